"""trojanzoo, by the constructors and methods that its users call."""
# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import trojanvision  # noqa: F401  (sets its environment up)
from torch import nn
from torch.utils.data import TensorDataset
from trojanvision.attacks import BadNet
from trojanvision.datasets import ImageSet
from trojanvision.defenses import ActivationClustering, FinePruning, NeuralCleanse, Strip
from trojanvision.marks import Watermark
from trojanvision.models import ImageModel
from trojanvision.models.imagemodel import _ImageModel
from trojanzoo.environ import env

from benchmarks import rivals
from benchmarks.sides import Given, anomaly, rates


def known() -> dict[str, Any]:
    shapes = {name: list(array.shape) for name, array in rivals.badnets_cnn().state_dict().items()}
    return {
        "versions": {"trojanzoo": version("trojanzoo"), "torch": torch.__version__},
        "nets": {"small": shapes},
    }


class Images(ImageSet):
    """Arrays as a data set: "train" is the defender's, "valid" what it is measured on."""

    name, num_classes, data_shape = "arrays", 10, [1, 28, 28]

    def __init__(self, parts: dict[str, tuple[np.ndarray, np.ndarray]], **kwargs):
        self.parts = {name: TensorDataset(*rivals.tensors(*part)) for name, part in parts.items()}
        super().__init__(num_workers=0, **kwargs)

    def _get_org_dataset(self, mode: str, **kwargs):
        pixels, label = self.parts[mode].tensors
        return TensorDataset(pixels.float() / 255, label)


def attacked(
    given: Given, parts: dict[str, tuple[np.ndarray, np.ndarray]], batch: int, cut: int = 6
) -> tuple[BadNet, dict[str, Any]]:
    """The net with its mark, and what every defense is given. What stands after `cut` modules is
    called the classifier there.
    """
    dataset = Images(parts, batch_size=batch, valid_batch_size=batch)
    net = rivals.badnets_cnn()
    net.load_state_dict({name: torch.from_numpy(v) for name, v in given.weights.items()})

    class Parts(_ImageModel):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.features, self.pool = net[:cut], nn.Identity()
            self.flatten = nn.Identity() if cut > 6 else nn.Flatten()
            self.classifier = net[cut:] if cut > 6 else net[cut + 1 :]

    model = ImageModel(name="parts", model=Parts, dataset=dataset)
    mark = Watermark(
        data_shape=dataset.data_shape, mark_height=5, mark_width=5, mark_height_offset=23,
        mark_width_offset=23,
    )  # fmt: skip
    shared = {"dataset": dataset, "model": model, "folder_path": str(given.folder)}
    attack = BadNet(mark=mark, target_class=0, poison_percent=0.05, **shared)
    return attack, {"attack": attack, "original": True, **shared}


def part(given: Given, name: str, rows: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    return given.data[f"{name}_image"][rows], given.data[f"{name}_label"][rows]


def neural_cleanse(given: Given, images: int, epochs: int, batch: int):
    parts = {"train": part(given, "clean", slice(images))}
    parts["valid"] = parts["train"]

    def run():
        _, shared = attacked(given, parts, batch)
        defense = NeuralCleanse(defense_remask_epoch=epochs, **shared)
        caught = {}
        found = defense.get_mark_loss_list

        def kept(**kwargs):
            caught["marks"], *others = found(verbose=False)
            return caught["marks"], *others

        defense.get_mark_loss_list = kept
        defense.detect()
        norms = caught["marks"][:, -1].flatten(1).norm(p=1, dim=1).tolist()
        return {"norms": norms, "index": anomaly(norms)}

    return run


def _strip(given: Given, inputs: int, replicas: int, batch: int):
    parts = {"train": part(given, "clean"), "valid": part(given, "valid")}
    _, shared = attacked(given, parts, batch)
    return Strip(
        strip_sample_num=replicas, strip_fpr=0.05, defense_input_num=inputs, **shared
    )  # fmt: skip


def strip(given: Given, inputs: int, replicas: int, batch: int):
    def run():
        defense = _strip(given, inputs, replicas, batch)
        caught, found = {}, defense.get_pred_labels
        defense.get_pred_labels = lambda: caught.setdefault("flagged", found())
        defense.detect()
        return rates(caught["flagged"], np.arange(2 * inputs) >= inputs)

    return run


def strip_scores(given: Given, inputs: int, replicas: int, batch: int):
    defense = _strip(given, inputs, replicas, batch)

    def run():
        flagged = defense.get_pred_labels()
        return rates(flagged, np.arange(2 * inputs) >= inputs)

    return run


def activation_clustering(given: Given, batch: int, fields: dict[str, Any], repaired: bool = False):
    poisoned = given.data["poisoned"]
    image, label = part(given, "train")

    def run():
        attack, shared = attacked(
            given,
            {"train": part(given, "train", ~poisoned), "valid": part(given, "test")},
            batch,
            9,
        )
        pixels, labels = rivals.tensors(image[poisoned], label[poisoned])
        attack.poison_set = TensorDataset(pixels.float() / 255, labels)
        defense = ActivationClustering(**fields, **shared)
        if repaired:  # the loader that it reads, in the order that its truth has
            loader = defense.dataset.get_dataloader
            defense.dataset.get_dataloader = lambda *args, **kwargs: loader(
                *args, **{**kwargs, "shuffle": False}
            )
        with torch.no_grad():
            return rates(defense.get_pred_labels(), defense.get_true_labels())

    return run


def spectral_signatures(given: Given):
    from trojanvision.defenses import SpectralSignature  # which it does not give

    return SpectralSignature


def fine_pruning(given: Given, images: int, tests: int, ratio: float, recipe: dict[str, Any]):
    parts = {
        "train": part(given, "clean", slice(images)),
        "valid": part(given, "test", slice(tests)),
    }

    def run():
        torch.manual_seed(0)
        attack, shared = attacked(given, parts, recipe["batch"])
        defense, model = FinePruning(prune_ratio=ratio, **shared), shared["model"]
        asr_before, acc_before = attack.validate_fn()
        attack.clean_acc = acc_before
        model.activate_params(model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe["lr"])
        defense.prune(epochs=recipe["epochs"], optimizer=optimizer)
        asr, acc = attack.validate_fn()
        pruned = int((defense.last_conv.weight_mask.flatten(1).sum(1) == 0).sum())
        found = {"acc_before": acc_before, "asr_before": asr_before, "acc": acc, "asr": asr}
        return {name: value / 100 for name, value in found.items()} | {"pruned": pruned}

    return run


env["tqdm"] = False
