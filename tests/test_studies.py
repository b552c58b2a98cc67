"""Studies from flags, and cells from Python."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest

import bdjax
from bdjax.cli import main
from bdjax.figures import figures
from bdjax.registry import make
from bdjax.store import Store, read_rows
from bdjax.studies import crossed, text_of
from bdjax.types import BadInput

SMALL = ["--set", "dataset.train_size=60", "--set", "dataset.test_size=20", "--set",
         "recipe.epochs=1", "--set", "model.hidden=4"]  # fmt: skip
FLAGS = ["--model", "ffnn", "--attack", "badnets", "--grid", "attack.rate=0.1,0.5", *SMALL]


def test_every_attack_and_the_twin_under_every_defense():
    attacks = {name: make("attack", name) for name in ("badnets", "blended")}
    cells = crossed(
        dataset=make("dataset", "fashion-mnist-sample"), model=make("model", "ffnn"),
        attacks=attacks, defenses={"strip": make("defense", "strip")}, seeds=(0, 1),
        axes={"attack.rate": (0.1, 0.5)},
    )  # fmt: skip
    assert len(cells) == 2 * (2 + 2 * 2 * 2)
    assert [c.row for c in cells[::2][:4]] == [
        "clean", "clean: strip", "badnets, attack.rate 0.1", "badnets, attack.rate 0.5",
    ]  # fmt: skip
    assert cells[-1].tags == {"attack": "blended", "defense": "strip", "attack.rate": 0.5}
    assert cells[-1].attack.rate == 0.5 and cells[-1].seed == 1


def test_a_study_from_flags_gives_what_the_file_it_stands_for_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["study", *FLAGS, "--save", "mine.py", "--out", "flags", "--quiet"])
    main(["run", "mine.py", "--out", "file", "--quiet"])
    flags, file = (read_rows([Path(name, "results.jsonl")]) for name in ("flags", "file"))
    assert len(flags) == 3
    assert [row["metrics"] for row in flags] == [row["metrics"] for row in file]
    assert [row["run"] for row in flags] == [row["run"] for row in file]
    twins = [row.get("twin") for row in flags if row["attack"] and not row["defense"]]
    assert len(twins) == 2 and all(twins), "clean twins are there"
    assert Path("flags", "study.py").read_text() == Path("mine.py").read_text()
    drawn = {path.name for path in Path("flags", "figures").glob("*.png")}
    assert drawn == {
        "stamped-badnets-attack-rate-0-1.png", "acc_test-attack-rate.png", "asr_nt-attack-rate.png",
        "validity.png",
    }  # fmt: skip
    assert "not as in the experiment" not in Path("flags", "index.html").read_text()
    with pytest.raises(SystemExit):
        main(["study", *FLAGS, "--save", "mine.py", "--out", "other"])
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"attacks": []}, "needs at least one attack"),
        ({"attacks": ["badnet"]}, "nearest name is 'badnets'"),
        ({"attacks": ["badnets", "badnets"]}, "given twice"),
        ({"defenses": ["strip:none"]}, "has no preset 'none'"),
        ({"dataset": "no/such.npz"}, "no such file"),
        ({"axes": ["attack.rate"]}, "PATH=VALUE"),
        ({"axes": ["attack.rate=1,1"]}, "have to differ"),
        ({"axes": ["attack.rate=.1,0.10"]}, "have to differ"),
        ({"axes": ["attack.rate=.1,.2", "attack[badnets].rate=.3,.4"]}, "vary the same field"),
        ({"axes": ["attack.rate=.1,.2"], "settings": ["attack.rate=.3"]}, "both set and varied"),
        ({"axes": ["rate=1,0"]}, "not of the form"),
        ({"seeds": 100_000_000}, "seeds"),
        ({"settings": ["attack.rate"]}, "PATH=VALUE"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_what_is_wrong_with_a_study_is_one_line(words, line):
    given = {"dataset": "fashion-mnist-sample", "model": "ffnn", "attacks": ["badnets"]} | words
    with pytest.raises(BadInput, match=line):
        text_of(**given)


def test_what_is_refused_is_not_saved_and_fields_of_two_methods_are_two(tmp_path, monkeypatch):
    """The mended command may have the same --save."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):  # draws more overlays than there are
        main(["study", *FLAGS, "--defense", "strip", "--save", "mine.py", "--out", "out"])
    assert not Path("mine.py").exists()
    axes = ["attack[badnets].rate=.1,.2", "attack[blended].rate=.3,.4"]
    text_of("fashion-mnist-sample", "ffnn", ["badnets", "blended"], axes=axes)


def test_cells_from_python_are_run_kept_and_returned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = crossed(
        dataset=make("dataset", "fashion-mnist-sample", train_size=60, test_size=20),
        model=make("model", "ffnn", hidden=(4,)), recipe=bdjax.Recipe(epochs=1),
        attacks={"badnets": make("attack", "badnets")},
    )  # fmt: skip
    rows = bdjax.run(cells, quiet=True)
    assert [row["row"] for row in rows] == ["clean", "badnets"]
    assert Path("results", "cells-cpu", "index.html").exists()
    drawn = [figure.name for figure in rows.where(attack="badnets").figures()]
    assert drawn == ["validity"], "no defense left arrays to be drawn"
    with pytest.raises(BadInput, match="no results folder"):
        bdjax.Rows(rows).figures()
    before = Path("results", "cells-cpu", "results.jsonl").read_bytes()
    again = bdjax.run(iter(cells), quiet=True)
    assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]
    assert Path("results", "cells-cpu", "results.jsonl").read_bytes() == before

    def wrong():
        yield cells[0]
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):  # a script's own fault stays its own
        bdjax.run(wrong())


def test_bars_move_where_they_can(monkeypatch):
    from bdjax.progress import terminal

    assert terminal() is None
    code = (
        "import sys, types; sys.modules['ipykernel'] = types.ModuleType('ipykernel')\n"
        "import rich.console; rich.console._is_jupyter = lambda: True\n"
        "from bdjax.progress import terminal; assert terminal().is_jupyter"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_each_kind_of_defense_saw_is_drawn(tmp_path):
    """From the arrays that `judge` gives, whatever the kind."""
    arrays = {
        "inputs": {"score_clean": np.ones(5), "score_trojan": np.zeros((1, 5))},
        "invert": {
            "norms": np.arange(4.0), "index": np.ones(4), "flagged": np.arange(4) == 0,
            "mask": np.ones((4, 6, 6, 1)), "pattern": np.ones((4, 6, 6, 3)),
        },
        "repair": {"acc_curve": np.linspace(1, 0, 4), "asr_curve": np.linspace(1, 0, 4)},
    }  # fmt: skip
    store = Store(tmp_path)
    rows = [planted.row(run=f"{i:016x}", row=kind) for i, kind in enumerate(arrays)]
    store.append(rows)
    for row in rows:
        store.save_arrays(row["run"], arrays[row["row"]])
    names = [figure.name for figure in figures(rows, store)]
    assert figures(rows, store)[0]._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    assert [name.partition("-")[0] for name in names] == ["scores", "norms", "triggers", "pruning"]
    twice = figures([*rows, {**rows[0], "row": "inputs!"}], store)
    assert len({figure.name for figure in twice}) == len(twice) == 5


def test_a_grid_draws_its_axes_and_which_victims_are_valid(tmp_path):
    def victim(rate, alpha, asr, **more):
        run = f"{int(1000 * rate + 10 * alpha):016x}"
        return planted.row(
            run=run, victim=run, attack="blended", defense=None,
            metrics={"asr_nt": asr, "acc_test": 0.9}, test={"n": 100, "majority": 0.1},
            config={"attack": {"rate": rate, "alpha": alpha}}, **more,
        )  # fmt: skip

    rates, store = (0.01, 0.1), Store(tmp_path)
    line = [victim(rate, 0.2, asr) for rate, asr in zip(rates, (0.6, 0.9))]
    one = {figure.name: figure for figure in figures(line, store)}
    assert list(one) == ["asr_nt-attack-rate", "acc_test-attack-rate", "validity"]
    drawn = one["asr_nt-attack-rate"].figure.axes[0].lines[0]
    assert drawn.get_xdata().tolist() == [0.01, 0.1] and drawn.get_ydata().tolist() == [0.6, 0.9]
    # Two axes: a heat map. The weak one counts for no claim, so it is empty there, and crossed out.
    grid = [victim(r, a, 5 * r + a - 0.1) for r in rates for a in (0.2, 0.9)]
    two = {figure.name: figure for figure in figures(grid, store)}
    assert list(two) == ["asr_nt-r", "acc_test-r", "validity"]
    shown = np.asarray(two["asr_nt-r"].figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, [[0.15, 0.6], [0.85, 1.0]], atol=1e-9)
    crosses = [line for line in two["validity"].figure.axes[0].lines if line.get_marker() == "x"]
    np.testing.assert_allclose(crosses[0].get_xdata(), [0.15])
