"""Short captions side by side in rows of one length, so that the text tower computes few places of padding.

The shape of a packed batch is fixed: the number of rows is measured once on the data (`measure_rows`), so that nearly
all batches fit. In the others the longest captions are cut until all fit: no caption is lost.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

SHORTEST = 2  # start and end of text: what a caption keeps however much is cut
MEASURED_BATCHES = 256  # drawn from the measured samples


class Packed(NamedTuple):
    """A batch of captions in rows, and how many of them had to be cut."""

    texts: dict[str, np.ndarray]
    shortened: int


def pack(tokens: np.ndarray, *, row_length: int, rows: int) -> Packed:
    """Lays captions side by side, by first-fit decreasing: the longest first, each into the first row with room.

    What is longer than a row is cut to it. If the captions do not fit even so, the longest of the batch are cut to one
    common length, the largest found with which all fit. A cut caption keeps its first tokens and its end-of-text id, as
    CLIP cuts texts. The same captions are always laid in the same way.

    Args:
      tokens: int32 (N, T), one caption a row, padded behind its end-of-text id, the first largest id of the row.
      row_length: L, of the packed rows.
      rows: R, of the packed batch.

    Returns:
      texts: int32 arrays.
        tokens (R, L): 0 where there is no caption.
        segments (R, L): 1, 2, … for the captions of a row, 0 where there is none.
        positions (R, L): place of each token within its caption, 0 where there is none.
        ends (N,): `row * L + place` of each caption's end-of-text id, in the order of the captions.
      shortened: captions that were cut.

    Raises:
      ValueError: the captions would not fit if they were all cut to `SHORTEST` tokens.
    """
    whole = lengths(tokens)  # (N,)
    sizes, row, start, segment = _fit(whole, row_length, rows)  # (N,) each
    first = row * row_length + start  # (N,) where each caption begins among the flattened places
    ends = first + sizes - 1  # (N,)
    # One entry for each token that is kept: it is read at `source` and written at `place`.
    position = _count_up(sizes)  # (M,) within its caption
    source = np.repeat(np.arange(len(tokens)) * tokens.shape[1], sizes) + position  # (M,)
    place = np.repeat(first, sizes) + position  # (M,)
    texts = {name: np.zeros(rows * row_length, np.int32) for name in ("tokens", "segments", "positions")}
    texts["tokens"][place] = tokens.reshape(-1)[source]
    texts["tokens"][ends] = tokens.max(axis=1)  # for those that were cut; the others end so already
    texts["segments"][place] = np.repeat(segment, sizes)
    texts["positions"][place] = position
    texts = {name: values.reshape(rows, row_length) for name, values in texts.items()}  # (R, L)
    return Packed({**texts, "ends": ends.astype(np.int32)}, int((sizes < whole).sum()))


def lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens of each caption up to its end-of-text id, which counts: (N, T) -> int64 (N,)."""
    return tokens.argmax(axis=1) + 1


def text_lengths(texts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tokens of each caption of a batch, with both ends, from the fields of a packed or a padded batch's texts: (N,).

    `ends` may count the tokens of the processes before this one, too.
    """
    rows, row_length = texts["tokens"].shape
    if "positions" in texts:
        return texts["positions"].reshape(-1)[texts["ends"] % (rows * row_length)] + 1
    return texts["ends"] % row_length + 1


def rows_for(batches: Iterable[np.ndarray], *, row_length: int, multiple_of: int = 1, quantile: float = 0.95) -> int:
    """Rows in which a share of the batches fits uncut, rounded up.

    Args:
      batches: the lengths of each one's captions, (N,).
      row_length: L, of the rows.
      multiple_of: what has to divide the rows, such as the number of devices.
      quantile: the share; 1.0 asks for the rows of the fullest batch.

    Raises:
      ValueError: there are no batches.
    """
    needed = [_rows_needed(np.minimum(sizes, row_length), row_length) for sizes in batches]
    if not needed:
        raise ValueError("the rows of packed captions are measured on batches, and there are none")
    rows = int(np.quantile(needed, quantile, method="higher"))
    return -(-rows // multiple_of) * multiple_of


def measure_rows(
    samples: Iterable[np.ndarray], *, batch_size: int, row_length: int, multiple_of: int = 1, quantile: float = 0.95
) -> int:
    """`rows_for` batches drawn at random from some samples of the data, of which a few thousand do.

    The draws are always the same: whoever measures the same samples, be it another process or a later run, gets the
    same number.

    Args:
      samples: the tokens of one image's captions each, (K, T).
      batch_size: images whose captions are packed together.
      row_length, multiple_of, quantile: see `rows_for`.

    Raises:
      ValueError: there are no samples.
    """
    sizes = np.array([lengths(tokens) for tokens in samples])  # (S, K)
    rng = np.random.default_rng(0)
    batches = (rng.choice(sizes, batch_size).reshape(-1) for _ in range(MEASURED_BATCHES if len(sizes) else 0))
    return rows_for(batches, row_length=row_length, multiple_of=multiple_of, quantile=quantile)


def _rows_needed(sizes: np.ndarray, row_length: int) -> int:
    # First-fit leaves at most one row less than half full.
    rows, _, _ = _place(sizes, row_length, 2 * int(sizes.sum()) // row_length + 1)
    return int(rows.max()) + 1


def _fit(whole: np.ndarray, row_length: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of the captions after the cut, and their places, see `_place`."""
    sizes = np.minimum(whole, row_length)
    places = _place(sizes, row_length, rows)
    if places is None:
        fits, fails = SHORTEST - 1, int(sizes.max())
        while fails - fits > 1:  # bisection for the largest common length with which all fit
            middle = (fits + fails) // 2
            found = _place(np.minimum(whole, middle), row_length, rows)
            if found is None:
                fails = middle
            else:
                fits, places = middle, found
        sizes = np.minimum(whole, fits)
    if places is None:
        raise ValueError(
            f"{len(whole)} captions do not fit into {rows} rows of {row_length} tokens even if all are cut to "
            f"{SHORTEST} tokens: give more rows, or longer ones"
        )
    return sizes, *places


def _place(sizes: np.ndarray, row_length: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """First-fit decreasing of captions into empty rows.

    Captions of one length are placed at once, since first-fit fills one row after the other with them.

    Returns:
      Row, first place in the row, and number among the captions of the row from 1 on, (N,) each; None where the
      captions do not fit.
    """
    values, counts = np.unique(sizes, return_counts=True)
    values, counts = values[::-1].astype(np.int32), counts[::-1]  # (V,) longest first
    taken = np.empty((len(values), rows), np.int32)  # captions of each length in each row
    room = np.full(rows, row_length, np.int32)  # tokens
    total = np.zeros(rows + 1, np.int32)  # captions of one length that the rows before each one take
    for value, count, took in zip(values, counts, taken, strict=True):
        np.cumsum(room // value, out=total[1:])
        if total[-1] < count:
            return None
        np.minimum(total, count, out=total)
        np.subtract(total[1:], total[:-1], out=took)
        room -= took * value
    kind, row = np.nonzero(taken)  # (F,) runs of captions of one length in one row, in the order of placing
    run = taken[kind, row]
    start = np.cumsum(taken * values[:, None], axis=0)[kind, row] - run * values[kind]
    number = np.cumsum(taken, axis=0)[kind, row] - run
    within = _count_up(run)  # (N,)
    order = np.argsort(-sizes, kind="stable")  # (N,)
    placed = np.empty((3, len(sizes)), np.int64)
    placed[0, order] = np.repeat(row, run)
    placed[1, order] = np.repeat(start, run) + within * sizes[order]
    placed[2, order] = np.repeat(number, run) + within + 1
    return tuple(placed)


def _count_up(counts: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 1, 2, 0, 1]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
