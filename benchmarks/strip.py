"""STRIP on the CNN of Shamshiri & Sohn, by replicas and by inputs; its cost in plain inferences at
N = 10.
"""

from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.defenses.inputs.strip import entropies
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import predict
from benchmarks.measure import Case, forward_flops

REPLICAS = {
    "smoke": (2,),
    "cpu": (2, 10, 50, 100, 200, 1000),
    "paper": (2, 10, 50, 100, 200, 500, 1000),
}
INPUTS = {"smoke": (5,), "cpu": (10, 50, 200), "paper": (10, 50, 200, 1000, 2000)}


def cases(rivals, scale: str) -> Iterator[Case]:
    for n in REPLICAS[scale]:
        yield case(rivals, "STRIP, replicas", n, 20, n)
    for inputs in INPUTS[scale]:
        yield case(rivals, "STRIP, inputs", inputs, inputs, 100)


def case(rivals, series: str, size: int, inputs: int, n: int) -> Case:
    """The entropies of `inputs` images with `n` replicas each."""
    data = datasets.load()
    model = build(Cnn(), data.shape, data.classes)
    variables = model.init(jax.random.key(0))
    x, overlays = data.test.image[:inputs], data.clean.image[:n]

    def score(v, x, t):
        return entropies(jax.random.key(0), model, v, x, t, n).mean(1)

    rival = baseline = None
    if rivals is not None:
        net = rivals.cnn().eval()
        left, _ = rivals.tensors(x, data.test.label[:inputs])
        right, _ = rivals.tensors(overlays, data.clean.label[:n])
        rival = partial(rivals.strip, net, left.float() / 255, right.float() / 255)
    if n == 10:
        plain = jax.jit(partial(predict, model))
        baseline = ("inference", partial(plain, *jax.device_put((variables, x))))
    return Case(
        series,
        size,
        score,
        (variables, x, overlays),
        rival,
        forward_flops(model, inputs * n),
        baseline,
    )
