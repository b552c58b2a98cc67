"""No search for a trigger gets stuck where its squashing function is flat."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_abs
import test_neural_cleanse as nc

import bdjax
from bdjax.defenses.invert import deep_inspect, mesa
from bdjax.defenses.invert.abs import VISIBLE, Abs, Candidate
from bdjax.defenses.invert.neural_cleanse import WORST
from bdjax.defenses.parts import inversion, screen
from bdjax.defenses.parts.inversion import BOUND, Trigger, descend, squash, unsquash, within

FAR = 50.0
"""A raw value from which tanh in float32 has no way back."""
KEY = jax.random.key(0)
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(bdjax.__path__, "bdjax.")
    if not found.name.endswith("__main__")
]
USERS = {
    module.__name__
    for module in MODULES
    if getattr(module, "squash", None) is squash and module is not inversion
}


def neural_cleanse(monkeypatch):
    """Every pixel is opaque; 12 are wanted, half of them."""
    d = dataclasses.replace(nc.QUICK, start_at_zero=False)
    start, step = d._moves(KEY, nc.MODEL, nc.VARIABLES, nc.IMAGES.image)
    state = start((jnp.asarray(1), jnp.asarray(0)))
    state = state._replace(raw=jax.tree.map(lambda v: jnp.full_like(v, FAR), state.raw))
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: (step(s), None), state, length=30)[0])
    assert float(squash(run(state).raw).mask.sum()) < 12


def abs_(monkeypatch):
    """Every pixel is opaque; 9 of 144 are free."""

    class Planted(Abs):
        def invert(self, loss, starts, candidates, rule):
            starts = starts._replace(mask=jnp.full_like(starts.mask, FAR))
            return super().invert(loss, starts, candidates, rule)

    variables, x, _ = test_abs.activations()
    d = Planted(size=9 / test_abs.PIXELS, steps=200, lanes=1)
    one = Candidate(*(jnp.ones(1, kind) for kind in (jnp.int32, jnp.int32, bool)))
    _, trigger = jax.jit(lambda: d.pixel(KEY, test_abs.MAPS, variables, x, one))()
    assert int((trigger.mask > VISIBLE).sum()) <= 25


def deep_inspect_(monkeypatch):
    """White surrogates, which the net takes for one label, become those of every label; a generator
    of ones makes zeros.
    """
    d = deep_inspect.DeepInspect(images=2, inversion_steps=200, lanes=1)
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, FAR))
        made = jax.jit(lambda: d.surrogates(KEY, nc.MODEL, nc.VARIABLES))()
    called = nc.MODEL.apply(nc.VARIABLES, made.reshape(-1, *nc.MODEL.shape)).logits.argmax(1)
    assert called.tolist() == np.repeat(np.arange(6), 2).tolist()
    generator = deep_inspect.Perturber(4, (2, 2, 1))
    moves(generator, jnp.zeros((3, 2)), jnp.zeros((3, 3)))


def mesa_(monkeypatch):
    """A generator of ones makes zeros."""
    moves(mesa.Generator(4, 3), jnp.zeros((3, 8)))


def moves(generator, *inputs):
    """A generator whose last layer stands far out comes back."""

    def far(path, leaf):
        last = "bias" in str(path) and leaf.shape == (jax.tree.leaves(out)[0].size // 3,)
        return jnp.full_like(leaf, FAR) if last else leaf

    out, params = generator.init_with_output(KEY, *inputs)
    params = jax.tree_util.tree_map_with_path(far, params)

    def loss(params, _):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            made = generator.apply(params, *inputs, mutable=["batch_stats"])[0]
        return made.mean(), made.max()

    rule = optax.adam(0.5)
    run = jax.jit(lambda p: descend(loss, p, rule.init(p), jnp.zeros(400), rule)[1])
    highest = run(params)
    assert float(highest[0]) > 0.999 and float(highest[-1]) < 0.1


def screen_(monkeypatch):
    """Every pixel is opaque: the price brings them back."""
    real = screen.Trigger

    def far(mask, pattern):
        stuck = float(jnp.max(jnp.abs(mask))) == 2.0 if not isinstance(mask, jax.core.Tracer) else 0
        return real(jnp.full_like(mask, FAR) if stuck else mask, pattern)

    rounds = (screen.Round(1 << 30, 200, 8),)
    images = nc.IMAGES.image
    plain = screen.screened(KEY, nc.MODEL, nc.VARIABLES, images, rounds).cost
    with monkeypatch.context() as patch:
        patch.setattr(screen, "Trigger", far)
        planted = screen.screened(KEY, nc.MODEL, nc.VARIABLES, images, rounds).cost
    assert float(planted.max()) < screen.PRICE / 2 and np.allclose(plain, planted, atol=1.0)


STUCK = {
    "bdjax.defenses.parts.screen": screen_,
    "bdjax.defenses.invert.neural_cleanse": neural_cleanse,
    "bdjax.defenses.invert.abs": abs_,
    "bdjax.defenses.invert.deep_inspect": deep_inspect_,
    "bdjax.defenses.invert.mesa": mesa_,
}


@pytest.mark.parametrize("user", sorted(USERS | set(STUCK)))
def test_a_stuck_pixel_comes_back_in_every_search_in_squashed_space(user, monkeypatch):
    assert user in USERS and user in STUCK, "plant a stuck pixel in each search that uses squash"
    STUCK[user](monkeypatch)


def test_a_search_squashes_by_nothing_else():
    flat = {"tanh", "sigmoid", "logistic", "hard_tanh", "hard_sigmoid", "soft_sign"}
    for module in MODULES:
        if getattr(module, "descend", None) is descend and module is not inversion:
            names = {
                node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
                for node in ast.walk(ast.parse(inspect.getsource(module)))
            }
            assert not names & flat, module.__name__


def test_squash_has_a_gradient_everywhere_and_is_tanh_within_the_bound():
    raw = jnp.asarray([-1e30, -1e4, -9.0, -BOUND, -1.0, 0.0, 0.5, BOUND, 8.2, 1e4])
    slope = jax.vmap(jax.grad(squash))(raw)
    assert float(slope.min()) > 1e-5
    inner = np.clip(np.asarray(raw, float), -BOUND, BOUND)
    np.testing.assert_allclose(squash(raw), np.tanh(inner) / 2 + 0.5, atol=2e-7)
    np.testing.assert_allclose(slope, (1 - np.tanh(inner) ** 2) / 2, rtol=0.02)
    again = unsquash({"a": squash(raw), "b": jnp.asarray([0.0, 1.0])})
    assert float(jnp.abs(again["b"]).max()) <= BOUND * 1.01
    np.testing.assert_allclose(again["a"], inner, atol=0.05)


def test_a_step_ends_within_the_bound():
    rule = optax.chain(optax.sgd(100.0), within(Trigger(-BOUND, 0.0), Trigger(BOUND, 1.0)))  # type: ignore[arg-type]
    loss = lambda t, _: (t.mask.sum() - t.pattern.sum(), None)  # noqa: E731
    first = Trigger(jnp.zeros(3), jnp.zeros(3))
    (last, _), _ = descend(loss, first, rule.init(first), jnp.zeros(2), rule)
    assert last.mask.tolist() == [-BOUND] * 3 and last.pattern.tolist() == [1] * 3


def test_a_search_that_cannot_move_stops_and_its_price_is_finite():
    search = dataclasses.replace(nc.QUICK, steps=1000)
    # Every image has label 0 whatever is stamped on it, and no gradient leads anywhere.
    constant = nc.run(search, jax.tree.map(jnp.zeros_like, nc.VARIABLES), nc.IMAGES)
    steps, cost = constant.info["steps"].tolist(), np.asarray(constant.info["cost"])
    assert steps[0] < 200 and steps[1:] == [1] * 5
    np.testing.assert_allclose(cost[0], WORST, rtol=1e-6)
    assert float(constant.info["norms"][0]) < 0.01
    broken = nc.run(search, jax.tree.map(lambda v: v * jnp.nan, nc.VARIABLES), nc.IMAGES)
    assert broken.info["steps"].tolist() == [1] * 6
    # An own price above the bound is kept, not cut.
    dear = dataclasses.replace(search, init_cost=100.0).begin()
    dear = dataclasses.replace(search, init_cost=100.0, patience=1).update(
        dear._replace(cost=jnp.asarray(100.0)), jnp.asarray(1.0), jnp.asarray(5.0)
    )[0]
    assert float(dear.cost) == 100
