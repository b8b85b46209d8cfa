"""TFRecord files, read in place: the offsets of the records are indexed once, for random access."""

import collections
import os
from collections.abc import Sequence

import numpy as np

from flair_jax.data.sources import files, index, tf_example
from flair_jax.data.sources.base import Record, ShardError


class TFRecord(index.IndexedShards):
    """All records of some uncompressed TFRecord files; see `base.Source`.

    The format has no index; a scan over the lengths of the records makes one, which is kept like that of a tar.
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
                f"no record in {len(self.shards)} shard(s), the first is {self.shards[0]}; left out: {self._left_out()}"
            )

    def __getitem__(self, index: int) -> Record:
        (content,) = self._parts(index)
        return tf_example.parse(content, *self.where(index))

    def _key(self, index: int) -> str:
        number = self._number(index)
        return tf_example.numbered_key(self.shards[number], index - int(self._table.starts[number]))


def scan(path: str) -> index.Index:
    """Reads the lengths of the records in a TFRecord file. A file that was cut keeps its complete records.

    Raises:
      ShardError: the file is not TFRecord, or compressed.
      OSError: it cannot be read.
    """
    # A record is: length (8 bytes), checksum of the length (4), the bytes, their checksum (4).
    skipped, spans, offset = collections.Counter(), [], 0
    with files.stream(path) as (file, state):
        while offset < state.size:
            file.seek(offset)
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
            if len(header) < 12 or offset + 16 + length > state.size:
                skipped["shard cut short"] += 1
                break
            spans.append((offset + 12, length))
            offset += 16 + length
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
    """The checksum of TFRecord, in pure Python: for a few bytes only."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
