"""Offsets of the samples in shards: an index per shard, and one table over all shards.

A shard is scanned once; what was found is kept in an index file beside the shard (or in a cache folder). An index is
trusted only while the shard has the state it was built from. The table of a large data set is kept too, as files in the
cache folder that are mapped into memory: all processes of a machine then share one copy.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import pickle
import random
import shutil
import stat
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from flair_jax.data.sources import files
from flair_jax.data.sources.base import ShardError

logger = logging.getLogger(__name__)

SCHEMA = 3  # of the index files and tables; another number makes them be built again
CACHE = "~/.cache/flair_jax"
INDEX_ENDING = ".index.npz"  # of the files beside shards
PROCESS_BYTES = 1 << 30  # shards of more bytes than this are scanned by several processes
CHUNK = 8  # shards that such a process scans, at most: to start it takes about half a second
MAPPED_BYTES = 1 << 24  # tables of more bytes than this are mapped; each process keeps its own copy of smaller ones
KEPT_DAYS = 30  # after which a table that was not opened is removed
LOGGED_SHARDS = 20  # shards whose faults are logged one by one

IndexDir = str | os.PathLike | None


@dataclasses.dataclass(frozen=True)
class Index:
    """Offsets of the samples of one shard. A sample has P parts, such as an image and a json."""

    state: files.State  # of the shard
    spans: np.ndarray  # (N, 2 P) int64: offset and size of each part, in bytes
    keys: np.ndarray  # uint8, the keys one after the other in UTF-8
    key_lengths: np.ndarray  # (N,) int64, bytes
    skipped: collections.Counter  # what was left out, by reason
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # reason -> name of the first one, if it has one


Scan = Callable[[str], Index]  # a module-level function, which can be pickled for other processes


# ---------------------------------------------------------------------------------------------------------------------
# Index files


def _cache(index_dir: IndexDir) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(index_dir if index_dir is not None else CACHE))


def _absolute(shard: str) -> str:
    return shard if files.is_remote(shard) else os.path.abspath(shard)


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:24]


def _index_files(shard: str, index_dir: IndexDir) -> list[pathlib.Path]:
    """Paths where the index of a shard may be, in order of preference."""
    path = _absolute(shard)
    cached = _cache(index_dir) / f"{pathlib.Path(path.partition('?')[0]).stem}-{_digest(path)}{INDEX_ENDING}"
    return [cached] if index_dir is not None or files.is_remote(shard) else [pathlib.Path(path + INDEX_ENDING), cached]


def _is_writable(folder: pathlib.Path) -> bool:
    # access() always succeeds for root; a folder without any write bit is left alone all the same.
    return os.access(folder, os.W_OK) and bool(stat.S_IMODE(folder.stat().st_mode) & 0o222)


def describe(skipped: collections.Counter, examples: Mapping[str, str]) -> str:
    """What was left out, for messages: `2 x link (first: a.jpg), 1 x empty file`."""
    parts = [
        f"{count} x {reason}" + (f" (first: {examples[reason]})" if reason in examples else "")
        for reason, count in skipped.items()
    ]
    return ", ".join(parts) or "nothing"


def _load(shard: str, state: files.State, index_dir: IndexDir) -> Index | None:
    """The index from its file, or None where there is none for the shard as it is now."""
    for file in _index_files(shard, index_dir):
        if not file.exists():
            continue
        try:
            index = _read(file)
        except Exception as error:  # damaged in whatever way: it is only a cache
            logger.warning("index %s cannot be read (%s: %s): built again", file, type(error).__name__, error)
            continue
        if index is not None and index.state == state:
            return index
    return None


def _to_json(skipped: collections.Counter, examples: Mapping[str, str], **more) -> bytes:
    return json.dumps({"skipped": skipped, "examples": examples, **more}).encode()


def _from_json(content: bytes) -> dict:
    """`skipped` and `examples` of an index or a table."""
    stored = json.loads(content)
    return {"skipped": collections.Counter(stored["skipped"]), "examples": dict(stored["examples"])}


def _read(file: pathlib.Path) -> Index | None:
    """None for a file of another schema. numpy checks the checksums of the zip; objects are not unpickled."""
    with np.load(file, allow_pickle=False) as stored:
        if int(stored["schema"]) != SCHEMA:
            return None
        index = Index(
            state=files.State(*stored["state"].tolist()),
            spans=stored["spans"],
            keys=stored["keys"],
            key_lengths=stored["key_lengths"],
            **_from_json(stored["skipped"].tobytes()),
        )
    count = len(index.key_lengths)
    if len(index.spans) != count or index.key_lengths.sum() != len(index.keys):
        raise ValueError(f"{count} samples, but {len(index.spans)} spans and {len(index.keys)} bytes of keys")
    offsets, sizes = index.spans[:, 0::2], index.spans[:, 1::2]
    if min(offsets.min(initial=0), sizes.min(initial=0)) < 0 or (offsets > index.state.size - sizes).any():
        raise ValueError(f"spans lie outside of the {index.state.size} bytes of the shard")
    return index


def _save(index: Index, shard: str, index_dir: IndexDir) -> None:
    """Writes the index to the first writable path. If there is none, the run continues and the next one scans again."""
    failures = []
    for file in _index_files(shard, index_dir):
        try:
            if str(file.parent) == os.path.dirname(os.path.abspath(shard)) and not _is_writable(file.parent):
                raise PermissionError(f"{file.parent} is read-only")
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(index, file)
            return
        except OSError as error:
            failures.append(f"{file}: {error}")
    logger.warning(
        "the index of %s is not kept and will be built again next time (%s). Give index_dir a folder with space.",
        shard,
        "; ".join(failures),
    )


def _write(index: Index, file: pathlib.Path) -> None:
    with files.replacing(file) as temporary, open(temporary, "wb") as target:
        np.savez(
            target,
            schema=SCHEMA,
            state=np.array(index.state, np.int64),
            spans=index.spans,
            keys=index.keys,
            key_lengths=index.key_lengths,
            skipped=np.frombuffer(_to_json(index.skipped, index.examples), np.uint8),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Indexes of all shards


def _indexes(shards: Sequence[str], states: Sequence[files.State], scan: Scan, index_dir: IndexDir) -> list[Index]:
    """Indexes of all shards, from their files where those are valid."""
    with concurrent.futures.ThreadPoolExecutor(files.THREADS) as pool:
        load = functools.partial(_load, index_dir=index_dir)
        found = dict(zip(shards, pool.map(load, shards, states), strict=True))
    sizes = {shard: state.size for shard, state in zip(shards, states, strict=True) if found[shard] is None}
    if sizes:
        logger.info("indexing %d of %d shards, once", len(sizes), len(shards))
        found.update(_scan_all(sizes, scan, index_dir))
    faulty = [shard for shard, index in found.items() if index.skipped]
    for shard in faulty[:LOGGED_SHARDS]:
        logger.warning("%s: left out %s", shard, describe(found[shard].skipped, found[shard].examples))
    if len(faulty) > LOGGED_SHARDS:
        logger.warning("%d more shards leave something out; see the counts in `skipped`", len(faulty) - LOGGED_SHARDS)
    return [found[shard] for shard in shards]


def _scan_all(sizes: dict[str, int], scan: Scan, index_dir: IndexDir) -> Iterator[tuple[str, Index]]:
    """(shard, index) for each of some shards with their sizes in bytes.

    Scanning is pure Python, which holds the GIL: few bytes are scanned in threads, many in processes. The order is
    random, so that processes and machines that start at the same time share the work through the index files.
    """
    from tqdm import tqdm  # of the process that opens the data set alone

    shards = random.Random(os.urandom(8)).sample(list(sizes), len(sizes))
    processes = len(os.sched_getaffinity(0)) if sum(sizes.values()) > PROCESS_BYTES else 1
    size = min(CHUNK, -(-len(shards) // processes)) if processes > 1 else 1
    chunks = [shards[start : start + size] for start in range(0, len(shards), size)]
    work = functools.partial(_scan_elsewhere if processes > 1 else _scan_here, scan=scan, index_dir=index_dir)
    with (
        concurrent.futures.ThreadPoolExecutor(processes if processes > 1 else files.THREADS) as pool,
        tqdm(total=len(shards), desc="indexing", unit="shard", delay=1, disable=None) as bar,
    ):
        futures = {pool.submit(work, chunk): chunk for chunk in chunks}
        try:
            for future in concurrent.futures.as_completed(futures):
                chunk = futures[future]
                yield from zip(chunk, future.result(), strict=True)
                bar.update(len(chunk))
        finally:  # a fault ends the work on the rest
            pool.shutdown(wait=False, cancel_futures=True)


def _scan_here(shards: Sequence[str], scan: Scan, index_dir: IndexDir) -> list[Index]:
    indexes = []
    for shard in shards:
        index = _load(shard, files.state(shard), index_dir)  # it may be there by now
        if index is None:
            try:
                index = scan(shard)
            except OSError as error:
                raise ShardError(f"{shard} cannot be read: {error}") from error
            _save(index, shard, index_dir)
        indexes.append(index)
    return indexes


def _scan_elsewhere(shards: Sequence[str], scan: Scan, index_dir: IndexDir) -> list[Index]:
    """`_scan_here` in a process of its own.

    Not through multiprocessing, whose children import the main module, which scripts have to be written for.
    """
    result = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        input=pickle.dumps((shards, scan, index_dir)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        check=True,
    )
    answer = pickle.loads(result.stdout)
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve() -> None:
    """Runs in the child of `_scan_elsewhere`: reads the work from stdin and writes the answer to stdout."""
    shards, scan, index_dir = pickle.load(sys.stdin.buffer)
    try:
        answer = _scan_here(shards, scan, index_dir)
    except (ShardError, OSError) as error:
        answer = error
    pickle.dump(answer, sys.stdout.buffer)


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclasses.dataclass(frozen=True)
class Table:
    """Offsets of all samples.

    It is pickled by the name of its folder if it has one, and by value otherwise.
    """

    starts: np.ndarray  # (shards + 1,) int64: number of each shard's first sample; at the end that of all samples
    states: np.ndarray  # (shards, 2) int64
    spans: np.ndarray  # (N, 2 P) int64, see Index
    keys: np.ndarray  # uint8
    key_ends: np.ndarray  # (N,) int64
    skipped: collections.Counter
    examples: dict[str, str]  # see Index; over all shards the first one of each reason
    checksum: int
    folder: str | None = None

    def __reduce__(self):
        if self.folder is not None:
            return _open_table, (self.folder,)
        return Table, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


ARRAYS = ("starts", "states", "spans", "keys", "key_ends")


def _merge(indexes: Sequence[Index]) -> Table:
    spans = np.concatenate([index.spans for index in indexes])  # (N, 2 P)
    keys = np.concatenate([index.keys for index in indexes])
    return Table(
        starts=np.cumsum([0, *(len(index.spans) for index in indexes)]),
        states=np.array([index.state for index in indexes], np.int64),
        spans=spans,
        keys=keys,
        key_ends=np.cumsum(np.concatenate([index.key_lengths for index in indexes])),
        skipped=sum((index.skipped for index in indexes), collections.Counter()),
        examples={reason: name for index in reversed(indexes) for reason, name in index.examples.items()},
        # Folders and offsets are left out, so that a moved or repacked data set keeps its checksum.
        checksum=zlib.crc32(keys, zlib.crc32(np.ascontiguousarray(spans[:, 1::2]))),
    )


def open_table(shards: Sequence[str], scan: Scan, index_dir: IndexDir) -> Table:
    """The table of some shards, from its files or from the indexes, which are built where there are none.

    Raises:
      FileNotFoundError: a shard does not exist.
      ShardError: a shard cannot be read, or `scan` refuses it.
    """
    with concurrent.futures.ThreadPoolExecutor(4 * files.THREADS) as pool:
        states = list(pool.map(_state, shards))
    home = _cache(index_dir) / f"{len(shards)}-shards-{_digest(chr(0).join(map(_absolute, shards)))}.table"
    folder = home / _version(states)
    if folder.exists():
        try:
            table = _open_table(str(folder))
            os.utime(home)
            return table
        except (OSError, ValueError, KeyError) as error:
            logger.warning("table %s cannot be read (%s): built again", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    table = _merge(_indexes(shards, states, scan, index_dir))
    if sum(getattr(table, name).nbytes for name in ARRAYS) <= MAPPED_BYTES:
        return table
    try:
        folder = home / _version(table.states.tolist())
        _save_table(table, folder)
        table = _open_table(str(folder))
    except OSError as error:
        logger.warning(
            "the table of %d samples is not kept (%s): each process has its own copy of it in memory. Give index_dir "
            "a folder with space.",
            len(table.spans),
            error,
        )
    else:
        _clean(home, folder)
    return table


def _state(shard: str) -> files.State:
    try:
        return files.state(shard)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ShardError(f"{shard} cannot be read: {error}") from error


def _version(states: Sequence[Sequence[int]]) -> str:
    return _digest(repr((SCHEMA, [tuple(state) for state in states])))


def _open_table(folder: str) -> Table:
    arrays = {}
    try:
        for name in ARRAYS:
            # As plain arrays: those of class memmap take several times as long to index.
            arrays[name] = np.asarray(np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False))
        with open(os.path.join(folder, "table.json"), "rb") as file:
            rest = file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is gone: the shards changed and another run has indexed them anew. Start again."
        ) from error
    count = int(arrays["starts"][-1])
    if len(arrays["spans"]) != count or len(arrays["key_ends"]) != count:
        raise ValueError(f"{count} samples, but {len(arrays['spans'])} spans and {len(arrays['key_ends'])} keys")
    return Table(**arrays, **_from_json(rest), checksum=int(json.loads(rest)["checksum"]), folder=str(folder))


def _save_table(table: Table, folder: pathlib.Path) -> None:
    """Atomic. If another process was faster, its folder is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        for name in ARRAYS:
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, getattr(table, name))
                _flush(file)
        with open(temporary / "table.json", "wb") as file:
            file.write(_to_json(table.skipped, table.examples, checksum=table.checksum))
            _flush(file)
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.exists():
            raise


def _flush(file) -> None:
    """Writes to the disk before the folder is renamed: after a power cut the files would hold zeros."""
    file.flush()
    os.fsync(file.fileno())


def _clean(home: pathlib.Path, folder: pathlib.Path) -> None:
    """Removes tables of earlier states of the same shards, and all tables not opened for `KEPT_DAYS`."""
    now = time.time()
    old = [path for path in home.iterdir() if path != folder and not path.name.startswith(".")]
    # A temporary folder may be another process's, at work right now.
    old += [path for path in home.glob(".*") if now - path.stat().st_mtime > 24 * 3600]
    old += [path for path in home.parent.glob("*-shards-*.table") if now - path.stat().st_mtime > KEPT_DAYS * 24 * 3600]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)  # others may clean at the same time


# ---------------------------------------------------------------------------------------------------------------------
# A source on top of a table


class IndexedShards:
    """Base class of the sources that read through a table; see `base.Source`.

    Cheap to pickle, and without open files: a shard is opened for each read. Under a global shuffle over more shards
    than a process may have open, a cache of open files would rarely hit.
    """

    def __init__(self, shards: Sequence[str], scan: Scan, index_dir: IndexDir):
        """
        Raises:
          FileNotFoundError, ShardError: see `open_table`.
        """
        self.shards = list(shards)
        self._table = open_table(self.shards, scan, index_dir)

    @property
    def skipped(self) -> collections.Counter:
        return self._table.skipped

    def _left_out(self) -> str:
        return describe(self._table.skipped, self._table.examples)

    @property
    def checksum(self) -> int:
        return self._table.checksum

    def __len__(self) -> int:
        return len(self._table.spans)

    def _number(self, index: int) -> int:
        """Number of the shard that holds a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._table.starts, index, side="right")) - 1

    def _key(self, index: int) -> str:
        ends = self._table.key_ends
        return (
            self._table.keys[ends[index - 1] if index else 0 : ends[index]].tobytes().decode("utf-8", "surrogateescape")
        )

    def where(self, index: int) -> tuple[str, str]:
        """(shard, key) of a sample, from the index alone."""
        return self.shards[self._number(index)], self._key(index)

    def _parts(self, index: int) -> list[bytes]:
        """
        Raises:
          IndexError: not 0 <= index < len(self).
          ShardError: the shard changed since its index was built, or vanished.
        """
        number = self._number(index)
        shard = self.shards[number]
        numbers = self._table.spans[index].tolist()
        spans = list(zip(numbers[0::2], numbers[1::2], strict=True))
        try:
            return files.read(shard, spans, files.State(*self._table.states[number].tolist()))
        except files.ChangedError as error:
            raise ShardError(
                f"{error}. Its index no longer fits: put the file back, or start again so that the index is rebuilt."
            ) from error
        except OSError as error:
            raise ShardError(f"{shard}: sample {self.where(index)[1]!r} cannot be read: {error}") from error
