"""Files that appear under their name whole or not at all, so that a killed run leaves nothing that looks finished."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator

import numpy as np

PARTIAL = ".partial"  # ending of a file that is being written


class PrepareError(RuntimeError):
    """The preparation cannot go on. The message says what to do."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`; what is written there takes the name `path` when the block ends well.

    Two processes may write the same file at the same time (a Beam runner may do a piece of work twice): each has its
    own temporary file, and the last one done replaces the other's equal one.

    Raises:
      PrepareError: the file cannot be written, for instance because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise PrepareError(
            f"{path} cannot be written: {error}. What is finished is kept: make room, and run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, content, **options) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, **options) + "\n", encoding="utf-8")


def write_array(path: pathlib.Path, content: np.ndarray) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, content)


def read_json(path: pathlib.Path):
    return json.loads(path.read_text(encoding="utf-8"))


def reading(path: str | os.PathLike, parts: Iterable) -> Iterator:
    """The parts as they come. What goes wrong in reading them becomes a PrepareError that names the file."""
    try:
        yield from parts
    except OSError as error:
        raise PrepareError(f"{path} cannot be read: {error}") from error


def remove_partial(folder: pathlib.Path) -> None:
    """Removes what killed runs left half-written in a folder and below."""
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)
