"""ABS: some neuron of a backdoored net, once it fires, lifts the target label whatever the image
shows.
"""

import functools
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bdjax import mesh, metrics
from bdjax.defenses.base import Inversion
from bdjax.defenses.parts.inversion import (
    BOUND,
    Trigger,
    descend,
    reaches,
    squash,
    stamp,
    within,
)
from bdjax.models.graph import layers_behind
from bdjax.models.layers import check_site
from bdjax.registry import defense, static
from bdjax.train import unit
from bdjax.types import (
    INT32,
    Array,
    BadInput,
    Count,
    Model,
    Range,
    Rate,
    Share,
    Size,
    Split,
    Steps,
    Variables,
    Verdict,
    Weight,
)

Space = Literal["pixel", "feature"]
VISIBLE = 0.01
"""Opacity above which a pixel counts as part of a trigger."""
WINDOW = 12
"""Side of the pooling windows that feature space is made of."""


class Neurons(NamedTuple):
    """What stimulation shows of each of `n` neurons: the `label: [n]` that it lifts on most images;
    by how much more than any other label, on the image where that is least, `elevation: [n]`;
    whether it is `suspect: [n]`.
    """

    label: jax.Array
    elevation: jax.Array
    suspect: jax.Array


class Candidate(NamedTuple):
    """A suspect neuron, by its number among all, the label that it lifts, and whether there is one;
    `[]` each.
    """

    neuron: jax.Array
    label: jax.Array
    valid: jax.Array


class Search(NamedTuple):
    """The trigger inversion of one candidate, carried from step to step."""

    candidate: Candidate
    params: Any
    opt_state: Any
    steps: jax.Array


@defense("abs")
class Abs(Inversion):
    """Stimulate each neuron, then look for a trigger that fires the few suspicious ones (Liu et
    al., 2019).

    Stimulation: neuron j of a layer (a whole feature map, or a unit) is set to v_k =
    k·`reach`·max/`levels`, k = 0 … `levels` − 1, max the layer's largest activation on the seed
    images. Label c rises by e_c = max_{k≥1} z_c(v_k) − z_c(v_0), z the logits. On each image c* =
    argmax e, at e_c* − the second largest. The neuron's label is the modal c*, its elevation the
    least of these leads over the images that are not of that label and lift it. Suspects are the
    neurons on which all images but `dissent` agree; the `top` of them with the highest elevation
    are candidates, half of them at most `per_site` of one layer.

    Inversion, all candidates at once, on a third of the seed images: Adam minimises d = −a_j + w·Σ
    others of its layer, before and after the activation function where there are sites for both;
    means over images and places, in units of the layer's largest activation. "pixel": x' = (1 −
    m)⊙x + m⊙Δ, w = 1e-4, plus `weight`·|m|₁/`size` once more pixels than `size` have m > 0.01,
    twice that beyond (√size + 2)². "feature": x' = [x, max, min, mean over 12×12]·T, |T| ≤ 1, w =
    1e-5, minus the mean SSIM(x, x'), 1000 times that while it is below 0.2.

    Not `relative`: the losses of the released code. Σ over images and places of raw activations
    instead of means; `weight`·|m|₁; 0.01·d − 10·Σ SSIM, 10⁴ instead of 10 while Σ SSIM < 2.

    REASR: share of all seed images that the inverted trigger sends to the candidate's label. A
    label with a candidate above `threshold` is flagged.

    `images`: seed images, as many of each class as possible; `steps` of each inversion; `lr`,
    `lr_feature`: Adam's learning rates; `size`: largest trigger, as a share of the image's pixels;
    `spaces`: kinds of inversion; `sites`: layers to stimulate, None = all with a name, but the
    pixels, the logits and what stands before an activation function. `lanes`: neurons or candidates
    side by side (None: the device's default).

    Verdict: `index`, the largest REASR, 0 without a candidate. `info`: `elevation`, `label: [n]` of
    all neurons, site after site, `suspect: [n]`; of each candidate `neuron`, `candidate_label`,
    `valid`, `reasr_pixel`, `reasr_feature: [top]`; `mask: [top, H, W, 1]`, `pattern: [top, H, W,
    C]`, `transform: [top, 4C, C]`.

    A flag says that such a change exists, not that anybody planted it. In a clean net of ten
    traffic signs, where Neural Cleanse finds triggers of |m|₁ = 33 to 79, a patch of 63 pixels of
    1,024 and a filter send nine tenths of the images or more to a label.

    Presets: `paper`; `original_code`, the released losses, decides at 0.8; `cpu`, fewer candidates,
    steps and images.

    Differs from the paper: its bound of 0.88 could not be verified. Differs from the released code:
    its weights are for sums over 16 images of 32×32 and layers of as many places, where its 500 is
    the default `weight`, 2; where the sums are small they freeze the mask. A unit of a dense layer
    may be worth more: its triggers grow to where the price doubles. The raw mask stays within ±6.
    There pixels are standardised; hidden layers as wide as there are classes are left out; a dense
    layer's neuron counts, after the activation function, among the others, by a slip; 64 pixels of
    a 32×32 image became a share; a net without suspects is an error. As there, one neuron must do:
    a backdoor that needs several at once escapes.

    Reference: Yingqi Liu, Wen-Chuan Lee, Guanhong Tao, Shiqing Ma, Yousra Aafer and Xiangyu Zhang,
    "ABS: Scanning Neural Networks for Back-Doors by Artificial Brain Stimulation", In ACM SIGSAC
    Conference on Computer and Communications Security.
    """

    reach: Weight = 8.0
    dissent: Annotated[Array | int, Range(0, INT32)] = 2
    steps: Steps = 1000
    lr: Rate = 0.1
    lr_feature: Rate = 2e-3
    size: Share = 1 / 16
    weight: Weight = 2.0
    threshold: Share = 0.88
    images: Size = static(50)
    levels: Annotated[int, Range(2, 1_000)] = static(5)
    top: Size = static(20)
    per_site: Count = static(3)
    relative: bool = static(True, before=True)
    spaces: tuple[Space, ...] = static(("pixel", "feature"))
    sites: tuple[str, ...] | None = static(None)
    lanes: Count | None = static(None)

    used_if = {
        **{key: {"spaces": ("pixel",)} for key in ("lr", "size", "weight")},
        "lr_feature": {"spaces": ("feature",)},
    }
    budget_fields = ("images", "top", "per_site", "steps")
    presets = {
        "paper": {},
        "original_code": {"threshold": 0.8, "relative": False, "weight": 500.0},
        "cpu": {"images": 30, "top": 12, "per_site": 2, "steps": 200},
    }

    def once(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        key_seed, key_trigger = jax.random.split(key)
        rows = seeds(key_seed, jnp.asarray(clean.label), self.images)
        x, label = unit(jnp.asarray(clean.image)[rows]), jnp.asarray(clean.label)[rows]
        found, owner = self.stimulate(model, variables, x, label)
        candidates = self.choose(found, owner)
        reasr, info = {}, {}
        if "pixel" in self.spaces:
            reasr["reasr_pixel"], trigger = self.pixel(key_trigger, model, variables, x, candidates)
            info |= trigger._asdict()
        if "feature" in self.spaces:
            reasr["reasr_feature"], info["transform"] = self.feature(
                model, variables, x, candidates
            )
        best = jnp.stack(list(reasr.values())).max(0)
        hit = (
            jax.nn.one_hot(candidates.label, model.classes, dtype=bool)
            & (best > self.threshold)[:, None]
        )
        flagged = hit.any(0)
        info |= reasr | found._asdict()
        info |= {
            "neuron": candidates.neuron,
            "candidate_label": candidates.label,
            "valid": candidates.valid,
        }
        return Verdict(best.max(), flagged.any(), flagged, info)

    def places(self, model: Model) -> tuple[str, ...]:
        """The sites to stimulate."""
        return hidden_sites(model) if self.sites is None else self.sites

    def stimulate(
        self, model: Model, variables: Variables, x: jax.Array, label: jax.Array
    ) -> tuple[Neurons, np.ndarray]:
        """What each neuron lifts on the seed images `x: [N, H, W, C]` of `label: [N]`, and its
        site's number: `[n]`.
        """
        acts = model.apply(variables, x).acts
        parts = [self.lift(model, variables, site, x, acts[site]) for site in self.places(model)]
        owner = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        lifted, lead = (jnp.concatenate(leaf) for leaf in zip(*parts))
        votes = jax.nn.one_hot(lifted, model.classes).sum(1)
        modal = metrics.labels(votes)
        counted = (lifted == modal[:, None]) & (label[None] != modal[:, None])
        elevation = jnp.where(counted.any(1), jnp.where(counted, lead, jnp.inf).min(1), 0.0)
        agreed = votes.max(1) >= label.shape[0] - jnp.asarray(self.dissent, jnp.float32)
        # Nothing moves where a layer is constant, and nothing can be said where a logit is not a
        # number.
        return Neurons(modal, elevation, agreed & (elevation > 0) & jnp.isfinite(elevation)), owner

    def lift(
        self, model: Model, variables: Variables, site: str, x: jax.Array, act: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """For each channel of `site` and each image, the label that rises most, and its lead: `[C,
        N]` each.
        """
        n, channels = act.shape[0], act.shape[-1]
        values = jnp.arange(self.levels, dtype=jnp.float32) * (act.max() * self.reach / self.levels)
        # a pruned neuron cannot fire
        alive = variables.get("masks", {}).get(site, jnp.ones(channels))
        repeated = jnp.concatenate([x] * self.levels)

        def one(channel):
            pushed = jax.vmap(lambda v: act.at[..., channel].set(v * alive[channel]))(values)
            pushed = pushed.reshape(-1, *act.shape[1:])
            logits = model.apply(variables, repeated, edits={site: lambda _: pushed}).logits
            logits = logits.reshape(self.levels, n, -1)
            rise, label = jax.lax.top_k(logits[1:].max(0) - logits[0], 2)
            return label[:, 0], rise[:, 0] - rise[:, 1]

        return mesh.lane_map(one, jnp.arange(channels), self.lanes)

    def choose(self, found: Neurons, owner: np.ndarray) -> Candidate:
        """The `top` suspects (or as many as there are neurons), highest elevation first, half of
        them spread over the sites.
        """
        order = jnp.argsort(jnp.where(found.suspect, -found.elevation, jnp.inf))
        site = jax.nn.one_hot(jnp.asarray(owner)[order], int(owner.max()) + 1, dtype=jnp.int32)
        rank = (site.cumsum(0) * site).sum(1)  # 1 = the site's best
        spread = found.suspect[order] & (rank <= self.per_site)
        spread &= jnp.cumsum(spread) <= self.top // 2
        chosen = order[jnp.argsort(~spread, stable=True)][: self.top]
        return Candidate(chosen, found.label[chosen], found.suspect[chosen])

    def drive(
        self,
        model: Model,
        acts: dict[str, jax.Array],
        neuron: jax.Array,
        scale: jax.Array,
        others: float,
    ):
        """Minus the activation of `neuron: []`, plus `others` times that of the rest of its layer:
        before and after the activation function, summed over images and places, divided by `scale:
        [sites]`.
        """

        previous = dict(zip(model.sites[1:], model.sites))

        def total(site):
            return acts[site].sum(range(acts[site].ndim - 1))

        def both(site):
            before = previous.get(site, "")
            return total(site) + total(before) if before.endswith("_pre") else total(site)

        parts = [both(site) / scale[i] for i, site in enumerate(self.places(model))]
        owner = jnp.asarray(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
        each = jnp.concatenate(parts)
        return -each[neuron] + others * (
            jnp.where(owner == owner[neuron], each, 0).sum() - each[neuron]
        )

    def scale(self, model: Model, variables: Variables, x: jax.Array) -> jax.Array:
        """What the sums over `x: [N, H, W, C]` and the places of each layer are divided by:
        `[sites]`.
        """
        places = self.places(model)
        if not self.relative:
            return jnp.ones(len(places))
        acts = model.apply(variables, x).acts
        sums = [acts[site].size // acts[site].shape[-1] for site in places]
        return jnp.stack([n * jnp.maximum(acts[site].max(), 1e-6) for n, site in zip(sums, places)])

    def limit(self, model: Model) -> jax.Array:
        """The largest trigger, in pixels, at least 1: `[]`."""
        pixels = jnp.asarray(self.size, jnp.float32) * model.shape[0] * model.shape[1]
        return jnp.maximum(jnp.round(pixels), 1)

    def pixel_loss(self, drive: jax.Array, mask: jax.Array, limit: jax.Array) -> jax.Array:
        """What a `mask: [H, W, 1]` that leads to `drive: []` costs: `[]`."""
        visible = (mask > VISIBLE).sum(dtype=jnp.float32)
        times = jnp.where(
            visible > (jnp.sqrt(limit) + 2) ** 2, 2.0, jnp.where(visible > limit, 1.0, 0.0)
        )
        return drive + times * self.weight * mask.sum() / (limit if self.relative else 1.0)

    def feature_loss(self, drive: jax.Array, alike: jax.Array) -> jax.Array:
        """What a change costs that leads to `drive: []` and leaves the images `alike: [N]`, in
        SSIM: `[]`.
        """
        if self.relative:
            mean = alike.mean()
            return drive - jnp.where(mean < 0.2, 1e3, 1.0) * mean
        total = alike.sum()
        return 0.01 * drive - jnp.where(total < 2, 1e4, 10.0) * total

    def invert(
        self, loss, starts: Any, candidates: Candidate, rule: optax.GradientTransformation
    ) -> Any:
        """The params that minimise `loss(params, neuron)` for each of the candidates, from `starts`
        (stacked).
        """

        def start(item) -> Search:
            candidate, params = item
            return Search(candidate, params, rule.init(params), jnp.zeros((), jnp.int32))

        def step(state: Search) -> Search:
            def objective(params, neuron):
                return loss(params, neuron), None

            neuron = state.candidate.neuron[None]
            (params, opt_state), _ = descend(objective, state.params, state.opt_state, neuron, rule)
            return Search(state.candidate, params, opt_state, state.steps + 1)

        def done(state: Search) -> jax.Array:
            return ~state.candidate.valid | (state.steps >= self.steps)

        return mesh.drain(start, step, done, (candidates, starts), self.lanes).params

    def reasr(
        self, model: Model, variables: Variables, put, params: Any, candidates: Candidate
    ) -> jax.Array:
        """Share of the seed images, changed by `put(params)`, that reach each candidate's label:
        `[top]`.
        """

        def one(item):
            params, label = item
            return reaches(model.apply(variables, put(params)).logits, label).mean()

        return jnp.where(
            candidates.valid, mesh.lane_map(one, (params, candidates.label), self.lanes), 0
        )

    def pixel(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        x: jax.Array,
        candidates: Candidate,
    ) -> tuple[jax.Array, Trigger]:
        """REASR and trigger of each candidate in pixel space."""
        height, width, _ = model.shape
        few = x[: max(1, x.shape[0] // 3)]
        scale = self.scale(model, variables, few)
        limit = self.limit(model)

        def squashed(trigger: Trigger) -> Trigger:
            return Trigger(squash(trigger).mask, trigger.pattern)

        def loss(raw: Trigger, neuron):
            trigger = squashed(raw)
            acts = model.apply(variables, stamp(trigger, few)).acts
            drive = self.drive(model, acts, neuron, scale, 1e-4)
            return self.pixel_loss(drive, trigger.mask, limit)

        corner = jnp.floor(jnp.sqrt(limit)).astype(jnp.int32)
        inside = (jnp.arange(height)[:, None] < corner) & (jnp.arange(width)[None] < corner)
        mask = jnp.where(inside, 2.0, -2.0)[..., None]
        n = candidates.neuron.shape[0]
        pattern = jnp.clip(jax.random.normal(key, (n, *model.shape)), 0, 1)
        starts = Trigger(jnp.stack([mask] * n), pattern)
        low, high = Trigger(-BOUND, 0.0), Trigger(BOUND, 1.0)  # type: ignore[arg-type]
        rule = optax.chain(optax.adam(self.lr), within(low, high))  # type: ignore[arg-type]
        triggers = squashed(self.invert(loss, starts, candidates, rule))
        return self.reasr(model, variables, lambda t: stamp(t, x), triggers, candidates), triggers

    def feature(
        self, model: Model, variables: Variables, x: jax.Array, candidates: Candidate
    ) -> tuple[jax.Array, jax.Array]:
        """REASR and transform of each candidate in feature space."""
        few, features = x[: max(1, x.shape[0] // 3)], pooled(x)
        scale = self.scale(model, variables, few)

        def put(transform, features=features):
            if mesh.platform() == "gpu":  # where XLA finds no tiles for products with 4 × 1 numbers
                parts = features[..., None] * jnp.expand_dims(transform, (0, 1, 2))
                return jnp.clip(parts.sum(-2), 0, 1)
            return jnp.clip(features @ transform, 0, 1)

        def loss(transform, neuron):
            changed = put(transform, features[: few.shape[0]])
            acts = model.apply(variables, changed).acts
            drive = self.drive(model, acts, neuron, scale, 1e-5)
            return self.feature_loss(drive, similarity(few, changed))

        start = jnp.eye(features.shape[-1], model.shape[-1])
        starts = jnp.stack([start] * candidates.neuron.shape[0])
        rule = optax.chain(optax.adam(self.lr_feature), within(-1.0, 1.0))  # type: ignore[arg-type]
        transforms = self.invert(loss, starts, candidates, rule)
        return self.reasr(model, variables, put, transforms, candidates), transforms

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        if model.classes < 2:
            raise BadInput(
                "ABS compares the labels of a model: it needs 2 classes or more, not "
                f"{model.classes}"
            )
        if len(clean.image) == 0:
            raise BadInput("ABS needs clean images: the defender has none")
        for site in self.sites or ():
            check_site(model, site)
        if not self.places(model):
            raise BadInput(
                "ABS finds no layer to stimulate among the sites "
                f"{', '.join(model.sites) or '(none)'}"
            )
        if not self.spaces:
            raise BadInput(
                f"spaces {self.spaces}: give one or both of {', '.join(get_args(Space))}"
            )


@functools.lru_cache(maxsize=64)
def hidden_sites(model: Model) -> tuple[str, ...]:
    """All sites but the pixels, the logits and what stands before an activation function."""
    shapes = shapes_of(model)
    skipped = {site for site in model.sites if site.endswith("_pre") or site == "input"}

    def hidden(site):  # a hidden layer may be as wide as there are classes
        return shapes[site][-1] != model.classes or layers_behind(model, site)

    return tuple(site for site in model.sites if site not in skipped and hidden(site))


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of each site's activation on one image, batch axis first."""
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    acts = jax.eval_shape(lambda key, x: model.apply(model.init(key), x).acts, jax.random.key(0), x)
    return {site: act.shape for site, act in acts.items()}


def seeds(key: jax.Array, label: jax.Array, count: int) -> jax.Array:
    """`count` rows (or all) of `label: [N]`, as many of each class as possible; every first part is
    balanced too.
    """
    n = label.shape[0]
    shuffled = jax.random.permutation(key, n)
    order = shuffled[jnp.argsort(label[shuffled], stable=True)]
    ordered = label[order]
    rank = jnp.arange(n) - jnp.searchsorted(ordered, ordered)  # within the class
    return order[jnp.argsort(rank, stable=True)][:count]


def pooled(x: jax.Array) -> jax.Array:
    """`x: [N, H, W, C]` beside its maximum, minimum and mean over 12×12 windows:
    `[N, H, W, 4C]`.
    """
    window = (WINDOW, WINDOW)
    high, low = nn.max_pool(x, window, padding="SAME"), -nn.max_pool(-x, window, padding="SAME")
    # Flax counts pixels in integers
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mean = nn.avg_pool(x, window, padding="SAME", count_include_pad=False)
    return jnp.concatenate([x, high, low, mean], -1)


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """SSIM of each pair of images `[N, H, W, C]`: `[N]`; 11×11 Gaussian windows, smaller ones on
    smaller images.
    """
    from dm_pix import ssim

    taps = min(11, *a.shape[1:3])
    weight = np.exp(-0.5 * ((np.arange(taps) - (taps - 1) / 2) / 1.5) ** 2)

    def band(side):  # a blur as a matrix: convolutions that dm-pix would write are slow on a CPU
        rows = [np.pad(weight / weight.sum(), (i, side - taps - i)) for i in range(side - taps + 1)]
        return jnp.asarray(np.stack(rows), jnp.float32)

    def blur(z):
        return jnp.einsum("ih,nhwc,jw->nijc", band(a.shape[1]), z, band(a.shape[2]))

    return ssim(a, b, filter_size=taps, filter_fn=blur)  # type: ignore[return-value]
