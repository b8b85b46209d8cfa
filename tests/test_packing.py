"""Packed captions: every one comes back whole, each row holds no more than it can, and cutting has to be asked for."""

import itertools

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
    assert packed.truncated == (sizes < [len(full) for full in whole]).sum()
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
        packed = packing.Packer(row_length, (rows,), truncate=True)(tokens)
        assert (check(tokens, packed, row_length, rows) == sizes).all()
        found = packed.texts["ends"] // row_length
        assert [np.flatnonzero(found == row).tolist() for row in range(len(expected))] == [
            sorted(row) for row in expected
        ]


def test_captions_are_cut_and_counted_where_that_is_asked_for():
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
                packing.Packer(row_length, (rows,), truncate=True)(tokens)
            continue
        packed = packing.Packer(row_length, (rows,), truncate=True)(tokens)
        sizes = check(tokens, packed, row_length, rows)
        if rows < enough:
            cut += 1
            longest = sizes[sizes < whole].max()
            assert packed.truncated and (sizes == np.minimum(whole, longest)).all()  # only the longest lose tokens
            assert len(first_fit_decreasing(np.minimum(whole, longest + 1).tolist(), row_length)) > rows  # and few
    assert refused > 100 and cut > 100


def test_a_batch_worked_out_by_hand():
    tokens = np.array([[7, 1, 9, 0, 0], [7, 2, 3, 4, 9], [7, 9, 0, 0, 0], [7, 5, 9, 0, 0]], np.int32)  # 9 ends
    texts, truncated = packing.Packer(8, (2,))(tokens)
    assert texts["tokens"].tolist() == [[7, 2, 3, 4, 9, 7, 1, 9], [7, 5, 9, 7, 9, 0, 0, 0]]
    assert texts["segments"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0, 0]]
    assert texts["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 0, 0, 0]]
    assert texts["ends"].tolist() == [7, 4, 12, 10]
    assert truncated == 0
    texts, truncated = packing.Packer(6, (2,), truncate=True)(tokens)
    assert texts["tokens"].tolist() == [[7, 2, 3, 9, 7, 9], [7, 1, 9, 7, 5, 9]]
    assert truncated == 1
    texts, truncated = packing.Packer(6, (2, 4))(tokens)  # by default nothing is cut: a longer batch gets more rows
    assert texts["tokens"].shape == (4, 6) and truncated == 0
    assert texts["tokens"].tolist()[:3] == [[7, 2, 3, 4, 9, 0], [7, 1, 9, 7, 5, 9], [7, 9, 0, 0, 0, 0]]
    assert texts["ends"].tolist() == [8, 4, 13, 11]


def test_a_batch_that_does_not_fit_is_refused():
    tokens = captions([10, 10, 10], length=10)
    with pytest.raises(ValueError, match="3 captions need 3 rows of 12; at most 2 are allowed"):
        packing.Packer(12, (1, 2))(tokens)
    with pytest.raises(ValueError, match="a caption of 10 tokens does not fit into a row of 8"):
        packing.Packer(8, (4,))(tokens)


def test_the_last_number_of_rows_is_enough_for_any_batch():
    rng = np.random.default_rng(3)
    for _ in range(500):
        length, count = int(rng.integers(2, 40)), int(rng.integers(1, 60))
        row_length, multiple_of = length + int(rng.integers(0, 60)), int(rng.integers(1, 4))
        sizes = rng.choice([rng.integers(2, length + 1, count), np.full(count, length)])
        options = dict(row_length=row_length, longest=length, multiple_of=multiple_of)
        counts = packing.row_counts(int(rng.integers(1, count + 1)), count, **options)
        assert packing.place(sizes, row_length).rows <= counts[-1]
        assert all(number % multiple_of == 0 for number in counts)
        assert (np.diff(counts) > 0).all()
        assert all(b <= max(packing.GROWTH * a, a + 1) + multiple_of for a, b in itertools.pairwise(counts))
    assert packing.row_counts(100, 384, row_length=80, longest=77) == (100, 125, 157, 197, 247, 309, 384)
    assert packing.row_counts(4, 8, row_length=80, longest=40, multiple_of=2) == (4,)


@pytest.mark.parametrize("row_captions", [1, 2, 8])
def test_rows_of_few_captions(row_captions):
    rng = np.random.default_rng(4)
    for _ in range(300):
        tokens, row_length = random_batch(rng)
        sizes = np.minimum(packing.lengths(tokens), row_length)
        placement = packing.place(sizes, row_length, row_captions=row_captions)
        texts = packing.lay_out(tokens, sizes, placement, row_length=row_length, rows=placement.rows)
        check(tokens, packing.Packed(texts, int((sizes < packing.lengths(tokens)).sum())), row_length, placement.rows)
        per_row = np.bincount(placement.row)
        assert per_row.min() > 0 and per_row.max() <= row_captions
        roomy = np.flatnonzero(per_row < row_captions)  # which first-fit left for want of tokens
        used = np.bincount(placement.row, sizes)[roomy]
        assert (used <= row_length // 2).sum() <= 1


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_captions_stay_with_their_device(devices):
    rng = np.random.default_rng(5)
    tokens = captions(rng.integers(2, 41, 64), length=40)
    counts = packing.row_counts(1, 64 // devices, row_length=50, longest=40)
    texts, truncated = packing.Packer(50, counts, devices)(tokens)
    rows = len(texts["tokens"])
    check(tokens, packing.Packed(texts, truncated), 50, rows)
    assert truncated == 0 and rows // devices in counts
    assert unpack(texts) == [row[: row.index(END) + 1] for row in tokens.tolist()]
    assert (texts["ends"] // 50 // (rows // devices) == np.arange(64) // (64 // devices)).all()


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
    packer = packing.Packer(80, packing.row_counts(rows, 256, row_length=80, longest=77, multiple_of=2))
    packed = [packer(np.concatenate([sample() for _ in range(32)])) for _ in range(40)]
    assert np.mean([(texts["segments"] > 0).mean() for texts, _ in packed]) > 0.9
    assert not any(truncated for _, truncated in packed)
    counts = [len(texts["tokens"]) for texts, _ in packed]
    assert set(counts) <= set(packer.row_counts[:2]) and counts.count(rows) >= 35
    with pytest.raises(ValueError, match="there are none"):
        packing.measure_rows([], batch_size=32, row_length=80)


def test_the_text_tower_takes_what_is_packed(tiny_model, tiny_params):
    tokens = captions([77, 5, 30, 12, 2, 44, 9], end=511)  # of the tiny vocabulary
    packed = packing.Packer(96, (3,))(tokens)
    assert packed.truncated == 0
    encode = jax.jit(lambda text: tiny_model.apply({"params": tiny_params}, text, method="encode_text").pooled)
    np.testing.assert_allclose(encode(Text(**packed.texts)), encode(Text.padded(tokens)), atol=2e-5)
