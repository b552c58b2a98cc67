"""What is built on a reversed trigger: nets with one known backdoor neuron, rows that are stamped,
a real victim; and Neural Cleanse's pre-screen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from bdjax.attacks.badnets import BadNets
from bdjax.attacks.blended import Blended
from bdjax.checkpoints import load_model, save_model
from bdjax.defenses.inputs.nc_filter import NcFilter
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.reversed import Reversed, TriggerDefense, fire
from bdjax.defenses.repair import nc_unlearning
from bdjax.defenses.repair.nc_pruning import NcPruning
from bdjax.defenses.repair.nc_unlearning import NcUnlearning
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import make
from bdjax.train import Recipe, clean_set, evaluate, fit, predict, stamped, unit
from bdjax.types import BadInput, Split

KEY = jax.random.key(0)
TARGET = planted.TARGET
ATTACK = BadNets(size=1, target=TARGET)  # one white pixel in the corner


MODEL, VARIABLES, CLEAN = planted.units()
STAMPED = stamped(ATTACK, 1, CLEAN.image, KEY)


def given(*suspects: int) -> Reversed:
    """Four triggers of |m|₁ = 1: trigger k lights pixel (7, 7 − (2 − k) mod 4) for label k, so that
    label 2 has the true one.
    """
    mask = np.zeros((4, 8, 8, 1), np.float32)
    for k in range(4):
        mask[k, 7, 7 - (TARGET - k) % 4] = 1
    suspect = jnp.asarray(np.isin(np.arange(4), suspects))
    return Reversed(jnp.asarray(mask), jnp.ones((4, 8, 8, 1)), jnp.arange(4), suspect)


def test_the_planted_net_is_what_it_should_be():
    assert (predict(MODEL, VARIABLES, CLEAN.image).argmax(-1) == CLEAN.label).all()
    assert (predict(MODEL, VARIABLES, STAMPED).argmax(-1) == TARGET).all()
    np.testing.assert_array_equal(given(2).mask.sum((1, 2, 3)), 1)


def test_the_filter_picks_the_planted_neuron_and_flags_what_fires_it():
    defense = NcFilter(found=given(TARGET))
    scores = jax.jit(lambda x: defense(KEY, MODEL, VARIABLES, CLEAN, x))(
        jnp.concatenate([CLEAN.image, STAMPED])
    )
    np.testing.assert_array_equal(scores.info["top"], [0, 0, 0, 0, 0, 1])  # 1 % of six neurons: one
    np.testing.assert_allclose([scores.info["clean"], scores.info["reversed"]], [0, 10], atol=1e-5)
    # The neuron sleeps on all clean images: their scores tie at the top, and none of them is
    # flagged.
    np.testing.assert_array_equal(scores.flagged, np.arange(80) >= 40)
    np.testing.assert_array_equal(scores.flagged, scores.score <= scores.boundary)


@pytest.mark.parametrize("fpr, flagged", [(0.0, 0), (0.26, 10), (0.5, 20), (1.0, 39)])
def test_the_filter_keeps_its_false_positive_rate(fpr, flagged):
    """Forty clean images whose scores are all different."""
    image = CLEAN.image.at[:, 7, 7, 0].set(0.5 + 0.5 * jnp.arange(40.0) / 40)
    defense = NcFilter(found=given(TARGET), fpr=fpr)
    scores = defense(KEY, MODEL, VARIABLES, CLEAN._replace(image=image), image)
    assert int(scores.flagged.sum()) == flagged


def test_pruning_cuts_the_planted_neuron_alone():
    defense = NcPruning(found=given(TARGET))
    repaired, info = jax.jit(lambda v: defense(KEY, MODEL, v, CLEAN))(VARIABLES)
    assert info["order"][0] == 5 and info["pruned"] == 1 and bool(info["repaired"])
    np.testing.assert_allclose(info["gap"], [0, 0, 0, 0, 0, 10], atol=1e-5)
    np.testing.assert_array_equal(info["reaction"][:2], [1, 0])
    np.testing.assert_array_equal(info["curve"][:2], [1, 1])
    np.testing.assert_array_equal(repaired["masks"]["penultimate"], [1, 1, 1, 1, 1, 0])
    assert (predict(MODEL, repaired, STAMPED).argmax(-1) == CLEAN.label).all()


def test_a_net_that_never_stops_reacting_is_pruned_where_it_reacts_least():
    stubborn = jax.tree.map(jnp.asarray, VARIABLES)
    stubborn["params"]["logits"]["bias"] = jnp.zeros(4).at[TARGET].set(100.0)
    _, info = NcPruning(found=given(TARGET))(KEY, MODEL, stubborn, CLEAN)
    np.testing.assert_array_equal(info["reaction"], 1)
    assert info["pruned"] == 0


def test_no_suspect_no_repair():
    none = given()
    assert not bool(none.suspect.any())
    scores = NcFilter(found=none)(KEY, MODEL, VARIABLES, CLEAN, STAMPED)
    assert (
        not bool(scores.flagged.any())
        and not bool(scores.info["repaired"])
        and np.isneginf(scores.boundary)
    )
    repaired, info = NcPruning(found=none)(KEY, MODEL, VARIABLES, CLEAN)
    assert (
        info["pruned"] == 0
        and not bool(info["repaired"])
        and bool((repaired["masks"]["penultimate"] == 1).all())
    )
    repaired, info = NcUnlearning(found=none)(KEY, MODEL, VARIABLES, CLEAN)
    assert not bool(info["repaired"])
    jax.tree.map(np.testing.assert_array_equal, repaired, VARIABLES)


def test_several_suspects_share_the_images_evenly_and_nobody_else():
    split = Split(jnp.zeros((4000, 8, 8, 1)), jnp.arange(4000) % 4)
    for suspects in ((0, 1, 2, 3), (1, 3), (2,)):
        fired = fire(KEY, given(*suspects), split, 4)
        drawn = np.bincount(fired.kind, minlength=5)
        np.testing.assert_allclose(drawn[np.array(suspects) + 1], 4000 / len(suspects), rtol=0.1)
        assert drawn.sum() == drawn[np.array(suspects) + 1].sum()
        lit = np.asarray(fired.image).reshape(4000, 64).argmax(1)
        np.testing.assert_array_equal(lit, 63 - (TARGET - (fired.kind - 1)) % 4)
        own = (fired.kind - 1) == split.label
        np.testing.assert_array_equal(fired.aimed, np.where(own, -1, fired.kind - 1))
    # An attack of one trigger: what its own stamp does.
    np.testing.assert_array_equal(fire(KEY, ATTACK, CLEAN, 4).image, STAMPED)


def test_all_labels_flagged_repairs_against_all():
    _, info = NcPruning(found=given(0, 1, 2, 3))(KEY, MODEL, VARIABLES, CLEAN)
    assert bool(info["repaired"]) and info["order"][0] == 5 and bool(info["suspect"].all())


@pytest.fixture
def unlearned_on(monkeypatch):
    """The images and labels that an unlearning trains on."""
    seen = []

    def keep(key, model, recipe, data, **kw):
        seen.append(data)
        return fit(key, model, recipe, data, **kw)

    monkeypatch.setattr(nc_unlearning, "fit", keep)

    def run(**fields):
        NcUnlearning(**fields, recipe=Recipe(epochs=0))(KEY, MODEL, VARIABLES, CLEAN)
        assert int(seen[-1].plan.size) == 40
        return seen[-1].rows(jnp.arange(40))

    return run


@pytest.mark.parametrize("share, count", [(0.2, 8), (1.0, 30), (0.0, 0)])
def test_unlearning_stamps_images_of_other_classes_under_their_own_labels(
    unlearned_on, share, count
):
    """Stamped images of the target class with their label would teach the backdoor."""
    x, label = unlearned_on(found=given(TARGET), share=share)
    touched = (x != CLEAN.image).any((1, 2, 3))
    np.testing.assert_array_equal(label, CLEAN.label)
    assert int(touched.sum()) == count and not bool((touched & (label == TARGET)).any())
    np.testing.assert_array_equal(x[touched], STAMPED[touched])


def test_unlearning_meets_the_original_trigger_as_it_is_fired(unlearned_on):
    attack = Blended(alpha=0.1, test_alpha=0.5, target=TARGET)
    x, label = unlearned_on(original=attack, share=1.0)
    own = (label == TARGET).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(
        x, jnp.where(own, CLEAN.image, stamped(attack, 1, CLEAN.image, KEY))
    )


QUICK = NeuralCleanse(
    steps=40,
    batches=10,
    batch=40,
    init_cost=0.1,
    cost_up=1.5,
    cost_down=1.5**1.5,
    patience=3,
    lanes=1,
)


@pytest.fixture(scope="module")
def searched():
    return jax.jit(lambda v: QUICK(KEY, MODEL, v, CLEAN))(VARIABLES)


def test_from_a_search_of_its_own(searched):
    """The corner must be brighter than 0.4 (10·x > 4); any other label takes a whole row at 0.5."""
    assert searched.flagged.tolist() == [False, False, True, False]
    assert float(searched.info["norms"][TARGET]) == pytest.approx(0.4, abs=0.06)
    found = Reversed.of(searched)
    np.testing.assert_array_equal(found.suspect, Reversed.of(searched, "smallest").suspect)
    for defense in (NcPruning(nc=QUICK), NcPruning(found=found), NcPruning(nc=QUICK, label=TARGET)):
        _, info = jax.jit(lambda v, d=defense: d(KEY, MODEL, v, CLEAN))(VARIABLES)
        assert info["order"][0] == 5 and info["pruned"] == 1
        assert info["label"][info["suspect"]].tolist() == [TARGET]


def test_smallest_without_outlier_and_without_a_working_trigger(searched):
    calm = searched._replace(flagged=jnp.zeros(4, bool))
    assert not bool(Reversed.of(calm).suspect.any())
    assert Reversed.of(calm, "smallest").suspect.tolist() == [False, False, True, False]
    never = calm._replace(info={**calm.info, "qualified": jnp.zeros(4, bool)})
    assert not bool(Reversed.of(never, "smallest").suspect.any())


def test_the_pre_screen_gives_up_labels_and_finishes_the_others(searched):
    short = dataclasses.replace(QUICK, steps=16)
    screened = dataclasses.replace(short, screen=2, screen_patience=3)
    run = jax.jit(lambda d, v: d(KEY, MODEL, v, CLEAN))
    every, some = run(short, VARIABLES), run(screened, VARIABLES)
    kept = np.asarray(some.info["kept"])
    assert kept.sum() == 2 and kept[TARGET]
    np.testing.assert_array_equal(some.info["steps"][kept], every.info["steps"][kept])
    np.testing.assert_allclose(some.info["norms"][kept], every.info["norms"][kept], rtol=1e-3)
    given_up = np.asarray(some.info["steps"])[~kept]
    assert (given_up < 16).all() and given_up[0] == given_up[1] >= 3
    assert not bool(some.flagged[~kept].any())
    # Ranks that never agree: all labels run to the end, the smallest are kept.
    never = run(dataclasses.replace(screened, screen_overlap=1.0), VARIABLES)
    assert never.info["steps"].tolist() == [16] * 4 and int(never.info["kept"].sum()) == 2
    # More than there are labels: off.
    off = run(dataclasses.replace(short, screen=100), VARIABLES)
    np.testing.assert_array_equal(off.info["norms"], every.info["norms"])
    assert bool(off.info["kept"].all())


def test_backdoorbench_fine_tunes_alike_after_pruning_and_after_a_search():
    recipe = make("defense", "nc-unlearning", "backdoorbench").recipe
    assert recipe == make("defense", "fine-pruning", "backdoorbench").recipe


def test_what_counts_as_an_oracle():
    for cls in (NcFilter, NcPruning, NcUnlearning):
        assert not cls().oracle and not cls(found=given(2)).oracle
        assert cls(label=2).oracle and cls(original=ATTACK).oracle
    assert not NcUnlearning(clean_only=True, original=ATTACK).oracle


@pytest.fixture(scope="module")
def found(victim, sample):
    """The verdict of Neural Cleanse on the real victim."""
    model, variables, _ = victim
    nc = NeuralCleanse(**NeuralCleanse.presets["cpu"])
    return jax.jit(lambda v: nc(KEY, model, v, sample.clean))(variables)


def test_on_a_real_victim(victim, sample, found, tmp_path):
    """The reversed trigger is enough to weaken the backdoor,
    and the saved net is the repaired one.
    """
    model, variables, attack = victim
    assert bool(found.flagged[3])
    measure = jax.jit(lambda v: evaluate(KEY, model, v, sample.test, attack))
    before, found = measure(variables), Reversed.of(found)
    recipe = Recipe(epochs=10, batch=32)
    pruning, unlearning = NcPruning(found=found), NcUnlearning(found=found, recipe=recipe)
    for defense, asr, drop in ((pruning, 0.5, 0.2), (unlearning, 0.3, 0.1)):
        repaired = jax.jit(lambda v, d=defense: d(KEY, model, v, sample.clean))(variables)
        after = measure(repaired.variables)
        assert after["asr_nt"] < asr < before["asr_nt"] and after["acc"] > before["acc"] - drop
        save_model(
            tmp_path / "net", Ffnn(hidden=(64,)), model, repaired.variables, defenses=(defense,)
        )
        _, _, loaded, about = load_model(tmp_path / "net")
        jax.tree.map(np.testing.assert_array_equal, measure(loaded), after)
        assert type(about["defenses"][0]) is type(defense)


def test_the_variants_of_unlearning_on_a_real_victim(victim, sample):
    """With the original trigger the backdoor goes; clean images alone leave it, as in the paper's
    table.
    """
    model, variables, attack = victim
    recipe = Recipe(epochs=10, batch=32)
    measure = jax.jit(lambda v: evaluate(KEY, model, v, sample.test, attack))
    original, clean = (
        measure(jax.jit(lambda v, d=d: d(KEY, model, v, sample.clean))(variables).variables)
        for d in (
            NcUnlearning(original=attack, recipe=recipe),
            NcUnlearning(clean_only=True, recipe=recipe),
        )
    )
    assert original["asr_nt"] < 0.3 and clean["asr_nt"] > 0.6
    # Clean-only is fine-tuning and nothing else.
    key_fit = jax.random.split(KEY, 3)[2]
    tuned, _ = jax.jit(lambda v: fit(key_fit, model, recipe, clean_set(sample.clean), variables=v))(
        variables
    )
    np.testing.assert_allclose(measure(tuned)["asr_nt"], clean["asr_nt"], atol=1e-3)


def test_the_filter_on_a_real_victim(victim, sample, found):
    model, variables, attack = victim
    x = jnp.stack([unit(sample.test.image), stamped(attack, 1, sample.test.image, KEY)])
    defense = NcFilter(found=Reversed.of(found))
    scores = jax.jit(lambda v: defense(KEY, model, v, sample.clean, x.reshape(-1, *x.shape[2:])))(
        variables
    )
    flagged = scores.flagged.reshape(2, -1)
    assert flagged[0].mean() < 0.15 and flagged[1].mean() > 0.7
    assert scores.info["reversed"] > scores.info["clean"]


def test_victims_and_leaves_vmap(found, victim, sample):
    model, variables, _ = victim
    clean = Split(sample.clean.image[:100], sample.clean.label[:100])
    triggers = Reversed.of(found)

    def run(until, v):
        return NcPruning(found=triggers, until=until)(KEY, model, v, clean).info["pruned"]

    bars = jnp.asarray([0.0, 0.5, 1.0])
    together = jax.jit(jax.vmap(run, (0, None)))(bars, variables)
    alone = [int(jax.jit(run)(bar, variables)) for bar in bars]
    assert together.tolist() == alone and alone[2] == 0 < alone[1]


def test_bad_input():
    TriggerDefense(found=given(2)).check(MODEL, CLEAN)
    for bad, says in (
        (NcFilter(found=given(2), fpr=2), "fpr"),
        (NcFilter(found=given(2), site="conv_9"), "no site 'conv_9'"),
        (NcFilter(share=-1), "share"),
        (NcPruning(until=3), "until"),
        (NcPruning(label=7), "label 7"),
        (NcPruning(pick="largest"), "pick"),  # type: ignore[arg-type]
        (NcPruning(nc=NeuralCleanse(screen=0)), "screen"),
        (NcUnlearning(share=1.1), "share"),
        (NcUnlearning(recipe=Recipe(batch=0)), "batch"),
        (NcUnlearning(original=BadNets(target=9)), "target label 9"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(MODEL, CLEAN)
    with pytest.raises(BadInput, match="the defender has none"):
        NcUnlearning(clean_only=True).check(MODEL, CLEAN[:0])
    for name in ("nc-filter", "nc-pruning", "nc-unlearning"):
        for preset in make("defense", name).presets:
            if preset != "conv":
                make("defense", name, preset).check(MODEL, CLEAN)
