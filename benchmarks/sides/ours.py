"""bdjax, as a user calls it: a defense in one compiled program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bdjax import mesh
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.strip import Strip, entropies
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.samples.activation_clustering import ActivationClustering
from bdjax.defenses.samples.spectral_signatures import SpectralSignatures
from bdjax.models.layers import build
from bdjax.models.mntd import MntdMnist
from bdjax.models.preact_resnet18 import PreActResNet18
from bdjax.train import Recipe, clean_set, evaluate
from bdjax.types import Model, Split
from benchmarks.sides import Given, rates

NETS = {"small": (MntdMnist(), (28, 28, 1)), "residual": (PreActResNet18(), (32, 32, 3))}
mesh.tune()  # before JAX starts, as the command line does
KEY = jax.random.key(0)


def net(name: str) -> Model:
    """The model of a net's name."""
    family, shape = NETS[name]
    return build(family, shape, 10)


def loaded(given: Given) -> tuple[Model, Any]:
    """The model and the variables that are given."""
    shape = given.data["clean_image"].shape[1:]
    (name,) = (name for name, (_, wanted) in NETS.items() if wanted == shape)
    flat = {tuple(path.split("/")): jnp.asarray(v) for path, v in given.weights.items()}
    return net(name), unflatten_dict(flat)


def known() -> dict[str, Any]:
    return {"versions": {"jax": jax.__version__, **mesh.how()}, "nets": {}}


def neural_cleanse(given: Given, images: int, fields: dict[str, Any], search: bool = False):
    model, variables = loaded(given)
    defense = NeuralCleanse(**fields)
    clean = Split(given.data["clean_image"][:images], given.data["clean_label"][:images])
    labels = jnp.arange(model.classes)

    @jax.jit
    def program(v, image, label):
        if search:
            found = defense.search(KEY, model, v, image, labels)
            verdict = defense.judge(found.norm, found.qualified)
        else:
            verdict = defense(KEY, model, v, Split(image, label))
        return verdict.info["norms"], verdict.index, verdict.flagged

    def run():
        norms, index, flagged = map(np.asarray, program(variables, clean.image, clean.label))
        return {
            "norms": norms.tolist(), "index": float(index), "flagged": flagged.nonzero()[0].tolist()
        }  # fmt: skip

    return run


def strip(given: Given, inputs: int, overlays: int, fields: dict[str, Any]):
    """The boundary from as many clean inputs as there are stamped ones."""
    model, variables = loaded(given)
    defense = Strip(inputs=inputs, boundary="empirical", **fields)
    clean = Split(
        *(given.data[f"clean_{part}"][: inputs + overlays] for part in ("image", "label"))
    )
    x = given.data["stamped_image"][:inputs]
    program = jax.jit(lambda v, clean, x: defense(KEY, model, v, clean, x))

    def run():
        found = program(variables, clean, x)
        return {
            "recall": float(found.flagged.mean()),
            "fpr": float(found.info["frr_fit"]),
            "entropy_clean": float(found.info["mean"]),
            "entropy_stamped": float(found.score.mean()),
        }

    return run


def strip_scores(given: Given, inputs: int, overlays: int, fields: dict[str, Any]):
    model, variables = loaded(given)
    clean = given.data["clean_image"]
    x = np.concatenate([clean[:inputs], given.data["stamped_image"][:inputs]])
    options = {k: v for k, v in fields.items() if k in ("blend", "alpha", "n")}

    @jax.jit
    def program(v, x, t):
        return entropies(KEY, model, v, x, t, **options).mean(1)

    def run():
        score = np.asarray(program(variables, x, clean[inputs : inputs + overlays]))
        return {
            "entropy_clean": score[:inputs].mean(), "entropy_stamped": score[inputs:].mean()
        }  # fmt: skip

    return run


def _samples(given: Given, defense: Any):
    model, variables = loaded(given)
    split = Split(given.data["train_image"], given.data["train_label"])
    program = jax.jit(lambda v, split: defense(KEY, model, v, clean_set(split)).removed)
    return lambda: rates(program(variables, split), given.data["poisoned"])


def activation_clustering(given: Given, fields: dict[str, Any]):
    return _samples(given, ActivationClustering(**fields))


def spectral_signatures(given: Given, fields: dict[str, Any]):
    return _samples(given, SpectralSignatures(**fields))


def fine_pruning(
    given: Given, images: int, tests: int, recipe: dict[str, Any], fields: dict[str, Any]
):
    model, variables = loaded(given)
    defense = FinePruning(recipe=Recipe(**recipe), **fields)
    clean, test = (
        Split(*(given.data[f"{name}_{part}"][:most] for part in ("image", "label")))
        for name, most in (("clean", images), ("test", tests))
    )

    @jax.jit
    def program(v, clean, test):
        repaired = defense(KEY, model, v, clean)
        measured = (evaluate(KEY, model, u, test, BadNets()) for u in (v, repaired.variables))
        return *((m["acc"], m["asr_all"]) for m in measured), repaired.info["pruned"]

    def run():
        before, after, pruned = jax.tree.map(float, program(variables, clean, test))
        found = {"acc_before": before[0], "asr_before": before[1], "pruned": pruned}
        return found | {"acc": after[0], "asr": after[1]}

    return run
