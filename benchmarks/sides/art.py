"""The Adversarial Robustness Toolbox, by its public classes."""
# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import logging
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from art.defences import detector, transformer
from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense
from art.defences.transformer.poisoning import STRIP, NeuralCleanse
from art.estimators.classification import PyTorchClassifier
from torch import nn

from benchmarks import rivals
from benchmarks.sides import Given, anomaly, rates

logging.disable(logging.WARNING)


def known() -> dict[str, Any]:
    shapes = {name: list(array.shape) for name, array in rivals.badnets_cnn().state_dict().items()}
    return {
        "versions": {
            "adversarial-robustness-toolbox": version("adversarial-robustness-toolbox"),
            "torch": torch.__version__,
        },
        "nets": {"small": shapes},
    }


def loaded(given: Given) -> nn.Sequential:
    net = rivals.badnets_cnn().eval()
    net.load_state_dict({name: torch.from_numpy(v) for name, v in given.weights.items()})
    return net


def classifier(net: nn.Module, classes: int = 10) -> PyTorchClassifier:
    return PyTorchClassifier(
        net, loss=nn.CrossEntropyLoss(), input_shape=(1, 28, 28), nb_classes=classes,
        clip_values=(0, 1), device_type="cpu",
    )  # fmt: skip


def pixels(image: np.ndarray) -> np.ndarray:
    return image.transpose(0, 3, 1, 2).astype(np.float32) / 255


def strip(given: Given, inputs: int, replicas: int, frr: float):
    """A Softmax is appended to the net, and the validation images are overlays too."""
    net = nn.Sequential(loaded(given), nn.Softmax(1)).eval()
    clean = pixels(given.data["clean_image"][:inputs])
    stamped = pixels(given.data["stamped_image"][:inputs])

    def run():
        defense = STRIP(classifier(net))(num_samples=replicas, false_acceptance_rate=frr)
        defense.mitigate(clean)
        abstained = [~defense.predict(x).any(1) for x in (clean, stamped)]
        return {"fpr": abstained[0].mean(), "recall": abstained[1].mean()}

    return run


def _samples(given: Given, cut: bool, defense: Any, classes: int):
    net = loaded(given)
    # The last layer alone is looked at: a net without its classifier shows what stands before it.
    shown = classifier(nn.Sequential(*net[:-1]), 512) if cut else classifier(net)
    x = pixels(given.data["train_image"])
    y = np.eye(classes, dtype=np.float32)[given.data["train_label"]]

    def run():
        _, clean = defense(shown, x, y)
        return rates(np.asarray(clean) == 0, given.data["poisoned"])

    return run


def activation_clustering(given: Given, fields: dict[str, Any], cut: bool):
    def detect(shown, x, y):
        return ActivationDefence(shown, x, y).detect_poison(**fields)

    return _samples(given, cut, detect, 10)


def spectral_signatures(given: Given, fields: dict[str, Any], cut: bool):
    def detect(shown, x, y):
        return SpectralSignatureDefense(shown, x, y, **fields).detect_poison()

    return _samples(given, cut, detect, 10)


def fine_pruning(given: Given):
    given_ = [
        name
        for name in (*dir(detector.poison), *dir(transformer.poisoning))
        if "prun" in name.lower()
    ]
    raise LookupError(f"classes that prune: {given_ or 'none'}")


def neural_cleanse(given: Given, images: int, fields: dict[str, Any], repaired: bool = False):
    """On a Keras net with the same weights. `repaired`: the learning rate is put back where its
    `reset` has set it to 0 with the optimizer's other variables.
    """
    import keras
    from art.estimators.classification import KerasClassifier

    layers = keras.layers
    net = keras.Sequential([
        layers.Input((28, 28, 1)), layers.Conv2D(16, 5, activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(32, 5, activation="relu"), layers.MaxPooling2D(), layers.Permute((3, 1, 2)),
        layers.Flatten(), layers.Dense(512, activation="relu"),
        layers.Dense(10, activation="softmax"),
    ])  # fmt: skip
    net.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    net.set_weights([
        v.transpose(2, 3, 1, 0) if v.ndim == 4 else v.T for v in given.weights.values()
    ])  # fmt: skip
    x = given.data["clean_image"][:images].astype(np.float32) / 255
    y = np.eye(10, dtype=np.float32)[given.data["clean_label"][:images]]

    def run():
        classifier = KerasClassifier(net, clip_values=(0, 1))
        defense = NeuralCleanse(classifier)(classifier, **fields)
        reset, rate = defense.reset, fields["learning_rate"]

        def again():
            reset()
            defense.opt.learning_rate.assign(rate)

        if repaired:
            defense.reset = again
        masks = [defense.generate_backdoor(x, y, target)[0] for target in np.eye(10)]
        norms = [float(np.abs(mask).sum()) for mask in masks]
        return {"norms": norms, "index": anomaly(norms)}

    return run
