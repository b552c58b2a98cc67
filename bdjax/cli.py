"""The command line:
`bdjax run | sweep | study | status | bench | list | data | train | poison | import | audit |
repair | scan | defend | report`.

`--plugin` stands before or after any of them, and acts before what they can choose from is known.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from bdjax import datasets, own, plugins, registry
from bdjax.datasets.files import Format
from bdjax.identity import Stale
from bdjax.registry import Entry
from bdjax.trackers import Log
from bdjax.types import BadInput, Range, Seed, Size, class_name

Kinds = Literal["all", "attacks", "defenses", "models", "datasets"]
Words = tyro.conf.Positional
Settings = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        name="set",
        metavar="PATH=VALUE",
        help="A field of the cells that is set otherwise, such as attack.rate=0.05 or "
        "'defense[fine-pruning].recipe.lr=1e-4'; may be given several times. The results go to a "
        "folder of their own.",
    ),
]
Plugins = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        help="Methods of your own: FILE.py or package.module, before or after the command; may be "
        "given several times. BDJAX_PLUGINS names those that are always wanted.",
        metavar="FILE.py|MODULE",
    ),
]


def run(
    file: Annotated[Path | None, Words] = None,
    listed: Annotated[bool, tyro.conf.arg(name="list")] = False,
    scale: str = "cpu",
    out: Path | None = None,
    seeds: int | None = None,
    lanes: str | None = None,
    settings: Settings = (),
    only: str | None = None,
    quiet: bool = False,
    stale: Stale | None = None,
    log: Log | None = None,
) -> None:
    """Run an experiment file: prints its table "paper vs ours", writes a results folder; goes on
    where it stopped.

    Args:
        file: The experiment, such as mine.py, or the name of one of bdjax's own: shamshiri2023.
        listed: Show bdjax's own experiments, and run none.
        scale: smoke, cpu or paper.
        out: Results folder; results/NAME-SCALE if not given.
        seeds: How many seeds; the scale's own number if not given.
        lanes: Runs side by side on a device, or auto; 1 on a CPU if not given, else all.
        only: Only the tables or rows whose name this pattern fits, such as "MNIST*".
        quiet: No progress.
        stale: Rows and victims that other code made: keep them, or redo them and nothing else; a
            folder that has some is refused if not given.
        log: Where else finished rows go: TensorBoard, Weights & Biases or MLflow, without a
            network.
    """
    from bdjax import experiment

    if (file is None) != listed:
        raise BadInput("run takes an experiment, or --list, which shows bdjax's own")
    if file is None:
        _printed(experiment.listed())
        return
    experiment.run(
        file, scale, out, seeds, quiet, lanes, changes=settings, only=only, stale=stale, log=log
    )


def sweep(
    file: Annotated[Path, Words],
    scale: str = "cpu",
    out: Path | None = None,
    seeds: int | None = None,
    shard: str | None = None,
    hosts: str = "off",
    engine: str | None = None,
    lanes: str = "auto",
    devices: int | None = None,
    resume: bool = True,
    dry_run: bool = False,
    target: str | None = None,
    settings: Settings = (),
    only: str | None = None,
    quiet: bool = False,
    stale: Stale | None = None,
    log: Log | None = None,
) -> None:
    """Run a sweep: an experiment file with many cells, on any number of devices and machines.

    Ctrl-C stops after what is running. Whatever ends it, the same command goes on from there.

    Args:
        file: The sweep, such as mine.py, or the name of one of bdjax's own: sweep_defenses.
        scale: smoke, cpu or paper.
        out: Results folder; results/NAME-SCALE if not given.
        seeds: How many seeds; the scale's own number if not given.
        shard: i/n, i from 0: do every n-th victim, as one of n processes unaware of each other.
        hosts: off; auto (TPU slice, Slurm); or ADDRESS:PORT,N,I: shard by jax.distributed.
        engine: ray or ray:ADDRESS: on the workers of a Ray cluster, dealt out as they become free
            and begun again where one is lost; a cluster of this machine if there is none.
        lanes: Runs side by side on a device: auto measures that once and remembers it, or a number.
        devices: How many devices; all of this process if not given. With an engine, how many a task
            takes: all TPU chips of a host, one GPU, or a node's CPUs as one if not given.
        resume: Go on where an earlier run stopped; --no-resume refuses a folder that has rows.
        dry_run: Print cells, groups, memory and expected time; train nothing.
        target: With --dry-run, of which devices: tpu:v5e:4x4, gpu:h100, gpu:h100:8, cpu. Each
            program is compiled for them, though they are not at hand: memory, time, what is sent.
        only: Only the tables or rows whose name this pattern fits, such as "MNIST*".
        quiet: No progress.
        stale: Rows and victims that other code made: keep them, or redo them and nothing else; a
            folder that has some is refused if not given.
        log: Where else finished rows go: TensorBoard, Weights & Biases or MLflow, without a
            network.
    """
    from bdjax import experiment

    options = {
        "stale": stale,
        "shard": shard,
        "hosts": hosts,
        "engine": engine,
        "devices": devices,
        "resume": resume,
        "dry_run": dry_run,
        "target": target,
        "changes": settings,
        "only": only,
        "log": log,
    }
    experiment.run(file, scale, out, seeds, quiet, lanes, live=True, **options)


def study(
    attack: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    defense: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    dataset: str = "fashion-mnist-sample",
    model: str = "cnn",
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    settings: Settings = (),
    seeds: int = 1,
    out: Path | None = None,
    save: Path | None = None,
    lanes: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    stale: Stale | None = None,
    log: Log | None = None,
) -> None:
    """Run every attack, and the clean twin, under every defense: a study without writing Python.

    Methods are names of `bdjax list`, or NAME:PRESET. The results folder keeps the experiment file
    that the study stands for, study.py.

    Args:
        attack: An attack; may be given several times.
        defense: A defense; may be given several times.
        dataset: A data set: a name of `bdjax list`, a path, or a set that TFDS has prepared.
        model: A family of nets.
        grid: PATH=VALUE,VALUE, such as attack.rate=0.01,0.1: a field over several values; may be
            given several times.
        seeds: How many seeds.
        out: Results folder; results/study-DIGEST if not given.
        save: Where else to write the experiment file, to be changed and run by `bdjax run`.
        lanes: Runs side by side on a device, or auto; 1 on a CPU if not given, else all.
        dry_run: Print cells, groups, memory and expected time; train nothing.
        quiet: No progress.
        stale: Rows and victims that other code made: keep them, or redo them and nothing else; a
            folder that has some is refused if not given.
        log: Where else finished rows go: TensorBoard, Weights & Biases or MLflow, without a
            network.
    """
    from bdjax import experiment, studies
    from bdjax.rows import result_files

    text = studies.text_of(dataset, model, attack, defense, seeds, grid, settings)
    folder = out or Path("results") / f"study-{registry.digest(text)[:8]}"
    if save is not None:
        studies.save(text, save)
    with tempfile.TemporaryDirectory() if dry_run else contextlib.nullcontext(folder) as kept:
        file = studies.keep(text, Path(kept))
        options = {"dry_run": dry_run, "live": True, "stale": stale, "log": log}
        try:
            experiment.run(file, "cpu", folder, None, quiet, lanes, **options)
        except BadInput:
            if save is not None and not result_files(folder):
                save.unlink()  # what was refused is no study yet: the mended command writes it
            raise


def status(folder: Annotated[Path, Words]) -> None:
    """Show what the processes of a run or sweep are doing, from its results folder alone: on any
    machine that sees it.

    Args:
        folder: The results folder.
    """
    from bdjax import progress

    progress.status(folder)


def list_methods(
    kind: Annotated[Kinds, Words] = "all",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
):
    """List the methods: name, paper, year, arXiv, file; of your own ones the plugin, too.

    Args:
        kind: attacks, defenses, models or datasets.
        as_json: As JSON, for scripts.
    """
    found = registry.entries(None if kind == "all" else kind.removesuffix("s"))
    rows = [
        {name: getattr(entry, name) for name in Entry._fields if name not in ("cls", "source")}
        for entry in found
    ]
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    from bdjax.progress import shown

    heads = [name for name in rows[0] if name != "plugin" or any(row[name] for row in rows)]
    table = Table(*heads, box=None)
    for row in rows:
        table.add_row(*(Text("" if row[h] is None else shown(row[h])) for h in heads))
    _printed(table)


def _printed(table: Any) -> None:
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def prepare(
    name: Annotated[str, Words],
    manual_dir: Path | None = None,
    data_dir: Path | None = None,
    quiet: bool = False,
) -> None:
    """Prepare a full data set through tensorflow-datasets (without TensorFlow): checksums verified,
    idempotent.

    Args:
        name: fashion-mnist, mnist, cifar10 or gtsrb.
        manual_dir: A folder that holds the original files, so that nothing is downloaded.
        data_dir: Where to; BDJAX_DATA_DIR or the user's cache if not given.
        quiet: No progress.
    """
    print(datasets.prepare(name, manual_dir=manual_dir, data_dir=data_dir, quiet=quiet))


def report(
    folders: Annotated[tuple[Path, ...], Words],
    out: Path | None = None,
    x: str | None = None,
    y: str | None = None,
    metric: str | None = None,
    latex: bool = False,
    figures: str | None = None,
    bib: bool = False,
    experiment: Path | None = None,
) -> None:
    """Write tables and page of finished results again; several folders become one page; pivots over
    any two axes; what a paper takes.

    Args:
        folders: Results folders, or experiments of bdjax's own, for the rows that came with it.
        out: Where to; if not given the folder itself, or `report` for several.
        x: Axis of a pivot, such as attack.rate or seed.
        y: Its second axis.
        metric: What the pivot shows, such as asr_nt; also lists the best defense of every victim.
        latex: tables.tex, too: a booktabs table for each table.
        figures: pdf,svg or one of them: figures of a paper's width, too, and figures.tex with pdf.
        bib: references.bib, too: BibTeX of what the rows use; tables.tex then cites it.
        experiment: The experiment file that draws the figures, where it is your own; without it,
            those of a study are drawn.
    """
    from bdjax import report as reports
    from bdjax.progress import shown

    if y is not None and x is None:
        raise BadInput("--y is the second axis of a pivot: give the first one, --x, too")
    if x is not None and metric is None:
        raise BadInput("--x is the axis of a pivot: give what it shows, --metric, too")
    if experiment is not None and figures is None:
        raise BadInput("--experiment draws figures: give their formats, --figures pdf,svg, too")
    made: list[Path] = []
    if latex or bib or figures is not None:  # before the page: formats and files may be wrong
        from bdjax.latex import write

        made = write(folders, out, tables=latex, figures=figures, bib=bib, file=experiment)
    print(f"page: {shown(reports.merge(list(folders), out, x=x, y=y, metric=metric))}")
    drawn = [path for path in made if path.parent.name == "figures"]
    for path in made:
        if path not in drawn:
            print(f"paper: {shown(path)}")
    if drawn:
        print(f"figures: {len(drawn)} files in {shown(drawn[0].parent)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a victim of any attack × model × dataset; saves a checkpoint, prints ACC and ASR.

    --attack, --model and --dataset take names of `bdjax list`, or NAME:PRESET; --dataset also takes
    a path (an image folder, .npz, .h5, Parquet) or the name of any set that TFDS has prepared.
    The fields of what was chosen are flags such as --attack.rate. `--attack none` trains the clean
    twin.
    """

    out: Path
    """Folder for the trained model."""
    seed: Seed = 0
    quiet: bool = False

    def __call__(self) -> None:
        from bdjax.checkpoints import old_model, save_model
        from bdjax.store import unfinished
        from bdjax.study import Cell
        from bdjax.sweep import Runner, device_name

        flags: Any = self
        own.whole(self.out, "model.json", old_model)
        cell = Cell("", "", flags.dataset, flags.model, flags.recipe, flags.attack, seed=self.seed)
        with unfinished("train", cell.run_id, device_name()) as store:
            runner = Runner(store, "train", quiet=self.quiet, stale="redo")
            (row,) = runner.run([cell])
            if "error" not in row:
                model, attack, variables = runner.victim(cell)
                about = {
                    "recipe": cell.recipe,
                    "dataset": cell.dataset,
                    "attack": attack,
                    "metrics": row["metrics"],
                    "seed": self.seed,
                }
                save_model(self.out, cell.model, model, variables, **about)
        if "error" in row:
            raise BadInput(f"{row['error']}; try a lower --recipe.lr")
        _show(row, self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poison:
    """Write the data set that any attack poisons, to train on elsewhere: the training set as
    `bdjax train` with this --seed sees it, the test set, and the test images with the triggers.

    --attack and --dataset as in `bdjax train`. --dataset DIR reads what was written into DIR.
    """

    out: Path
    """Folder for the files, an index of the rows (index.csv) and what made them (poison.json)."""
    format: Format = "npz"
    """npz; folder: PNG files in a folder per class; parquet: as HuggingFace has them."""
    seed: Seed = 0
    """The seed of the training."""
    quiet: bool = False

    def __call__(self) -> None:
        from bdjax.poison import write_poisoned
        from bdjax.progress import shown

        flags: Any = self
        about = write_poisoned(
            self.out,
            flags.dataset,
            flags.attack,
            seed=self.seed,
            format=self.format,
            quiet=self.quiet,
        )
        print(", ".join(f"{count} {part} images" for part, count in about["rows"].items()))
        _show_plan(about["counts"])
        for note in about["notes"]:
            print(f"note: {note}")
        size = " --dataset.size None" if self.format == "folder" else ""
        print(f"saved in {shown(self.out)}; --dataset {shown(self.out)}{size} reads it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defend:
    """Apply any defense to a checkpoint of `bdjax train`: prints metrics, saves the repaired model
    to --out.

    --defense takes a name of `bdjax list defenses`, or NAME:PRESET; its fields are flags such
    as --defense.max-drop.
    """

    checkpoint: Annotated[Path, Words]
    """Folder of a trained model."""
    out: Path | None = None
    """Folder for the repaired model; not saved if not given."""
    labels: Literal["given", "net", "none"] = "given"
    """Labels of the images: those of the data set; the net's own answers, so that accuracy says how
    often it still answers the same; or none, and only what needs none is computed."""
    seed: Seed = 0
    train_seed: Seed | None = None
    """The --seed of the model's training, where bdjax 0.1 trained it and did not keep that."""
    quiet: bool = False

    def __call__(self) -> None:
        import jax

        from bdjax import identity
        from bdjax.checkpoints import check_data, copy_model, load_model, old_model, save_model
        from bdjax.store import unfinished
        from bdjax.study import Cell
        from bdjax.sweep import Runner, device_name, fits, labelled
        from bdjax.train import Recipe

        if self.out is not None:
            own.whole(self.out, "model.json", old_model, [self.checkpoint])
        net, model, variables, about = load_model(self.checkpoint)
        if about["dataset"] is None:
            again = "import it with --dataset" if about["origin"] else "save it anew"
            raise BadInput(f"{self.checkpoint}: its model.json names no dataset: {again}")
        flags: Any = self
        stage = flags.defense.stage
        dataset = about["dataset"]
        if self.labels != "given":
            if stage in ("train", "samples"):
                raise BadInput(
                    f"{registry.name_of(flags.defense)} takes the training set as it was labelled: "
                    "leave --labels away"
                )
            dataset = labelled(dataset, model, variables, self.labels)
        fits(model, dataset.load())
        if stage == "samples" and any(defense.stage == "train" for defense in about["defenses"]):
            raise BadInput(
                f"{self.checkpoint} was made by a defense that replaces training, by rows of its "
                f"own: give {registry.name_of(flags.defense)} the model that `bdjax train` made"
            )
        cell = Cell(
            "",
            "",
            dataset,
            net,
            about["recipe"] or Recipe(),  # nobody knows that of an imported net
            about["attack"],
            flags.defense,
            self.seed,
        )
        judges = cell.stage in ("invert", "models", "inputs")
        if judges and self.out is not None:
            raise BadInput(
                f"{registry.name_of(flags.defense)} judges and repairs nothing: leave --out away"
            )
        check_data(about, self.checkpoint, strict=cell.stage == "samples")
        trained = self._trained(about, cell)
        code = identity.codes([cell])[cell.run_id]  # what other code has begun is begun anew
        given = [code, about["defenses"], self.labels, trained, *jax.tree.leaves(variables)]
        with unfinished("defend", cell.run_id, given, device_name()) as store:
            repaired = store.folder / "net"
            found = [row for row in store.rows() if row["run"] == cell.run_id]
            if not found or not (judges or repaired.exists()):
                runner = Runner(store, "defend", quiet=self.quiet, unlabelled=self.labels == "none")
                row, variables = runner.defend(cell, model, variables, trained)
                found = [row]
                if not judges:
                    # One that replaces training takes nothing over from a repaired net.
                    before = () if cell.stage == "train" else about["defenses"]
                    about["defenses"] = (*before, flags.defense)
                    about |= {"metrics": row["metrics"], "seed": trained}
                    save_model(repaired, net, model, variables, **about)
            if self.out is not None:
                copy_model(repaired, self.out)
            arrays = store.arrays(cell.run_id)
        _show(found[0], self.out)
        if cell.stage in ("invert", "models"):
            _show_labels(arrays, dataset.load().names)

    def _trained(self, about: dict[str, Any], cell: Any) -> int | None:
        """The seed of the model's training, which says what rows are poisoned: judges of the
        training rows need it.
        """
        needed = cell.stage == "samples" and about["seed"] is None
        if needed and self.train_seed is None:
            raise BadInput(
                f"{self.checkpoint} does not say with which seed it was trained, so nobody knows "
                "its poisoned rows: give --train-seed N (bdjax 0.1 trained with 0 unless it was "
                "given --seed)"
            )
        if not needed and self.train_seed is not None:
            known = (
                "the judges of training rows alone look at it"
                if cell.stage != "samples"
                else f"the model was trained with seed {about['seed']}"
            )
            raise BadInput(f"leave --train-seed away: {known}")
        return self.train_seed if needed else about["seed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Import any net: a file of ONNX, PyTorch, safetensors or Keras, or an Orbax checkpoint. Says
    what was understood, compares it with the original, and saves it, so that every command goes on
    from it. No code of the file is run.

    Bare weights need --arch, a name of `bdjax list models` or the common ones (resnet18, vgg16_bn),
    and --preprocess.
    """

    file: Annotated[Path, Words]
    """The file."""
    out: Path
    """Folder for the net."""
    preprocess: str | None = None
    """The pixels that the net takes: 0-1, 0-255, -1-1, imagenet, cifar10 … or 'mean=…,… std=…,…',
    with bgr where blue comes first."""
    size: tuple[Size, Size, Size] | None = None
    """Height, width and channels of its images, where the file leaves them open."""
    logits: Path | None = None
    """The original's logits: an .npz with `image` [N, H, W, C] and `logits` [N, K]."""
    accuracy: Annotated[float, Range(0, 1)] | None = None
    """What its accuracy on the test images of --dataset should be, such as 0.95."""

    def __call__(self) -> None:
        from bdjax.checkpoints import old_model
        from bdjax.imports import load_net, save_net
        from bdjax.progress import shown

        flags: Any = self
        own.whole(self.out, "model.json", old_model, [self.file, self.logits])
        if (self.file / "model.json").exists():
            raise BadInput(f"{self.file} is a net of bdjax already")
        loaded = load_net(
            self.file,
            arch=flags.arch,
            preprocess=self.preprocess,
            size=self.size,
            dataset=flags.dataset,
            logits=self.logits,
            accuracy=self.accuracy,
        )
        save_net(self.out, loaded)
        for line in loaded.lines:
            print(shown(line))
        print(f"saved in {shown(self.out)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Is this net backdoored, which label, by what trigger? Needs a few hundred clean images and no
    attack: runs all model judges that apply, and decides by one rule. Writes audit.json and a page.

    Exit codes: 0 no sign, 3 infected, 4 undecided. Ctrl-C and the end of the time leave the page of
    what is there; the same command goes on from it.

    --dataset as in `bdjax train`; where its classes are not the net's, the net labels the images.
    """

    net: Annotated[Path, Words]
    """A folder of `bdjax train` or `bdjax import`, or a file of ONNX or Keras that holds a whole
    net."""
    minutes: Annotated[float, Range(0, 1e6)] = 10.0
    """The time; judges for which it is too short are listed."""
    out: Path | None = None
    """Folder for the results; results/audit-NET if not given."""
    alpha: Annotated[float, Range(1e-9, 0.5)] = 0.05
    """The chance of accusing a clean net that the rule keeps to, as far as its nulls are right."""
    reference: Annotated[int, Range(0, 10_000)] = 0
    """Train so many clean nets and as many backdoored ones for nulls and power; says first how long
    that takes, on top of the minutes."""
    quiet: bool = False

    def __call__(self) -> int:
        from bdjax.audits import CODES, audit, lines
        from bdjax.progress import shown

        flags: Any = self
        if flags.dataset is None:
            raise BadInput("an audit needs clean images of the net's kind: give --dataset")
        out = self.out or Path("results") / f"audit-{self.net.resolve().name}"
        found = audit(
            self.net, flags.dataset, minutes=self.minutes, out=out, alpha=self.alpha,
            reference=self.reference, quiet=self.quiet,
        )  # fmt: skip
        for line in lines(found):
            print(shown(line))
        print(f"page: {shown(out / 'index.html')}")
        return CODES[found.word]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair:
    """Repair a net that was given to you, the trigger unknown, and write it in the format in which
    it came.

    `--defense auto` tries the repairs that apply and leave a net that can be exported, and picks on
    images that none of them saw: by accuracy, less the share that triggers found still move.
    --defense takes a name of `bdjax list defenses`, or NAME:PRESET, too. --attack: a trigger that
    is known, to be measured before and after and used for nothing else. --dataset as in `bdjax
    train`, clean images, by default those that the folder names; where its classes are not the
    net's, the net labels them, and accuracy says how often it still answers the same.
    """

    net: Annotated[Path, Words]
    """Folder of a net, or its file."""
    out: Path
    """Folder for the repaired net."""
    export: Path | None = None
    """File for the repaired net, in the format in which it came; any net can be .safetensors."""
    audit: Path | None = None
    """Folder of an audit, whose triggers are taken; they are looked for if not given."""
    minutes: Annotated[float, Range(1e-3, 1e6)] = 10.0
    """No repair is begun after so many minutes."""
    seed: Seed = 0

    def __call__(self) -> None:
        from bdjax.checkpoints import old_model, save_model
        from bdjax.exports import check_file, export
        from bdjax.imports import load_net
        from bdjax.progress import shown
        from bdjax.repairs import repair_net

        flags: Any = self
        own.whole(self.out, "model.json", old_model, [self.net, self.audit])
        if self.export is not None:
            check_file(load_net(self.net).about, self.export)
        made = repair_net(
            self.net,
            flags.dataset,
            defense=flags.defense,
            audit=self.audit,
            attack=flags.attack,
            minutes=self.minutes,
            seed=self.seed,
            say=lambda line: print(shown(line), flush=True),
        )
        print(f"picked: {registry.name_of(made.defense)}")
        width = max(len(line.what) for line in made.table)
        print(f"{'':{width}}  before   after")
        for what, *both, share in made.table:
            numbers = (f"{100 * n:.1f} %" if share else _number(float(n)) for n in both)
            print(f"{shown(what):{width}}  {'  '.join(f'{text:>6}' for text in numbers)}")
        save_model(self.out, made.net, made.model, made.variables, **made.about)
        print(f"saved in {shown(self.out)}")
        if self.export is not None:
            export(made.net, made.model, made.variables, made.about, self.export)
            print(f"exported to {shown(self.export)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """Are these images poisoned? `bdjax scan SET` judges a training set, on --net or on a net that
    is trained on it; `bdjax scan IMAGES --net NET --clean SET` judges images that came to a net.
    Writes a page with the suspects, suspects.csv, and the set without them, cleaned.npz.

    Exit codes: 0 no sign, 3 infected, 4 undecided. --model and --recipe say which net is trained.
    """

    images: Annotated[str, Words]
    """The set, as --dataset of `bdjax train`; or, with --clean, a folder of images or a set."""
    net: Path | None = None
    """Folder of a net, or its file."""
    clean: str | None = None
    """Clean images of the net's kind, as --dataset of `bdjax train`."""
    out: Path | None = None
    """Folder for the results; results/scan-NAME if not given."""
    alpha: Annotated[float, Range(1e-6, 0.5)] = 0.05
    """The share of clean sets that is called infected at most; of images, of clean ones that each
    filter suspects."""
    seed: Seed = 0

    used_if = {"model": {"net": (None,)}, "recipe": {"net": (None,)}}

    def __call__(self) -> int:
        from bdjax.audits import CODES
        from bdjax.progress import shown
        from bdjax.scans import scan_images, scan_set

        flags: Any = self
        out = self.out or Path("results") / f"scan-{Path(self.images).resolve().stem}"
        more: Any = {"out": out, "alpha": self.alpha, "seed": self.seed}
        more["say"] = lambda line: print(shown(line), flush=True)
        if self.clean is None:
            made = {"model": flags.model, "recipe": flags.recipe} if self.net is None else {}
            found = scan_set(self.images, self.net, **made, **more)
        elif self.net is None:
            raise BadInput("the filters of inputs judge them by a net: give it, --net")
        else:
            found = scan_images(self.images, self.net, self.clean, **more)
        print(f"verdict: {found.word}; {shown(found.reason)}")
        print(f"{found.suspects.sum()} suspects of {len(found.suspects)} images")
        print(f"page: {shown(out / 'index.html')}")
        return CODES[found.word]


def _show(row: dict[str, Any], out: Path | None) -> None:
    from bdjax.progress import shown
    from bdjax.sweep import warn

    if row["verdict"] is not None:
        print(f"{'verdict':14} {row['verdict']}")
    for name, value in row["metrics"].items():
        print(f"{shown(name):14} {_number(value)}")
    if row["metrics"].get("acc_test") is not None:
        warn(row["metrics"]["acc_test"], **row["test"])
    if plan := row.get("plan"):
        _show_plan(plan)
    if out is not None:
        print(f"saved in {shown(out)}")


def _show_plan(plan: dict[str, int]) -> None:
    print(
        f"poisoned       {plan['poisoned']} of {plan['rows']} rows: {plan['relabelled']} "
        f"relabelled, {plan['clean_label']} with their own label, {plan['added']} added"
    )


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "—"
    return str(round(value, 4)) if math.isfinite(value) else "∞" if value > 0 else "−∞"


def _show_labels(arrays: dict[str, Any], names: Sequence[str]) -> None:
    """What a judge found of each label: whether it flags it, and how large its trigger is."""
    import numpy as np

    from bdjax.progress import shown

    flagged = arrays["flagged"]
    norms = arrays.get("norms", np.full(len(flagged), np.nan))
    if "candidate_label" in arrays and "mask" in arrays:  # of neurons: a label's smallest
        sizes = np.where(arrays["valid"], arrays["mask"].sum((1, 2, 3)), np.inf)
        norms = np.full(len(flagged), np.inf)
        np.minimum.at(norms, arrays["candidate_label"], sizes)
        norms[np.isinf(norms)] = np.nan
    found = np.flatnonzero(flagged)
    named = [shown(class_name(k, names)) for k in range(len(flagged))]
    print(f"flagged        {', '.join(named[k] for k in found) or 'no label'}")
    if np.isnan(norms).all():
        return
    for k, norm in enumerate(norms):
        text = "no trigger" if np.isnan(norm) else f"norm {norm:.4g}"
        print(f"  label {named[k]}: {text}{', flagged' if flagged[k] else ''}")


CHOICES: dict[str, dict[str, Any]] = {
    "train": {"attack": "badnets", "model": "cnn", "dataset": "fashion-mnist-sample"},
    "poison": {"attack": "badnets", "dataset": "fashion-mnist-sample"},
    "defend": {"defense": "fine-pruning"},
    "import": {"arch": None, "dataset": None},
    "audit": {"dataset": None},
    "repair": {"defense": "auto", "dataset": None, "attack": None},
    "scan": {"model": "cnn"},
}
"""The methods that a command takes by name, and which it takes if none is named."""


def _taken(flags: Collection[str], args: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes `--FLAG VALUE` and `--FLAG=VALUE` out of `args`: flags and values, and what is left."""
    given, left, words = [], [], iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag.removeprefix("--") in flags:
            given.append((flag.removeprefix("--"), value if equals else next(words, "")))
        else:
            left.append(word)
    return given, left


def plugged(args: Sequence[str]) -> list[str]:
    """Loads the plugins that `args` name; returns what is left."""
    given, left = _taken(["plugin"], args)
    for _, word in given:
        if not word or word.startswith("-"):
            raise BadInput("--plugin takes a file or a module, such as --plugin my_net.py")
        plugins.load_plugins(word)
    return left


def chosen(kinds: dict[str, Any], args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes `--attack NAME:PRESET` and the like out of `args`: the configured methods, and what is
    left.
    """
    given, left = _taken(kinds, args)
    made = {}
    for kind, named in (kinds | dict(given)).items():
        if named is None or named == kinds[kind] == "auto":
            made[kind] = None
            continue
        name, colon, preset = named.partition(":")
        if kind == "dataset":
            made[kind] = datasets.source(named)
        elif kind == "arch":
            from bdjax.foreign.native import architecture

            made[kind] = architecture(named)
        elif named == "none" and kind == "attack":
            made[kind] = None
        else:
            made[kind] = registry.make(kind, name, preset if colon else None)
    return made, left


def _with_fields(base: type, methods: dict[str, Any]) -> type:
    """The command `base` with the fields of the chosen methods as nested flags."""
    given: list[tuple[str, Any, Any]] = [
        (name, type(value), dataclasses.field(default=value))
        for name, value in methods.items()
        if value is not None
    ]
    given.append(("plugin", Plugins, dataclasses.field(default=())))
    absent = {name: None for name, value in methods.items() if value is None}
    made = dataclasses.make_dataclass(
        base.__name__, given, bases=(base,), namespace=absent, frozen=True, kw_only=True
    )
    made.__doc__ = base.__doc__
    return made


RULES = tyro.constructors.ConstructorRegistry()


@RULES.primitive_rule
def _numbers(info: Any) -> Any:
    """A number, written in ASCII, or several where None stands for all. A field that may hold an
    array, so that sweeps can vmap it, is one number on the command line.
    """
    if get_origin(info.type) is tuple or not (found := registry.ranges(info.type)):
        return None
    several = any(get_origin(part) is tuple for part in get_args(info.type))
    kinds = found[0][0]
    kind = next((kind for kind in (float, int) if kind in kinds), None)
    optional = type(None) in get_args(info.type)

    def read(words: list[str]) -> Any:
        if words == ["None"] and optional:
            return None
        return tuple(map(one, words)) if several else one(*words)

    def one(word: str) -> Any:
        if kind is None:
            raise ValueError("an array can be given from Python only")
        try:
            if not word.isascii() or "_" in word or word != word.strip():
                raise ValueError
            return kind(word)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"'{word}' is not {number}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar="ARRAY" if kind is None else kind.__name__.upper() + " ..." * several,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [
            str(one) for one in (value if several and value is not None else (value,))
        ],
    )


@RULES.primitive_rule
def _functions(info: Any) -> Any:
    """A field that holds a function, or another method, is set from Python."""
    if not any(
        "Callable" in str(member) or getattr(member, "_is_protocol", False)
        for member in get_args(info.type)
    ):
        return None

    def read(words: list[str]) -> None:
        if words != ["None"]:
            raise ValueError("it can be given from Python only")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FUNCTION",
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [getattr(value, "__name__", "None")],
    )


def bench() -> None:
    """Measure what training and the defenses cost as they grow."""


def _bench() -> Callable:
    """The benchmarks, which stand beside the package in a clone of the project."""
    try:
        from benchmarks.__main__ import bench
    except ImportError as error:
        reason = (
            f"the project's folder `benchmarks`: install a clone by `pip install -e .` ({error})"
        )
        raise BadInput(f"`bdjax bench` needs {reason}") from error
    return bench


COMMANDS: dict[str, Callable] = {
    "run": run, "sweep": sweep, "study": study, "status": status,
    "list": list_methods, "data": prepare, "train": Train, "poison": Poison,
    "defend": Defend, "report": report, "bench": bench, "import": Import,
    "audit": Audit,
    "repair": Repair, "scan": Scan,
}  # fmt: skip


def _later(fn: Callable) -> Callable:
    """`fn` to be called when all flags are known to be good."""

    @functools.wraps(fn)
    def made(*args, **kwargs):
        kwargs.pop("plugin")  # loaded before anything was parsed
        return functools.partial(registry.door(fn), *args, **kwargs)

    known = inspect.signature(fn)
    flag = inspect.Parameter(
        "plugin", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=Plugins
    )
    made.__signature__ = known.replace(parameters=[*known.parameters.values(), flag])  # type: ignore[attr-defined]
    made.__annotations__ = {**fn.__annotations__, "plugin": Plugins}
    del made.__wrapped__  # tyro would read that one's types
    return made


SEVERAL = {"--set", "--attack", "--defense", "--grid"}
"""Flags that may be given more than once."""


def _switches(command: Any, path: str = "--") -> Iterator[str]:
    """The flags of a command, or of a method on its line, that are given without a value."""
    hints = get_type_hints(command, include_extras=True)
    for name, hint in hints.items():
        plain, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        named = next((note.name for note in notes if getattr(note, "name", None)), name)
        if plain is bool:
            yield path + named.replace("_", "-")
        elif dataclasses.is_dataclass(plain) and isinstance(plain, type):
            yield from _switches(plain, f"{path}{named.replace('_', '-')}.")


def _parsed(commands: dict[str, Callable], args: Sequence[str]) -> Any:
    """What the arguments ask for, not yet begun; a mistake is one line."""
    switches = set(_switches(commands[args[0]])) if args and args[0] in commands else set()
    for word in args:
        if (flag := word.partition("=")[0]) in switches and flag != word:
            raise BadInput(f"{word}: {flag} takes no value, leave it away")
    commands = {name: fn if isinstance(fn, type) else _later(fn) for name, fn in commands.items()}
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.extras.subcommand_cli_from_dict(
                commands, prog="bdjax", args=list(args), registry=RULES
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # A box, drawn or plain: its title, what is wrong, and, below a line, help.
        text = re.sub(r"\x1b\[[0-9;]*m", "", boxed.getvalue())
        rows = [row.strip(" │|") for row in text.splitlines()[1:]]
        parts = [list(part) for line, part in itertools.groupby(rows, _is_line) if not line]
        words = " ".join(" ".join(parts[0] if parts else []).split())
        raise BadInput(f"{words.rstrip('.')}; see `bdjax {' '.join(args[:1])} --help`") from None


def _is_line(row: str) -> bool:
    return len(row) > 3 and not set(row) - set("─╰╯╭╮+-")


def _all_read(made: Any, flags: Sequence[str]) -> None:
    """Raises `BadInput` where a flag was given that the command, or the chosen method, does not
    read.
    """
    for flag in flags:
        part, *path = flag.removeprefix("--").replace("-", "_").split(".")
        reason = registry.unread(made, [part])
        if reason is None and path and (method := getattr(made, part, None)) is not None:
            path[-1] = path[-1] if hasattr(method, path[-1]) else path[-1].removeprefix("no_")
            reason = registry.unread(method, path)
        if reason:
            raise BadInput(f"{flag} has no effect: {reason}; leave it away")


def _at_home(word: str) -> str:
    """`~` written out, which a shell leaves as it is in --out=~/net."""
    return re.sub(r"^(--[^=]*=)?~(?=/|$)", lambda flag: (flag[1] or "") + str(Path.home()), word)


def command(args: Sequence[str]) -> int:
    """Parses and runs one command; its exit code."""
    from bdjax.train import Recipe

    methods = {name: {} for name in CHOICES}
    for flag, value in zip(["bdjax", *args], args, strict=False):
        if not value.strip() or (value.startswith("--") and value.endswith("=")):
            name = value.strip().rstrip("=") or flag
            raise BadInput(f"an empty word after {name}: is a variable of the shell not set?")
    args = [_at_home(word) for word in plugged(args)]
    flags = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    several = SEVERAL - {f"--{kind}" for kind in CHOICES.get(args[0] if args else "", ())}
    if twice := [flag for flag in flags if flags.count(flag) > 1 and flag not in several]:
        raise BadInput(f"{twice[0]} is given twice")
    if args and args[0] in CHOICES:
        methods[args[0]], left = chosen(CHOICES[args[0]], args[1:])
        args = [args[0], *left]
    commands = COMMANDS | {
        "train": _with_fields(Train, {**methods["train"], "recipe": Recipe()}),
        "poison": _with_fields(Poison, methods["poison"]),
        "defend": _with_fields(Defend, methods["defend"]),
        "import": _with_fields(Import, methods["import"]),
        "audit": _with_fields(Audit, methods["audit"]),
        "repair": _with_fields(Repair, methods["repair"]),
        "scan": _with_fields(Scan, {**methods["scan"], "recipe": Recipe()}),
    }
    if args and args[0] == "bench":  # imported for itself alone: it needs all that draws
        commands["bench"] = _bench()
    if args and not args[0].startswith("-") and args[0] not in commands:
        raise BadInput(
            f"unknown command '{args[0]}'{registry.near(args[0], commands)} (`bdjax --help` shows "
            "all)"
        )
    if args and args[0] == "data":
        if list(args[1:2]) not in (["prepare"], ["--help"], ["-h"]):
            raise BadInput("`bdjax data prepare NAME` is the only command on data")
        args = ["data", *args[2:]] if args[1] == "prepare" else args
    made = _parsed(commands, args)
    if dataclasses.is_dataclass(made):
        if fault := registry.fault_within(made):
            name, _, rest = fault.partition(" ")
            raise BadInput(f"--{name.replace('_', '-')} {rest}")
        _all_read(made, flags)
    return made() or 0  # type: ignore[operator]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 the input is wrong (one line says what), 3 infected and 4
    undecided by an audit, 130 interrupted, 143 terminated.
    """
    from bdjax import mesh
    from bdjax.progress import ended

    mesh.tune()
    ended(lambda: command(sys.argv[1:] if args is None else args))
