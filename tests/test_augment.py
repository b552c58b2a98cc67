"""Augmentation: planted images whose answer is known, draws per image, and one hashable object that
combines all.
"""

import jax
import numpy as np
import pytest

from bdjax import datasets
from bdjax.augment import Augmentation, crop, flip, rotate, shift
from bdjax.registry import digest
from bdjax.train import Recipe, unit

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def x():
    return np.asarray(unit(datasets.load().test.image[:64]))


def test_flip_takes_half_of_the_images(x):
    y = np.asarray(jax.jit(flip)(KEY, x))
    same, flipped = (
        np.array([np.array_equal(a, b) for a, b in zip(y, z)]) for z in (x, x[:, :, ::-1])
    )
    assert (same ^ flipped).all()
    assert 16 < flipped.sum() < 48


def test_crop_is_a_window_of_the_padded_image(x):
    y, wide = (
        np.asarray(jax.jit(lambda k, v: crop(k, v, 2))(KEY, x)),
        np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))),
    )
    windows = {
        (i, j): [np.array_equal(y[n], wide[n, i : i + 28, j : j + 28]) for n in range(len(y))]
        for i in range(5)
        for j in range(5)
    }
    assert np.any(list(windows.values()), 0).all()
    assert sum(map(any, windows.values())) > 15  # Most of the 25 places are drawn by 64 images.


def test_shift_moves_the_centre_of_mass_and_fills_with_black():
    x = np.zeros((201, 20, 40, 1), np.float32)
    x[:, 10, 20] = 1
    x[-1] = 1
    *y, white = np.asarray(jax.jit(lambda k, v: shift(k, v, 0.1))(KEY, x))
    y = np.stack(y)
    mass = y.sum((1, 2, 3))
    np.testing.assert_allclose(mass, 1, atol=1e-3)
    down = (y * np.arange(20).reshape(1, 20, 1, 1)).sum((1, 2, 3)) - 10
    right = (y * np.arange(40).reshape(1, 1, 40, 1)).sum((1, 2, 3)) - 20
    for moved, reach in ((down, 2), (right, 4)):  # 0.1 of 20 rows and of 40 columns
        assert np.abs(moved).max() <= reach + 1e-3
        assert moved.min() < -0.9 * reach < 0.9 * reach < moved.max()
    assert white.min() < 0.01 < 0.99 < white.max()


def test_rotate_turns_about_the_centre_by_up_to_the_angle():
    x = np.zeros((200, 41, 41, 1), np.float32)
    x[:, 20, 35] = 1  # 15 pixels right of the centre
    y = np.asarray(jax.jit(lambda k, v: rotate(k, v, 30.0))(KEY, x))
    rows, columns = np.arange(41).reshape(1, 41, 1, 1) - 20, np.arange(41).reshape(1, 1, 41, 1) - 20
    mass = y.sum((1, 2, 3))
    at = np.stack([(y * axis).sum((1, 2, 3)) / mass for axis in (rows, columns)])
    np.testing.assert_allclose(np.hypot(*at), 15, atol=0.5)
    angle = np.rad2deg(np.arctan2(*at))
    assert np.abs(angle).max() < 32
    assert angle.min() < -25 < 25 < angle.max()


@pytest.mark.parametrize("augment", [flip, crop, shift, rotate, Augmentation(15, 0.1, 2, True)])
def test_every_image_draws_its_own_and_stays_in_range(augment, x):
    twins = np.repeat(x[:1], 8, 0)
    run = jax.jit(augment)
    y = np.asarray(run(KEY, twins))
    assert y.shape == twins.shape and y.dtype == np.float32
    assert y.min() >= 0 and y.max() <= 1 + 1e-6
    assert len(np.unique(y.reshape(8, -1), axis=0)) > 1
    np.testing.assert_array_equal(y, run(KEY, twins))
    assert not np.array_equal(y, run(jax.random.key(1), twins))


@pytest.mark.parametrize(
    "augment",
    [lambda k, v: shift(k, v, 0.0), lambda k, v: rotate(k, v, 0.0), Augmentation().__call__],
)
def test_nothing_asked_nothing_done(augment, x):
    np.testing.assert_allclose(jax.jit(augment)(KEY, x), x, atol=1e-5)


def test_one_object_that_programs_can_share():
    one, same, other = Augmentation(shift=0.1), Augmentation(shift=0.1), Augmentation(shift=0.2)
    assert one == same and hash(one) == hash(same) and one != other
    recipes = [Recipe(augment=a) for a in (one, same, other)]
    assert (
        jax.tree.structure(recipes[0])
        == jax.tree.structure(recipes[1])
        != jax.tree.structure(recipes[2])
    )
    assert digest(recipes[0]) == digest(recipes[1]) != digest(recipes[2])
