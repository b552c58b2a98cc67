"""ℓ∞ pruning: norms and caps by hand, a planted channel, each rule against one net at a time, a
real victim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from flax.linen import relu

from bdjax.attacks.badnets import BadNets
from bdjax.channels import prune, responses
from bdjax.checkpoints import load_model, save_model
from bdjax.defenses.parts.reversed import Reversed
from bdjax.defenses.repair.linf_pruning import LinfPruning, cap
from bdjax.models.layers import Net, build, conv, dense, site
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import make, pytree
from bdjax.train import evaluate, predict, stamped
from bdjax.types import BadInput

KEY = jax.random.key(0)
TARGET = planted.TARGET
ATTACK = BadNets(size=1, target=TARGET)  # one white pixel in the corner


@pytree
class Planted(Net):
    """Four maps: the image × 1, 2, 3, and 20·(image − ½), which only pixels brighter than ½ fire;
    then rows are summed.
    """

    def layers(self, x, train, classes):
        maps = site("conv_last", relu(conv(x, 4, 1, "conv")))
        return dense(maps, classes, "logits")


def net():
    """Label = the row that is lit at 0.4 of the image; the corner, through map 3, lifts label 2."""
    kernel = jnp.asarray([1.0, 2.0, 3.0, 20.0]).reshape(1, 1, 1, 4)
    head = np.zeros((8, 8, 4, 4), np.float32)
    for k in range(4):
        head[k, :, :3, k] = 1
    head[:, :, 3, TARGET] = 10
    params = {
        "conv": {"kernel": kernel, "bias": jnp.asarray([0.0, 0.0, 0.0, -10.0])},
        "logits": {"kernel": jnp.asarray(head.reshape(-1, 4)), "bias": jnp.zeros(4)},
    }
    return build(Planted(), (8, 8, 1), 4), {"params": params}


MODEL, VARIABLES = net()
CLEAN = planted.lit_rows(0.4)
STAMPED = stamped(ATTACK, 1, CLEAN.image, KEY)


def given(suspect: bool = True) -> Reversed:
    """The true trigger at 0.9 instead of white."""
    mask = jnp.zeros((1, 8, 8, 1)).at[0, 7, 7].set(1.0)
    return Reversed(
        mask, jnp.full((1, 8, 8, 1), 0.9), jnp.asarray([TARGET]), jnp.asarray([suspect])
    )


def test_norms_by_hand():
    image = jnp.zeros((1, 8, 8, 1)).at[0, 0, 0].set(0.3).at[0, 1, 1].set(0.4)
    scale = np.asarray([1, 2, 3, 0])
    for measure, value in (("l1", 0.7), ("l2", 0.5), ("linf", 0.4), ("mean", 0.7 / 64)):
        found = responses(MODEL, VARIABLES, "conv_last", image, measure)
        np.testing.assert_allclose(found[0], value * scale, rtol=1e-5)


def test_caps_by_hand():
    act, tau = jnp.asarray([[-3.0, -1.0, 0.5, 2.0, 4.0]]), jnp.asarray(2.0)
    np.testing.assert_array_equal(cap(act, tau, "zero"), [[0, -1, 0.5, 2, 0]])
    np.testing.assert_array_equal(cap(act, tau, "clip"), [[-2, -1, 0.5, 2, 2]])
    for rule in ("zero", "clip"):
        np.testing.assert_array_equal(cap(act, jnp.asarray(jnp.inf), rule), act)


def test_the_planted_net_is_what_it_should_be():
    assert (predict(MODEL, VARIABLES, CLEAN.image).argmax(-1) == CLEAN.label).all()
    assert (predict(MODEL, VARIABLES, STAMPED).argmax(-1) == TARGET).all()


# Map 3 fires at 10 on white, at 8 on the reversed trigger, at 0 on clean images, whose largest
# activation is 1.2 (map 2).
CASES = {
    "static": (
        LinfPruning(rule="static", inputs="syn", found=given(), max_drop=0.0, points=13),
        [0.9, 1.8, 2.7, 8.0],
    ),
    "oracle": (
        LinfPruning(rule="static", inputs="ori", original=ATTACK, max_drop=0.0, points=13),
        [1, 2, 3, 10],
    ),
    "both": (
        LinfPruning(
            rule="static", inputs="ori+syn", original=ATTACK, found=given(), max_drop=0.0, points=13
        ),
        [0.9, 1.8, 2.7, 8.0],
    ),
    "excess": (
        LinfPruning(rule="excess", inputs="syn", found=given(), max_drop=0.0, points=13),
        [0.5, 1.0, 1.5, 8.0],
    ),
    "zero": (LinfPruning(rule="zero", max_drop=0.0, points=13), None),
    "clip": (LinfPruning(rule="clip", max_drop=0.0, points=13), None),
}


@pytest.fixture(scope="module")
def results():
    return {
        name: jax.jit(lambda v, d=d: d(KEY, MODEL, v, CLEAN))(VARIABLES)
        for name, (d, _) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_the_backdoor_goes_and_clean_images_stay_right(name, results):
    defense, top = CASES[name]
    repaired, info = results[name]
    model = defense.wrap(MODEL)
    assert (predict(model, repaired, CLEAN.image).argmax(-1) == CLEAN.label).all()
    assert (predict(model, repaired, STAMPED).argmax(-1) == CLEAN.label).all()
    if top is not None:
        np.testing.assert_allclose(info["top"], top, rtol=1e-5)
        assert (
            repaired["masks"]["conv_last"][3] == 0
            and info["pruned"] == 4 - repaired["masks"]["conv_last"].sum()
        )
    start = 8.0 if name == "excess" else 1.2
    np.testing.assert_allclose(
        info["thresholds"], [np.inf, *(start * np.linspace(1, 0, 13))], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_the_curve_equals_one_net_at_a_time(name, results):
    """And the chosen threshold is the lowest before accuracy falls."""
    defense, _ = CASES[name]
    info = results[name].info
    for tau, share in zip(info["thresholds"], info["curve"], strict=True):
        if defense.by_channel:
            net = prune(VARIABLES, "conv_last", (info["top"] <= tau).astype(jnp.float32))
        else:
            net = {**VARIABLES, "cap": tau}
        right = predict(defense.wrap(MODEL), net, CLEAN.image).argmax(-1) == CLEAN.label
        assert float(right.mean()) == pytest.approx(float(share), abs=1e-6)
    fell = np.flatnonzero(np.asarray(info["curve"]) < 1)
    assert float(info["threshold"]) == float(info["thresholds"][fell[0] - 1 if len(fell) else -1])


def test_curves_of_the_four_settings():
    """At τ = ∞ each trigger works; at the largest clean activation none does. On top, the reversed
    trigger covers the original one.
    """
    defense, _ = CASES["static"]

    def both(v):
        result = defense(KEY, MODEL, v, CLEAN)
        return result, defense.report(KEY, MODEL, v, CLEAN, ATTACK, result)

    _, curves = jax.jit(both)(VARIABLES)
    assert set(curves) == {
        "acc_clean",
        "acc_ori",
        "acc_syn",
        "acc_ori+syn",
        "asr_ori",
        "asr_syn",
        "asr_ori+syn",
    }
    for name, curve in curves.items():
        first, second = (
            (1, 0) if name.startswith("asr") else (1 if name == "acc_clean" else 0.25, 1)
        )
        np.testing.assert_allclose(curve[:2], [first, second], err_msg=name)
    np.testing.assert_array_equal(curves["asr_syn"], curves["asr_ori+syn"])
    np.testing.assert_array_equal(curves["acc_syn"], curves["acc_ori+syn"])
    zero, _ = CASES["zero"]
    found = zero.report(KEY, MODEL, VARIABLES, CLEAN, None, zero(KEY, MODEL, VARIABLES, CLEAN))
    assert set(found) == {"acc_clean"}


def test_a_threshold_of_ones_own():
    for tau in (0.5, 5.0):
        repaired, info = LinfPruning(rule="clip", threshold=tau)(KEY, MODEL, VARIABLES, CLEAN)
        assert repaired["cap"] == info["threshold"] == jnp.float32(tau)
    for tau, pruned in ((8.5, 0), (5.0, 1), (1.0, 3)):
        _, info = LinfPruning(rule="static", inputs="syn", found=given(), threshold=tau)(
            KEY, MODEL, VARIABLES, CLEAN
        )
        assert info["pruned"] == pruned


def test_no_suspect_no_pruning():
    repaired, info = LinfPruning(rule="static", inputs="syn", found=given(False))(
        KEY, MODEL, VARIABLES, CLEAN
    )
    assert not bool(info["repaired"]) and info["pruned"] == 0 and np.isinf(info["threshold"])
    np.testing.assert_array_equal(repaired["masks"]["conv_last"], 1)


def test_an_edit_still_works_on_a_capped_net():
    model = LinfPruning(rule="clip").wrap(MODEL)
    seen = []
    model.apply(
        {**VARIABLES, "cap": jnp.asarray(0.5)},
        STAMPED,
        edits={"conv_last": lambda a: seen.append(a) or a},
    )
    assert float(seen[0].max()) == 0.5


def test_on_a_real_victim(victim, sample, tmp_path):
    """Norms of the penultimate units of a net without convolutions; the saved net is the repaired
    one.
    """
    model, variables, attack = victim
    label = jnp.asarray(3)
    mask = jnp.zeros((1, 28, 28, 1)).at[0, 23:, 23:].set(1.0)
    found = Reversed(mask, jnp.ones((1, 28, 28, 1)), label.reshape(1), jnp.ones(1, bool))
    before = evaluate(KEY, model, variables, sample.test, attack)
    # Logits that read the pixels too, as here, let some of the backdoor through whatever is cut.
    for defense in (
        LinfPruning(rule="excess", inputs="syn", found=found, max_drop=0.1),
        LinfPruning(rule="zero", threshold=2.0),
    ):
        repaired, _ = jax.jit(lambda v, d=defense: d(KEY, model, v, sample.clean))(variables)
        wrapped = defense.wrap(model)
        after = evaluate(KEY, wrapped, repaired, sample.test, attack)
        assert after["asr_nt"] < before["asr_nt"] - 0.02 and after["acc"] > before["acc"] - 0.2
        save_model(tmp_path / "net", Ffnn(hidden=(64,)), wrapped, repaired, defenses=(defense,))
        _, again, loaded, _ = load_model(tmp_path / "net")
        jax.tree.map(
            np.testing.assert_array_equal, evaluate(KEY, again, loaded, sample.test, attack), after
        )


def test_what_counts_as_an_oracle_and_bad_input():
    assert not LinfPruning().oracle and not LinfPruning(rule="static", inputs="syn").oracle
    assert LinfPruning(rule="static", inputs="ori", original=ATTACK).oracle
    assert LinfPruning(rule="static", inputs="ori+syn", original=ATTACK).oracle
    assert LinfPruning(rule="static", inputs="syn", label=2).oracle
    for preset in LinfPruning.presets:
        make("defense", "linf-pruning", preset).check(MODEL, CLEAN)
    for bad, says in (
        (LinfPruning(rule="dynamic"), "rule 'dynamic'"),  # type: ignore[arg-type]
        (LinfPruning(rule="static", norm="l3"), "norm 'l3'"),  # type: ignore[arg-type]
        (LinfPruning(norm="l2"), "linf"),
        (LinfPruning(rule="excess"), "give inputs 'syn'"),
        (LinfPruning(rule="static", inputs="ori"), "give original"),
        (LinfPruning(max_drop=2), "max_drop"),
        (LinfPruning(threshold=-1.0), "threshold"),
        (LinfPruning(points=0), "points"),
        (LinfPruning(site="conv_9"), "no site 'conv_9'"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(MODEL, CLEAN)
    with pytest.raises(BadInput, match="the defender has none"):
        LinfPruning().check(MODEL, CLEAN[:0])
