"""Captions on disk, found by their join key in memory that does not grow with their number.

The rows of a caption file are concatenated in one file. Beside it are runs: tables of at most
`RUN_ROWS` rows, sorted by a 64-bit hash of the join key, with the offset of each row. A lookup is a binary search in
the memory-mapped tables and a short read; the join key itself is compared, so equal hashes do no harm.
"""

import array
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flair_jax.data.prepare import atomic

RUN_ROWS = 1 << 21  # rows sorted at a time: some 150 MB while it is done
CHUNK_ROWS = 1 << 18  # rows compared at a time where duplicates are counted


class Found(NamedTuple):
    """The captions of one join key. `number` is unique to it in the store."""

    number: int
    captions: list[dict]  # of each row with this key, in the order of the files


def hash_of(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Writer:
    """Writes the rows of one caption file into `folder`, as `NAME.rows` and `NAME.RUN.{hashes,spans}.npy`."""

    def __init__(self, folder: pathlib.Path, name: str, rows: pathlib.Path):
        """`rows`: where the rows are written to; the caller gives the file its name when all is done."""
        self._folder, self._name = folder, name
        self._file = open(rows, "wb")  # noqa: SIM115  (closed by __exit__)
        self._offset = 0
        self._hashes, self._spans = (
            array.array("Q"),
            array.array("q"),
        )  # flat arrays: lists of Python integers take ten times the memory
        self.runs: list[int] = []  # rows of each

    def add(self, key: str, captions: dict) -> None:
        row = json.dumps([key, captions], separators=(",", ":")).encode()
        self._file.write(row)
        self._hashes.append(hash_of(key))
        self._spans.extend((self._offset, len(row)))
        self._offset += len(row)
        if len(self._hashes) == RUN_ROWS:
            self._write_run()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._file:
            if kind is None and self._hashes:
                self._write_run()

    def _write_run(self) -> None:
        hashes = np.array(self._hashes, np.uint64)  # (N,)
        spans = np.array(self._spans, np.int64).reshape(-1, 2)
        self._hashes, self._spans = array.array("Q"), array.array("q")
        order = np.argsort(hashes, kind="stable")  # equal keys stay in the order of the file
        for what, column in (("hashes", hashes[order]), ("spans", spans[order])):
            atomic.write_array(_run_file(self._folder, self._name, len(self.runs), what), column)
        self.runs.append(len(hashes))


class Store:
    """All rows that writers left in a folder."""

    def __init__(self, folder: pathlib.Path, runs: dict[str, list[int]]):
        """`runs`: for each writer's name the rows of its runs, in the order in which rows come first."""
        self._rows, self._hashes, self._spans, self._starts = [], [], [], [0]
        for name, lengths in runs.items():
            rows = open(folder / f"{name}.rows", "rb", buffering=0)  # noqa: SIM115  (as long as the store)
            for run, length in enumerate(lengths):
                self._rows.append(rows)
                self._hashes.append(np.load(_run_file(folder, name, run, "hashes"), mmap_mode="r", allow_pickle=False))
                self._spans.append(np.load(_run_file(folder, name, run, "spans"), mmap_mode="r", allow_pickle=False))
                self._starts.append(self._starts[-1] + length)

    def __len__(self) -> int:
        """The number of rows, more than any `Found.number`."""
        return self._starts[-1]

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """For each key all rows that have it, or None."""
        wanted = np.array([hash_of(key) for key in keys], np.uint64)  # (K,)
        numbers, captions = [None] * len(keys), [[] for _ in keys]
        for run, hashes in enumerate(self._hashes):
            starts = np.searchsorted(hashes, wanted, side="left")
            stops = np.searchsorted(hashes, wanted, side="right")
            for number in np.flatnonzero(stops > starts):
                for row in range(starts[number], stops[number]):
                    key, found = self._read(run, row)
                    if key != keys[number]:
                        continue  # another key of the same hash
                    if numbers[number] is None:
                        numbers[number] = self._starts[run] + row
                    captions[number].append(found)
        return [
            None if number is None else Found(number, found) for number, found in zip(numbers, captions, strict=True)
        ]

    def some_keys(self, count: int) -> list[str]:
        """The keys of at most `count` rows, for messages."""
        first = len(self._hashes[0]) if self._hashes else 0
        return [self._read(0, row)[0] for row in range(min(count, first))]

    def count_repeated(self) -> int:
        """The number of rows whose key an earlier row has too. Keys are compared by hash, so it is nearly exact."""
        repeated = 0
        for run, hashes in enumerate(self._hashes):
            for start in range(0, len(hashes), CHUNK_ROWS):
                chunk = np.asarray(hashes[start : start + CHUNK_ROWS])
                seen = np.zeros(len(chunk), bool)
                seen[1:] = chunk[1:] == chunk[:-1]
                seen[:1] = start > 0 and hashes[start - 1] == chunk[0]
                for earlier in self._hashes[:run]:
                    nearest = np.minimum(np.searchsorted(earlier, chunk), len(earlier) - 1)
                    seen |= earlier[nearest] == chunk
                repeated += int(seen.sum())
        return repeated

    def _read(self, run: int, row: int) -> tuple[str, dict]:
        offset, size = self._spans[run][row].tolist()
        return json.loads(os.pread(self._rows[run].fileno(), size, offset))


def _run_file(folder: pathlib.Path, name: str, run: int, what: str) -> pathlib.Path:
    return folder / f"{name}.{run:04d}.{what}.npy"
