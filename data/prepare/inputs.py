"""Where images come from: webdataset tars as they are, or a folder of image files.

Both are cut into units, each the work of one worker: a tar, or some thousand files of the folder.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data import records
from data.prepare import files

FOLDER_UNIT = 4096  # files of a folder in one unit
MAX_IMAGE_BYTES = 1 << 28  # of an image file, as it is stored
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Member(NamedTuple):
    """One image of a unit, and for tars the text that belongs to it; offsets and sizes in bytes."""

    name: str  # the key in a tar, the path in a folder
    offset: int
    size: int
    text_offset: int = 0
    text_size: int = 0


Read = Callable[[str, int, int], bytes]  # (name, offset, size) -> bytes; fewer if the file is shorter


@dataclasses.dataclass(frozen=True)
class Tars:
    """Uncompressed webdataset tars, in which each image has a partner: a text with the extension `partner`."""

    paths: tuple[str, ...]
    partner: str = "json"

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, unit: int) -> str:
        return os.path.basename(self.paths[unit])

    def weights(self) -> list[int]:
        """Bytes of each unit."""
        return [os.stat(path).st_size for path in self.paths]

    def state(self, unit: int) -> list:
        """What changes when the unit is replaced."""
        return files.state(self.paths[unit])

    def scan(self, unit: int) -> tuple[list[Member], collections.Counter]:
        """The complete samples of a tar, and what was left out, by reason."""
        index = records.scan(self.paths[unit])
        return [Member(key, *span) for key, span in zip(_keys(index), index.spans.tolist(), strict=True)], index.skipped

    @contextlib.contextmanager
    def open(self, unit: int) -> Iterator[Read]:
        with open(self.paths[unit], "rb", buffering=0) as file:
            yield lambda name, offset, size: _read(file, offset, size)


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files in a folder and below, by their path in it; files in `listing` keep the paths, one file a unit."""

    root: str
    listing: str
    units: int

    def __len__(self) -> int:
        return self.units

    def name(self, unit: int) -> str:
        return os.path.basename(os.path.abspath(self.root))

    def weights(self) -> list[int]:
        """Files of each unit."""
        return [len(self._names(unit)) for unit in range(self.units)]

    def state(self, unit: int) -> list:
        """What changes when one of the files is replaced, added or removed."""
        states = [files.state(os.path.join(self.root, name)) for name in self._names(unit)]
        return [len(states), hashlib.sha256(repr(states).encode("utf-8", "surrogatepass")).hexdigest()]

    def scan(self, unit: int) -> tuple[list[Member], collections.Counter]:
        """The images of a unit; nothing is left out."""
        sizes = [(name, os.stat(os.path.join(self.root, name)).st_size) for name in self._names(unit)]
        return [Member(name, 0, size) for name, size in sizes], collections.Counter()

    @contextlib.contextmanager
    def open(self, unit: int) -> Iterator[Read]:
        def read(name: str, offset: int, size: int) -> bytes:
            with open(os.path.join(self.root, name), "rb", buffering=0) as file:
                return _read(file, offset, size)

        yield read

    def _names(self, unit: int) -> list[str]:
        return files.read_json(pathlib.Path(self.listing) / f"{unit:05d}.json")


Inputs = Tars | Folder


def list_folder(root: str, listing: pathlib.Path) -> Folder:
    """Lists the images below a folder, sorted, into files in `listing`.

    Raises:
      PrepareError: there is no such folder, or no image in it.
    """
    if not os.path.isdir(root):
        raise files.PrepareError(f"--images: {root} is no folder")
    listing.mkdir(parents=True, exist_ok=True)
    units = 0
    names = _image_files(root)
    while unit_names := list(itertools.islice(names, FOLDER_UNIT)):
        files.write_json(listing / f"{units:05d}.json", unit_names)
        units += 1
    if not units:
        raise files.PrepareError(f"--images: {root} and its folders hold no image ({', '.join(EXTENSIONS)})")
    return Folder(root, str(listing), units)


def _image_files(root: str) -> Iterator[str]:
    """Paths below `root`, with `/` between folders; hidden files and folders are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _read(file: io.FileIO, offset: int, size: int) -> bytes:
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise files.PrepareError(f"{file.name} cannot be read: {error}") from error


def _keys(index: records.Index) -> list[str]:
    ends = np.cumsum(index.key_lengths).tolist()
    keys = index.keys.tobytes()
    return [keys[start:end].decode("utf-8", "surrogateescape") for start, end in zip([0, *ends], ends, strict=False)]
