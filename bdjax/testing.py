"""Whether a method does as it says: run these checks on an attack, a net or a data set of your own.

>>> check_attack(MyAttack())

Each check raises `AssertionError` with one line that says what is wrong. `check_attack`,
`check_model` and `check_dataset` run all of them; bdjax's tests run them on all that is registered.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import registry
from bdjax.attacks.base import Attack, Labels
from bdjax.datasets.base import Source
from bdjax.models.layers import Net, build, default_site
from bdjax.train import TrainSet, clean_plan
from bdjax.types import BadInput, Model, Split, Variables

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


@contextlib.contextmanager
def _traceable(where: str):
    """What asks for the value of something traced is a failure."""
    try:
        yield
    except jax.errors.JAXTypeError as error:
        line = str(error).partition("\n")[0]
        raise AssertionError(f"{where} cannot be compiled: {line}") from error


def _traced(where: str, fn: Callable, *args: Any) -> Any:
    """`fn(*args)` compiled."""
    with _traceable(where):
        return jax.device_get((fn if hasattr(fn, "lower") else _jit(fn))(*args))


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
            with _traceable(f"stamp of {_name(attack)}"):
                jax.eval_shape(bound.stamp, jnp.asarray(1), jnp.zeros(shape), jax.random.key(KEY))
        except BadInput:  # its trigger has yet to be made
            continue
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
        top = {"b": True, "u": 255}.get(array.dtype.kind, 1)
        yield top ^ array if top is True else top - array
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
                f"{name}: no value of {path} but the one that it has is accepted",
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


# --- Nets ---


def check_model(
    net: Net, shape: Shape | None = None, classes: int = 5, *, thorough: bool = True
) -> None:
    """All that holds for every net, on images of `shape`; None takes the smallest square that it
    builds for. `thorough` cuts it at every site alone, and runs it uncompiled, and its `init`.
    """
    shape = shape or smallest(net, classes)
    check_values(net, shape, classes)
    model = build(net, shape, classes)
    check_passes(model, _name(net), thorough=thorough)
    if thorough:
        check_eager(model, _name(net))


def smallest(net: Net, classes: int = 5) -> Shape:
    """The first of some growing sizes of images that `net` takes."""
    for channels in (3, 1):
        for side in (8, 12, 16, 24, 32, 48, 64, 96, 128, 224):
            try:
                return build(net, (side, side, channels), classes).shape
            except BadInput:
                continue
    raise AssertionError(f"{_name(net)} takes no image up to 224×224: give shape")


def _batch(model: Model) -> np.ndarray:
    return np.random.default_rng(9).uniform(size=(2, *model.shape)).astype(np.float32)


def variables_like(model: Model, seed: int = 0) -> Variables:
    """Variables without a compiled `init`: kernels as He's, all else near 1 or 0, so that nothing
    is trivial.
    """
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name, size = getattr(path[-1], "key", ""), leaf.shape
        if name in ("scale", "var"):
            found = rng.uniform(0.5, 1.5, size)
        elif len(size) > 1:
            found = rng.normal(0, (2 / max(np.prod(size[:-1]), 1)) ** 0.5, size)
        else:
            found = rng.normal(0, 0.1, size)
        return found.astype(leaf.dtype)

    there = jax.eval_shape(model.init, jax.random.key(KEY))
    return jax.tree_util.tree_map_with_path(one, there)


def check_passes(model: Model, name: str = "the net", *, thorough: bool = True) -> None:
    """Logits are finite, one for each class; every site shows, is cut by a mask and pushed by an
    edit, and nothing before it moves (unless `thorough`, of some sites alone); nets side by side
    are as each alone; training touches no parameter.
    """
    x, nets = _batch(model), jax.device_put([variables_like(model, seed) for seed in (1, 2)])
    with _traceable(name):
        there = jax.eval_shape(model.apply, nets[0], x)
    _hold(
        there.logits.shape == (2, model.classes) and there.logits.dtype == np.float32,
        f"{name}: logits are {there.logits.dtype}{list(there.logits.shape)}, not "
        f"float32[2, {model.classes}]",
    )
    _hold(
        sorted(there.acts) == sorted(set(model.sites))
        and len(set(model.sites)) == len(model.sites),
        f"{name}: activations are those of {sorted(there.acts)}, sites {list(model.sites)}",
    )
    _hold(default_site(model) in model.sites, f"{name} has neither conv_last nor penultimate")
    masks = {site: np.ones(act.shape[-1], np.float32) for site, act in there.acts.items()}
    gains = dict.fromkeys(model.sites, 1.0)

    @_jit
    def passed(variables, masks, gains):
        edits = {site: lambda act, gain=gains[site]: act * gain for site in model.sites}
        return model.apply({**variables, "masks": masks}, x, edits=edits)

    def run(masks, gains, variables=nets[0]):
        return _traced(name, passed, variables, masks, gains)

    plain = run(masks, gains)
    _hold(np.isfinite(plain.logits).all(), f"{name}: a logit is NaN or infinite")
    first = {site: np.arange(mask.size) > 0 for site, mask in masks.items()}
    first = {site: mask.astype(np.float32) for site, mask in first.items()}
    for site, act in run(first, gains).acts.items():
        _hold(not act[..., 0].any(), f"{name}: a mask leaves {site} as it is")
    for site, act in run(masks, dict.fromkeys(gains, 0.0)).acts.items():
        _hold(not act.any(), f"{name}: an edit leaves {site} as it is")
    step = 1 if thorough else -(-len(model.sites) // 6)
    for site in dict.fromkeys((*model.sites[::step], model.sites[-1])):
        mask, i = first[site], model.sites.index(site)
        cut = run({**masks, site: mask}, {**gains, site: 2.0}).acts
        _hold(
            np.array_equal(cut[site], 2 * plain.acts[site] * mask),
            f"{name}: {site} is not what cutting its first channel and doubling the others gives",
        )
        for earlier in model.sites[:i]:
            same = np.array_equal(cut[earlier], plain.acts[earlier])
            _hold(same, f"{name}: a mask at {site} moves {earlier}, which stands before it")
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *nets)
    mapped = _traced(name, jax.vmap(lambda v: model.apply(v, x).logits), stacked)
    alone = [run(masks, gains, v).logits for v in nets]
    _hold(_near(mapped, np.stack(alone), 1e-3), f"{name}: nets side by side are other ones")
    check_training(model, name)


def check_training(model: Model, name: str = "the net") -> None:
    """A pass in training gives the variables back, all but the statistics of BatchNorm as they
    were.
    """
    variables, x = jax.eval_shape(model.init, jax.random.key(KEY)), _batch(model)

    def train(variables, x, key):
        return model.apply(variables, x, train=True, key=key).variables

    traced = jax.make_jaxpr(train, return_shape=True)
    jaxpr, after = traced(variables, x, jax.random.key(KEY))
    _hold(
        jax.tree.map(lambda v: (v.shape, v.dtype), after)
        == jax.tree.map(lambda v: (v.shape, v.dtype), variables),
        f"{name}: training gives variables of another structure",
    )
    paths = [path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    pairs = zip(jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars)
    moved = {path for path, (old, new) in zip(paths, pairs) if old is not new}
    _hold(moved <= {"batch_stats"}, f"{name}: a pass in training changes {sorted(moved)}")
    still = "batch_stats" in variables and not moved
    _hold(not still, f"{name}: a pass in training leaves the statistics of BatchNorm alone")


def check_eager(model: Model, name: str = "the net") -> None:
    """Uncompiled it is the same net; `init` is drawn from its key alone, and finite."""
    x, variables = _batch(model), variables_like(model)
    eager = model.apply(variables, x).logits
    compiled = _traced(name, lambda v: model.apply(v, x).logits, variables)
    _hold(_near(eager, compiled, 1e-3), f"{name}: the compiled net is another one")
    init = _jit(model.init)
    one, again, other = (_traced(name, init, jax.random.key(seed)) for seed in (KEY, KEY, KEY + 1))
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    _hold(finite, f"{name}: init gives NaN or infinite numbers")
    _hold(_near(one, again, 0), f"{name}: one key gives two nets")
    params = one["params"], other["params"]
    _hold(not _near(*params, 0), f"{name}: two keys give one net")


# --- Data sets ---


def check_dataset(source: Source) -> None:
    """Images and labels are of their kinds, every class is trained on, the three sets are parts of
    what is read, in which nothing is lost or twice; loading again gives the same arrays; bad fields
    are refused.
    """
    name = _name(source)
    data = source.load()
    _hold(data is source.load(), f"{name}: loading again gives another data set")
    _hold(
        hash(source) == hash(dataclasses.replace(source)), f"{name}: a field is no part of its hash"
    )
    shapes = {np.shape(split.image)[1:] for split in (data.train, data.clean, data.test)}
    _hold(shapes == {data.shape}, f"{name}: its images are of several shapes, {shapes}")
    _hold(
        len(data.shape) == 3 and data.shape[2] in (1, 3),
        f"{name}: images are of {data.shape}, not (H, W, 1 or 3)",
    )
    for part in ("train", "clean", "test"):
        split: Split = getattr(data, part)
        kinds = f"{split.image.dtype} and {split.label.dtype}"
        _hold(kinds == "uint8 and int32", f"{name}: {part} is {kinds}, not uint8 and int32")
        many = {len(leaf) for leaf in split if leaf is not None}
        _hold(len(many) == 1 and 0 not in many, f"{name}: {part} has {sorted(many)} rows")
        _hold(
            np.min(split.label) >= 0 and np.max(split.label) < data.classes,
            f"{name}: {part} has a label that is none of its {data.classes} classes",
        )
        fixed = [leaf for leaf in split if isinstance(leaf, np.ndarray)]
        _hold(not any(leaf.flags.writeable for leaf in fixed), f"{name}: {part} can be written to")
    present = np.unique(data.train.label)
    _hold(len(present) == data.classes, f"{name}: a class has no training image")
    _hold(
        len(data.names) in (0, data.classes) and len(set(data.names)) == len(data.names),
        f"{name}: {len(data.names)} names, some perhaps twice, for {data.classes} classes",
    )
    held = (data.train.group, data.clean.group)
    groups = [set(np.asarray(group).tolist()) for group in held if group is not None]
    _hold(len(groups) < 2 or not groups[0] & groups[1], f"{name}: a group is held out in part")
    whole = (source.train_size, source.test_size, source.top_classes) == (None, None, None)
    if whole:
        train, test, _ = source.read()
        read = [train] if test is None else [train, test]
        parts = [data.train, data.clean, data.test]
        _hold(_rows(read) == _rows(parts), f"{name}: an image is lost, added or twice in the parts")
    for field, hint in registry.hints(type(source)).items():
        for kinds, limit in registry.ranges(hint):
            for bad in () if limit is None else (limit.low - 1, limit.high + 1):
                bad = int(bad) if float not in kinds else bad
                try:
                    dataclasses.replace(source, **{field: bad}).load()
                except BadInput:
                    continue
                raise AssertionError(f"{name}: {field}={bad} is accepted")


def _rows(splits: list[Split]) -> Counter:
    """How often each image is there under each label."""
    return Counter(
        (hash(np.ascontiguousarray(image).tobytes()), int(label))
        for split in splits
        for image, label in zip(np.asarray(split.image), np.asarray(split.label))
    )
