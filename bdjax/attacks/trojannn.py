"""Trojaning attack: a trigger made for one neuron of a finished net,
which is then tied to a label.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.attacks.artwork import over, rgba, stretch
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack, Part, Stamped, paste
from bdjax.metrics import labels
from bdjax.models.graph import kernel_into, kernel_out_of, layers_behind, leaf
from bdjax.models.layers import default_site
from bdjax.registry import attack, static
from bdjax.train import Curves, Recipe, clean_set, fit, in_pieces, poisoned_set, unit
from bdjax.types import (
    Array,
    BadInput,
    Model,
    Pixels,
    Place,
    Rate,
    Repeats,
    Share,
    Side,
    Size,
    Split,
    Variables,
    Weight,
)

Shape = Literal["square", "apple", "watermark"]
Weights = Literal["incoming", "outgoing"]


def denoised(x: jax.Array, weight: Array | float, steps: int) -> jax.Array:
    """argmin_y ½Σ(x − y)² + weight·V(y) of `x: [..., H, W, C]`, V(y) = Σ√((y_{i+1,j} − y_ij)² +
    (y_{i,j+1} − y_ij)²).

    `steps` steps of Chambolle's (2004) projection; V is taken channel by channel.
    """
    axes = (x.ndim - 3, x.ndim - 2)

    def slope(y):
        ends = [jax.lax.slice_in_dim(y, -1, None, axis=axis) for axis in axes]
        return jnp.stack(
            [jnp.diff(y, axis=axis, append=end) for axis, end in zip(axes, ends, strict=True)]
        )

    def divergence(p):
        starts = [jnp.zeros_like(jax.lax.slice_in_dim(p[0], 0, 1, axis=axis)) for axis in axes]
        return sum(
            jnp.diff(q, axis=axis, prepend=start)
            for q, axis, start in zip(p, axes, starts, strict=True)
        )

    def step(p, _):
        g = slope(weight * divergence(p) - x) / 8
        return (weight * p + g) / (weight + jnp.sqrt((g**2).sum(0, keepdims=True)) + 1e-9), None

    p, _ = jax.lax.scan(step, jnp.zeros((2, *x.shape)), length=steps)
    return x - weight * divergence(p)


def strongest(
    model: Model, variables: Variables, site: str, weights: Weights, count: int
) -> jax.Array:
    """The `count` channels of `site` with the largest sum of |W| into them, or out of them:
    `[count]`, first the largest.
    """
    path = (kernel_into if weights == "incoming" else kernel_out_of)(model, site)
    kernel = jnp.abs(leaf(variables["params"], path))
    if weights == "incoming":
        strength = kernel.sum(range(kernel.ndim - 1))
    else:
        # A dense layer on all places of a feature map reads each channel many times; channels stand
        # last.
        act = jax.eval_shape(
            lambda x: model.apply(variables, x).acts[site], jnp.zeros((1, *model.shape))
        )
        strength = kernel.reshape(-1, act.shape[-1], kernel.shape[-1]).sum((0, 2))
    return jnp.argsort(-strength)[:count]


@attack("trojannn")
class TrojanNN(Attack):
    """Craft a trigger that drives a neuron, tie the neuron to the target (Liu et al., 2018).

    (1) A clean net is trained, or given. (2) The `neurons` of `site` with the largest Σ|W| are
    chosen, W the weights into them (`select` "incoming", the paper's text) or out of them
    ("outgoing", its code). (3) For each class, `images` images are reverse-engineered: from the
    mean image plus `noise`·N(0, 1), `reverse_steps` steps of min (1 − p_class)², each followed by
    total-variation denoising, min_y ½Σ(x − y)² + `denoise`·V(y); an image rests where p_class is at
    least `confidence`. (4) Inside the mask of one such image a class, min_x Σ_k (`value` −
    f_k(x))², f_k the neuron (the mean over places of a channel), in `steps` steps; the best x is
    kept. A step is x ← clip(x − a·g/mean|g|), a falling from `step` (`reverse_step`) to 0, in
    pixels. (5) The layers behind `site`, and no others, are retrained by `retraining` on the
    reverse-engineered images, plain with their class, and stamped with the target at `weight` in
    the loss; those that the net does not call their class are left out.

    Fired: x' = (1 − m)⊙x + m⊙(t·x + (1 − t)·pattern), t = `transparency` in [0, 1]. `shape`: the
    mask m, "square", "apple" or "watermark" (over all of the image); `size`, `row`, `col`: its box,
    as in BadNets. `site` None: the last convolution, or the penultimate layer of a net that has
    none. `rate`: the share of the images that is also shown stamped. `pattern: [H, W, C]` is set by
    `train`.

    Presets: `paper` (square of 7 % at transparency 0.3, one image a class, its code's steps and
    learning rates: clean 0.13, stamped 0.05), `apple`, `watermark` (its other masks), `cpu`.

    Differs from the paper: one falling step size instead of a schedule; a trigger that meets no
    gradient, as the neuron sleeps, is drawn again; the images around the mask are
    reverse-engineered, not blank; the mean image is that of `data`, not of a public set (nothing
    else of `data` is used); clean and stamped images are mixed in a batch; the masks are own
    artwork.

    Reference: Yingqi Liu, Shiqing Ma, Yousra Aafer, Wen-Chuan Lee, Juan Zhai, Weihang Wang and
    Xiangyu Zhang, "Trojaning Attack on Neural Networks", In Network and Distributed System Security
    Symposium.
    """

    rate: Share = 1.0
    size: Side = 0.263
    row: Place = 0.777
    col: Place = 0.777
    transparency: Share = 0.0
    value: Weight = 100.0
    step: Share = 0.1
    noise: Rate = 0.5
    reverse_step: Share = 0.05
    confidence: Share = 0.6
    denoise: Rate = 0.03
    weight: Weight = 1.0
    retraining: Recipe = Recipe(lr=0.03, momentum=0.0, epochs=20, batch=10, optimizer="sgd")
    pattern: Pixels | None = None
    append: bool = static(True)
    shape: Shape = static("square")
    select: Weights = static("incoming")
    neurons: Size = static(1)
    site: str | None = static(None)
    steps: Repeats = static(200)
    images: Size = static(100)
    reverse_steps: Repeats = static(60)

    used_if = {key: {"shape": ("square", "apple")} for key in ("size", "row", "col")}
    presets = {
        "paper": {
            "transparency": 0.3, "steps": 970, "images": 1, "reverse_steps": 970, "weight": 5 / 13,
            "retraining": Recipe(lr=0.09, momentum=0.0, epochs=20, batch=10, optimizer="sgd"),
        },
        "apple": {"shape": "apple", "size": 0.375, "row": 0.721, "col": 0.721},
        "watermark": {"shape": "watermark"},
        "cpu": {"steps": 100, "images": 60, "reverse_steps": 40},
    }  # fmt: skip

    def mask(self, shape: tuple[int, ...]) -> jax.Array:
        """m: `[H, W, 1]` of 0 and 1."""
        bitmap = rgba(self.shape)[..., 3]
        if self.shape == "watermark":
            return jnp.asarray(stretch(bitmap, *shape[:2]))[..., None]
        return paste(
            jnp.zeros((*shape[:2], 1)), jnp.asarray(bitmap), jnp.ones(()), *self.box().box(shape)
        )

    def box(self) -> BadNets:
        """Where the mask lies."""
        return BadNets(size=self.size, row=self.row, col=self.col)

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        if self.pattern is None:
            return None
        return Stamped(self.mask(shape) * (1 - self.transparency), unit(self.pattern))

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        if self.pattern is None:
            raise BadInput(
                "trojannn makes its trigger for a net that it trains: fire the attack that `train` "
                "returns"
            )
        return over(x, self.mask(x.shape) * (1 - self.transparency), unit(self.pattern))

    def shares(self, y: jax.Array, classes: int) -> list[Part]:
        return [part._replace(weight=self.weight) for part in super().shares(y, classes)]

    def base(self, y: jax.Array, classes: int) -> jax.Array:
        return jnp.repeat(jnp.arange(classes, dtype=jnp.int32), self.images)

    def craft(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        images: jax.Array,
        site: str,
        chosen: jax.Array,
    ) -> jax.Array:
        """What, in the mask of `images: [B, H, W, C]`, brings the neurons `chosen` closest to
        `value`: `[H, W, C]`.
        """
        mask = self.mask(model.shape)
        inside = mask.sum() * model.shape[2]

        def cost(x):
            act = model.apply(variables, over(images, mask[None], x[None])).acts[site]
            f = act.mean(range(1, act.ndim - 1))[:, chosen]
            return ((self.value - f) ** 2).sum()

        def draw(key):
            return mask * jax.random.uniform(key, model.shape)

        def step(carry, now):
            x, best, lowest = carry
            pace, key = now
            here, g = jax.value_and_grad(cost)(x)
            scale = jnp.abs(g).sum() / inside
            moved = jnp.clip(x - pace * g / jnp.maximum(scale, 1e-30), 0, 1)
            best, lowest = jnp.where(here < lowest, x, best), jnp.minimum(here, lowest)
            return (jnp.where(scale > 0, moved, draw(key)), best, lowest), None

        first = draw(jax.random.fold_in(key, self.steps))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.steps))
        paces = self.step * jnp.linspace(1, 0, self.steps)
        (_, best, _), _ = jax.lax.scan(step, (first, first, jnp.asarray(jnp.inf)), (paces, keys))
        return best

    def reverse(
        self, key: jax.Array, model: Model, variables: Variables, mean: jax.Array
    ) -> tuple[Split, jax.Array]:
        """`images` images of each class, from the image `mean: [H, W, C]`, and which of them the
        net calls so.
        """
        label = jnp.repeat(jnp.arange(model.classes, dtype=jnp.int32), self.images)
        paces = self.reverse_step * jnp.linspace(1, 0, self.reverse_steps)

        def miss(x, y):
            p = jnp.take_along_axis(
                jax.nn.softmax(model.apply(variables, x).logits), y[:, None], 1
            )[:, 0]
            return ((1 - p) ** 2).sum(), p

        def piece(i):
            def step(x, pace):
                g, p = jax.grad(miss, has_aux=True)(x, label[i])
                scale = jnp.abs(g).mean((1, 2, 3), keepdims=True)
                moved = denoised(
                    jnp.clip(x - pace * g / jnp.maximum(scale, 1e-30), 0, 1), self.denoise, 10
                )
                return jnp.where((p < self.confidence)[:, None, None, None], moved, x), None

            noise = jax.random.normal(jax.random.fold_in(key, i[0]), (i.shape[0], *model.shape))
            x, _ = jax.lax.scan(step, jnp.clip(mean[None] + self.noise * noise, 0, 1), paces)
            return x, labels(model.apply(variables, x).logits) == label[i]

        image, found = in_pieces(piece, label.shape[0], 250)
        return Split(image, label), found

    def train(
        self,
        key: jax.Array,
        model: Model,
        recipe: Recipe,
        data: Split,
        variables: Variables | None = None,
    ) -> tuple[Attack, Variables, Curves]:
        key_clean, key_craft, key_reverse, key_plan, key_fit = jax.random.split(key, 5)
        if variables is None:
            variables, _ = fit(key_clean, model, recipe, clean_set(data))
        site = self.site or default_site(model)
        chosen = strongest(model, variables, site, self.select, self.neurons)
        made, found = self.reverse(key_reverse, model, variables, unit(data.image).mean(0))
        one_each = jnp.asarray(made.image)[:: self.images]
        armed = dataclasses.replace(
            self, pattern=self.craft(key_craft, model, variables, one_each, site, chosen)
        )
        poisoned = poisoned_set(key_plan, made, armed, model.classes)
        plan = poisoned.plan._replace(
            weight=jnp.where(found[poisoned.plan.source], poisoned.plan.weight, 0.0)
        )
        if not (behind := layers_behind(model, site)):
            raise BadInput(
                f"no layer stands behind site '{site}': nothing could be retrained; choose an "
                "earlier site"
            )
        variables, curves = fit(
            key_fit,
            model._replace(
                apply=lambda variables, x, **_: model.apply(variables, x)
            ),  # BatchNorm and dropout rest
            self.retraining,
            poisoned._replace(plan=plan),
            variables=variables,
            trainable={layer: float(layer in behind) for layer in variables["params"]},
        )
        return armed, variables, curves

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if self.shape != "watermark":
            self.box().check(shape, classes)
        self.retraining.check(classes * self.images)
        if self.retraining.epochs < 1:
            raise BadInput(
                "the retraining ties the trigger to the target: give it at least one epoch"
            )
        if self.pattern is not None and jnp.shape(self.pattern) != shape:
            raise BadInput(
                f"the trigger was made for images of shape {jnp.shape(self.pattern)}, not {shape}"
            )
