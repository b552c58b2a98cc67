"""Which of many labels lead? All are searched at once by a few steps, on few images; then fewer
labels by more steps on more images.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax import mesh
from bdjax.defenses.parts.inversion import (
    BOUND,
    Trigger,
    descend,
    squash,
    stamp,
    within,
)
from bdjax.train import unit
from bdjax.types import Array, Model, Variables

FOLDED = 16
"""Labels whose images go through the net in one batch: it is small for one label."""


class Round(NamedTuple):
    """`steps` more, of `batch` images each, for the `labels` that lead by then."""

    labels: int
    steps: int
    batch: int


ROUNDS = (Round(1 << 30, 10, 8), Round(256, 20, 8), Round(64, 60, 16))
"""Successive halving: of a thousand labels the first round is half of the work."""
PRICE = 13.0
"""What an opaque image costs beside the cross-entropy: about that of a label that is out of
reach.
"""


class State(NamedTuple):
    """One label's search, carried from round to round; `cost: []`, what it compares by: the
    cross-entropy and the price of the mask, over the last quarter of a round.
    """

    label: jax.Array
    raw: Trigger
    opt_state: optax.OptState
    cost: jax.Array


class Screened(NamedTuple):
    """`order: [K]`, the labels, most suspicious first; `cost: [K]`, by which they were compared:
    those of the last round come first, whatever the others' cost.
    """

    order: jax.Array
    cost: jax.Array


def screened(
    key: jax.Array, model: Model, variables: Variables, images: Array, rounds=ROUNDS, lr=0.2
) -> Screened:
    """Ranks all labels by how small a patch sends images to them: min over m, Δ of ℓ(t, f((1 − m)⊙x
    + m⊙Δ)) + `PRICE`·mean(m), by Adam from one faint grey start for all. `images: [N, H, W, C]`.

    What a round leaves out keeps its place behind those that go on. Safe under jit.
    """
    images = jnp.asarray(images)
    adam = optax.adam(lr, b1=0.5, b2=0.9)
    rule = optax.chain(adam, within(Trigger(-BOUND, -BOUND), Trigger(BOUND, BOUND)))  # type: ignore[arg-type]
    raw = Trigger(jnp.full((*model.shape[:2], 1), -2.0), jnp.zeros(model.shape))

    def start(label):
        return State(label, raw, rule.init(raw), jnp.asarray(jnp.inf))

    def loss(label):
        def of(raw, rows):
            trigger = squash(raw)
            logits = model.apply(variables, stamp(trigger, unit(images[rows]))).logits
            ce = -jax.nn.log_softmax(logits)[:, label].mean()
            return (value := ce + PRICE * trigger.mask.mean()), value

        return of

    states = jax.vmap(start)(jnp.arange(model.classes, dtype=jnp.int32))
    behind: list[State] = []
    for i, (labels, steps, batch) in enumerate(rounds):
        count = states.label.shape[0]
        if labels < count and i:
            order = jnp.argsort(states.cost)
            take = lambda some, states=states: jax.tree.map(lambda v: v[some], states)  # noqa: E731
            behind.insert(0, take(order[labels:]))
            states = take(order[:labels])
        rows = jax.random.randint(jax.random.fold_in(key, i), (steps, batch), 0, images.shape[0])

        def go(state: State, rows=rows, steps=steps) -> State:
            (raw, opt_state), cost = descend(
                loss(state.label), state.raw, state.opt_state, rows, rule
            )
            return State(state.label, raw, opt_state, cost[-max(1, steps // 4) :].mean())

        states = mesh.lane_map(go, states, FOLDED)
    last = jnp.argsort(states.cost)
    parts = [jax.tree.map(lambda v: v[last], states), *behind]
    label = jnp.concatenate([part.label for part in parts])
    cost = jnp.concatenate([part.cost for part in parts])
    return Screened(label, jnp.zeros_like(cost).at[label].set(cost))
