"""Files on this machine and in stores (gs://, s3://, https:// …): names, states, ranges of bytes, atomic writes.

Stores are reached through fsspec, whose packages for each kind of store are installed apart: gcsfs, s3fs, aiohttp.
"""

import contextlib
import glob
import hashlib
import io
import logging
import os
import pathlib
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

logger = logging.getLogger(__name__)

THREADS = 16  # to hide the latency of network file systems and stores
READ_AHEAD = 1 << 23  # bytes that are fetched at once where a file of a store is streamed
GAP = 1 << 16  # ranges of a file with smaller gaps between them, in bytes, are fetched as one
WAITS = (1, 4, 16)  # seconds between attempts to read from a store
RECHECK = 600.0  # seconds between checks of the state of a file of a store; each costs a request
# Metadata of stores that changes with a file's content; each store has some of them.
MARKS = (
    *("ETag", "etag", "md5Hash", "crc32c", "generation", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created"),
)

PARTIAL = ".partial"  # ending of a file that is being written

_seen: dict[tuple[str, "State"], float] = {}  # when a file of a store was last checked to have a state


class State(NamedTuple):
    """Identifies the content of a file: a changed file has another state."""

    size: int  # bytes
    stamp: int  # time of the last change in ns; in a store a hash of its `MARKS` instead


class ChangedError(OSError):
    """A file is not what it was when its state was taken."""


def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def state(path: str) -> State:
    """
    Raises:
      OSError: there is no such file, or its store cannot be asked.
    """
    if not is_remote(path):
        return _local_state(os.stat(path))
    system, name = _store(path)
    info = _with_retries(lambda: system.info(name), path)
    if info.get("size") is None:
        raise OSError(f"{path}: the store does not report the size, so parts of the file cannot be read")
    marks = repr([(mark, str(info[mark])) for mark in MARKS if info.get(mark)])
    stamp = int.from_bytes(hashlib.sha256(marks.encode()).digest()[:8], "little", signed=True)
    return State(int(info["size"]), stamp)


def check(path: str, expected: State) -> None:
    """
    Raises:
      ChangedError: the file has another state. A file of a store is checked every ten minutes at most.
      OSError: there is no such file any more, or its store cannot be asked.
    """
    if not is_remote(path):
        _compare(path, state(path), expected)
        return
    now = time.monotonic()
    if now - _seen.get((path, expected), -RECHECK) >= RECHECK:
        _compare(path, state(path), expected)
        _seen[path, expected] = now


def read(path: str, spans: Sequence[tuple[int, int]], expected: State) -> list[bytes]:
    """The bytes of each (offset, size); spans that are close together are read in one access.

    Raises:
      ChangedError: the file's state is not the expected one, see `check`, or it has fewer bytes.
      OSError: it cannot be read.
    """
    parts: list[bytes] = [b""] * len(spans)
    with _ranges(path, expected) as fetch:
        for numbers in _neighbours(spans):
            start = spans[numbers[0]][0]
            stop = max(offset + size for offset, size in (spans[number] for number in numbers))
            content = fetch(start, stop)
            if len(content) != stop - start:
                raise ChangedError(f"{path}: {len(content)} bytes at {start} instead of {stop - start}")
            for number in numbers:
                offset, size = spans[number]
                parts[number] = content[offset - start : offset - start + size]
    return parts


def _neighbours(spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Numbers of the spans that are not empty, in file order, grouped into what is fetched at once."""
    groups, stop = [], -GAP - 1
    for number in sorted((number for number, span in enumerate(spans) if span[1]), key=lambda number: spans[number][0]):
        offset, size = spans[number]
        if offset - stop <= GAP:
            groups[-1].append(number)
        else:
            groups.append([number])
        stop = max(stop, offset + size)
    return groups


@contextlib.contextmanager
def _ranges(path: str, expected: State) -> Iterator:
    """A function (start, stop) -> bytes of a file that has the expected state."""
    if is_remote(path):
        check(path, expected)
        system, name = _store(path)
        yield lambda start, stop: _with_retries(lambda: system.cat_file(name, start=start, end=stop), path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        _compare(path, _local_state(os.fstat(handle)), expected)
        yield lambda start, stop: os.pread(handle, stop - start, start)
    finally:
        os.close(handle)


@contextlib.contextmanager
def stream(path: str) -> Iterator[tuple[BinaryIO, State]]:
    """A seekable file to read from front to back, and its state. From a store it comes in blocks of some megabytes.

    Raises:
      OSError: it cannot be opened.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            yield file, _local_state(os.fstat(file.fileno()))
        return
    found = state(path)
    with io.BufferedReader(_StoreFile(path, found.size), READ_AHEAD) as file:
        yield file, found


class _StoreFile(io.RawIOBase):
    """A file of a store; each read is a request."""

    def __init__(self, path: str, size: int):
        self._path, self._size, self._position = path, size, 0
        self._system, self._name = _store(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, target) -> int:
        start, stop = self._position, min(self._position + len(target), self._size)
        if start >= stop:
            return 0
        content = _with_retries(lambda: self._system.cat_file(self._name, start=start, end=stop), self._path)
        if len(content) != stop - start:
            raise ChangedError(f"{self._path}: {len(content)} bytes at {start} instead of {stop - start}")
        target[: len(content)] = content
        self._position = stop
        return len(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside a local `path`. What is written there is renamed to `path` if the block succeeds.

    A killed process leaves no half-written file under the final name. Processes may write the same file at the same
    time: each has a temporary file of its own, and the last one to finish replaces the others' files. The mode of the
    file follows the umask, whatever the code that writes it would choose.

    Raises:
      OSError: the file cannot be written, for instance because the disk is full. `path` stays as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # before the rename: after a power cut the file would hold zeros
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find(pattern: str) -> list[str]:
    """The files that a name with wildcards matches, sorted; the file or folder itself where it has none."""
    if not is_remote(pattern):
        if os.path.exists(pattern):  # before wildcards: a name may hold brackets
            return [pattern]
        return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []
    system, name = _store(pattern)
    if glob.has_magic(name):
        return sorted(system.unstrip_protocol(path) for path in _with_retries(lambda: system.glob(name), pattern))
    return [pattern] if _with_retries(lambda: system.exists(name), pattern) else []


def folder(path: str) -> list[str] | None:
    """The paths of the entries of a folder, sorted; None if the path is not a folder."""
    if not is_remote(path):
        return sorted(os.path.join(path, name) for name in os.listdir(path)) if os.path.isdir(path) else None
    system, name = _store(path)
    if not _with_retries(lambda: system.isdir(name), path):
        return None
    listed = _with_retries(lambda: system.ls(name, detail=False), path)
    return sorted(system.unstrip_protocol(entry) for entry in listed)


def _local_state(status: os.stat_result) -> State:
    return State(status.st_size, status.st_mtime_ns)


def _compare(path: str, found: State, expected: State) -> None:
    if found != expected:
        raise ChangedError(
            f"{path} was replaced or changed during the run: expected {expected.size} bytes with stamp "
            f"{expected.stamp}, found {found.size} with {found.stamp}"
        )


def _store(path: str):
    """(fsspec's file system, the name in it). Listings are not kept: they would hide changes.

    Raises:
      FileNotFoundError: there is no such kind of store.
      ImportError: its package is not installed; the message names it.
    """
    import fsspec  # of the users of stores alone

    try:
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ValueError as error:
        raise FileNotFoundError(f"{path}: there is no kind of store of this name: {error}") from error


def _with_retries(action, path: str):
    """Calls `action`, with retries.

    Raises:
      OSError: every attempt failed. Each store raises exceptions of its own; all of them become this one.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (PermissionError, NotImplementedError):
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and _is_missing(error):
                raise
            if wait is None:
                raise OSError(f"{path} cannot be read from its store: {type(error).__name__}: {error}") from error
            logger.warning("%s: %s: %s; retrying in %d s", path, type(error).__name__, error, wait)
            time.sleep(wait)


def _is_missing(error: FileNotFoundError) -> bool:
    """fsspec raises FileNotFoundError also for an HTTP server that does not answer; the cause distinguishes the two."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410)
