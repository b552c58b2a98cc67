"""What the defenses of a training set share: the victim's view of each row, the principal axes of
each class, and the training set without its suspects.

Rows of a class are picked by weights, so that shapes do not depend on the labels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.train import TrainSet, batched
from bdjax.types import Model, Variables

MORE, ITERATIONS = 10, 20
"""Of the subspace iteration: extra axes, which make the wanted ones converge, and steps."""


class Axes(NamedTuple):
    """Of rows `[M, D]`: their `mean: [D]`, `axes: [D, k]`, orthonormal, and the `variance: [k]`
    along them, falling.
    """

    mean: jax.Array
    axes: jax.Array
    variance: jax.Array


def activations(
    model: Model,
    variables: Variables,
    data: TrainSet,
    site: str,
    *,
    batch: int = 250,
) -> tuple[jax.Array, jax.Array]:
    """What each training row looks like at `site`, flat: `[M, D]`, and which rows exist and have
    finite values: `[M]`.

    All other rows are 0.
    """

    def piece(i):
        act = model.apply(variables, data.rows(i)[0]).acts[site]
        return act.reshape(act.shape[0], -1)

    rows = data.plan.label.shape[0]
    act = batched(piece, rows, batch)
    seen = jnp.isfinite(act).all(1) & (jnp.arange(rows) < data.plan.size)
    return jnp.where(seen[:, None], act, 0.0), seen


def principal(key: jax.Array, x: jax.Array, weight: jax.Array, count: int) -> Axes:
    """The leading principal axes of those rows of `x: [M, D]` with `weight: [M]` 1, not 0, by
    subspace iteration.

    At most D axes; one without variance is 0.
    """
    n = jnp.maximum(weight.sum(), 1.0)
    mean = weight @ x / n

    def along(axes):
        return weight[:, None] * (x @ axes - (mean @ axes)[None])

    def step(axes, _):
        z = along(axes)
        turned = z.T @ x - z.sum(0)[:, None] * mean[None]  # x.T @ z would copy x first
        return jnp.linalg.qr(turned.T)[0], None

    start = jax.random.normal(key, (x.shape[1], min(count + MORE, x.shape[1])))
    axes, _ = jax.lax.scan(step, jnp.linalg.qr(start)[0], length=ITERATIONS)
    z = along(axes)
    variance, turn = jnp.linalg.eigh(z.T @ z / n)
    axes, variance = (axes @ turn)[:, ::-1][:, :count], variance[::-1][:count]
    # What is left of equal rows in float32 is noise: it must not be scaled up to an axis.
    real = variance > 1e-10 * (weight @ (x**2).sum(1)) / n
    return Axes(mean, jnp.where(real[None], axes, 0.0), jnp.where(real, variance, 0.0))


def along_own(
    x: jax.Array, label: jax.Array, mean: jax.Array, axes: jax.Array, *, batch: int = 250
) -> jax.Array:
    """Coordinates `[M, k]` of each row of `x: [M, D]` on the axes of its class: `mean: [K, D]`,
    `axes: [K, D, k]`.
    """

    def piece(i):
        return jnp.einsum("bd,bdk->bk", x[i] - mean[label[i]], axes[label[i]])

    return batched(piece, x.shape[0], batch)
