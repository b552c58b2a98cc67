"""The two nets of STRIP that were its own; its third is `resnet20`."""

from flax.linen import elu

from bdjax.models.layers import Net, act, batch_norm, conv, dense, dropout, max_pool, site
from bdjax.registry import model


@model("strip-mnist")
class StripMnist(Net):
    """Two 3×3 convolutions and a dense layer of 100 (Gao et al., 2019, arXiv:1902.06531).

    80,758 parameters at 28×28×1, 10 classes. The paper says "2 conv + 2 dense" and the count; this
    layout (8 and 16 channels, a 2×2 pool after each, 100 hidden units) fits it exactly and is a
    reconstruction. Paper: batch 128, 20 epochs, learning rate 1e-3.
    """

    smallest = 4

    def layers(self, x, train, classes):
        x = max_pool(act("conv_1", conv(x, 8, 3, "conv_1")), 2)
        x = max_pool(act("conv_last", conv(x, 16, 3, "conv_2")), 2)
        return dense(act("penultimate", dense(x, 100, "dense")), classes, "logits")


@model("strip-cifar10")
class StripCifar10(Net):
    """Six 3×3 convolutions, each followed by ELU and then BatchNorm, and dropout (Gao et al., 2019,
    arXiv:1902.06531).

    308,394 trainable parameters at 32×32×3, 10 classes, 309,290 with the running statistics. A site
    named `…_pre` stands before the ELU, its partner after the BatchNorm, so that a mask there
    silences the channel. Paper: RMSprop, learning rate 1e-3 (5e-4 after 75 of 125 epochs), batch
    64, L2 1e-4, rotation 15°, shift 0.1 and flips.

    Differs from the authors' code: running statistics keep 0.9 of what they were, ε is 1e-5; those
    of Keras 0.99 and 1e-3.
    """

    smallest = 8

    def layers(self, x, train, classes):
        for i in range(6):
            width, name = 32 << i // 2, f"conv_{i + 1}"
            place = "conv_last" if i == 5 else name
            x = elu(site(f"{place}_pre", conv(x, width, 3, name)))
            x = site(place, batch_norm(x, train, f"norm_{i + 1}"))
            if i % 2:
                x = max_pool(x, 2)
                x = site("penultimate", x.reshape(x.shape[0], -1)) if i == 5 else x
                x = dropout(x, (0.2, 0.3, 0.4)[i // 2], train)
        return dense(x, classes, "logits")
