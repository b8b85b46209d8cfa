"""Zero-shot semantic segmentation: every patch token is compared with the names of the classes.

No mask is ever trained on. The way of FLAIR's published numbers is `spec/flair.md` 3.7: plain projected patch tokens,
cosine with the class vectors, bilinear to the size of the labels, the best class wins.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flair_jax.evaluators.features import Encoder, call, check_texts, one_behind, patch_grid
from flair_jax.models.layers import normalize
from flair_jax.report import Result

IGNORE = 255
WAYS = ("value", "projected")


@dataclasses.dataclass(frozen=True)
class SegmentationSet:
    """Images with a class for every pixel, and the texts that stand for the classes.

    Attributes:
      name: stands in the names of the metrics.
      classes: C names.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      labels: int arrays (h, w) of one size, by index: 0 to C - 1, or `IGNORE` for pixels that do not count, such as the
        background. Their size may differ from the images'.
      tokens: int32 (P, T), padded prompts.
      class_of_prompt: int (P,), every class at least once.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    classes: Sequence[str]
    images: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    tokens: np.ndarray
    class_of_prompt: np.ndarray

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(f"{self.name}: {len(self.images)} images and {len(self.labels)} labels; expected as many")
        if len(self.classes) > IGNORE:
            raise ValueError(
                f"{self.name}: {len(self.classes)} classes; the label {IGNORE} is kept for pixels to ignore"
            )
        check_texts(self.name, self.tokens, self.class_of_prompt, len(self.classes))
        if missing := set(range(len(self.classes))) - set(self.class_of_prompt.tolist()):
            raise ValueError(f"{self.name}: no prompt for the classes {[self.classes[c] for c in sorted(missing)]}")


class ConfusionMatrix:
    """Counts of pixels, exact over batches of any size.

    Attributes:
      counts: int64 (C, C), true class by predicted class.
    """

    def __init__(self, classes: int):
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, labels: np.ndarray, predictions: np.ndarray) -> None:
        """Counts the pixels whose label is not `IGNORE`; both arrays have the same shape.

        Raises:
          ValueError: shapes differ, or a label or a prediction is no class.
        """
        if labels.shape != predictions.shape:
            raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} differ in shape")
        classes = len(self.counts)
        counted = labels != IGNORE
        labels, predictions = labels[counted].astype(np.int64), predictions[counted].astype(np.int64)
        for name, values in (("label", labels), ("prediction", predictions)):
            if values.size and not 0 <= values.min() <= values.max() < classes:
                raise ValueError(f"{name}s run from {values.min()} to {values.max()}; expected 0 to {classes - 1}")
        counts = np.bincount(labels * classes + predictions, minlength=classes**2)
        self.counts += counts.reshape(classes, classes)

    def present(self) -> np.ndarray:
        """Which classes have a pixel in the labels, bool (C,)."""
        return self.counts.sum(1) > 0

    def iou(self) -> np.ndarray:
        """Intersection over union of each class, float64 (C,); NaN for a class without a pixel in the labels."""
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        return np.where(self.present(), self.counts.diagonal() / np.maximum(union, 1), np.nan)

    def chance(self) -> float:
        """Mean over the present classes of the IoU that uniformly random labels would have.

        Of n pixels of a class and M pixels in all, n / C are hit and (M - n) / C are wrongly claimed, which makes
        n / (C n + M - n): the ratio of the expectations, and the expected ratio when pixels are many.
        """
        pixels = self.counts.sum(1)[self.present()]
        return float(np.mean(pixels / (len(self.counts) * pixels + pixels.sum() - pixels)))


@functools.lru_cache(maxsize=8)
def _predict(
    model: nn.Module, whole: NamedSharding, way: str, image_size: tuple[int, int], label_size: tuple[int, int]
) -> Callable:
    """Features of images and class vectors (C, D) -> the best class of every pixel, int32 (B, h, w)."""

    def predict(params, image, vectors):
        local = call(model, "dense_features", params, image) if way == "value" else image.local
        similarity = normalize(local) @ vectors.T  # (B, L, C)
        similarity = similarity.reshape(-1, *patch_grid(*image_size, similarity.shape[1]), len(vectors))
        shape = similarity.shape[0], *label_size, len(vectors)
        similarity = jax.image.resize(similarity, shape, "bilinear")  # (B, h, w, C)
        best = jnp.argmax(similarity, axis=-1)
        return jnp.where(jnp.isfinite(similarity).all(-1), best, -1)  # -1 is refused when pixels are counted

    return jax.jit(predict, out_shardings=whole)


class Segmentation:
    """Yields `segmentation/<set>/miou` and `…/iou/<class>` of the first way, `…/<way>/miou` of others, `…/chance`.

    The mean IoU is taken over the classes that occur in the labels; a pixel given to another class still counts against
    its true one.

    Ways to make patch tokens and texts comparable:
      value: `model.dense_features`, what the pooling would give if all attention rested on the patch.
      projected: the projected patch tokens as they are.

    A class is the mean of its prompts' unit vectors, at unit length.

    Args:
      model: a module with `encode_image`, `encode_text` and, for value, `dense_features`.
      data: what to segment.
      preprocess: the set's images (B, H, W, 3) -> the model's input of the same height and width; runs inside jit.
      ways: some of `WAYS`, of which a model without text-conditioned pooling has "projected" alone; None: all.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown way, or none.
    """

    def __init__(
        self,
        model: nn.Module,
        data: SegmentationSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        ways: Sequence[str] | None = None,
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        available = WAYS if model.has_pooling else ("projected",)
        ways = available if ways is None else ways
        if not ways or set(ways) - set(available):
            raise ValueError(f"segmentation ways are {tuple(ways)}; expected one or more of {available}")
        self._data, self._ways = data, tuple(ways)
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._membership = (np.arange(len(data.classes))[:, None] == data.class_of_prompt).astype(np.float32)  # (C, P)
        grid_size, label_size = np.shape(data.images[0])[:2], np.shape(data.labels[0])
        self._predict = {way: _predict(model, self._encoder.whole, way, grid_size, label_size) for way in self._ways}

    def confusion(self, params: Any) -> dict[str, ConfusionMatrix]:
        """Counts over the whole set, by way."""
        params = self._encoder.place(params)
        text = self._encoder.texts(params, self._data.tokens)
        vectors = normalize(self._membership @ normalize(text.pooled))  # (C, D)

        def batches():
            for images, image in self._encoder.images(params, self._data.images):
                yield images, {way: self._predict[way](params, image, vectors) for way in self._ways}

        matrices = {way: ConfusionMatrix(len(self._data.classes)) for way in self._ways}
        for images, predictions in one_behind(batches()):
            labels = np.stack([self._data.labels[int(number)] for number in images])
            for way, prediction in predictions.items():
                matrices[way].add(labels, np.asarray(prediction)[: len(images)])
        return matrices

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          ValueError: no pixel is labelled, a label is no class, or a similarity is not finite.
        """
        data = self._data
        matrices = self.confusion(params)
        first, *others = self._ways
        if not matrices[first].present().any():
            raise ValueError(f"segmentation/{data.name}: no pixel has a label other than {IGNORE}")
        iou = matrices[first].iou()
        yield Result("segmentation", data.name, "miou", float(np.nanmean(iou)))
        for way in others:
            yield Result("segmentation", data.name, "miou", float(np.nanmean(matrices[way].iou())), way)
        yield Result("segmentation", data.name, "chance", matrices[first].chance())
        for name, value, present in zip(data.classes, iou, matrices[first].present(), strict=True):
            if present:
                yield Result("segmentation", data.name, name, float(value), "iou")
