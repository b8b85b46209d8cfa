"""What an index of photographs has on disk, and the folder that it follows; search.py encodes and finds.

    catalogue.sqlite      which weights, which files, and which row of features each file has
    pooled-000001.f16     float16 (rows, D), normalised
    local-000001.f16      float16 (rows, L, D), with text-conditioned pooling alone; mapped into memory, never loaded

Rows are written before the transaction that names them, and files only grow: what a killed process left after the last
row is cut off by the next update, which goes on there. One process updates at a time; others read meanwhile what
the last transaction left.
"""

import contextlib
import os
import pathlib
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from flair_jax.data.transforms import images as image_rules

INDEX_FOLDER = ".flair_jax"  # among the photographs; hidden folders are not searched for photographs
CATALOGUE = "catalogue.sqlite"
SCHEMA = "1"  # of the catalogue and the files; another one is refused
TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE images (digest BLOB PRIMARY KEY, row INTEGER NOT NULL UNIQUE)",
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, "
    "read_ns INTEGER NOT NULL, row INTEGER, reason TEXT)",
)
META = {"schema", "fingerprint", "checkpoint", "width", "patches", "generation", "revision", "id"}
RACY_NS = 2_000_000_000  # file systems note times in steps of up to two seconds
MAX_BYTES = 1 << 29  # of an image file; larger ones are not read


class File(NamedTuple):
    """A file of the folder as the catalogue knows it: without features `row` is None and `reason` says why."""

    size: int
    mtime_ns: int
    read_ns: int
    row: int | None
    reason: str | None

    def is_of(self, status: os.stat_result) -> bool:
        """Whether a file with this status has surely the content that was read."""
        same = (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)
        return same and self.mtime_ns < self.read_ns - RACY_NS


class Rows:
    """A file of float16 rows of one shape, and nothing else."""

    def __init__(self, path: pathlib.Path, shape: tuple[int, ...]):
        self.path, self._shape = path, shape
        self._bytes = 2 * int(np.prod(shape))

    def mapped(self, rows: int) -> np.ndarray:
        """The first rows, mapped into memory."""
        self._check(rows)
        return np.memmap(self.path, np.float16, "r", shape=(rows, *self._shape))

    def cut(self, rows: int) -> None:
        """Cuts off what comes after so many rows; without a file it begins one."""
        if rows:
            self._check(rows)
        with open(self.path, "ab") as file:
            file.truncate(rows * self._bytes)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Writes float16 rows (n, …) from number `first` on, safe from a power cut when it returns.

        Raises:
          ValueError: a number is not finite: it is too large for float16.
        """
        if rows.shape[1:] != self._shape or rows.dtype != np.float16:
            raise ValueError(f"{self.path}: rows are {rows.dtype} {rows.shape[1:]}; expected float16 {self._shape}")
        if not np.isfinite(rows).all():
            raise ValueError(f"{self.path}: features of this model do not fit into float16: it cannot be searched with")
        with open(self.path, "r+b") as file:
            file.seek(first * self._bytes)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())

    def _check(self, rows: int) -> None:
        found = self.path.stat().st_size
        if found < rows * self._bytes:
            raise ValueError(
                f"{self.path} has {found} bytes; the catalogue says {rows} rows of {self._bytes}. The index is "
                f"damaged: remove the folder {self.path.parent} and index again"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def index_folder(folder: str | os.PathLike, at: str | os.PathLike | None = None) -> pathlib.Path:
    """Where the index of a folder of photographs lies."""
    return pathlib.Path(folder).expanduser() / INDEX_FOLDER if at is None else pathlib.Path(at).expanduser()


def scan(folder: pathlib.Path, at: pathlib.Path) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """Files of a folder and of those in it, by their path relative to it, and what cannot be read, with the reason.

    Hidden files and folders are left out, and links to folders, which may lead round in circles.
    """
    found, unreadable = {}, {}
    own = at.resolve()

    def note(error: OSError) -> None:
        unreadable[os.path.relpath(error.filename, folder)] = f"cannot be read: {error.strerror}"

    for root, folders, files in os.walk(folder, onerror=note):
        inner = pathlib.Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (inner / name).resolve() != own)
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = inner / name
            try:
                status = path.stat()
            except OSError as error:
                note(error)
                continue
            if stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
                found[os.path.relpath(path, folder)] = status
            else:
                unreadable[os.path.relpath(path, folder)] = "not a file"
    return found, unreadable


def why_no_image(file: Any, size: int) -> str | None:
    """Why a file is no image to decode, by its first bytes and its size; None if it is one."""
    try:
        with Image.open(file, formats=image_rules.FORMATS):
            pass
    except UnidentifiedImageError:
        return f"not an image in one of the formats {', '.join(image_rules.FORMATS)}"
    except OSError:
        raise
    except Exception:  # of which the decoder says more
        pass
    return f"{size:,} bytes; at most {MAX_BYTES:,} are read" if size > MAX_BYTES else None


def inside(path: bytes, catalogue: pathlib.Path) -> str:
    """A path of the catalogue, relative to the folder. Raises ValueError if it leaves the folder."""
    name = os.fsdecode(path)
    parts = pathlib.PurePath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError(f"{catalogue} names a file outside of the folder, {name!r}: it is not to be trusted")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue


@contextlib.contextmanager
def connected(catalogue: pathlib.Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection; errors of SQLite become OSError with the name of the file."""
    uri = f"{catalogue.resolve().as_uri()}?mode={'rwc' if create else 'rw'}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            yield connection
    except sqlite3.Error as error:
        raise OSError(
            f"{catalogue}: {error}. Where it is damaged, remove the folder {catalogue.parent} and index again"
        ) from error


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """What happens in the block is done as a whole or not at all; one that writes counts in `meta`."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        if kind == "IMMEDIATE":
            connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'revision'")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def read_meta(connection: sqlite3.Connection) -> dict[str, str]:
    """What the catalogue says of itself; empty if there are no tables yet."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'").fetchone():
        return {}
    found = dict(connection.execute("SELECT key, value FROM meta"))
    if missing := META - found.keys():
        raise sqlite3.DatabaseError(f"the table meta lacks {', '.join(sorted(missing))}")
    return found


def state_of(meta: Mapping[str, str]) -> tuple[str, str]:
    """Identifies what a transaction left."""
    return meta["id"], meta["revision"]


def forget(connection: sqlite3.Connection, names: Iterable[str]) -> None:
    if paths := [(os.fsencode(name),) for name in names]:
        with transaction(connection):
            connection.executemany("DELETE FROM files WHERE path = ?", paths)


def noted_checkpoint(at: pathlib.Path) -> str:
    """What an index says its model was loaded from; empty if it does not say.

    Raises:
      FileNotFoundError: there is no index.
    """
    if not (at / CATALOGUE).exists():
        raise FileNotFoundError(f"{at} is no index of photographs: python -m flair_jax.search index FOLDER makes one")
    with connected(at / CATALOGUE) as connection:
        return read_meta(connection).get("checkpoint", "")
