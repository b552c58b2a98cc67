"""ResNet-20."""

from bdjax.models.layers import HE, Net, act, batch_norm, conv, dense, site
from bdjax.registry import model


@model("resnet20")
class ResNet20(Net):
    """Nine residual blocks of two 3×3 convolutions (He et al., 2015, arXiv:1512.03385).

    STRIP prints 276,587 parameters for it at 32×32×3, 43 classes. The layout that fits: biases in
    every convolution, 1×1 convolutions without BatchNorm as the two shortcuts that change size, and
    the running statistics counted (275,211 are trainable). Kernels start as He's.

    Sites: in block b, `block_b_1` after the first ReLU, `block_b_2` the second convolution before
    the sum, `block_b` after the sum's ReLU (`conv_last` in block 9). STRIP: batch 32, 100 epochs,
    learning rate 1e-3, 1e-4 after 80.

    Reference: Kaiming He, Xiangyu Zhang, Shaoqing Ren and Jian Sun, "Deep Residual Learning for
    Image Recognition".
    """

    def layers(self, x, train, classes):
        def normed(x, width, size, name, stride=1):
            return batch_norm(
                conv(x, width, size, name, stride=stride, init=HE), train, f"{name}_norm"
            )

        x = act("conv_1", normed(x, 16, 3, "conv_1"))
        for i in range(9):
            width, name = 16 << i // 3, f"block_{i + 1}"
            stride = 2 if i in (3, 6) else 1
            y = act(f"{name}_1", normed(x, width, 3, f"{name}_1", stride))
            y = site(f"{name}_2", normed(y, width, 3, f"{name}_2"))
            if stride == 2:
                x = site(
                    f"{name}_shortcut", conv(x, width, 1, f"{name}_shortcut", stride=2, init=HE)
                )
            x = act("conv_last" if i == 8 else name, x + y)
        return dense(site("penultimate", x.mean((1, 2))), classes, "logits")
