"""Strict JAX settings, and small real data, models and victims that the tests share."""

import copy
import os
from importlib.metadata import version
from pathlib import Path

# Before JAX starts: four virtual CPU devices for the tests of sharding.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")  # else Keras, looked for by a test, wants TensorFlow
# The same programs, less polished: most of the tests' time is compilation. The emitters of fusions
# through MLIR take half of it; the releases for Python 3.11 still have the older ones, later ones
# stop at the flag.
if version("jax").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
    )
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """What a worker, or an earlier run, has compiled nobody compiles again: not the other workers,
    nor their children. `-p no:cacheprovider` has no place for it.
    """
    if (cache := getattr(config, "cache", None)) is None:
        return
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
    seconds = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that cannot be shipped; a test that needs it skips where it is
    absent.
    """
    folder = Path(os.environ.get("BDJAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of test data (BDJAX_TEST_DATA) at {folder.name}")
    return folder


@pytest.fixture
def own_names(monkeypatch):
    """The registry with bdjax's own names alone, whatever experiments other tests have read, and
    no plugins; restored afterwards.
    """
    from bdjax import plugins, registry

    registry.entries()  # bdjax's own would not come back
    own = {name: entry for name, entry in registry._entries.items() if entry.plugin is None}
    monkeypatch.setattr(registry, "_entries", own)
    monkeypatch.setattr(registry, "_pytrees", copy.copy(registry._pytrees))
    monkeypatch.setattr(plugins, "_files", {})
    monkeypatch.setattr(plugins, "_words", [])


@pytest.fixture(scope="session")
def sample():
    """2,000 + 500 real images of the embedded Fashion-MNIST: `Dataset`."""
    from bdjax import datasets

    return datasets.load("fashion-mnist-sample", train_size=2000, test_size=500)


@pytest.fixture(scope="session")
def victim(sample):
    """`(model, variables, attack)`: a small net with the 5×5 white square of BadNets, target 3."""
    from bdjax.attacks.badnets import BadNets
    from bdjax.models.layers import build
    from bdjax.models.shamshiri import Ffnn
    from bdjax.train import Recipe, fit, poisoned_set

    model = build(Ffnn(hidden=(64,)), sample.shape, sample.classes)
    attack = BadNets(target=3)
    key = jax.random.key(0)
    recipe = Recipe(epochs=5, batch=32)
    variables, _ = jax.jit(
        lambda k: fit(k, model, recipe, poisoned_set(k, sample.train, attack, sample.classes))
    )(key)
    return model, variables, attack
