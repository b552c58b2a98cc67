"""ResNet-18, -34 and -50, as torchvision and BackdoorBench have them."""

from typing import Literal

from flax import linen as nn

from bdjax.models.layers import HE, act, batch_norm, conv, dense, site
from bdjax.models.standardised import Standardised
from bdjax.registry import model, static

BLOCKS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3)}


@model("resnet")
class ResNet(Standardised):
    """Residual blocks in four stages (He et al., 2015, arXiv:1512.03385).

    11,689,512 trainable parameters with `depth` 18, 21,797,672 with 34, 25,557,032 with 50, at 1000
    classes. `stem`: "imagenet", a 7×7 convolution of stride 2 and a max-pool; or "cifar", a 3×3
    convolution. Strides stand on the 3×3 convolutions, a pixel of padding on both sides. Layers
    have torchvision's names, so that its weights load. Kernels start as He's.

    Sites: `layerS.B` is the sum of block B in stage S after its ReLU (`conv_last` in the last one),
    `layerS.B.1`, `layerS.B.2` the ReLUs within.
    """

    depth: Literal["18", "34", "50"] = static("18")
    stem: Literal["imagenet", "cifar"] = static("imagenet")

    def layers(self, x, train, classes):
        def normed(x, width, size, name, norm, stride=1):
            pads = ((size // 2, size // 2),) * 2
            x = conv(x, width, size, name, stride=stride, padding=pads, bias=False, init=HE)
            return batch_norm(x, train, norm)

        large = self.stem == "imagenet"
        x = act("conv1", normed(x, 64, 7 if large else 3, "conv1", "bn1", 2 if large else 1))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # type: ignore[arg-type]
        bottleneck = self.depth == "50"
        for stage, count in enumerate(BLOCKS[self.depth], 1):
            inner = 32 << stage
            width = 4 * inner if bottleneck else inner
            sizes = ((1, inner), (3, inner), (1, width)) if bottleneck else ((3, inner), (3, width))
            for block in range(count):
                name = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                y = x
                for i, (size, features) in enumerate(sizes, 1):
                    step = stride if i == (2 if bottleneck else 1) else 1
                    y = normed(y, features, size, f"{name}.conv{i}", f"{name}.bn{i}", step)
                    y = act(f"{name}.{i}", y) if i < len(sizes) else y
                if stride == 2 or x.shape[-1] != width:
                    down = f"{name}.downsample"
                    x = normed(x, width, 1, f"{down}.0", f"{down}.1", stride)
                last = stage == 4 and block == count - 1
                x = act("conv_last" if last else name, x + y)
        return dense(site("penultimate", x.mean((1, 2))), classes, "fc")
