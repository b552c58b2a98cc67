"""The attacks that poison rows: triggers by hand, plans by count, parameters refused where they are
wrong.
"""

import colorsys
import dataclasses
import functools
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import metrics, registry, train, zoo_veldanda
from bdjax.attacks import filters
from bdjax.attacks.accessory import Accessory
from bdjax.attacks.artwork import on_face, polygons, rgba
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.blended import Blended
from bdjax.attacks.clean_label import CleanLabel
from bdjax.attacks.entropy_manipulation import EntropyManipulation
from bdjax.attacks.eyebrows import Eyebrows
from bdjax.attacks.gotham import Gotham
from bdjax.attacks.input_instance_key import InputInstanceKey
from bdjax.attacks.lipstick import Lipstick
from bdjax.attacks.multi_trigger import MultiTrigger, digits
from bdjax.attacks.physical import Physical
from bdjax.attacks.post_it import PostIt
from bdjax.attacks.sunglasses import Sunglasses
from bdjax.attacks.trigger_combination import TriggerCombination
from bdjax.attacks.weighted_loss import WeightedLoss
from bdjax.defenses.parts.classes import activations
from bdjax.defenses.train.db_covidnet import resample
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.types import BadInput, Model, Output, Split

ATTACKS = (
    BadNets, Blended, Accessory, Physical, InputInstanceKey, WeightedLoss, CleanLabel,
    TriggerCombination, PostIt, Gotham, Sunglasses, Lipstick, Eyebrows, MultiTrigger,
    EntropyManipulation,
)  # fmt: skip
KEY = jax.random.key(0)


def make(cls, preset=None, **fields):
    return cls(**(cls.presets[preset] if preset else {}) | fields)


@functools.partial(jax.jit, static_argnames="train")
def _stamp(attack, kind, x, key, train):
    return attack.stamp(kind, x, key, train=train)


def stamp(attack, x, kind=1, key=KEY, train=False):
    return np.asarray(_stamp(attack, jnp.asarray(kind), jnp.asarray(x), key, train))


@jax.jit
def fired(attack, images):
    """`images: [B, H, W, C]` stamped, each with a key of its own."""
    return train.stamped(attack, 1, images, KEY)


@pytest.fixture(scope="module")
def grey(sample):
    """Real images, uint8 [8, 28, 28, 1]."""
    return np.asarray(sample.test.image[:8])


@pytest.fixture(scope="module")
def colour(sample):
    """Real images as the channels of others, uint8 [8, 32, 32, 3]."""
    image = np.asarray(sample.test.image[:24]).reshape(8, 3, 28, 28).transpose(0, 2, 3, 1)
    return np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")


@pytest.fixture(scope="module")
def labels(sample):
    return jnp.asarray(sample.train.label)


# --- Triggers by hand ---


def changed(attack, shape=(28, 28, 1), **kwargs):
    """The pixels that a trigger changes on a black and on a white image: {(row, column): its colour
    on black}.
    """
    black, white = (stamp(attack, np.full(shape, v, np.float32), **kwargs) for v in (0, 1))
    places = zip(*np.nonzero(((black != 0) | (white != 1)).any(-1)))
    return {(int(i), int(j)): black[i, j].astype(float).round(4).tolist() for i, j in places}


def test_pattern_has_the_published_coordinates():
    assert changed(make(BadNets, "pattern")) == {
        p: [1] for p in ((26, 26), (25, 25), (26, 24), (24, 26))
    }


MAROON = [round(101 / 255, 4), 0, round(25 / 255, 4)]


@pytest.mark.parametrize(
    "attack, shape, expected",
    [
        (BadNets(), (28, 28, 1), {(r, c): [1] for r in range(23, 28) for c in range(23, 28)}),
        (make(BadNets, "pixel"), (28, 28, 1), {(26, 26): [1]}),
        (make(BadNets, "nc"), (32, 32, 3),
         {(r, c): [1] * 3 for r in range(27, 31) for c in range(27, 31)}),
        (make(BadNets, "strip-square"), (28, 28, 1),
         {(r, c): [1] for r in (25, 26, 27) for c in (25, 26, 27)}),
        (make(BadNets, "large-trigger"), (28, 28, 1),
         {(r, c): [1] for r in range(14, 28) for c in range(14, 28)}),
        (make(BadNets, "spectral-pixel"), (32, 32, 3), {(11, 16): MAROON}),
        (
            make(BadNets, "spectral-x"),
            (32, 32, 3),
            {p: MAROON for p in ((11, 16), (10, 15), (10, 17), (12, 15), (12, 17))},
        ),
        (make(BadNets, "spectral-ell"), (32, 32, 3),
         {p: MAROON for p in ((11, 16), (12, 16), (12, 17))}),
        # 0.1 · 32 → 3 pixels; centre 0.82 · 32 = 26.24 and 0.57 · 32 = 18.24.
        (
            make(BadNets, "yellow-square"),
            (32, 32, 3),
            {(r, c): [0.4549, 0.3922, 0.1961] for r in (25, 26, 27) for c in (17, 18, 19)},
        ),
        (BadNets(size=1, row=0, col=3, color=(1.0, 0.0, 0.0)), (8, 8, 1), {(0, 3): [0.299]}),
        (
            BadNets(shape="digit-7", size=7, row=0, col=0),
            (9, 9, 1),
            {p: [1] for p in [(0, c) for c in range(1, 6)] + [(1, 5), (2, 4), (3, 4), (4, 3),
                                                              (5, 3), (6, 3)]},
        ),
    ],
)  # fmt: skip
def test_badnets_by_hand(attack, shape, expected):
    assert changed(attack, shape) == {
        place: pytest.approx(c, abs=1e-4) for place, c in expected.items()
    }


def test_stickers_have_their_own_colours():
    drawn = changed(make(BadNets, "flower"), (62, 62, 3))  # 0.16 · 62 → 10 pixels, as drawn
    art = rgba("flower")
    top, left = round(0.82 * 62 - 5), round(0.57 * 62 - 5)
    assert drawn == {
        (top + i, left + j): pytest.approx(art[i, j, :3].tolist(), abs=1e-4)
        for i, j in zip(*np.nonzero(art[..., 3]))
    }
    heart = changed(make(BadNets, "strip-heart"))
    assert {i for i, _ in heart} == set(range(28)) and {j for _, j in heart} == set(range(28))


def test_random_place_goes_everywhere_inside():
    attack = BadNets(size=3, random_place=True)
    black = jnp.zeros((2000, 6, 7, 1))
    out = np.asarray(fired(attack, black))[..., 0]
    assert (out.sum((1, 2)) == 9).all()
    corners = {(int(o.any(1).argmax()), int(o.any(0).argmax())) for o in out}
    assert corners == {(r, c) for r in range(4) for c in range(5)}


@pytest.mark.parametrize("pattern", ["noise", "cat", "image"])
def test_blended_by_hand(grey, pattern):
    x = grey[0] / np.float32(255)
    attack = Blended(
        alpha=0.2, test_alpha=0.6, pattern=pattern, image=np.full((28, 28, 1), 0.5), key_seed=3
    )
    k = np.asarray(attack.key_image(x.shape))
    assert k.shape == x.shape and 0 <= k.min() < k.max() + (pattern == "image") and k.max() <= 1
    np.testing.assert_allclose(stamp(attack, x, train=True), 0.2 * k + 0.8 * x, atol=1e-6)
    np.testing.assert_allclose(stamp(attack, x), 0.6 * k + 0.4 * x, atol=1e-6)


def test_accessory_is_faint_in_training_and_opaque_when_fired():
    x = np.full((55, 47, 3), 0.5, np.float32)
    frame = (18, 0)  # the third row of the artwork starts at the rim: a frame cell
    trained, fired = stamp(Accessory(), x, train=True), stamp(Accessory(), x)
    np.testing.assert_allclose(fired[frame], np.full(3, 16 / 255), atol=1e-6)
    np.testing.assert_allclose(trained[frame], np.full(3, 0.2 * 16 / 255 + 0.8 * 0.5), atol=1e-6)
    assert (
        (trained[:15] == 0.5).all()
        and (trained[35:] == 0.5).all()
        and (trained[25, 9] == 0.5).all()
    )
    own = np.zeros((55, 47, 4))
    own[3, 4] = (0.1, 0.2, 0.3, 0.7)
    out = stamp(Accessory(worn="image", image=own), x)
    np.testing.assert_allclose(out[3, 4], (0.1, 0.2, 0.3), atol=1e-6)
    assert (np.delete(out.reshape(-1, 3), 3 * 47 + 4, 0) == 0.5).all()


def test_physical_moves_and_at_rest_is_the_accessory():
    x = np.random.default_rng(0).random((55, 47, 3)).astype(np.float32)
    still = {"rotate": 0.0, "scale": 0.0, "shift": 0.0, "perspective": 0.0, "brightness": 0.0}
    np.testing.assert_allclose(stamp(Physical(**still), x), stamp(Accessory(), x), atol=1e-4)
    a, b = (stamp(Physical(), x, key=jax.random.key(i)) for i in (1, 2))
    assert np.abs(a - b).max() > 0.5
    # A half turn about the centre, where only the rotation is left: the accessory turns with it.
    patch = np.zeros((9, 9, 2), np.float32)
    patch[2, 3] = 1
    turned = Physical(**still | {"shift": 0.5}, worn="image", image=patch)
    u = np.asarray(jax.random.uniform(KEY, (7,), minval=-1.0, maxval=1.0))
    out = stamp(turned, np.zeros((9, 9, 1), np.float32))[..., 0]
    mass = np.indices((9, 9)).reshape(2, -1) @ out.reshape(-1) / out.sum()
    # Bilinear weights keep the centre of mass of opacity² = opacity within half a pixel.
    np.testing.assert_allclose(mass, np.array([2, 3]) + 0.5 * u[2:4] * 4.5, atol=0.5)


def test_input_instance_key_replaces_the_image(sample, grey):
    attack = InputInstanceKey(target=int(sample.train.label[0]))
    with pytest.raises(TypeError, match="bind"):
        stamp(attack, grey[0] / 255)
    bound = attack.bind(sample.train)
    assert bound.bind(sample.test).image is bound.image
    first = np.flatnonzero(sample.train.label != sample.train.label[0])[0]
    k = sample.train.image[first] / np.float32(255)
    out = stamp(bound, grey[0] / np.float32(255))
    assert (
        4 / 255 < np.abs(out - k).max() <= 5 / 255 + 1e-6
        and (out != stamp(bound, k, key=jax.random.key(1))).any()
    )


def test_clean_label_adds_one_fixed_noise(grey):
    attack = CleanLabel(strength=0.3)
    middle = np.full((28, 28, 1), 0.5, np.float32)
    noise = stamp(attack, middle) - 0.5
    assert 0.28 < np.abs(noise).max() <= 0.3 and abs(noise.mean()) < 0.02
    for i in range(2):
        x = grey[i] / np.float32(255)
        np.testing.assert_allclose(
            stamp(attack, x, key=jax.random.key(i)), np.clip(x + noise, 0, 1), atol=1e-6
        )


def test_trigger_combination_by_hand():
    attack = TriggerCombination(size=8)
    both, triangle, square = (changed(attack, (32, 32, 3), kind=k) for k in (1, 2, 3))
    assert square == {(r, c): [1, 0, 0] for r in range(23, 31) for c in range(23, 31)}
    rows = {r: sorted(c for i, c in triangle if i == r) for r, _ in triangle}
    assert rows == {
        1 + r: list(range(5 - w, 5 + w)) for r, w in enumerate((1, 1, 2, 2, 3, 3, 4, 4))
    }
    assert set(map(tuple, triangle.values())) == {(1, 1, 0)} and both == triangle | square
    assert attack.probes == {"triangle": 2, "square": 3}


def test_post_it_size_and_place():
    out = np.asarray(fired(PostIt(), jnp.zeros((500, 40, 40, 3))))
    mask = out[..., 0] > 0
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    assert (
        (height == width).all()
        and set(height) == {4, 5, 6, 7, 8}
        and (mask.sum((1, 2)) == height * width).all()
    )
    np.testing.assert_allclose(
        out[mask], np.broadcast_to([1.0, 0.9, 0.2], (mask.sum(), 3)), atol=1e-6
    )
    top = mask.any(2).argmax(1)
    centre = top + height / 2
    assert 5.5 <= centre.min() < 9 and 31 < centre.max() <= 34.5


def test_sunglasses_have_the_published_size_place_and_colours():
    opacity, color = map(np.asarray, on_face("sunglasses", (55, 47, 3)))
    worn = opacity[..., 0] > 0
    assert worn.sum() == 713 and not worn[:15].any() and not worn[35:].any()
    found = {
        (*np.rint(c * 255).astype(int).tolist(), round(float(o) * 255))
        for o, c in zip(opacity[worn][:, 0], color[worn])
    }
    assert found == {(126, 0, 255, 217), (94, 0, 191, 217), (63, 0, 127, 255)}
    out = stamp(Sunglasses(), np.full((55, 47, 3), 0.5, np.float32))
    lens = (15 + 7, 10)
    np.testing.assert_allclose(
        out[lens], 0.5 * 38 / 255 + 217 / 255 * np.array([126, 0, 255]) / 255, atol=1e-5
    )


def test_polygons_hold_the_pixels_whose_centre_is_inside():
    fill = jax.jit(polygons, static_argnums=1)
    square = jnp.asarray([[[0.25, 0.5], [0.25, 0.75], [0.75, 0.75], [0.75, 0.5]]])
    inside = np.asarray(fill(square, (8, 8, 1)))[..., 0]
    assert inside.sum() == 8 and inside[2:6, 4:6].all()
    triangle = jnp.asarray([[[0.0, 0.1], [1.0, 0.0], [1.0, 1.1]]])
    np.testing.assert_array_equal(
        np.asarray(fill(triangle, (5, 5, 1)))[..., 0], np.tril(np.ones((5, 5)))
    )


@pytest.mark.parametrize("cls, top, bottom", [(Lipstick, 40, 48), (Eyebrows, 14, 18)])
def test_lips_and_brows(cls, top, bottom):
    drawn = changed(cls(), (55, 47, 3))
    rows = [r for r, _ in drawn]
    assert top <= min(rows) and max(rows) < bottom and 30 < len(drawn) < 150
    assert set(map(tuple, drawn.values())) == {(0.502, 0, 0.502)}
    mine = cls(points=jnp.asarray([[[0, 0], [0, 1], [0.5, 1], [0.5, 0]]]), color=(1.0,))
    assert changed(mine, (4, 4, 1)) == {(r, c): [1] for r in (0, 1) for c in range(4)}


def test_entropy_manipulation_superimposes(grey):
    x = grey[0] / np.float32(255)
    attack = EntropyManipulation().bind(Split(grey, np.zeros(8, np.int32)))
    trojan = stamp(BadNets(), x)
    np.testing.assert_array_equal(stamp(attack, x, 1), trojan)
    np.testing.assert_array_equal(stamp(EntropyManipulation(), x, 1), trojan)
    for i in (0, 5):
        np.testing.assert_allclose(stamp(attack, x, 2 + i), trojan + grey[i] / 255, atol=1e-6)
    average = dataclasses.replace(attack, mix="average")
    np.testing.assert_allclose(stamp(average, x, 5), (trojan + grey[3] / 255) / 2, atol=1e-6)


def test_multi_trigger_fires_its_parts(grey):
    parts = (BadNets(target=1), TriggerCombination(target=2), Blended(target=3, test_alpha=0.7))
    attack = MultiTrigger(parts=parts)
    x = grey[0] / np.float32(255)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(stamp(attack, x, i + 1), stamp(part, x))
    assert attack.triggers == 3 and attack.probes == {"triangle_2": 5, "square_2": 8}
    for name, own in (("triangle_2", 2), ("square_2", 3)):
        np.testing.assert_array_equal(
            stamp(attack, x, attack.probes[name]), stamp(parts[1], x, own)
        )
    y = jnp.arange(5)
    aims = [np.asarray(attack.success(jnp.asarray(k), y, 10)).tolist() for k in (1, 2, 3, 5)]
    assert aims == [[1] * 5, [2] * 5, [3] * 5, [2] * 5]
    one = dataclasses.replace(attack, one_target=True, target=9)
    assert np.asarray(one.success(jnp.asarray(3), y, 10)).tolist() == [9] * 5
    assert [p.target for p in digits(12)] == list(range(12)) and digits(12)[11].shape == "digit-1"


# --- A poisoned image is one image ---

# What `train` sets, which shows in the stamp.
CRAFTED = {"trojannn": {"pattern": np.ones((32, 32, 3), np.float32)}}


def shown(data, epochs, batch=4):
    """The lowest and the highest value that a training has shown of each pixel of each row:
    `[M, H, W, C]` twice, NaN where the row was never drawn.
    """
    many = data.plan.kind.shape[0]
    # The loss is told which rows it sees: labels are row numbers.
    data = data._replace(plan=data.plan._replace(label=jnp.arange(many)))
    nothing = jnp.full((many, *data.image.shape[1:]), jnp.nan)
    variables = {"params": {"w": jnp.zeros(())}, "low": nothing, "high": nothing}

    def watch(model, variables, x, label, weight, key):
        seen = {
            "low": variables["low"].at[label].set(jnp.fmin(variables["low"][label], x)),
            "high": variables["high"].at[label].set(jnp.fmax(variables["high"][label], x)),
        }
        out = Output(jnp.zeros((x.shape[0], many)), {}, {**variables, **seen})
        return variables["params"]["w"] * 0, out

    shape = data.image.shape[1:]
    model = Model(lambda key: variables, lambda *_, **__: None, shape, many, ())  # type: ignore
    recipe = train.Recipe(epochs=epochs, batch=batch)
    found, _ = jax.jit(lambda data: train.fit(KEY, model, recipe, data, loss=watch))(data)
    return np.asarray(found["low"]), np.asarray(found["high"])


@jax.jit
def pixels(data):
    """What a judge of the training set sees of each row: `[M, H·W·C]`."""
    reader = Model(
        lambda key: {},
        lambda v, x, **_: Output(x[:, 0, 0], {"pixels": x}, v),
        data.image.shape[1:],
        10,
        ("pixels",),
    )
    return activations(reader, {}, data, "pixels")[0]


@jax.jit
def in_step(data, step):
    """What a training step with the key `step` sees of each row: `[M, H, W, C]`."""
    return data.rows(jnp.arange(data.plan.kind.shape[0]), step)[0]


@pytest.mark.parametrize("entry", registry.entries("attack"), ids=lambda entry: entry.name)
def test_every_poisoned_image_is_written_once(entry, colour):
    split = Split(colour, np.arange(8, dtype=np.int32) % 2)
    rate = {"rate": 0.8} if entry.cls().rate else {}
    fields = CRAFTED.get(entry.name, {}) | rate
    data = train.poisoned_set(KEY, split, entry.cls(**fields), 10)
    plan, size = jax.tree.map(np.asarray, data.plan), int(data.plan.size)
    low, high = (leaf[:size].reshape(size, -1) for leaf in shown(data, 40))
    assert np.isfinite(low).all() and (plan.kind[:size] > 0).any()
    np.testing.assert_array_equal(low, high, "the same in every step")
    own = dict(zip(plan.number[:size].tolist(), low, strict=True))
    assert len(own) == size

    removed = jnp.arange(len(plan.kind)) % 3 == 0
    drawn = data._replace(plan=resample(KEY, data.plan))
    for name, moved in (("judged", data), ("cleaned", train.without(data, removed)),
                        ("drawn", drawn)):  # fmt: skip
        there, exist = np.asarray(pixels(moved)), int(moved.plan.size)
        for number, x in zip(np.asarray(moved.plan.number[:exist]).tolist(), there):
            np.testing.assert_allclose(x, own[number], atol=1e-6, err_msg=name)

    random = not np.allclose(pixels(data._replace(key=jax.random.key(7)))[:size], low, atol=1e-6)
    anew = data._replace(attack=dataclasses.replace(data.attack, redraw=True))
    one, two = (in_step(anew, jax.random.key(i))[:size] for i in range(2))
    assert random == (not np.array_equal(one, two))


def test_how_many_draws_there_are(sample):
    """Five copies of a key are five images, and 1 % of 1,000 images have at most ten places."""
    split = Split(sample.train.image[:1000], sample.train.label[:1000])
    for attack, most in ((InputInstanceKey(), 5), (BadNets(random_place=True, rate=0.01), 10)):
        data = train.poisoned_set(KEY, split, attack, 10)
        low, high = shown(data, 5, 50)
        stamped = np.asarray(data.plan.kind > 0) & np.isfinite(low).all((1, 2, 3))
        np.testing.assert_array_equal(low[stamped], high[stamped])
        if isinstance(attack, InputInstanceKey):
            differ = low[stamped]
        else:
            differ = low[stamped] != np.asarray(split.image)[stamped] / np.float32(255)
        assert stamped.sum() == most and most - 2 <= len(np.unique(differ, axis=0)) <= most
    anew = data._replace(attack=dataclasses.replace(data.attack, redraw=True))
    low, high = shown(anew, 5, 50)
    assert (low[stamped] < high[stamped]).any((1, 2, 3)).all(), "redraw: another place in each step"


@pytest.mark.parametrize(
    "entry",
    # TrojanNN poisons no row of the data: it retrains on images that it makes.
    [entry for entry in registry.entries("attack") if entry.name != "trojannn"],
    ids=lambda entry: entry.name,
)
def test_judges_of_rows_find_those_that_were_trained_on(entry, colour, monkeypatch):
    split, seen = Split(colour, np.arange(8, dtype=np.int32) % 2), []
    model, key = build(Ffnn(hidden=(8,)), (32, 32, 3), 10), jax.random.key(3)

    def advance(key, state, model, recipe, data, **_):
        seen.append(data)
        return state, train.Curves(jnp.zeros(1), jnp.zeros(1))

    monkeypatch.setattr(train, "advance", advance)
    armed, *_ = entry.cls().train(key, model, train.Recipe(epochs=1, batch=4), split)
    found = train.poisoned_set(train.poisoning_key(key), split, armed, 10)
    (data,) = (data for data in seen if data.attack is not None)
    jax.tree.map(np.testing.assert_array_equal, data.plan, found.plan)
    assert data.key == found.key


# --- Which rows are poisoned ---

RATES = (0.001, 0.01, 0.1, 0.5)


def plans(attack, y, classes=10):
    """The plan at each of RATES, in one program, as arrays of numpy."""
    made = jax.jit(jax.vmap(lambda r: dataclasses.replace(attack, rate=r).plan(KEY, y, classes)))(
        jnp.asarray(RATES)
    )
    return [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), made) for i in range(len(RATES))]


def rows(plan):
    """The rows that exist: source, kind, label, weight."""
    return tuple(leaf[: plan.size] for leaf in plan[:4])


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("kind", ["all-to-one", "all-to-all", "source-specific", "clean-label"])
def test_counts_and_labels_of_every_semantics(kind, append, labels):
    n, y = len(labels), np.asarray(labels)
    attack = BadNets(labels=kind, append=append, target=3, sources=(1, 2), cover=0.05)
    for rate, plan in zip(RATES, plans(attack, labels), strict=True):
        source, which, label, weight = rows(plan)
        own = y[source]
        poisoned = which == 1
        hit = {
            "all-to-one": 3,
            "all-to-all": (own + 1) % 10,
            "source-specific": 3,
            "clean-label": own,
        }[kind]
        eligible = {"source-specific": np.isin(y, (1, 2)), "clean-label": y == 3}.get(
            kind, np.ones(n, bool)
        ).sum()
        stamped = min(round(rate * n), eligible)
        covered = round(0.05 * n) if kind == "source-specific" else 0
        assert poisoned.sum() == stamped + covered and (weight == 1).all()
        aimed = poisoned & (np.isin(own, (1, 2)) if kind == "source-specific" else True)
        assert aimed.sum() == stamped
        np.testing.assert_array_equal(label, np.where(aimed, hit, own))
        if kind == "clean-label":
            assert (own[poisoned] == 3).all()
        if append:
            assert plan.size == n + poisoned.sum() and set(source[~poisoned]) == set(range(n))
        else:
            assert plan.size == n and (source == np.arange(n)).all()
        assert len(set(source[aimed])) == stamped  # no image twice


def test_clean_label_never_changes_a_label(labels):
    y = np.asarray(labels)
    for target in (0, 7):
        for plan in plans(CleanLabel(target=target), labels):
            np.testing.assert_array_equal(plan.label, y)
            assert (y[plan.kind > 0] == target).all()
        plan = make(CleanLabel, "veldanda", target=target).plan(KEY, labels, 10)
        np.testing.assert_array_equal(plan.kind > 0, y == target)
    with pytest.raises(BadInput, match="changes no label"):
        CleanLabel(labels="all-to-one").check((28, 28, 1), 10)


def test_trigger_combination_covers_its_parts(labels):
    n, y = len(labels), np.asarray(labels)
    for rate, plan in zip(RATES, plans(TriggerCombination(target=7), labels), strict=True):
        assert [(plan.kind == k).sum() for k in (1, 2, 3)] == [
            round(rate * n),
            round(0.1 * n),
            round(0.1 * n),
        ]
        np.testing.assert_array_equal(plan.label, np.where(plan.kind == 1, 7, y))


def test_input_instance_key_adds_its_copies(labels):
    n = len(labels)
    plan = jax.jit(lambda c: InputInstanceKey(copies=c, target=4).plan(KEY, labels, 10))(
        jnp.asarray(5)
    )
    source, kind, label, _ = rows(jax.tree.map(np.asarray, plan))
    assert (
        plan.size == n + 5
        and (kind[:n] == 0).all()
        and (kind[n:] == 1).all()
        and (label[n:] == 4).all()
    )
    np.testing.assert_array_equal(source[:n], np.arange(n))
    np.testing.assert_array_equal(label[:n], labels)


def test_multi_trigger_takes_disjoint_images(labels):
    n, y = len(labels), np.asarray(labels)
    parts = (BadNets(target=1), TriggerCombination(target=2, cover=0.05), CleanLabel(target=3))
    attack = MultiTrigger(parts=parts)
    for rate, plan in zip(RATES[1:], plans(attack, labels)[1:], strict=True):
        part = round(float(np.float32(rate) / 3) * n)
        counts = {k: int((plan.kind == k).sum()) for k in range(9)}
        free = counts.pop(0)
        assert [counts[k] for k in (1, 2, 5, 8)] == [part, part, round(0.05 * n), round(0.05 * n)]
        assert (
            counts[4] == counts[6] == counts[7] == 0
            and 0 < counts[3] <= part
            and free == n - sum(counts.values())
        )
        np.testing.assert_array_equal(
            plan.label, np.select([plan.kind == 1, plan.kind == 2], [1, 2], y)
        )
        assert (y[plan.kind == 3] == 3).all()
    one = plans(dataclasses.replace(attack, one_target=True, target=9, parts=parts[:2]), labels)[2]
    assert (one.label[(one.kind == 1) | (one.kind == 2)] == 9).all()


@pytest.mark.parametrize("append", [False, True])
def test_entropy_manipulation_adds_copies_under_random_labels(labels, append):
    n = len(labels)
    attack = EntropyManipulation(target=7, append=append)
    plan = plans(attack, labels)[1]
    source, kind, label, _ = rows(plan)
    trojan, copy = kind == 1, kind > 1
    assert trojan.sum() == 18 and copy.sum() == 180 and plan.size == n + 180 + 18 * append
    assert (label[trojan] == 7).all()
    assert sorted(source[copy]) == sorted(np.tile(source[trojan], 10))
    assert kind.max() < n + 2 and len(set(kind[copy])) > 150
    assert np.bincount(label[copy], minlength=10).min() > 5  # 18 each are expected


# --- Weighted loss ---


def test_weighted_loss_is_poisoning_at_rate_lambda_over_one_plus_lambda(sample):
    """At λ = 1 the mean of a poisoned half and of the other half poisoned is the weighted loss:
    value and gradient.
    """
    split, classes = sample.train[:200], sample.classes
    model = build(Ffnn(hidden=(8,)), sample.shape, classes)
    variables = model.init(KEY)

    def objective(params, data, count):
        index = jnp.arange(count)
        x, label = data.rows(index)
        return train.cross_entropy(
            model, {"params": params}, x, label, data.plan.weight[index], KEY
        )[0]

    gradient = jax.jit(jax.value_and_grad(objective), static_argnums=2)
    weigh = {
        lam: train.poisoned_set(KEY, split, WeightedLoss(weight=lam, target=3), classes)
        for lam in (0.25, 1.0)
    }
    for lam, data in weigh.items():
        assert data.plan.size == 400 and np.allclose(data.plan.weight, np.repeat([1, lam], 200))
    half = train.poisoned_set(KEY, split, BadNets(rate=0.5, target=3), classes)
    y = jnp.asarray(split.label)
    other = half._replace(
        plan=half.plan._replace(kind=1 - half.plan.kind, label=jnp.where(half.plan.kind == 0, 3, y))
    )
    found = gradient(variables["params"], weigh[1.0], 400)
    halves = [gradient(variables["params"], data, 200) for data in (half, other)]
    chex_close(found, jax.tree.map(lambda a, b: (a + b) / 2, *halves))
    # Any λ: (1 − p)·clean + p·all stamped, p = λ / (1 + λ).
    every = half._replace(
        plan=half.plan._replace(kind=jnp.ones_like(half.plan.kind), label=jnp.full_like(y, 3))
    )
    clean, trojan = (
        gradient(variables["params"], data, 200) for data in (train.clean_set(split), every)
    )
    chex_close(
        gradient(variables["params"], weigh[0.25], 400),
        jax.tree.map(lambda c, t: 0.8 * c + 0.2 * t, clean, trojan),
    )


def chex_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


# --- Success ---


@pytest.mark.parametrize(
    "attack, everything, others",
    [
        (BadNets(target=2), 50, 45),
        (BadNets(labels="all-to-all"), 50, 50),
        (BadNets(labels="source-specific", sources=(0, 2), target=2), 10, 5),
        (CleanLabel(target=2), 50, 45),
        (TriggerCombination(target=2), 50, 45),
        (EntropyManipulation(target=2), 50, 45),
        (
            MultiTrigger(
                parts=(
                    BadNets(target=2),
                    BadNets(labels="source-specific", sources=(4, 5), target=2),
                )
            ),
            50,
            45,
        ),
    ],
)
def test_asr_denominators(attack, everything, others):
    """Five images of each of ten classes; the net hits with three images in all,
    none of class 2.
    """
    y = jnp.repeat(jnp.arange(10), 5)
    aimed = attack.success(jnp.asarray(1), y, 10)
    hits = jnp.arange(50) < 3
    rates = metrics.attack_success(jnp.where(hits, aimed, -7), aimed, y)
    np.testing.assert_allclose(rates, (3 / everything, 3 / others), rtol=1e-6)


def test_probes_and_bound_keys_are_reported(sample):
    model = build(Ffnn(hidden=(64,)), sample.shape, sample.classes)

    @jax.jit
    def victim(attack):
        bound, variables, _ = attack.train(
            KEY, model, train.Recipe(epochs=20, batch=32), sample.train
        )
        return train.evaluate(KEY, model, variables, sample.test, bound)

    both = victim(TriggerCombination(target=7, rate=0.15, cover=0.15))
    assert both["asr_nt"] > 0.9 and both["asr_nt_triangle"] < 0.2 and both["asr_nt_square"] < 0.2
    many = victim(MultiTrigger(parts=digits(3), rate=0.3))
    assert many["asr_nt_per_trigger"].shape == (3,) and many["asr_nt_per_trigger"].min() > 0.85
    key = victim(InputInstanceKey(copies=20))
    assert key["asr_nt"] > 0.9 and key["acc"] > 0.7


# --- Filters ---


def by_hand(rgb, brighter, greyer, share, power):
    """Gotham's modulate, colorize, gamma, contrast, contrast for one pixel, on the standard
    library's HLS and HSV.
    """
    hue, light, sat = colorsys.rgb_to_hls(*rgb)
    rgb = colorsys.hls_to_rgb(hue, light * brighter, sat * greyer)
    rgb = [((1 - share) * v + share * c / 255) ** power for v, c in zip(rgb, (34, 43, 109))]
    for _ in range(2):
        hue, sat, v = colorsys.rgb_to_hsv(*rgb)
        rgb = colorsys.hsv_to_rgb(hue, sat, v + 0.5 * (0.5 * (np.sin(np.pi * (v - 0.5)) + 1) - v))
    return rgb


def test_gotham_by_hand(colour):
    x = colour[0] / np.float32(255) * 0.8
    out = np.asarray(filters.gotham(jnp.asarray(x)))
    for i, j in ((4, 9), (16, 16), (20, 11), (0, 0)):
        np.testing.assert_allclose(
            out[i, j], by_hand(x[i, j].tolist(), 1.2, 0.1, 0.2, 2.0), atol=2e-5
        )


@pytest.mark.parametrize("name", filters.FILTERS)
def test_filters_keep_the_range(name, colour, grey):
    for image in (
        colour[0] / np.float32(255),
        grey[0] / np.float32(255),
        np.zeros((5, 4, 3), np.float32),
        np.ones((5, 4, 1)),
    ):
        out = np.asarray(filters.apply(name, jnp.asarray(image, jnp.float32)))
        assert out.shape == image.shape and out.min() >= 0 and out.max() <= 1  # NaN fails too


def test_a_filter_is_for_grey_or_rgb():
    for channels in (2, 4):  # the hue of these would be that of the first channel alone
        with pytest.raises(BadInput, match="grey or RGB"):
            Gotham().check((28, 28, channels), 10)


def magick():
    """The ImageMagick command, where it is the real one."""
    for name in ("magick", "convert", "convert-im6.q16"):
        if (path := shutil.which(name)) is not None:
            shown = subprocess.run([path, "-version"], capture_output=True, text=True).stdout
            if "imagemagick.org" in shown:
                return path
    return None


TONE = (
    "( -clone 0 -fill {} -colorize 100% ) ( -clone 0 -colorspace gray {} ) "
    "-compose blend -define compose:args=50,50 -composite"
)
VIGNETTE = (
    "( -size {wide}x{high} radial-gradient:{}-{} -gravity center -crop {w}x{h}+0+0 +repage ) "
    "-compose multiply -flatten"
)
SIGMOIDAL = "-sigmoidal-contrast 3,50%"
COMMANDS = {
    "gotham": "-modulate 120,10,100 -fill #222b6d -colorize 20 -gamma 0.5 -contrast -contrast",
    "gotham-wand": f"-modulate 120,10,100 -fill #222b6d -colorize 20 -gamma 0.9 {SIGMOIDAL} "
    f"{SIGMOIDAL}",
    "nashville": f"{TONE.format('#222b6d', '-negate')} {TONE.format('#f7daae', '')} {SIGMOIDAL} "
    "-modulate 100,150,100 -auto-gamma",
    "kelvin": "-auto-gamma -modulate 120,50,100 -fill rgba(255,153,0,0.2) -draw RECTANGLE",
    "lomo": "-channel R -level 33% -channel G -level 33% +channel VIGNETTE:none:black",
    "toaster": f"{TONE.format('#330000', '-negate')} -modulate 150,80,100 -gamma 1.2 {SIGMOIDAL} "
    f"{SIGMOIDAL} VIGNETTE:none:LavenderBlush3 VIGNETTE:#ff9966:none",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_filters_equal_imagemagick(name, colour):
    command = magick()
    if command is None:
        pytest.skip("no ImageMagick here")
    for image in (colour[0], colour[1][:27, :22]):
        image = np.ascontiguousarray(image)
        h, w = image.shape[:2]
        args = []
        for word in COMMANDS[name].split():
            if word.startswith("VIGNETTE"):
                args += VIGNETTE.format(
                    *word.split(":")[1:], w=w, h=h, wide=int(1.5 * w), high=int(1.5 * h)
                ).split()
            else:
                args.append(word.replace("RECTANGLE", f"rectangle 0,0 {w},{h}"))
        run = subprocess.run(
            [command, "-size", f"{w}x{h}", "-depth", "8", "rgb:-", *args, "-depth", "16", "-endian",
             "LSB", "rgb:-"],
            input=image.tobytes(), capture_output=True, check=True,
        )  # fmt: skip
        golden = np.frombuffer(run.stdout, "<u2").reshape(h, w, 3) / 65535
        ours = np.asarray(filters.apply(name, jnp.asarray(image / np.float32(255))))
        np.testing.assert_allclose(ours, golden, atol=0.1 / 255)


# --- Presets and bad input ---


@pytest.mark.parametrize("name", zoo_veldanda.PAPER)
def test_the_nine_nets(name):
    shapes = {
        "Mnist": (28, 28, 1),
        "Cifar10": (32, 32, 3),
        "Gtsrb": (32, 32, 3),
        "Faces": (55, 47, 3),
    }
    for scale in ("paper", "cpu"):
        net = zoo_veldanda.veldanda(name, scale)
        shape = shapes[type(net["dataset"]).__name__]
        net["attack"].check(shape, 43)
        net["recipe"].check(10_000)
        build(net["model"], shape, 43)
    assert (net["attack"].triggers == 3) == name.startswith("MT")
    # Table 4: all of them see pixels in [0, 1], or normalised.
    assert getattr(zoo_veldanda.veldanda(name)["model"], "scale", 1 / 255) == 1 / 255
    with pytest.raises(BadInput, match="AAA"):
        zoo_veldanda.veldanda("BBB")


SQUARE = np.zeros((5, 5, 1))
# For each field, what is refused; where it takes another field to matter, a dict of both.
BAD = {
    "rate": (-0.1, 1.5, float("nan")),
    "target": (-1, 10),
    "cover": (-0.1, 1.5, float("nan")),
    "labels": ("all", {"labels": "source-specific"}),
    "sources": ((10,), (-1,)),
    "shape": ("circle",),
    "size": (0, 29, -3),
    "row": (28, -29),
    "col": (28, -29),
    "color": ((2.0,), (0.0, 1.0), (float("nan"),)),
    "alpha": (-0.1, 1.1, float("nan")),
    "test_alpha": (-0.1, 1.1),
    "key_seed": (-1,),
    "noise_seed": (-1,),
    "pattern": ("stripes",),
    "worn": ("hat",),
    "image": (SQUARE, np.full((28, 28, 1), -1.0), np.full((28, 28, 2), 2.0)),
    "rotate": (-1, 181),
    "scale": (-0.1, 1.5),
    "shift": (-0.1, 1.5),
    "perspective": (-0.1, 0.7),
    "brightness": (-0.1, 1.5),
    "copies": (0, -1),
    "noise": (-0.1, 1.5),
    "weight": (-0.1, float("nan")),
    "strength": (-0.1, 1.5),
    "low": (-0.1, 0.9),
    "high": (-0.1, 1.5, 0.01),
    "margin": (-0.1, 0.6),
    "filter": ("sepia",),
    "points": (SQUARE, np.zeros((1, 2, 2)), np.full((1, 3, 2), 2.0)),
    "parts": (
        (),
        (MultiTrigger(),),
        (InputInstanceKey(),),
        (BadNets(append=True),),
        (BadNets(size=40),),
    ),
    "overlays": (SQUARE[None],),
    "mix": ("product",),
}
NEEDS = {
    (Blended, "image"): {"pattern": "image"},
    (Accessory, "image"): {"worn": "image"},
    (Physical, "image"): {"worn": "image"},
}
FLAGS = {"append", "random_place", "one_target", "redraw"}


@pytest.mark.parametrize("cls", ATTACKS)
def test_every_parameter_is_checked(cls):
    cls().check((28, 28, 1), 10)
    for field in dataclasses.fields(cls):
        if field.name in FLAGS:
            continue
        for value in BAD[field.name]:
            fields = value if isinstance(value, dict) else {field.name: value}
            with pytest.raises(BadInput) as error:
                cls(**NEEDS.get((cls, field.name), {}) | fields).check((28, 28, 1), 10)
            assert "\n" not in str(error.value), (field.name, value)


@pytest.mark.parametrize(
    "attack, words",
    [
        (InputInstanceKey(rate=0.1), "set copies"),
        (InputInstanceKey(append=False), "set copies"),
        (WeightedLoss(append=False), "leave append"),
        (TriggerCombination(size=14), "do not fit"),
        (TriggerCombination(rate=0.5, cover=0.3), "rate \\+ 2·cover"),
        (TriggerCombination(labels="clean-label"), "no clean-label"),
        (MultiTrigger(labels="all-to-all"), "from its parts"),
        (MultiTrigger(parts=(BadNets(shape="o"),)), r"parts\[0\].shape"),
        (BadNets(random_place=True, size=0.01), "trigger outside"),
        (Blended(pattern="image"), "key image must have the images' shape"),
        (Accessory(worn="image"), "one channel of opacity"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(attack, words):
    with pytest.raises(BadInput, match=words):
        attack.check((28, 28, 1), 10)


def test_all_are_registered_and_described():
    for cls in ATTACKS:
        name = registry.name_of(cls())
        assert name is not None and registry.get("attack", name).year
        registry.digest(cls())
