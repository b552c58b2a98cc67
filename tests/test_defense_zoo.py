"""The rules of the defense zoo on rows whose answer is known."""

from pathlib import Path

import pytest

from bdjax import experiment
from bdjax.rows import Rows

HERE = experiment.load(Path(__file__).parents[1] / "experiments" / "defense_zoo.py")
CLEAN, ATTACKED = "MNIST: no attack", "MNIST: Blended, noise key"


def row(name, table=ATTACKED, **metrics):
    return {"row": name, "table": table, "metrics": metrics, "oracle": False}


BEFORE = row(HERE.BEFORE, acc_test=0.98, asr_nt=1.0)


@pytest.mark.parametrize(
    ("metrics", "alarm", "wanted"),
    [
        ({"acc_test": 0.94, "asr_nt": 0.1}, False, (True, True)),
        ({"acc_test": 0.94, "asr_nt": 0.4}, False, (False, True)),
        (
            {"acc_test": 0.90, "asr_nt": 0.0},
            False,
            (False, False),
        ),  # nothing is left of the net either
        (
            {"acc_test": 0.98, "asr_nt": 1.0, "infected": 1.0, "anomaly_index": 3.0},
            False,
            (True, True),
        ),
        (
            {"acc_test": 0.98, "asr_nt": 1.0, "infected": 1.0, "anomaly_index": 3.0},
            True,
            (False, True),
        ),
        (
            {"acc_test": 0.98, "asr_nt": 1.0, "infected": 0.0, "anomaly_index": 1.0},
            False,
            (False, False),
        ),
        (
            {"asr_nt": 1.0, "infected": 0.0, "undecided": 1.0, "anomaly_index": 2.1},
            False,
            (False, True),  # seeds that disagree
        ),
    ],
)
def test_what_works(metrics, alarm, wanted):
    assert HERE.works(row("it", **metrics), BEFORE, alarm) == wanted


def test_a_false_alarm_on_the_clean_net_counts_against_all():
    judge = {"acc_test": 0.98, "infected": 1.0, "anomaly_index": 3.0}
    rows = [row(HERE.BEFORE, CLEAN, acc_test=0.98), BEFORE, row("judge", asr_nt=1.0, **judge)]
    ((claim, verdict, numbers),) = HERE.trends(Rows(rows))
    assert (claim, verdict) == (
        "judge works",
        "reproduced",
    ) and numbers == f"1 of 1; {ATTACKED} (✓ 3.0)"
    ((_, verdict, numbers),) = HERE.trends(Rows([*rows, row("judge", CLEAN, **judge)]))
    assert verdict == "partly" and "clean nets accused: 1 of 1 of MNIST" in numbers
    seeds = [row("judge", CLEAN, **judge | {"infected": i}) for i in (0.0, 1.0, 0.0)]
    ((_, verdict, numbers),) = HERE.trends(Rows([*rows, *seeds]))
    assert verdict == "partly" and "clean nets accused: 1 of 3 of MNIST" in numbers, "one is enough"
    ((_, verdict, _),) = HERE.trends(
        Rows([*rows, row("judge", "GTSRB, ten classes: no attack", **judge)])
    )
    assert verdict == "reproduced", "the clean net of other images does not count"


def test_seeds_are_averaged_and_those_that_disagree_are_undecided():
    acc = [row("it", acc_test=0.98, asr_nt=asr) for asr in (0.1, 0.2)]
    assert HERE.over(Rows(acc))["metrics"] == {"acc_test": 0.98, "asr_nt": pytest.approx(0.15)}
    said = [row("judge", infected=i, undecided=0.0, anomaly_index=2.0) for i in (1.0, 1.0, 0.0)]
    assert HERE.short(HERE.over(Rows(said))).startswith("? ")
    assert HERE.short(HERE.over(Rows(said[:2]))).startswith("✓ ")
    assert HERE.short(HERE.over(Rows(said[2:]))).startswith("✗ ")


def test_a_filter_may_cost_the_rejections_that_it_is_set_to():
    strict = row("filter", acc_test=0.82, asr_nt=0.0) | {"config": {"defense": {"frr": 0.122}}}
    assert HERE.works(strict, BEFORE, False) == (True, True)
    strict["metrics"]["acc_test"] = 0.80
    assert HERE.works(strict, BEFORE, False) == (False, False)


def test_the_maps_leave_judges_and_the_clean_net_out(tmp_path):
    rows = [row(HERE.BEFORE, CLEAN, acc_test=0.98), BEFORE, row("repair", acc_test=0.9, asr_nt=0.0)]
    rows += [
        row("repair", CLEAN, acc_test=0.9),
        row("judge", acc_test=0.98, asr_nt=1.0, infected=0.0),
    ]
    asr, acc = HERE.figures(Rows(rows), None, "cpu")
    for (*_, picture), columns in ((asr, 1), (acc, 2)):
        assert picture.axes[0].images[0].get_array().shape == (2, columns)
    assert HERE.short(rows[3]) == "90 / –"
