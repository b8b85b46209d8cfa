"""Another number of processes goes on where some stopped: nothing is repeated or lost."""

import collections
import json

import numpy as np
import pytest
from test_loader import digest, numbers, stream, write_shards

from flair_jax.data import iterator_state

BATCH = 12


def read(shards, start, count, batches) -> tuple[list, list]:
    """`batches` of each of `count` processes: what they read, batch by batch, and their positions."""
    start = [None] * count if start is None else iterator_state.redistribute(json.loads(json.dumps(start)), count)
    parts, ends = [], []
    for index in range(count):
        options = dict(batch_size=BATCH, process_index=index, process_count=count)
        with stream(shards, position=start[index], **options) as own:
            parts.append([next(own) for _ in range(batches)])
            ends.append(own.position)
    return [list(step) for step in zip(*parts, strict=True)], ends


def test_global_batches_stay_the_same(tmp_path):
    """Where every sample can be used."""
    shards = write_shards(tmp_path / "shards", (7, 1, 5, 6))
    expected, _ = read(shards, None, 1, 12)
    found, ends = [], None
    for count, batches in ((2, 3), (4, 2), (1, 1), (3, 4), (6, 2)):
        steps, ends = read(shards, ends, count, batches)
        found += [[number for part in step for number in numbers(part)] for step in steps]
    assert found == [numbers(step[0]) for step in expected]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_repeated_or_lost(tmp_path, seed):
    """Where a third cannot be used, so that processes are far apart when they stop."""
    rng = np.random.default_rng(seed)
    bad = {int(number): {"json": b"{}"} for number in rng.choice(150, 50, replace=False)}
    shards = write_shards(tmp_path / "shards", (40, 1, 70, 39), bad)
    found, ends = [], None
    for count, batches in ((4, 5), (2, 1), (3, 3), (6, 1), (2, 4), (1, 7)):
        steps, ends = read(shards, ends, count, batches)
        found += [number for step in steps for part in step for number in numbers(part)]
    with stream(shards, batch_size=BATCH) as whole:
        expected = [number for _ in range(len(found) // BATCH) for number in numbers(next(whole))]
        # The last reader was alone, so all that was read is a beginning of the order, skips included.
        assert collections.Counter(found) == collections.Counter(expected)
        assert ends[0]["skipped"] == whole.position["skipped"] and ends[0]["epoch"] == whole.position["epoch"]


def test_positions_of_as_many_processes_stay(tmp_path):
    shards = write_shards(tmp_path / "shards", (19,), {3: {"json": b"{}"}})
    _, ends = read(shards, None, 3, 2)
    assert iterator_state.redistribute(ends, 3) == ends
    with stream(shards, batch_size=BATCH, position=iterator_state.redistribute(ends, 1)[0]) as one:
        first = digest(next(one))
    with stream(shards, batch_size=BATCH, position=iterator_state.redistribute(ends, 1)[0], workers=1) as one:
        assert digest(next(one)) == first  # also by workers


def test_a_batch_that_cannot_be_shared(tmp_path):
    shards = write_shards(tmp_path / "shards", (19,))
    _, ends = read(shards, None, 2, 1)
    with pytest.raises(iterator_state.PositionError, match="5 processes cannot share batches of 12"):
        iterator_state.redistribute(ends, 5)
