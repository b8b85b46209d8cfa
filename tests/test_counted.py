"""Counts in messages."""

from flair_jax.data.counted import counted


def test_counts_have_the_number_of_their_noun():
    assert [counted(n, "file") for n in (0, 1, 2, 12_000)] == ["0 files", "1 file", "2 files", "12,000 files"]
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
