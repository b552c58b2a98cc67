"""The two target nets of MNTD, Meta Neural Trojan Detection."""

from typing import Literal

from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.layers import HE, Net, act, conv, dense, dropout, max_pool
from bdjax.registry import model, static


@model("mntd-mnist")
class MntdMnist(BadNetsCnn):
    """The BadNets CNN with max-pooling (Xu et al., 2019, arXiv:1910.03137).

    281,034 parameters at 28×28×1, 10 classes.
    """

    pool: Literal["avg", "max"] = static("max")


@model("mntd-cifar10")
class MntdCifar10(Net):
    """Two pairs of 3×3 convolutions and two dense layers of 256 (Xu et al., 2019,
    arXiv:1910.03137).

    1,182,762 parameters at 32×32×3, 10 classes. Half of the second dense layer is dropped in
    training. Padding "SAME" and He's kernels are ours.
    """

    smallest = 4

    def layers(self, x, train, classes):
        for i, width in enumerate((32, 32, 64, 64), 1):
            x = act("conv_last" if i == 4 else f"conv_{i}", conv(x, width, 3, f"conv_{i}", init=HE))
            x = x if i % 2 else max_pool(x, 2)
        x = act("dense_1", dense(x, 256, "dense_1", init=HE))
        x = dropout(act("penultimate", dense(x, 256, "dense_2", init=HE)), 0.5, train)
        return dense(x, classes, "logits")
