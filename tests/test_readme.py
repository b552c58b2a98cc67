"""The README's table and the site's results are those of the committed rows; the examples run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import results

import bdjax
from bdjax import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
pytestmark = pytest.mark.usefixtures("own_names")  # an experiment has methods of its own


def test_the_readme_is_short_and_its_table_is_up_to_date():
    assert len(README.encode()) <= 8 << 10
    assert results.generate(README) == README, "run `python docs/_site/results.py`"


@pytest.mark.parametrize("page", [ROOT / "README.md"], ids=lambda p: p.name)
def test_every_file_it_names_exists(page):
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert Path(page.parent, path).exists(), path


def test_the_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "start.md").read_text(), re.S)
    assert code is not None and len([line for line in code[1].splitlines() if line.strip()]) <= 16
    small = code[1].replace("datasets.load()", "datasets.load(train_size=1000, test_size=200)")
    exec(compile(small, "start.md", "exec"), {})
    rates = [float(v) for v in re.findall(r"\d\.\d*", capsys.readouterr().out)]
    assert len(rates) == 4 and rates[-1] > 0.5 > rates[0]


def test_the_example_of_a_method_of_one_s_own_is_one(tmp_path, own_names):
    text = (ROOT / "docs" / "howto" / "plugins.md").read_text()
    name, code = re.search(r"```python\n# (\w+\.py)\n(.*?)```", text, re.S).groups()  # type: ignore[union-attr]
    (tmp_path / name).write_text(code)
    (entry,) = bdjax.load_plugins(tmp_path / name)
    lit = entry.cls(strength=0.5).trigger(jnp.zeros((8, 8, 1)), jax.random.key(0))
    assert float(lit.sum()) == 0.5 * 9
    assert f"--plugin {name} --{entry.kind} {entry.name} --{entry.kind}.strength" in text


def test_pages_of_results_hold_the_committed_numbers():
    """By the rows themselves, not by the code that makes tables."""
    pages = dict(results.pages())
    for name, _, path in results.files():
        page = pages[f"results/{path.stem}.md"]
        rows = [row for row in results.committed(path) if not row.get("error")]
        assert f"{len(results.committed(path))} rows" in page, name
        for table in dict.fromkeys(row.get("table") or "Results" for row in rows):
            assert f"**{table}**" in page, (name, table)
        alone = [r for r in rows if sum(_same(r, other) for other in rows) == 1][:20]
        for row in alone:
            value = row["metrics"].get("acc_test")
            if value is not None and value == value and not report.faults(rows).get(row["run"]):
                line = next(line for line in page.splitlines() if _begins(line, row))
                assert f"{100 * value:.1f}" in line, (name, row["row"])


def _same(one, two) -> bool:
    keys = ("table", "row", "dataset", "model", "attack", "defense")
    return all(one.get(key) == two.get(key) for key in keys)


def _begins(line: str, row) -> bool:
    return line.startswith(f"| {row['row']} ") and f"{100 * row['metrics']['acc_test']:.1f}" in line


def test_what_pages_stand_for_is_known():
    for page in PAGES:
        for name in re.findall(r"<!-- (\w+)", page.read_text()):
            assert name in results.PARTS, (page, name)
