"""Neural Cleanse:
the target label of a backdoor is the one that a strangely small trigger reaches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax import mesh, metrics
from bdjax.defenses.base import Inversion, searched, spread
from bdjax.defenses.parts.inversion import (
    BOUND,
    Trigger,
    descend,
    folded,
    random_trigger,
    reaches,
    squash,
    stamp,
    unsquash,
    within,
)
from bdjax.registry import defense, static
from bdjax.train import batched, unit
from bdjax.types import (
    Array,
    BadInput,
    Class,
    Count,
    Model,
    Positive,
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

CrossEntropy = Literal["log", "linear"]
Init = Literal["random", "ones"]
Scale = Literal["linear", "log"]
WORST = math.log(1e7)
"""The largest cross-entropy of Keras, which clips p at 1e-7. Where one opaque pixel costs as much,
a higher λ asks for nothing more.
"""


class Schedule(NamedTuple):
    """One label's cost λ, what moves it, and when to stop; all `[]`.

    `succeeded`: successes in a row while λ is 0; `ups`, `downs`: successes and failures in a row
    since λ last moved; `rose`, `fell`: whether λ ever did. `best`: smallest norm of a mask that
    qualified; `stale`: steps in a row that hardly improved it.
    """

    cost: jax.Array
    succeeded: jax.Array
    ups: jax.Array
    downs: jax.Array
    rose: jax.Array
    fell: jax.Array
    best: jax.Array
    stale: jax.Array
    steps: jax.Array
    stopped: jax.Array


class Search(NamedTuple):
    """One label's search, carried from one outer step to the next. `label: []`, `attempt: []` its
    random start.
    """

    label: jax.Array
    attempt: jax.Array
    raw: Trigger
    opt_state: Any
    best: Trigger
    schedule: Schedule


class Found(NamedTuple):
    """The best trigger of each of `L` labels: `norm: [L]` its |m|₁; `qualified: [L]` whether it
    ever worked; `kept: [L]` whether its search was brought to an end, not given up by the
    pre-screen.
    """

    trigger: Trigger
    norm: jax.Array
    qualified: jax.Array
    steps: jax.Array
    cost: jax.Array
    kept: jax.Array


@defense("neural-cleanse")
class NeuralCleanse(Inversion):
    """Reverse-engineer the smallest trigger of every label, flag the outliers (Wang et al., 2019).

    For each label t: min over m, Δ of ℓ(t, f((1 − m)⊙x + m⊙Δ)) + λ·|m|₁ over the defender's clean
    images x of all classes, by Adam on m = tanh(·)/2 + ½, Δ likewise. λ rises while the trigger
    works and falls while it does not; the smallest mask that worked is kept. Then index = |norm −
    median| / (1.4826·MAD), and a label below the median with an index above `threshold` is a
    target.

    `steps`: outer steps at most, of `batches` mini-batches of `batch` images, drawn anew in each;
    `lr`: Adam's learning rate (β = 0.5, 0.9); `ce`: "log", −log p, or "linear", (1 − p)·log 10⁷:
    what the released code minimises, as it swaps the arguments of Keras' clipped cross-entropy.
    `success`: share of a step's stamped images that must reach the label for it to count as a
    success. `init_cost`: first λ > 0; `start_at_zero`: only after `patience` successes with λ = 0.
    After `patience` successes in a row λ is multiplied by `cost_up`, up to log 10⁷ (or `init_cost`,
    if that is more), after as many failures divided by `cost_down`. Early stop: once λ has moved
    both ways, or is as high as it gets, and the best norm did not fall below `stop_ratio` of what
    it was for `stop_patience` steps in a row; or where a step that fails moved nothing. `init`:
    "random" (uniform m, Δ) or "ones" (raw values 1, m = Δ = 0.88); `inits`: starts a label, the
    best is kept. `norm_scale`: decide on norms or on log norms (few labels with one small norm
    inflate the MAD; both indices are reported); `two_sided`: flag large norms as well.
    `labels`: search for these alone (None: all); to the others' norms, NaN, nothing is compared.
    `lanes`: labels side by side (None: see `folded`). `seeds`: see `Judge`.

    `screen`: for many labels, a low-cost pre-screen: all labels are searched, step by step, until
    more than the share `screen_overlap` of the `screen` labels with the smallest current norms were
    among them a step before, for `screen_patience` steps in a row; then only these go on. The
    others keep the norm that they have, which counts in the median but is never flagged; as it is
    too large, so is the index.

    Verdict: `index`, that of the smallest norm; `p_value`, see `metrics.smallest_p`, none with a
    pre-screen: the norms of searches that were given up are not those of whole ones. `info`:
    `norms`, `index`, `index_log`, `success` (share of all clean images that the best trigger sends
    to the label), `qualified`, `steps`, `cost`: `[K]`; `mask: [K, H, W, 1]`, `pattern: [K, H, W,
    C]`. A label that never reached `success` has the norm of its last mask, as in the released
    code; it counts in the median but is never flagged. A norm that is not a number counts as
    infinite. With MAD = 0, any label that differs from the median has index ∞. The p-value is
    one-sided whatever `two_sided` says.

    Presets: `paper`; `original_code`, the released GTSRB script; `backdoorbench`; `cpu`, 400
    mini-batches a label; `low-cost`, the paper's pre-screen for 1,283 labels (100, half of them, 10
    steps).

    Differs from the paper: m cannot leave [0, 1] (released: tanh/(2 − ε) + ½); raw values stay
    within ±6, where float32 has a gradient left, and λ has a bound; the kept mask is judged by its
    own norm, the released code's by the mean over its step; images come from a fresh permutation in
    each step, there from one walk through the shuffled set; norms are not measured on 8-bit
    pictures.

    Reference: Bolun Wang, Yuanshun Yao, Shawn Shan, Huiying Li, Bimal Viswanath, Haitao Zheng and
    Ben Y. Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
    In IEEE Symposium on Security and Privacy.
    """

    lr: Rate = 0.1
    steps: Steps = 1000
    init_cost: Weight = 1e-3
    cost_up: Weight = 2.0
    cost_down: Positive = 2.0**1.5
    patience: Steps = 5
    success: Share = 0.99
    stop_ratio: Weight = 1.0
    stop_patience: Steps = 25
    threshold: Weight = 2.0
    screen_overlap: Share = 0.5
    screen_patience: Steps = 10
    batch: Count = static(32)
    batches: Size = static(31)
    ce: CrossEntropy = static("log")
    start_at_zero: bool = static(True)
    init: Init = static("random")
    inits: Annotated[int, Range(1, 1_000)] = static(1)
    norm_scale: Scale = static("linear")
    two_sided: bool = static(False)
    screen: Count | None = static(None)
    labels: tuple[Class, ...] | None = static(None, before=None)
    lanes: Count | None = static(None)

    used_if = {key: {"screen": ...} for key in ("screen_overlap", "screen_patience")}
    budget_fields = ("steps", "batches")
    presets = {
        "paper": {},
        "original_code": {"ce": "linear"},
        "backdoorbench": {
            "steps": 80, "batch": 256, "batches": 10, "start_at_zero": False, "success": 0.98,
            "stop_ratio": 0.99,
            "init": "ones",
        },
        "cpu": {"steps": 40, "batches": 10},
        "low-cost": {"screen": 100},
    }  # fmt: skip

    def once(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        numbers = searched(self.labels, model.classes)
        labels = jnp.asarray(numbers, jnp.int32)
        found = self.search(key, model, variables, clean.image, labels)
        verdict = self.judge(found.norm, found.qualified & found.kept)
        # Searches that were given up have norms unlike those of whole ones.
        p_value = jnp.where(found.kept.all(), verdict.p_value, jnp.nan)
        info = (
            verdict.info
            | {
                "success": self.reach(model, variables, clean.image, found.trigger, labels),
                "steps": found.steps,
                "cost": found.cost,
                "mask": found.trigger.mask,
                "pattern": found.trigger.pattern,
            }
            | ({} if self.screen is None else {"kept": found.kept})
        )
        flagged, info = spread((verdict.flagged, info), numbers, model.classes)
        return Verdict(verdict.index, verdict.infected, flagged, info, p_value)

    def judge(self, norms: jax.Array, qualified: jax.Array) -> Verdict:
        """The outlier rule on the labels' norms: `norms, qualified: [K]`."""
        index, index_log = (
            metrics.anomaly_index(v) for v in (norms, jnp.log(jnp.maximum(norms, 1e-6)))
        )
        decisive = {"linear": index, "log": index_log}[self.norm_scale]
        side = (norms < jnp.median(norms)) | self.two_sided
        flagged = qualified & side & (decisive > self.threshold)
        smallest = jnp.argmin(jnp.where(qualified | ~qualified.any(), norms, jnp.inf))
        info = {"norms": norms, "index": index, "index_log": index_log, "qualified": qualified}
        p_value = metrics.smallest_p(norms, qualified)
        return Verdict(decisive[smallest], flagged.any(), flagged, info, p_value)

    def search(
        self, key: jax.Array, model: Model, variables: Variables, images: Array, labels: jax.Array
    ) -> Found:
        """The smallest working trigger for each of `labels: [L]`, whatever the others are. `images:
        [N, H, W, C]`.
        """
        start, step = self._moves(key, model, variables, images)

        def done(state: Search) -> jax.Array:
            return state.schedule.stopped | (state.schedule.steps >= self.steps)

        attempts = jnp.arange(self.inits)
        items = (jnp.repeat(labels, self.inits), jnp.tile(attempts, labels.shape[0]))
        kept, lanes = jnp.ones(labels.shape, bool), folded(self.lanes, model, variables, self.batch)
        if self.screen is None or self.screen >= labels.shape[0]:
            end: Search = mesh.drain(start, step, done, items, lanes)
        else:
            states, kept = self._screened(mesh.lane_map(start, items, lanes), step, done, lanes)
            rows = (
                jnp.argsort(~kept, stable=True)[: self.screen, None] * self.inits + attempts[None]
            )
            rows = rows.reshape(-1)
            best = mesh.drain(
                lambda state: state, step, done, jax.tree.map(lambda v: v[rows], states), lanes
            )
            end = jax.tree.map(lambda every, these: every.at[rows].set(these), states, best)

        qualified = jnp.isfinite(end.schedule.best)
        trigger = jax.tree.map(
            lambda best, last: jnp.where(qualified.reshape(-1, 1, 1, 1), best, last),
            end.best,
            squash(end.raw),
        )
        norm = trigger.mask.sum((1, 2, 3))
        norm = jnp.where(jnp.isnan(norm), jnp.inf, norm)
        found = Found(
            trigger,
            norm,
            qualified,
            end.schedule.steps,
            end.schedule.cost,
            jnp.repeat(kept, self.inits),
        )
        # Of each label's attempts the one with the smallest norm among those that qualified.
        pick = (
            jnp.argmin(end.schedule.best.reshape(-1, self.inits), 1)
            + jnp.arange(labels.shape[0]) * self.inits
        )
        return jax.tree.map(lambda leaf: leaf[pick], found)

    def rank(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> jax.Array:
        """|m|₁ of each label after 8 short outer steps, 40 mini-batches in all: `[K]`, NaN where
        not searched. A backdoor's label leads by then.
        """
        labels = searched(self.labels, model.classes)
        short = dataclasses.replace(self, batches=min(self.batches, 5))
        numbers = jnp.asarray(labels, jnp.int32)
        norms = short.history(key, model, variables, clean.image, numbers, 8)[-1]
        return spread(norms, labels, model.classes)

    def history(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        images: Array,
        labels: jax.Array,
        steps: int,
    ) -> jax.Array:
        """|m|₁ of each label's mask after each of `steps` outer steps, none of them the last:
        `[steps, L]`.
        """
        start, step = self._moves(key, model, variables, images)

        def one(label):
            def go(state, _):
                state = step(state)
                return state, squash(state.raw).mask.sum()

            return jax.lax.scan(go, start((label, jnp.zeros((), jnp.int32))), length=steps)[1]

        return mesh.lane_map(one, labels, folded(self.lanes, model, variables, self.batch)).T

    def _moves(
        self, key: jax.Array, model: Model, variables: Variables, images: Array
    ) -> tuple[Callable[[Any], Search], Callable[[Search], Search]]:
        """How a search starts, from `(label, attempt)`, and an outer step of it."""
        images = jnp.asarray(images)
        n = images.shape[0]
        adam = optax.adam(self.lr, b1=0.5, b2=0.9)  # type: ignore[arg-type]
        rule = optax.chain(adam, within(Trigger(-BOUND, -BOUND), Trigger(BOUND, BOUND)))  # type: ignore[arg-type]

        def key_of(label, attempt):
            return jax.random.fold_in(jax.random.fold_in(key, label), attempt)

        def start(item) -> Search:
            label, attempt = item
            raw = unsquash(
                random_trigger(jax.random.fold_in(key_of(label, attempt), 0), model.shape)
            )
            raw = jax.tree.map(jnp.ones_like, raw) if self.init == "ones" else raw
            return Search(label, attempt, raw, rule.init(raw), squash(raw), self.begin())

        def step(state: Search) -> Search:
            def loss(raw, rows):
                trigger = squash(raw)
                logits = model.apply(variables, stamp(trigger, unit(images[rows]))).logits
                value = (
                    self.cross_entropy(logits, state.label)
                    + state.schedule.cost * trigger.mask.sum()
                )
                return value, reaches(logits, state.label).mean()

            here = jax.random.fold_in(key_of(state.label, state.attempt), state.schedule.steps + 1)
            batch = min(self.batch, n)
            rows = jax.random.permutation(here, n)[jnp.arange(self.batches * batch) % n].reshape(
                self.batches, batch
            )
            (raw, opt_state), hits = descend(loss, state.raw, state.opt_state, rows, rule)
            trigger = squash(raw)
            schedule, better = self.update(state.schedule, hits.mean(), trigger.mask.sum())
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), trigger, state.best)
            # What stands still, or is not a number, and fails at that will do so for ever.
            moved = jnp.stack([(jnp.abs(a - b) > 0).any() for a, b in zip(raw, state.raw)]).any()
            stuck = ~moved & (hits.mean() < self.success)
            schedule = schedule._replace(stopped=schedule.stopped | stuck)
            return Search(state.label, state.attempt, raw, opt_state, best, schedule)

        return start, step

    def _screened(
        self, states: Search, step: Callable, done: Callable, lanes: int | None
    ) -> tuple[Search, jax.Array]:
        """All searches, `states`, until the ranks of the labels' norms are consistent, and the
        `screen` leaders: `[L]`.
        """
        screen = self.screen or len(states.label)

        def leaders(states):
            norm = squash(states.raw).mask.sum((1, 2, 3)).reshape(-1, self.inits).min(1)
            return jnp.argsort(jnp.argsort(norm)) < screen

        def round_(carry):
            states, before, row, rounds = carry
            states = mesh.lane_map(
                lambda s: jax.lax.cond(done(s), lambda s: s, step, s), states, lanes
            )
            now = leaders(states)
            consistent = (now & before).sum().astype(
                jnp.float32
            ) > self.screen_overlap * jnp.asarray(screen, jnp.float32)
            return states, now, jnp.where(consistent, row + 1, 0), rounds + 1

        def going(carry):
            return (carry[2] < self.screen_patience) & (carry[3] < self.steps)

        zero = jnp.zeros((), jnp.int32)
        states, kept, _, _ = mesh.loop(going, round_, (states, leaders(states), zero, zero))
        return states, kept

    def cross_entropy(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """How far a batch with `logits: [B, K]` is from `label: []`."""
        log_p = jax.nn.log_softmax(logits)[:, label]
        return -log_p.mean() if self.ce == "log" else jnp.log(1e7) * (1 - jnp.exp(log_p)).mean()

    def begin(self) -> Schedule:
        """The schedule before the first step."""
        cost = jnp.asarray(0.0 if self.start_at_zero else self.init_cost, jnp.float32)
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return Schedule(cost, zero, zero, zero, no, no, jnp.asarray(jnp.inf), zero, zero, no)

    def update(self, old: Schedule, rate: jax.Array, norm: jax.Array) -> tuple[Schedule, jax.Array]:
        """After a step that sent the share `rate` to the label and left |m|₁ = `norm`, and whether
        it is the best.
        """
        ok = rate >= self.success
        better = ok & (norm < old.best)
        best = jnp.where(better, norm, old.best)
        # The first qualifying mask improves on infinity.
        stale = jnp.where(
            jnp.isfinite(best),
            jnp.where(best >= self.stop_ratio * old.best, old.stale + 1, 0),
            old.stale,
        )
        highest = jnp.maximum(jnp.asarray(self.init_cost, jnp.float32), WORST)
        settled = (old.rose & old.fell) | (old.cost >= highest)
        stopped = settled & (stale >= self.stop_patience)

        succeeded = jnp.where((old.cost == 0) & ok, old.succeeded + 1, 0)
        begins = succeeded >= self.patience
        cost = jnp.where(begins, jnp.asarray(self.init_cost, jnp.float32), old.cost)
        ups = jnp.where(ok, jnp.where(begins, 0, old.ups) + 1, 0)
        downs = jnp.where(ok, 0, old.downs + 1)
        up, down = ups >= self.patience, downs >= self.patience
        higher = jnp.minimum(cost * self.cost_up, highest)
        cost = jnp.where(up, higher, jnp.where(down, cost / self.cost_down, cost))
        new = Schedule(
            cost=cost,
            succeeded=jnp.where(begins, 0, succeeded),
            ups=jnp.where(up, 0, ups),
            downs=jnp.where(down, 0, downs),
            rose=(old.rose & ~begins) | up,
            fell=(old.fell & ~begins) | down,
            best=best,
            stale=stale,
            steps=old.steps + 1,
            stopped=stopped,
        )
        return new, better

    def reach(
        self,
        model: Model,
        variables: Variables,
        images: Array,
        triggers: Trigger,
        labels: jax.Array,
    ) -> jax.Array:
        """Share of `images` that each of `triggers`, stacked, sends to its label: `[L]`."""
        images = jnp.asarray(images)

        def one(item):
            trigger, label = item

            def hit(i):
                return reaches(
                    model.apply(variables, stamp(trigger, unit(images[i]))).logits, label
                )

            return batched(hit, images.shape[0], 250).mean()

        return mesh.lane_map(one, (triggers, labels), self.lanes)

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        searched(self.labels, model.classes)
        if model.classes < 3:
            raise BadInput(
                "Neural Cleanse compares the labels of a model: it needs 3 classes or more, not "
                f"{model.classes}"
            )
        if len(clean.image) == 0:
            raise BadInput("Neural Cleanse needs clean images: the defender has none")
