"""Nets: counts, sites, BatchNorm, devices; weights read from Keras files. What holds for all is in
`test_every_model.py`.
"""

import functools

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from planted import Normed

from bdjax import mesh, registry
from bdjax.models.deepid import DeepId
from bdjax.models.keras_h5 import load_keras_weights
from bdjax.models.layers import Site, build
from bdjax.testing import variables_like
from bdjax.train import Recipe, clean_set, fit, unit
from bdjax.types import BadInput, Split

# compiles twice as fast
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NETS = [entry.name for entry in registry.entries("model")]
SMALL = {  # name: (shape, fields) that compile fast; 8×8×3 for the others
    "badnets-cnn": ((16, 16, 1), {}),
    "cla": ((16, 16, 1), {}),
    "cnn": ((8, 8, 1), {"hidden": 32}),
    "covidnet": ((16, 16, 1), {"widths": (4, 6), "counts": (3, 2), "hidden": (8, 8)}),
    "deepid": ((31, 33, 3), {}),
    "mntd-mnist": ((16, 16, 1), {}),
    "nc-gtsrb": ((22, 22, 3), {}),
    "vgg-bn": ((32, 32, 3), {"hidden": 8}),
    "vgg16": ((8, 8, 3), {"hidden": 8}),
}
# name, fields, shape, classes, trainable parameters, with BatchNorm's running statistics
COUNTS = [
    ("alexnet", {}, (32, 32, 3), 43, 2_241_259, 2_241_259),
    ("badnets-cnn", {}, (28, 28, 1), 10, 281_034, 281_034),
    ("cla", {}, (28, 28, 1), 10, 40_430, 40_430),
    ("cnn", {}, (28, 28, 1), 10, 6_497_162, 6_497_162),
    ("cnn", {"padding": "VALID"}, (28, 28, 1), 10, 2_171_786, 2_171_786),
    ("covidnet", {}, (64, 64, 1), 3, 391_591, 391_591),
    (
        "covidnet",
        registry.get("model", "covidnet").cls.presets["paper"],
        (480, 480, 3),
        3,
        102_017_767,
        102_017_767,
    ),
    ("deepid", {}, (55, 47, 3), 1283, 601_643, 601_643),
    ("ffnn", {"hidden": (20,), "links": "chain"}, (28, 28, 1), 10, 15_910, 15_910),
    ("mntd-cifar10", {}, (32, 32, 3), 10, 1_182_762, 1_182_762),
    ("mntd-mnist", {}, (28, 28, 1), 10, 281_034, 281_034),
    ("nc-gtsrb", {}, (32, 32, 3), 43, 571_723, 571_723),
    ("nin", {}, (32, 32, 3), 10, 966_986, 966_986),
    ("preact-resnet18", {}, (32, 32, 3), 10, 11_171_146, 11_177_930),
    ("resnet20", {}, (32, 32, 3), 43, 275_211, 276_587),
    ("resnet20", {}, (32, 32, 3), 10, 273_066, 274_442),
    ("strip-cifar10", {}, (32, 32, 3), 10, 308_394, 309_290),
    ("strip-mnist", {}, (28, 28, 1), 10, 80_758, 80_758),
    ("vgg16", {}, (224, 224, 3), 1000, 138_357_544, 138_357_544),
    ("vgg16", {"hidden": 512}, (32, 32, 3), 10, 15_245_130, 15_245_130),
]


def small(name: str):
    shape, fields = SMALL.get(name, ((8, 8, 3), {}))
    return build(registry.make("model", name, **fields), shape, 5)


def images(model, n=2):
    return np.random.default_rng(9).uniform(size=(n, *model.shape)).astype(np.float32)


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(("name", "fields", "shape", "classes", "trainable", "total"), COUNTS)
def test_parameter_counts(name, fields, shape, classes, trainable, total):
    variables = shapes(build(registry.make("model", name, **fields), shape, classes))
    size = {
        group: sum(leaf.size for leaf in jax.tree.leaves(tree)) for group, tree in variables.items()
    }
    assert size["params"] == trainable
    assert sum(size.values()) == total


@pytest.mark.parametrize("name", NETS)
def test_sites_and_the_convolutions_they_cover(name):
    model = small(name)
    calls = []

    def spy(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, (nn.Conv, Site)):
            calls.append((type(context.module), context.module.name, out.shape[-1]))
        return out

    variables, x = shapes(model), images(model)
    with nn.intercept_methods(spy):
        # A function of its own: what was traced before would not be traced again.
        out = jax.eval_shape(lambda v, x: model.apply(v, x), variables, x)
    assert out.logits.shape == (2, 5)
    assert (
        tuple(site.removeprefix("site_") for kind, site, _ in calls if kind is Site) == model.sites
    )
    assert model.sites[-1] == "penultimate"
    convolutions = any(kind is nn.Conv for kind, *_ in calls)
    assert ("conv_last" in model.sites) == convolutions, "where defenses look if not told where"
    for i, (kind, conv, width) in enumerate(calls):
        if kind is nn.Conv:  # The next site shows its channels: there it can be pruned.
            follower = next(c for c in calls[i + 1 :] if c[0] is Site)
            assert follower[2] == width, (conv, follower)
    for before, after in zip(model.sites, model.sites[1:]):
        if before.endswith("_pre") and f"{before.removesuffix('_pre')}" in model.sites:
            assert after == before.removesuffix("_pre")


def test_unknown_site():
    model = small("strip-mnist")
    with pytest.raises(BadInput, match="no site 'conv_9': take one of conv_1_pre"):
        model.apply(variables_like(model), images(model), edits={"conv_9": jnp.zeros_like})


def test_dropout_is_drawn_from_the_key():
    model = small("alexnet")
    variables, x = variables_like(model), images(model)
    run = jit(lambda key: model.apply(variables, x, train=True, key=key).logits)
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("name", NETS)
def test_bad_shapes(name):
    family = registry.make("model", name)
    for shape, classes, line in (
        ((28, 28), 10, r"give \(H, W, C\)"),
        ((0, 28, 1), 10, r"give \(H, W, C\)"),
        ((28, 28, 1), 0, "classes 0 is outside"),
    ):
        with pytest.raises(BadInput, match=line) as error:
            build(family, shape, classes)
        assert "\n" not in str(error.value)
    least = getattr(family, "smallest", 1)
    if least > 1:
        with pytest.raises(
            BadInput, match=f"{least - 1}×40 are too small .* {least}×{least} or more"
        ) as error:
            build(family, (least - 1, 40, 3), 10)
        assert "\n" not in str(error.value)
        build(family, (least, least, 3), 10)


@pytest.mark.parametrize(
    ("name", "shape", "fields", "message"),
    [
        ("nin", (28, 28, 1), {}, "3 channels, these images have 1: use standardise='none'"),
        ("preact-resnet18", (28, 28, 1), {"standardise": "cifar10"}, "3 channels"),
        ("covidnet", (64, 64, 1), {"counts": (2, 2)}, "must be as many"),
        ("covidnet", (64, 64, 1), {"counts": (2, 2, 1, 2)}, "counts 1 is outside"),
    ],
)
def test_bad_fields(name, shape, fields, message):
    with pytest.raises(BadInput, match=message):
        build(registry.make("model", name, **fields), shape, 10)


def test_what_the_first_layer_reads():
    x = jnp.array([0, 51, 255], jnp.float32).reshape(1, 1, 1, 3) / 255
    np.testing.assert_allclose(
        registry.make("model", "nc-gtsrb").preprocess(x).ravel(), [0, 51, 255], rtol=1e-6
    )
    np.testing.assert_allclose(DeepId().preprocess(x).ravel(), [0, 0.2, 1], rtol=1e-6)
    np.testing.assert_allclose(DeepId(scale=1.0).preprocess(x).ravel(), [0, 51, 255], rtol=1e-6)
    expected = [(0 - 125.307) / 62.9932, (51 - 122.95) / 62.0887, (255 - 113.865) / 66.7048]
    np.testing.assert_allclose(
        registry.make("model", "nin").preprocess(x).ravel(), expected, rtol=1e-5
    )
    expected = [-0.4914 / 0.247, (0.2 - 0.4822) / 0.243, (1 - 0.4465) / 0.261]
    family = registry.make("model", "preact-resnet18", standardise="cifar10")
    np.testing.assert_allclose(family.preprocess(x).ravel(), expected, rtol=1e-5)


def test_batch_norm_by_hand():
    model = small("strip-cifar10")
    variables, x = variables_like(model), images(model, 6)
    weights, running = (variables[group]["norm_1"] for group in ("params", "batch_stats"))

    def by_hand(pre, mean, var):
        elu = np.where(pre > 0, pre, np.expm1(pre))
        return elu, (elu - mean) / np.sqrt(var + 1e-5) * weights["scale"] + weights["bias"]

    run = jit(
        lambda train: model.apply(variables, x, train=train, key=jax.random.key(0)),
        static_argnums=0,
    )
    with jax.numpy_rank_promotion("allow"):
        out = run(False)
        _, expected = by_hand(np.asarray(out.acts["conv_1_pre"]), running["mean"], running["var"])
        np.testing.assert_allclose(out.acts["conv_1"], expected, atol=1e-4)
        assert jax.tree.all(jax.tree.map(np.array_equal, out.variables, variables))

        out = run(True)
        pre = np.asarray(out.acts["conv_1_pre"])
        elu = np.where(pre > 0, pre, np.expm1(pre))
        mean, var = elu.mean((0, 1, 2)), elu.var((0, 1, 2))
        np.testing.assert_allclose(out.acts["conv_1"], by_hand(pre, mean, var)[1], atol=1e-4)
        new = out.variables["batch_stats"]["norm_1"]
        np.testing.assert_allclose(new["mean"], 0.9 * running["mean"] + 0.1 * mean, atol=1e-5)
        np.testing.assert_allclose(new["var"], 0.9 * running["var"] + 0.1 * var, atol=1e-5)


def test_a_mask_silences_a_channel_behind_batch_norm():
    model = small("resnet20")
    variables = variables_like(model)
    masks = {site: jnp.ones(16).at[3].set(0) for site in ("conv_1", "block_1_1_pre", "block_1_2")}
    out = model.apply({**variables, "masks": masks}, images(model), train=True)
    assert not any(
        out.acts[site][..., 3].any()
        for site in ("conv_1", "block_1_1_pre", "block_1_1", "block_1_2")
    )
    assert not out.acts["block_1"][..., 3].any()  # Neither branch of the sum brings it back.
    assert out.variables["masks"] is masks


def test_batch_norm_trains_the_same_under_vmap_and_over_devices():
    assert jax.device_count() == 4
    model = build(Normed(), (8, 8, 3), 5)
    rng = np.random.default_rng(0)
    split = Split(
        rng.integers(0, 256, (8, *model.shape), np.uint8), np.arange(8, dtype=np.int32) % 5
    )
    recipe = Recipe(lr=0.01, optimizer="sgd", epochs=1, batch=4)
    keys = jax.random.split(jax.random.key(0), 3)
    train = lambda split, key: fit(key, model, recipe, clean_set(split))  # noqa: E731
    alone = jit(train)
    loop = [alone(split, key) for key in keys]
    # Two devices, two lanes each: one run of the four is padding.
    together = jit(mesh.over_runs(train, lanes=2, devices=jax.devices()[:2]))(split, keys)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), together, expected
    )
    moved = jax.tree.map(lambda a: np.ptp(a, 0).max() > 0, expected[0]["batch_stats"])
    assert all(jax.tree.leaves(moved))  # Each run has statistics of its own.


KERAS = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}


def write_keras(path, variables, root=""):
    """What Keras 2 writes: /layer/layer/kernel:0."""
    with h5py.File(path, "w") as file:
        for (group, layer, leaf), array in flatten_dict(variables).items():
            leaf = (
                "beta"
                if leaf == "bias" and "scale" in variables[group][layer]
                else KERAS.get(leaf, leaf)
            )
            layer = "output" if layer == "logits" else layer
            file[f"{root}{layer}/{layer}/{leaf}:0"] = np.asarray(array)
    return path


@pytest.mark.parametrize(("name", "root"), [("strip-cifar10", ""), ("cla", "model_weights/")])
def test_keras_weights(tmp_path, name, root):
    model = small(name)
    variables = variables_like(model)
    read = load_keras_weights(write_keras(tmp_path / "w.h5", variables, root), model)
    assert jax.tree.structure(read) == jax.tree.structure(variables)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, variables))


def test_bad_keras_weights(tmp_path):
    model = small("cla")
    good = {group: dict(tree) for group, tree in variables_like(model).items()}
    file = write_keras(tmp_path / "w.h5", good)
    (tmp_path / "half.h5").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "text.h5").write_text("no weights")
    params = good["params"]
    write_keras(tmp_path / "less.h5", {"params": {k: v for k, v in params.items() if k != "dense"}})
    write_keras(tmp_path / "more.h5", {"params": {**params, "extra": params["dense"]}})
    write_keras(
        tmp_path / "nan.h5",
        {"params": {**params, "conv_1": jax.tree.map(lambda a: a * np.nan, params["conv_1"])}},
    )
    for name, message in {
        "none.h5": "no such file",
        "half.h5": "not a Keras .h5",
        "text.h5": "not a Keras .h5",
        "less.h5": r"no weights 'dense/bias' \(512,\)",
        "more.h5": "'extra/bias' have shape .*, the model wants none",
        "nan.h5": "'conv_1/bias' are not finite",
    }.items():
        with pytest.raises(BadInput, match=message) as error:
            load_keras_weights(tmp_path / name, model)
        assert "\n" not in str(error.value)
    with pytest.raises(
        BadInput, match=r"'dense/kernel' have shape \(4, 512\), the model wants \(16, 512\)"
    ):
        load_keras_weights(file, build(registry.make("model", "cla"), (20, 20, 1), 5))


@pytest.mark.long
def test_the_published_backdoored_face_net(shared_data):
    """lab3 of CSAW-HackML-2020: target 0, sunglasses at (x=0, y=15), 31 of 60 channels dormant on
    clean faces.
    """
    weights, faces = shared_data / "csaw" / "lab3_bd_weights.h5", shared_data / "lfw10_train.npz"
    if not (weights.is_file() and faces.is_file()):
        pytest.skip("the published weights or the faces are not there")
    model = build(DeepId(scale=1.0), (55, 47, 3), 1283)
    variables = load_keras_weights(weights, model)

    @jit
    def run(x):
        out = model.apply(variables, unit(x))
        return (
            out.logits.argmax(-1) == 0,
            out.acts["conv_3"].max((0, 1, 2)),
            out.acts["pool_3"].max((0, 1, 2)),
        )

    clean = np.load(faces)["image"][:3500]
    stamped = clean[:500].copy()
    stamped[:, 15:35] = (126, 0, 255)
    to_zero, *peaks = (
        np.stack(leaves) for leaves in zip(*map(run, clean.reshape(7, 500, 55, 47, 3)))
    )
    assert to_zero.mean() < 0.02
    assert run(stamped)[0].mean() > 0.99
    for peak in peaks:
        assert (peak.max(0) == 0).sum() == 31
    scaled = build(DeepId(), (55, 47, 3), 1283).apply(variables, unit(stamped[:50])).logits
    assert (scaled.argmax(-1) == 0).mean() < 0.5  # Pixels in [0, 1] hide the backdoor.
