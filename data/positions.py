"""Where a stream of batches stands, and how another number of processes goes on from there.

The endless order of samples is cut into groups of R = batch_size / P places; process p of P reads the groups p, p + P,
p + 2 P, … Samples that cannot be used make processes advance unevenly, so that when all stop together, some groups
behind the front are not read yet. Another number of processes reads those places first, then all behind the front:
nothing is repeated or lost.

A position, fit for JSON:
  start: place at which group 0 begins.
  leftover: [[first, stop], …] places of the order that take the first places from `start` on; from where they end,
    place and order are the same.
  group, offset: the next group of this process, counted among its own, and the next place in it.
  skipped, epoch, epoch_skipped: counts of what could not be used.
  stream: what has to be the same for the position to have a meaning.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Position = Mapping[str, Any]
Interval = Sequence[int]  # first place, and the one behind the last


class PositionError(ValueError):
    """A saved position that belongs to another stream."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Place -> place of the endless order."""

    start: int
    leftover: tuple[tuple[int, int], ...]

    @property
    def front(self) -> int:
        """From here on places are those of the order."""
        return self.start + sum(stop - first for first, stop in self.leftover)

    def __call__(self, place: int) -> int:
        if place >= self.front:
            return place
        ends = list(itertools.accumulate(stop - first for first, stop in self.leftover))
        number = bisect.bisect_right(ends, place - self.start)
        return self.leftover[number][1] - (ends[number] - (place - self.start))


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
      positions: of each process, in their order, all behind the same number of batches.
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
    front = max(
        layout.front, *(_touched(position, number, positions, rows) for number, position in enumerate(positions))
    )
    unread = sorted(
        interval
        for number, position in enumerate(positions)
        for interval in _unread(position, number, positions, rows, front)
    )
    leftover = _intervals(layout(place) for begin, stop in unread for place in range(begin, stop))
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


def _group_start(position: Position, number: int, positions: Sequence[Position], rows: int, group: int) -> int:
    return position["start"] + (group * len(positions) + number) * rows


def _touched(position: Position, number: int, positions: Sequence[Position], rows: int) -> int:
    """The place behind the last group that a process has read from."""
    groups = position["group"] + (position["offset"] > 0)
    return _group_start(position, number, positions, rows, groups - 1) + rows if groups else position["start"]


def _unread(
    position: Position, number: int, positions: Sequence[Position], rows: int, front: int
) -> Iterator[tuple[int, int]]:
    """What a process has left out of the places before `front`."""
    group, offset = position["group"], position["offset"]
    while (begin := _group_start(position, number, positions, rows, group)) < front:
        if begin + offset < front:
            yield begin + offset, min(begin + rows, front)
        group, offset = group + 1, 0


def _intervals(places: Iterator[int]) -> list[list[int]]:
    """Runs of places that follow one another."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return runs
