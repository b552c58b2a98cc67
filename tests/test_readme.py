"""The README's generated parts are up to date, and its example runs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from readme import ROOT, generate

import bdjax

README = (ROOT / "README.md").read_text()


def test_generated_parts_are_up_to_date():
    assert generate(README) == README, "run `python tests/readme.py`"


def test_every_file_it_names_exists():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert Path(ROOT, path).exists(), path


def test_the_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None and len([line for line in code[1].splitlines() if line.strip()]) <= 16
    small = code[1].replace("datasets.load()", "datasets.load(train_size=1000, test_size=200)")
    exec(compile(small, "README.md", "exec"), {})
    rates = [float(v) for v in re.findall(r"\d\.\d*", capsys.readouterr().out)]
    assert len(rates) == 4 and rates[-1] > 0.5 > rates[0]


def test_the_example_of_a_method_of_one_s_own_is_one(tmp_path, own_names):
    name, code = re.search(r"```python\n# (\w+\.py)\n(.*?)```", README, re.S).groups()  # type: ignore[union-attr]
    (tmp_path / name).write_text(code)
    (entry,) = bdjax.load_plugins(tmp_path / name)
    lit = entry.cls(strength=0.5).trigger(jnp.zeros((8, 8, 1)), jax.random.key(0))
    assert float(lit.sum()) == 0.5 * 9
    assert f"--plugin {name} --{entry.kind} {entry.name} --{entry.kind}.strength" in README
