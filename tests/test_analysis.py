"""Analysis: Grad-CAM of a net whose saliency is known by hand, norms, and the figures of both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import plots, report
from bdjax.analysis.gradcam import grad_cam, mass_inside, trigger_box
from bdjax.analysis.norms import Norms, norms, separation
from bdjax.channels import channel_means
from bdjax.models.layers import forward, site
from bdjax.train import stamped
from bdjax.types import BadInput, Model

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPE = (4, 4, 2)
WEIGHT = RNG.normal(size=(4, 4, 2, 3)).astype(np.float32)


class Linear(nn.Module):
    """Logits that are linear in the site `conv_last`, which is the image itself, pooled to half its
    size.
    """

    @nn.compact
    def __call__(self, x, train):
        act = site(
            "conv_last",
            x.reshape(x.shape[0], 4, x.shape[1] // 4, 4, x.shape[2] // 4, 2).mean((2, 4)),
        )
        return site("penultimate", jnp.einsum("bhwc,hwck->bk", act, jnp.asarray(WEIGHT)))


def net(shape) -> Model:
    def apply(variables, x, *, train=False, edits=None, key=None):
        return forward(Linear(), variables, x, edits=edits)

    return Model(lambda key: {}, apply, shape, 3, ("conv_last", "penultimate"))


def test_grad_cam_by_hand():
    x, label = RNG.uniform(size=(3, *SHAPE)).astype(np.float32), np.array([0, 2, 1])
    found = jax.jit(lambda x, y: grad_cam(net(SHAPE), {}, x, y, batch=2))(x, label)
    for image, k, cam in zip(x, label, found):
        weight = WEIGHT[..., k].mean((0, 1))  # the mean gradient of each channel
        np.testing.assert_allclose(cam, np.maximum(image @ weight, 0), rtol=1e-5, atol=1e-6)
    # One label for all, on larger images: the map has the image's size.
    large = np.repeat(np.repeat(x, 2, 1), 2, 2)
    grown = grad_cam(net((8, 8, 2)), {}, large, 2)
    assert grown.shape == (3, 8, 8)
    np.testing.assert_allclose(grown[1, ::7, ::7], found[1, ::3, ::3], rtol=1e-4, atol=1e-6)
    # Pixels in 0 … 255 are the same images.
    eight = (255 * x).astype(np.uint8)
    np.testing.assert_allclose(
        grad_cam(net(SHAPE), {}, eight, 0),
        grad_cam(net(SHAPE), {}, eight / np.float32(255), 0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_pruned_channels_are_not_looked_at():
    x = RNG.uniform(size=(3, *SHAPE)).astype(np.float32)
    found = grad_cam(net(SHAPE), {"masks": {"conv_last": jnp.asarray([1.0, 0.0])}}, x, 1)
    np.testing.assert_allclose(
        found, np.maximum(x[..., 0] * WEIGHT[..., 0, 1].mean(), 0), rtol=1e-5, atol=1e-6
    )


def test_box_and_mass():
    clean = np.zeros((3, 5, 6, 1), np.uint8)
    other = clean.copy()
    other[0, 1, 2] = other[0, 3, 4] = 9  # two pixels: the box holds all between them
    other[1, 4, 5] = 1
    box = np.asarray(trigger_box(clean, other))
    assert box[0].sum() == 9 and box[0, 1:4, 2:5].all() and box[1].sum() == 1 and not box[2].any()
    cam = np.ones((3, 5, 6), np.float32)
    cam[1] = 0
    np.testing.assert_allclose(mass_inside(cam, box), [9 / 30, np.nan, 0], rtol=1e-6)
    np.testing.assert_array_equal(
        box, trigger_box(clean / np.float32(255), other / np.float32(255))
    )


def test_sites_without_places_and_unknown_ones_are_told():
    with pytest.raises(BadInput, match=r"site 'penultimate' has \(3,\)"):
        grad_cam(net(SHAPE), {}, np.zeros((1, *SHAPE)), 0, "penultimate")
    with pytest.raises(BadInput, match="no site 'conv_1'"):
        grad_cam(net(SHAPE), {}, np.zeros((1, *SHAPE)), 0, "conv_1")
    with pytest.raises(BadInput, match="no site 'conv_1'"):
        norms(net(SHAPE), {}, "conv_1", np.zeros((1, *SHAPE)))


def test_norms_by_numpy():
    x, base = (RNG.uniform(size=(7, *SHAPE)).astype(np.float32) for _ in range(2))
    for found, values in (
        (norms(net(SHAPE), {}, "conv_last", x, batch=3), x),
        (norms(net(SHAPE), {}, "conv_last", x, minus=base), x - base),
    ):
        flat = values.reshape(7, -1)
        for one, order in zip(found, (1, 2, np.inf)):
            np.testing.assert_allclose(one, np.linalg.norm(flat, order, axis=1), rtol=1e-5)


def test_separation_is_the_auroc_of_each():
    low, high = jnp.asarray([1.0, 2, 3]), jnp.asarray([4.0, 5])
    found = separation(Norms(low, low, high), Norms(high, low[:2], low))
    np.testing.assert_allclose(found, [1, (0 + 0.5 + 1 + 0.5) / 6, 0])


def test_real_victim(sample, victim):
    """The trigger makes activations larger, and shows in its norms."""
    model, variables, attack = victim
    x = stamped(attack, 1, sample.test.image, KEY)
    both = jax.jit(
        lambda x, c: (
            norms(model, variables, "penultimate", x),
            norms(model, variables, "penultimate", c),
        )
    )
    trojan, clean = both(x, sample.test.image)
    found = separation(clean, trojan)
    print([round(float(v), 3) for v in found])
    figure = plots.activation_norms({"clean": clean, "stamped": trojan}, {"stamped": found})
    assert f"{float(found.linf):.2f}" in figure.axes[2].get_xlabel()
    drawn(figure)


# --- Figures ---


def drawn(figure) -> None:
    [picture] = report.draw([("x", "", "", figure)])
    assert picture.png[:4] == b"\x89PNG"


def test_cams_are_laid_over_the_images():
    pictures, maps = RNG.uniform(size=(2, 3, 8, 8, 3)), np.zeros((2, 3, 8, 8))
    maps[0, 0, 2, 3] = 7
    figure = plots.cams(pictures, maps, ["vanilla", "trojaned"], ["a", "b", "c"])
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert np.unravel_index(np.argmax(shown[..., 0] - shown[..., 2]), (8, 8)) == (2, 3)
    drawn(figure)


def test_activation_maps_share_a_scale():
    model = net(SHAPE)
    means = {name: channel_means(model, {}, "conv_last",
                                 RNG.uniform(size=(5, *SHAPE)).astype(np.float32) * k)
             for name, k in (("clean", 1), ("stamped", 3))}  # fmt: skip
    figure = plots.activation_maps(means)
    first, second = (axes.images[0] for axes in figure.axes[:2])
    assert first.get_clim() == second.get_clim() == (0, float(means["stamped"].max()))
    np.testing.assert_allclose(np.asarray(first.get_array()).ravel(), means["clean"], rtol=1e-6)
    drawn(figure)
    drawn(plots.activation_maps({"clean": np.arange(100.0)}))


def test_replicas_start_at_two():
    figure = plots.replicas([3.0, 2.0, 1.5, 1.4], 3)
    assert (
        list(figure.axes[0].lines[0].get_xdata()) == [2, 3, 4]
        and figure.axes[0].texts[0].get_text() == "N = 3"
    )
    drawn(figure)
