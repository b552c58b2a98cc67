"""The experiment on Veldanda & Garg (2020): its rules on planted rows,
its probes on planted nets.
"""

from pathlib import Path

import jax
import pytest
from planted import TARGET, lit_rows, units

from bdjax import experiment
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.multi_trigger import MultiTrigger
from bdjax.models.cla import Cla
from bdjax.models.layers import build
from bdjax.rows import Rows

HERE = experiment.load(Path(__file__).parents[1] / "experiments" / "veldanda2020.py")
CORNER = BadNets(shape="pixel", size=1, target=TARGET)
OTHER = BadNets(shape="pixel", size=1, row=0, col=0, target=TARGET)


def row(table, name, seed=0, **metrics):
    return {"table": table, "row": name, "seed": seed, "metrics": metrics}


def grid_of(column, left):
    """A grid of working victims and what a defense leaves of each, and one victim that does not
    work.
    """
    rows = []
    for seed, value in enumerate([*left, 0.0]):
        rows.append(
            row(HERE.swept(HERE.BASELINE), "r", seed, asr_nt=0.99 if seed < len(left) else 0.3)
        )
        rows.append(row(HERE.swept(column), "r", seed, asr_nt=value))
    return rows


def table3(column, **left):
    return [
        row(HERE.table3(column), name, acc_test=0.9, asr_nt=value) for name, value in left.items()
    ]


@pytest.mark.parametrize(
    ("left", "tick"),
    [([0.0, 0.9, 0.5, 0.1], True), ([0.9] * 4, False), ([0.1] * 4, False), ([], False)],
)
def test_pitfall_1_is_success_that_depends_on_the_attackers_settings(left, tick):
    found, numbers = HERE.pitfall1(Rows(grid_of(HERE.FP, left)), HERE.FP)
    assert found is tick and f"of {len(left)} settings" in numbers


def test_pitfall_2_is_failure_outside_the_assumptions_or_out_of_scope():
    square = [row(HERE.ADAPTIVE, f"{HERE.NC}: {HERE.PLAIN}", asr_nt=0.0)]
    assert HERE.pitfall2(
        Rows([*square, *table3(HERE.NC, PN=0.1, LS=0.1, AAA=0.9, SG=0.9)]), HERE.NC
    )[0]
    assert not HERE.pitfall2(
        Rows([*square, *table3(HERE.NC, PN=0.1, LS=0.1, AAA=0.1, SG=0.1)]), HERE.NC
    )[0]
    # it fails everywhere
    assert not HERE.pitfall2(Rows(table3(HERE.NC, PN=0.9, LS=0.9, AAA=0.9, SG=0.9)), HERE.NC)[0]
    rows = [*table3(HERE.BASELINE, AAA=1.0, TCA=1.0), *table3(HERE.MESA, AAA=0.1)]
    found, numbers = HERE.pitfall2(Rows(rows), HERE.MESA)
    assert found and numbers.endswith("out of scope: TCA")
    # What was not run yet is not out of scope.
    part = [*table3(HERE.BASELINE, AAA=1.0, TCA=1.0), *table3(HERE.FP, AAA=0.9)]
    found, numbers = HERE.pitfall2(Rows(part), HERE.FP)
    assert not found and "scope" not in numbers


def test_a_defense_succeeds_as_in_the_paper_only_where_its_successes_were_run():
    def says(**asr):
        rows = [*table3(HERE.BASELINE, **dict.fromkeys(asr, 1.0)), *table3(HERE.NC, **asr)]
        return HERE.succeeds_for_the_papers(Rows(rows), HERE.NC)[1]

    assert says(PN=0.1, AAA=0.9) == "reproduced" and says(PN=0.9, AAA=0.1) == "not"
    assert says(AAA=0.9) == "partly"  # PN is where it succeeds


@pytest.mark.parametrize(
    ("plain", "adaptive", "tick"), [(0.1, 0.9, True), (0.1, 0.1, False), (0.9, 0.9, False)]
)
def test_pitfall_3_needs_an_attack_that_only_its_adaptive_version_survives(plain, adaptive, tick):
    names = HERE.PLAIN, HERE.BROKEN[HERE.STRIP][0]
    rows = [
        row(HERE.ADAPTIVE, f"{HERE.STRIP}: {name}", far=far)
        for name, far in zip(names, (plain, adaptive))
    ]
    assert HERE.pitfall3(Rows(rows), HERE.STRIP)[0] is tick


def test_the_papers_own_numbers_give_its_verdicts():
    rows = []
    for column, of_column in HERE.PAPER.items():
        for name in of_column:
            found = HERE.reported(name, column)
            rows.append(row(HERE.table3(column), name, **found))
    rows += table3(
        HERE.NC, **{name: 0.9 for name in HERE.BADNETS if name not in HERE.PAPER[HERE.NC]}
    )
    claims = {claim: (verdict, numbers) for claim, verdict, numbers in HERE.trends(Rows(rows))}
    for claim in (
        "Fine-Pruning succeeds for CLA alone", "Neural Cleanse succeeds for PN alone",
        "Neural Cleanse, oracle succeeds for CLA, MTSTA alone", "Generative, oracle succeeds for "
                                                                "FSA, SG alone",
        "STRIP fails entirely on all-to-all",
    ):  # fmt: skip
        assert claims[claim][0] == "reproduced", (claim, claims[claim])
    assert claims["ABS fails on TCA"][0] == "not"  # nothing was measured
    for column, ticks in HERE.TICKS.items():
        assert all(
            f"Table 1: {column}, pitfall {i}: {tick}" in claims for i, tick in enumerate(ticks, 1)
        )


def test_a_row_of_three_triggers_is_compared_with_each():
    assert HERE.reported("MTSTA", HERE.FP) == pytest.approx(
        {
            "acc_test": 0.9731,
            "asr_nt": 0.6823,
            "asr_ls": 0.4504,
            "asr_eb": 0.6471,
            "asr_sg": 0.9494,
            "asr_worst": 0.9494,
        }
    )
    assert HERE.reported("PN", HERE.STRIP) == {"far": 1.0} and HERE.reported("AAA", HERE.MESA) == {}


def test_what_an_abs_or_a_strip_leaves():
    assert (
        HERE.outcome({"infected": 1.0, "target_flagged": 0.0, "asr_nt": 1.0}, HERE.ABS, "AAA") == 0
    )
    assert (
        HERE.outcome({"infected": 1.0, "target_flagged": 0.0, "asr_nt": 1.0}, HERE.ABS, "TCA") == 1
    )
    assert HERE.outcome({"far": 0.3, "asr_nt": 0.1}, HERE.STRIP) == 0.3
    assert HERE.outcome({"asr_nt": 0.1, "asr_worst": 0.4}, HERE.FP) == 0.4


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1.0), (20.0, 0.0)])
def test_the_share_of_the_trigger_that_lies_in_sleeping_channels(threshold, share):
    """Unit 5 sleeps on clean images and is the only one that the corner moves, if its threshold
    lets it.
    """
    model, variables, data = units(threshold=threshold)
    found = HERE.LastPool()(jax.random.key(0), model, variables, CORNER, data, data)
    assert found["dormant_share"] == pytest.approx(share, abs=1e-6)
    assert found["clean"][5] == 0 and found["stamped"][5] == pytest.approx(10.0 if share else 0.0)


def test_each_trigger_has_its_own_success_and_target():
    model, variables, data = units()
    attack = MultiTrigger(parts=(CORNER, OTHER))
    found = HERE.EachTrigger(("ls", "eb"))(jax.random.key(0), model, variables, attack, data, data)
    assert found["asr_ls"] == 1 and found["asr_eb"] < 0.5 and found["asr_worst"] == 1
    made = HERE.SetUp(32, 5, 0.1, ("ls", "eb"))(
        jax.random.key(0), model, variables, attack, data, data
    )
    assert (made["target_ls"], made["target_eb"], made["batch"], made["epochs"]) == (
        TARGET,
        TARGET,
        32,
        5,
    )
    assert made["parameters"] == 64 * 6 + 6 + 6 * 4 + 4


def test_table_5_is_the_net_of_cla():
    model, data = build(Cla(), (28, 28, 1), 10), lit_rows(0.5)
    variables = model.init(jax.random.key(0))
    assert HERE.Shapes()(jax.random.key(0), model, variables, None, data, data) == HERE.LAYERS


def test_every_badnet_can_be_set_up():
    s = HERE.SCALES["smoke"]
    for name, about in HERE.BADNETS.items():
        cell, targets = HERE.badnet(s, name)
        assert cell.attack.triggers == max(len(about.parts), 1)
        cell.attack.check((55, 47, 3), 16)
        places = [(c.run_id, c.table, c.row) for c in HERE.of_badnet(s, name)]
        assert len(set(places)) == len(places)
        assert name == "FSA" or targets == about.targets


@pytest.mark.parametrize(
    ("reversed_", "covered", "verdict"),
    [(100, 1.0, "not"), (25, 1.0, "reproduced"), (100, 0.8, "partly")],
)
def test_a_reversed_trigger_misses_the_sunglasses_where_their_masks_hardly_overlap(
    reversed_, covered, verdict
):
    found = row(
        HERE.FIGURE2, "SG", l1_original=100.0, l1_reversed=float(reversed_), share_covered=covered
    )
    claims = {claim: value for claim, value, _ in HERE.trends(Rows([found]))}
    assert claims["Neural Cleanse misses size and shape of the sunglasses"] == verdict
