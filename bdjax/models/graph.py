"""What a net's computation tells about its layers: which stand behind a site, which feed it, which
reads it.

All of it is found by tracing, once and without data, so it holds for any net. A layer's array is
named by its path in `variables["params"]`: `("conv_2", "bias")`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bdjax.models.layers import check_site
from bdjax.types import BadInput, Model

Path = tuple[str, ...]


def layers_behind(model: Model, site: str) -> tuple[str, ...]:
    """The layers, keys of `variables["params"]`, that work on what leaves `site`."""
    return tuple(sorted({path[0] for _, paths in _readers(model, site) for path in paths}))


def bias_of(model: Model, site: str) -> Path:
    """The bias, one value a channel, that is added last before `site`."""
    return _nearest(model, site, "bias", 1)


def kernel_into(model: Model, site: str) -> Path:
    """The kernel `[..., C]` that makes the C channels of `site`."""
    return _nearest(model, site, "kernel", 2)


def kernel_out_of(model: Model, site: str) -> Path:
    """The kernel `[..., n·C, K]` that reads the C channels of `site`: of a convolution, or of a
    dense layer on all places.
    """
    channels = _activation(model, site).shape[-1]
    for operation, paths in _readers(model, site):
        found = [path for path in paths if path[-1] == "kernel"]
        if found and _shape(model, found[0])[-2] % channels == 0:
            return found[0]
        if found or operation == "concatenate":
            break
    raise BadInput(
        f"no layer reads site '{site}' alone: choose another site, or neurons by their incoming "
        "weights"
    )


def kernel_of_logits(model: Model) -> Path:
    """The kernel `[..., K]` that makes the logits."""
    jaxpr, paths = _trace(model, lambda v, x: model.apply(v, x).logits)
    for path in (paths[v] for v in _needed(jaxpr) if v in paths):
        if path[-1] == "kernel" and _shape(model, path)[-1] == model.classes:
            return path
    raise BadInput("no layer of the net has a kernel for its logits")


def leaf(params: Any, path: Path) -> jax.Array:
    """The array at `path`."""
    return flatten_dict(params)[path]  # type: ignore[return-value]


def with_leaf(params: Any, path: Path, value: jax.Array) -> Any:
    """`params` with `value` at `path`."""
    return unflatten_dict({**flatten_dict(params), path: value})


def _trace(model: Model, fn: Callable, *more: Any) -> tuple[Any, dict[Any, Path]]:
    """The computation of `fn(variables, x, *more)`, and the path of each of its inputs that is a
    parameter.
    """
    rest = dict(jax.eval_shape(model.init, jax.random.key(0)))
    params = flatten_dict(rest.pop("params"))
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)

    def flat(params, rest, x, *more):
        return fn({**rest, "params": unflatten_dict(params)}, x, *more)

    jaxpr = jax.make_jaxpr(flat)(params, rest, x, *more).jaxpr
    # a dict's leaves come in the order of its keys
    return jaxpr, dict(zip(jaxpr.invars, sorted(params)))


def _readers(model: Model, site: str) -> list[tuple[str, list[Path]]]:
    """Each operation on what leaves `site`, up to the logits: its name, and the parameters that it
    takes.
    """
    act = _activation(model, site)
    jaxpr, paths = _trace(
        model, lambda v, x, act: model.apply(v, x, edits={site: lambda _: act}).logits, act
    )
    *_, image, act = jaxpr.invars
    behind, aside, made_of, found = {act}, {image}, {v: [path] for v, path in paths.items()}, []
    for step in jaxpr.eqns:
        inputs = _variables(step.invars)
        own = [path for v in inputs for path in made_of.get(v, [])]
        if behind.intersection(inputs):
            behind.update(step.outvars)
            found.append((step.primitive.name, own))
        elif aside.intersection(inputs):
            aside.update(step.outvars)
        else:  # made of parameters alone: a bias in the shape of a feature map
            made_of.update(dict.fromkeys(step.outvars, own))
    return found


def _activation(model: Model, site: str) -> jax.ShapeDtypeStruct:
    check_site(model, site)
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    return jax.eval_shape(lambda x: model.apply(model.init(jax.random.key(0)), x).acts[site], x)


def _nearest(model: Model, site: str, name: str, axes: int) -> Path:
    """The parameter `name` whose last axis, of `axes` or more, is the channels, and which acts last
    before `site`.
    """
    channels = _activation(model, site).shape[-1]
    jaxpr, paths = _trace(model, lambda v, x: model.apply(v, x).acts[site])
    for path in (paths[v] for v in _needed(jaxpr) if v in paths):
        shape = _shape(model, path)
        if path[-1] == name and shape[-1] == channels and len(shape) >= axes:
            return path
    raise BadInput(
        f"no layer before site '{site}' has a {name} for its {channels} channels: choose another "
        "site"
    )


def _shape(model: Model, path: Path) -> tuple[int, ...]:
    return leaf(jax.eval_shape(model.init, jax.random.key(0))["params"], path).shape


def _variables(inputs: Any) -> list[Any]:
    return [v for v in inputs if not hasattr(v, "val")]  # the others are literals


def _needed(jaxpr: Any) -> list[Any]:
    """What the outputs are made of, the last used first."""
    needed = dict.fromkeys(_variables(jaxpr.outvars))
    for step in reversed(jaxpr.eqns):
        if any(v in needed for v in step.outvars):
            needed.update(dict.fromkeys(v for v in _variables(step.invars) if v not in needed))
    return list(needed)
