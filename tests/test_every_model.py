"""Every registered net does as it says, and nets that do not are found out."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import planted
import pytest
from flax.linen import relu

from bdjax import registry, testing
from bdjax.models.layers import Net, batch_norm, conv, dense, site
from bdjax.registry import pytree, static
from bdjax.types import BadInput, Size

ENTRIES = registry.entries("model")
MOST = 8
"""Units and channels: what is wider is narrowed, where the net can be built so."""


def small(net):
    """`net` with its widths, in fields of whole numbers, at most `MOST`."""

    def less(value):
        if isinstance(value, tuple):
            return tuple(map(less, value))
        return min(value, MOST) if type(value) is int else value

    narrow = {field.name: less(getattr(net, field.name)) for field in dataclasses.fields(net)}
    try:
        smaller = dataclasses.replace(net, **narrow)
        testing.smallest(smaller)
    except (BadInput, AssertionError):
        return net
    return smaller


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_net_does_as_it_says(entry):
    testing.check_model(small(entry.cls()), thorough=False)


@pytest.mark.long
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_net_does_as_it_says_at_every_site_and_uncompiled(entry):
    testing.check_model(small(entry.cls()))


# --- Nets that do not as they say ---


@pytree
class Sound(Net):
    """A sound net. The broken ones differ from it in one thing."""

    def layers(self, x, train, classes):
        x = site("conv_last", relu(batch_norm(conv(x, 4, 3, "conv"), train, "norm")))
        return self.end(dense(site("penultimate", x.mean((1, 2))), classes, "logits"))

    def end(self, x):
        return x


BROKEN = {}
broken = functools.partial(planted.broken, BROKEN)


@broken("NaN")
class NotANumber(Sound):
    def end(self, x):
        return jnp.log(-1 - x**2)


@broken(r"float32\[2, 6\], not float32\[2, 5\]")
class TooMany(Sound):
    def end(self, x):
        return jnp.concatenate([x, x[:, :1]], 1)


@broken("neither conv_last nor penultimate")
class Blind(Sound):
    def layers(self, x, train, classes):
        return dense(site("other", x), classes, "logits")


@broken("side by side")
class Fickle(Sound):
    def end(self, x):
        return x + np.float32(np.random.default_rng().uniform(1, 2))


@broken("statistics of BatchNorm alone")
class Asleep(Sound):
    def layers(self, x, train, classes):
        return super().layers(x, False, classes)


@broken("cannot be compiled")
class Peeks(Sound):
    def end(self, x):
        return x if x.shape[0] == 1 or x[0, 0] > 0 else -x


@broken("width=0 is accepted")
class Unchecked(Sound):
    width: Size = static(3)

    def check(self, shape, classes):
        pass


def test_the_sound_net_passes():
    testing.check_model(Sound())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_net_is_found_out(name):
    planted.found_out(testing.check_model, *BROKEN[name])
