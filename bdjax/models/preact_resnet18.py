"""PreActResNet-18, the standard net of BackdoorBench."""

from bdjax.models.layers import HE, act, batch_norm, conv, dense, site
from bdjax.models.standardised import Standardised
from bdjax.registry import model


@model("preact-resnet18")
class PreActResNet18(Standardised):
    """Eight residual blocks with BatchNorm and ReLU before each convolution (He et al., 2016,
    arXiv:1603.05027).

    11,171,146 trainable parameters at 32×32×3, 10 classes. As in BackdoorBench: no normalisation or
    ReLU after the last block, shortcuts that change size are bare 1×1 convolutions of the activated
    input, a pixel of padding on both sides. `standardise`: "none" (pixels in [0, 1]) or "cifar10".
    Kernels start as He's.

    Sites: in block b, `block_b_1` and `block_b_2` are the activated inputs of its two convolutions,
    `block_b` is the sum (`conv_last` in block 8).

    Reference: Kaiming He, Xiangyu Zhang, Shaoqing Ren and Jian Sun, "Identity Mappings in Deep
    Residual Networks", In European Conference on Computer Vision.
    """

    def layers(self, x, train, classes):
        def conv3(x, width, name, stride=1):
            return conv(
                x, width, 3, name, stride=stride, padding=((1, 1), (1, 1)), bias=False, init=HE
            )

        x = site("conv_1", conv3(x, 64, "conv_1"))
        for i in range(8):
            width, name = 64 << i // 2, f"block_{i + 1}"
            stride = 2 if i in (2, 4, 6) else 1
            y = act(f"{name}_1", batch_norm(x, train, f"{name}_1_norm"))
            if stride == 2:
                shortcut = conv(y, width, 1, f"{name}_shortcut", stride=2, bias=False, init=HE)
                x = site(f"{name}_shortcut", shortcut)
            y = conv3(y, width, f"{name}_1", stride)
            y = act(f"{name}_2", batch_norm(y, train, f"{name}_2_norm"))
            x = site("conv_last" if i == 7 else name, x + conv3(y, width, f"{name}_2"))
        return dense(site("penultimate", x.mean((1, 2))), classes, "logits")
