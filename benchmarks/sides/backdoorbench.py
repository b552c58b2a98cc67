"""A checkout of BackdoorBench that the user has, on sys.path: its classes and functions, given
images and a net instead of its files. Its names of data sets stand for sizes and normalisations:
"gtsrb" is 32×32×3 without any.
"""
# pyright: reportMissingImports=false

import csv
import importlib
import types
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from models.preact_resnet import PreActResNet18
from PIL import Image
from torch.utils.data import DataLoader
from utils.aggregate_block.dataset_and_transform_generate import get_transform
from utils.aggregate_block.fix_random import fix_random
from utils.bd_dataset_v2 import (
    dataset_wrapper_with_transform,
    prepro_cls_DatasetBD_v2,
    xy_iter,
)

from benchmarks.sides import Given, anomaly, rates

BATCH = 32


def known() -> dict[str, Any]:
    state = PreActResNet18(num_classes=10).state_dict()
    shapes = {k: list(v.shape) for k, v in state.items() if "num_batches" not in k}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"versions": versions, "nets": {"residual": shapes}}


def method(given: Given, module: str, **settings: Any) -> tuple[types.ModuleType, Any]:
    """A module of its methods, which read the arguments of their command line from a name of the
    module, and these.
    """
    found: Any = importlib.import_module(module)
    folder = given.folder / "record"
    folder.mkdir(exist_ok=True)
    found.args = types.SimpleNamespace(
        device="cpu", dataset="gtsrb", model="preactresnet18", num_classes=10, input_height=32,
        input_width=32, input_channel=3, batch_size=BATCH, random_seed=0, save_path=str(folder),
        log="record/", result_file="net", **settings,
    )  # fmt: skip
    return found, found.args


def state(given: Given) -> dict[str, torch.Tensor]:
    """Its net's weights; the counts of batches, of which no number depends, as they begin."""
    return PreActResNet18(num_classes=10).state_dict() | {
        name: torch.from_numpy(v) for name, v in given.weights.items()
    }


def loaded(given: Given) -> torch.nn.Module:
    net = PreActResNet18(num_classes=10).eval()
    net.load_state_dict(state(given))
    return net


def pictures(image: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(each) for each in image]


transform = partial(get_transform, "gtsrb", 32, 32, train=False)


def images(image: np.ndarray, label: Any) -> Any:
    return xy_iter(pictures(image), [int(k) for k in label], transform=transform())


def neural_cleanse(given: Given, images: int, epochs: int, batch: int):
    module, args = method(
        given, "defense.nc", EPSILON=1e-7, mask_lr=0.1, nc_epoch=epochs, init_cost=1e-3,
        cost_multiplier=2, use_norm=1, atk_succ_threshold=98.0, early_stop=True,
        early_stop_threshold=0.99, early_stop_patience=25, patience=5, to_file=True,
        output_path=str(given.folder / "output.txt"),
    )  # fmt: skip
    data, label = given.data["clean_image"][:images], given.data["clean_label"][:images]
    dataset = globals()["images"](data, label)

    def run():
        fix_random(0)
        loader = DataLoader(dataset, batch_size=batch, shuffle=True)
        norms = []
        for target in range(args.num_classes):
            args.target_label = target
            mask, pattern = (np.ones((c, 32, 32), np.float32) for c in (1, 3))
            recorder, _ = module.train_mask(args, {"model": state(given)}, loader, mask, pattern)
            norms.append(torch.norm(recorder.mask_best, p=1))
        numbers = {k: k for k in range(args.num_classes)}
        flagged = module.outlier_detection(torch.stack(norms), numbers, args)
        values = [float(norm) for norm in norms]
        return {"norms": values, "index": anomaly(values), "flagged": [k for k, _ in flagged]}

    return run


def strip(given: Given, inputs: int, replicas: int, frr: float):
    """Of the clean images that it draws its overlays from, thresholds are made as well."""
    module, args = method(given, "detection_pretrain.strip")
    clean, stamped = given.data["clean_image"], given.data["stamped_image"][:inputs]
    overlays = images(clean[:replicas], [0] * replicas)
    judged = np.concatenate([clean[replicas : replicas + inputs], stamped])
    inspected, net = images(judged, [0] * 2 * inputs), loaded(given)

    def run():
        fix_random(0)
        worker = module.STRIP(
            args, inspected, overlays, net, strip_alpha=1.0, N=replicas, defense_fpr=frr
        )
        found = np.isin(np.arange(2 * inputs), worker.cleanse())
        return rates(found, np.arange(2 * inputs) >= inputs)

    return run


def activation_clustering(given: Given, rows: int, fields: dict[str, Any]):
    module, args = method(given, "detection_pretrain.ac", **fields)
    image, label = given.data["train_image"][:rows], given.data["train_label"][:rows]
    cleanser = object.__new__(module.ac)
    cleanser.args = args
    taken, net = pictures(image), loaded(given)

    def run():
        fix_random(0)
        suspects = cleanser.cleanser(taken, [int(k) for k in label], transform(), net, 10, args)
        found = np.isin(np.arange(rows), np.asarray(suspects, int))
        return rates(found, given.data["poisoned"][:rows])

    return run


def spectral_signatures(given: Given, rows: int, percentile: int, layer: str):
    module, args = method(
        given, "detection_pretrain.spectral", percentile=percentile, target_layer=layer
    )
    image, label = given.data["train_image"][:rows], given.data["train_label"][:rows]
    written = given.folder / "record" / "detection_info.csv"

    def run():
        written.unlink(missing_ok=True)
        data = prepro_cls_DatasetBD_v2(xy_iter(pictures(image), [int(k) for k in label], None))
        for i in given.data["poisoned"][:rows].nonzero()[0]:
            data.set_one_bd_sample(i, Image.fromarray(image[i]), int(label[i]), int(label[i]))
        cleanser = object.__new__(module.spectral)
        cleanser.args = args
        train = dataset_wrapper_with_transform(data, transform(), None)
        cleanser.result = {"model": state(given), "bd_train": train}
        cleanser.filtering()
        (row,) = csv.DictReader(written.read_text().splitlines())
        return {"recall": float(row["TPR"]), "fpr": float(row["FPR"])}

    return run
