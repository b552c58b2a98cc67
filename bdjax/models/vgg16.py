"""VGG-16."""

from bdjax.models.layers import HE, Net, act, conv, dense, dropout, max_pool
from bdjax.registry import model, static
from bdjax.types import Size


@model("vgg16")
class Vgg16(Net):
    """Thirteen 3×3 convolutions, three dense layers, any input size (Simonyan & Zisserman, 2014,
    arXiv:1409.1556).

    138,357,544 parameters at 224×224×3, 1000 classes (`hidden` 4096); 15,245,130 at 32×32×3, 10
    classes with `hidden`
    512. Each pool rounds an odd side up. Half of the hidden units are dropped in training. Kernels
         start as He's.

    Reference: Karen Simonyan and Andrew Zisserman, "Very Deep Convolutional Networks for
    Large-Scale Image Recognition".
    """

    hidden: Size = static(4096)

    def layers(self, x, train, classes):
        for i, (count, width) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), 1):
            for j in range(1, count + 1):
                name = f"conv_{i}_{j}"
                x = act(
                    "conv_last" if name == "conv_5_3" else name, conv(x, width, 3, name, init=HE)
                )
            x = max_pool(x, 2, padding="SAME")
        x = dropout(act("dense_1", dense(x, self.hidden, "dense_1", init=HE)), 0.5, train)
        x = dropout(act("penultimate", dense(x, self.hidden, "dense_2", init=HE)), 0.5, train)
        return dense(x, classes, "logits")
