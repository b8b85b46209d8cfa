"""Image-caption records, and the interface of the sources that they come from, whatever the format of the shards."""

import bisect
import collections
import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import Protocol


class ShardError(RuntimeError):
    """A shard that cannot be used, or that changed since it was opened."""


class RecordError(ValueError):
    """A record that holds no image-caption pair. The other records of its shard may be good."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample as its shard stores it."""

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
      checksum: of the keys and sizes of the records; equal on every machine that has the same data.
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


def join(sources: Sequence[Source]) -> Source:
    """The concatenation of some sources, in their order."""
    return sources[0] if len(sources) == 1 else Concatenation(sources)


class Concatenation:
    """The concatenation of some sources; see `Source`."""

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
