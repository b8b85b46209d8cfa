"""ArrayRecord files, and data sets of TensorFlow Datasets that were prepared as ArrayRecord."""

import collections
import concurrent.futures
import functools
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flair_jax.data.sources import files, index, tf_example
from flair_jax.data.sources.base import Record, RecordError, ShardError

TFDS_PREFIX = "tfds:"
ENDS = 1 << 16  # bytes at both ends of an ArrayRecord file that its checksum is made of
TFDS_ADVICE = (
    "Only data sets of TensorFlow Datasets that were prepared as ArrayRecord are read in any order. Prepare it so "
    "(`tfds build NAME --file_format=array_record`), convert it (`tfds convert_format --dataset_version_dir=FOLDER "
    "--out_dir=OTHER --out_file_format=array_record`), or name its TFRecord files as shards "
    "(FOLDER/NAME-train.tfrecord*)."
)
READERS = 256  # ArrayRecord files that a process keeps open; systems often allow 1024 in all


class Part(NamedTuple):
    """Consecutive records of an ArrayRecord file."""

    path: str
    state: files.State
    start: int
    count: int
    checksum: int  # of the file's size and both ends, where it keeps its index


class ArrayRecord:
    """Records of ArrayRecord files; see `base.Source`.

    The files contain an index. The array_record package opens local paths and gs://.
    """

    def __init__(self, parts: Sequence[Part], skipped: collections.Counter):
        """
        Raises:
          ShardError: there is no record at all.
        """
        self._parts = list(parts)
        self.shards = list(dict.fromkeys(part.path for part in parts))
        self.skipped = skipped
        self._ends = np.cumsum([part.count for part in parts])  # (parts,)
        if not len(self):
            raise ShardError(f"no record in {len(parts)} shard(s); left out: {index.describe(skipped, {})}")
        self.checksum = zlib.crc32(repr([part[2:] for part in parts]).encode())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        part, number = self._locate(index)
        shard, key = self.where(index)
        try:
            files.check(part.path, part.state)
        except OSError as error:
            raise ShardError(f"{shard}: {error}: put the file back, or start again.") from error
        try:
            (content,) = _reader(part).read([number])
        except RuntimeError as error:  # the library's only exception
            raise RecordError(f"the record is damaged: {error}") from error
        return tf_example.parse(content, shard, key)

    def where(self, index: int) -> tuple[str, str]:
        part, number = self._locate(index)
        return part.path, tf_example.numbered_key(part.path, number)

    def _locate(self, index: int) -> tuple[Part, int]:
        """(part, number of the record in its file)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, part.start + index - (int(self._ends[number]) - part.count)


@functools.lru_cache(maxsize=READERS)
def _reader(part: Part):
    """The reader of a file, shared by all threads of a process: opening one takes as long as 20 reads.

    A reader that was evicted is closed when the last thread has finished with it. grain's and array_record's own data
    sources keep every file open, which fails for data sets of more files than a process may open.
    """
    return _open_reader(part.path)


def _open_reader(path: str):
    """
    Raises:
      ShardError: it is no complete ArrayRecord file.
    """
    from array_record.python import array_record_module  # of the users of this format alone

    # Without read-ahead and threads: the records that follow are not the ones that a shuffle asks for next.
    reader = array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15
    )
    if reader.ok():
        return reader
    try:
        reader.close()  # says what is wrong
    except RuntimeError as error:
        raise ShardError(
            f"{path} is not a complete ArrayRecord file ({error}). The index is at its end, so nothing can be read "
            "of a file that was cut or whose writer was not closed: fetch or write it again, or leave it out."
        ) from error
    raise ShardError(f"{path} cannot be opened as an ArrayRecord file")


def open_files(paths: Sequence[str]) -> ArrayRecord:
    """All records of some ArrayRecord files.

    Raises:
      FileNotFoundError: a file does not exist.
      ShardError: a file is incomplete or in a store that array_record cannot read, or there is no record at all.
    """
    return _open_parts([(path, 0, None) for path in paths])


def _open_parts(ranges: Sequence[tuple[str, int, int | None]]) -> ArrayRecord:
    """`ranges`: (path, first record, how many or None for all)."""
    with concurrent.futures.ThreadPoolExecutor(files.THREADS) as pool:
        parts = list(pool.map(_open_part, ranges))
    empty = sum(part.state.size == 0 for part in parts)
    return ArrayRecord(
        [part for part in parts if part.state.size], collections.Counter({"empty file": empty} if empty else {})
    )


def _open_part(wanted: tuple[str, int, int | None]) -> Part:
    path, start, count = wanted
    if files.is_remote(path) and not path.startswith("gs://"):
        raise ShardError(
            f"{path}: the array_record package opens local paths and gs:// only. Mount the store, copy the files, or "
            "use tars or TFRecord, which are read from any store."
        )
    try:
        state = files.state(path)
        if state.size == 0:
            return Part(path, state, 0, 0, 0)
        size = min(ENDS, state.size)
        ends = b"".join(files.read(path, [(0, size), (state.size - size, size)], state))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error}") from error
    total = _open_reader(path).num_records()
    if start + (count or 0) > total:
        raise ShardError(f"{path} has {total} records, expected {start + count}: it is not the file that was prepared")
    return Part(path, state, start, total - start if count is None else count, zlib.crc32(ends, state.size))


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow Datasets


def open_tfds(name: str) -> ArrayRecord:
    """A split of a data set of TensorFlow Datasets that was prepared as ArrayRecord.

    tfds says which records of which files make up the split. They are then read as `tfds.data_source` reads them, but
    without tfds, which worker processes need not load, and with the images as they were encoded.

    Args:
      name: `tfds:NAME[/CONFIG][:VERSION]?split=train[&data_dir=/x]`, or the folder of a data set instead of its name.
        Splits may be sliced and added as tfds allows: `train[:90%]`, `train+validation`.

    Raises:
      ShardError: there is no such data set or split on this machine, or it was prepared in another format.
      ImportError: tensorflow-datasets is not installed.
    """
    builder, options = _tfds_builder(name, file_format="array_record")
    splits = builder.info.splits
    if not splits:
        raise ShardError(f"{name}: nothing in {builder.data_dir}. {TFDS_ADVICE}")
    if "split" not in options:
        raise ShardError(f"{name}: which split? Add ?split= with one of {', '.join(splits)}")
    try:
        instructions = splits[options["split"]].file_instructions
    except (ValueError, KeyError) as error:
        raise ShardError(f"{name}: {error}") from error
    return _open_parts([(os.fspath(part.filename), part.skip, part.take) for part in instructions])


def tfrecord_files(name: str) -> list[str]:
    """The TFRecord files of whole splits, the format in which TensorFlow Datasets prepares by default.

    Args:
      name: see `open_tfds`.

    Returns:
      Paths; empty where the data set is not there, has another format, or the split is a part of the files' records.
    """
    try:
        builder, options = _tfds_builder(name)
        parts = builder.info.splits[options["split"]].file_instructions
    except (ShardError, ValueError, KeyError):
        return []
    whole = all(part.skip == 0 and part.take in (-1, part.examples_in_shard) for part in parts)
    if not whole or builder.info.file_format.value != "tfrecord":
        return []
    return [os.fspath(part.filename) for part in parts]


def _tfds_builder(name: str, **form: str) -> tuple[Any, dict[str, str]]:
    """The builder of a data set, in a `file_format` if one is given, and the options of its name. Raises ShardError."""
    import tensorflow_datasets as tfds  # of the users of this format alone

    text, options = _tfds_options(name)
    try:
        if os.path.isdir(text):
            return tfds.builder_from_directory(text, **form), options
        return tfds.builder(text, data_dir=options.get("data_dir"), **form), options
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise ShardError(f"{name}: {str(error).splitlines()[0]} {TFDS_ADVICE}") from error


def _tfds_options(name: str) -> tuple[str, dict[str, str]]:
    """`tfds:a/b:1.0.0?split=train&data_dir=/x` -> a/b:1.0.0, {split: train, data_dir: /x}."""
    text, _, query = name.removeprefix(TFDS_PREFIX).partition("?")
    # Not as URLs have it: there `+` would be a space and `%]` a mistake.
    options = dict(re.findall(r"([^=&]+)=([^&]*)", query))
    unknown = options.keys() - {"split", "data_dir"}
    if not text or unknown:
        wrong = ", ".join(sorted(unknown)) or "no name"
        raise ShardError(f"{name}: expected tfds:NAME?split=…&data_dir=…, not {wrong}")
    if "data_dir" in options:
        options["data_dir"] = os.path.expanduser(options["data_dir"])
    return os.path.expanduser(text), options
