"""What every registered defense promises: pure, safe under jit and vmap over key, variables and
every number it has.
"""

import jax
import pytest

from bdjax import registry
from bdjax.analysis.sensitivity import Sensitivity
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.base import Defense, judge
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.sweep import compile_key, stack
from bdjax.train import Recipe, unit
from bdjax.types import BadInput, Splits, Victim

DEFENSES = registry.entries("defense")
WORK = {
    "steps", "inversion_steps", "epochs", "batch", "batches", "rounds", "starts", "orders", "n",
    "images", "inputs", "members", "shadows", "validation", "top", "per_site",
}  # fmt: skip
"""What a budget may count."""


def small(entry):
    return entry.cls(**getattr(entry.cls, "presets", {}).get("cpu", {}))


@pytest.mark.parametrize("entry", DEFENSES, ids=lambda entry: entry.name)
def test_every_defense_is_one_traceable_program_over_keys_nets_and_numbers(entry, sample):
    """Traced, not compiled: a branch on a number, a size that depends on one, or an impure call
    would raise here.
    """
    model = build(Cnn("VALID", hidden=16, features=(4, 4)), sample.shape, sample.classes)
    clean, defense = sample.clean, small(entry)
    defense.check(model, clean)
    runs = 2
    keys = jax.random.split(jax.random.key(0), runs)
    nets = jax.eval_shape(jax.vmap(model.init), keys)
    defenses = stack([defense] * runs)
    images = sample.test.image[:8]
    data = Splits(sample.train, clean, sample.test[:8])

    def run(key, variables, defense):
        victim = Victim(model, variables, BadNets(), Recipe(epochs=1), jax.random.key(1))
        return defense.applied(key, victim, data)

    found = jax.eval_shape(jax.vmap(run), keys, nets, defenses)
    if entry.cls.stage in ("repair", "train"):
        wrapped = defense.wrap(model)
        wanted = jax.eval_shape(jax.vmap(wrapped.init), keys)
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree["params"])
            for tree in (found.variables, wanted)
        ]
        assert shapes[0] == shapes[1], "variables of the model that `wrap` names"
        out = jax.eval_shape(
            jax.vmap(lambda v: wrapped.apply(v, unit(images)).logits), found.variables
        )
        assert out.shape[:2] == (runs, 8)
    elif entry.cls.stage in ("invert", "models"):
        assert found.index.shape == found.infected.shape == (runs,)
        assert found.flagged.shape == (runs, sample.classes) and found.flagged.dtype == bool
    elif entry.cls.stage == "inputs":
        assert found.score.shape == found.flagged.shape == (runs, 8) and found.flagged.dtype == bool
    else:
        assert found.score.shape == found.removed.shape == (runs, len(sample.train.label))
    assert isinstance(found.info, dict)


ONE_OF_A_KIND = {entry.cls.stage: entry for entry in DEFENSES}


@pytest.mark.parametrize("entry", ONE_OF_A_KIND.values(), ids=ONE_OF_A_KIND.keys())
def test_one_function_judges_every_kind_and_asks_for_what_is_absent(entry, sample):
    model = build(Cnn("VALID", hidden=16, features=(4, 4)), sample.shape, sample.classes)
    data, key = Splits(sample.train, sample.clean, sample.test[:8]), jax.random.key(0)
    defense = small(entry)

    def judged(**parts):
        given = {"attack": BadNets(), "recipe": Recipe(epochs=1), "key": key} | parts
        if "variables" not in parts:
            given["variables"] = model.init(key)
        return judge(key, Victim(model, **given), defense, data)

    found = jax.eval_shape(judged)
    assert {"acc_test", "asr_nt"} <= set(found.metrics), "measured, whatever the kind"
    assert all(value.shape == () for value in found.metrics.values())
    assert not any(value.shape == () for value in found.arrays.values())
    leaves_a_net = entry.cls.stage in ("train", "repair", "samples")
    assert (found.variables is not None) == leaves_a_net
    for part in set(defense.needs) - {"attack"}:
        with pytest.raises(BadInput, match=f"needs the victim's {part}"):
            judged(**{part: None})


def test_a_defense_of_no_kind_is_refused():
    with pytest.raises(BadInput, match=r"nothing.* of no kind: derive .*Nothing from Training"):

        @registry.defense("nothing")
        class Nothing(Defense):
            pass


@pytest.mark.parametrize("entry", DEFENSES, ids=lambda entry: entry.name)
def test_every_preset_is_a_defense_of_its_own_and_equal_ones_share_programs(entry):
    for name in getattr(entry.cls, "presets", {}):
        one, two = (registry.make("defense", entry.name, name) for _ in range(2))
        assert compile_key(one) == compile_key(two) and hash(compile_key(one)[0]) == hash(
            compile_key(two)[0]
        )
        assert registry.digest(one) == registry.digest(two)
    assert entry.cls().oracle is False, "no oracle by default"


def flat(value, path=""):
    """The leaves of a described configuration, by dotted name."""
    if not isinstance(value, dict):
        return {path: value}
    parts = [flat(v, f"{path}.{name}" if path else name) for name, v in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def changed(cls, preset, other):
    """Where two presets of a method differ: name, value and value."""
    one, two = (flat(registry.describe(cls(**fields))) for fields in (preset, other))
    names = [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
    return {name: (one.get(name), two.get(name)) for name in names}


@pytest.mark.parametrize("entry", DEFENSES, ids=lambda entry: entry.name)
def test_the_preset_for_small_machines_is_the_same_method(entry):
    """It differs from the paper's preset, or the defaults, in counts of work alone."""
    presets, budget = getattr(entry.cls, "presets", {}), entry.cls.budget_fields
    fields = flat(registry.describe(entry.cls()))
    for name in budget:
        value = fields[name]
        assert name.rpartition(".")[2] in WORK and (value is None or type(value) is int), name
    differs = changed(entry.cls, presets.get("cpu", {}), presets.get("paper", {}))
    assert set(differs) <= set(budget), differs


def test_another_rule_width_or_rate_would_be_seen():
    mesa, clustering = (registry.get("defense", n).cls for n in ("mesa", "activation-clustering"))
    assert set(changed(mesa, {"hidden": 64, "lr": 2e-3, "epochs": 4}, {})) == {
        "hidden", "lr", "epochs",
    }  # fmt: skip
    assert changed(clustering, {"reduce": "ica"}, {}) == {"reduce": ("ica", "pca")}
    told = registry.make("defense", "nc-pruning", "cpu")
    assert set(changed(type(told), {"nc": told.nc}, {})) == {"nc.steps", "nc.batches"}


@pytest.mark.parametrize(
    "entry", [e for e in DEFENSES if e.cls.stage == "repair"], ids=lambda entry: entry.name
)
def test_the_outcome_over_the_number_that_decides_it_is_one_program(entry, sample):
    """Every repair names that number, a leaf, and its docstring says where the default is from."""
    defense, net = small(entry), Cnn("VALID", hidden=16, features=(4, 4))
    model = build(net, sample.shape, sample.classes)
    value = flat(registry.describe(defense))[entry.cls.sensitive]
    assert isinstance(value, float)
    assert "Decides most: " in entry.cls.__doc__
    probe, attack = Sensitivity(defense, (0.01, 0.02)), BadNets()
    nets = jax.eval_shape(jax.vmap(model.init), jax.random.split(jax.random.key(0), 2))
    run = jax.vmap(
        lambda net: probe(jax.random.key(0), model, net, attack, sample.clean, sample.test)
    )
    found = jax.eval_shape(run, nets)
    assert found["asr_nt"].shape == found["acc"].shape == (2, 2)
    assert found["asr_nt_at_0.01"].shape == (2,)
