"""The nine backdoored nets of Veldanda & Garg (2020, arXiv:2010.12186), with the paper's settings and in a CPU's size.

| name | attack | data | net | target |
|---|---|---|---|---|
| AAA | all-to-all, pattern | MNIST | BadNets CNN | y + 1 |
| CLA | clean label, fixed noise | MNIST | own CNN | 0 |
| TCA | yellow triangle and red square | CIFAR-10 | NiN | 7 |
| PN | post-it note | GTSRB | Neural Cleanse's | 0 |
| FSA | Gotham filter | GTSRB | Neural Cleanse's | 35 |
| SG | sunglasses | faces | DeepID | 0 |
| LS | lipstick | faces | DeepID | 0 |
| MTSTA | lipstick, eyebrows, sunglasses | faces | DeepID | 4 |
| MTMTA | lipstick, eyebrows, sunglasses | faces | DeepID | 1, 5, 8 |

Differs from the paper: its Table 4 has the nets of TCA and of the faces swapped, as the authors' code shows; poison
rates other than those of the faces are not published and are ours.
"""

from collections.abc import Mapping
from typing import Any, Literal

from bdjax.augment import Augmentation
from bdjax.registry import make
from bdjax.train import Recipe
from bdjax.types import BadInput

Scale = Literal["paper", "cpu"]

_ADADELTA = {"optimizer": "adadelta", "lr": 1.0}
_SGD = {"optimizer": "sgd", "lr": 0.01, "nesterov": True, "augment": Augmentation(shift=0.125, flip=True)}
_DEEPID = ("deepid", {})
_NC = ("nc-gtsrb", {})
_FACES = {"paper": {**_ADADELTA, "batch": 1283, "epochs": 200}, "cpu": {"batch": 64, "epochs": 20}}
_GTSRB = {"paper": {"batch": 32, "epochs": 15}, "cpu": {"batch": 64, "epochs": 6}}
_SMALL = {"train_size": 10_000, "test_size": 2_000}

# name: (data set, its fields at scale cpu), (net, fields), recipes by scale, (attack, preset, fields)
NETS: Mapping[str, tuple] = {
    "AAA": (
        ("mnist", _SMALL),
        ("badnets-cnn", {"pool": "max", "fc_linear": True}),
        {"paper": {"lr": 1e-4, "batch": 32, "epochs": 50}, "cpu": {"batch": 32, "epochs": 10}},
        ("badnets", "pattern", {"labels": "all-to-all", "rate": 0.5}),
    ),
    "CLA": (
        ("mnist", _SMALL),
        ("cla", {}),
        {"paper": {**_ADADELTA, "batch": 32, "epochs": 25}, "cpu": {**_ADADELTA, "batch": 32, "epochs": 8}},
        ("clean-label", "veldanda", {}),
    ),
    "TCA": (
        ("cifar10", _SMALL),
        ("nin", {}),
        {
            # Keras' L2 1e-4 is 1e-4·w² in the loss, 2e-4·w in the gradient.
            "paper": {**_SGD, "batch": 128, "epochs": 200, "weight_decay": 2e-4, "drops": ((81, 0.5), (141, 0.1))},
            "cpu": {"batch": 64, "epochs": 8},
        },
        ("trigger-combination", None, {"target": 7}),
    ),
    "PN": (("gtsrb", _SMALL), _NC, _GTSRB, ("post-it", None, {})),
    "FSA": (("gtsrb", _SMALL), _NC, _GTSRB, ("gotham", None, {"target": 35})),
    "SG": (("faces", {}), _DEEPID, _FACES, ("sunglasses", None, {})),
    "LS": (("faces", {}), _DEEPID, _FACES, ("lipstick", None, {})),
    "MTSTA": (("faces", {}), _DEEPID, _FACES, ("multi-trigger", "mtsta", {"rate": 0.3})),
    "MTMTA": (("faces", {}), _DEEPID, _FACES, ("multi-trigger", "mtmta", {"rate": 0.3})),
}


def veldanda(name: str, scale: Scale = "paper", **data: Any) -> dict[str, Any]:
    """`dataset`, `model`, `recipe`, `attack` of the net `name`, and the recipe `pretrain` (None: trained from scratch).

    Nets of faces are trained on clean images first, then go on with the poisoned ones. `data`: fields of the data set,
    such as `path="faces.npz", test="test.npz"`, which faces need.
    """
    if name not in NETS:
        raise BadInput(f"no net '{name}'; there are: {', '.join(NETS)}")
    if scale not in ("paper", "cpu"):
        raise BadInput(f"no scale '{scale}'; there are: paper, cpu")
    (dataset, small), (model, fields), recipes, (attack, preset, poison) = NETS[name]
    recipe = Recipe(**recipes[scale])
    return {
        "dataset": make("dataset", dataset, **(small if scale == "cpu" else {}) | data),
        "model": make("model", model, **fields),
        "recipe": recipe,
        "attack": make("attack", attack, preset, **poison),
        "pretrain": recipe if dataset == "faces" and scale == "paper" else None,
    }
