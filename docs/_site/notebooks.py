"""Notebooks without outputs, executed by the build and shown with what they gave.

A run is kept under `.cache` by the notebook's text and bdjax's code, so that building the
site again while writing takes seconds.
"""

import base64
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
SECONDS = 600
"""The longest that a cell may take."""
SETUP = """
import os
import subprocess
import warnings

warnings.filterwarnings("ignore")


def _system(command):
    env = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(command, shell=True, text=True, capture_output=True, env=env)
    print(done.stdout, end="")
    if done.returncode not in (0, 3, 4):  # those of an audit
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr}")


get_ipython().system = _system
"""
"""Runs before the cells, and is not shown: a command that fails ends the build."""


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path`, run in a folder of its own; a cell that fails ends the build."""
    kept = CACHE / "notebooks" / f"{path.stem}-{_digest(path)}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    book = nbformat.read(path, as_version=4)
    before = dict(os.environ)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before['PATH']}"
    os.environ["COLUMNS"] = "100"
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        with tempfile.TemporaryDirectory() as folder:
            where = {"metadata": {"path": folder}}
            book.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
            NotebookClient(book, timeout=SECONDS, kernel_name="python3", resources=where).execute()
            del book.cells[0]
    finally:
        os.environ.clear()
        os.environ.update(before)
    kept.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, kept)
    return book


def _digest(path: Path) -> str:
    code = sorted((ROOT / "bdjax").rglob("*.py"))
    parts = [path.read_bytes(), Path(__file__).read_bytes(), *(file.read_bytes() for file in code)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def markdown(book: nbformat.NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name. A cell's metadata may say what its
    pictures show: `alt`, a list.
    """
    parts, pictures = [], {}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(_code(cell.source))
        said = list(cell.metadata.get("alt", []))
        text = ""
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stdout":
                    text += output.text
                continue
            if output.output_type == "error":
                raise RuntimeError(f"{name}: {output.ename}: {output.evalue}")
            if "image/png" in output.data:
                parts += _text(text)
                text = ""
                file = f"{name}-{len(pictures)}.png"
                pictures[file] = base64.b64decode(output.data["image/png"])
                parts.append(f"![{said.pop(0)}]({file})")
            elif "text/html" in output.data and "<table" in output.data["text/html"]:
                parts += _text(text)
                text = ""
                parts.append(f'<div class="frame">{output.data["text/html"]}</div>')
            else:
                text += output.data.get("text/plain", "") + "\n"
        parts += _text(text)
    return "\n\n".join(parts) + "\n", pictures


def _code(source: str) -> str:
    lines = source.splitlines()
    if all(line.startswith("!") or not line.strip() for line in lines):
        return "```console\n" + "\n".join(f"$ {line[1:]}" for line in lines if line) + "\n```"
    return f"```python\n{source}\n```"


def _text(text: str) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [f"``` {{ .text .output }}\n{text.rstrip()}\n```"] if text.strip() else []
