"""What the operators of ONNX compute, opset 11 to the newest: one small function each.

Shape arithmetic runs on known numbers, in NumPy; all else in JAX. Where a feature map stands NHWC,
`Value.order` says so, and the functions keep it there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.foreign.graph import (
    ONNX,
    Dropout,
    Node,
    Order,
    Value,
    channels_last,
    numbers,
    numpy_of,
    operator,
    ordered,
    plain,
)
from bdjax.models.conv import conv_general_dilated, max_pool
from bdjax.types import BadInput

op = functools.partial(operator, ONNX)


# --- Number by number ---


def _each(fn: Callable[[Any], Any]) -> Callable[..., Value]:
    """An operator that maps each number, wherever it stands."""
    return lambda n, x, *_: Value(fn(jnp.asarray(x.array)), x.order)


for _name, _fn in {
    "Relu": jax.nn.relu, "Sigmoid": jax.nn.sigmoid, "Tanh": jnp.tanh, "Erf": lax.erf,
    "Softplus": jax.nn.softplus, "Softsign": jax.nn.soft_sign, "Selu": jax.nn.selu,
    "HardSwish": jax.nn.hard_swish, "Mish": jax.nn.mish,
}.items():  # fmt: skip
    op(_name)(_each(_fn))


def _either(name: str) -> Callable[..., Value]:
    """An operator that NumPy and JAX call `name`; of known numbers it is known."""
    return lambda n, x: Value(getattr(numpy_of(x), name)(x.array), x.order)


for _name, _fn in {
    "Abs": "abs", "Neg": "negative", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Floor": "floor",
    "Ceil": "ceil", "Round": "round", "Sign": "sign", "Sin": "sin", "Cos": "cos", "Tan": "tan",
    "Reciprocal": "reciprocal", "Not": "logical_not", "IsNaN": "isnan", "Atan": "arctan",
}.items():  # fmt: skip
    op(_name)(_either(_fn))


@op("Identity")
def identity(n: Node, x: Value) -> Value:
    return x


@op("Dropout")
def dropout(n: Node, x: Value, ratio: Value | None = None, mode: Value | None = None) -> Value:
    rate = float(n.attr("ratio", 0.5) if ratio is None else plain(ratio))
    return Value(Dropout(rate)(x.array, n.train), x.order) if n.train else x


@op("LeakyRelu")
def leaky_relu(n: Node, x: Value) -> Value:
    return Value(jax.nn.leaky_relu(x.array, n.attr("alpha", 0.01)), x.order)


@op("ThresholdedRelu")
def thresholded_relu(n: Node, x: Value) -> Value:
    return Value(jnp.where(x.array > n.attr("alpha", 1.0), x.array, 0.0), x.order)


@op("Elu")
def elu(n: Node, x: Value) -> Value:
    return Value(jax.nn.elu(x.array, n.attr("alpha", 1.0)), x.order)


@op("Celu")
def celu(n: Node, x: Value) -> Value:
    return Value(jax.nn.celu(x.array, n.attr("alpha", 1.0)), x.order)


@op("Selu")
def selu(n: Node, x: Value) -> Value:
    alpha, gamma = n.attr("alpha", 1.6732632423543772), n.attr("gamma", 1.0507009873554805)
    return Value(gamma * jax.nn.elu(x.array, alpha), x.order)


@op("HardSigmoid")
def hard_sigmoid(n: Node, x: Value) -> Value:
    line = n.attr("alpha", 0.2) * x.array + n.attr("beta", 0.5)
    return Value(jnp.clip(line, 0.0, 1.0), x.order)


@op("Binary")
def binary(n: Node, x: Value) -> Value:
    """The logits of two classes, of which the net gives one number: not ONNX's, see `assemble`."""
    return Value(jnp.concatenate([jnp.zeros_like(plain(x)), plain(x)], -1))


@op("Gelu")
def gelu(n: Node, x: Value) -> Value:
    return Value(jax.nn.gelu(x.array, n.attr("approximate", "none") == "tanh"), x.order)


@op("Swish")
def swish(n: Node, x: Value) -> Value:
    return Value(x.array * jax.nn.sigmoid(n.attr("alpha", 1.0) * x.array), x.order)


@op("Clip")
def clip(n: Node, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    least = n.attr("min") if low is None else plain(low)
    most = n.attr("max") if high is None else plain(high)
    return Value(numpy_of(x, low, high).clip(x.array, least, most), x.order)


KINDS = {1: "f", 2: "i", 3: "i", 4: "i", 5: "i", 6: "i", 7: "i", 9: "b", 10: "f", 11: "f"} | {
    12: "i", 13: "i", 16: "f",
}  # fmt: skip
"""The types of ONNX: floats of any width are float32 here, whole numbers int32 (int64 if known)."""


@op("Cast")
def cast(n: Node, x: Value) -> Value:
    if (kind := KINDS.get(n.attr("to", 1))) is None:
        raise BadInput(f"numbers of type {n.attr('to')} are not known here")
    known = isinstance(x.array, np.ndarray)
    return Value(x.array.astype(_type(kind, known)), x.order)


@op("CastLike")
def cast_like(n: Node, x: Value, like: Value) -> Value:
    kind = np.dtype(like.array.dtype).kind
    return Value(x.array.astype(_type(kind, isinstance(x.array, np.ndarray))), x.order)


def _type(kind: str, known: bool) -> Any:
    return {"f": np.float32, "b": np.bool_}.get(kind, np.int64 if known else np.int32)


# --- Several arrays, shapes broadcast ---


def aligned(*values: Value) -> tuple[list[Any], Order | None]:
    """The arrays with their axes in one order, that of the first of the highest rank that depends
    on the image.
    """
    rank = max(len(v.shape) for v in values)
    lead = [v for v in values if len(v.shape) == rank and not isinstance(v.array, np.ndarray)]
    order = next((v.order for v in lead if v.order is not None), None)
    return [_in_order(v, rank, order) for v in values], order


def _in_order(value: Value, rank: int, order: Order | None) -> Any:
    if order is None or value.order == order:
        return value.array if value.order == order else plain(value)
    array = plain(value)
    if array.ndim == 0:
        return array
    return array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(order)


def _pairwise(name: str) -> Callable[..., Value]:
    def fn(n: Node, *values: Value) -> Value:
        arrays, order = aligned(*values)
        return Value(functools.reduce(getattr(numpy_of(*values), name), arrays), order)

    return fn


for _name, _fn in {
    "Add": "add", "Sub": "subtract", "Mul": "multiply", "Max": "maximum", "Min": "minimum",
    "Sum": "add", "Equal": "equal", "Less": "less", "Greater": "greater", "And": "logical_and",
    "LessOrEqual": "less_equal", "GreaterOrEqual": "greater_equal", "Or": "logical_or",
    "Xor": "logical_xor",
}.items():  # fmt: skip
    op(_name)(_pairwise(_fn))


@op("Div")
def div(n: Node, x: Value, y: Value) -> Value:
    (a, b), order = aligned(x, y)
    if np.dtype(a.dtype).kind in "iu":  # towards zero
        lib = numpy_of(x, y)
        return Value(lib.trunc(a / b).astype(a.dtype), order)
    return Value(a / b, order)


@op("Pow")
def power(n: Node, x: Value, y: Value) -> Value:
    (a, b), order = aligned(x, y)
    if isinstance(b, np.ndarray) and b.size == 1 and float(b.item()).is_integer():
        return Value(a ** int(b.item()), order)  # its gradient is finite at 0
    return Value(numpy_of(x, y).power(a, b).astype(a.dtype), order)


@op("Mod")
def mod(n: Node, x: Value, y: Value) -> Value:
    (a, b), order = aligned(x, y)
    lib = numpy_of(x, y)
    return Value((lib.fmod if n.attr("fmod", 0) else lib.mod)(a, b), order)


@op("Mean")
def mean(n: Node, *values: Value) -> Value:
    arrays, order = aligned(*values)
    return Value(functools.reduce(jnp.add, arrays) / len(arrays), order)


@op("PRelu")
def prelu(n: Node, x: Value, slope: Value) -> Value:
    (a, b), order = aligned(x, slope)
    return Value(jnp.where(a < 0, a * b, a), order)


@op("Where")
def where(n: Node, condition: Value, x: Value, y: Value) -> Value:
    (c, a, b), order = aligned(condition, x, y)
    return Value(numpy_of(condition, x, y).where(c, a, b), order)


# --- Products ---


def _pads(n: Node, spatial: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after, along each of the image's axes."""
    rank = len(spatial)
    strides, dilations = n.attr("strides", [1] * rank), n.attr("dilations", [1] * rank)
    auto = n.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = n.attr("pads", [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return list(zip(pads[:rank], pads[rank:], strict=True))
    found = []
    for length, kernel, step, spread in zip(spatial, size, strides, dilations, strict=True):
        out = -(-length // step)
        total = max(0, (out - 1) * step + (kernel - 1) * spread + 1 - length)
        less, more = total // 2, total - total // 2
        found.append((less, more) if auto == "SAME_UPPER" else (more, less))
    return found


@op("Conv")
def conv(n: Node, x: Value, w: Value, b: Value | None = None) -> Value:
    rank = len(x.shape)
    last = channels_last(rank)
    kernel = ordered(w, (*range(2, rank), 1, 0))
    size = kernel.shape[:-2]
    array = ordered(x, last)
    letters = "DHW"[-(rank - 2) :] if rank < 6 else ""
    out = conv_general_dilated(
        array,
        jnp.asarray(kernel),
        tuple(n.attr("strides", [1] * (rank - 2))),
        _pads(n, array.shape[1:-1], size),
        rhs_dilation=tuple(n.attr("dilations", [1] * (rank - 2))),
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=n.attr("group", 1),
    )
    return Value(out if b is None else out + plain(b), last)


@op("ConvTranspose")
def conv_transpose(n: Node, x: Value, w: Value, b: Value | None = None) -> Value:
    rank = len(x.shape)
    last, group = channels_last(rank), n.attr("group", 1)
    kernel, array = plain(w), ordered(x, last)  # [C, O / group, h, w]
    size = kernel.shape[2:]
    strides, dilations = n.attr("strides", [1] * len(size)), n.attr("dilations", [1] * len(size))
    extra = n.attr("output_padding", [0] * len(size))
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilations)]
    lengths = zip(array.shape[1:-1], strides, reach, extra)
    whole = [(length - 1) * s + r + e for length, s, r, e in lengths]
    auto = n.attr("auto_pad", "NOTSET")
    if (wanted := n.attr("output_shape")) or auto.startswith("SAME"):
        wanted = wanted or [length * s for length, s in zip(array.shape[1:-1], strides)]
        totals = [o - w for w, o in zip(wanted[-len(size) :], whole)]
        halves = [(t - t // 2, t // 2) if t > 0 else (0, t) for t in totals]
        pads = [(b, a) for a, b in halves] if auto == "SAME_UPPER" else halves
    else:
        pads = _pads(n, array.shape[1:-1], size)
    edges = [(r - 1 - a, r - 1 - b + e) for r, (a, b), e in zip(reach, pads, extra)]
    flipped = jnp.flip(jnp.asarray(kernel), range(2, rank))
    # [group, C / group, O / group, …] to […, C / group, O]
    grouped = flipped.reshape(group, -1, *kernel.shape[1:])
    placed = jnp.moveaxis(grouped, (1, 0, 2), (-3, -2, -1))
    letters = "DHW"[-len(size) :]
    out = lax.conv_general_dilated(
        array,
        placed.reshape(*size, kernel.shape[0] // group, -1),
        [1] * len(size),
        edges,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=group,
    )
    return Value(out if b is None else out + plain(b), last)


@op("Gemm")
def gemm(n: Node, a: Value, b: Value, c: Value | None = None) -> Value:
    x = plain(a).T if n.attr("transA", 0) else plain(a)
    y = ordered(b, (1, 0)) if n.attr("transB", 0) else plain(b)
    lib = numpy_of(a, b)
    out = n.attr("alpha", 1.0) * lib.matmul(x, y) if n.attr("alpha", 1.0) != 1 else lib.matmul(x, y)
    if c is None:
        return Value(out)
    beta = n.attr("beta", 1.0)
    return Value(out + (plain(c) if beta == 1 else beta * plain(c)))


@op("MatMul")
def matmul(n: Node, a: Value, b: Value) -> Value:
    return Value(numpy_of(a, b).matmul(plain(a), plain(b)))


@op("Einsum")
def einsum(n: Node, *values: Value) -> Value:
    return Value(numpy_of(*values).einsum(n.attr("equation"), *map(plain, values)))


@op("Attention")
def attention(n: Node, q: Value, k: Value, v: Value, mask: Value | None = None, *past: Any) -> Any:
    if any(one is not None for one in past) or n.attr("softcap", 0.0) or len(n.outputs) > 1:
        raise BadInput("attention with a past, a softcap or its scores is not known here")
    heads = n.attr("q_num_heads", 0), n.attr("kv_num_heads", 0), n.attr("kv_num_heads", 0)
    parts = [_heads(plain(x), count) for x, count in zip((q, k, v), heads)]
    query, key, value = parts
    if (many := query.shape[1] // key.shape[1]) > 1:
        key, value = (jnp.repeat(one, many, axis=1) for one in (key, value))
    scale = n.attr("scale") or 1 / math.sqrt(query.shape[-1])
    scores = jnp.einsum("bhqd,bhkd->bhqk", query * scale, key)
    if mask is not None:
        given = plain(mask)
        scores = jnp.where(given, scores, -jnp.inf) if given.dtype == bool else scores + given
    if n.attr("is_causal", 0):
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    open_ = jnp.isfinite(scores).any(-1, keepdims=True)  # else nothing may be looked at
    shares = jnp.where(open_, jax.nn.softmax(jnp.where(open_, scores, 0.0), -1), 0.0)
    out = jnp.einsum("bhqk,bhkd->bhqd", shares, value)
    if plain(q).ndim == 3:
        out = out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)
    return Value(out)


def _heads(x: Any, count: int) -> Any:
    if x.ndim == 4:
        return x
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


# --- Pooling ---


def _windows(n: Node, x: Value) -> tuple[Any, list[int], list[int], list[tuple[int, int]]]:
    """The array NHWC, the windows' size and strides, and the padding, with `ceil_mode` in it."""
    array = ordered(x, channels_last(len(x.shape)))
    size = list(n.attr("kernel_shape"))
    strides, dilations = n.attr("strides", [1] * len(size)), n.attr("dilations", [1] * len(size))
    pads = _pads(n, array.shape[1:-1], size)
    if n.attr("ceil_mode", 0):
        for i, (low, high) in enumerate(pads):
            reach, length = (size[i] - 1) * dilations[i] + 1, array.shape[1 + i]
            out = -(-(length + low + high - reach) // strides[i]) + 1
            if (out - 1) * strides[i] >= length + low:  # a window would begin in the padding
                out -= 1
            pads[i] = (low, max(high, (out - 1) * strides[i] + reach - length - low))
    return array, size, list(strides), pads


def _reduce_window(array: Any, start: Any, fn: Any, size, strides, pads, dilations) -> Any:
    return lax.reduce_window(
        array, start, fn, (1, *size, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)],
        window_dilation=(1, *dilations, 1),
    )  # fmt: skip


@op("MaxPool")
def max_pooling(n: Node, x: Value) -> Value:
    if len(n.outputs) > 1:
        raise BadInput("the places of the maxima are not known here")
    array, size, strides, pads = _windows(n, x)
    last, dilations = channels_last(array.ndim), n.attr("dilations", [1] * len(size))
    even = len(size) == 2 and size == strides == size[::-1] and set(dilations) == {1}
    if even and not any(map(any, pads)):
        return Value(max_pool(array, size[0]), last)
    return Value(_reduce_window(array, -jnp.inf, lax.max, size, strides, pads, dilations), last)


@op("AveragePool")
def average_pooling(n: Node, x: Value) -> Value:
    array, size, strides, pads = _windows(n, x)
    last, dilations = channels_last(array.ndim), n.attr("dilations", [1] * len(size))
    how = size, strides, pads, dilations
    total = _reduce_window(array, 0.0, lax.add, *how)
    if not any(map(any, pads)):
        return Value(total / math.prod(size), last)
    counted = np.ones((1, *array.shape[1:-1], 1), np.float32)
    if n.attr("count_include_pad", 0):  # what ceil_mode adds does not count
        given = _pads(n, array.shape[1:-1], size)
        counted = np.pad(counted, [(0, 0), *given, (0, 0)], constant_values=1.0)
        pads = [(0, high - more) for (_, high), (_, more) in zip(pads, given)]
        how = size, strides, pads, dilations
    return Value(total / _reduce_window(jnp.asarray(counted), 0.0, lax.add, *how), last)


@op("GlobalAveragePool")
def global_average_pool(n: Node, x: Value) -> Value:
    array = ordered(x, channels_last(len(x.shape)))
    axes = tuple(range(1, array.ndim - 1))
    return Value(array.mean(axes, keepdims=True), channels_last(array.ndim))


@op("GlobalMaxPool")
def global_max_pool(n: Node, x: Value) -> Value:
    array = ordered(x, channels_last(len(x.shape)))
    axes = tuple(range(1, array.ndim - 1))
    return Value(array.max(axes, keepdims=True), channels_last(array.ndim))


# --- Normalising ---


@op("BatchNormalization")
def batch_normalization(n: Node, x: Value, scale, bias, mean, var) -> Value:
    if n.attr("training_mode", 0):
        raise BadInput("the net was exported in training mode: export it in evaluation mode")
    last = channels_last(len(x.shape))
    gain = plain(scale) / numpy_of(var).sqrt(plain(var) + n.attr("epsilon", 1e-5))
    return Value((ordered(x, last) - plain(mean)) * gain + plain(bias), last)


def _standardised(x: Any, axes: Sequence[int], epsilon: float) -> Any:
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(axes, keepdims=True) + epsilon)


@op("InstanceNormalization")
def instance_normalization(n: Node, x: Value, scale: Value, bias: Value) -> Value:
    last = channels_last(len(x.shape))
    array = ordered(x, last)
    axes = tuple(range(1, array.ndim - 1))
    normed = _standardised(array, axes, n.attr("epsilon", 1e-5))
    return Value(normed * plain(scale) + plain(bias), last)


@op("GroupNormalization")
def group_normalization(n: Node, x: Value, scale: Value, bias: Value) -> Value:
    last, groups = channels_last(len(x.shape)), n.attr("num_groups")
    array = ordered(x, last)
    parts = array.reshape(*array.shape[:-1], groups, -1)
    axes = (*range(1, array.ndim - 1), array.ndim)
    normed = _standardised(parts, axes, n.attr("epsilon", 1e-5)).reshape(array.shape)
    each = [plain(one) for one in (scale, bias)]
    if each[0].shape[0] == groups != array.shape[-1]:  # before opset 21: one for each group
        each = [jnp.repeat(jnp.asarray(one), array.shape[-1] // groups) for one in each]
    return Value(normed * each[0] + each[1], last)


@op("LayerNormalization")
def layer_normalization(n: Node, x: Value, scale: Value, bias: Value | None = None) -> Value:
    array = plain(x)
    axes = tuple(range(n.attr("axis", -1) % array.ndim, array.ndim))
    normed = _standardised(array, axes, n.attr("epsilon", 1e-5)) * plain(scale)
    return Value(normed if bias is None else normed + plain(bias))


@op("RMSNormalization")
def rms_normalization(n: Node, x: Value, scale: Value) -> Value:
    array = plain(x)
    axes = tuple(range(n.attr("axis", -1) % array.ndim, array.ndim))
    power = (array**2).mean(axes, keepdims=True)
    return Value(array * lax.rsqrt(power + n.attr("epsilon", 1e-5)) * plain(scale))


@op("MeanVarianceNormalization")
def mean_variance_normalization(n: Node, x: Value) -> Value:
    return Value(_standardised(plain(x), tuple(n.attr("axes", [0, 2, 3])), 1e-9))


@op("LRN")
def lrn(n: Node, x: Value) -> Value:
    last, size = channels_last(len(x.shape)), n.attr("size")
    array = ordered(x, last)
    pads = [(0, 0)] * (array.ndim - 1) + [((size - 1) // 2, size // 2)]
    window = (1,) * (array.ndim - 1) + (size,)
    total = lax.reduce_window(array**2, 0.0, lax.add, window, (1,) * array.ndim, pads)
    base = n.attr("bias", 1.0) + n.attr("alpha", 1e-4) / size * total
    return Value(array * base ** -n.attr("beta", 0.75), last)


@op("LpNormalization")
def lp_normalization(n: Node, x: Value) -> Value:
    array, axis = plain(x), n.attr("axis", -1)
    norm = jnp.linalg.norm(array, n.attr("p", 2), axis, keepdims=True)
    return Value(array / jnp.where(norm == 0, 1.0, norm))


def _softmax(fn: Callable[..., Any]) -> Callable[..., Value]:
    def softmax(n: Node, x: Value) -> Value:
        axis = n.attr("axis", -1) % len(x.shape)
        if n.attr("flat", 0):  # before opset 13: over all axes from this one on
            array = plain(x)
            rows = array.reshape(math.prod(array.shape[:axis]), -1)
            return Value(fn(rows, axis=-1).reshape(array.shape))
        return Value(fn(x.array, axis=_axis(x, axis)), x.order)

    return softmax


op("Softmax")(_softmax(jax.nn.softmax))
op("LogSoftmax")(_softmax(jax.nn.log_softmax))


# --- Shapes ---


def _axis(x: Value, axis: int) -> int:
    """Where the graph's axis stands in the array."""
    axis %= max(len(x.shape), 1)
    return axis if x.order is None else x.order.index(axis)


def _axes(n: Node, x: Value, given: Value | None) -> list[int] | None:
    axes = n.attr("axes") if given is None else numbers(given)
    return None if axes is None else [axis % max(len(x.shape), 1) for axis in axes]


@op("Shape")
def shape(n: Node, x: Value) -> Value:
    return Value(np.asarray(x.shape[n.attr("start", 0) : n.attr("end", len(x.shape))], np.int64))


@op("Size")
def size(n: Node, x: Value) -> Value:
    return Value(np.asarray(math.prod(x.shape), np.int64))


@op("Reshape")
def reshape(n: Node, x: Value, to: Value) -> Value:
    wanted = numbers(to)
    if not n.attr("allowzero", 0):
        wanted = [x.shape[i] if w == 0 else w for i, w in enumerate(wanted)]
    if (axis := n.attr("batch_axis")) is not None:  # written for one batch size
        wanted[axis] = n.attr("each") * n.batch
    return Value(plain(x).reshape(wanted))


@op("Flatten")
def flatten(n: Node, x: Value) -> Value:
    axis = n.attr("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    return Value(plain(x).reshape(math.prod(x.shape[:axis]), -1))


@op("Transpose")
def transpose(n: Node, x: Value) -> Value:
    perm = n.attr("perm", list(range(len(x.shape)))[::-1])
    if isinstance(x.array, np.ndarray):
        return Value(plain(x).transpose(perm))
    order = tuple(perm.index(i) for i in x.order or range(len(perm)))
    return Value(x.array, None if order == tuple(range(len(order))) else order)


@op("Squeeze")
def squeeze(n: Node, x: Value, axes: Value | None = None) -> Value:
    found = _axes(n, x, axes)
    found = [i for i, length in enumerate(x.shape) if length == 1] if found is None else found
    return Value(plain(x).squeeze(tuple(found)))


@op("Unsqueeze")
def unsqueeze(n: Node, x: Value, axes: Value | None = None) -> Value:
    found = n.attr("axes") if axes is None else numbers(axes)
    return Value(numpy_of(x).expand_dims(plain(x), tuple(found)))


@op("Concat")
def concat(n: Node, *values: Value) -> Value:
    axis = n.attr("axis", 0) % max(len(values[0].shape), 1)
    order = next((v.order for v in values if v.order is not None), None)
    if order is None:
        arrays = [plain(v) for v in values]
    else:
        arrays = [ordered(v, order) for v in values]
    if axis and max(v.shape[0] for v in values) == n.batch:  # the file may know of one image alone
        arrays = [
            jnp.broadcast_to(a, (n.batch, *a.shape[1:])) if a.shape[0] == 1 else a for a in arrays
        ]
    place = axis if order is None else order.index(axis)
    lib = np if all(isinstance(a, np.ndarray) for a in arrays) else jnp
    return Value(lib.concatenate(arrays, place), order)


@op("Split")
def split(n: Node, x: Value, sizes: Value | None = None) -> list[Value]:
    axis = n.attr("axis", 0)
    given = n.attr("split") if sizes is None else numbers(sizes)
    if given is None:
        length, parts = x.shape[axis], n.attr("num_outputs", len(n.outputs))
        most = -(-length // parts)
        given = [min(most, length - i * most) for i in range(parts)]
    cuts = np.cumsum(given)[:-1].tolist()
    parts = numpy_of(x).split(x.array, cuts, _axis(x, axis))
    return [Value(part, x.order) for part in parts]


@op("Slice")
def slice_(n: Node, x: Value, *given: Value | None) -> Value:
    if given:
        found: list[Any] = [g and numbers(g) for g in (*given, None, None)[:4]]
    else:
        found = [n.attr("starts"), n.attr("ends"), n.attr("axes"), None]
    starts, ends, axes, steps = found
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    cut = [slice(None)] * len(x.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = x.shape[axis]
        if step < 0 and end < -length:  # beyond the first one
            end = None
        cut[_axis(x, axis)] = slice(start, end, step)
    return Value(x.array[tuple(cut)], x.order)


PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@op("Pad")
def pad(n: Node, x: Value, pads: Value | None = None, value: Value | None = None, axes=None):
    given = n.attr("pads") if pads is None else numbers(pads)
    over = list(range(len(x.shape))) if axes is None else [a % len(x.shape) for a in numbers(axes)]
    edges = [(0, 0)] * len(x.shape)
    for i, axis in enumerate(over):
        edges[_axis(x, axis)] = (given[i], given[i + len(over)])
    array = x.array
    if min(map(min, edges), default=0) < 0:  # cuts
        cut = [slice(-min(a, 0), min(b, 0) or None) for a, b in edges]
        array, edges = array[tuple(cut)], [(max(a, 0), max(b, 0)) for a, b in edges]
    mode, lib = PAD_MODES[n.attr("mode", "constant")], numpy_of(x)
    if mode != "constant":
        return Value(lib.pad(array, edges, mode=mode), x.order)
    fill = n.attr("value", 0.0) if value is None else _floats(value)[0]
    return Value(lib.pad(array, edges, constant_values=array.dtype.type(fill)), x.order)


@op("Expand")
def expand(n: Node, x: Value, to: Value) -> Value:
    wanted = numbers(to)
    if (axis := n.attr("batch_axis")) is not None:
        wanted[axis] = n.attr("each") * n.batch
    array = plain(x)
    return Value(numpy_of(x).broadcast_to(array, np.broadcast_shapes(array.shape, tuple(wanted))))


@op("Tile")
def tile(n: Node, x: Value, repeats: Value) -> Value:
    return Value(numpy_of(x).tile(plain(x), tuple(numbers(repeats))))


@op("ConstantOfShape")
def constant_of_shape(n: Node, to: Value) -> Value:
    value, kind = n.attr("value", 0.0), np.dtype(n.attr("dtype", "float32"))
    # a broadcast takes no memory before somebody looks
    lib = np if to.known is None else jnp
    return Value(lib.full(numbers(to), value, kind if lib is np else None))


@op("Range")
def range_(n: Node, start: Value, limit: Value, delta: Value) -> Value:
    first, end, step = (v.array if v.known is None else v.known for v in (start, limit, delta))
    if start.known is not None:
        count = max(0, math.ceil((end.item() - first.item()) / step.item()))
        return Value(jnp.zeros(count, jnp.float32))
    return Value(np.arange(first.item(), end.item(), step.item()).astype(first.dtype))


@op("Gather")
def gather(n: Node, x: Value, index: Value) -> Value:
    axis, where = n.attr("axis", 0), plain(index)
    if isinstance(where, np.ndarray):
        where = where % max(x.shape[axis], 1) if where.size else where
        if where.ndim == 0 and x.order is None and not isinstance(x.array, np.ndarray):
            return Value(lax.index_in_dim(x.array, int(where), axis % x.array.ndim, False))
    return Value(numpy_of(x, index).take(plain(x), where, axis))


@op("GatherElements")
def gather_elements(n: Node, x: Value, index: Value) -> Value:
    return Value(numpy_of(x, index).take_along_axis(plain(x), plain(index), n.attr("axis", 0)))


@op("GatherND")
def gather_nd(n: Node, x: Value, index: Value) -> Value:
    if n.attr("batch_dims", 0):
        raise BadInput("batch_dims are not known here")
    return Value(plain(x)[tuple(numpy_of(x, index).moveaxis(plain(index), -1, 0))])


@op("ScatterND")
def scatter_nd(n: Node, x: Value, index: Value, updates: Value) -> Value:
    if n.attr("reduction", "none") != "none":
        raise BadInput("a reduction is not known here")
    places = tuple(np.moveaxis(plain(index), -1, 0))
    return Value(jnp.asarray(plain(x)).at[places].set(plain(updates)))


@op("OneHot")
def one_hot(n: Node, index: Value, depth: Value, values: Value) -> Value:
    (count,), (off, on) = numbers(depth), plain(values)
    hot = plain(index)[..., None] % count == np.arange(count)
    array = numpy_of(index, values).where(hot, on, off)
    return Value(np.moveaxis(array, -1, n.attr("axis", -1)) if isinstance(array, np.ndarray)
                 else jnp.moveaxis(array, -1, n.attr("axis", -1)))  # fmt: skip


@op("Trilu")
def trilu(n: Node, x: Value, k: Value | None = None) -> Value:
    lib = numpy_of(x)
    diagonal = 0 if k is None else numbers(k)[0]
    return Value((lib.triu if n.attr("upper", 1) else lib.tril)(plain(x), diagonal))


@op("NonZero")
def non_zero(n: Node, x: Value) -> Value:
    if not isinstance(x.array, np.ndarray):
        raise BadInput("how many there are depends on the image")
    return Value(np.stack(np.nonzero(plain(x))))


@op("CumSum")
def cum_sum(n: Node, x: Value, axis: Value) -> Value:
    if n.attr("exclusive", 0) or n.attr("reverse", 0):
        raise BadInput("exclusive and reverse sums are not known here")
    return Value(numpy_of(x).cumsum(plain(x), numbers(axis)[0]))


@op("DepthToSpace")
def depth_to_space(n: Node, x: Value) -> Value:
    block, array = n.attr("blocksize"), ordered(x, channels_last(4))
    b, h, w, c = array.shape
    if n.attr("mode", "DCR") == "DCR":
        parts = array.reshape(b, h, w, block, block, -1).transpose(0, 1, 3, 2, 4, 5)
    else:
        parts = array.reshape(b, h, w, -1, block, block).transpose(0, 1, 4, 2, 5, 3)
    return Value(parts.reshape(b, h * block, w * block, c // block**2), channels_last(4))


@op("SpaceToDepth")
def space_to_depth(n: Node, x: Value) -> Value:
    if n.attr("mode", "DCR") != "DCR":
        raise BadInput("mode CRD is not known here")
    block, array = n.attr("blocksize"), ordered(x, channels_last(4))
    b, h, w, c = array.shape
    parts = array.reshape(b, h // block, block, w // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return Value(parts.reshape(b, h // block, w // block, c * block**2), channels_last(4))


# --- Reducing ---


def _reducing(fn: Callable[..., Any]) -> Callable[..., Value]:
    """An operator that is `fn(library, array, axes, keepdims)`."""

    def reduce(n: Node, x: Value, axes: Value | None = None) -> Value:
        over = _axes(n, x, axes)
        if not over and n.attr("noop_with_empty_axes", 0):
            return Value(x.array, x.order)
        over = over or list(range(len(x.shape)))
        keep, lib = bool(n.attr("keepdims", 1)), numpy_of(x)
        if keep:
            return Value(fn(lib, x.array, tuple(_axis(x, a) for a in over), True), x.order)
        if x.order is not None:  # the axes that stay may stand as the graph has them already
            stay = [axis for axis in x.order if axis not in over]
            array = fn(lib, x.array, tuple(_axis(x, a) for a in over), False)
            return Value(array.transpose(np.argsort(stay)) if stay != sorted(stay) else array)
        return Value(fn(lib, x.array, tuple(over), False))

    return reduce


for _name, _reduce in {
    "ReduceMean": lambda lib, x, axes, keep: x.mean(axes, keepdims=keep),
    "ReduceSum": lambda lib, x, axes, keep: x.sum(axes, keepdims=keep),
    "ReduceMax": lambda lib, x, axes, keep: x.max(axes, keepdims=keep),
    "ReduceMin": lambda lib, x, axes, keep: x.min(axes, keepdims=keep),
    "ReduceProd": lambda lib, x, axes, keep: x.prod(axes, keepdims=keep),
    "ReduceL1": lambda lib, x, axes, keep: lib.abs(x).sum(axes, keepdims=keep),
    "ReduceL2": lambda lib, x, axes, keep: lib.sqrt((x * x).sum(axes, keepdims=keep)),
    "ReduceSumSquare": lambda lib, x, axes, keep: (x * x).sum(axes, keepdims=keep),
    "ReduceLogSum": lambda lib, x, axes, keep: lib.log(x.sum(axes, keepdims=keep)),
    "ReduceLogSumExp": lambda lib, x, axes, keep: jax.nn.logsumexp(x, axes, keepdims=keep),
}.items():
    op(_name)(_reducing(_reduce))


def _arg(name: str) -> Callable[..., Value]:
    def arg(n: Node, x: Value) -> Value:
        if n.attr("select_last_index", 0):
            raise BadInput("the last of equal ones is not known here")
        array, axis = plain(x), n.attr("axis", 0)
        found = getattr(numpy_of(x), name)(array, axis, keepdims=bool(n.attr("keepdims", 1)))
        return Value(found)

    return arg


op("ArgMax")(_arg("argmax"))
op("ArgMin")(_arg("argmin"))


# --- Resizing ---


@op("Resize")
def resize(n: Node, x: Value, *given: Value | None) -> Value:
    _, scales, sizes = (*given, None, None, None)[:3]
    if n.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise BadInput("tf_crop_and_resize is not known here")
    if n.attr("antialias", 0) or n.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise BadInput("antialias and aspect ratios are not known here")
    if len(given) == 1:  # opset 10
        scales = given[0]
    axes = [a % len(x.shape) for a in n.attr("axes", range(len(x.shape)))]
    factors = [] if scales is None else _floats(scales)
    wanted = [] if sizes is None or not sizes.array.size else numbers(sizes)
    array = x.array
    for i, axis in enumerate(axes):
        length = x.shape[axis]
        out = wanted[i] if wanted else math.floor(length * factors[i])
        scale = factors[i] if factors and not wanted else out / length
        if out != length or scale != 1:
            matrix = _interpolation(n, length, out, scale)
            array = jnp.moveaxis(
                jnp.tensordot(array, jnp.asarray(matrix), ((_axis(x, axis),), (1,))),
                -1,
                _axis(x, axis),
            )
    return Value(array, x.order)


@op("Upsample")
def upsample(n: Node, x: Value, scales: Value | None = None) -> Value:
    given = Value(np.asarray(n.attr("scales"), np.float32)) if scales is None else scales
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return resize(n._replace(attrs={**n.attrs, **how}), x, None, given)


def _floats(value: Value) -> list[float]:
    known = value.array if value.known is None else value.known
    if not isinstance(known, np.ndarray):
        raise BadInput("a setting depends on the image")
    return [float(v) for v in np.ravel(known)]


def _interpolation(n: Node, length: int, out: int, scale: float) -> np.ndarray:
    """The weights `[out, length]` of the given pixels in each new one."""
    if out * length > 1 << 26:
        raise BadInput(f"resizing {length} to {out} pixels: too large")
    places = np.arange(out, dtype=np.float64)
    at = {
        "half_pixel": (places + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (places + 0.5) / scale - 0.5 if out > 1 else places * 0,
        "asymmetric": places / scale,
        "align_corners": places * ((length - 1) / (length * scale - 1) if out > 1 else 0),
        "half_pixel_symmetric": (places + 0.5) / scale
        - 0.5
        + length / 2 * (1 - out / (length * scale)),
    }[n.attr("coordinate_transformation_mode", "half_pixel")]
    mode = n.attr("mode", "nearest")
    if mode == "nearest":
        index = {
            "round_prefer_floor": np.ceil(at - 0.5),
            "round_prefer_ceil": np.floor(at + 0.5),
            "floor": np.floor(at),
            "ceil": np.ceil(at),
        }[n.attr("nearest_mode", "round_prefer_floor")]
        near, weights = index[:, None], np.ones((out, 1))
    elif mode == "linear":
        near = np.floor(at)[:, None] + np.arange(2)
        weights = np.maximum(0, 1 - np.abs(at[:, None] - near))
    elif mode == "cubic":
        near = np.floor(at)[:, None] + np.arange(-1, 3)
        weights = _cubic(np.abs(at[:, None] - near), n.attr("cubic_coeff_a", -0.75))
    else:
        raise BadInput(f"mode {mode} is not known here")
    if n.attr("exclude_outside", 0):
        weights = weights * ((near >= 0) & (near < length))
        weights = weights / weights.sum(1, keepdims=True)
    near = np.clip(near, 0, length - 1).astype(int)
    matrix = np.zeros((out, length), np.float32)
    np.add.at(matrix, (np.arange(out)[:, None], near), weights)
    return matrix


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
    outer = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0))
