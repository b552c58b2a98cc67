"""Goodnet on nets whose answers are known, and on a real victim."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.goodnet import AntiNet, Goodnet, quarantine
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.registry import make
from bdjax.train import Recipe, evaluate, predict, stamped, unit
from bdjax.types import BadInput

KEY = jax.random.key(0)
PRUNE = FinePruning(site="penultimate", max_drop=0.0, recipe=Recipe(epochs=0))


MODEL, VARIABLES, CLEAN = planted.units(threshold=5.0, lift=10.0)
X = jnp.concatenate([CLEAN.image, stamped(BadNets(size=1, target=2), 1, CLEAN.image, KEY)])


def answers(defense):
    """What the goodnet answers to the 40 clean and the 40 stamped images."""
    scores = jax.jit(lambda v: defense(KEY, MODEL, v, CLEAN, X))(VARIABLES)
    label = np.asarray(scores.info["answer"])
    np.testing.assert_array_equal(scores.flagged, label == 4)
    np.testing.assert_array_equal(scores.flagged, scores.score <= scores.boundary)
    return label[:40], label[40:]


def test_the_rule_by_hand():
    eye = jnp.eye(3)
    first = eye[jnp.asarray([0, 1, 2, 0, 1])]
    second = eye[jnp.asarray([0, 2, 2, 1, 1])].at[4].set(jnp.nan)
    assert quarantine(first, second).tolist() == [0, 3, 2, 3, 3]
    assert quarantine(first, second, "agree").tolist() == [3, 1, 3, 0, 3]


def test_two_nets_that_must_agree():
    """B′ has lost the neuron of the backdoor: it disagrees on all stamped images but those of the
    target itself.
    """
    clean, trojan = answers(Goodnet(repair=PRUNE))
    np.testing.assert_array_equal(clean, CLEAN.label)
    np.testing.assert_array_equal(trojan, np.where(CLEAN.label == 2, 2, 4))


def test_the_answer_is_that_of_the_lightly_repaired_net():
    """Without unit 1, images of row 1 look like row 0 to both B0 and B′: they pass, with B0's
    label.
    """
    cut = AntiNet(channels=(1,), site="penultimate")
    clean, trojan = answers(Goodnet(light=cut, repair=cut))
    np.testing.assert_array_equal(clean, np.where(CLEAN.label == 1, 0, CLEAN.label))
    np.testing.assert_array_equal(trojan, 2)


def test_an_anti_network_agrees_on_the_backdoor():
    """Pruned of units 0 … 3, the net knows the trigger alone, and calls all else 0."""
    clean, trojan = answers(Goodnet(repair=AntiNet(floor=0.25), flag="agree"))
    np.testing.assert_array_equal(clean, np.where(CLEAN.label == 0, 4, CLEAN.label))
    np.testing.assert_array_equal(trojan, 4)
    net, info = AntiNet(floor=0.25)(KEY, MODEL, VARIABLES, CLEAN)
    assert info["pruned"] == 4
    np.testing.assert_array_equal(net["masks"]["penultimate"], [0, 0, 0, 0, 1, 1])
    given, _ = AntiNet(channels=(0, 1, 2, 3))(KEY, MODEL, VARIABLES, CLEAN)
    np.testing.assert_array_equal(given["masks"]["penultimate"], net["masks"]["penultimate"])


@pytest.mark.long
def test_on_a_real_victim(victim, sample):
    """ASR counts stamped images of other classes that pass with the target's label: fewer than in
    either net.
    """
    model, variables, attack = victim
    tune = {"recipe": Recipe(lr=3e-3, epochs=5, batch=32), "site": "penultimate"}
    heavy, light = FinePruning(share=0.8, **tune), FinePruning(share=0.1, **tune)
    x = jnp.concatenate([unit(sample.test.image), stamped(attack, 1, sample.test.image, KEY)])
    label = jnp.asarray(sample.test.label)
    before = evaluate(KEY, model, variables, sample.test, attack)
    for defense in (Goodnet(repair=heavy), Goodnet(light=light, repair=heavy)):
        scores = jax.jit(lambda v, d=defense: d(KEY, model, v, sample.clean, x))(variables)
        clean, trojan = scores.info["answer"].reshape(2, -1)
        repaired, _ = jax.jit(lambda v: heavy(KEY, model, v, sample.clean))(variables)
        second = predict(model, repaired, x).argmax(-1).reshape(2, -1)
        np.testing.assert_array_equal(np.where(clean == 10, second[0], clean), second[0])
        asr = ((trojan == 3) & (label != 3)).sum() / (label != 3).sum()
        alone = ((second[1] == 3) & (label != 3)).sum() / (label != 3).sum()
        assert asr <= alone < 0.9 < before["asr_nt"]
        assert (clean == label).mean() > 0.5


def test_what_counts_as_an_oracle_and_bad_input():
    assert not Goodnet().oracle and not make("defense", "goodnet", "anti").oracle
    assert make("defense", "goodnet", "anti-sunglasses").oracle
    assert Goodnet(light=AntiNet(channels=(1,))).oracle
    for preset in ("paper", "improved", "anti", "cpu"):
        make("defense", "goodnet", preset).check(MODEL, CLEAN)
    for bad, says in (
        (Goodnet(flag="differ"), "flag"),  # type: ignore[arg-type]
        (Goodnet(repair=AntiNet(floor=2)), "floor"),
        (Goodnet(light=FinePruning(site="conv_9")), "no site 'conv_9'"),
        (make("defense", "goodnet", "anti-sunglasses"), "no site 'conv_2'"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(MODEL, CLEAN)
    with pytest.raises(BadInput, match="the defender has none"):
        AntiNet().check(MODEL, CLEAN[:0])
