"""MESA: its entropy estimator against a known information, its generator on a known distribution,
its repair.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdjax.defenses.invert import mesa
from bdjax.defenses.invert.mesa import (
    Estimator,
    Mesa,
    Statistic,
    information,
    mine_loss,
    mine_rule,
    stick,
    stick_each,
)
from bdjax.defenses.parts.inversion import descend
from bdjax.defenses.repair.mesa_retraining import MesaRetraining, Patches
from bdjax.train import Recipe, predict
from bdjax.types import BadInput, Model, Output, Split

KEY = jax.random.key(0)
SIDE, CLASSES, TARGET, EDGE = 8, 3, 2, 0.6


def apply(variables, x, *, train=False, edits=None, key=None):
    """Labels 0 and 1: the brighter half. Label 2: any pixel above 0.6."""
    p = variables["params"]
    halves = p["gain"] * jnp.stack([x[:, :, :4].mean((1, 2, 3)), x[:, :, 4:].mean((1, 2, 3))], 1)
    return Output(
        jnp.concatenate([halves, p["backdoor"] * (x.max((1, 2, 3)) - EDGE)[:, None]], 1),
        {},
        variables,
    )


VARIABLES = {"params": {"gain": jnp.asarray(20.0), "backdoor": jnp.asarray(100.0)}}
MODEL = Model(lambda key: VARIABLES, apply, (SIDE, SIDE, 1), CLASSES, ())
LABEL = np.arange(250, dtype=np.int32) % 2
HALF = np.where((np.arange(SIDE) >= 4)[None] == LABEL[:, None], 0.3, 0.0)[:, None, :, None]
CLEAN = Split(np.broadcast_to(255 * HALF, (250, SIDE, SIDE, 1)).round().astype(np.uint8), LABEL)
QUICK = Mesa(alpha=1.0, side=1, hidden=32, noise_size=8, batch=50, epochs=75, lr=2e-3, noise=0.02)


@pytest.fixture(scope="module")
def found():
    run = jax.jit(lambda variables: QUICK(KEY, MODEL, variables, CLEAN))
    return {
        name: run(jax.tree.map(change, VARIABLES))
        for name, change in (("planted", lambda v: v), ("nan", _nan))
    }


def _nan(leaf):
    return leaf * jnp.nan


def test_estimator_finds_the_information_of_correlated_normals():
    rule = mine_rule(optax.adam(2e-3), 1e-2)
    statistic = Statistic(64)
    first = statistic.init(KEY, jnp.zeros((1, 1)), jnp.zeros((1, 1)))["params"]

    def fitted(rho):
        def pairs(weights, key):
            z, noise, other = jax.random.normal(key, (3, 512, 1))
            g = rho * z + jnp.sqrt(1 - rho**2) * noise
            return (statistic.apply({"params": weights}, one, g) for one in (z, other))

        def loss(params, key):
            return mine_loss(*pairs(params.statistic, key), params.average), None

        params = Estimator(first, jnp.ones(()))
        (params, _), _ = descend(loss, params, rule.init(params), jax.random.split(KEY, 800), rule)
        keys = jax.random.split(jax.random.key(1), 20)
        return jax.vmap(lambda k: information(*pairs(params.statistic, k)))(keys).mean()

    estimates = jax.jit(jax.vmap(fitted))(jnp.asarray([0.9, 0.0]))
    # I(z; g) = −½ log(1 − ρ²) nats for normals of correlation ρ.
    np.testing.assert_allclose(estimates, [-0.5 * np.log(1 - 0.81), 0], atol=0.08)


def test_moving_average_and_information_by_hand():
    joint, independent = jnp.asarray([1.0, 3.0]), jnp.log(jnp.asarray([2.0, 6.0]))
    assert float(information(joint, independent)) == pytest.approx(2 - np.log(4), rel=1e-5)
    assert float(mine_loss(joint, independent, jnp.asarray(2.0))) == pytest.approx(
        4 / 2 - 2 + (2 - 4) ** 2 / 2
    )
    params = Estimator((), jnp.asarray(2.0))
    rule = mine_rule(optax.adam(1.0), 0.25)
    loss = lambda p, _: (mine_loss(joint, independent, p.average), None)  # noqa: E731
    (params, _), _ = descend(loss, params, rule.init(params), jnp.zeros(2), rule)
    assert float(params.average) == pytest.approx(0.75 * (0.75 * 2 + 0.25 * 4) + 0.25 * 4)


def test_the_generator_moves_first_and_the_estimator_on_noise_of_its_own(monkeypatch):
    drawn, turns = [], []

    def uniform(key, shape, of=jax.random.uniform):
        drawn.append(of(key, shape))
        return drawn[-1]

    def turn(loss, params, opt_state, items, rule):
        turns.append(type(params).__name__)
        drawn.clear()
        out = descend(loss, params, opt_state, items, rule)
        turns.append(len(drawn))
        return out

    monkeypatch.setattr(mesa.jax.random, "uniform", uniform)
    monkeypatch.setattr(mesa, "descend", turn)
    few = dataclasses.replace(QUICK, epochs=1)
    image, target, beta = jnp.asarray(CLEAN.image[:50]), jnp.asarray(TARGET), jnp.asarray(0.9)
    jax.eval_shape(lambda: few.train(KEY, MODEL, VARIABLES, image, target, beta))
    # Each turn draws noise to generate from and other noise to pair with.
    assert turns[:4] == ["dict", 2, "Estimator", 2]


def test_generator_covers_the_valid_patches_and_collapses_without_entropy(found):
    # F ≥ 0.9 from 0.69 up, as the other labels' logits are 6 and 0; nothing else is asked of a
    # pixel.
    spread = np.asarray(found["planted"].info["patches"][TARGET, -1]).reshape(-1)
    assert (spread > EDGE + 0.06).mean() > 0.95
    assert np.histogram(spread, bins=3, range=(0.7, 1.0))[0].min() >= 3, (
        "a third of the valid range is not covered"
    )

    def drawn(alpha, key):
        some = dataclasses.replace(QUICK, alpha=alpha, epochs=150)
        target, beta, image = jnp.asarray(TARGET), jnp.asarray(0.9), jnp.asarray(CLEAN.image)
        return some.train(key, MODEL, VARIABLES, image, target, beta)[0].std()

    # Three starts each: one alone may be wide by chance.
    alphas, keys = jnp.asarray([0.0] * 3 + [1.0] * 3), jnp.tile(jax.random.split(KEY, 3), 2)
    dull, lively = jax.jit(jax.vmap(drawn))(alphas, keys).reshape(2, 3).mean(1)
    assert dull < lively / 2


def test_the_planted_label_is_flagged_alone(found):
    verdict = found["planted"]
    assert verdict.flagged.tolist() == [False, False, True] and float(verdict.index) > 0.95
    assert verdict.info["asr"].shape == (3, 3) and float(verdict.info["asr"][:TARGET].max()) < 0.1
    assert verdict.info["patches"].shape == (3, 3, 128, 1, 1, 1)


def test_a_known_label_is_an_oracle_and_searched_alone():
    known = dataclasses.replace(QUICK, label=TARGET, epochs=1)
    assert known.oracle and MesaRetraining(mesa=known).oracle
    assert not QUICK.oracle and not MesaRetraining().oracle
    verdict = jax.jit(lambda: known(KEY, MODEL, VARIABLES, CLEAN))()
    assert verdict.flagged.tolist() == [False, False, True]
    assert not verdict.info["patches"][:TARGET].any() and verdict.info["patches"][TARGET].any()


def test_nan_logits_give_no_verdict_rather_than_a_wrong_one(found):
    assert not bool(found["nan"].infected) and float(found["nan"].index) == 0


def test_patches_are_pasted_whole_and_everywhere():
    x, patch = jnp.zeros((40, 5, 4, 2)), jnp.ones((40, 3, 3, 2))
    one = stick(KEY, x, patch)
    assert one.sum((1, 2, 3)).tolist() == [18] * 40 and bool((one == one[:1]).all())
    each = stick_each(KEY, x, patch)
    assert each.sum((1, 2, 3)).tolist() == [18] * 40
    assert {tuple(np.argwhere(v[..., 0])[0].tolist()) for v in np.asarray(each)} == {
        (r, c) for r in range(3) for c in range(2)
    }


def test_stamper_takes_patches_of_flagged_labels_alone():
    pool = jnp.broadcast_to(
        jnp.asarray([0.1, 0.2, 0.3])[:, None, None, None, None], (3, 4, 2, 2, 1)
    )
    stamper = Patches(pool, jnp.asarray([True, False, True]))
    keys = jax.random.split(KEY, 30)
    made = jax.jit(jax.vmap(lambda k: stamper.stamp(jnp.asarray(1), jnp.zeros((4, 4, 1)), k)))(keys)
    assert set((10 * np.asarray(made).max((1, 2, 3))).round().astype(int).tolist()) == {1, 3}
    assert float(stamper.stamp(jnp.asarray(0), jnp.zeros((4, 4, 1)), KEY).max()) == 0


@pytest.mark.long
def test_retraining_takes_the_backdoor_out_and_leaves_a_clean_net_alone():
    mesa = dataclasses.replace(QUICK, epochs=20, betas=(0.9,))
    recipe = Recipe(lr=5.0, epochs=10, batch=50, optimizer="sgd")
    defense = MesaRetraining(rate=0.2, mesa=mesa, recipe=recipe)
    defense.check(MODEL, CLEAN)
    repair = jax.jit(lambda variables: defense(KEY, MODEL, variables, CLEAN))
    stamped = np.asarray(CLEAN.image) / np.float32(255)
    stamped[:, 0, 0] = 0.9

    def rates(variables):
        right = (predict(MODEL, variables, CLEAN.image).argmax(1) == CLEAN.label).mean()
        return float(right), float((predict(MODEL, variables, stamped).argmax(1) == TARGET).mean())

    result = repair(VARIABLES)
    assert rates(VARIABLES) == (1, 1) and rates(result.variables) == (1, 0)
    assert result.info["flagged"].tolist() == [False, False, True]
    clean = {"params": {**VARIABLES["params"], "backdoor": jnp.asarray(0.0)}}
    untouched = repair(clean)
    assert not bool(untouched.info["flagged"].any())
    jax.tree.map(np.testing.assert_array_equal, untouched.variables, clean)


def test_bad_input():
    QUICK.check(MODEL, CLEAN)
    for bad, says in (
        (Mesa(side=9), "side 9"),
        (Mesa(betas=()), "betas"),
        (Mesa(betas=(0.5, 1.5)), "beta"),
        (Mesa(noise_size=6), "noise_size"),
        (Mesa(alpha=float("nan")), "alpha"),
        (Mesa(samples=0), "samples"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(MODEL, CLEAN)
    with pytest.raises(BadInput, match="2 classes"):
        QUICK.check(MODEL._replace(classes=1), CLEAN)
    for few in (CLEAN[:0], CLEAN[:1]):
        with pytest.raises(BadInput, match="clean images"):
            QUICK.check(MODEL, few)
    with pytest.raises(BadInput, match="rate"):
        MesaRetraining(rate=2.0).check(MODEL, CLEAN)
