"""Whether a method does as it says: run these checks on an attack, a net or a data set of your own.

>>> check_attack(MyAttack())

Each check raises `AssertionError` with one line that says what is wrong. `check_attack`,
`check_model` and `check_dataset` run all of them; bdjax's tests run them on all that is registered.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import registry
from bdjax.attacks.base import Attack, Labels
from bdjax.train import TrainSet, clean_plan
from bdjax.types import BadInput, Split

Shape = tuple[int, int, int]
SHAPE, CLASSES = (28, 28, 3), 20
KEY = 0
CLOSE = 1e-5
"""How far two computations of one number may lie apart, by the order of their sums."""

# Each check compiles a few programs that run for milliseconds.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _hold(holds: Any, words: str) -> None:
    if not holds:
        raise AssertionError(words)


def _traced(where: str, fn: Callable, *args: Any) -> Any:
    """`fn(*args)` compiled; what asks for the value of something traced is a failure."""
    try:
        return jax.device_get((fn if hasattr(fn, "lower") else _jit(fn))(*args))
    except jax.errors.JAXTypeError as error:
        line = str(error).partition("\n")[0]
        raise AssertionError(f"{where} cannot be compiled: {line}") from error


def _near(one: Any, two: Any, atol: float = CLOSE) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.shape(a) == np.shape(b) and np.allclose(a, b, 1e-4, atol) for a, b in pairs)


# --- Attacks ---


def check_attack(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """All that holds for every attack, on images of `shape`: stamps, plans, labels, values."""
    check_values(attack, shape, classes)
    ready = with_pictures(attack, shape, classes)
    for each in ready:
        check_stamps(each, shape, classes)
    check_randomness(ready[0], shape, classes)
    check_plan(attack, shape, classes)
    check_labels(attack, shape, classes)
    check_leaves(attack, shape, classes)


def example(shape: Shape = SHAPE, classes: int = CLASSES, images: int = 400) -> Split:
    """Images of noise, labels 0 … K − 1 in turn: what attacks are checked on."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (images, *shape), np.uint8)
    return Split(image, np.arange(images, dtype=np.int32) % classes)


def _pictures(shape: Shape) -> jax.Array:
    """Black, white and noise: `[3, H, W, C]`."""
    noise = np.random.default_rng(1).uniform(size=shape).astype(np.float32)
    return jnp.stack([jnp.zeros(shape), jnp.ones(shape), jnp.asarray(noise)])


def with_pictures(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> list[Attack]:
    """`attack` ready to be fired, and with each of the pictures that it may take: an attack that
    makes its trigger for a net has a random one.
    """
    data, found = example(shape, classes), []
    for filled in (attack, *_filled(attack, shape, classes)):
        bound = filled.bind(data)
        try:
            jax.eval_shape(bound.stamp, jnp.asarray(1), jnp.zeros(shape), jax.random.key(KEY))
        except BadInput:  # its trigger has yet to be made
            continue
        except jax.errors.JAXTypeError as error:
            line = str(error).partition("\n")[0]
            raise AssertionError(f"stamp of {_name(attack)} cannot be compiled: {line}") from error
        found.append(bound)
    _hold(found, f"{_name(attack)} cannot be fired: check its fields of pictures")
    return found


def _filled(attack: Attack, shape: Shape, classes: int) -> Iterator[Attack]:
    rng = np.random.default_rng(2)
    for name, hint in registry.hints(type(attack)).items():
        limits = [limit for _, limit in registry.ranges(hint) if limit is not None]
        if getattr(attack, name) is not None or not any(limit.pixels for limit in limits):
            continue
        modes: dict[str, Any] = {}
        for cls in reversed(type(attack).__mro__):
            for other, values in (vars(cls).get("used_if", {}).get(name) or {}).items():
                modes[other] = values[0]
        for size in (shape, (*shape[:2], shape[2] + 1), (4, *shape)):
            picture = rng.integers(0, 256, size, np.uint8)
            try:
                filled = dataclasses.replace(attack, **modes, **{name: picture})
                filled.check(shape, classes)
            except BadInput:
                continue
            yield filled
            break


def _name(method: Any) -> str:
    return registry.name_of(method) or type(method).__name__


def _fired(attack: Attack) -> list[int]:
    """The kinds that are fired at test time."""
    return [*range(1, attack.triggers + 1), *attack.probes.values()]


def _stamps(attack: Attack, kinds: jax.Array, images: jax.Array, key: jax.Array, train: bool):
    """`images: [B, H, W, C]` with each of `kinds: [T]`: `[T, B, H, W, C]`."""

    def one(kind, x):
        return attack.stamp(kind, x, key, train=train)

    return jax.vmap(lambda kind: jax.vmap(lambda x: one(kind, x))(images))(kinds)


def check_stamps(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """Stamped images are images; kind 0 leaves them alone; `exact` is kept; jit changes nothing."""
    name, key, x = _name(attack), jax.random.key(KEY), _pictures(shape)
    fired = _fired(attack)
    plan = attack.plan(key, jnp.asarray(attack.base(_labels(classes), classes)), classes)
    exists = np.arange(plan.kind.shape[0]) < int(plan.size)
    rest = set(np.asarray(plan.kind)[exists].tolist()) - {0, *fired}
    kinds = [0, *fired, *sorted(rest)[:2]]

    def both(attack, key):
        return tuple(_stamps(attack, jnp.asarray(kinds), x, key, train) for train in (True, False))

    for train, found in zip((True, False), _traced(f"stamp of {name}", both, attack, key)):
        where = f"{name}, {'in training' if train else 'fired'}:"
        _hold(
            found.dtype == np.float32 and found.shape == (len(kinds), *x.shape),
            f"{where} stamps are {found.dtype}{list(found.shape[2:])}, not float32{list(shape)}",
        )
        _hold(np.isfinite(found).all(), f"{where} a stamped pixel is NaN or infinite")
        _hold(np.array_equal(found[0], x), f"{where} kind 0 changes the image")
        for kind, images in zip(kinds, found):
            most = 1.0 if kind in (0, *fired) else attack.brightest
            low, high = images.min(), images.max()
            _hold(
                low >= 0 and high <= most + 1e-6,
                f"{where} kind {kind} has pixels from {low:g} to {high:g}, outside [0, {most:g}]",
            )
            said = attack.exact(kind, shape, train=train) if kind in fired else None
            _hold(kind == 0 or not np.array_equal(images, x), f"{where} kind {kind} does nothing")
            if said is not None:
                m, pattern = np.asarray(said.mask), np.asarray(said.pattern)
                _hold(
                    m.shape == (*shape[:2], 1) and pattern.shape == shape,
                    f"{where} exact gives a mask of {m.shape} and a pattern of {pattern.shape}",
                )
                gap = np.abs(images - ((1 - m) * np.asarray(x) + m * pattern)).max()
                _hold(
                    gap <= float(said.most) + CLOSE,
                    f"{where} kind {kind} is {gap:g} away from what `exact` says, at most "
                    f"{float(said.most):g} is allowed",
                )
                out = (m == 0) & (np.asarray(said.most) == 0)
                same = np.where(out, images == np.asarray(x), True).all()
                _hold(same, f"{where} kind {kind} changes a pixel outside of its mask")
        eager = attack.stamp(jnp.asarray(1), x[2], key, train=train)
        _hold(_near(found[1, 2], eager), f"{where} the compiled stamp is another one")


def check_randomness(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """A poisoned image is one image: its stamp comes from the key and the row's number alone, in
    every step; with `redraw` it is another one in every step. `random` says whether keys matter.
    """
    name, x, many = _name(attack), _pictures(shape)[2], 6
    key, other, *steps = jax.random.split(jax.random.key(KEY), 4)
    kind = jnp.asarray(attack.triggers)
    once, again = (attack.stamp(kind, x, key) for _ in range(2))
    _hold(_near(once, again, 0), f"{name}: one key gives two stamps")

    row = jnp.arange(many)
    plan = clean_plan(row)._replace(source=0 * row, kind=1 + 0 * row)

    def rows(attack, number, step):
        data = TrainSet(x[None], plan._replace(number=number), attack, other)
        return data.rows(row, step)[0]

    def seen(redraw):
        program = functools.partial(_traced, f"stamp of {name}", _jit(rows))
        return functools.partial(program, dataclasses.replace(attack, redraw=redraw))

    written = seen(False)
    one = written(row, steps[0])
    same = np.array_equal(one, written(row, steps[1]))
    _hold(same, f"{name}: a poisoned image is another one in the next step")
    turned = written(row[::-1], steps[0])[::-1]
    _hold(_near(turned, one), f"{name}: a row's stamp hangs on its place, not on its number")
    differ = not np.allclose(one, one[:1])
    if attack.random:
        _hold(differ, f"{name} is random, but all rows have one stamp: it ignores its key")
        new, newer = (seen(True)(row, step) for step in steps)
        _hold(not np.allclose(new, newer), f"{name}: with redraw, stamps of two steps are the same")
    else:
        words = "declare it: random"
        _hold(not differ, f"{name}: stamps differ from row to row without being random; {words}")


def _labels(classes: int) -> jax.Array:
    return jnp.asarray(np.arange(400, dtype=np.int32) % classes)


def _modes(attack: Attack, shape: Shape, classes: int) -> Iterator[Attack]:
    """`attack` as it is, and with each other `labels` and `append` that its `check` accepts."""
    yield attack
    for labels in get_args(Labels):
        sources = tuple(k for k in range(1, 4) if not np.any(np.asarray(attack.target) == k))
        fields = {"labels": labels, "append": not attack.append}
        fields |= {"sources": sources} if labels == "source-specific" else {}
        changed = dataclasses.replace(attack, **fields)
        try:
            changed.check(shape, classes)
        except BadInput:
            continue
        yield changed


def check_plan(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """Rows are of images that there are, clean ones keep their label, each has a number of its own;
    as many are stamped as `rate` asks for; `count` counts what `plan` does.
    """
    key = jax.random.key(KEY)
    for each in _modes(attack, shape, classes):
        name = f"{_name(attack)} ({each.labels}, append={each.append})"
        y = np.asarray(each.base(_labels(classes), classes))
        plan = jax.device_get(each.plan(key, jnp.asarray(y), classes))
        size = int(plan.size)
        _hold(0 < size <= len(plan.kind), f"{name}: {size} rows of {len(plan.kind)} exist")
        source, kind, label, weight, number = (leaf[:size] for leaf in plan[:-1])
        _hold(
            ((source >= 0) & (source < len(y))).all(),
            f"{name}: a row is of image {source.max()}, there are {len(y)}",
        )
        own = y[source]
        _hold(
            ((label >= 0) & (label < classes)).all() and (kind >= 0).all(),
            f"{name}: a row has a label or a kind that there is not",
        )
        _hold((label == own)[kind == 0].all(), f"{name}: a clean row has another label")
        _hold(len(set(number.tolist())) == size, f"{name}: two rows have one number")
        _hold(
            np.isfinite(weight).all() and (weight >= 0).all(),
            f"{name}: the weight of a row is negative, NaN or infinite",
        )
        count = each.count(key, _labels(classes), classes)
        poisoned = kind > 0
        found = {
            "rows": size, "poisoned": poisoned.sum(), "added": max(size - len(y), 0),
            "relabelled": (poisoned & (label != own)).sum(),
            "clean_label": (poisoned & (label == own)).sum(),
        }  # fmt: skip
        for what, many in found.items():
            _hold(count[what] == many, f"{name}: count says {count[what]} {what}, the plan {many}")
    if registry.unread(attack, ["rate"]) is None:
        check_rate(attack, shape, classes)


def check_rate(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """A rate of 0 stamps nothing, a rate r the share r of what rate 1 asks for, as far as there are
    images for it; a rate that comes to no image is refused.
    """
    name, key, y = _name(attack), jax.random.key(KEY), _labels(classes)

    def at(rate: float) -> dict[str, int]:
        return dataclasses.replace(attack, rate=rate, cover=0.0).count(key, y, classes)

    none, all_ = at(0.0), at(1.0)
    _hold(none["poisoned"] == 0, f"{name}: at rate 0 {none['poisoned']} rows are stamped")
    for rate in (0.1, 0.5):
        some = at(rate)
        # A share of each trigger's own is rounded, and each of its rows may have copies.
        slack = 0.02 * all_["asked"] + 1
        _hold(
            abs(some["asked"] - rate * all_["asked"]) <= slack,
            f"{name}: rate {rate} asks for {some['asked']} rows, rate 1 for {all_['asked']}",
        )
        least = min(some["asked"], all_["poisoned"])
        _hold(
            least <= some["poisoned"] <= some["asked"],
            f"{name}: rate {rate} asks for {some['asked']} rows, {some['poisoned']} are stamped",
        )
    try:
        at(1e-6)
    except BadInput:
        return
    raise AssertionError(f"{name}: a rate that comes to no image is accepted")


def check_labels(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """What a stamped row is called is what `success` aims at, image by image, and `targets` are the
    labels aimed at.
    """
    key, every = jax.random.key(KEY), jnp.arange(classes, dtype=jnp.int32)
    for each in _modes(attack, shape, classes):
        name = f"{_name(attack)} ({each.labels}, append={each.append})"
        aims = {}
        for k in _fired(each):
            aims[k] = aim = np.asarray(each.success(jnp.asarray(k), every, classes))
            _hold(
                aim.shape == (classes,) and aim.dtype.kind == "i",
                f"{name}: success gives {aim.dtype}{list(aim.shape)} for {classes} labels",
            )
            _hold(
                ((aim >= -1) & (aim < classes)).all(),
                f"{name}: success aims at a label that there is not",
            )
            turned = np.asarray(each.success(jnp.asarray(k), every[::-1], classes))
            _hold(np.array_equal(turned[::-1], aim), f"{name}: success hangs on other images")
        y = each.base(_labels(classes), classes)
        plan = jax.device_get(each.plan(key, jnp.asarray(y), classes))
        size = int(plan.size)
        kind, label, own = plan.kind[:size], plan.label[:size], np.asarray(y)[plan.source[:size]]
        for k in range(1, each.triggers + 1):
            mine = kind == k
            _hold(mine.any(), f"{name}: no row of training has trigger {k}")
            aim = aims[k][own]
            _hold(
                ((label == aim) | (label == own))[mine].all(),
                f"{name}: a row with trigger {k} has a label that success does not aim at",
            )
            _hold(
                (label == aim)[mine & (aim >= 0)].any(),
                f"{name}: no row with trigger {k} has the label that success aims at",
            )
        hits = {int(label) for k in range(1, each.triggers + 1) for label in aims[k]} - {-1}
        targets = set(np.flatnonzero(each.targets(classes)).tolist())
        _hold(targets == hits, f"{name}: targets are {targets}, success aims at {hits}")


def _leaves(method: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(method)
    return [(jax.tree_util.keystr(path).lstrip("."), leaf) for path, leaf in flat]


def _others(value: Any) -> Iterator[Any]:
    """Values near `value` that its field may hold."""
    array = np.asarray(value)
    if array.ndim:
        yield array[..., ::-1] if array.dtype == np.uint8 else 1 - array
    elif array.dtype.kind in "iu":
        yield from (value + 1, value - 1)
    else:
        yield from (0.5 * value, 0.5 + 0.5 * value, value - 1, value + 1)


def check_leaves(attack: Attack, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """Every number that is a leaf may be traced and mapped over: mapped attacks stamp, plan and aim
    as each of them alone.
    """
    attack = with_pictures(attack, shape, classes)[0]
    name, leaves = _name(attack), _leaves(attack)
    tree = jax.tree.structure(attack)
    varied = [attack]
    for i, (path, leaf) in enumerate(leaves):
        for other in _others(leaf):
            changed = tree.unflatten([other if j == i else v for j, (_, v) in enumerate(leaves)])
            try:
                changed.check(shape, classes)
            except BadInput:
                continue
            if not np.array_equal(np.asarray(other), np.asarray(leaf)):
                varied.append(changed)
                break
        else:
            field = path.replace("[", ".").replace("]", "").split(".")
            _hold(
                not hasattr(attack, field[0]) or registry.unread(attack, field[:1]) is not None,
                f"{name}: no value of {path} but {leaf} is accepted",
            )
    arrays = [jax.tree.map(lambda v: jnp.asarray(v, _strong(v)), each) for each in varied]
    x, y, key = _pictures(shape)[2], _labels(classes)[: 3 * classes], jax.random.key(KEY)
    y = jnp.asarray(attack.base(y, classes))

    def does(attack):
        kind = jnp.asarray(attack.triggers)
        return {
            "stamp": attack.stamp(kind, x, key, train=False),
            "training": attack.stamp(kind, x, key, train=True),
            "plan": attack.plan(key, y, classes)._asdict(),
            "success": attack.success(kind, y, classes),
        }

    program = _jit(does)
    each = [_traced(name, program, one) for one in arrays]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *arrays)
    mapped = _traced(f"{name}, mapped over its numbers,", jax.vmap(does), stacked)
    for i, one in enumerate(each):
        for what in one:
            got = jax.tree.map(lambda v, i=i: v[i], mapped[what])
            where = "as it is" if i == 0 else f"variant {i}"
            _hold(_near(got, one[what]), f"{name}: {what} under vmap is another one ({where})")


def _strong(value: Any) -> Any:
    kind = np.asarray(value).dtype
    return {"f": jnp.float32, "i": jnp.int32}.get(kind.kind, kind)


def check_values(method: Any, shape: Shape = SHAPE, classes: int = CLASSES) -> None:
    """`check` refuses numbers outside their ranges, and NaN; a target that is no class; and every
    number has a range.
    """
    name = _name(method)
    try:
        method.check(shape, classes)
    except BadInput as error:
        raise AssertionError(f"{name} is not accepted as it is: {error}") from error
    for field, hint in registry.hints(type(method)).items():
        value = getattr(method, field)
        for kinds, limit in registry.ranges(hint):
            if not kinds & {int, float}:
                continue
            if limit is None:
                raise AssertionError(f"{name}.{field} has no Range: annotate it")
            whole = float not in kinds
            bad = [limit.low - 1, limit.high + 1] + ([] if whole else [float("nan")])
            for one in bad:
                one = int(one) if whole else one
                wrong = (one,) * max(len(value), 1) if isinstance(value, tuple) else one
                _refused(method, {field: wrong}, shape, classes)
    if isinstance(method, Attack) and registry.unread(method, ["target"]) is None:
        _refused(method, {"target": classes}, shape, classes)


def _refused(method: Any, fields: dict[str, Any], *where: Any) -> None:
    words = ", ".join(f"{name}={value}" for name, value in fields.items())
    try:
        dataclasses.replace(method, **fields).check(*where)
    except BadInput as error:
        _hold("\n" not in str(error), f"{_name(method)}: {words} is refused in several lines")
        return
    raise AssertionError(f"{_name(method)}: {words} is accepted")
