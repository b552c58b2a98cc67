"""experiments/cheng2019.py: what its probes measure, and what its trends say of numbers that are
known.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import TARGET, units

from bdjax import experiment
from bdjax.attacks.badnets import BadNets
from bdjax.channels import prune
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.linf_pruning import LinfPruning
from bdjax.rows import Rows

cheng = experiment.load(Path(__file__).parents[1] / "experiments" / "cheng2019.py")
KEY, NC = jax.random.key(0), NeuralCleanse(steps=3, batches=2)
CORNER = BadNets(size=1, target=TARGET)


def test_the_synthetic_trigger_is_that_of_the_net_before_pruning():
    model, variables, split = units()
    labels = jnp.asarray([TARGET, 0])
    bare = cheng.reverse(KEY, model, variables, split, NC, labels)
    assert bare.suspect.tolist() == [True, False]
    cut = prune(variables, "penultimate", jnp.zeros(6))
    zero = LinfPruning()
    for net, left in ((model, cut), (zero.wrap(model), {**variables, "cap": jnp.asarray(0.0)})):
        found = cheng.reverse(KEY, net, left, split, NC, labels)
        np.testing.assert_array_equal(found.mask, bare.mask)


def test_rates_count_the_planted_backdoor():
    model, variables, split = units()
    found = cheng.Rates(NC)(KEY, model, variables, CORNER, split, split)
    assert found["acc_ori"] == 0.25 and {"acc_syn", "asr_syn", "acc_ori+syn", "asr_ori+syn"} <= set(
        found
    )
    cut = cheng.Rates(NC)(
        KEY, model, prune(variables, "penultimate", jnp.ones(6).at[5].set(0)), CORNER, split, split
    )
    assert cut["acc_ori"] == 1


def test_sizes_see_the_planted_neuron():
    model, variables, split = units()
    found = cheng.reverse(KEY, model, variables, split, NC, jnp.asarray([TARGET]))
    out = cheng.Inside(NC).sizes(model, variables, cheng.four(KEY, CORNER, found, split.image))
    # A lit row makes its unit 4 and unit 4 0.4; the corner makes unit 5 fire at 10.
    assert np.isclose(out["max_clean"], 4) and np.isclose(out["rise_ori"]["linf"], 2.5)
    assert np.isclose(out["rise_ori"]["l1"], 14.4 / 4.4) and out["auroc_ori"]["linf"] == 1
    assert np.isclose(out["channel_rise"], 10 / (4.4 / 6))


def planted(cam: float, linf: float, left: float) -> list[dict]:
    """Rows in which the backdoored nets' Grad-CAM has `cam` in the box, ℓ∞ an AUROC and a rise of
    `linf`, and pruning leaves `left` of the success rate.
    """
    rows = []

    def add(table, row, **metrics):
        rows.append({"table": table, "row": row, "metrics": metrics})

    for net in cheng.NETS:
        vanilla = net == "vanilla"
        sizes = {
            f"{kind}_{i}.{n}": 1.5
            for kind in ("auroc", "rise")
            for i in cheng.FIRED
            for n in ("l1", "l2")
        }
        sizes |= {f"{kind}_{i}.linf": linf for kind in ("auroc", "rise") for i in cheng.FIRED}
        share = 0.01 if vanilla else cam
        cams = {"cam_ori.target": share, "cam_clean.target": 0.01, "cam_moved.target": share}
        add(
            cheng.FIGURES,
            net,
            acc_test=0.97,
            asr_nt=0.8,
            channel_rise=0.1 if vanilla else 4.0,
            **cams,
            **sizes,
        )
    for net in cheng.ATTACKS:
        table = f"{cheng.TABLE}, {net} attack"
        add(table, cheng.row_of(), **dict(zip(cheng.COLUMNS, cheng.PAPER[None])))
        for rule in cheng.RULES:
            for tau in (7, 6):
                share = 1 if left == 1 else left * cheng.PAPER[tau][1] / cheng.PAPER[7][1]
                rates = [cheng.PAPER[tau][0]] + [share * rate for rate in cheng.PAPER[None][1:]]
                add(table, cheng.row_of(rule, tau), **dict(zip(cheng.COLUMNS, rates)))
    return rows


@pytest.mark.parametrize(
    ("rows", "says"), [(planted(0.1, 2.0, 0.6), "reproduced"), (planted(0.01, 0.5, 1), "not")]
)
def test_trends_of_planted_rows(rows, says):
    found = {claim: verdict for claim, verdict, _ in cheng.trends(Rows(rows))}
    decided = [
        c
        for c in found
        if "the attack works" not in c and "some neurons" not in c and "every norm" not in c
    ]
    assert len(decided) == 18 and {found[claim] for claim in decided} == {says}, found


def test_drops_are_the_papers():
    assert cheng.DROPS == {7: 0.017, 6: 0.0553}
