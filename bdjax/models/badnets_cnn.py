"""The CNN of the BadNets paper."""

from typing import Literal

from flax.linen import relu

from bdjax.models.layers import Net, avg_pool, conv, dense, max_pool, site
from bdjax.registry import model, static
from bdjax.types import BadInput


@model("badnets-cnn")
class BadNetsCnn(Net):
    """Two valid 5×5 convolutions, pooling, a dense layer of 512 (Gu et al., 2017,
    arXiv:1708.06733).

    281,034 parameters at 28×28×1, 10 classes. `pool`: the paper averages; `fc_linear`: no
    activation after the dense layer, as in the published all-to-all net of Veldanda & Garg (which
    pools by maximum).
    """

    pool: Literal["avg", "max"] = static("avg")
    fc_linear: bool = static(False)

    def layers(self, x, train, classes):
        pool = {"avg": avg_pool, "max": max_pool}[self.pool]
        x = pool(site("conv_1", relu(conv(x, 16, 5, "conv_1", padding="VALID"))), 2)
        x = site("conv_2_pre", conv(x, 32, 5, "conv_2", padding="VALID"))
        x = pool(site("conv_last", relu(x)), 2)
        x = site("dense_pre", dense(x, 512, "dense"))
        return dense(site("penultimate", x if self.fc_linear else relu(x)), classes, "logits")

    def check(self, shape, classes):
        super().check(shape, classes)
        if min(shape[:2]) < 16:
            raise BadInput(
                f"images of {shape[0]}×{shape[1]} are too small for this net: it wants 16×16 or "
                "more"
            )
