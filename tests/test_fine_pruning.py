"""Fine-Pruning and the channel masks under it: planted channels, the curve against one net at a
time, what stays frozen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import relu
from planted import Normed

from bdjax import channels, train
from bdjax.analysis.sensitivity import Sensitivity
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.models import conv as convolutions
from bdjax.models.layers import Net, build, conv, dense, site
from bdjax.registry import make, pytree
from bdjax.train import Recipe, advance, begin, clean_set, evaluate, predict, stamped, unit
from bdjax.types import BadInput, Split

KEY = jax.random.key(0)


@pytree
class Planted(Net):
    def layers(self, x, train, classes):
        return dense(site("conv_last", relu(conv(x, 4, 3, "conv"))).max((1, 2)), classes, "logits")


@pytest.fixture(scope="module")
def clean(sample):
    return jax.tree.map(jnp.asarray, sample.test[:200])


@pytest.fixture(scope="module")
def tiny(sample):
    model = build(Normed(), sample.shape, 10)
    return model, jax.jit(model.init)(KEY)


def test_a_planted_backdoor_channel_is_pruned_and_nothing_else(clean):
    """Channel 2 fires on a white 3×3 square, which half-bright images do not have; the others carry
    the clean labels.
    """
    model = build(Planted(), (28, 28, 1), 10)
    edge = jnp.tile(jnp.asarray([1.0, 0.0, -1.0]), (3, 1))
    kernel = jnp.stack([edge, edge.T, jnp.ones((3, 3)), jnp.full((3, 3), 0.3)], -1)[:, :, None]
    head = jnp.eye(4, 10).at[2].set(0.0).at[2, 7].set(1e4)
    params = {
        "conv": {"kernel": kernel, "bias": jnp.zeros(4).at[2].set(-8.5)},
        "logits": {"kernel": head, "bias": jnp.zeros(10)},
    }
    variables = {"params": params}
    half = unit(clean.image) / 2
    label = predict(model, variables, half).argmax(-1)
    trojaned = half.at[:, 20:23, 20:23].set(1.0)
    assert (predict(model, variables, trojaned).argmax(-1) == 7).all() and (label != 7).all()

    defense = FinePruning(max_drop=0.0, recipe=Recipe(epochs=0))
    repaired, info = jax.jit(lambda v: defense(KEY, model, v, Split(half, label)))(variables)
    assert info["order"][0] == 2 and info["activation"][2] == 0 and info["pruned"] == 1
    assert info["curve"][0] == info["curve"][1] == 1.0 > info["curve"][2]
    np.testing.assert_array_equal(repaired["masks"]["conv_last"], [1, 1, 0, 1])
    np.testing.assert_array_equal(predict(model, repaired, trojaned).argmax(-1) == 7, False)


def test_activation_order_and_curve_equal_one_net_at_a_time(tiny, clean):
    model, variables = tiny
    act = np.asarray(model.apply(variables, unit(clean.image)).acts["conv_last"])
    mean = channels.channel_means(model, variables, "conv_last", clean.image, batch=80)
    np.testing.assert_allclose(mean, act.mean((0, 1, 2)), rtol=1e-4)
    order = jnp.argsort(mean)
    label = clean.label.at[:50].set(-1)
    got = jax.jit(
        lambda v: channels.curve(model, v, "conv_last", order, clean.image, label, batch=80)
    )(variables)
    for count in range(9):
        masked = {**variables, "masks": {"conv_last": jnp.ones(8).at[order[:count]].set(0.0)}}
        right = predict(model, masked, clean.image).argmax(-1)[50:] == label[50:]
        assert float(right.mean()) == pytest.approx(float(got[count]), abs=1e-6)


def test_what_stands_before_the_site_is_computed_once_a_batch(tiny, clean, monkeypatch):
    monkeypatch.setattr(train, "AT_ONCE", 200)
    monkeypatch.setattr(convolutions, "_by_patches", lambda *_: False)  # to be told by its name
    model, variables = tiny
    order = jnp.arange(8)
    run = jax.jit(lambda v: channels.curve(model, v, "conv_last", order, clean.image, clean.label))
    text = run.lower(variables).compile().as_text()
    assert (
        sum(
            "convolution" in line and "f32[200,28,28" in line.partition("=")[2][:20]
            for line in text.splitlines()
        )
        == 1
    )


def test_the_budget_rule():
    points = jnp.asarray([0.90, 0.91, 0.88, 0.86, 0.85, 0.90, 0.10])
    counts = jax.vmap(lambda drop: channels.largest_within(points, drop))(
        jnp.asarray([0.0, 0.02, 0.04, 0.05, 1.0])
    )
    # The point at 5 never helps a budget that 4 exceeds.
    np.testing.assert_array_equal(counts, [1, 2, 3, 5, 6])


def test_pruned_channels_stay_frozen_at_zero_through_fine_tuning(tiny, clean):
    """Also behind BatchNorm, and together with a mask that the net came with."""
    model, variables = tiny
    before = channels.prune(variables, "conv_last", jnp.ones(8).at[5].set(0.0))
    defense = FinePruning(share=0.5, recipe=Recipe(epochs=3, batch=50))
    after, info = jax.jit(lambda v: defense(KEY, model, v, clean))(before)
    assert info["order"][0] == 5 and info["pruned"] == 4
    gone = np.asarray(info["order"][:4])
    left = np.asarray(info["order"][4:])
    np.testing.assert_array_equal(np.flatnonzero(after["masks"]["conv_last"] == 0), np.sort(gone))
    moved = [
        np.abs(after["params"][n][p] - variables["params"][n][p])
        for n, p in (("conv", "kernel"), ("norm", "scale"))
    ]
    moved.append(
        np.abs(after["params"]["logits"]["kernel"] - variables["params"]["logits"]["kernel"])
        .reshape(-1, 8, 10)
        .sum(2)
    )
    for change in moved:
        assert (change[..., gone] == 0).all() and (
            change[..., left].max(tuple(range(change.ndim - 1))) > 0
        ).all()
    acts = model.apply(after, unit(clean.image)).acts["conv_last"]
    assert (acts[..., gone] == 0).all() and (acts[..., left].max((0, 1, 2)) > 0).all()
    assert info["acc"][-1] > info["acc"][0]


def test_budgets_vmap(victim, clean):
    model, variables, _ = victim
    recipe = Recipe(epochs=1, batch=50)
    run = jax.jit(
        lambda drop: FinePruning(max_drop=drop, recipe=recipe)(KEY, model, variables, clean)
    )
    drops = jnp.asarray([0.0, 0.02, 0.5])
    together = jax.jit(jax.vmap(run))(drops)
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), *[run(drop) for drop in drops])
    np.testing.assert_array_equal(together.info["pruned"], alone.info["pruned"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        together.variables,
        alone.variables,
    )


def test_on_a_real_victim(victim, sample):
    model, variables, attack = victim
    defense = FinePruning(recipe=Recipe(epochs=0))
    repaired, info = jax.jit(lambda v: defense(KEY, model, v, sample.clean))(variables)
    k, points = int(info["pruned"]), np.asarray(info["curve"])
    assert (
        0 < k < 64
        and (points[: k + 1] >= points[0] - 0.0401).all()
        and points[k + 1] < points[0] - 0.0399
    )
    kept = predict(model, repaired, sample.clean.image).argmax(-1) == sample.clean.label
    assert float(kept.mean()) == pytest.approx(points[k], abs=1e-6)
    # The curve over stamped images says what evaluate measures on the repaired net.
    aimed = jnp.where(sample.test.label == 3, -1, 3)
    x = stamped(attack, 1, sample.test.image, KEY)
    asr = jax.jit(lambda v: channels.curve(model, v, "penultimate", info["order"], x, aimed))(
        variables
    )
    measured = jax.jit(lambda v: evaluate(KEY, model, v, sample.test, attack))(repaired)
    assert float(asr[k]) == pytest.approx(float(measured["asr_nt"]), abs=1e-6)
    assert asr[0] > 0.9


@pytest.mark.parametrize("reset", [None, "conv"])
def test_one_channel_at_a_time_equals_a_plain_loop(tiny, clean, reset):
    """One optimiser throughout; channels that no clean image fires come last; with the quirk, the
    pruned convolution starts from the victim's parameters each time.
    """
    model, fresh = tiny
    variables = jax.tree.map(jnp.asarray, fresh)
    variables["params"]["norm"]["bias"] = jnp.zeros(8).at[jnp.asarray([1, 6])].set(-100.0)  # asleep
    recipe = Recipe(lr=1e-3, epochs=2, batch=50)
    defense = FinePruning(one_by_one=3, recipe=recipe, reset=reset)
    defense.check(model, clean)
    got, info = jax.jit(lambda v: defense(KEY, model, v, clean))(variables)
    order = np.asarray(info["order"])
    assert set(order[-2:]) == {1, 6} and (np.diff(info["activation"][order[:6]]) >= 0).all()
    assert info["loss"].shape == info["acc"].shape == (3, 2) and info["pruned"] == 3
    assert (np.asarray(got["masks"]["conv_last"]) == 0).nonzero()[0].tolist() == sorted(order[:3])

    step = jax.jit(lambda s: advance(KEY, s, model, recipe, clean_set(clean), epochs=2)[0])
    state = begin(KEY, model, recipe, channels.prune(variables, "conv_last", jnp.ones(8)))
    for channel in order[:3]:
        net = dict(channels.prune(state.variables, "conv_last", jnp.ones(8).at[channel].set(0.0)))
        if reset is not None:
            net["params"] = {**net["params"], "conv": variables["params"]["conv"]}
        state = step(state._replace(variables=net))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, dict(state.variables)
    )


@pytest.mark.long
def test_the_grid_is_what_single_runs_measure(victim, clean, sample):
    """Rows are learning rates, columns counts of pruned channels; under `one_by_one` a count of 0
    is the victim.
    """
    model, variables, attack = victim
    recipe = Recipe(epochs=1, batch=50)
    measure = jax.jit(lambda v: evaluate(KEY, model, v, sample.test, attack))
    lrs, counts = jnp.asarray([1e-3, 1e-2]), (0, 2, 1)
    for defense in (FinePruning(recipe=recipe), FinePruning(recipe=recipe, one_by_one=2)):
        run = jax.jit(
            lambda v, d=defense: d.grid(KEY, model, v, clean, sample.test, attack, lrs, counts)
        )
        got = run(variables)
        assert set(got) == {"acc", "asr_all", "asr_nt"} and got["acc"].shape == (2, 3)
        for i, lr in enumerate(lrs):
            one = dataclasses.replace(defense, recipe=dataclasses.replace(recipe, lr=lr))
            if defense.one_by_one is None:
                one = dataclasses.replace(one, share=2 / 64)
            alone = measure(jax.jit(lambda v, d=one: d(KEY, model, v, clean))(variables).variables)
            for name, table in got.items():
                assert float(table[i, 1]) == pytest.approx(float(alone[name]), abs=0.005), (
                    name,
                    lr,
                )
        if defense.one_by_one is not None:
            before = measure(variables)
            assert all((table[:, 0] == before[name]).all() for name, table in got.items())


def test_the_curve_over_the_learning_rate_is_a_row_of_the_grid(victim, clean, sample):
    model, variables, attack = victim
    defense, lrs = FinePruning(share=2 / 64, recipe=Recipe(epochs=1, batch=50)), (1e-3, 1e-2)
    found, row = jax.jit(
        lambda v: (
            Sensitivity(defense, lrs)(KEY, model, v, attack, clean, sample.test),
            defense.grid(KEY, model, v, clean, sample.test, attack, jnp.asarray(lrs), (2,)),
        )
    )(variables)
    for name in ("acc", "asr_all", "asr_nt"):
        np.testing.assert_allclose(found[name], row[name][:, 0], atol=0.005)
    assert [found[f"asr_nt_at_{lr:g}"] for lr in lrs] == found["asr_nt"].tolist()
    with pytest.raises(BadInput, match="Strip names no number"):
        Sensitivity(Strip(), lrs)(KEY, model, variables, attack, clean, sample.test)


def test_bad_input(tiny, clean):
    model, _ = tiny
    with pytest.raises(BadInput, match="no site 'conv_9'"):
        FinePruning(site="conv_9").check(model, clean)
    with pytest.raises(BadInput, match=r"max_drop 4 is outside"):
        FinePruning(max_drop=4).check(model, clean)
    with pytest.raises(BadInput, match="share"):
        FinePruning(share=1.5).check(model, clean)
    with pytest.raises(BadInput, match="batch"):
        FinePruning(recipe=Recipe(batch=0)).check(model, clean)
    with pytest.raises(
        BadInput, match="reset 'conv_9' needs one_by_one and one of the layers conv, logits, norm"
    ):
        FinePruning(one_by_one=1, reset="conv_9").check(model, clean)
    with pytest.raises(BadInput, match="one_by_one"):
        FinePruning(reset="conv").check(model, clean)
    with pytest.raises(BadInput, match="one_by_one 0"):
        FinePruning(one_by_one=0).check(model, clean)
    for preset in ("paper", "csaw", "cpu"):
        make("defense", "fine-pruning", preset).check(model, clean)
