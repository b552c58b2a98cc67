"""DeepInspect on nets in which the smallest perturbation of each label is known, and on a real
victim.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_neural_cleanse import CLEAN, PLANTED, block_net

from bdjax.defenses.invert.deep_inspect import DeepInspect, left_index
from bdjax.types import BadInput

KEY = jax.random.key(0)
MODEL, VARIABLES, IMAGES = block_net(PLANTED)
QUICK = DeepInspect(steps=1200, batch=60, images=16, inversion_steps=60, hidden=64, noise_size=16)
run = jax.jit(lambda variables: QUICK(KEY, MODEL, variables, IMAGES[:0]))  # needs no clean images


@pytest.fixture(scope="module")
def found():
    return {"planted": run(VARIABLES), "clean": run(block_net(CLEAN)[1])}


def test_the_label_with_a_one_pixel_trigger_is_flagged_alone(found):
    verdict, clean = found["planted"], found["clean"]
    assert verdict.flagged.tolist() == [True] + [False] * 5, (verdict.info, clean.info)
    assert int(verdict.info["norms"].argmin()) == 0 and float(verdict.index) == float(
        verdict.info["index"][0]
    )
    # Six labels are a coarse scale: by chance a clean net may pass the bar of 2, but nowhere near
    # as far.
    assert float(clean.index) < 0.25 * float(verdict.index), clean.info


def test_surrogates_are_what_the_net_takes_for_their_label():
    made = jax.jit(lambda v: QUICK.surrogates(KEY, MODEL, v))(VARIABLES)
    assert made.shape == (6, 16, *MODEL.shape) and float(made.min()) >= 0 and float(made.max()) <= 1
    labels = MODEL.apply(VARIABLES, made.reshape(-1, *MODEL.shape)).logits.argmax(1).reshape(6, 16)
    assert bool((labels == jnp.arange(6)[:, None]).all())


def test_left_index_by_hand():
    # Median 10; below it the gaps 0, 1, 6: median 1, so that 4 lies 6 / 1.4826 deviations to the
    # left.
    np.testing.assert_allclose(
        left_index(jnp.asarray([10.0, 9, 4, 30, 90])), [0, 1 / 1.4826, 6 / 1.4826, 0, 0], rtol=1e-5
    )
    # What stands to the right, however wild, changes nothing.
    np.testing.assert_allclose(
        left_index(jnp.asarray([10.0, 9, 4, 11, 12])), [0, 1 / 1.4826, 6 / 1.4826, 0, 0], rtol=1e-5
    )
    assert left_index(jnp.full(5, 7.0)).tolist() == [0] * 5
    assert np.isinf(left_index(jnp.asarray([7.0, 7, 7, 7, 3]))[4])


def test_degenerate_norms():
    works = jnp.ones(5)
    assert not bool(QUICK.judge(jnp.full(5, 7.0), works).infected)
    assert QUICK.judge(jnp.asarray([7.0, 7, 7, 7, 3]), works).flagged.tolist() == [False] * 4 + [
        True
    ]
    assert not bool(QUICK.judge(jnp.asarray([7.0, 7, 7, 7, 3]), works.at[4].set(0.0)).infected), (
        "it does not work"
    )
    for broken in (jnp.full(5, jnp.nan), jnp.asarray([1.0, jnp.nan, jnp.nan, jnp.nan, 2.0])):
        assert not bool(QUICK.judge(broken, works).infected)


def test_nan_logits_give_no_verdict_rather_than_a_wrong_one():
    verdict = run(jax.tree.map(lambda leaf: leaf * jnp.nan, VARIABLES))
    assert not bool(verdict.infected) and float(verdict.index) == 0


def test_bad_input():
    QUICK.check(MODEL, IMAGES[:0])
    for bad, says in (
        (DeepInspect(steps=0), "steps"),
        (DeepInspect(success=1.5), "success"),
        (DeepInspect(gamma_norm=-1.0), "gamma_norm"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(MODEL, IMAGES)
    with pytest.raises(BadInput, match="3 or more"):
        QUICK.check(MODEL._replace(classes=2), IMAGES)


def test_real_victim_has_the_smallest_perturbation_at_its_target(victim, sample):
    model, variables, attack = victim
    defense = dataclasses.replace(DeepInspect(**DeepInspect.presets["cpu"]), steps=1000)
    verdict = jax.jit(lambda v: defense(KEY, model, v, sample.clean))(variables)
    assert int(verdict.info["norms"].argmin()) == attack.target, verdict.info["norms"]
