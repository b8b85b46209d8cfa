"""Files beside shards, made once and read by training: for each of some texts, such as a sample's key, a row of JSON.

A side file is a safetensors file, of which a look-up reads a few hundred bytes. A row is found by its text, the first
item of it, so a row can never be used for another text, whatever became of the shard.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from flair_jax.data.sources import files
from flair_jax.data.sources.base import ShardError


class Kind(NamedTuple):
    """What side files hold.

    Attributes:
      name: of the kind, in messages and in the files.
      ending: of their names, after that of the shard.
      schema: version of the files.
      counted: what the rows are of, in `about`.
      needed_by: what of training needs them, and which command makes them.
    """

    name: str
    ending: str
    schema: int
    counted: str
    needed_by: str
    command: str


def path(shard: str, folder: str | None, kind: Kind) -> str:
    """The side file of a shard: beside it, or in a folder.

    Raises:
      ShardError: the shard lies in a store, and there is no folder.
    """
    if folder is not None:
        return os.path.join(os.path.expanduser(folder), os.path.basename(shard.partition("?")[0]) + kind.ending)
    if files.is_remote(shard):
        raise ShardError(f"{shard} lies in a store: give the {kind.name} a folder of this machine")
    return shard + kind.ending


def write(
    target: pathlib.Path,
    rows: Mapping[str, Sequence[Any]],
    about: Mapping[str, Any],
    kind: Kind,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a side file.

    Args:
      target: a file that the caller gives its name when all is done.
      rows: text -> what `SideFile.find` gives after the text; fit for JSON.
      about: what `read_about` returns, fit for JSON.
      kind: of the file.
      arrays: more of them, that rows refer to.
    """
    order = sorted(rows, key=hash_of)
    encoded = [json.dumps([text, *rows[text]], separators=(",", ":")).encode() for text in order]
    arrays = {
        "hashes": np.array([hash_of(text) for text in order], np.uint64),  # (N,), sorted
        "rows": joined([np.frombuffer(row, np.uint8) for row in encoded], np.uint8),
        "row_ends": ends(map(len, encoded)),  # (N + 1,)
        **(arrays or {}),
    }
    metadata = {kind.name: json.dumps({"schema": kind.schema, kind.counted: len(rows), **about})}
    safetensors.numpy.save_file(arrays, target, metadata)


def hash_of(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def joined(parts: Sequence[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def ends(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def read_about(file: str, kind: Kind) -> dict[str, Any]:
    """What `write` was told about a file.

    Raises:
      ShardError: it is no side file of this kind, or one of another version.
      OSError: it cannot be read.
    """
    again = f"remove it, and make it again: {kind.command}"
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {}).get(kind.name, "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ShardError(f"{file} holds no {kind.name} ({error}): {again}") from error
    if not isinstance(about, dict) or about.get("schema") != kind.schema:
        raise ShardError(f"{file} holds no {kind.name} of schema {kind.schema}: {again}")
    return about


def check(
    shards: Sequence[str], folder: str | None, kind: Kind, differs: Callable[[dict[str, Any]], str] = lambda about: ""
) -> str:
    """A stamp of the side files of all shards as they are now, after a look at each.

    Args:
      shards: all shards of a source.
      folder: of the files; None: beside the shards.
      kind: of the files.
      differs: what of `about` is other than this run needs it; "": nothing.

    Raises:
      ShardError: a file is missing, belongs to another state of its shard, or differs.
    """

    def one(shard: str) -> str:
        file, again = path(shard, folder, kind), f"make them first: {kind.command}"
        try:
            state, about = files.state(file), read_about(file, kind)
            size = files.state(shard).size
        except FileNotFoundError as error:
            raise ShardError(f"{shard} has no {kind.name}, which {kind.needed_by}: {error}; {again}") from error
        if about["size"] != size:
            raise ShardError(f"{file} is stale: its shard had {about['size']} bytes and has {size}; {again}")
        if difference := differs(about):
            raise ShardError(f"{file} {difference}; {again}")
        return repr((file, state))

    with concurrent.futures.ThreadPoolExecutor(files.THREADS) as pool:
        states = list(pool.map(one, dict.fromkeys(shards)))
    return hashlib.sha256("".join(states).encode()).hexdigest()[:16]


class SideFile:
    """An open side file. What is searched for each text is kept in memory; of the rows only the one is read."""

    def __init__(self, file: str):
        self._opened = safetensors.safe_open(file, framework="numpy")
        self._hashes = self._opened.get_tensor("hashes")
        self._ends = {"row_ends": self._opened.get_tensor("row_ends")}
        self._slices = {"rows": self._opened.get_slice("rows")}

    def row(self, text: str) -> list[Any] | None:
        """The row of a text, without the text."""
        wanted = np.uint64(hash_of(text))
        for number in range(int(np.searchsorted(self._hashes, wanted)), len(self._hashes)):
            if self._hashes[number] != wanted:
                break
            found, *row = json.loads(self.stored("rows", "row_ends", number))
            if found == text:
                return row
        return None

    def span(self, name: str, number: int) -> tuple[int, int]:
        start, end = self._ends[name][number : number + 2].tolist()
        return start, end

    def values(self, name: str, start: int, end: int) -> np.ndarray:
        return self._slices[name][start:end]

    def stored(self, name: str, ends_name: str, number: int) -> bytes:
        return self.values(name, *self.span(ends_name, number)).tobytes()
