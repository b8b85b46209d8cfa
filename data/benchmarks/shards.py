"""One's own shards as a retrieval set: every sentence of a record is a text of its image."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from flair_jax.data.benchmarks import base
from flair_jax.data.sources.base import RecordError, Source
from flair_jax.data.sources.open import Shards, open_source
from flair_jax.data.transforms import captions, images
from flair_jax.data.transforms.base import SampleError, parse


@dataclasses.dataclass(frozen=True)
class RecordPicture:
    """The image of a record; see `base.Picture`.

    Attributes:
      upright: whether it is turned as its EXIF orientation says, see `images.decode`.
    """

    source: Source
    index: int
    upright: bool

    @property
    def path(self) -> str:
        return ": ".join(self.source.where(self.index))

    def exists(self) -> bool:
        return True

    def key(self) -> str:
        return repr((self.path, self.source.checksum, self.upright))

    def decode(self) -> Any:
        """
        Raises:
          ImageError: naming the record. ShardError: the shard changed.
        """
        try:
            return images.decode(self.source[self.index].image, self.upright)
        except images.ImageError as error:
            raise images.ImageError(f"{self.path}: {error}") from error


def read(
    shards: Shards, fields: Sequence[str], *, index_dir: str | os.PathLike | None = None, upright: bool = False
) -> tuple[base.Retrieval, collections.Counter]:
    """The records that have captions, and how many have none or cannot be parsed, by reason.

    Args:
      shards, index_dir: see `open_source`.
      fields: keys of the captions, see `captions.sentences`.
      upright: see `RecordPicture`.

    Raises:
      FileNotFoundError, ShardError: see `open_source`.
      AnnotationError: no record can be used.
    """
    source = open_source(shards, index_dir)
    pictures, texts, owners, skipped = [], [], [], collections.Counter()
    for index in range(len(source)):
        try:
            sentences = captions.sentences(parse(source[index]), fields)
        except (RecordError, SampleError) as error:
            skipped[str(error)] += 1
            continue
        owners += [len(pictures)] * len(sentences)
        texts += sentences
        pictures.append(RecordPicture(source, index, upright))
    if not pictures:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in skipped.most_common()) or "no records"
        raise base.AnnotationError(
            f"no usable record in {shards} with the caption fields {tuple(fields)}: {reasons}. Set `fields` to those "
            "that hold captions there"
        )
    return base.Retrieval(pictures, texts, np.asarray(owners)), skipped
