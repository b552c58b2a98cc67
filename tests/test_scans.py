"""Poisoned sets and images, and clean ones, by all judges of rows and of inputs."""

import csv

import jax
import numpy as np
import planted
import pytest
from PIL import Image

from bdjax import audit, cli, datasets, own, scan_set, scans
from bdjax.attacks.badnets import BadNets
from bdjax.checkpoints import save_model
from bdjax.datasets.files import Npz
from bdjax.models.shamshiri import Ffnn
from bdjax.train import Recipe, stamped

KEY = jax.random.key(0)


def test_a_class_of_two_groups_is_told_from_those_of_one():
    draw = np.random.default_rng(0)
    label = np.repeat(np.arange(10), 100)
    score = draw.normal(size=1000) ** 2
    clean = scans.grouped("judge", score, label)
    assert clean.p_value > 0.05
    poison = (label == 7) & (np.arange(1000) % 10 < 3)
    found = scans.grouped("judge", np.where(poison, 30 + score, score), label, tuple("abcdefghij"))
    assert found.p_value < 1e-3 and found.accuses == "label 7 (h)"
    assert np.array_equal(found.suspects, poison)
    few = scans.grouped("judge", score[:300], label[:300])
    assert "fewer than 4 classes" in few.fault


def test_the_false_alarms_of_sets_are_as_many_as_said():
    draw = np.random.default_rng(1)
    label = np.repeat(np.arange(10), 100)
    p = [scans.grouped("judge", draw.normal(size=1000) ** 2, label).p_value for _ in range(200)]
    assert np.mean(np.asarray(p) <= 0.05) <= 0.1  # 95 % of draws of a rate of .05 lie below .08


def test_the_false_alarms_of_filters_are_as_many_as_said():
    draw = np.random.default_rng(2)
    found = [scans.ranked("filter", draw.normal(size=300), 100, 0.05) for _ in range(400)]
    assert np.mean([one.p_value <= 0.05 for one in found]) <= 0.08
    assert 0.03 < np.mean([one.suspects.mean() for one in found]) < 0.07
    low = np.concatenate([draw.normal(size=100) - 4, draw.normal(size=200)])
    hit = scans.ranked("filter", low, 100, 0.05)
    assert hit.p_value < 1e-6 and hit.suspects.mean() > 0.9
    assert "cannot tell" in scans.ranked("filter", low[:110], 100, 0.05).fault


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The planted net, clean images of its kind, and images with its trigger."""
    folder = tmp_path_factory.mktemp("scans")
    image, label = planted.pictures(200)
    np.savez(folder / "clean.npz", image=image, label=label)
    hit = np.asarray(stamped(BadNets(size=1), 1, image[:40], KEY)) * 255
    np.savez(folder / "hit.npz", image=np.uint8(hit.round()), label=label[:40])
    for name, labels in (("more", label + 1), ("few", label * 0)):
        np.savez(folder / f"{name}.npz", image=image, label=labels)
    model, variables, _ = planted.units()
    save_model(folder / "net", planted.Units(), model, variables)
    return folder


def test_images_with_the_trigger_are_infected_and_indexed(world, tmp_path, capsys):
    args = ["scan", str(world / "hit.npz"), "--net", str(world / "net")]
    args += ["--clean", str(world / "clean.npz"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    out = capsys.readouterr().out
    assert stop.value.code == 3 and "verdict: infected" in out, out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Infected" in page and "data:image/png;base64" in page and "http" not in page
    rows = list(csv.DictReader((tmp_path / "out" / "suspects.csv").open()))
    assert len(rows) == 40 and sum(row["suspect"] == "1" for row in rows) > 20
    assert rows[0]["suspect"] == "1"


def test_folders_are_read_at_the_size_of_the_net(world, tmp_path, capsys):
    image, label = planted.pictures(60)
    for i, one in enumerate(image):
        folder = tmp_path / "clean" / str(label[i])
        folder.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(one[..., 0]).resize((20, 20))
        large.save(folder / f"{i}.png")
        (tmp_path / "given").mkdir(exist_ok=True)
        large.save(tmp_path / "given" / f"{i}.png")
    clean, net = datasets.source(str(tmp_path / "clean")), str(world / "net")
    args = ["scan", str(tmp_path / "given"), "--net", net, "--clean", str(tmp_path / "clean")]
    code, out, err = planted.command(capsys, *args, "--out", str(tmp_path / "out"))
    assert code in (0, 3, 4) and "suspects of 60 images" in out, err
    assert len(scans._pictures(tmp_path / "clean", planted.units()[0])[0]) == 60
    assert audit(net, clean, minutes=0, quiet=True).about["data"]["searched"]


def test_suspects_of_a_folder_are_named_by_their_files(world, tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "COMPARED", 2)
    for i, (one, k) in enumerate(zip(*planted.pictures(120))):
        folder = tmp_path / "set" / "train" / str(k)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one[..., 0]).save(folder / f"{i:03}.png")
    found = scan_set(tmp_path / "set", str(world / "net"), out=tmp_path / "out", say=len)
    rows = list(csv.DictReader((tmp_path / "out" / "suspects.csv").open()))
    files = [tmp_path / "set" / row["image"] for row in rows]
    assert len(set(files)) == len(found.order) and all(file.is_file() for file in files)
    assert all(file.parent.name == row["what"] for file, row in zip(files, rows))


def test_a_set_may_have_some_of_the_classes_of_its_net(world, tmp_path, monkeypatch):
    """Its net judges it, though a class has no image; nothing of an earlier scan stays behind."""
    monkeypatch.setattr(scans, "COMPARED", 2)
    image, label = planted.pictures(200)
    kept = np.flatnonzero(label != 1)
    np.savez(tmp_path / "part.npz", image=image[kept], label=label[kept])
    (out := tmp_path / "out").mkdir()
    with own.renamed(out / "cleaned.npz") as file:
        file.write_bytes(b"of an earlier scan")
    part = datasets.source(str(tmp_path / "part.npz"))
    found = scan_set(part, str(world / "net"), out=out, say=len)
    assert sorted(found.order.tolist()) == list(range(len(kept)))
    assert (out / "cleaned.npz").exists() == bool(found.suspects.any())


def test_what_cannot_be_scanned_is_one_line(world, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "index.html").write_text("mine")
    hit, clean, net = (str(world / name) for name in ("hit.npz", "clean.npz", "net"))
    out = ["--out", str(tmp_path / "out")]
    for args, words in (
        ([hit, "--clean", clean, *out], "give it, --net"),
        (
            [hit, "--net", net, "--clean", clean, "--out", str(tmp_path / "taken")],
            "written by bdjax",
        ),
        ([str(tmp_path / "none.npz"), *out], "no such file"),
        ([hit, "--alpha", "2", *out], "--alpha"),
        ([hit, "--net", net, "--recipe.epochs", "1", *out], "--recipe.epochs has no effect"),
        ([hit, "--net", net, "--model", "cnn", *out], "--model has no effect"),
        ([str(world / "more.npz"), "--net", net, *out], "trained on it, or none (--net)"),
        ([str(world / "few.npz"), *out], "none to compare with"),  # before anything is trained
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["scan", *args])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and said.count("\n") == 1, said
    assert (tmp_path / "taken" / "index.html").read_text() == "mine"


@pytest.mark.long
def test_a_set_is_not_convicted_and_what_is_suspect_can_be_looked_at(sample, tmp_path):
    image, label = sample.train.image[:1500].copy(), sample.train.label[:1500].copy()
    np.savez(tmp_path / "twin.npz", image=image, label=label)
    rows = np.random.default_rng(0).permutation(np.flatnonzero(label != 3))[:60]
    image[rows, 22:27, 22:27] = 255
    label[rows] = 3
    np.savez(tmp_path / "poisoned.npz", image=image, label=label)
    how = {"model": Ffnn(hidden=(64,)), "recipe": Recipe(epochs=10, batch=32), "say": len}
    twin = scan_set(Npz(path=str(tmp_path / "twin.npz")), **how)
    found = scan_set(Npz(path=str(tmp_path / "poisoned.npz")), out=tmp_path / "out", **how)
    assert twin.word == found.word == "undecided" and "do not convict" in found.reason
    assert sorted(found.order.tolist()) == list(range(1500))
    assert (tmp_path / "out" / "index.html").exists()
    if found.suspects.any():
        kept = np.load(tmp_path / "out" / "cleaned.npz")
        assert len(kept["label"]) == 1500 - found.suspects.sum()
