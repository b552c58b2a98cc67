"""The files of `bdjax poison` hold what training sees and what ASR is measured on, for every attack
that poisons data, as other tools and bdjax itself read them.
"""

import csv
import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_cli import bdjax

from bdjax import datasets, poison, registry
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack
from bdjax.checkpoints import load_model
from bdjax.datasets.base import Source
from bdjax.datasets.files import in_order
from bdjax.poison import folder_names, write_poisoned
from bdjax.train import (
    TrainSet,
    advance,
    begin,
    clean_set,
    measuring_key,
    poisoned_set,
    poisoning_key,
    predict,
    stamped,
)
from bdjax.types import BadInput, Split

NAMES = ("a/b", "cat", "..", "cat ", "0", "é", "g", "h", "i", "j")
ATTACKS = registry.entries("attack")
FORMATS = ("npz", "folder", "parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Source:
    """100 colour images in ten classes, as a source: 70 to train on."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "a.npz"
    image = draw.integers(0, 256, (100, 32, 32, 3), np.uint8)
    np.savez(path, image=image, label=np.arange(100) % 10, names=np.array(NAMES))
    return datasets.source(str(path))


def index_of(folder: Path, part: str) -> list[dict[str, float]]:
    with open(folder / "index.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("split") == part]
    assert [int(row["row"]) for row in rows] == list(range(len(rows)))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def read(folder: Path, part: str, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels in the order of the rows, read without bdjax."""
    if form == "npz":
        arrays = np.load(folder / f"{part}.npz")
        assert arrays["names"].tolist() == list(NAMES)
        return arrays["image"], arrays["label"]
    if form == "folder":  # As torchvision, Keras and others number the folders.
        classes = sorted(path.name for path in (folder / part).iterdir())
        paths = sorted((folder / part).rglob("*.png"), key=lambda path: path.name)
        found = [np.asarray(Image.open(path)) for path in paths]
        assert len(classes) == 10
        return np.stack(found), np.array([classes.index(path.parent.name) for path in paths])
    table = pq.read_table(folder / "data" / f"{part}-00000-of-00001.parquet")
    about = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert about["label"] == {"names": list(NAMES), "_type": "ClassLabel"}
    rows = table.to_pylist()
    found = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    return np.stack(found), np.array([row["label"] for row in rows])


def as_lists(images, labels) -> list[tuple]:
    return sorted((int(label), image.tobytes()) for image, label in zip(images, labels))


def holds(folder: Path, form: str, source: Source, attack, seed: int) -> None:
    """Raises unless the files are what a training with `seed` sees."""
    data, key = source.load(), jax.random.key(seed)
    seen = poisoned_set(poisoning_key(key), data.train, attack, data.classes)
    size = int(seen.plan.size)
    x, label = jax.jit(TrainSet.rows)(seen, jnp.arange(size))
    image, written = read(folder, "train", form)
    assert image.dtype == np.uint8 and image.shape == x.shape
    np.testing.assert_allclose(image / 255, np.clip(x, 0, 1), atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(written, label)
    lines = index_of(folder, "train")
    for name, leaf in (
        ("source", seen.plan.source), ("kind", seen.plan.kind), ("number", seen.plan.number),
        ("old_label", data.train.label[np.asarray(seen.plan.source)]), ("new_label", label),
        ("weight", seen.plan.weight),
    ):  # fmt: skip
        got = [line[name] for line in lines]
        np.testing.assert_allclose(got, np.asarray(leaf)[:size], atol=1e-6, err_msg=name)
    image, written = read(folder, "triggered", form)
    lines, first = index_of(folder, "triggered"), 0
    for kind in range(1, attack.triggers + 1):
        aim = np.asarray(attack.success(jnp.asarray(kind), jnp.asarray(data.test.label), 10))
        shot = jax.random.fold_in(jax.random.fold_in(measuring_key(key), kind), 0)
        x = np.asarray(jax.jit(stamped)(seen.attack, kind, data.test.image, shot))[aim >= 0]
        rows = slice(first, first := first + len(x))
        np.testing.assert_allclose(image[rows] / 255, x, atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(written[rows], aim[aim >= 0])
        assert [line["source"] for line in lines[rows]] == np.flatnonzero(aim >= 0).tolist()
        assert {line["kind"] for line in lines[rows]} == {kind}
    assert len(image) == first == len(lines)
    image, label = read(folder, "test", form)
    np.testing.assert_array_equal(image, data.test.image)
    np.testing.assert_array_equal(label, data.test.label)
    own_reader = datasets.source(str(folder), **{"size": None} if form == "folder" else {})
    train, test, names = own_reader.read()
    expected = NAMES if form != "folder" else tuple(folder_names(NAMES, 10))
    assert names == expected and test is not None
    assert as_lists(train.image, train.label) == as_lists(*read(folder, "train", form))
    assert as_lists(test.image, test.label) == as_lists(image, label)
    place = {"folder": "triggered", "parquet": "data/triggered-00000-of-00001.parquet"}
    where = str(folder / place.get(form, "triggered.npz"))
    _, test, _ = dataclasses.replace(own_reader, test=where).read()
    assert as_lists(test.image, test.label) == as_lists(*read(folder, "triggered", form))


def written(entry, data, folder, form, **fields):
    attack = registry.make("attack", entry.name, **fields)
    label = jnp.asarray(data.load().train.label)
    if attack.base(label, 10) is not label:
        with pytest.raises(BadInput, match="there is no poisoned set to write"):
            write_poisoned(folder, data, attack, seed=3, format=form)
        assert not folder.exists()
        return
    about = write_poisoned(folder, data, attack, seed=3, format=form)
    assert json.loads((folder / "poison.json").read_text()) == {**about, "format": 1}
    assert about["counts"]["poisoned"] > 0 and about["rows"]["train"] == about["counts"]["rows"]
    assert about["fingerprint"] == datasets.fingerprint(data.load())
    assert any("its own `train`" in note for note in about["notes"]) == attack.trains
    holds(folder, form, data, attack, 3)


@pytest.mark.parametrize("form", FORMATS)
def test_files_are_what_training_sees(form, data, tmp_path):
    fields = {"random_place": True, "labels": "source-specific", "sources": (1, 2), "cover": 0.1}
    written(registry.get("attack", "badnets"), data, tmp_path / "out", form, append=True, **fields)


@pytest.mark.long
@pytest.mark.parametrize("entry", ATTACKS, ids=lambda entry: entry.name)
def test_files_of_every_attack(entry, data, tmp_path):
    for form in FORMATS:
        written(entry, data, tmp_path / form, form)


def test_an_attack_that_makes_its_images_for_a_net_is_refused(data, tmp_path):
    made = [entry for entry in ATTACKS if entry.cls.base is not Attack.base]
    assert made
    for entry in made:
        written(entry, data, tmp_path / "out", "npz")
    for wrong in ({"seed": -1}, {"seed": 2**32}, {"seed": 0.5}, {"format": "zip"}):
        with pytest.raises(BadInput):
            write_poisoned(tmp_path / "out", data, BadNets(), **wrong)
    with pytest.raises(BadInput, match="without an attack nothing is poisoned"):
        write_poisoned(tmp_path / "out", data, None)
    with pytest.raises(BadInput, match=r"a share of 0\.001 of 70 images is none"):
        write_poisoned(tmp_path / "out", data, BadNets(rate=0.001))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_stored_is_said(data, tmp_path):
    about = write_poisoned(
        tmp_path / "a", data, registry.make("attack", "weighted-loss", redraw=True)
    )
    assert [note.split(" by ")[0] for note in about["notes"]] == [
        "in the loss rows count",
        "training draws each stamp anew in every step: written is one draw",
    ]


def test_the_order_of_folders_is_that_of_the_classes():
    assert folder_names(("cat", "dog"), 2) == ["cat", "dog"]
    assert folder_names((), 11) == [f"{k:02d}" for k in range(11)]
    assert folder_names(("dog", "cat"), 2) == ["0_dog", "1_cat"]
    for names in (NAMES, [str(k) for k in range(43)], ["a", "A"], [".", "..", "/", ""], ["a "] * 3):
        found = folder_names(names, len(names))
        assert sorted(found) == in_order(found) == found and len(set(found)) == len(names)
        assert all("/" not in name and not name.startswith(".") for name in found)


def test_nothing_half_and_nothing_of_others_is_replaced(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = write_poisoned(out, data, BadNets())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(poison, "_write_index", stop)
    for place in (out, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            write_poisoned(place, data, BadNets(target=1))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = write_poisoned(out, data, BadNets(), format="parquet")
    assert again == first and not (out / "train.npz").exists()
    (out / "mine.txt").write_text("mine")
    for place in (out, tmp_path / "file", tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(BadInput):
            write_poisoned(place, data, BadNets())
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.long
def test_a_training_on_the_files_is_the_training_of_the_attack(data, tmp_path, capsys):
    """White squares on stored images need no rounding."""
    some = ["--dataset", data.path, "--attack.random-place", "--seed", "5", "--quiet"]
    net = [
        "--model",
        "ffnn",
        "--model.hidden",
        "16",
        "--recipe.epochs",
        "2",
        "--recipe.batch",
        "16",
    ]
    code, _, err = bdjax(capsys, "poison", *some, "--out", str(tmp_path / "files"))
    assert code == 0, err
    code, _, err = bdjax(capsys, "train", *some, *net, "--out", str(tmp_path / "net"))
    assert code == 0, err
    _, model, variables, about = load_model(tmp_path / "net")
    key, recipe = jax.random.key(5), about["recipe"]
    files = Split(*read(tmp_path / "files", "train", "npz"))
    state = begin(jax.random.fold_in(key, 0), model, recipe)
    run = jax.jit(lambda state: advance(
        jax.random.fold_in(key, 3), state, model, recipe, clean_set(files), epochs=2
    ))  # fmt: skip
    again = run(state)[0].variables
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(variables), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    image, label = read(tmp_path / "files", "triggered", "npz")
    hit = np.asarray(predict(model, variables, image)).argmax(-1) == label
    other = np.array([line["old_label"] for line in index_of(tmp_path / "files", "triggered")])
    found = about["metrics"]
    assert hit.mean() == pytest.approx(found["asr_all"])
    assert hit[other != label].mean() == pytest.approx(found["asr_nt"])


def test_the_command_says_what_it_wrote_and_reads_it(data, tmp_path, capsys):
    out = str(tmp_path / "out")
    code, said, err = bdjax(
        capsys, "poison", "--dataset", data.path, "--out", out, "--format", "folder", "--quiet"
    )
    assert code == 0, err
    assert "70 train images, 20 test images, 20 triggered images" in said
    assert "poisoned       7 of 70 rows" in said and f"--dataset {out} --dataset.size None" in said
    code, _, err = bdjax(capsys, "poison", "--attack", "none", "--out", str(tmp_path / "b"))
    assert code == 2 and "nothing is poisoned" in err
    code, _, err = bdjax(capsys, "poison", "--format", "zip", "--out", str(tmp_path / "b"))
    assert code == 2 and len(err.strip().splitlines()) == 1
