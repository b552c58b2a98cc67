"""Lanes and devices: the same numbers however the work is laid out, and nothing sent between
devices.
"""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import mesh
from bdjax.attacks.badnets import BadNets
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.conv import conv_general_dilated
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.train import Recipe, fit, poisoned_set

NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("lanes", [None, 1, 2, 5, 99])
def test_lane_map_is_map(lanes):
    x = jnp.arange(5.0)
    np.testing.assert_array_equal(mesh.lane_map(lambda v: {"y": v * 2}, x, lanes)["y"], x * 2)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_drain_steps_each_item_until_it_is_done(lanes):
    goals = jnp.array([3, 0, 5, 1, 4])

    def start(goal):
        return {"goal": goal, "at": jnp.zeros((), jnp.int32), "sum": jnp.zeros(2)}

    def step(s):
        return {"goal": s["goal"], "at": s["at"] + 1, "sum": s["sum"] + 1.0}

    out = mesh.drain(start, step, lambda s: s["at"] >= s["goal"], goals, lanes)
    np.testing.assert_array_equal(out["at"], goals)
    np.testing.assert_array_equal(out["sum"][:, 0], goals)


def test_drain_does_not_wait_for_the_slowest():
    """Two lanes, items of 6, 1, 1, 1, 1, 1, 1 steps: six rounds, not 6 + 1 + 1 + 1."""
    goals = jnp.array([6, 1, 1, 1, 1, 1, 1])
    calls = []

    def step(s):
        jax.debug.callback(lambda: calls.append(1))
        return s[0], s[1] + 1

    jax.block_until_ready(mesh.drain(lambda g: (g, 0 * g), step, lambda s: s[1] >= s[0], goals, 2))
    jax.effects_barrier()
    assert len(calls) <= 2 * 7


@pytest.mark.parametrize(
    ("seconds", "most", "lanes"),
    [
        ({1: 8, 2: 4, 4: 2, 8: 1.9, 16: 1}, 16, 4),  # 8 saves too little: 16 is not tried
        ({1: 8, 2: 4, 4: 2, 6: 1}, 6, 6),
        ({1: 1, 2: 2}, 64, 1),
        ({1: 1}, 1, 1),
        ({1: 4, 2: 2, 4: float("inf")}, 8, 2),  # out of memory
    ],
)
def test_widest_doubles_while_it_pays(seconds, most, lanes):
    assert mesh.widest(seconds.__getitem__, most) == lanes


@pytest.mark.parametrize(
    ("seconds", "first", "lanes"),
    [
        ({16: 1, 8: 1.05, 4: 2}, 16, 8),  # halved for as long as a tenth is not lost
        ({16: 1, 8: 2}, 16, 16),
        ({4: 2, 2: 4, 8: 1, 16: 1}, 4, 8),
        ({3: 2, 1: 2}, 3, 1),
        ({4: float("inf"), 2: 3, 1: 6}, 4, 2),
    ],
)
def test_widest_begins_with_what_fits(seconds, first, lanes):
    assert mesh.widest(seconds.__getitem__, 16, first) == lanes


@pytest.mark.parametrize(
    ("size", "lanes", "asked"),
    [(1000, 64, [64]), (500, 40, [64, 1, 2, 40]), (109, 0, [64, 1]), (110, 1, [64, 1, 2])],
)
def test_the_lanes_that_fit_are_found_by_few_compilations(size, lanes, asked):
    tried = []

    def held(lanes):
        tried.append(lanes)
        return 100 + 10 * lanes if lanes < 64 else float("inf" if size < 1000 else 740)

    assert mesh.fitting(held, size, 64) == lanes and tried == asked


def test_products_are_exact_on_accelerators_unless_the_user_says_otherwise():
    def text():
        return str(jax.make_jaxpr(jnp.dot)(jnp.ones((4, 4)), jnp.ones((4, 4))))

    assert mesh.precision() is None and "HIGH" not in text()
    for target in ("gpu", "tpu"):
        with mesh.aiming(target):
            assert mesh.precision() == "float32" and "HIGHEST" in text()
        with jax.default_matmul_precision("tensorfloat32"), mesh.aiming(target):
            assert mesh.precision() == "tensorfloat32" and "HIGHEST" not in text()


def test_what_is_traced_asks_the_target_and_not_the_host():
    conv = jax.jit(lambda x, k: conv_general_dilated(x, k, (1, 1), "VALID", **NHWC))

    def text():
        return str(jax.make_jaxpr(conv)(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))))

    here = text()
    assert mesh.platform() == "cpu" and mesh.default_lanes(7) == 1 and "custom_vjp" in here
    with mesh.aiming("tpu"):
        assert mesh.platform() == "tpu" and mesh.default_lanes(7) == 7
        assert "custom_vjp" not in text()  # though the same function was traced before
        with mesh.aiming("cpu"):
            assert text() == here
    assert mesh.platform() == "cpu" and text() == here


def test_kernels_side_by_side_are_a_grouped_convolution_or_batched_products():
    x, w = jnp.ones((8, 4, 9, 9, 3)), jnp.ones((8, 3, 3, 3, 5))

    def loss(x, w):
        return (conv_general_dilated(x, w, (1, 1), "SAME", **NHWC) ** 2).sum()

    graded = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))

    def counts():
        text = graded.lower(x, w).as_text()
        return [text.count(f"stablehlo.{name}") for name in ("convolution", "dot_general")]

    with mesh.aiming("gpu"):
        assert counts() == [3, 0]
        with mesh.patches(True):
            assert counts() == [0, 3]
        assert counts() == [3, 0]


def training(net, data, classes):
    model = build(net, data.image.shape[1:], classes)

    def run(shared, item):
        key, rate = item
        train = poisoned_set(key, shared, BadNets(rate=rate), classes)
        return fit(key, model, Recipe(epochs=1, batch=32), train)[0]["params"]

    return run


def test_sharded_over_devices_equals_unsharded(sample):
    devices = jax.local_devices()
    assert len(devices) == 4
    small = sample.train[:128]
    run = training(Ffnn(hidden=(16,)), small, sample.classes)
    # 6 runs on 4 devices: padded
    items = (jax.random.split(jax.random.key(0), 6), jnp.linspace(0.0, 0.5, 6))
    one = jax.jit(mesh.over_runs(run, devices=devices[:1]))(small, items)
    four = jax.jit(mesh.over_runs(run, devices=devices))(*mesh.place(small, items, devices))
    chex.assert_trees_all_close(four, one, atol=1e-5)


def test_nothing_is_sent_between_devices(sample):
    devices = jax.local_devices()
    small = sample.train[:64]
    run = training(BadNetsCnn(), small, sample.classes)
    items = (jax.random.split(jax.random.key(0), 8), jnp.linspace(0.0, 0.5, 8))
    placed = mesh.place(small, items, devices)
    text = jax.jit(mesh.over_runs(run, devices=devices)).lower(*placed).compile().as_text()
    assert not [name for name in COLLECTIVES if name in text]


def test_flags_are_known_to_this_version_of_jax():
    """XLA stops at a flag that it does not know; what the user says of them is left as it is."""
    code = (
        "import os; from bdjax import mesh; mesh.tune(); first = os.environ.get('XLA_FLAGS', '');"
        "import jax; jax.devices(); mesh.tune(); print(first == os.environ.get('XLA_FLAGS', ''));"
        "print(mesh.onednn() == bool(mesh.FLAGS.get(jax.__version_info__[:3])), first)"
    )
    given = "--xla_cpu_use_onednn=false"
    for flags in (None, given, "--xla_force_host_platform_device_count=2"):
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        env |= {"XLA_FLAGS": flags} if flags else {}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        same, known = done.stdout.splitlines()
        assert same == "True" and (flags or "") in known
        assert flags == given or known.startswith("True")
        assert flags != given or known.split()[1:] == [given]
