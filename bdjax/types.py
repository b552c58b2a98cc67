"""What flows through the house: every function of bdjax takes and returns these.

Letters in shapes: `N` images, `B` batch, `H W C` height, width, channels, `K` classes, `M` rows of
a poisoned training set. Pixels are float32 in [0, 1], NHWC, at every boundary; stored images are
uint8.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, Protocol

import jax
import numpy as np
from jax.core import Tracer

from bdjax.errors import BadInput as BadInput
from bdjax.errors import shortened

Array = jax.Array | np.ndarray
ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
"""What stands for one in a check: values, what is traced, a shape alone."""
Variables = Mapping[str, Any]
"""A model's state: `params`, `batch_stats` where it has BatchNorm, and `masks: {site: [C]}` where
channels were pruned.
"""
Edits = Mapping[str, Callable[[jax.Array], jax.Array]]


class Range(NamedTuple):
    """The numbers that a field may hold, both ends included; with `pixels`, arrays of uint8 stand
    for shares of 255.
    """

    low: float
    high: float
    pixels: bool = False

    def fault(self, value: Any) -> str | None:
        """What is wrong with a number or array, as the end of a line; None where nothing is. NaN is
        outside.
        """
        if isinstance(value, (jax.Array, np.ndarray)):
            array = np.asarray(value)
            if array.size == 0 or (self.pixels and array.dtype == np.uint8):
                return None
            low, high = array.min(), array.max()  # NaN if any is
            value = low if not low >= self.low else high
        if self.low <= value <= self.high:
            return None
        low, high = (str(int(x)) if x == int(x) else f"{x:g}" for x in (self.low, self.high))
        return f"{shown(value)} is outside [{low}, {high}]"


INT32 = 2**31 - 1
MOST = 1e6
"""The largest factor, weight or threshold: its square is still far from float32's end."""
Share = Annotated[Array | float, Range(0, 1)]
"""A share, probability or opacity."""
Weight = Annotated[Array | float, Range(0, MOST)]
"""A factor, weight or threshold."""
Positive = Annotated[Array | float, Range(1e-6, MOST)]
"""What is divided by, or must move."""
Rate = Annotated[Array | float, Range(0, 1e3)]
"""A learning rate or a step."""
Pixels = Annotated[Array, Range(0, 1, pixels=True)]
"""Images: uint8, or in [0, 1]."""
Label = Annotated[Array | int, Range(0, INT32)]
"""A label; that it is below K is seen where K is known."""
Class = Annotated[int, Range(0, INT32)]
"""As `Label`, but part of the program."""
Side = Annotated[Array | float, Range(0, 65_536)]
"""The side of a box in pixels, or, below 1, as a share of the image's."""
Place = Annotated[Array | float, Range(-65_536, 65_536)]
"""A row or column; below 0 from the end."""
Steps = Annotated[Array | int, Range(1, 1_000_000)]
"""How often something is done, in a loop that may be left early."""
Draw = Annotated[Array | int, Range(0, 2**32 - 1)]
"""A seed that a sweep may vary."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
Key = Annotated[jax.Array, "key"]
"""One key of `jax.random.key`."""
Count = Annotated[int, Range(1, INT32)]
"""How many of what is there: more than there are means all."""
Size = Annotated[int, Range(1, 65_536)]
"""What memory grows with: units, channels, members, images."""
Epochs = Annotated[int, Range(0, 1_000_000)]
Repeats = Annotated[int, Range(1, 1_000_000)]
"""As `Steps`, but part of the program."""


class Metric(NamedTuple):
    """A number that rows may have, declared in the tuple `measures` of the class that gives it.

    `name`: its key, where `*` stands for any text, put in place of the `*` of the label:
    `asr_at_*`. `unit`: in a word, "" for none; a "share", in [0, 1], is printed as a percentage.
    `better`: which values are, None where neither. `label`: its heading, else the name. `hint`:
    what it is, in a line.

    >>> measures = (Metric("loss", better="low"), Metric("pruned", "channels"))
    """

    name: str
    unit: str = ""
    better: Literal["high", "low"] | None = None
    label: str = ""
    hint: str = ""


def shown(value: Any) -> str:
    """A number, or whatever stands where one should, in an error line."""
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"a key of shape {list(value.shape)}"
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (np.generic, jax.Array, np.ndarray)) and np.ndim(value) == 0:
        value = np.asarray(value).item()
    if isinstance(value, float):
        return repr(value) if len(repr(value)) <= 8 else f"{value:.6g}"
    huge = isinstance(value, int) and abs(value) >= 10**30
    return "a huge number" if huge else shortened(value)


def seed(value: Any) -> Any:
    """A seed as a leaf: what int32 cannot hold becomes uint32."""
    return np.uint32(value) if type(value) is int and INT32 < value < 2**32 else value


def concrete(*values: Any) -> bool:
    """Whether all leaves have values, as outside of jit and vmap."""
    return not any(
        isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(values)
    )


def between(name: str, value: Any, low: float, high: float) -> None:
    """Raises `BadInput` unless low ≤ value ≤ high (NaN is outside); what is traced passes."""
    if concrete(value) and (fault := Range(low, high).fault(np.asarray(value))):
        raise BadInput(f"{name} {fault}")


def whole(name: str, value: Any, low: int, high: int = INT32) -> int:
    """A whole number, given as such or in ASCII digits; raises `BadInput` where it is none or not
    in [low, high].
    """
    text = str(value)
    digits = text.removeprefix("-")
    if (
        not isinstance(value, (int, str, np.integer))
        or isinstance(value, bool)
        or not (digits.isascii() and digits.isdigit())
        or len(digits) > 30
    ):
        raise BadInput(f"{name} '{shown(text)}' is not a whole number from {low} to {high}")
    if fault := Range(low, high).fault(int(text)):
        raise BadInput(f"{name} {fault}")
    return int(text)


class Split(NamedTuple):
    """Images that belong together.

    `image: [N, H, W, C]` uint8, `label: [N]` int32, `group: [N]` int32 or None (frames of one
    object share a group).
    """

    image: Array
    label: Array
    group: Array | None = None

    def __getitem__(self, rows) -> "Split":  # type: ignore[override]
        """The rows `rows`: an index array or slice over N."""
        return Split(*(None if leaf is None else leaf[rows] for leaf in self))  # type: ignore[arg-type]


class Dataset(NamedTuple):
    """A data set in memory. The attacker trains on `train`; `clean` is the defender's own held-out
    data; `test` only measures.
    """

    name: str
    train: Split
    clean: Split
    test: Split
    classes: int
    names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(H, W, C)`."""
        return self.train.image.shape[1:]  # type: ignore[return-value]


class Splits(NamedTuple):
    """The images of a data set without the rest, on the devices: what programs share. `train` is
    None where nothing looks at it.
    """

    train: Split
    clean: Split
    test: Split


def class_name(label: int, names: Sequence[str] = ()) -> str:
    """A label as people read it, wherever one is shown: `3 (Dress)`, or its number alone where the
    classes have no names, or it is its own.
    """
    name = names[label] if 0 <= label < len(names) else ""
    return f"{label} ({name})" if name not in ("", str(label)) else str(label)


class Output(NamedTuple):
    """`logits: [B, K]`; `acts: {site: [B, ...]}`; `variables`: the input variables, BatchNorm
    statistics updated if training.
    """

    logits: jax.Array
    acts: dict[str, jax.Array]
    variables: Variables


class Model(NamedTuple):
    """A network as two pure functions.

    `init(key) -> variables`; `apply(variables, x, *, train=False, edits=None, key=None) -> Output`
    with `x: [B, H, W, C]` in [0, 1]. `sites`: the places, in order of the forward pass, where a
    defense may look (`acts`), cut (`masks`) or push (`edits`).
    """

    init: Callable[..., Variables]
    apply: Callable[..., Output]
    shape: tuple[int, int, int]
    classes: int
    sites: tuple[str, ...]


class Plan(NamedTuple):
    """Which rows a poisoned training set has. Sizes depend on N alone, so that rates can be
    vmapped.

    `source: [M]` the base image of a row; `kind: [M]` its trigger, 0 = none; `label: [M]` its
    training label; `weight: [M]` its weight in the loss; `number: [M]` its number at poisoning,
    which it keeps wherever it is moved: what its stamp is drawn by; `size: []` how many rows,
    counted from the first, exist: the others are never drawn.
    """

    source: jax.Array
    kind: jax.Array
    label: jax.Array
    weight: jax.Array
    number: jax.Array
    size: jax.Array

    def take(self, rows: jax.Array, size: jax.Array) -> "Plan":
        """The rows `rows`, an index array over M, of which the first `size` exist."""
        return Plan(*(leaf[rows] for leaf in self[:-1]), size=size)


class Stamper(Protocol):
    """What writes triggers into images: an attack, or triggers that a search has found."""

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        """`x: [H, W, C]` with trigger `kind: []` (0 = unchanged). `train=False`: as fired at test
        time, where that differs.
        """
        ...


class Attack(Stamper, Protocol):
    """An attack, as training, measuring and judging see it. `bdjax.attacks.base.Attack` is the base
    that attacks are made from; `bdjax.testing.check_attack` looks whether one does as it says.

    `trains`: its `train` does more than poison rows, and is run whole; what `train` returns is what
    is fired. `plans`: its rows come from a `plan` of its own, not from shares of the images.
    """

    trains: ClassVar[bool]
    plans: ClassVar[bool]

    @property
    def redraw(self) -> bool:
        """Whether stamps are drawn anew in every training step."""
        ...

    @property
    def triggers(self) -> int:
        """How many triggers are fired at test time: kinds 1 … triggers."""
        ...

    @property
    def probes(self) -> dict[str, int]:
        """Further kinds worth firing at test time, by name."""
        ...

    def bind(self, data: Split) -> "Attack":
        """This attack with the images that it takes from the attacker's data."""
        ...

    def train(
        self,
        key: jax.Array,
        model: Model,
        recipe: Any,
        data: Split,
        variables: Variables | None = None,
    ) -> tuple["Attack", Variables, Any]:
        """The attack as it is to be fired, a victim of it, and the curves of its training."""
        ...

    def plan(self, key: jax.Array, y: jax.Array, classes: int) -> Plan:
        """Which rows the training set has: labels `y: [N]` of `classes` classes."""
        ...

    def count(self, key: jax.Array, y: jax.Array, classes: int) -> dict[str, int]:
        """How many rows `plan` has, and how many of them are stamped and relabelled."""
        ...

    def targets(self, classes: int) -> jax.Array:
        """The labels that one of the triggers is to give: `[K]` bool."""
        ...

    def success(self, kind: jax.Array, y: jax.Array, classes: int) -> jax.Array:
        """The label that counts as a hit for true labels `y: [N]`; -1 where there is none."""
        ...

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Raises `BadInput` where this attack cannot be run on images of `shape`."""
        ...


class Victim(NamedTuple):
    """A net to be judged, and what is known of how it came about: its `attack` as it is fired
    (None: a clean net, or nobody knows), the `recipe` and `key` of its training. Kinds of defenses
    need different ones of these; what is not known is None.
    """

    model: Model
    variables: Any = None
    attack: Attack | None = None
    recipe: Any = None
    key: Any = None


class Judgement(NamedTuple):
    """What is reported of a defense on a victim, of any kind: `metrics: {name: []}`, `arrays` for
    pictures, and the `variables` that it leaves behind, None where it leaves the net alone.
    """

    metrics: dict[str, Any]
    arrays: dict[str, Any]
    variables: Variables | None = None


class Repaired(NamedTuple):
    """The variables that a defense leaves behind, of the model `defense.wrap(model)`, and what it
    reports: curves, counts, the pruning order.
    """

    variables: Variables
    info: dict[str, Any]


class Verdict(NamedTuple):
    """A judgement on a model. `index: []` anomaly index; `infected: []` bool; `flagged: [K]` bool,
    labels called targets; `p_value: []` of the null that the net is clean, NaN where the judge has
    none.

    Of several seeds `info["seeds"]` holds each one's `index`, `infected`, `p_value: [S]` and
    `flagged: [S, K]`, see `defenses.base.Judge`.
    """

    index: jax.Array
    infected: jax.Array
    flagged: jax.Array
    info: dict[str, Any]
    p_value: Array | float = np.nan

    @property
    def undecided(self) -> jax.Array:
        """Whether seeds disagree: `[]` bool."""
        each = self.info["seeds"]["infected"] if "seeds" in self.info else self.infected[..., None]
        return each.any(-1) & ~each.all(-1)

    @property
    def word(self) -> "Word":
        """The verdict in words, once it is computed."""
        return word(bool(self.infected), bool(self.undecided))


Word = Literal["infected", "undecided", "no sign"]
"""What a judge says: its rule holds on every seed, on some, on none."""


def word(infected: Any, undecided: Any = False) -> Word:
    """The word of a verdict, from its two numbers: as a row's metrics hold them, too."""
    return "infected" if infected == 1 else "undecided" if undecided == 1 else "no sign"


class Scores(NamedTuple):
    """A judgement on inputs. `score: [B]`, lower = more suspicious; `boundary: []`; `flagged: [B]`
    = `score <= boundary`.
    """

    score: jax.Array
    boundary: jax.Array
    flagged: jax.Array
    info: dict[str, Any]


class Suspects(NamedTuple):
    """A judgement on training rows. `score: [M]`, higher = more suspicious; `removed: [M]` bool."""

    score: jax.Array
    removed: jax.Array
    info: dict[str, Any]


@jax.tree_util.register_static
class Unlabelled:
    """In the place of labels that nobody has: whoever reads them raises `BadInput`."""

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        raise BadInput(
            "without labels this cannot be done: give them (--labels given), or let the net give "
            "them (--labels net)"
        )

    __array__ = __jax_array__ = __len__ = __iter__ = __getitem__ = _read
    shape = dtype = ndim = astype = property(_read)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unlabelled) or self._read()

    def __hash__(self) -> int:
        return hash(Unlabelled)


NO_LABELS = Unlabelled()


def check_images(
    image: Any,
    shape: Any = None,
    label: Any = NO_LABELS,
    classes: int | None = None,
    least: int = 1,
) -> None:
    """Raises `BadInput` unless `image: [N, H, W, C]` is uint8 or in [0, 1], of `shape` (None: any),
    with one `label` of 0 … `classes` − 1 each, and N at `least` that. Values that are traced pass.
    """
    for name, array, form in (("images", image, "[N, H, W, C]"), ("labels", label, "[N]")):
        if not isinstance(array, (*ARRAYS, Unlabelled)):
            raise BadInput(f"{name} are {type(array).__name__}, not an array {form}")
    given = np.shape(image)
    if len(given) != 4 or (shape is not None and given[1:] != tuple(shape)):
        wanted = "[N, H, W, C]" if shape is None else f"[N, {', '.join(map(str, shape))}]"
        raise BadInput(f"images have shape {list(given)}, not {wanted}")
    if 0 in given[1:] or given[0] < least:
        raise BadInput(f"images have shape {list(given)}: there is none")
    kind = image.dtype
    if kind != np.uint8 and not jax.numpy.issubdtype(kind, np.floating):
        raise BadInput(f"images are of {kind}: give uint8, or floats in [0, 1]")
    if concrete(image) and (fault := Range(0, 1, pixels=True).fault(image)):
        raise BadInput(f"a pixel {fault}: give uint8, or floats in [0, 1]")
    if isinstance(label, Unlabelled):
        return
    if np.shape(label) != given[:1]:
        raise BadInput(f"{given[0]} images have labels of shape {list(np.shape(label))}")
    check_labels(label, classes)


def check_variables(variables: Any) -> None:
    """Raises `BadInput` unless `variables` can be those of a model: a mapping, `params` too."""
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params", {}), Mapping):
        raise BadInput("variables are no mapping with params: give what the model's init made")
    for leaf in jax.tree.leaves(variables, is_leaf=lambda leaf: leaf is None):
        if not isinstance(leaf, ARRAYS):
            raise BadInput(f"variables hold {type(leaf).__name__}, not arrays alone")


def check_labels(label: Any, classes: int | None) -> None:
    """Raises `BadInput` unless `label: [N]` are whole numbers, of 0 … `classes` − 1."""
    kind = label.dtype if hasattr(label, "dtype") else np.asarray(label).dtype
    if not jax.numpy.issubdtype(kind, np.integer):
        raise BadInput(f"labels are of {kind}, not whole numbers")
    most = INT32 if classes is None else classes - 1
    if concrete(label) and (fault := Range(0, most).fault(np.asarray(label))):
        raise BadInput(f"a label {fault}")
