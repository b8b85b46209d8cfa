"""Output shards: webdataset tars, or ArrayRecord of tf.train.Example with the features key, image and json.

The bytes of a shard follow from its samples alone: no dates, no owners.
"""

import io
import pathlib
import tarfile
from collections.abc import Iterable
from typing import NamedTuple

from flair_jax.data.prepare import atomic
from flair_jax.data.sources.tf_example import Example

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
    with atomic.replacing(path) as temporary:
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
    example = Example()
    for name, value in (("key", sample.key.encode()), ("image", sample.image), ("json", sample.json)):
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)
