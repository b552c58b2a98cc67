"""Fine-Pruning: prune what sleeps on clean images, then fine-tune."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.channels import channel_means, curve, curves_on_test, largest_within, mask_of, prune
from bdjax.defenses.base import Repair
from bdjax.mesh import lane_map
from bdjax.models.layers import check_site, default_site
from bdjax.registry import defense, static
from bdjax.train import Recipe, advance, begin, clean_set, evaluate, fit
from bdjax.types import Array, Attack, BadInput, Model, Repaired, Share, Size, Split, Variables


@defense("fine-pruning")
class FinePruning(Repair):
    """Prune the channels that clean images leave dormant, then fine-tune (Liu et al., 2018,
    arXiv:1805.12185).

    Channels are pruned in increasing order of their mean activation ā_c on the clean images; k of
    them, the largest count with acc(0) − acc(j) ≤ max_drop for all j ≤ k; then the net is trained
    on the same clean images with the pruned channels at zero.

    `site`: where to prune; None is the last convolution before its pooling, or the penultimate
    layer of a net that has none. `max_drop`: accuracy that pruning may cost on the clean images,
    absolute, in [0, 1]. `share`: prune this share of the channels instead, in [0, 1]. `recipe`: the
    fine-tuning. `one_by_one`: instead of either, prune this many channels one at a time, each
    followed by the whole recipe with one optimiser throughout; channels that no clean image fires
    come last. `reset`: name of a layer that gets the victim's parameters back each time (Ye et
    al.'s code does so with the pruned convolution: what it learnt is lost, all other layers go on).

    As in the paper, the same clean images rank the channels, set the count and fine-tune.

    Presets: `paper`; `original_code`, 48 of 60 channels as in the authors' face script;
    `backdoorbench`, the penultimate layer, 100 epochs of SGD; `csaw`, Ye et al.'s (2021): one
    channel at a time, 10 epochs each, to 10 % of DeepID's 60 (their code counts double and stops at
    4). On DeepID both papers prune `site="pool_3"`, not its last convolution; the quirk is
    `reset="conv_3"`. `cpu`: small batches, for a few hundred clean images.

    Decides most: the learning rate of the fine-tuning, more than the pruning. The paper has none;
    ours is that of the authors' solver, Adam at a fixed 1e-3, and of Ye et al., whose 10 epochs we
    take too. Show it beside others (`analysis.sensitivity`): at 1e-4, 3e-4, 1e-3, 3e-3 and 1e-2 the
    preset `cpu` left one all-to-all net of MNIST an ASR_nt of 50, 17, 3, 1 and 1 %, one with the
    5×5 square 100, 100, 100, 92 and 3 %.

    `info`: `order: [C]`, `activation: [C]` = ā, `curve: [C + 1]` accuracy on the clean images by
    pruned count (before any fine-tuning), `pruned` = k, `loss` and `acc` of the fine-tuning, by
    epoch, or by channel and epoch. For the curve of any other images and labels, ASR say, see
    `channels.curve`; for learning rate × channels `grid`.

    Differs from the paper: a mask stands for zeroed weights, and keeps pruned channels at zero in
    the fine-tuning. Differs from BackdoorBench: its drop is relative and in steps of 1 % of the
    channels, its learning rate decays along a cosine, and it looks at test images. Differs from Ye
    et al.: they zero the weights and let them grow again.

    Reference: Kang Liu, Brendan Dolan-Gavitt and Siddharth Garg, "Fine-Pruning: Defending Against
    Backdooring Attacks on Deep Neural Networks", In Research in Attacks, Intrusions, and Defenses.
    """

    max_drop: Share = 0.04
    share: Share | None = None
    recipe: Recipe = Recipe(lr=1e-3, epochs=10)
    site: str | None = static(None)
    one_by_one: Size | None = static(None)
    reset: str | None = static(None)

    used_if = {
        "max_drop": {"share": (None,), "one_by_one": (None,)},
        "share": {"one_by_one": (None,)},
        "reset": {"one_by_one": ...},
    }
    budget_fields = ("recipe.epochs", "recipe.batch")
    sensitive = "recipe.lr"
    presets = {
        "paper": {},
        "original_code": {"share": 0.8},
        "backdoorbench": {
            "site": "penultimate",
            "max_drop": 0.1,
            "recipe": Recipe(lr=0.01, weight_decay=5e-4, epochs=100, batch=256, optimizer="sgd"),
        },
        "csaw": {"one_by_one": 6, "recipe": Recipe(lr=1e-3, epochs=10, batch=32)},
        "cpu": {"recipe": Recipe(lr=1e-3, epochs=10, batch=32)},
    }

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        site = self.site or default_site(model)
        order, activation = self.rank(model, variables, clean)
        points = curve(model, variables, site, order, clean.image, clean.label)
        info = {"order": order, "activation": activation, "curve": points}
        if self.one_by_one is not None:
            tuned, (log, _) = self.one_at_a_time(
                key, model, variables, clean, order, self.one_by_one
            )
            return Repaired(
                tuned, info | {"pruned": jnp.asarray(log.loss.shape[0])} | log._asdict()
            )
        if self.share is None:
            count = largest_within(points, self.max_drop)
        else:
            count = jnp.round(jnp.asarray(self.share, jnp.float32) * order.shape[0]).astype(
                jnp.int32
            )
        pruned = prune(variables, site, mask_of(order, count))
        tuned, log = fit(key, model, self.recipe, clean_set(clean), variables=pruned)
        return Repaired(tuned, info | {"pruned": count} | log._asdict())

    def rank(self, model: Model, variables: Variables, clean: Split) -> tuple[jax.Array, jax.Array]:
        """The order `[C]` in which channels are pruned, and their mean activations `[C]`."""
        activation = channel_means(model, variables, self.site or default_site(model), clean.image)
        order = jnp.argsort(activation)
        if self.one_by_one is not None:
            order = order[jnp.argsort(activation[order] == 0, stable=True)]
        return order, activation

    def one_at_a_time(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        clean: Split,
        order: jax.Array,
        count: int,
        measure: Callable[[Variables], Any] = lambda variables: None,
    ) -> tuple[Variables, Any]:
        """Prunes the first `count` channels of `order: [C]` in turn and fine-tunes; returns the
        last net and, for each channel, the fine-tuning's curves and `measure` of the net, stacked.
        """
        site, params = self.site or default_site(model), variables["params"]
        whole = jnp.ones(order.shape[0])

        def stage(state, channel):
            net = prune(state.variables, site, whole.at[channel].set(0.0))
            if self.reset is not None:
                net = {**net, "params": {**net["params"], self.reset: params[self.reset]}}
            state = state._replace(variables=net)
            state, log = advance(
                key, state, model, self.recipe, clean_set(clean), epochs=self.recipe.epochs
            )
            return state, (log, measure(state.variables))

        state = begin(key, model, self.recipe, prune(variables, site, whole))
        state, found = jax.lax.scan(stage, state, order[:count])
        return state.variables, found

    def grid(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        clean: Split,
        test: Split,
        attack: Attack | None,
        lrs: Array,
        counts: Sequence[int],
        *,
        lanes: int | None = None,
    ) -> dict[str, jax.Array]:
        """`acc`, `asr_all`, `asr_nt: [L, C']` on `test` after repair with each of `lrs: [L]` and of
        `counts` of pruned channels, in one program: for a heat-map, not for a choice. With
        `one_by_one` the net with k channels pruned goes on from that with k − 1, and a count of 0
        is the victim.
        """

        def measure(net):
            found = evaluate(key, model, net, test, attack)
            return {name: found[name] for name in ("acc", "asr_all", "asr_nt") if name in found}

        order, _ = self.rank(model, variables, clean)
        lrs, columns = jnp.asarray(lrs, jnp.float32), jnp.asarray(counts)
        if self.one_by_one is not None:
            before = measure(variables)

            def row(lr):
                tuned = dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, lr=lr))
                _, (_, found) = tuned.one_at_a_time(
                    key, model, variables, clean, order, max(counts), measure
                )
                return jax.tree.map(
                    lambda b, s: jnp.concatenate([b[None], s])[columns], before, found
                )

            return lane_map(row, lrs, lanes)

        def cell(item):
            lr, count = item
            net = prune(variables, self.site or default_site(model), mask_of(order, count))
            recipe = dataclasses.replace(self.recipe, lr=lr)
            return measure(fit(key, model, recipe, clean_set(clean), variables=net)[0])

        shape = (lrs.shape[0], columns.shape[0])
        found = lane_map(cell, (jnp.repeat(lrs, shape[1]), jnp.tile(columns, shape[0])), lanes)
        return jax.tree.map(lambda leaf: leaf.reshape(shape), found)

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Attack | None,
        result: Repaired,
    ) -> dict[str, jax.Array]:
        """`acc_curve`, `asr_curve: [C + 1]`: accuracy and ASR_nt (first trigger) on `test` by
        pruned count, before fine-tuning.
        """
        site, order = self.site or default_site(model), result.info["order"]
        return curves_on_test(key, model, variables, site, order, test, attack)

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        check_site(model, self.site or default_site(model))
        self.recipe.check(len(clean.label))
        layers = jax.eval_shape(model.init, jax.random.key(0))["params"]
        if self.reset is not None and (self.reset not in layers or self.one_by_one is None):
            raise BadInput(
                f"reset '{self.reset}' needs one_by_one and one of the layers {', '.join(layers)}"
            )
