"""A user's own Flax modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bdjax
from bdjax import testing
from bdjax.foreign import flax as foreign
from bdjax.types import BadInput, Split


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.width, (3, 3))(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        return x + nn.Conv(self.width, (3, 3))(y)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        for _ in range(2):
            x = Block(8)(x, train)
        return nn.Dense(5)(nn.Dropout(0.3, deterministic=not train)(x.mean((1, 2))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2)])
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = x + nnx.relu(block(x))
        return self.head(self.drop(x.mean((1, 2))))


@pytest.fixture
def victims():
    module = Linen()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), False)
    linen = bdjax.net(module, variables, shape=(16, 16, 3), train={"train": True})
    own = Nnx(nnx.Rngs(0))
    return {"linen": linen, "nnx": bdjax.net(own, shape=(16, 16, 3))}, (module, variables, own)


def test_outputs_are_the_modules_own(victims, monkeypatch):
    found, (module, variables, own) = victims
    x = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)
    own.eval()
    theirs = {"linen": module.apply(variables, x, False), "nnx": own(x)}
    for name, victim in found.items():
        ours = victim.model.apply(victim.variables, x).logits
        np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=1e-6)  # another order of sums
        assert {"conv_last", "penultimate"} <= {*victim.model.sites}
    assert found["linen"].model.apply(variables, x).acts["conv_last"].shape == (4, 16, 16, 8)
    assert "Block_0" in found["linen"].model.sites and "blocks.0" in found["nnx"].model.sites
    # With their own convolutions to the last digit: watching changes nothing.
    monkeypatch.setattr(foreign, "_quickened", lambda conv: None)
    for name, victim in found.items():
        assert np.array_equal(victim.model.apply(victim.variables, x).logits, theirs[name])


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_convolutions_are_those_that_are_fast_in_loops(victims, name):
    victim, x = victims[0][name], jnp.zeros((2, 16, 16, 3))
    passed = jax.make_jaxpr(lambda x: victim.model.apply(victim.variables, x).logits)(x)
    calls = [e for e in passed.jaxpr.eqns if e.primitive.name == "custom_vjp_call"]
    assert len(calls) >= 3 and "conv_general_dilated" not in {
        e.primitive.name for e in passed.jaxpr.eqns
    }


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_they_are_nets_like_any_other(victims, name):
    victim = victims[0][name]
    testing.check_passes(victim.model, name)
    x = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)

    def drawn(seed):
        key = jax.random.key(seed)
        return victim.model.apply(victim.variables, x, train=True, key=key).logits

    assert np.array_equal(drawn(0), drawn(0)) and not np.array_equal(drawn(0), drawn(1))


class Linens(nn.Module):
    """Two convolutions, the second within a transformation of Linen."""

    lift: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        if self.lift == "scan":
            conv = nn.scan(Carried, {"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = conv()(x, None)
        elif self.lift == "vmap":
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x = nn.vmap(nn.Conv, in_axes=None, axis_size=2, **axes)(8, (3, 3))(x).sum(0)
        else:
            x = getattr(nn, self.lift)(nn.Conv)(8, (3, 3))(x)
        return nn.Dense(5)(x.mean((1, 2)))


class Carried(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(8, (3, 3))(x), None


class Nnxs(Nnx):
    """As above, of NNX."""

    def __init__(self, lift, rngs):
        super().__init__(rngs)
        self.lift = lift

    def __call__(self, x):
        call = lambda block, x: block(x)  # noqa: E731
        lifted = {"remat": nnx.remat(call), "jit": nnx.jit(call)}
        lifted["vmap"] = lambda block, x: jax.vmap(lambda one: block(one[None])[0])(x)
        x = lifted[self.lift](self.blocks[0], self.stem(x))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("lift", ["scan", "vmap", "remat", "jit"])
def test_nothing_leaves_a_transformation(lift):
    x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    module = Linens(lift)
    victims = [bdjax.net(module, module.init(jax.random.key(0), x), shape=(8, 8, 3))]
    if lift != "scan":
        victims.append(bdjax.net(Nnxs(lift, nnx.Rngs(0)), shape=(8, 8, 3)))
    for victim in victims:
        # What leaves the first convolution is not that of the last one, which is not seen.
        assert victim.model.sites == ("stem", "penultimate")
        acts = jax.jit(lambda v, x, net=victim.model: net.apply(v, x).acts)(victim.variables, x)
        assert acts["stem"].shape == (2, 8, 8, 8)


class Head(nn.Module):
    """Logits that no dense layer makes, in 16 bits."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(4)(nn.Conv(8, (3, 3))(x)).mean((1, 2))
        rows = self.param("rows", nn.initializers.normal(), (8, self.classes))
        return (x @ rows).astype(jnp.bfloat16)


def test_logits_are_of_float32_and_two_classes_or_more():
    x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    for classes in (1, 5):
        module = Head(classes)
        variables = module.init(jax.random.key(0), x)
        net, variables = bdjax.net(module, variables, shape=(8, 8, 3))[:2]
        logits, theirs = net.apply(variables, x).logits, module.apply(variables, x)
        assert logits.dtype == jnp.float32 and logits.shape == (2, max(classes, 2))
        assert net.classes == max(classes, 2) and np.array_equal(logits[:, -1], theirs[:, -1])
        assert classes > 1 or not logits[:, 0].any()
        # The image, which its one convolution reads, is not what enters a last layer.
        assert net.sites == ("Conv_0", "conv_last")


def test_a_defense_on_them(victims):
    victim = victims[0]["linen"]
    draw = np.random.default_rng(0)
    part = Split(
        draw.integers(0, 256, (20, 16, 16, 3), np.uint8), np.arange(20, dtype=np.int32) % 5
    )
    data = bdjax.Dataset("random", part, part, part, 5)
    defense = bdjax.make("defense", "fine-pruning")
    found = bdjax.judge(jax.random.key(0), victim, defense, data)
    assert found.variables is not None and "acc_test" in found.metrics


def test_pixels_and_what_is_wrong(victims):
    module, variables, own = victims[1]
    x = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    loud = bdjax.net(
        module, variables, shape=(16, 16, 3), train={"train": True}, preprocess="0-255"
    )
    wanted = module.apply(variables, x * 255, False)
    assert np.allclose(loud.model.apply(variables, x).logits, wanted, atol=1e-3)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    for words, call in {
        "are not finite": lambda: bdjax.net(
            module, broken, shape=(16, 16, 3), train={"train": True}
        ),
        "needs its variables": lambda: bdjax.net(module, shape=(16, 16, 3)),
        "holds its own variables": lambda: bdjax.net(own, variables, shape=(16, 16, 3)),
        "is no module of Flax": lambda: bdjax.net(len, variables, shape=(16, 16, 3)),
        "cannot take images": lambda: bdjax.net(module, variables, shape=(16, 16, 3)),
        "not those of this module": lambda: bdjax.net(
            module, {"params": {}}, shape=(16, 16, 3), train={"train": True}
        ),
    }.items():
        with pytest.raises(BadInput, match=words):
            call()
