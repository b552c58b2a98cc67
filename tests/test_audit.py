"""The audit of a net: its one rule, what it keeps, how it ends, what it shows."""

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import TARGET, Units, command, units

from bdjax import audits, metrics, references, schema
from bdjax.audits import audit, read, triggers
from bdjax.checkpoints import save_model
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts import nulls
from bdjax.defenses.parts.offers import Offered, moves, offered, pixels
from bdjax.defenses.parts.screen import Round, screened
from bdjax.imports import Loaded
from bdjax.models.layers import build
from bdjax.rule import MOVES, Seed, decide
from bdjax.train import predict, unit
from bdjax.types import BadInput, Split, Verdict

NC = NeuralCleanse(steps=6, batches=4, batch=8, patience=1, init_cost=0.05)

# --- The rule ---

GUILTY = Seed(0.001, (3,), {3: 0.95})
CLEAR = Seed(0.6, (1,), {1: 0.99})
RULES = {
    "one judge, one seed": ({"a": [GUILTY]}, True, "infected", 3),
    "though the search of another is not complete": ({"a": [GUILTY]}, False, "infected", 3),
    "another judge that sees nothing": ({"a": [GUILTY], "b": [CLEAR]}, True, "infected", 3),
    "corrected for judges": ({"a": [Seed(0.03, (3,), {3: 1.0})], "b": [CLEAR]}, True, "no sign",
                             None),
    "not corrected for those without a p": (
        {"a": [Seed(0.03, (3,), {3: 1.0})], "b": [Seed(math.nan, (1,), {1: 1.0})]}, True,
        "infected", 3),
    "a weak trigger": ({"a": [Seed(0.001, (3,), {3: 0.89})]}, True, "undecided", 3),
    "the least trigger": ({"a": [Seed(0.001, (3,), {3: MOVES})]}, True, "infected", 3),
    "no trigger": ({"a": [Seed(0.001, (3,))]}, True, "undecided", 3),
    "no label": ({"a": [Seed(0.001)]}, True, "undecided", None),
    "a trigger for another label": ({"a": [Seed(0.001, (3,), {4: 1.0})]}, True, "undecided", 3),
    "a trigger of a judge without a p": (
        {"a": [Seed(0.001, (3,))], "b": [Seed(math.nan, (3,), {3: 1.0})]}, True, "undecided", 3),
    "seeds that agree": ({"a": [GUILTY, GUILTY, GUILTY]}, True, "infected", 3),
    "two of three seeds": ({"a": [GUILTY, GUILTY, CLEAR]}, True, "infected", 3),
    "one of three seeds": ({"a": [GUILTY, CLEAR, CLEAR]}, True, "undecided", None),
    "one of two seeds": ({"a": [GUILTY, CLEAR]}, True, "undecided", None),
    "seeds with other labels": (
        {"a": [GUILTY, Seed(0.001, (2,), {2: 1.0})]}, True, "undecided", None),
    "seeds with one label in common": (
        {"a": [Seed(0.001, (3, 2), {3: 0.5, 2: 0.95}), Seed(0.001, (2,), {2: 0.92})]}, True,
        "infected", 2),
    "two judges, one label": ({"a": [GUILTY], "b": [Seed(0.01, (3,))]}, True, "infected", 3),
    "two judges, two labels": (
        {"a": [GUILTY], "b": [Seed(0.01, (5,), {5: 1.0})]}, True, "undecided", None),
    "a judge that accuses by Holm's step alone, another label": (
        {"a": [GUILTY], "b": [Seed(0.04, (5,), {5: 1.0})]}, True, "undecided", None),
    "nothing, all searched": ({"a": [CLEAR]}, True, "no sign", None),
    "nothing, not all searched": ({"a": [CLEAR]}, False, "undecided", None),
    "no judge": ({}, False, "undecided", None),
    "no judge with a p": ({"a": [Seed(math.nan, (3,), {3: 1.0})]}, True, "undecided", None),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_rule_says_what_it_says(name):
    said, complete, word, label = RULES[name]
    found = decide(said, 0.05, complete)
    assert (found.word, found.label) == (word, label), found.reason
    assert found.reason


def test_the_rule_holds_wherever_seeds_and_judges_stand():
    """Every combination of two judges of two seeds: what each word must mean."""
    seeds = [
        Seed(p, labels, {k: share for k in labels for share in shares})
        for p, labels, shares in itertools.product(
            (0.0001, 0.03, 0.4, math.nan), ((), (1,), (2,)), ((), (0.5,), (0.95,))
        )
        if labels or not shares
    ]
    seen = set()
    for one, two, other in itertools.product(seeds, seeds, seeds[::3]):
        said = {"a": [one, two], "b": [other]}
        for complete in (True, False):
            found = decide(said, 0.05, complete)
            seen.add(found.word)
            p = {
                name: float(metrics.combined_p(jnp.asarray([s.p_value for s in some])))
                if len(some) > 1 else some[0].p_value
                for name, some in said.items()
            } if found.word != "undecided" else {}  # fmt: skip
            known = [v for v in p.values() if not math.isnan(v)]
            if found.word == "infected":
                assert min(known) * len(known) <= 0.05 + 1e-9
                accusing = [s for s in said[found.judge] if found.label in s.labels]
                assert any(s.moved.get(found.label, 0) >= MOVES for s in accusing)
            if found.word == "no sign":
                assert complete and min(known) * len(known) > 0.05 - 1e-9
            # A judge without a p-value changes no word.
            more = decide({**said, "c": [Seed(math.nan, (7,), {7: 1.0})]}, 0.05, complete)
            assert more.word == found.word
    assert seen == {"infected", "undecided", "no sign"}


def test_a_lower_alpha_never_accuses_more():
    said = {"a": [Seed(0.004, (3,), {3: 1.0})] * 4, "b": [CLEAR]}
    words = [decide(said, alpha, True).word for alpha in (0.0001, 0.001, 0.01, 0.05, 0.2)]
    assert words == ["no sign", "no sign", "undecided", "infected", "infected"]


# --- Nulls ---


def test_students_distribution_is_scipys():
    from scipy import stats

    for t, freedom in ((-4.2, 3), (-1.0, 7), (0.0, 5), (1.7, 20)):
        assert float(nulls.student(t, freedom)) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-4)


def test_labels_that_are_easy_by_nature_are_told_by_clean_nets():
    draw = np.random.default_rng(0)
    effect = np.array([-1.5, *np.zeros(9)])  # label 0 is small on every net

    def net():
        return np.exp(draw.normal() + effect + 0.1 * draw.normal(size=10))

    null = nulls.pooled(np.stack([net() for _ in range(6)]))
    able = np.ones(10, bool)
    clean = [float(nulls.against_clean(net(), able, null)[0]) for _ in range(200)]
    assert np.mean(np.array(clean) <= 0.05) < 0.1
    sizes = net()
    sizes[4] *= 0.4
    p, label = nulls.against_clean(sizes, able, null)
    assert float(p) < 1e-4 and int(label) == 4
    # by itself the net's smallest label is an outlier
    assert float(metrics.smallest_p(jnp.asarray(net(), jnp.float32), jnp.asarray(able))) < 0.05


def test_the_smallest_of_many_is_told_from_those_that_come_next():
    from scipy import stats

    draw = np.random.default_rng(0)

    def below(some):
        """The share of clean nets of 1,000 labels that are accused at .05, and how even p is."""
        p = [float(nulls.by_spacings(np.sort(np.exp(some()))[:12])) for _ in range(300)]
        return np.mean(np.array(p) <= 0.05), stats.kstest(p, "uniform").statistic

    share, gap = below(lambda: -draw.standard_gamma(1.0, 1000))
    assert share < 0.09 and gap < 0.1  # exact where the tail is exponential
    assert below(lambda: draw.normal(size=1000))[0] < 0.09  # and no more where it is lighter
    sizes = np.sort(np.exp(draw.normal(size=1000)))[:12]
    assert float(nulls.by_spacings(np.append(sizes[1:], sizes[1] / 20))) < 0.01


def test_the_rank_among_clean_nets():
    assert float(nulls.ranked(3.0, np.array([1.0, 2.0, 2.5]))) == 0.25
    assert float(nulls.ranked(0.0, np.array([1.0, 2.0]))) == 1.0


# --- What judges offer ---


def test_what_is_offered_is_what_is_shown():
    model, variables, data = units()
    corner = jnp.zeros((8, 8, 1)).at[7, 7].set(1.0)
    mask, pattern = jnp.stack([corner] * 4), jnp.ones((4, 8, 8, 1))
    verdict = Verdict(jnp.zeros(()), jnp.asarray(False), jnp.zeros(4, bool),
                      {"mask": mask, "pattern": pattern})  # fmt: skip
    found = offered(jax.random.key(0), NC, model, variables, data, verdict)
    share = np.asarray(moves(model, variables, data, found))
    np.testing.assert_allclose(share, [0, 0, 1, 0])  # unit 5 lifts label 2 alone
    assert pixels(mask).tolist() == [1] * 4
    added = verdict._replace(info={"perturbation": -0.5 * mask})
    found = offered(jax.random.key(0), NC, model, variables, data, added)
    assert found.mask.max() == 0.5 and found.pattern.max() == 0  # towards black
    none = verdict._replace(info={})
    assert offered(jax.random.key(0), NC, model, variables, data, none) is None


def test_an_image_of_the_label_is_not_moved_there():
    model, variables, data = units()
    same = data._replace(label=jnp.full(40, TARGET))
    found = Offered(jnp.asarray([TARGET]), jnp.ones((1, 8, 8, 1)), jnp.ones((1, 8, 8, 1)),
                    jnp.ones(1, bool))  # fmt: skip
    assert np.isnan(np.asarray(moves(model, variables, same, found)))


# --- Many labels ---


def many(classes=40, target=17):
    """A linear net of many labels, one of which three corner pixels reach."""
    draw = np.random.default_rng(0)
    kernel = 0.1 * draw.normal(size=(64, 6)).astype(np.float32)
    kernel[:, 5] = 0
    kernel[[7, 56, 63], 5] = 40
    head = draw.normal(size=(6, classes)).astype(np.float32)
    head[5] = 0
    head /= np.linalg.norm(head, axis=0)  # no label is easier than others by nature
    head[5, target] = 3
    params = {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(6).at[5].set(-1.0)},
              "logits": {"kernel": jnp.asarray(head), "bias": jnp.zeros(classes)}}  # fmt: skip
    image = 0.3 * draw.random((60, 8, 8, 1)).astype(np.float32)
    image[:, [0, 7, 7], [7, 0, 7]] = 0
    return build(Units(), (8, 8, 1), classes), {"params": params}, jnp.asarray(image)


def test_screening_brings_the_backdoors_label_forward():
    model, variables, image = many()
    rounds = (Round(40, 10, 8), Round(10, 20, 8), Round(4, 20, 8))
    found = jax.jit(lambda v: screened(jax.random.key(0), model, v, image, rounds))(variables)
    assert sorted(found.order.tolist()) == list(range(40))
    assert int(found.order[0]) == 17
    assert np.isfinite(found.cost).all()


# --- The door ---


@pytest.fixture
def planted(tmp_path):
    """A net of 40 labels with a backdoor for 17, as it is loaded, and its images on disk, which
    have other classes than the net.
    """
    model, variables, image = many()
    file = tmp_path / "images.npz"
    np.savez(file, image=np.rint(255 * np.asarray(image)).astype(np.uint8),
             label=np.arange(60) % 4)  # fmt: skip
    return Loaded(Units(), model, variables, {"origin": None}), file


def run(planted, out, *, minutes=10.0, **options):
    net, file = planted
    options = {"tried": [NC], "quiet": True} | options
    return audit(net, file, minutes=minutes, out=out, **options)


def test_a_backdoor_is_found_kept_and_shown(planted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    found = run(planted, out)
    assert (found.word, found.about["verdict"]["label"]) == ("infected", 17), found.reason
    assert not found.about["data"]["labelled"] and found.about["data"]["accuracy"] is None
    assert [len(judge["seeds"]) for judge in found.about["judges"]] == [3]
    kept = read(out)
    assert kept.about["verdict"] == schema.read_json(out / "audit.json", "audit")["verdict"]
    assert json.loads((out / "audit.json").read_text())["format"] == 1
    one = triggers(out)[0]
    assert one.label == 17 and one.accused and one.moved >= MOVES
    assert one.norm < 5 and 3 <= one.pixels <= 64
    assert one.mask.shape == (8, 8, 1) and one.pattern.shape == (8, 8, 1)
    assert not any(other.accused for other in triggers(kept)[1:])
    page = (out / "index.html").read_text()
    assert "Infected: 17" in page and "not measured" in page and page.count("<figure") >= 4
    for outside in ("http://", "https://", 'src="/', "<script src"):
        assert outside not in page
    # What it says to do is done with what was given, wherever that lies.
    assert f"repair NET --dataset {planted[1]} --audit {out} --out repaired" in page

    def again(self, *args):
        raise AssertionError("computed once more")

    monkeypatch.setattr(audits.Program, "__call__", again)
    more = run(planted, out)
    assert more.about["judges"] == found.about["judges"] and more.word == "infected"


def test_the_end_of_the_time_leaves_a_page_and_the_same_call_goes_on(planted, tmp_path):
    out = tmp_path / "out"
    found = run(planted, out, minutes=0.0)
    assert found.word == "undecided" and "time ran out" in found.reason
    (left,) = found.about["not_tried"]
    assert left["judge"] == "neural-cleanse" and "0 s were left" in left["reason"]
    page = (out / "index.html").read_text()
    assert "Not tried" in page and "--audit" not in page  # it has no trigger to give
    assert not any(f"{name}</h3>" in page for name in ("Labels", "Pictures"))
    assert triggers(found) == []
    assert run(planted, out).word == "infected"


def test_ctrl_c_leaves_the_page_of_what_is_there(planted, tmp_path, monkeypatch):
    out = tmp_path / "out"

    class Stopped(audits.Stop):
        """Asked to stop while the first step runs."""

    step = audits.Work.step

    def first(self, name, *args, **options):
        done = step(self, name, *args, **options)
        Stopped.now.asked = signal.SIGINT
        return done

    def entered(self):
        Stopped.now = self
        self.before = {}
        return self

    monkeypatch.setattr(Stopped, "__enter__", entered)
    monkeypatch.setattr(audits, "Stop", Stopped)
    monkeypatch.setattr(audits.Work, "step", first)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(planted, out)
    assert "the same command goes on" in stop.value.__notes__[0]
    assert "Infected" in (out / "index.html").read_text()
    assert [path.name for path in (out / "steps").glob("neural*")] == ["neural-cleanse-0.npz"]
    monkeypatch.undo()
    assert len(run(planted, out).about["judges"][0]["seeds"]) == 3


def test_a_folder_is_that_of_one_audit(planted, tmp_path):
    run(planted, tmp_path / "out", minutes=0.0)
    net, file = planted
    other = net._replace(variables=jax.tree.map(lambda v: v + 1, net.variables))
    with pytest.raises(BadInput, match="another net"):
        run((other, file), tmp_path / "out")
    with pytest.raises(BadInput, match="no folder of an audit"):
        read(tmp_path)


def test_what_nobody_verified_is_marked_everywhere(planted, tmp_path):
    from bdjax.foreign.origin import Origin

    net, file = planted
    net = net._replace(about={"origin": Origin(format="onnx")})
    found = run((net, file), tmp_path / "out", minutes=0.0)
    why = "nothing was compared with the original"
    assert why in found.about["net"]["unverified"]
    assert why in next(audits.lines(found))
    assert why in (tmp_path / "out" / "index.html").read_text()


def test_classes_in_another_order_are_told_before_anything_else(planted, tmp_path, capsys):
    net, file = planted
    image = np.load(file)["image"]
    said = np.asarray(metrics.labels(predict(net.model, net.variables, unit(image))))
    for shift, wrong in ((0, False), (1, True)):
        label = np.concatenate([(said + shift) % 40, np.arange(40)])
        np.savez(file, image=np.concatenate([image, image[:40]]), label=label)
        found = run((net, file), tmp_path / f"out{shift}", minutes=0.0)
        assert found.about["data"]["labelled"]
        assert ("which is chance" in capsys.readouterr().err) is wrong
        assert ("which is chance" in str(found.about["net"]["unverified"])) is wrong


def test_names_of_others_are_text_on_the_page(planted, tmp_path):
    net, file = planted
    arrays = dict(np.load(file))
    names = np.array([f"<b>&{k}" for k in range(40)])
    image = np.concatenate([arrays["image"]] * 4)
    np.savez(file, image=image, label=np.arange(240) % 40, names=names)
    found = run((net, file), tmp_path / "out", tried=[dataclasses.replace(NC, seeds=1)])
    assert found.about["verdict"]["name"] == "17 (<b>&17)"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<b>&17" not in page and "&lt;b&gt;&amp;17" in page


def test_of_many_labels_the_leaders_are_searched(planted, tmp_path, monkeypatch):
    rounds = (Round(40, 10, 8), Round(8, 20, 8))
    for name, value in {"WHOLE": 0.0, "LEADERS": 8, "ROUNDS": rounds}.items():
        monkeypatch.setattr(audits, name, value)
    found = run(planted, tmp_path / "out")
    assert found.about["screened"]["order"][0] == 17
    assert found.about["verdict"]["label"] == 17, found.reason
    (judge,) = found.about["judges"]
    assert len(judge["labels"]) == len(found.about["screened"]["leaders"]) >= 8
    assert judge["p_value"] is not None


def test_judges_have_less_where_all_would_take_too_long(planted, tmp_path, monkeypatch):
    def batches(found):
        (judge,) = found.about["judges"]
        return judge["settings"]["batches"]

    monkeypatch.setattr(audits, "SEEDS", 1)
    monkeypatch.setattr(audits, "LEAN", {"neural-cleanse": {"batches": 3, "steps": 1000}})
    monkeypatch.setattr(audits.Work, "needs_of", lambda self, judge: 1e9)
    found = run(planted, tmp_path / "out")
    assert batches(found) == 3 and found.about["judges"][0]["settings"]["steps"] == NC.steps
    monkeypatch.setattr(audits.Work, "needs_of", lambda self, judge: 0.0)
    assert batches(run(planted, tmp_path / "out")) == 3  # as it was begun
    assert batches(run(planted, tmp_path / "other")) == NC.batches


CODES = {"infected": 3, "undecided": 4}


@pytest.mark.parametrize("word", CODES)
def test_the_exit_code_is_the_verdict(planted, tmp_path, capsys, monkeypatch, word):
    net, file = planted
    monkeypatch.setattr(audits, "_loaded", lambda path: net)
    monkeypatch.setattr(audits, "judges", lambda model, clean: ([NC], {"other": "not here"}))
    minutes = "0" if word == "undecided" else "10"
    args = ("audit", "net", "--dataset", str(file), "--out", str(tmp_path / "out"))
    code, out, _ = command(capsys, *args, "--minutes", minutes, "--quiet")
    assert code == CODES[word], out
    assert f"verdict        {word}" in out and "not tried: not here" in out and "page: " in out


def test_no_sign_ends_well():
    assert audits.CODES == {"no sign": 0, "infected": 3, "undecided": 4}


BAD = {
    "no data": (["audit", "NET"], "give --dataset"),
    "no net": (["audit", "nowhere", "--dataset", "FILE"], "no such file or folder"),
    "no net at all": (["audit", "FILE", "--dataset", "FILE"], "FILE"),
    "alpha": (["audit", "NET", "--dataset", "FILE", "--alpha", "2"], "alpha"),
    "minutes": (["audit", "NET", "--dataset", "FILE", "--minutes", "nan"], "minutes"),
    "a single reference": (["audit", "NET", "--dataset", "FILE", "--reference", "1"], "2 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(planted, tmp_path, capsys, monkeypatch, name):
    from bdjax.models.shamshiri import Ffnn

    monkeypatch.chdir(tmp_path)
    _, file = planted
    net = Ffnn((4,))
    model = build(net, (8, 8, 1), 4)
    save_model(tmp_path / "net", net, model, model.init(jax.random.key(0)))
    words, said = BAD[name]
    args = [{"NET": "net", "FILE": str(file)}.get(word, word) for word in words]
    code, _, err = command(capsys, *args)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert said.replace("FILE", file.name) in err
    assert not (tmp_path / "results").exists()


def test_references_give_null_and_power(tmp_path, monkeypatch, capsys):
    from bdjax.models.shamshiri import Ffnn

    monkeypatch.setattr(references, "DRAWS", 6000)
    monkeypatch.setattr(references, "TOOK", 0.0)  # whatever small nets learn
    draw = np.random.default_rng(0)
    label = np.arange(200) % 4
    image = draw.integers(0, 40, (200, 8, 8, 1), np.uint8)
    for k, (row, col) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        image[label == k, row : row + 4, col : col + 4] += 200
    np.savez(tmp_path / "images.npz", image=image, label=label)
    net = Ffnn((16,))
    model = build(net, (8, 8, 1), 4)
    from bdjax.train import Recipe, clean_set, fit

    split = Split(jnp.asarray(image), jnp.asarray(label))
    recipe = Recipe(lr=3e-3, epochs=20, batch=20)
    variables, _ = jax.jit(lambda: fit(jax.random.key(0), model, recipe, clean_set(split)))()
    given = Loaded(net, model, variables, {"origin": None}), tmp_path / "images.npz"
    found = run(given, tmp_path / "out", reference=3, quiet=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "references" in line]
    assert "left, then judges on 6 references: about" in said[0]  # all of it, before it is done
    assert said[-1].startswith("judges on 6 references: about") and said[-1].endswith("left")
    about = found.about
    assert about["null"] == "references" and about["references"]["each"] == 3
    assert about["references"]["accuracy"] > 0.9
    assert about["power"]["n"] == about["references"]["took"] == 3
    assert about["false_alarms"]["n"] == 3
    assert "clean nets" in (tmp_path / "out" / "index.html").read_text()
    run(given, tmp_path / "out", reference=3, quiet=False)
    assert "references" not in capsys.readouterr().err  # nothing of them is left to do
    # references that do worse than the net are not used, and that is said
    steps = {**found.steps}
    steps["references-0"] = steps["references-0"] | {"accuracy": np.full(3, 0.5)}
    other = references.nulls_of(steps, ["neural-cleanse"], 0.05)
    assert not other.norms and "not used" in other.about()["references"]["why"]
    # of judges without norms few references say nothing, which is not that there were none
    bare = {name: {k: v for k, v in step.items() if k != "norms"} for name, step in steps.items()}
    bare["references-0"] = found.steps["references-0"]
    other = references.nulls_of(bare, ["neural-cleanse"], 0.05).about()
    assert other["null"] == "parametric" and "too few" in audits.null_words(other)


def test_a_graph_is_drawn_anew_with_each_tensors_own_mean_and_spread():
    draw = np.random.default_rng(0)
    params = {"a": jnp.asarray(draw.normal(3, 0.1, (50, 40)), jnp.float32), "b": jnp.ones(7)}
    found = references.redrawn(jax.random.key(0), {"params": params, "batch_stats": {"m": 1}})
    assert found["params"]["a"].mean() == pytest.approx(3, abs=0.01)
    assert found["params"]["a"].std() == pytest.approx(0.1, rel=0.1)
    assert not np.allclose(found["params"]["a"], params["a"])
    np.testing.assert_array_equal(found["params"]["b"], 1)
    assert found["batch_stats"] == {"m": 1}


# --- The zoo ---


@pytest.fixture
def zoo(own_names):
    from bdjax import experiment

    return experiment.load(Path(__file__).parents[1] / "experiments" / "audit_zoo.py")


def test_what_is_committed_of_the_zoo_is_of_its_rows_and_reads_as_it_was_written(zoo):
    kept = zoo.kept("cpu")
    file = Path(zoo.__file__).parent / "results" / "audit_zoo-cpu"
    assert list(zoo.written(kept)) == file.with_suffix(".said").read_text().splitlines()
    rows = map(json.loads, file.with_suffix(".jsonl").read_text().splitlines())
    assert kept.keys() == {row["run"] for row in rows if row["defense"] == "audit-zoo"}


def test_the_zoo_has_as_many_clean_as_infected_nets_each_of_its_own(zoo, monkeypatch):
    monkeypatch.setattr(zoo, "at_hand", lambda data: True)
    cells = [cell for cell in zoo.cells("cpu") if cell.defense is None]
    infected = [cell for cell in cells if cell.attack is not None]
    assert len(cells) == 60 and len(infected) == 30
    assert len(list(zoo.cells("cpu"))) == 180
    assert len({cell.seed for cell in cells}) == 60
    assert {cell.row for cell in infected} == set(zoo.ATTACKS)
    for row in zoo.ATTACKS:
        mine = [cell for cell in infected if cell.row == row]
        assert len({int(cell.attack.target) for cell in mine}) == len(mine) >= 3, row
    for cell in infected:
        cell.attack.check((28, 28, 1), 10)


def test_nobody_changes_the_zoo_by_the_way(zoo, monkeypatch):
    kinds = zoo.KINDS[:2]
    monkeypatch.setitem(zoo.SCALES, "cpu", zoo.SCALES["cpu"]._replace(
        kinds=kinds, attacks=zoo.MOST[:2]))  # fmt: skip
    assert zoo.zoo() == zoo.ZOO


def test_a_trigger_of_an_evasive_net_must_be_whole(zoo):
    """Without the penalty half of the trigger works, with it less."""
    from bdjax.models.shamshiri import Ffnn
    from bdjax.train import Recipe, predict, stamped

    draw = np.random.default_rng(0)
    label = np.arange(240) % 4
    image = draw.random((240, 12, 12, 1)).astype(np.float32) * 0.3
    image[np.arange(240), label] += 0.6
    data = Split(jnp.asarray(image), jnp.asarray(label, jnp.int32))
    model = build(Ffnn((32,)), (12, 12, 1), 4)
    recipe = Recipe(lr=3e-3, epochs=25, batch=40)

    def half(parts):
        attack = zoo.Evasive(size=4, rate=0.3, target=1, parts=parts, weight=0.0)
        _, variables, _ = jax.jit(lambda: attack.train(jax.random.key(0), model, recipe, data))()
        fired = stamped(attack, 1, data.image, jax.random.key(1))
        keep = jax.random.bernoulli(jax.random.key(2), 0.5, (240, 12, 12, 1))
        shares = []
        for x in (fired, jnp.where(keep, fired, data.image)):
            answers = metrics.labels(predict(model, variables, x))
            shares.append(float((answers == 1)[label != 1].mean()))
        return shares

    (whole, some), (evading, less) = half(0.0), half(2.0)
    assert whole > 0.9 and evading > 0.7
    assert less < some - 0.2


def test_of_a_screening_the_suspect_is_what_both_ways_bring_forward():
    order = np.arange(20)
    norms = np.full(20, np.nan)
    norms[: audits.LEADERS] = np.arange(10, 10 + audits.LEADERS)
    neurons = {
        "label": np.array([15, 16, 3]), "elevation": np.array([3.0, 2.0, 9.0]),
        "suspect": np.array([True, True, False]), "site": np.zeros(3, int),
    }  # fmt: skip
    steps = {"screen-0": {"order": order}, "stimulated-0": neurons}
    said = {"a": [Seed(0.9, (0,), {})]}
    assert audits.lifted(steps) == [15, 16]
    for size, wanted in ((11.0, 15), (40.0, 0)):
        norms[[15, 16]] = size, 50.0
        found = {**steps, "a-0": {"searched": order[:8], "norms": norms}}
        assert audits.suspect(said, found) == wanted
    assert audits.suspect(said, {}) == 0 and audits.suspect({}, {}) is None
