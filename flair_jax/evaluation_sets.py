"""Public evaluation sets as evaluators: pictures become pixels, texts become tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from flair_jax.data.benchmarks import base
from flair_jax.data.transforms import images as image_rules


class Pixels(Sequence):
    """Pictures as uint8 pixels (H, W, 3) of one size, by index; decoded when asked for.

    Attributes:
      keys: for the feature store: a text per picture that identifies its pixels and how they were prepared.

    Args:
      pictures: of a set.
      size: height and width.
      crop: RGB image, size -> pixels; by default the reference's, `images.evaluation_crop`.
    """

    def __init__(
        self,
        pictures: Sequence[base.Picture],
        size: tuple[int, int],
        crop: Callable[[Any, tuple[int, int]], np.ndarray] = image_rules.evaluation_crop,
    ):
        self._pictures, self._size, self._crop = pictures, size, crop

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> np.ndarray:
        """
        Raises:
          ImageError: naming the file. OSError: it cannot be read.
        """
        return self._crop(image_rules.to_rgb(self._pictures[index].decode()), self._size)

    @property
    def keys(self) -> list[str]:
        return [f"{self._crop.__name__} {self._size} {picture.key()}" for picture in self._pictures]


# Task -> (model, set, data, options) -> evaluators.
TASKS: Mapping[str, Callable[[nn.Module, base.Benchmark, Any, Mapping[str, Any]], Iterator[Any]]] = {}
