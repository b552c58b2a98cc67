"""Files of nets that are cut, damaged, made to run code or to fill the memory: one line each."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile

import h5py
import numpy as np
import pytest

from bdjax import load_net
from bdjax.foreign import onnx as reader
from bdjax.foreign import safetensors
from bdjax.foreign.graph import Graph, Weight, parsed, written
from bdjax.foreign.torch import LEGACY
from bdjax.types import BadInput

HOW = {"arch": "cnn", "preprocess": "0-1", "size": (28, 28, 1)}
MOST = 1 << 30
"""Bytes that reading a hostile file may take."""


def refused(path, **how):
    """The line with which a file is refused; nothing else may come of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput) as caught:
        load_net(path, **how)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600, line
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < MOST, "memory"
    return line


def pt(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in dict(storages).items():
            archive.writestr(f"archive/data/{name}", content)
    return path


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_in_a_pickle_is_not_run(tmp_path, protocol):
    raw = pickle.dumps({"weight": Evil(tmp_path / "ran")}, protocol)
    for content, name in ((raw, "plain.pt"), (b"\x80\x02" + raw, "plain.bin")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, **HOW)
    assert "which is code" in refused(pt(tmp_path / "zip.pt", raw), **HOW)
    magic = pickle.dumps(LEGACY, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    (tmp_path / "old.pt").write_bytes(magic + raw)
    assert "which is code" in refused(tmp_path / "old.pt", **HOW)
    assert not (tmp_path / "ran").exists()


GLOBALS = ("builtins eval", "os system", "posix system", "torch load", "numpy.core.multiarray _x",
           "collections OrderedDict.fromkeys", "torch._utils _rebuild_tensor_v2.__globals__",
           "bdjax.own discard")  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
def test_names_that_are_not_known_are_refused(tmp_path, name):
    module, _, attribute = name.partition(" ")
    raw = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    assert attribute in refused(pt(tmp_path / "a.pt", raw), **HOW)


@pytest.mark.parametrize("raw", [
    b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2³¹ places
    b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a bytearray of a terabyte
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", b"\x80\x02(" + b"t" * 50_000 + b".",
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", b"I1\n.", b"\x80\x02N.", b"\x80\x02}.",
    b"\x80\x02cPIL.Image\nImage\n)\x81}b.", b"\x80\x02c_codecs\nencode\n}b.", b"", b"\x80",
    b"\x80\x02ccollections\nOrderedDict\n}b.", b"\x80\x02ctorch\nSize\n(K\x01tR.",
    b"\x80\x02cnumpy\ndtype\nX\x08\x00\x00\x009999999V\x85R.",
])  # fmt: skip
def test_odd_pickles_are_one_line(tmp_path, raw):
    refused(pt(tmp_path / "a.pt", raw), **HOW)


def with_shape(shape, strides, size=4, offset=0):
    """A pickle of one tensor, by its operations."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def text(word):
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    raw = b"\x80\x02}" + text("weight") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
    raw += text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    raw += number(size) + b"tQ" + number(offset)
    for values in (shape, strides):
        raw += b"(" + b"".join(map(number, values)) + b"t"
    return raw + b"\x89}tRs."


@pytest.mark.parametrize("shape, strides", [
    ((1 << 40,), (0,)), ((1 << 20, 1 << 20), (0, 0)), ((5,), (1,)), ((4,), (2,)), ((-4,), (1,)),
    ((4,), (-1,)), ((4,), ()), ((2,), (1 << 62,)),
])  # fmt: skip
def test_a_tensor_that_is_no_view_of_its_numbers_is_refused(tmp_path, shape, strides):
    path = pt(
        tmp_path / "a.pt", with_shape(shape, strides), {"0": np.ones(4, np.float32).tobytes()}
    )
    assert "tensor 'weight'" in refused(path, **HOW)


def test_a_tensor_beyond_or_without_its_storage_is_refused(tmp_path):
    data = {"0": np.ones(4, np.float32).tobytes()}
    refused(pt(tmp_path / "a.pt", with_shape((4,), (1,), offset=3), data), **HOW)
    refused(pt(tmp_path / "a.pt", with_shape((4,), (1,))), **HOW)


def test_zip_bombs_are_refused(tmp_path):
    zeros = bytes(1 << 26)
    path = pt(tmp_path / "a.pt", with_shape((4,), (1,)), {"0": zeros}, zipfile.ZIP_DEFLATED)
    assert "packed" in refused(path, **HOW)
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * (1 << 26))
        archive.writestr("model.weights.h5", zeros)
    assert "too large" in refused(tmp_path / "a.keras")
    pickled = pt(tmp_path / "b.pt", b"\x80\x02" + zeros + zeros, (), zipfile.ZIP_DEFLATED)
    assert "too large" in refused(pickled, **HOW)


def config(layers):
    return json.dumps({"class_name": "Sequential", "config": {"layers": layers}})


DENSE = [
    {"class_name": "InputLayer", "config": {"batch_shape": [None, 8, 8, 1], "name": "i"}},
    {"class_name": "Flatten", "config": {"name": "f"}},
    {"class_name": "Dense", "config": {"name": "d", "activation": "linear"}},
]


def keras_h5(path, layers=DENSE, shape=(64, 3), **how):
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = config(layers)
        group = file.create_group("model_weights/d/d")
        group.create_dataset("kernel:0", shape, "f4", **how)
        group.create_dataset("bias:0", (3,), "f4")
    return path


def test_bombs_of_hdf5_are_refused(tmp_path):
    assert load_net(keras_h5(tmp_path / "a.h5")).model.classes == 3  # that is how it would be read
    huge = keras_h5(tmp_path / "b.h5", shape=(1 << 20, 1 << 20), chunks=(1024, 1024))
    assert "declares" in refused(huge)
    with h5py.File(keras_h5(tmp_path / "c.h5"), "r+") as file:
        del file["model_weights/d/d/kernel:0"]
        file["model_weights/d/d/kernel:0"] = h5py.ExternalLink("/etc/passwd", "/")
    refused(tmp_path / "c.h5")
    outside = keras_h5(tmp_path / "d.h5", external=[("/etc/hostname", 0, 768)])
    assert "lies in other files" in refused(outside)


@pytest.mark.parametrize("layer, words", [
    ({"class_name": "Lambda", "config": {"name": "l", "function": ["4wE="]}}, "code"),
    ({"class_name": "Mine", "config": {"name": "l"}}, "Mine"),
    ({"class_name": "Dense", "module": "os", "config": {"name": "l"}}, "its owner's code"),
    ({"class_name": "Dense", "registered_name": "a>B", "config": {"name": "l"}}, "owner's code"),
    ({"class_name": "Dense", "config": 3}, "damaged"), (3, "damaged"),
    ({"class_name": ["x"], "config": {"name": "l"}}, "not known"),
    ({"class_name": "Activation", "config": {"name": "l", "activation": "eval"}}, "eval"),
    ({"class_name": "Reshape", "config": {"name": "l", "target_shape": [1 << 40]}}, ""),
    ({"class_name": "UpSampling2D", "config": {"name": "l", "size": 1 << 20}}, ""),
    ({"class_name": "ZeroPadding2D", "config": {"name": "l", "padding": 1 << 20}}, ""),
    ({"class_name": "MaxPooling2D", "config": {"name": "l"}}, "damaged"),
])  # fmt: skip
def test_layers_that_are_not_known_are_refused_by_name(tmp_path, layer, words):
    path = keras_h5(tmp_path / "a.h5", [DENSE[0], layer, *DENSE[1:]])
    assert words in refused(path)


# --- ONNX ---


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx")


def model(onnx, nodes, initializers=(), shape=("n", 1, 8, 8)):
    h = onnx.helper
    made = h.make_graph(
        [h.make_node(op, i, o, **attrs) for op, i, o, attrs in nodes], "g",
        [h.make_tensor_value_info("x", 1, shape)], [h.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in dict(initializers).items()],
    )  # fmt: skip
    return h.make_model(made, opset_imports=[h.make_opsetid("", 18)])


HEAD = [("Flatten", ["x"], ["f"], {}), ("Gemm", ["f", "w"], ["y"], {})]
KERNEL = {"w": np.ones((64, 3), np.float32)}


APART = {
    "an absolute path": {"location": "/etc/passwd"},
    "another folder": {"location": "../secret.bin"},
    "a folder below": {"location": "below/secret.bin"},
    "the folder itself": {"location": "."},
    "no place": {},
    "a link": {"location": "link.bin"},
    "a pipe": {"location": "pipe.bin"},
    "a folder": {"location": "below"},
    "too short": {"location": "short.bin"},
    "beyond the end": {"location": "right.bin", "offset": "1"},
    "far beyond": {"location": "right.bin", "offset": str(10**30)},
    "before the start": {"location": "right.bin", "offset": "-4"},
    "no offset": {"location": "right.bin", "offset": "x"},
    "another length": {"location": "right.bin", "length": "4"},
    "a huge length": {"location": "right.bin", "length": str(1 << 60)},
    "NUL": {"location": "a\0b"},
}


@pytest.mark.parametrize("name", [*APART, "huge"])
def test_numbers_in_other_files(onnx, tmp_path, name):
    made = model(onnx, HEAD, KERNEL)
    (one,) = made.graph.initializer
    one.ClearField("raw_data")
    one.data_location = onnx.TensorProto.EXTERNAL
    told = APART.get(name, {"location": "right.bin"})
    if name == "huge":
        one.dims[0] = 1 << 40
    for key, value in told.items():
        one.external_data.add(key=key, value=value)
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    numbers = KERNEL["w"].tobytes()
    for place in (tmp_path / "secret.bin", home / "below" / "secret.bin", home / "right.bin"):
        place.write_bytes(numbers)
    (home / "short.bin").write_bytes(numbers[:-1])
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(home / "pipe.bin")
    (home / "a.onnx").write_bytes(made.SerializeToString())
    refused(home / "a.onnx")


def test_numbers_that_many_tensors_share_are_bounded(onnx, tmp_path):
    """A small file beside it must not become a large net."""
    made = model(onnx, HEAD, KERNEL)
    (one,) = made.graph.initializer
    one.ClearField("raw_data")
    one.data_location = onnx.TensorProto.EXTERNAL
    one.external_data.add(key="location", value="right.bin")
    for i in range(50):
        made.graph.initializer.add().CopyFrom(one)
        made.graph.initializer[-1].name = f"w{i}"
    (tmp_path / "right.bin").write_bytes(KERNEL["w"].tobytes())
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    load_net(tmp_path / "a.onnx")
    with pytest.raises(BadInput, match="more than the memory here allows"):
        reader.whole(tmp_path / "a.onnx", made.SerializeToString(), 20_000)


HUGE = np.asarray([1 << 20, 1 << 20])
BOMBS = {
    "constant": ([("ConstantOfShape", ["s"], ["c"], {})], {"s": HUGE}),
    "expand": ([("Expand", ["o", "s"], ["c"], {})], {"o": np.ones(1, np.float32), "s": HUGE}),
    "tile": ([("Tile", ["o", "s"], ["c"], {})], {"o": np.ones((1, 1), np.float32), "s": HUGE}),
    "range": ([("Range", ["a", "s", "b"], ["c"], {})], {"a": 0, "s": 1 << 40, "b": 1}),
    "outer": (
        [("Mul", ["o", "p"], ["c"], {})],
        {"o": np.ones((1 << 17, 1), np.float32), "p": np.ones((1, 1 << 17), np.float32)},
    ),
    "pad": (
        [("Pad", ["o", "s"], ["c"], {})], {"o": np.ones(1, np.float32), "s": np.int64([0, 1 << 40])}
    ),
    "doubling": (
        [("Concat", [f"c{i}"] * 2, [f"c{i + 1}"], {"axis": 0}) for i in range(60)]
        + [("Identity", ["c60"], ["c"], {})],
        {"c0": np.ones(8, np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_billions_of_numbers_are_refused(onnx, tmp_path, name):
    nodes, arrays = BOMBS[name]
    used = [("ReduceSum", ["c"], ["t"], {"keepdims": 0}), ("Add", ["x", "t"], ["g"], {})]
    head = [("Flatten", ["g"], ["f"], {}), HEAD[1]]
    made = model(onnx, [*nodes, *used, *head], {**arrays, **KERNEL})
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    assert "too large" in refused(tmp_path / "a.onnx")


@pytest.mark.parametrize("nodes, arrays", [
    ([("Resize", ["x", "", "s"], ["g"], {})], {"s": np.float32([1, 1, 1e6, 1e6])}),
    ([("Expand", ["x", "s"], ["g"], {})], {"s": np.asarray([1, 1 << 20, 8, 8])}),
    ([("Tile", ["x", "s"], ["g"], {})], {"s": np.asarray([1, 1 << 30, 1, 1])}),
])  # fmt: skip
def test_activations_of_billions_are_refused(onnx, tmp_path, nodes, arrays):
    made = model(onnx, [*nodes, ("GlobalAveragePool", ["g"], ["x2"], {}),
                        ("Flatten", ["x2"], ["f"], {}), HEAD[1]], {**arrays, **KERNEL})  # fmt: skip
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    refused(tmp_path / "a.onnx")


def test_millions_of_small_messages_are_refused_before_they_are_parsed(onnx, monkeypatch):
    from bdjax import schema
    from bdjax.foreign.onnx import _model

    monkeypatch.setattr(schema, "memory", lambda: 1 << 24)
    body = b"\x0a\x00" * (1 << 18)
    with pytest.raises(BadInput, match="are no weights: too large"):
        _model(b"\x3a" + b"\x80\x80\x20" + body)
    big = model(onnx, HEAD, {"w": np.ones((64, 3000), np.float32)}).SerializeToString()
    assert len(big) > 1 << 16 and _model(big).graph.node


def test_tensors_that_do_not_hold_what_they_say_are_refused(onnx, tmp_path):
    for dims in ([1 << 40, 3], [64, 4], [-1, 3]):
        made = model(onnx, HEAD, KERNEL)
        made.graph.initializer[0].dims[:] = dims
        (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
        assert "tensor 'w'" in refused(tmp_path / "a.onnx")
    made = model(onnx, HEAD, {"w": np.full((64, 3), np.nan, np.float32)})
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    assert "not finite" in refused(tmp_path / "a.onnx")


# --- Damage ---


def whole(tmp_path, onnx=None):
    """A file of each format, with what it needs to be read; all are under 1 MB."""
    rows = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    keras_h5(tmp_path / "a.h5")
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        held = io.BytesIO()
        with h5py.File(held, "w") as file:
            file["layers/dense/vars/0"], file["layers/dense/vars/1"] = rows, np.zeros(3, np.float32)
        archive.writestr("config.json", config(DENSE))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0"}))
        archive.writestr("model.weights.h5", held.getvalue())
    safe = safetensors.written({"a.weight": rows, "b.weight": rows})
    (tmp_path / "a.safetensors").write_bytes(safe)
    data = {"0": rows.tobytes()}
    pt(tmp_path / "a.pt", with_shape((64, 3), (3, 1), 192), data)
    if onnx is not None:
        big = {"w": np.ones((64, 300), np.float32)}
        (tmp_path / "a.onnx").write_bytes(model(onnx, HEAD, big).SerializeToString())
    return sorted(tmp_path.glob("a.*"))


def test_files_cut_at_every_kilobyte_are_one_line(onnx, tmp_path):
    for path in whole(tmp_path, onnx):
        raw = path.read_bytes()
        for end in range(0, len(raw), 1024):
            path.write_bytes(raw[:end])
            refused(path, **(HOW if path.suffix in (".pt", ".safetensors") else {}))


@pytest.mark.long
def test_files_with_a_byte_changed_are_read_or_one_line(onnx, tmp_path):
    draw = np.random.default_rng(0)
    for path in whole(tmp_path, onnx):
        raw = path.read_bytes()
        for place in draw.integers(0, min(len(raw), 3000), 40):
            path.write_bytes(raw[:place] + bytes([draw.integers(256)]) + raw[place + 1 :])
            try:
                load_net(path, **(HOW if path.suffix in (".pt", ".safetensors") else {}))
            except BadInput as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("raw", [
    b"", b"x", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"{}", b"\x08\x07", bytes(1000),
    (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
    (20).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}',
])  # fmt: skip
@pytest.mark.parametrize("ending", ["onnx", "pt", "safetensors", "keras", "h5", "bin"])
def test_what_is_no_net_is_one_line(tmp_path, raw, ending):
    (tmp_path / f"a.{ending}").write_bytes(raw)
    refused(tmp_path / f"a.{ending}", **HOW)


def test_what_is_no_file_is_one_line(tmp_path):
    assert "No such file" in refused(tmp_path / "none.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "a pipe or a device" in refused(tmp_path / "pipe.onnx")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", **HOW)


def test_a_graph_in_a_net_s_folder_is_not_trusted():
    weight = Weight("a", "b", (1 << 40,))
    graph = Graph((), "x", "NCHW", "y", (8, 8, 1), 3, {"w": weight}, {}, {})
    for text in ("", "{}", "[]", "[" * 100_000, written(graph), '{"nodes": [{"op": 3}]}'):
        with pytest.raises(BadInput, match="is damaged"):
            parsed(text)
