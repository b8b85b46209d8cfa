"""Orders of samples: whole epochs, windows, mixtures."""

import collections

import numpy as np
import pytest

from flair_jax.data import order


def take(dataset, count, start=0):
    epochs, numbers = zip(*(dataset[place] for place in range(start, start + count)), strict=True)
    return list(epochs), list(numbers)


# Grain's permutation walks through 2**16 numbers to find a few: as in use, tables are for those of less than 60.
@pytest.mark.parametrize("small", [60, order.SMALL])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 50, 333, 400, 2000])
@pytest.mark.parametrize("count", [1, 2, 333, 400])
def test_every_epoch_holds_every_sample_once(monkeypatch, count, window, small):
    """By tables for small sets, by grain's permutation for large ones."""
    monkeypatch.setattr(order, "SMALL", small)
    dataset = order.endless([count], 3, window=window)
    seen = set()
    for epoch in range(3):
        epochs, numbers = take(dataset, count, epoch * count)
        assert set(epochs) == {epoch} and sorted(numbers) == list(range(count))
        seen.add(tuple(numbers))
    if count > 2 and (window is None or window > 1):
        assert len(seen | {tuple(range(count))}) == 4


def test_without_shuffling():
    assert take(order.endless([2, 3], 0, shuffle=False), 12)[1] == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_seeds_do_not_share_their_orders():
    orders = {tuple(take(order.endless([40], seed), 40, 40 * epoch)[1]) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("small", [0, order.SMALL])
def test_the_whole_epoch_is_mixed_well(monkeypatch, small):
    monkeypatch.setattr(order, "SMALL", small)
    count = 50_000
    numbers = np.array(take(order.endless([count], 0), count)[1])
    assert abs(np.corrcoef(np.arange(count), numbers)[0, 1]) < 3.5 * count**-0.5  # standard errors
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) < 3.5 * count**-0.5


def test_a_window_reads_few_places_and_mixes_them():
    count, window = 16_000, 1600
    numbers = np.array(take(order.endless([count], 0, window=window), count)[1]).reshape(-1, window)
    blocks = [set((part // (window // order.BLOCKS)).tolist()) for part in numbers]
    assert all(len(some) == order.BLOCKS for some in blocks)
    assert all(np.ptp(part) > count / 2 for part in numbers)  # from all over the set
    for part in numbers:
        assert abs(np.corrcoef(np.arange(window), part)[0, 1]) < 0.1
    again = np.array(take(order.endless([count], 0, window=window), count, count)[1]).reshape(-1, window)
    assert set((again[0] // (window // order.BLOCKS)).tolist()) != blocks[0]  # combined anew


def test_a_mixture_keeps_its_proportions_and_loses_nothing():
    sizes, weights = [50, 200, 10], [1.0, 2.0, 1.0]
    epochs, numbers = take(order.endless(sizes, 5, weights=weights), 4000)
    sets = np.searchsorted(np.cumsum(sizes), numbers, side="right")
    for start in range(0, 4000, 100):  # also in short runs
        assert np.abs(np.bincount(sets[start : start + 100], minlength=3) - [25, 50, 25]).max() <= 1
    for which, size in enumerate(sizes):  # each set has whole epochs of its own
        own = [(epoch, number) for epoch, number, owner in zip(epochs, numbers, sets, strict=True) if owner == which]
        for epoch in range(len(own) // size):
            assert {e for e, _ in own[epoch * size : (epoch + 1) * size]} == {epoch}
            assert len({number for _, number in own[epoch * size : (epoch + 1) * size]}) == size
    assert collections.Counter(zip(epochs, numbers, strict=True)).most_common(1)[0][1] == 1  # so no draw comes twice


def test_sets_of_equal_size_have_orders_of_their_own():
    numbers = take(order.endless([30, 30], 0, weights=[1, 1]), 60)[1]
    first, second = [n for n in numbers if n < 30], [n - 30 for n in numbers if n >= 30]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights=[1.0]), "each of 2 sets"),
        (dict(weights=[1.0, 0.0]), "positive"),
        (dict(weights=[1.0, float("nan")]), "positive"),
        (dict(window=0), "shuffle_window"),
        (dict(window=10, shuffle=False), "shuffle=True"),
        (dict(weights=[1, 1], shuffle=False), "shuffle=True"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        order.endless([3, 4], 0, **options)
