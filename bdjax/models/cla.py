"""The MNIST net of the clean-label attack."""

from bdjax.models.layers import Net, act, conv, dense, max_pool, site
from bdjax.registry import model


@model("cla")
class Cla(Net):
    """Valid 5×5 convolutions of 16 and 4 channels and a linear layer of 512 (Veldanda & Garg, 2020,
    arXiv:2010.12186).

    40,430 parameters at 28×28×1, 10 classes. The dense layer has no activation function, as
    printed. Padding is not printed; "VALID" is a reconstruction. Paper: Adadelta, learning rate 1,
    batch 32, 25 epochs.
    """

    smallest = 16

    def layers(self, x, train, classes):
        x = max_pool(act("conv_1", conv(x, 16, 5, "conv_1", padding="VALID")), 2)
        x = max_pool(act("conv_last", conv(x, 4, 5, "conv_2", padding="VALID")), 2)
        return dense(site("penultimate", dense(x, 512, "dense")), classes, "logits")
