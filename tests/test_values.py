"""Values are checked where they enter: every field has a range, and every door looks at it."""

import dataclasses
import importlib.util
import itertools
import math
import re
import subprocess
import sys
import types
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import cli, mesh, registry
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack
from bdjax.attacks.blended import Blended
from bdjax.attacks.lipstick import Lipstick
from bdjax.augment import Augmentation
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn, Ffnn
from bdjax.study import Cell
from bdjax.sweep import Runner
from bdjax.train import (
    Recipe,
    advance,
    attacked,
    begin,
    clean_set,
    evaluate,
    fit,
    poisoned_set,
    predict,
    stamped,
)
from bdjax.types import INT32, BadInput, Split, Splits, Victim, whole

KEY = jax.random.key(0)
MODEL = build(Cnn(features=(2, 4), hidden=8), (28, 28, 1), 10)
RNG = np.random.default_rng(0)
DATA = Split(
    RNG.integers(0, 256, (40, 28, 28, 1), np.uint8), np.tile(np.arange(10, dtype=np.int32), 4)
)
ENTRIES = registry.entries()


def classes():
    """All classes with hyper-parameters: registered, parts of those, and their bases."""
    nested = [c for c in registry._pytrees.values() if c.__module__.startswith("bdjax.")]
    return {c.__qualname__: c for c in [*(e.cls for e in ENTRIES), *nested, Augmentation]}


def test_no_two_classes_share_a_structure(own_names):
    """jit takes what it compiled for one class only for that class: lipstick and eyebrows, equal in
    fields and different in `outline` alone, must not do each other's work.
    """
    toys = [registry.pytree(type(f"Toy{i}", (Lipstick,), {"outline": ()})) for i in range(3)]
    made = [e.cls() for e in ENTRIES if e.kind != "dataset"] + [toy() for toy in toys]
    found = {type(value).__name__: jax.tree.structure(value) for value in made}
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert a != b, f"{one} and {other}"
    for value in made:
        leaves, structure = jax.tree.flatten(value)
        assert jax.tree.structure(jax.tree.unflatten(structure, leaves)) == structure
        names = {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(value)}
        moving = {f.name for f in dataclasses.fields(value) if not registry.is_static(f)}
        assert names <= moving


def fields():
    """Each number of each class with defaults: the class, the field, its types and range."""
    for name, cls in sorted(classes().items()):
        for field in dataclasses.fields(cls):
            for kinds, limit in registry.ranges(registry.hints(cls)[field.name]):
                if kinds != {jax.Array}:  # what a computation leaves behind
                    yield pytest.param(cls, field, kinds, limit, id=f"{name}-{field.name}")


def filled(cls, field, value):
    """`cls` with `value` in `field`: as it is, or in a tuple of the field's own length."""
    hint = registry.hints(cls)[field.name]
    parts = [arg for arg in (hint, *typing.get_args(hint)) if typing.get_origin(arg) is tuple]
    for part in parts[:1]:
        inner = typing.get_args(part)
        if typing.get_origin(inner[0]) is tuple:  # drops: (epoch, factor) pairs
            value = (value, 0.5) if isinstance(value, int) else (1, value)
        value = (value,) if Ellipsis in inner else (value,) * len(inner)
    return dataclasses.replace(made(cls), **{field.name: value})


def made(cls):
    def something(hint):
        if dataclasses.is_dataclass(hint):
            return made(hint)
        return (0.0,) if typing.get_origin(hint) is tuple else jnp.zeros(2)

    needed = {
        f.name: something(registry.hints(cls)[f.name])
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    return cls(**needed)


@pytest.mark.parametrize(("cls", "field", "kinds", "limit"), fields())
def test_every_number_has_a_finite_range_that_is_enforced(cls, field, kinds, limit):
    assert limit is not None, f"{cls.__name__}.{field.name} has no Range"
    assert math.isfinite(limit.low) and math.isfinite(limit.high) and limit.low < limit.high
    whole_ones = int in kinds and float not in kinds
    assert not whole_ones or limit.high < 2**32
    step = 1 if whole_ones else abs(limit.high) * 1e-3 + 1e-3
    bad = [limit.low - step, limit.high + step, math.nan, math.inf, -math.inf, 10**400, -(10**400)]
    bad += ["1", "", True, [limit.low], 1j, b"1", object()]
    bad += [limit.low + 0.5] if whole_ones else []
    good = [limit.low, limit.high]
    if not kinds & {int, float}:
        bad, good = [np.full(3, value) for value in bad[:2]] + [np.full(2, math.nan), 0.5, "x"], []
    if field.name == "drops":
        bad = [value for value in bad if isinstance(value, int) == whole_ones and value != 1]
    for value in bad:
        with pytest.raises(BadInput, match=field.name) as caught:
            registry.validate(filled(cls, field, value))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    for value in good:
        registry.validate(filled(cls, field, int(value) if whole_ones else float(value)))
    if jax.Array in kinds:
        many = np.asarray([limit.low, limit.high], np.int64 if whole_ones else np.float64)
        registry.validate(filled(cls, field, many))
        with pytest.raises(BadInput, match="outside"):
            registry.validate(filled(cls, field, np.append(many, limit.low - step)))


@pytest.mark.parametrize("name", sorted(classes()))
def test_words_flags_and_parts_are_checked(name):
    cls = classes()[name]
    for field, hint in registry.hints(cls).items():
        args = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            bad = ["nothing", 1, None, f"{args[0]}s", np.zeros(2)]
        elif hint is bool:
            bad = [1, "True", None]
        elif hint is str or set(args) == {str, types.NoneType}:
            bad = [1, b"x"]
        elif dataclasses.is_dataclass(hint):
            bad = [None, "x", 1]
        else:
            continue
        for value in bad:
            with pytest.raises(BadInput, match=field):
                registry.validate(dataclasses.replace(made(cls), **{field: value}))


def test_a_fault_within_a_part_is_found():
    for entry in ENTRIES:
        for field, value in (
            (f.name, getattr(made(entry.cls), f.name))
            for f in entry.cls.__dataclass_fields__.values()
        ):
            if isinstance(value, Recipe):
                bad = dataclasses.replace(value, lr=math.nan)
                with pytest.raises(BadInput, match=rf"{field}\.lr nan"):
                    registry.make(entry.kind, entry.name, None, **{field: bad})
    with pytest.raises(BadInput, match=r"augment\.rotate inf"):
        registry.validate(Recipe(augment=Augmentation(rotate=math.inf)))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.kind}-{e.name}")
def test_what_is_traced_passes(entry):
    for method in [
        entry.cls(),
        *(entry.cls(**p) for p in getattr(entry.cls, "presets", {}).values()),
    ]:
        registry.validate(method)
        jax.eval_shape(registry.validate, method)


def test_what_was_learned_or_found_passes():
    from bdjax.defenses.models.mntd import Meta, Mntd
    from bdjax.defenses.parts.reversed import Reversed
    from bdjax.defenses.repair.nc_pruning import NcPruning

    found = Reversed(
        jnp.ones((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 1)), jnp.arange(2), jnp.ones(2, bool)
    )
    registry.validate(NcPruning(found=found))
    registry.validate(Mntd(learned=Meta(*[jnp.full(3, jnp.nan)] * 9)))
    with pytest.raises(BadInput, match=r"found\.label -1 is outside"):
        registry.validate(NcPruning(found=dataclasses.replace(found, label=jnp.arange(2) - 1)))


# --- The doors of the library ---

BAD_DATA = {
    "a label": Split(DATA.image, DATA.label + 1),
    "negative": Split(DATA.image, DATA.label - 1),
    "labels of shape": Split(DATA.image, DATA.label[:5]),
    "labels that are no numbers": Split(DATA.image, DATA.label.astype(np.float32)),
    "another shape": Split(DATA.image[:, :20], DATA.label),
    "three axes": Split(DATA.image[..., 0], DATA.label),
    "pixels to 255 as floats": Split(DATA.image.astype(np.float32), DATA.label),
    "NaN pixels": Split(np.full(DATA.image.shape, np.nan, np.float32), DATA.label),
    "whole numbers": Split(DATA.image.astype(np.int32), DATA.label),
}
ATTACK_DOORS = {
    "poisoned_set": lambda a, d: poisoned_set(KEY, d, a, 10),
    "train": lambda a, d: a.train(KEY, MODEL, Recipe(epochs=1), d),
    "attacked": lambda a, d: attacked(KEY, MODEL, {}, d, a),
    "evaluate": lambda a, d: evaluate(KEY, MODEL, {}, d, a),
}


@pytest.mark.parametrize("entry", registry.entries("attack"), ids=lambda e: e.name)
@pytest.mark.parametrize("door", [*ATTACK_DOORS, "plan", "stamped", "cell", "make"])
def test_attacks_are_checked_at_every_door(entry, door):
    doors = ATTACK_DOORS | {
        "plan": lambda a, d: a.plan(KEY, jnp.asarray(d.label), 10),
        "stamped": lambda a, d: stamped(a, 1, d.image, KEY),
        "cell": lambda a, d: Cell("", "", registry.make("dataset", "mnist"), Cnn(), Recipe(), a),
        "make": lambda a, d: registry.make("attack", entry.name, rate=a.rate, target=a.target),
    }
    for bad in ({"rate": math.nan}, {"rate": 1.5}, {"target": -1}, {"target": "0"}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            doors[door](entry.cls(**bad), DATA)
    if door in ATTACK_DOORS and entry.cls().labels != "clean-label":
        with pytest.raises(BadInput, match="10"):
            doors[door](dataclasses.replace(entry.cls(), target=10), DATA)


@pytest.mark.parametrize("data", BAD_DATA.values(), ids=BAD_DATA)
def test_data_are_checked_at_every_door(data):
    for name, door in ATTACK_DOORS.items():
        if name != "poisoned_set" or data.image.shape == DATA.image.shape:  # no net there
            with pytest.raises(BadInput):
                door(BadNets(), data)
    with pytest.raises(BadInput):
        fit(KEY, MODEL, Recipe(epochs=1), clean_set(data))
    if data.label is DATA.label:
        with pytest.raises(BadInput):
            predict(MODEL, {}, data.image)
    for entry in registry.entries("defense"):
        with pytest.raises(BadInput):
            called(entry.cls(), data)


def called(defense, data):
    victim = Victim(MODEL, {}, None, Recipe(epochs=1), KEY)
    return defense.applied(KEY, victim, Splits(data, data, data))


@pytest.mark.parametrize("entry", registry.entries("defense"), ids=lambda e: e.name)
def test_defenses_are_checked_when_called(entry):
    for field in dataclasses.fields(entry.cls):
        found = registry.ranges(registry.hints(entry.cls)[field.name])
        if found and found[0][0] & {int, float}:
            with pytest.raises(BadInput, match=field.name):
                called(filled(entry.cls, field, math.nan), DATA)
            with pytest.raises(BadInput, match=field.name):
                filled(entry.cls, field, math.nan).check(MODEL, DATA)
    if "site" in entry.cls.__dataclass_fields__:  # the defense's own check is run, too
        with pytest.raises(BadInput, match="no site 'nowhere'"):
            called(entry.cls(site="nowhere"), DATA)


def test_recipes_are_checked_where_training_begins():
    data = clean_set(DATA)
    state = jax.eval_shape(lambda: begin(KEY, MODEL, Recipe()))
    for bad in (Recipe(lr=math.nan), Recipe(epochs=-1), Recipe(batch=0), Recipe(momentum=2.0)):
        for door in (
            lambda r: fit(KEY, MODEL, r, data),
            lambda r: begin(KEY, MODEL, r),
            lambda r: advance(KEY, state, MODEL, r, data, epochs=1),
            lambda r: BadNets().train(KEY, MODEL, r, DATA),
            lambda r: Cell("", "", registry.make("dataset", "mnist"), Cnn(), r),
        ):
            with pytest.raises(BadInput, match=r"Recipe: \w+ .* is outside"):
                door(bad)
    with pytest.raises(BadInput, match="epochs"):
        advance(KEY, state, MODEL, Recipe(), data, epochs=-1)


def test_nets_and_sources_are_checked_where_they_are_built():
    with pytest.raises(BadInput, match=r"hidden 0 is outside \[1, 65536\]"):
        build(Ffnn(hidden=(8, 0)), (28, 28, 1), 10)
    with pytest.raises(BadInput, match="holdout nan"):
        registry.make("dataset", "fashion-mnist-sample").__class__(holdout=math.nan).load()
    with pytest.raises(BadInput, match="lanes"):
        Runner(None, "x", lanes=0)  # type: ignore[arg-type]


def test_seeds_run_to_the_last_of_32_bits():
    source = registry.make("dataset", "mnist", seed=2**32 - 1)
    cell = Cell("", "", source, Cnn(), Recipe(), seed=2**32 - 1)
    jax.random.key(cell.seed)
    for bad in (-1, 2**32, 1.5, "x", True, math.nan, 10**400):
        with pytest.raises(BadInput, match="seed"):
            dataclasses.replace(cell, seed=bad)
        with pytest.raises(BadInput, match="seed"):
            registry.make("dataset", "mnist", seed=bad)
    last = Blended(key_seed=2**32 - 1)
    same = jax.jit(lambda a: stamped(a, 1, DATA.image[:1], KEY))(last)
    assert jnp.allclose(same, stamped(last, 1, DATA.image[:1], KEY), atol=1e-6)
    assert registry.describe(last)["key_seed"] == 2**32 - 1


def test_a_cell_holds_what_it_says():
    source = registry.make("dataset", "mnist")
    good: dict[str, Any] = {"dataset": source, "model": Cnn(), "recipe": Recipe()}
    for part, bad in (
        ("dataset", "mnist"), ("model", MODEL), ("recipe", None), ("attack", "badnets"),
        ("defense", BadNets()),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"a cell's {part} is"):
            Cell("", "", **(good | {part: bad}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "-1", "1.5", "1e3", "nan", "inf", "१", "²", " 1", "1_0", "9" * 400, str(2**31)]
)
def test_whole_numbers_of_the_command_line(text):
    with pytest.raises(BadInput, match=r"^lanes"):
        whole("lanes", text, 1)
    assert whole("lanes", "7", 1) == 7 and whole("lanes", INT32, 1) == INT32


def test_what_cannot_fit_is_refused_before_memory_is_taken():
    with pytest.raises(BadInput, match=r"takes [\d,.]+ GB, there are"):
        build(Ffnn(hidden=(65_536,) * 64), (28, 28, 1), 10)
    big_ones: tuple[tuple[str, dict[str, Any]], ...] = (
        ("mntd", {"shadows": 65_536}), ("deep-inspect", {"images": 65_536, "hidden": 65_536}),
        ("autoencoder", {"hidden": (65_536,) * 16}),
    )  # fmt: skip
    big = build(Ffnn(hidden=(2048, 2048)), (64, 64, 3), 1000)
    for name, fields in big_ones:
        with pytest.raises(BadInput, match="GB"):
            registry.make("defense", name, None, **fields).check(big, DATA)
    mesh.fits("a byte", 1)


# --- What is not read ---


@pytest.mark.parametrize("cls", [e.cls for e in ENTRIES] + [Recipe], ids=lambda c: c.__name__)
def test_a_mode_says_which_fields_it_reads(cls):
    names = {f.name for f in dataclasses.fields(cls)}
    rules: dict = {}
    for base in reversed(cls.__mro__):
        rules |= vars(base).get("used_if", {})
    for field, wanted in rules.items():
        if field not in names:
            assert not any(field in vars(b).get("used_if", {}) for b in [cls]), field
            continue
        if wanted is None:
            assert registry.unread(made(cls), [field])
            continue
        for other, values in wanted.items():
            hint = registry.hints(cls)[other]
            known = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            assert values is ... or not known or set(values) <= set(known)
            for value in known:
                mode = dataclasses.replace(made(cls), **{other: value})
                if value not in values:
                    assert registry.unread(mode, [field])
        fitting = {o: v[0] if v is not ... else 1 for o, v in wanted.items()}
        fitting = {o: (v,) if o == "spaces" else v for o, v in fitting.items()}
        assert registry.unread(dataclasses.replace(made(cls), **fitting), [field]) is None


SMALL = ["--model", "ffnn", "--dataset", "fashion-mnist-sample"]
TRAIN = ["train", *SMALL, "--out", "OUT"]
DEFEND = ["defend", "OUT/nowhere"]


@pytest.mark.parametrize(
    "args",
    [
        [*TRAIN, "--attack.cover", "0.1"],
        [*TRAIN, "--attack.sources", "1"],
        [*TRAIN, "--recipe.momentum", "0.5"],
        [*TRAIN, "--recipe.nesterov"],
        [*TRAIN, "--dataset.data-dir", "/tmp"],
        [*TRAIN, "--attack", "none", "--attack.rate", "0.1"],
        [*TRAIN, "--attack", "blended", "--attack.pattern", "cat", "--attack.key-seed", "1"],
        [*TRAIN, "--seed", "1", "--seed", "2"],
        [*TRAIN, "--attack", "badnets:"],
        [*TRAIN, "--defense.max-drop", "0.1"],
        [*DEFEND, "--defense", "activation-clustering", "--defense.recipe.epochs", "2"],
        [*DEFEND, "--defense", "neural-cleanse", "--defense.screen-overlap", "0.3"],
        [*DEFEND, "--defense", "fine-pruning:paper", "--defense.max-drop", "0.3"],
        ["report", "OUT", "--y", "seed"],
        ["report", "OUT", "--x", "seed"],
        ["run", "experiments/shamshiri2023.py", "--seeds", "1000000000"],
        ["run", "experiments/shamshiri2023.py", "--seeds", "-1"],
        ["run", "experiments/shamshiri2023.py", "--lanes", "0"],
        ["run", "experiments/shamshiri2023.py", "--lanes", "१"],
        ["sweep", "experiments/sweep_defenses.py", "--devices", "100000"],
        ["sweep", "experiments/sweep_defenses.py", "--shard", "0/२"],
        ["sweep", "experiments/sweep_defenses.py", "--lanes", "1e3"],
        ["sweep", "experiments/sweep_defenses.py", "--hosts", "auto", "--shard", "0/2"],
        ["run"], ["nonsense"], [], ["train"], ["list", "x"], ["data", "prepare"], ["bench", "--x"],
    ],
)  # fmt: skip
def test_flags_that_nobody_reads_are_refused(capsys, tmp_path, args):
    refused(capsys, tmp_path, args)


def refused(capsys, tmp_path, args):
    """Runs `args`: one line, exit code 2, and nothing written."""
    with pytest.raises(SystemExit) as stop:
        cli.main([word.replace("OUT", str(tmp_path / "out")) for word in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2, args
    assert len(err.strip().splitlines()) == 1 and err.startswith("bdjax: "), err
    assert not (tmp_path / "out").exists()
    return err


WORDS = ["nan", "inf", "-inf", "1e400", "9" * 40, "-1e30", "", "१", "0x1", "1_0", "x", "true"]


def numeric_flags():
    """A command line up to its value for each numeric flag of each registered method."""
    for entry in ENTRIES:
        command = [*DEFEND] if entry.kind == "defense" else [*TRAIN]
        if (flag := f"--{entry.kind}") in command:
            del command[command.index(flag) : command.index(flag) + 2]
        command += [flag, entry.name]
        yield from flags_of(entry.cls, command, entry.kind)
    yield from flags_of(Recipe, TRAIN, "recipe")
    yield [*TRAIN, "--seed"]
    yield [*DEFEND, "--seed"]


def flags_of(cls, command, path):
    for field in dataclasses.fields(cls):
        found = registry.ranges(registry.hints(cls)[field.name])
        if len(found) == 1 and found[0][0] & {int, float}:
            yield [*command, f"--{path}.{field.name.replace('_', '-')}"]


FLAGS = list(numeric_flags())


@pytest.mark.parametrize("i", range(0, len(FLAGS), 12))
def test_bad_numbers_on_the_command_line(capsys, tmp_path, i):
    refused(capsys, tmp_path, [*FLAGS[i], WORDS[i // 12 % len(WORDS)]])


@pytest.mark.long
@pytest.mark.parametrize("i", range(len(FLAGS)))
def test_all_bad_numbers_on_the_command_line(capsys, tmp_path, i):
    for word in WORDS:
        args = [*FLAGS[i], word]
        if word == "9" * 40 and "--model.scale" in args:
            continue
        err = refused(capsys, tmp_path, args)
        assert re.search(re.escape(FLAGS[i][-1]), err), err


# --- The registry ---

METHOD = '''
from bdjax.attacks.base import Attack
from bdjax.registry import attack

@attack("same-name")
class {name}(Attack):
    """Does nothing (Nobody et al., 2026)."""

    def trigger(self, x, key):
        return x
'''


def imported(path, module):
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec and spec.loader
    sys.modules[module] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_two_methods_under_one_name_are_refused(tmp_path, own_names):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(METHOD.format(name="One"))
    two.write_text(METHOD.format(name="One"))
    first = imported(one, "experiment_one")
    again = imported(one, "experiment_one")  # a file that is read again
    assert first.One is not again.One
    assert registry.get("attack", "same-name").cls is again.One
    for module in ("experiment_two", "experiment_one"):
        with pytest.raises(BadInput, match=r"one\.py.*two\.py"):
            imported(two, module)
    assert registry.get("attack", "same-name").cls is again.One
    one.write_text(METHOD.format(name="Other"))
    with pytest.raises(BadInput, match="two attacks are called 'same-name'"):
        imported(one, "experiment_one")


def test_a_cell_of_a_notebook_may_run_again(monkeypatch, own_names):
    notebook = types.ModuleType("__main__")  # without a file
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    for _ in range(2):
        exec(METHOD.format(name="Mine"), vars(notebook))
    assert registry.get("attack", "same-name").cls is vars(notebook)["Mine"]
    with pytest.raises(BadInput, match="Mine in __main__ and Yours in __main__"):
        exec(METHOD.format(name="Yours"), vars(notebook))
    assert issubclass(vars(notebook)["Mine"], Attack)


# --- What is let go ---

MANY = """
import statistics
import subprocess
import sys
from bdjax import registry
from bdjax.attacks.badnets import BadNets
from bdjax.models.shamshiri import Cnn
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner
from bdjax.train import Recipe


def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024


source = registry.make("dataset", "fashion-mnist-sample", train_size=100, test_size=50)
runner = Runner(Store(sys.argv[1]), "many", quiet=True)
sizes = []
for i in range(30):
    net = Cnn(features=(2 + i, 2), hidden=4)
    row = runner.run([Cell("", str(i), source, net, Recipe(epochs=1, batch=50), BadNets())])
    assert "acc_test" in row[0]["metrics"]
    sizes.append(resident())
# What the last compilation has just freed comes and goes.
print(statistics.median(sizes[-9:]) - sizes[0])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_thirty_architectures_in_one_process(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) < 75, f"{ran.stdout} MB"
