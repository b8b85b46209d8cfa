"""Features on disk: sets that share images or texts encode them once, and a killed evaluation goes on.

    FOLDER/<fingerprint of the weights>/images-00000.rows     rows of bytes, one after the other
    FOLDER/<fingerprint of the weights>/images-00000.index    the layout of a row, then the key of each row

Each process appends to files of its own number and reads those of all, so with several processes the folder lies on a
file system that they share. A row counts once its key stands in the index, which is written after it: what a killed
process left half-written is cut off when the files are opened again.
"""

import hashlib
import json
import math
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

LINE = 65  # bytes of a key in the index: SHA-256 in hexadecimal digits, and the end of the line


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
        self._weights: list[tuple[Any, list[Any], str]] = []  # model, leaves of its parameters, their fingerprint

    def open(self, kind: str, model: Any, params: Any) -> "Rows":
        """The rows of a kind, such as "images", as they are on disk now; every process takes part."""
        folder = self._folder / self._fingerprint(model, params)
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"features of {kind} are written")
        return Rows(folder, kind)

    def _fingerprint(self, model: Any, params: Any) -> str:
        """Computed once for all evaluators that are given the very same arrays."""
        leaves = jax.tree.leaves(params)
        for known, arrays, found in self._weights:
            if known == model and len(arrays) == len(leaves) and all(map(operator.is_, arrays, leaves)):
                return found
        found = fingerprint(model, params)
        self._weights.append((model, leaves, found))
        return found


class Rows:
    """The rows of one kind. What other processes append later is seen by the next `FeatureStore.open`."""

    def __init__(self, folder: pathlib.Path, kind: str):
        self._folder, self._own = folder, f"{kind}-{jax.process_index():05d}"
        self._layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._rows: dict[bytes, tuple[pathlib.Path, int]] = {}  # digest of a key -> its file, its row there
        self._own_rows, self._head = 0, 0  # of the own files: rows, and bytes of the index before its first key
        for index in sorted(folder.glob(f"{kind}-?????.index")):
            self._read(index)

    def __contains__(self, key: str) -> bool:
        return _digest(key) in self._rows

    def read(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The rows of some keys, all of which are there."""
        size = _row_bytes(self._layout)
        files, raw = {}, np.empty((len(keys), size), np.uint8)
        try:
            for row, key in zip(raw, keys, strict=True):
                path, number = self._rows[_digest(key)]
                if path not in files:
                    files[path] = path.open("rb")
                files[path].seek(number * size)
                row[:] = np.frombuffer(files[path].read(size), np.uint8)
        finally:
            for file in files.values():
                file.close()
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
            head = {name: [list(shape), dtype.name] for name, (shape, dtype) in self._layout.items()}
            index.write_text(json.dumps(head) + "\n")
            data.write_bytes(b"")
            self._head = index.stat().st_size
        raw = [np.ascontiguousarray(array[new]).reshape(len(new), -1).view(np.uint8) for array in rows.values()]
        digests = b"".join(_digest(keys[number]).hex().encode() + b"\n" for number in new)
        _append(data, self._own_rows * _row_bytes(self._layout), np.concatenate(raw, axis=1).tobytes())
        _append(index, self._head + self._own_rows * LINE, digests)
        for number in new:
            self._rows[_digest(keys[number])] = data, self._own_rows
            self._own_rows += 1

    def _read(self, index: pathlib.Path) -> None:
        """Takes over what is whole in one pair of files, and cuts the rest off those that are this process's own."""
        data = index.with_suffix(".rows")
        lines = index.read_bytes().split(b"\n")[:-1]  # a last line without an end was cut short
        if not lines or not data.exists():
            return
        layout = {name: (tuple(shape), _dtype(dtype)) for name, (shape, dtype) in json.loads(lines[0]).items()}
        self._layout = layout
        rows = min(len(lines) - 1, data.stat().st_size // _row_bytes(layout))
        if index.stem == self._own:
            self._own_rows, self._head = rows, len(lines[0]) + 1
        for number, line in enumerate(lines[1 : rows + 1]):
            self._rows[bytes.fromhex(line.decode())] = data, number


def _append(path: pathlib.Path, end: int, content: bytes) -> None:
    """Writes at `end`; what a killed process or a full disk left there, half-written, is cut off."""
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(content)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _row_bytes(layout: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
