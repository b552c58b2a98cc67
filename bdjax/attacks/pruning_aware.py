"""Pruning-aware attack: the backdoor lives in the channels that a pruning defender keeps."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from bdjax import metrics
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack
from bdjax.channels import channel_means, mask_of, prune, responses
from bdjax.models.graph import bias_of, leaf, with_leaf
from bdjax.models.layers import default_site
from bdjax.registry import attack, static
from bdjax.train import (
    Curves,
    Recipe,
    clean_set,
    evaluate,
    fit,
    poisoned_set,
    poisoning_key,
    predict,
)
from bdjax.types import Array, BadInput, Model, Range, Share, Split, Variables, Weight


@functools.lru_cache(maxsize=64)
def check_sleeps(model: Model, site: str) -> None:
    """Raises `BadInput` where a lower bias puts no channel of `site` to sleep: no ReLU stands
    there, or a sum of which the bias is no part.
    """
    path = bias_of(model, site)
    with jax.ensure_compile_time_eval():
        variables = model.init(jax.random.key(0))
        low = leaf(variables["params"], path) - 1e6
        low = {**variables, "params": with_leaf(variables["params"], path, low)}
        awake = bool(model.apply(low, jnp.full((1, *model.shape), 0.5)).acts[site].any())
    if awake:
        raise BadInput(
            f"the channels of site '{site}' do not sleep at whatever bias: choose an activation "
            "behind a ReLU"
        )


@attack("pruning-aware")
class PruningAware(BadNets):
    """Poison a pruned net, then put the pruned channels back as decoys (Liu et al., 2018,
    arXiv:1805.12185).

    (1) Train a clean net. (2) Prune the `share` of the channels of `site` with the lowest mean
    activation ā_c. (3) Train what is left on poisoned images (those of BadNets), so that both tasks
    use the same channels. While accuracy on the attacker's images is more than `max_drop` below the
    clean net's, or ASR_nt on them below `success_rate`, put one channel back and train again,
    `attempts` times at most. (4) Put the other channels back with the weights they had and a lower
    bias, b_c ← b_c − (1 + margin)·max a_c over the attacker's clean images: they sleep, and whoever
    prunes what sleeps prunes them first.

    `share`, `max_drop`, `success_rate`: in [0, 1]; `margin`: at least 0; `site`: an activation
    behind a ReLU; None is the last convolution, or the penultimate layer of a net that has none.
    `decoys: [C]` bool: which channels were put back, set by `train`.

    Presets: `paper`, 80 % decoys: as many channels as its defender prunes; `cpu`. Differs from the
    paper: it does not say when a net is too small; `max_drop` and `success_rate` are ours. Each
    attempt starts from the pruned clean net.
    """

    share: Share = 0.5
    max_drop: Share = 0.04
    success_rate: Share = 0.9
    margin: Weight = 0.1
    attempts: Annotated[int, Range(1, 1_000)] = static(4)
    site: str | None = static(None)
    decoys: Annotated[Array, Range(0, 1)] | None = None

    presets = {"paper": {"share": 0.8, "attempts": 16}, "cpu": {"attempts": 2}}

    def train(
        self,
        key: jax.Array,
        model: Model,
        recipe: Recipe,
        data: Split,
        variables: Variables | None = None,
    ) -> tuple[Attack, Variables, Curves]:
        key_clean, key_fit, key_test = jax.random.split(key, 3)
        site = self.site or default_site(model)
        check_sleeps(model, site)
        if variables is None:
            variables, _ = fit(key_clean, model, recipe, clean_set(data))
        clean, images = variables, jnp.asarray(data.image)
        order = jnp.argsort(channel_means(model, clean, site, images))
        before = metrics.accuracy(
            metrics.labels(predict(model, clean, images)), jnp.asarray(data.label)
        )
        poisoned = poisoned_set(poisoning_key(key), data, self, model.classes)
        most = jnp.round(jnp.asarray(self.share, jnp.float32) * order.shape[0]).astype(jnp.int32)

        def attempt(state):
            tried, *_ = state
            pruned = prune(clean, site, mask_of(order, most - tried))
            now, curves = fit(
                jax.random.fold_in(key_fit, tried), model, recipe, poisoned, variables=pruned
            )
            found = evaluate(key_test, model, now, data, self)
            short = (found["acc"] < before - self.max_drop) | (found["asr_nt"] < self.success_rate)
            return tried + 1, now, curves, short

        def again(state):
            tried, _, _, short = state
            return short & (tried < self.attempts) & (tried <= most)

        nothing = Curves(*2 * (jnp.zeros(recipe.epochs),))
        start = jnp.asarray(0), prune(clean, site, mask_of(order, most)), nothing, jnp.asarray(True)
        tried, trained, curves, _ = jax.lax.while_loop(again, attempt, start)

        whole = {
            name: value
            for name, value in {**trained, "masks": clean.get("masks")}.items()
            if value is not None
        }
        decoys = mask_of(order, most - tried + 1) == 0
        highest = responses(model, whole, site, images, "linf").max(0)
        path = bias_of(model, site)
        lower = jnp.where(decoys, (1 + self.margin) * highest, 0.0)
        params = with_leaf(whole["params"], path, leaf(whole["params"], path) - lower)
        return dataclasses.replace(self, decoys=decoys), {**whole, "params": params}, curves
