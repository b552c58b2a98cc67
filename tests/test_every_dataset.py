"""Every registered data set does as it says, and sources that do not are found out."""

import dataclasses
import functools

import numpy as np
import planted
import pytest
from PIL import Image

from bdjax import registry, testing
from bdjax.datasets.base import Source
from bdjax.registry import pytree
from bdjax.types import BadInput, Split

ENTRIES = registry.entries("dataset")
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file, or folder, of 60 images of each kind, 55×47×3 as faces are."""
    import h5py
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("sources")
    image = np.random.default_rng(0).integers(0, 256, (60, 55, 47, 3), np.uint8)
    label = np.arange(60) % 3
    np.savez(folder / "images.npz", image=image, label=label, names=np.array(NAMES))
    with h5py.File(folder / "images.h5", "w") as file:
        file["data"], file["label"] = image.transpose(0, 3, 1, 2), label
    files = []
    for i, (one, k) in enumerate(zip(image, label)):
        path = folder / "images" / NAMES[k] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(path)
        files.append(path.read_bytes())
    table = pyarrow.table({"image": files, "label": label})
    pyarrow.parquet.write_table(table, folder / "images.parquet")
    return sorted(folder.iterdir())


def source_of(entry, written):
    """The source with its images: those that it names itself, or the first file that it reads."""
    fields = {field.name for field in dataclasses.fields(entry.cls)}
    sources = [entry.cls(path=str(path)) for path in written] if "path" in fields else [entry.cls()]
    for source in sources:
        try:
            source.load()
        except BadInput as error:
            why = str(error)
        else:
            return source
    assert "prepare" in why, why
    pytest.skip(why)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_data_set_does_as_it_says(entry, written):
    testing.check_dataset(source_of(entry, written))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_parts_of_every_data_set_do_as_they_say(entry, written):
    source = source_of(entry, written)
    some = 30 if source.load().classes <= 15 else None  # some of each class on both sides
    testing.check_dataset(dataclasses.replace(source, train_size=some, holdout=0.5, seed=7))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_data_set_without_its_path_says_how_to_name_it(entry):
    if "path" in {field.name for field in dataclasses.fields(entry.cls)}:
        for read in (entry.cls().load, entry.cls().read):
            with pytest.raises(BadInput, match="no data are named: --dataset"):
                read()


# --- Sources that do not as they say ---


@pytree
class Sound(Source):
    """A sound source. The broken ones differ from it in one thing."""

    def read(self):
        image = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
        return Split(image, np.arange(40, dtype=np.int32) % 4), None, tuple("abcd")


BROKEN = {}
broken = functools.partial(planted.broken, BROKEN)


@broken("an image is lost, added or twice")
class Fickle(Sound):
    def read(self):
        train, test, names = super().read()
        noise = np.random.default_rng().integers(0, 256, train.image.shape, np.uint8)
        return train._replace(image=noise), test, names


@broken("pixels run from 0 to 1; give 0 to 255")
class Floats(Sound):
    def read(self):
        train, test, names = super().read()
        return train._replace(image=train.image / np.float32(255)), test, names


@broken(r"class 3 .*has no training image")
class Gap(Sound):
    def read(self):
        train, test, names = super().read()
        return train[train.label < 3], test, names


@broken("names, some perhaps twice")
class Twice(Sound):
    def read(self):
        return *super().read()[:2], tuple("aabc")


@broken("images have shape")
class FourChannels(Sound):
    def read(self):
        train, test, names = super().read()
        return train._replace(image=np.repeat(train.image, 4, -1)), test, names


@broken("loading again gives another")
class Reread(Sound):
    def load(self):
        return super().load()._replace()


def test_the_sound_source_passes():
    testing.check_dataset(Sound())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_found_out(name):
    planted.found_out(testing.check_dataset, *BROKEN[name])
