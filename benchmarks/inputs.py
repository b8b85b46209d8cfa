"""Batches to measure with: from shards, as training reads them, or made up, of captions as long as real ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flair_jax.data.transforms import packing

# Merged sub-captions of DreamLIP's kind: a gamma of this mean, in tokens with both ends (spec/anchors.md 2.1).
MEAN_TOKENS, SHAPE = 27.0, 4.0


def made_up(
    images: int,
    image_size: tuple[int, int],
    captions_per_image: int,
    text: Mapping[str, Any],
    row_length: int | None,
    *,
    parts: int = 1,
    batches: int = 4,
) -> list[dict[str, Any]]:
    """Batches of noise as `loader.Stream` gives them, all of one shape.

    Args:
      images: N, of a batch.
      image_size: height and width in pixels.
      captions_per_image: K.
      text: `context_length` and `vocab_size` of the model.
      row_length: tokens in a row of packed captions; None: a row for each caption.
      parts: devices, each with rows of its own.
      batches: how many.

    Returns:
      Each has `images` uint8 (N, H, W, 3) and `texts`, int32 arrays by name.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    if images % parts:
        raise ValueError(f"batch_size {images} must be a multiple of the {parts} devices")
    rng = np.random.default_rng(0)
    sizes = text["context_length"], text["vocab_size"]
    pixels = [rng.integers(0, 256, (images, *image_size, 3), dtype=np.uint8) for _ in range(batches)]
    tokens = [captions(rng, images * captions_per_image, *sizes) for _ in range(batches)]
    if row_length is None:
        texts = [packing.padded(padded) for padded in tokens]
    else:
        lengths = (packing.lengths(share) for padded in tokens for share in np.split(padded, parts))
        rows = packing.rows_for(lengths, row_length=row_length, quantile=1.0)
        pack = packing.Packer(row_length, (rows,), parts)
        texts = [pack(padded).texts for padded in tokens]
    return [{"images": image, "texts": text} for image, text in zip(pixels, texts, strict=True)]


def captions(rng: np.random.Generator, count: int, context_length: int, vocab_size: int) -> np.ndarray:
    """Captions of random words, int32 (N, T), lengths as in `MEAN_TOKENS`; start and end are the two largest ids."""
    lengths = rng.gamma(SHAPE, MEAN_TOKENS / SHAPE, count).round().clip(4, context_length).astype(int)  # (N,)
    tokens = rng.integers(1, vocab_size - 2, (count, context_length), dtype=np.int32)  # (N, T)
    tokens[:, 0] = vocab_size - 2
    column = np.arange(context_length)
    tokens[column >= lengths[:, None]] = 0
    tokens[np.arange(count), lengths - 1] = vocab_size - 1
    return tokens


def unpacked(texts: Mapping[str, np.ndarray], context_length: int) -> np.ndarray:
    """The captions of a batch a row each, padded with zeros as the reference trains, int32 (N, T)."""
    lengths, flat = packing.text_lengths(texts), texts["tokens"].reshape(-1)
    tokens = np.zeros((len(lengths), context_length), np.int32)
    for row, end, length in zip(tokens, texts["ends"], lengths, strict=True):
        row[:length] = flat[end - length + 1 : end + 1]
    return tokens
