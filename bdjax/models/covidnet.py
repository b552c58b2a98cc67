"""A chest X-ray net with attention gates."""

from typing import Annotated

from flax.linen import sigmoid

from bdjax.models.layers import Net, act, conv, dense, max_pool, site
from bdjax.registry import model, static
from bdjax.types import BadInput, Range, Size


@model("covidnet")
class CovidNet(Net):
    """PEPX blocks, dense shortcuts and attention gates (Ambati & Dubey, 2021, arXiv:2105.10239).

    PEPX: two 1×1 convolutions, a depthwise 3×3, two more 1×1. Stage s has `counts[s]` PEPX blocks
    of `widths[s]` channels; each but the first reads the sum of the stage's shortcut (a 1×1
    convolution) and of all its blocks so far. The next stage's shortcut reads that sum over the
    whole stage; its first block reads shortcut + gate(last block, mean of the others), with gate(x,
    g) = x·σ(ψ(ReLU(θx + φg))). The last stage gates its shortcut by the mean of its blocks, and
    that map (`conv_last`) goes to dense layers of `hidden` units.

    The stem halves the sides twice and each stage but the last once, rounded up, so any size works:
    the paper has 480×480. Preset "paper" has its widths; the default is a small version of ours.
    Kernels start with variance 1/fan-in: with twice as much, the dense sums grow until the gates
    shut and nothing is learnt.

    Differs from the published code: the gates work on channels (there, on image rows), and the last
    block of the last stage reads the dense sum as all others do.

    Reference: Anirudh Ambati and Shiv Ram Dubey, "AC-CovidNet: Attention Guided Contrastive CNN for
    Recognition of Covid-19 in Chest X-Ray Images".
    """

    widths: tuple[Size, ...] = static((16, 32, 64, 128))
    counts: tuple[Annotated[int, Range(2, 1_000)], ...] = static((2, 2, 3, 2))
    hidden: tuple[Size, Size] = static((256, 64))

    presets = {
        "paper": {"widths": (56, 112, 216, 424), "counts": (3, 4, 6, 3), "hidden": (1024, 256)}
    }

    def layers(self, x, train, classes):
        x = act("conv_1", conv(max_pool(x, 2, padding="SAME"), self.widths[0], 7, "conv_1"))
        x = dense_path = max_pool(x, 2, padding="SAME")
        for s, (width, count) in enumerate(zip(self.widths, self.counts), 1):
            shortcut = act(f"shortcut_{s}", conv(dense_path, width, 1, f"shortcut_{s}"))
            blocks, total = [], shortcut
            for b in range(1, count + 1):
                blocks.append(_pepx(x if b == 1 else total, width, f"pepx_{s}_{b}"))
                total = total + blocks[-1]
            if s == len(self.widths):
                x = site("conv_last", _gate(shortcut, sum(blocks) / count, f"gate_{s}"))
                break
            attended = _gate(blocks[-1], sum(blocks[:-1]) / (count - 1), f"gate_{s}")
            x = max_pool(shortcut + site(f"gate_{s}", attended), 2, padding="SAME")
            dense_path = max_pool(total, 2, padding="SAME")
        x = act("dense_1", dense(x, self.hidden[0], "dense_1"))
        return dense(act("penultimate", dense(x, self.hidden[1], "dense_2")), classes, "logits")

    def check(self, shape, classes):
        super().check(shape, classes)
        if not 0 < len(self.widths) == len(self.counts):
            raise BadInput(f"widths {self.widths} and counts {self.counts} must be as many")


def _pepx(x, width: int, name: str):
    x = act(f"{name}_1", conv(x, width, 1, f"{name}_1"))
    x = act(f"{name}_2", conv(x, width, 1, f"{name}_2"))
    x = site(f"{name}_3", conv(x, width, 3, f"{name}_3", groups=width))
    x = act(f"{name}_4", conv(x, width, 1, f"{name}_4"))
    return act(name, conv(x, width, 1, f"{name}_5"))


def _gate(x, g, name: str):
    width = x.shape[-1]
    common = act(f"{name}_hidden", conv(x, width, 1, f"{name}_x") + conv(g, width, 1, f"{name}_g"))
    return x * site(f"{name}_map", sigmoid(conv(common, 1, 1, f"{name}_map")))
