"""Public evaluation sets as evaluators: pictures become pixels, texts become tokens."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from flair_jax import initialize
from flair_jax.data.benchmarks import base
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms import windows as text_windows
from flair_jax.evaluators import Retrieval, RetrievalSet


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


def retrieval(
    model: nn.Module, benchmark: base.Benchmark, data: base.Retrieval, options: Mapping[str, Any]
) -> Iterator[Retrieval]:
    """Retrieval with texts as the model takes them, and in other ways that options ask for, an evaluator for each.

    Options, beside those of `Retrieval`:
      windows: a way or several of `windows.WAYS`, of what is done with texts that are longer than the context.
      context_length: evaluates with a longer context, too, of stretched position embeddings; None: no.
    """
    options = dict(options)
    ways = options.pop("windows", "truncate")
    longer = options.pop("context_length", None)
    modes = options.pop("modes", None)
    pixels = Pixels(data.pictures, model.image_size)

    def evaluator(model, way, label, **more):
        tokens, rows = text_windows.text_rows(data.texts, model.context_length, way)
        rows = None if way == "truncate" else rows
        known = modes if modes is None or rows is None else [mode for mode in modes if mode != "topk"]
        texts = RetrievalSet(benchmark.name, pixels, tokens, data.image_of_text, rows, data.texts)
        return Retrieval(model, texts, preprocess=image_rules.normalize, modes=known, label=label, **more, **options)

    for way in (ways,) if isinstance(ways, str) else ways:
        yield evaluator(model, way, "" if way == "truncate" else way)
    if longer is not None and longer > model.context_length:
        long_model = model.clone(text_options={**model.text_options, "context_length": longer})
        stretch = functools.partial(initialize.stretch_context, length=longer)
        yield evaluator(long_model, "truncate", f"{longer} tokens", prepare=stretch)


# Task -> (model, set, data, options) -> evaluators.
TASKS: Mapping[str, Callable[[nn.Module, base.Benchmark, Any, Mapping[str, Any]], Iterator[Any]]] = {
    "retrieval": retrieval,
}
