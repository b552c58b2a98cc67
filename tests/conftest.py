"""Strict JAX settings, and small real data, models and victims that the tests share."""

import os
from pathlib import Path

# Before JAX starts: four virtual CPU devices for the tests of sharding.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that cannot be shipped; a test that needs it skips where it is absent."""
    folder = Path(os.environ.get("BDJAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of test data (BDJAX_TEST_DATA) at {folder.name}")
    return folder
