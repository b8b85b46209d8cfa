"""Image-text retrieval: Recall@k, mean and median rank, both ways.

Metric and modes are those of FLAIR's published numbers (Xiao et al., CVPR 2025; `spec/flair.md` 3.3 and 3.4), without
its faults: scores are float32 whatever the model computes in, ties have a rule, and a text that the top-k selection
left out is a miss instead of a tie that may win.
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

from flair_jax.evaluators.features import Encoder, call, check_texts, one_behind
from flair_jax.report import Result

RECALLS = (1, 5, 10)
MODES = ("flair", "topk", "global")
CHUNK = 2**22  # elements of the score matrix that are compared at a time


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images and texts, any number of texts an image.

    Attributes:
      name: stands in the names of the metrics.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      tokens: int32 (N, T), padded texts.
      image_of_text: int (N,), the number of each text's image.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    images: Sequence[np.ndarray]
    tokens: np.ndarray
    image_of_text: np.ndarray

    def __post_init__(self):
        check_texts(self.name, self.tokens, self.image_of_text, len(self.images))


def retrieval_metrics(
    scores: np.ndarray, image_of_text: np.ndarray, valid: np.ndarray | None = None
) -> dict[str, float]:
    """Recall@1/5/10 as fractions, and mean and median rank counted from 1.

    Text to image: the rank of the text's image among all images. Image to text: the best rank of any of the image's
    texts among all texts; images without a text are no queries. The median of an even number of ranks is the mean of
    the two in the middle, rounded down, as in the reference.

    Ties: among equal scores the lower index comes first, for images and for texts, as in a stable descending sort; a
    model whose scores are all equal gets chance level.

    A query whose target is not `valid` is a miss: it has the last rank and is found at no k.

    Args:
      scores: float (I, N), images by texts.
      image_of_text: int (N,).
      valid: bool (I, N), the pairs that were scored; None: all. Other pairs are behind all that were.

    Raises:
      ValueError: a valid score is not finite.
    """
    images, texts = scores.shape
    everything = np.arange(texts)
    own = scores[image_of_text, everything]  # (N,)
    if valid is not None:
        own = np.where(valid[image_of_text, everything], own, -np.inf)

    # Each image's first own text in the order of the ranking: best score, then lowest index.
    order = np.lexsort((everything, -own, image_of_text))
    queries, first = np.unique(image_of_text[order], return_index=True)
    best_text = order[first]  # (Q,)

    images_ahead = np.zeros(texts, np.int64)
    texts_ahead = np.zeros(images, np.int64)
    target = np.full(images, -1)
    target[queries] = best_text
    rows = max(1, CHUNK // texts)
    for start in range(0, images, rows):
        image = np.arange(start, min(start + rows, images))
        block = scores[image]  # (C, N)
        scored = np.ones_like(block, bool) if valid is None else valid[image]
        if not np.isfinite(block[scored]).all():
            bad = image[np.nonzero(scored & ~np.isfinite(block))[0][0]]
            raise ValueError(f"scores of image {bad} are not finite: the weights or the image are broken")
        block = np.where(scored, block, -np.inf)
        before = (block == own) & (image[:, None] < image_of_text)
        images_ahead += ((block > own) | before).sum(0)
        best = own[target[image]][:, None]  # of images without texts it is some text's, and not used below
        before = (block == best) & (everything < target[image][:, None])
        texts_ahead[image] = ((block > best) | before).sum(1)

    metrics = {}
    for direction, ahead, found, last in (
        ("text_to_image", images_ahead, np.isfinite(own), images),
        ("image_to_text", texts_ahead[queries], np.isfinite(own[best_text]), texts),
    ):
        rank = np.where(found, 1 + ahead, last)
        for k in RECALLS:
            metrics[f"{direction}_R@{k}"] = float(np.mean(found & (rank <= k)))
        metrics[f"{direction}_mean_rank"] = float(np.mean(rank))
        metrics[f"{direction}_median_rank"] = float(np.floor(np.median(rank)))
    return metrics


def retrieval_chance(images: int, image_of_text: np.ndarray) -> dict[str, float]:
    """Expected Recall@k of a random order.

    An image with n of N texts is found by its k first texts unless all of them are among the N - n others.
    """
    texts = len(image_of_text)
    own = np.bincount(image_of_text)
    own = own[own > 0]
    chance = {f"text_to_image_R@{k}": min(1.0, k / images) for k in RECALLS}
    for k in RECALLS:
        drawn = np.arange(min(k, texts))
        others = np.maximum(texts - own[:, None] - drawn, 0)  # (Q, k)
        chance[f"image_to_text_R@{k}"] = float(np.mean(1 - np.prod(others / (texts - drawn), axis=1)))
    return chance


@functools.lru_cache(maxsize=8)
def _programs(model: nn.Module, whole: NamedSharding, texts: int, topk: int) -> tuple[Callable, ...]:
    """The jitted score, global score, selection of the `topk` best of `texts` texts, and score of what was selected."""

    def scores(method):
        def apply(params, image, text):
            result = call(model, method, params, image, text)
            if result.dtype != jnp.float32:  # bfloat16 has about 3 digits: most of the top ranks would be ties
                raise TypeError(f"{type(model).__name__}.{method} gives {result.dtype}; expected float32")
            return result

        return apply

    score, global_score = scores("score"), scores("global_score")

    def select(blocks):  # -> scores and numbers of the best texts, (B, k) each
        return jax.lax.top_k(jnp.concatenate(blocks, axis=1)[:, :texts], topk)

    def rescore(params, image, text, coarse, columns):  # each image with texts of its own, (B, k) -> (B, k)
        def one(image, columns):
            image, own = jax.tree.map(lambda x: x[None], image), jax.tree.map(lambda x: x[columns], text)
            return score(params, image, own)[0]

        # What is broken in the coarse scores must not vanish in the fine ones.
        return jnp.where(jnp.isfinite(coarse), jax.vmap(one)(image, columns), jnp.nan)

    return tuple(jax.jit(function, out_shardings=whole) for function in (score, global_score, select, rescore))


class Retrieval:
    """Yields `retrieval/<set>/<mode>/<metric>` and `retrieval/<set>/chance/<metric>`.

    Modes:
      flair: `model.score`, which pools every image for every text.
      topk: each image keeps the `topk` texts with the best `model.global_score` (equal ones: the first) and ranks those
        by `model.score`; an image that did not keep a text cannot be found by it. As in the reference the selection is
        made per image for both directions.
      global: `model.global_score`, as CLIP.

    Every image and every text is encoded once, for all modes together. The device holds the features of two batches of
    images and of all texts' pooled features, and scores of `image_batch` x `text_batch` pairs at a time; the host holds
    4 bytes a pair and mode.

    Args:
      model: a module with `encode_image`, `encode_text`, `score` and, for topk and global, `global_score`.
      data: what to rank.
      preprocess: the set's images (B, H, W, 3) -> the model's input; runs inside jit.
      modes: some of `MODES`, of which a model without text-conditioned pooling has "global" alone; None: all.
      topk: texts an image keeps; more than there are means all.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown mode, or a size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data: RetrievalSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        modes: Sequence[str] | None = None,
        topk: int = 128,
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        available = MODES if model.has_pooling else ("global",)
        modes = available if modes is None else modes
        if unknown := set(modes) - set(available):
            raise ValueError(f"unknown retrieval modes {sorted(unknown)}; for this model there are {available}")
        if topk < 1:
            raise ValueError(f"topk is {topk}; expected at least 1")
        self._data, self._modes = data, tuple(modes)
        self._topk = min(topk, len(data.tokens))
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._score, self._global_score, self._select, self._rescore = _programs(
            model, self._encoder.whole, len(data.tokens), self._topk
        )

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict."""
        data = self._data
        for mode, (scores, valid) in self.scores(params).items():
            for metric, value in retrieval_metrics(scores, data.image_of_text, valid).items():
                yield Result("retrieval", data.name, metric, value, mode)
        for metric, value in retrieval_chance(len(data.images), data.image_of_text).items():
            yield Result("retrieval", data.name, metric, value, "chance")

    def scores(self, params: Any) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """The score matrix of every mode, float32 (I, N), and which pairs were scored, bool (I, N) or None for all."""
        shape = len(self._data.images), len(self._data.tokens)
        tables = {mode: np.full(shape, -np.inf, np.float32) for mode in self._modes}
        valid = {mode: np.zeros(shape, bool) if mode == "topk" else None for mode in self._modes}
        for images, results in one_behind(self._batches(self._encoder.place(params))):
            rows = images[:, None]
            for mode, (blocks, columns) in results.items():
                values = np.concatenate([np.asarray(block) for block in blocks], axis=1)[: len(images)]
                if columns is None:
                    tables[mode][images] = values[:, : shape[1]]
                else:
                    columns = np.asarray(columns)[: len(images)]
                    tables[mode][rows, columns] = values
                    valid[mode][rows, columns] = True
        return {mode: (tables[mode], valid[mode]) for mode in self._modes}

    def _batches(self, params: Any) -> Iterator[tuple[np.ndarray, dict[str, tuple[list[jax.Array], Any]]]]:
        """Starts the work on each batch of images: their numbers, and by mode the score blocks with their columns."""
        texts, modes = len(self._data.tokens), self._modes
        text = self._encoder.texts(params, self._data.tokens)
        rows = self._encoder.text_rows(texts)
        numbers = [np.minimum(np.arange(start, start + rows), texts - 1) for start in range(0, texts, rows)]
        blocks = [self._encoder.take([text], number) for number in numbers]
        for images, image in self._encoder.images(params, self._data.images):
            results = {}
            if "flair" in modes:
                results["flair"] = [self._score(params, image, block) for block in blocks], None
            if "global" in modes or "topk" in modes:
                coarse = [self._global_score(params, image, block) for block in blocks]
            if "global" in modes:
                results["global"] = coarse, None
            if "topk" in modes:
                best, columns = self._select(coarse)
                parts = [slice(start, start + rows) for start in range(0, self._topk, rows)]
                fine = [self._rescore(params, image, text, best[:, part], columns[:, part]) for part in parts]
                results["topk"] = fine, columns
            yield images, results
