"""Whole models of Keras from their own description, and weights alone."""

from typing import Any

import jax
import numpy as np
import pytest

from bdjax import load_net
from bdjax.exports import export
from bdjax.foreign import runtime
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.types import BadInput

pytest.importorskip("keras")
keras: Any = runtime.keras()
L = keras.layers

FREE = jax.numpy_rank_promotion, jax.numpy_dtype_promotion
"""What Keras needs of JAX, which these tests keep strict."""


@pytest.fixture(autouse=True)
def loose():
    with FREE[0]("allow"), FREE[1]("standard"):
        yield


def vgg():
    block = lambda n: [L.Conv2D(n, 3, padding="same"), L.BatchNormalization(), L.ReLU()]  # noqa: E731
    parts = [L.Rescaling(1 / 255), *block(4), L.MaxPooling2D(), *block(8), L.MaxPooling2D()]
    parts += [L.Flatten(), L.Dense(16, activation="tanh"), L.Dropout(0.5), L.Dense(5)]
    return keras.Sequential([keras.Input((16, 16, 3)), *parts])


def mobile():
    return keras.Sequential([
        keras.Input((17, 15, 3)), L.ZeroPadding2D(((1, 2), (0, 3))),
        L.DepthwiseConv2D(3, strides=2, depth_multiplier=2), L.BatchNormalization(scale=False),
        L.ReLU(6.0), L.SeparableConv2D(8, 3, padding="same", activation="swish"),
        L.AveragePooling2D(3, 2, padding="same"), L.GlobalMaxPooling2D(), L.Dense(5),
    ])  # fmt: skip


def odd():
    return keras.Sequential([
        keras.Input((16, 16, 3)), L.Rescaling(2.0, -1.0),
        L.Conv2DTranspose(6, 3, strides=2, padding="same"), L.LeakyReLU(), L.Cropping2D(2),
        L.UpSampling2D(2), L.GroupNormalization(3), L.PReLU(shared_axes=[1, 2]),
        L.Conv2D(8, 3, dilation_rate=2, groups=2), L.LayerNormalization(), L.Activation("gelu"),
        L.MaxPooling2D(2, padding="same"), L.Permute((2, 1, 3)), L.Reshape((-1, 8)),
        L.GlobalAveragePooling1D(), L.Dense(7, activation="elu"), L.Dense(4),
    ])  # fmt: skip


def functional():
    image = keras.Input((16, 16, 3))
    x = L.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.1, 0.2, 0.3])(image)
    a, b = L.Conv2D(8, 3, padding="same")(x), L.Conv2D(8, 1)(x)
    skip = L.Add()([a, b])
    x = L.Concatenate()([skip, a, x])
    x = L.Multiply()([L.Conv2D(8, 1)(x), L.Dense(8, activation="sigmoid")(skip)])
    x = L.Maximum()([L.Subtract()([x, L.Average()([a, b, skip])]), a])
    squeezed = L.Conv2D(8, 1, activation="hard_sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
    x = L.GlobalAveragePooling2D()(L.Multiply()([x, squeezed]))
    return keras.Model(image, L.Dense(5, activation="softmax")(x))


def vit():
    image = keras.Input((16, 16, 3))
    x = L.Reshape((16, 8))(L.Conv2D(8, 4, strides=4)(image))
    y = L.LayerNormalization()(x)
    x = L.Add()([x, L.MultiHeadAttention(2, 3)(y, y)])
    y = L.Dense(8)(L.Dense(16, activation="gelu")(L.LayerNormalization()(x)))
    return keras.Model(image, L.Dense(5)(L.Flatten()(L.Add()([x, y]))))


def resized():
    return keras.Sequential([
        keras.Input((16, 15, 3)), L.Resizing(9, 21), L.Conv2D(4, 3), L.ReLU(),
        L.Resizing(3, 10, interpolation="nearest"), L.UpSampling2D(3, interpolation="bilinear"),
        L.Flatten(), L.Dense(5),
    ])  # fmt: skip


def nested():
    inner = keras.Sequential([keras.Input((8,)), L.Dense(8, activation="relu"), L.Dropout(0.1)])
    given = keras.Input((8, 8, 8))
    block = keras.Model(
        given, L.Add()([L.Conv2D(8, 3, padding="same", name="conv2d")(given), given])
    )
    image, shared = keras.Input((16, 16, 3)), L.Dense(8, activation="relu")
    x = L.Conv2D(8, 3, strides=2, padding="same", name="conv2d")(image)
    x = shared(shared(L.GlobalAveragePooling2D()(block(block(x)))))
    return keras.Model(image, L.Dense(1, activation="sigmoid")(inner(x)))


NETS = {fn.__name__: fn for fn in (vgg, mobile, odd, functional, vit, resized, nested)}


def made(name):
    model, draw = NETS[name](), np.random.default_rng(0)
    for weight in model.weights:
        if weight.dtype == "float32":
            value = draw.normal(0, 0.3, weight.shape)
            weight.assign(np.abs(value) + 0.5 if "variance" in weight.path else value)
    return model


def outputs(model, x):
    return np.asarray(model(x, training=False))


def logits(net, x):
    with FREE[0]("raise"), FREE[1]("strict"):
        return np.asarray(net.model.apply(net.variables, x).logits)


def test_probabilities_that_are_nearly_alike_tell_no_more_than_float32_holds():
    """Those of an untrained EfficientNet, whose logits are 1e-8."""
    logits = np.random.default_rng(0).normal(0, 1e-8, (3, 5)).astype(np.float32)
    rounded = np.full((3, 5), 0.2, np.float32) + np.float32(2**-26) * np.arange(-2, 3)
    assert runtime.difference(logits, rounded, "Softmax") == 0
    other = logits + np.float32([0, 1e-3, 0, 0, 0])
    assert runtime.difference(other, np.asarray(jax.nn.softmax(logits)), "Softmax") > 0.5


@pytest.mark.parametrize("ending", [".keras", pytest.param(".h5", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name", [n if n == "functional" else pytest.param(n, marks=pytest.mark.long) for n in NETS]
)
def test_a_model_is_read_held_against_keras_and_written_back(tmp_path, name, ending):
    model = made(name)
    path = tmp_path / f"net{ending}"
    model.save(path)
    found = load_net(path, preprocess="0-255" if name == "vgg" else "0-1")
    assert found.about["origin"].by.startswith("keras") and not found.about["origin"].unverified
    x = np.random.default_rng(1).random((3, *found.model.shape), np.float32)
    given = x * 255 if name == "vgg" else x
    if name not in ("functional", "nested"):
        theirs = outputs(model, given)
        assert np.abs(logits(found, x) - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert "penultimate" in found.model.sites
    other = jax.tree.map(lambda leaf: leaf * 1.01, found.variables)
    export(found.net, found.model, other, found.about, tmp_path / f"out{ending}")
    again = keras.saving.load_model(tmp_path / f"out{ending}", compile=False)
    moved = [(a.numpy() if hasattr(a, "numpy") else np.asarray(a)) for a in again.get_weights()]
    before = model.get_weights()
    assert sum(not np.allclose(a, b) for a, b in zip(moved, before)) >= 2
    assert all(
        np.allclose(a, 1.01 * b, rtol=1e-5, atol=1e-7) or np.array_equal(a, b)
        for a, b in zip(moved, before)
    )


def test_the_file_s_own_scaling_is_read(tmp_path):
    made("vgg").save(tmp_path / "net.keras")
    found = load_net(tmp_path / "net.keras")
    assert found.about["origin"].pixels == "file"
    assert "pixels: 0-255, as the file says" in found.lines


def test_batch_norm_has_its_own_statistics_and_the_last_map_is_found(tmp_path):
    made("vgg").save(tmp_path / "net.keras")
    found = load_net(tmp_path / "net.keras")
    assert set(found.variables["batch_stats"]) == {
        "batch_normalization",
        "batch_normalization_1",
    } or (len(found.variables["batch_stats"]) == 2)
    acts = found.model.apply(found.variables, np.zeros((1, 16, 16, 3), np.float32)).acts
    assert acts["conv_last"].shape == (1, 8, 8, 8) and acts["penultimate"].shape == (1, 16)


def test_code_is_refused_by_name(tmp_path):
    double = keras.Sequential([keras.Input((8, 8, 3)), L.Lambda(lambda x: 2 * x), L.Flatten()])
    for ending in (".keras", ".h5"):
        double.save(tmp_path / f"lambda{ending}")
        with pytest.raises(BadInput, match="Lambda layer, which is code"):
            load_net(tmp_path / f"lambda{ending}")

    @keras.saving.register_keras_serializable("mine")
    class Own(L.Layer):
        def call(self, x):
            return x

    own = keras.Sequential([keras.Input((8, 8, 3)), Own(), L.Flatten(), L.Dense(3)])
    own.save(tmp_path / "own.keras")
    with pytest.raises(BadInput, match="Own of its owner's code"):
        load_net(tmp_path / "own.keras")
    rare = keras.Sequential([keras.Input((8, 8, 3)), L.RandomCrop(4, 4), L.Flatten(), L.Dense(3)])
    rare.save(tmp_path / "rare.keras")
    with pytest.raises(BadInput, match=r"RandomCrop \('random_crop"):
        load_net(tmp_path / "rare.keras")


@pytest.mark.parametrize("names", [None, ("z", "a")])
def test_of_several_outputs_the_first_is_taken(tmp_path, names):
    image = keras.Input((6, 6, 3))
    flat = L.Flatten()(image)
    ends = [L.Dense(4, name="one")(flat), L.Dense(2, name="two")(flat)]
    both = keras.Model(image, dict(zip(names, ends)) if names else ends)
    both.save(tmp_path / "net.keras")
    found = load_net(tmp_path / "net.keras")
    assert found.model.classes == 4 and "of 2 outputs the first, one" in found.lines
    x = np.random.default_rng(0).random((2, 6, 6, 3), np.float32)
    theirs = np.asarray(both(x)["z"] if names else both(x)[0])
    assert np.abs(logits(found, x) - theirs).max() < 1e-5
    again = keras.Input((6, 6, 3))
    second = both(again)["a" if names else 1]
    keras.Model(again, L.ReLU()(second)).save(tmp_path / "within.keras")
    with pytest.raises(BadInput, match="named outputs" if names else "a further output"):
        load_net(tmp_path / "within.keras")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_transposed_convolution_whose_kernel_is_smaller_than_its_stride(tmp_path, padding):
    model = keras.Sequential([
        keras.Input((5, 4, 2)), L.Conv2DTranspose(3, (2, 3), strides=(3, 1), padding=padding),
        L.Conv2DTranspose(2, (1, 2), strides=(2, 4), padding=padding),
        L.Conv2DTranspose(2, (4, 3), strides=(1, 2), padding=padding), L.Flatten(), L.Dense(3),
    ])  # fmt: skip
    model.save(tmp_path / "net.keras")
    found = load_net(tmp_path / "net.keras")
    x = np.random.default_rng(0).random((2, 5, 4, 2), np.float32)
    assert np.abs(logits(found, x) - outputs(model, x)).max() < 1e-5


def test_a_model_in_16_bits_is_held_to_what_they_can(tmp_path):
    how = {"dtype": "mixed_float16"}
    model = keras.Sequential([
        keras.Input((8, 8, 3)), L.Conv2D(8, 3, **how), L.Flatten(**how),
        L.Dense(4, activation="softmax", **how),
    ])  # fmt: skip
    model.save(tmp_path / "net.keras")
    found = load_net(tmp_path / "net.keras")
    assert 1e-4 < found.about["origin"].error < 1e-2
    assert "it computes in 16 bits" in " ".join(found.lines)


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize(
    "shape, size", [((None, None, 3), (6, 5, 3)), ((90,), (6, 5, 3)), ((6, 5), (6, 5, 1))]
)
def test_the_size_of_images_is_given_where_a_model_leaves_it_open(tmp_path, ending, shape, size):
    first = [L.GlobalAveragePooling2D()] if None in shape else [L.Flatten()]
    model = keras.Sequential([keras.Input(shape), *first, L.Dense(4)])
    path = tmp_path / f"net{ending}"
    model.save(path)
    found = load_net(path, preprocess="0-1", size=size)
    x = np.random.default_rng(0).random((2, *size), np.float32)
    theirs = outputs(model, x if None in shape else x.reshape(2, *shape))
    assert np.abs(logits(found, x) - theirs).max() < 1e-5
    export(found.net, found.model, found.variables, found.about, tmp_path / f"again{ending}")
    if shape == (6, 5):
        assert load_net(path).model.shape == size
    else:
        with pytest.raises(BadInput, match="give --size H W C"):
            load_net(path)


def test_what_is_not_known_is_not_called_damaged(tmp_path):
    for layer, why in (
        (L.Conv2D(4, 3, activation="glu"), "the activation function glu"),
        (L.BatchNormalization(axis=1), "axis 1"),
        (L.UpSampling2D(2, interpolation="bicubic"), "interpolation"),
    ):
        model = keras.Sequential([keras.Input((8, 8, 4)), layer, L.Flatten(), L.Dense(3)])
        model.save(tmp_path / "net.keras")
        with pytest.raises(BadInput, match=f"net.keras: {why}.* is not known here"):
            load_net(tmp_path / "net.keras")


def test_groups_are_normalised_with_and_without_weights(tmp_path):
    group = L.GroupNormalization
    model = keras.Sequential([
        keras.Input((4, 4, 6)), group(2, scale=False), group(1, center=False), group(-1),
        group(3, scale=False, center=False), group(1, scale=False), L.Reshape((16, 6)), group(2),
        L.Flatten(), L.Dense(3),
    ])  # fmt: skip
    draw = np.random.default_rng(1)
    model.set_weights([draw.normal(size=one.shape) for one in model.get_weights()])
    model.save(tmp_path / "net.keras")
    found = load_net(tmp_path / "net.keras")
    x = draw.random((2, 4, 4, 6), np.float32)
    theirs = outputs(model, x)
    assert np.abs(logits(found, x) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_layers_of_one_name_at_two_depths(tmp_path):
    inner = keras.Sequential([L.Dense(3, name="c"), L.ReLU()], name="q")
    outer = keras.Sequential([L.Dense(3, name="c"), inner], name="p")
    model = keras.Sequential([keras.Input((4, 4, 3)), outer, L.Flatten(), L.Dense(3, name="c")])
    model.save(tmp_path / "net.h5")
    found = load_net(tmp_path / "net.h5")
    x = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    assert np.abs(logits(found, x) - outputs(model, x)).max() < 1e-5


def test_weights_alone_need_an_architecture(tmp_path):
    net = keras.Sequential([
        keras.Input((28, 28, 1)), L.Conv2D(16, 5, activation="relu", name="conv_1"),
        L.AveragePooling2D(2), L.Conv2D(32, 5, activation="relu", name="conv_2"),
        L.AveragePooling2D(2), L.Flatten(), L.Dense(512, activation="relu", name="dense"),
        L.Dense(10, name="logits"),
    ])  # fmt: skip
    path = tmp_path / "net.weights.h5"
    net.save_weights(path)
    with pytest.raises(BadInput, match="weights alone: give their architecture"):
        load_net(path)
    found = load_net(path, arch=BadNetsCnn(), preprocess="0-1", size=(28, 28, 1))
    x = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    theirs = outputs(net, x)
    assert np.abs(logits(found, x) - theirs).max() < 1e-5 * np.abs(theirs).max()
    other = jax.tree.map(lambda leaf: leaf * 2, found.variables)
    export(found.net, found.model, other, found.about, tmp_path / "out.h5")
    (tmp_path / "out.h5").rename(tmp_path / "out.weights.h5")
    before = net.get_weights()
    net.load_weights(tmp_path / "out.weights.h5")
    assert all(np.allclose(a, 2 * b) for a, b in zip(net.get_weights(), before))
