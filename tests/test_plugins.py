"""A stranger's methods, each in a file outside the package, get what the built-in ones have."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

import bdjax
from bdjax import plugins, registry, report
from bdjax.store import Store, read_rows
from bdjax.sweep import Runner

TOYS = Path(__file__).parent / "toys"
FILES = ("toy_attack.py", "toy_net.py", "toy_images.py", "toy_defenses.py")
FLAGS = [word for file in FILES for word in ("--plugin", file)]
SMALL = ["--dataset", "stripes", "--model", "one-layer", "--recipe.batch", "20", "--quiet"]

WHERE = filter(None, [str(TOYS.parents[1]), os.environ.get("PYTHONPATH")])
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(WHERE)}
"""Of a process that finds this bdjax from wherever it runs."""


@pytest.fixture
def here(tmp_path, monkeypatch, own_names):
    """A folder of a stranger's that holds the toys, and where commands are given."""
    for file in TOYS.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def command(capsys):
    """Runs a command, see `planted.command`."""
    return functools.partial(planted.command, capsys)


# --- From end to end ---


def test_by_python_they_are_swept_saved_loaded_and_reported(here):
    found = bdjax.load_plugins(*FILES)
    assert {entry.plugin for entry in found} == set(FILES)
    assert {entry.kind for entry in found} == set(registry.KINDS)
    shone = bdjax.make("attack", "corner-light", "faint", rate=0.2)
    assert shone.lamp.strength == 0.4
    parts = bdjax.make("dataset", "stripes"), bdjax.make("model", "one-layer")
    cell = bdjax.Cell("t", "none", *parts, bdjax.Recipe(epochs=8, batch=20), shone)
    lit = list(bdjax.grid(cell, attack__lamp__strength=(0.6, 1.0)))
    hard = bdjax.make("defense", "clip-weights", "hard")
    cells = [*lit, *bdjax.grid(lit, row=("hard",), defense=(hard,))]
    store = Store(here / "swept")
    runner = Runner(store, "toys", quiet=True)
    rows = runner.run(cells)
    assert all(row["attack"] == "corner-light" and row["dataset"] == "stripes" for row in rows)
    assert rows[1]["metrics"]["asr_nt"] > 0.8, "the toy works"
    assert [row["defense"] for row in rows] == [None, None, "clip-weights", "clip-weights"]
    assert rows[3]["metrics"]["limit"] == pytest.approx(1e-6)
    assert rows[0]["config"]["attack"]["plugin"] == "toy_attack.py"

    model, attack, variables = runner.victim(lit[1])
    about = {"attack": attack, "dataset": cell.dataset, "recipe": cell.recipe, "defenses": (hard,)}
    bdjax.save_model("saved", cell.model, model, variables, **about)
    text = (here / "saved" / "model.json").read_text()
    assert str(here) not in text.replace(json.loads(text)["dataset"]["data_dir"] or "-", "")
    net, again, read, told = bdjax.load_model("saved")
    assert net == cell.model and told["attack"] == attack and told["defenses"] == (hard,)
    image = cell.dataset.load().test.image
    ours, theirs = (bdjax.predict(m, v, image) for m, v in ((model, variables), (again, read)))
    assert np.array_equal(ours, theirs)

    page = report.merge([here / "swept"], None, x="attack.lamp.strength", metric="asr_nt")
    assert "corner-light" in page.read_text()


def test_by_command_they_are_listed_trained_defended_swept_and_reported(here, command):
    code, out, _ = command("list", *FLAGS)
    assert code == 0
    for entry in plugins.load_plugins(*FILES):
        assert re.search(rf"{entry.name} .*{re.escape(entry.plugin or '')}", out), entry.name
    choice = ["--attack", "corner-light:faint", "--attack.lamp.strength", "0.9"]
    few = ["--recipe.epochs", "3", "--dataset.count", "120"]
    code, out, err = command("train", *SMALL, *choice, *few, *FLAGS, "--out", "victim")
    assert code == 0 and "asr_nt" in out, err
    told = json.loads((here / "victim" / "model.json").read_text())["attack"]
    assert (told["plugin"], told["lamp"]["plugin"]) == ("toy_attack.py", "toy_attack.py")
    assert told["lamp"]["strength"] == pytest.approx(0.9)
    code, out, err = command(
        *FLAGS, "defend", "victim", "--defense", "clip-weights:hard", "--out", "fixed", "--quiet"
    )
    assert code == 0 and re.search(r"limit +0\.0", out), err
    assert bdjax.load_model("fixed")[3]["defenses"][0].limit == pytest.approx(1e-6)


def test_by_command_in_a_process_of_its_own(here):
    """A study of toys and of a defense in its own file; the report needs no plugin."""

    args = ["sweep", "toy_study.py", "--out", "swept", "--quiet", *FLAGS]
    env = {**ENV, plugins.VARIABLE: FILES[0]}
    done = subprocess.run(
        [sys.executable, "-m", "bdjax", *args], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = read_rows([here / "swept" / "results.jsonl"])
    assert {row["defense"] for row in rows} == {None, "no-defense"}
    assert {row["config"]["attack"]["lamp"]["strength"] for row in rows} == {0.5, 1.0}
    typed = json.loads((here / "swept" / "report.json").read_text())["command"]
    assert all(f"--plugin {file}" in typed for file in FILES), "what goes on from here"
    page = report.merge([here / "swept"])
    assert "no-defense" in page.read_text() and registry.brought() == []


@pytest.mark.long
def test_a_defense_of_every_kind_by_command(here, command):
    kinds = {e.cls.stage: e.name for e in plugins.load_plugins(*FILES) if e.kind == "defense"}
    assert set(kinds) == {entry.cls.stage for entry in registry.entries("defense")}
    choice = ["--attack", "corner-light", "--recipe.epochs", "3"]
    code, _, err = command("train", *SMALL, *choice, *FLAGS, "--out", "victim")
    assert code == 0, err
    for stage, name in kinds.items():
        code, out, err = command("defend", "victim", "--defense", name, *FLAGS, "--quiet")
        assert code == 0 and "asr_nt" in out, (stage, err)
        assert ("verdict" in out) == (stage in ("invert", "models"))
        assert ("frr" in out) == (stage == "inputs") and ("recall" in out) == (stage == "samples")


# --- What a checkpoint lacks ---


def test_a_checkpoint_names_what_it_lacks_and_imports_nothing(here, command, monkeypatch, capsys):
    bdjax.load_plugins(*FILES)
    net, source = bdjax.make("model", "one-layer"), bdjax.make("dataset", "stripes")
    data = source.load()
    model = bdjax.build(net, data.shape, data.classes)
    about = {
        "attack": bdjax.make("attack", "corner-light"), "dataset": source,
        "recipe": bdjax.Recipe(), "defenses": (bdjax.make("defense", "clip-weights"),),
    }  # fmt: skip
    bdjax.save_model("saved", net, model, model.init(jax.random.key(0)), **about)
    for file in FILES:
        (here / file).write_text("raise SystemExit('imported by itself')")
    theirs = {entry.cls for entry in registry.brought()}
    for table in (registry._entries, registry._pytrees):
        for key, value in list(table.items()):
            if getattr(value, "cls", value) in theirs or key[0] == "toy_attack":
                del table[key]
    code, _, err = command("defend", "saved", "--defense", "fine-pruning")
    assert code == 2 and err == (
        "bdjax: saved: this net needs the model 'one-layer' of toy_net.py and the attack "
        "'corner-light' of toy_attack.py and the dataset 'stripes' of toy_images.py and the "
        "defense 'clip-weights' of toy_defenses.py: give --plugin toy_net.py --plugin "
        "toy_attack.py --plugin toy_images.py --plugin toy_defenses.py\n"
    )
    for file in FILES:
        shutil.copy(TOYS / file, here)
    monkeypatch.setattr(plugins, "_files", {})
    bdjax.load_plugins(*FILES[1:])
    with pytest.raises(bdjax.BadInput, match=r"needs the attack 'corner-light' of toy_attack\.py:"):
        bdjax.load_model("saved")
    sys.path.insert(0, str(here))
    monkeypatch.delitem(sys.modules, "toy_attack", raising=False)
    import toy_attack  # type: ignore[import-not-found]  # a file may be imported as well

    assert registry.plugin_of(toy_attack.CornerLight) == "toy_attack"
    assert bdjax.load_model("saved")[3]["attack"] == toy_attack.CornerLight()
    file = here / "saved" / "model.json"
    capsys.readouterr()
    text = json.loads(file.read_text())
    file.write_text(json.dumps(text | {"net": text["net"] | {"plugin": "old.py"}}))
    bdjax.load_model("saved")
    assert capsys.readouterr().err == (
        "bdjax: saved: 'one-layer' is that of toy_net.py here, it was that of old.py, when the net "
        "was made\n"
    )
    for odd in ("../toy.py", "a b", "x\x1b.py", 1, ["a.py"], {}):
        file.write_text(json.dumps(text | {"net": text["net"] | {"plugin": odd}}))
        with pytest.raises(bdjax.BadInput, match="which is no plugin"):
            bdjax.load_model("saved")
        file.write_text(json.dumps(text | {"net": text["net"] | {"name": [odd]}}))
        with pytest.raises(bdjax.BadInput, match="which is no method of toy_net"):
            bdjax.load_model("saved")


def test_what_a_cell_of_a_notebook_defines(here, monkeypatch):
    notebook = types.ModuleType("__main__")  # without a file
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    code = (TOYS / "toy_net.py").read_text()
    exec(code, vars(notebook))
    old = bdjax.make("model", "one-layer", hidden=4)
    exec(code, vars(notebook))
    assert type(old) is not registry.get("model", "one-layer").cls
    described = registry.describe(old)
    assert described == {"name": "one-layer", "plugin": "__main__", "hidden": 4}
    assert registry.revive("model", described, {}) == bdjax.make("model", "one-layer", hidden=4)
    del registry._entries["model", "one-layer"]
    with pytest.raises(bdjax.BadInput, match="of a notebook: run its cells first"):
        registry.require({"net": "model"}, {"net": described})


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda e: f"{e.kind}-{e.name}")
def test_what_is_built_in_names_no_plugin_and_a_hash_does_not_see_one(entry, monkeypatch):
    made = entry.cls()
    assert entry.plugin is None and '"plugin"' not in json.dumps(registry.describe(made))
    before = registry.digest(made)
    monkeypatch.setattr(registry, "plugin_of", lambda cls: "elsewhere.py")
    assert registry.describe(made)["plugin"] == "elsewhere.py"
    assert registry.digest(made) == before


# --- Doors ---


def test_every_command_takes_plugins(here, command):
    _, out, _ = command("--help")
    names = re.search(r"\{([a-z,]+)\}", out)
    assert names is not None
    for name in names[1].split(","):
        _, out, err = command(name, "--help", "--plugin", "toy_net.py")
        assert "--plugin FILE.py|MODULE" in out, name
        code, _, err = command(name, "--plugin", "nowhere.py")
        assert code == 2 and err.startswith("bdjax: no plugin file nowhere.py"), name
        code, _, err = command("--plugin=nowhere.py", name)
        assert code == 2 and err.startswith("bdjax: no plugin file nowhere.py"), name


def test_a_plugin_is_loaded_once_and_again_when_it_changed(here, monkeypatch):
    count = here / "count.py"
    count.write_text((here / "toy_net.py").read_text() + "\nprint('loaded')\n")
    (here / "link.py").symlink_to(count)
    for word in ("count.py", "./count.py", str(count), "link.py"):
        assert [e.name for e in plugins.load_plugins(word)] == ["one-layer"]
    first = registry.get("model", "one-layer").cls
    count.write_text(count.read_text().replace("16", "32"))
    plugins.load_plugins("count.py")
    assert registry.get("model", "one-layer").cls is not first
    assert bdjax.make("model", "one-layer").hidden == 32


def test_the_environment_and_a_module(here, command, monkeypatch):
    (here / "my_pkg").mkdir()
    (here / "my_pkg" / "__init__.py").touch()
    shutil.copy(here / "toy_net.py", here / "my_pkg" / "net.py")
    monkeypatch.setattr(plugins, "_standing", False)
    monkeypatch.setenv(plugins.VARIABLE, os.pathsep.join(["my_pkg.net", "", "toy_attack.py"]))
    code, out, err = command("list", "--json", "--plugin", "toy_attack.py")
    assert code == 0, err
    found = {row["name"]: row["plugin"] for row in json.loads(out) if row["plugin"]}
    assert found == {"one-layer": "my_pkg.net", "corner-light": "toy_attack.py"}
    assert plugins.flags() == " --plugin toy_attack.py --plugin my_pkg.net"
    sys.modules.pop("my_pkg.net")
    monkeypatch.setattr(plugins, "_standing", False)
    monkeypatch.setenv(plugins.VARIABLE, "nowhere.py")
    for _ in range(2):
        code, _, err = command("list")
        assert code == 2 and err.startswith(f"bdjax: {plugins.VARIABLE}: no plugin file nowhere.py")


def test_a_file_in_the_working_folder_is_no_module(here, monkeypatch):
    """Workers of a cluster get files as they are, and import modules."""
    monkeypatch.setattr(plugins, "_words", ["mine.py", "a/b.py", "my_package.mine", "mine"])
    assert plugins.modules() == ("my_package.mine", "mine")


def test_an_installed_package_and_a_broken_one(here, command, monkeypatch):
    for name, code in (("good", (here / "toy_net.py").read_text()), ("broken", "import nowhere")):
        (here / f"{name}_pkg.py").write_text(code)
        about = here / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmine = {name}_pkg\n")
    sys.path.insert(0, str(here))
    monkeypatch.setattr(plugins, "_standing", False)
    code, out, err = command("list", "--json")
    assert code == 0
    assert {r["name"]: r["plugin"] for r in json.loads(out) if r["plugin"]} == {
        "one-layer": "good_pkg"
    }
    assert re.fullmatch(
        r"bdjax: the plugin 'mine' of broken is left out: broken_pkg: .*broken_pkg.py, line 1: "
        r"ModuleNotFoundError: No module named 'nowhere'\n",
        err,
    )
    sys.modules.pop("good_pkg")


# --- Mistakes ---

BEFORE = """
import bdjax

@bdjax.model("before")
class Before(bdjax.Net):
    pass

"""
ATTACK = """
@bdjax.attack({name})
class A(bdjax.Attack):
    {body}
"""


def attack(name: str = "'a'", body: str = "pass") -> str:
    return ATTACK.format(name=name, body=body)


MISTAKES = {
    "no_python": ("x = (\n", r"no_python.py is not Python: .*line \d"),
    "binary": ("\0", r"binary.py is not Python"),
    "raises": ("raise ValueError('a\\nb')\n", r"raises.py, line 8: ValueError: a b"),
    "exits": ("raise SystemExit(3)\n", r"exits.py, line 8: SystemExit: 3"),
    "imports": ("import nowhere\n", r"imports.py, line 8: ModuleNotFoundError"),
    "no_name": (attack().replace("('a')", ""), r"no_name.py, line 9: @attack takes a name"),
    "upper": (attack("'My'"), "takes a name of small letters"),
    "none": (attack("'none'"), "and not 'none'"),
    "field": (attack(body="plugin: float = 1"), "a field cannot be called 'plugin'"),
    "required": (
        "@bdjax.model('a')\nclass A(bdjax.Net):\n    size: int\n",
        r"required.py, line 8: model 'a': its field 'size' needs a default",
    ),
    "preset": (attack(body="presets = {'p': {'rat': 1}}"), "'p' sets 'rat', which is no field"),
    "hint": (
        attack(body="x: 'Nowhere' = 1\n    trigger = lambda self, x, key: x"),
        r"hint.py: attack 'a': NameError: name 'Nowhere'",
    ),
    "idle": (attack(), r"idle.py, line 9: attack 'a' lacks what it does: define trigger\(self, x,"),
    "clash": (
        attack("'badnets'"),
        r"two attacks are called 'badnets': BadNets in .*badnets.py and A in .*clash.py; rename",
    ),
    "theirs": (
        attack("'corner-light'"),
        r"'corner-light': CornerLight in .*toy_attack.py and A in .*theirs.py; rename one",
    ),
}


@pytest.mark.parametrize(("name", "text", "words"), [(k, *v) for k, v in MISTAKES.items()])
def test_a_mistake_in_a_plugin_is_one_line_and_leaves_nothing(here, command, name, text, words):
    (here / f"{name}.py").write_text(BEFORE + text)
    code, _, err = command("list", "--plugin", "toy_attack.py", "--plugin", f"{name}.py")
    assert code == 2 and re.search(words, err), err
    assert len(err.splitlines()) == 1
    assert [entry.plugin for entry in registry.brought()] == ["toy_attack.py"]


def test_a_clash_is_the_plugin_s_mistake_whichever_came_first(here):
    (here / "mine.py").write_text(BEFORE + attack("'badnets'"))
    code = (
        "import bdjax\ntry:\n    bdjax.load_plugins('mine.py')\nexcept bdjax.BadInput as error:\n"
    )
    code += "    print(error)\nprint(bdjax.make('attack', 'badnets'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    words = r"mine.py, line 9: two .*: BadNets in .*badnets.py and A in .*; rename one\nBadNets\("
    assert re.match(words, done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--plugin", "nowhere.pkg"], "no plugin nowhere.pkg: Python finds no module nowhere"),
        (["--plugin", "nothing.py"], "nothing.py is no plugin: it registers no method"),
        (
            ["--plugin", "toy_nets.py"],
            "no plugin file toy_nets.py; the nearest name is 'toy_net.py",
        ),
        (["--plugin", "bdjax.metrics"], "bdjax.metrics is no plugin: it registers no"),
        (["--plugin", "a b"], "'a b' is no plugin"),
        (["--plugin", "toys/"], "no plugin file toys"),
        (["--plugin", "sub/"], "sub is a folder: give the plugin's file"),
        (["--plugin", "data.txt/x"], "no plugin file"),
        (["--plugin"], "--plugin takes a file or a module"),
        (["--plugin", "--json"], "--plugin takes a file or a module"),
        (["--plugin="], "an empty word after --plugin"),
        (
            ["--plugin", "toy_net.py", "--plugin", "sub/toy_net.py"],
            "two plugins are called toy_net",
        ),
    ],
)
def test_a_plugin_that_is_none(here, command, given, words):
    (here / "nothing.py").write_text("from bdjax.attacks.badnets import BadNets\n")
    (here / "sub").mkdir()
    shutil.copy(here / "toy_net.py", here / "sub")
    code, _, err = command("list", *given)
    assert code == 2 and re.search(words, err) and len(err.splitlines()) == 1, err


SIGNATURES = {
    "attack": ("Attack", "def trigger(self, x): return x", r"trigger\(self, x\) is to be trigger"),
    "stamp": ("Attack", "def stamp(self, kind, x, key): return x", r"be stamp\(.*\*, train=True\)"),
    "plan": ("Attack", "def plan(self, key, labels, classes): 0\n    stamp = max", "be plan"),
    "model": ("Net", "def layers(self, x): return x", r"be layers\(self, x, train, classes\)"),
    "dataset": (
        "Source",
        "def read(self, path): return 3",
        r"read\(self, path\) is to be read\(self",
    ),
    "idle": ("Source", "", r"lacks what it does: define read\(self\)"),
    "Training": (
        "Training",
        "def __call__(self, *a): return 1",
        r"\(self, \*a\) is to be .*recipe",
    ),
    "Repair": ("Repair", "def __call__(self, key, net, variables, clean): return 1", "be __call__"),
    "InputFilter": (
        "InputFilter",
        "def __call__(self, key, model, variables, clean): 0",
        "clean, x",
    ),
    "SampleFilter": ("SampleFilter", "def __call__(self, *a): return 1", "variables, data"),
    "Judge": ("Judge", "def once(self, key, model): return 1", "be once"),
    "Inversion": ("Inversion", "", r"define once\(self, key, model"),
    "hook": ("Judge", "def once(self, *a): return 1\n    def report(self): return {}", "be report"),
}
KIND = {"Attack": "attack", "Net": "model", "Source": "dataset"}


def one_of(base: str, body: str) -> type:
    """A stranger's class of a base of bdjax's, registered as 'odd'."""
    kind = KIND.get(base, "defense")
    space = {"bdjax": bdjax, "jax": jax, "jnp": jnp, "np": np, "__name__": "odd"}
    body = body or "pass"
    exec(
        compile(f"@bdjax.{kind}('odd')\nclass Odd(bdjax.{base}):\n    {body}\n", "odd.py", "exec"),
        space,
    )
    return space["Odd"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_method_that_is_called_otherwise_is_refused(own_names, name):
    base, body, words = SIGNATURES[name]
    with pytest.raises(bdjax.BadInput, match=f"{KIND.get(base, 'defense')} 'odd'.*{words}"):
        one_of(base, body)
    assert not registry.brought()


CALLS = {
    "Attack": "def trigger(self, x, key): {}",
    "Net": "def layers(self, x, train, classes): {}",
    "Source": "def read(self): {}",
    "Training": "def __call__(self, key, model, recipe, data, clean): {}",
    "Repair": "def __call__(self, key, model, variables, clean): {}",
    "InputFilter": "def __call__(self, key, model, variables, clean, x): {}",
    "SampleFilter": "def __call__(self, key, model, variables, data): {}",
    "Judge": "def once(self, key, model, variables, clean): {}",
    "Inversion": "def once(self, key, model, variables, clean): {}",
}
WRONG = {
    "Attack": [
        "return x[:2]", "return x.sum()", "return 'x'", "return (255 * x).astype('uint8')",
    ],
    "Net": ["return x"],
    "Source": [
        "return 1, None, ()", "return bdjax.Split([1], [1]), None, ()",
        "return bdjax.Split(np.full((3, 8, 8, 1), 9.0), np.arange(2)), None, ()",
    ],
    "Training": [
        "return bdjax.Repaired(3, {})", "return bdjax.Repaired({'params': {'a': 'b'}}, {})",
    ],
    "Repair": [
        "return variables", "return bdjax.Repaired(variables, None)",
        "return bdjax.Repaired(variables, {'note': 'text'})",
        "return bdjax.Repaired(variables, {'more': {'note': 'text'}})",
        "return bdjax.Repaired(variables, {'asr_nt': 0.0})",
        "return bdjax.Repaired(variables, {3: 1})",
        "return bdjax.Repaired(variables, {'a': 1, 'b': {3: 1}})",
    ],
    "InputFilter": [
        "return bdjax.Scores(x, 0.5, x > 0, {})", "return x.mean((1, 2, 3))",
        "s = x.mean((1, 2, 3)); return bdjax.Scores(s, 0.5, s, {})",
        "s = x.mean((1, 2, 3)); return bdjax.Scores(s, 0.5, s > 0, {'far': 0.0})",
        "s = x.mean((1, 2, 3)); return bdjax.Scores(s * 1j, 0.5, s > 0, {})",
    ],
    "SampleFilter": [
        "return bdjax.Suspects(jnp.zeros(3), jnp.zeros(3, bool), {})",
        "s = jnp.zeros(data.plan.label.shape); return bdjax.Suspects(s, s, {})",
    ],
    "Judge": [
        "return bdjax.Verdict(1.0, True, jnp.zeros(3, bool), {})",
        "return bdjax.Verdict(None, True, jnp.zeros(model.classes, bool), {})",
        "return bdjax.Verdict(1.0, True, jnp.zeros(model.classes, int), {})",
        "return bdjax.Verdict(1.0, 1.0, jnp.zeros(model.classes, bool), {})",
        "return bdjax.Verdict(1.0, True, jnp.zeros(model.classes, bool), {'key': key})",
    ],
    "Inversion": ["return True"],
}  # fmt: skip
WAYS = [
    "return 3", "return None", "return jnp.zeros(3)", "return nowhere", "return {}['a']",
    "raise SystemExit(3)",
]  # fmt: skip


@pytest.mark.parametrize("base", CALLS)
def test_what_a_method_does_wrong_is_one_line_that_names_it(own_names, base):
    model = bdjax.build(bdjax.make("model", "ffnn", hidden=(4,)), (8, 8, 1), 4)
    key = jax.random.key(0)
    rows = bdjax.Split(np.full((40, 8, 8, 1), 9, np.uint8), np.arange(40, dtype=np.int32) % 4)
    data = bdjax.Dataset("d", rows, rows[:8], rows[:8], 4)
    recipe = bdjax.Recipe(epochs=1, batch=20)
    attack = bdjax.make("attack", "badnets", size=2)
    victim = bdjax.Victim(model, model.init(key), attack, recipe, key)

    def run(made):
        if base == "Attack":
            return made.train(key, model, recipe, rows)
        if base == "Net":
            return bdjax.build(made, (8, 8, 1), 4)
        return made.load() if base == "Source" else bdjax.judge(key, victim, made, data)

    for way in WRONG[base] + WAYS:
        made = one_of(base, CALLS[base].format(way))()
        for call in (run,) if base in ("Net", "Source") else (run, jax.jit(run, static_argnums=0)):
            with pytest.raises(bdjax.BadInput, match=r"odd|Odd") as error:
                call(made)
            assert "\n" not in str(error.value), way


@pytest.mark.parametrize("way", ["raise ValueError(1)", "return x[:2]", "return x"])
@pytest.mark.parametrize(
    "form", ["@jax.jit\n    def trigger(self", "@staticmethod\n    def trigger("]
)
def test_a_method_that_is_compiled_or_static_is_held_to_the_same(own_names, form, way):
    made = one_of("Attack", f"{form}, x, key): {way}".replace("(, ", "("))()
    call = lambda: made.trigger(jnp.ones((8, 8, 1)), jax.random.key(0))  # noqa: E731
    if way == "return x":
        assert call().shape == (8, 8, 1)
        return
    with pytest.raises(bdjax.BadInput, match=r"attack .odd. of odd"):
        call()


@pytest.mark.parametrize("body", ["trigger = 3", "trigger = property(lambda self: 1 / 0)"])
def test_a_method_that_is_none_is_refused(own_names, body):
    with pytest.raises(bdjax.BadInput, match="attack 'odd': trigger is to be a method, not "):
        one_of("Attack", body)


# --- The public face ---


def test_the_public_face_is_there_and_imports_nothing_by_itself():
    for name in bdjax.__all__:
        found = getattr(bdjax, name)
        # A module of that name would take its place as soon as somebody imports it.
        assert isinstance(found, types.ModuleType) or not find_spec(f"bdjax.{name}"), name
    assert set(bdjax.__all__) <= set(dir(bdjax))
    assert (Path(bdjax.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        bdjax.nowhere  # noqa: B018
    code = "import sys, bdjax; print({'jax', 'numpy', 'flax', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.stdout.strip() == "set()", done.stderr
