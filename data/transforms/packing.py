"""Sequence packing: captions side by side in rows of one length, so that the text tower computes little padding.

The packer is first-fit decreasing bin packing (Johnson 1973). Under `jax.jit` every number of rows is a program of its
own, so a batch gets one of a few numbers, `row_counts`: the first is measured on the data (`measure_rows`) and enough
for nearly all batches, the last is enough for any batch. So no caption is ever cut, unless `truncate` is asked for.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SHORTEST = 2  # start and end of text: what a caption keeps however much is cut
MEASURED_BATCHES = 256  # drawn from the measured samples
GROWTH = 1.25  # from one number of rows to the next; a few programs to compile, and little padding in each


class Placement(NamedTuple):
    """Where each of N captions stands, integers (N,) each."""

    row: np.ndarray
    start: np.ndarray  # column of its first token
    segment: np.ndarray  # its number among the captions of the row, from 1 on

    @property
    def rows(self) -> int:
        """Rows that hold a caption; they are the first ones."""
        return int(self.row.max(initial=-1)) + 1


def lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens of each caption up to and including its end of text, the first largest id: (N, T) -> int64 (N,)."""
    return tokens.argmax(axis=1) + 1


def padded(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Captions as they are, one a row.

    Args:
      tokens: int32 (N, T), padded after the end of text.

    Returns:
      tokens, and ends: int32 (N,), index of each end-of-text token into the flattened tokens.
    """
    rows, row_length = tokens.shape
    return {"tokens": tokens, "ends": (np.arange(rows) * row_length + lengths(tokens) - 1).astype(np.int32)}


def text_lengths(texts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tokens of each caption of a batch, with both ends, from the fields of a packed or a padded batch's texts: (N,).

    `ends` may count the tokens of the preceding processes, too.
    """
    rows, row_length = texts["tokens"].shape
    if "positions" in texts:
        return texts["positions"].reshape(-1)[texts["ends"] % (rows * row_length)] + 1
    return texts["ends"] % row_length + 1


def place(
    sizes: np.ndarray, row_length: int, rows: int | None = None, row_captions: int | None = None
) -> Placement | None:
    """First-fit decreasing: the longest caption first, each into the first row with room. Always the same result.

    Args:
      sizes: tokens of each caption, integers (N,), at most `row_length`.
      row_length: L, tokens of a row.
      rows: how many there are; None: as many as it takes.
      row_captions: captions that may share a row; None: any number.

    Returns:
      None if the captions do not fit into `rows`.

    Raises:
      ValueError: a caption is longer than a row, and `rows` is None.
    """
    if rows is None:
        if sizes.max(initial=0) > row_length:
            raise ValueError(f"a caption of {sizes.max()} tokens does not fit into a row of {row_length}")
        # Of the rows that first-fit closes for want of tokens at most one is less than half full.
        rows = 2 * int(sizes.sum()) // row_length + 1 + (len(sizes) // row_captions if row_captions else 0)
    # Captions of one length are placed together: first-fit fills one row after the other with them.
    values, counts = np.unique(sizes, return_counts=True)
    values, counts = values[::-1].astype(np.int32), counts[::-1]  # (V,) longest first
    taken = np.empty((len(values), rows), np.int32)  # captions of each length in each row
    room = np.full(rows, row_length, np.int32)  # tokens
    free = None if row_captions is None else np.full(rows, row_captions, np.int32)  # captions
    total = np.zeros(rows + 1, np.int32)  # captions of one length that all rows before each one take
    for value, count, took in zip(values, counts, taken, strict=True):
        fitting = room // value
        np.cumsum(fitting if free is None else np.minimum(fitting, free), out=total[1:])
        if total[-1] < count:
            return None
        np.minimum(total, count, out=total)
        np.subtract(total[1:], total[:-1], out=took)
        room -= took * value
        if free is not None:
            free -= took
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
    return Placement(*placed)


def lay_out(
    tokens: np.ndarray, sizes: np.ndarray, placement: Placement, *, row_length: int, rows: int
) -> dict[str, np.ndarray]:
    """Writes captions into rows.

    Args:
      tokens: int32 (N, T), one caption a row, padded after its end-of-text id, the first largest id of the row.
      sizes: tokens to keep of each caption, (N,). One that is cut keeps its first tokens and its end of text.
      placement: from `place` of these sizes.
      row_length: L, of the packed rows.
      rows: R, at least `placement.rows`.

    Returns:
      int32 arrays:
        tokens (R, L): 0 where there is no caption.
        segments (R, L): 1, 2, … for the captions of a row, 0 where there is none.
        positions (R, L): position of each token within its caption, 0 where there is none.
        ends (N,): `row * L + column` of each caption's end-of-text id, in the order of the captions.
    """
    first = placement.row * row_length + placement.start  # (N,) index of each caption's first token
    ends = first + sizes - 1  # (N,)
    # One entry for each token that is kept: it is read at `source` and written at `target`.
    position = _count_up(sizes)  # (M,) within its caption
    source = np.repeat(np.arange(len(tokens)) * tokens.shape[1], sizes) + position  # (M,)
    target = np.repeat(first, sizes) + position  # (M,)
    texts = {name: np.zeros(rows * row_length, np.int32) for name in ("tokens", "segments", "positions")}
    texts["tokens"][target] = tokens.reshape(-1)[source]
    texts["tokens"][ends] = tokens.max(axis=1)  # for those that were cut; the others end so already
    texts["segments"][target] = np.repeat(placement.segment, sizes)
    texts["positions"][target] = position
    texts = {name: values.reshape(rows, row_length) for name, values in texts.items()}  # (R, L)
    return {**texts, "ends": ends.astype(np.int32)}


def truncate(whole: np.ndarray, row_length: int, rows: int) -> tuple[np.ndarray, Placement]:
    """Cuts the longest captions to one common length, the largest found with which all fit into `rows`.

    Args:
      whole: tokens of each caption, (N,).
      row_length, rows: of the packed batch.

    Returns:
      The tokens to keep of each caption, (N,), and where they stand.

    Raises:
      ValueError: the captions would not fit if they were all cut to `SHORTEST` tokens.
    """
    sizes = np.minimum(whole, row_length)
    placement = place(sizes, row_length, rows)
    if placement is not None:
        return sizes, placement
    fits, fails = SHORTEST - 1, int(sizes.max())
    while fails - fits > 1:  # bisection
        middle = (fits + fails) // 2
        found = place(np.minimum(whole, middle), row_length, rows)
        if found is None:
            fails = middle
        else:
            fits, placement = middle, found
    if placement is None:
        raise ValueError(
            f"{len(whole)} captions do not fit into {rows} rows of {row_length} tokens even if all are cut to "
            f"{SHORTEST} tokens: give more rows, or longer ones"
        )
    return np.minimum(whole, fits), placement


class Packed(NamedTuple):
    """A batch of captions in rows, and how many of them had to be cut."""

    texts: dict[str, np.ndarray]
    truncated: int


class Placed(NamedTuple):
    """The captions of a process's batch and where they stand, before they are written into rows.

    parts: of each device its tokens (n, T), the tokens to keep of each caption (n,), and their placement.
    rows: per device, that this process needs, one of `Packer.row_counts`.
    """

    parts: list[tuple[np.ndarray, np.ndarray, Placement]]
    rows: int


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs the captions of a batch, those of each device's images into rows of its own.

    Attributes:
      row_length: L, tokens of a row.
      row_counts: the numbers of rows that a device may get, ascending, see `row_counts`.
      devices: of this process, over which its captions are split in order.
      truncate: whether to cut the longest captions of a batch that do not fit into the first of `row_counts`, instead
        of taking more rows. What is cut depends on which captions share a device.
    """

    row_length: int
    row_counts: Sequence[int]
    devices: int = 1
    truncate: bool = False

    def place(self, tokens: np.ndarray) -> Placed:
        """Where the captions go.

        Args:
          tokens: int32 (N, T), see `lay_out`; N is a multiple of the devices.

        Raises:
          ValueError: they do not fit.
        """
        parts, rows = [], self.row_counts[0]
        for part in np.split(tokens, self.devices):
            sizes = lengths(part)  # (n,)
            if self.truncate:
                sizes, placement = truncate(sizes, self.row_length, rows)
            else:
                placement = place(sizes, self.row_length)
                rows = max(rows, placement.rows)
            parts.append((part, sizes, placement))
        if rows > self.row_counts[-1]:
            raise ValueError(
                f"{len(parts[0][0])} captions need {rows} rows of {self.row_length}; at most {self.row_counts[-1]} "
                "are allowed"
            )
        return Placed(parts, next(count for count in self.row_counts if count >= rows))

    def lay_out(self, placed: Placed, rows: int) -> Packed:
        """Writes the captions into rows.

        Args:
          placed: from `place`.
          rows: of each device, at least `placed.rows`; the same on all processes.

        Returns:
          The arrays of `lay_out`, those of all devices one after the other: R is `devices * rows`.
        """
        written = [lay_out(*part, row_length=self.row_length, rows=rows) for part in placed.parts]
        for device, texts in enumerate(written):
            texts["ends"] += np.int32(device * rows * self.row_length)
        truncated = sum(int((sizes < lengths(tokens)).sum()) for tokens, sizes, _ in placed.parts)
        return Packed({name: np.concatenate([texts[name] for texts in written]) for name in written[0]}, truncated)

    def __call__(self, tokens: np.ndarray) -> Packed:
        """`place` and `lay_out` for a single process."""
        placed = self.place(tokens)
        return self.lay_out(placed, placed.rows)


def row_counts(measured: int, captions: int, *, row_length: int, longest: int, multiple_of: int = 1) -> tuple[int, ...]:
    """The numbers of rows that a batch may have: the measured one, then more by `GROWTH`, up to enough for any batch.

    Args:
      measured: rows that are enough for nearly all batches.
      captions: N, in a batch.
      row_length: L, of the rows.
      longest: tokens of the longest caption there can be, at most L.
      multiple_of: what has to divide each number.
    """
    # N captions of at most `longest` tokens always fit: a row without room for one more holds ⌊L / longest⌋ already.
    enough = _round_up(-(-captions // (row_length // longest)), multiple_of)
    counts = [_round_up(measured, multiple_of)]
    while counts[-1] < enough:
        counts.append(min(enough, _round_up(int(np.ceil(counts[-1] * GROWTH)), multiple_of)))
    return tuple(counts)


def rows_for(batches: Iterable[np.ndarray], *, row_length: int, multiple_of: int = 1, quantile: float = 0.95) -> int:
    """Rows that are enough for a share of the batches, rounded up.

    Args:
      batches: the lengths of each one's captions, (N,); longer ones count as `row_length`.
      row_length: L, of the rows.
      multiple_of: what has to divide the rows, such as the number of micro-batches.
      quantile: the share; 1.0 asks for the rows of the fullest batch.

    Raises:
      ValueError: there are no batches.
    """
    needed = [place(np.minimum(sizes, row_length), row_length).rows for sizes in batches]
    if not needed:
        raise ValueError("the rows of packed captions are measured on batches, and there are none")
    return _round_up(int(np.quantile(needed, quantile, method="higher")), multiple_of)


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


def _round_up(value: int, multiple_of: int) -> int:
    return -(-value // multiple_of) * multiple_of


def _count_up(counts: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 1, 2, 0, 1]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
