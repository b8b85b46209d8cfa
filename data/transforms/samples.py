"""FLAIR's transforms, captions and crop, and what applies transforms to the records of a source."""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from flair_jax.data.sources.base import RecordError, Source
from flair_jax.data.transforms import captions, fast_images, images, tokenizer
from flair_jax.data.transforms.base import CAPTIONS, TEXTS, VALID, Sample, SampleError, Transform
from flair_jax.data.transforms.regions import Region

Pixels = Literal["reference", "fast", "device"]

RUN = 32  # samples that are loaded step by step; their encoded images are held meanwhile
UNUSABLE = (RecordError, SampleError)
# What is wrong of a mirrored picture.
SIDED_WORDS = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed)?)?\b", re.IGNORECASE)


class Skipped(NamedTuple):
    """Stands where a sample that cannot be used would be."""

    shard: str
    key: str
    reason: str
    index: int  # in the endless order


@dataclasses.dataclass(frozen=True)
class Captions:
    """The transform that draws K captions: `texts/captions`, int32 (K, T).

    Attributes:
      options: how they are drawn, K among them.
      tokenize: texts to ids, of T a text.
    """

    options: captions.CaptionOptions
    tokenize: tokenizer.Tokenizer

    names = (f"{TEXTS}{CAPTIONS}",)

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        return {self.names[0]: self.tokenize(self.draw(sample))}

    def draw(self, sample: Sample) -> list[str]:
        """The captions as texts; always the same for one sample. Raises SampleError."""
        return captions.draw(sample.fields, sample.rng(CAPTIONS), self.options)


@dataclasses.dataclass(frozen=True)
class Crop:
    """The transform that makes the random resized crop: `images`, uint8 (H, W, 3) RGB.

    With pixels "device" `images` is a canvas, uint8 (C, C, 3), and `crop_boxes`, float32 (4,), says which part of it
    the training step has to crop: top, left, height and width in pixels; see `flair_jax.augmentation`.

    Attributes:
      size: of the crop, side in pixels or (height, width).
      options: how it is drawn.
      flip: decides which pictures are mirrored; None: none are.
      pixels: "reference" crops and resizes as the reference does, bit for bit; "fast" in a third of the time, with
        nearly the same pixels; "device" leaves the crop to the step.
      upright: whether to turn photographs as their EXIF orientation says. The reference does not.

    Raises:
      ValueError: `pixels` is none of these.
    """

    size: int | tuple[int, int]
    options: images.AugmentationOptions
    pixels: Pixels = "reference"
    upright: bool = False
    flip: "Flip | None" = None

    def __post_init__(self):
        if self.pixels not in get_args(Pixels):
            raise ValueError(f"pixels is {self.pixels!r}; expected one of {', '.join(get_args(Pixels))}")

    @property
    def names(self) -> tuple[str, ...]:
        return ("images", "crop_boxes") if self.pixels == "device" else ("images",)

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        data, draws = sample.record.image, (self.size, sample.rng("crop"), self.options)
        flip = self.flip is not None and self.flip(sample)
        if self.pixels == "reference":
            image = images.to_rgb(images.decode(data, self.upright))
            return {"images": images.random_resized_crop(image, *draws, flip)}
        if self.pixels == "fast":
            return {"images": fast_images.random_resized_crop(data, *draws, self.upright, flip)}
        canvas, crop_box = fast_images.canvas(data, *draws, self.upright, flip)
        return {"images": canvas, "crop_boxes": crop_box}

    def view(self, sample: Sample) -> images.View:
        """What the arrays show of the picture: the same draws without its pixels."""
        flip = self.flip is not None and self.flip(sample)
        if self.options.squash and not self.upright:
            return images.View(1, (0.0, 0.0, 1.0, 1.0), flip)
        width, height, orientation = images.stored_size(sample.record.image)
        orientation = orientation if self.upright else 1
        if orientation > 4:  # these swap the axes
            width, height = height, width
        left, top, right, bottom = self.options.draw_box(width, height, sample.rng("crop"))
        return images.View(orientation, (left / width, top / height, right / width, bottom / height), flip)


@dataclasses.dataclass(frozen=True)
class Flip:
    """Draws whether a picture is mirrored, left for right.

    Attributes:
      options: `flip` and `sided` of them.
      captions: the transform that draws the captions.
      regions: where a sample's regions are; None where their descriptions are not trained.

    Raises of a call:
      ValueError: a text of the sample says left or right, and nobody said what to do then.
      SampleError: the sample has no captions.
    """

    options: images.AugmentationOptions
    captions: Captions
    regions: Callable[[Sample], list[Region]] | None = None

    def __call__(self, sample: Sample) -> bool:
        said = None if self.options.sided == "flip" else self._sided(sample)
        if said is not None and self.options.sided == "refuse":
            raise ValueError(
                f"config.data.augmentation.flip is {self.options.flip}, and the text {said!r:.200} would be wrong of a "
                f"mirrored picture (sample {sample.record.key}). Set config.data.augmentation.sided='keep' to leave "
                "such pictures as they are, sided='flip' to mirror them all the same, or flip=0.0"
            )
        return said is None and sample.rng("flip").random() < self.options.flip

    def _sided(self, sample: Sample) -> str | None:
        """The first text that a draw may use and that says left or right, among captions and descriptions."""
        texts = captions.texts(sample.fields, self.captions.options)
        found = [] if self.regions is None else self.regions(sample)
        return next(filter(SIDED_WORDS.search, (*texts, *(region.description for region in found))), None)


@dataclasses.dataclass(frozen=True)
class LoadTraining:
    """Of each (index in the endless order, (epoch, sample number)) the arrays of the sample by name, or Skipped.

    Attributes:
      source: of the records.
      transforms: make the arrays. They run in this order, so the cheap ones that may refuse a sample come first.
      seed: of all draws, which follow from it, the epoch and the number alone.

    Raises:
      ValueError: two transforms make arrays of one name.
    """

    source: Source
    transforms: Sequence[Transform]
    seed: int

    def __post_init__(self):
        counts = collections.Counter(name for transform in self.transforms for name in transform.names)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"several transforms make arrays named {', '.join(twice)}; a name may come once")
        if lonely := sorted(name for name in counts if name.startswith(VALID) and _texts_of(name) not in counts):
            raise ValueError(f"{', '.join(lonely)}: there are no {', '.join(map(_texts_of, lonely))}")
        if not any(name.startswith(TEXTS) for name in counts):
            raise ValueError(f"no transform makes texts; the arrays are {', '.join(sorted(counts))}")

    def __call__(self, group: Sequence[tuple[int, tuple[int, int]]]) -> list[dict[str, np.ndarray] | Skipped]:
        return [sample for first in range(0, len(group), RUN) for sample in self._run(group[first : first + RUN])]

    def _run(self, run: Sequence[tuple[int, tuple[int, int]]]) -> list[dict[str, np.ndarray] | Skipped]:
        """Step by step for all, not sample by sample: what a step uses stays in the caches of the core."""
        samples: list[Sample | None] = [None] * len(run)
        made: list[dict[str, np.ndarray] | Skipped] = [{} for _ in run]
        for transform in (None, *self.transforms):  # None: the record is read
            for i, (index, (epoch, number)) in enumerate(run):
                if isinstance(made[i], Skipped):
                    continue
                try:
                    if transform is None:
                        samples[i] = Sample(self.source[number], self.seed, epoch, number)
                    else:
                        made[i] |= transform(samples[i])
                except UNUSABLE as error:
                    made[i], samples[i] = Skipped(*self.source.where(number), str(error), index), None
        return made

    def texts(self, which: tuple[int, int]) -> np.ndarray | None:
        """The tokens of a sample alone, int32 (C, T), without its picture; None where it cannot be used."""
        only = [transform for transform in self.transforms if any(name.startswith(TEXTS) for name in transform.names)]
        (made,) = LoadTraining(self.source, only, self.seed)([(0, which)])
        if isinstance(made, Skipped):
            return None
        return np.concatenate([array for name, array in made.items() if name.startswith(TEXTS)])


def _texts_of(name: str) -> str:
    """valid/NAME -> texts/NAME."""
    return TEXTS + name.removeprefix(VALID)


def join_texts(batch: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Takes the slots of texts out of a batch and joins them.

    Args:
      batch: arrays by name, (B, …) each, among them `texts/NAME` (B, C_NAME, T) and perhaps `valid/NAME` (B, C_NAME).

    Returns:
      The other arrays; the tokens, int32 (B, C, T), whose C slots are those of the names, in the order of the
      transforms; and which of them are valid, bool (B, C), or None where no name says so.
    """
    others, tokens, valid = {}, {}, {}
    for name, array in batch.items():
        if name.startswith(TEXTS):
            tokens[name.removeprefix(TEXTS)] = array
        elif name.startswith(VALID):
            valid[name.removeprefix(VALID)] = array
        else:
            others[name] = array
    joined = np.concatenate(list(tokens.values()), axis=1)  # (B, C, T)
    if not valid:
        return others, joined, None
    everywhere = [valid.get(name, np.ones(array.shape[:2], bool)) for name, array in tokens.items()]
    return others, joined, np.concatenate(everywhere, axis=1)
