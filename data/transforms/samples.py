"""One record -> the arrays of one sample, or the reason why it cannot be used."""

import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from flair_jax.data.sources.base import Record, RecordError, Source
from flair_jax.data.transforms import captions, fast_images, images, tokenizer

Pixels = Literal["reference", "fast", "device"]


class Skipped(NamedTuple):
    """Stands where a sample that cannot be used would be."""

    shard: str
    key: str
    reason: str
    place: int  # in the endless order


class JSONError(ValueError):
    """A json that does not parse."""


RUN = 32  # samples that are loaded step by step; their encoded images are held meanwhile
UNUSABLE = (RecordError, JSONError, captions.CaptionError, images.ImageError)


@dataclasses.dataclass(frozen=True)
class LoadTraining:
    """Of each (place in the endless order, (epoch, sample number)) the arrays of the sample, or Skipped.

    The arrays are `images`, uint8 (H, W, 3), and `tokens`, int32 (K, T); with pixels "device" `images` is a canvas,
    uint8 (C, C, 3), and `boxes`, float32 (4,), says which part of it the device has to crop.

    Attributes:
      source: of the records.
      image_size: of the crops, side in pixels or (height, width).
      tokenize: turns K captions into ids.
      seed: of all draws, which follow from it, the epoch and the number alone.
      captions, augmentation: how captions and crops are drawn.
      pixels: "reference" crops and resizes as the reference does, bit for bit; "fast" in a third of the time, with
        nearly the same pixels; "device" leaves the crop to the step, see `flair_jax.augmentation`.

    Raises:
      ValueError: `pixels` is none of these.
    """

    source: Source
    image_size: int | tuple[int, int]
    tokenize: tokenizer.Tokenizer
    seed: int
    captions: captions.CaptionOptions
    augmentation: images.AugmentationOptions
    pixels: Pixels

    def __post_init__(self):
        if self.pixels not in get_args(Pixels):
            raise ValueError(f"pixels is {self.pixels!r}; expected one of {', '.join(get_args(Pixels))}")

    def __call__(self, group: Sequence[tuple[int, tuple[int, int]]]) -> list[dict[str, np.ndarray] | Skipped]:
        return [sample for first in range(0, len(group), RUN) for sample in self._run(group[first : first + RUN])]

    def _run(self, run: Sequence[tuple[int, tuple[int, int]]]) -> list[dict[str, np.ndarray] | Skipped]:
        """Step by step for all, not sample by sample: what a step uses stays in the caches of the core."""
        loaded = [{} for _ in run]
        for step in (self._read, self._add_tokens, self._add_crop):  # the cheap ones first
            for position, (place, which) in enumerate(run):
                if isinstance(loaded[position], Skipped):
                    continue
                try:
                    step(loaded[position], which)
                except UNUSABLE as error:
                    loaded[position] = Skipped(*self.source.where(which[1]), str(error), place)
        return loaded

    def _read(self, sample: dict[str, Any], which: tuple[int, int]) -> None:
        sample["record"] = self.source[which[1]]

    def _add_tokens(self, sample: dict[str, Any], which: tuple[int, int]) -> None:
        sample["tokens"] = self._tokens(sample["record"], which)

    def _add_crop(self, sample: dict[str, Any], which: tuple[int, int]) -> None:
        sample |= self._crop(sample.pop("record"), which)

    def tokens(self, which: tuple[int, int]) -> np.ndarray | None:
        """The tokens alone, int32 (K, T), without looking at the picture; None where there are no captions."""
        try:
            return self._tokens(self.source[which[1]], which)
        except UNUSABLE:
            return None

    def _tokens(self, record: Record, which: tuple[int, int]) -> np.ndarray:
        return self.tokenize(captions.draw(_parse(record), self._rng("captions", which), self.captions))

    def _rng(self, purpose: str, which: tuple[int, int]) -> random.Random:
        # One for each purpose, so that a change of the crop leaves the captions as they are. Text goes through SHA-512.
        return random.Random(f"{purpose}/{self.seed}/{which[0]}/{which[1]}")

    def _crop(self, record: Record, which: tuple[int, int]) -> dict[str, np.ndarray]:
        data, rng = record.image, self._rng("crop", which)
        law = self.image_size, rng, self.augmentation.scale, self.augmentation.ratio
        if self.pixels == "reference":
            return {"images": images.random_resized_crop(images.to_rgb(images.decode(data)), *law)}
        if self.pixels == "fast":
            return {"images": fast_images.random_resized_crop(data, *law)}
        canvas, box = fast_images.canvas(data, *law)
        return {"images": canvas, "boxes": box}


@dataclasses.dataclass(frozen=True)
class LoadEvaluation:
    """(place, sample number) -> (key, uint8 (H, W, 3), sentences) or Skipped."""

    source: Source
    image_size: int | tuple[int, int]
    fields: Sequence[str]

    def __call__(self, place: int, number: int) -> tuple[str, np.ndarray, list[str]] | Skipped:
        try:
            record = self.source[number]
            sentences = captions.sentences(_parse(record), self.fields)
            image = images.evaluation_crop(images.to_rgb(images.decode(record.image)), self.image_size)
        except UNUSABLE as error:
            return Skipped(*self.source.where(number), str(error), place)
        return record.key, image, sentences


def _parse(record: Record) -> Any:
    try:
        return json.loads(record.json)
    except (ValueError, RecursionError) as error:
        raise JSONError(f"the json does not parse: {error}") from error
