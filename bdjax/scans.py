"""Are these images poisoned? A training set by the judges of training rows; images that came to a
net by the filters of its inputs. Suspects ranked with pictures, an index, one word.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import datasets, imports, own, registry
from bdjax.datasets.base import Source, divide, together
from bdjax.datasets.files import Folder, is_image, sized
from bdjax.datasets.pictures import picture, stacked
from bdjax.defenses.base import Defense, InputFilter, SampleFilter
from bdjax.defenses.parts import nulls
from bdjax.defenses.parts.reversed import TriggerDefense
from bdjax.models.layers import Net, build
from bdjax.models.shamshiri import Cnn
from bdjax.repairs import search
from bdjax.sweep import labelled, takes
from bdjax.train import Recipe, clean_set, fit, unit
from bdjax.types import BadInput, Dataset, Model, Range, Seed, Split, Word, class_name

FEWEST, COMPARED = 20, 4
"""Rows of a class, and clean images, below which nothing is said by them; and classes with so many
rows, below which none is told from the others.
"""
LEAST, SHARE = 0.01, 0.6
"""The share of a class that is looked for, from and to."""
SHOWN = 40
"""Suspects on the page."""
FILES = ("index.html", "suspects.csv", "cleaned.npz")
NET, RECIPE = Cnn(), Recipe()
"""What is trained on a set that comes without a net."""
Alpha = Annotated[float, Range(1e-6, 0.5)]


class Judged(NamedTuple):
    """What a judge says: its `p_value`, corrected for what it compares; whom it `accuses`, in
    words; the `score: [N]` of each image, higher = more suspicious, and its `suspects: [N]`; why it
    was left out, `fault`.
    """

    name: str
    p_value: float = np.nan
    accuses: str = ""
    score: np.ndarray = np.zeros(0)
    suspects: np.ndarray = np.zeros(0, bool)
    fault: str = ""


class Scan(NamedTuple):
    """The verdict in a `word`, and why; all `judges`; the images in `order`, the most suspicious
    first, and which of them are `suspects: [N]`.
    """

    word: Word
    reason: str
    judges: tuple[Judged, ...]
    order: np.ndarray
    suspects: np.ndarray


TOO_FEW = f"fewer than {COMPARED} classes have {FEWEST} rows: none to compare with"
UNPROVEN = "judges of rows rank them, they do not convict a set"


@registry.door
def scan_set(
    dataset: str | Path | Source,
    net: str | Path | None = None,
    *,
    out: str | Path | None = None,
    model: Net = NET,
    recipe: Recipe = RECIPE,
    alpha: Alpha = 0.05,
    seed: Seed = 0,
    say: Callable[[str], Any] = print,
) -> Scan:
    """Whether the training set of `dataset` is poisoned, by every judge of training rows on `net`,
    or on one of the family `model` that `recipe` trains on it.

    A judge tells poison from the other rows of a class by a score; most suspicious is the class
    whose scores stand out most from those of the others, `p_value` under a log-normal distribution
    of these, times the number of classes.

    The word is *undecided*, whatever the judges say: the classes of real sets differ so much that
    this p-value was .02 for a clean sample of Fashion-MNIST, and .6 for one with 4 % of poison. The
    order of the suspects is what there is to look at.

    `out`: a folder for the page, `suspects.csv`, which names the file of each image or, where the
    set is no folder, its row, and the set without the suspects, `cleaned.npz`.
    """
    folder = _ready(out)
    loaded = None if net is None else imports.load_net(net)
    dataset = datasets.source(dataset)
    if loaded is not None:
        dataset = sized(dataset, loaded.model.shape)
    train, _, names = dataset.read()
    image, label = np.asarray(train.image), np.asarray(train.label, np.int32)
    split = Split(image, label)
    classes = max(len(names), int(split.label.max()) + 1)
    if np.sum(np.bincount(label) >= FEWEST) < COMPARED:
        raise BadInput(TOO_FEW)
    key_fit, key_judge = jax.random.split(jax.random.key(seed))
    if loaded is None:
        made = build(model, split.image.shape[1:], classes)
        say(f"training {registry.name_of(model)} on {len(split.label)} images")
        rows = clean_set(split)
        variables = jax.jit(lambda k: fit(k, made, recipe, rows)[0])(key_fit)
    else:
        made, variables = loaded.model, loaded.variables
        takes(made, Dataset("the set", split, split, split, classes))
        if classes > made.classes:
            raise BadInput(
                f"the net has {made.classes} classes, the set has {classes}: give a net that "
                "was trained on it, or none (--net)"
            )

    def one(judge: Any) -> Judged:
        registry.admit(judge, made, split)
        rows = clean_set(split)
        found = jax.jit(lambda v: judge(key_judge, made, v, rows))(variables)
        return grouped(_name(judge), np.asarray(found.score), label, names)

    judged = [_tried(judge, one, say) for judge in _of(SampleFilter)]
    said = _decided(judged, alpha)
    found = said._replace(word="undecided", reason=f"{UNPROVEN}; {said.reason}")
    if folder is not None:
        labels = [class_name(int(k), names) for k in split.label]
        files = dataset.files() if isinstance(dataset, Folder) else None
        kept = ~found.suspects if found.suspects.any() else None
        null = (
            "Nothing is decided: of real sets neither false alarms nor power are as they should be "
            "yet. Look at the suspects; poison in most classes at once is not seen."
        )
        more = {"names": np.array(names)} if names else {}
        cleaned = None if kept is None else {"image": image[kept], "label": label[kept], **more}
        _write(folder, found, image, labels, "training set", null, cleaned, files)
    return found


@registry.door
def scan_images(
    images: str | Path,
    net: str | Path,
    clean: str | Path | Source,
    *,
    out: str | Path | None = None,
    alpha: Alpha = 0.05,
    seed: Seed = 0,
    say: Callable[[str], Any] = print,
) -> Scan:
    """Whether `images`, a folder of pictures or a data set, carry a trigger of `net`, by every
    filter of inputs. `clean`: images of its kind, half of which the filters learn from.

    An image is suspected by a filter where it is among the share `alpha` of the other half: of
    clean images that share is, whatever the net. `p_value`: the chance that so many of as many
    clean images are (beta-binomial). The word is *infected* where a filter's p, times the number of
    filters, is at most `alpha`, *undecided* where only its own is.
    """
    folder = _ready(out)
    loaded = imports.load_net(net)
    model, variables = loaded.model, loaded.variables
    clean = sized(datasets.source(clean), model.shape)
    data = clean.load()
    takes(model, data)
    if data.classes != model.classes:
        data = labelled(clean, model, variables, "net").load()
    given, files = _pictures(own.at_home(images), model)
    joined = together(data.train, data.clean, data.test)
    known, held = divide(joined, 0.5, int(seed) % 2**31)
    if min(len(known.label), len(held.label)) < FEWEST:
        raise BadInput(f"{len(joined.label)} clean images are too few: give a few hundred")
    x = jnp.concatenate([unit(given), unit(held.image)])
    key_find, key_judge = jax.random.split(jax.random.key(seed))
    triggers: list[Any] = []

    def one(judge: Any) -> Judged:
        if isinstance(judge, TriggerDefense):
            if not triggers:
                triggers.append(search(key_find, model, variables, known))
            judge = registry.replace(judge, ["found"], triggers[0])
        registry.admit(judge, model, known)
        found = jax.jit(lambda v, x: judge(key_judge, model, v, known, x).score)(variables, x)
        return ranked(_name(judge), np.asarray(found), len(given), alpha)

    found = _decided([_tried(judge, one, say) for judge in _of(InputFilter)], alpha)
    if folder is not None:
        null = (
            f"Of clean images each filter suspects {alpha:.0%}, measured on {len(held.label)} held "
            "out."
        )
        _write(folder, found, given, files, "images", null, None)
    return found


# --- What is told from scores ---


def grouped(name: str, score: np.ndarray, label: np.ndarray, names: Sequence[str] = ()) -> Judged:
    """A judge's `score: [N]` of training rows: the class whose scores are largest in the mean of
    |score|, and those of its rows that are the more suspicious of two groups.
    """
    score = np.where(np.isfinite(score), score, np.nanmin(score, initial=0.0))
    found = {k: second_group(score[label == k]) for k in np.unique(label).tolist()}
    found = {k: below for k, below in found.items() if below is not None}
    if len(found) < COMPARED:
        return Judged(name, fault=TOO_FEW)
    rest = {k: -np.log(np.abs(score[label == k]).mean() + 1e-12) for k in found}
    first = min(rest, key=lambda k: rest[k])
    others = np.asarray([v for k, v in rest.items() if k != first])
    n, spread = len(others), max(float(others.std(ddof=1)), 1e-6)
    t = (rest[first] - others.mean()) / (spread * (1 + 1 / n) ** 0.5)
    p_value = min(1.0, len(found) * float(nulls.student(t, n - 1)))
    suspects = (label == first) & (score > found[first])
    return Judged(name, p_value, f"label {class_name(first, names)}", score, suspects)


def second_group(score: np.ndarray) -> float | None:
    """Where the less suspicious of the two groups begins into which the scores of a class `[n]`
    fall, those with the most variance between them; None of too few.
    """
    n = len(score)
    if n < FEWEST or np.ptp(score) == 0:
        return None
    order = np.sort(score)[::-1].astype(np.float64)
    sums, m = np.cumsum(order), np.arange(1, n)
    first, second = sums[:-1] / m, (sums[-1] - sums[:-1]) / (n - m)
    between = m * (n - m) * (first - second) ** 2 / n**2
    able = (m >= max(2, LEAST * n)) & (m <= SHARE * n)
    return float(order[int(np.argmax(np.where(able, between, -1.0))) + 1])


def ranked(name: str, score: np.ndarray, given: int, alpha: float) -> Judged:
    """A filter's `score`, lower = more suspicious, of `given` images and of clean ones after them:
    which of the former are among the share `alpha` of the latter.
    """
    from scipy.stats import betabinom

    score = np.where(np.isfinite(score), score, -np.inf)  # what is no number is suspicious
    mine, held = score[:given], np.sort(score[given:])
    below = np.searchsorted(held, mine, "right")
    rank = int(alpha * (len(held) + 1))
    if rank < 1:
        return Judged(name, fault=f"{len(held)} clean images cannot tell a share of {alpha:g}")
    suspects = below < rank
    chance = betabinom.sf(suspects.sum() - 1, given, rank, len(held) + 1 - rank)
    words = f"{suspects.sum()} of {given} images"
    return Judged(name, float(chance), words, -below.astype(float), suspects)


def _decided(judged: Sequence[Judged], alpha: float) -> Scan:
    able = [one for one in judged if not one.fault]
    if not able:
        why = "; ".join(f"{one.name}: {one.fault}" for one in judged)
        raise BadInput(f"no judge applies: {why}" if why else "no judge applies")
    best = min(able, key=lambda one: one.p_value)
    least = min(1.0, best.p_value * len(able))
    word: Word = "infected" if least <= alpha else "no sign"
    reason = f"{best.name} accuses {best.accuses}: p {least:.2g}, corrected for {len(able)} judges"
    if word == "no sign" and best.p_value <= alpha:
        word = "undecided"
    elif word == "no sign":
        reason = f"no judge accuses anything: the smallest p, corrected, is {least:.2g}"
    guilty = [one for one in able if one.p_value * len(able) <= alpha]
    suspects = np.logical_or.reduce([one.suspects for one in guilty or [best]])
    suspects &= word == "infected"
    ranks = np.mean([np.argsort(np.argsort(one.score)) for one in able], axis=0)
    return Scan(word, reason, tuple(judged), np.lexsort((-ranks, ~suspects)), suspects)


def _of(kind: type) -> Iterator[Any]:
    for entry in registry.entries("defense"):
        if issubclass(entry.cls, kind) and not (judge := registry.on_cpu(entry)).oracle:
            yield judge


def _tried(judge: Defense, one: Callable[[Any], Judged], say: Callable[[str], Any]) -> Judged:
    try:
        found = one(judge)
    except BadInput as error:
        found = Judged(_name(judge), fault=str(error))
    say(f"  {found.name}: {found.fault or f'{found.accuses}, p {found.p_value:.2g}'}")
    return found


def _name(judge: Any) -> str:
    return registry.name_of(judge) or type(judge).__name__


# --- Files ---


def _pictures(path: Path, model: Model) -> tuple[np.ndarray, list[str]]:
    """The images of a folder, or of a data set, as the net takes them, and what they are called."""
    files = sorted(p for p in path.glob("*") if is_image(p)) if path.is_dir() else []
    if not files:
        train, test, _ = sized(datasets.source(str(path)), model.shape).read()
        image = np.concatenate([split.image for split in (train, test) if split is not None])
        files = [Path(str(i)) for i in range(len(image))]
    else:
        height, width, _ = model.shape
        size = height if height == width else None
        image = stacked(path, (picture(p) for p in files), len(files), size)
    if image.shape[-1] == 1 and model.shape[-1] == 3:
        image = image.repeat(3, -1)
    if image.shape[1:] != tuple(model.shape):
        have, wanted = ("×".join(map(str, one)) for one in (image.shape[1:], model.shape))
        raise BadInput(f"{path}: images of {have}, the net takes {wanted}")
    return image, [p.name for p in files]


def _ready(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = own.at_home(out)
    own.beside(folder, FILES)
    return folder


def _write(
    folder: Path, found: Scan, image: np.ndarray, words: Sequence[str], title: str, null: str,
    cleaned: dict[str, np.ndarray] | None, places: Sequence[str] | None = None,
) -> None:  # fmt: skip
    able = [one for one in found.judges if not one.fault]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "what", "suspect", *(one.name for one in able)])
    for i in found.order.tolist():
        scores = (f"{one.score[i]:.6g}" for one in able)
        table.writerow([places[i] if places else i, words[i], int(found.suspects[i]), *scores])
    files = {
        "index.html": _page(found, image, words, title, null).encode(),
        "suspects.csv": text.getvalue().encode(),
    }
    if cleaned is not None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **cleaned)  # type: ignore[arg-type]
        files["cleaned.npz"] = packed.getvalue()
    own.beside(folder, FILES)
    if cleaned is None:  # an earlier scan's is not this one's
        (folder / "cleaned.npz").unlink(missing_ok=True)
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(own.renamed(folder / name)).write_bytes(content)


def _page(found: Scan, image: np.ndarray, words: Sequence[str], title: str, null: str) -> str:
    from bdjax import plots
    from bdjax.report import TONES, Figure, draw, embedded, templates

    rows = found.order[:SHOWN]
    across = min(8, len(rows))
    down = -(-len(rows) // across)
    grid = np.full((down * across, *image.shape[1:]), np.nan, np.float32)
    grid[: len(rows)] = np.asarray(unit(image[rows]))
    grid = grid.reshape(down, across, *image.shape[1:])
    caption = "The most suspicious first: " + ", ".join(f"{i} ({words[i]})" for i in rows.tolist())
    (drawn,) = draw([Figure("suspects", "Suspects", caption, plots.images(grid))])
    return (
        templates()
        .get_template("scan.html.j2")
        .render(
            scan=found,
            title=title,
            tone=TONES[found.word],
            null=null,
            pictures=[{"id": drawn.name, **embedded(drawn)}],
        )
    )
