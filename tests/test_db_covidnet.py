"""DB-COVIDNet: who sees which block, votes by hand, and that a member never sees more than its
view.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.badnets import BadNets
from bdjax.checkpoints import load_model, save_model
from bdjax.defenses.parts.view import viewed
from bdjax.defenses.train.db_covidnet import (
    TIE,
    DbCovidNet,
    Vote,
    assign,
    blocks_of,
    combine,
    ensemble,
    resample,
)
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import make
from bdjax.train import Recipe, clean_set, evaluate, poisoned_set, predict, unit
from bdjax.types import BadInput, Plan

KEY = jax.random.key(0)
RECIPE = Recipe(lr=2e-3, epochs=4, batch=32)


@pytest.fixture(scope="module")
def model(sample):
    return build(Ffnn(hidden=(32,), links="chain"), sample.shape, 10)


@pytest.fixture(scope="module")
def trained(model, sample):
    """Ten members on an attacked training set."""
    attack = BadNets(target=3)
    data = poisoned_set(KEY, sample.train, attack, 10)
    defense = DbCovidNet(vote="median")
    voting = defense.wrap(model)

    def run(key):
        out = defense(key, model, RECIPE, data, sample.clean)
        return out.variables, out.info, evaluate(key, voting, out.variables, sample.test, attack)

    run = jax.jit(run)
    return (*run(KEY), voting, run)


def test_partitions():
    grid = np.asarray(blocks_of(KEY, (28, 28, 1), (4, 4), "grid"))
    assert (
        (grid[21:, 21:] == 15).all()
        and (grid[:7, 7:14] == 1).all()
        and (np.bincount(grid.reshape(-1)) == 49).all()
    )
    stripes = np.asarray(blocks_of(KEY, (7, 5, 3), (7, 1), "grid"))
    np.testing.assert_array_equal(stripes, np.arange(7)[:, None].repeat(5, 1))
    random = np.asarray(blocks_of(KEY, (28, 28, 1), (4, 4), "random"))
    assert (np.bincount(random.reshape(-1)) == 49).all() and (random != grid).mean() > 0.8
    ragged = np.bincount(np.asarray(blocks_of(KEY, (10, 7, 1), (3, 2), "grid")).reshape(-1))
    assert ragged.sum() == 70 and ragged.min() >= 9


@pytest.mark.parametrize(("members", "keep", "blocks"), [(10, 4, 16), (7, 5, 12)])
def test_every_block_is_seen_by_fewer_than_half(members, keep, blocks):
    kept = jax.jit(jax.vmap(lambda k: assign(k, members, blocks, keep)))(jax.random.split(KEY, 50))
    assert (kept.sum(2) == keep).all()
    seen = kept.sum(1)
    assert seen.max() == -(-members * keep // blocks) < members / 2 and seen.max() - seen.min() <= 1


def test_an_unlucky_draw_has_no_such_bound():
    kept = jax.vmap(lambda k: assign(k, 10, 16, 6, balanced=False))(jax.random.split(KEY, 200))
    assert (kept.sum(2) == 6).all() and (kept.sum(1) >= 5).mean() > 0.1
    many = jax.jit(jax.vmap(lambda keep: assign(KEY, 10, 16, keep).sum(1)))(jnp.arange(1, 5))
    np.testing.assert_array_equal(many, np.arange(1, 5)[:, None].repeat(10, 1))


def test_votes_by_hand():
    p = jnp.asarray(
        [[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.0, 0.1, 0.9], [0.0, 0.2, 0.8]]
    )[:, None]
    np.testing.assert_allclose(combine(p, "mean")[0], [0.24, 0.3, 0.46], atol=1e-6)
    majority = (1 - TIE) * np.asarray([0.4, 0.2, 0.4]) + TIE * np.asarray([0.24, 0.3, 0.46])
    np.testing.assert_allclose(combine(p, "majority")[0], majority, atol=1e-6)
    assert combine(p, "majority")[0].argmax() == 2  # Two votes each for 0 and 2: the mean decides.
    np.testing.assert_allclose(
        combine(p, "median")[0], np.asarray([0.1, 0.3, 0.4]) / 0.8, atol=1e-6
    )
    np.testing.assert_allclose(
        combine(p, "trimmed")[0], np.asarray([0.2, 0.3, 1.4 / 3]) / (0.5 + 1.4 / 3), atol=1e-6
    )
    even = combine(p[1:], "median")[0]  # of four members: between the middle two
    np.testing.assert_allclose(even, np.asarray([0.05, 0.25, 0.6]) / 0.9, atol=1e-6)


def test_an_ensemble_of_one_is_the_masked_net(model, sample):
    view = jnp.zeros(sample.shape).at[:14].set(1.0)
    variables = jax.jit(model.init)(KEY)
    stacked = jax.tree.map(lambda leaf: leaf[None], {**variables, "view": view})
    x = unit(sample.test.image[:40])
    plain = model.apply(variables, x * view[None]).logits
    for vote in get_args(Vote):
        out = ensemble(viewed(model), 1, vote).apply(stacked, x)
        np.testing.assert_array_equal(out.logits.argmax(-1), plain.argmax(-1))
        np.testing.assert_array_equal(out.acts["votes"][:, 0], plain.argmax(-1))
        if vote != "majority":
            np.testing.assert_allclose(jax.nn.softmax(out.logits), jax.nn.softmax(plain), atol=1e-5)


def test_votes_are_the_members_and_logits_the_vote(trained, model, sample):
    variables, _, _, voting, _ = trained
    x = unit(sample.test.image[:30])
    out = voting.apply(variables, x)
    each = [jax.tree.map(lambda leaf, k=k: leaf[k], variables) for k in range(10)]
    p = jnp.stack([jax.nn.softmax(viewed(model).apply(v, x).logits) for v in each])
    np.testing.assert_array_equal(out.acts["votes"], p.argmax(-1).T)
    np.testing.assert_allclose(jax.nn.softmax(out.logits), combine(p, "median"), atol=1e-5)
    side_by_side = ensemble(viewed(model), 10, "median", 10).apply(variables, x)
    np.testing.assert_allclose(
        jax.nn.softmax(side_by_side.logits), jax.nn.softmax(out.logits), atol=1e-5
    )
    assert voting.sites == ("votes",) and set(out.acts) == {"votes"}


def test_a_member_sees_its_blocks_only(trained, sample):
    variables, info, _, voting, _ = trained
    block = np.asarray(blocks_of(KEY, sample.shape, (4, 4), "grid"))
    np.testing.assert_array_equal(variables["view"][..., 0], np.asarray(info["blocks"])[:, block])
    assert (info["seen"] == info["blocks"].sum(0)).all() and info["seen"].max() == 3
    x = unit(sample.test.image[:100])
    stamped = x.at[:, 23:, 23:].set(1.0)
    before, after = (voting.apply(variables, v).acts["votes"] for v in (x, stamped))
    changed = np.asarray((before != after).any(0))
    np.testing.assert_array_equal(changed[~np.asarray(info["blocks"][:, 15])], False)


def test_it_holds_off_a_trigger_within_one_block(trained):
    _, info, measured, *_ = trained
    assert measured["acc"] > 0.65 and measured["asr_nt"] < 0.5
    assert (
        info["acc"].shape == info["loss"].shape == (10, 4)
        and (info["acc"][:, -1] > info["acc"][:, 0]).all()
    )


def test_seeds_vmap(trained):
    *_, run = trained
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(run))(keys)
    for i in range(2):
        _, info, measured = run(keys[i])
        np.testing.assert_array_equal(info["blocks"], together[1]["blocks"][i])
        np.testing.assert_allclose(info["loss"], together[1]["loss"][i], atol=0.02)
        assert float(measured["acc"]) == pytest.approx(float(together[2]["acc"][i]), abs=0.02)


def test_a_bootstrap_draws_existing_rows_with_replacement():
    n = 3000
    rows = jnp.arange(2 * n)
    plan = Plan(rows, rows % 3, rows % 7, rows.astype(jnp.float32), rows + 5, jnp.asarray(n))
    drawn = resample(KEY, plan)
    assert drawn.size == n and drawn.source.max() < n
    np.testing.assert_array_equal(drawn.kind, drawn.source % 3)
    np.testing.assert_array_equal(drawn.label, drawn.source % 7)
    np.testing.assert_array_equal(drawn.weight, drawn.source)
    np.testing.assert_array_equal(drawn.number, drawn.source + 5)
    assert len(np.unique(drawn.source[:n])) / n == pytest.approx(1 - np.exp(-1), abs=0.02)


def test_without_bootstrap_and_masks_members_differ_in_their_seed_alone(model, sample):
    defense = DbCovidNet(
        members=2, keep=16, design="random", bootstrap=False, scale=True, vote="mean"
    )
    data = clean_set(sample.train)
    out = jax.jit(
        lambda: defense(KEY, model, Recipe(epochs=1, batch=50), data, sample.clean).variables
    )()
    assert (out["view"] == 1).all() and (
        out["params"]["logits"]["kernel"][0] != out["params"]["logits"]["kernel"][1]
    ).any()


def test_bad_input(model, sample):
    cases = (
        ({"keep": 8}, "5 of 10 members would see one block"),
        ({"keep": 0}, "keep 0"),
        ({"members": 0}, "members 0"),
        ({"grid": (40, 1)}, "grid"),
        ({"vote": "loudest"}, "vote 'loudest'"),
    )
    for fields, message in cases:
        with pytest.raises(BadInput, match=message):
            DbCovidNet(**fields).check(model, sample.clean)
    make("defense", "db-covidnet", "cpu").check(model, sample.clean)
    DbCovidNet(keep=8, design="random").check(model, sample.clean)
    with pytest.raises(BadInput, match="run this defense on its members"):
        ensemble(model, 1, "mean").apply({"masks": {}}, unit(sample.test.image[:2]))


def test_a_saved_ensemble_is_loaded_as_one(trained, sample, tmp_path):
    variables, _, _, voting, _ = trained
    about = {"defenses": (DbCovidNet(vote="median"),)}
    save_model(tmp_path / "saved", Ffnn(hidden=(32,), links="chain"), voting, variables, **about)
    _, again, loaded, _ = load_model(tmp_path / "saved")
    x = unit(sample.test.image[:30])
    np.testing.assert_array_equal(again.apply(loaded, x).logits, voting.apply(variables, x).logits)


def test_predict_takes_an_ensemble(trained, sample):
    variables, _, measured, voting, _ = trained
    label = predict(voting, variables, sample.test.image).argmax(-1)
    assert float((label == sample.test.label).mean()) == pytest.approx(
        float(measured["acc"]), abs=1e-6
    )
