"""Trigger inversion: which small change sends every image to one label? Shared by Neural Cleanse
and its kin.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax import mesh
from bdjax.metrics import labels
from bdjax.types import Model, Variables

BOUND = 6.0
"""How far from 0 raw values go. In float32 tanh(8.2) is 1 and its gradient 0; at 6 the gradient is
still 1e-5, and `squash` 6e-6 away from 0 or 1.
"""


FOLDED = 5
SMALL = 8_000_000
"""On two cores five labels at a time are 1.2 to 1.4 times as fast, as weights are read once for all
of them, as long as the activations of a batch take less than this many bytes; more leave the cache.
"""


class Trigger(NamedTuple):
    """Something to paste: opacity `mask: [H, W, 1]`, one for all channels, and `pattern: [H, W,
    C]`, both in [0, 1].
    """

    mask: jax.Array
    pattern: jax.Array


def stamp(trigger: Trigger, x: jax.Array) -> jax.Array:
    """A(x) = (1 − m)⊙x + m⊙Δ for `x: [B, H, W, C]`."""
    mask, pattern = trigger.mask[None], trigger.pattern[None]
    return (1 - mask) * x + mask * pattern


def folded(lanes: int | None, model: Model, variables: Variables, batch: int) -> int | None:
    """How many searches through one net go side by side, their images in one batch: `lanes` if
    given; else by the size of the activations of a batch on a CPU, and the device's default (None)
    elsewhere.
    """
    if lanes is not None or mesh.platform() != "cpu":
        return lanes
    x = jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32)
    acts = jax.eval_shape(lambda x: model.apply(variables, x).acts, x)
    return FOLDED if mesh.bytes_of(acts) <= SMALL else 1


def reaches(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Which rows of `logits: [B, K]` are called `label: []`."""
    return labels(logits) == label


def squash(raw: Any) -> Any:
    """From the real line, where it is optimised, to (0, 1): tanh(·)/2 + ½ of each leaf of the
    pytree `raw`. Beyond ±`BOUND` value and gradient are those at the bound, so that nothing is
    stuck; `within(-BOUND, BOUND)` in the rule of its optimiser keeps a raw value from going far.
    """

    def one(v):
        # The bound passes the gradient on as it is: v - v is 0, its gradient 1.
        inside = jnp.clip(jax.lax.stop_gradient(v), -BOUND, BOUND) + (v - jax.lax.stop_gradient(v))
        return jnp.tanh(inside) / 2 + 0.5

    return jax.tree.map(one, raw)


def unsquash(value: Any) -> Any:
    """The inverse of `squash`: raw values within ±`BOUND`."""
    end = math.tanh(BOUND)
    return jax.tree.map(lambda v: jnp.arctanh(jnp.clip(2 * v - 1, -end, end)), value)


def random_trigger(key: jax.Array, shape: tuple[int, int, int]) -> Trigger:
    """Mask and pattern uniform in [0, 1] for images of `shape` (H, W, C)."""
    key_mask, key_pattern = jax.random.split(key)
    return Trigger(
        jax.random.uniform(key_mask, (*shape[:2], 1)), jax.random.uniform(key_pattern, shape)
    )


def within(low: Any, high: Any) -> optax.GradientTransformation:
    """The last link of a chain: the step ends inside [low, high]; both are pytrees like the
    parameters.
    """

    def shorten(updates, params):
        return jax.tree.map(
            lambda u, p, a, b: jnp.clip(p + u, a, b) - p, updates, params, low, high
        )

    return optax.stateless(shorten)


def descend(
    loss: Callable, params: Any, opt_state: Any, items: Any, rule: optax.GradientTransformation
) -> Any:
    """One optimiser step on `loss(params, item) -> (value, aux)` for each of the leading-axis
    `items`.

    `params` is any pytree: a raw trigger, a feature-space mask, a generator. Returns `((params,
    opt_state), aux)`, aux stacked.
    """

    def step(carry, item):
        params, opt_state = carry
        grads, aux = jax.grad(loss, has_aux=True)(params, item)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction mixes float and int
            updates, opt_state = rule.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), aux

    return jax.lax.scan(step, (params, opt_state), items)
