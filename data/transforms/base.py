"""What a transform is: one record -> named arrays, as a pure function of (record, seed, epoch, number).

The loader knows transforms and not what they make: it stacks the arrays of a batch's samples under their names. Names
that begin with `TEXTS` are slots of texts, which it joins and may pack.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from flair_jax.data.sources.base import Record

TEXTS, VALID = "texts/", "valid/"
CAPTIONS, NEGATIVES, DESCRIPTIONS = "captions", "negatives", "descriptions"  # slots that objectives know: TEXTS + slot
BOXES, BOXES_VALID, DESCRIPTION_IDS = "regions/boxes", "regions/valid", "regions/description_ids"


class SampleError(ValueError):
    """A sample that cannot be used and is skipped. The message says why, without naming the record."""


class JSONError(SampleError):
    """A json that does not parse."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record, and all that its random draws may depend on.

    Attributes:
      record: the encoded image and json.
      seed: of the run.
      epoch: how often the record came before.
      number: of the record in the data set.
    """

    record: Record
    seed: int
    epoch: int
    number: int

    @functools.cached_property
    def fields(self) -> Any:
        """The decoded json, an object unless the shard is broken. Raises JSONError."""
        return parse(self.record)

    def rng(self, purpose: str) -> random.Random:
        """The source of all draws for one purpose: the same whenever it is asked for.

        One for each purpose, so that a change of the crop leaves the captions as they are; a transform that needs what
        another one has drawn, such as negatives of the captions, draws it again.
        """
        return random.Random(f"{purpose}/{self.seed}/{self.epoch}/{self.number}")  # a text goes through SHA-512


class Transform(Protocol):
    """Makes some arrays of a sample.

    Attributes:
      names: of the arrays, for every sample the same, with the same shapes and dtypes. `texts/NAME`, int32 (C, T), are
        C tokenised texts; beside it there may be `valid/NAME`, bool (C,), which of them are meant. Slots that
        objectives know: `texts/captions`, and after it `texts/negatives`, hard negatives of its first text, one of each
        kind of `config.data.negatives.kinds` in their order; one that does not exist is any text, such as the caption
        itself, and `valid/negatives` says so; then `texts/descriptions`, of regions of the image, see
        `transforms.regions`.
    """

    names: tuple[str, ...]

    def __call__(self, sample: Sample) -> Mapping[str, np.ndarray]:
        """The arrays by name.

        Raises:
          SampleError: the sample cannot be used.
        """


def parse(record: Record) -> Any:
    """The decoded json of a record. Raises JSONError."""
    try:
        return json.loads(record.json)
    except (ValueError, RecursionError) as error:
        raise JSONError(f"the json does not parse: {error}") from error
