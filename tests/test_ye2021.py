"""Ye et al. (2021): the probes agree with the defenses that they stand for, and the trends read the
rows as they should.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import experiment, metrics, sweep
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.multi_trigger import MultiTrigger
from bdjax.defenses.inputs.goodnet import Goodnet
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.rows import Rows
from bdjax.train import Recipe, stamped, unit

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def ye():
    return experiment.load(Path(__file__).parents[1] / "experiments" / "ye2021.py")


def test_one_chain_of_repairs_gives_what_the_goodnet_defense_answers(ye, sample, victim):
    model, variables, attack = victim
    clean, test = sample.clean[:100], sample.test[:100]
    repair = FinePruning(site="penultimate", one_by_one=3, recipe=Recipe(epochs=1, batch=20))
    probe = ye.FinePruned(repair, triggers=("square",), counts=(0, 1, 3), light=1, strong=3)
    found = jax.jit(lambda v: probe(KEY, model, v, attack, clean, test))(variables)
    x = jnp.concatenate([unit(test.image), stamped(attack, 1, test.image, KEY)])
    for name, light in (("G", None), ("G′", FinePruning(**{**vars(repair), "one_by_one": 1}))):
        scores = jax.jit(lambda v, d: d(KEY, model, v, clean, x))(variables, Goodnet(repair, light))
        answer = np.asarray(scores.info["answer"])
        assert np.isclose(found[name]["acc"], (answer[:100] == test.label).mean())
        assert np.isclose(found[name]["asr_square"], (answer[100:] == attack.target).mean())


def test_one_trigger_of_several(ye):
    both = MultiTrigger(parts=(BadNets(size=2, target=3), BadNets(size=3, row=1, col=1, target=5)))
    one, x, y = ye.Only(attack=both, kind=2), jnp.zeros((4, 9, 9, 1)), jnp.arange(4)
    np.testing.assert_array_equal(stamped(one, 1, x, KEY), stamped(both, 2, x, KEY))
    np.testing.assert_array_equal(stamped(one, 0, x, KEY), x)
    assert one.triggers == 1 and one.success(jnp.asarray(1), y, 10).tolist() == [5] * 4
    assert (
        metrics.attack_success(jnp.asarray([5, 5, 3, 5]), one.success(jnp.asarray(1), y, 10), y).all
        == 0.75
    )


def test_a_model_that_reads_pixels_too_large(ye, victim):
    model, variables, _ = victim
    x = jax.random.uniform(KEY, (3, *model.shape))
    logits = ye.read(model, 2.0).apply(variables, x).logits
    np.testing.assert_allclose(logits, model.apply(variables, 2 * x).logits, rtol=1e-6)


def row(ye, name, pixels, **found):
    return {"table": ye.titled(ye.GRID, pixels), "row": name,
            "metrics": {k.replace("__", "."): v for k, v in found.items()},
            "seed": 0}  # fmt: skip


def test_trends_of_planted_rows(ye):
    """G′ gains 30 points where pixels are wrong and none where they are right; the attack is
    stopped in both.
    """
    nets = dict.fromkeys(("B′", "G", "G′"), (0.8, 0.0)) | {"B": (0.5, 1.0), "B0": (0.8, 0.5)}

    def planted(pixels, **other):
        rates = {net: other.get(net, pair) for net, pair in nets.items()}
        found = {f"{net}__acc": acc for net, (acc, _) in rates.items()}
        found |= {f"{net}__asr_sunglasses": asr for net, (_, asr) in rates.items()}
        return row(ye, "sunglasses, lr 0.001", pixels, acc_test=0.8, activation_left=0.5, **found)

    rows = [planted(ye.RAW, G=(0.5, 0.0)), planted(ye.RIGHT)]
    verdicts = {text: verdict for text, verdict, _ in ye.trends(Rows(rows))}
    held = {text for text, verdict in verdicts.items() if verdict == "reproduced"}
    assert {
        "G′ is more accurate than G",
        "B's accuracy is below 60 %",
        "Ours: with pixels right G stops the attack, lr 0.001",
    } < held
    assert "Ours: with pixels right G′ is not needed, lr 0.001" in held
    assert verdicts["STRIP fails on the nets that we trained"] == "not"  # no such row
    rows[1] = planted(ye.RIGHT, G=(0.5, 0.0))
    verdicts = {text: verdict for text, verdict, _ in ye.trends(Rows(rows))}
    assert verdicts["Ours: with pixels right G′ is not needed, lr 0.001"] == "not"


def test_the_paper_s_numbers_stand_beside_our_columns(ye):
    probe = ye.FinePruned(ye.pruning(1), triggers=("sunglasses",), counts=(0, 1, 2, 4))
    said = ye.says("sunglasses", probe)
    assert [said["B.acc"], said["k1.asr_sunglasses"]] == pytest.approx([0.4236, 0.313])
    # Figure 1's, not Table I's
    assert [said["B0.acc"], said["G′.asr_sunglasses"]] == pytest.approx([0.8276, 0.0009])
    small = ye.FinePruned(ye.pruning(1, lr=1e-4), triggers=("sunglasses",), counts=(0, 1, 2, 4))
    said = ye.says("sunglasses", small)
    assert said["B0.acc"] == pytest.approx(0.933) and "G.acc" not in said
    assert set(ye.says("multi", probe)) >= {
        f"G.asr_{t}" for t in ("sunglasses", "lipstick", "eyebrows")
    }


def test_repairs_of_the_published_net_by_kind(ye):
    def row(name, **nets):
        found = {f"{net}.{m}": v for net, pair in nets.items()
                 for m, v in zip(("acc", "asr_sunglasses"), pair)}  # fmt: skip
        return {"table": ye.LAB3, "row": name, "metrics": found | {"acc": 1.0}}

    some = {"B": (1, 1), "B0": (0.5, 1), "G′": (0.4, 1), "k1": (0.7, 0.9)}
    others = {"undefended": (1, 1), "weight 0.1": (0.95, 0.05), "fine-tuned": (0.4, 1)}
    rows = Rows([row("Goodnets", **some), row("Forgetting in the last layer", **others)])
    assert ye.agreements(rows.by("row")) == {
        "Fine-Pruning": [(0.5, 1), (0.7, 0.9)],
        "forgetting in the last layer": [(0.95, 0.05)],
        "unlearning by fine-tuning": [(0.4, 1)],
    }
    assert ye.agreements({}) == {}


def test_the_published_net_is_examined_where_its_files_are(ye, tmp_path, monkeypatch):
    """Its own answers are the labels of faces that it does not know: most people have none."""
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(ye, "load_keras_weights", lambda path, model: model.init(KEY))
    (tmp_path / ye.WEIGHTS).touch()
    draw = np.random.default_rng(0)
    for name in ("faces_train.npz", "faces_test.npz"):
        label = np.repeat(np.arange(22), 4).astype(np.uint8)
        image = draw.integers(0, 256, (len(label), 55, 47, 3), np.uint8)
        np.savez(tmp_path / name, image=image, label=label)
    ye._answered.cache_clear()
    cells = [cell for cell in ye.cells("cpu", 1) if cell.table == ye.LAB3]
    assert {"Goodnets", "Forgetting in the last layer"} <= {cell.row for cell in cells}
    for cell in cells:
        sweep.check(cell)
