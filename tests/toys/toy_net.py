"""A net of a stranger's own."""

from flax.linen import relu

import bdjax
from bdjax.models.layers import dense, site
from bdjax.types import Size


@bdjax.model("one-layer")
class OneLayer(bdjax.Net):
    """One hidden layer (Stranger, 2026)."""

    hidden: Size = bdjax.static(16)

    def layers(self, x, train, classes):
        x = site("penultimate", relu(dense(x, self.hidden, "hidden")))
        return dense(x, classes, "logits")
