"""Features on disk: sets that share images or texts encode them once, and a killed evaluation goes on.

    FOLDER/<fingerprint of the weights>/images-<run>-00000.rows    rows of bytes, one after the other
    FOLDER/<fingerprint of the weights>/images-<run>-00000.index   layout of a row, then key and checksum of each row

Each process of a run appends to files of its own and reads those of all, so that several runs may share a folder; with
several processes it lies on a file system that they share. A row counts once its key stands in the index, which is
written after it: what a killed process left half-written is not read. What does not have its checksum is encoded again.
"""

import contextlib
import hashlib
import json
import math
import operator
import os
import pathlib
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

LINE = 64 + 1 + 8 + 1  # bytes of the index per row: SHA-256 of the key and CRC-32 of the row in hexadecimal digits
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # name of an array -> shape and type of its row


def fingerprint(model: Any, params: Any) -> str:
    """Identifies features: by the model, with how it computes, and its parameters, whole on this host."""
    digest = hashlib.sha256(repr(model).encode())
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


class FeatureStore:
    """Rows of features by key, for each set of weights.

    Args:
      folder: on a local or shared file system; made if need be.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = pathlib.Path(folder)
        # No other run has this name; in the order of names the newest file is the last one.
        self._run = f"{time.time_ns():016x}{uuid.uuid4().hex[:8]}"
        self._weights: list[tuple[Any, list[Any], str]] = []  # model, leaves of its parameters, their fingerprint

    def open(self, kind: str, model: Any, params: Any) -> "Rows":
        """The rows of a kind, such as "images", as they are on disk now; every process takes part."""
        folder = self._folder / self._fingerprint(model, params)
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"features of {kind} are written")
        return Rows(folder, kind, self._run)

    def _fingerprint(self, model: Any, params: Any) -> str:
        """Computed once for all evaluators that are given the very same arrays."""
        leaves = jax.tree.leaves(params)
        for known, arrays, found in self._weights:
            if known == model and len(arrays) == len(leaves) and all(map(operator.is_, arrays, leaves)):
                return found
        found = fingerprint(model, params)
        self._weights.append((model, leaves, found))
        return found


class _Place(NamedTuple):
    """Where a row lies: the file, its number there, and its checksum."""

    path: pathlib.Path
    number: int
    checksum: int


class Rows:
    """The rows of one kind. What other processes append later is seen by the next `FeatureStore.open`.

    Args:
      folder: of the weights.
      kind: such as "images".
      run: a name for the files of this run, which no other run has.
    """

    def __init__(self, folder: pathlib.Path, kind: str, run: str):
        self._folder, self._own = folder, f"{kind}-{run}-{jax.process_index():05d}"
        self._layout: Layout = {}
        self._rows: dict[bytes, _Place] = {}  # by the digest of the key
        self._own_rows, self._head = 0, 0  # of the own files: rows, and bytes of the index before its first key
        for index in sorted(folder.glob(f"{kind}-*.index")):
            self._read(index)

    def __contains__(self, key: str) -> bool:
        return _digest(key) in self._rows

    def read(self, keys: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The rows of some keys, all of which are there; None if some are damaged, which are not there any more."""
        size = _row_bytes(self._layout)
        raw, damaged = np.empty((len(keys), size), np.uint8), set()
        with contextlib.ExitStack() as opened:
            files = {}
            for row, digest in zip(raw, map(_digest, keys), strict=True):
                place = self._rows[digest]
                try:
                    if place.path not in files:
                        files[place.path] = opened.enter_context(place.path.open("rb"))
                    files[place.path].seek(place.number * size)
                    content = files[place.path].read(size)
                except OSError:  # removed in the meantime, or a fault of the disk
                    content = b""
                if len(content) < size or zlib.crc32(content) != place.checksum:
                    damaged.add(digest)
                else:
                    row[:] = np.frombuffer(content, np.uint8)
        if damaged:
            where = self._rows[next(iter(damaged))].path
            logging.warning("%s: %d rows are damaged, and are encoded again", where, len(damaged))
            for digest in damaged:
                del self._rows[digest]
            return None
        fields, start = {}, 0
        for name, (shape, dtype) in self._layout.items():
            stop = start + math.prod(shape) * dtype.itemsize
            fields[name] = np.ascontiguousarray(raw[:, start:stop]).view(dtype).reshape(len(keys), *shape)
            start = stop
        return fields

    def add(self, keys: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        """Appends rows, by name (n, …) with the same n for all; those whose key is there already are left out.

        Raises:
          OSError: a file cannot be written, for instance because the disk is full.
        """
        new = [number for number, key in enumerate(keys) if key not in self]
        if not new:
            return
        index, data = self._folder / f"{self._own}.index", self._folder / f"{self._own}.rows"
        if not self._own_rows:
            self._layout = {name: (array.shape[1:], array.dtype) for name, array in rows.items()}
            head = _head({name: [list(shape), dtype.name] for name, (shape, dtype) in self._layout.items()})
            index.write_bytes(head)
            data.write_bytes(b"")
            self._head = len(head)
        raw = [np.ascontiguousarray(array[new]).reshape(len(new), -1).view(np.uint8) for array in rows.values()]
        content = np.concatenate(raw, axis=1)
        digests = [_digest(keys[number]) for number in new]
        checksums = [zlib.crc32(row) for row in content]
        lines = [f"{key.hex()} {checksum:08x}\n" for key, checksum in zip(digests, checksums, strict=True)]
        _append(data, self._own_rows * content.shape[1], content.tobytes())
        _append(index, self._head + self._own_rows * LINE, "".join(lines).encode())
        for digest, checksum in zip(digests, checksums, strict=True):
            self._rows[digest] = _Place(data, self._own_rows, checksum)
            self._own_rows += 1

    def _read(self, index: pathlib.Path) -> None:
        """Takes over what is whole in one pair of files; those of this run go on after it."""
        data = index.with_suffix(".rows")
        try:
            content, size = index.read_bytes(), data.stat().st_size
        except FileNotFoundError:  # another run has written no row yet, or the folder is being cleared
            return
        first, end, rest = content.partition(b"\n")
        layout = _layout(first + end)
        if layout is None:
            if content:
                logging.warning("%s is damaged; what it lists is encoded again", index)
            return
        if layout != self._layout:  # of another version of the code: the newest counts
            self._rows.clear()
            self._layout = layout
        places = []
        for number in range(min(len(rest) // LINE, size // _row_bytes(layout))):
            line = rest[number * LINE : (number + 1) * LINE]
            try:
                digest, checksum = bytes.fromhex(line[:64].decode()), int(line[65:73].decode(), 16)
            except ValueError:
                logging.warning("%s is damaged from row %d on; what it lists there is encoded again", index, number)
                break
            places.append((digest, _Place(data, number, checksum)))
        self._rows.update(places)
        if index.stem == self._own:
            self._own_rows, self._head = len(places), len(first) + 1


def _append(path: pathlib.Path, end: int, content: bytes) -> None:
    """Writes at `end`; what a full disk left there, half-written, is cut off."""
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(content)


def _head(layout: Mapping[str, Any]) -> bytes:
    """The first line of an index, with a checksum of its own."""
    text = json.dumps(layout).encode()
    return b"%s %08x\n" % (text, zlib.crc32(text))


def _layout(line: bytes) -> Layout | None:
    """The layout that the first line of an index says; None: it is damaged."""
    try:
        content = json.loads(line.rpartition(b" ")[0])
        if _head(content) != line:
            return None
        return {name: (tuple(shape), _dtype(dtype)) for name, (shape, dtype) in content.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _row_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
