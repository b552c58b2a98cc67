"""Nets of an audited net's own architecture of which it is known whether they are backdoored: what
its judges say of clean ones is their null, what they say of planted ones their power.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import checkpoints, mesh, metrics, sweep
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.base import pick, together
from bdjax.defenses.parts import nulls
from bdjax.foreign.net import Imported
from bdjax.progress import duration
from bdjax.rule import Seed, able, decide, seed_of, smallest
from bdjax.train import Recipe, State, advance, attacked, begin, poisoned_set, predict
from bdjax.types import Dataset, Model, Split, Variables

IMAGES, DRAWS, EPOCHS = 10_000, 60_000, (3, 200)
"""Images that references are trained on, at most, how many are drawn in all, and the fewest and
most epochs.
"""
SHORT = 0.1
"""How far below the audited net's accuracy that of the clean references may be."""
TOOK = 0.8
"""Share of the held-out images that a planted trigger moves, for it to count as a backdoor."""
RATE = 0.1
"""Poison rate of the planted ones."""
SAID = 30.0
"""Seconds between what is said of the time that is left, at least."""


class Calibration(NamedTuple):
    """What references say: of each judge the null of its `norms`, and the `index` of clean nets;
    `found` and `planted`: how many planted backdoors there are, and are found; `alarms` of
    `clean` nets, each held against the others. `why` they are not used, None where they are.
    """

    norms: Mapping[str, nulls.Pooled]
    index: Mapping[str, np.ndarray]
    counts: Mapping[str, int]
    trained: Mapping[str, Any] | None
    why: str | None

    def seed(self, judge: str, arrays: Mapping[str, np.ndarray]) -> Seed:
        """What a judge's step says beside them; by itself, where they say nothing of this judge."""
        if (null := self.norms.get(judge)) is not None:
            p_value, label = nulls.against_clean(arrays["norms"], able(arrays), null)
            return seed_of(arrays, (float(p_value), int(label)))
        if (index := self.index.get(judge)) is not None:
            return seed_of(arrays, (float(nulls.ranked(arrays["index"], index)), smallest(arrays)))
        return seed_of(arrays)

    def about(self) -> dict[str, Any]:
        """What `audit.json` says of them."""
        used = bool(self.norms or self.index)
        power = alarms = None
        if self.counts.get("planted"):
            power = _share(self.counts["found"], self.counts["planted"])
        if self.counts.get("clean"):
            alarms = _share(self.counts["alarms"], self.counts["clean"])
        return {
            "null": "references" if used else "parametric", "power": power,
            "false_alarms": alarms,
            "references": None if self.trained is None else {**self.trained, "why": self.why},
        }  # fmt: skip


def _share(hits: int, n: int) -> dict[str, Any]:
    low, high = metrics.interval(jnp.arange(n) < hits)
    return {"hits": hits, "n": n, "share": hits / n, "low": float(low), "high": float(high)}


NONE = Calibration({}, {}, {}, None, None)


def nulls_of(
    steps: Mapping[str, Mapping[str, np.ndarray]], judges: Sequence[str], alpha: float
) -> Calibration:
    """What the steps of an audit say of its references; `judges`: those that the net was shown
    to.
    """
    if "references-0" not in steps:
        return NONE
    about = steps["references-0"]
    n = len(about["accuracy"])
    trained = {
        "each": n, "accuracy": float(about["accuracy"].mean()), "wanted": float(about["wanted"]),
        "took": int((about["moved"] >= TOOK).sum()), "seconds": float(about["seconds"]),
    }  # fmt: skip
    why = short(about["accuracy"], float(about["wanted"]))
    if why is not None:
        return Calibration({}, {}, {}, trained, why)
    seen = {judge: [steps.get(f"{judge}-ref-{i}") for i in range(2 * n)] for judge in judges}
    whole = {
        judge: [row for row in rows if row is not None]
        for judge, rows in seen.items() if all(row is not None for row in rows)
    }  # fmt: skip
    if not whole:
        return Calibration({}, {}, {}, trained, "no judge has seen all of them yet")

    def null(among: Sequence[int]) -> Calibration:
        norms, index = {}, {}
        for judge, rows in whole.items():
            some = [rows[i] for i in among]
            if all("norms" in row and np.isfinite(row["norms"]).all() for row in some):
                norms[judge] = nulls.pooled(np.stack([row["norms"] for row in some]))
            elif (len(among) + 1) * alpha >= len(whole):  # else no rank among them could accuse
                index[judge] = np.array([float(row["index"]) for row in some])
        return Calibration(norms, index, {}, None, None)

    def word(i: int, of: Calibration) -> tuple[str, int | None]:
        said = {judge: [of.seed(judge, rows[i])] for judge, rows in whole.items()}
        found = decide(said, alpha, True)
        return found.word, found.label

    every = null(range(n))
    counts = {}
    if n >= 3:
        others = [word(i, null([k for k in range(n) if k != i]))[0] for i in range(n)]
        counts |= {"clean": n, "alarms": others.count("infected")}
    planted = [i for i in range(n, 2 * n) if about["moved"][i - n] >= TOOK]
    right = [word(i, every) == ("infected", int(about["target"][i - n])) for i in planted]
    counts |= {"planted": len(planted), "found": sum(right)}
    few = f"{n} clean nets are too few for a rank among them to accuse: give more, --reference"
    why = None if every.norms or every.index else few
    return every._replace(counts=counts, trained=trained, why=why)


def short(accuracy: np.ndarray, wanted: float) -> str | None:
    """Why clean references of this accuracy say nothing about a net that has `wanted`."""
    if wanted - (mean := float(accuracy.mean())) <= SHORT:
        return None
    return (
        f"the clean references reach an accuracy of {100 * mean:.1f} %, the net has "
        f"{100 * wanted:.1f} %: they are not used"
    )


# --- Training ---


def planted(n: int, shape: tuple[int, int, int], classes: int) -> BadNets:
    """2·N attacks, stacked: N that poison nothing, N patches of random size, place, colour and
    target.
    """
    draw = np.random.default_rng(0)
    side = min(shape[:2])
    size = draw.integers(max(2, side // 10), max(3, side // 5) + 1, 2 * n)
    row, col = (draw.integers(0, length - size + 1) for length in shape[:2])
    color = draw.integers(0, 2, (shape[2], 2 * n)).astype(np.float32)
    color[0] = np.where(color.any(0), color[0], 1)  # not black, as much of an image may be
    rate = np.repeat([0.0, RATE], n).astype(np.float32)
    return BadNets(
        rate=jnp.asarray(rate), target=jnp.asarray(draw.integers(0, classes, 2 * n), jnp.int32),
        size=jnp.asarray(size), row=jnp.asarray(row), col=jnp.asarray(col),
        cover=jnp.zeros(2 * n), color=tuple(jnp.asarray(color)),
    )  # fmt: skip


def redrawn(key: jax.Array, variables: Variables) -> Variables:
    """The variables of a net whose initial ones nobody knows, its parameters drawn anew with each
    one's own mean and spread.
    """
    leaves, structure = jax.tree.flatten(variables["params"])
    keys = jax.random.split(key, len(leaves))
    drawn = [
        leaf.mean() + leaf.std() * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return {**variables, "params": jax.tree.unflatten(structure, drawn)}


def _started(
    model: Model, keys: jax.Array, own_start: bool, variables: Variables, recipe: Recipe
) -> State:
    def one(key):
        start = None if own_start else redrawn(key, variables)
        return begin(key, model, recipe, start)

    return jax.vmap(one)(keys)


def _epoch(
    model: Model, keys: jax.Array, attacks: BadNets, states: State, data: Split, recipe: Recipe
) -> State:
    """One more epoch of all references, in one program."""

    def one(item):
        key, attack, state = item
        key_plan, key_run = jax.random.split(key)
        train = poisoned_set(key_plan, data, attack, model.classes)
        return advance(key_run, state, model, recipe, train, epochs=1)[0]

    return mesh.lane_map(one, (keys, attacks, states), None)


def _measured(
    model: Model, variables: Variables, attacks: BadNets, held: Split
) -> tuple[jax.Array, jax.Array]:
    """The accuracy of each on the held-out images, and what share its trigger moves: `[2N]`."""

    label = jnp.asarray(held.label)

    def one(item):
        variables, attack = item
        acc = metrics.accuracy(metrics.labels(predict(model, variables, held.image)), label)
        hits = attacked(jax.random.key(0), model, variables, held, attack)
        return acc, metrics.attack_success(hits.predicted[0], hits.aimed[0], label).nt

    return mesh.lane_map(one, (variables, attacks), None)


def calibrate(
    work: Any, judges: Mapping[str, Any], n: int, net: Any, data: Dataset, stop: Any
) -> None:
    """Trains `n` clean and `n` planted references and shows them to the judges that have seen the
    net, as steps of the audit `work`; says first how long that takes.
    """
    todo = sorted(judges, key=lambda name: work.steps[f"{name}-0"]["seconds"])
    todo = [name for name in todo if "searched" not in work.steps[f"{name}-0"]]
    steps = {f"{name}-ref-{i}": (name, i) for name in todo for i in range(2 * n)}

    def needed() -> str:
        """How long the judges will take, who compile once."""
        missing = [name for step, (name, _) in steps.items() if step not in work.steps]
        took = {name: float(work.steps[f"{name}-0"]["seconds"]) for name in todo}
        each = {name: min(took[name], work.needs_of(judges[name])) for name in todo}
        return f"judges on {2 * n} references: about {duration(sum(each[k] for k in missing))}"

    nets = _trained(work, n, net, data, stop, needed)
    about = work.steps.get("references-0")
    if nets is None or about is None:
        return
    if (why := short(about["accuracy"], float(about["wanted"]))) is not None:
        sweep.say(why, work.quiet)
        return
    kept = ("norms", "qualified", "index", "flagged", "infected", "p_value", "label", "valid",
            "moved")  # fmt: skip
    said = -math.inf
    for step, (name, i) in steps.items():
        if stop.asked is not None:
            return
        if step not in work.steps:
            start = time.monotonic()
            if start > said + SAID:
                sweep.say(f"{needed()} left", work.quiet)
                said = start
            found = work.shown(judges[name], sweep.take(nets, i))
            small = {key: value for key, value in found.items() if key in kept}
            work.keep(step, small | {"seconds": time.monotonic() - start})


def _trained(
    work: Any, n: int, net: Any, data: Dataset, stop: Any, then: Callable[[], str]
) -> Variables | None:
    """The references, stacked, from the last epoch that was kept on; None where it was stopped.
    `then`: says what comes after.
    """
    model, images = work.model, work.images
    # all that the user has but what triggers are measured by
    pool = together(data.train, data.clean)
    if len(pool.label) > IMAGES:
        pool = pool[pick(np.asarray(pool.label), IMAGES, 0)]
    if not images.labelled:
        pool = pool._replace(label=sweep.answers(model, work.variables, pool.image))
    pool = Split(jnp.asarray(pool.image), jnp.asarray(pool.label))
    many = len(pool.label)
    epochs = int(np.clip(round(DRAWS / many), *EPOCHS))
    recipe = Recipe(
        epochs=epochs, batch=64, drops=((2 * epochs // 3, 0.1),), augment=_augment(model)
    )
    keys = jax.random.split(jax.random.key(1), 2 * n)
    attacks = planted(n, model.shape, model.classes)
    states = jax.jit(_started, static_argnums=(0, 2))(
        model, keys, not isinstance(net, Imported), work.variables, recipe
    )
    place = None if work.folder is None else work.folder / "references" / f"nets-{n}"
    if place is not None and place.exists():
        states = checkpoints.load_tree(place, states)
    first, start = int(states.epoch[0]), time.monotonic()
    run = jax.jit(_epoch, static_argnums=0, donate_argnums=3)
    if first < epochs:  # apart, as it takes as long as many epochs
        run = run.lower(model, keys, attacks, states, pool, recipe).compile()
    for epoch in range(first, epochs):
        began = time.monotonic()
        states = jax.block_until_ready(run(keys, attacks, states, pool, recipe))
        if epoch == first:
            left = duration((time.monotonic() - began) * (epochs - epoch - 1))
            what = f"references: {2 * n} nets, {epochs} epochs of {many} images"
            sweep.say(f"{what}: about {left} left, then {then()}", work.quiet)
        if place is not None and (stop.asked is not None or epoch % 5 == 4 or epoch + 1 == epochs):
            checkpoints.save_tree(place, states)
        if stop.asked is not None:
            return None
    if "references-0" not in work.steps:
        found = jax.jit(_measured, static_argnums=0)(model, states.variables, attacks, images.held)
        accuracy, moved = map(np.asarray, found)
        wanted = 1.0 if images.accuracy is None else images.accuracy
        work.keep("references-0", {
            "accuracy": accuracy[:n], "moved": moved[n:], "target": np.asarray(attacks.target)[n:],
            "wanted": wanted, "seconds": time.monotonic() - start,
        })  # fmt: skip
    return states.variables


def _augment(model: Model) -> Any:
    from bdjax.augment import Augmentation

    return Augmentation(crop=max(1, min(model.shape[:2]) // 10))
