"""Every registered defense with its preset `cpu` on a small CNN, by the images that it is given."""

from collections.abc import Iterator

import jax

from bdjax import datasets, registry
from bdjax.attacks.badnets import BadNets
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe
from bdjax.types import BadInput, Splits, Victim
from benchmarks.measure import Case

IMAGES = {"smoke": (200,), "cpu": (250, 1000), "paper": (250, 500, 1000)}
SMOKE = ("fine-pruning", "strip", "spectral-signatures", "lpsf")


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
                victim = Victim(model, v, BadNets(), Recipe(epochs=1), key)
                return defense.applied(key, victim, Splits(split, split, split))

            yield Case(f"{entry.name}, images", images, apply, (variables, clean))
