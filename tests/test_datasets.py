"""Sources of images: what they give, how it is split, and one clear line for every kind of bad
input.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from PIL import Image

from bdjax import cli, datasets, registry, schema
from bdjax.attacks.badnets import BadNets
from bdjax.audits import images_of
from bdjax.datasets import base, prepared
from bdjax.datasets.base import trainable
from bdjax.datasets.public import Gtsrb, Mnist
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.poison import write_poisoned
from bdjax.study import Cell
from bdjax.sweep import check
from bdjax.train import Recipe
from bdjax.types import BadInput, Split

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("BDJAX_TEST_DATA") or ROOT.parent / "shared" / "data")
real = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no real images in {REAL}: set BDJAX_TEST_DATA"
)


def images(n, shape=(8, 8, 1), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def save(path, **arrays):
    good = {"image": images(40), "label": np.arange(40) % 4}
    Path(path).parent.mkdir(exist_ok=True)
    np.savez(path, **{k: v for k, v in (good | arrays).items() if v is not None})
    return str(path)


def rows(split):
    return {image.tobytes() for image in split.image}


def counts(split):
    return np.bincount(split.label).tolist()


# What the sources give


def test_sample_is_stratified_and_split():
    data = datasets.load()
    assert (
        data.name == "fashion-mnist-sample"
        and data.shape == (28, 28, 1)
        and data.classes == len(data.names) == 10
    )
    assert (
        counts(data.train) == [900] * 10
        and counts(data.clean) == [100] * 10
        and counts(data.test) == [200] * 10
    )
    assert data.train.image.dtype == np.uint8 and data.train.label.dtype == np.int32
    assert (
        not rows(data.clean) & rows(data.train) and not np.asarray(data.train.image).flags.writeable
    )
    assert datasets.load() is data


def test_seed_sizes_and_fingerprint():
    data = datasets.load(train_size=1000, test_size=50)
    assert (
        counts(data.train) == [90] * 10
        and counts(data.clean) == [10] * 10
        and counts(data.test) == [5] * 10
    )
    base._load.cache_clear()
    again, other = (
        datasets.load(train_size=1000, test_size=50),
        datasets.load(train_size=1000, test_size=50, seed=1),
    )
    assert datasets.fingerprint(again) == datasets.fingerprint(data) != datasets.fingerprint(other)
    changed = data._replace(clean=other.clean)
    assert datasets.fingerprint(changed) not in (
        datasets.fingerprint(data),
        datasets.fingerprint(other),
    )
    with pytest.raises(BadInput, match="test_size is 5; give 10"):
        datasets.load(test_size=5)


def test_pick_gives_each_class_its_share():
    label = np.repeat([0, 1, 2], [600, 390, 10])
    chosen = base.pick(label, 100, seed=0)
    assert np.bincount(label[chosen]).tolist() == [60, 39, 1] and len(set(chosen)) == 100
    assert set(base.pick(label, 50, seed=0)) < set(chosen)
    assert np.bincount(label[base.pick(label, 3, seed=0)]).tolist() == [1, 1, 1]


def test_groups_stay_together(tmp_path):
    # Tracks are counted within a class, so track 0 of class 0 is not track 0 of class 1.
    label, track = np.repeat([0, 1], 60), np.tile(np.repeat(np.arange(10), 6), 2)
    data = datasets.load(
        "npz",
        path=save(tmp_path / "a.npz", image=images(120), label=label, track=track),
        holdout=0.25,
    )
    assert (
        data.train.group is not None
        and data.clean.group is not None
        and data.test.group is not None
    )
    groups = [
        set(np.asarray(split.group).tolist()) for split in (data.train, data.clean, data.test)
    ]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    assert counts(data.test) == [12, 12] and counts(data.clean) == [12, 12]


def test_npz_with_and_without_test(tmp_path):
    path, test = (
        save(tmp_path / "a.npz", names=np.array(list("abcd"))),
        save(tmp_path / "b.npz", image=images(40, seed=1)),
    )
    data = datasets.load("npz", path=path, test=test)
    assert (
        data.names == ("a", "b", "c", "d")
        and counts(data.train) == [9] * 4
        and len(data.test.label) == 40
    )
    data = datasets.load("npz", path=path)
    assert counts(data.test) == [2] * 4 and not rows(data.test) & (
        rows(data.train) | rows(data.clean)
    )


def test_folder(tmp_path):
    for name in ("2", "10"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images(10, seed=int(name))):
            Image.fromarray(image[..., 0]).save(tmp_path / name / f"{i}.png")
    data = datasets.load("folder", path=str(tmp_path), size=8)
    assert data.names == ("2", "10") and data.shape == (8, 8, 1) and counts(data.test) == [2, 2]
    assert rows(data.train) < rows(Split(images(10, seed=2), np.zeros(10))) | rows(
        Split(images(10, seed=10), np.zeros(10))
    )
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "2", tmp_path / "both" / part / "cat")
        shutil.copytree(tmp_path / "10", tmp_path / "both" / part / "dog")
    Image.fromarray(images(1, (9, 9, 3))[0]).save(tmp_path / "both" / "test" / "cat" / "colour.jpg")
    data = datasets.load("folder", path=str(tmp_path / "both"), size=16)
    assert (
        data.names == ("cat", "dog") and data.shape == (16, 16, 3) and counts(data.test) == [11, 10]
    )


def test_h5_and_faces(tmp_path):
    h5py = pytest.importorskip("h5py")
    faces = images(12, (55, 47, 3))
    for name, dtype in (("a.h5", np.float64), ("b.h5", np.uint8)):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"], file["label"] = (
                faces.transpose(0, 3, 1, 2).astype(dtype),
                (np.arange(12) % 3).astype(float),
            )
        data = datasets.load("faces", path=str(tmp_path / name))
        assert data.classes == 3 and rows(data.train) | rows(data.clean) | rows(data.test) == rows(
            Split(faces, faces)
        )
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["data"] = faces
    with pytest.raises(BadInput, match="has no label"):
        datasets.load("h5", path=str(tmp_path / "c.h5"))


@real
def test_real_faces_and_xrays():
    data = datasets.load(
        "faces", path=str(REAL / "lfw10_train.npz"), test=str(REAL / "lfw10_test.npz")
    )
    assert data.classes == 158 and len(data.test.label) == 807 and min(counts(data.train)) >= 7
    assert len(data.clean.label) == 352 and min(counts(data.clean)) == 1
    data = datasets.load(
        "chest-xray",
        path=str(REAL / "covid3_128_train.npz"),
        test=str(REAL / "covid3_128_test.npz"),
    )
    assert data.names == ("Covid-19", "No_findings", "Pneumonia") and data.shape == (128, 128, 1)


# Bad input

NAN, BIG = images(40).astype(np.float32), images(40).astype(np.float32)
NAN[3, 2, 1], BIG[0] = np.nan, np.inf
BAD = {
    "has no image": {"image": None},
    "has no label": {"label": None},
    r"shape \[40, 8, 8\]": {"image": images(40)[..., 0]},
    r"shape \[40, 8, 8, 4\]": {"image": images(40, (8, 8, 4))},
    r"shape \[0, 8": {"image": images(0), "label": np.arange(0)},
    "dtype <U1": {"image": np.full((40, 8, 8, 1), "x")},
    "NaN or infinite": {"image": NAN},
    "NaN or infin": {"image": BIG},
    "pixels run from 0 to 1;": {"image": images(40) % 2 / 1.0},
    "pixels run from -1": {"image": images(40).astype(np.int16) - 1},
    "40 images but label": {"label": np.arange(39) % 4},
    "40 images but group": {"track": np.arange(3)},
    "labels are not whole": {"label": np.arange(40) % 4 + 0.5},
    "labels are not": {"label": np.full(40, "cat")},
    "labels run from -1": {"label": np.arange(40) % 4 - 1},
    "class 2 has no training": {"label": np.array([0, 1, 3, 4] * 10)},
    r"class 4 \(e\) has no training": {"names": np.array(list("abcde"))},
    "label is 3 but there are 2": {"names": np.array(["a", "b"])},
    "class 1 has no training": {"label": np.array([0, 2_000_000_000] * 20)},
    "pickled objects": {"image": np.array([{"code": print}] * 40, object)},
    "names are not": {"names": np.arange(4)},
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arrays(tmp_path, line):
    with pytest.raises(BadInput, match=line) as error:
        datasets.load("npz", path=save(tmp_path / "a.npz", **BAD[line]))
    assert "\n" not in str(error.value) and "a.npz" in str(error.value)


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_bad_files(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(BadInput, match="no such file"):
        datasets.load("npz", path=str(path))
    if suffix == "npz":
        save(path)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file["data"], file["label"] = images(40, (1, 8, 8)), np.arange(40) % 4
    whole = path.read_bytes()
    for damage in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        whole[:200] + b"\0" * 900 + whole[1100:] if suffix == "npz" else b"x",
    ):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="damaged or not in its format") as error:
            datasets.load("npz", path=str(path))
        assert "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    def line(match, **fields):
        with pytest.raises(BadInput, match=match):
            datasets.load("folder", path=str(tmp_path), **fields)

    line("no sub-folders")
    (tmp_path / "cat").mkdir()
    line("cat: has no image")
    Image.fromarray(images(1, (9, 9, 3))[0]).save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "b.png").write_bytes((tmp_path / "cat" / "a.png").read_bytes()[:60])
    line("b.png: cannot be read")
    (tmp_path / "cat" / "b.png").write_bytes(b"\x89PNGxxx")
    line(r"b.png: cannot be read as an image \(damaged, or of a format that is not read\)$")
    for name in "ab":  # 8 bits in files of 16
        dark = images(1)[0, ..., 0].astype(np.uint16)
        Image.fromarray(dark).save(tmp_path / "cat" / f"{name}.png")
    line("no pixel of the training images is above 1 of 255: they are black", size=8)
    with pytest.raises(BadInput, match="no such folder"):
        datasets.load("folder", path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("alone", ["train", "test", "val"])
def test_a_folder_with_one_of_its_sets_alone(tmp_path, alone):
    for i, image in enumerate(images(40)):
        folder = tmp_path / alone / str(i % 4)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    data = datasets.load("folder", path=str(tmp_path), size=8)
    assert data.names == ("0", "1", "2", "3") and counts(data.test) == [2] * 4


@pytest.mark.parametrize("each", [1, 2])
def test_few_images_are_enough_to_judge_by_but_not_to_train_on(tmp_path, each):
    path = save(tmp_path / "few.npz", image=images(5 * each), label=np.arange(5 * each) % 5)
    source = datasets.source(path)
    data = source.load()
    parts = [data.train, data.clean, data.test]
    assert all(len(part.label) for part in parts) and sum(len(p.label) for p in parts) == 5 * each
    model = build(Ffnn(hidden=(4,)), data.shape, data.classes)
    found = images_of(model, model.init(jax.random.key(0)), data)
    assert len(found.search.label) + len(found.held.label) == 5 * each
    with pytest.raises(
        BadInput, match=r"few.npz: class \d has [01] of the 2 images .*; add images"
    ):
        trainable(source, data)
    with pytest.raises(BadInput, match=r"few.npz: class"):
        write_poisoned(tmp_path / "out", source, BadNets(size=2))
    cell = Cell("t", "r", source, Ffnn(hidden=(4,)), Recipe(epochs=1), None)
    with pytest.raises(BadInput, match=r"few.npz: class"):
        check(cell)
    one = save(tmp_path / "one.npz", image=images(1), label=np.zeros(1))
    with pytest.raises(BadInput, match="one image, or one group of them, is too few"):
        datasets.load(one)


def test_what_is_said_of_a_class_without_training_images_is_true(tmp_path):
    path = save(tmp_path / "a.npz", image=images(30), label=np.arange(30) % 5)

    def tried(**fields):
        source = datasets.source(path, **fields)
        trainable(source, source.load())

    tried()
    with pytest.raises(BadInput, match="all its images held out; lower holdout"):
        tried(holdout=0.99)
    tried(holdout=0.3)
    with pytest.raises(BadInput, match="or raise train_size"):
        tried(train_size=6)
    tried(train_size=10)


def test_bad_fields(tmp_path):
    path = save(tmp_path / "a.npz")
    for holdout in (0.0, 1.0, float("nan")):
        with pytest.raises(BadInput, match="holdout"):
            datasets.load("npz", path=path, holdout=holdout)
    with pytest.raises(BadInput, match="train_size is 41"):
        datasets.load("npz", path=path, train_size=41)
    with pytest.raises(BadInput, match=r"test images \(9, 9, 1\)"):
        datasets.load("npz", path=path, test=save(tmp_path / "b.npz", image=images(40, (9, 9, 1))))
    with pytest.raises(BadInput, match="no data are named"):
        datasets.load("npz")
    with pytest.raises(BadInput, match="aligned faces are"):
        datasets.load("faces", path=path)


# Prepared sets

SMALL = {"image": images(20, (28, 28, 1)), "label": np.arange(20) % 10}


@pytest.fixture
def small(tmp_path):
    """A folder to prepare from with a tiny MNIST as `.npz`."""
    (tmp_path / "manual").mkdir()
    for part in ("train", "test"):
        save(tmp_path / "manual" / f"mnist_{part}.npz", **SMALL)
    return tmp_path


def test_prepare_once_and_load(small, monkeypatch):
    monkeypatch.setenv("BDJAX_DATA_DIR", str(small / "home"))
    with pytest.raises(
        BadInput, match=r"mnist is not prepared in .*home: run `bdjax data prepare mnist`"
    ):
        datasets.load("mnist")
    line = datasets.prepare("mnist", str(small / "manual"), quiet=True)
    folder = small / "home" / "mnist" / "3.0.1"
    assert line == f"mnist is ready in {folder}" and (folder / "sources.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert datasets.prepare("mnist", str(small / "manual"), quiet=True) == f"{line}: nothing to do"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    data = datasets.load("mnist")
    assert counts(data.test) == [2] * 10 and rows(data.test) == rows(
        Split(SMALL["image"], SMALL["label"])
    )
    # Then the records are decoded again, in the same order.
    (folder / prepared.DECODED).write_bytes(b"damaged")
    base._load.cache_clear()
    assert datasets.fingerprint(datasets.load("mnist")) == datasets.fingerprint(data)
    (folder / prepared.DECODED).unlink()
    next(folder.glob("*train.array_record*")).write_bytes(b"damaged")
    base._load.cache_clear()
    with pytest.raises(BadInput, match=r"damaged .*delete it"):
        datasets.load("mnist")


@pytest.mark.parametrize(
    "error, line", [(OSError(28, os.strerror(28)), "disk is full"), (KeyboardInterrupt(), None)]
)
def test_interrupted_prepare_leaves_nothing(small, monkeypatch, error, line):
    calls = iter(range(5))

    def fromarray(array):  # Stops in the middle of the images.
        if next(calls, None) is None:
            raise error
        return original(array)

    original = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", fromarray)
    with pytest.raises(type(error) if not line else BadInput, match=line):
        datasets.prepare("mnist", str(small / "manual"), str(small / "home"), quiet=True)
    assert not (small / "home" / "mnist").exists()
    with pytest.raises(BadInput, match="is not prepared"):
        datasets.load("mnist", data_dir=str(small / "home"))


def test_prepare_says_what_is_wrong(small):
    def line(match, *args):
        with pytest.raises(BadInput, match=match) as error:
            datasets.prepare(*args, quiet=True)
        assert "\n" not in str(error.value)

    manual, home = str(small / "manual"), str(small / "home")
    (small / "file").touch()
    line("needs no preparing", "npz")
    line("nowhere: no such folder", "mnist", str(small / "nowhere"))
    line("lacks cifar-10-binary.tar.gz", "cifar10", manual, home)
    line("is no folder", "mnist", manual, str(small / "file"))
    save(small / "manual" / "mnist_test.npz")
    line("is not mnist", "mnist", manual, home)
    (small / "manual" / "mnist_test.npz").unlink()
    for file in Mnist.files:
        (small / "manual" / file).write_bytes(b"not what is registered")
    line("wrong checksum: download https://", "mnist", manual, home)


def test_gtsrb_archives(tmp_path, monkeypatch):
    train, test, answers = Gtsrb.files
    with zipfile.ZipFile(tmp_path / train, "w") as file:
        for label in range(43):
            for track in range(2):
                path = tmp_path / f"{track:05d}_00029.ppm"
                Image.fromarray(np.full((40, 36, 3), 5 * label + track, np.uint8)).save(path)
                file.write(path, f"GTSRB/Final_Training/Images/{label:05d}/{path.name}")
    with zipfile.ZipFile(tmp_path / test, "w") as file:
        file.write(path, "GTSRB/Final_Test/Images/00000.ppm")
    with zipfile.ZipFile(tmp_path / answers, "w") as file:
        file.writestr("GT-final_test.csv", "Filename;Width;ClassId\r\n00000.ppm;36;42\r\n")
    with pytest.raises(BadInput, match="wrong checksum; download https://"):
        datasets.prepare("gtsrb", str(tmp_path), str(tmp_path), quiet=True)
    monkeypatch.setattr(
        Gtsrb,
        "md5",
        tuple(prepared.hashlib.md5((tmp_path / f).read_bytes()).hexdigest() for f in Gtsrb.files),
    )
    datasets.prepare("gtsrb", str(tmp_path), str(tmp_path), quiet=True)
    data = datasets.load("gtsrb", data_dir=str(tmp_path))
    assert (
        data.shape == (32, 32, 3)
        and counts(data.train) == counts(data.clean) == [1] * 43
        and data.test.label == [42]
    )
    assert (
        data.train.image[:, 0, 0, 0] // 5 == data.train.label
    ).all() and data.train.group is not None


@real
def test_prepare_real_files_without_tensorflow(tmp_path):
    code = f"""if True:
        import sys
        from bdjax import datasets, registry
        from bdjax.datasets.public import FashionMnist
        whole = FashionMnist.parse
        def part(*files):  # All is checked and read; a part is written, to be quick.
            train, test = whole(*files)
            assert len(train.label) == 60_000 and len(test.label) == 10_000
            return train[:1000], test[:200]
        FashionMnist.parse = part
        originals = {str(REAL / "fashion_mnist")!r}
        datasets.prepare("fashion-mnist", originals, {str(tmp_path)!r}, quiet=True)
        data = datasets.load("fashion-mnist", data_dir={str(tmp_path)!r})
        assert len(data.train.label) == 900 and len(data.clean.label) == 100
        assert len(data.test.label) == 200
        assert not any(name.split(".")[0] in ("tensorflow", "keras") for name in sys.modules)
        """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_needs_no_reader():
    code = (
        "import sys, bdjax.datasets; "
        "assert not {'PIL', 'h5py', 'pyarrow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_sources_are_hashable_configurations():
    from bdjax import registry

    for entry in registry.entries("dataset"):
        source = entry.cls()
        assert hash(source) == hash(dataclasses.replace(source)) and all(
            map(registry.is_static, dataclasses.fields(source))
        )


def test_the_largest_classes_alone_are_numbered_anew(tmp_path):
    label = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    image = np.zeros((10, 8, 8, 3), np.uint8) + label.astype(np.uint8)[:, None, None, None]
    np.savez(tmp_path / "train.npz", image=image, label=label, names=np.array(list("abcd")))
    np.savez(tmp_path / "test.npz", image=image[::3], label=label[::3])
    where = {"path": str(tmp_path / "train.npz"), "test": str(tmp_path / "test.npz")}
    data = registry.make("dataset", "npz", **where, top_classes=2).load()
    assert data.names == ("b", "d") and data.classes == 2
    assert sum(len(split.label) for split in (data.train, data.clean)) == 7
    np.testing.assert_array_equal(data.test.label, [0, 1, 1])
    np.testing.assert_array_equal(data.test.image[:, 0, 0, 0], [1, 3, 3])
    with pytest.raises(BadInput, match="give 2 to 4"):
        registry.make("dataset", "npz", **where, top_classes=9).load()


# Paths: what a data set is, is known by its content


def encoded(image, suffix="png"):
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, suffix)
    return stream.getvalue()


def table(path, image=None, label=None, features=None, **columns):
    """A Parquet file as HuggingFace writes it."""
    image = images(40) if image is None else image
    label = pa.array(np.arange(len(image)) % 4) if label is None else label
    if not isinstance(image, pa.Array):
        image = pa.array([{"bytes": encoded(x), "path": "a.png"} for x in image])
    found = pa.table({"image": image, "label": label, **columns})
    if features is not None:
        about = json.dumps({"info": {"features": features}})
        found = found.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(found, path, row_group_size=16)
    return str(path)


FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list("wxyz")}}


def test_a_path_is_what_it_holds_whatever_its_name(tmp_path):
    """All hold the same 40 images, in 4 classes."""
    given = Split(images(40), np.arange(40) % 4)
    places = {}
    os.rename(save(tmp_path / "a.npz", names=np.array(list("wxyz"))), tmp_path / "npz.h5")
    places["npz"] = tmp_path / "npz.h5"
    with h5py.File(tmp_path / "h5.npz", "w") as file:
        file["data"], file["label"] = given.image.transpose(0, 3, 1, 2), given.label
    places["h5"] = tmp_path / "h5.npz"
    places["parquet"] = Path(table(tmp_path / "table", features=FEATURES))
    places["folder"] = tmp_path / "folder"
    for i, (image, label) in enumerate(zip(given.image, given.label, strict=True)):
        (tmp_path / "folder" / "wxyz"[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "wxyz"[label] / f"{i}").write_bytes(encoded(image))
    for kind, path in places.items():
        source = datasets.source(str(path), **{"size": None} if kind == "folder" else {})
        assert registry.name_of(source) == kind
        data = source.load()
        assert data.classes == 4 and data.names == (() if kind == "h5" else tuple("wxyz"))
        assert rows(data.train) | rows(data.clean) | rows(data.test) == rows(given)
    for word in ("a", "nowhere/a", "nowhere.npz", "~nobody/x", "a\0b", "x" * 5000, "mnis"):
        with pytest.raises(BadInput) as error:
            datasets.source(word)
        assert "\n" not in str(error.value)
    (tmp_path / "one.png").write_bytes(encoded(images(1)[0]))
    (tmp_path / "text").write_text("no images")
    for name, line in (("one.png", "is one image"), ("text", "is neither .npz, .h5 nor Parquet")):
        with pytest.raises(BadInput, match=line):
            datasets.source(str(tmp_path / name))


def test_the_sets_of_a_folder_by_their_names(tmp_path):
    train, test = images(40), images(12, seed=1)
    for name, part in (("train", train), ("test", test)):
        save(tmp_path / "npz" / f"{name}.npz", image=part, label=np.arange(len(part)) % 4)
        for i, image in enumerate(part):
            folder = tmp_path / "folder" / name.replace("test", "val") / str(i % 4)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(encoded(image))
        table(tmp_path / "data" / "data" / f"{name}-00000-of-00001.parquet", part)
        table(tmp_path / "converted" / name / "0000.parquet", part)
    for i in range(2):
        label = pa.array(np.arange(20) % 4)
        table(tmp_path / "shards" / f"train-{i}.parquet", train[20 * i : 20 * i + 20], label)
    table(tmp_path / "shards" / "test.parquet", test)
    for kind in ("npz", "folder", "data", "converted", "shards"):
        extra = {"size": 8} if kind == "folder" else {}
        data = datasets.load(str(tmp_path / kind), **extra)
        assert rows(data.test) == rows(Split(test, test)), kind
        assert rows(data.train) | rows(data.clean) == rows(Split(train, train)), kind
    data = datasets.load("parquet", path=str(tmp_path / "shards" / "train-0.parquet"))
    assert len(data.train.label) + len(data.clean.label) + len(data.test.label) == 20


def test_every_command_that_takes_a_data_set_takes_a_path(tmp_path, monkeypatch):
    path = table(tmp_path / "a", features=FEATURES)
    for name, kinds in cli.CHOICES.items():
        if "dataset" in kinds:
            made, left = cli.chosen(kinds, ["--dataset", path, "--dataset.size", "9"])
            assert made["dataset"] == datasets.source(path) and left == ["--dataset.size", "9"], (
                name
            )


def test_columns_and_labels_of_tables(tmp_path):
    def load(**fields):
        return datasets.load(str(tmp_path / "a"), **fields)

    words = pa.array(["10", "9", "cat", "9"] * 10)
    for label in (words, words.dictionary_encode()):
        table(tmp_path / "a", label=label)
        data = load()
        assert data.names == ("9", "10", "cat") and counts(data.train) == [15, 7, 7]
    raw = pa.array([encoded(image) for image in images(40)], pa.large_binary())
    table(tmp_path / "a", raw, second=raw, text=words, coarse=pa.array(np.arange(40) % 2))
    data = load()
    assert data.names == () and data.classes == 4 and rows(data.test) < rows(Split(images(40), raw))
    assert load(label="coarse", image="second").classes == 2 and load(label="text").classes == 3
    with pytest.raises(BadInput, match="no column 'junk' holds labels; those that do: label, text"):
        load(label="junk")
    pq.write_table(pa.table({"a": raw, "b": raw, "y": words}), tmp_path / "a")
    with pytest.raises(BadInput, match=r"could be the images \(a, b\): give image=NAME"):
        load()
    table(tmp_path / "a", images(40, (8, 8, 3)))
    assert load().shape == (8, 8, 3) and load(size=5).shape == (5, 5, 3)
    mixed = [encoded(images(1)[0]), encoded(images(1, (8, 8, 3))[0])] * 20
    table(tmp_path / "a", pa.array(mixed))
    assert load().shape == (8, 8, 3)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ODD = [encoded(images(1, (9, 9, 1))[0])] + [encoded(images(1)[0])] * 39
BAD_TABLES = {
    "no column holds images": {"image": pa.array(np.arange(40))},
    "no column holds images;": {"image": pa.array([[{"bytes": b"a"}]] * 40)},
    "save the bytes of the images": {
        "image": pa.array([{"bytes": None, "path": "a"}] * 40, STRUCT)
    },
    "row 0: has no image in it": {"image": pa.array([None] * 40, STRUCT)},
    "row 0: cannot be read as an image": {"image": pa.array([b"junk"] * 40)},
    "of different sizes, image 2 is 8×8 and those before it 9×9": {"image": pa.array(ODD)},
    "no column holds labels": {"label": pa.array(np.full(40, np.nan))},
    "row 0: has no label": {"label": pa.array([None] + [0, 1, 2] * 13)},
    "no column holds labels;": {"label": pa.array([{"a": 1}] * 40)},
    "labels run from -1": {"label": pa.array(np.arange(40) % 4 - 1)},
    "a label is 4 but there are 4": {"label": pa.array(np.arange(40) % 5), "features": FEATURES},
    r"class 4 \(e\) has no training image": {
        "features": FEATURES | {"label": {"names": list("abcde")}}
    },
    "labels run from 0 to 4.6": {"label": pa.array([0, 2**62] * 20)},
    "labels run from 0 to 9.2": {"label": pa.array([0, 2**63] * 20, pa.uint64())},
    "has no rows": {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
}


@pytest.mark.parametrize("line", BAD_TABLES)
def test_bad_tables(tmp_path, line):
    path = table(tmp_path / "a.parquet", **BAD_TABLES[line])
    with pytest.raises(BadInput, match=line) as error:
        datasets.load(path)
    assert "\n" not in str(error.value) and "a.parquet" in str(error.value)


def test_what_describes_a_table_may_be_junk(tmp_path):
    for features in ([1], {"label": 3}, {"label": {"names": [1, 2]}}, {"label": {"names": "ab"}}):
        data = datasets.load(table(tmp_path / "a", features=features))
        assert data.names == () and data.classes == 4


def test_damaged_tables(tmp_path):
    path = Path(table(tmp_path / "a", images(200, (16, 16, 1)), features=FEATURES))
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    cut = [*range(0, len(whole), 1000), len(whole) - 1, len(whole) - 9]
    damaged = [whole[:size] for size in cut]
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[draw.integers(len(whole) - 3000, len(whole))] ^= int(draw.integers(1, 256))
        damaged.append(bytes(flipped))
    refused = 0
    for raw in damaged:
        path.write_bytes(raw)
        try:
            datasets.load("parquet", path=str(path))
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= len(cut)


def test_a_table_declares_no_more_than_there_is_room_for(tmp_path, monkeypatch):
    many = pa.table({"image": [bytes(4 << 20)] * 4, "label": np.arange(4)})
    path = str(tmp_path / "a")
    pq.write_table(many, path, compression="zstd")
    monkeypatch.setattr(schema, "LARGE", 1 << 20)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)  # Nothing is unpacked.
    with pytest.raises(BadInput, match="declares 4"):
        datasets.load(path)
    monkeypatch.undo()
    monkeypatch.setattr(schema, "memory", lambda: 1 << 20)
    with pytest.raises(BadInput, match="give a smaller size"):
        datasets.load(table(tmp_path / "a"), size=1000)


# Any set that TFDS has prepared


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A data folder with a set, `pets`, that TFDS has prepared and bdjax does not know."""
    import tensorflow_datasets as tfds

    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path))
    features = tfds.features.FeaturesDict(
        {
            "photo": tfds.features.Image(shape=(8, 8, 1)),
            "kind": tfds.features.ClassLabel(names=list("wxyz")),
            "box": tfds.features.BBoxFeature(),
            "id": tfds.features.Text(),
        }
    )

    def examples(seed, count):
        for i, image in enumerate(images(count, seed=seed)):
            box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
            row = {"photo": Image.fromarray(image[..., 0]), "kind": i % 4, "box": box, "id": "a"}
            yield i, row

    from tensorflow_datasets.core.registered import skip_registration

    with skip_registration():

        class Pets(tfds.core.GeneratorBasedBuilder):
            name = "pets"
            VERSION = tfds.core.Version("10.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(0, 40)} | {
                    "validation": self._generate_examples(1, 12)
                }

            def _generate_examples(self, seed, count):
                yield from examples(seed, count)

    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):
        Pets(data_dir=tmp_path, file_format="array_record").download_and_prepare(
            download_config=config
        )
    return tmp_path / "pets" / "10.0.0"


def test_any_prepared_set(foreign):
    (foreign.parent / "9.0.0").mkdir()
    (foreign.parent / "9.0.0" / "dataset_info.json").touch()  # an older version
    for word in ("pets", "tfds:pets", str(foreign.parent), str(foreign)):
        data = datasets.load(word)
        assert data.name == "tfds" and data.names == tuple("wxyz")
        assert rows(data.train) | rows(data.clean) == rows(Split(images(40), images(40)))
        assert counts(data.test) == [3] * 4
    assert not list(foreign.glob("*.npz")), "nothing is written into it"
    with pytest.raises(BadInput, match="no set that TFDS has prepared"):
        datasets.load("tfds:cats")
    # The same examples as TensorFlow writes them.
    description = json.loads((foreign / "dataset_info.json").read_text())
    (foreign / "dataset_info.json").write_text(json.dumps(description | {"fileFormat": "tfrecord"}))
    reader = array_record_module.ArrayRecordReader
    for path in foreign.glob("*array_record*"):
        records = reader(str(path)).read_all()
        raw = b"".join(len(r).to_bytes(8, "little") + bytes(4) + r + bytes(4) for r in records)
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(raw)
        path.unlink()
    again = datasets.load("pets", size=8)
    assert datasets.fingerprint(again) == datasets.fingerprint(data)
    path = next(foreign.glob("*train*"))
    whole = path.read_bytes()
    for cut in (0, 5, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadInput) as error:
            datasets.load("pets")
        assert "\n" not in str(error.value)
    path.write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(BadInput, match="ends within a record"):
        datasets.load("pets")


def test_a_prepared_set_names_no_code(foreign, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = foreign / "features.json"
    for key in ("pythonClassName", "python_class_name"):
        text = path.read_text().replace("pythonClassName", key)
        path.write_text(
            text.replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Feature")
        )
        with pytest.raises(BadInput, match=r"a feature of other code, 'evil\.Feature'"):
            datasets.load("pets")
    path.write_text("{")
    with pytest.raises(BadInput, match=r"pets.*features\.json is not JSON"):
        datasets.load("pets")
