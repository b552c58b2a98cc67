"""Training as a pure function: a scan over steps, the poison stamped inside the step, each image in
every epoch as it was written once, one uint8 copy of the data for all runs.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import mesh, metrics
from bdjax.registry import admit, check_given, door, pytree, static, validate
from bdjax.types import (
    INT32,
    MOST,
    Array,
    Attack,
    BadInput,
    Count,
    Epochs,
    Key,
    Model,
    Plan,
    Range,
    Rate,
    Share,
    Split,
    Stamper,
    Variables,
    Weight,
    between,
    check_images,
    check_labels,
    check_variables,
    whole,
)

Optimizer = Literal["adam", "sgd", "adadelta", "rmsprop"]
Augment = Callable[[jax.Array, jax.Array], jax.Array]
"""`augment(key, x) -> x` for a batch `x: [B, H, W, C]` in [0, 1]; a module-level function, so that
programs can be shared.
"""


@pytree
class Recipe:
    """How to train: `epochs` of N draws in batches of `batch` (at most N) with learning rate `lr`.

    `momentum` is SGD's (Nesterov with `nesterov`); `weight_decay` the factor of an L2 term in the
    gradient; `drops`: (epoch, factor) pairs: from that epoch on the learning rate is `lr · factor`.
    Keras' L2 of w is a `weight_decay` of 2·w; its RMSprop has ε outside of the root, here it is
    within.
    """

    lr: Rate = 1e-3
    momentum: Share = 0.9
    weight_decay: Weight = 0.0
    epochs: Epochs = static(8)
    batch: Count = static(128)
    optimizer: Optimizer = static("adam")
    nesterov: bool = static(False)
    drops: tuple[tuple[Epochs, Annotated[float, Range(0, MOST)]], ...] = static(())
    augment: Augment | None = static(None)

    used_if = {"momentum": {"optimizer": ("sgd",)}, "nesterov": {"optimizer": ("sgd",)}}

    def check(self, rows: int) -> None:
        """Raises `BadInput` where a training set of `rows` rows cannot be trained on like this."""
        validate(self)
        if rows < 1:
            raise BadInput(f"batches from {rows} training images: at least 1 is needed")

    def transform(self) -> optax.GradientTransformation:
        """The update rule without its learning rate, which varies with the epoch."""
        rule = {
            "adam": optax.scale_by_adam,
            "sgd": lambda: optax.trace(self.momentum, self.nesterov),  # type: ignore[arg-type]
            "adadelta": lambda: optax.scale_by_adadelta(rho=0.95, eps=1e-7),
            "rmsprop": lambda: optax.scale_by_rms(decay=0.9, eps=1e-7),
        }[self.optimizer]()
        return optax.chain(optax.add_decayed_weights(self.weight_decay), rule)  # type: ignore[arg-type]


class TrainSet(NamedTuple):
    """A poisoned training set as it is stored: the clean images, which rows there are, and how a
    row is stamped.

    Each poisoned image is written once: what is random in the stamp of a row comes from `key` and
    the row's `number` alone, in every epoch and for whoever looks at the row.
    """

    image: Array
    plan: Plan
    attack: Stamper | None = None
    key: jax.Array | None = None

    def rows(self, rows: jax.Array, step: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Images `[B, H, W, C]` in [0, 1], stamped, and their labels `[B]`.

        `step`: the key of a training step, by which an attack with `redraw` draws anew.
        """
        plan = self.plan
        x = unit(jnp.asarray(self.image)[plan.source[rows]])
        if self.attack is not None:
            if self.key is None:
                raise BadInput("a training set with an attack needs the key of its stamps: key=")
            # Stampers that are no attacks, such as reversed triggers, need not say.
            if step is not None and getattr(self.attack, "redraw", False):
                keys = jax.random.split(step, rows.shape[0])
            else:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, plan.number[rows])
            x = jax.vmap(self.attack.stamp)(plan.kind[rows], x, keys)
        return x, plan.label[rows]


class State(NamedTuple):
    """What is carried from epoch to epoch, and saved in a checkpoint."""

    variables: Variables
    opt_state: Any
    epoch: jax.Array


class Curves(NamedTuple):
    """What an epoch reports: mean training `loss: [E]` and accuracy on the drawn rows,
    `acc: [E]`.
    """

    loss: jax.Array
    acc: jax.Array


Loss = Callable[
    [Model, Variables, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]
]
"""`loss(model, variables, x, label, weight, key) -> (scalar, Output)`."""


def unit(image: Array) -> jax.Array:
    """uint8 pixels as float32 in [0, 1]; float pixels as they are."""
    image = jnp.asarray(image)
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image


def clean_plan(y: jax.Array) -> Plan:
    """The plan of an unpoisoned training set with labels `y: [N]`."""
    n = y.shape[0]
    rows = jnp.arange(n)
    return Plan(rows, jnp.zeros(n, jnp.int32), y, jnp.ones(n), rows, jnp.asarray(n))


@door
def clean_set(split: Split) -> TrainSet:
    """`split` as an unpoisoned training set."""
    check_images(split.image, None, split.label)
    return TrainSet(split.image, clean_plan(jnp.asarray(split.label)))


def poisoning_key(key: jax.Array) -> jax.Array:
    """The key by which a run of key `key` poisons its data: `poisoned_set(poisoning_key(key), …)`
    is what it is trained on, for its judges too.
    """
    return jax.random.fold_in(key, 2)


def measuring_key(key: jax.Array) -> jax.Array:
    """The key by which a run of key `key` fires its triggers at the test set."""
    return jax.random.fold_in(key, 1)


def stamp_key(key: jax.Array) -> jax.Array:
    """The key of the stamps of a training set whose rows were chosen by `key`."""
    return jax.random.fold_in(key, 1 << 16)  # the chosen rows take small numbers


@door
def poisoned_set(key: Key, split: Split, attack: Attack | None, classes: Count) -> TrainSet:
    """`split` poisoned by `attack`, each image written once; None gives the clean twin."""
    if attack is None:
        return clean_set(split)
    check_images(split.image, None, split.label, classes)
    admit(attack, split.image.shape[1:], classes)
    attack = attack.bind(split)
    plan = attack.plan(key, jnp.asarray(split.label), classes)
    return TrainSet(split.image, plan, attack, stamp_key(key))


def without(data: TrainSet, removed: jax.Array) -> TrainSet:
    """`data` without the rows `removed: [M]`, to train on again: the kept rows come first, and only
    they exist.
    """
    kept = ~removed & (jnp.arange(removed.shape[0]) < data.plan.size)
    first = jnp.argsort(~kept, stable=True)
    return data._replace(plan=data.plan.take(first, jnp.maximum(kept.sum(), 1)))


def agree(model: Model, recipe: Recipe, data: TrainSet) -> None:
    """Raises `BadInput` where `data` cannot be trained on: images of another shape than the
    model's, labels that it does not have, a recipe that is wrong.
    """
    if not isinstance(data.plan, Plan):
        raise BadInput("a training set without a plan: make it by clean_set or poisoned_set")
    check_given("a training set", {"attack": Stamper | None}, {"attack": data.attack})
    if data.attack is not None:
        check_given("a training set", {"key": Key}, {"key": data.key})
    if np.ndim(data.image) != 1:  # numbers of what a loss of its own reads
        check_images(data.image, model.shape)
    if len({np.shape(leaf)[:1] for leaf in data.plan[:4]}) > 1:
        raise BadInput("source, kind, label and weight of a plan differ in length")
    check_labels(data.plan.label, model.classes)
    n, plan = np.shape(data.image)[0], data.plan
    between("the source of a plan's row", plan.source, 0, n - 1)
    between("the size of a plan", plan.size, 1, np.shape(plan.source)[0])
    admit(recipe, n)


GIVEN: dict[str, Any] = {
    "key": Key, "model": Model, "recipe": Recipe, "data": TrainSet, "variables": Variables,
    "clean": Split, "x": Array,
}  # fmt: skip
"""What a defense is given, by name."""


def cross_entropy(
    model: Model, variables: Variables, x, label, weight, key
) -> tuple[jax.Array, Any]:
    """The weighted mean cross-entropy of a batch."""
    out = model.apply(variables, x, train=True, key=key)
    loss = optax.softmax_cross_entropy_with_integer_labels(out.logits, label)
    return (weight * loss).sum() / jnp.maximum(weight.sum(), 1e-9), out


@door
def begin(key: Key, model: Model, recipe: Recipe, variables: Variables | None = None) -> State:
    """The state before the first epoch: fresh variables, or the given ones."""
    validate(recipe)
    if variables is not None:
        check_variables(variables)
        if "params" not in variables:
            raise BadInput("variables without params cannot be trained: give what init made")
    variables = model.init(key) if variables is None else variables
    return State(variables, recipe.transform().init(variables["params"]), jnp.zeros((), jnp.int32))


@door
def advance(
    key: Key,
    state: State,
    model: Model,
    recipe: Recipe,
    data: TrainSet,
    *,
    epochs: int,
    trainable: Any = None,
    loss: Loss = cross_entropy,
) -> tuple[State, Curves]:
    """`epochs` more epochs. All randomness comes from (key, epoch, step): a resumed run equals an
    unbroken one bit for bit.

    `trainable`: a pytree like the parameters (or a prefix of it) of 0/1 arrays; parameters at 0
    keep their value: frozen layers, pruned links. An epoch is N // batch batches over a random
    permutation of the rows that exist, N the number of base images.
    """
    agree(model, recipe, data)
    whole("epochs", epochs, 0)
    rule = recipe.transform()
    n = data.image.shape[0]
    capacity = data.plan.source.shape[0]
    batch = min(recipe.batch, n)
    params = state.variables["params"]
    masks = None if trainable is None else check_trainable(trainable, params)

    def step(carry, now):
        variables, opt_state = carry
        rows, lr, key = now
        key_stamp, key_augment, key_model = jax.random.split(key, 3)
        x, label = data.rows(rows, key_stamp)
        if recipe.augment is not None:
            x = recipe.augment(key_augment, x)

        def objective(params):
            return loss(
                model, {**variables, "params": params}, x, label, data.plan.weight[rows], key_model
            )

        (value, out), grads = jax.value_and_grad(objective, has_aux=True)(variables["params"])
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction mixes float and int
            updates, opt_state = rule.update(grads, opt_state, variables["params"])
        updates = jax.tree.map(lambda u: -lr * u, updates)
        if masks is not None:
            updates = jax.tree.map(lambda u, m: u * m, updates, masks)
        variables = {**out.variables, "params": optax.apply_updates(variables["params"], updates)}
        return (variables, opt_state), (value, metrics.accuracy(metrics.labels(out.logits), label))

    def epoch(state: State, _):
        here = jax.random.fold_in(key, state.epoch)
        # Rows that do not exist sort behind those that do; positions wrap around, so every batch is
        # full.
        draw = jax.random.uniform(jax.random.fold_in(here, 0), (capacity,))
        order = jnp.argsort(jnp.where(jnp.arange(capacity) < data.plan.size, draw, 2.0))
        steps = n // batch
        rows = order[jnp.arange(steps * batch) % data.plan.size].reshape(steps, batch)
        lr = jnp.asarray(recipe.lr, jnp.float32)
        for first, factor in recipe.drops:
            lr = jnp.where(state.epoch >= first, jnp.asarray(recipe.lr, jnp.float32) * factor, lr)
        keys = jax.random.split(jax.random.fold_in(here, 1), steps)
        carry = (state.variables, state.opt_state)
        (variables, opt_state), (losses, accs) = jax.lax.scan(
            step, carry, (rows, jnp.broadcast_to(lr, steps), keys)
        )
        return State(variables, opt_state, state.epoch + 1), Curves(losses.mean(), accs.mean())

    return jax.lax.scan(epoch, state, length=epochs)


@door
def fit(
    key: Key,
    model: Model,
    recipe: Recipe,
    data: TrainSet,
    *,
    variables: Variables | None = None,
    trainable: Any = None,
    loss: Loss = cross_entropy,
) -> tuple[Variables, Curves]:
    """A whole training run, jit- and vmappable over the key and every leaf of the recipe and the
    attack.

    >>> train = poisoned_set(key, split, BadNets(rate=0.1), 10)
    >>> variables, curves = fit(key, model, Recipe(epochs=5), train)
    """
    agree(model, recipe, data)
    key_init, key_run = jax.random.split(key)
    state = begin(key_init, model, recipe, variables)
    state, curves = advance(
        key_run, state, model, recipe, data, epochs=recipe.epochs, trainable=trainable, loss=loss
    )
    return state.variables, curves


def check_trainable(trainable: Any, params: Any) -> Any:
    """`trainable` for each of `params`; raises `BadInput` where it is no tree like them of
    0 … 1.
    """
    try:
        masks = broadcast_prefix(trainable, params)
        kinds = [(leaf, jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(masks)]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput("trainable is no tree of numbers like the parameters") from error
    for (leaf, shape, kind), param in zip(kinds, jax.tree.leaves(params), strict=True):
        if shape not in ((), jnp.shape(param)) or not jnp.issubdtype(kind, jnp.floating):
            raise BadInput(
                f"trainable has {kind}{list(shape)} for {param.dtype}{list(jnp.shape(param))}: "
                "give floats of that shape, 0 or 1"
            )
        between("trainable", leaf, 0, 1)
    return masks


def broadcast_prefix(prefix: Any, tree: Any) -> Any:
    """`prefix` with each of its leaves repeated over the subtree of `tree` that it stands for."""
    return jax.tree.map(lambda leaf, sub: jax.tree.map(lambda _: leaf, sub), prefix, tree)


AT_ONCE = 100
"""Images at a time on a CPU where `mesh.OLD`: there 10,000 replicas of STRIP, 28×28, take 0.23 s,
but 0.53 s with 500 at a time.
"""


def batched(fn: Callable, rows: int, batch: int) -> Any:
    """`fn(index [b]) -> pytree of [b, ...]` over indices 0 … rows − 1 in pieces of one size, at
    most `batch`, that fit in memory: pytree of `[rows, ...]`. What it makes of an index hangs on
    nothing but that index.
    """
    if mesh.OLD and mesh.platform() == "cpu":
        batch = min(batch, AT_ONCE)
    count = -(-rows // batch)
    return in_pieces(fn, rows, -(-rows // count))  # 640 by 500 are 2 × 320, not 2 × 500


def in_pieces(fn: Callable, rows: int, batch: int) -> Any:
    """As `batched`, in the very `pieces` of that batch: where draws hang on them."""
    index = pieces(rows, batch)
    if len(index) == 1:
        return fn(index[0])
    out = jax.lax.map(fn, index)
    return jax.tree.map(lambda leaf: leaf.reshape(index.size, *leaf.shape[2:])[:rows], out)


def pieces(rows: int, batch: int) -> jax.Array:
    """Indices 0 … rows − 1 in pieces of one size, at most `batch`: the last row fills the last
    one.
    """
    batch = min(batch, rows)
    count = -(-rows // batch)
    return jnp.minimum(jnp.arange(count * batch), rows - 1).reshape(count, batch)


@door
def predict(model: Model, variables: Variables, images: Array, *, batch: Count = 250) -> jax.Array:
    """Logits `[N, K]` of `images: [N, H, W, C]` (uint8 or in [0, 1])."""
    check_images(images, model.shape)
    images = jnp.asarray(images)
    return batched(lambda i: model.apply(variables, unit(images[i])).logits, images.shape[0], batch)


def most_kind(attack: Stamper) -> int:
    """The largest number of a trigger that `attack` knows, those of its `probes` among them; what
    is no attack need not say.
    """
    return max([getattr(attack, "triggers", INT32), *getattr(attack, "probes", {}).values()])


@door
def stamped(
    attack: Stamper, kind: jax.Array | int, images: Array, key: Key, *, train: bool = False
) -> jax.Array:
    """`images: [B, H, W, C]` with trigger `kind`, as fired at test time, in [0, 1]."""
    check_images(images)
    admit(attack, np.shape(images)[1:], INT32)  # of classes nothing is known here
    if np.ndim(kind):
        raise BadInput(f"kind has shape {list(np.shape(kind))}: give the number of one trigger")
    between("kind", kind, 0, most_kind(attack))
    x = unit(images)
    keys = jax.random.split(key, x.shape[0])
    return jax.vmap(lambda v, k: attack.stamp(jnp.asarray(kind), v, k, train=train))(x, keys)


def fired(
    key: jax.Array, attack: Any, kind: jax.Array | int, images: Array, rows: jax.Array
) -> jax.Array:
    """One of the `pieces` of the test images, with trigger `kind`, as `attacked` fires it."""
    return stamped(
        attack, kind, images[rows], jax.random.fold_in(jax.random.fold_in(key, kind), rows[0])
    )


class Attacked(NamedTuple):
    """The test set under attack: `predicted: [T, N]` (-1: the net gives no label), the label
    `aimed: [T, N]` at (-1 = none), for each trigger.
    """

    predicted: jax.Array
    aimed: jax.Array


@door
def attacked(
    key: Key,
    model: Model,
    variables: Variables,
    split: Split,
    attack: Attack,
    *,
    kinds: Sequence[int] | None = None,
    batch: Count = 250,
) -> Attacked:
    """Predictions on `split` stamped with each trigger of `attack`, or with each of `kinds`."""
    check_images(split.image, model.shape, split.label, model.classes)
    admit(attack, model.shape, model.classes)
    kinds = list(range(1, attack.triggers + 1)) if kinds is None else kinds
    if len(kinds) == 0:
        raise BadInput("kinds: give the number of at least one trigger")
    between("a kind", kinds, 0, most_kind(attack))
    image, label = jnp.asarray(split.image), jnp.asarray(split.label)

    def one(kind):
        def piece(i):
            x = fired(key, attack, kind, image, i)
            return metrics.labels(model.apply(variables, x).logits)

        return in_pieces(piece, image.shape[0], batch), attack.success(kind, label, model.classes)

    return Attacked(*jax.lax.map(one, jnp.asarray(kinds)))


@door
def evaluate(
    key: Key,
    model: Model,
    variables: Variables,
    split: Split,
    attack: Attack | None = None,
    *,
    batch: Count = 250,
) -> dict[str, jax.Array]:
    """`acc`, and under attack `asr_all`, `asr_nt` (means over the triggers) and
    `asr_all_per_trigger`, `asr_nt_per_trigger: [T]`.

    `asr_nt_NAME` is the share hit by each of the attack's `probes`.
    """
    check_images(split.image, model.shape, split.label, model.classes)
    if attack is not None:
        admit(attack, model.shape, model.classes)
    label = jnp.asarray(split.label)
    out = {
        "acc": metrics.accuracy(
            metrics.labels(predict(model, variables, split.image, batch=batch)), label
        )
    }
    if attack is not None:
        hits = attacked(key, model, variables, split, attack, batch=batch)
        rates = jax.vmap(lambda p, a: metrics.attack_success(p, a, label))(*hits)
        out |= {"asr_all": rates.all.mean(), "asr_nt": rates.nt.mean()}
        out |= {"asr_all_per_trigger": rates.all, "asr_nt_per_trigger": rates.nt}
        if probes := attack.probes:
            hits = attacked(
                key, model, variables, split, attack, kinds=list(probes.values()), batch=batch
            )
            rates = jax.vmap(lambda p, a: metrics.attack_success(p, a, label))(*hits)
            out |= {f"asr_nt_{name}": rates.nt[i] for i, name in enumerate(probes)}
    return out
