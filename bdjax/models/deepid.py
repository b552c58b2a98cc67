"""DeepID, the face net of Fine-Pruning, Neural Cleanse and the CSAW backdoor contest."""

from typing import Annotated

from flax.linen import relu

from bdjax.models.layers import Net, act, conv, dense, max_pool, site
from bdjax.registry import model, static
from bdjax.types import MOST, Range


@model("deepid")
class DeepId(Net):
    """Four convolutions; the third and the fourth both feed the 160 features (Sun et al., 2014).

    601,643 parameters at 55×47×3, 1283 classes. The sum of two linear layers, one on the pooled
    third convolution and one on the fourth, goes through a ReLU. Fine-Pruning cuts channels of
    `conv_3`, ranked by their activation at `pool_3`; `conv_last` is the fourth.

    `scale`: what raw pixels, 0 to 255, are multiplied by: 1/255, or 1 for nets that were trained on
    raw pixels, as the published lab3 net was (`keras_h5.load_keras_weights` reads it). Layers carry
    the names of the published Keras nets.

    Reference: Yi Sun, Xiaogang Wang and Xiaoou Tang, "Deep Learning Face Representation from
    Predicting 10,000 Classes", In IEEE Conference on Computer Vision and Pattern Recognition.
    """

    scale: Annotated[float, Range(1e-6, MOST)] = static(1 / 255)
    smallest = 31

    def preprocess(self, x):
        return x * (255 * self.scale)

    def layers(self, x, train, classes):
        x = max_pool(act("conv_1", conv(x, 20, 4, "conv_1", padding="VALID")), 2)
        x = max_pool(act("conv_2", conv(x, 40, 3, "conv_2", padding="VALID")), 2)
        x = site("pool_3", max_pool(act("conv_3", conv(x, 60, 3, "conv_3", padding="VALID")), 2))
        deeper = act("conv_last", conv(x, 80, 2, "conv_4", padding="VALID"))
        x = site("penultimate_pre", dense(x, 160, "fc_1") + dense(deeper, 160, "fc_2"))
        return dense(site("penultimate", relu(x)), classes, "logits")
