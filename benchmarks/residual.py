"""Residual nets with BatchNorm, 32×32×3, B = 32: a training step, a label-step of Neural Cleanse
and STRIP on ResNet-20 and PreActResNet-18, the net of most benchmarks of the field.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.strip import entropies
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.models.layers import build
from bdjax.models.preact_resnet18 import PreActResNet18
from bdjax.models.resnet20 import ResNet20
from bdjax.train import Recipe, advance, begin, poisoned_set
from bdjax.types import Split
from benchmarks.measure import Case, forward_flops

BATCH, LABELS = 32, 2
NETS = {"ResNet-20": (ResNet20(), 16), "PreActResNet-18": (PreActResNet18(), 4)}
"""Each with its number of mini-batches."""
SMOKE = {"ResNet-20": (ResNet20(), 1)}


def cases(rivals, scale: str) -> Iterator[Case]:
    for name, (net, steps) in (SMOKE if scale == "smoke" else NETS).items():
        split = widened(datasets.load().train[slice(steps * BATCH)])
        model = build(net, split.image.shape[1:], 10)
        variables = model.init(jax.random.key(0))
        rival = None if rivals is None else (rivals, getattr(rivals, name.lower().replace("-", "")))
        yield training(name, model, split, rival)
        yield search(name, model, variables, split, rival)
        yield strip(name, model, variables, split, rival)


def widened(split: Split) -> Split:
    """28×28×1 images in the middle of 32×32, in three equal channels."""
    wide = np.pad(split.image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return Split(np.repeat(wide, 3, -1), split.label)


def training(name: str, model: Any, split: Split, rival: Any) -> Case:
    """An epoch over the images, for the seconds of its steps."""
    key, recipe, steps = jax.random.key(0), Recipe(batch=BATCH, epochs=1), len(split.label) // BATCH

    def epoch(key, state, split):
        data = poisoned_set(key, split, BadNets(), 10)
        return advance(key, state, model, recipe, data, epochs=1)

    other = None
    if rival is not None:
        module, net = rival
        image, label = module.tensors(split.image, split.label)
        poisoned = module.torch.rand(len(label)) < 0.1
        other = partial(module.train, net(), image, label, poisoned, BATCH)
    args = key, begin(key, model, recipe), split
    work = 3 * forward_flops(model, len(split.label))
    return Case(f"{name}, training steps", steps, epoch, args, other, work)


def search(name: str, model: Any, variables: Any, split: Split, rival: Any) -> Case:
    """An outer step of Neural Cleanse for two labels."""
    steps = len(split.label) // BATCH
    defense = NeuralCleanse(steps=1, batches=steps, batch=BATCH)

    def run(v, x):
        return defense.search(jax.random.key(0), model, v, x, jnp.arange(LABELS)).norm

    other = None
    if rival is not None:
        module, net = rival
        pixels, _ = module.tensors(split.image, split.label)
        other = partial(module.neural_cleanse, net().eval(), pixels, LABELS, 1, BATCH)
    work = 2 * forward_flops(model, len(split.label)) * LABELS
    size = steps * LABELS
    return Case(
        f"{name}, Neural Cleanse label-steps", size, run, (variables, split.image), other, work
    )


def strip(name: str, model: Any, variables: Any, split: Split, rival: Any) -> Case:
    """The entropies of an eighth of the images, over 20 replicas or as many as there are."""
    n = min(20, len(split.label) // 2)
    x, overlays = split.image[: len(split.label) // 8], split.image[-n:]

    def score(v, x, t):
        return entropies(jax.random.key(0), model, v, x, t, n).mean(1)

    other = None
    if rival is not None:
        module, net = rival
        left, right = (
            module.tensors(part, split.label[: len(part)])[0].float() / 255
            for part in (x, overlays)
        )
        other = partial(module.strip, net().eval(), left, right)
    replicas = len(x) * n
    work = forward_flops(model, replicas)
    return Case(f"{name}, STRIP replicas", replicas, score, (variables, x, overlays), other, work)
