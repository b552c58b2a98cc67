"""LPSF: dormant pixels, the growth of scale-free links, and that pruned links never come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.badnets import BadNets
from bdjax.defenses.train.lpsf import Graph, Lpsf, degrees, exponent, graph_of, grow
from bdjax.models.layers import Net, build, conv, dense, max_pool
from bdjax.models.nin import Nin
from bdjax.models.resnet import ResNet
from bdjax.models.shamshiri import Ffnn
from bdjax.models.vgg_bn import VggBn
from bdjax.registry import pytree
from bdjax.train import Recipe, evaluate, poisoned_set, predict, unit
from bdjax.types import BadInput, Split

KEY = jax.random.key(0)


@pytree
class Tiny(Net):
    def layers(self, x, train, classes):
        x = max_pool(conv(x, 4, 5, "conv", stride=2), 2)
        return dense(dense(x, 16, "dense"), classes, "logits")


@pytest.mark.parametrize(
    ("links", "second", "last"),
    [
        ("chain", [4, 5, 6], [7, 8]),
        ("input", [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 8]),
        ("all", range(7), range(9)),
    ],
)
def test_the_graph_of_a_net(links, second, last):
    graph = graph_of(build(Ffnn(hidden=(3, 2), links=links), (2, 2, 1), 2))
    assert (
        graph.names == ("dense_1", "dense_2", "logits")
        and graph.widths == (3, 2, 2)
        and graph.nodes == 11
    )
    for rows, wanted in zip(graph.rows, (range(4), second, last), strict=True):
        np.testing.assert_array_equal(rows, list(wanted))


def test_a_unit_draws_exactly_its_links_from_living_earlier_nodes():
    graph = graph_of(build(Ffnn(hidden=(6, 5), links="all"), (3, 3, 1), 4))
    alive = jnp.ones(24, bool).at[jnp.asarray([0, 4, 8])].set(False)
    drawn = jax.jit(lambda k: grow(k, graph, alive, jnp.asarray([3, 10, 40])))(KEY)
    assert drawn.shape == (15, 24) and not drawn[:, ~alive].any()
    np.testing.assert_array_equal(drawn.sum(1), [3] * 6 + [10] * 5 + [9 - 3 + 6 + 5] * 4)
    for unit_, first in zip(drawn, [9] * 6 + [15] * 5 + [20] * 4, strict=True):
        assert not unit_[first:].any()
    np.testing.assert_array_equal(
        degrees(drawn), drawn.sum(0) + jnp.append(jnp.zeros(9, int), drawn.sum(1))
    )


def test_preference_is_degree_plus_one():
    """Two units read the same two inputs, one link each: the second repeats the first's choice with
    probability 2/3, not 1/2.
    """
    graph = Graph(("a", "b"), (np.arange(2), np.arange(2)), (1, 1))

    def repeats(preferential):
        one = jax.vmap(
            lambda k: grow(
                k, graph, jnp.ones(4, bool), jnp.asarray([1, 1]), preferential=preferential
            )
        )
        drawn = jax.jit(one)(jax.random.split(KEY, 4000))
        return float((drawn[:, 0] == drawn[:, 1]).all(-1).mean())

    assert repeats(True) == pytest.approx(2 / 3, abs=0.03)
    assert repeats(False) == pytest.approx(1 / 2, abs=0.03)


def test_growth_is_heavy_tailed_and_random_links_are_not():
    """1,200 units one after another: Barabási–Albert, whose exponent is 3."""
    rows = tuple(np.arange(8 + i) for i in range(1200))
    graph = Graph(tuple(map(str, range(1200))), rows, (1,) * 1200)
    links = jnp.full(1200, 8)
    grown, even = (
        degrees(grow(KEY, graph, jnp.ones(1208, bool), links, preferential=p))
        for p in (True, False)
    )
    assert grown.sum() == even.sum() == 2 * 8 * 1200
    assert 2.5 < exponent(grown, 8) < 3.3
    assert grown.max() > 2 * even.max()


def test_the_exponent_of_a_power_law():
    uniform = (jnp.arange(20000.0) + 0.5) / 20000
    # continuous P(k) ∝ k^−2.5 from 9.5 on, rounded
    degree = jnp.floor(9.5 * uniform ** (-1 / 1.5) + 0.5)
    assert exponent(degree, 10) == pytest.approx(2.5, abs=0.05)


def test_dormant_pixels_by_each_rule():
    image = np.zeros((4, 2, 2, 1), np.uint8)
    image[0, 0, 0] = 255  # mean .25, active in one image of four
    image[:, 0, 1] = 51  # mean .2, active in all
    image[:, 1, 0] = 13  # mean .05, active in none
    clean = Split(image, np.zeros(4, np.int32))

    def dormant(**fields):
        return Lpsf(**fields).dormant(clean).reshape(-1).tolist()

    assert dormant(tau=0.22) == [False, True, True, True]
    assert dormant(rule="active", tau=0.5) == [True, False, True, True]
    assert dormant(rule="quantile", tau=0.5) == [False, False, True, True]
    assert dormant(tau=1.0, prune=False) == [False] * 4


@pytest.fixture(scope="module")
def run(sample):
    """`(model, train)`: the net, and its training on an attacked set at any tau and number of
    links.
    """
    model = build(Ffnn(hidden=(64,), links="all"), sample.shape, 10)
    attack = BadNets(target=3)
    data = poisoned_set(KEY, sample.train, attack, 10)
    recipe = Recipe(lr=2e-3, epochs=5, batch=32)

    @jax.jit
    def train(tau, links):
        trained = Lpsf(tau=tau, links=links)(KEY, model, recipe, data, sample.clean)
        return (
            trained.variables,
            trained.info,
            evaluate(KEY, model, trained.variables, sample.test, attack),
        )

    return model, lambda tau, links: train(jnp.float32(tau), jnp.int32(links))


def test_pruned_links_stay_zero_and_dormant_pixels_have_no_say(run, sample):
    model, train = run
    variables, info, _ = train(0.3, 24)
    dormant = np.asarray(info["dormant"])
    assert 300 < dormant.sum() < 500
    for name, mask in info["masks"].items():
        kernel = np.asarray(variables["params"][name]["kernel"])
        assert (kernel[np.asarray(mask) == 0] == 0).all() and (
            kernel[np.asarray(mask) == 1] != 0
        ).mean() > 0.99
        assert not kernel[:784][dormant.reshape(-1)].any()
        np.testing.assert_array_equal(mask.sum(0), 24)
    assert float(info["density"]) == pytest.approx(24 * 74 / (784 * 64 + 848 * 10))
    x = unit(sample.test.image[:50])
    noise = jnp.where(info["dormant"][None], jax.random.uniform(KEY, x.shape), x)
    np.testing.assert_allclose(
        predict(model, variables, x), predict(model, variables, noise), atol=1e-5
    )


def test_a_sweep_over_tau_and_links_is_one_program(run):
    _, train = run
    taus, links = jnp.asarray([0.05, 0.3]), jnp.asarray([16, 48])
    together = jax.jit(jax.vmap(train))(taus, links)
    for i in range(2):
        alone = train(taus[i], links[i])
        assert alone[1]["density"] == together[1]["density"][i]
        np.testing.assert_array_equal(alone[1]["dormant"], together[1]["dormant"][i])
        assert float(alone[2]["acc"]) == pytest.approx(float(together[2]["acc"][i]), abs=0.02)


def test_variants_have_the_links_they_say(run, sample):
    model, _ = run
    graph = graph_of(model)
    alive = jnp.ones(graph.nodes, bool).at[:100].set(False)

    def count(**fields):
        masks, scales, _ = jax.jit(lambda d: d.links_of(KEY, graph, alive))(
            Lpsf(links=24, **fields)
        )
        for name, rows in zip(graph.names, graph.rows, strict=True):
            # The variance of a unit's input is what it was, whatever is pruned.
            np.testing.assert_allclose(
                (masks[name] * scales[name] ** 2).sum(0), len(rows), rtol=1e-4
            )
        return [int(mask.sum()) for mask in masks.values()]

    assert count() == count(topology="random") == [24 * 64, 24 * 10]
    assert count(topology="dense") == count(edges="weighted") == [684 * 64, 748 * 10]
    assert count(edges="budget") == [684 * 64, 64 * 10]


def test_a_net_with_convolutions_loses_dormant_pixels_and_last_links(sample):
    model = build(Tiny(), sample.shape, 10)
    defense = Lpsf(tau=0.3, links=5)
    data = poisoned_set(KEY, sample.train, BadNets(target=3), 10)
    recipe = Recipe(epochs=1, batch=100)
    variables, info = jax.jit(lambda d: defense(KEY, model, recipe, d, sample.clean))(data)
    trained = defense.wrap(model)
    assert list(info["masks"]) == ["logits"] and (info["masks"]["logits"].sum(0) == 5).all()
    assert (variables["params"]["logits"]["kernel"] != 0).sum() == 50
    x = unit(sample.test.image[:20])
    np.testing.assert_array_equal(
        trained.apply(variables, x).logits,
        trained.apply(variables, jnp.where(info["dormant"][None], 0.5, x)).logits,
    )


def test_it_removes_a_trigger_on_dormant_pixels(run):
    """The corner of Fashion-MNIST is dark: without its links the white square says little."""
    _, train = run
    whole, pruned = (train(tau, 256)[2] for tau in (0.0, 0.4))
    assert whole["asr_nt"] > 0.85 and pruned["asr_nt"] < 0.3
    assert pruned["acc"] > whole["acc"] - 0.12


def test_bad_input(sample):
    model = build(Ffnn(hidden=(4,)), sample.shape, 10)
    for fields, message in (
        ({"tau": 2.0}, "tau"),
        ({"links": 0}, "links"),
        ({"rule": "median"}, "rule 'median'"),
    ):
        with pytest.raises(BadInput, match=message):
            Lpsf(**fields).check(model, sample.clean)
    Lpsf().check(model, sample.clean)
    maps = build(Nin(standardise="none"), sample.shape, 10)
    with pytest.raises(BadInput, match=r"a dense last layer, 'logits\.kernel' is none"):
        Lpsf().check(maps, sample.clean)


@pytest.mark.parametrize(("net", "last"), [(ResNet(), "fc"), (VggBn(hidden=8), "classifier.6")])
def test_the_last_layer_is_found_by_whatever_name(net, last):
    graph = graph_of(build(net, (32, 32, 3), 10))
    assert graph.names == (last,) and graph.widths == (10,)
