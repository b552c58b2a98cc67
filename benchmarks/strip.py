"""STRIP: 50 inputs × 100 replicas through the CNN of Shamshiri & Sohn."""

import jax

from bdjax import datasets
from bdjax.defenses.inputs.strip import entropies
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from benchmarks.measure import Case, forward_flops

INPUTS, REPLICAS = 50, 100


def cases(rivals) -> list[Case]:
    data = datasets.load()
    model = build(Cnn(), data.shape, data.classes)
    variables = model.init(jax.random.key(0))
    x, overlays = data.test.image[:INPUTS], data.clean.image[:REPLICAS]
    score = jax.jit(lambda v, x, t: entropies(jax.random.key(0), model, v, x, t, REPLICAS).mean(1))
    placed = jax.device_put((variables, x, overlays))
    rival = None
    if rivals is not None:
        net = rivals.cnn().eval()
        inputs, _ = rivals.tensors(x, data.test.label[:INPUTS])
        others, _ = rivals.tensors(overlays, data.clean.label[:REPLICAS])
        rival = lambda: rivals.strip(net, inputs.float() / 255, others.float() / 255)  # noqa: E731
    return [Case(f"strip {INPUTS}×{REPLICAS}", lambda: score(*placed), rival, forward_flops(model, INPUTS * REPLICAS))]
