"""Tables with hand-computed numbers, figures with planted shapes,
and the page in a real browser.
"""

import csv
import errno
import html
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from rich.console import Console

from bdjax import datasets, experiment, latex, plots, registry, report, shipped
from bdjax.attacks.badnets import BadNets
from bdjax.rows import result_files
from bdjax.types import BadInput, class_name

EVIL = "CNN <script>alert(1)</script> | [bold]x"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


def cell(row, seed=0, metrics=None, **fields):
    """A row as the store holds it, with sample values."""
    return {
        "run": registry.digest(row, seed, fields), "experiment": "sample", "scale": "cpu",
        "table": "Table I", "row": row, "dataset": "fashion-mnist-sample", "model": "cnn",
        "attack": "badnets", "defense": None, "seed": seed, "config": {}, "metrics": metrics or {},
        "reported": {}, "seconds": {"compile": 3.0, "run": 40.0}, "oracle": False,
        "substitute": None, "device": "cpu (2 cores)", "jax": "0.10.2", "commit": "abc1234",
    } | fields  # fmt: skip


@pytest.fixture
def rows():
    paper = {"acc_test": 0.9899, "asr_all": 0.999}
    found = [
        cell(EVIL, s, {"acc_test": acc, "asr_nt": asr}, reported=paper)
        for s, acc, asr in ((0, 0.90, 0.991), (1, 0.91, 0.993), (2, 0.92, None))
    ]
    found += [cell("clean net", s, {"acc_test": 0.93 + s / 100}) for s in range(2)]
    strip = {"acc_test": 0.88, "far": 0.0312, "index": 2.345, "asr_nt": 0.02}
    found.append(
        cell(
            "STRIP",
            0,
            strip,
            table="Table II",
            defense="strip",
            oracle=True,
            substitute="LFW faces",
        )
    )
    found.append(
        cell(
            "STRIP",
            1,
            table="Table II",
            defense="strip",
            error="diverged: NaN",
            substitute="LFW faces",
        )
    )
    return found


def sweep():
    """Fine-pruning over attack rate × kept share: ASR = rate · (1 − keep), and two traps for
    `best`.
    """
    found = []
    for rate in (0.1, 0.01):
        config = {"attack": {"name": "badnets", "rate": rate}, "recipe": {"lr": 0.1}}
        for keep in (0.5, 0.9):
            for seed in range(2):
                metrics = {"acc_test": 0.9, "asr_nt": rate * (1 - keep) + seed / 1000}
                found.append(
                    cell(
                        f"FP {keep}",
                        seed,
                        metrics,
                        defense="fine-pruning",
                        config=config | {"defense": {"keep": keep}},
                    )
                )
        found.append(
            cell(
                "dead net",
                0,
                {"acc_test": 0.1, "asr_nt": 0.0},
                defense="kill",
                config=config | {"defense": {}},
            )
        )
        found.append(
            cell(
                "oracle",
                0,
                {"acc_test": 0.9, "asr_nt": 0.0},
                defense="o",
                oracle=True,
                config=config | {"defense": {}},
            )
        )
    found.append(cell("failed", 0, defense="fine-pruning", error="diverged"))
    return found


def test_rows_whose_triggers_were_drawn_anew_say_so(rows):
    def drawn(redraw):
        config = {"attack": {"name": "badnets", "redraw": redraw}}
        (table,) = report.aggregate([{**rows[0], "config": config}])
        return table["rows"][0]

    assert drawn(True)["redraw"] and not drawn(False)["redraw"]
    words = [text for _, text in report._remarks(drawn(True))]
    assert words == ["triggers drawn anew in every step"] and not report._remarks(drawn(False))


def test_aggregate_has_mean_sample_sd_and_distance_to_the_paper(rows):
    first, second = report.aggregate(rows)
    assert [first["name"], second["name"]] == ["Table I", "Table II"]
    assert first["metrics"] == ["acc_test", "asr_all", "asr_nt"]
    victim, clean = first["rows"]
    assert (victim["row"], victim["n"], clean["n"]) == (EVIL, 3, 2)
    acc = victim["metrics"]["acc_test"]
    assert acc["mean"] == pytest.approx(0.91) and acc["sd"] == pytest.approx(0.01)
    assert acc["delta"] == pytest.approx(0.91 - 0.9899)
    # A NaN of one seed (null in JSON) is left out and counted; the paper's number shows where we
    # have none.
    assert victim["metrics"]["asr_nt"]["n"] == 2
    assert victim["metrics"]["asr_all"] == {
        "n": 0,
        "mean": None,
        "sd": None,
        "paper": 0.999,
        "delta": None,
    }
    strip = second["rows"][0]
    assert (strip["n"], strip["failed"], strip["errors"], strip["oracle"]) == (
        1,
        1,
        ["diverged: NaN"],
        True,
    )
    assert strip["metrics"]["far"]["sd"] is None


def test_rows_of_two_scales_or_nets_never_share_a_mean():
    tables = report.aggregate(
        [cell("a", 0), cell("a", 1, scale="smoke"), cell("a", 0, model="ffnn")]
    )
    assert [(t["name"], len(t["rows"])) for t in tables] == [
        ("Table I (cpu)", 2),
        ("Table I (smoke)", 1),
    ]


@pytest.mark.parametrize(
    "metric, values, reported, expected",
    [
        ("acc_test", [0.909, 0.915], 0.9899, ("91.2 ± 0.4", "98.99", "−7.8")),
        ("asr_nt", [0.0], 0.002, ("0.0", "0.2", "−0.2")),
        ("auroc", [0.98765], None, ("0.988", "—", "—")),
        ("index", [2.0, 3.5], 3.25, ("2.75 ± 1.06", "3.25", "−0.50")),
        ("l1_target", [123.4], 120.0, ("123", "120", "+3")),
        ("pruned", [14], 35, ("14", "35", "−21")),
        ("loss", [-1e-5], None, ("−1.0e−05", "—", "—")),
        ("asr_nt_at_0.01", [1.0], 1.0, ("100.0", "100", "0.0")),
        ("learning_rate", [0.5], 0.25, ("0.500", "0.25", "+0.250")),
    ],
)
def test_how_numbers_are_written(metric, values, reported, expected):
    row = report.aggregate(
        [cell("a", s, {metric: v}, reported={metric: reported}) for s, v in enumerate(values)]
    )
    stat = row[0]["rows"][0]["metrics"][metric]
    got = (
        report.ours(metric, stat, len(values)),
        report.paper(metric, stat),
        report.delta(metric, stat),
    )
    assert got == expected


def test_csv_has_full_precision_and_markdown_is_escaped(rows, tmp_path):
    report.write(
        tmp_path,
        rows,
        title="Sample",
        trends=[("ASR is high", "partly", "99.2 %")],
        notes=["x < y"],
    )
    table = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [line["row"] for line in table] == [EVIL, "clean net", "STRIP"]
    assert (
        float(table[0]["acc_test"]) == pytest.approx(0.91)
        and float(table[0]["acc_test_paper"]) == 0.9899
    )
    assert (
        table[2]["oracle"] == "true" and table[2]["failed"] == "1" and table[2]["asr_nt_sd"] == ""
    )
    text = (tmp_path / "table.md").read_text()
    assert (
        "98.99 → 91.0 ± 1.0 (Δ −8.0)" in text
        and "oracle, substitute: LFW faces, 1 failed: diverged: NaN" in text
    )
    assert "<script" not in text and "- **partly**: ASR is high (99.2 %)" in text
    widths = {
        len(re.findall(r"(?<!\\)\|", line))
        for line in text.split("## Table II")[0].splitlines()
        if line[:1] == "|"
    }
    assert len(widths) == 1


def test_console_shows_paper_and_ours_in_110_columns_without_escapes(rows):
    out = io.StringIO()
    report.print_table(rows, Console(file=out))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 110 and "\x1b" not in text
    assert (
        "91.0 ± 1.0" in text
        and "98.99, −8.0" in text
        and "[bold]x" in text
        and "1 failed: diverged: NaN" in text
    )
    terminal = io.StringIO()
    report.print_table(rows, Console(file=terminal, force_terminal=True, width=100))
    assert "\x1b" in terminal.getvalue()
    bare = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert max(map(len, bare.splitlines())) <= 100


def test_a_finished_row_in_one_line(rows):
    assert (
        report.line(rows[-2])
        == "Table II, STRIP, seed 0: ACC test % 88.0, ASR nt % 2.0, FAR % 3.1 [40.0 s]"
    )
    assert report.line(rows[-1]) == "Table II, STRIP, seed 1: failed: diverged: NaN [40.0 s]"


def store(folder: Path, rows) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"run": "torn'
    )
    return folder


def test_merge_keeps_figures_trends_and_notes_and_leaves_the_folders_alone(rows, tmp_path):
    first, second = store(tmp_path / "one", rows), store(tmp_path / "two", sweep())
    figure = report.Figure("curve", "A curve", "Sample.", plots.curves([1, 2], {"a": [0.1, 0.2]}))
    written = report.write(
        first,
        rows,
        [figure],
        "First",
        ["a note"],
        [("claim", "not", "1 %")],
        {"train": 2.0},
        "bdjax run x",
    )
    before = written.read_bytes()
    page = report.merge([first, second], tmp_path / "both").read_text()
    for text in (
        "First",
        "A curve",
        "a note",
        "claim",
        "bdjax run x",
        "Table II",
        'href="#s1-t0"',
        "train 2.0",
    ):
        assert text in page
    assert written.read_bytes() == before and not (second / "index.html").exists()
    # One folder is written again in place, with what it knew.
    assert report.merge([first]) == written and written.read_bytes() == before


def test_two_results_of_one_experiment_are_told_apart(rows, tmp_path):
    """Two scales, say, or two machines: by the folder, or the file."""
    one, two = store(tmp_path / "one", rows), store(tmp_path / "two", rows)
    (two / "results.jsonl").rename(two / "mine-paper.jsonl")
    merged = report.merge([one, two / "mine-paper.jsonl"], tmp_path / "both")
    titles = re.findall(r"<h2[^>]*>([^<]*)", merged.read_text())
    title = rows[0]["experiment"]
    assert {f"{title}, {one}", f"{title}, mine-paper"} <= {*titles}, titles


@pytest.mark.parametrize("name", [name for name in shipped.names() if shipped.results(name)])
def test_rows_that_came_with_bdjax_have_their_experiments_title_notes_and_claims(name, tmp_path):
    module = experiment.load(name)
    made = getattr(module, "trends", lambda rows: ())
    for path in shipped.results(name):
        section = report.load(path)
        assert section.title == module.TITLE and section.notes == experiment.notes(module)
        claims = [claim for claim, *_ in made(report.valid(section.rows))]
        assert [trend.claim for trend in section.trends] == claims
    # A copy is the user's own file: whatever it says, no experiment is run for it.
    first = result_files(shipped.results(name)[0])[0]
    copy = tmp_path / f"{name}-cpu.jsonl"
    copy.write_bytes(first.read_bytes())
    assert report.load(copy).title == name and not report.load(copy).trends


def test_bad_folders_get_one_clear_line(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="has no results"):
        report.merge([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(BadInput, match="no finished row"):
        report.merge([store(tmp_path / "empty", [])], tmp_path / "out")
    folder = store(tmp_path / "damaged", rows)
    (folder / "report.json").write_text('{"title": ')
    with pytest.raises(BadInput, match=r"is damaged: .*: delete it"):
        report.merge([folder])
    with pytest.raises(BadInput, match="cannot write") as error:
        report.write(tmp_path / "file" / "out", rows)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_what_was_there(rows, tmp_path, monkeypatch):
    report.write(tmp_path, rows, title="Before")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = Path.write_bytes

    def full(path, data):
        if path.name == "index.html":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadInput, match="the disk is full"):
        report.write(tmp_path, rows[:1], title="After")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_pivot_over_two_axes():
    rows = [row for row in sweep() if row["defense"] == "fine-pruning"]
    table = report.pivot(rows, "attack.rate", "defense.keep", "asr_nt")
    assert (table.x, table.y) == ([0.01, 0.1], [0.5, 0.9])
    np.testing.assert_allclose(table.mean, [[0.0055, 0.0505], [0.0015, 0.0105]])
    np.testing.assert_allclose(table.sd, np.full((2, 2), 0.001 / np.sqrt(2)))
    assert table.n.tolist() == [[2, 2], [2, 2]]
    line = report.pivot(rows, "defense", None, "asr_nt")
    assert line.x == ["fine-pruning"] and line.n.tolist() == [[8]]
    assert {"attack.rate", "defense.keep", "seed", "row"} <= set(report.axes(rows))
    assert len(report.pivot_figures(rows, "attack.rate", "defense.keep", "asr_nt")) == 2


def test_a_mean_over_more_than_seeds_says_so():
    """As where a folder holds rows of an experiment from before and after a change of a field."""
    rows = [r | {"row": "same"} for r in sweep() if r["row"].startswith("FP")]
    lines = [line for table in report.aggregate(rows) for line in table["rows"]]
    assert lines[0]["n"] == len(rows)
    assert lines[0]["notes"][0] == ("a mean over settings that differ in attack.rate, defense.keep")
    one = [r for r in rows if r["config"] == rows[0]["config"]]
    assert report.aggregate(one)[0]["rows"][0]["notes"] == []


def test_a_metric_has_a_column_of_its_own_whatever_it_is_called(rows):
    metrics = {"acc_test": 0.5, "acc_test_sd": 7.0, "n": 8.0, "row": 9.0, "seconds_run": 6.0}
    made = [r | {"metrics": metrics} for r in rows[:2]]
    head, *lines = csv.reader(report.csv(report.aggregate(made)).splitlines())
    assert len(set(head)) == len(head)
    found = dict(zip(head, lines[0]))
    assert found["row"] == rows[0]["row"] and float(found["metric_row"]) == 9
    assert float(found["metric_n"]) == 8 and int(found["n"]) <= 2
    assert float(found["metric_acc_test_sd"]) == 7 and float(found["metric_seconds_run"]) == 6


def test_what_is_not_defended_has_a_pivot_and_what_nobody_measured_is_said(tmp_path):
    rows = [r for r in sweep() if not r["defense"]]
    folder = store(tmp_path, rows or [r | {"defense": None} for r in sweep()])
    assert "<figure" in report.merge([folder], None, "attack.rate", None, "asr_nt").read_text()
    with pytest.raises(BadInput, match="no defense without oracle has 'asr_nt': give --x"):
        report.merge([folder], None, None, None, "asr_nt")
    odd = [r | {"metrics": {**r["metrics"], "odd": math.nan}} for r in sweep()]
    with pytest.raises(BadInput, match="no row has the metric 'odd'"):
        report.pivot(odd, "attack.rate", None, "odd")


def test_letters_that_a_font_lacks_are_not_warned_of(recwarn):
    drawing = plots.curves([1, 2], {"漢 🦊": [0.1, 0.2]})
    report.draw([report.Figure("f", "漢", "", drawing)])
    latex._saved(drawing, "pdf")
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_pivot_says_what_there_is():
    with pytest.raises(BadInput, match=r"metric 'asr_n'; the nearest is 'asr_nt'"):
        report.pivot(sweep(), "attack.rate", None, "asr_n")
    with pytest.raises(BadInput, match=r"asr_nt. has .attack.rat.; what varies: .*attack\.rate"):
        report.pivot(sweep(), "attack.rat", None, "asr_nt")


def test_best_is_neither_an_oracle_nor_a_dead_net(tmp_path):
    found = report.best(sweep(), "asr_nt")
    assert [row["row"] for row in found] == ["attack.rate 0.1, FP 0.9"] * 2 + [
        "attack.rate 0.01, FP 0.9"
    ] * 2
    page = report.merge(
        [store(tmp_path, sweep())], None, "attack.rate", "defense.keep", "asr_nt"
    ).read_text()
    assert "Best defense by ASR nt %" in page and page.count("<figure") == 2


def test_page_is_self_contained_and_escaped(rows, tmp_path):
    text = report.write(
        tmp_path, rows, title="<em>T</em>", trends=[("<i>", "not", "")], notes=["<u>"]
    ).read_text()
    for tag in ("<script>alert", "<em>", "<i>", "<u>"):
        assert tag not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|https?://|@import|url\(""", text)


def test_the_parts_below_a_wide_table_have_the_rows_that_say_something_there(tmp_path):
    """The first has every row; each value stands in one of them."""
    wide = {f"metric_{i}_of_a_filter": i + 0.125 for i in range(12)}
    rows = [cell("victim", metrics={"acc_test": 0.5}), cell("filtered", metrics=wide)]
    rows.append(cell("nothing", seconds={}))
    text = report.write(tmp_path, rows).read_text()
    first, *below = re.findall(r"<table>.*?</table>", text, re.DOTALL)
    assert [first.count(f">{name}<") for name in ("victim", "filtered", "nothing")] == [1, 1, 1]
    assert len(below) > 1
    assert all("filtered" in part and "nothing" not in part for part in below)
    assert sum("victim" in part for part in below) == 1  # its seconds
    assert all(text.count(f'data-value="{i + 0.125}"') == 1 for i in range(12))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_in_a_browser(rows, tmp_path):
    """Loads without a console error, sorts, switches its colours and does not overflow a phone of
    360 pixels.
    """
    wide = [report.Figure("wide", "Wide", "Sample.", plots.norms(np.arange(43.0) + 1))]
    page = report.write(
        tmp_path / "out",
        [*rows, cell("none", 0, {"asr_nt": 0.5}), cell("deep", 0, {"acc_test": 0.95})],
        wide,
        "T" * 200,
        ["word" * 100],
    ).read_text()
    frame = (
        f'<iframe id="page" style="width:360px;height:800px" srcdoc="{html.escape(page)}"></iframe>'
    )
    script = """
    addEventListener("load", () => {
      const { contentDocument: d, contentWindow: w } = document.getElementById("page");
      const table = d.querySelector("table");
      const heads = [...table.querySelectorAll("th[data-column]")];
      const head = heads.find((h) => h.textContent === "ours");
      const names = () => [...table.tBodies[0].rows].map((r) => r.cells[0].textContent.slice(0, 5));
      const scrolls = table.parentElement.scrollWidth > 360;
      const found = { width: d.documentElement.scrollWidth, scrolls };
      head.querySelector("button").click();
      found.up = [...names(), head.getAttribute("aria-sort")];
      head.querySelector("button").click();
      found.down = [...names(), head.getAttribute("aria-sort")];
      found.sorted = table.querySelectorAll("[aria-sort]").length;
      const color = () => w.getComputedStyle(d.body).backgroundColor;
      const before = color();
      d.getElementById("theme").click();
      found.switched = color() !== before;
      found.pictures = [...d.images].every((i) => i.complete && i.naturalWidth > 0);
      document.title = "T";
      document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
    });"""
    (tmp_path / "test.html").write_text(f"<!doctype html><body>{frame}<script>{script}</script>")
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
             "--disable-background-networking --disable-component-update --disable-sync "
             "--enable-logging=stderr --dump-dom")  # fmt: skip
    command = [
        str(CHROMIUM),
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        (tmp_path / "test.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    result = re.search(r"<pre>(.*?)</pre>", done.stdout)
    assert result, done.stderr[-2000:]
    found = json.loads(html.unescape(result[1]))
    # "none" has no accuracy: it stays at the end both ways.
    assert found["up"] == ["CNN <", "clean", "deep", "none", "ascending"]
    assert found["down"] == ["deep", "clean", "CNN <", "none", "descending"]
    assert found["width"] <= 360 and found["scrolls"] and found["sorted"] == 1
    assert found["switched"] and found["pictures"]


# --- Figures ---


def drawn(figure) -> tuple[int, int]:
    """Size in pixels of the figure as PNG."""
    [picture] = report.draw([("x", "", "", figure)])
    assert picture.png[:4] == b"\x89PNG"
    return int.from_bytes(picture.png[16:20], "big"), int.from_bytes(picture.png[20:24], "big")


def test_stamped_images_show_the_trigger_alone():
    image = datasets.load("fashion-mnist-sample").test.image[:3] / np.float32(255)
    attack, key = BadNets(), jax.random.key(0)
    trojan = np.stack([attack.trigger(x, key) for x in jax.numpy.asarray(image)])
    figure = plots.stamped(image, trojan, ["a", "b", "c"])
    gap = np.asarray(figure.axes[6].images[0].get_array())
    assert gap[-5:, -5:].max() == 1 and gap[:-5].max() == 0 and gap[:, :-5].max() == 0
    faint = plots.stamped(image, np.clip(image + 0.01, 0, 1))
    assert re.match(r"difference ×\d+", faint.axes[6].get_ylabel())
    assert min(drawn(figure)) > 100


def test_curves_draw_mean_and_range_and_leave_the_users_style_alone():
    before = dict(matplotlib.rcParams)
    figure = plots.pruning(
        [0, 1, 2], [[0.9, 0.8, 0.5], [0.8, 0.8, 0.1]], [[1, 1, 0], [1, 0, 0]], chosen=1
    )
    assert dict(matplotlib.rcParams) == before
    lines = figure.axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [0.85, 0.8, 0.3])
    band = figure.axes[0].collections[1].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (0, 1)
    assert figure.axes[0].texts[0].get_text() == "stop at 1"
    drawn(figure)


def test_runtime_has_the_exponent():
    size = np.array([2.0, 10, 50, 1000])
    figure = plots.runtime(
        {"ours": (size, np.stack([size**2, 3 * size**2, 2 * size**2])), "one": ([5.0], [1.0])}, "N"
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["ours, exponent 2.00", "one"]
    drawn(figure)


def test_histograms_are_shares_of_their_own_sample():
    rng = np.random.default_rng(0)
    clean, trojan = rng.normal(1, 0.2, 100), rng.normal(0.1, 0.02, 1000)
    figure = plots.entropies(clean, trojan, 0.4)
    width = (max(clean.max(), trojan.max()) - min(clean.min(), trojan.min())) / 40
    for outline in figure.axes[0].patches[::2]:
        x, y = outline.get_xy().T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        assert area / width == pytest.approx(1)
    assert "boundary 0.4" in [text.get_text() for text in figure.legends[0].get_texts()]
    drawn(figure)


@pytest.mark.parametrize("labels", [10, 43])
def test_neural_cleanse_pictures(labels):
    l1 = np.full(labels, 60.0)
    l1[3] = 10
    flagged = l1 < 30
    figure = plots.norms(l1, np.abs(l1 - 60) / 10, flagged, target=3)
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in figure.axes[0].patches}
    assert bars[3].get_hatch() and not bars[4].get_hatch()
    assert "5.0" in [text.get_text() for text in figure.axes[0].texts]
    assert figure.axes[0].get_ylabel() == "L1 of the mask"
    assert plots.norms(l1, what="size").axes[0].get_ylabel() == "size"
    drawn(figure)
    mask = np.zeros((labels, 8, 8, 1))
    shown = plots.triggers(mask, np.ones((labels, 8, 8, 3)), l1, marked=flagged)
    titles = [axes.get_title() for axes in shown.axes if axes.get_title()]
    assert len(titles) == labels and titles[3] == "label 3\nL1 10.0"
    drawn(shown)


def test_classes_have_their_names_in_pictures():
    names = ("T-shirt/top", "$x^2$", "2", "")
    words = [class_name(k, names) for k in range(5)]
    assert words == ["0 (T-shirt/top)", "1 ($x^2$)", "2", "3", "4"] and class_name(7) == "7"
    masks = np.ones((4, 8, 8, 1))
    titles = [a.get_title() for a in plots.triggers(masks, masks, np.ones(4), names=names).axes]
    assert [t.replace("\n", " ") for t in titles] == [f"{w} L1 1.0" for w in words[:4]]
    axes = plots.norms(np.arange(4.0), names=names).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == words[:4]
    many, flagged = [f"c{k}" for k in range(40)], np.arange(40) == 7
    axes = plots.norms(np.arange(40.0), flagged=flagged, names=many).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["7 (c7)"]


def test_names_of_classes_are_shown_by_one_function():
    for folder in ("bdjax", "experiments", "benchmarks"):
        for file in (Path(__file__).parents[1] / folder).rglob("*.py"):
            assert not re.search(r"\.names\[", file.read_text()), file


def test_votes_heat_maps_and_boxes():
    figure = plots.votes([0.1, 0.1], [1.0, 0.0], [True, False])
    assert [text.get_text() for text in figure.axes[0].texts] == ["10", "10", "100", "0"]
    filled, empty = figure.axes[0].lines
    assert list(filled.get_xdata()) == [0] and list(empty.get_xdata()) == [1]
    drawn(figure)
    drawn(plots.votes(np.zeros(64), np.ones(64)))
    figure = plots.heat_map([[0.5, np.nan]], [1, 2], [1e-3], percent=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.0"]
    drawn(figure)
    figure = plots.heat_map(np.zeros((40, 60)), range(60), range(40))
    assert len(figure.axes[0].get_yticks()) == 40  # no defense without its name
    drawn(figure)
    drawn(plots.boxes({"few": [1.0, 2.0], "many": np.arange(100.0)}, line=3))
    drawn(plots.images(np.full((2, 3, 4, 6, 3), np.nan), ["a", "b"], ["x", "y", "z\nz"]))
    drawn(plots.curves(["sum", "average"], {"$x": [0.1, 0.2]}, percent=True))


def test_infinite_and_not_measured_differ_everywhere(tmp_path):
    values = {
        "all": ("inf", "inf"),
        "one": (1.5, "inf"),
        "none": (None, None),
        "both": ("inf", "-inf"),
    }
    lines = [
        cell(name, seed, {"acc_test": 0.9, "index": value}, defense="d", config={"lr": name})
        for name, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    folder = store(tmp_path, lines)
    found = report.load(folder).rows
    (table,) = report.aggregate(found)
    shown = {
        line["row"]: report.ours("index", line["metrics"].get("index"), 2) for line in table["rows"]
    }
    assert shown == {"all": "∞", "one": "∞", "none": "—", "both": "±∞"}
    page = report.merge([folder], None, "lr", None, "index").read_text()
    assert 'data-value="Infinity">∞<' in page and 'data-value="">—<' in page
    with open(folder / "table.csv") as file:
        assert [line["index"] for line in csv.DictReader(file)] == ["inf", "inf", "", ""]
    text = (folder / "table.md").read_text()
    assert [f"| {name} | 90.0 ± 0.0 | {cell} |" in text for name, cell in shown.items()] == [
        True
    ] * 4
    printed = Console(file=io.StringIO(), width=110)
    report.print_table(found, printed)
    text = printed.file.getvalue()  # type: ignore[attr-defined]
    assert all(re.search(rf"^{name} .*∞", text, re.M) for name in ("all", "one"))
    assert re.search("^none .*—", text, re.M)
    mean = report.pivot(found, "lr", None, "index").mean
    assert np.isinf(mean[0, :2]).all() and np.isnan(mean[0, 2:]).all()
    alike = [
        row | {"config": {}, "defense": row["row"],
               "metrics": {"acc_test": 0.9, "auroc": row["metrics"].get("index")}}
        for row in found
    ]  # fmt: skip
    assert {row["defense"] for row in report.best(alike, "auroc")} < {"all", "one"}
    assert "index 2 → ∞ (Δ +∞)" in report.line(found[0] | {"reported": {"index": 2.0}})
    assert report.paper("index", report._stat([1.0], np.inf)) == "∞"
    assert report.delta("index", report._stat([1.0], np.inf)) == "−∞"
    figure = plots.heat_map([[np.inf, 1.0], [np.nan, 2.0]], [1, 2], [1, 2])
    assert "∞" in {text.get_text() for text in figure.axes[0].texts}
