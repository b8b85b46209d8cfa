"""The files of a preparation: each appears under its name whole or not at all, and what goes wrong names it."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from flair_jax.data.sources import files


class PrepareError(RuntimeError):
    """The preparation cannot go on. The message says what to do."""


class InputError(PrepareError):
    """A file or an option has to change before the preparation can go on, so the work done so far is of no use."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`files.replacing`, for all files of a preparation. A Beam runner may do a piece of work twice at the same time.

    Raises:
      PrepareError: the file cannot be written, for instance because the disk is full.
    """
    try:
        with files.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise PrepareError(
            f"{path} cannot be written: {error}. What is finished is kept: make room, and run the same command again."
        ) from error


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
    for path in folder.rglob(f".*{files.PARTIAL}"):
        path.unlink(missing_ok=True)
