"""Packed captions: every one comes back, each row holds no more than it can, and what is cut is cut as little."""

import jax
import numpy as np
import pytest

from flair_jax.data.transforms import packing, tokenizer
from flair_jax.models.text import Text

END = tokenizer.EOT


def captions(sizes, length: int = 77, seed: int = 0, end: int = END) -> np.ndarray:
    """Padded rows of random ids, of the given sizes with both marks."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes)
    tokens = rng.integers(1, end - 1, (len(sizes), length), np.int32)
    tokens[:, 0] = end - 1
    tokens[np.arange(len(sizes)), sizes - 1] = end
    return np.where(np.arange(length) < sizes[:, None], tokens, 0)


def unpack(texts) -> list[list[int]]:
    """Every caption, read from its end backwards as far as its segment reaches."""
    tokens, segments, positions = (texts[name] for name in ("tokens", "segments", "positions"))
    rows = []
    for end in texts["ends"]:
        row, last = divmod(int(end), tokens.shape[1])
        columns = np.flatnonzero(segments[row] == segments[row, last])
        assert columns[-1] == last and (np.diff(columns) == 1).all()
        assert (positions[row, columns] == np.arange(len(columns))).all()
        rows.append(tokens[row, columns].tolist())
    return rows


def check(tokens: np.ndarray, packed: packing.Packed, row_length: int, rows: int) -> np.ndarray:
    """All that must hold of any packed batch. Returns the captions' sizes in it."""
    texts = packed.texts
    assert {name: (array.shape, array.dtype) for name, array in texts.items()} == {
        **dict.fromkeys(("tokens", "segments", "positions"), ((rows, row_length), np.dtype("int32"))),
        "ends": ((len(tokens),), np.dtype("int32")),
    }
    whole = [row[: row.index(END) + 1] for row in tokens.tolist()]
    found = unpack(texts)
    sizes = np.array([len(caption) for caption in found])
    for full, caption in zip(whole, found, strict=True):
        assert caption == [*full[: len(caption) - 1], END]
    assert packed.shortened == (sizes < [len(full) for full in whole]).sum()
    used = texts["segments"] > 0
    assert used.sum() == sizes.sum()  # no two captions share a place, and there is nothing beside them
    assert not any(texts[name][~used].any() for name in ("tokens", "positions"))
    for segments in texts["segments"]:  # numbered from 1 on, side by side from the left
        numbers = segments[segments > 0]
        assert (segments[: len(numbers)] > 0).all() and set(np.diff(numbers, prepend=0)) <= {0, 1}
    return sizes


def first_fit_decreasing(sizes, row_length: int) -> list[list[int]]:
    """The textbook's loop: the captions of each row."""
    rows, room = [], []
    for caption in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, free in enumerate(room) if free >= sizes[caption]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(caption)
        room[row] -= sizes[caption]
    return rows


def random_batch(rng) -> tuple[np.ndarray, int]:
    """Captions and a row length, of one of several kinds."""
    length, count = int(rng.integers(2, 40)), int(rng.integers(1, 40))
    row_length = int(rng.integers(2, 60))
    kinds = [
        rng.integers(2, length + 1, count),
        np.full(count, length),
        np.full(count, 2),
        np.minimum(row_length // 2 + 1, length) * np.ones(count, int),  # two never fit
        np.where(rng.random(count) < 0.1, length, 2),  # a few long ones
        np.clip(row_length // rng.integers(1, 5, count) + rng.integers(-1, 2, count), 2, length),  # nearly full rows
    ]
    sizes = kinds[rng.integers(len(kinds))]
    return captions(np.maximum(sizes, 2), length, seed=int(rng.integers(1 << 30))), row_length


def test_every_caption_comes_back():
    rng = np.random.default_rng(0)
    for _ in range(1500):
        tokens, row_length = random_batch(rng)
        sizes = np.minimum(packing.lengths(tokens), row_length)
        expected = first_fit_decreasing(sizes.tolist(), row_length)
        assert packing.rows_for([packing.lengths(tokens)], row_length=row_length) == len(expected)

        rows = len(expected) + int(rng.integers(3))  # enough
        packed = packing.pack(tokens, row_length=row_length, rows=rows)
        assert (check(tokens, packed, row_length, rows) == sizes).all()
        found = packed.texts["ends"] // row_length
        assert [np.flatnonzero(found == row).tolist() for row in range(len(expected))] == [
            sorted(row) for row in expected
        ]


def test_captions_that_do_not_fit_are_cut_and_counted():
    rng = np.random.default_rng(1)
    refused = cut = 0
    for _ in range(1500):
        tokens, row_length = random_batch(rng)
        whole = packing.lengths(tokens)
        enough = packing.rows_for([whole], row_length=row_length)
        rows = int(rng.integers(1, enough + 1))
        if len(tokens) > rows * (row_length // 2):  # not even two tokens each
            refused += 1
            with pytest.raises(ValueError, match=f"{len(tokens)} captions do not fit into {rows} rows of {row_length}"):
                packing.pack(tokens, row_length=row_length, rows=rows)
            continue
        packed = packing.pack(tokens, row_length=row_length, rows=rows)
        sizes = check(tokens, packed, row_length, rows)
        if rows < enough:
            cut += 1
            longest = sizes[sizes < whole].max()
            assert packed.shortened and (sizes == np.minimum(whole, longest)).all()  # only the longest lose tokens
            assert len(first_fit_decreasing(np.minimum(whole, longest + 1).tolist(), row_length)) > rows  # and few
    assert refused > 100 and cut > 100


def test_a_batch_worked_out_by_hand():
    tokens = np.array([[7, 1, 9, 0, 0], [7, 2, 3, 4, 9], [7, 9, 0, 0, 0], [7, 5, 9, 0, 0]], np.int32)  # 9 ends
    texts, shortened = packing.pack(tokens, row_length=8, rows=2)
    assert texts["tokens"].tolist() == [[7, 2, 3, 4, 9, 7, 1, 9], [7, 5, 9, 7, 9, 0, 0, 0]]
    assert texts["segments"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0, 0]]
    assert texts["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 0, 0, 0]]
    assert texts["ends"].tolist() == [7, 4, 12, 10]
    assert shortened == 0
    texts, shortened = packing.pack(tokens, row_length=6, rows=2)
    assert texts["tokens"].tolist() == [[7, 2, 3, 9, 7, 9], [7, 1, 9, 7, 5, 9]]
    assert shortened == 1


def test_rows_from_a_quantile():
    batches = [np.full(rows, 8) for rows in range(1, 101)]  # one caption fills a row
    assert packing.rows_for(batches, row_length=8, quantile=1.0) == 100
    assert packing.rows_for(batches, row_length=8, quantile=0.5) == 51
    assert packing.rows_for(batches, row_length=8, quantile=0.5, multiple_of=16) == 64
    assert packing.rows_for(batches, row_length=4, quantile=1.0) == 100  # captions are cut to the row
    assert packing.rows_for(batches, row_length=17, quantile=1.0) == 50
    with pytest.raises(ValueError, match="there are none"):
        packing.rows_for([], row_length=8)


def test_measured_rows_are_nine_tenths_full():
    """On lengths like those of photographs' captions: one to three sentences of about a dozen tokens each."""
    rng = np.random.default_rng(2)

    def sample():
        sizes = [2 + np.clip(rng.normal(12, 4, rng.integers(1, 4)), 3, 25).astype(int).sum() for _ in range(8)]
        return captions(sizes, seed=int(rng.integers(1 << 30)))

    samples = [sample() for _ in range(512)]
    rows = packing.measure_rows(samples, batch_size=32, row_length=80, multiple_of=2)
    assert rows % 2 == 0
    assert rows == packing.measure_rows(iter(samples), batch_size=32, row_length=80, multiple_of=2)
    fill, shortened = [], 0
    for _ in range(40):
        packed = packing.pack(np.concatenate([sample() for _ in range(32)]), row_length=80, rows=rows)
        fill.append((packed.texts["segments"] > 0).mean())
        shortened += packed.shortened
    assert np.mean(fill) > 0.9
    assert shortened < 0.01 * 40 * 256
    with pytest.raises(ValueError, match="there are none"):
        packing.measure_rows([], batch_size=32, row_length=80)


def test_the_text_tower_takes_what_is_packed(tiny_model, tiny_params):
    tokens = captions([77, 5, 30, 12, 2, 44, 9], end=511)  # of the tiny vocabulary
    packed = packing.pack(tokens, row_length=96, rows=3)
    assert packed.shortened == 0
    encode = jax.jit(lambda text: tiny_model.apply({"params": tiny_params}, text, method="encode_text").pooled)
    np.testing.assert_allclose(encode(Text(**packed.texts)), encode(Text.padded(tokens)), atol=2e-5)
