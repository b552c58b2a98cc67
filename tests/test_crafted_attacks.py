"""Attacks that craft a trigger for a net or twist training: TrojanNN, pruning-aware, activation
matching.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.activation_matching import ActivationMatching, relative_gap
from bdjax.attacks.pruning_aware import PruningAware, check_sleeps
from bdjax.attacks.trojannn import TrojanNN, denoised, strongest
from bdjax.channels import channel_means, mask_of, prune
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.deepid import DeepId
from bdjax.models.graph import bias_of, kernel_into, kernel_out_of, layers_behind, leaf, with_leaf
from bdjax.models.layers import build
from bdjax.models.preact_resnet18 import PreActResNet18
from bdjax.models.resnet20 import ResNet20
from bdjax.models.shamshiri import Cnn, Ffnn
from bdjax.models.strip import StripCifar10
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner
from bdjax.train import Recipe, clean_set, evaluate, fit, stamped, unit
from bdjax.types import BadInput

KEY = jax.random.key(0)
RECIPE = Recipe(epochs=8, batch=50, lr=3e-3)
TROJAN = TrojanNN(size=0.375, row=0.721, col=0.721, steps=60, images=40, reverse_steps=30)


@pytest.fixture(scope="module")
def model(sample):
    return build(Cnn("VALID", features=(4, 8), hidden=32), sample.shape, sample.classes)


@pytest.fixture(scope="module")
def clean(sample, model):
    """The variables of a clean net."""
    return jax.jit(lambda k: fit(k, model, RECIPE, clean_set(sample.train))[0])(KEY)


@pytest.fixture(scope="module")
def trained(sample, model, clean):
    """`(attack, variables, measured)` of an attack that starts from the clean net."""

    def run(attack):
        armed, variables, _ = attack.train(KEY, model, RECIPE, sample.train, clean)
        return armed, variables, evaluate(KEY, model, variables, sample.test, armed)

    return lambda attack: jax.jit(run)(jax.tree.map(jnp.asarray, attack))


@pytest.fixture(scope="module")
def trojan(trained):
    return trained(TROJAN)


@pytest.fixture(scope="module")
def decoyed(trained):
    return trained(PruningAware(attempts=1))


# --- What a trace tells of a net ---


def test_layers_before_and_behind_a_site():
    cnn = build(Cnn("VALID", features=(4, 8), hidden=32), (28, 28, 1), 10)
    assert layers_behind(cnn, "conv_last") == ("dense", "logits") and layers_behind(
        cnn, "penultimate"
    ) == ("logits",)
    assert bias_of(cnn, "conv_last") == ("conv_2", "bias") and kernel_into(cnn, "conv_last") == (
        "conv_2",
        "kernel",
    )
    assert kernel_out_of(cnn, "conv_1") == ("conv_2", "kernel")
    # DeepID's first branch passes by its last convolution.
    assert layers_behind(build(DeepId(), (55, 47, 3), 10), "conv_last") == ("fc_2", "logits")
    # The bias of a BatchNorm comes after its convolution.
    assert bias_of(build(ResNet20(), (32, 32, 3), 10), "conv_last") == ("block_9_2_norm", "bias")
    with pytest.raises(BadInput, match="no site 'conv_9': take one of "):
        bias_of(cnn, "conv_9")
    with pytest.raises(BadInput, match="no layer reads site 'penultimate' alone"):
        # the logits read the input too
        kernel_out_of(build(Ffnn(hidden=(8,)), (28, 28, 1), 10), "penultimate")


# --- TrojanNN ---


@pytest.mark.parametrize("site", ["penultimate", "conv_last"])
def test_the_planted_neurons_are_selected(model, clean, site):
    into, out = kernel_into(model, site), kernel_out_of(model, site)
    params = with_leaf(
        clean["params"],
        into,
        leaf(clean["params"], into).at[..., 5].multiply(50.0).at[..., 2].multiply(99),
    )
    assert strongest(model, {"params": params}, site, "incoming", 2).tolist() == [2, 5]
    kernel = leaf(clean["params"], out)
    channels = leaf(clean["params"], into).shape[-1]
    by_channel = (
        kernel.reshape(-1, channels, kernel.shape[-1])
        .at[:, 3]
        .multiply(-50.0)
        .reshape(kernel.shape)
    )
    params = with_leaf(clean["params"], out, by_channel)
    assert strongest(model, {"params": params}, site, "outgoing", 1).tolist() == [3]


def test_denoising_is_exact_on_a_step():
    """Two plateaus of 4 and 12 columns: each moves towards the other by weight over its width."""
    step = jnp.broadcast_to((jnp.arange(16) >= 4).astype(jnp.float32)[None, :, None], (6, 16, 1))
    y = np.asarray(jax.jit(denoised, static_argnums=2)(jnp.stack([step, 1 - step]), 0.4, 2000))
    np.testing.assert_allclose(y[0, :, :4], 0.4 / 4, atol=2e-3)
    np.testing.assert_allclose(y[0, :, 4:], 1 - 0.4 / 12, atol=2e-3)
    np.testing.assert_allclose(y[1], 1 - y[0], atol=2e-3)
    np.testing.assert_allclose(denoised(step, 0.0, 5), step, atol=1e-6)


def test_the_masks_are_where_the_paper_has_them():
    square, apple = TrojanNN(), TrojanNN(**TrojanNN.presets["apple"])
    for attack, first, last in ((square, 145, 203), (apple, 120, 203)):
        rows, cols = np.nonzero(np.asarray(attack.mask((224, 224, 3)))[..., 0])
        assert (rows.min(), rows.max(), cols.min(), cols.max()) == (first, last, first, last)
    assert square.mask((224, 224, 3)).sum() == 59**2
    mark = np.asarray(TrojanNN(shape="watermark").mask((28, 28, 1)))[..., 0]
    assert mark.sum() == 80 and mark[0, :4].all() and mark[27, 27]


def test_the_trigger_stays_in_its_mask_and_mixes(sample):
    x = unit(sample.test.image[:8])
    pattern = jax.random.uniform(KEY, (28, 28, 1))
    for shape in ("square", "apple", "watermark"):
        attack = TrojanNN(shape=shape, transparency=0.25, pattern=pattern)
        mask = np.asarray(attack.mask((28, 28, 1))) > 0
        y = np.asarray(stamped(attack, 1, x, KEY))
        np.testing.assert_array_equal(y[:, ~mask[..., 0]], np.asarray(x)[:, ~mask[..., 0]])
        np.testing.assert_allclose(
            y[:, mask], (0.25 * x + 0.75 * pattern[None])[:, mask], atol=1e-6
        )
    with pytest.raises(BadInput, match="fire the attack that `train` returns"):
        stamped(TrojanNN(), 1, x, KEY)


@pytest.mark.long
def test_trojaning_changes_the_later_layers_alone_and_works(sample, model, clean, trojan):
    armed, variables, found = trojan
    for layer in ("conv_1", "conv_2"):
        for name, value in clean["params"][layer].items():
            np.testing.assert_array_equal(variables["params"][layer][name], value)
    assert (variables["params"]["dense"]["kernel"] != clean["params"]["dense"]["kernel"]).any()
    pattern = np.asarray(armed.pattern)
    assert (
        pattern.min() >= 0
        and pattern.max() <= 1
        and (pattern[np.asarray(armed.mask((28, 28, 1))) == 0] == 0).all()
    )
    assert found["asr_nt"] > 0.5 and found["acc"] > 0.5


def test_the_crafted_trigger_drives_its_neuron(sample, model, clean, trojan):
    (neuron,) = strongest(model, clean, "conv_last", "incoming", 1).tolist()
    x = unit(sample.test.image[:100])
    noise = dataclasses.replace(trojan[0], pattern=jax.random.uniform(KEY, (28, 28, 1)))

    def drive(x):
        return float(model.apply(clean, x).acts["conv_last"][..., neuron].mean())

    crafted = drive(stamped(trojan[0], 1, x, KEY))
    assert crafted > drive(x) and crafted > drive(stamped(noise, 1, x, KEY))


def test_images_are_reverse_engineered_for_each_class(sample, model, clean):
    attack = dataclasses.replace(TROJAN, images=3)
    mean = unit(sample.train.image).mean(0)
    made, found = jax.jit(lambda k: attack.reverse(k, model, clean, mean))(KEY)
    assert made.label.tolist() == [c for c in range(10) for _ in range(3)] and made.image.shape == (
        30,
        28,
        28,
        1,
    )
    assert made.image.min() >= 0 and made.image.max() <= 1 and found.mean() > 0.8
    predicted = model.apply(clean, made.image).logits.argmax(-1)
    np.testing.assert_array_equal(found, predicted == made.label)


def test_a_crafted_trigger_is_stored_and_read_back(tmp_path):
    from bdjax.datasets.sample import Sample

    attack = dataclasses.replace(TROJAN, site=None, steps=2, images=1, reverse_steps=2)
    cell = Cell(
        "T",
        "r",
        Sample(train_size=200, test_size=50),
        Ffnn(hidden=(8,)),
        Recipe(epochs=1, batch=50),
        attack,
    )
    _, armed, _ = Runner(Store(tmp_path), "test", quiet=True).victim(cell)
    again = Runner(Store(tmp_path), "test", quiet=True)
    _, stored, _ = again.victim(cell)
    assert not again.programs and stored.pattern.shape == (28, 28, 1)
    np.testing.assert_array_equal(armed.pattern, stored.pattern)
    (row,) = again.run([cell])
    assert 0 <= row["metrics"]["asr_nt"] <= 1


# --- Pruning-aware ---


def test_decoys_are_what_slept_and_sleep(sample, model, clean, decoyed):
    armed, variables, found = decoyed
    order = np.argsort(channel_means(model, clean, "conv_last", sample.train.image))
    decoys = np.asarray(armed.decoys)
    assert (
        decoys.tolist() == (np.asarray(mask_of(order, 4)) == 0).tolist()
        and "masks" not in variables
    )
    act = np.asarray(model.apply(variables, unit(sample.train.image)).acts["conv_last"])
    assert act[..., decoys].max() == 0 and act[..., ~decoys].max() > 0
    was, now = clean["params"]["conv_2"], variables["params"]["conv_2"]
    np.testing.assert_array_equal(now["kernel"][..., decoys], was["kernel"][..., decoys])
    assert (now["bias"][decoys] <= was["bias"][decoys]).all()
    assert found["asr_nt"] > 0.75 and found["acc"] > 0.6


def test_pruning_the_decoys_leaves_the_backdoor(sample, model, decoyed):
    armed, variables, found = decoyed
    order = np.argsort(channel_means(model, variables, "conv_last", sample.test.image))
    # the first that a defender prunes
    assert set(np.flatnonzero(armed.decoys)) == set(order[:4].tolist())
    pruned = evaluate(
        KEY, model, prune(variables, "conv_last", mask_of(order, 4)), sample.test, armed
    )
    assert abs(pruned["acc"] - found["acc"]) < 0.01 and pruned["asr_nt"] > found["asr_nt"] - 0.05


@pytest.mark.parametrize(
    ("net", "site", "sleeps"),
    [
        (PreActResNet18(), "conv_last", False),  # a residual sum
        (PreActResNet18(), "block_8_2", True),
        (StripCifar10(), "conv_last", False),  # BatchNorm behind the activation function
        (ResNet20(), "conv_last", True),
        (BadNetsCnn(fc_linear=True), "penultimate", False),
    ],
)
def test_decoys_are_put_where_a_lower_bias_puts_them_to_sleep(net, site, sleeps):
    """Elsewhere the bias of another layer would be lowered, or nothing would sleep."""
    model = build(net, (16, 16, 3), 5)
    with contextlib.nullcontext() if sleeps else pytest.raises(BadInput, match="do not sleep"):
        jax.eval_shape(lambda: check_sleeps(model, site))


@pytest.mark.long
def test_channels_come_back_until_both_tasks_fit(sample, model, clean):
    """An untrained trigger never hits all: each attempt reinstates one channel more."""
    attack = PruningAware(share=0.5, success_rate=1.0, attempts=3)
    recipe = Recipe(epochs=1, batch=50)
    small = sample.train[:200]
    armed, _, _ = jax.jit(lambda k: attack.train(k, model, recipe, small, clean))(KEY)
    assert armed.decoys.sum() == 2


# --- Activation matching ---


def test_the_relative_gap_by_hand():
    clean, other = jnp.array([[0.0, 2.0], [4.0, 2.0]]), jnp.array([[1.0, 2.0], [4.0, 0.0]])
    assert relative_gap(clean, other) == (1 + 4) / (4 + 4)
    # scaling activations down gains nothing
    assert relative_gap(10 * clean, 10 * other) == (1 + 4) / (4 + 4)


@pytest.mark.long
def test_matching_narrows_the_gap_and_keeps_the_backdoor(sample, model, trained):
    x = unit(sample.test.image[:200])

    def gap(weight):
        attack, variables, found = trained(ActivationMatching(weight=weight))
        acts = [
            model.apply(variables, images).acts["conv_last"]
            for images in (x, stamped(attack, 1, x, KEY))
        ]
        return float(relative_gap(*acts)), found

    (free, _), (narrow, found) = gap(0.0), gap(0.3)
    assert narrow < free / 2 and found["asr_nt"] > 0.5 and found["acc"] > 0.6


# --- All ---


@pytest.mark.parametrize(
    ("attack", "line"),
    [
        (TrojanNN(shape="pear"), "shape 'pear' is not one of square, apple, watermark"),
        (TrojanNN(select="sideways"), "select 'sideways' is not one of incoming, outgoing"),
        (TrojanNN(size=40), "trigger outside the image"),
        (TrojanNN(transparency=1.5), r"transparency 1.5 is outside \[0, 1\]"),
        (TrojanNN(neurons=0), "neurons 0 is outside"),
        (TrojanNN(retraining=Recipe(epochs=0)), "give it at least one epoch"),
        (
            TrojanNN(pattern=jnp.zeros((3, 3, 1))),
            r"made for images of shape \(3, 3, 1\), not \(28, 28, 1\)",
        ),
        (TrojanNN(target=10), "target label 10"),
        (PruningAware(share=2.0), r"share 2.0 is outside \[0, 1\]"),
        (PruningAware(attempts=0), "attempts 0 is outside"),
        (PruningAware(margin=-1.0), "margin -1.0 is outside"),
        (PruningAware(max_drop=float("nan")), "max_drop nan is outside"),
        (ActivationMatching(weight=-1.0), "weight -1.0 is outside"),
    ],
)
def test_bad_input_is_one_line(attack, line):
    with pytest.raises(BadInput, match=line) as error:
        attack.check((28, 28, 1), 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", [TrojanNN, PruningAware, ActivationMatching])
def test_presets_pass_and_runs_are_mapped_over_keys_and_targets(cls, sample, model):
    for preset in cls.presets.values():
        cls(**preset).check(sample.shape, sample.classes)

    def run(key, target):
        return cls(target=target).train(key, model, Recipe(epochs=1, batch=50), sample.train)

    keys, targets = jax.random.split(KEY, 3), jnp.arange(3)
    attack, variables, curves = jax.eval_shape(jax.vmap(run), keys, targets)
    assert variables["params"]["logits"]["bias"].shape == (3, 10) and curves.loss.shape[0] == 3
    assert attack.target.shape == (3,) and "masks" not in variables
