"""DB-COVIDNet: members that each see a few blocks of the image only, and a vote."""

import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.base import Training
from bdjax.defenses.parts.view import viewed
from bdjax.mesh import bytes_of, fits, lane_map
from bdjax.metrics import hits, labels
from bdjax.registry import defense, static
from bdjax.train import Recipe, TrainSet, batched, fit, stamped, unit
from bdjax.types import (
    INT32,
    Array,
    Attack,
    BadInput,
    Count,
    Model,
    Output,
    Plan,
    Range,
    Repaired,
    Size,
    Split,
    Variables,
    between,
)

Vote = Literal["majority", "mean", "median", "trimmed"]
Partition = Literal["grid", "random"]
Design = Literal["guaranteed", "random"]
TIE = 1e-3
"""What the mean probabilities weigh in a majority vote: less than any one vote of up to 1000."""


def blocks_of(
    key: jax.Array, shape: tuple[int, int, int], grid: tuple[int, int], partition: str
) -> jax.Array:
    """The block `[H, W]` in 0 … rows·columns − 1 that each pixel belongs to; under "random", blocks
    of scattered pixels.
    """
    height, width, _ = shape
    rows, columns = grid
    block = np.add.outer(
        np.arange(height) * rows // height * columns, np.arange(width) * columns // width
    )
    return (
        jax.random.permutation(key, block.reshape(-1)).reshape(block.shape)
        if partition == "random"
        else jnp.asarray(block)
    )


def assign(
    key: jax.Array, members: int, blocks: int, keep: Array | int, *, balanced: bool = True
) -> jax.Array:
    """Which `keep` of the blocks each member sees: `[members, blocks]` bool.

    Balanced: a member takes the blocks that the fewest members before it have taken, ties at
    random, so that no block is seen by more than ⌈members · keep / blocks⌉. Otherwise each draws
    evenly.
    """

    def member(seen, key):
        score = jax.random.uniform(key, (blocks,)) + (seen if balanced else 0.0)
        mine = jnp.argsort(jnp.argsort(score)) < keep
        return seen + mine.astype(jnp.float32), mine

    return jax.lax.scan(member, jnp.zeros(blocks), jax.random.split(key, members))[1]


def combine(probabilities: jax.Array, vote: str) -> jax.Array:
    """The vote's distribution `[B, K]` from `probabilities: [members, B, K]`.

    "majority": shares of the members' labels, ties broken by the mean; "median" and "trimmed" (the
    mean without the highest and lowest third) are taken class by class and rescaled to sum to 1. A
    member without a label (NaN) votes for nobody: it finds all classes alike; where none has one,
    neither has the vote.
    """
    members, _, classes = probabilities.shape
    label = labels(probabilities)
    probabilities = jnp.where((label >= 0)[..., None], probabilities, 1 / classes)
    mean = probabilities.mean(0)
    if vote == "majority":
        found = (1 - TIE) * jax.nn.one_hot(label, classes).mean(0) + TIE * mean
    elif vote == "mean":
        found = mean
    else:
        cut = (members - 1) // (2 if vote == "median" else 3)
        middle = jnp.sort(probabilities, 0)[cut : members - cut].mean(0)
        found = middle / middle.sum(-1, keepdims=True)
    return jnp.where((label >= 0).any(0)[:, None], found, jnp.nan)


@functools.lru_cache(maxsize=64)
def ensemble(model: Model, members: int, vote: Vote, lanes: int | None = None) -> Model:
    """`members` of `model` that vote: the variables are the members', stacked; softmax(logits) is
    the vote's distribution.

    The one site is `votes: [B, members]`, the members' labels, -1 = none: to look at, not to cut or
    push.
    """

    def init(key):
        return jax.vmap(model.init)(jax.random.split(key, members))

    def apply(variables, x, *, train=False, edits=None, key=None):
        if edits or "masks" in variables:
            raise BadInput(
                "an ensemble has no site to edit or mask: run this defense on its members"
            )

        def member(item):
            number, mine = item
            out = model.apply(
                mine, x, train=train, key=None if key is None else jax.random.fold_in(key, number)
            )
            # Compiled for a CPU, softmax may turn NaN logits into numbers.
            known = (labels(out.logits) >= 0)[:, None]
            return jnp.where(known, jax.nn.softmax(out.logits), jnp.nan), out.variables

        probabilities, variables = lane_map(member, (jnp.arange(members), variables), lanes)
        whole = combine(probabilities, vote)
        logits = jnp.where(jnp.isnan(whole), jnp.nan, jnp.log(jnp.maximum(whole, 1e-30)))
        return Output(logits, {"votes": labels(probabilities).T}, variables)

    return model._replace(init=init, apply=apply, sites=("votes",))


def resample(key: jax.Array, plan: Plan) -> Plan:
    """A bootstrap sample of the rows that exist: as many, drawn with replacement."""
    rows = jax.random.randint(key, plan.source.shape, 0, plan.size)
    return plan.take(rows, plan.size)


@defense("db-covidnet")
class DbCovidNet(Training):
    """Bagging of nets that each see a few blocks of the image, and vote (Shamshiri et al., 2023).

    A reconstruction: the paper's text could not be obtained. Known: dropped features, or pixels,
    that form a partition; a bagging ensemble; a vote; several triggers in different parts defeat
    it. Ours: the pixels are divided into blocks; member k is trained on a bootstrap sample of the
    (poisoned) data, and later asked, with all but `keep` blocks at zero: x ⊙ (1 − d_k). It works
    where few members see the trigger: the default design lets fewer than half of them see any one
    block. That is what a median bears; a majority vote, in truth a plurality, is swung by less
    where the others disagree. More members see a trigger that lies across blocks.

    `keep`: blocks that a member sees. `grid`: (rows, columns) of blocks; stripes are (k, 1) or (1,
    k). `partition`: "random" scatters the pixels of a block. `design`: "random" draws each member's
    blocks evenly, with no guarantee. `scale`: multiply what is seen by blocks / keep, as dropout
    does. `vote`: see `combine`. `lanes`: members trained side by side. Where members · keep is a
    multiple of the number of blocks, every block is seen by equally many.

    Presets: `cpu`, four members: each block is seen by one.

    The result runs on `ensemble(...)`. `info`: `blocks: [members, blocks]` bool, what each sees;
    `seen: [blocks]` by how many; `loss`, `acc: [members, epochs]`.

    Reference: Samaneh Shamshiri, Ki Jin Han and Insoo Sohn, "DB-COVIDNet: A Defense Method against
    Backdoor Attacks", Mathematics.
    """

    keep: Annotated[Array | int, Range(1, INT32)] = 4
    members: Annotated[int, Range(1, 1_000)] = static(10)
    grid: tuple[Size, Size] = static((4, 4))
    partition: Partition = static("grid")
    design: Design = static("guaranteed")
    vote: Vote = static("majority")
    bootstrap: bool = static(True)
    scale: bool = static(False)
    lanes: Count | None = static(None)

    budget_fields = ("members",)
    presets = {"cpu": {"members": 4}}

    def __call__(
        self, key: jax.Array, model: Model, recipe: Recipe, data: TrainSet, clean: Split
    ) -> Repaired:
        key_blocks, key_assign, key_fit = jax.random.split(key, 3)
        count = self.grid[0] * self.grid[1]
        block = blocks_of(key_blocks, model.shape, self.grid, self.partition)
        kept = assign(
            key_assign, self.members, count, self.keep, balanced=self.design == "guaranteed"
        )
        factor = count / jnp.asarray(self.keep, jnp.float32) if self.scale else 1.0
        member = viewed(model)

        def train(item):
            key, kept = item
            key_init, key_rows, key_fit = jax.random.split(key, 3)
            view = jnp.broadcast_to(
                kept[block][..., None].astype(jnp.float32) * factor, model.shape
            )
            rows = data._replace(plan=resample(key_rows, data.plan)) if self.bootstrap else data
            return fit(
                key_fit, member, recipe, rows, variables={**member.init(key_init), "view": view}
            )

        variables, log = lane_map(
            train, (jax.random.split(key_fit, self.members), kept), self.lanes
        )
        info = {"blocks": kept, "seen": kept.sum(0)} | log._asdict()
        return Repaired(variables, info)

    def wrap(self, model: Model) -> Model:
        return ensemble(viewed(model), self.members, self.vote, self.lanes)

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Attack | None,
        result: Repaired,
    ) -> dict[str, jax.Array]:
        """Of each member: `votes_clean`, `votes_stamped`, its share of votes for the label aimed at
        by the first trigger, among images that are not of it; `sees_trigger`, whether its blocks
        show a pixel that the trigger changes. `[members]` each.
        """
        if attack is None:
            return {}
        aimed = attack.success(jnp.asarray(1), jnp.asarray(test.label), model.classes)
        counted = (aimed >= 0) & (aimed != test.label)
        voting = self.wrap(model)
        clean, trojan = unit(test.image), stamped(attack, 1, test.image, key)

        def share(x):
            votes = batched(lambda i: voting.apply(variables, x[i]).acts["votes"], x.shape[0], 250)
            return hits(votes, aimed[:, None]).mean(0, where=counted[:, None])

        changed = (jnp.abs(trojan - clean) > 1e-6).any((0, 3))
        sees = (variables["view"].any(-1) & changed[None]).any((1, 2))
        return {"votes_clean": share(clean), "votes_stamped": share(trojan), "sees_trigger": sees}

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        each = bytes_of(jax.eval_shape(model.init, jax.random.key(0)))
        fits(f"an ensemble of {self.members}", self.members * each)
        count = self.grid[0] * self.grid[1]
        if self.grid[0] > model.shape[0] or self.grid[1] > model.shape[1]:
            raise BadInput(
                f"grid {self.grid} does not divide images of {model.shape[0]}×{model.shape[1]}"
            )
        between("keep", self.keep, 1, count)
        most = int(-(-self.members * np.max(np.asarray(self.keep)) // count))
        if self.design == "guaranteed" and 2 * most >= self.members:
            raise BadInput(
                f"{most} of {self.members} members would see one block, not fewer than half: lower "
                "keep or take design='random'"
            )
