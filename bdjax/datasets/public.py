"""The public sets that `prepared` knows how to get."""

import csv
import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from bdjax.datasets.base import checked
from bdjax.datasets.prepared import Prepared
from bdjax.registry import dataset
from bdjax.types import Split


@dataset("mnist")
class Mnist(Prepared):
    """MNIST: 60,000 / 10,000 handwritten digits, 28×28×1 (LeCun et al., 1998).

    Reference: Yann LeCun, Leon Bottou, Yoshua Bengio and Patrick Haffner, "Gradient-Based Learning
    Applied to Document Recognition", Proceedings of the IEEE.
    """

    tfds, stock, shape = "mnist", "MNIST", (28, 28, 1)
    url = "https://storage.googleapis.com/cvdf-datasets/mnist/"
    files = tuple(
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    names = tuple("0123456789")

    @staticmethod
    def parse(*files: Path) -> tuple[Split, Split]:
        def read(images: Path, labels: Path) -> Split:
            pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
            label = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
            return checked(images, pixels.reshape(-1, 28, 28, 1), label)

        return read(*files[:2]), read(*files[2:])


@dataset("fashion-mnist")
class FashionMnist(Mnist):
    """Fashion-MNIST: 60,000 / 10,000 pictures of clothes, 28×28×1 (Xiao et al., 2017,
    arXiv:1708.07747).

    Reference: Han Xiao, Kashif Rasul and Roland Vollgraf, "Fashion-MNIST: A Novel Image Dataset for
    Benchmarking Machine Learning Algorithms".
    """

    tfds, stock = "fashion_mnist", "FashionMNIST"
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )


@dataset("cifar10")
class Cifar10(Prepared):
    """CIFAR-10: 50,000 / 10,000 small photographs, 32×32×3 (Krizhevsky, 2009).

    Reference: Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", Technical
    report, University of Toronto.
    """

    tfds, stock, shape = "cifar10", "Cifar10", (32, 32, 3)
    url = "https://www.cs.toronto.edu/~kriz/"
    files = ("cifar-10-binary.tar.gz",)
    names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    @staticmethod
    def parse(*files: Path) -> tuple[Split, Split]:
        def read(tar: tarfile.TarFile, *batches: str) -> Split:
            members = [tar.extractfile(f"cifar-10-batches-bin/{batch}.bin") for batch in batches]
            rows = np.frombuffer(
                b"".join(file.read() for file in members if file), np.uint8
            ).reshape(-1, 3073)
            return checked(
                files[0], rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
            )

        with tarfile.open(files[0]) as tar:
            return read(tar, *(f"data_batch_{i}" for i in range(1, 6))), read(tar, "test_batch")


@dataset("gtsrb")
class Gtsrb(Prepared):
    """German traffic signs: 39,209 / 12,630 images of 43 signs, 32×32×3 (Stallkamp et al., 2012).

    The whole frame is resized, with its margin of some 10 % around the sign. A track is some 30
    frames of one sign on one drive: these stay together when images are held out.

    Reference: Johannes Stallkamp, Marc Schlipsing, Jan Salmen and Christian Igel, "Man vs.
    Computer: Benchmarking Machine Learning Algorithms for Traffic Sign Recognition", Neural
    Networks.
    """

    tfds, shape = "gtsrb", (32, 32, 3)
    url = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
    files = (
        "GTSRB_Final_Training_Images.zip",
        "GTSRB_Final_Test_Images.zip",
        "GTSRB_Final_Test_GT.zip",
    )
    md5 = (
        "f33fd80ac59bff73c82d25ab499e03a3",
        "c7e4e6327067d32654124b0fe9e82185",
        "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
    )
    # fmt: off
    names = (
        "Limit 20", "Limit 30", "Limit 50", "Limit 60", "Limit 70", "Limit 80", "End of limit 80",
        "Limit 100", "Limit 120", "No passing", "No passing for lorries", "Right of way",
        "Priority road", "Yield", "Stop", "No vehicles", "No lorries", "No entry", "Caution",
        "Curve left", "Curve right", "Double curve", "Bumpy road", "Slippery road", "Road narrows",
        "Road work", "Traffic signals", "Pedestrians", "Children", "Bicycles", "Ice or snow",
        "Wild animals", "End of limits", "Turn right", "Turn left", "Ahead only", "Ahead or right",
        "Ahead or left", "Keep right", "Keep left", "Roundabout", "End of no passing",
        "End of no passing for lorries",
    )
    # fmt: on

    @staticmethod
    def parse(*files: Path) -> tuple[Split, Split]:
        from PIL import Image

        def read(archive: Path) -> tuple[list[str], np.ndarray]:
            with zipfile.ZipFile(archive) as file:
                names = sorted(name for name in file.namelist() if name.endswith(".ppm"))
                frames = (Image.open(io.BytesIO(file.read(name))) for name in names)
                small = [
                    np.asarray(frame.resize((32, 32), Image.Resampling.BILINEAR))
                    for frame in frames
                ]
                return names, np.stack(small)

        names, image = read(files[0])  # …/CLASS/TRACK_FRAME.ppm
        label, track = np.array(
            [[int(n.split("/")[-2]), int(n.split("/")[-1].split("_")[0])] for n in names]
        ).T
        train = checked(files[0], image, label, track)
        names, image = read(files[1])
        with zipfile.ZipFile(files[2]) as file, file.open("GT-final_test.csv") as answers:
            rows = csv.DictReader(io.TextIOWrapper(answers), delimiter=";")
            answer = {row["Filename"]: int(row["ClassId"]) for row in rows}
        return train, checked(files[1], image, np.array([answer[n.split("/")[-1]] for n in names]))
