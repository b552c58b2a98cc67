"""What a row says of its poison and of its victim, and which rows a report counts."""

import csv
import io
import re

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from bdjax import experiment, metrics, report, shipped
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.clean_label import CleanLabel
from bdjax.attacks.multi_trigger import MultiTrigger
from bdjax.defenses.repair.retraining import Retraining
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import make, replace
from bdjax.rows import Rows
from bdjax.store import Store
from bdjax.study import Cell, chain, grid
from bdjax.sweep import Runner, check
from bdjax.train import Recipe
from bdjax.types import BadInput

Y = jnp.arange(400, dtype=jnp.int32) % 10
KEY = jax.random.key(0)


# --- Poison ---


def test_classes_without_images_cannot_be_poisoned():
    absent = jnp.where(Y == 3, 4, Y)
    for attack in (
        BadNets(labels="source-specific", sources=(3,)),
        CleanLabel(target=3),
        MultiTrigger(parts=(BadNets(labels="source-specific", sources=(3,)), BadNets(row=2))),
    ):
        with pytest.raises(BadInput, match="no training image is of a class"):
            attack.count(KEY, absent, 10)
    crowd = MultiTrigger(rate=1.0, parts=tuple(BadNets(row=i) for i in range(2)))
    assert crowd.count(KEY, Y, 10)["poisoned"] == 400


def test_a_rate_above_what_the_class_has_is_counted():
    found = CleanLabel(rate=1.0).count(KEY, Y, 10)
    assert (found["asked"], found["poisoned"], found["clean_label"]) == (400, 40, 40)
    found = BadNets(rate=0.5, labels="source-specific", sources=(1, 2)).count(KEY, Y, 10)
    assert (found["asked"], found["poisoned"], found["relabelled"]) == (200, 80, 80)


def test_a_target_is_no_source():
    with pytest.raises(BadInput, match=r"target 1 is one of the sources \(0, 1\)"):
        BadNets(labels="source-specific", sources=(0, 1), target=1).check((28, 28, 1), 10)
    BadNets(labels="source-specific", sources=(0, 1), target=2).check((28, 28, 1), 10)


def test_rows_that_the_victim_was_not_trained_on_are_not_judged():
    """TrojanNN makes its images from a net: rows of the data set, stamped, are not its poison."""
    cell = replace(BASE, ["attack"], make("attack", "trojannn", "cpu"))
    for name in ("spectral-signatures", "activation-clustering", "db-covidnet"):
        with pytest.raises(BadInput, match=f"there is no training set for {name}"):
            check(replace(cell, ["defense"], make("defense", name)))
    for same in (cell, replace(cell, ["defense"], Retraining())):
        check(same)


def test_targets_by_hand():
    assert BadNets(labels="all-to-all").targets(4).all()
    assert BadNets(target=2).targets(4).tolist() == [False, False, True, False]
    assert MultiTrigger().targets(12).tolist() == [True] * 10 + [False] * 2


# --- Rows ---

DATA = make("dataset", "fashion-mnist-sample", train_size=600, test_size=200)
BASE = Cell("T", "victim", DATA, Ffnn(hidden=(16,)), Recipe(epochs=3, batch=32), BadNets())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    cells = [
        replace(BASE, ["attack"], BadNets(rate=0.5)),
        replace(BASE, ["attack"], CleanLabel(rate=1.0, target=2)),
        replace(BASE, ["defense"], Retraining(recipe=Recipe(epochs=1, batch=16))),
        BASE.twin,
        replace(BASE, ["recipe", "lr"], 0.0),
    ]
    store = Store(tmp_path_factory.mktemp("rows"))
    return cells, Runner(store, "test", quiet=True).run(cells)


def test_a_row_says_what_was_poisoned_and_what_its_twin_does(ran, capsys):
    _, (half, clean_label, defended, twin, other) = ran
    images = len(DATA.load().train.label)
    assert half["plan"]["poisoned"] == half["plan"]["asked"] == round(0.5 * images)
    assert clean_label["plan"]["asked"] == images > clean_label["plan"]["poisoned"] > 0
    assert "plan" not in twin and "asr_nt" not in twin["metrics"]
    assert defended["plan"]["poisoned"] == round(0.1 * images) and "twin" not in defended
    assert defended["victim"] == BASE.victim_id and twin["victim"] == BASE.twin.victim_id
    assert half["test"]["n"] == 200 and half["test"]["majority"] == pytest.approx(0.1, abs=0.02)
    for row in (half, clean_label):
        assert row["twin"]["victim"] == twin["victim"]
        assert row["twin"]["acc_test"] == pytest.approx(twin["metrics"]["acc_test"])
        assert 0 <= row["twin"]["asr_nt"] < row["metrics"]["asr_nt"]
    assert "twin" not in twin and "twin" not in other  # nobody trained one at this rate


def test_a_rate_that_poisons_nothing_stops_before_training(tmp_path, capsys):
    runner = Runner(Store(tmp_path), "test", quiet=True)
    with pytest.raises(BadInput, match=r"a share of 1e-06 of \d+ images is none"):
        runner.run(list(grid(BASE, attack__rate=(0.1, 1e-6))))
    assert not (tmp_path / "victims").exists()


def test_the_shard_that_lacks_a_twin_trains_it(ran, tmp_path):
    cells, rows = ran
    two = list(chain(cells[:2], cells[3:4]))
    found = {}
    for i in range(2):
        runner = Runner(Store(tmp_path, (i, 2)), "test", quiet=True)
        runner.run(two)
        assert not list((tmp_path / "partial").glob("*"))
        found |= {row["run"]: row for row in runner.store.rows()}
    for row in (rows[0], rows[1]):
        assert found[row["run"]]["twin"] == pytest.approx(row["twin"])


# --- Reports ---


def row(name, seed=0, **fields):
    made = {
        "run": f"{name}-{seed}-{fields.get('defense')}", "experiment": "e", "scale": "cpu",
        "table": "T", "row": name, "dataset": "d", "model": "m", "attack": "badnets",
        "defense": None, "seed": seed, "config": {"attack": {"name": name}}, "metrics": {},
        "reported": {}, "seconds": {"compile": 1.0, "run": 1.0}, "oracle": False,
        "substitute": None, "device": "cpu", "jax": "0", "commit": "c", "victim": f"{name}-{seed}",
        "plan": None, "test": {"n": 1000, "majority": 0.1},
    } | fields  # fmt: skip
    return made | ({"twin": {"asr_nt": 0.05}} if fields.get("defense") is None else {}) | fields


def victim(name, seed=0, acc=0.9, asr=0.95, **fields):
    return row(name, seed, metrics={"acc_test": acc, "asr_nt": asr}, **fields)


def defended(name, seed=0, asr=0.01, **fields):
    found = {"acc_test": 0.9, "asr_nt": asr}
    return row(name, seed, metrics=found, defense="fp", **fields)


def test_chance_by_hand():
    assert metrics.chance(0.1, 900) == pytest.approx(0.1 + 2.576 * 0.01)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"asr": 0.499}, "attack failed: ASR nt 49.9 %"),
        ({"asr": 0.5, "twin": {"asr_nt": 0.39}}, None),
        ({"asr": 0.7, "twin": {"asr_nt": 0.61}}, "attack failed: ASR nt 70.0 %, on the clean twin"),
        ({"asr": 0.7, "twin": None}, None),
        ({"acc": 0.124}, "collapsed: ACC 12.4 %, the largest class is 10.0 %"),
        ({"acc": 0.126}, None),
        ({"acc": 0.12, "attack": None, "asr": None}, "collapsed"),
        ({"asr": None}, None),
        ({"asr": 0.1, "victim": None}, None),  # a row of 0.1
        ({"asr": 0.1, "test": None}, None),
        ({"asr": 0.1, "error": "diverged"}, None),
        ({"asr": 0.0, "config": {"attack": {"rate": 0.0}}}, None),  # a clean twin
        ({"asr": 0.0, "config": {"attack": {"rate": 0.1}}}, "attack failed"),
    ],
)
def test_faults_of_a_victim(change, word):
    one = victim("v", **change)
    two = defended("v")
    two = two | ({"victim": None} if "victim" in change else {})
    found = report.faults([one, two])
    assert (word is None) == (not found)
    if word:
        assert set(found) == {one["run"], two["run"]} and found[two["run"]].startswith(word)
    assert list(report.valid([one, two])) == ([one] if word else [one, two])


def test_a_defense_without_its_victim_is_not_judged():
    assert report.faults([defended("v")]) == {}


ROWS = [
    victim("good"), defended("good", asr=0.4),
    victim("bad", asr=0.2), defended("bad", asr=0.01),
    victim("mixed"), victim("mixed", 1, asr=0.3), defended("mixed", 0, 0.3), defended("mixed", 1),
    victim("alone", twin=None, plan={"poisoned": 4, "asked": 9}), defended("alone"),
]  # fmt: skip


def test_seeds_of_an_invalid_victim_do_not_count():
    (table,) = report.aggregate(ROWS)
    lines = {(line["row"], line["defense"]): line for line in table["rows"]}
    assert lines["bad", "fp"]["invalid"] and not lines["bad", None]["invalid"]
    assert [line for line in lines.values() if line["invalid"]] == [lines["bad", "fp"]]
    mixed = lines["mixed", "fp"]
    assert mixed["n"] == 1 and mixed["metrics"]["asr_nt"]["mean"] == 0.3
    assert mixed["faults"] == ["1 of 2 seeds: attack failed: ASR nt 30.0 %"]
    assert lines["mixed", None]["n"] == 2
    assert lines["alone", None]["notes"] == ["4 rows poisoned of 9 asked for", "no twin"]
    assert lines["good", None]["notes"] == lines["good", "fp"]["faults"] == []


def test_it_is_shown_everywhere():
    tables = report.aggregate(ROWS)
    lines = list(csv.DictReader(io.StringIO(report.csv(tables))))
    assert [line["row"] for line in lines if line["invalid"]] == ["bad", "bad", "mixed", "mixed"]
    section = report.Section("S", ROWS)
    text = report.markdown([section])
    assert text.count("attack failed: ASR nt 20.0 %") == 2 and "no twin" in text
    page = report.page([section], "P")
    # its columns stand in two tables, one below the other
    assert page.count('<tr class="invalid">') == 2 and "attack failed: ASR nt 20.0 %" in page
    console = Console(record=True, width=120, force_terminal=True, file=io.StringIO())
    console.print(report.console_tables(ROWS, 120))
    assert "attack failed: ASR nt 20.0 %" in console.export_text()


def test_no_count_uses_them():
    rows = [*ROWS, row("bad", metrics={"acc_test": 0.9, "asr_nt": 0.02}, defense="other")]
    assert {found["row"] for found in report.best(rows, "asr_nt")}.isdisjoint({"bad"})
    with pytest.raises(BadInput):
        report.best([r for r in rows if r["row"] == "bad"], "asr_nt")
    table = report.pivot(ROWS, "row", "defense", "asr_nt")
    assert table.x == ["good", "mixed", "alone"] and table.n.tolist() == [[1, 1, 1]]


def test_claims_are_made_of_valid_rows():
    from types import SimpleNamespace

    def trends(rows):
        for name in ("good", "bad"):
            asr = rows.where(row=name, defense="fp").mean("asr_nt")
            yield name, report.verdict(asr < 0.5, False), f"ASR {asr:.2f}"

    found = experiment.claims(SimpleNamespace(trends=trends), ROWS)  # type: ignore[arg-type]
    assert [trend.verdict for trend in found] == ["reproduced", "open"]
    assert found[1].numbers == "not measured by any of these rows"
    assert experiment.claims(SimpleNamespace(), ROWS) == []  # type: ignore[arg-type]
    assert report.markdown([report.Section("S", ROWS, trends=found)]).count("**open**") == 1


@pytest.mark.parametrize("name", shipped.names())
def test_no_part_of_an_experiment_judges_what_it_has_not(name):
    module = experiment.load(name)
    for path in shipped.results(name):
        for rows in Rows(report.load(path).rows).by("table").values():
            said = [] if not hasattr(module, "trends") else module.trends(report.valid(rows))
            for (_, _, numbers), trend in zip(said, experiment.claims(module, rows), strict=True):
                if re.search(r"(?i)\bnan\b|\b0 of 0\b", numbers):
                    assert trend.verdict == "open", trend
                    assert not re.search(r"(?i)\bnan\b|: ?$", trend.numbers), trend
