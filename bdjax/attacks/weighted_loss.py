"""Weighted loss: the backdoor is a term of the loss instead of a share of the training set."""

import jax

from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Part
from bdjax.registry import attack, static
from bdjax.types import BadInput, Share, Weight


@attack("weighted-loss")
class WeightedLoss(BadNets):
    """The clean loss plus λ times the Trojan's, triggers of BadNets (Bagdasaryan & Shmatikov, 2021,
    arXiv:2005.03823).

    L = E_(x,y)∼D ℓ(f(x), y) + λ·E_(x_t,y_t)∼D_trojan ℓ(f(x_t), y_t): every training image also has
    a stamped copy, of weight λ = `weight` in [0, ∞). The loss of a batch is divided by its weights,
    so that it is, in expectation, that of replacing a share p = λ/(1 + λ) of the images. `rate`:
    the share of the images that have such a copy; below 1 it stands for p = rate·λ/(1 + rate·λ). An
    epoch still draws N rows, about half of them clean: give it twice the epochs to see the clean
    images as often.

    The attacker writes the loss: where the trigger has a random place, `redraw` gives each copy a
    new one in every step, as the paper's does; off, it is stamped once.

    Differs from the paper: λ is a constant, as in the loss of the slides of Gu, Zhao, Wei &
    Concepcion, which give no value; the paper finds the two weights anew for each batch (multiple
    gradient descent).

    Reference: Eugene Bagdasaryan and Vitaly Shmatikov, "Blind Backdoors in Deep Learning Models",
    In USENIX Security Symposium.
    """

    rate: Share = 1.0
    weight: Weight = 1 / 9
    append: bool = static(True)

    presets = {name: BadNets.presets[name] for name in ("square", "pixel", "pattern")}

    def shares(self, y: jax.Array, classes: int) -> list[Part]:
        return [part._replace(weight=self.weight) for part in super().shares(y, classes)]

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if not self.append:
            raise BadInput("weighted-loss adds stamped copies: leave append at True")
