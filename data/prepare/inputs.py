"""Where images come from: webdataset tars as they are, or a folder of image files.

Both are cut into units, each the work of one worker: a tar, or some thousand files of the folder. A unit has a state,
[weight, …], which changes when something in it is replaced.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flair_jax.data.prepare import atomic, report
from flair_jax.data.sources import files, webdataset
from flair_jax.data.sources.base import ShardError

FOLDER_UNIT = 4096  # files of a folder in one unit
MAX_IMAGE_BYTES = 1 << 28  # of an image file, as it is stored
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Member(NamedTuple):
    """One image of a unit, and in tars the text that belongs to it; offsets and sizes in bytes."""

    name: str  # the key in a tar, the path in a folder
    offset: int
    size: int
    text_offset: int = 0
    text_size: int = 0


@dataclasses.dataclass(frozen=True)
class Tars:
    """Uncompressed webdataset tars, in which each image has a partner: a text with the extension `partner`."""

    paths: tuple[str, ...]
    partner: str = "json"

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, unit: int) -> str:
        return os.path.basename(self.paths[unit])

    def state(self, unit: int) -> list:
        """[bytes, stamp, path]."""
        return [*files.state(self.paths[unit]), self.paths[unit]]

    def scan(self, unit: int, state: list) -> tuple[list[Member], report.Tally]:
        """The complete samples of a tar, and what was left out, by reason. Raises PrepareError."""
        try:
            index = webdataset.scan(self.paths[unit], self.partner)
        except (ShardError, OSError) as error:
            raise atomic.PrepareError(str(error)) from error
        _check(self.paths[unit], state, [*index.state, self.paths[unit]])
        left_out = report.Tally()
        for reason, count in index.skipped.items():
            left_out.skip(reason, f"{self.name(unit)} {index.examples.get(reason, '')}".rstrip(), count)
        return [Member(key, *span) for key, span in zip(_keys(index), index.spans.tolist(), strict=True)], left_out

    def image(self, unit: int, state: list, member: Member) -> bytes:
        return self._read(unit, state, member.offset, member.size)

    def text(self, unit: int, state: list, member: Member) -> bytes:
        return self._read(unit, state, member.text_offset, member.text_size)

    def _read(self, unit: int, state: list, offset: int, size: int) -> bytes:
        try:
            (content,) = files.read(self.paths[unit], [(offset, size)], files.State(*state[:2]))
        except OSError as error:
            raise atomic.PrepareError(f"{error}. Start again in an empty folder.") from error
        return content


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

    def state(self, unit: int) -> list:
        """[files, digest of their names and states]."""
        states = [(name, files.state(os.path.join(self.root, name))) for name in self._names(unit)]
        return [len(states), hashlib.sha256(repr(states).encode("utf-8", "surrogatepass")).hexdigest()]

    def scan(self, unit: int, state: list) -> tuple[list[Member], report.Tally]:
        """The images of a unit; nothing is left out. Raises PrepareError."""
        _check(f"{self.root}: a file", state, self.state(unit))
        sizes = [(name, files.state(os.path.join(self.root, name)).size) for name in self._names(unit)]
        return [Member(name, 0, size) for name, size in sizes], report.Tally()

    def image(self, unit: int, state: list, member: Member) -> bytes:
        path = os.path.join(self.root, member.name)
        try:
            with open(path, "rb") as file:
                content = file.read(member.size + 1)
        except OSError as error:
            raise atomic.PrepareError(f"{path} cannot be read: {error}") from error
        _check(path, [member.size], [len(content)])
        return content

    def _names(self, unit: int) -> list[str]:
        return atomic.read_json(pathlib.Path(self.listing) / f"{unit:05d}.json")


Inputs = Tars | Folder


def list_folder(root: str, listing: pathlib.Path) -> Folder:
    """Lists the images below a folder, sorted, into files in `listing`.

    Raises:
      PrepareError: there is no such folder, or no image in it.
    """
    if not os.path.isdir(root):
        raise atomic.PrepareError(f"--images: {root} is no folder")
    listing.mkdir(parents=True, exist_ok=True)
    units = 0
    names = _image_files(root)
    while unit_names := list(itertools.islice(names, FOLDER_UNIT)):
        atomic.write_json(listing / f"{units:05d}.json", unit_names)
        units += 1
    if not units:
        raise atomic.PrepareError(f"--images: {root} and its folders hold no image ({', '.join(EXTENSIONS)})")
    return Folder(root, str(listing), units)


def _image_files(root: str) -> Iterator[str]:
    """Paths below `root`, with `/` between folders; hidden files and folders are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _keys(index) -> list[str]:
    ends = np.cumsum(index.key_lengths).tolist()
    keys = index.keys.tobytes()
    return [keys[start:end].decode("utf-8", "surrogateescape") for start, end in itertools.pairwise([0, *ends])]


def _check(path: str, expected: Sequence, found: Sequence) -> None:
    if list(expected) != list(found):
        raise atomic.PrepareError(
            f"{path} was replaced or changed during the run: expected {list(expected)}, found {list(found)}. "
            "Start again in an empty folder."
        )
