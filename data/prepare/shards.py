"""Output shards: webdataset tars, or ArrayRecord of tf.train.Example with the features key, image and json.

The bytes of a shard follow from its samples alone: no dates, no owners.
"""

import io
import pathlib
import tarfile
from collections.abc import Iterable
from typing import NamedTuple

from data.prepare import files

SUFFIXES = {"tar": ".tar", "array_record": ".array_record"}


class Sample(NamedTuple):
    key: str
    extension: str  # of the image, without the dot
    image: bytes
    json: bytes


def write(path: pathlib.Path, format: str, samples: Iterable[Sample]) -> None:
    """Writes a shard, which appears when it is complete.

    Raises:
      PrepareError: the file cannot be written.
    """
    with files.replacing(path) as temporary:
        (_write_tar if format == "tar" else _write_array_record)(temporary, samples)


def _write_tar(path: pathlib.Path, samples: Iterable[Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, content in ((sample.extension, sample.image), ("json", sample.json)):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_array_record(path: pathlib.Path, samples: Iterable[Sample]) -> None:
    from array_record.python import array_record_module  # of the users of this format alone

    # A group of one record: any record is one short read, as training's shuffle needs it.
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        for sample in samples:
            writer.write(_example(sample))
        writer.close()
    except RuntimeError as error:  # how the library reports a full disk
        raise OSError(str(error)) from error


def _example(sample: Sample) -> bytes:
    """A serialised tf.train.Example, whose layout is simple enough to do without TensorFlow."""
    features = {"image": sample.image, "json": sample.json, "key": sample.key.encode()}
    entries = []
    for name, value in features.items():
        feature = _field(1, _field(1, value))  # Feature.bytes_list, BytesList.value
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))  # Features.feature: name, feature
    return _field(1, b"".join(entries))  # Example.features


def _field(number: int, content: bytes) -> bytes:
    """A field of protocol buffers' wire format that holds bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
