"""From cells to rows: cells that differ in numbers alone are stacked and run as one compiled program.

A `Cell` names a victim (dataset × model × recipe × attack × seed) and what is done to it. The victim of several
defenses is trained once, in chunks that are checkpointed, and kept by the hash of its configuration. Rows are on disk
as soon as their group ends; a run that was interrupted goes on where it stopped.
"""

import dataclasses
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import mesh, metrics, registry
from bdjax.attacks.base import Attack
from bdjax.datasets import fingerprint
from bdjax.defenses.base import Defense
from bdjax.models.layers import Net, build
from bdjax.progress import Progress
from bdjax.store import Store, load_tree, save_tree
from bdjax.train import Recipe, advance, begin, evaluate, poisoned_set, predict, stamped, unit
from bdjax.types import BadInput, Model, Repaired, Scores, Split, Suspects, Verdict

CHECKPOINT_EVERY = 30.0
"""Seconds of training between two checkpoints."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of a table, for one seed. `reported`: the paper's values of our metrics; `substitute`: what stands in for
    its data.
    """

    table: str
    row: str
    dataset: Any
    model: Net
    recipe: Recipe
    attack: Attack | None = None
    defense: Defense | None = None
    seed: int = 0
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)
    substitute: str | None = None

    @property
    def stage(self) -> str | None:
        """What the defense returns; None without one."""
        return None if self.defense is None else registry.get("defense", registry.name_of(self.defense) or "").stage

    @property
    def victim(self) -> str:
        """Content hash of everything that decides the victim's weights."""
        data = fingerprint(self.dataset.load())
        return registry.digest(data, self.model, self.recipe, self.attack, self.seed)

    @property
    def run(self) -> str:
        """Content hash of the row."""
        return registry.digest(self.victim, self.defense, self.table, self.row)


def grid(base: Any, **axes: Iterable[Any]) -> Iterator[Any]:
    """Copies of the dataclass `base` over the product of `axes`: `grid(cell, seed=range(3), attack__rate=(0.01, 0.1))`.

    `a__b` is field `b` of field `a`.
    """
    for values in itertools.product(*axes.values()):
        made = base
        for path, value in zip(axes, values, strict=True):
            made = replace(made, path.split("__"), value)
        yield made


def replace(base: Any, path: Sequence[str], value: Any) -> Any:
    """`base` with the field at `path` set to `value`."""
    first, *rest = path
    if not hasattr(base, first):
        raise BadInput(f"{type(base).__name__} has no field '{first}'")
    return dataclasses.replace(base, **{first: replace(getattr(base, first), rest, value) if rest else value})


def stack(items: Sequence[Any]) -> Any:
    """Pytrees of one structure as one pytree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *items)


def take(items: Any, index: Any) -> Any:
    """The item, or items, at `index` of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], items)


def compile_key(*values: Any) -> Any:
    """Equal where one program serves: the structure (static fields) and the shapes and types of the leaves."""
    leaves, structure = jax.tree.flatten(values)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


class Clock:
    """Seconds spent, by stage: data, compile, train, defend, report."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, since: float) -> None:
        """Books the time from `since` until now."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - since

    def split(self, before: dict[str, float] | None = None, cells: int = 1) -> dict[str, float]:
        """Seconds of compiling, and of anything else for one of `cells`, since `before`."""
        compiling = self.seconds.get("compile", 0.0)
        found = {"compile": compiling, "run": (sum(self.seconds.values()) - compiling)}
        if before is None:
            return found
        return {"compile": found["compile"] - before["compile"], "run": (found["run"] - before["run"]) / cells}


@dataclasses.dataclass
class Runner:
    """Runs cells into a store. `lanes` and `devices` as in `mesh.over_runs`; `on_rows` is told of each finished group."""

    store: Store
    experiment: str
    scale: str = "cpu"
    lanes: int | None = None
    devices: Sequence[Any] | None = None
    quiet: bool = False
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None
    clock: Clock = dataclasses.field(default_factory=Clock)
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The rows of all `cells`, those of earlier runs included, in the order of `cells`."""
        done = {row["run"] for row in self.store.rows()}
        pending = [cell for cell in cells if cell.run not in done]
        for cell in pending:
            check(cell)
        for group in _grouped(pending, lambda c: (c.dataset, c.model, compile_key(c.recipe, c.attack))):
            self._group(group)
        rows = {row["run"]: row for row in self.store.rows()}
        return [rows[cell.run] for cell in cells if cell.run in rows]

    def victim(self, cell: Cell) -> tuple[Model, Any, Any]:
        """The model, the attack as it is fired, and the variables of a cell's victim; trained if it is not there yet."""
        model, shared = self._data(cell)
        victims, _, _ = self._victims([cell], model, shared)
        attack, variables = take(victims, 0)
        return model, attack, variables

    def defend(self, cell: Cell, model: Model, variables: Any) -> tuple[dict[str, Any], Any]:
        """The row of `cell` for a given victim, and the repaired variables where its defense repairs."""
        check(cell)
        _, shared = self._data(cell)
        return self._judged(
            [cell], model, shared, stack([(cell.attack, variables)]), {"compile": 0.0, "run": 0.0}, keep=True
        )

    def _data(self, cell: Cell) -> tuple[Model, Any]:
        start = time.monotonic()
        data = cell.dataset.load()
        shared = tuple(Split(jnp.asarray(s.image), jnp.asarray(s.label)) for s in (data.train, data.clean, data.test))
        self.clock.add("data", start)
        return build(cell.model, data.shape, data.classes), shared

    def _group(self, cells: list[Cell]) -> None:
        model, shared = self._data(cells[0])
        # Victims first, then what needs them; defenses that replace training come last, as they need no victim.
        needing = [cell for cell in cells if cell.stage != "train"]
        if needing:
            names = list(dict.fromkeys(cell.victim for cell in needing))
            owner = {cell.victim: cell for cell in reversed(needing)}
            victims, seconds, lost = self._victims([owner[name] for name in names], model, shared)
            index = {name: i for i, name in enumerate(names)}
            for group in _grouped(needing, lambda c: compile_key(c.defense)):
                whole = [cell for cell in group if not lost[index[cell.victim]]]
                self._failed([cell for cell in group if cell not in whole], "training diverged: the loss is not finite")
                if whole:
                    chosen = np.asarray([index[cell.victim] for cell in whole])
                    self._judged(whole, model, shared, take(victims, chosen), seconds)
        for group in _grouped((c for c in cells if c.stage == "train"), lambda c: compile_key(c.defense)):
            self._judged(group, model, shared, None, {"compile": 0.0, "run": 0.0})

    def _victims(self, cells: list[Cell], model: Model, shared: Any) -> tuple[Any, dict[str, float], list[bool]]:
        """The victims' `(attack, variables)`, stacked in the order of `cells`; seconds; and which of them diverged."""
        folder = self.store.folder / "victims"
        like = jax.eval_shape(lambda: _untrained(cells[0], model, shared))
        missing = [cell for cell in cells if not (folder / cell.victim).exists()]
        seconds = {"compile": 0.0, "run": 0.0}
        if missing:
            trained, losses, seconds = self._trained(missing, model, shared)
            for i, cell in enumerate(missing):
                save_tree(folder / cell.victim, (take(trained, i), losses[i]))
        saved = [load_tree(folder / cell.victim, (like, jax.ShapeDtypeStruct((), jnp.float32))) for cell in cells]
        return stack([victim for victim, _ in saved]), seconds, [not np.isfinite(loss) for _, loss in saved]

    def _trained(self, cells: list[Cell], model: Model, shared: Any) -> tuple[Any, np.ndarray, dict[str, float]]:
        """Trains the victims of `cells`, all in one program an epoch, with a checkpoint every half minute."""
        label = f"training {len(cells)} × {registry.name_of(cells[0].model)}"
        label += "" if cells[0].attack is None else f" ({registry.name_of(cells[0].attack)})"
        items = stack([(jax.random.key(cell.seed), cell.recipe, bound(cell, shared)) for cell in cells])
        before = self.clock.split()
        if cells[0].attack is not None and type(cells[0].attack).train is not Attack.train:
            say(f"{label}: one program, no progress before its end", self.quiet)
            victims, losses = self._ran("train", _whole_training, model, shared, *items)
            return victims, np.asarray(losses), self.clock.split(before, len(cells))

        epochs = cells[0].recipe.epochs
        partial_folder = self.store.folder / "partial" / registry.digest([cell.victim for cell in cells])
        states = self._ran("train", _begin, model, shared, *items)
        losses = jnp.zeros(len(cells))
        if partial_folder.exists():
            states, losses = load_tree(partial_folder, (states, losses))
        first = int(np.asarray(states.epoch)[0])
        program = self._program(_epoch, model, shared, *items, states, donate=(len(items) + 1,))
        start = saved = time.monotonic()
        with Progress(epochs - first, label, self.quiet) as bar:
            for epoch in range(first, epochs):
                states, losses = jax.block_until_ready(program(shared, *items, states))
                bar.step(f"loss {float(jnp.mean(losses)):.3f}")
                if time.monotonic() - saved > CHECKPOINT_EVERY and epoch + 1 < epochs:
                    save_tree(partial_folder, (states, losses))
                    saved = time.monotonic()
        self.clock.add("train", start)
        shutil.rmtree(partial_folder, ignore_errors=True)
        return (items[2], states.variables), np.asarray(losses), self.clock.split(before, len(cells))

    def _program(self, fn: Callable, model: Model, shared: Any, *items: Any, donate: tuple[int, ...] = ()) -> Any:
        """`fn(model, shared, *item)` over runs, compiled once for all groups that it serves."""
        key = (fn, model, compile_key(shared, items))
        if key not in self.programs:
            start = time.monotonic()
            devices = self.devices or jax.local_devices()[:1]
            spread = mesh.over_runs(lambda shared, item: fn(model, shared, *item), lanes=self.lanes, devices=devices)
            jitted = jax.jit(lambda shared, *items: spread(shared, items), donate_argnums=donate)
            self.programs[key] = jitted.lower(shared, *items).compile()
            self.clock.add("compile", start)
        return self.programs[key]

    def _ran(self, stage: str, fn: Callable, model: Model, shared: Any, *items: Any) -> Any:
        """The outputs of `fn` for all items."""
        program = self._program(fn, model, shared, *items)
        start = time.monotonic()
        out = jax.block_until_ready(program(shared, *items))
        self.clock.add(stage, start)
        return out

    def _judged(
        self, cells: list[Cell], model: Model, shared: Any, victims: Any, seconds: Any, keep: bool = False
    ) -> tuple[dict[str, Any], Any]:
        """Applies one defense (or none) to the victims of `cells`, stacked, and writes the rows.

        Returns the first row and, with `keep`, the first repaired variables.
        """
        stage = cells[0].stage
        keys = stack([jax.random.fold_in(jax.random.key(cell.seed), 1) for cell in cells])
        before = self.clock.split()
        defenses = self._prepared(cells, model, shared)
        found, arrays = {}, {}
        if stage is None:
            (attacks, variables), judged = victims, model
        else:
            say(
                f"{registry.name_of(cells[0].defense)} on {len(cells)} × {registry.name_of(cells[0].model)}", self.quiet
            )
            attacks, given = victims or (stack([bound(c, shared) for c in cells]), stack([c.recipe for c in cells]))
            items = (keys, stack(defenses), attacks, given)
            found, arrays, variables = self._ran("defend", JUDGES[stage], model, shared, *items)
            if variables is None:
                variables, judged = given, model
            else:
                judged = cells[0].defense.wrap(model)
        if stage != "inputs":  # what passes a filter is measured there
            measured = self._ran("evaluate", _measured, judged, shared, keys, attacks, variables)
            found, arrays = {**measured[0], **found}, {**measured[1], **arrays}
        found, arrays = jax.device_get((found, arrays))
        spent = self.clock.split(before, len(cells))
        if stage is None:
            spent = {name: value + seconds[name] for name, value in spent.items()}
        rows = []
        for i, cell in enumerate(cells):
            if arrays:
                self.store.save_arrays(cell.run, take(arrays, i))
            rows.append(self._row(cell, {name: plain(value[i]) for name, value in found.items()}, spent))
        self.store.append(rows)
        self.on_rows(rows)
        return rows[0], take(variables, 0) if keep and stage in ("repair", "train") else None

    def _prepared(self, cells: list[Cell], model: Model, shared: Any) -> list[Defense | None]:
        """The cells' defenses with what they learn before they see a victim: once for a data set and an architecture,
        whatever the victims' seeds.
        """
        defense = cells[0].defense
        if defense is None or type(defense).prepare is Defense.prepare:
            return [cell.defense for cell in cells]
        data = fingerprint(cells[0].dataset.load())
        paths = [self.store.folder / "prepared" / registry.digest(data, c.model, c.defense) for c in cells]
        for path, cell in dict(zip(paths, cells, strict=True)).items():
            if not path.exists():
                save_tree(path, take(self._ran("defend", _prepare, model, shared, stack([cell.defense])), 0))
        like = jax.eval_shape(lambda d: _prepare(model, shared, d), defense)
        return [load_tree(path, like) for path in paths]

    def _failed(self, cells: list[Cell], reason: str) -> None:
        rows = [{**self._row(cell, {}, {"compile": 0.0, "run": 0.0}), "error": reason} for cell in cells]
        self.store.append(rows)
        self.on_rows(rows)

    def _row(self, cell: Cell, found: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        names = {part: registry.name_of(getattr(cell, part)) for part in ("dataset", "model", "attack", "defense")}
        config = {
            part: registry.describe(getattr(cell, part)) for part in ("dataset", "model", "recipe", "attack", "defense")
        }
        return {
            "run": cell.run, "experiment": self.experiment, "scale": self.scale, "table": cell.table, "row": cell.row,
            **names, "seed": cell.seed, "config": config, "metrics": found, "reported": dict(cell.reported),
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "oracle": bool(cell.defense is not None and cell.defense.oracle), "substitute": cell.substitute,
            "device": device_name(), "jax": jax.__version__, "commit": commit(),
        }  # fmt: skip


def check(cell: Cell) -> None:
    """Raises `BadInput` where the cell cannot be run."""
    data = cell.dataset.load()
    model = build(cell.model, data.shape, data.classes)
    cell.recipe.check(len(data.train.label))
    if cell.attack is not None:
        cell.attack.check(data.shape, data.classes)
    if cell.defense is not None:
        cell.defense.check(model, data.clean)


def bound(cell: Cell, shared: Any) -> Any:
    """The cell's attack with the images that it takes from the training set."""
    return None if cell.attack is None else cell.attack.bind(shared[0])


def say(line: str, quiet: bool) -> None:
    """A plain line about what is being done."""
    if not quiet:
        print(line, file=sys.stderr, flush=True)


# --- The programs: each is mapped over runs. `shared = (train, clean, test)`. ---


def _untrained(cell: Cell, model: Model, shared: Any) -> Any:
    variables = model.init(jax.random.key(0))
    if cell.attack is None:
        return None, variables
    attack = jax.tree.map(jnp.asarray, bound(cell, shared))
    if type(attack).train is Attack.train:
        return attack, variables
    attack, variables, _ = attack.train(jax.random.key(0), model, cell.recipe, shared[0])
    return attack, variables


def _begin(model: Model, shared: Any, key: jax.Array, recipe: Recipe, attack: Any) -> Any:
    return begin(jax.random.fold_in(key, 0), model, recipe)


def _epoch(model: Model, shared: Any, key: jax.Array, recipe: Recipe, attack: Any, state: Any) -> Any:
    train = poisoned_set(jax.random.fold_in(key, 2), shared[0], attack, model.classes)
    state, curves = advance(jax.random.fold_in(key, 3), state, model, recipe, train, epochs=1)
    return state, curves.loss[0]


def _whole_training(model: Model, shared: Any, key: jax.Array, recipe: Recipe, attack: Any) -> Any:
    attack, variables, curves = attack.train(key, model, recipe, shared[0])
    return (attack, variables), curves.loss[-1]


def _measured(model: Model, shared: Any, key: jax.Array, attack: Any, variables: Any) -> tuple[dict, dict]:
    """ACC and ASR as every row has them: scalars and arrays."""
    train, _, test = shared
    found = evaluate(key, model, variables, test, attack)
    acc_train = metrics.accuracy(predict(model, variables, train.image).argmax(-1), train.label)
    found = {"acc_train": acc_train, "acc_test": found.pop("acc"), **found}
    return split_scalars(found)


def split_scalars(found: Mapping[str, Any]) -> tuple[dict, dict]:
    """The scalars of a nested dict, and its arrays, by dotted name."""
    scalars, arrays = {}, {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            inner = split_scalars(value)
            scalars |= {f"{name}.{k}": v for k, v in inner[0].items()}
            arrays |= {f"{name}.{k}": v for k, v in inner[1].items()}
        elif value is not None:
            (scalars if jnp.ndim(value) == 0 else arrays)[name] = jnp.asarray(value)
    return scalars, arrays


Judged = tuple[dict, dict, Any]
"""Scalars and arrays to report, and the variables that ACC and ASR are then measured on (None: the victim's)."""


def _prepare(model: Model, shared: Any, defense: Any) -> Any:
    return defense.prepare(jax.random.key(0), model, shared[1])


def _repair(model: Model, shared: Any, key: jax.Array, defense: Any, attack: Any, variables: Any) -> Judged:
    result: Repaired = defense(jax.random.fold_in(key, 1), model, variables, shared[1])
    extra = defense.report(key, model, variables, shared[2], attack, result)
    return *split_scalars({**result.info, **extra}), result.variables


def _train(model: Model, shared: Any, key: jax.Array, defense: Any, attack: Any, recipe: Any) -> Judged:
    train = poisoned_set(jax.random.fold_in(key, 2), shared[0], attack, model.classes)
    result: Repaired = defense(jax.random.fold_in(key, 1), model, recipe, train, shared[1])
    extra = defense.report(key, model, result.variables, shared[2], attack, result)
    return *split_scalars({**result.info, **extra}), result.variables


def _verdict(model: Model, shared: Any, key: jax.Array, defense: Any, attack: Any, variables: Any) -> Judged:
    result: Verdict = defense(jax.random.fold_in(key, 1), model, variables, shared[1])
    extra = defense.report(key, model, variables, shared[2], attack, result)
    found = {"anomaly_index": result.index, "infected": result.infected.astype(jnp.float32)}
    if attack is not None:
        found["target_flagged"] = result.flagged[attack.target].astype(jnp.float32)
    _, arrays = split_scalars({**result.info, **extra, "flagged": result.flagged})
    return found, arrays, None


def _inputs(model: Model, shared: Any, key: jax.Array, defense: Any, attack: Any, variables: Any) -> Judged:
    """ACC and ASR count what passes: a clean input that is flagged is lost, a stamped one that is flagged is stopped."""
    _, clean, test = shared
    kd = jax.random.fold_in(key, 1)
    # Clean and stamped inputs go through one call: the defense is traced once.
    pictures, predictions = [unit(test.image)], []
    kinds = range(1, attack.triggers + 1) if attack is not None else ()
    pictures += [stamped(attack, kind, test.image, jax.random.fold_in(key, kind + 1)) for kind in kinds]
    x = jnp.stack(pictures)
    predictions = jax.lax.map(lambda x: predict(model, variables, x).argmax(-1), x)
    scores: Scores = defense(kd, model, variables, clean, x.reshape(-1, *x.shape[2:]))
    score, flagged = (leaf.reshape(x.shape[:2]) for leaf in (scores.score, scores.flagged))
    right = predictions[0] == test.label
    found = {"acc_test": (right & ~flagged[0]).mean(), "frr": flagged[0].mean(), "boundary": scores.boundary}
    arrays = {"score_clean": score[0]}
    if attack is not None:
        aimed = jnp.stack([attack.success(jnp.asarray(kind), test.label, model.classes) for kind in kinds])

        def measure(score_, flagged_, predicted, aimed):
            works = (predicted == aimed) & (aimed != test.label)
            far, _ = metrics.far_frr(flagged[0], flagged_, works)
            rates = metrics.attack_success(jnp.where(flagged_, -2, predicted), aimed, test.label)
            return far, rates.all, rates.nt, metrics.auroc(-score[0], -score_, None, works)

        far, every, nt, auroc = jax.vmap(measure)(score[1:], flagged[1:], predictions[1:], aimed)
        found |= {"far": far.mean(), "asr_all": every.mean(), "asr_nt": nt.mean(), "auroc": auroc.mean()}
        arrays |= {"score_trojan": score[1:], "far_per_trigger": far}
    return found, arrays, None


def _samples(model: Model, shared: Any, key: jax.Array, defense: Any, attack: Any, variables: Any) -> Judged:
    train = poisoned_set(jax.random.fold_in(key, 2), shared[0], attack, model.classes)
    result: Suspects = defense(jax.random.fold_in(key, 1), model, variables, train)
    exists = jnp.arange(train.plan.kind.shape[0]) < train.plan.size
    poison, removed = (train.plan.kind > 0) & exists, result.removed & exists
    hit = (poison & removed).sum()
    found = {
        "recall": hit / poison.sum(), "precision": hit / jnp.maximum(removed.sum(), 1),
        "auroc": metrics.auroc(result.score, result.score, exists & ~poison, poison), **result.info,
    }  # fmt: skip
    extra = defense.report(key, model, variables, shared[2], attack, result)
    return *split_scalars({**found, **extra}), None


JUDGES: dict[str, Callable[..., Judged]] = {
    "repair": _repair, "train": _train, "invert": _verdict, "models": _verdict, "inputs": _inputs, "samples": _samples,
}  # fmt: skip


def plain(value: Any) -> float | int | None:
    """A scalar for JSON; None for NaN and infinities, which JSON does not have."""
    number = np.asarray(value).item()
    return number if not isinstance(number, float) or math.isfinite(number) else None


def device_name() -> str:
    """The kind of device in words: `cpu (2 cores)`, `NVIDIA H200`, `TPU v5e`."""
    device = jax.devices()[0]
    return f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind


def commit() -> str | None:
    """The project's commit, None outside of its repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
