"""Training the CNN of Shamshiri & Sohn on a poisoned Fashion-MNIST sample, one epoch, batches of 32 and 128."""

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, advance, begin, poisoned_set
from benchmarks.measure import Case, flops


def cases(rivals) -> list[Case]:
    found = []
    for batch, images in ((32, 960), (128, 2560)):
        data = datasets.load(train_size=images * 10 // 9 + 10)
        split = data.train[:images]
        model = build(Cnn(), data.shape, data.classes)
        key, recipe = jax.random.key(0), Recipe(batch=batch, epochs=1)
        state = begin(key, model, recipe)

        @jax.jit
        def epoch(key, state, split, model=model, recipe=recipe):
            return advance(key, state, model, recipe, poisoned_set(key, split, BadNets(), 10), epochs=1)

        placed = jax.device_put(split)
        x = jax.numpy.zeros((batch, *data.shape))
        forward = flops(lambda v, x, model=model: model.apply(v, x).logits, state.variables, x)
        rival = None
        if rivals is not None:
            image, label = rivals.tensors(split.image, split.label)
            net, poisoned = rivals.cnn(), rivals.torch.rand(images) < 0.1
            rival = lambda net=net, i=image, y=label, p=poisoned, b=batch: rivals.train(net, i, y, p, b)  # noqa: E731
        ours = lambda epoch=epoch, state=state, placed=placed: epoch(key, state, placed)  # noqa: E731
        found.append(Case(f"train B={batch}", ours, rival, 3 * forward * (images // batch)))
    return found
