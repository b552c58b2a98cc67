"""A poisoned data set as files: for training elsewhere on what bdjax trains on."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import own, registry, schema
from bdjax.datasets import fingerprint, source
from bdjax.datasets.base import Source, trainable
from bdjax.datasets.files import Format, in_order
from bdjax.progress import Progress
from bdjax.train import (
    TrainSet,
    fired,
    measuring_key,
    pieces,
    poisoned_set,
    poisoning_key,
)
from bdjax.types import Attack, BadInput, Dataset, Split, shown, whole

BATCH = 250
HEADS = "split", "row", "source", "kind", "old_label", "new_label", "number", "weight"


class Rows(NamedTuple):
    """What one file holds: the labels `[N]`, the images, a batch of uint8 at a time and which of
    them were clipped, and the columns of the index: `source`, `kind`, `old_label`, `number`,
    `weight`.
    """

    label: np.ndarray
    images: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    columns: tuple[np.ndarray, ...] = ()


def write_poisoned(
    out: str | Path,
    dataset: Source | str,
    attack: Attack,
    *,
    seed: int = 0,
    format: Format = "npz",
    quiet: bool = True,
) -> dict[str, Any]:
    """Writes `dataset`, a source or what `datasets.source` takes, as `attack` poisons it in a
    training with `seed` into the new folder `out`; returns what stands in its `poison.json`.

    `train`: the images that the victim is trained on, as they are stored, poisoned ones with their
    training label. `test`: the test set as it is. `triggered`: the test images that the attack aims
    at, with each of its triggers, as ASR is measured on them, with the label that counts as a hit:
    the accuracy on them is ASR all, that on rows whose `old_label` is another ASR nt. All are
    rounded to 8 bits. `index.csv` has a line for each row of `train` and `triggered`: the row of
    the images that it was made of, its trigger (0: none), both labels, its number at poisoning and
    its weight in the loss.

    `format`: "npz" (`train.npz`: `image`, `label`, `names`), "folder" (`train/CLASS/ROW.png`) or
    "parquet" (`data/train-….parquet`, as HuggingFace has them). Each is read by `--dataset OUT`.

    Raises `BadInput` where there is no poisoned set before a net is trained, and where `out` holds
    anything that bdjax did not write.
    """
    dataset = source(dataset) if isinstance(dataset, str) else dataset
    out = own.whole(Path(out), "poison.json", read=dataset.watched())
    writers = {"npz": _npz, "folder": _folder, "parquet": _parquet}
    data, key = dataset.load(), jax.random.key(whole("seed", seed, 0, 2**32 - 1))
    if format not in writers:
        raise BadInput(f"format '{shown(format)}' is not one of {', '.join(writers)}")
    if attack is None:
        raise BadInput("without an attack nothing is poisoned: give one")
    trainable(dataset, data)
    registry.admit(attack, data.shape, data.classes)
    name, y = registry.name_of(attack) or type(attack).__name__, jnp.asarray(data.train.label)
    if makes_images(attack, y, data.classes):
        raise BadInput(
            f"{name} makes the images that it trains on for a net that it is given: there is no "
            "poisoned set to write; train it: bdjax train"
        )
    counts = attack.count(poisoning_key(key), y, data.classes)
    arrays = jax.tree.map(jnp.asarray, attack)  # as a sweep stacks them
    train = poisoned_set(poisoning_key(key), data.train, arrays, data.classes)
    train = jax.tree.map(jnp.asarray, train)  # to the device once
    parts = {
        "train": _trained_on(train, data.train),
        "test": _plain(data.test),
        "triggered": _triggered(measuring_key(key), train.attack, data),
    }
    about = {
        "attack": registry.describe(attack),
        "dataset": registry.describe(dataset),
        "fingerprint": fingerprint(data),
        "seed": seed,
        "shape": list(data.shape),
        "classes": data.classes,
        "names": list(data.names),
        "rows": {part: len(rows.label) for part, rows in parts.items()},
        "counts": counts,
    }
    clipped = dict.fromkeys(parts, 0)
    with own.renamed(out) as folder:
        folder.mkdir()
        with Progress(sum(about["rows"].values()), f"writing {name}", quiet) as bar:

            def told(part: str) -> Iterator[np.ndarray]:
                for batch, outside in parts[part].images():
                    clipped[part] += int(outside.sum())
                    yield batch
                    bar.step(amount=len(batch))

            for part, rows in parts.items():
                writers[format](folder, part, told(part), rows.label, data)
        _write_index(folder / "index.csv", parts)
        about["notes"] = _notes(attack, train, clipped)
        (folder / "poison.json").write_text(schema.dump(about, "poison", 1), encoding="utf-8")
    return about


def makes_images(attack: Attack, y: jax.Array, classes: int) -> bool:
    """Whether an attack trains on images that it makes for a net, not on those with labels
    `y: [N]`.
    """
    return getattr(attack, "base", lambda y, _: y)(y, classes) is not y


def _notes(attack: Any, train: TrainSet, clipped: dict[str, int]) -> list[str]:
    """What the files do not say of a training by this attack."""
    notes = []
    if attack.trains:
        notes.append("the attack is trained by its own `train`: written is the set that it poisons")
    weight = np.asarray(train.plan.weight)[: int(train.plan.size)]
    if (weight != 1).any():
        notes.append("in the loss rows count by the column `weight` of index.csv")
    if attack.redraw:
        notes.append("training draws each stamp anew in every step: written is one draw")
    for part, many in clipped.items():
        if many:
            notes.append(f"{many} images of {part} leave [0, 1] and are clipped to 8 bits")
    return notes


def _write_index(path: Path, parts: dict[str, Rows]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(HEADS)
        for part, rows in parts.items():
            if rows.columns:
                source, kind, old, number, weight = (column.tolist() for column in rows.columns)
                new = rows.label.tolist()
                columns = range(len(new)), source, kind, old, new, number, weight
                lines.writerows((part, *line) for line in zip(*columns, strict=True))


# --- The rows ---


@jax.jit
def _row_images(train: TrainSet, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rounded(train.rows(index)[0])


@jax.jit
def _fired_images(key, attack, kind, images, index) -> tuple[jax.Array, jax.Array]:
    return _rounded(fired(key, attack, kind, images, index))


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """8-bit pixels, and which images had others than these can be."""
    outside = ((x < -1e-6) | (x > 1 + 1e-6)).any((1, 2, 3))
    return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8), outside


def _trained_on(train: TrainSet, split: Split) -> Rows:
    size = int(train.plan.size)
    source, kind, label, weight, number = (np.asarray(leaf)[:size] for leaf in train.plan[:-1])
    old, weight = np.asarray(split.label)[source], np.round(weight.astype(np.float64), 6)

    def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in pieces(size, BATCH):
            left = size - int(rows[0])
            image, outside = _row_images(train, rows)
            yield np.asarray(image)[:left], np.asarray(outside)[:left]

    return Rows(label, images, (source, kind, old, number, weight))


def _triggered(key: jax.Array, attack: Any, data: Dataset) -> Rows:
    y, count = jnp.asarray(data.test.label), len(data.test.label)
    aims = [
        np.asarray(attack.success(jnp.asarray(kind), y, data.classes))
        for kind in range(1, attack.triggers + 1)
    ]
    source = np.concatenate([np.flatnonzero(aim >= 0) for aim in aims])
    kind = np.concatenate([np.full((aim >= 0).sum(), k) for k, aim in enumerate(aims, 1)])

    def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        test = jnp.asarray(data.test.image)
        for kind, aim in enumerate(aims, 1):
            for rows in pieces(count, BATCH):
                made = _fired_images(key, attack, jnp.asarray(kind), test, rows)
                mine = (aim[np.asarray(rows)] >= 0) & (np.arange(len(rows)) < count - int(rows[0]))
                image, outside = (np.asarray(leaf)[mine] for leaf in made)
                yield image, outside

    old, label = (
        np.asarray(data.test.label)[source],
        np.concatenate([aim[aim >= 0] for aim in aims]),
    )
    return Rows(label, images, (source, kind, old, source, np.ones(len(source))))


def _plain(split: Split) -> Rows:
    def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(split.label), BATCH):
            batch = np.asarray(split.image[start : start + BATCH])
            yield batch, np.zeros(len(batch), bool)

    return Rows(np.asarray(split.label), images)


# --- The files ---


def _npz(folder: Path, part: str, images: Iterator[np.ndarray], label: np.ndarray, data: Dataset):
    shape = (len(label), *data.shape)
    if math.prod(shape) > (most := schema.memory() // 2):
        raise BadInput(
            f"{part} takes {schema.gigabytes(math.prod(shape))}; at most {schema.gigabytes(most)} "
            "are written as .npz here: give --format parquet"
        )
    image, done = np.empty(shape, np.uint8), 0
    for batch in images:
        image[done : done + len(batch)] = batch
        done += len(batch)
    names = {"names": np.array(data.names)} if data.names else {}
    np.savez_compressed(folder / f"{part}.npz", image=image, label=label, **names)  # type: ignore[arg-type]


def _folder(
    folder: Path, part: str, images: Iterator[np.ndarray], label: np.ndarray, data: Dataset
):
    places = [folder / part / name for name in folder_names(data.names, data.classes)]
    for place in places:  # One without images too: others number the folders that there are.
        place.mkdir(parents=True)
    row = 0
    for batch in images:
        for image in batch:
            (places[label[row]] / f"{row:07d}.png").write_bytes(_png(image))
            row += 1


def folder_names(names: Sequence[str], classes: int) -> list[str]:
    """A folder for each class, such that their order, by which others number them, is that of the
    classes: names where they are so and can be, else numbers in front.
    """
    plain = [re.sub(r'[/\\:*?"<>|\0-\x1f]', "_", name).strip(" .")[:100] for name in names]
    alone = len({name.casefold() for name in plain}) == classes  # on any file system
    if alone and plain == list(names) and sorted(plain) == in_order(plain) == plain:
        return plain
    width = len(str(classes - 1))
    return [
        f"{k:0{width}d}" + (f"_{plain[k]}" if plain and plain[k] != str(k) else "")
        for k in range(classes)
    ]


def _parquet(
    folder: Path, part: str, images: Iterator[np.ndarray], label: np.ndarray, data: Dataset
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    classes = {"names": list(data.names or map(str, range(data.classes))), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": classes}
    columns = pa.schema(
        [("image", kind), ("label", pa.int64())],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    (folder / "data").mkdir(exist_ok=True)
    row = 0
    with pq.ParquetWriter(folder / "data" / f"{part}-00000-of-00001.parquet", columns) as file:
        for batch in images:
            pictures = [
                {"bytes": _png(image), "path": f"{row + i:07d}.png"}
                for i, image in enumerate(batch)
            ]
            some = label[row : row + len(batch)].astype(np.int64)
            row += len(batch)
            if len(batch):
                file.write_table(pa.table([pa.array(pictures, kind), some], schema=columns))


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "png")
    return stream.getvalue()
