"""Questions to rows, and what is declared of their metrics."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from bdjax import experiment, registry, report, shipped
from bdjax.attacks.trigger_combination import TriggerCombination
from bdjax.defenses.base import Judge, Repair, judge
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.registry import pytree
from bdjax.rows import Rows, lookup, result_files
from bdjax.train import Recipe
from bdjax.types import BadInput, Metric, Splits, Victim

ROOT = Path(__file__).parents[1]


def row(name, seed=0, defense=None, rate=0.1, tags=None, config=None, **metrics):
    return {
        "run": f"{name}{seed}{defense}{round(1 / rate)}", "table": "T", "row": name, "seed": seed,
        "dataset": "mnist", "model": "cnn", "attack": "badnets", "defense": defense,
        "tags": tags or {},
        "config": {"attack": {"rate": rate, "sources": [1, 2]}, **(config or {})},
        "metrics": metrics, "seconds": {"compile": 0.0, "run": 1.0},
    }  # fmt: skip


ROWS = Rows(
    [
        row("a", 0, asr_nt=0.9, tags={"net": "CNN"}),
        row("a", 1, asr_nt=0.7, tags={"net": "CNN"}),
        row("a", 2, asr_nt=math.nan, tags={"net": "CNN"}),
        row("b", 0, "strip", far=0.1, tags={"net": "CNN", "defense": "with STRIP"}),
        row("b", 0, "strip", far=0.3, rate=0.01, config={"defense": {"n": 5, "blend": "sum"}}),
        row("c", 0, "strip", rate=0.01) | {"error": "diverged"},
    ]
)


def names(rows):
    return [(r["row"], r["seed"]) for r in rows]


def test_rows_are_found_by_tag_then_field_then_configuration():
    assert names(ROWS.where(net="CNN")) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert names(ROWS.where(net="CNN", defense=None, seed=1)) == [("a", 1)]
    assert len(ROWS.where(defense="strip")) == 2, "a tag goes before the field of that name"
    assert names(ROWS.where(defense="with STRIP")) == [("b", 0)]
    assert len(ROWS.where(attack__rate=0.01)) == len(ROWS.where(**{"attack.rate": 0.01})) == 2
    assert len(ROWS.where(attack__rate=float(jax.numpy.float32(0.01)))) == 2
    assert len(ROWS.where(attack__sources=(1, 2))) == 6
    assert ROWS.where(defense__blend="sum")[0] is ROWS[4] and len(ROWS.where(net=None)) == 2
    assert len(ROWS.where(seed=True)) == 0, "True is not 1"
    tagged = Rows([row("clean", tags={"defense": "none"}), row("b", 0, "strip")])
    assert (
        names(tagged.where(defense=None)) == names(tagged.where(defense="none")) == [("clean", 0)]
    )


def test_nothing_found_is_nothing_measured_and_an_unknown_key_is_told():
    none = ROWS.where(row="none of this name")
    assert len(none) == 0 and math.isnan(none.mean("asr_nt")) and none.values("asr_nt") == []
    assert len(none.where(anything=3)) == 0, "no row is left that could have it"
    for key, nearest in (("nett", "net"), ("attack__rat", "attack.rate"), ("modle", "model")):
        with pytest.raises(BadInput, match=f"nearest name is '{nearest}'"):
            ROWS.where(**{key: 1})


def test_the_numbers_of_rows():
    victims = ROWS.where(row="a")
    assert victims.values("asr_nt") == [0.9, 0.7] and victims.mean("asr_nt") == pytest.approx(0.8)
    assert victims.std("asr_nt") == pytest.approx(0.2 / math.sqrt(2))
    assert math.isnan(victims[:1].std("asr_nt"))
    ends = Rows([row("a", x=math.inf), row("a", x=1.0)])
    assert ends.mean("x") == math.inf and math.isnan(ends.std("x"))
    assert math.isnan(Rows([row("a", x=math.inf), row("a", x=-math.inf)]).mean("x"))
    assert len(ROWS.done) == 5 and ROWS.where(row="c").values("far") == []
    assert [(k, len(v)) for k, v in ROWS.by("row").items()] == [("a", 3), ("b", 2), ("c", 1)]
    assert list(ROWS[:2].by("seed", "attack.sources")) == [(0, "[1, 2]"), (1, "[1, 2]")]
    kept = SimpleNamespace(arrays=lambda run: {"x": run} if run.startswith("a1") else {})
    assert [(r["seed"], list(found)) for r, found in ROWS.arrays(kept)] == [(1, ["x"])]


def test_a_frame_or_one_line(monkeypatch):
    pandas = SimpleNamespace(DataFrame=list)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    first = ROWS.frame()[0]
    assert (first["net"], first["attack.rate"], first["asr_nt"]) == ("CNN", 0.1, 0.9)
    assert first["attack.sources"] == "[1, 2]" and first["seed"] == 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BadInput, match=r"pip install 'bdjax\[frame\]'"):
        ROWS.frame()


def test_a_pivot_goes_over_tags():
    found = report.pivot(ROWS, "attack.rate", "net", "asr_nt")
    assert (found.x, found.y, found.n.tolist()) == ([0.1], ["CNN"], [[2]])
    assert "net" in report.axes(ROWS) and lookup(ROWS[0], "net") == "CNN"


# --- Metrics ---


def test_an_undeclared_metric_is_a_plain_number_of_which_nothing_is_best():
    assert not report.is_percent("learning_rate") and report.label_of("asr_loss") == "asr loss"
    judged = [row("a", acc_test=0.9), row("a", 0, "strip", acc_test=0.9, loss=0.1)]
    with pytest.raises(BadInput, match=r"Metric\('loss', better='low'\) in `measures`"):
        report.best(judged, "loss")

    @pytree
    class Mine(Repair):
        measures = (Metric("loss_of_mine", better="low", label="loss"),)

    low, high = (row(n, 0, n, acc_test=0.9, loss_of_mine=v) for n, v in (("low", 1), ("high", 9)))
    assert [r["defense"] for r in report.best([high, low], "loss_of_mine")] == ["low"]
    assert report.label_of("loss_of_mine") == "loss" and Mine.measures[0].better == "low"


def test_a_metric_that_no_row_has_is_a_mistake_and_one_that_others_have_is_nan():
    rows = Rows([row("a", mine=1.0, asr_nt=0.5), row("b", acc_test=0.5)])
    assert math.isnan(rows.where(row="b").mean("mine"))  # of the rest
    assert math.isnan(rows.by("row")["a"].done[:1].std("far"))  # declared: it might be there
    for ask in (rows.mean, rows.std, rows.values, rows.where(row="b").mean):
        with pytest.raises(BadInput, match=r"the metric 'asr'; the nearest .* 'asr_nt'"):
            ask("asr")
    assert math.isnan(Rows([row("a")]).mean("asr")) and math.isnan(Rows().mean("asr"))


def test_a_metric_means_one_thing():
    for other in (Metric("asr_nt", "share", "high"), Metric("far", better="low")):
        with pytest.raises(BadInput, match=f"'{other.name}' of .*Other.* is declared otherwise"):

            @pytree
            class Other(Repair):
                measures = (other,)

    for odd in (Metric("odd", better="up"), Metric("o*d*")):  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="`better` is"):
            registry.declare("here", odd)
    registry.declare("here", Metric("seen_here", better="low"))
    registry.declare("here", Metric("seen_here", better="high"))  # a cell that is run again
    assert registry.declared("seen_here") == Metric("seen_here", better="high")


def test_the_longest_pattern_names_a_metric():
    registry.declare("patterns", Metric("pat_*", label="P *"), Metric("pat_at_*", label="at *"))
    assert [report.label_of(f"pat_{n}") for n in ("0.5", "at_1e-3", "")] == [
        "P 0.5",
        "at 1e-3",
        "pat ",
    ]


def test_what_is_declared_of_a_probe_goes_with_its_report(tmp_path):
    registry.declare("a probe", Metric("half_probed", "share", "low", "half"))
    rows = [row("a", half_probed=0.5)]
    (tmp_path / "results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    report.write(tmp_path, rows)
    del registry._metrics["half_probed"]
    assert not report.is_percent("half_probed")
    report.merge([tmp_path])
    assert "half %" in (tmp_path / "table.md").read_text()


def defenses():
    for entry in registry.entries("defense"):
        marks = [] if entry.name in ("goodnet", "strip") else [pytest.mark.long]
        yield pytest.param(entry, marks=marks, id=entry.name)


@pytest.mark.parametrize("entry", defenses())
def test_every_metric_of_a_defense_is_declared(entry, sample):
    model = build(Cnn("VALID", hidden=16, features=(4, 4)), sample.shape, sample.classes)
    data, key = Splits(sample.train, sample.clean, sample.test[:8]), jax.random.key(0)
    made = entry.cls(**getattr(entry.cls, "presets", {}).get("cpu", {}))
    made = dataclasses.replace(made, seeds=2) if isinstance(made, Judge) else made

    def judged():
        given = Victim(model, model.init(key), TriggerCombination(), Recipe(epochs=1), key)
        return judge(key, given, made, data).metrics

    found = jax.eval_shape(judged)
    assert [name for name in found if registry.declared(name) is None] == []
    assert len(found) >= 4


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda f: f.stem)
def test_every_metric_of_an_experiment_is_declared(file):
    experiment.load(file)
    files = [path for one in shipped.results(file.stem) for path in result_files(one)]
    for path in files:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found = {name: None for line in lines for name in {**line["metrics"], **line["reported"]}}
        assert [name for name in found if registry.declared(name) is None] == []
