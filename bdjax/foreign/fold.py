"""Masks of channels made part of the weights, where that leaves the net exactly what it was."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bdjax.models.layers import Model
from bdjax.types import BadInput, Variables

SAME = 1e-5
"""The largest difference, over the largest |logit|, of logits that are the same."""
BATCH, DRAWS = 4, 3


def folded(model: Model, variables: Variables) -> Variables:
    """`variables` without masks: each is multiplied into the layer that makes its channels, or,
    where one layer alone reads them, into that one. Raises `BadInput`, naming the site, where
    neither gives the same net.

    That they are the same is tried on random images, on nets of the same kind with other weights,
    and with other channels masked, as those that a pruning takes answer to few images at all:
    numbers drawn so agree by chance only where the nets are equal.
    """
    left: dict[str, Any] = dict(variables.get("masks", {}))
    bare = {k: v for k, v in variables.items() if k != "masks"}
    for site in [name for name in model.sites[::-1] if name in left]:  # the last one first
        mask = left.pop(site)
        if np.all(np.asarray(mask) == 1):
            continue
        bare = _one(model, bare, site, jnp.asarray(mask), left)
    return bare


def _one(model: Model, variables: Any, site: str, mask: jax.Array, others: Any) -> Variables:
    draws = [_drawn(variables, seed) for seed in range(DRAWS)]
    x = jax.random.uniform(jax.random.key(0), (BATCH, *model.shape))
    values = np.unique([1.0, *np.asarray(mask)]).astype(np.float32)
    masks = jnp.asarray(np.random.default_rng(0).choice(values, (DRAWS, len(mask))))
    logits = jax.jit(lambda v, masks: model.apply({**v, "masks": masks}, x).logits)
    wanted = [logits(one, {**others, site: other}) for one, other in zip(draws, masks)]

    def same(change: Any) -> bool:
        for one, other, want in zip(draws, masks, wanted):
            found = logits(change(one, other), others)
            if not np.abs(found - want).max() <= SAME * max(np.abs(want).max(), 1e-30):
                return False
        return True

    for change in _changes(variables, len(mask)):
        if same(change):
            return change(variables, mask)
    raise BadInput(
        f"the mask of '{site}' cannot be folded into the weights: no layer makes or reads its "
        "channels alone (as on a residual sum); the net stays available as one of bdjax"
    )


def _drawn(variables: Variables, seed: int) -> Any:
    """Variables of a net of the same kind: each array shaken by its own size."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(variables))))

    def shake(path: Any, leaf: Any) -> jax.Array:
        leaf, size = jnp.asarray(leaf), 0.3 * jnp.abs(jnp.asarray(leaf)).mean() + 1e-3
        moved = leaf + size * jax.random.normal(next(keys), leaf.shape, leaf.dtype)
        return jnp.abs(moved) if path[-1].key == "var" else moved

    return jax.tree_util.tree_map_with_path(shake, variables)


def _changes(variables: Variables, count: int) -> Iterator[Any]:
    """Ways of multiplying a mask of `count` channels into one layer, `change(variables, mask)`: the
    channels that it makes, each layer in turn, the last first; then those that it reads.
    """
    params: dict[Any, Any] = flatten_dict(variables["params"])  # type: ignore[assignment]
    layers: dict[Any, list[Any]] = {}
    for path in params:
        layers.setdefault(path[:-1], []).append(path)
    for paths in list(layers.values())[::-1]:
        own = [p for p in paths if params[p].ndim and params[p].shape[-1] == count]
        if own and len(own) == len(paths):
            yield _scaled(own, lambda mask: mask)
    for path, leaf in params.items():
        if leaf.ndim < 2 or leaf.shape[-2] % count:
            continue
        repeats = leaf.shape[-2] // count
        yield _scaled([path], lambda mask, n=repeats: jnp.tile(mask, n)[:, None])
        if repeats > 1:  # laid flat with the channels first
            yield _scaled([path], lambda mask, n=repeats: jnp.repeat(mask, n)[:, None])


def _scaled(paths: list[Any], factor: Any) -> Any:
    def change(variables: Any, mask: jax.Array) -> Any:
        params: dict[Any, Any] = dict(flatten_dict(variables["params"]))  # type: ignore[arg-type]
        by = factor(mask)
        params |= {p: params[p] * jnp.broadcast_to(by, params[p].shape) for p in paths}
        return {**variables, "params": unflatten_dict(params)}

    return change
