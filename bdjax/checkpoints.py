"""Nets and other pytrees on disk: Orbax checkpoints whose leaves have names, and the folder of a
net with its `model.json`.

All is written to a temporary name and renamed, and replaces only what bdjax wrote (`bdjax.own`).
Nothing that is read back can run code, and none of it is trusted (`bdjax.schema`).
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bdjax import own, registry, schema
from bdjax.datasets.base import fingerprint
from bdjax.foreign.net import Imported as Imported  # so that it can be revived
from bdjax.foreign.origin import Origin
from bdjax.models.layers import build
from bdjax.own import renamed
from bdjax.progress import say_once, silent
from bdjax.types import BadInput, Model, Variables

PIXELS = [0.0, 1.0]
"""The range of pixels that every net takes."""


PARTS = {
    "net": "model",
    "attack": "attack",
    "dataset": "dataset",
    "recipe": "recipe",
    "defenses": "defense",
}
"""The described parts of a `model.json`, and of which kind each is."""


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their places in it, such as `params/conv_1/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf
        for path, leaf in leaves
    }
    if len(found) < len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return found


def save_tree(path: Path, tree: Any) -> None:
    """A pytree of arrays as an Orbax checkpoint, its leaves in nested dicts by their names; as
    `.npz` where JAX knows of other hosts: Orbax would wait for them, and let the first one alone
    write.
    """
    with renamed(path, old_checkpoint) as temporary:
        write_tree(temporary, tree)


def write_tree(path: Path, tree: Any) -> None:
    """`save_tree` into a folder that is itself being written."""
    leaves = {name: np.asarray(leaf) for name, leaf in named(tree).items()}
    if jax.process_count() > 1:
        path.mkdir()
        schema.write_arrays(path / "leaves.npz", leaves, "leaves")
    else:
        about, nested = {"format": schema.KINDS["leaves"].format}, unflatten_dict(leaves, sep="/")
        with silent("absl"), _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), nested, custom_metadata=about)


def load_tree(path: Path, like: Any) -> Any:
    """The pytree saved at `path`, with the structure of `like`; `BadInput` where it is damaged or
    of other shapes. Nothing is read before its declared shapes are those of `like`.
    """
    expected = named(like)

    def names(found: Mapping[str, Any]) -> list[str]:
        # bdjax 0.1 numbered the leaves.
        old = [f"{i:04d}" for i in range(len(expected))]
        place = old if found.keys() == set(old) else list(expected)
        kinds = [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in expected.values()]
        for name, kind in zip(place, kinds, strict=True):
            if name not in found:
                reason = f"it has no {name}"
            elif (tuple(found[name].shape), np.dtype(found[name].dtype)) != kind:
                reason = f"{name} is {found[name].dtype} {list(found[name].shape)}"
            elif len(found) > len(place):
                reason = f"it has {len(found)} arrays"
            else:
                continue
            raise BadInput(
                f"the checkpoint {path} does not fit the model that its description names: {reason}"
            )
        return place

    try:
        for folder, _, files in os.walk(path):
            for file in files:
                schema.plain_file(os.path.join(folder, file))
        if (path / "leaves.npz").exists():
            saved = schema.read_arrays(path / "leaves.npz", "leaves")
            place = names(saved)
        else:
            with _checkpointer() as checkpointer:
                about = checkpointer.metadata(path.absolute())
                made, known = (about.custom_metadata or {}).get("format", 0), schema.KINDS["leaves"]
                if schema.fitted(made, schema.COUNT, "format") > known.format:
                    raise BadInput(f"{path} was written by a newer bdjax: update bdjax")
                place = names(flatten_dict(about.item_metadata.tree, sep="/"))
                saved = flatten_dict(checkpointer.restore(path.absolute()), sep="/")
        leaves = [np.asarray(saved[name]) for name in place]
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"the checkpoint {path} is damaged or incomplete: {_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def save_model(
    path: str | Path, net: Any, model: Model, variables: Variables, **about: Any
) -> None:
    """A model folder: `model.json` (the net, its images, and `about`: attack, dataset, metrics, the
    `seed` of its training …), arrays and `variables`.

    Of the data set it keeps the fingerprint, and the places of its files as absolute paths.
    """
    arrays: dict[str, np.ndarray] = {}
    about = {key: value for key, value in about.items() if value is not None}
    if (source := about.get("dataset")) is not None:
        kept = about.get("fingerprint") or fingerprint(source.load())
        about |= {"fingerprint": kept, "dataset": source.placed()}
    described = {
        "net": net,
        "shape": model.shape,
        "classes": model.classes,
        "pixels": PIXELS,
        "masks": sorted(variables.get("masks", {})),
        **about,
    }
    text = schema.dump(registry.describe(described, arrays), "model", indent=1)
    with renamed(own.whole(Path(path), "model.json", old_model), old_model) as temporary:
        temporary.mkdir()
        write_tree(temporary / "variables", variables)
        schema.write_arrays(temporary / "arrays.npz", arrays, "arrays")
        (temporary / "model.json").write_text(text, encoding="utf-8")


def copy_model(path: Path, to: Path) -> None:
    """A model folder once more."""
    with renamed(own.whole(to, "model.json", old_model), old_model) as temporary:
        shutil.copytree(path, temporary)


@registry.door
def load_model(path: str | Path) -> tuple[Any, Model, Variables, dict[str, Any]]:
    """`(net, model, variables, about)` of a model folder; `attack`, `dataset`, `recipe` and
    `defenses` (those applied, in order) in `about` are revived; plugins that they need are not
    loaded but named. `seed` and `fingerprint` are None
    where bdjax 0.1 wrote the folder. Relative paths of the data set start at the folder.
    """
    path = Path(path)
    if not (path / "model.json").exists():
        raise BadInput(
            f"{path} is no model folder: it has no model.json (`bdjax train --out {path}` makes "
            "one)"
        )
    about = {
        "seed": None,
        "fingerprint": None,
        **schema.read_json(path / "model.json", "model"),
    }
    if (pixels := about.pop("pixels", PIXELS)) != PIXELS:
        raise BadInput(f"{path}: the net takes pixels of the range {pixels}; bdjax gives {PIXELS}")
    arrays = schema.read_arrays(path / "arrays.npz", "arrays")
    try:
        for line in registry.require(PARTS, about):
            say_once(f"bdjax: {path}: {line}, when the net was made")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    try:
        net = registry.revive("model", about.pop("net"), arrays)
        shape, classes, masked = tuple(about.pop("shape")), about.pop("classes"), about.pop("masks")
        for kind in ("attack", "dataset", "recipe"):
            about[kind] = registry.revive(kind, about.get(kind), arrays)
        for part in ("origin", "triggered"):  # of a net that was imported
            about[part] = registry.revive("model", about.get(part), arrays)
        about["defenses"] = registry.revive("defense", about.get("defenses", []), arrays)
        for part in (net, about["attack"], about["dataset"], about["recipe"], *about["defenses"]):
            registry.validate(part)
        registry.validate(about["origin"])
        if isinstance(about["origin"], Origin) and (why := about["origin"].unverified):
            say_once(f"bdjax: {path} is unverified: {why}")
        # What 0.1 wrote is relative to where it ran, which nobody knows: it is looked for here.
        if about.pop("format") and about["dataset"] is not None:
            about["dataset"] = about["dataset"].placed(path)
        model = build(net, shape, classes)  # type: ignore[arg-type]
        for defense in about["defenses"]:
            model = defense.wrap(model)
        like = dict(jax.eval_shape(model.init, jax.random.key(0)))
        if masked:
            probe = jax.ShapeDtypeStruct((1, *shape), np.float32)
            acts = jax.eval_shape(lambda v, x: model.apply(v, x).acts, like, probe)
            like["masks"] = {
                site: jax.ShapeDtypeStruct(acts[site].shape[-1:], np.float32) for site in masked
            }
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{path}: the model's description is damaged: {_line(error)}") from error
    return net, model, load_tree(path / "variables", like), about


def check_data(about: Mapping[str, Any], where: object, strict: bool = False) -> None:
    """Holds the data set of a saved net against what it was trained on: a line where it is other
    data now, and `BadInput` with `strict`.
    """
    if about["fingerprint"] in (None, fingerprint(about["dataset"].load())):
        return
    source = getattr(about["dataset"], "path", "") or registry.name_of(about["dataset"])
    line = f"{where}: the data set {source} is not what the net was trained on"
    if strict:
        raise BadInput(f"{line}: put back that data; this defense looks for its poisoned rows")
    say_once(f"bdjax: {line}: ACC and ASR are those on other data")


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- What version 0.1 wrote, which kept no manifest ---

CHECKPOINT = re.compile(
    r"(?:variables/|arrays/)?(?:_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|"
    r"leaves\.npz|manifest\.ocdbt|d|d/[0-9a-f]+|ocdbt\.process_\d+(?:/manifest\.ocdbt|/d|"
    r"/d/[0-9a-f]+)?|array_metadatas(?:/process_\d+)?)|variables|arrays"
)


def old_checkpoint(path: Path, *more: str) -> bool:
    """Whether a folder holds the files of a checkpoint of 0.1, those of `more`, and nothing
    else.
    """
    names = {name for name, _ in own.walk(path)}
    return any(name.endswith(("_METADATA", "leaves.npz")) for name in names) and all(
        name in more or CHECKPOINT.fullmatch(name) for name in names
    )


def old_victims(path: Path) -> bool:
    """Whether a folder holds victims of 0.1."""
    return isinstance(plain_json(path / "members.json"), list) and old_checkpoint(
        path, "members.json"
    )


def old_model(path: Path) -> bool:
    """Whether a folder is a net of 0.1 and holds nothing else. Others have a `model.json` too."""
    about = plain_json(path / "model.json")
    if not isinstance(about, dict) or not isinstance(about.get("net"), dict):
        return False
    right = isinstance(about["net"].get("name"), str) and {"shape", "classes", "masks"} <= {*about}
    return right and old_checkpoint(path, "model.json", "arrays.npz")


def plain_json(path: Path) -> Any:
    """What a small file of JSON holds; None where it is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_bytes()) if own.kind(path) == "file" else None
    return None
