"""Public evaluation sets as evaluators: pictures become pixels, texts become tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from flair_jax.data.benchmarks import base
from flair_jax.data.benchmarks import segmentation as segmentation_sets
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators import Segmentation, SegmentationSet


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


def segmentation(
    model: nn.Module, benchmark: base.Benchmark, data: base.Segmentation, options: Mapping[str, Any]
) -> Iterator[Segmentation]:
    """Zero-shot segmentation of pictures of any size.

    Args:
      options: of `evaluators.Segmentation`, and of those that the set's entry gives; and
        classes: lines with the names of a class, see `segmentation_sets.parse_classes`, in place of the set's own.
        templates: prompts in which `{c}` is the name; None: the 80 of ImageNet.
    """
    options = {"short_side": 1.5, **benchmark.options, **options}
    classes, templates = options.pop("classes", None), options.pop("templates", None)
    classes = data.classes if classes is None else segmentation_sets.parse_classes(classes)
    if len(classes) != len(data.classes):
        raise ValueError(f"{benchmark.name}: names of {len(classes)} classes; the set has {len(data.classes)}")
    templates = segmentation_sets.templates() if templates is None else templates
    if wrong := [template for template in templates if "{c}" not in template]:
        raise ValueError(f"{benchmark.name}: the templates {wrong} have no {{c}} for the name of a class")
    names = [name for synonyms in classes for name in synonyms]
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    yield Segmentation(
        model,
        SegmentationSet(
            benchmark.name,
            [synonyms[0] for synonyms in classes],
            Pixels(data.pictures, model.image_size, _as_stored),
            data.masks,
            Tokenizer(model.context_length)(prompts),
            np.repeat(np.arange(len(names)), len(templates)),
            class_of_query=np.repeat(np.arange(len(classes)), [len(synonyms) for synonyms in classes]),
            sizes=np.array([segmentation_sets.image_size(picture) for picture in data.pictures]),
            background=data.background,
        ),
        preprocess=image_rules.normalize,
        **options,
    )


def _as_stored(image: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels of the whole picture in its own size."""
    del size
    return np.asarray(image)


# Task -> (model, set, data, options) -> evaluators.
TASKS: Mapping[str, Callable[[nn.Module, base.Benchmark, Any, Mapping[str, Any]], Iterator[Any]]] = {
    "segmentation": segmentation,
}
