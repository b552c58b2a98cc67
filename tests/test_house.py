"""How the house is built: imports go one way, the core imports little, nothing personal is in the
files.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors"}, {"types", "shipped", "__version__"},
    {"registry", "schema", "own", "plugins", "identity"},
    {"metrics", "mesh", "progress", "augment", "rows"}, {"models", "datasets", "foreign"},
    {"train"},
    {"store", "checkpoints", "channels", "migrate", "trackers"}, {"attacks"},
    {"defenses", "analysis", "zoo_veldanda", "testing", "imports", "exports", "rule"},
    {"study", "changes", "studies", "poison", "loops"},
    {"sweep"}, {"target"}, {"engine"}, {"references"}, {"audits"}, {"repairs"}, {"scans"},
    {"plots", "report"}, {"figures", "audit_page"}, {"experiment"}, {"latex"}, {"cli", "__main__"},
)  # fmt: skip
CORE = {"jax", "flax", "optax", "chex", "numpy", "orbax", "filelock"}
LATE = {
    "augment",
    "plots",
    "figures",
    "report",
    "experiment",
    "latex",
    "cli",
    "__main__",
    "audit_page",
}
FILES = sorted((ROOT / "bdjax").rglob("*.py"))


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(tree: ast.Module, top: bool):
    """Names of imported modules; `top`: only those that are imported with the module itself."""
    nodes = tree.body if top else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "bdjax"
                else [node.module]
            )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_go_one_way_and_are_few(file):
    parts = file.relative_to(ROOT / "bdjax").with_suffix("").parts
    if parts == ("__init__",):
        return
    tree = ast.parse(file.read_text())
    for name in imports(tree, top=True):
        first, *rest = name.split(".")
        if first == "bdjax":
            assert layer(rest[0]) <= layer(parts[0]), (
                f"{name} is built on what this file belongs to"
            )
        elif parts[0] not in LATE:
            import sys

            assert first in CORE | set(sys.stdlib_module_names), (
                f"import {first} where it is used, not at the top"
            )


def test_one_shard_map_and_no_jit_in_methods():
    for file in FILES:
        text, where = file.read_text(), file.relative_to(ROOT / "bdjax").parts[0]
        assert "jax.shard_map(" not in text or where == "mesh.py", file
        if where in (
            "attacks",
            "defenses",
            "models",
            "analysis",
            "train.py",
            "metrics.py",
            "mesh.py",
        ):
            assert not re.search(r"jax\.jit\b", text), (
                f"{file}: only sweep, cli and benchmarks compile"
            )


def test_no_path_of_a_machine_and_no_big_file():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.exists() and path.stat().st_size > 1 << 20:
            assert name.startswith("bdjax/datasets/fashion_mnist_"), f"{name} is over 1 MiB"
        if path.suffix in (".py", ".md", ".toml", ".j2", ".jsonl"):
            assert not re.search(r"(?<![\w.])/(home|root|work|Users|tmp)/\w", path.read_text()), (
                f"{name} names a machine's path"
            )


def test_no_public_name_is_that_of_a_module():
    """`from bdjax import name` would give one or the other, by what was imported before."""
    import bdjax

    files = [*(ROOT / "bdjax").glob("*.py"), *(ROOT / "bdjax").glob("*/__init__.py")]
    modules = {file.parent.name if file.stem == "__init__" else file.stem for file in files}
    own = {name for name in modules if bdjax._HOMES.get(name) == "bdjax"}
    assert not (set(bdjax.__all__) - own) & modules
