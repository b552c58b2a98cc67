"""Nets of ONNX: equal to the original, looked into, trained, written back."""

from pathlib import Path

import foreign_nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bdjax import cli, datasets, load_model, load_net, save_net, testing
from bdjax.exports import export, export_net
from bdjax.foreign import onnx as reader
from bdjax.foreign import runtime
from bdjax.foreign.graph import ONNX, Node, Value, compute, plain
from bdjax.models.graph import kernel_into
from bdjax.train import Recipe, clean_set, fit
from bdjax.types import BadInput, Split

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper


def apart(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def ran(path, x):
    session = onnxruntime.InferenceSession(path.read_bytes())
    name = session.get_inputs()[0].name
    rows = [session.run(None, {name: one[None].transpose(0, 3, 1, 2)})[0] for one in x]
    return np.concatenate(rows)


@pytest.fixture
def file(tmp_path):
    """Writes a net of `foreign_nets` to an ONNX file."""

    def write(name, how="legacy", **more):
        net = foreign_nets.made(name)
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(foreign_nets.onnx_bytes(net, how, **more))
        return net, path

    return write


LONG = pytest.mark.long
SOME = [
    pytest.param(name, how, marks=[] if (name, how) in quick else LONG)
    for quick in [
        {("resnet", "training"), ("mobile", "legacy"), ("vit", "dynamo"), ("vgg", "legacy")}
    ]
    for name in foreign_nets.NETS
    for how in ("legacy", "dynamic", "training", "dynamo")
]
"""Every net by every exporter; in the bare suite one each."""


@pytest.mark.parametrize("name, how", SOME)
def test_logits_are_those_of_pytorch(file, name, how):
    net, path = file(name, how)
    found = load_net(path, preprocess="imagenet")
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    x = foreign_nets.images()
    ours = found.model.apply(found.variables, x).logits
    assert apart(ours, foreign_nets.logits(net, (x - mean) / std)) < 1e-5
    assert (
        found.about["origin"].by.startswith("onnxruntime") and not found.about["origin"].unverified
    )
    assert "penultimate" in found.model.sites
    assert ("conv_last" in found.model.sites) == (name != "vit")


def test_an_old_opset_is_read(file):
    net, path = file("resnet", "dynamic", opset=11)
    found = load_net(path, preprocess="0-1")
    x = foreign_nets.images()
    assert apart(found.model.apply(found.variables, x).logits, foreign_nets.logits(net, x)) < 1e-5


def test_names_and_shapes_are_those_that_defenses_look_for(file):
    _, path = file("resnet", "training")
    model, variables = load_net(path, preprocess="0-1")[1:3]
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 3, 8)
    assert variables["params"]["fc"]["kernel"].shape == (16, 10)
    assert set(variables["batch_stats"]["bn1"]) == {"mean", "var"}
    assert kernel_into(model, "layer1.0.relu") == ("layer1.0.conv1", "kernel")
    x = foreign_nets.images(2)
    acts = model.apply(variables, x).acts
    assert acts["conv_last"].shape == (2, 16, 16, 16) and acts["penultimate"].shape == (2, 16)
    assert (np.asarray(acts["conv_last"]) == np.maximum(acts["conv_last_pre"], 0)).all()


@pytest.mark.parametrize("name", ["resnet", pytest.param("vit", marks=LONG)])
def test_it_is_a_net_like_any_other(file, name):
    _, path = file(name, "training")
    model = load_net(path, preprocess="0-1").model
    testing.check_passes(model, name, thorough=False)
    testing.check_eager(model, name)


def test_batch_norm_learns_its_statistics(file):
    net, path = file("resnet", "training")
    model, variables = load_net(path, preprocess="0-1")[1:3]
    x = foreign_nets.images(8)
    after = model.apply(variables, x, train=True).variables["batch_stats"]["bn1"]
    torch = foreign_nets.torch
    out = net.conv1(torch.tensor(x.transpose(0, 3, 1, 2).copy())).detach().numpy()
    before = variables["batch_stats"]["bn1"]
    for leaf, now in (("mean", out.mean((0, 2, 3))), ("var", out.var((0, 2, 3)))):
        assert np.allclose(after[leaf], 0.9 * before[leaf] + 0.1 * now, atol=1e-5)
    data = clean_set(Split(np.uint8(x * 255), np.arange(8, dtype=np.int32)))
    recipe = Recipe(epochs=20, batch=8, lr=3e-3)
    curves = fit(jax.random.key(0), model, recipe, data, variables=variables)[1]
    assert curves.loss[-1] < 0.5 * curves.loss[0]


def test_fresh_weights_have_the_means_and_spreads_of_the_file_s(file):
    _, path = file("resnet", "training")
    _, model, variables, *_ = load_net(path, preprocess="0-1")
    fresh = model.init(jax.random.key(0))
    old, new = (v["params"]["layer1.1.conv2"]["kernel"] for v in (variables, fresh))
    assert not np.allclose(old, new)
    assert abs(new.std() / old.std() - 1) < 0.1 and abs(new.mean() - old.mean()) < 0.1 * old.std()
    assert (fresh["batch_stats"]["bn1"]["var"] == 1).all()


def test_a_net_of_the_house_from_then_on(file, tmp_path, capsys):
    _, path = file("mobile")
    cli.main(["import", str(path), "--out", str(tmp_path / "net")])
    said = capsys.readouterr().out
    assert "32×32×3, 10 classes" in said and "unverified: which pixels" in said
    _, model, variables, about = load_model(tmp_path / "net")
    assert "is unverified" in capsys.readouterr().err
    assert about["origin"].format == "onnx"
    x = foreign_nets.images()
    assert apart(model.apply(variables, x).logits, ran(path, x)) < 1e-5


@pytest.mark.parametrize("name, how", SOME)
def test_it_is_written_back_with_its_names(file, tmp_path, name, how):
    _, path = file(name, how)
    found = load_net(path, preprocess="0-1")
    other = jax.tree.map(lambda leaf: leaf * 1.01, found.variables)
    export(found.net, found.model, other, found.about, tmp_path / "out.onnx")
    x = foreign_nets.images()
    assert apart(found.model.apply(other, x).logits, ran(tmp_path / "out.onnx", x)) < 1e-5
    old, new = (onnx.load(p).graph for p in (path, tmp_path / "out.onnx"))
    assert list(old.node) == list(new.node)
    assert [i.name for i in old.initializer] == [i.name for i in new.initializer]


def test_masks_are_folded_where_that_is_exact_and_refused_where_not(file, tmp_path):
    _, path = file("resnet", "training")
    net, model, variables, about, _ = load_net(path, preprocess="0-1")
    x = foreign_nets.images()

    def cut(site, channels):
        mask = (jnp.arange(channels) % 3 > 0).astype(jnp.float32)
        return {**variables, "masks": {site: mask}}

    for site, channels in (("relu", 8), ("layer1.0.relu", 8), ("conv_last", 16)):
        wanted = model.apply(cut(site, channels), x).logits
        if site == "relu":  # a residual sum reads it, too: into the BatchNorm before it
            assert apart(wanted, model.apply(variables, x).logits) > 1e-3
        export(net, model, cut(site, channels), about, tmp_path / "out.onnx")
        assert apart(wanted, ran(tmp_path / "out.onnx", x)) < 1e-5
    with pytest.raises(BadInput, match=r"mask of 'layer1.0.relu_1' cannot be folded"):
        export(net, model, cut("layer1.0.relu_1", 8), about, tmp_path / "not.onnx")
    assert not (tmp_path / "not.onnx").exists()


def test_a_file_of_the_user_is_not_replaced(file, tmp_path):
    _, path = file("vgg")
    found = load_net(path, preprocess="0-1")
    before = path.read_bytes()
    with pytest.raises(BadInput, match="was not written by bdjax"):
        export(found.net, found.model, found.variables, found.about, path)
    assert path.read_bytes() == before


# --- What the file says ---


def graph(nodes, initializers=(), shape=("n", 3, 8, 8), kind=TensorProto.FLOAT, output="y", **more):
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(made, opset_imports=opsets, **more)


def head(x, weights):
    return [
        helper.make_node("Flatten", [x], ["flat"]),
        helper.make_node("Gemm", ["flat", weights], ["z"]),
        helper.make_node("Softmax", ["z"], ["y"]),
    ]


WEIGHTS = ("w", np.random.default_rng(0).normal(size=(192, 4)).astype(np.float32))


def test_a_last_softmax_is_left_away_and_pixels_are_read_from_the_graph():
    nodes = [helper.make_node("Div", ["x", "c"], ["a"]), *head("a", "w")]
    found = reader.read(graph(nodes, [WEIGHTS, ("c", np.float32(255))]).SerializeToString())
    assert found.pixels is not None and found.pixels.scale == 255
    assert "Softmax" in " ".join(found.notes) and found.classes == 4
    assert set(found.variables["params"]) == {"w"} or "c" not in str(found.variables["params"])


@pytest.mark.parametrize("axis, classes", [(1, 4), (2, 24)])
def test_a_last_softmax_goes_from_behind_views_too(tmp_path, axis, classes):
    kernel = np.random.default_rng(0).normal(size=(4, 3, *((8, 8) if axis == 1 else (3, 8))))
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=axis),
        helper.make_node("Flatten", ["b"], ["y"]),
    ]
    made = [("k", np.float32(kernel))]
    found = load_net(written(tmp_path / "net.onnx", nodes, made, ir_version=9))
    assert found.model.classes == classes and found.about["origin"].error < 1e-4
    assert found.about["origin"].last == ("Softmax" if axis == 1 else "")
    x = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    ours = np.asarray(found.model.apply(found.variables, x).logits)
    assert np.allclose(ours.sum(1), 1 if axis == 1 else 4) == (axis == 2)
    nodes[2].output[0] = "p"
    twice = [*nodes, helper.make_node("Softmax", ["p"], ["y"])]
    found = load_net(written(tmp_path / "net.onnx", twice, made, ir_version=9))
    assert np.asarray(found.model.apply(found.variables, x).logits).min() >= 0


def test_a_net_that_reads_bytes_takes_them():
    nodes = [helper.make_node("Cast", ["x"], ["a"], to=1), *head("a", "w")]
    raw = graph(nodes, [WEIGHTS], kind=TensorProto.UINT8).SerializeToString()
    assert reader.read(raw).pixels.scale == 255


def test_bytes_are_whole_pixels(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=1),
        helper.make_node("Div", ["a", "c"], ["b"]),
        *head("b", "w"),
    ]
    kind = {"kind": TensorProto.UINT8, "ir_version": 9}
    path = written(tmp_path / "net.onnx", nodes, [WEIGHTS, ("c", np.float32(255))], **kind)
    assert load_net(path).about["origin"].error < 1e-5


def test_logits_that_are_the_same_for_all_images_prove_nothing(tmp_path):
    path = written(tmp_path / "net.onnx", head("x", "w"), [("w", np.zeros((192, 4), np.float32))],
                   ir_version=9)  # fmt: skip
    found = load_net(path)
    assert not found.about["origin"].by and "same logits" in " ".join(found.lines)
    told = written(tmp_path / "told.onnx", head("x", "w"), [WEIGHTS], ir_version=9)
    assert load_net(told).about["origin"].by


def test_a_net_in_16_bits_is_held_to_what_they_can(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node("Flatten", ["a"], ["flat"]),
        helper.make_node("Gemm", ["flat", "h"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ]
    values = np.float16(WEIGHTS[1] * 0.3)
    path = written(tmp_path / "net.onnx", nodes, [("h", values)], ir_version=9)
    found = load_net(path)
    assert 1e-4 < found.about["origin"].error < 1e-2
    assert "it computes in 16 bits" in " ".join(found.lines)
    with pytest.raises(BadInput, match="export it in float32"):
        x = np.zeros((2, 8, 8, 3), np.float32)
        np.savez(tmp_path / "other.npz", image=x, logits=np.ones((2, 4), np.float32))
        load_net(path, logits=tmp_path / "other.npz")


def test_images_without_an_axis_for_their_one_channel(tmp_path):
    nodes = [helper.make_node("Identity", ["x"], ["a"]), *head("a", "w")]
    shape = {"shape": ("n", 12, 16), "ir_version": 9}
    path = written(tmp_path / "net.onnx", nodes, [WEIGHTS], **shape)
    for size in (None, (12, 16, 1)):
        found = load_net(path, preprocess="0-1", size=size)
        assert found.model.shape == (12, 16, 1) and found.about["origin"].error < 1e-5
    with pytest.raises(BadInput, match="takes images of 12×16×1, not of 12×16×3"):
        load_net(path, size=(12, 16, 3))


def test_the_meta_data_of_images_is_read():
    made = graph(head("x", "w"), [WEIGHTS])
    for key, value in (("Image.BitmapPixelFormat", "Bgr8"),
                       ("Image.NominalPixelRange", "NominalRange_0_255")):  # fmt: skip
        made.metadata_props.add(key=key, value=value)
    assert reader.read(made.SerializeToString()).pixels.words() == "0-255 bgr"


def test_one_output_is_two_classes():
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["y"]),
    ]
    found = reader.read(graph(nodes, [("w", WEIGHTS[1][:, :1])]).SerializeToString())
    assert found.classes == 2


def test_what_is_missing_is_named():
    nodes = [helper.make_node("Det", ["x"], ["y"], name="here")]
    with pytest.raises(BadInput, match=r"operator Det \('here'\) is not known"):
        reader.read(graph(nodes).SerializeToString())
    nodes = [helper.make_node("Relu", ["x"], ["y"], surprise=1)]
    with pytest.raises(BadInput, match="its attribute surprise is not known"):
        reader.read(graph([*nodes, *head("y", "w")], [WEIGHTS], output="y").SerializeToString())
    made = graph(head("x", "w"), [WEIGHTS], shape=("n", 3, "h", "w"))
    with pytest.raises(BadInput, match=r"leaves the size of its images open .*--size"):
        reader.read(made.SerializeToString())
    assert reader.read(made.SerializeToString(), (8, 8, 3)).shape == (8, 8, 3)


def test_weights_of_one_number_without_axes(tmp_path):
    nodes = [
        helper.make_node("PRelu", ["x", "slope"], ["a"]),
        helper.make_node("Flatten", ["a"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "bias"], ["y"]),
    ]
    one = [WEIGHTS, ("slope", np.float32(0.2)), ("bias", np.float32(0.5))]
    path = written(tmp_path / "net.onnx", nodes, one, ir_version=9)
    found = load_net(path, preprocess="0-1")
    save_net(tmp_path / "net", found)
    export_net(tmp_path / "net", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_a_net_without_weights_or_classes_is_refused_in_a_line(tmp_path):
    view = [helper.make_node("Flatten", ["x"], ["y"])]
    path = written(tmp_path / "net.onnx", view, [], ir_version=9)
    with pytest.raises(BadInput, match=r"net\.onnx: it has no weights"):
        load_net(path)
    none = [("w", np.zeros((192, 0), np.float32))]
    written(path, head("x", "w"), none, ir_version=9)
    with pytest.raises(BadInput, match=r"net\.onnx: .* \['batch', 0\]: not one of logits"):
        load_net(path)
    written(path, head("x", "w"), [WEIGHTS], ir_version=9)
    np.savez(tmp_path / "other.npz", image=np.zeros((2, 8, 8, 3), np.float32),
             logits=np.ones((2, 4), np.float32))  # fmt: skip
    with pytest.raises(BadInput, match=r"net\.onnx: its logits differ"):
        load_net(path, logits=tmp_path / "other.npz")


def test_operators_out_of_order_and_one_called_params(tmp_path):
    with pytest.raises(BadInput, match="reads 'z', which no operator before it makes"):
        reader.read(graph(head("x", "w")[::-1], [WEIGHTS]).SerializeToString())
    nodes = head("x", "w")
    nodes[1].name = "params"
    assert load_net(written(tmp_path / "net.onnx", nodes, [WEIGHTS], ir_version=9))


def test_a_class_number_is_no_logit():
    nodes = [*head("x", "w"), helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0)]
    made = graph(nodes, [WEIGHTS])
    best = helper.make_tensor_value_info("best", TensorProto.INT64, None)
    made.graph.output.insert(0, best)
    found = reader.read(made.SerializeToString())
    assert found.classes == 4 and "of 2 outputs" in found.notes[0]
    _, outputs = runtime.original(Path(), made.SerializeToString(), "onnx", "NCHW")
    assert outputs(np.zeros((2, 8, 8, 3))).shape == (2, 4)
    del made.graph.output[1]
    with pytest.raises(BadInput, match="a class number: export it with its logits"):
        reader.read(made.SerializeToString())


def written(path, nodes, initializers, **more):
    path.write_bytes(graph(nodes, initializers, **more).SerializeToString())
    return path


@pytest.mark.parametrize("where", ["image", "constant"])
def test_padding_with_a_value_is_exported(tmp_path, where):
    pads = np.asarray([0, 0, 1, 1, 0, 0, -1, -1])
    padded, ones = "x" if where == "image" else "c", np.ones((1, 3, 8, 8), np.float32)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(ones)),
        helper.make_node("Pad", [padded, "pads", "v"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["s"]),
        *head("s", "w"),
    ]
    more = [("pads", pads), ("v", np.float32(0.5))]
    path = written(tmp_path / "net.onnx", nodes, [WEIGHTS, *more], ir_version=9)
    found = load_net(path, preprocess="0-1")
    x = np.random.default_rng(0).random((2, *found.model.shape), np.float32)
    np.testing.assert_array_equal(
        found.model.apply(found.variables, x).logits,
        found.model.apply(found.variables, jnp.asarray(x)).logits,
    )
    export(found.net, found.model, found.variables, found.about, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


# --- Every operator, against the cases that ONNX itself keeps ---

REFUSED = (
    "past",
    "softcap",
    "select_last_index",
    "exclusive",
    "reverse",
    "batch_dims",
    "antialias",
)
REFUSED += (
    "tf_crop",
    "argmax_2d",
    "not_larger",
    "not_smaller",
    "scatternd_",
    "qk_matmul",
    "nonpad",
)
REFUSED += ("local_window", "bidirectional_window", "training_mode", "training_dropout", "crd_mode")
REFUSED += (
    "padded_kv",
    "batch_dim1",
    "empty_set",
    "onehot",
    "cache",
    "reduce_max_empty",
    "training",
    "cumsum_1d_int32_excl",
)


def test_numbers_in_a_file_beside_it(file, tmp_path):
    """As torch's exporter writes a net, unless told otherwise."""
    _, path = file("resnet")
    whole = load_net(path)
    two = tmp_path / "two"
    two.mkdir()
    onnx.save_model(onnx.load(path), two / "net.onnx", save_as_external_data=True,
                    location="net.onnx.data", size_threshold=0)  # fmt: skip
    found = load_net(two / "net.onnx")
    for left, right in zip(*map(jax.tree.leaves, (found.variables, whole.variables)), strict=True):
        np.testing.assert_array_equal(left, right)
    save_net(tmp_path / "net", found)
    export_net(tmp_path / "net", tmp_path / "again.onnx")
    x = np.asarray(jax.random.uniform(jax.random.key(0), (2, *whole.model.shape)))
    np.testing.assert_array_equal(ran(tmp_path / "again.onnx", x), ran(path, x))
    (two / "net.onnx.data").unlink()
    with pytest.raises(BadInput, match="which is not there: keep both together"):
        load_net(two / "net.onnx")


@pytest.mark.long
def test_operators_are_those_of_onnx():
    cases = pytest.importorskip("onnx.backend.test.case.node").collect_testcases(None)
    right, wrong = 0, []
    for case in cases:
        (first, *more) = case.model.graph.node
        known = not more and first.op_type in ONNX and not first.domain
        if not known or any(word in case.name for word in REFUSED):
            continue
        attrs = reader._attributes(first, case.model.opset_import[0].version)
        for inputs, outputs in case.data_sets:
            arrays = dict(zip((i.name for i in case.model.graph.input), map(np.asarray, inputs)))
            if any(a.dtype.kind not in "fiub" for a in arrays.values()):
                continue
            given = [None if not n else _value(first.op_type, i, arrays[n])
                     for i, n in enumerate(first.input)]  # fmt: skip
            node = Node(first.op_type, "node", tuple(first.input), tuple(first.output), attrs)
            with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
                found = compute(node, given)
            pairs = [(np.asarray(plain(o)), np.asarray(w)) for o, w in zip(found, outputs)]
            same = all(
                o.shape == w.shape
                and np.allclose(o.astype(float), w.astype(float), 2e-3, 1e-3, equal_nan=True)
                for o, w in pairs
            )
            right += same
            wrong += [] if same else [case.name]
    assert not wrong and right > 600


def _value(op, place, array):
    settings = place > 0 and op in (
        "Resize", "Upsample", "Range", "Dropout", "ConstantOfShape", "Pad",
    )  # fmt: skip
    return Value(array if settings or array.dtype.kind in "iub" else jnp.asarray(array))


def test_a_folder_keeps_the_template_small(file, tmp_path):
    _, path = file("vgg")
    found = load_net(path, preprocess="0-1")
    assert found.about["origin"].template.nbytes < 0.2 * path.stat().st_size
    save_net(tmp_path / "net", found)
    again = load_net(tmp_path / "net")
    assert again.net == found.net and len(again.lines) == 0


def test_a_folder_is_read_at_the_size_of_the_net_and_other_sizes_are_told(file, tmp_path):
    _, path = file("mobile")
    side, image = (
        foreign_nets.SIDE,
        np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), np.uint8),
    )
    for i, one in enumerate(image):
        (tmp_path / "set" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(tmp_path / "set" / str(i % 2) / f"{i}.png")
    loaded = load_net(path, dataset=tmp_path / "set")
    assert loaded.model.shape == (side, side, 3) and loaded.about["dataset"].size == side
    np.savez(tmp_path / "set.npz", image=image, label=np.arange(4) % 2)
    with pytest.raises(BadInput, match=f"takes images of {side}×{side}×3, those of npz are 9×9×3"):
        load_net(path, dataset=datasets.source(str(tmp_path / "set.npz")))
    with pytest.raises(BadInput, match=f"takes images of {side}×{side}×3, not of 9×9×3"):
        load_net(path, size=(9, 9, 3))
