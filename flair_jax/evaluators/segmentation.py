"""Zero-shot semantic segmentation: every patch of an image is compared with the names of the classes.

No mask is ever trained on. The protocol is the one of FLAIR's published numbers (`spec/flair.md` 3.7; SCLIP, Wang et
al., ECCV 2024): windows that slide over the image, the cosine of each patch with each name, bilinear interpolation to
the size of the labels, the best class wins. IoU and its mean are mmsegmentation's.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from flair_jax import initialize
from flair_jax.evaluators.features import (
    BrokenImages,
    EmptySet,
    Encoder,
    call,
    check_texts,
    lookahead,
    patch_grid,
    raise_broken,
)
from flair_jax.figures import segmentation as figures
from flair_jax.models.layers import normalize
from flair_jax.report import Result

IGNORE = 255  # label of pixels that do not count
UNDECIDED = 255  # prediction where several classes share the best score
MODES = ("projected", "value", "attention")
LONG_SIDE = 2048 / 224  # longest side of a resized image, in windows
FIGURE_IMAGES = 6
KEPT_WINDOWS = 20_000  # of a set, in the feature store
# The program that decides about pixels is compiled for sizes that are multiples of these, not for every image.
ROWS, COLUMNS, WINDOWS = 64, 128, 4
BLOCK = 16  # rows of pixels that are decided about at a time: their scores stay in a CPU's cache


@dataclasses.dataclass(frozen=True)
class SegmentationSet:
    """Images with a class for every pixel, and the texts that stand for the classes.

    A class has one or several names, which are called queries here: the best of its queries is its score. A query has
    one or several prompts, of whose unit vectors it is the mean, at unit length.

    Attributes:
      name: stands in the names of the metrics.
      classes: C names.
      images: arrays (H, W, 3), by index; loaded when asked for.
      labels: int arrays (h, w), by index: 0 to C - 1, or `IGNORE` for pixels that do not count. Their size may differ
        from the image's.
      tokens: int32 (P, T), padded prompts.
      query_of_prompt: int (P,), every query at least once.
      class_of_query: int (Q,), every class at least once; None: each class has one query, its own number.
      sizes: int (I, 2), height and width of each image; None: all have the size of the first one.
      background: the class of pixels that no other class claims; None: there is none.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    classes: Sequence[str]
    images: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    tokens: np.ndarray
    query_of_prompt: np.ndarray
    class_of_query: np.ndarray | None = None
    sizes: np.ndarray | None = None
    background: int | None = None

    def __post_init__(self):
        if self.class_of_query is None:
            object.__setattr__(self, "class_of_query", np.arange(len(self.classes)))
        if not len(self.images) or len(self.images) != len(self.labels):
            raise ValueError(
                f"{self.name}: {len(self.images)} images and {len(self.labels)} labels; expected as many, and some"
            )
        if len(self.classes) > IGNORE:
            raise ValueError(
                f"{self.name}: {len(self.classes)} classes; the label {IGNORE} is kept for pixels to ignore"
            )
        check_texts(self.name, self.tokens, self.query_of_prompt, len(self.class_of_query))
        if missing := set(range(len(self.class_of_query))) - set(self.query_of_prompt.tolist()):
            raise ValueError(
                f"{self.name}: no prompt for the classes "
                f"{[self.classes[self.class_of_query[query]] for query in sorted(missing)]}"
            )
        if set(self.class_of_query.tolist()) != set(range(len(self.classes))):
            raise ValueError(f"{self.name}: queries belong to {np.unique(self.class_of_query)}; expected every class")
        if self.sizes is None:
            size = np.shape(self.images[0])[:2]
            object.__setattr__(self, "sizes", np.tile(size, (len(self.images), 1)))
        if self.sizes.shape != (len(self.images), 2):
            raise ValueError(f"{self.name}: sizes {self.sizes.shape} of {len(self.images)} images; expected (I, 2)")
        if self.background is not None and not 0 <= self.background < len(self.classes):
            raise ValueError(f"{self.name}: background is {self.background} of {len(self.classes)} classes")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class ConfusionMatrix:
    """Counts of pixels, exact over batches of any size.

    Attributes:
      counts: int64 (C, C + 1), true class by predicted class; the last column is `UNDECIDED`.
    """

    def __init__(self, classes: int):
        self.counts = np.zeros((classes, classes + 1), np.int64)

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
        predictions = np.where(predictions == UNDECIDED, classes, predictions)
        for name, values, last in (("label", labels, classes - 1), ("prediction", predictions, classes)):
            if values.size and not 0 <= values.min() <= values.max() <= last:
                raise ValueError(f"{name}s run from {values.min()} to {values.max()}; expected 0 to {classes - 1}")
        counts = np.bincount(labels * (classes + 1) + predictions, minlength=self.counts.size)
        self.counts += counts.reshape(self.counts.shape)

    def iou(self) -> np.ndarray:
        """Intersection over union of each class, float64 (C,); NaN for a class that is neither true nor predicted.

        A class without a pixel in the labels has 0 as soon as one counted pixel is predicted as that class. The mean
        leaves out NaN. That is mmsegmentation's `IoUMetric`, and torchmetrics' `MulticlassJaccardIndex`.
        """
        hits = self.counts[:, :-1].diagonal()
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def class_accuracy(self) -> np.ndarray:
        """Share of each class's pixels that are right, float64 (C,); NaN for a class without a pixel in the labels."""
        pixels = self.counts.sum(1)
        return np.where(pixels > 0, self.counts[:, :-1].diagonal() / np.maximum(pixels, 1), np.nan)

    def accuracy(self) -> float:
        """Share of all counted pixels that are right."""
        return float(self.counts[:, :-1].diagonal().sum() / self.counts.sum())

    def chance(self) -> float:
        """Mean over the classes of the IoU that uniformly random predictions would have.

        Of n pixels of a class and M pixels in all, n / C are hit and (M - n) / C are wrongly claimed, which makes
        n / (C n + M - n): the ratio of the expectations, and the expected ratio when pixels are many.
        """
        pixels = self.counts.sum(1)
        return float(np.mean(pixels / (len(self.counts) * pixels + pixels.sum() - pixels)))

    def sum_over_processes(self) -> None:
        """Makes every process's counts the sum over all processes."""
        low, high = self.counts & 0xFFFFFF, self.counts >> 24  # jax has 32 bits
        parts = multihost_utils.process_allgather(np.stack([low, high]).astype(np.int32))
        low, high = np.asarray(parts, np.int64).sum(0)
        self.counts = low + (high << 24)


# ---------------------------------------------------------------------------------------------------------------------
# Interpolation: bilinear, pixel centres at half, as PyTorch's with align_corners=False and without antialias


def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each of `new` positions lies between two of `old`: their numbers (new,) twice, and the weight of the second."""
    position = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(position.astype(int), old - 1)
    return low, np.minimum(low + 1, old - 1), np.float32(position - low)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) in another size, of the same type; integers are rounded."""
    result = image
    for axis, new in enumerate(size):
        if image.shape[axis] != new:
            low, high, weight = taps(image.shape[axis], new)
            weight = weight.reshape(-1, *[1] * (2 - axis))
            result = np.take(result, low, axis) * (1 - weight) + np.take(result, high, axis) * weight
    return np.rint(result).astype(image.dtype) if np.issubdtype(image.dtype, np.integer) else result


def interpolation(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of linear interpolation along one axis."""
    low, high, weight = taps(old, new)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), low), 1 - weight)
    np.add.at(matrix, (np.arange(new), high), weight)
    return matrix


# ---------------------------------------------------------------------------------------------------------------------
# Windows


class Grid(NamedTuple):
    """What is cut out of an image: its size after resizing, and the first row or column of each window."""

    size: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]


def sliding(size: Sequence[int], window: tuple[int, int], short_side: float | None) -> Grid:
    """Windows at a stride of half a window, the last one pushed back inside, on an image that is resized first.

    Args:
      size: height and width of the image as it is stored.
      window: height and width.
      short_side: of the resized image, in windows' shorter sides; its longer side is at most `LONG_SIDE` of them. None:
        the image keeps its size. Where a window would not fit, the image is enlarged until it does.
    """
    unit, scale = min(window), 1.0
    if short_side is not None:
        scale = min(short_side * unit / min(size), LONG_SIDE * unit / max(size))
    scale = max(scale, *(inner / outer for inner, outer in zip(window, size, strict=True)))
    resized = tuple(max(inner, int(outer * scale + 0.5)) for inner, outer in zip(window, size, strict=True))
    starts = []
    for inner, outer in zip(window, resized, strict=True):
        stride = inner // 2
        count = -(-(outer - inner) // stride) + 1
        starts.append(tuple(min(number * stride, outer - inner) for number in range(count)))
    return Grid(resized, *starts)


def whole(size: Sequence[int], unit: int, patch: int, short_side: float) -> Grid:
    """One window, all of an image whose shorter side has `short_side` units.

    Sides are rounded, the shorter one to patches and the longer one to four: every size is a program to compile.
    """
    scale = min(short_side * unit / min(size), LONG_SIDE * unit / max(size))
    steps = [patch if side == min(size) else 4 * patch for side in size]
    resized = tuple(max(1, round(side * scale / step)) * step for side, step in zip(size, steps, strict=True))
    return Grid(resized, (0,), (0,))


class Windows(Sequence):
    """The windows of images one after another, (h, w, 3), by index; an image is loaded once for all of its windows.

    Args:
      images: arrays (H, W, 3), by index.
      numbers: int (I,), which of them.
      grids: of each of those.
      window: height and width.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        numbers: np.ndarray,
        grids: Sequence[Grid],
        window: tuple[int, int],
    ):
        self._images, self._numbers, self._grids, self._window = images, numbers, grids, window
        self.counts = np.array([len(grid.tops) * len(grid.lefts) for grid in grids])
        self.ends = np.cumsum(self.counts)
        self._load = functools.lru_cache(maxsize=32)(self._resized)
        self._locks = [threading.Lock() for _ in grids]  # several threads ask for windows of one image

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self._window, 3

    def __getitem__(self, index: int) -> np.ndarray:
        image, top, left = self._locate(index)
        height, width = self._window
        with self._locks[image]:
            pixels = self._load(image)
        return pixels[top : top + height, left : left + width]

    def image_of(self, index: np.ndarray | int) -> np.ndarray:
        """Which of the images a window belongs to."""
        return np.searchsorted(self.ends, index, side="right")

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Which image, and the first row and column in it."""
        image = int(self.image_of(index))
        grid = self._grids[image]
        row, column = divmod(index - int(self.ends[image]), len(grid.lefts))  # counted from the end: negative
        return image, grid.tops[row], grid.lefts[column]

    def _resized(self, image: int) -> np.ndarray:
        return resize(np.asarray(self._images[int(self._numbers[image])]), self._grids[image].size)

    @property
    def keys(self) -> list[str] | None:
        """For the feature store: a text for each window that identifies its pixels. None: nothing is to be kept.

        The patches of a window of 224 pixels take 400 kB, so that a large set would take tens of gigabytes, and an
        accelerator has computed them again before they are read.
        """
        keys = getattr(self._images, "keys", None)
        if keys is None or len(self) > KEPT_WINDOWS:
            return None
        found = []
        for index in range(len(self)):
            image, top, left = self._locate(index)
            found.append(f"bilinear {self._grids[image].size} {top} {left} {self._window} {keys[self._numbers[image]]}")
        return found


@functools.lru_cache(maxsize=256)
def stitching(length: int, window: int, starts: tuple[int, ...], patches: int, out: int) -> np.ndarray:
    """The matrix (out, windows * patches) that takes scores of patches along one axis to the pixels of the labels.

    Scores of a window are interpolated to its pixels, windows that overlap are averaged, and the result is interpolated
    to the size of the labels. All three are linear and separable (windows stand in rows and columns), so that they are
    one matrix for the rows and one for the columns, and nothing of the resized image's size is ever made.
    """
    matrix = np.zeros((length, len(starts) * patches), np.float32)
    covered = np.zeros(length, np.float32)
    to_pixels = interpolation(patches, window)
    for number, start in enumerate(starts):
        matrix[start : start + window, number * patches : (number + 1) * patches] += to_pixels
        covered[start : start + window] += 1
    return interpolation(length, out) @ (matrix / covered[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# On the devices


@jax.jit
def _query_vectors(members: jax.Array, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which prompts each query has, bool (U, P), and their features (P, D) -> two means of them, float32 (U, D).

    The first is of the features as they are, which pooling takes; the second of their unit vectors, at unit length.
    """
    weights = members / members.sum(1, keepdims=True)
    mean = functools.partial(jnp.matmul, weights, precision="highest")
    return mean(pooled.astype(jnp.float32)), normalize(mean(normalize(pooled)))


@functools.lru_cache(maxsize=16)
def _patch_scores(model: nn.Module, out: NamedSharding, mode: str) -> Callable:
    """Features of windows and of Q queries -> the score of each patch, float32 (B, Q, L)."""

    def scores(params, image, text, vectors):
        if mode == "attention":
            weights, _ = call(model, "attention_maps", params, image, text)
            return weights.mean(2).astype(jnp.float32)
        local = call(model, "dense_features", params, image) if mode == "value" else image.local
        local = normalize(local).astype(jnp.float32)
        return jnp.einsum("bld,qd->bql", local, vectors, precision="highest")

    return jax.jit(scores, out_shardings=out)


@functools.partial(jax.jit, static_argnames=("classes", "shares", "background", "temperature", "threshold", "area"))
def _decide(
    rows, columns, scores, texts, class_of_query, size, *, classes, shares, background, temperature, threshold, area
) -> jax.Array:
    """The best class of every pixel, uint8 (h, w).

    Args:
      rows, columns: `stitching`, (h, k) and (w, l).
      scores: of the patches for each different query, (U, k, l).
      texts: int (Q,), which of the U different ones each query is; None: Q is U.
      class_of_query: int (Q,).
      size: int (2,), how many rows and columns are pixels, and not padding.
      classes: C.
      shares: whether a query's probability is its share of the sum of scores, instead of their softmax.
      background, temperature, threshold, area: see `Segmentation`.
    """
    # The background comes first, so that it is seen whether it is among the classes that share the best score.
    owner = class_of_query if background is None else jnp.where(class_of_query == background, -1, class_of_query)
    blocks = rows.reshape(-1, BLOCK, rows.shape[1])

    def better(one, other):
        """Of two queries' scores, the larger one, and the first and the last class that has it."""
        (a, a_first, a_last), (b, b_first, b_last) = one, other
        first, last = jnp.minimum(a_first, b_first), jnp.maximum(a_last, b_last)
        return (
            jnp.maximum(a, b),
            jnp.where(a > b, a_first, jnp.where(a < b, b_first, first)),
            jnp.where(a > b, a_last, jnp.where(a < b, b_last, last)),
        )

    def best(allowed):
        """The best class of the `allowed` ones, bool (C,) or None for all, and its probability among all."""

        def block(part):
            values = jnp.einsum("yk,qkl->qyl", part, scores, precision="highest")
            values = jnp.einsum("qyl,xl->qyx", values, columns, precision="highest")
            if texts is not None:
                values = values[texts]  # here, so that equal texts have equal scores to the bit
            candidates = values
            if allowed is not None:
                candidates = jnp.where(allowed[class_of_query][:, None, None], values, -jnp.inf)
            owners = jnp.broadcast_to(owner[:, None, None], values.shape)
            start = jnp.float32(-jnp.inf), jnp.int32(classes), jnp.int32(-2)
            # One pass over the scores, in place of one each for the maximum and the classes that have it.
            top, first, last = jax.lax.reduce((candidates, owners, owners), start, better, (0,))
            chosen = jnp.where(first == last, first, UNDECIDED)
            if background is None:
                return chosen, top
            chosen = jnp.where(first == -1, background, chosen)
            if shares:
                likely = top / jnp.maximum(values.sum(0), jnp.finfo(values.dtype).tiny)
            else:
                likely = 1 / jnp.exp(temperature * (values - top)).sum(0)
            return chosen, likely

        chosen, likely = jax.lax.map(block, blocks)
        return chosen.reshape(-1, columns.shape[0]), likely.reshape(-1, columns.shape[0])

    chosen, likely = best(None)
    if background is not None and area is not None:
        inside = (jnp.arange(chosen.shape[0]) < size[0])[:, None] & (jnp.arange(chosen.shape[1]) < size[1])
        names = jnp.arange(classes)
        pixels = jax.lax.map(lambda name: jnp.sum(inside & (chosen == name)), names)
        pixels = jnp.where(names == background, 0, pixels)
        chosen, likely = best((pixels > area * pixels.sum()) | (names == background))
    if background is not None and threshold is not None:
        chosen = jnp.where(likely < threshold, background, chosen)
    return chosen.astype(jnp.uint8)


def _padded(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Zeros are added until the shape is a multiple of both numbers."""
    return np.pad(matrix, [(0, -side % step) for side, step in zip(matrix.shape, (rows, columns), strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# The evaluator


class Segmentation:
    """Yields `segmentation/<set>/<mode>/miou`, `…/accuracy`, `…/mean_accuracy`, `…/iou/<class>`, and `…/<set>/chance`.

    accuracy is the share of pixels that are right, mean_accuracy its mean over the classes that occur in the labels;
    for miou and iou see `ConfusionMatrix.iou`. A pixel for which several classes share the best score belongs to none
    of them and is wrong, unless one of them is the background, which then has it: a model that gives all classes the
    same score never does better than chance.

    Modes, the scores of a patch for a query:
      projected: cosine of the projected patch token; FLAIR's published numbers.
      value: cosine of `model.dense_features`, what the pooling would give if all attention rested on the patch.
      attention: the weight that text-conditioned pooling gives the patch for the query, mean of the heads.

    Windows of the model's image size slide over the image, see `sliding`, or the model takes the whole image with
    resized position embeddings, see `whole`. The device holds the scores of a batch of windows and of a few rows of an
    image's pixels; the host holds a batch of windows, and one image's patch scores.

    Args:
      model: a module with `encode_image`, `encode_text`, `image_size` and, for value, `dense_features` and, for
        attention, `attention_maps`. For whole images see `initialize.with_image_size`.
      data: what to segment.
      preprocess: windows (B, h, w, 3) -> the model's input of the same height and width; runs inside jit.
      modes: some of `MODES`, of which a model without text-conditioned pooling has "projected" alone; None: all.
      short_side: of the resized image, in sides of the model's images: 1.5 is 336 pixels for a model of 224. None:
        images keep their size.
      whole_image: whether the model takes whole images instead of windows; needs `short_side`.
      temperature: cosines times this number go into the softmax over all queries, whose result is compared with
        `threshold`. (The probability in mode "attention" is a query's share of the sum over all queries instead.)
      threshold: if the set has a background: pixels whose best probability is below it are background.
      area: if the set has a background: a class is left out of an image of whose pixels that are not background it
        would get no more than this share. None: none is.
      image_batch, text_batch: sizes of batches, of windows and of texts. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown mode, or none; or an option that is no positive number.
    """

    def __init__(
        self,
        model: nn.Module,
        data: SegmentationSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        modes: Sequence[str] | None = None,
        short_side: float | None = None,
        whole_image: bool = False,
        temperature: float = 40.0,
        threshold: float = 0.1,
        area: float | None = None,
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        available = MODES if model.has_pooling else ("projected",)
        modes = available if modes is None else modes
        if not modes or set(modes) - set(available):
            raise ValueError(f"segmentation modes are {tuple(modes)}; expected one or more of {available}")
        numbers = {"short_side": short_side, "temperature": temperature, "threshold": threshold, "area": area}
        for name, number in numbers.items():
            if number is not None and not number > 0:
                raise ValueError(f"{name} is {number}; expected a number above 0")
        if whole_image and short_side is None:
            raise ValueError("whole_image needs short_side, the size of the images that the model takes")
        self._model, self._data, self._modes = model, data, tuple(modes)
        self._short_side, self._whole_image = short_side, whole_image
        self._decision = {
            "classes": len(data.classes),
            "background": data.background,
            "temperature": temperature,
            "threshold": threshold,
            "area": area,
        }
        self._encoder = functools.partial(
            Encoder, preprocess=preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh
        )
        self._shown: list[tuple[int, dict[str, np.ndarray]]] = []  # numbers of images, and their masks by mode
        self._iou: dict[str, np.ndarray] = {}

    def confusion(self, params: Any) -> dict[str, ConfusionMatrix]:
        """Counts over the whole set, by mode.

        Raises:
          BrokenImages: images or their labels cannot be read.
          ValueError: a score is not finite, or a label is no class.
        """
        data = self._data
        matrices = {mode: ConfusionMatrix(len(data.classes)) for mode in self._modes}
        mine = self._mine()
        shown = set(mine[np.linspace(0, len(mine) - 1, min(FIGURE_IMAGES, len(mine))).astype(int)].tolist())
        self._shown = []
        for number, labels, predictions in self._masks(params):
            for mode, prediction in predictions.items():
                matrices[mode].add(labels, prediction)
            if number in shown:
                self._shown.append((number, predictions))
        if jax.process_count() > 1:
            for matrix in matrices.values():
                matrix.sum_over_processes()
        return matrices

    def masks(self, params: Any) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The number of each image, and by mode the class of every pixel, uint8 of the labels' shape; `UNDECIDED` where
        several share the best score. Of the images of this process, see `confusion` for errors.
        """
        for number, _, masks in self._masks(params):
            yield number, masks

    def _masks(self, params: Any) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
        """`masks` with the labels of each image between."""
        broken: dict[int, str] = {}
        for number, labels, predictions in lookahead(self._predictions(params, broken)):
            height, width = labels.shape
            yield number, labels, {mode: np.asarray(mask)[:height, :width] for mode, mask in predictions.items()}
        raise_broken(broken, len(self._data.images))

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          EmptySet: no pixel is labelled. And see `confusion`.
        """
        data, matrices = self._data, self.confusion(params)
        result = functools.partial(Result, "segmentation", data.name)
        if not matrices[self._modes[0]].counts.any():
            raise EmptySet(f"segmentation/{data.name}: no pixel has a label other than {IGNORE}")
        self._iou = {mode: matrix.iou() for mode, matrix in matrices.items()}
        for mode, matrix in matrices.items():
            yield result("miou", float(np.nanmean(self._iou[mode])), mode)
            yield result("accuracy", matrix.accuracy(), mode)
            yield result("mean_accuracy", float(np.nanmean(matrix.class_accuracy())), mode)
        yield result("chance", matrices[self._modes[0]].chance())
        for mode, iou in self._iou.items():
            for name, value in zip(data.classes, iou, strict=True):
                if np.isfinite(value):
                    yield result(f"iou/{name}", float(value), mode)

    def figures(self, params: Any) -> Iterator[tuple[str, Any]]:
        """Titles and pictures (PIL) of the last `run`: images with masks of the mode whose mean IoU is best, and the
        IoU of the classes.
        """
        del params  # the other evaluators' need them
        data = self._data
        if self._shown:
            best = max(self._modes, key=lambda mode: np.nanmean(self._iou[mode]))
            images = [np.asarray(data.images[number]) for number, _ in self._shown]
            labels = [np.asarray(data.labels[number]) for number, _ in self._shown]
            predictions = [masks[best] for _, masks in self._shown]
            yield f"true and predicted masks ({best})", figures.masks(images, labels, predictions, data.classes)
        if self._iou:
            yield "intersection over union", figures.bars(data.classes, self._iou)

    @property
    def notes(self) -> list[str]:
        """What the report says about the way of evaluation."""
        height, width = self._model.image_size
        found = f"windows of {height} x {width} pixels at a stride of half a window"
        if self._whole_image:
            found = "whole images with resized position embeddings"
        if self._short_side is not None:
            found += f", on images whose shorter side has {self._short_side * min(height, width):.0f} pixels"
        notes = [f"Scores of patches come from {found}; the mean IoU is over classes that are true or predicted."]
        if self._data.background is not None:
            rule = f"probability is below {self._decision['threshold']} (temperature {self._decision['temperature']:g})"
            if self._decision["area"] is not None:
                rule += f", and classes that would get no more than {self._decision['area']:.0%} of the foreground"
            notes.append(f"Background is where the best {rule}.")
        return notes

    def _mine(self) -> np.ndarray:
        """Numbers of the images whose pixels this process decides about and counts."""
        return np.arange(jax.process_index(), len(self._data.images), jax.process_count())

    def _groups(self) -> Iterator[tuple[tuple[int, int], np.ndarray, list[Grid]]]:
        """Windows of one size each: height and width, the numbers of the images, and their grids."""
        size = tuple(self._model.image_size)
        if not self._whole_image:
            grids = [sliding(x, size, self._short_side) for x in self._data.sizes]
            yield size, np.arange(len(grids)), grids
            return
        patch = self._model.vision_options["patch_size"]
        grids = [whole(x, min(size), patch, self._short_side) for x in self._data.sizes]
        for resized in sorted({grid.size for grid in grids}):
            numbers = np.array([number for number, grid in enumerate(grids) if grid.size == resized])
            yield resized, numbers, [grids[number] for number in numbers]

    def _queries(self) -> tuple[np.ndarray, np.ndarray]:
        """Which prompts the different queries have, bool (U, P), and which of those each query is, int (Q,)."""
        data = self._data
        members = data.query_of_prompt == np.arange(len(data.class_of_query))[:, None]
        texts = [data.tokens[row].tobytes() for row in members]
        order = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return members[[texts.index(text) for text in order]], np.array([order[text] for text in texts])

    def _predictions(
        self, params: Any, broken: dict[int, str]
    ) -> Iterator[tuple[int, np.ndarray, dict[str, jax.Array]]]:
        """Starts the work on each image: its number, its labels, and by mode the best class of every pixel, padded.

        Images whose labels cannot be read are added to `broken` and left out.
        """
        data = self._data
        base = self._encoder(self._model)
        members, texts = self._queries()
        text = base.texts(base.place(params), data.tokens)
        raw, vectors = _query_vectors(members, text.pooled)
        queries = text.replace(pooled=raw)
        mine = set(self._mine().tolist())
        for size, numbers, grids in self._groups():
            model, resized = self._model, params
            if size != tuple(model.image_size):
                model, resized = initialize.with_image_size(model, params, size)
            windows = Windows(data.images, numbers, grids, size)
            try:
                for image, scores in self._scores(model, resized, windows, (queries, vectors)):
                    number = int(numbers[image])
                    if not all(np.isfinite(x).all() for x in scores.values()):  # on all processes
                        raise ValueError(
                            f"segmentation/{data.name}: scores of image {number} are not finite: "
                            f"the weights or the image are broken"
                        )
                    if number not in mine:
                        continue
                    try:
                        labels = np.asarray(data.labels[number])
                    except (OSError, ValueError) as error:  # as readers of annotations raise
                        broken[number] = str(error)
                        continue
                    decide = functools.partial(self._decide, grid=grids[image], window=size, labels=labels, texts=texts)
                    yield number, labels, {mode: decide(x, mode=mode) for mode, x in scores.items()}
            except BrokenImages as error:
                reasons = {int(numbers[windows.image_of(window)]): why for window, why in error.reasons.items()}
                raise BrokenImages(reasons) from error

    def _scores(
        self, model: nn.Module, params: Any, windows: Windows, queries: tuple[Any, jax.Array]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Which of the images of the windows, and by mode its patch scores, float32 (windows, U, L)."""
        encoder = self._encoder(model)
        params = encoder.place(params)
        programs = {mode: _patch_scores(model, encoder.whole, mode) for mode in self._modes}

        def started():
            for numbers, image in encoder.images(params, windows):
                yield numbers, {mode: run(params, image, *queries) for mode, run in programs.items()}

        # Those of an image come together, unless a store has some of them already.
        waiting: dict[int, dict[int, dict[str, np.ndarray]]] = collections.defaultdict(dict)
        for numbers, batch in lookahead(started()):
            batch = {mode: np.asarray(x) for mode, x in batch.items()}
            for row, number in enumerate(numbers.tolist()):
                image = int(windows.image_of(number))
                waiting[image][number] = {mode: x[row] for mode, x in batch.items()}
                if len(waiting[image]) == windows.counts[image]:
                    rows = [scores for _, scores in sorted(waiting.pop(image).items())]
                    yield image, {mode: np.stack([scores[mode] for scores in rows]) for mode in self._modes}

    def _decide(
        self,
        scores: np.ndarray,
        *,
        grid: Grid,
        window: tuple[int, int],
        labels: np.ndarray,
        texts: np.ndarray,
        mode: str,
    ) -> jax.Array:
        """Patch scores of an image's windows (windows, U, L) -> the best class of every pixel, padded."""
        patches = patch_grid(*window, scores.shape[-1])
        starts = grid.tops, grid.lefts
        scores = scores.reshape(*map(len, starts), -1, *patches).transpose(2, 0, 3, 1, 4)  # (U, rows, h, columns, w)
        scores = scores.reshape(len(scores), len(grid.tops) * patches[0], -1)
        # Numbers of windows differ from image to image: padded, so that the program is compiled for few of them.
        steps = [side * (WINDOWS if len(start) > 1 else 1) for side, start in zip(patches, starts, strict=True)]
        axes = zip(grid.size, window, starts, patches, labels.shape, strict=True)
        rows, columns = (stitching(*axis) for axis in axes)
        rows, columns = _padded(rows, ROWS, steps[0]), _padded(columns, COLUMNS, steps[1])
        scores = np.pad(scores, [(0, 0), *((0, -n % step) for n, step in zip(scores.shape[1:], steps, strict=True))])
        repeated = None if len(scores) == len(texts) else texts
        owner = self._data.class_of_query.astype(np.int32)
        size = np.array(labels.shape, np.int32)
        return _decide(rows, columns, scores, repeated, owner, size, shares=mode == "attention", **self._decision)
