"""A whole study, 3 attacks × 4 defenses × 2 seeds on a ResNet-18 of 32×32 images: a command each of
BackdoorBench's scripts, and one `bdjax study`; what both leave behind when they are killed.

BackdoorBench knows no data set of the user's: the images are written in the layout of its GTSRB, of
which the 43 classes are made from 10 by how bright a picture is among its likes.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bdjax import datasets
from bdjax.store import read_rows
from bdjax.types import BadInput, Split
from benchmarks.residual import widened

NAME = "a whole study"
CLASSES = 43
GRIDS = {
    "smoke": (("badnet",), ("spectral",), 1, 1, 430, 215),
    "cpu": (("badnet", "blended", "sig"), ("fp", "ac", "spectral", "strip"), 2, 2, 860, 430),
    "paper": (("badnet", "blended", "sig"), ("fp", "ac", "spectral", "strip"), 2, 20, 8600, 1720),
}
"""By scale: attacks, defenses, seeds, epochs, images to train on and to test on."""
OURS = {
    "badnet": "badnets", "blended": "blended", "sig": "gotham", "fp": "fine-pruning:backdoorbench",
    "ac": "activation-clustering:backdoorbench", "spectral": "spectral-signatures:backdoorbench",
    "strip": "strip:backdoorbench",
}  # fmt: skip
"""What bdjax calls the same; for the sinusoid, which it has not, another attack on whole images."""
SCRIPTS = {"strip": "detection_pretrain/strip.py"}
"""Where a defense's script is, if not in `defense/`."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "badnet": ("--patch_mask_path", "resource/badnet/trigger_image.png"),
    "sig": ("--pratio", "0.02"),  # of all images, among those of the target
    "strip": ("--clean_sample_num", "43"),
}
BATCH = 64
STRIP = {"n": 26, "inputs": 43}
"""Its boundary is fit on as many images as there; overlays are what is left of the clean ones."""
LAST = "bdjax, killed after 60 % of its time and given again"


class Ended(NamedTuple):
    """A command that ended: wall seconds, the most memory of it, its code (below 0: killed), and
    what it said last.
    """

    seconds: float
    peak_mb: float
    code: int
    last: str


def ended(
    words: Sequence[str], folder: Path, variables: Mapping[str, str], until: float | None = None
) -> Ended:
    """Runs a command to its end, or kills it after `until` seconds."""
    log = folder / "log.txt"
    begun = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            words, cwd=folder, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip
    while True:
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            break
        if until is not None and time.monotonic() - begun > until:
            os.killpg(process.pid, signal.SIGKILL)
            until = None
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(said) if line.strip()), "")
    return Ended(time.monotonic() - begun, usage.ru_maxrss / 1e3, process.returncode, last[:200])


def pictures(count: int, split: Split) -> Split:
    """`count` images of 43 classes, as many of each as can be."""
    image = widened(split).image
    bright, label = image.mean((1, 2, 3)), np.zeros(len(image), np.int32)
    parts, first = [5, 5, 5] + [4] * 7, 0
    for k, n in enumerate(parts):
        rows = np.flatnonzero(split.label == k)
        label[rows[np.argsort(bright[rows])]] = first + np.arange(len(rows)) * n // len(rows)
        first += n
    rows = np.concatenate([np.flatnonzero(label == k)[: count // CLASSES] for k in range(CLASSES)])
    return Split(image[rows], label[rows])


def written(folder: Path, train: Split, test: Split) -> None:
    """`train` and `test` as BackdoorBench reads GTSRB, and as an .npz each."""
    for name, split in (("train", train), ("test", test)):
        np.savez(folder / f"{name}.npz", image=split.image, label=split.label)
    places = {k: folder / "data" / "gtsrb" / "Train" / f"{k:05d}" for k in range(CLASSES)}
    lists: list[tuple[Path, int | None, Split]] = [
        (place / f"GT-{k:05d}.csv", k, train) for k, place in places.items()
    ]
    lists.append((folder / "data" / "gtsrb" / "Test" / "GT-final_test.csv", None, test))
    for file, k, split in lists:
        file.parent.mkdir(parents=True)
        with open(file, "w", newline="") as out:
            table = csv.writer(out, delimiter=";")
            table.writerow(["Filename", *"WHXYZA", "ClassId"])
            rows = range(len(split.label)) if k is None else np.flatnonzero(split.label == k)
            for i in rows:
                Image.fromarray(np.asarray(split.image[i])).save(file.parent / f"{i:05d}.png")
                table.writerow([f"{i:05d}.png", *[0] * 6, split.label[i]])


def scripts(scale: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of BackdoorBench, after the interpreter's name, and what each leaves, as a
    pattern in `record`.
    """
    attacks, defenses, seeds, epochs, _, _ = GRIDS[scale]
    shared = [
        "--dataset", "gtsrb", "--dataset_path", "./data", "--device", "cpu", "--model", "resnet18",
        "--num_workers", "0", "--batch_size", str(BATCH), "--epochs", str(epochs), "--amp", "False",
    ]  # fmt: skip
    for seed, attack in [(seed, attack) for seed in range(seeds) for attack in attacks]:
        name, seeded = f"{attack}_{seed}", [*shared, "--random_seed", str(seed)]
        yield (
            f"{name}/attack_result.pt",
            [
                f"attack/{attack}.py", "--yaml_path", "config/attack/prototype/gtsrb.yaml",
                "--bd_yaml_path", f"config/attack/{attack}/default.yaml", "--save_folder_name",
                name, *OPTIONS.get(attack, ()), *seeded,
            ],
        )  # fmt: skip
        for defense in defenses:
            kind = "detection" if defense in SCRIPTS else "defense"
            left = (
                "detection/strip_pretrain/detection_info.csv"
                if defense in SCRIPTS
                else (f"defense/{defense}/defense_result.pt")
            )
            yield (
                f"{name}/{left}",
                [
                    SCRIPTS.get(defense, f"defense/{defense}.py"), "--result_file", name,
                    "--yaml_path", f"config/{kind}/{defense}/gtsrb.yaml",
                    *OPTIONS.get(defense, ()), *seeded,
                ],
            )  # fmt: skip


def ours(scale: str, out: str) -> list[str]:
    """The command of bdjax, after the interpreter's name."""
    attacks, defenses, seeds, epochs, _, _ = GRIDS[scale]
    words = ["-m", "bdjax", "study", "--dataset", "train.npz", "--model", "resnet"]
    words += ["--seeds", str(seeds), "--out", out, "--quiet"]
    for kind, names in (("attack", attacks), ("defense", defenses)):
        words += [word for name in names for word in (f"--{kind}", OURS[name])]
    settings = {"recipe.epochs": epochs, "recipe.batch": BATCH}
    if "strip" in defenses:
        settings |= {f"defense.{name}": value for name, value in STRIP.items()}
    for path, value in settings.items():
        words += ["--set", f"{path}={value}"]
    return words


def studied(scale: str, folder: Path, checkout: Path, python: str, root: Path) -> Iterator[tuple]:
    """The name of a row, its metrics, and what is to be said of it: both as they are, then both
    killed in the middle and begun again.
    """
    attacks, _, seeds, _, rows, tests = GRIDS[scale]
    data = datasets.load()
    written(folder, pictures(rows, data.train), pictures(tests, data.test))
    for part in checkout.iterdir():  # its scripts write beside themselves: not in the user's folder
        if part.is_dir() and part.name not in ("record", "data", ".git"):
            (folder / part.name).symlink_to(part)
    (folder / "record").mkdir()
    theirs = {"PYTHONPATH": ".", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    mine = {"PYTHONPATH": str(root), "BDJAX_DATA_DIR": str(folder / "home")}

    def left(rows_of: str) -> int:
        file = folder / rows_of / "results.jsonl"
        found = read_rows([file]) if file.exists() else []
        return len({row["run"] for row in found if "error" not in row})

    commands = [(there, [python, *words]) for there, words in scripts(scale)]
    taken, failed = [], []
    for there, words in commands:
        taken.append(ended(words, folder, theirs))
        if not (folder / "record" / there).exists():
            failed.append(f"{words[1]}: {taken[-1].last}")
    whole = sum(one.seconds for one in taken)
    why = f"of {len(failed)} of its commands nothing is left: {failed[0]}" if failed else ""
    yield (
        "BackdoorBench",
        {
            "wall_s": whole, "peak_mb": max(one.peak_mb for one in taken),
            "commands": len(commands), "results": len(commands) - len(failed),
        },
        why,
    )  # fmt: skip
    one = ended([sys.executable, *ours(scale, "whole")], folder, mine)
    if one.code:
        raise BadInput(f"bdjax study ended with code {one.code}: {one.last}")
    victims = len(attacks) * seeds
    yield (
        "bdjax",
        {
            "wall_s": one.seconds, "peak_mb": one.peak_mb, "commands": 1, "results": left("whole"),
            "ratio": whole / one.seconds,
        },
        "clean twins of the victims are trained and judged as well",
    )  # fmt: skip
    there, words = commands[0]
    words = ["killed" if word == there.split("/")[0] else word for word in words]
    ended(words, folder, theirs, taken[0].seconds / 2)
    again = ended(words, folder, theirs)
    kept = (folder / "record" / "killed" / "attack_result.pt").exists()
    yield (
        "BackdoorBench, its first command killed halfway and given again",
        {"wall_s": again.seconds, "results": float(kept)},
        "" if kept else f"the same command then stops: {again.last}",
    )  # fmt: skip
    ended([sys.executable, *ours(scale, "killed")], folder, mine, 0.6 * one.seconds)
    kept = left("killed")
    again = ended([sys.executable, *ours(scale, "killed")], folder, mine)
    yield (
        LAST,
        {"wall_s": again.seconds, "results": left("killed"), "kept": kept, "victims": victims},
        "" if again.code == 0 else again.last,
    )  # fmt: skip
