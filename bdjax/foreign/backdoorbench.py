"""The poisoned test images of BackdoorBench's `attack_result.pt`."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bdjax.datasets.pictures import picture, stacked
from bdjax.foreign.torch import Picture
from bdjax.types import BadInput, Split, shown

FOLDER = "bd_test_dataset"


def triggered(path: Path, state: Any) -> Split | None:
    """The test images with the trigger, labelled with what counts as a hit, that the file at `path`
    holds, or names among the PNG files beside it; None where it has none.
    """
    container = state.get("bd_data_container") if isinstance(state, Mapping) else None
    rows = container.get("data_dict") if isinstance(container, Mapping) else None
    if not isinstance(rows, Mapping) or not rows:
        return None
    found = [_row(path.parent, row) for row in rows.values()]
    if any(image is None for image, _ in found):
        return None
    image = stacked(path, (image for image, _ in found), len(found), None)
    return Split(image, np.asarray([label for _, label in found], np.int32))


def _row(folder: Path, row: Any) -> tuple[Any, int]:
    """The image of a row, None where its file is not there, and the label aimed at."""
    if isinstance(row, Mapping):
        image, info = _image(folder, str(row.get("path"))), row.get("other_info")
    elif isinstance(row, Sequence) and row and isinstance(row[0], Picture):
        image, info = row[0].shown(), row[1] if len(row) == 2 else row[1:]
    else:
        raise BadInput("its poisoned images are kept in a way that is not known here")
    try:
        label = int(info[0] if isinstance(info, Sequence) else info)  # type: ignore[index,arg-type]
    except (TypeError, ValueError, IndexError):
        raise BadInput(f"the label {shown(info)} of a poisoned image is none") from None
    return image, label


def _image(folder: Path, place: str) -> Any:
    """The image at a path of the writer's machine, looked for beside the file."""
    parts = PurePosixPath(place.replace("\\", "/")).parts
    if FOLDER not in parts or ".." in parts:
        return None
    here = folder.joinpath(*parts[parts.index(FOLDER) :])
    return picture(here) if here.is_file() else None
