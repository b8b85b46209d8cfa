"""Opens shards of any format as one source.

    source = open_source("/data/cc3m/{0000..0575}.tar::gs://bucket/cc12m/*.array_record::tfds:my_set?split=train")
    source[7]  ->  Record(key, shard, image, json)

The formats: webdataset tars, and tf.train.Example in ArrayRecord or TFRecord files or in a data set of TensorFlow
Datasets. Tars, ArrayRecord and TFRecord are recognised by their file names.
"""

import collections
import glob
import itertools
import os
import re
from collections.abc import Sequence

import braceexpand

from flair_jax.data.sources import array_record, files, tfrecord, webdataset
from flair_jax.data.sources.base import ShardError, Source, join
from flair_jax.data.sources.index import INDEX_ENDING

TAR, ARRAY_RECORD, TFRECORD, TFDS = "webdataset", "ArrayRecord", "TFRecord", "TFDS"
# What file names end in. TensorFlow Datasets, Beam and others number shards after the extension.
ENDINGS = {
    TAR: r"\.tar",
    ARRAY_RECORD: r"\.array_?record(-\d+-of-\d+)?",
    TFRECORD: r"\.tfrecords?(-\d+-of-\d+)?",
}
ANNOTATIONS_ENDING = ".annotations"  # of files beside shards, see `data.transforms.annotations`
REGIONS_ENDING = ".regions"  # of others, see `data.transforms.region_files`
LIST_ENDING = ".txt"  # of a text file that lists shards
TFDS_MARK = "dataset_info.json"  # is in each folder of a data set of TensorFlow Datasets

Shards = str | os.PathLike | Sequence["Shards"]


def open_source(shards: Shards, index_dir: str | os.PathLike | None = None) -> Source:
    """The data set that some shards make up, in their order; they may be of several formats.

    Args:
      shards: see `expand`.
      index_dir: folder for index files; None: beside the shards, or in ~/.cache/flair_jax where that is not possible.

    Raises:
      FileNotFoundError: see `expand`.
      ShardError: a file is not of the format that its name says, or of none, or there is no record in a format.
    """
    openers = {
        TAR: lambda paths: webdataset.WebDataset(paths, index_dir),
        ARRAY_RECORD: array_record.open_files,
        TFRECORD: lambda paths: tfrecord.TFRecord(paths, index_dir),
        TFDS: lambda names: join([array_record.open_tfds(name) for name in names]),
    }
    return join([openers[format](list(paths)) for format, paths in itertools.groupby(expand(shards), _known_format)])


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def expand(shards: Shards) -> list[str]:
    """Paths of the shards that a pattern, or a list of patterns, names.

    A pattern may be one of these, or several of them joined by `::`, as the reference writes merged sets:
      a path in which braces are expanded as in bash (`cc3m-{0000..0575}.tar`, `{a/{0..2},b/{0..2}}.tar`), and then
        wildcards (`*`, `?`, `[…]`);
      a folder: all its shards, sorted;
      a text file, `LIST.txt`: one pattern a line; empty lines and lines that begin with `#` are left out. Relative
        paths are relative to the folder of the list;
      the name of a data set of TensorFlow Datasets (`tfds:…`), which stays as it is.
    A leading `~` is the user's home folder. Paths may lie in stores (gs://, s3://, …); whether shards that are spelled
    out exist there is left to the functions that open them. A shard that is named twice is read twice.

    Raises:
      FileNotFoundError: a pattern matches nothing, its braces are not balanced, or a file that it spells out does not
        exist.
      ShardError: a folder that holds shards of several formats, or several splits of a data set; a list that names
        nothing or another list, or is not UTF-8.
      TypeError: something else than text, paths and lists of them.
    """
    return [path for pattern in sets(shards) for path in _expand_pattern(pattern)]


def sets(shards: Shards) -> list[str]:
    """The separate patterns of a list or of a text with `::`.

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
    if pattern.startswith(array_record.TFDS_PREFIX):
        return [pattern]
    paths, missing = [], []
    for name in _expand_braces(pattern):
        found = _find(name)
        paths += found
        if not found:
            missing.append(name)
    if missing:
        what = "no such file" if files.folder(missing[0]) is None else "a folder without shards"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"shards {pattern!r}: {what}: {missing[0]!r}{others}")
    return [path for name in paths for path in (_listed(name) if _is_list(name) else [name])]


def _expand_braces(pattern: str) -> list[str]:
    whole = os.path.expanduser(pattern)
    if not files.is_remote(pattern) and os.path.exists(whole):  # a name may hold braces
        return [whole]
    try:
        return [os.path.expanduser(name) for name in braceexpand.braceexpand(pattern, escape=False)]
    except braceexpand.UnbalancedBracesError as error:
        raise FileNotFoundError(f"shards {pattern!r}: no such file, and its braces are not balanced") from error


def _is_list(path: str) -> bool:
    return (_without_query(path) if files.is_remote(path) else path).endswith(LIST_ENDING)


def _listed(path: str) -> list[str]:
    """The shards that a text file lists."""
    try:
        with files.stream(path) as (file, _):
            lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: a list of shards is UTF-8 text, one path or pattern a line: {error}") from error
    patterns = [os.path.expanduser(line) for line in lines if line and not line.startswith("#")]
    if not patterns:
        raise ShardError(f"{path} lists no shards: expected one path or pattern a line")
    if nested := next(filter(_is_list, patterns), None):
        raise ShardError(f"{path} lists another list, {nested}: list the shards themselves")
    folder = os.path.dirname(path)
    absolute = [
        line if files.is_remote(line) or line.startswith(array_record.TFDS_PREFIX) else os.path.join(folder, line)
        for line in patterns
    ]
    return [path for pattern in sets(absolute) for path in _expand_pattern(pattern)]


def _find(name: str) -> list[str]:
    """The shards that a name without braces refers to."""
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
            f"{name} is a data set of TensorFlow Datasets, which has several splits in one folder. Name the split: "
            f"{array_record.TFDS_PREFIX}{name}?split=train"
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
    beside = (INDEX_ENDING, ANNOTATIONS_ENDING, REGIONS_ENDING)  # which `x.tar*` matches too
    return [path for path in files.find(name) if not path.endswith(beside)]


def _format(path: str) -> str | None:
    """The format that the ending of a name says, or None."""
    if path.startswith(array_record.TFDS_PREFIX):
        return TFDS
    name = _without_query(path) if files.is_remote(path) else path
    return next((format for format, ending in ENDINGS.items() if re.search(ending + r"\Z", name)), None)


def _without_query(url: str) -> str:
    """A signed URL continues after the name of the file."""
    return url.partition("?")[0]


def _known_format(path: str) -> str:
    format = _format(path)
    if format is None:
        raise ShardError(
            f"{path}: the name says no format. Shards end in .tar, .array_record or .tfrecord, the latter two perhaps "
            "followed by a number such as -00000-of-00010. They must not be compressed: unpack .gz."
        )
    return format
