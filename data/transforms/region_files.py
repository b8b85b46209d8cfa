"""Regions in a file beside each shard, `SHARD.regions`: what `data.prepare annotate regions` detects."""

import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import REGIONS_ENDING
from flair_jax.data.transforms import side_files
from flair_jax.data.transforms.base import Sample
from flair_jax.data.transforms.regions import FIELD, Region, parse

OPENED = 256  # files that a process keeps open
COMMAND = "python -m flair_jax.data.prepare annotate regions"
KIND = side_files.Kind("regions", REGIONS_ENDING, 1, "samples", "data.regions.source needs", COMMAND)
BESIDE = "beside"  # value of `data.regions.source`


def write(target: pathlib.Path, found: Iterable[tuple[str, Sequence[Region]]], about: Mapping[str, Any]) -> int:
    """Writes the regions of a shard's samples; of equal keys the first counts.

    Args:
      target: a file that the caller gives its name when all is done.
      found: key of a sample, its regions.
      about: what `side_files.read_about` returns, fit for JSON.

    Returns:
      The number of samples.
    """
    rows: dict[str, list] = {}
    for key, regions in found:
        rows.setdefault(key, [[region.fields() for region in regions]])
    side_files.write(target, rows, about, KIND)
    return len(rows)


class RegionFiles(NamedTuple):
    """The regions of some shards, opened by `open_regions`; cheap to pickle."""

    folder: str | None
    stamp: str  # of the files as they were when they were opened

    def __call__(self, sample: Sample) -> list[Region]:
        """
        Raises:
          ShardError: the sample has no row.
          RegionError: see `regions.parse`.
        """
        file = side_files.path(sample.record.shard, self.folder, KIND)
        row = _opened(file, self.stamp).row(sample.record.key)
        if row is None:
            raise ShardError(f"{file} has no row for the sample {sample.record.key!r}: it is stale; again: {COMMAND}")
        return parse({FIELD: row[0]})


def open_regions(shards: Sequence[str], folder: str | None) -> RegionFiles:
    """The regions of all shards, after a look at each file.

    Args:
      shards: all shards of a source.
      folder: of the files; None: beside the shards.

    Raises:
      ShardError: a file is missing, or belongs to another state of its shard.
    """
    return RegionFiles(folder, side_files.check(shards, folder, KIND))


@functools.lru_cache(maxsize=OPENED)
def _opened(file: str, stamp: str) -> side_files.SideFile:
    return side_files.SideFile(file)
