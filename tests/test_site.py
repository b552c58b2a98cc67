"""The built site and a page of results in a real browser: on a phone and on a desktop nothing is
cut, nothing fails, tables sort, the dark page is dark, and pictures have words.

`python docs/_site/make.py` builds the site; without it, or without a browser, these are skipped.
"""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from bdjax import shipped
from bdjax.cli import main

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
PHONE, DESKTOP = 390, 1280
AT_ONCE = 8
"""Pages that a browser holds at a time."""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--enable-logging=stderr", "--dump-dom",
]  # fmt: skip
LOOK = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const d = frame.contentDocument, w = frame.contentWindow, root = d.documentElement;
    const cut = [...d.querySelectorAll("main *, article *")].filter((node) => {
      const box = node.getBoundingClientRect();
      // What stands in a frame that scrolls, or is hidden, is not cut.
      const frames = ".wide, .frame, .scroll, pre, .highlight, .full, nav, [hidden]";
      return box.width > 0 && box.right > frame.clientWidth + 1 && !node.closest(frames);
    });
    const hidden = [...d.querySelectorAll(".scroll")].filter(
      (s) => s.scrollWidth > s.clientWidth + 1);
    const table = [...d.querySelectorAll("table")].find((t) => t.querySelector("thead button"));
    let sorts = null;
    if (table) {
      const column = Math.min(1, table.tBodies[0].rows[0].cells.length - 1);
      const texts = () => [...table.tBodies[0].rows].map((r) => r.cells[column].textContent.trim());
      const head = [...table.querySelectorAll("thead th")].filter((h) => h.querySelector("button"));
      const one = head.find((h) => (h.dataset.column ?? head.indexOf(h)) == column) ?? head[column];
      const before = texts().sort().join("|");
      one.querySelector("button").click();
      const up = texts(), said = one.getAttribute("aria-sort");
      one.querySelector("button").click();
      const down = texts();
      const values = new Set(up.filter((t) => t && !"—–".includes(t)));
      sorts = said === "ascending" && one.getAttribute("aria-sort") === "descending"
        && [...up].sort().join("|") === before && (values.size < 2 || up.join() !== down.join());
    }
    const light = w.getComputedStyle(d.body).backgroundColor;
    const theme = d.getElementById("theme");
    if (theme) theme.click(); else d.body.setAttribute("data-md-color-scheme", "slate");
    const dark = w.getComputedStyle(d.body).backgroundColor !== light;
    const images = [...d.images].filter((i) => !i.closest("header, nav, footer"));
    return {
      page: frame.dataset.page, width: root.scrollWidth, sorts, dark,
      cut: cut.slice(0, 3).map((n) => `${n.tagName}.${n.className} ${n.textContent.slice(0, 40)}`),
      hidden: hidden.length,
      wordless: images.filter((i) => !i.alt.trim()).map((i) => i.src.slice(-60)),
      broken: images.filter((i) => i.complete && !i.naturalWidth).map((i) => i.src.slice(-60)),
    };
  });
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folder of pages of results by bdjax itself, a committed one and two on one page."""
    folder = tmp_path_factory.mktemp("pages")
    main(["report", "defense_zoo", "--out", str(folder / "zoo")])
    main(["report", "shamshiri2023", "veldanda2020", "--out", str(folder / "several")])
    assert len(shipped.results("defense_zoo")) == 1
    return folder


def seen(folder: Path, names: list[str], width: int, profile: Path) -> list[dict]:
    """What a browser of this width sees of pages in `folder`."""
    handler = functools.partial(Quiet, directory=str(folder))
    found = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for i in range(0, len(names), AT_ONCE):
            frames = "".join(
                f'<iframe data-page="{html.escape(name)}" src="{html.escape(name)}" '
                f'style="width:{width}px;height:900px;border:0"></iframe>'
                for name in names[i : i + AT_ONCE]
            )
            text = f"<!doctype html><title>look</title><body>{frames}<script>{LOOK}</script>"
            (folder / f"look-{i}.html").write_text(text, encoding="utf-8")
            url = f"http://127.0.0.1:{server.server_address[1]}/look-{i}.html"
            done = subprocess.run(
                [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", url],
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
            assert not said, said[:3]
            result = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)
            assert result, done.stderr[-2000:]
            found += json.loads(html.unescape(result[1]))
        server.shutdown()
    return found


def faults(one: dict, width: int) -> list[str]:
    words = [f"{one['width']} pixels wide"] if one["width"] > width else []
    words += [f"cut: {one['cut']}"] if one["cut"] else []
    words += [f"pictures without words: {one['wordless']}"] if one["wordless"] else []
    words += [f"pictures are missing: {one['broken']}"] if one["broken"] else []
    words += ["a table does not sort"] if one["sorts"] is False else []
    words += [] if one["dark"] else ["the dark page is not dark"]
    return words


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_page_of_the_site(tmp_path, width):
    if not (SITE / "index.html").exists():
        pytest.skip("no site: python docs/_site/make.py")
    folder = tmp_path / "site"
    shutil.copytree(SITE, folder)
    names = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
    names = [name for name in names if name != "404.html"]
    found = seen(folder, names, width, tmp_path / "profile")
    assert [one["page"] for one in found] == names and len(names) > 90
    assert sum(one["sorts"] is True for one in found) > 30
    wrong = {one["page"]: words for one in found if (words := faults(one, width))}
    assert not wrong


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pages_of_results(pages, tmp_path, width):
    names = ["zoo/index.html", "several/index.html"]
    found = seen(pages, names, width, tmp_path / "profile")
    assert not {one["page"]: words for one in found if (words := faults(one, width))}
    assert all(one["sorts"] for one in found)
    if width == DESKTOP:
        assert not any(one["hidden"] for one in found), "a column is hidden"
