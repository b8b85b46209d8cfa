"""Image-caption records and where they come from: one interface, whatever the format of the shards.

    source = open_source("/data/cc3m/{0000..0575}.tar::gs://bucket/cc12m/*.array_record::tfds:my_set?split=train")
    source[7]  ->  Record(key, shard, image, json)

The formats: webdataset tars (`data.webdataset`), and tf.train.Example in ArrayRecord or TFRecord files or in a data set
of TensorFlow Datasets (`data.examples`). Tars, ArrayRecord and TFRecord are known by their names.
"""

import bisect
import collections
import dataclasses
import glob
import itertools
import os
import re
import zlib
from collections.abc import Sequence
from typing import Protocol

from data import files

TAR, ARRAY_RECORD, TFRECORD, TFDS = "webdataset", "ArrayRecord", "TFRecord", "TFDS"
TFDS_PREFIX = "tfds:"
# What file names end in. TensorFlow Datasets, Beam and others number shards behind the extension.
ENDINGS = {
    TAR: r"\.tar",
    ARRAY_RECORD: r"\.array_?record(-\d+-of-\d+)?",
    TFRECORD: r"\.tfrecords?(-\d+-of-\d+)?",
}
INDEX_ENDING = ".index.npz"  # of the files beside shards that `data.index` keeps
TFDS_MARK = "dataset_info.json"  # lies in each folder of a data set of TensorFlow Datasets

Shards = str | os.PathLike | Sequence["Shards"]


class ShardError(RuntimeError):
    """A shard that cannot be used, or that is not the one that was opened."""


class RecordError(ValueError):
    """One record that holds no image-caption pair; the others of its shard may be good."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard."""

    key: str
    shard: str
    image: bytes  # encoded: JPEG, PNG, WebP
    json: bytes  # an object with the caption fields


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


def open_source(shards: Shards, index_dir: str | os.PathLike | None = None) -> Source:
    """The data set that some shards make up, in their order; they may be of several formats.

    Args:
      shards: what `expand` understands.
      index_dir: folder for index files; None: beside the shards, or in ~/.cache/flair_jax where that is not possible.

    Raises:
      FileNotFoundError: see `expand`.
      ShardError: a file is not of the format that its name says, or of none, or there is no record in a format.
    """
    from data import examples, webdataset  # here, because they know this module

    openers = {
        TAR: lambda paths: webdataset.WebDataset(paths, index_dir),
        ARRAY_RECORD: examples.open_array_records,
        TFRECORD: lambda paths: examples.TFRecord(paths, index_dir),
        TFDS: lambda names: join([examples.open_tfds(name) for name in names]),
    }
    return join([openers[format](list(paths)) for format, paths in itertools.groupby(expand(shards), _known_format)])


def join(sources: Sequence[Source]) -> Source:
    """Sources one after the other, as one."""
    return sources[0] if len(sources) == 1 else Concatenation(sources)


class Concatenation:
    """Sources one after the other; see `Source`."""

    def __init__(self, sources: Sequence[Source]):
        self.shards = [shard for source in sources for shard in source.shards]
        self.skipped = sum((source.skipped for source in sources), collections.Counter())
        self.checksum = zlib.crc32(repr([(len(source), source.checksum) for source in sources]).encode())
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        source, index = self._locate(index)
        return source[index]

    def where(self, index: int) -> tuple[str, str]:
        source, index = self._locate(index)
        return source.where(index)

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def expand(shards: Shards) -> list[str]:
    """Paths of the shards that a pattern, or a list of patterns, names.

    A pattern may hold braces (`cc3m-{0000..0575}.tar`, `{train,val}.tar`) and wildcards (`*`, `?`, `[…]`), be a folder
    (all its shards, sorted), be the name of a data set of TensorFlow Datasets (`tfds:…`, which stays as it is), or be
    several of these joined by `::` as the reference writes merged sets. Paths may lie in stores (gs://, s3://, …);
    whether shards that are spelled out exist there is left to those who open them. A shard that is named twice is read
    twice.

    Raises:
      FileNotFoundError: a pattern matches nothing, or a file that it spells out does not exist.
      ShardError: a folder that holds shards of several formats, or several splits of a data set.
      TypeError: something else than text, paths and lists of them.
    """
    return [path for pattern in sets(shards) for path in _expand_pattern(pattern)]


def sets(shards: Shards) -> list[str]:
    """The patterns that a list or `::` holds apart.

    Raises:
      FileNotFoundError: there is none.
      TypeError: something else than text, paths and lists of them.
    """
    if isinstance(shards, list | tuple):
        if not shards:
            raise FileNotFoundError("the list of shards is empty: name at least one shard, folder or pattern")
        return [pattern for part in shards for pattern in sets(part)]
    if not isinstance(shards, str | os.PathLike):
        raise TypeError(f"shards must be text, a path, or a list of these, got {type(shards).__name__}: {shards!r}")
    return [pattern.strip() for pattern in os.fspath(shards).split("::")]


def _expand_pattern(pattern: str) -> list[str]:
    if pattern.startswith(TFDS_PREFIX):
        return [pattern]
    paths, missing = [], []
    for name in _expand_braces(os.path.expanduser(pattern)):
        found = _find(name)
        paths += found
        if not found:
            missing.append(name)
    if missing:
        what = "no such file" if files.folder(missing[0]) is None else "a folder without shards"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"shards {pattern!r}: {what}: {missing[0]!r}{others}")
    return paths


def _find(name: str) -> list[str]:
    """The shards that a name without braces stands for."""
    if files.is_remote(name):
        if glob.has_magic(_without_query(name)):
            return _matches(name)
        if _format(name):
            return [name]  # a request for each of thousands of shards would take minutes
    entries = files.folder(name)
    if entries is None:
        return _matches(name)
    if any(os.path.basename(path) == TFDS_MARK for path in entries):
        raise ShardError(
            f"{name} is a data set of TensorFlow Datasets, whose splits lie side by side. Name the split: "
            f"{TFDS_PREFIX}{name}?split=train"
        )
    shards = [path for path in entries if _format(path)]
    formats = collections.Counter(map(_format, shards))
    if len(formats) > 1:
        raise ShardError(
            f"the folder {name} holds shards of several formats ({dict(formats)}): say which, as in "
            f"{os.path.join(name, '*.tar')}"
        )
    return shards


def _matches(name: str) -> list[str]:
    return [path for path in files.find(name) if not path.endswith(INDEX_ENDING)]  # `x.tar*` does not mean those


def _format(path: str) -> str | None:
    """The format that a name speaks of."""
    if path.startswith(TFDS_PREFIX):
        return TFDS
    name = _without_query(path) if files.is_remote(path) else path
    return next((format for format, ending in ENDINGS.items() if re.search(ending + r"\Z", name)), None)


def _without_query(url: str) -> str:
    """Signed URLs go on behind the name of the file."""
    return url.partition("?")[0]


def _known_format(path: str) -> str:
    format = _format(path)
    if format is None:
        raise ShardError(
            f"{path}: the name says no format. Shards end in .tar, .array_record or .tfrecord, the latter two perhaps "
            "with a number like -00000-of-00010 behind. They must not be compressed: unpack .gz."
        )
    return format


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
