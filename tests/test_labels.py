"""From logits to labels, in one place: NaN is no label, least of all label 0."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import channels, metrics, registry
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.base import judge
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.train.db_covidnet import combine, ensemble
from bdjax.sweep import labelled
from bdjax.train import attacked, evaluate
from bdjax.types import Split, Splits, Victim
from tests.planted import units

ROOT = Path(__file__).parents[1]
NAN, INF = np.nan, np.inf
MODEL, VARIABLES, CLEAN = units()
BROKEN = jax.tree.map(lambda leaf: jnp.full_like(leaf, NAN), VARIABLES)
ATTACK = BadNets(size=2)
DATA = Split(np.asarray(255 * CLEAN.image).astype(np.uint8), CLEAN.label)


@pytest.mark.parametrize(
    ("logits", "label"),
    [
        ([1.0, 3, 2], 1),
        ([3.0, 3, 2], 0),
        ([-INF, -5, -INF], 1),
        ([NAN, 3, 2], -1),
        ([1.0, 3, NAN], -1),
        ([NAN] * 3, -1),
        ([1.0, INF, 0], -1),
        ([-INF] * 3, -1),
    ],
)
@pytest.mark.parametrize("how", [lambda f: f, jax.jit])
def test_labels(logits, label, how):
    found = how(metrics.labels)(jnp.asarray([[logits] * 2]))
    assert found.dtype == jnp.int32 and found.tolist() == [[label] * 2]


def test_no_label_hits_nothing():
    aimed, label = jnp.array([-1, -1, 0]), jnp.array([0, 1, 1])
    predicted = jnp.full(3, -1)
    assert not metrics.hits(predicted, aimed).any()
    assert [float(v) for v in metrics.attack_success(predicted, aimed, label)] == [0, 0]


def _bare(tree: ast.AST) -> list[int]:
    """The lines where `argmax` runs over the last axis, or over the second one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("argmax", "top_k"):
            given = [*node.args, *(k.value for k in node.keywords if k.arg in ("axis", "dim"))]
            if {ast.unparse(value) for value in given} & {"-1", "1"}:
                found.append(node.lineno)
    return found


def test_argmax_over_labels_stands_in_one_place():
    assert _bare(ast.parse("x.argmax(-1)\njnp.argmax(x, axis=1)\nx.argmax()")) == [1, 2]
    files = [p for d in ("bdjax", "experiments", "benchmarks") for p in (ROOT / d).rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if path.name != "rivals.py"  # other people's methods, in PyTorch
        for line in _bare(ast.parse(path.read_text()))
    }
    assert len(files) > 100 and {name.partition(":")[0] for name in found} == {"bdjax/metrics.py"}


def test_a_broken_net_is_right_about_nothing_and_obeys_nobody():
    found = evaluate(jax.random.key(0), MODEL, BROKEN, DATA, ATTACK)
    assert (found["acc"], found["asr_all"], found["asr_nt"]) == (0, 0, 0)
    assert (attacked(jax.random.key(0), MODEL, BROKEN, DATA, ATTACK).predicted == -1).all()


def test_a_broken_net_has_no_accuracy_under_any_edit():
    order, site = jnp.arange(6), MODEL.sites[-1]
    curve = channels.curve(MODEL, BROKEN, site, order, DATA.image, DATA.label)
    np.testing.assert_array_equal(curve, 0)
    np.testing.assert_array_equal(
        channels.over_points(
            MODEL, BROKEN, site, channels.masked, jnp.ones((2, 6)), DATA.image, -1 + 0 * DATA.label
        ),
        NAN,
    )


@pytest.mark.parametrize("vote", ["majority", "mean", "median", "trimmed"])
def test_a_member_without_a_label_votes_for_nobody(vote):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), (5, 6)).astype(np.float32)
    broken = np.concatenate([p, np.full((2, 6, 4), NAN, np.float32)])
    found = combine(jnp.asarray(broken), vote)
    assert np.isfinite(found).all()
    if vote in ("majority", "mean"):
        np.testing.assert_array_equal(
            metrics.labels(found), metrics.labels(combine(jnp.asarray(p), vote))
        )
    assert (metrics.labels(combine(jnp.asarray(broken[5:]), vote)) == -1).all()
    voting = ensemble(MODEL, 2, vote)
    nets = jax.tree.map(lambda a, b: jnp.stack([a, b]), VARIABLES, BROKEN)
    out = jax.jit(voting.apply)(nets, CLEAN.image)
    np.testing.assert_array_equal(out.acts["votes"][:, 1], -1)
    np.testing.assert_array_equal(metrics.labels(out.logits), CLEAN.label)
    nets = jax.tree.map(lambda b: jnp.stack([b, b]), BROKEN)
    np.testing.assert_array_equal(metrics.labels(jax.jit(voting.apply)(nets, CLEAN.image)[0]), -1)


def test_a_broken_net_behind_a_filter_is_right_about_nothing_and_obeys_nobody():
    data, victim = Splits(DATA, DATA, DATA), Victim(MODEL, BROKEN, ATTACK)
    found = jax.jit(lambda key: judge(key, victim, Strip(n=4), data).metrics)(jax.random.key(0))
    assert (found["acc_test"], found["asr_all"], found["asr_nt"]) == (0, 0, 0)


def test_the_names_of_classes_go_with_labels_of_the_net(sample, victim):
    model, variables, _ = victim
    source = registry.make("dataset", "fashion-mnist-sample", train_size=2000, test_size=500)
    for how in ("net", "none"):
        assert labelled(source, model, variables, how).load().names == sample.names
    other = labelled(source, model._replace(classes=4), variables, "none").load()
    assert (other.classes, other.names) == (4, ())
