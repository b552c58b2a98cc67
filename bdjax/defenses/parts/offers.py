"""What a judge has to show: the triggers behind its verdict, as pictures to paste, whatever it
searches in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import mesh, metrics
from bdjax.defenses.base import Judge, searched
from bdjax.defenses.parts.inversion import Trigger, stamp
from bdjax.train import batched, unit
from bdjax.types import Array, Model, Split, Variables, Verdict

PLACES = 5
"""Where a patch that may stand anywhere is tried: the middle and towards the corners."""
TRIED = 8, 64
"""Patches of a generator, and images, by which the one to show is chosen."""


class Offered(NamedTuple):
    """Triggers for T labels, `label: [T]` (several may be for one): mask·pattern as in `stamp`,
    with `mask: [T, H, W, 1 or C]`, `pattern: [T, H, W, C]`; `valid: [T]`.
    """

    label: jax.Array
    mask: jax.Array
    pattern: jax.Array
    valid: jax.Array


def offered(
    key: jax.Array, judge: Judge, model: Model, variables: Variables, clean: Split, verdict: Verdict
) -> Offered | None:
    """The triggers of a verdict of one seed; None of a judge that has none to show.

    A perturbation g that is added is shown as the blend of opacity |g| with what it pushes to,
    black or white. A patch that may stand anywhere is shown at that of `PLACES` places where it
    moves most of the clean images.
    """
    info = verdict.info
    rows = searched(getattr(judge, "labels", None), model.classes)
    label = jnp.asarray(rows, jnp.int32)
    every = jnp.ones(label.shape, bool)
    if "perturbation" in info:
        g = info["perturbation"][rows]
        return Offered(label, jnp.abs(g), (g > 0).astype(jnp.float32), every)
    if "patches" in info:
        return _placed(key, model, variables, clean, info["patches"], info["asr"])
    if "mask" not in info or "pattern" not in info:
        return None
    if "candidate_label" in info:
        found = (info[name] for name in ("candidate_label", "mask", "pattern", "valid"))
        return Offered(*found)
    return Offered(label, info["mask"][rows], info["pattern"][rows], every)


def _placed(
    key: jax.Array, model: Model, variables: Variables, clean: Split, patches: jax.Array,
    asr: jax.Array,
) -> Offered:  # fmt: skip
    """Of each label's `patches: [K, β, S, s, s, C]` the best one at its best place."""
    many, images = TRIED
    height, width, _ = model.shape
    side = patches.shape[-2]
    image = unit(jnp.asarray(clean.image)[:images])
    rows, cols = height - side, width - side
    ends = [(rows // 2, cols // 2), *((r, c) for r in (rows // 5, rows - rows // 5)
            for c in (cols // 5, cols - cols // 5))]  # fmt: skip
    corners = jnp.asarray(ends[:PLACES])

    def put(patch, corner) -> Trigger:
        at = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        mask = jax.lax.dynamic_update_slice(
            jnp.zeros((height, width, 1)), jnp.ones((side, side, 1)), at
        )
        return Trigger(mask, jax.lax.dynamic_update_slice(jnp.zeros(model.shape), patch, at))

    def one(item):
        label, patches, asr = item
        some = patches[jnp.argmax(asr)][:many]
        count = some.shape[0]
        which = jnp.repeat(jnp.arange(count), len(ends))
        corner = jnp.tile(corners, (count, 1))

        def works(item):
            trigger = put(some[item[0]], item[1])
            return (metrics.labels(model.apply(variables, stamp(trigger, image)).logits)
                    == label).mean()  # fmt: skip

        best = jnp.argmax(mesh.lane_map(works, (which, corner), 1))
        return put(some[which[best]], corner[best])

    labels = jnp.arange(model.classes, dtype=jnp.int32)
    found: Trigger = mesh.lane_map(one, (labels, patches, asr), 1)
    return Offered(labels, found.mask, found.pattern, jnp.ones(labels.shape, bool))


def moves(model: Model, variables: Variables, held: Split, found: Offered) -> jax.Array:
    """The share of those `held` images that neither have nor get a trigger's label, which it sends
    there: `[T]`; NaN where there is no such image.
    """
    image, own = jnp.asarray(held.image), jnp.asarray(held.label)

    def answers(change):
        def piece(i):
            return metrics.labels(model.apply(variables, change(unit(image[i]))).logits)

        return batched(piece, image.shape[0], 250)

    before = answers(lambda x: x)

    def one(item):
        label, mask, pattern = item
        after = answers(lambda x: stamp(Trigger(mask, pattern), x))
        others = (own != label) & (before != label)
        return jnp.where(
            others.any(), (others & (after == label)).sum() / jnp.maximum(others.sum(), 1), jnp.nan
        )

    return mesh.lane_map(one, found[:3], 1)


def pixels(mask: Array) -> np.ndarray:
    """On how many pixels the triggers of `mask: [T, H, W, 1 or C]` are visible, more than 1 % of
    opacity: `[T]`.
    """
    return (np.asarray(mask).max(-1) > 0.01).sum((1, 2))
