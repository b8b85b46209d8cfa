"""Random access to image-caption records in webdataset tars, read in place through an index of offsets.

A tar is scanned once; where each image and each json begins is then kept in an index file beside the shard (or in a
cache folder), so that any sample is two short reads away and a shuffle may be global. An index is trusted only while
the shard has the size and modification time it was built from.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import itertools
import logging
import os
import pathlib
import re
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

logger = logging.getLogger(__name__)

SCHEMA = 1  # of the index files; another number makes them be built again
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CACHE = "~/.cache/flair_jax"
BLOCK = tarfile.BLOCKSIZE
INDEXING_THREADS = 16  # to hide the latency of network file systems
LOGGED_SHARDS = 20  # shards whose faults are logged one by one

Shards = str | os.PathLike | Sequence["Shards"]


class ShardError(RuntimeError):
    """A shard that cannot be used, or that is not the one the index was built from."""


class RecordError(ValueError):
    """One record that holds no image-caption pair; the others of its shard may be good."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard; `key` is webdataset's: the path up to the first dot of the file name."""

    key: str
    shard: str
    image: bytes
    json: bytes


class Source(Protocol):
    """All records of a data set, by number.

    Safe to use from many threads, and cheap to pickle for worker processes.

    Attributes:
      shards: what it was opened from.
      skipped: what was left out when it was opened, by reason.
      checksum: the same data gives the same number on every machine, other data another.
    """

    shards: list[str]
    skipped: collections.Counter
    checksum: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """
        Raises:
          IndexError: not 0 <= index < len(self).
          RecordError: this record cannot be parsed.
          ShardError: its shard changed since it was opened, or vanished.
        """

    def where(self, index: int) -> tuple[str, str]:
        """(shard, key) of a record, without reading it."""


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def expand(shards: Shards) -> list[str]:
    """Paths of the shards that a pattern, or a list of patterns, names.

    A pattern may hold braces (`cc3m-{0000..0575}.tar`, `{train,val}.tar`) and wildcards (`*`, `?`, `[…]`), be a folder
    (all its `*.tar`, sorted), or be several of these joined by `::` as the reference writes merged sets. A shard that
    is named twice is read twice.

    Raises:
      FileNotFoundError: a pattern matches nothing, or a file that it spells out does not exist.
      TypeError: something else than text, paths and lists of them.
    """
    if isinstance(shards, list | tuple):
        if not shards:
            raise FileNotFoundError("the list of shards is empty: name at least one tar, folder or pattern")
        return [path for pattern in shards for path in expand(pattern)]
    if not isinstance(shards, str | os.PathLike):
        raise TypeError(f"shards must be text, a path, or a list of these, got {type(shards).__name__}: {shards!r}")
    return [path for pattern in os.fspath(shards).split("::") for path in _expand_pattern(pattern)]


def _expand_pattern(pattern: str) -> list[str]:
    paths, missing = [], []
    for name in _expand_braces(os.path.expanduser(pattern.strip())):
        if os.path.isdir(name):
            found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        elif os.path.exists(name):  # before wildcards: a name may hold brackets
            found = [name]
        else:
            found = sorted(glob.glob(name)) if glob.has_magic(name) else []
        paths += found
        if not found:
            missing.append(name)
    if missing:
        what = "a folder without *.tar" if os.path.isdir(missing[0]) else "no such file"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"shards {pattern!r}: {what}: {missing[0]!r}{others}")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """`a{08..10}b` -> a08b, a09b, a10b; `{x,y}` -> x, y; several pairs of braces multiply."""
    parts = re.split(r"\{([^{}]+)\}", pattern)
    choices = [[text] if place % 2 == 0 else _alternatives(text) for place, text in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _alternatives(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if numbers:
        first, last = numbers.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return text.split(",") if "," in text else ["{" + text + "}"]


# ---------------------------------------------------------------------------------------------------------------------
# The index of one shard


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the samples of one shard lie."""

    size: int  # of the shard, bytes
    mtime_ns: int  # of the shard
    spans: np.ndarray  # (N, 4) int64: image offset, image size, json offset, json size, in bytes
    keys: np.ndarray  # uint8, the keys one after the other in UTF-8
    key_lengths: np.ndarray  # (N,) int64, bytes
    skipped: collections.Counter  # members and samples left out, by reason


def scan(path: str) -> Index:
    """Reads the headers of a tar and pairs images with their json.

    What is no complete, plainly named sample is left out and counted: partners that are missing, second images or jsons
    of a key, directories, links, names that are absolute or hold `..`. A tar that was cut keeps its complete members.

    Raises:
      ShardError: the file is no tar (or a compressed one, which has no offsets).
    """
    skipped = collections.Counter()
    images, jsons = {}, {}
    with open(path, "rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        for member in _members(file, path, state.st_size, skipped):
            fault = _fault(member)
            if fault:
                skipped[fault] += 1
                continue
            key, extension = _key_and_extension(member.name)
            samples = images if extension in IMAGE_EXTENSIONS else jsons if extension == "json" else None
            if samples is None:
                continue  # .txt and the like are no fault
            if key in samples:
                skipped["second image or json of a key"] += 1
            else:
                samples[key] = (member.offset_data, member.size)
    skipped["image without json"] += len(images.keys() - jsons.keys())
    skipped["json without image"] += len(jsons.keys() - images.keys())
    keys = [key for key in images if key in jsons]
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return Index(
        size=state.st_size,
        mtime_ns=state.st_mtime_ns,
        spans=np.array([images[key] + jsons[key] for key in keys], np.int64).reshape(-1, 4),  # (N, 4)
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        key_lengths=np.array([len(key) for key in encoded], np.int64),  # (N,)
        skipped=+skipped,  # without the zeros
    )


def _members(file, path: str, size: int, skipped: collections.Counter) -> Iterator[tarfile.TarInfo]:
    """The members whose bytes are all there; how the tar ends is checked, because tarfile ends at damage in silence."""
    if size == 0:
        skipped["empty file"] += 1
        return
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (closing it would not close the file)
    except tarfile.TarError as error:
        raise ShardError(
            f"{path} is not a tar file ({error}). Shards are uncompressed webdataset tars: unpack .tar.gz, "
            "and fetch or write the file again if it is damaged."
        ) from error
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:  # the file ends inside of a header or before the next one
            skipped["shard cut short"] += 1
            return
        if member is None:
            break
        if member.offset_data + member.size > size:
            skipped["shard cut short"] += 1
            return
        yield member
    end = os.pread(file.fileno(), BLOCK, tar.offset)
    if len(end) < BLOCK:  # only complete members, but no end mark: more may have followed
        skipped["shard cut short"] += 1
    elif end.strip(b"\0"):
        skipped["damaged header, rest of the shard not read"] += 1


def _fault(member: tarfile.TarInfo) -> str | None:
    if member.isdir():
        return "directory"
    if member.issym() or member.islnk():
        return "link"
    if not member.isreg() or member.issparse():
        return "special file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe name"
    if not _key_and_extension(member.name)[0]:
        return "name without a key"
    return None


def _key_and_extension(name: str) -> tuple[str, str]:
    """webdataset's rule: split at the first dot of the file name. A file name that begins with a dot has no key."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


# ---------------------------------------------------------------------------------------------------------------------
# Index files


def _index_files(shard: str, index_dir: str | os.PathLike | None) -> list[pathlib.Path]:
    """Where the index of a shard may lie, best place first."""
    path = pathlib.Path(shard).absolute()
    folder = pathlib.Path(index_dir if index_dir is not None else CACHE).expanduser()
    cached = folder / f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.index.npz"
    return [cached] if index_dir is not None else [path.with_name(path.name + ".index.npz"), cached]


def _is_writable(folder: pathlib.Path) -> bool:
    # For root access() is always granted; a folder without any write bit is meant to stay as it is all the same.
    return os.access(folder, os.W_OK) and bool(stat.S_IMODE(folder.stat().st_mode) & 0o222)


def _load_index(shard: str, index_dir: str | os.PathLike | None) -> Index | None:
    """The index from its file, or None where there is none for the shard as it is now."""
    state = os.stat(shard)
    for file in _index_files(shard, index_dir):
        if not file.exists():
            continue
        try:
            index = _read_index(file)
        except Exception as error:  # damaged in whatever way: it is only a cache
            logger.warning("index %s cannot be read (%s: %s): built again", file, type(error).__name__, error)
            continue
        if index is not None and (index.size, index.mtime_ns) == (state.st_size, state.st_mtime_ns):
            return index
    return None


def _read_index(file: pathlib.Path) -> Index | None:
    """None for a file of another schema. numpy checks the checksums of the zip; objects are not unpickled."""
    with np.load(file, allow_pickle=False) as stored:
        if int(stored["schema"]) != SCHEMA:
            return None
        index = Index(
            size=int(stored["size"]),
            mtime_ns=int(stored["mtime_ns"]),
            spans=stored["spans"],
            keys=stored["keys"],
            key_lengths=stored["key_lengths"],
            skipped=collections.Counter(
                dict(zip(stored["skipped_reasons"].tolist(), stored["skipped_counts"].tolist(), strict=True))
            ),
        )
    count = len(index.key_lengths)
    if index.spans.shape != (count, 4) or index.key_lengths.sum() != len(index.keys):
        raise ValueError(f"{count} samples, but spans {index.spans.shape} and {len(index.keys)} bytes of keys")
    return index


def _save_index(index: Index, shard: str, index_dir: str | os.PathLike | None) -> None:
    """Writes the index to the first place that takes it. Without one the run goes on and the next one scans again."""
    failures = []
    for file in _index_files(shard, index_dir):
        try:
            if file.parent == pathlib.Path(shard).absolute().parent and not _is_writable(file.parent):
                raise PermissionError(f"{file.parent} is read-only")
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_index(index, file)
            return
        except OSError as error:
            failures.append(f"{file}: {error}")
    logger.warning(
        "the index of %s is not kept and will be built again next time (%s). Give index_dir a folder with space.",
        shard,
        "; ".join(failures),
    )


def _write_index(index: Index, file: pathlib.Path) -> None:
    """All or nothing: readers, and writers of other processes, never see half a file."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as target:
            np.savez(
                target,
                schema=SCHEMA,
                size=index.size,
                mtime_ns=index.mtime_ns,
                spans=index.spans,
                keys=index.keys,
                key_lengths=index.key_lengths,
                skipped_reasons=np.array(list(index.skipped), np.str_),
                skipped_counts=np.array(list(index.skipped.values()), np.int64),
            )
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _scan_and_save(shard: str, index_dir: str | os.PathLike | None) -> Index:
    index = scan(shard)
    _save_index(index, shard, index_dir)
    return index


# ---------------------------------------------------------------------------------------------------------------------
# The source


class WebDataset:
    """All samples of some shards, by number: `len(source)`, `source[i] -> Record`.

    Safe to use from many threads and cheap to send to worker processes: it holds numpy arrays (40 bytes a sample and
    its key) and no open file. A shard is opened for each read: under a global shuffle over more shards than a process
    may hold open, a cache of files would seldom hit.

    Attributes:
      shards: paths, in the order of the samples.
      skipped: members and samples of the tars that were left out, by reason (see `scan`).
    """

    def __init__(self, shards: Shards, index_dir: str | os.PathLike | None = None):
        """
        Args:
          shards: what `expand` understands.
          index_dir: folder for the index files; None: beside the shards, or in ~/.cache/flair_jax where that is not
            possible.

        Raises:
          FileNotFoundError: see `expand`.
          ShardError: a file is no tar, or no shard holds a complete sample.
        """
        self.shards = expand(shards)
        indexes = _indexes(self.shards, index_dir)
        self.skipped = sum((index.skipped for index in indexes), collections.Counter())
        counts = [len(index.spans) for index in indexes]
        if not sum(counts):
            raise ShardError(
                f"no sample with an image ({'|'.join(IMAGE_EXTENSIONS)}) and a json in {len(self.shards)} shard(s), "
                f"the first is {self.shards[0]}; left out: {dict(self.skipped) or 'nothing'}"
            )
        self._starts = np.cumsum([0, *counts])  # (shards + 1,)
        self._states = np.array([(index.size, index.mtime_ns) for index in indexes], np.int64)  # (shards, 2)
        self._spans = np.concatenate([index.spans for index in indexes])  # (N, 4)
        self._keys = np.concatenate([index.keys for index in indexes])
        lengths = np.concatenate([index.key_lengths for index in indexes])  # (N,)
        self._key_ends = np.cumsum(lengths)  # (N,)
        # Folders and the places inside of the tars do not matter: a moved or repacked data set stays the same.
        self.checksum = zlib.crc32(self._keys, zlib.crc32(np.ascontiguousarray(self._spans[:, 1::2])))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        """
        Raises:
          IndexError: not 0 <= index < len(self).
          ShardError: the shard changed since its index was built, or vanished.
        """
        shard, key = self.where(index)
        image_offset, image_size, json_offset, json_size = self._spans[index].tolist()
        try:
            handle = os.open(shard, os.O_RDONLY)
            try:
                self._check_state(handle, index)
                image = os.pread(handle, image_size, image_offset)
                json = os.pread(handle, json_size, json_offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise ShardError(f"{shard}: sample {key!r} cannot be read: {error}") from error
        if (len(image), len(json)) != (image_size, json_size):
            raise ShardError(f"{shard}: sample {key!r} is cut: the file changed while it was read. Start again.")
        return Record(key, shard, image, json)

    def where(self, index: int) -> tuple[str, str]:
        """(shard, key) of a sample, from the index alone."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = self._key_ends[index - 1] if index else 0
        key = self._keys[start : self._key_ends[index]].tobytes().decode("utf-8", "surrogateescape")
        return self.shards[self._shard_number(index)], key

    def _shard_number(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _check_state(self, handle: int, index: int) -> None:
        number = self._shard_number(index)
        state, expected = os.fstat(handle), tuple(self._states[number].tolist())
        if (state.st_size, state.st_mtime_ns) != expected:
            raise ShardError(
                f"{self.shards[number]} was replaced or changed during the run: expected {expected[0]} bytes, modified "
                f"at {expected[1]} ns, found {state.st_size} bytes, modified at {state.st_mtime_ns} ns. Its index no "
                "longer fits: put the file back, or start again so that the index is rebuilt."
            )


def _indexes(shards: list[str], index_dir: str | os.PathLike | None) -> list[Index]:
    """Indexes of all shards, from their files where those are valid."""
    with concurrent.futures.ThreadPoolExecutor(INDEXING_THREADS) as pool:
        indexes = list(pool.map(functools.partial(_load_index, index_dir=index_dir), shards))
        missing = [number for number, index in enumerate(indexes) if index is None]
        if missing:
            logger.info("indexing %d of %d shards, once", len(missing), len(shards))
        scan_one = functools.partial(_scan_and_save, index_dir=index_dir)
        for number, index in zip(missing, pool.map(scan_one, [shards[number] for number in missing]), strict=True):
            indexes[number] = index
    faulty = [number for number, index in enumerate(indexes) if index.skipped]
    for number in faulty[:LOGGED_SHARDS]:
        logger.warning("%s: left out %s", shards[number], dict(indexes[number].skipped))
    if len(faulty) > LOGGED_SHARDS:
        logger.warning("%d more shards leave something out; see the counts in `skipped`", len(faulty) - LOGGED_SHARDS)
    return indexes


def open_source(shards: Shards, index_dir: str | os.PathLike | None = None) -> Source:
    """The data set that some shards make up; see `WebDataset`."""
    return WebDataset(shards, index_dir)
