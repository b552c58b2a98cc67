"""MNTD: what jumbo learning draws, planted families of nets told apart, what each variant learns,
real shadow nets.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import metrics
from bdjax.defenses.models.mntd import Jumbo, Meta, Mntd, best_threshold, jumbo, one_class, score
from bdjax.mesh import lane_map
from bdjax.models.layers import Net, build, dense, dropout, site
from bdjax.registry import describe, pytree, revive
from bdjax.train import Recipe, clean_set, fit
from bdjax.types import BadInput, Model, Output, Split

KEY = jax.random.key(0)
SHAPE, CLASSES = (6, 6, 1), 3


@pytree
class Linear(Net):
    def layers(self, x, train, classes):
        x = site("penultimate", x.reshape(x.shape[0], -1))
        return dense(dropout(x, 0.5, train), classes, "logits")


@pytest.fixture(scope="module")
def model():
    return build(Linear(), SHAPE, CLASSES)


def families(key, nets):
    """Linear nets of random weights;
    in every second one the last pixel speaks for a random class.
    """
    keys = jax.random.split(key, 2)
    guilty = jnp.arange(nets) % 2
    kernel = 0.3 * jax.random.normal(keys[0], (nets, 36, CLASSES))
    target = jax.nn.one_hot(jax.random.randint(keys[1], (nets,), 0, CLASSES), CLASSES)
    kernel = kernel.at[:, -1].add(3.0 * guilty[:, None].astype(jnp.float32) * target)
    return {"params": {"logits": {"kernel": kernel, "bias": jnp.zeros((nets, CLASSES))}}}, guilty


@pytest.mark.parametrize("channels", [1, 3])
def test_jumbo_draws_what_the_paper_draws(channels):
    shape = (12, 10, channels)
    draws = jax.jit(jax.vmap(lambda k: jumbo(k, shape, 7)))(jax.random.split(KEY, 400))
    mask, pattern, alpha = (np.asarray(leaf) for leaf in (draws.mask, draws.pattern, draws.alpha))
    rows, cols = mask[..., 0].any(2).sum(1), mask[..., 0].any(1).sum(1)
    whole = rows == 12
    assert (mask.sum((1, 2, 3)) == rows * cols).all() and (
        (rows == cols) | (whole & (cols == 10))
    ).all()
    counts = [(rows == size).sum() for size in (2, 3, 4, 5)] + [whole.sum()]
    assert sum(counts) == 400 and min(counts) > 50
    first = mask[..., 0].any(2).argmax(1)[rows == 2]
    assert set(first) == set(range(11))  # flush with either edge, and everything between
    assert ((alpha[whole] >= 0.05) & (alpha[whole] <= 0.2)).all()
    patch = alpha[~whole]
    assert (((patch >= 0.2) & (patch <= 0.5)) | (patch == 1)).all() and 0.15 < (
        patch == 1
    ).mean() < 0.35
    assert ((draws.rate >= 0.05) & (draws.rate <= 0.5)).all() and set(
        np.asarray(draws.target)
    ) == set(range(7))
    assert ((pattern >= 0) & (pattern <= 1)).all()
    if channels == 1:
        on = pattern.sum((1, 2, 3))
        assert np.isin(pattern, (0, 1)).all() and (pattern <= mask).all()
        assert ((on >= 1) & (on < mask.sum((1, 2, 3)))).all()


def test_the_stamp_is_exact_and_the_rows_are_appended():
    mask = jnp.zeros((4, 4, 1)).at[1:3, 1:3].set(1.0)
    attack = Jumbo(rate=0.5, target=2, mask=mask, pattern=jnp.ones((4, 4, 1)), alpha=0.25)
    x = jnp.full((4, 4, 1), 0.4)
    stamped = attack.stamp(jnp.asarray(1), x, KEY)
    np.testing.assert_allclose(stamped, x + mask * (0.25 * 1.0 - 0.25 * 0.4), atol=1e-7)
    plan = attack.plan(KEY, jnp.arange(8) % 4, 4)
    assert (
        plan.size == 12
        and (plan.kind[:8] == 0).all()
        and (plan.kind[8:12] == 1).all()
        and (plan.label[8:12] == 2).all()
    )
    clean = dataclasses.replace(attack, rate=0.0).plan(KEY, jnp.arange(8) % 4, 4)
    assert clean.size == 8


@pytest.fixture(scope="module")
def trained(model):
    """Meta-classifiers, each learned from 96 planted nets."""
    nets, guilty = families(KEY, 96)
    pixels = jax.random.uniform(KEY, (20, *SHAPE))

    @functools.cache
    def learn(defense, seed=1):
        return compiled(defense)(jax.random.key(seed))

    @functools.cache
    def compiled(defense):
        return jax.jit(lambda k: defense.train_meta(k, model, nets, guilty, pixels))

    return learn


def test_planted_families_are_told_apart_by_tuned_queries(model, trained):
    params, loss = trained(Mntd(meta=Recipe(lr=1e-2, epochs=20, batch=1)))
    held, guilty = families(jax.random.key(9), 40)
    unused = {name: jnp.zeros(()) for name in ("threshold", "auroc", "shadow_acc", "loss")}
    learned = Meta(**params, **unused)
    scores = jax.vmap(lambda v: learned.score(model, v))(held)
    assert metrics.auroc(scores, scores, guilty == 0, guilty == 1) > 0.95 and loss[-1] < loss[0] / 5
    # The queries were tuned to the planted pixel: it is where they differ most from the other
    # pixels.
    size = (
        jnp.abs(params["queries"] - params["queries"].mean((1, 2, 3), keepdims=True))
        .mean((0, 3))
        .reshape(-1)
    )
    assert size.argmax() == 35


@pytest.mark.parametrize(
    ("fields", "fixed"),
    [
        ({}, ()),
        ({"tune": False}, ("queries",)),
        ({"variant": "robust"}, ("kernel", "bias", "weight", "offset")),
        ({"variant": "one-class"}, ("offset",)),
    ],
)
def test_each_variant_learns_what_it_should(trained, fields, fixed):
    before, _ = trained(Mntd(meta=Recipe(epochs=0)))
    after, _ = trained(Mntd(meta=Recipe(epochs=1, batch=4), **fields))
    for name in before:
        assert bool((before[name] == after[name]).all()) == (name in fixed), name
    other, _ = trained(Mntd(meta=Recipe(epochs=0)), 5)
    # what the robust variant hides from attackers
    assert not np.allclose(other["kernel"], before["kernel"])


def test_one_class_knows_benign_nets_from_others(model):
    """Benign nets are alike, up to noise; it has never seen one that is not."""
    keys = jax.random.split(KEY, 3)
    common = jax.random.normal(keys[0], (1, 36, CLASSES))

    def nets(kernel):
        return {
            "params": {"logits": {"kernel": kernel, "bias": jnp.zeros((kernel.shape[0], CLASSES))}}
        }

    benign = common + 0.3 * jax.random.normal(keys[1], (44, 36, CLASSES))
    others = jax.random.normal(keys[2], (20, 36, CLASSES))
    defense = Mntd(variant="one-class", meta=Recipe(lr=3e-3, epochs=20, batch=1))
    params, _ = jax.jit(
        lambda v: defense.train_meta(
            KEY, model, v, jnp.zeros(24, jnp.int32), jax.random.uniform(KEY, (20, *SHAPE))
        )
    )(nets(benign[:24]))
    judge = jax.vmap(lambda v: score(params, model, v, defense.answers))
    assert metrics.auroc(judge(nets(benign[24:])), judge(nets(others))) > 0.95


def test_the_one_class_loss_by_hand():
    params = {
        "kernel": jnp.asarray([[1.0, 2.0]]),
        "bias": jnp.asarray([3.0]),
        "weight": jnp.asarray([1.0]),
    }
    logits = jnp.asarray([[0.0, 0.5], [0.0, -2.0]])
    model = Model(lambda k: {}, lambda v, x, **_: Output(logits, {}, v), (1, 1, 1), 2, ())
    x = jnp.asarray([0, 3])
    loss, out = one_class(0.5)(
        model, {"params": params, "seen": jnp.full(4, jnp.nan)}, x, x, x, KEY
    )
    # nothing seen yet: t = −1
    assert float(loss) == pytest.approx(15 / 2 + (1.5 + 0.0) / 2 / 0.5 - 1)
    np.testing.assert_array_equal(out.variables["seen"], [0.5, np.nan, np.nan, -2.0])
    seen = jnp.asarray([-1.0, jnp.nan, -3.0, jnp.nan])
    loss, _ = one_class(0.5)(model, {"params": params, "seen": seen}, x, x, x, KEY)
    # t = the median of −1 and −3
    assert float(loss) == pytest.approx(15 / 2 + (2.5 + 0.0) / 2 / 0.5 - 2)


def test_the_threshold_lies_between_the_families():
    guilty = jnp.asarray([0, 1, 0, 1, 0])
    assert best_threshold(jnp.asarray([0.0, 10.0, 1.0, 11.0, 2.0]), guilty) == 6.0
    # One benign net above two trojaned ones: it is given up, not they.
    assert best_threshold(jnp.asarray([0.0, 10.0, 1.0, 11.0, 12.0]), guilty) == 5.5


@pytest.mark.parametrize("answers", ["probabilities", "logits"])
def test_a_net_is_judged_by_its_answers_in_evaluation_mode(model, answers):
    """Released code leaves dropout on while it judges, and reads logits: what is added to all of
    them changes no answer, yet the score.
    """
    variables = jax.tree.map(lambda leaf: leaf[0], families(KEY, 2)[0])
    shapes = {"queries": (2, *SHAPE), "kernel": (6, 4), "bias": (4,), "weight": (4,), "offset": ()}
    parts = {
        n: jax.random.normal(jax.random.fold_in(KEY, i), s)
        for i, (n, s) in enumerate(shapes.items())
    }
    parts["bias"] += 3.0  # no unit sleeps
    learned = Meta(
        **parts,
        threshold=jnp.asarray(0.0),
        auroc=jnp.ones(()),
        shadow_acc=jnp.ones(()),
        loss=jnp.zeros(2),
        answers=answers,
    )
    defense = Mntd(learned=learned, answers=answers)
    clean = Split(jnp.zeros((1, *SHAPE)), jnp.zeros(1, jnp.int32))
    verdict = defense(KEY, model, variables, clean)
    f = np.asarray(parts["queries"]).reshape(2, 36) @ np.asarray(
        variables["params"]["logits"]["kernel"]
    )
    if answers == "probabilities":
        f = np.exp(f) / np.exp(f).sum(-1, keepdims=True)
    hidden = np.maximum(f.reshape(6) @ np.asarray(parts["kernel"]) + parts["bias"], 0)
    assert float(verdict.index) == pytest.approx(
        float(hidden @ parts["weight"] + parts["offset"]), rel=1e-4
    )
    assert (
        verdict.infected == (verdict.index > 0)
        and not verdict.flagged.any()
        and verdict.flagged.shape == (3,)
    )
    logits = variables["params"]["logits"]
    lifted = {"params": {"logits": {**logits, "bias": logits["bias"] + 3.0}}}
    same = np.isclose(learned.score(model, lifted), verdict.index, rtol=1e-4)
    assert same == (answers == "probabilities")
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, variables)
    assert jnp.isnan(defense(KEY, model, broken, clean).index)
    # A prepared defense can be saved with what it judged.
    arrays: dict = {}
    again = revive("defense", describe(defense, arrays), arrays)
    assert float(again(KEY, model, variables, clean).index) == pytest.approx(
        float(verdict.index), rel=1e-6
    )


@pytest.fixture(scope="module")
def prepared(sample, victim):
    defense = Mntd(
        shadows=24,
        validation=8,
        recipe=Recipe(epochs=25, batch=50),
        meta=Recipe(epochs=20, batch=1),
    )
    defense.check(victim[0], sample.clean)
    return defense, jax.jit(lambda k: defense.prepare(k, victim[0], sample.clean))(
        jax.random.key(3)
    )


def test_real_shadow_nets_convict_the_real_victim(prepared, victim, sample):
    _, ready = prepared
    model, variables, _ = victim
    assert ready.learned.auroc > 0.8 and ready.learned.shadow_acc > 0.6
    assert ready.learned.loss[-1] < ready.learned.loss[0]

    def twin(key):
        return fit(key, model, Recipe(epochs=5, batch=32), clean_set(sample.train))[0]

    twins = jax.jit(lambda keys: lane_map(twin, keys))(jax.random.split(KEY, 4))
    judge = jax.jit(lambda v: ready(KEY, model, v, sample.clean))
    clean = jax.jit(lambda v: lane_map(lambda v: ready(KEY, model, v, sample.clean).index, v))(
        twins
    )
    verdict = judge(variables)
    assert verdict.index > clean.max() and verdict.info["threshold"] == ready.learned.threshold


def test_unprepared_it_prepares_itself(model):
    pixels = jax.random.randint(KEY, (40, *SHAPE), 0, 256).astype(jnp.uint8)
    clean = Split(pixels, jnp.arange(40) % 3)
    small = {
        "recipe": Recipe(epochs=1, batch=10),
        "meta": Recipe(epochs=2, batch=2),
        "variant": "one-class",
    }
    defense = Mntd(shadows=3, validation=2, **small)
    variables = jax.tree.map(lambda leaf: leaf[1], families(KEY, 2)[0])
    ready = jax.jit(lambda k: defense.prepare(k, model, clean))(KEY)
    whole = jax.jit(lambda k: defense(k, model, variables, clean))(KEY)
    np.testing.assert_allclose(ready(KEY, model, variables, clean).index, whole.index, rtol=1e-5)
    assert jnp.isnan(whole.info["shadow_auroc"]), "no trojaned shadow nets, no AUROC"
    assert jnp.isfinite(whole.info["threshold"])


def test_bad_input(model):
    clean = Split(np.zeros((40, *SHAPE), np.uint8), np.zeros(40, np.int32))
    small = Recipe(epochs=1, batch=10)
    for fields, message in (
        ({"variant": "two-class"}, "variant 'two-class'"),
        ({"shadows": 0}, "shadows 0"),
        ({"queries": 0}, "queries 0"),
        ({"nu": 0.0}, "nu 0.0 is outside"),
        ({"recipe": Recipe(epochs=0)}, "at least 1 epoch"),
        ({"variant": "robust", "tune": False}, "leave tune at True"),
    ):
        with pytest.raises(BadInput, match=message):
            Mntd(**{"recipe": small, **fields}).check(model, clean)
    with pytest.raises(BadInput, match="too small for patches"):
        Mntd(recipe=small).check(build(Linear(), (4, 4, 1), 3), clean)
