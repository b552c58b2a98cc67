"""Nothing that is read back is trusted: whatever lies where a file should be, there is one line, or
it is left out and counted; and what bdjax 0.1 wrote is still read.
"""

import itertools
import json
import os
import shutil
import signal
import zipfile
from contextlib import contextmanager
from pathlib import Path

import chex
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from planted import row

from bdjax import audits, checkpoints, cli, datasets, plots, progress, report, schema, store, sweep
from bdjax.attacks.badnets import BadNets
from bdjax.checkpoints import load_model, load_tree, save_model, save_tree
from bdjax.datasets.files import Npz
from bdjax.datasets.sample import Sample
from bdjax.defenses import base
from bdjax.models.keras_h5 import load_keras_weights
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store, read_rows
from bdjax.train import Recipe
from bdjax.types import BadInput

JSON = sorted(kind for kind, known in schema.KINDS.items() if isinstance(known.form, dict))
NPZ = sorted(schema.KINDS.keys() - {*JSON, "h5"})
FULL = row(
    "a", experiment="e", scale="cpu", dataset="npz", model="cnn", attack="badnets", defense=None,
    seed=0, config={"attack": {"name": "badnets", "rate": 0.1}, "defense": None}, victim="v",
    metrics={"acc_test": 0.9, "asr_nt": 0.8, "infected": 1.0, "undecided": 0.0}, verdict="infected",
    plan={"asked": 3, "poisoned": 2}, test={"n": 50, "majority": 0.1}, oracle=False,
    twin={"victim": "w", "acc_test": 0.9, "asr_nt": 0.1}, reported={"asr_nt": 0.9}, substitute=None,
    device="cpu", jax="0", commit=None,
)  # fmt: skip
SMALL = Sample(train_size=200, test_size=50)
SHARE = {"hits": 1, "n": 2, "share": 0.5, "low": 0.1, "high": 0.9}
AUDIT = {
    "key": "0" * 16, "version": "0", "alpha": 0.05, "minutes": 10.0,
    "net": {"name": "n", "shape": [8, 8, 1], "classes": 4, "parameters": 9, "unverified": None},
    "data": {"name": "d", "searched": 9, "held": 9, "labelled": True, "accuracy": 0.9, "names": []},
    "verdict": {"word": "infected", "reason": "r", "judge": "j", "label": 1, "name": "1",
                "p_value": 0.01, "complete": True},
    "null": "references", "power": SHARE, "false_alarms": SHARE,
    "references": {"each": 2, "accuracy": 0.9, "wanted": 0.9, "took": 2, "seconds": 1.0,
                   "why": None},
    "judges": [{
        "judge": "j", "settings": {}, "word": "infected", "index": 3.0, "p_value": 0.01,
        "seeds": [{"p_value": float("nan"), "index": float("inf"), "labels": [1]}],
        "labels": [{"label": 1, "name": "1", "flagged": True, "norm": 2.0, "moved": None,
                    "pixels": 3}],
        "neuron": {"site": "s", "channel": 0, "label": 1}, "seconds": 1.0,
    }],
    "screened": {"labels": 4, "leaders": ["1"], "order": [1], "seconds": 1.0},
    "not_tried": [{"judge": "m", "reason": "r"}], "seconds": 2.0,
}  # fmt: skip


@contextmanager
def seconds(most: int):
    """Ends what hangs."""

    def late(*_):
        raise TimeoutError(f"took more than {most} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(read, *args) -> str | None:
    """The line that reading ends in; None where it ends well."""
    with seconds(60):
        try:
            read(*args)
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return str(error)
    return None


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    """A model folder."""
    path, made = tmp_path_factory.mktemp("model") / "net", Ffnn(hidden=(4,))
    model = build(made, (28, 28, 1), 10)
    about = {"dataset": SMALL, "attack": BadNets(target=3), "recipe": Recipe(), "seed": 7}
    metrics = {"acc_test": 0.5, "index": float("inf"), "asr_nt": float("nan")}
    save_model(path, made, model, model.init(jax.random.key(0)), metrics=metrics, **about)
    return path


@pytest.fixture(scope="module")
def whole(net, tmp_path_factory) -> Path:
    """A folder with a whole file of each kind."""
    home = tmp_path_factory.mktemp("whole")
    results = Store(home / "results")
    results.append([FULL, *(row(name, metrics={"acc_test": 0.9}) for name in "bc")])
    curve = report.Figure("curve", "A curve", "Sample.", plots.curves([1, 2], {"a": [0.1, 0.2]}))
    trends = [("claim", "not", "1 %")]
    report.write(results.folder, results.rows(), [curve], "T", ["n"], trends, {"train": 2.0}, "x")
    facts = dict.fromkeys(("shard", "devices", "doing"), "")
    facts |= dict.fromkeys(("total", "rows", "before", "groups", "group", "failed"), 1)
    progress.Board(results.folder / "progress.json", **facts).write()
    poison = {"attack": {}, "dataset": {}, "fingerprint": "0" * 16, "seed": 0, "shape": [8, 8, 1]}
    poison |= {"classes": 4, "names": [], "rows": {"train": 4}, "counts": {"rows": 4}, "notes": []}
    (home / "poison.json").write_text(schema.dump(poison, "poison"))
    (home / "audit.json").write_text(schema.dump(AUDIT, "audit"))
    members = results.folder / "members.json"
    members.write_text(schema.dump({"victims": ["a", "b"]}, "members"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDJAX_DATA_DIR", str(home / "cache"))
        store.remember("lanes", "cpu", {"lanes": 2, "tried": 4})
    (home / "net").mkdir()
    for name in ("arrays.npz", "model.json"):
        shutil.copy(net / name, home / "net")
    image = {"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.arange(4)}
    twice = {f"{part}_{k}": v for part in ("train", "test") for k, v in image.items()}
    known = {"image": image["image"], "logits": np.zeros((4, 3), np.float32)}
    for kind, arrays in {"npz": image, "decoded": twice, "reference": known}.items():
        schema.write_arrays(home / f"{kind}.npz", arrays, kind)
    results.save_arrays("a", {"a0": np.arange(3.0)})
    (home / "tree").mkdir()
    schema.write_arrays(home / "tree" / "leaves.npz", {"a/b": np.zeros(3)}, "leaves")
    with h5py.File(home / "a.h5", "w") as file:
        file["data"], file["label"] = np.zeros((4, 1, 8, 8)), np.arange(4)
    return home


@pytest.fixture
def files(whole, net, tmp_path):
    """A copy of a whole file of each kind, and what reads it: `{kind: (path, read)}`."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.symlink(net / "variables", tmp_path / "net" / "variables")

    def status(path):
        found = progress.boards(path.parent)
        progress.table(found)
        if not found:
            raise BadInput("no board")

    results, like = tmp_path / "results", {"a": {"b": np.zeros(3)}}
    found = {
        "model": ("net/model.json", lambda path: load_model(path.parent)),
        "row": ("results/results.jsonl", lambda p: report.merge([p.parent], tmp_path / "page")),
        "report": ("results/report.json", lambda path: report.load(path.parent)),
        "progress": ("results/progress.json", status),
        "poison": ("poison.json", lambda path: schema.read_json(path, "poison")),
        "audit": ("audit.json", lambda path: audits.read(path.parent)),
        "members": ("results/members.json", sweep._held),
        "lanes": ("cache/lanes.json", lambda path: schema.read_json(path, "lanes")),
        "npz": ("npz.npz", lambda path: schema.read_arrays(path, "npz")),
        "reference": ("reference.npz", lambda path: schema.read_arrays(path, "reference")),
        "decoded": ("decoded.npz", lambda path: schema.read_arrays(path, "decoded")),
        "arrays": ("results/arrays/a.npz", lambda path: Store(results).arrays(path.stem)),
        "leaves": ("tree/leaves.npz", lambda path: load_tree(path.parent, like)),
        "h5": ("a.h5", lambda path: schema.read_arrays(path, "h5", ("data", "label"))),
    }
    return {kind: (tmp_path / path, read) for kind, (path, read) in found.items()}


def test_whole_files_of_every_kind_are_read(files):
    assert files.keys() == schema.KINDS.keys()
    for path, read in files.values():
        assert told(read, path) is None


# --- JSON ---

WRONG = (None, True, -1, 0.5, 1e300, 10**400, "x", "inf", "../x", [], [[]], {}, {"name": "x"})


def places(value, path=()):
    """The path of every value within a value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*path, key))


def changed(value, path, new):
    """A copy with the value at `path` replaced, or taken out."""
    copy = json.loads(json.dumps(value))
    if not path:
        return new
    *way, last = path
    inner = copy
    for key in way:
        inner = inner[key]
    if new is ...:
        del inner[last]
    else:
        inner[last] = new
    return copy


def odd_texts(text: str) -> list[bytes]:
    """What is no JSON, or none that is read."""
    cut = [text[: len(text) * i // 4].encode() for i in range(4)] + [text[:-2].encode()]
    head = "{" + '"format": 1, '
    values = [
        "NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "1" * 5000,
        "[" * 1000 + "]" * 1000, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '{"a": 1, "a": 2}',
    ]  # fmt: skip
    odd = [(head + f'"odd": {value}, ' + text[1:]).encode() for value in values]
    return [*cut, *odd, b"", b"\xff\xfe{}", b'{"\xff": 1}', b"\xef\xbb\xbf" + text.encode(), b"[1]"]


@pytest.mark.parametrize("kind", sorted({*JSON} - {"row"}))
def test_text_that_is_no_json_of_ours(files, kind):
    path, read = files[kind]
    for raw in odd_texts(path.read_text().strip()):
        path.write_bytes(raw)
        assert told(read, path), raw[:80]


@pytest.mark.parametrize("made", [99, -1, True, "1", None, 1.5])
@pytest.mark.parametrize("kind", sorted({*JSON} - {"row"}))
def test_other_formats(files, kind, made, capsys):
    path, read = files[kind]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": made}))
    line = told(read, path) or ""
    assert line and ("update bdjax" in line + capsys.readouterr().err) == (made == 99)


def mutations(path: Path, whole=None) -> list:
    whole = json.loads(path.read_text()) if whole is None else whole
    spots = [place for place in places(whole) if place]
    return [
        changed(whole, place, new) for place, new in itertools.product(spots, (*WRONG, ...))
    ] + [*WRONG]


@pytest.mark.parametrize("kind", sorted({*JSON} - {"row"}))
def test_wrong_types_and_missing_keys(files, kind):
    path, read = files[kind]
    lines = []
    for value in mutations(path):
        path.write_text(json.dumps(value))
        lines.append(told(read, path))
    assert sum(line is not None for line in lines) > len(lines) / 2


def test_required_parts_of_a_model_s_description(files):
    path, read = files["model"]
    whole = json.loads(path.read_text())
    for name in ("net", "shape", "classes", "masks"):
        path.write_text(json.dumps(changed(whole, (name,), ...)))
        assert name in told(read, path)
    path.write_text(json.dumps(whole | {"pixels": [0.0, 255.0]}))
    assert "pixels" in told(read, path)


def test_odd_rows_are_counted_and_the_rest_is_reported(files, capsys):
    path, read = files["row"]
    lines = path.read_text().splitlines()
    whole = json.loads(lines[0])
    odd = [raw for raw in odd_texts(lines[0]) if raw.strip() and b"\n" not in raw]
    for i, value in enumerate(mutations(path, whole)):
        if isinstance(value, dict) and value.get("run") == whole["run"]:
            value |= {"run": f"m{i}"}  # or the first of them stands for all
        odd.append(json.dumps(value).encode())
    kept = [row for row in odd if not told(schema.understood, row, "row")]
    assert len(kept) < len(odd) / 2
    path.write_bytes(b"\n".join([*odd, *map(str.encode, lines[1:]), b'{"run": "torn']))
    assert told(read, path) is None and {"b", "c"} <= {row["run"] for row in read_rows([path])}
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert f"{len(odd) - len(kept)} of {len(odd) + 2} rows of {path}" in said
    path.write_text(lines[0] + "\n" + json.dumps(whole | {"format": 99}) + "\n")
    assert "row 2 was written by a newer bdjax" in told(read, path)


def test_no_row_is_written_that_would_not_be_read(tmp_path):
    results = Store(tmp_path)
    odd = ({"run": "../x"}, {"metrics": {"a": "b"}}, {"row": "\ud800"}, {"seconds": {}})
    for fields in odd:
        assert "cannot write this row" in told(results.append, [row("a") | fields])
    results.append([row("a", metrics={"x": np.inf, "y": -np.inf, "z": np.nan})])
    assert '"x": "inf", "y": "-inf", "z": null' in results.results.read_text()
    found = results.rows()[0]["metrics"]
    assert (found["x"], found["y"]) == (np.inf, -np.inf) and np.isnan(found["z"])


# --- Other things in the place of files ---


def other_things(path: Path):
    """Puts one thing after another where the file was."""
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    yield "a pipe"
    for target in ("/dev/zero", "/dev/stdin", path.name, "/nowhere"):
        path.unlink()
        os.symlink(target, path)
        yield target
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    yield "a terabyte of nothing"
    path.unlink()


@pytest.mark.parametrize("kind", sorted(schema.KINDS))
def test_things_that_are_no_files(files, kind):
    path, read = files[kind]
    # What a report or a figure lacks it does without.
    free = {"arrays", "report"} if kind in ("arrays", "report") else set()
    for thing in other_things(path):
        gone = thing in ("/nowhere", path.name)
        assert told(read, path) or (gone and free), thing


def test_a_figure_is_a_picture_of_the_folder(files):
    folder = files["report"][0].parent
    things = other_things(folder / "figures" / "curve.png")
    for thing in itertools.chain(things, ["nothing"]):
        with seconds(5):
            assert not report.load(folder).pictures, thing


def test_images_of_a_folder_are_plain_files(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "cat" / f"{i}.png")
    for thing in other_things(tmp_path / "cat" / "3.png"):
        assert told(lambda: datasets.load("folder", path=str(tmp_path), size=8)), thing
    monkeypatch.setattr(schema, "memory", lambda: 1 << 20)
    line = told(lambda: datasets.load("folder", path=str(tmp_path), size=512))
    assert "give a smaller size" in line


# --- Arrays ---


def bomb(path: Path, shape: tuple, dtype="|u1", size: int | None = None) -> None:
    """An `.npz` whose `image` declares more than is there."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".ljust(117)
    raw = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.encode() + b"\n" + b"\0" * 64
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", raw)
        if size is not None:
            archive.filelist[0].file_size = size


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "line"),
    [
        ((14_800, 512, 512, 3), "|u1", 11_639_194_752, "declares 11.6 GB"),
        ((14_800, 512, 512, 3), "|u1", None, "declares 11.6 GB"),
        ((64,), "|u1", 1 << 50, "declares"),
        ((10**12,), "|V0", None, "declares"),
        ((65,), "|u1", None, "not of the size"),
        ((-1, -64), "|u1", None, "not of the size"),
        ((8,), "|O", None, "pickled objects"),
    ],
)
def test_an_archive_is_measured_before_it_is_unpacked(tmp_path, shape, dtype, size, line):
    bomb(tmp_path / "a.npz", shape, dtype, size)
    with seconds(5):
        assert line in (told(Npz(path=str(tmp_path / "a.npz")).load) or "")
        assert line in told(schema.read_arrays, tmp_path / "a.npz", "arrays")


@pytest.mark.parametrize("kind", NPZ)
def test_damaged_archives(files, kind, tmp_path):
    path, read = files[kind]
    whole = path.read_bytes()
    for end in range(0, len(whole), len(whole) // 7):
        path.write_bytes(whole[:end])
        assert told(read, path), end
    rng = np.random.default_rng(0)
    for _ in range(60):  # a flipped byte is seen, or makes no difference
        odd = bytearray(whole)
        odd[int(rng.integers(len(odd)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(odd)
        told(read, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", b"x" * 500)
    assert "packed" in told(read, path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(match="Duplicate"):
        archive.writestr("a.npy", b"x" * 500)
        archive.writestr("a.npy", b"y" * 500)
    assert "one name" in told(read, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"x" * 500)
        archive.filelist.append(zipfile.ZipInfo("b.npy"))
        archive.filelist[1].header_offset = 20
        archive.filelist[1].file_size = archive.filelist[1].compress_size = 400
        archive.filelist[1].CRC = 0
    assert "overlap" in told(read, path)


def odd_h5(file: h5py.File, here: Path, case: str) -> None:
    label = np.arange(4)
    match case:
        case "external link":
            file["data"] = h5py.ExternalLink(here / "other.h5", "data")
        case "soft link":
            file["real"], file["data"] = np.zeros((4, 1, 8, 8)), h5py.SoftLink("/real")
        case "external storage":
            kept = [(here / "raw", 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("data", (4, 1, 8, 8), "u1", external=kept)
        case "virtual":
            layout = h5py.VirtualLayout((4, 1, 8, 8), "u1")
            layout[...] = h5py.VirtualSource(here / "other.h5", "data", (4, 1, 8, 8))
            file.create_virtual_dataset("data", layout)
        case "a group":
            file.create_group("data")
        case "texts":
            file["data"] = ["cat"] * 4
        case "nothing":
            file["data"] = h5py.Empty("u1")
        case "declares":
            file.create_dataset("data", (10**9, 3, 32, 32), "u1", chunks=(1, 3, 32, 32))
        case "a chunk":
            part = file.create_dataset(
                "data", (4, 1, 8, 8), "u1", chunks=(4, 1, 8, 8), compression="gzip"
            )
            part.id.write_direct_chunk((0, 0, 0, 0), b"\0" * (2 << 20))
        case "packed":
            file.create_dataset("data", (4, 1, 8, 8), "i4", scaleoffset=4)
        case "references":
            file.create_dataset("data", (4,), h5py.ref_dtype)
    file["label"] = label


@pytest.mark.parametrize(
    "case",
    ["external link", "soft link", "external storage", "virtual", "a group", "texts", "nothing",
     "declares", "a chunk", "packed", "references"],
)  # fmt: skip
def test_h5_holds_plain_arrays_of_its_own(tmp_path, case):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        odd_h5(file, tmp_path, case)
    line = told(lambda: datasets.load("h5", path=str(tmp_path / "a.h5")))
    assert line and "a.h5" in line


@pytest.mark.parametrize("case", ["external storage", "declares", "a chunk", "packed"])
def test_keras_weights_are_plain_arrays_of_their_file(tmp_path, case):
    model = build(Ffnn(hidden=(4,)), (8, 8, 1), 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        odd_h5(file, tmp_path, case)
        file.move("data", "dense_1/dense_1/kernel:0")
    line = told(load_keras_weights, tmp_path / "a.h5", model)
    assert "dense_1/kernel:0" in line or "declares" in line
    for thing in other_things(tmp_path / "a.h5"):
        assert told(load_keras_weights, tmp_path / "a.h5", model), thing


def test_a_packed_h5_is_read(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=data, compression="gzip", shuffle=True, fletcher32=True)
        file["label"] = np.arange(40) % 4
    assert datasets.load("h5", path=str(tmp_path / "a.h5")).classes == 4


def test_a_file_is_what_it_holds_whatever_its_name(tmp_path):
    image, label = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40)
    np.savez(tmp_path / "a.npz", image=image, label=label % 4)
    (tmp_path / "a.npz").rename(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.npz", "w", userblock_size=512) as file:
        file["data"], file["label"] = np.moveaxis(image, -1, 1), label % 4
    for name, kind in itertools.product(("a.h5", "b.npz"), ("npz", "h5")):
        data = datasets.load(kind, path=str(tmp_path / name))
        assert data.shape == (8, 8, 1) and data.classes == 4
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    for i, kind in enumerate(("jpeg", "png", "bmp", "gif", "tiff", "webp", "png") * 3):
        suffix = (".png", "", ".dat")[i % 3]
        with open(tmp_path / "folder" / "cat" / f"{i}{suffix}", "wb") as file:
            Image.fromarray(image[i, ..., 0]).save(file, kind)
    (tmp_path / "folder" / "cat" / "notes.txt").write_text("no image")
    data = datasets.load("folder", path=str(tmp_path / "folder"), size=8)
    assert sum(len(split.label) for split in (data.train, data.clean, data.test)) == 21


# --- Checkpoints ---


def test_leaves_have_names_that_plain_orbax_reads(tmp_path):
    import orbax.checkpoint as ocp

    tree = {"params": {"conv_1": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}}
    save_tree(tmp_path / "t", ({"rate": jnp.float32(0.1)}, tree, [np.arange(2), np.int32(3)]))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
        found = plain.restore(tmp_path / "t")
    assert found["1"]["params"]["conv_1"]["kernel"].shape == (2, 3)
    assert set(found) == {"0", "1", "2"} and set(found["2"]) == {"0", "1"}


def test_a_checkpoint_that_does_not_fit_is_not_read(tmp_path, monkeypatch):
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.int32)}
    save_tree(tmp_path / "t", tree)
    likes = [
        (tree | {"a": np.zeros((3, 2), np.float32)}, "a is float32"),
        (tree | {"b": np.zeros(3, np.float32)}, "b is int32"),
        (tree | {"c": np.zeros(3)}, "has no c"),
        ({"a": tree["a"]}, "has 2 arrays"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.Checkpointer.restore", None)
        for like, line in likes:
            assert line in told(load_tree, tmp_path / "t", like)
    chex.assert_trees_all_equal(load_tree(tmp_path / "t", tree), tree)


def test_damaged_checkpoints(tmp_path):
    tree = {"a": np.arange(3000.0)}
    save_tree(tmp_path / "t", tree)
    for file in sorted(path for path in (tmp_path / "t").rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for raw in (b"", whole[: len(whole) // 2], b"x" * len(whole), b"[" * 100_000):
            file.write_bytes(raw)
            told(load_tree, tmp_path / "t", tree)  # some of them nobody reads
        file.unlink()
        os.mkfifo(file)
        assert "a pipe" in told(load_tree, tmp_path / "t", tree)
        file.unlink()
        file.write_bytes(whole)
    chex.assert_trees_all_equal(load_tree(tmp_path / "t", tree), tree)
    about = tmp_path / "t" / "_CHECKPOINT_METADATA"
    about.write_text(about.read_text().replace('"format": 1', '"format": 99'))
    assert "update bdjax" in told(load_tree, tmp_path / "t", tree)


# --- What a model folder says of its training ---


def test_a_model_folder_knows_its_data_and_its_training(net, tmp_path, monkeypatch, capsys):
    text = json.loads((net / "model.json").read_text())
    assert text["format"] == 1 and text["seed"] == 7 and text["pixels"] == [0.0, 1.0]
    assert text["fingerprint"] == datasets.fingerprint(SMALL.load())
    assert text["metrics"] == {"acc_test": 0.5, "index": "inf", "asr_nt": None}
    about = load_model(net)[3]
    assert about["metrics"]["index"] == np.inf and np.isnan(about["metrics"]["asr_nt"])

    image, label = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40)
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", image=image, label=label % 4)
    made = Ffnn(hidden=(4,))
    model = build(made, (8, 8, 1), 4)
    variables = model.init(jax.random.key(0))
    save_model(tmp_path / "m", made, model, variables, dataset=Npz(path="a.npz"), seed=0)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    about = load_model(tmp_path / "m")[3]
    checkpoints.check_data(about, "m", strict=True)
    assert about["dataset"].load().classes == 4 and not capsys.readouterr().err

    file = tmp_path / "m" / "model.json"  # moved with its data: relative to itself
    (tmp_path / "m" / "mine.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    described = json.loads(file.read_text())
    described["dataset"]["path"] = "mine.npz"
    file.write_text(json.dumps(described))
    about = load_model(tmp_path / "m")[3]
    checkpoints.check_data(about, "m", strict=True)

    np.savez(tmp_path / "m" / "mine.npz", image=255 - image, label=label % 4)
    checkpoints.check_data(about, "m")
    assert "is not what the net was trained on" in capsys.readouterr().err
    assert "is not what the net was trained on" in told(checkpoints.check_data, about, "m", True)


def test_data_that_changed_on_disk_is_read_anew(tmp_path):
    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        np.savez(
            tmp_path / "a.npz", image=rng.integers(0, 256, (40, 8, 8, 1)), label=np.arange(40) % 4
        )
        for i in range(20):
            (tmp_path / "folder" / "cat").mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
            image.save(tmp_path / "folder" / "cat" / f"{i}.png")

    def look() -> list:
        sources = (
            ("npz", {"path": str(tmp_path / "a.npz")}),
            (
                "folder",
                {"path": str(tmp_path / "folder"), "size": 8},
            ),
        )
        return [datasets.load(kind, **fields) for kind, fields in sources]

    write(0)
    before = look()
    assert all(one is other for one, other in zip(before, look(), strict=True))
    write(1)
    after = look()
    for one, other in zip(before, after, strict=True):
        assert datasets.fingerprint(one) != datasets.fingerprint(other)
    (tmp_path / "folder" / "cat" / "3.png").unlink()
    assert len(look()[1].train.label) < len(after[1].train.label)


def test_defend_looks_at_the_rows_that_were_poisoned(tmp_path, monkeypatch, capsys):
    seen, made = [], sweep.poisoned_set

    def recorded(*args):
        train = made(*args)
        note = lambda *leaves: seen.append([np.asarray(leaf) for leaf in leaves])  # noqa: E731
        jax.debug.callback(note, train.plan.source, train.plan.kind)
        return train

    for module in (sweep, base):
        monkeypatch.setattr(module, "poisoned_set", recorded)
    out = str(tmp_path / "net")
    data = ["--dataset.train-size", "100", "--dataset.test-size", "20"]
    fast = ["--model", "ffnn", "--model.hidden", "4", "--recipe.epochs", "1", "--quiet"]
    cli.main(["train", "--out", out, "--seed", "3", "--attack.rate", "0.3", *data, *fast])
    train = list(seen)
    judge = ["defend", out, "--defense", "spectral-signatures", "--quiet"]
    seen.clear()
    cli.main(judge)
    assert train and seen
    for plan in seen:
        chex.assert_trees_all_equal(plan, train[0])
    other = made(jax.random.fold_in(jax.random.key(0), 2), *planned(out)).plan
    assert not np.array_equal(other.kind, train[0][1]) or not np.array_equal(
        other.source, train[0][0]
    )

    def refused(*args) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main([*judge, *args])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "trained with seed 3" in refused("--train-seed", "3")
    file = tmp_path / "net" / "model.json"  # as bdjax 0.1 wrote it
    old = {k: v for k, v in json.loads(file.read_text()).items()}
    for name in ("format", "seed", "fingerprint", "pixels"):
        del old[name]
    file.write_text(json.dumps(old))
    assert "give --train-seed N" in refused()
    seen.clear()
    cli.main([*judge, "--train-seed", "3"])
    chex.assert_trees_all_equal(seen[0], train[0])


def planned(path: str):
    about, model = (part for part in load_model(path)[3:0:-2])
    return about["dataset"].load().train, about["attack"], model.classes


# --- What bdjax 0.1 wrote ---


def test_what_the_first_version_wrote_is_read(net, tmp_path, monkeypatch):
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path))
    made, _, variables, about = load_model(net)
    leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(variables))}
    for name in ("orbax", "npz"):
        old = tmp_path / name
        old.mkdir()
        if name == "npz":
            (old / "variables").mkdir()
            np.savez(old / "variables" / "leaves.npz", **leaves)
        else:
            with checkpoints._checkpointer() as checkpointer:
                checkpointer.save(old / "variables", leaves)
        np.savez(old / "arrays.npz")
        described = json.loads((net / "model.json").read_text())
        for key in ("format", "seed", "fingerprint", "pixels"):
            del described[key]
        described["metrics"] = {"acc_test": 0.5, "index": None}
        (old / "model.json").write_text(json.dumps(described, indent=1))
        again, _, found, told_of = load_model(old)
        chex.assert_trees_all_equal(found, variables)
        assert again == made and told_of["attack"] == about["attack"]
        assert told_of["seed"] is None and told_of["fingerprint"] is None

    results = tmp_path / "results"
    results.mkdir()
    line = row("a", metrics={"index": None, "acc_test": 1}, reported={"acc_test": 0.9})
    (results / "results.jsonl").write_text(json.dumps(line) + "\n")
    about = {"title": "T", "notes": [], "trends": [["c", "not", "n"]], "seconds": {},
             "command": None, "figures": []}  # fmt: skip
    (results / "report.json").write_text(json.dumps(about))
    section = report.load(results)
    assert section.title == "T" and np.isnan(section.rows[0]["metrics"]["index"])
    (results / "members.json").write_text('["a", "b"]')
    assert sweep._held(results / "members.json")["victims"] == ["a", "b"]
    (tmp_path / "lanes.json").write_text('{"cpu": {"lanes": 2, "tried": 4}}')
    assert store.recall("lanes") == {"cpu": {"lanes": 2, "tried": 4}}
    np.savez(results / "a.npz", a0=np.arange(3))
    assert list(schema.read_arrays(results / "a.npz", "arrays")) == ["a0"]
