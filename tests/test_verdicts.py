"""Verdicts over seeds, p-values of the smallest norm, searches for some labels, and AUROCs that say
what they measure.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from scipy import stats

from bdjax import metrics, registry, report, study, sweep
from bdjax.cli import main
from bdjax.defenses import base
from bdjax.defenses.base import Judge, folded
from bdjax.defenses.invert.deep_inspect import DeepInspect
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.reversed import Reversed
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.registry import pytree
from bdjax.store import Store
from bdjax.types import BadInput, Verdict, word

KEY = jax.random.key(0)
JUDGES = [e for e in registry.entries("defense") if e.cls.stage in ("invert", "models")]
QUICK = NeuralCleanse(steps=12, batches=3, batch=8, patience=2)


@pytree
class Dice(Judge):
    """Draws its norms; says that a label below −1 is a target."""

    def once(self, key, model, variables, clean):
        first, _ = jax.random.split(key)  # the key is used up, as a search does
        norms = jax.random.normal(first, (5,))
        found = {"norms": norms, "mask": norms.sum()}
        return Verdict(-norms.min(), (norms < -1).any(), norms < -1, found, jnp.exp(norms.min()))


NET, VARIABLES, CLEAN = planted.units()


def rolled(seeds, key=KEY):
    with jax.debug_key_reuse(True):
        return jax.jit(lambda k: Dice(seeds=seeds)(k, NET, VARIABLES, CLEAN))(key)


def test_seeds_fold_into_one_verdict_and_the_first_draws_what_a_single_one_does():
    one, three, five = rolled(1), rolled(3), rolled(5)
    each = three.info["seeds"]
    assert each["index"][0] == one.index and each["flagged"][0].tolist() == one.flagged.tolist()
    np.testing.assert_array_equal(five.info["seeds"]["norms"][:3], each["norms"])
    assert len(set(np.asarray(five.info["seeds"]["index"]).tolist())) == 5, "other draws"
    assert float(three.index) == float(np.median(each["index"]))
    middle = np.argsort(each["index"])[1]
    np.testing.assert_array_equal(three.info["norms"], each["norms"][middle])
    assert three.info["mask"] == pytest.approx(float(three.info["norms"].sum()), rel=1e-5), (
        "norm and picture of one seed"
    )
    assert "seeds" not in one.info


@pytest.mark.parametrize(
    ("flags", "said", "flagged"),
    [
        (([1, 0], [1, 1]), "infected", [True, False]),
        (([1, 0], [0, 1]), "infected", [False, False]),
        (([1, 0], [0, 0]), "undecided", [False, False]),
        (([0, 0], [0, 0]), "no sign", [False, False]),
    ],
)
def test_three_words(flags, said, flagged):
    flags = jnp.asarray(flags, bool)
    found = folded(Verdict(jnp.arange(2.0), flags.any(1), flags, {}, jnp.full(2, jnp.nan)))
    assert found.word == said and found.flagged.tolist() == flagged
    assert word(float(found.infected), float(found.undecided)) == said, "as rows hold it"
    assert bool(found.infected) == (said == "infected") and np.isnan(found.p_value)


def test_p_values_of_seeds_are_combined_validly_however_they_depend():
    """Equal ones, and the worst case for the median of three: of three valid p-values two lie below
    α at the same time as often as they can.
    """
    assert metrics.combined_p(jnp.asarray([0.2])) == pytest.approx(0.2)
    assert metrics.combined_p(jnp.asarray([0.2, 0.01, 0.03])) == pytest.approx(0.045)
    assert metrics.combined_p(jnp.asarray([0.9, 0.8, 0.01])) == 1
    assert metrics.combined_p(jnp.asarray([0.02, jnp.nan, 0.02])) == pytest.approx(0.03)
    assert np.isnan(metrics.combined_p(jnp.full(3, jnp.nan)))
    rng, n, low = np.random.default_rng(0), 20_000, 0.05
    # With chance 1.5·low two of the three, drawn evenly, lie below low: each does with chance low.
    both = rng.random(n) < 1.5 * low
    p = np.where(both[:, None], rng.random((n, 3)) * low, low + rng.random((n, 3)) * (1 - low))
    p[np.arange(n), rng.integers(0, 3, n)] = low + rng.random(n) * (1 - low)
    found = jax.vmap(metrics.combined_p)(jnp.asarray(p, jnp.float32))
    for alpha in (0.03, 0.075, 0.2):
        at_most = stats.binom.ppf(0.999, n, alpha)
        assert (np.asarray(found) <= alpha).sum() <= at_most
    assert (np.asarray(found) <= 1.5 * low).mean() > low, "less than S/k times would not do"


def by_hand(norms, able):
    """The p-value in NumPy, float64."""
    x = np.log(norms[np.isfinite(norms)])
    j = (
        np.flatnonzero(np.isfinite(norms))
        .tolist()
        .index(np.where(able & np.isfinite(norms), norms, np.inf).argmin())
    )
    rest = np.delete(x, j)
    t = (x[j] - rest.mean()) / (rest.std(ddof=1) * np.sqrt(1 + 1 / len(rest)))
    return min(1.0, len(x) * stats.t.cdf(t, len(rest) - 1))


P = jax.jit(jax.vmap(metrics.smallest_p))


@pytest.mark.parametrize("labels", [4, 5, 10, 16, 43])
def test_false_alarms_of_the_p_value_are_what_it_says(labels):
    """Under its null: independent log-normal norms, of any scale."""
    n, rng = 8_000, np.random.default_rng(labels)
    norms = np.exp(rng.normal(3, 0.4, (n, labels))).astype(np.float32)
    p = np.asarray(P(norms, np.ones((n, labels), bool)))
    for alpha in (0.01, 0.05):
        low, high = stats.binom.interval(0.999, n, alpha)
        assert low <= (p <= alpha).sum() <= high, alpha
    some = [by_hand(row, np.ones(labels, bool)) for row in norms[:40].astype(float)]
    np.testing.assert_allclose(p[:40], some, rtol=2e-3)
    np.testing.assert_allclose(p, P(norms * 100, np.ones((n, labels), bool)), atol=2e-3)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_labels_whose_triggers_fail_do_not_raise_false_alarms(share):
    """The large norms fail, and stop somewhere above."""
    n, rng = 8_000, np.random.default_rng(1)
    x = rng.normal(3, 0.4, (n, 10))
    able = x < stats.norm.ppf(1 - share, 3, 0.4)
    p = np.asarray(P(np.exp(x + ~able).astype(np.float32), able))
    assert (p <= 0.05).mean() < 0.05


def test_p_values_at_the_edges():
    one = jax.jit(metrics.smallest_p)

    def p(norms, able=None, length=12):
        """One program for most: infinite norms, which count nowhere, fill up to `length`."""
        spare = length - len(norms)
        norms = np.asarray([*norms, *[np.inf] * spare], np.float32)
        able = np.ones(length - spare, bool) if able is None else able
        return float(one(norms, np.pad(able, (0, spare), constant_values=True)))

    clear = [40, 50, 60, 45, 55, 48, 52, 1]
    assert p(clear) < 1e-3
    assert p(clear, np.arange(8) < 7) > 0.5, "a trigger that fails convicts nobody"
    assert p(clear, np.zeros(8, bool)) == 1
    assert p(clear, length=8) == pytest.approx(p(clear)), "infinite norms count nowhere"
    assert np.isnan(p(clear[-3:]))
    assert p([7.0] * 9) == 1 and p([0.0] * 9) == 1
    assert p([*[7.0] * 8, 6.0]) < 1e-6 and p([*[7.0] * 8, 8.0]) == 1, "small, not large"
    assert p([*clear[:-1], 0.0]) < 1e-4


@pytest.mark.parametrize("entry", JUDGES, ids=lambda entry: entry.name)
def test_every_judge_of_models_has_seeds_and_a_p_value(entry, sample):
    """Traced: one program for all seeds, with the verdicts of each beside the folded one."""
    assert issubclass(entry.cls, Judge) and entry.cls().seeds == 1
    model = build(Cnn("VALID", hidden=16, features=(4, 4)), sample.shape, sample.classes)
    cpu = getattr(entry.cls, "presets", {}).get("cpu", {})
    judge, single = entry.cls(**{**cpu, "seeds": 3}), entry.cls(**cpu)
    variables = jax.eval_shape(model.init, KEY)
    found = jax.eval_shape(lambda k, v: judge(k, model, v, sample.clean), KEY, variables)
    one = jax.eval_shape(lambda k, v: single(k, model, v, sample.clean), KEY, variables)
    assert found.p_value.shape == one.p_value.shape == ()
    seeds = found.info["seeds"]
    assert seeds["index"].shape == seeds["infected"].shape == seeds["p_value"].shape == (3,)
    assert seeds["flagged"].shape == (3, sample.classes)
    rest = {name: leaf.shape for name, leaf in found.info.items() if name != "seeds"}
    assert rest == {name: leaf.shape for name, leaf in one.info.items()}


@pytest.mark.parametrize("entry", JUDGES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("seeds", [0, -1, 1.5, True])
def test_a_number_of_seeds_that_is_none_is_refused(entry, seeds, sample):
    model = build(Cnn("VALID", hidden=16, features=(4, 4)), sample.shape, sample.classes)
    with pytest.raises(BadInput, match="seeds"):
        entry.cls(seeds=seeds).check(model, sample.clean)


# --- Searches for some labels ---


def test_a_search_for_some_labels_finds_what_the_whole_one_finds_for_them(victim, sample):
    model, variables, attack = victim
    some = (int(attack.target), 1, 5, 8)

    def run(nc):
        return jax.jit(lambda k: nc(k, model, variables, sample.clean))(KEY)

    every = run(QUICK)
    few = run(NeuralCleanse(**{**vars(QUICK), "labels": some}))
    inside = np.isin(np.arange(10), some)
    np.testing.assert_allclose(
        few.info["norms"][inside], every.info["norms"][inside], rtol=1e-3, atol=1e-3
    )
    for name in ("norms", "index", "index_log", "success", "cost"):
        assert np.isnan(few.info[name][~inside]).all() and np.isfinite(few.info[name][inside]).all()
    assert not few.flagged[~inside].any() and not few.info["qualified"][~inside].any()
    assert not few.info["mask"][~inside].any() and few.info["mask"].shape == (10, 28, 28, 1)
    alone = QUICK.judge(few.info["norms"][inside], few.info["qualified"][inside])
    assert few.index == alone.index and few.p_value == alone.p_value, "nothing else is compared"
    chosen = Reversed.of(few, "smallest").suspect
    assert chosen.sum() == 1 and inside[int(chosen.argmax())]

    ranked = jax.jit(lambda k: QUICK.rank(k, model, variables, sample.clean))(KEY)
    assert ranked.shape == (10,) and int(ranked.argmin()) == attack.target


def test_deep_inspect_for_some_labels(victim, sample):
    model, variables, _ = victim
    judge = DeepInspect(
        steps=3, batch=8, images=4, inversion_steps=2, hidden=8, labels=(2, 3, 7, 9)
    )
    found = jax.jit(lambda k: judge(k, model, variables, sample.clean))(KEY)
    inside = np.isin(np.arange(10), judge.labels)
    assert np.isfinite(found.info["norms"][inside]).all()
    assert np.isnan(found.info["norms"][~inside]).all() and np.isfinite(found.p_value)
    assert not found.info["perturbation"][~inside].any() and found.info["surrogate"].all()


@pytest.mark.parametrize("cls", [e.cls for e in JUDGES if hasattr(e.cls(), "labels")])
@pytest.mark.parametrize(
    "labels", [(), (1,), (1, 2), (1, 1, 2), (1, 2, 10), (-1, 2, 3), (1.5, 2, 3)]
)
def test_labels_that_cannot_be_compared_are_refused(cls, labels, sample, victim):
    with pytest.raises(BadInput, match="labels"):
        cls(labels=labels).check(victim[0], sample.clean)


@pytest.mark.parametrize("words", [("1", "x"), ("1", "1.5", "2"), ("-1", "2", "3"), ("2²", "1")])
def test_labels_on_the_command_line(words, tmp_path, capsys):
    for entry in JUDGES:
        if hasattr(entry.cls(), "labels"):
            flags = ["--defense", entry.name, "--defense.labels", *words]
            with pytest.raises(SystemExit) as stop:
                main(["defend", str(tmp_path), *flags])
            out, err = capsys.readouterr()
            assert stop.value.code == 2 and not out
            assert err.count("\n") == 1 and "labels" in err and len(err) < 200


def test_a_first_ranking_is_printed_where_there_are_many_labels(
    victim, sample, monkeypatch, tmp_path, capsys
):
    model, variables, attack = victim
    cell = study.Cell(
        "", "", registry.make("dataset", "fashion-mnist-sample", train_size=2000, test_size=500),
        registry.make("model", "ffnn", hidden=(64,)), sweep.Recipe(epochs=5, batch=32), attack,
        NeuralCleanse(steps=1, batches=4, batch=16, seeds=2),
    )  # fmt: skip
    monkeypatch.setattr(sweep, "RANKED", 10)
    runner = sweep.Runner(Store(tmp_path), "defend", quiet=False)
    row, _ = runner.defend(cell, model, variables)
    lines = capsys.readouterr().err.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("first ranking of 10 labels")]
    (search,) = [i for i, line in enumerate(lines) if line.startswith("neural-cleanse on")]
    assert first < search and f": {int(attack.target)} (Dress) (" in lines[first]
    assert row["labels"] == {"flagged": [], "target": ["3 (Dress)"]}

    assert row["verdict"] == "no sign" and row["metrics"]["undecided"] == 0
    assert row["metrics"]["p_value"] == 1, "no trigger works after one step"
    kept = runner.store.arrays(row["run"])
    assert kept["seeds.index"].shape == (2,) and kept["seeds.norms"].shape == (2, 10)


# --- What tables show ---


def judged(seed, **metrics):
    return {
        "run": f"r{seed}", "experiment": "e", "table": "T", "row": "it", "seed": seed,
        "metrics": metrics, "seconds": {"compile": 0.0, "run": 1.0}, "reported": {},
    }  # fmt: skip


def test_tables_pages_and_progress_show_the_word():
    rows = [
        judged(0, infected=1.0, undecided=0.0, anomaly_index=4.0, p_value=0.01),
        judged(1, infected=0.0, undecided=1.0, anomaly_index=2.1, p_value=0.2),
        judged(2, infected=1.0, undecided=0.0, anomaly_index=3.0, p_value=0.02),
    ]
    (line,) = report.aggregate(rows)[0]["rows"]
    assert line["verdict"] == "2 infected, 1 undecided"
    section = report.Section("t", rows)
    for text in (report.markdown([section]), report.page([section], "t")):
        assert "2 infected, 1 undecided" in text and "p value" in text
    assert "undecided" in report.line(rows[1])
    rows[0]["labels"] = {"flagged": ["3 (Dress)", "8 (<Bag>)"], "target": ["3 (Dress)"]}
    (line,) = report.aggregate(rows)[0]["rows"]
    assert line["notes"] == ["flags 3 (Dress) and 8 (<Bag>), target 3 (Dress)"]
    assert "8 (&lt;Bag&gt;)" in report.page([report.Section("t", rows)], "t")
    old = judged(3, infected=1.0, anomaly_index=4.0)  # a row of 0.1: one seed
    assert report.aggregate([old])[0]["rows"][0]["verdict"] == "infected"
    unjudged = judged(4, acc_test=0.9)
    assert report.aggregate([unjudged])[0]["rows"][0]["verdict"] is None


def test_every_auroc_says_of_what(tmp_path):
    """Rows of 0.1 had one name for all of them."""
    rows = [
        {**judged(i, auroc=0.5), "defense": name}
        for i, name in enumerate(("mntd", "activation-clustering", "spectral-signatures", "strip"))
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [next(iter(row["metrics"])) for row in Store(tmp_path).rows()]
    assert names == ["shadow_auroc", "auroc_pooled", "auroc_pooled", "auroc"]
    hints = [registry.declared(name).hint for name in (*dict.fromkeys(names), "auroc_within")]
    assert all(hints) and len(set(hints)) == 4


def test_auroc_within_owes_nothing_to_scores_that_differ_between_labels():
    """Label 1 scores high as a whole and holds the poison, which scores lowest there."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 100)
    poison = (label == 1) & (np.arange(300) % 100 < 10)
    score = label % 2 * 5 + rng.random(300) - 0.5 * poison
    args = [jnp.asarray(a) for a in (score.astype(np.float32), label, ~poison, poison)]
    pooled = metrics.auroc(args[0], args[0], args[2], args[3])
    mine = label == 1
    pairs = score[poison][:, None] > score[mine & ~poison][None]
    assert pooled > 0.7
    assert float(base._within(*args, 3)) == pytest.approx(pairs.mean(), abs=1e-6)
    assert pairs.mean() < 0.5
    assert np.isnan(base._within(*args[:3], jnp.zeros(300, bool), 3))
