"""Every registered defense with its preset `cpu` on a small CNN, by the images that it is given."""

from collections.abc import Iterator
from typing import Any

import jax

from bdjax import datasets, registry
from bdjax.attacks.badnets import BadNets
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, TrainSet, poisoned_set
from bdjax.types import BadInput, Model, Split
from benchmarks.measure import Case

IMAGES = {"smoke": (200,), "cpu": (250, 1000), "paper": (250, 500, 1000)}
SMOKE = ("fine-pruning", "strip", "spectral-signatures", "lpsf")


def applied(
    defense: Any,
    key: jax.Array,
    model: Model,
    variables: Any,
    clean: Split,
    train: TrainSet,
    images: Any,
) -> Any:
    """What a defense returns, whatever its stage: it is given what it asks for; training is for one
    epoch.
    """
    return {
        "train": lambda: defense(key, model, Recipe(epochs=1), train, clean),
        "samples": lambda: defense(key, model, variables, train),
        "inputs": lambda: defense(key, model, variables, clean, images),
    }.get(
        registry.get("defense", registry.name_of(defense) or "").stage,
        lambda: defense(key, model, variables, clean),
    )()


def cases(rivals, scale: str) -> Iterator[Case]:
    data = datasets.load()
    model = build(Cnn(hidden=64, features=(8, 16)), data.shape, data.classes)
    variables = model.init(jax.random.key(0))
    for entry in registry.entries("defense"):
        if scale == "smoke" and entry.name not in SMOKE:
            continue
        for images in IMAGES[scale]:
            defense = entry.cls(**getattr(entry.cls, "presets", {}).get("cpu", {}))
            clean = data.clean[slice(images)]
            try:
                defense.check(model, clean)
            except BadInput:
                continue

            def apply(v, split, defense=defense):
                key = jax.random.key(0)
                train = poisoned_set(key, split, BadNets(), data.classes)
                return applied(defense, key, model, v, split, train, split.image)

            yield Case(f"{entry.name}, images", images, apply, (variables, clean))
