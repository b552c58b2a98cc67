"""AlexNet for small images."""

from bdjax.models.layers import HE, Net, act, conv, dense, dropout, max_pool
from bdjax.registry import model, static
from bdjax.types import Size


@model("alexnet")
class AlexNet(Net):
    """Five 3×3 convolutions, the last of 128 channels, and a dense layer (Krizhevsky et al., 2012).

    A reconstruction of the traffic-sign net of Cheng et al., who say "AlexNet" and show 128
    channels in the last convolution. Like other versions for 32×32 pixels it has 3×3 kernels and
    `stride` 2 in the first layer. `features`: channels of the convolutions; `hidden`: width of the
    dense layer, after which half of the units are dropped in training. Kernels start as He's.

    Reference: Alex Krizhevsky, Ilya Sutskever and Geoffrey E. Hinton, "ImageNet Classification with
    Deep Convolutional Neural Networks", In Advances in Neural Information Processing Systems.
    """

    features: tuple[Size, Size, Size, Size, Size] = static((64, 192, 384, 256, 128))
    stride: Size = static(2)
    hidden: Size = static(512)
    smallest = 8

    def layers(self, x, train, classes):
        one, two, three, four, five = self.features
        x = max_pool(
            act("conv_1", conv(x, one, 3, "conv_1", stride=self.stride, init=HE)), 2, padding="SAME"
        )
        x = max_pool(act("conv_2", conv(x, two, 3, "conv_2", init=HE)), 2, padding="SAME")
        x = act("conv_3", conv(x, three, 3, "conv_3", init=HE))
        x = act("conv_4", conv(x, four, 3, "conv_4", init=HE))
        x = max_pool(act("conv_last", conv(x, five, 3, "conv_5", init=HE)), 2, padding="SAME")
        x = dropout(act("penultimate", dense(x, self.hidden, "dense", init=HE)), 0.5, train)
        return dense(x, classes, "logits")
