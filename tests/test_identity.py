"""What a run is, and by which code it was made: what must change a hash, a digest, a row, and what
must not.
"""

import dataclasses
import functools
import importlib
import json
import linecache
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

from bdjax import cli, experiment, identity, migrate, registry, report, schema, sweep
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import replace
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner
from bdjax.train import Recipe
from bdjax.types import BadInput

RESULTS = sorted((Path(__file__).parents[1] / "experiments" / "results").rglob("*.jsonl"))
DATA = registry.make("dataset", "fashion-mnist-sample", train_size=60, test_size=20)
CELL = Cell("T", "a", DATA, Ffnn(hidden=(4,)), Recipe(epochs=1, batch=32), BadNets(rate=0.5))


# --- Runs ---


def test_what_shows_a_run_is_no_part_of_it():
    moved = dataclasses.replace(
        CELL, table="U", row="b", reported={"acc_test": 0.9}, substitute="clothes"
    )
    assert (moved.run_id, moved.victim_id) == (CELL.run_id, CELL.victim_id)
    others = [
        replace(CELL, path, value)
        for path, value in [
            (["seed"], 1),
            (["attack", "rate"], 0.25),
            (["recipe", "epochs"], 2),
            (["model", "hidden"], (5,)),
            (["dataset", "train_size"], 50),
            (["attack"], None),
        ]
    ]
    assert len({CELL.victim_id, *(cell.victim_id for cell in others)}) == 7
    data = DATA.load()
    called = sweep.Labelled(data=data._replace(names=tuple("abcdefghij"), name="clothes"))
    assert replace(CELL, ["dataset"], called).run_id == CELL.run_id
    defended = replace(CELL, ["defense"], NeuralCleanse())
    assert defended.victim_id == CELL.victim_id and defended.run_id != CELL.run_id


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), np.ones((), np.float32)])
def test_a_number_is_the_same_however_it_is_given(one):
    assert replace(CELL, ["recipe", "weight_decay"], one).run_id == (
        replace(CELL, ["recipe", "weight_decay"], 1.0).run_id
    )
    tenth = replace(CELL, ["attack", "rate"], 0.1 * float(one))
    assert tenth.run_id == replace(CELL, ["attack", "rate"], np.float32(0.1)).run_id


def fields():
    """All fields of registered methods that an older version did not have."""
    for entry in registry.entries():
        for field in dataclasses.fields(entry.cls):
            if "before" in field.metadata:
                yield entry, field


def test_a_new_field_at_its_old_meaning_voids_nothing():
    assert len(list(fields())) > 30
    for entry, field in fields():
        method = registry.make(entry.kind, entry.name)
        old = dataclasses.replace(method, **{field.name: field.metadata["before"]})
        without = {k: v for k, v in registry.describe(old).items() if k != field.name}
        assert identity.plain(registry.describe(old), entry.kind) == (
            identity.plain(without, entry.kind)
        )
        other = registry.describe(old) | {field.name: "another"}
        assert identity.plain(other, entry.kind)[field.name] == "another"


def test_a_leaf_may_be_new_too_and_parts_of_methods():
    @registry.pytree
    class NewPart:
        a: int = 1
        b: float = registry.leaf(2.0, before=2)

    assert identity.plain(registry.describe([NewPart()])) == [{"class": "NewPart", "a": 1}]
    other = identity.plain(registry.describe([NewPart(b=3.5)]))
    assert other == [{"class": "NewPart", "a": 1, "b": 3.5}]  # and not where it comes from
    del registry._pytrees[registry._stem(registry.plugin_of(NewPart)), "NewPart"]


def test_the_mark_of_a_plugin_is_no_part_of_a_run():
    described = {"name": "badnets", "rate": 0.1}
    assert identity.plain(described | {"plugin": "mine"}) == identity.plain(described)
    functions = [identity.plain({"function": f"{name}.f"}) for name in ("a", "plugin_a", "b.a")]
    assert functions[0] == functions[1] != functions[2]


def committed():
    return [json.loads(line) for path in RESULTS for line in path.read_text().splitlines()]


def test_all_fields_since_0_1_say_what_was_done_before():
    registry.entries()

    def missing(described, kind):
        if isinstance(described, list):
            return set().union(*(missing(inner, kind) for inner in described))
        if not isinstance(described, dict):
            return set()
        inner = set().union(*(missing(value, kind) for value in described.values()))
        cls = identity._class(described, kind) if {"name", "class"} & {*described} else None
        ours = cls is not None and cls.__module__.startswith("bdjax.")  # not an experiment's probe
        new = [f for f in dataclasses.fields(cls) if f.name not in described] if ours else []
        return inner | {(cls, f.name) for f in new if "before" not in f.metadata}

    rows = committed()
    assert len(rows) == 2747
    assert not set().union(*(missing(v, k) for row in rows for k, v in row["config"].items()))


# --- Digests ---

CODE = '''
"""What it is."""
import os, bdjax.metrics as m

class A(Base):
    """Why."""
    size: int = 3
    """Of what."""

    def f(self, x=None, *, y=b"\\xff", **more) -> "int":
        # Because.
        return f"{x!r:>{self.size}} and {y}" if x else (1.0, -2j, "\\u20ac", ..., None, True)

@wraps
async def g(*a):
    match a:
        case [1, *rest] | {"k": 2}: pass
        case A(size=s) if s: return [i async for i in rest]
    try: del a[0]
    except* OSError as e: raise e from None
    finally: h = lambda: (yield)
'''


def code(text):
    return [s.dump for s in identity._parsed("a file", text)]


def test_equal_on_all_versions_of_python():
    # Written down once, held by whichever version runs the tests.
    assert identity._hash(code(CODE)) == "bc6e044a60b69293"


def test_a_digest_is_blind_to_what_does_nothing():
    other = CODE.replace("What it is.", "Else.").replace("# Because.", "").replace("Why.", "New.")
    other = other.replace("Of what", "One").replace("if x else (", "if (x) else (\n\n    ")
    other = other.replace("import os, bdjax.metrics as m", "import bdjax.metrics as m\nimport os")
    assert other != CODE and code(other) == code(CODE)
    for old, new in [("3", "4"), ("x!r", "x!s"), (" and ", " or "), ("2j", "3j"), ("s: r", "x: r")]:
        assert old in CODE and code(CODE.replace(old, new, 1)) != code(CODE)
    assert code("x = f'a' 'b' f'{x:}'") == code("x = f'ab{x}'")
    declared = "class A:\n    measures = (Metric('a'),)\n    x = 1\ndeclare('here', Metric('b'))"
    assert code(declared) == code("class A:\n    x = 1") != code("class A:\n    rates = 1")


def test_what_is_named_is_there_and_methods_have_source():
    for files in identity.CORE.values():
        for file, names in files.items():
            bound = set().union(*(s.binds for s in identity._read(str(identity.ROOT / file))))
            assert bound.issuperset(names), file
    for entry in registry.entries():
        assert identity.digest([entry.cls]), entry.name
        method = registry.make(entry.kind, entry.name)
        things = set(identity._things(method))
        assert set(identity._named(registry.describe(method), entry.kind)) == things


def digests():
    found = {(e.kind, e.name): identity.digest([e.cls]) for e in registry.entries()}
    return found | {("core", part): digest for part, digest in identity._core().items()}


def test_a_file_counts_for_its_method_and_all_that_stand_on_it(monkeypatch):
    before, read = digests(), identity._read

    def changed(*files):
        """The parts of the core and the methods whose digest differs where `files` are others."""
        places = {str(identity.ROOT / file) for file in files}
        assert all(Path(place).is_file() for place in places)
        more = identity._parsed("more", "more = 1")
        monkeypatch.setattr(identity, "_read", lambda p: (*read(p), *(more if p in places else ())))
        return {key for key, digest in digests().items() if digest != before[key]}

    on = changed("defenses/invert/neural_cleanse.py")
    users = ("neural-cleanse", "nc-pruning", "nc-unlearning", "nc-filter")
    assert on >= {("defense", name) for name in users}
    assert ("defense", "fine-pruning") not in on and {kind for kind, _ in on} == {"defense"}
    for entry in (entry for entry in registry.entries("defense") if not entry.plugin):
        text = (identity.ROOT.parent / entry.file).read_text()
        if "neural_cleanse import" in text:
            assert ("defense", entry.name) in on
    assert ("defense", "fine-pruning") in changed("channels.py")
    assert changed("train.py", "metrics.py") == {("core", "training"), ("core", "judging")}
    plain = ("report", "registry", "cli", "sweep", "types", "datasets/base")
    assert not changed("models/conv.py", *(f"{name}.py" for name in plain))


def test_own_files_and_what_stands_beside_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "own_method.py": """
            from own_helper import strength

            class Own:
                def f(self):
                    from own_package.late import more
                    import bdjax
                    return strength() + more() + bdjax.channels.prune
        """,
        "own_helper.py": "import numpy\ndef strength():\n    return 1  # why\n",
        "own_package/__init__.py": "",
        "own_package/late.py": "from .inner import more\n",
        "own_package/inner.py": "def more():\n    return 2\n",
        "own_other.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    own = importlib.import_module("own_method").Own

    def after(name, old, new):
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
        return identity.digest([own])

    first = identity.digest([own])
    assert first == after("own_helper.py", "  # why", '\n    """Not."""\n')
    assert first == after("own_other.py", "1", "2")
    seen = [first, after("own_helper.py", "return 1", "return 10")]
    seen += [after("own_package/inner.py", "2", "20"), after("own_method.py", "+ more()", "")]
    assert len(set(seen)) == 4
    assert any(Path(p).name == "channels.py" for p in followed(own))
    (tmp_path / "own_method.py").unlink()
    assert identity.digest([own]) is None


def followed(cls):
    """The files that count for a class."""
    places, read = [], identity._read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "_read", lambda place: places.append(place) or read(place))
        identity.digest([cls])
    return places


def test_code_without_a_source_is_stale(monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec("def f():\n    pass", vars(main))
    assert identity.digest([main.f]) is None
    assert identity.differs({"probe": None}, {"probe": None}) == ["probe"]


def test_cells_of_a_notebook(monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def cell(number, text):
        name = f"<cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), vars(main))

    cell(1, "import bdjax\nfrom bdjax import channels\nsize = 3\ndef helper():\n    return 1\n")
    text = "class A:\n    def f(self):\n        return channels.prune, helper() * size"
    cell(2, f"{text}, bdjax.augment\n")
    first = identity.digest([main.A])
    assert first and {Path(place).name for place in followed(main.A)} >= {
        "channels.py", "augment.py",
    }  # fmt: skip
    cell(3, "unused = 4\n")
    assert identity.digest([main.A]) == first
    cell(4, "def helper():\n    return 2\n")
    second = identity.digest([main.A])
    cell(5, "size = 5\n")
    assert len({first, second, identity.digest([main.A])}) == 3


# --- What a folder does with them ---


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


STUDY = """
    '''Two of them.'''
    import dataclasses

    from stale_toy import Toy
    from stale_other import Other

    from bdjax import registry
    from bdjax.attacks.badnets import BadNets
    from bdjax.models.shamshiri import Ffnn
    from bdjax.registry import pytree
    from bdjax.study import Cell, grid
    from bdjax.train import Recipe

    TITLE, SCALES, TABLE = "toys", ("smoke",), "T"

    def cells(scale, seeds):
        data = registry.make("dataset", "fashion-mnist-sample", train_size=60, test_size=20)
        recipe = Recipe(epochs=1, batch=32)
        cell = Cell(TABLE, "a", data, Ffnn(hidden=(4,)), recipe, BadNets(rate=0.5))
        several = list(grid(cell, defense=(None, Toy(), Other()), probe=(Seen(),)))
        reported = {"acc_test": 0.5}
        yield from several
        yield dataclasses.replace(several[0], table="Too", row="b", reported=reported)

    @pytree
    class Seen:
        def __call__(self, key, model, variables, attack, clean, test):
            return {"seen": scale() * clean.label.mean(dtype="float32")}

    def scale():
        return 1.0
"""
TOY = """
    import jax
    from bdjax import registry
    from bdjax.defenses.base import Repair
    from bdjax.types import Repaired

    @registry.defense("stale-toy")
    class Toy(Repair):
        '''A toy.'''
        def __call__(self, key, model, variables, clean):
            from stale_helper import times
            return Repaired(jax.tree.map(lambda x: times() * x, variables), {})
"""
OTHER = """
    from bdjax import registry
    from bdjax.defenses.base import Repair
    from bdjax.types import Repaired

    @registry.defense("stale-other")
    class Other(Repair):
        '''Another.'''
        def __call__(self, key, model, variables, clean):
            return Repaired(variables, {"n": clean.label.sum()})
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A file with a study of two toys in files of their own, and its folder of results."""
    folder = tmp_path_factory.mktemp("study")
    texts = {
        "study": STUDY,
        "stale_toy": TOY,
        "stale_other": OTHER,
        "stale_helper": "def times():\n    return 1\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        run(folder, folder / "out")
        yield folder
    for kind, name in [key for key in registry._entries if key[1].startswith("stale-")]:
        del registry._entries[kind, name]


PROGRAMS = {}


def run(folder, out, **options):
    """The study, as a new process would run it."""
    for name in ("stale_toy", "stale_other", "stale_helper"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    with pytest.MonkeyPatch.context() as patch:
        # What one run has compiled the next ones use.
        patch.setattr(experiment, "Runner", functools.partial(Runner, programs=PROGRAMS))
        return experiment.run(folder / "study.py", "smoke", out, quiet=True, **options)


@pytest.fixture
def edited(study, tmp_path, monkeypatch):
    """A copy of the results, and a function that edits a file of the study for the test alone."""
    import shutil

    shutil.copytree(study / "out", tmp_path / "out")
    texts = {path: path.read_text() for path in study.glob("*.py")}

    def edit(name, old, new):
        text = (study / name).read_text()
        assert old in text
        (study / name).write_text(text.replace(old, new))

    yield tmp_path / "out", edit
    for path, text in texts.items():
        path.write_text(text)


def runs(rows):
    return {row["defense"]: (row["metrics"], row["code"], row["written"]) for row in rows}


def test_two_tables_share_a_run_and_may_be_called_otherwise(study, edited, monkeypatch):
    out, _ = edited
    monkeypatch.setattr(sweep, "compiled", None)  # nothing is computed from here on
    rows = run(study, out)
    cells = list(experiment.load(study / "study.py").cells("smoke", None))
    assert [(row["table"], row["row"]) for row in rows] == [("T", "a")] * 3 + [("Too", "b")]
    assert [row["run"] for row in rows] == [cell.run_id for cell in cells]
    assert rows[0]["metrics"] == rows[3]["metrics"]
    assert [row["reported"] for row in rows] == [{}, {}, {}, {"acc_test": 0.5}]
    assert len(lines(out)) == 3 and len(Store(out).rows()) == 4
    moved = [dataclasses.replace(cells[0], table="V"), *cells[1:]]
    Runner(Store(out), "study", "smoke", quiet=True).run(cells[:1])  # a part of them
    assert len(lines(out)) == 3
    Runner(Store(out), "study", "smoke", quiet=True, complete=True).run([*moved, *moved])
    Runner(Store(out), "another", quiet=True).run(cells[:1])
    found = [
        (r["experiment"], r["table"]) for r in Store(out).rows() if r["run"] == cells[0].run_id
    ]
    assert sorted(found) == [("another", "T"), ("study", "Too"), ("study", "V")]
    tables = {table["name"] for table in report.aggregate(report.load(out).rows)}
    assert tables == {"T (smoke)", "T (cpu)", "Too (smoke)", "V (smoke)"}
    assert len({row["run"] for row in lines(out)}) == 3


def numbers(rows):
    return {name: found[:2] for name, found in runs(rows).items()}


def nowhere(described, kind):
    """As if no method were at hand."""
    if described is not None:
        raise LookupError
    yield from ()


def test_what_does_not_change_the_code_asks_nothing(study, edited, monkeypatch):
    out, edit = edited
    edit("stale_toy.py", "A toy.", "Still a toy.")
    edit("stale_helper.py", "return 1", "return  1  # as it was")
    edit("study.py", '"toys", ("smoke",), "T"', '"toys", ("smoke",), "U"')
    edit("study.py", "Two of them", "A new word")
    monkeypatch.setattr(sweep, "compiled", None)
    rows = run(study, out)
    assert [row["table"] for row in rows] == ["U"] * 3 + ["Too"]
    assert not identity.kept(rows)
    assert {row["table"] for row in Store(out).rows()} == {"U", "Too"}


def test_rows_of_other_code_are_asked_about_kept_or_made_anew(study, edited, monkeypatch, capsys):
    out, edit = edited
    before, first = runs(Store(out).rows()), numbers(Store(out).rows())
    edit("stale_helper.py", "return 1", "return 0")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "compiled", None)
        with pytest.raises(
            BadInput, match=r"1 rows \(stale-toy 1\) come from other code"
        ) as caught:
            run(study, out)
        assert "--stale keep" in str(caught.value) and "\n" not in str(caught.value)
        for command in ("run", "sweep"):
            with pytest.raises(SystemExit) as stop:
                cli.main([command, str(study / "study.py"), "--scale", "smoke", "--out", str(out)])
            assert stop.value.code == 2 and "--stale redo" in capsys.readouterr().err
        run(study, out, dry_run=True)
        assert "1 rows come from other code" in capsys.readouterr().out
        assert runs(Store(out).rows()) == before
        report.merge([out])
        text = (out / "table.md").read_text()
        assert text.count("by other code ‡") == 1 and report.OTHER in text
        for _ in range(2):
            kept = run(study, out, stale="keep")
            assert numbers(kept) == numbers(Store(out).rows()) == first
            assert len(lines(out)) == 4  # it says so, once
        assert [row["defense"] for row in Store(out).rows() if "kept" in row] == ["stale-toy"]
        patch.setattr(identity, "_named", nowhere)
        assert len(identity.kept(Store(out).rows())) == 1
    said = []
    monkeypatch.setattr(Runner, "_written", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(study, out, stale="redo")
    assert numbers(Store(out).rows()) == first  # the new row was not there yet
    monkeypatch.undo()
    monkeypatch.syspath_prepend(study)
    trained = Runner._trained
    monkeypatch.setattr(Runner, "_trained", lambda *a: said.append(a) or trained(*a))
    after = runs(run(study, out, stale="redo"))
    assert not said  # the victim is of this code
    assert {name for name in after if after[name] != before[name]} == {"stale-toy"}
    assert not any("kept" in row for row in Store(out).rows())
    assert after["stale-toy"][0]["acc_train"] != before["stale-toy"][0]["acc_train"]
    assert not identity.kept(Store(out).rows())
    assert len(lines(out)) == 5 and len(Store(out).rows()) == 4
    monkeypatch.setattr(sweep, "compiled", None)
    assert runs(run(study, out)) == after


def test_a_changed_probe_counts(study, edited):
    out, edit = edited
    edit("study.py", "return 1.0", "return 2.0")
    with pytest.raises(BadInput, match=r"3 rows \(the probe 3\)"):
        run(study, out)


def test_victims_of_other_code(study, edited, monkeypatch):
    out, _ = edited
    before = runs(Store(out).rows())
    core = {**identity._core(), "training": "0" * 16}
    monkeypatch.setattr(identity, "_core", lambda: core)
    trained, made = Runner._trained, []
    monkeypatch.setattr(Runner, "_trained", lambda *a: made.append(len(a[1])) or trained(*a))
    with pytest.raises(BadInput, match=r"3 rows \(bdjax's training 3\)"):
        run(study, out)
    (out / "results.jsonl").unlink()  # as if the run had stopped after the training
    with pytest.raises(BadInput, match=r"out: 1 victims come from other code"):
        run(study, out)
    assert not made
    kept = runs(run(study, out, stale="keep"))
    assert not made
    for name, (metrics, code, _) in kept.items():  # what the victim was made by stays true
        assert metrics == before[name][0] and code == before[name][1]
    anew = run(study, out, stale="redo")
    assert made == [1] and {row["code"]["training"] for row in anew} == {"0" * 16}
    assert not identity.kept(anew)
    assert runs(run(study, out)) == runs(anew) and made == [1]


def test_victims_of_code_without_a_source_serve_the_run_that_trained_them(
    study, edited, monkeypatch
):
    out, _ = edited
    monkeypatch.setattr(identity, "digest", lambda things: None)
    rows = run(study, out, stale="redo")
    assert len(rows) == 4 and {row["code"]["model"] for row in rows} == {None}
    with pytest.raises(BadInput, match="3 rows"):
        run(study, out)


def test_rows_and_victims_without_a_digest_are_stale(study, edited):
    out, _ = edited
    rows = [{k: v for k, v in row.items() if k not in ("code", "written")} for row in lines(out)]
    (out / "results.jsonl").write_text("".join(schema.dump(row, "row") + "\n" for row in rows))
    with pytest.raises(BadInput, match=r"3 rows \(no digest kept 3\)"):
        run(study, out)
    assert identity.kept(Store(out).rows()) == {row["run"] for row in rows}


def test_a_report_without_the_methods_goes_by_the_latest_rows():
    row = {"run": "a", "config": {"probe": {"class": "NotLoaded"}}, "written": 1.0}
    core = identity._core()
    old = row | {"code": core | {"probe": "0" * 16}}
    new = row | {"run": "b", "code": core | {"probe": "1" * 16}, "written": 2.0}
    assert identity.kept([old]) == set() and identity.kept([new, old]) == {"a"}


# --- Rows of 0.1 ---


def some():
    """Rows of every committed file, of every attack and defense that one of them has, as 0.1 had
    them: without their code, and called otherwise.
    """
    found = {}
    for row in committed():
        if row["experiment"] == "audit_zoo":  # 0.1 had none
            continue
        if "code" in row:
            later = ("code", "how", "written", "plan", "twin", "labels", "test", "verdict")
            row = {k: v for k, v in row.items() if k not in later} | {"run": row["run"][::-1]}
        found.setdefault((row["experiment"], row["attack"], row["defense"]), row)
    return list(found.values())


def meant(kind, described):
    """What 0.1 configured, with today's fields at what was done then."""
    made = registry.revive(kind, described, {})
    new = [f for f in dataclasses.fields(made) if f.name not in described] if made else []
    return dataclasses.replace(made, **{f.name: f.metadata["before"] for f in new}) if new else made


def test_rows_of_0_1_are_brought_over(tmp_path, monkeypatch):
    rows = some()
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path / "none"))
    shown = next(row for row in rows if row["dataset"] == "fashion-mnist-sample")
    twice = [shown | {"run": "0" * 16, "table": "Again"}]
    other = [shown | {"run": "1" * 16, "table": "Odd", "metrics": {"acc_test": 2.0}}]
    source = tmp_path / "old.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows + twice + other)
    source.write_text(text)
    sample = [r for r in rows if r["dataset"] == "fashion-mnist-sample"]
    migrate.main([str(source), str(tmp_path / "new")])
    assert source.read_text() == text
    found = Store(tmp_path / "new").rows()
    assert len(found) == len(rows) + 2  # none is lost
    brought = {row["was"]: row for row in found if "was" in row}
    assert brought.keys() == {row["run"] for row in sample}
    kept = {row["run"] for row in found if "was" not in row}
    assert kept == {row["run"] for row in [*rows, *other] if row not in sample}
    for row in sample:
        parts = {kind: meant(kind, described) for kind, described in row["config"].items()}
        cell = Cell("", "", seed=row["seed"], **parts)
        assert (cell.run_id, cell.victim_id) == tuple(
            brought[row["run"]][k] for k in ("run", "victim")
        )
        assert report.measured(next(iter(brought[row["run"]]["metrics"].values())))
    again = {row["table"] for row in found if row["run"] == brought[shown["run"]]["run"]}
    assert again == {shown["table"], "Again"}
    assert identity.kept(found) == {row["run"] for row in found}
