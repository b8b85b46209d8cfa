"""Batches to measure with: from shards, as training reads them, or made up, of captions as long as real ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flair_jax.data.transforms import packing
from flair_jax.data.transforms.base import BOXES, BOXES_VALID, CAPTIONS, DESCRIPTION_IDS, DESCRIPTIONS

# Merged sub-captions of DreamLIP's kind: a gamma of this mean, in tokens with both ends (spec/anchors.md 2.1).
MEAN_TOKENS, SHAPE = 27.0, 4.0
DESCRIPTION_TOKENS = 9.0  # of a region, such as "a large red circle in the grass"


def made_up(
    images: int,
    image_size: tuple[int, int],
    slots: Mapping[str, int],
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
      slots: of an image's texts, name -> number, see `plan.slots_of`.
      text: `context_length` and `vocab_size` of the model.
      row_length: tokens in a row of packed captions; None: a row for each caption.
      parts: devices, each with rows of its own.
      batches: how many.

    Returns:
      Each has `images` uint8 (N, H, W, 3) and `texts`, int32 arrays by name; where there are other slots than captions
      `valid`, all of them; and where there are descriptions boxes of them.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    if images % parts:
        raise ValueError(f"batch_size {images} must be a multiple of the {parts} devices")
    rng = np.random.default_rng(0)
    sizes = text["context_length"], text["vocab_size"]
    pixels = [rng.integers(0, 256, (images, *image_size, 3), dtype=np.uint8) for _ in range(batches)]
    tokens = [_texts(rng, images, slots, *sizes) for _ in range(batches)]
    if row_length is None:
        texts = [packing.padded(padded) for padded in tokens]
    else:
        lengths = (packing.lengths(share) for padded in tokens for share in np.split(padded, parts))
        rows = packing.rows_for(lengths, row_length=row_length, quantile=1.0)
        pack = packing.Packer(row_length, (rows,), parts)
        texts = [pack(padded).texts for padded in tokens]
    more = {} if slots.keys() == {CAPTIONS} else {"valid": np.ones((images, sum(slots.values())), bool)}
    if regions := slots.get(DESCRIPTIONS):
        size = rng.uniform(0.1, 0.5, (images, regions, 2))
        centre = rng.uniform(size / 2, 1 - size / 2)
        more[BOXES] = np.concatenate([centre, size], axis=2).astype(np.float32)
        more[BOXES_VALID] = np.ones((images, regions), bool)
        more[DESCRIPTION_IDS] = np.arange(images * regions, dtype=np.int32).reshape(images, regions)
    return [{"images": image, "texts": text, **more} for image, text in zip(pixels, texts, strict=True)]


def _texts(rng: np.random.Generator, images: int, slots: Mapping[str, int], *sizes: int) -> np.ndarray:
    """Texts of all slots in image-major order, int32 (N * C, T)."""
    parts = [
        captions(rng, images * count, *sizes, mean=DESCRIPTION_TOKENS if name == DESCRIPTIONS else MEAN_TOKENS)
        for name, count in slots.items()
    ]
    return np.concatenate([part.reshape(images, -1, sizes[0]) for part in parts], axis=1).reshape(-1, sizes[0])


def captions(
    rng: np.random.Generator, count: int, context_length: int, vocab_size: int, mean: float = MEAN_TOKENS
) -> np.ndarray:
    """Captions of random words, int32 (N, T), of so many tokens on average; start and end are the two largest ids."""
    lengths = rng.gamma(SHAPE, mean / SHAPE, count).round().clip(4, context_length).astype(int)  # (N,)
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
