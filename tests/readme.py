"""Writes the generated parts of the README: `python tests/readme.py`. A test checks that they are up to date."""

import json
import re
from pathlib import Path

from bdjax import registry

ROOT = Path(__file__).parents[1]
FOLDERS = {"attack": "Attacks", "defense": "Defenses", "model": "Models", "dataset": "Data"}


def methods() -> str:
    """Method → paper → file."""
    parts = []
    for kind, title in FOLDERS.items():
        parts.append(f"**{title}**\n\n| name | paper | file |\n|---|---|---|")
        for e in registry.entries(kind):
            link = f"[arXiv:{e.arxiv}](https://arxiv.org/abs/{e.arxiv})" if e.arxiv else ""
            paper = f"{e.paper}, {e.year} {link}".strip() if e.paper else ""
            parts[-1] += f"\n| `{e.name}` | {paper} | [{Path(e.file).name}]({e.file}) |"
    return "\n\n".join(parts)


def results(file: str) -> str:
    """The tables of a committed results file."""
    from bdjax import report

    rows = [json.loads(line) for line in (ROOT / file).read_text().splitlines()]
    return report.brief_markdown(rows)


def generate(text: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match) -> str:
        name, _, argument = match["name"].partition(" ")
        made = {"methods": methods, "results": lambda: results(argument)}[name]()
        return f"<!-- {match['name']} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>(methods|results)[^>]*?) -->.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(generate(path.read_text()))
