"""Batches to measure with: from shards, as training reads them, or made up, of captions as long as real ones."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flair_jax.data.transforms import packing, tokenizer

# Merged sub-captions of DreamLIP's kind: a gamma of this mean, in tokens with both ends (spec/anchors.md 2.1).
MEAN_TOKENS, SHAPE = 27.0, 4.0
HELD = 4  # batches made up, which come again and again


def made_up(config: Mapping[str, Any], batch_size: int, devices: int, image_size, context_length: int) -> Iterator:
    """Endless batches as `loader.Stream` gives them, of noise."""
    if batch_size % devices:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the {devices} devices")
    rng = np.random.default_rng(0)
    count, row_length = config["captions"]["count"], config["packing"]["row_length"]
    held = []
    for _ in range(HELD):
        images = rng.integers(0, 256, (batch_size, *image_size, 3), dtype=np.uint8)
        held.append((images, captions(rng, batch_size * count, context_length)))
    if row_length is None:
        pack = None
    else:
        samples = captions(rng, 1024 * count, context_length).reshape(1024, count, -1)
        share = batch_size // devices
        rows = packing.measure_rows(
            samples, batch_size=share, row_length=row_length, quantile=config["packing"]["quantile"]
        )
        counts = packing.row_counts(rows, share * count, row_length=row_length, longest=context_length)
        pack = packing.Packer(row_length, counts, devices)
    batches = []
    for images, tokens in held:
        texts = packing.padded(tokens) if pack is None else pack(tokens).texts
        batches.append({"images": images, "texts": texts})
    return itertools.cycle(batches)


def captions(rng: np.random.Generator, count: int, context_length: int) -> np.ndarray:
    """Captions of random words, int32 (N, T), lengths as in `MEAN_TOKENS`."""
    lengths = rng.gamma(SHAPE, MEAN_TOKENS / SHAPE, count).round().clip(4, context_length).astype(int)  # (N,)
    tokens = rng.integers(1, tokenizer.SOT, (count, context_length), dtype=np.int32)  # (N, T)
    tokens[:, 0] = tokenizer.SOT
    column = np.arange(context_length)
    tokens[column >= lengths[:, None]] = 0
    tokens[np.arange(count), lengths - 1] = tokenizer.EOT
    return tokens


def unpacked(texts: Mapping[str, np.ndarray], context_length: int) -> np.ndarray:
    """The captions of a batch a row each, padded with zeros as the reference trains, int32 (N, T)."""
    lengths, flat = packing.text_lengths(texts), texts["tokens"].reshape(-1)
    tokens = np.zeros((len(lengths), context_length), np.int32)
    for row, end, length in zip(tokens, texts["ends"], lengths, strict=True):
        row[:length] = flat[end - length + 1 : end + 1]
    return tokens
