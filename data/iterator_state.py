"""The state of a stream of batches, and how another number of processes resumes from it.

The endless order of samples is cut into groups of R = batch_size / P indices; process p of P reads the groups p, p + P,
p + 2 P, … Samples that cannot be used make processes advance unevenly, so that when all stop together, some groups
before the furthest one are not read yet. Another number of processes reads those indices first, then all later ones:
nothing is repeated or lost.

grain's `ElasticIterator` also resumes on another number of hosts, but its state is one index for all of them, so each
host has to take the same number of samples, and it refuses filters: a sample that cannot be used would end the run.

A position, fit for JSON:
  start: index at which group 0 begins.
  leftover: [[first, stop], …] indices of the order that are read first, in place of those from `start` on; after them
    each index stands for itself.
  group, offset: the next group of this process, counted among its own, and the next index in it.
  skipped, epoch, epoch_skipped: counts of what could not be used.
  stream: what has to be the same for the position to have a meaning.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Position = Mapping[str, Any]
Interval = Sequence[int]  # [first, stop): the first index, and the one after the last


class PositionError(ValueError):
    """A saved position that belongs to another stream."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Index in the order that is read -> index in the endless order."""

    start: int
    leftover: tuple[tuple[int, int], ...]

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Index after each interval; the first entry is `start`."""
        return list(itertools.accumulate((stop - first for first, stop in self.leftover), initial=self.start))

    @property
    def front(self) -> int:
        """From here on each index stands for itself."""
        return self._ends[-1]

    def __call__(self, index: int) -> int:
        if index >= self.front:
            return index
        number = bisect.bisect_right(self._ends, index)
        return self.leftover[number - 1][1] - (self._ends[number] - index)


def first(stream: Mapping[str, Any]) -> Position:
    """Of a process that has read nothing yet."""
    return {
        "start": 0,
        "leftover": [],
        "group": 0,
        "offset": 0,
        "skipped": {},
        "epoch": 0,
        "epoch_skipped": 0,
        "stream": dict(stream),
    }


def redistribute(positions: Sequence[Position], process_count: int) -> list[Position]:
    """The positions of all processes of a run, for as many processes as are to go on.

    Args:
      positions: of each process, in their order, all after the same number of batches.
      process_count: of the processes that go on.

    Returns:
      One for each of them; the given ones where their number stays.

    Raises:
      PositionError: the batch cannot be split evenly over the processes.
    """
    if len(positions) == process_count:
        return list(positions)
    batch_size = positions[0]["stream"]["batch_size"]
    if batch_size % process_count:
        raise PositionError(f"{process_count} processes cannot share batches of {batch_size} evenly")
    layout = Layout(positions[0]["start"], tuple(map(tuple, positions[0]["leftover"])))
    rows = batch_size // len(positions)
    # Where the next group of each process begins; its others follow at distances of a batch.
    begins = [position["start"] + position["group"] * batch_size + n * rows for n, position in enumerate(positions)]
    offsets = [position["offset"] for position in positions]
    touched = [begin + rows - (0 if offset else batch_size) for begin, offset in zip(begins, offsets, strict=True)]
    front = max(layout.front, *touched)
    unread = sorted(
        (group + (offset if group == begin else 0), min(group + rows, front))
        for begin, offset in zip(begins, offsets, strict=True)
        for group in range(begin, front, batch_size)
    )
    leftover = _intervals(layout(index) for begin, stop in unread for index in range(begin, stop))
    common = first(positions[0]["stream"]) | {
        "start": front - sum(stop - begin for begin, stop in unread),
        "leftover": leftover,
        "epoch": max(position["epoch"] for position in positions),
    }
    latest = [position["epoch_skipped"] for position in positions if position["epoch"] == common["epoch"]]
    common["epoch_skipped"] = sum(latest) // process_count
    skipped = sum((collections.Counter(position["skipped"]) for position in positions), collections.Counter())
    return [
        common
        | {
            "skipped": {} if number else dict(skipped),  # which the first process reports
            "stream": common["stream"] | {"process_index": number, "process_count": process_count},
        }
        for number in range(process_count)
    ]


def _intervals(indices: Iterator[int]) -> list[list[int]]:
    """Runs of consecutive indices, as [first, stop)."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    return runs
