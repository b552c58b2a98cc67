"""MM-BD on nets whose margins are known, beside a plain NumPy form, and whether its p-value keeps
its word.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bdjax import audit_page, build
from bdjax.audits import leaders_of
from bdjax.defenses.invert.mm_bd import MmBd, gamma_fit, ranked, surprise
from bdjax.models.shamshiri import Ffnn
from bdjax.rule import decide, seed_of
from bdjax.types import BadInput, Model, Output, Split

KEY = jax.random.key(0)
NONE = Split(jnp.zeros((0, 4, 4, 1)), jnp.zeros(0, jnp.int32))
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 8)).astype(np.float32)


def linear(weights) -> Model:
    """Logits x·W."""
    model = build(Ffnn(hidden=(3,)), (4, 4, 1), weights.shape[1])
    return model._replace(
        apply=lambda v, x, **_: Output(x.reshape(len(x), -1) @ v["params"]["w"], {}, v)
    )


def plain(weights, start, lr, steps):
    """The margin of each label of a linear net, in NumPy."""
    found = []
    for label, x in enumerate(start):
        x = x.reshape(len(x), -1).astype(float)
        for step in range(steps + 1):
            inside = np.clip(x, 0, 1)
            logits = inside @ weights
            rest = np.where(np.arange(weights.shape[1]) == label, -np.inf, logits)
            if step == steps:
                found.append((logits[:, label] - rest.max(1)).max())
                break
            slope = weights[:, [label]].T - weights[:, rest.argmax(1)].T
            x = x + lr * slope * ((x >= 0) & (x <= 1))
    return np.array(found)


def test_margins_beside_a_plain_form():
    judge = MmBd(starts=3, steps=40, lr=0.02)
    keys = jax.random.split(KEY, 8)
    start = np.stack([jax.random.uniform(key, (3, 4, 4, 1)) for key in keys])
    found = judge.margins(KEY, linear(WEIGHTS), {"params": {"w": jnp.asarray(WEIGHTS)}})
    np.testing.assert_allclose(found, plain(WEIGHTS, start, 0.02, 40), rtol=1e-4)


def test_gamma_fit_is_that_of_scipy():
    for shape in (0.7, 4.0, 40.0):
        x = RNG.gamma(shape, 3.0, 60).astype(np.float32)
        told = stats.gamma.fit(x[:50].astype(float), floc=0)
        found = gamma_fit(jnp.asarray(x), jnp.arange(60) < 50)
        np.testing.assert_allclose(found, (told[0], told[2]), rtol=2e-3)


def test_surprise_by_scipy():
    r = np.array([3.0, 4.0, 2.5, 3.5, 20.0, -1.0, 3.1, 2.0], np.float32)
    a, _, scale = stats.gamma.fit([3.0, 4.0, 2.5, 3.5, 3.1, 2.0], floc=0)
    p, *_ = surprise(jnp.asarray(r))
    wanted = -np.expm1(8 * np.log1p(-stats.gamma.sf(20.0, a, scale=scale)))
    assert float(p) == pytest.approx(wanted, rel=0.05)
    assert float(surprise(jnp.asarray([1.0, 2.0, -1.0, -1.0]))[0]) == 1.0  # too few to tell
    assert float(surprise(jnp.full(6, -2.0))[0]) == 1.0
    assert float(surprise(jnp.full(6, -jnp.inf))[0]) == 1.0


def test_a_backdoored_label_is_flagged_alone():
    weights = np.array(WEIGHTS)
    weights[:4, 5] += 12.0
    planted, clean = (
        MmBd(starts=4, steps=60)(KEY, linear(w), {"params": {"w": jnp.asarray(w)}}, NONE)
        for w in (weights, WEIGHTS)
    )
    assert planted.flagged.tolist() == [k == 5 for k in range(8)] and float(planted.p_value) < 0.01
    assert not clean.infected and float(clean.p_value) > 0.05


def test_the_p_value_keeps_its_word_where_the_authors_number_does_not():
    r = RNG.gamma(4.0, 1.0, (300, 10)).astype(np.float32)

    items = jax.random.split(KEY, 300), r
    theirs, ours = jax.lax.map(lambda item: ranked(*item), items, batch_size=10)
    assert (np.asarray(theirs) <= 0.05).mean() > 0.18
    assert (np.asarray(ours) <= 0.05).mean() < 0.09


def test_it_can_ask_for_a_closer_look_but_not_convict():
    arrays = {"margins": np.array([1.0, 9.0, 2.0]), "flagged": np.array([False, True, False]),
              "p_value": 0.001}  # fmt: skip
    said = seed_of(arrays)
    assert said.labels == (1,)
    found = decide({"mm-bd": [said]}, 0.05, True, ("a", "b", "c"))
    assert (found.word, found.label) == ("undecided", 1)
    assert "accuses the net of 1 (b)" in found.reason


def test_a_judge_without_triggers_has_no_column_of_sizes():
    said = {"label": 1, "name": "b", "flagged": True, "norm": None, "moved": None}
    sized = {"label": 2, "name": "c", "flagged": False, "norm": 3.0, "moved": 0.5}
    about = {"judges": [{"judge": "mm-bd", "labels": [said, said | {"norm": math.nan}]},
                        {"judge": "neural-cleanse", "labels": [sized]}]}  # fmt: skip
    (row,) = audit_page._labels(about)
    assert row["by"] == {"neural-cleanse": sized}


def test_the_widest_margins_are_searched_beside_the_smallest_patches():
    steps = {"screen-0": {"order": np.arange(20)}, "mm-bd-0": {"margins": np.arange(20.0)}}
    assert leaders_of(steps) == [*range(8), 19, 18]


def test_few_classes():
    with pytest.raises(BadInput, match="needs 4 classes or more, not 3"):
        MmBd()(KEY, build(Ffnn(), (4, 4, 1), 3), {"params": {}}, NONE)
