"""Image-caption records in tf.train.Example: ArrayRecord and TFRecord files, and data sets of TensorFlow Datasets.

Features of an Example:
  the image: the first of `IMAGE_FEATURES`, encoded (JPEG, PNG, WebP).
  json: an object with the caption fields, as text. Where there is none, one is made of the other features: a text, a
    number, or a list where a feature has not exactly one value. Bytes that are no text are left out.
  key: names the record in messages. Where there is none, file and number do.

TensorFlow is not needed, and not loaded: the messages are parsed by protobuf alone.
"""

import collections
import concurrent.futures
import json
import os
import re
import threading
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from data import files, index
from data.records import TFDS_PREFIX, Record, RecordError, ShardError

IMAGE_FEATURES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp")
ENDS = 1 << 16  # bytes at both ends of an ArrayRecord file that its checksum is made of
TFDS_ADVICE = (
    "Only data sets of TensorFlow Datasets that were prepared as ArrayRecord are read in any order. Prepare it so "
    "(`tfds build NAME --file_format=array_record`), convert it (`tfds convert_format --dataset_version_dir=FOLDER "
    "--out_dir=OTHER --out_file_format=array_record`), or name its TFRecord files as shards "
    "(FOLDER/NAME-train.tfrecord*)."
)
READERS = 256  # ArrayRecord files that a process keeps open; systems often allow 1024 in all


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def _example_class() -> type[message.Message]:
    """The message class of tf.train.Example, from the published numbers of its fields.

    It lives in a pool of its own, so that it does not clash with TensorFlow's where that is loaded too.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="data/example.proto", package="data", syntax="proto3")

    def add(name: str, *fields: tuple[str, int, Any], repeated: bool = False) -> descriptor_pb2.DescriptorProto:
        declared = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields, start=1):
            added = declared.field.add(name=field_name, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added.type = field.TYPE_MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                added.type_name = f".data.{kind}"
        return declared

    add("BytesList", ("value", field.TYPE_BYTES), repeated=True)
    add("FloatList", ("value", field.TYPE_FLOAT), repeated=True)
    add("Int64List", ("value", field.TYPE_INT64), repeated=True)
    feature = add("Feature", ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    feature.oneof_decl.add(name="kind")
    for alternative in feature.field:
        alternative.oneof_index = 0
    features = add("Features", ("feature", "Features.FeatureEntry"), repeated=True)
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".data.Feature", label=field.LABEL_OPTIONAL
    )
    add("Example", ("features", "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("data.Example"))


Example = _example_class()


def parse(content: bytes, shard: str, key: str) -> Record:
    """The record that a serialised Example holds; `key` is for those that have none of their own.

    Raises:
      RecordError: the bytes are no Example, or one without an image, or with features of other types.
    """
    try:
        features = Example.FromString(content).features.feature
    except message.DecodeError as error:
        raise RecordError(f"the record is not a tf.train.Example: {error}") from error
    name = next((name for name in IMAGE_FEATURES if name in features), None)
    if name is None:
        found = ", ".join(sorted(features)[:20]) or "none"
        raise RecordError(f"the Example has no image ({'|'.join(IMAGE_FEATURES)}); its features: {found}")
    image = _single_bytes(features, name)
    if "key" in features and features["key"].WhichOneof("kind") == "bytes_list":
        key = _single_bytes(features, "key").decode("utf-8", "replace")
    if "json" in features:
        return Record(key, shard, image, _single_bytes(features, "json"))
    values = {name: _value(feature) for name, feature in sorted(features.items()) if name not in IMAGE_FEATURES}
    fields = {name: value for name, value in values.items() if value is not None}
    return Record(key, shard, image, json.dumps(fields).encode())


def _single_bytes(features, name: str) -> bytes:
    values = features[name].bytes_list.value
    if len(values) != 1:
        kind = features[name].WhichOneof("kind") or "nothing"
        raise RecordError(f"feature {name!r} of the Example: expected one string of bytes, not {len(values)} in {kind}")
    return values[0]


def _value(feature) -> Any:
    """What a feature is in a JSON object; None for bytes that are no text."""
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind == "bytes_list":
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError:
            return None
    return values[0] if len(values) == 1 else values


# ---------------------------------------------------------------------------------------------------------------------
# TFRecord


class TFRecord(index.IndexedShards):
    """All records of some uncompressed TFRecord files; see `data.records.Source`.

    The format has no index; one scan over the lengths of the records makes it, which is kept like a tar's.
    """

    def __init__(self, shards: Sequence[str], index_dir: str | os.PathLike | None = None):
        """
        Raises:
          FileNotFoundError: a shard does not exist.
          ShardError: a file is no uncompressed TFRecord file, or there is no record at all.
        """
        super().__init__(shards, scan, index_dir)
        if not len(self):
            raise ShardError(
                f"no record in {len(self.shards)} shard(s), the first is {self.shards[0]}; left out: "
                f"{dict(self.skipped) or 'nothing'}"
            )

    def __getitem__(self, index: int) -> Record:
        (content,) = self._parts(index)
        return parse(content, *self.where(index))

    def _key(self, index: int) -> str:
        number = self._number(index)
        return _numbered(self.shards[number], index - int(self._table.starts[number]))


def scan(path: str) -> index.Index:
    """Reads the lengths of the records in a TFRecord file. A file that was cut keeps its complete records.

    Raises:
      ShardError: the file is not TFRecord, or compressed.
      OSError: it cannot be read.
    """
    # A record is: length (8 bytes), checksum of the length (4), the bytes, their checksum (4).
    skipped, spans, place = collections.Counter(), [], 0
    with files.stream(path) as (file, state):
        while place < state.size:
            file.seek(place)
            header = file.read(12)
            length = int.from_bytes(header[:8], "little")
            if len(header) == 12 and _masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
                if not spans:
                    gzip = header.startswith(b"\x1f\x8b")
                    raise ShardError(
                        f"{path} is {'gzip' if gzip else 'not a TFRecord file'}. Shards are uncompressed TFRecord "
                        "files, because only those can be read in any order: unpack it (gzip -d), or write it again."
                    )
                skipped["damaged length, rest of the shard not read"] += 1
                break
            if len(header) < 12 or place + 16 + length > state.size:
                skipped["shard cut short"] += 1
                break
            spans.append((place + 12, length))
            place += 16 + length
    if state.size == 0:
        skipped["empty file"] += 1
    return index.Index(
        state=state,
        spans=np.array(spans, np.int64).reshape(-1, 2),  # (N, 2)
        keys=np.zeros(0, np.uint8),
        key_lengths=np.zeros(len(spans), np.int64),
        skipped=skipped,
    )


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc32c_table()


def _masked_crc32c(content: bytes) -> int:
    """The checksum of TFRecord. For a few bytes only: it is Python."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------------------
# ArrayRecord


class Part(NamedTuple):
    """Some neighbouring records of an ArrayRecord file."""

    path: str
    state: files.State
    start: int
    count: int
    checksum: int  # of the file's size and both ends, where it keeps its index


class ArrayRecord:
    """Records of ArrayRecord files; see `data.records.Source`.

    The files have an index of their own. What the array_record package opens: local paths and gs://.
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
            raise ShardError(f"no record in {len(parts)} shard(s); left out: {dict(skipped) or 'nothing'}")
        self.checksum = zlib.crc32(repr([part[2:] for part in parts]).encode())
        self._readers = _Readers()

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
            (content,) = self._readers.open(part).read([number])
        except RuntimeError as error:  # the library's only exception
            raise RecordError(f"the record is damaged: {error}") from error
        return parse(content, shard, key)

    def where(self, index: int) -> tuple[str, str]:
        part, number = self._locate(index)
        return part.path, _numbered(part.path, number)

    def _locate(self, index: int) -> tuple[Part, int]:
        """(part, number of the record in its file)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[place]
        return part, part.start + index - (int(self._ends[place]) - part.count)


def _numbered(path: str, number: int) -> str:
    return f"{os.path.basename(path)}:{number}"


class _Readers:
    """The readers that were used last, for all threads of a process. To open one takes as long as 20 reads."""

    def __init__(self):
        self._readers = collections.OrderedDict()
        self._lock = threading.Lock()

    def open(self, part: Part):
        with self._lock:
            if part in self._readers:
                self._readers.move_to_end(part)
                return self._readers[part]
        reader = _open_reader(part.path)
        with self._lock:
            self._readers[part] = reader
            if len(self._readers) > READERS:
                self._readers.popitem(last=False)  # it is closed when the last thread lets go of it
        return reader

    def __reduce__(self):
        return _Readers, ()  # each process opens its own


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
            f"{path} is not a complete ArrayRecord file ({error}). The index lies at its end, so nothing can be read "
            "of a file that was cut or whose writer was not closed: fetch or write it again, or leave it out."
        ) from error
    raise ShardError(f"{path} cannot be opened as an ArrayRecord file")


def open_array_records(paths: Sequence[str]) -> ArrayRecord:
    """All records of some ArrayRecord files.

    Raises:
      FileNotFoundError: a file does not exist.
      ShardError: a file is not complete, or lies where array_record cannot read; or there is no record at all.
    """
    return _open_parts([(path, 0, None) for path in paths])


def _open_parts(ranges: Sequence[tuple[str, int, int | None]]) -> ArrayRecord:
    """`ranges`: (path, first record, how many or None for all)."""
    with concurrent.futures.ThreadPoolExecutor(index.THREADS) as pool:
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
    import tensorflow_datasets as tfds  # of the users of this format alone

    text, options = _tfds_options(name)
    try:
        if os.path.isdir(text):
            builder = tfds.builder_from_directory(text, file_format="array_record")
        else:
            builder = tfds.builder(text, data_dir=options.get("data_dir"), file_format="array_record")
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise ShardError(f"{name}: {str(error).splitlines()[0]} {TFDS_ADVICE}") from error
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
