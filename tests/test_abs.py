"""ABS on a net with a planted backdoor neuron, whose elevation is known, and on a real victim and
its clean twin.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.invert.abs import VISIBLE, Abs, Candidate, Neurons, pooled, seeds, similarity
from bdjax.models.layers import build
from bdjax.models.nin import Nin
from bdjax.models.shamshiri import Ffnn
from bdjax.models.strip import StripMnist
from bdjax.train import Recipe, clean_set, fit, unit
from bdjax.types import BadInput, Split

SIDE, LIT, CLASSES, TARGET, BACKDOOR = 8, 0.8, 4, 2, 4
KEY = jax.random.key(0)
MODEL = build(Ffnn(hidden=(7,), links="chain"), (SIDE, SIDE, 1), CLASSES)


def images() -> Split:
    """Class k has its quadrant lit at 0.8, the rest is black."""
    label = np.arange(24, dtype=np.int32) % CLASSES
    quadrant = np.kron(np.arange(4).reshape(2, 2), np.ones((4, 4)))
    return Split(
        (255 * LIT * (quadrant[None] == label[:, None, None])).round().astype(np.uint8)[..., None],
        label,
    )


CLEAN = images()


def planted(*, patch: float = 0.0, brightness: float = 0.0) -> dict:
    """Units 0 … 3: the mean of a quadrant, 10 to its label. Unit 4 is the backdoor: with `patch` it
    fires on two bright pixels beside two dark ones, with `brightness` where the whole image is lit.
    Unit 5 is dead, unit 6 always 1.
    """
    flat = np.asarray(CLEAN.image[:CLASSES], np.float32).reshape(CLASSES, -1) > 0
    kernel = np.zeros((SIDE * SIDE, 7), np.float32)
    kernel[:, :4] = flat.T / 16
    checker = np.zeros((SIDE, SIDE), np.float32)
    checker[6:, 6:] = [[4, -4], [-4, 4]]
    kernel[:, 4] = checker.reshape(-1) if patch else 4 * brightness / SIDE**2
    out = np.zeros((7, CLASSES), np.float32)
    out[:4] = 10 * np.eye(4)
    out[4, TARGET], out[4, 1], out[6] = 40, 15, [1, 2, 3, 4]
    bias = np.asarray([0, 0, 0, 0, -4 if patch else -2 * brightness, 0, 1], np.float32)
    if not patch and not brightness:
        kernel[:, 4] = out[4] = 0
    layers = {
        "dense_1": {"kernel": kernel, "bias": bias},
        "logits": {"kernel": out, "bias": np.zeros(4, np.float32)},
    }
    return {"params": jax.tree.map(jnp.asarray, layers)}


# One compiled program for most tests: victims and hyper-parameters are its arguments.
QUICK = Abs(steps=300, images=24, top=5, lanes=1)
run = jax.jit(lambda defense, variables, clean: defense(KEY, MODEL, variables, clean))


@pytest.fixture(scope="module")
def found():
    victims = {"patch": planted(patch=1.0), "filter": planted(brightness=1.0), "clean": planted()}
    return {name: run(QUICK, variables, CLEAN) for name, variables in victims.items()}


def test_elevation_by_hand(found):
    info = found["patch"].info
    # Stimulation ends at 4·8/5 times the layer's maximum of 1 (unit 6); the lead is what the best
    # label gains more.
    np.testing.assert_allclose(
        info["elevation"], [64, 64, 64, 64, 6.4 * (40 - 15), 0, 6.4], rtol=1e-4
    )
    assert info["label"][:5].tolist() == [0, 1, 2, 3, TARGET] and int(info["label"][6]) == 3
    assert info["suspect"].tolist() == [True] * 5 + [False, True]
    assert info["neuron"].tolist()[0] == BACKDOOR and int(info["candidate_label"][0]) == TARGET


def test_planted_neuron_is_found_and_its_clean_twin_is_not(found):
    verdict = found["patch"]
    reasr = np.asarray(verdict.info["reasr_pixel"])
    assert float(verdict.index) == 1 and bool(verdict.infected)
    assert verdict.flagged.tolist() == [label == TARGET for label in range(CLASSES)]
    assert reasr[0] == 1 and reasr[1:].max() <= 0.3
    # The trigger lies on the two pixels that the neuron waits for; 4 pixels of 64 are free, 16 cost
    # double.
    shown = np.asarray(verdict.info["mask"][0] * verdict.info["pattern"][0])[..., 0]
    assert shown[6, 6] > 0.9 and shown[7, 7] > 0.9
    assert np.all((np.asarray(verdict.info["mask"]) > VISIBLE).sum((1, 2, 3)) <= 16)
    clean = found["clean"]
    assert (
        not bool(clean.infected)
        and float(clean.index) <= 0.3
        and not bool(clean.info["suspect"][BACKDOOR])
    )


def test_a_filter_is_found_in_feature_space_alone(found):
    info = found["filter"].info
    first = info["neuron"].tolist().index(BACKDOOR)
    assert bool(found["filter"].flagged[TARGET]) and float(info["reasr_feature"][first]) == 1
    assert float(info["reasr_pixel"][first]) <= 0.3
    assert float(jnp.abs(info["transform"]).max()) <= 1


def test_stimulation_of_maps_equals_a_plain_loop():
    model = build(StripMnist(), (12, 12, 1), 3)
    variables = model.init(KEY)
    x = jax.random.uniform(KEY, (4, 12, 12, 1))
    act = model.apply(variables, x).acts["conv_1"]
    lifted, lead = jax.jit(lambda act: Abs().lift(model, variables, "conv_1", x, act))(act)
    assert lifted.shape == (8, 4)
    push = jax.jit(
        lambda c, v: (
            model.apply(variables, x, edits={"conv_1": lambda a: a.at[..., c].set(v)}).logits
        )
    )
    for channel in (0, 7):
        logits = [np.asarray(push(channel, v)) for v in np.arange(5) * 8 / 5 * float(act.max())]
        rise = np.max(logits[1:], 0) - logits[0]
        assert lifted[channel].tolist() == rise.argmax(1).tolist()
        rise.sort(1)
        np.testing.assert_allclose(lead[channel], rise[:, -1] - rise[:, -2], rtol=1e-4, atol=1e-4)


# Channel 3 of `conv_last`, behind the 8 of `conv_1`, which are not pushed here.
MAPS, MAPPED, PIXELS, CHANNEL = build(StripMnist(), (12, 12, 1), 3), 8 + 3, 12 * 12, 3


def activations():
    """Some images, and the net's maps on them before and after the activation function."""
    variables = MAPS.init(KEY)
    x = jax.random.uniform(jax.random.key(1), (6, 12, 12, 1))
    return variables, x, MAPS.apply(variables, x).acts


def plain_drive(pre, post, others):
    """−Σ of the channel, plus `others` times Σ of the rest, on both sides of the activation."""
    both = pre.astype(float) + post
    return others * np.delete(both, CHANNEL, -1).sum() - both[..., CHANNEL].sum()


@pytest.mark.parametrize("visible", [5, 9, 12, 25, 26])
def test_pixel_losses_equal_the_plain_ones(visible):
    variables, x, acts = activations()
    pre, post = np.asarray(acts["conv_last_pre"]), np.asarray(acts["conv_last"])
    drive = plain_drive(pre, post, 1e-4)
    mask = np.full(PIXELS, 0.009, np.float32)  # not visible, but paid for
    mask[:visible] = 0.5
    times = 0 if visible <= 9 else 1 if visible <= 25 else 2  # (√9 + 2)² = 25
    released = drive + times * 500 * mask.sum()
    relative = drive / (6 * 36 * post.max()) + times * 2 * mask.sum() / 9
    for expected, defense in (
        (released, Abs(**Abs.presets["original_code"], size=9 / PIXELS)),
        (relative, Abs(size=9 / PIXELS)),
    ):
        found = defense.drive(
            MAPS, acts, jnp.asarray(MAPPED), defense.scale(MAPS, variables, x), 1e-4
        )
        loss = defense.pixel_loss(found, jnp.asarray(mask.reshape(12, 12, 1)), defense.limit(MAPS))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("alike", [0.9, 0.4, 0.25, 0.1])
def test_feature_losses_equal_the_plain_ones(alike):
    variables, x, acts = activations()
    pre, post = np.asarray(acts["conv_last_pre"]), np.asarray(acts["conv_last"])
    drive = plain_drive(pre, post, 1e-5)
    each = alike + np.linspace(-0.05, 0.05, 6, dtype=np.float32)
    released = 0.01 * drive - (1e4 if each.sum() < 2 else 10) * each.sum()
    relative = drive / (6 * 36 * post.max()) - (1e3 if each.mean() < 0.2 else 1) * each.mean()
    for expected, defense in (
        (released, Abs(**Abs.presets["original_code"])),
        (relative, Abs()),
    ):
        found = defense.drive(
            MAPS, acts, jnp.asarray(MAPPED), defense.scale(MAPS, variables, x), 1e-5
        )
        np.testing.assert_allclose(
            defense.feature_loss(found, jnp.asarray(each)), expected, rtol=1e-4
        )


def test_a_hidden_layer_as_wide_as_the_logits_is_stimulated():
    wide = build(Ffnn(hidden=(CLASSES, 7)), (SIDE, SIDE, 1), CLASSES)
    assert QUICK.places(wide) == ("hidden_1", "penultimate")
    maps = build(Nin(), (SIDE, SIDE, 3), 160)  # 160 channels of the second convolution, and logits
    places = QUICK.places(maps)
    assert "conv_1_2" in places and "penultimate" not in places


def test_half_of_the_candidates_are_spread_over_the_layers():
    elevation = jnp.asarray([9.0, 8, 7, 6, 5, 4, 3, 2])
    found = Neurons(jnp.arange(8), elevation, jnp.asarray([True] * 6 + [False, True]))
    owner = np.asarray([0, 0, 0, 0, 1, 1, 1, 1])
    chosen = Abs(top=4, per_site=1).choose(found, owner)
    assert chosen.neuron.tolist() == [0, 4, 1, 2] and bool(chosen.valid.all())
    every = Abs(top=50, per_site=2).choose(found, owner)
    assert sorted(every.neuron.tolist()) == list(range(8)) and every.valid.tolist() == [
        True
    ] * 7 + [False]


def test_seeds_are_balanced_and_so_is_their_first_third():
    label = jnp.asarray([0] * 50 + [1] * 5 + [3] * 9)
    rows = seeds(KEY, label, 12)
    assert len(set(rows.tolist())) == 12
    assert np.bincount(label[rows]).tolist() == [4, 4, 0, 4] and np.bincount(
        label[rows[:6]]
    ).tolist() == [2, 2, 0, 2]
    assert sorted(seeds(KEY, label, 1000).tolist()) == list(range(64))


def test_feature_space_and_similarity_by_hand():
    x = jax.random.uniform(KEY, (2, 14, 13, 2))
    found = np.asarray(pooled(x))
    # The window of an even side reaches 5 pixels up and left, 6 down and right; what is outside
    # does not count.
    inside = np.asarray(x)[:, 0:9, 5:13]  # at (2, 10)
    for i, of in enumerate((None, np.max, np.min, np.mean)):
        expected = np.asarray(x)[:, 2, 10] if of is None else of(inside, axis=(1, 2))
        np.testing.assert_allclose(found[:, 2, 10, 2 * i : 2 * i + 2], expected, rtol=1e-5)
    from dm_pix import ssim

    other = x.at[:, 3:5].set(0.0)
    np.testing.assert_allclose(similarity(x, x), 1, rtol=1e-5)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(similarity(x, other), ssim(x, other), rtol=1e-4)


def test_lanes_agree_and_victims_can_be_stacked():
    few = dataclasses.replace(QUICK, steps=20)
    wide = dataclasses.replace(few, lanes=3, spaces=("pixel",))
    victims = [planted(patch=1.0), planted()]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *victims)
    together = jax.jit(jax.vmap(lambda v: wide(KEY, MODEL, v, CLEAN)))(stacked)
    for i, variables in enumerate(victims):
        alone = run(few, variables, CLEAN)
        for part in ("elevation", "label", "neuron", "reasr_pixel", "mask"):
            np.testing.assert_allclose(
                together.info[part][i], alone.info[part], rtol=1e-3, atol=1e-3, err_msg=part
            )


def test_a_larger_trigger_costs_more_than_it_fires():
    """On maps, where a whole-image pattern fires most: 9 pixels of 144 are free."""
    variables, x, _ = activations()
    defense = Abs(size=9 / PIXELS, steps=200, lanes=1)
    one = Candidate(jnp.asarray([3, MAPPED]), jnp.zeros(2, jnp.int32), jnp.ones(2, bool))
    run = jax.jit(lambda d: d.pixel(KEY, MAPS, variables, x, one)[1].mask)
    priced, free = (
        (np.asarray(run(dataclasses.replace(defense, weight=w))) > VISIBLE).sum((1, 2, 3))
        for w in (2.0, 0.0)
    )
    assert np.all(priced <= 25) and np.all(free > 72), (priced, free)


def test_a_pruned_neuron_cannot_fire():
    masked = {**planted(patch=1.0), "masks": {"penultimate": jnp.ones(7).at[BACKDOOR].set(0.0)}}
    found, _ = QUICK.stimulate(MODEL, masked, unit(CLEAN.image), jnp.asarray(CLEAN.label))
    assert float(found.elevation[BACKDOOR]) == 0 and found.suspect.tolist() == [True] * 4 + [
        False
    ] * 2 + [True]


def test_degenerate_nets_are_clean_not_errors():
    # a NaN logit; constant activations
    for broken in (lambda leaf: leaf * jnp.nan, jnp.zeros_like):
        verdict = run(QUICK, jax.tree.map(broken, planted(patch=1.0)), CLEAN)
        assert (
            float(verdict.index) == 0
            and not bool(verdict.infected)
            and not bool(verdict.info["suspect"].any())
        )


def test_bad_input():
    QUICK.check(MODEL, CLEAN)
    for bad, says in (
        (Abs(images=0), "images"),
        (Abs(levels=1), "levels"),
        (Abs(size=2.0), "size"),
        (Abs(spaces=()), "spaces"),
        (Abs(sites=("conv_9",)), "conv_9"),
        (Abs(lr=float("nan")), "lr"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(MODEL, CLEAN)
    with pytest.raises(BadInput, match="2 classes"):
        QUICK.check(MODEL._replace(classes=1), CLEAN)
    with pytest.raises(BadInput, match="clean images"):
        QUICK.check(MODEL, CLEAN[:0])
    bare = MODEL._replace(sites=(), apply=lambda v, x: SimpleNamespace(acts={}))
    with pytest.raises(BadInput, match="no layer to stimulate"):
        QUICK.check(bare, CLEAN)


def test_real_victim_reaches_the_bound_at_its_target_and_its_clean_twin_does_not(victim, sample):
    model, variables, attack = victim
    defense = Abs(**Abs.presets["cpu"])
    defense.check(model, sample.clean)
    recipe = Recipe(epochs=5, batch=32)
    twin, _ = jax.jit(lambda k: fit(k, model, recipe, clean_set(sample.train)))(KEY)
    assert (
        float(
            (
                model.apply(twin, unit(sample.test.image)).logits.argmax(-1) == sample.test.label
            ).mean()
        )
        > 0.65
    )
    judge = jax.jit(lambda v: defense(KEY, model, v, sample.clean))
    infected, clean = judge(variables), judge(twin)
    assert infected.flagged.tolist() == [label == attack.target for label in range(10)]
    assert float(infected.index) > 0.88 > float(clean.index) + 0.2 and not bool(clean.infected)
