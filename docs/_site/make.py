"""Builds the site: `python docs/_site/make.py` writes the source that Zensical reads into
`site-source/`, and has it built into `site/`; it ends with 1 where anything is wrong with it.

The source is what people wrote in `docs/`, and what is made of the code and of committed rows:
methods from the registry, results, the public face, executed notebooks.
"""

import html.parser
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import api
import methods
import notebooks
import results
import yaml

ROOT = HERE.parents[1]
SOURCE, SITE = ROOT / "site-source", ROOT / "site"
TABLE = re.compile(r"(?:^\|.*\|$\n?)+", re.M)


def source() -> None:
    """Writes the source anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = SOURCE / "pages"
    shutil.copytree(HERE.parent, pages, ignore=shutil.ignore_patterns("_site", "*.ipynb"))
    for path in pages.rglob("*.md"):
        path.write_text(results.filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    made = list(generated())
    for place, content in made:
        path = pages / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for path in pages.rglob("*.md"):
        path.write_text(_wide(path.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(ROOT / results.ROWS / "defense_zoo-asr.png", pages)
    config = yaml.safe_load((HERE / "site.yml").read_text(encoding="utf-8"))
    listed = set(_listed(config["nav"]))
    rest = [path.relative_to(pages).as_posix() for path in pages.rglob("*.md")]
    config["nav"] = _nav(config["nav"], [place for place in rest if place not in listed])
    (SOURCE / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def generated() -> Iterator[tuple[str, str | bytes]]:
    """What is made of code, rows and notebooks, by its place in the site."""
    yield from methods.pages()
    yield from results.pages()
    yield from api.pages()
    for path in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        text, pictures = notebooks.markdown(notebooks.executed(path), path.stem)
        yield f"tutorials/{path.stem}.md", text
        yield from ((f"tutorials/{name}", content) for name, content in pictures.items())


def _wide(text: str) -> str:
    """Tables in a frame that scrolls by itself, by keyboard too; not within code."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    head = '<div class="wide" tabindex="0" role="region" aria-label="A table" markdown>'

    def framed(found: re.Match) -> str:
        return f"{head}\n\n{found[0].rstrip()}\n\n</div>\n"

    return "".join(part if part.startswith("```") else TABLE.sub(framed, part) for part in parts)


def _listed(item: Any) -> Iterator[str]:
    """The pages that the navigation names."""
    if isinstance(item, str):
        yield item
    else:
        for inner in item.values() if isinstance(item, dict) else item:
            yield from _listed(inner)


def _nav(item: Any, rest: list[str]) -> Any:
    """An entry of the navigation; `FOLDER/*` stands for the pages of a folder that it names
    nowhere.
    """
    if isinstance(item, list):
        found = [_nav(one, rest) for one in item]
        return [one for part in found for one in (part if isinstance(part, list) else [part])]
    if isinstance(item, dict):
        return {title: _nav(inner, rest) for title, inner in item.items()}
    if item.endswith("/*"):
        mine = [p for p in rest if re.fullmatch(re.escape(item[:-1]) + r"[^/]+\.md", p)]
        return sorted(mine, key=lambda p: (not p.endswith("/index.md"), p))
    return item


# --- What is wrong with a site ---

LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[bool, str]] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {given[name] or "" for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append((False, given["href"] or ""))
        elif tag in LOADS and given.get(LOADS[tag]) and given.get("rel") != "canonical":
            self.links.append((True, given[LOADS[tag]] or ""))


def faults(site: Path) -> list[str]:
    """Links that lead nowhere, and whatever a page would fetch from elsewhere."""
    pages = {}
    for path in site.rglob("*.html"):
        pages[path] = _Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    found = []
    for path, page in pages.items():
        for loads, link in page.links:
            parts = urllib.parse.urlsplit(link)
            where = f"{path.relative_to(site)}: {link}"
            if parts.scheme in ("http", "https") or parts.netloc:
                found += [f"{where} is fetched from elsewhere"] if loads else []
            elif not parts.scheme:
                aim = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
                if parts.path.startswith("/"):  # as the page for what is not there has them
                    aim = site / parts.path.lstrip("/")
                aim = (aim / "index.html" if aim.is_dir() else aim).resolve()
                name = urllib.parse.unquote(parts.fragment)
                if not aim.exists():
                    found.append(f"{where} leads nowhere")
                elif name and aim in pages and name not in pages[aim].names:
                    found.append(f"{where} has no such heading")
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found += [
            f"{path.relative_to(site)} fetches {u}"
            for u in re.findall(r"url\(['\"]?(https?:[^)]+)", text)
        ]
    return sorted(set(found))


def main() -> int:
    source()
    shutil.rmtree(SITE, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=SOURCE
    )
    if done.returncode:
        return done.returncode
    (SOURCE / "site").rename(SITE)
    wrong = faults(SITE)
    print("\n".join(wrong), file=sys.stderr)
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.name}/, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
