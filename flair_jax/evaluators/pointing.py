"""Pointing game: does the attention of a phrase peak inside the box of what it names (Zhang et al., ECCV 2016)?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flair_jax.evaluators.features import Encoder, call, check_texts, one_behind, patch_grid
from flair_jax.report import Result


@dataclasses.dataclass(frozen=True)
class PointingSet:
    """Phrases, each with the box of the one object of its image that it names.

    Attributes:
      name: stands in the names of the metrics.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      tokens: int32 (N, T), padded phrases.
      image_of_text: int (N,), the number of each phrase's image.
      boxes: float (N, 4), x0, y0, x1, y1 in pixels of `images`; x1 and y1 are outside.
      objects: int (N,), how many objects the phrase's image has.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    images: Sequence[np.ndarray]
    tokens: np.ndarray
    image_of_text: np.ndarray
    boxes: np.ndarray
    objects: np.ndarray

    def __post_init__(self):
        check_texts(self.name, self.tokens, self.image_of_text, len(self.images))
        texts = len(self.tokens)
        if self.boxes.shape != (texts, 4) or self.objects.shape != (texts,):
            raise ValueError(
                f"{self.name}: boxes {self.boxes.shape} and objects {self.objects.shape}; "
                f"expected ({texts}, 4) and ({texts},) for {texts} phrases"
            )
        if (self.boxes[:, :2] >= self.boxes[:, 2:]).any() or self.objects.min() < 1:
            raise ValueError(f"{self.name}: a box is empty, or an image has no object")


def patches_in_boxes(boxes: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Which patches have their centre in each box: (N, 4) pixels, (h, w) patches, (H, W) pixels -> bool (N, h * w)."""
    rows, columns = grid
    y = (np.arange(rows) + 0.5) * size[0] / rows
    x = (np.arange(columns) + 0.5) * size[1] / columns
    x0, y0, x1, y1 = (side[:, None] for side in boxes.T)
    inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]  # (N, h, w)
    return inside.reshape(len(boxes), -1)


def texts_by_image(images: int, image_of_text: np.ndarray) -> np.ndarray:
    """The texts of each image in their order, int (I, M) with M the largest number; -1 behind an image's last."""
    order = np.argsort(image_of_text, kind="stable")
    count = np.bincount(image_of_text, minlength=images)
    place = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((images, count.max()), -1)
    table[image_of_text[order], place] = order
    return table


@functools.lru_cache(maxsize=8)
def _attend(model: nn.Module, whole: NamedSharding) -> Callable:
    """Each image with texts of its own, numbers (B, M) among all texts -> attention over the patches (B, M, L)."""

    def attend(params, image, text, texts):
        def one(image, texts):
            image, own = jax.tree.map(lambda x: x[None], image), jax.tree.map(lambda x: x[texts], text)
            weights, _ = call(model, "attention_maps", params, image, own)
            return weights[0].mean(1)  # over the heads

        return jax.vmap(one)(image, texts)

    return jax.jit(attend, out_shardings=whole)


class Pointing:
    """Yields `pointing/<set>/accuracy`, `…/chance` and `…/chance_object`, fractions.

    Scored is the attention over the patches averaged over the heads, as FLAIR's own pictures show it, without the zero
    key: the question is where the text looks most, not whether it looks at all. A phrase is right when the centre of
    the patch with the largest attention (of equal ones the first) lies in its box. A box without any patch's centre
    cannot be hit and counts as wrong.

    `chance` is a random patch: the mean share of patch centres in the phrase's box. `chance_object` is a random object
    of the image: the mean of 1 / objects.

    Args:
      model: a module with `encode_image`, `encode_text` and `attention_maps`.
      data: what to point at.
      preprocess: the set's images (B, H, W, 3) -> the model's input of the same height and width; runs inside jit.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: PointingSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        self._data = data
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._attend = _attend(model, self._encoder.whole)

    def attention(self, params: Any) -> np.ndarray:
        """Attention of each phrase over the patches of its image, mean of the heads, float32 (N, L)."""
        params = self._encoder.place(params)
        table = texts_by_image(len(self._data.images), self._data.image_of_text)
        text = self._encoder.texts(params, self._data.tokens)

        def batches():
            for images, image in self._encoder.images(params, self._data.images):
                rows = jax.tree.leaves(image)[0].shape[0]
                texts = np.zeros((rows, table.shape[1]), np.int32)  # padding: any text
                texts[: len(images)] = np.maximum(table[images], 0)
                yield images, self._attend(params, image, text, self._encoder.split(texts))

        parts = [np.asarray(weights)[: len(images)] for images, weights in one_behind(batches())]
        weights = np.concatenate(parts)  # (I, M, L)
        result = np.empty((len(self._data.tokens), weights.shape[-1]), weights.dtype)
        result[table[table >= 0]] = weights[table >= 0]
        return result

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          ValueError: an attention weight is not finite.
        """
        data = self._data
        weights = self.attention(params)
        if not np.isfinite(weights).all():
            raise ValueError(f"pointing/{data.name}: attention is not finite: the weights or an image are broken")
        size = np.shape(data.images[0])[:2]
        inside = patches_in_boxes(data.boxes, patch_grid(*size, weights.shape[1]), size)
        hit = np.take_along_axis(inside, weights.argmax(1)[:, None], axis=1)
        yield Result("pointing", data.name, "accuracy", float(hit.mean()))
        yield Result("pointing", data.name, "chance", float(inside.mean()))
        yield Result("pointing", data.name, "chance_object", float((1 / data.objects).mean()))
