"""The README's generated parts are up to date, and its example runs."""

import re
from pathlib import Path

from readme import ROOT, generate


def test_generated_parts_are_up_to_date():
    text = (ROOT / "README.md").read_text()
    assert generate(text) == text, "run `python tests/readme.py`"


def test_every_file_it_names_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert Path(ROOT, path).exists(), path


def test_the_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None and len([line for line in code[1].splitlines() if line.strip()]) <= 16
    small = code[1].replace("datasets.load()", "datasets.load(train_size=1000, test_size=200)")
    exec(compile(small, "README.md", "exec"), {})
    rates = [float(v) for v in re.findall(r"\d\.\d*", capsys.readouterr().out)]
    assert len(rates) == 4 and rates[-1] > 0.5 > rates[0]
