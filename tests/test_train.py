"""`fit`, the poisoned rows, evaluation: learnability, masks, resuming, exact counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.badnets import BadNets
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.train import (
    Recipe,
    TrainSet,
    advance,
    batched,
    begin,
    clean_set,
    evaluate,
    fit,
    poisoned_set,
    predict,
)
from bdjax.types import BadInput, Split

RECIPE = Recipe(epochs=4, batch=32)


@pytest.fixture(scope="module")
def model(sample):
    return build(Ffnn(hidden=(32,)), sample.shape, sample.classes)


@pytest.fixture(scope="module")
def one_epoch(model, sample):
    """A compiled epoch that the tests of this file share."""

    @jax.jit
    def epoch(key, state, attack):
        train = poisoned_set(jax.random.fold_in(key, 9), sample.train, attack, sample.classes)
        return advance(key, state, model, RECIPE, train, epochs=1)

    return epoch


def test_victim_learns_both_the_task_and_the_trigger(victim, sample):
    model, variables, attack = victim
    found = evaluate(jax.random.key(1), model, variables, sample.test, attack)
    assert found["acc"] > 0.7
    assert found["asr_nt"] > 0.9
    chex.assert_tree_all_finite(found)


def test_clean_twin_does_not_answer_to_the_trigger(sample):
    model = build(Ffnn(hidden=(64,)), sample.shape, sample.classes)
    key = jax.random.key(0)
    variables, _ = jax.jit(lambda k: fit(k, model, RECIPE, clean_set(sample.train)))(key)
    assert evaluate(key, model, variables, sample.test, BadNets(target=3))["asr_nt"] < 0.3


def test_resumed_equals_unbroken_bit_for_bit(one_epoch, model):
    key, attack = jax.random.key(3), jax.tree.map(jnp.asarray, BadNets())
    state = begin(key, model, RECIPE)
    for _ in range(2):
        state, _ = one_epoch(key, state, attack)
    saved = jax.tree.map(np.asarray, state)  # what a checkpoint holds
    for _ in range(2):
        state, _ = one_epoch(key, state, attack)
    again = saved
    for _ in range(2):
        again, _ = one_epoch(key, again, attack)
    chex.assert_trees_all_equal(state.variables, again.variables)
    assert int(state.epoch) == 4


def test_rate_zero_is_the_clean_twin(one_epoch, model, sample):
    key = jax.random.key(3)
    state = begin(key, model, RECIPE)
    poisoned, _ = one_epoch(key, state, jax.tree.map(jnp.asarray, BadNets(rate=0.0)))
    clean, _ = jax.jit(
        lambda k, s: advance(k, s, model, RECIPE, clean_set(sample.train), epochs=1)
    )(key, state)
    chex.assert_trees_all_close(poisoned.variables, clean.variables, atol=1e-6)


def test_vmap_over_runs_equals_the_loop(model, sample):
    small = Split(sample.train.image[:256], sample.train.label[:256])

    def run(key, rate, target):
        attack = BadNets(rate=rate, target=target)
        train = poisoned_set(key, small, attack, sample.classes)
        return fit(key, model, Recipe(epochs=1, batch=32), train)[0]["params"]

    keys, rates, targets = (
        jax.random.split(jax.random.key(0), 3),
        jnp.array([0.0, 0.1, 0.5]),
        jnp.array([0, 4, 9]),
    )
    mapped = jax.jit(jax.vmap(run))(keys, rates, targets)
    single = jax.jit(run)
    for i in range(3):
        alone = single(keys[i], rates[i], targets[i])
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone, atol=1e-5
        )
    assert single._cache_size() == 1, "a rate, a target or a key must not compile anew"


def test_frozen_parameters_keep_their_value(model, sample):
    key = jax.random.key(0)
    variables = model.init(key)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    dense = jnp.ones(shapes["dense_1"]["kernel"]).at[:100].set(0.0)
    trainable = {"dense_1": {"kernel": dense, "bias": 1.0}, "logits": 0.0}
    after, _ = fit(
        key,
        model,
        Recipe(epochs=1, batch=32),
        clean_set(sample.train),
        variables=variables,
        trainable=trainable,
    )
    before = variables["params"]
    chex.assert_trees_all_equal(after["params"]["logits"], before["logits"])
    chex.assert_trees_all_equal(
        after["params"]["dense_1"]["kernel"][:100], before["dense_1"]["kernel"][:100]
    )
    assert not np.allclose(
        after["params"]["dense_1"]["kernel"][100:], before["dense_1"]["kernel"][100:]
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adadelta", "rmsprop"])
def test_every_optimizer_learns(optimizer, model, sample):
    lr = {"adam": 1e-3, "sgd": 0.05, "adadelta": 1.0, "rmsprop": 1e-3}[optimizer]
    recipe = Recipe(epochs=2, batch=32, optimizer=optimizer, lr=lr)
    _, curves = jax.jit(lambda k: fit(k, model, recipe, clean_set(sample.train)))(jax.random.key(0))
    assert curves.acc[-1] > 0.6


def test_a_drop_of_the_learning_rate_to_zero_stops_learning(model, sample):
    small = clean_set(sample.train[:64])
    recipe = Recipe(epochs=3, batch=32, drops=((1, 0.0),))
    key = jax.random.key(0)
    state, _ = advance(key, begin(key, model, recipe), model, recipe, small, epochs=1)
    later, _ = advance(key, state, model, recipe, small, epochs=2)
    chex.assert_trees_all_equal(state.variables, later.variables)


def test_augment_is_applied_to_the_stamped_batch(model, sample):
    def black(key, x):
        return jnp.zeros_like(x)

    small = sample.train[:64]
    recipe = Recipe(epochs=1, batch=32, augment=black)
    key = jax.random.key(0)
    after, _ = fit(key, model, recipe, poisoned_set(key, small, BadNets(rate=1.0), sample.classes))
    before = model.init(jax.random.split(key)[0])
    chex.assert_trees_all_equal(
        after["params"]["dense_1"]["kernel"], before["params"]["dense_1"]["kernel"]
    )


def test_rows_that_do_not_exist_are_never_drawn(model, sample):
    small = sample.train[:64]
    plan = clean_set(small).plan
    broken = plan._replace(
        weight=jnp.where(jnp.arange(64) < 40, 1.0, jnp.nan), size=jnp.asarray(40)
    )
    variables, _ = fit(jax.random.key(0), model, RECIPE, TrainSet(small.image, broken))
    chex.assert_tree_all_finite(variables["params"])


def test_batched_equals_all_at_once():
    x = jnp.arange(23.0)
    np.testing.assert_array_equal(batched(lambda i: {"a": x[i] * 2}, 23, 5)["a"], x * 2)
    np.testing.assert_array_equal(batched(lambda i: x[i] * 2, 23, 100), x * 2)


@pytest.mark.parametrize("rows", [1, 64, 99, 101, 640, 1001])
@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_pieces_are_of_one_size_at_most_the_batch_and_none_is_almost_empty(rows, batch):
    sizes = []
    batched(lambda i: sizes.append(len(i)) or i, rows, batch)
    (size,) = {*sizes}
    assert size <= batch and -(-rows // size) * size - rows < -(-rows // size)


def test_predict_is_independent_of_the_batch(victim, sample):
    model, variables, _ = victim
    whole = predict(model, variables, sample.test.image, batch=500)
    chex.assert_trees_all_close(
        whole, predict(model, variables, sample.test.image, batch=64), atol=1e-5
    )


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(batch=0), "batch 0"),
        (Recipe(lr=-1.0), "lr -1.0"),
        (Recipe(lr=float("nan")), "lr nan"),
        (Recipe(epochs=-1), "epochs"),
        (Recipe(batch=8, optimizer="adamw"), "optimizer 'adamw'"),  # type: ignore[arg-type]
    ],
)
def test_bad_recipes(recipe, words):
    with pytest.raises(BadInput, match=words):
        recipe.check(100)
