"""Fields of an experiment's cells, changed by name."""

from pathlib import Path

import pytest

from bdjax import experiment, shipped
from bdjax.attacks.badnets import BadNets
from bdjax.changes import changed, read, varied
from bdjax.cli import main
from bdjax.datasets.sample import Sample
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.models.shamshiri import Ffnn
from bdjax.store import read_rows
from bdjax.study import Cell, grid
from bdjax.train import Recipe
from bdjax.types import BadInput

BASE = Cell("t", "victim", Sample(train_size=60, test_size=20), Ffnn(hidden=(4,)), Recipe(epochs=1))
VICTIM = Cell("t", "victim", BASE.dataset, BASE.model, BASE.recipe, BadNets())
CELLS = [
    BASE, VICTIM, *grid(VICTIM, row=["pruned"], defense=[FinePruning()]),
    *grid(VICTIM, row=["filtered"], defense=[Strip(n=5)]),
]  # fmt: skip
FILE = """
from test_changes import CELLS

TITLE, SCALES = "Changed", {"cpu": 1}


def cells(scale, seeds):
    return CELLS
"""


def test_a_field_is_changed_in_the_cells_that_have_it_and_nowhere_else():
    words = {"attack.rate": "0.05", "defense[fine-pruning].recipe.lr": "1e-4", "recipe.epochs": "2"}
    found = changed(CELLS, words)
    assert [cell.recipe.epochs for cell in found] == [2] * 4
    assert found[0].attack is None and all(c.attack and c.attack.rate == 0.05 for c in found[1:])
    assert found[2].defense == FinePruning(recipe=Recipe(lr=1e-4, epochs=10))
    assert found[3].defense == CELLS[3].defense
    assert found[2].changed == {
        "attack.rate": 0.05, "defense[fine-pruning].recipe.lr": 1e-4, "recipe.epochs": 2,
    }  # fmt: skip
    assert found[0].changed == {"recipe.epochs": 2}
    assert changed(CELLS, {}) == CELLS


def test_a_twin_that_is_clean_by_its_rate_stays_clean():
    """As in Shamshiri & Sohn: beside what is poisoned, and not where all are clean."""
    cells = list(grid(VICTIM, row=["poisoned", "twin"], attack__rate=[0.1]))
    cells[1] = next(grid(cells[1], attack__rate=[0.0]))
    for path in ("attack.rate", "attack[badnets].rate"):
        found = changed(cells, {path: "0.05", "recipe.epochs": "2"})
        assert [cell.attack.rate for cell in found] == [0.05, 0.0]
        assert [cell.recipe.epochs for cell in found] == [2, 2]
        assert path not in found[1].changed
    assert changed(cells[1:], {"attack.rate": "0.05"})[0].attack.rate == 0.05


def test_results_may_lie_in_a_folder_called_as_their_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = shipped.file("shamshiri2023")
    for name in ("shamshiri2023", "mine", "mine.py"):
        (tmp_path / name).mkdir()
    assert shipped.file("shamshiri2023") == before
    for name in ("mine", "mine.py"):
        with pytest.raises(BadInput, match=f"^{name} is a folder: give the experiment's file"):
            experiment.load(name)


@pytest.mark.parametrize("name", shipped.names())
def test_the_rate_of_every_experiment_can_be_changed(name, own_names):
    """But of one that varies it."""
    cells = list(experiment.load(name).cells("smoke", 1))
    if len({c.attack.rate for c in cells if c.attack is not None} - {0.0}) == 1:
        changed(cells, {"attack.rate": "0.05"})


def test_values_are_read_as_their_fields_are():
    def one(path, text):
        return changed(CELLS, {path: text})

    assert one("attack.rate", "1")[1].attack == BadNets(rate=1.0)
    assert one("model.hidden", "8")[0].model == Ffnn(hidden=(8,))
    assert one("model.hidden", "8, 4")[0].model == Ffnn(hidden=(8, 4))
    assert one("defense.share", "0.5")[2].defense == FinePruning(share=0.5)
    assert one("defense.site", "penultimate")[2].defense == FinePruning(site="penultimate")
    assert one("attack.append", "true")[1].attack == BadNets(append=True)
    assert one("dataset.train_size", "none")[0].dataset == Sample(test_size=20)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("attack.rat=1", "nearest name is 'attack.rate'"),
        ("defense[fine-pruning].recipe.l=1", r"'defense\[fine-pruning\].recipe.lr'"),
        ("defense[fine-pruni].recipe.lr=1", "nearest name is 'fine-pruning'"),
        ("attac.rate=1", "begins with one of dataset, model"),
        ("attack.rate=2", r"attack.rate: .*outside \[0, 1\]"),
        ("attack.rate=lots", "is not a number"),
        ("recipe.epochs=1.5", "is not a whole number"),
        ("recipe.optimizer=adamax", "is not one of adam"),
        ("recipe.augment=flip", "from Python only"),
        ("defense.recipe=1", "defense.recipe is a Recipe: set one of its fields"),
        ("attack.sources=1", "attack.sources has no effect: it is read only with labels"),
        ("attack.rate", "not of the form PATH=VALUE"),
        ("attack.rate=", "not of the form PATH=VALUE"),
        ("=1", "not of the form PATH=VALUE"),
    ],
)
def test_what_cannot_be_set_is_one_line(words, line):
    with pytest.raises(BadInput, match=line) as error:
        changed(CELLS, read([words]))
    assert "\n" not in str(error.value)


def test_two_cells_that_would_become_one_and_two_values_of_one_field_are_refused():
    rates = list(grid(VICTIM, row=["low", "high"], attack__rate=[0.1]))
    rates[1] = next(grid(rates[1], attack__rate=[0.2]))
    with pytest.raises(BadInput, match=r"attack.rate: .* would become one run; .* --only"):
        changed(rates, {"attack.rate": 0.3})
    with pytest.raises(BadInput, match="set twice"):
        read(["attack.rate=1", "attack.rate=0"])


def test_a_field_that_another_change_makes_read_can_be_set_in_any_order():
    words = ["attack.sources=1,2", "attack.labels=source-specific"]
    for order in (words, words[::-1]):
        assert changed(CELLS, read(order))[1].attack == BadNets(
            labels="source-specific", sources=(1, 2)
        )


def test_a_field_is_varied_over_values_in_the_cells_that_have_it():
    found = list(varied(CELLS, "attack.rate", (0.1, 0.2)))
    assert [c.row for c in found[:3]] == [
        "victim", "victim, attack.rate 0.1", "victim, attack.rate 0.2"
    ]  # fmt: skip
    assert [c.tags.get("attack.rate") for c in found] == [None, *[0.1, 0.2] * 3]
    with pytest.raises(BadInput, match="nearest"):
        list(varied(CELLS, "attack.rates", (1, 2)))


def test_results_of_a_changed_experiment_stand_beside_the_unchanged_ones(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    main(["run", "mine.py", "--quiet", "--only", "victim"])
    main(["run", "mine.py", "--quiet", "--only", "victim", "--set", "attack.rate=0.5"])
    plain, other = sorted(p.name for p in Path("results").iterdir())
    assert plain == "mine-cpu" and other.startswith("mine-cpu-")
    rows = read_rows([Path("results", other, "results.jsonl")])
    assert [row.get("set") for row in rows] == [None, {"attack.rate": 0.5}]
    page = Path("results", other, "index.html").read_text()
    assert "not as in the experiment: attack.rate 0.5" in page
    assert "--set attack.rate=0.5" in page and "--only victim" in page
    with pytest.raises(BadInput, match="the tables are 't'"):
        experiment.run("mine.py", only="nothing")
