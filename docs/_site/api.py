"""The pages of the public face, made from the stub that names it: each name stands where it is
defined, and mkdocstrings reads it there.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

STUB = Path(__file__).parents[2] / "bdjax" / "__init__.pyi"
GROUPS = {
    "Methods: find, make, write your own": (
        "entries make attack defense model dataset static leaf pytree load_plugins Attack Training "
        "Repair Inversion Judge InputFilter SampleFilter Net Source"
    ),
    "Data": "datasets write_poisoned Dataset Split Splits",
    "Train and measure": (
        "Recipe build fit evaluate predict poisoned_set stamped judge metrics Metric"
    ),
    "Studies": "Cell grid zipped chain sample crossed changed varied run Rows",
    "Nets in and out": "load_net save_net export_net net load_model save_model",
    "Audit, repair, scan": "audit repair_net scan_set scan_images",
    "What flows through": (
        "types Model Plan Victim Repaired Verdict Scores Suspects Judgement BadInput"
    ),
}
OPTIONS = "    options:\n      show_root_heading: true\n      heading_level: 2\n"


def homes() -> dict[str, str]:
    """Where each public name is defined."""
    body = ast.parse(STUB.read_text(encoding="utf-8")).body
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def pages() -> Iterator[tuple[str, str]]:
    """A page a group; what is in no group stands in the last."""
    known = homes()
    listed = [name for names in GROUPS.values() for name in names.split()]
    groups = {head: names.split() for head, names in GROUPS.items()}
    if more := [name for name in known if name not in listed]:
        groups["More"] = more
    index = ["# API reference", "", "`import bdjax` imports nothing else: each public name is "
             "imported when it is first asked for.", ""]  # fmt: skip
    for head, names in groups.items():
        file = head.partition(":")[0].lower().replace(" ", "-") + ".md"
        here = [name for name in names if name in known]
        index.append(f"- [{head}]({file}): " + ", ".join(f"`{name}`" for name in here))
        lines = [f"# {head}", ""]
        for name in here:
            more = "      members: true\n" if known[name].count(".") == 1 else ""
            lines += [f"::: {known[name]}\n{OPTIONS}{more}", ""]
        yield f"api/{file}", "\n".join(lines)
    yield "api/index.md", "\n".join(index) + "\n"
