"""A user's own Flax modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bdjax
from bdjax import testing
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


def test_outputs_are_the_modules_own(victims):
    found, (module, variables, own) = victims
    x = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)
    own.eval()
    theirs = {"linen": module.apply(variables, x, False), "nnx": own(x)}
    for name, victim in found.items():
        assert np.array_equal(victim.model.apply(victim.variables, x).logits, theirs[name])
        assert {"conv_last", "penultimate"} <= {*victim.model.sites}
    assert found["linen"].model.apply(variables, x).acts["conv_last"].shape == (4, 16, 16, 8)
    assert "Block_0" in found["linen"].model.sites and "blocks.0" in found["nnx"].model.sites


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_they_are_nets_like_any_other(victims, name):
    victim = victims[0][name]
    testing.check_passes(victim.model, name)
    x = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)

    def drawn(seed):
        key = jax.random.key(seed)
        return victim.model.apply(victim.variables, x, train=True, key=key).logits

    assert np.array_equal(drawn(0), drawn(0)) and not np.array_equal(drawn(0), drawn(1))


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
    for words, call in {
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
