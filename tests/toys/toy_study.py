"""A study of a stranger's own methods, and of one that stands in this file."""

import bdjax

TITLE = "Lamps"
SCALES = {"cpu": 0}


@bdjax.defense("no-defense")
class NoDefense(bdjax.Repair):
    """Leaves the net alone (Stranger, 2026)."""

    def __call__(self, key, model, variables, clean):
        return bdjax.Repaired(variables, {})


def cells(scale, seeds):
    parts = (bdjax.make("dataset", "stripes"), bdjax.make("model", "one-layer"))
    recipe = bdjax.Recipe(epochs=8, batch=20)
    cell = bdjax.Cell("lamps", "none", *parts, recipe, bdjax.make("attack", "corner-light"))
    lit = list(bdjax.grid(cell, attack__lamp__strength=(0.5, 1.0)))
    yield from lit
    yield from bdjax.grid(lit, row=("left",), defense=[NoDefense()])
