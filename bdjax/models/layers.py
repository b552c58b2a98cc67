"""From a few lines of layers to a `Model`: `Site` marks a place to look, cut or push; `forward` is
the one pure pass over them.

A family of nets is a `Net` with one method, `layers(x, train, classes)`, written with the helpers
below (any Linen module works beside them). Keep `nn.scan` and `nn.remat` away from a site: the
interceptor could not see through them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from bdjax import mesh
from bdjax.models.conv import conv_general_dilated, max_pool
from bdjax.registry import door, static, validate
from bdjax.types import BadInput, Count, Edits, Model, Output, Variables, check_variables

FOREIGN = (
    errors.ScopeParamNotFoundError, errors.ScopeParamShapeError, errors.ScopeCollectionNotFound,
    errors.ScopeVariableNotFoundError, errors.InvalidScopeError,
)  # fmt: skip
"""What Flax raises on variables that are another net's."""
LECUN, HE, GLOROT = (
    nn.initializers.lecun_normal(),
    nn.initializers.he_normal(),
    nn.initializers.glorot_uniform(),
)
"""Kernel initialisers: variance 1/fan-in (the default here); 2/fan-in, which keeps a deep stack of
ReLU layers alive; 2/(fan-in + fan-out), the default of Keras.
"""


class Site(nn.Module):
    """The identity, with a name by which defenses find this activation."""

    def __call__(self, x):
        return x


def site(name: str, x: jax.Array) -> jax.Array:
    """Marks `x` as the activation `name`."""
    return Site(name=f"site_{name}")(x)


def act(name: str, x: jax.Array, fn: Callable[[jax.Array], jax.Array] = nn.relu) -> jax.Array:
    """`fn(x)` with a site on each side: `{name}_pre` before and `name` after it."""
    return site(name, fn(site(f"{name}_pre", x)))


def conv(
    x,
    features: int,
    size: int,
    name: str,
    *,
    stride: int = 1,
    padding: str | Any = "SAME",
    groups: int = 1,
    bias: bool = True,
    init: nn.initializers.Initializer = LECUN,
):
    """A `size`×`size` convolution whose gradients are fast on CPU too."""
    layer = nn.Conv(
        features, (size, size), (stride, stride), padding, feature_group_count=groups,
        use_bias=bias, name=name, kernel_init=init, conv_general_dilated=conv_general_dilated,
    )  # fmt: skip
    return layer(x)


def dense(x, features: int, name: str, *, init: nn.initializers.Initializer = LECUN):
    """A fully connected layer on flattened features."""
    return nn.Dense(features, kernel_init=init, name=name)(x.reshape(x.shape[0], -1))


def batch_norm(x, train: bool, name: str, *, momentum: float = 0.9, epsilon: float = 1e-5):
    """BatchNorm: batch statistics while training, running ones after."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, name=name
    )(x)


def dropout(x, rate: float, train: bool):
    """Dropout; active only while training."""
    return nn.Dropout(rate, deterministic=not train)(x)


def avg_pool(x, window: int, stride: int | None = None, padding: str = "VALID"):
    """Average pooling."""
    step = stride or window
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by an integer
        return nn.avg_pool(x, (window, window), (step, step), padding)


class Net:
    """Base of the model families. `layers(x, train, classes)` builds the net inside a Linen module;
    pixels come in [0, 1].
    """

    smallest = 1  # pixels of the shorter side

    def preprocess(self, x: jax.Array) -> jax.Array:
        """From pixels in [0, 1] to what the first layer wants."""
        return x

    def layers(self, x: jax.Array, train: bool, classes: int) -> jax.Array:
        raise TypeError(f"{type(self).__name__} must define layers(x, train, classes)")

    def check(self, shape: Sequence[int], classes: int) -> None:
        """Raises `BadInput` where this net cannot take images of `shape`."""
        validate(self)
        if min(shape[:2]) < self.smallest:
            size, least = f"{shape[0]}×{shape[1]}", f"{self.smallest}×{self.smallest}"
            raise BadInput(
                f"images of {size} are too small for {type(self).__name__}: it wants {least} or "
                "more"
            )


class _Linen(nn.Module):
    config: Any
    classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        return self.config.layers(self.config.preprocess(x), train, self.classes)


def forward(
    module: nn.Module,
    variables: Variables,
    x: jax.Array,
    *,
    train: bool = False,
    edits: Edits | None = None,
    key=None,
) -> Output:
    """One pass that returns every site's activation, after its mask (`variables["masks"]`) and its
    edit were applied.

    Activations nobody reads are dead code under jit, and so is all that stands before a site whose
    edit ignores its input.
    """
    check_variables(variables)
    acts: dict[str, jax.Array] = {}
    masks = variables.get("masks", {})
    edits = edits or {}

    def look(call, args, kwargs, context):
        if not isinstance(context.module, Site):
            return call(*args, **kwargs)
        name = context.module.name.removeprefix("site_")  # type: ignore[union-attr]
        (y,) = args
        if name in masks and jnp.shape(masks[name]) not in ((), y.shape[-1:], y.shape):
            raise BadInput(f"the mask of '{name}' has shape {jnp.shape(masks[name])}, not [C]")
        y = y * jnp.broadcast_to(masks[name], y.shape) if name in masks else y
        acts[name] = edits[name](y) if name in edits else y
        return acts[name]

    state = {name: value for name, value in variables.items() if name != "masks"}
    rngs = None if key is None else {"dropout": key}
    mutable = [name for name in state if name != "params"] if train else []
    try:
        with nn.intercept_methods(look):
            logits, updated = module.apply(state, x, train, mutable=mutable, rngs=rngs)
    except FOREIGN as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"the variables are not those of this net: {why}") from error
    if unknown := (set(edits) | set(masks)) - set(acts):
        raise BadInput(
            f"the model has no site '{sorted(unknown)[0]}': take one of {', '.join(acts)}"
        )
    return Output(logits, acts, {**variables, **updated})


@door
def build(net: Net, shape: Sequence[int], classes: Count) -> Model:
    """The `Model` of a configured family for images of `shape` (H, W, C). The same arguments give
    the same object.
    """
    validate(net)
    return _built(net, tuple(shape), int(classes))


@functools.lru_cache(maxsize=256)
def _built(net: Net, shape: tuple[int, int, int], classes: int) -> Model:
    if len(shape) != 3 or min(shape) < 1 or classes < 1:
        raise BadInput(
            f"a net for images of shape {shape} and {classes} classes: give (H, W, C) and the "
            "number of classes"
        )
    net.check(shape, classes)
    module = _Linen(net, classes)
    probe = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def init(key: jax.Array) -> Variables:
        return module.init(key, jnp.zeros((1, *shape)), False)

    def apply(
        variables: Variables,
        x: jax.Array,
        *,
        train: bool = False,
        edits: Edits | None = None,
        key=None,
    ) -> Output:
        return forward(module, variables, x, train=train, edits=edits, key=key)

    sites: list[str] = []  # eval_shape would return a dict in alphabetical order
    try:
        jax.eval_shape(lambda k, x: sites.extend(apply(init(k), x).acts), jax.random.key(0), probe)
        size = mesh.bytes_of(jax.eval_shape(init, jax.random.key(0)))
        mesh.fits(f"{type(net).__name__} with its gradient", 2 * size)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{type(net).__name__} cannot take images of shape {shape}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    return Model(init, apply, shape, classes, tuple(sites))


def default_site(model: Model) -> str:
    """The last convolution; the penultimate layer of a net without convolutions."""
    return "conv_last" if "conv_last" in model.sites else "penultimate"


def check_site(model: Model, site: str) -> None:
    """Raises `BadInput` where `model` has no such site."""
    if site not in model.sites:
        raise BadInput(f"the model has no site '{site}': take one of {', '.join(model.sites)}")


__all__ = [
    "GLOROT",
    "HE",
    "LECUN",
    "Net",
    "Site",
    "act",
    "avg_pool",
    "batch_norm",
    "build",
    "check_site",
    "conv",
    "default_site",
    "dense",
    "dropout",
    "forward",
    "max_pool",
    "site",
    "static",
]
