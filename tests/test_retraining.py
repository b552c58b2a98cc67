"""Repairs by training and preprocessing: re-training, autoencoder, neural complexity,
NNoculation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import checkpoints
from bdjax.channels import prune
from bdjax.defenses.repair.autoencoder import Autoencoder
from bdjax.defenses.repair.neural_complexity import NeuralComplexity, complexity, correlation
from bdjax.defenses.repair.nnoculation import NNoculation, Noise
from bdjax.defenses.repair.retraining import Retraining
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import make
from bdjax.train import Recipe, clean_set, evaluate, fit, predict, unit
from bdjax.types import BadInput, Split

KEY = jax.random.key(0)
NET = Ffnn(hidden=(64,))


@pytest.fixture(scope="module")
def measure(victim, sample):
    """`measure(model, variables)`: ACC and ASR on the test images."""
    attack = victim[2]

    def run(model, variables):
        return jax.jit(lambda v: evaluate(KEY, model, v, sample.test, attack))(variables)

    return run


@pytest.fixture(scope="module")
def before(victim, measure):
    return measure(*victim[:2])


def repaired(defense, victim, sample):
    model, variables, _ = victim
    defense.check(model, sample.clean)
    return jax.jit(lambda v: defense(KEY, model, v, sample.clean))(variables)


def reloaded(tmp_path, defense, model, variables):
    checkpoints.save_model(tmp_path / "net", NET, model, variables, defenses=(defense,))
    return checkpoints.load_model(tmp_path / "net")


def test_retraining_is_training_on_clean_images_and_is_saved_as_such(
    victim, sample, measure, before, tmp_path
):
    model, variables, _ = victim
    defense = make("defense", "retraining", "cpu")
    result = repaired(defense, victim, sample)
    tuned, _ = jax.jit(
        lambda v: fit(KEY, model, defense.recipe, clean_set(sample.clean), variables=v)
    )(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result.variables, tuned)
    after = measure(model, result.variables)
    assert after["acc"] > before["acc"] - 0.05 and result.info["loss"].shape == (5,)
    _, again, saved, _ = reloaded(tmp_path, defense, model, result.variables)
    assert again is model and measure(again, saved)["asr_nt"] == after["asr_nt"] < before["asr_nt"]


@pytest.fixture(scope="module")
def guarded(victim, sample):
    defense = make("defense", "autoencoder", "cpu")
    return defense, repaired(defense, victim, sample)


def test_the_net_behind_the_autoencoder_is_the_net_of_what_it_draws(guarded, victim, sample):
    defense, result = guarded
    model, variables, _ = victim
    behind = defense.wrap(model)
    assert behind is make("defense", "autoencoder", "cpu").wrap(model), "programs are shared"
    x = unit(sample.test.image[:7])
    hidden = np.array(x).reshape(7, -1)
    layers = jax.tree.map(np.asarray, result.variables["autoencoder"])
    for name in ("dense_1", "dense_2", "dense_3"):
        hidden = np.maximum(hidden @ layers[name]["kernel"] + layers[name]["bias"][None], 0)
    drawn = 1 / (
        1 + np.exp(-(hidden @ layers["logits"]["kernel"] + layers["logits"]["bias"][None]))
    )
    by_hand = model.apply(variables, jnp.asarray(drawn.reshape(x.shape), jnp.float32)).logits
    np.testing.assert_allclose(behind.apply(result.variables, x).logits, by_hand, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, result.variables["params"], variables["params"])
    # Masks and edits are the net's own.
    mask = jnp.ones(64).at[:32].set(0.0)
    masked = behind.apply(prune(result.variables, "penultimate", mask), x)
    edited = behind.apply(result.variables, x, edits={"penultimate": lambda a: a * mask[None]})
    np.testing.assert_allclose(masked.logits, edited.logits, atol=1e-5)
    assert (masked.acts["penultimate"][:, :32] == 0).all()


def test_the_autoencoder_draws_clean_images_and_not_the_trigger(
    guarded, victim, sample, measure, before, tmp_path
):
    defense, result = guarded
    image = unit(sample.clean.image)
    assert result.info["mse"] < jnp.var(image - image.mean(0, keepdims=True)) / 2
    behind = defense.wrap(victim[0])
    after = measure(behind, result.variables)
    assert after["asr_nt"] < 0.2 < 0.9 < before["asr_nt"] and after["acc"] > before["acc"] - 0.15
    _, model, saved, about = reloaded(tmp_path, defense, behind, result.variables)
    again = measure(model, saved)
    assert again["acc"] == after["acc"] and again["asr_nt"] == after["asr_nt"]
    assert about["defenses"][0].hidden == defense.hidden


def test_training_behind_the_autoencoder_leaves_it_alone(guarded, victim, sample):
    defense, result = guarded
    behind, recipe = defense.wrap(victim[0]), Recipe(epochs=1, batch=50)
    tuned, _ = jax.jit(lambda v: fit(KEY, behind, recipe, clean_set(sample.clean), variables=v))(
        result.variables
    )
    jax.tree.map(
        np.testing.assert_array_equal, tuned["autoencoder"], result.variables["autoencoder"]
    )
    assert not np.allclose(
        tuned["params"]["logits"]["kernel"], victim[1]["params"]["logits"]["kernel"]
    )


def brute_force(corr):
    """Σ_k [(k/n)·I(X) − ⟨I(X_k)⟩] over all subsets."""
    n = len(corr)

    def information(rows):
        return -0.5 * np.log(np.linalg.det(corr[np.ix_(rows, rows)]))

    whole = information(range(n))
    means = [
        np.mean([information(rows) for rows in itertools.combinations(range(n), k)])
        for k in range(1, n + 1)
    ]
    return sum(k / n * whole - mean for k, mean in enumerate(means, 1))


def over_all_orders(corr, present):
    """`complexity` with every order of the nodes."""
    n = len(present)
    draws = jnp.asarray(list(itertools.permutations(range(n))), jnp.float32) / n
    return float(jax.jit(complexity)(corr, present, draws))


def test_complexity_by_hand_and_against_all_subsets():
    rho = 0.8
    pair = jnp.asarray([[1.0, rho], [rho, 1.0]])
    assert over_all_orders(pair, jnp.ones(2)) == pytest.approx(-0.25 * np.log(1 - rho**2), abs=1e-6)
    assert over_all_orders(jnp.eye(5), jnp.ones(5)) == pytest.approx(0, abs=1e-6)
    x = jax.random.normal(KEY, (50, 5)) @ jax.random.normal(jax.random.key(1), (5, 5))
    corr = correlation(x, 1e-3)
    assert over_all_orders(corr, jnp.ones(5)) == pytest.approx(
        brute_force(np.asarray(corr)), rel=1e-3
    )
    # Absent nodes are as if they had never been.
    left = jnp.asarray([0, 2, 3])
    present = jnp.zeros(5).at[left].set(1.0)
    part = brute_force(np.asarray(corr)[np.ix_(left, left)])
    assert over_all_orders(corr, present) == pytest.approx(part, rel=1e-3)
    constant = correlation(x.at[:, 2].set(7.0), 1e-3)
    np.testing.assert_allclose(constant[2], np.eye(5)[2], atol=1e-6)
    assert bool(jnp.isfinite(correlation(jnp.zeros((4, 3)), 1e-3)).all())


def test_nodes_that_sleep_on_clean_images_are_pruned_first(victim, sample):
    model, variables, _ = victim
    planted = jnp.arange(64) % 6 == 5
    layer = variables["params"]["dense_1"]
    layer = {**layer, "bias": jnp.where(planted, -1e3, layer["bias"])}
    net = {"params": {**variables["params"], "dense_1": layer}}
    act = model.apply(net, unit(sample.clean.image)).acts["penultimate"]
    asleep = np.asarray(act.max(0) == 0)
    assert asleep[np.asarray(planted)].all() and asleep.sum() < 30
    count = int(asleep.sum()) + 4  # those that fire on an image or two cost hardly more
    defense = NeuralComplexity(share=count / 64, rounds=2, orders=16, recipe=Recipe(epochs=0))
    repaired, info = jax.jit(lambda v: defense(KEY, model, v, sample.clean))(net)
    assert (repaired["masks"]["penultimate"][asleep] == 0).all()
    assert info["pruned"] == count and info["complexity"].shape == (2,)


def test_neural_complexity_prunes_its_share_round_by_round(
    victim, sample, measure, before, tmp_path
):
    model, variables, _ = victim
    came = prune(variables, "penultimate", jnp.ones(64).at[7].set(0.0))
    defense = make("defense", "neural-complexity", "cpu")
    defense.check(model, sample.clean)
    result = jax.jit(lambda v: defense(KEY, model, v, sample.clean))(came)
    mask = np.asarray(result.variables["masks"]["penultimate"])
    assert mask[7] == 0 and mask.sum() == 63 - 32 == 63 - result.info["pruned"]
    assert (np.diff(result.info["complexity"]) < 0).all(), "fewer nodes, less complexity"
    after = measure(model, result.variables)
    assert after["acc"] > before["acc"] - 0.1
    _, again, saved, _ = reloaded(tmp_path, defense, model, result.variables)
    assert measure(again, saved)["asr_nt"] == after["asr_nt"]


def test_noise_is_coarse_and_of_its_share():
    x = jnp.full((8, 12, 3), 0.25)
    noisy = jax.jit(jax.vmap(lambda k, p: Noise(level=p).stamp(jnp.asarray(1), x, k), (0, None)))
    keys = jax.random.split(KEY, 150)
    noise = noisy(keys, 0.3)
    changed = np.asarray(noise != 0.25).reshape(150, 4, 2, 4, 3, 3)  # cells of 2×3 pixels
    assert (changed.all((2, 4)) == changed.any((2, 4))).all(), "a cell is replaced as a whole"
    assert changed.mean() == pytest.approx(0.3, abs=0.02)
    assert changed[:, 0, 0, 0, 0].any(-1).mean() > 0.5, "each channel has its own cells"
    values = np.asarray(noise)[np.asarray(noise) != 0.25]
    assert values.mean() == pytest.approx(128 / 255, abs=0.01) and values.std() == pytest.approx(
        0.2, abs=0.01
    )
    assert ((noise >= 0) & (noise <= 1)).all()
    assert (noisy(keys, 0.0) == 0.25).all() and (noisy(keys, 1.0) != 0.25).all()
    plan = Noise().plan(KEY, jnp.arange(6) % 3, 3)
    assert plan.size == 12 and plan.kind.sum() == 6
    np.testing.assert_array_equal(plan.label, plan.source % 3)


def test_nnoculation_keeps_the_strongest_noise_that_accuracy_bears(victim, sample, measure, before):
    model, variables, _ = victim
    idle = NNoculation(levels=(0.1, 0.5), recipe=Recipe(epochs=0))
    result = jax.jit(lambda v: idle(KEY, model, v, sample.clean))(variables)
    assert result.info["level"] == 0.5 and (result.info["after"] == result.info["before"]).all()
    jax.tree.map(np.testing.assert_array_equal, result.variables["params"], variables["params"])
    # Where all cost too much, the best is kept.
    wild = NNoculation(
        levels=(0.0, 0.9), max_drop=0.0, recipe=Recipe(lr=1.0, epochs=1, batch=20, optimizer="adam")
    )
    result = jax.jit(lambda v: wild(KEY, model, v, sample.clean))(variables)
    after = np.asarray(result.info["after"])
    assert (after < result.info["before"]).all() and result.info["level"] == (0.0, 0.9)[
        after.argmax()
    ]


def test_nnoculation_weakens_the_real_backdoor(victim, sample, measure, before):
    defense = make("defense", "nnoculation", "cpu")
    result = repaired(defense, victim, sample)
    after = measure(victim[0], result.variables)
    assert after["asr_nt"] < before["asr_nt"] - 0.1 and after["acc"] > before["acc"] - 0.1
    assert result.info["after"].shape == (6,) and result.info["loss"].shape == (6, 10)


def test_bad_input(victim, sample):
    model, clean = victim[0], sample.clean
    for defense, message in (
        (Retraining(recipe=Recipe(batch=0)), "batch 0"),
        (Autoencoder(hidden=()), "at least one hidden layer"),
        (NeuralComplexity(share=1.5), "share 1.5"),
        (NeuralComplexity(site="conv_9"), "no site 'conv_9'"),
        (NeuralComplexity(rounds=0), "rounds 0"),
        (NNoculation(levels=()), "levels is empty"),
        (NNoculation(levels=(0.5, 1.5)), "levels 1.5"),
        (NNoculation(holdout=0.0), "raise it"),
    ):
        with pytest.raises(BadInput, match=message):
            defense.check(model, clean)
    with pytest.raises(BadInput, match="0 training images"):
        Retraining().check(model, Split(clean.image[:0], clean.label[:0]))
    assert predict(model, victim[1], clean.image[:2]).shape == (2, 10)
