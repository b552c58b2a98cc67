"""Every registered defense through the command line, on nets of each kind: a result, or one line
that says what to use. And what it reports has a meaning.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import relu

from bdjax import registry
from bdjax.attacks.badnets import BadNets
from bdjax.checkpoints import save_model
from bdjax.datasets.files import Npz
from bdjax.models.layers import Net, build, conv, dense, site
from bdjax.registry import pytree
from bdjax.train import Recipe, fit, poisoned_set
from tests.planted import Normed, lit_rows
from tests.test_cli import bdjax

SMALL = {
    "epochs": 1, "steps": 3, "inversion_steps": 2, "batches": 1, "images": 8, "samples": 8,
    "shadows": 4, "validation": 2, "queries": 2, "n": 4, "starts": 1, "rounds": 1, "orders": 2,
    "points": 3, "top": 2, "members": 4, "batch": 8, "hidden": 8, "noise_size": 16, "side": 2,
    "links": 2, "grid": (4, 4),
}  # fmt: skip
"""Budgets, by name."""
FAST = {("dense", name) for name in ("neural-cleanse", "retraining")}


@pytree
class Dense(Net):
    """One hidden layer."""

    def layers(self, x, train, classes):
        return dense(site("penultimate", relu(dense(x, 8, "dense"))), classes, "logits")


@pytree
class Convolved(Net):
    """A convolution and a dense layer."""

    def layers(self, x, train, classes):
        x = site("conv_last", relu(conv(x, 4, 3, "conv")))
        return dense(site("penultimate", relu(dense(x, 8, "dense"))), classes, "logits")


NETS = {"dense": Dense(), "convolved": Convolved(), "normed": Normed()}
ATTACKS = {
    "dense": BadNets(size=2, target=1), "convolved": None,
    "normed": BadNets(size=2, labels="all-to-all"),
}  # fmt: skip
DEFENSES = [entry.name for entry in registry.entries("defense")]


def small(method, whole=None, path=()):
    """Flags that make a method's budgets, and those of its parts, small."""
    flags, whole = [], whole or method
    for field in dataclasses.fields(method):
        value, place = getattr(method, field.name), (*path, field.name)
        here = "--defense." + ".".join(place).replace("_", "-")
        if registry.unread(whole, place):
            continue
        if dataclasses.is_dataclass(value):
            flags += small(value, whole, place)
        elif field.name in SMALL and value is not None:
            low = SMALL[field.name]
            many = isinstance(value, tuple)
            low = low if many == isinstance(low, tuple) else (low,) * len(value)
            flags += [here, *map(str, low if many else (low,))]
    return flags


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """200 images of 8×8 in 4 classes, a lit row each, and their data set."""
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    shown = lit_rows(0.5)
    image = np.tile(np.asarray(255 * shown.image).astype(np.uint8), (5, 1, 1, 1))
    noise = np.random.default_rng(0).integers(0, 60, image.shape).astype(np.uint8)
    np.savez(path, image=image + noise, label=np.tile(shown.label, 5), names=list("abcd"))
    return Npz(path=str(path), holdout=0.3)


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    """The folder of a victim of each kind."""
    made = {}

    def of(kind):
        if kind not in made:
            attack = ATTACKS[kind]
            data = source.load()
            model, recipe = build(NETS[kind], data.shape, data.classes), Recipe(epochs=20, batch=16)
            train = poisoned_set(jax.random.key(2), data.train, attack, data.classes)
            variables, _ = jax.jit(lambda key: fit(key, model, recipe, train))(jax.random.key(0))
            path = tmp_path_factory.mktemp("net") / kind
            about = {"recipe": recipe, "dataset": source, "attack": attack, "metrics": {}}
            save_model(path, NETS[kind], model, variables, **about)
            made[kind] = str(path)
        return made[kind]

    return of


def defend(capsys, folder, name, *flags):
    """The numbers that are printed, and all that is; or the line that says what to use."""
    cls = registry.get("defense", name).cls
    preset = "cpu" if "cpu" in getattr(cls, "presets", {}) else None
    named = name if preset is None else f"{name}:{preset}"
    budget = small(registry.make("defense", name, preset))
    code, out, err = bdjax(capsys, "defend", folder, "--defense", named, "--quiet", *budget, *flags)
    assert "Traceback" not in err
    if code:
        lines = [line for line in err.splitlines() if "not what the net was trained on" not in line]
        assert code == 2 and len(lines) == 1, err
        return None, err
    lines = (line.split() for line in out.splitlines())
    return {line[0]: line[1] for line in lines if len(line) >= 2}, out


def cases(kinds):
    for kind in kinds:
        for name in DEFENSES:
            marks = [] if (kind, name) in FAST else [pytest.mark.long]
            yield pytest.param(kind, name, marks=marks, id=f"{kind}-{name}")


@pytest.mark.parametrize(("kind", "name"), cases(NETS))
def test_a_result_or_one_line(capsys, saved, kind, name):
    found, text = defend(capsys, saved(kind), name)
    if found is None:
        assert any(word in text for word in ("give", "use", "take", "choose", "needs", "try")), text
        return
    assert "acc_test" in found and ("poisoned" in found) == (ATTACKS[kind] is not None)
    words = {"asr", "far", "recall", "precision", "target", "poisoned"}
    of_attack = [key for key in found if words & set(re.split(r"[_.]", key))]
    assert bool(of_attack) == (ATTACKS[kind] is not None)
    if registry.get("defense", name).cls.stage in ("invert", "models"):
        assert "\nflagged        " in text
        norms = [line.split(":")[0] for line in text.splitlines() if line.startswith("  label ")]
        assert norms in ([], [f"  label {k} ({c})" for k, c in enumerate("abcd")])


def test_neural_cleanse_prints_a_norm_for_each_label(capsys, saved):
    _, text = defend(capsys, saved("dense"), "neural-cleanse")
    assert text.count("  label ") == text.count(": norm ") == 4


@pytest.mark.long
def test_a_defense_that_replaces_training_can_be_saved_and_defended(capsys, saved, tmp_path):
    for name in ("lpsf", "db-covidnet"):
        found, text = defend(capsys, saved("dense"), name, "--out", str(tmp_path / name))
        assert found is not None, text
        about = json.loads((tmp_path / name / "model.json").read_text())
        assert [one["name"] for one in about["defenses"]] == [name]
        again, text = defend(capsys, str(tmp_path / name), "retraining")
        assert again is not None or "members" in text


def other(folder, tmp_path, change):
    """The net in `folder` with another data set, of images and labels that `change` makes."""
    from bdjax.checkpoints import load_model

    net, model, variables, about = load_model(folder)
    arrays = dict(np.load(about["dataset"].path))
    path = tmp_path / f"other{len(list(tmp_path.iterdir()))}.npz"  # what is loaded is kept
    np.savez(path, **(arrays | change(arrays)))
    about = {k: v for k, v in about.items() if k != "dataset"}
    dataset = Npz(path=str(path), holdout=0.3)
    save_model(tmp_path / "odd", net, model, variables, dataset=dataset, **about)
    return str(tmp_path / "odd")


def test_a_net_and_data_that_differ(capsys, saved, tmp_path):
    wide = other(saved("dense"), tmp_path, lambda a: {"image": np.tile(a["image"], (1, 2, 1, 1))})
    found, text = defend(capsys, wide, "retraining")
    assert found is None and "takes images of 8×8×1, those of npz are 16×8×1" in text
    odd = other(
        saved("dense"),
        tmp_path,
        lambda a: {"label": a["label"] % 3, "names": np.array(list("abc"))},
    )
    found, text = defend(capsys, odd, "retraining")
    assert found is None and "the net has 4 classes, npz has 3" in text and "--labels" in text
    found, text = defend(capsys, odd, "retraining", "--labels", "net")
    assert found is not None and float(found["acc_test"]) > 0.5
    found, text = defend(capsys, odd, "retraining", "--labels", "none")
    assert found is None and "without labels this cannot be done" in text
    found, text = defend(capsys, odd, "neural-cleanse", "--labels", "none")
    assert found is not None and "acc_test" not in found and "anomaly_index" in found
    found, text = defend(capsys, odd, "strip", "--labels", "none")
    assert found is not None and "acc_test" not in found and "boundary" in found
    found, text = defend(capsys, odd, "spectral-signatures", "--labels", "net")
    assert found is None and "leave --labels away" in text


def test_accuracy_at_chance_is_said(capsys, saved, tmp_path):
    mixed = other(
        saved("dense"),
        tmp_path,
        lambda a: {"label": np.random.default_rng(0).permutation(a["label"])},
    )
    code, _, err = bdjax(capsys, "defend", mixed, "--defense", "neural-cleanse:cpu", "--quiet")
    assert code == 0 and "which is chance" in err
    code, _, err = bdjax(
        capsys, "defend", saved("dense"), "--defense", "neural-cleanse:cpu", "--quiet"
    )
    assert code == 0 and "chance" not in err


def test_a_broken_net_is_never_right(capsys, saved, tmp_path):
    from bdjax.checkpoints import load_model

    net, model, variables, about = load_model(saved("dense"))
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), variables)
    save_model(tmp_path / "broken", net, model, broken, **about)
    for name in ("neural-cleanse", "strip"):
        found, text = defend(capsys, str(tmp_path / "broken"), name)
        assert found is not None, text
        assert float(found["acc_test"]) == float(found["asr_nt"]) == 0
