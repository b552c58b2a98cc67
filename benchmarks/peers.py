"""`python -m benchmarks peers`: what a user would run instead. trojanzoo, ART and a checkout of
BackdoorBench beside bdjax: the same weights, images and budgets, seconds and results of both.

They have an environment apart, as trojanzoo needs an older matplotlib than bdjax:

    python3.11 -m venv peers
    peers/bin/pip install -e '.[peers]'
    peers/bin/pip install 'matplotlib<3.9'  # bdjax is not run there
    python -m benchmarks peers --python peers/bin/python --backdoorbench DIR

BackdoorBench needs pyyaml, pandas, opencv-python-headless, kornia, imageio, pytorch_wavelets,
PyWavelets and 'setuptools<81' there as well; ART's Neural Cleanse needs tensorflow-cpu. What is not
there has a row that says so. The whole study (`--only "*study*"`) needs BackdoorBench alone, in an
environment with 'numpy<1.24': its Fine-Pruning and activation clustering stop under a newer one.

Each library runs in processes of its own, ours and theirs in turn. Cold is the first call in a
fresh process, imports apart; warm are the calls after it, in processes that stay.
"""

import contextlib
import fnmatch
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bdjax import datasets, registry
from bdjax.attacks.badnets import BadNets
from bdjax.foreign import native
from bdjax.train import Recipe, fit, poisoned_set
from bdjax.types import BadInput
from benchmarks import measure
from benchmarks.residual import widened
from benchmarks.sides import ours, study

ROOT = Path(__file__).parents[1]
PEERS = {"trojanzoo": "trojanzoo", "art": "ART", "backdoorbench": "BackdoorBench"}
INSTALL = "benchmarks/peers.py says how they are installed; --python names their interpreter"


STUDY = "BackdoorBench: a whole study"


class Failed(Exception):
    """A library stopped, in its words."""


class Job(NamedTuple):
    """A comparison: `job` is a function of both modules in `benchmarks.sides`, prepared with the
    settings `ours` and `theirs`; `cause`: what is wrong there, or was changed.
    """

    name: str
    peer: str
    net: str
    job: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    cause: str = ""

    @property
    def title(self) -> str:
        return f"{PEERS[self.peer]}: {self.name}"


class Size(NamedTuple):
    """How much each job does: Neural Cleanse's outer steps and mini-batches of 32 for each of 10
    labels; STRIP's inputs, as many clean as stamped, and replicas; rows of a training set; images
    and epochs of a fine-tuning.
    """

    steps: int
    batches: int
    inputs: int
    replicas: int
    rows: int
    images: int = 0
    epochs: int = 0


SIZES = {
    "smoke": {"small": Size(1, 2, 10, 4, 400, 100, 1), "residual": Size(1, 1, 4, 4, 200)},
    "cpu": {"small": Size(10, 10, 100, 50, 5000, 1000, 5), "residual": Size(2, 2, 32, 20, 1000)},
    "paper": {
        "small": Size(50, 31, 500, 50, 9000, 1000, 10),
        "residual": Size(8, 10, 100, 100, 9000),
    },
}
TRAINING = {
    "smoke": {"small": (400, 1), "residual": (200, 0)},
    "cpu": {"small": (5000, 5), "residual": (1000, 3)},
    "paper": {"small": (9000, 8), "residual": (9000, 8)},
}
"""Images and epochs of the two victims; 0: the net as it begins."""
LAST = "sees a PyTorch net's last layer alone, here the logits"
CUT = "with a net cut before its last layer, of which it sees the last one alone"
KERAS = (
    "is for Keras alone, and on Keras 3 its reset sets the learning rate to 0 with the "
    "optimizer's other variables, so that no mask moves"
)


def jobs(scale: str) -> Iterator[Job]:
    """All comparisons of a scale but the study."""
    small, residual = SIZES[scale]["small"], SIZES[scale]["residual"]
    count = 32 * small.batches
    search = {
        "steps": small.steps, "batches": small.batches, "start_at_zero": False, "cost_up": 1.5,
        "cost_down": 1.5**1.5, "patience": 10, "stop_ratio": 0.99, "stop_patience": 20,
    }  # fmt: skip
    zoo = "trojanzoo", "small"
    yield Job(
        "Neural Cleanse", *zoo, "neural_cleanse", {"images": count, "fields": search},
        {"images": count, "epochs": small.steps, "batch": 32},
        "keeps the last mask, not the best, of a rate that falls along a cosine; no verdict",
    )  # fmt: skip
    blend = {"blend": "average", "n": small.replicas}
    pairs = {"inputs": small.inputs, "replicas": small.replicas, "batch": small.inputs}
    given = {"inputs": small.inputs, "overlays": 2 * small.replicas}
    whole = given | {"fields": blend | {"frr": 0.05}}
    yield Job("STRIP", *zoo, "strip", whole, pairs)
    yield Job("STRIP, scoring alone", *zoo, "strip_scores", given | {"fields": blend}, pairs)
    there = {"reduce_method": "FastICA", "cluster_analysis": "silhouette_score"}
    here = {"reduce": "ica", "rule": "silhouette", "starts": 1}
    clustering = {"batch": 100, "fields": there}
    yield Job(
        "activation clustering", *zoo, "activation_clustering", {"fields": here}, clustering,
        "compares rows of a shuffled loader with unshuffled truth",
    )  # fmt: skip
    yield Job(
        "activation clustering, repaired", *zoo, "activation_clustering", {"fields": here},
        clustering | {"repaired": True},
        "rows in the order of its truth; it splits by what the net answers, not by labels, and its "
        "ICA and k-means draw anew each time",
    )  # fmt: skip
    yield Job(
        "spectral signatures", *zoo, "spectral_signatures", {"fields": {}}, {},
        "is commented out there",
    )  # fmt: skip
    recipe = {"epochs": small.epochs, "batch": 100, "lr": 1e-3}
    tuned = {"images": small.images, "tests": small.images // 2, "recipe": recipe}
    yield Job(
        "Fine-Pruning", *zoo, "fine_pruning", tuned | {"fields": {"share": 0.8}},
        tuned | {"ratio": 0.8},
    )  # fmt: skip

    art = "art", "small"
    for words, repaired in (("", False), (", repaired", True)):
        yield Job(
            f"Neural Cleanse{words}", *art, "neural_cleanse",
            {"images": count, "fields": search | {"patience": 5, "stop_patience": 10}},
            {
                "images": count, "repaired": repaired,
                "fields": {"steps": small.steps, "learning_rate": 0.1, "batch_size": 32, "norm": 1},
            },
            "with its learning rate put back" if repaired else KERAS,
        )  # fmt: skip
    yield Job(
        "STRIP", *art, "strip", given | {"fields": blend | {"frr": 0.05}},
        {"inputs": small.inputs, "replicas": small.replicas, "frr": 0.05},
        "takes the entropy over the replicas instead of the classes, and needs a Softmax appended",
    )  # fmt: skip
    for words, cut in (("", False), (", net cut", True)):
        yield Job(
            f"activation clustering{words}", *art, "activation_clustering",
            {"fields": {"starts": 1, "size": 0.5}},
            {"cut": cut, "fields": {"nb_clusters": 2, "nb_dims": 10, "reduce": "PCA"}},
            CUT if cut else LAST,
        )  # fmt: skip
        yield Job(
            f"spectral signatures{words}", *art, "spectral_signatures",
            {"fields": {"projection": "released", "remove": 0.495}},
            {"cut": cut, "fields": {"expected_pp_poison": 0.33, "eps_multiplier": 1.5}},
            CUT if cut else LAST,
        )  # fmt: skip
    yield Job(
        "Fine-Pruning", *art, "fine_pruning", tuned | {"fields": {"share": 0.8}}, {}, "has none"
    )

    bench = "backdoorbench", "residual"
    count = 32 * residual.batches
    search = {
        "steps": residual.steps, "batches": residual.batches, "start_at_zero": False,
        "success": 0.98, "stop_ratio": 0.99, "init": "ones",
    }  # fmt: skip
    for words, alone in (("", False), (", search alone", True)):
        yield Job(
            f"Neural Cleanse{words}", *bench, "neural_cleanse",
            {"images": count, "fields": search, "search": alone},
            {"images": count, "epochs": residual.steps, "batch": 32},
        )  # fmt: skip
    yield Job(
        "STRIP", *bench, "strip",
        {
            "inputs": residual.inputs, "overlays": residual.replicas,
            "fields": {"n": residual.replicas, "frr": 0.1},
        },
        {"inputs": residual.inputs, "replicas": residual.replicas, "frr": 0.1},
    )  # fmt: skip
    yield Job(
        "activation clustering", *bench, "activation_clustering",
        {"fields": {"reduce": "ica", "starts": 1}},
        {"rows": residual.rows, "fields": {"nb_dims": 10, "nb_clusters": 2}},
    )  # fmt: skip
    yield Job(
        "spectral signatures", *bench, "spectral_signatures",
        {"fields": {"projection": "released", "site": "conv_last"}},
        {"rows": residual.rows, "percentile": 85, "layer": "layer4"},
    )  # fmt: skip


# --- What both are given ---


def victim(scale: str, net: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A model with a backdoor, its variables, and the arrays that the jobs read."""
    rows, epochs = TRAINING[scale][net]
    most = SIZES[scale][net]
    data, model, key = datasets.load(), ours.net(net), jax.random.key(0)
    wide = widened if net == "residual" else lambda split: split
    # Their order is that of classes; jobs take the first so many.
    train, clean, test = (
        wide(split[mixed(len(split.label), len(split.label))])
        for split in (data.train, data.clean, data.test)
    )
    attack = BadNets(rate=0.05 if net == "small" else 0.1)
    poisoned = poisoned_set(key, train[:rows], attack, data.classes)
    recipe = Recipe(epochs=max(epochs, 1), batch=64 if net == "small" else 32)
    begin = jax.jit(model.init)
    train_it = jax.jit(lambda key, poisoned: fit(key, model, recipe, poisoned)[0])
    variables = train_it(key, poisoned) if epochs else begin(key)

    def bytes_of(x):
        return np.asarray(np.round(np.asarray(x) * 255), np.uint8)

    stamp = jax.jit(jax.vmap(lambda x: attack.stamp(jnp.asarray(1), x, key)))
    others = test[np.flatnonzero(np.asarray(test.label) != attack.target)]
    image, label = jax.jit(lambda p: p.rows(np.arange(most.rows)))(poisoned)
    kind = np.asarray(poisoned.plan.kind)[: most.rows]
    valid = train[slice(None, most.inputs * most.replicas)]
    arrays = {"train_image": bytes_of(image), "train_label": label, "poisoned": kind > 0}
    arrays["stamped_image"] = bytes_of(stamp(others.image[: most.inputs].astype(np.float32) / 255))
    arrays |= {
        f"{name}_{part}": getattr(split, part)
        for name, split in (("clean", clean), ("test", test), ("valid", valid))
        for part in ("image", "label")
    }
    return model, variables, {name: np.asarray(array) for name, array in arrays.items()}


def mixed(n: int, rows: int) -> np.ndarray:
    """`rows` of `n` numbers in random order."""
    return np.random.default_rng(0).permutation(n)[:rows]


def named(
    net: str, model: Any, variables: Any, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """The weights by the names of a PyTorch net of the same architecture, whose arrays have
    `shapes`.
    """
    blank = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    _, moves, _ = native.variables(ours.NETS[net][0], model, blank, "torch")
    flat = flatten_dict(variables, sep="/")
    return {move.name: move.theirs(np.asarray(flat[path])) for path, move in moves.items()}


def written(file: Path, arrays: Mapping[Any, Any]) -> None:
    """Writes arrays by their names."""
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]


# --- Processes ---


class Process(contextlib.AbstractContextManager):
    """A library, ready to run a job."""

    def __init__(
        self, name: str, folder: Path, net: str, job: str, settings: Mapping[str, Any],
        python: str = sys.executable, path: Sequence[str] = (), **variables: str,
    ):  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *path])
        words = [python, "-m", "benchmarks.sides", name, str(folder), net, job]
        self.errors = open(folder / f"{name}.log", "ab")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [*words, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.errors, cwd=folder, env=kept | variables, text=True,
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            raise Failed(f"{python}: {error.strerror}") from error
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        found = json.loads(line) if line else {"error": f"ended with code {self.process.wait()}"}
        if "error" in found:
            self.__exit__()
            raise Failed(found["error"])
        return found

    def run(self) -> dict[str, Any]:
        print(file=self.process.stdin, flush=True)
        return self.answer()

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        self.errors.close()


class Peer(NamedTuple):
    """A library that is there: how its processes are started, its versions, and the shapes of the
    arrays of its nets.
    """

    python: str
    path: tuple[str, ...]
    versions: dict[str, str]
    nets: dict[str, dict[str, list[int]]]

    def start(self, job: Job, folder: Path) -> Process:
        return Process(job.peer, folder, job.net, job.job, job.theirs, self.python, self.path)


def measured(job: Job, peer: Peer, folder: Path, repeats: int) -> dict[str, Any]:
    """What is measured of `job`, in `repeats` warm calls and fresh processes of each side: metrics,
    the results of both, and why the other one stopped, if it did.
    """
    caches = [Path(tempfile.mkdtemp(dir=folder)) for _ in range(repeats)]

    def mine(cache: Path) -> Process:
        keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return Process(
            "ours", folder, job.net, job.job, job.ours, JAX_COMPILATION_CACHE_DIR=str(cache), **keep
        )

    starts = {"ours": lambda: mine(caches[0]), "theirs": lambda: peer.start(job, folder)}
    first: dict[str, list[float]] = {name: [] for name in starts}
    later: dict[str, list[dict[str, Any]]] = {name: [] for name in starts}
    why = ""
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, start in [*starts.items()]:
            try:
                side = stack.enter_context(start())
                first[name].append(side.run()["seconds"])
                sides[name] = side
            except Failed as error:
                if name == "ours":
                    raise Failed(f"bdjax: {error}") from error
                why = str(error)
                del starts[name]
        for _ in range(repeats):
            for name, side in sides.items():
                later[name].append(side.run())
    for cache in caches[1:]:
        for name, start in starts.items():
            with mine(cache) if name == "ours" else start() as side:
                first[name].append(side.run()["seconds"])
    with mine(caches[0]) as side:
        again = side.run()["seconds"]
    found = {"again_s": again}
    for name in starts:
        end = "" if name == "ours" else "_theirs"
        found |= {
            f"warm{end}_s": statistics.median(one["seconds"] for one in later[name]),
            f"cpu{end}_s": statistics.median(one["cpu_s"] for one in later[name]),
            f"cold{end}_s": statistics.median(first[name]),
            f"peak{end}_mb": max(one["peak_mb"] for one in later[name]),
        }
    if "theirs" in starts:
        pairs = list(zip(later["theirs"], later["ours"]))
        for what, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_s")):
            found[what] = statistics.median(theirs[of] / mine[of] for theirs, mine in pairs)
        found["cold_ratio"] = found["cold_theirs_s"] / found["cold_s"]
    results = {name: later[name][-1]["found"] for name in starts}
    return {"metrics": found, "results": results, "why": why}


# --- Rows ---

HEADS = ("ours s", "theirs s", "ratio", "CPU ratio", "cold s", "theirs s", "ratio", "again s")
COLUMNS = (
    "warm_s", "warm_theirs_s", "ratio", "cpu_ratio", "cold_s", "cold_theirs_s", "cold_ratio",
    "again_s",
)  # fmt: skip
"""Of a row's metrics: seconds of a warm call, of both sides, theirs over ours, of CPU seconds too;
of a first call; and of ours where an earlier process left its compiled programs.
"""


def line(row: dict[str, Any]) -> str:
    """A row as people read it, under `HEADS`: seconds, then the results and what is wrong."""
    found = row["metrics"]
    cells = [
        (f"{found[name]:.2f}" if "ratio" in name else f"{found[name]:.3f}")
        if name in found
        else "–"
        for name in COLUMNS
    ]
    text = f"{row['table']}: {row['row']}".ljust(100)
    if "wall_s" in found:  # of a study
        return (
            text
            + "  ".join(f"{name} {value:.5g}" for name, value in found.items())
            + (f"\n    {row['cause']}" if row["cause"] else "")
        )
    text += "".join(f"{cell:>12}" for cell in cells)
    for side, results in row.get("results", {}).items():
        words = "  ".join(f"{name} {briefly(value)}" for name, value in results.items())
        text += f"\n    {side + ':':8} {words}"
    return text + (f"\n    there: {row['cause']}" if row.get("cause") else "")


def briefly(value: Any) -> str:
    """A result in few characters: of many norms the smallest and the median."""
    if isinstance(value, list):
        if len(value) < 4:
            return str(value)
        return f"{min(value):.4g} … {statistics.median(value):.4g}"
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def run_of(table: str, name: str, scale: str) -> str:
    """What names a row's run."""
    return registry.digest(table, name, scale)


def row(
    table: str, name: str, scale: str, metrics: dict[str, float], results: dict[str, Any],
    cause: str, config: Mapping[str, Any], versions: Mapping[str, Any], seconds: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """A row of results."""
    return measure.row(
        "peers", table, name, scale, metrics, {"compile": 0.0, "run": seconds}, config,
        results=results, cause=re.sub(r" \(/\S+\)", "", cause), versions=dict(versions),
    )  # fmt: skip


def there(name: str, folder: Path, python: str, path: Sequence[str]) -> Peer:
    """A library; raises `Failed` where it is not there."""
    with Process(name, folder, "none", "known", {}, python, path) as process:
        return Peer(python, tuple(path), **process.first)


def rows(
    scale: str,
    done: Mapping[str, Any],
    backdoorbench: Path | None = None,
    python: Path | None = None,
    only: str | None = None,
    repeats: int = 3,
) -> Iterator[dict[str, Any]]:
    """A row for each comparison. `backdoorbench`: a checkout; `python`: the interpreter that has
    the libraries; `only`: a pattern of titles, such as "ART*"; `done`: rows that are there.
    """
    if backdoorbench is not None and not (backdoorbench / "detection_pretrain").is_dir():
        raise BadInput(f"{backdoorbench} is no checkout of BackdoorBench")
    ended = {run for run, row in done.items() if row["metrics"]}
    names = [name for name in PEERS if name != "backdoorbench" or backdoorbench is not None]
    wanted = [job for job in jobs(scale) if job.peer in names]
    titles = [job.title for job in wanted]
    titles += [STUDY] if backdoorbench is not None else []
    chosen = [title for title in titles if only is None or fnmatch.fnmatch(title, only)]
    if not chosen:
        raise BadInput(f"no comparison fits '{only}'; there are: {'; '.join(titles)}")
    wanted = [
        job
        for job in wanted
        if job.title in chosen and run_of(PEERS[job.peer], job.name, scale) not in ended
    ]
    interpreter = os.path.abspath(python or sys.executable)  # not resolved: of an environment
    with tempfile.TemporaryDirectory(prefix="bdjax-") as temporary:
        folder = Path(temporary)
        peers, missing = {}, {}
        for name in dict.fromkeys(job.peer for job in wanted):
            try:
                path = [str(backdoorbench.resolve())] if name == "backdoorbench" else []  # type: ignore[union-attr]
                peers[name] = there(name, folder, interpreter, path)
            except Failed as error:
                missing[name] = f"{error} ({INSTALL})"
        if missing and not peers:
            raise BadInput("; ".join(f"{PEERS[name]}: {why}" for name, why in missing.items()))
        for net in dict.fromkeys(job.net for job in wanted if job.peer in peers):
            model, variables, arrays = victim(scale, net)
            written(folder / f"{net}.npz", arrays)
            written(folder / f"{net}-ours.npz", flatten_dict(variables, sep="/"))
            for name, peer in peers.items():
                if net in peer.nets:
                    weights = named(net, model, variables, peer.nets[net])
                    written(folder / f"{net}-{name}.npz", weights)
        for name, why in missing.items():
            yield row(PEERS[name], "not there", scale, {}, {}, why, {}, {})
        for job in wanted:
            if job.peer in peers:
                begun, peer = time.monotonic(), peers[job.peer]
                try:
                    found = measured(job, peer, folder, repeats)
                except Failed as error:
                    found = {"metrics": {}, "results": {}, "why": str(error)}
                causes = [text for text in (job.cause, found["why"]) if text]
                yield row(
                    PEERS[job.peer], job.name, scale, found["metrics"], found["results"],
                    "; ".join(causes),
                    {"ours": job.ours, "theirs": job.theirs, "repeats": repeats}, peer.versions,
                    time.monotonic() - begun,
                )  # fmt: skip
        last = run_of("A whole study", study.LAST, scale)
        if backdoorbench is not None and STUDY in chosen and last not in ended:
            place = folder / "study"
            place.mkdir()
            checkout = backdoorbench.resolve()
            for name, metrics, cause in study.studied(scale, place, checkout, interpreter, ROOT):
                yield row(
                    "A whole study", name, scale, metrics, {}, cause, {}, {}, metrics["wall_s"]
                )
