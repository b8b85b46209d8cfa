"""Image-text retrieval: Recall@k, mean and median rank, text to image and image to text.

Metric and modes are those of FLAIR's published numbers (Xiao et al., CVPR 2025; `spec/flair.md` 3.3 and 3.4), without
its faults: scores are float32 whatever the model computes in, ties have a rule, and a text that the top-k selection
left out is a miss instead of a tie that may win. A long text may be several rows of tokens, whose scores are pooled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from flair_jax.evaluators.features import Encoder, call, check_texts, lookahead
from flair_jax.report import Result

RECALLS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
MODES = ("flair", "topk", "global")
POOLINGS = ("mean", "max", "top2", "top3")
CHUNK = 2**22  # elements of the score matrix that are compared at a time
CURVE = 100  # largest k of the recall curves
EXAMPLES = 4  # of the best and of the worst answers, in pictures


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images and texts, any number of texts per image.

    Attributes:
      name: stands in the names of the metrics.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      tokens: int32 (W, T), padded rows of tokens.
      image_of_text: int (N,), the number of each text's image.
      text_of_row: int (W,), the text of each row, in ascending order; every text has a row. None: one row a text.
      texts: N strings, for pictures; empty: they show none.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    images: Sequence[np.ndarray]
    tokens: np.ndarray
    image_of_text: np.ndarray
    text_of_row: np.ndarray | None = None
    texts: Sequence[str] = ()

    def __post_init__(self):
        owners, rows = self.image_of_text, self.text_of_row
        if rows is not None:
            if not np.array_equal(np.unique(rows), np.arange(len(owners))) or (np.diff(rows) < 0).any():
                raise ValueError(f"{self.name}: text_of_row must name each of {len(owners)} texts, in ascending order")
            owners = owners[rows]
        check_texts(self.name, self.tokens, owners, len(self.images))
        if len(self.texts) not in (0, len(self.image_of_text)):
            raise ValueError(f"{self.name}: {len(self.texts)} strings for {len(self.image_of_text)} texts")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the right answer of each of Q queries stands.

    Attributes:
      rank: int (Q,), from 1; that of the best one where several are right. found: bool (Q,), False for a miss.
      candidates: among how many.
    """

    rank: np.ndarray
    found: np.ndarray
    candidates: int

    def recall(self, k: int) -> float:
        return float(np.mean(self.found & (self.rank <= k)))

    def curve(self) -> np.ndarray:
        """Recall@k for k from 1 to `CURVE` or the number of candidates."""
        return np.array([self.recall(k) for k in range(1, min(CURVE, self.candidates) + 1)])


def retrieval_ranks(scores: np.ndarray, image_of_text: np.ndarray, valid: np.ndarray | None = None) -> dict[str, Ranks]:
    """The rank of every query's answer, by direction.

    Text to image: the rank of the text's image among all images. Image to text: the best rank of any of the image's
    texts among all texts; images without a text are no queries.

    Ties: among equal scores the lower index comes first, for images and for texts, as in a stable descending sort; a
    model whose scores are all equal gets chance level.

    A query whose target is not `valid` is a miss: it has the last rank and is found at no k.

    Args:
      scores: float (I, N), images by texts.
      image_of_text: int (N,).
      valid: bool (I, N), the pairs that were scored; None: all. Other pairs rank after all of these.

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

    text_found, image_found = np.isfinite(own), np.isfinite(own[best_text])
    return {
        "text_to_image": Ranks(np.where(text_found, 1 + images_ahead, images), text_found, images),
        "image_to_text": Ranks(np.where(image_found, 1 + texts_ahead[queries], texts), image_found, texts),
    }


def retrieval_metrics(
    scores: np.ndarray, image_of_text: np.ndarray, valid: np.ndarray | None = None
) -> dict[str, float]:
    """Recall@1/5/10 as fractions, and mean and median rank counted from 1, of `retrieval_ranks`."""
    return rank_metrics(retrieval_ranks(scores, image_of_text, valid))


def rank_metrics(ranks: Mapping[str, Ranks]) -> dict[str, float]:
    """The metrics of both directions.

    The median of an even number of ranks is the mean of the two in the middle, rounded down, as in the reference.
    """
    metrics = {}
    for direction in DIRECTIONS:
        found = ranks[direction]
        for k in RECALLS:
            metrics[f"{direction}_R@{k}"] = found.recall(k)
        metrics[f"{direction}_mean_rank"] = float(np.mean(found.rank))
        metrics[f"{direction}_median_rank"] = float(np.floor(np.median(found.rank)))
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


@functools.lru_cache(maxsize=8)
def _jit_pool(whole: NamedSharding, poolings: tuple[str, ...]) -> Callable:
    return jax.jit(functools.partial(pool_rows, poolings=poolings), out_shardings=whole)


def pool_rows(
    blocks: Sequence[jax.Array], first: jax.Array, count: jax.Array, most: int, poolings: Sequence[str]
) -> dict[str, jax.Array]:
    """Scores of rows of tokens -> scores of their texts, by pooling.

    "mean" is the mean over a text's rows, "max" the best one, "top2" the mean of its two best ones, or of the one that
    it has. One row of each text at a time is added, so that nothing is larger than the scores of all texts.

    Args:
      blocks: float32 (B, n) each, together the scores of at least W rows.
      first, count: int (N,), the first row of each text and how many it has.
      most: the largest count.

    Returns:
      float32 (B, N) each; NaN where a row's score is not finite, so that pooling hides none.
    """
    scores = jnp.concatenate(blocks, axis=1)
    depth = max(1, *(1 if name in ("mean", "max") else int(name.removeprefix("top")) for name in poolings))

    def add(number, carry):
        total, best, broken = carry
        there = number < count
        own = jnp.where(there, scores[:, jnp.where(there, first + number, 0)], 0)  # (B, N)
        ranked, rest = [], jnp.where(there, own, -jnp.inf)
        for place in best:
            ranked.append(jnp.maximum(place, rest))
            rest = jnp.minimum(place, rest)
        return total + own, tuple(ranked), broken | ~jnp.isfinite(own)

    shape = scores.shape[0], len(first)
    nothing = tuple(jnp.full(shape, -jnp.inf, jnp.float32) for _ in range(depth))
    start = jnp.zeros(shape, jnp.float32), nothing, jnp.zeros(shape, bool)
    total, best, broken = jax.lax.fori_loop(0, most, add, start)
    pooled = {}
    for name in poolings:
        if name == "mean":
            value = total / count
        elif name == "max":
            value = best[0]
        else:
            kept = jnp.minimum(int(name.removeprefix("top")), count)
            value = sum(jnp.where(place < kept, x, 0) for place, x in enumerate(best)) / kept
        pooled[name] = jnp.where(broken, jnp.nan, value)
    return pooled


class Retrieval:
    """Yields `retrieval/<set>/<mode>/<metric>` and, without a label, `retrieval/<set>/chance/<metric>`.

    Modes:
      flair: `model.score`, which pools every image for every text.
      topk: each image keeps the `topk` texts with the best `model.global_score` (equal ones: the first) and ranks those
        by `model.score`; an image that did not keep a text cannot be found by it. As in the reference the selection is
        made per image for both directions. Not for texts of several rows.
      global: `model.global_score`, as CLIP.

    Where texts have several rows of tokens, each row is scored as a text, and the text's score is pooled from them: a
    mode is then called "flair windows mean", with the label in the middle.

    Every image and every text is encoded once, for all modes together. The device holds the features of two batches of
    images and of all texts' pooled features, and scores of `image_batch` x `text_batch` pairs at a time; the host holds
    4 bytes per pair and mode, for topk 5. COCO's 5,000 x 25,014 pairs are 0.5 GB a mode.

    Args:
      model: a module with `encode_image`, `encode_text`, `score` and, for topk and global, `global_score`.
      data: what to rank.
      preprocess: the set's images (B, H, W, 3) -> the model's input; runs inside jit.
      modes: some of `MODES`, of which a model without text-conditioned pooling has "global" alone; None: all.
      topk: texts that each image keeps; more than there are means all.
      pooling: some of `POOLINGS`, of the scores of a text's rows; one row a text needs none.
      label: of what is done with the texts, a part of the modes' names.
      text_tower: what encodes the texts instead of `model`, such as one with longer position embeddings: a model that
        differs in its text tower alone, and a function from parameters of `model` to its own.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown mode or pooling, or a size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data: RetrievalSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        modes: Sequence[str] | None = None,
        topk: int = 128,
        pooling: Sequence[str] = ("mean", "max"),
        label: str = "",
        text_tower: tuple[nn.Module, Callable[[Any], Any]] | None = None,
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        available = MODES if model.has_pooling else ("global",)
        if data.text_of_row is not None:
            available = tuple(mode for mode in available if mode != "topk")
        modes = available if modes is None else modes
        if unknown := set(modes) - set(available):
            raise ValueError(f"unknown retrieval modes {sorted(unknown)}; for this model and set there are {available}")
        if topk < 1:
            raise ValueError(f"topk is {topk}; expected at least 1")
        if unknown := set(pooling) - set(POOLINGS):
            raise ValueError(f"unknown pooling {sorted(unknown)}; there are {POOLINGS}")
        if data.text_of_row is not None and not pooling:
            raise ValueError(f"{data.name}: texts have several rows of tokens; pooling needs one of {POOLINGS}")
        self._model, self._data, self._preprocess = model, data, preprocess
        self._modes, self._pooling, self._label = tuple(modes), tuple(pooling), label
        self._topk = min(topk, len(data.tokens))
        sizes = dict(image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._encoder = self._text_encoder = Encoder(model, preprocess, **sizes)
        self._text_model, self._text_params = text_tower or (model, lambda params: params)
        if text_tower is not None:
            self._text_encoder = Encoder(self._text_model, preprocess, **sizes)
        self._score, self._global_score, self._select, self._rescore = _programs(
            model, self._encoder.whole, len(data.tokens), self._topk
        )
        self._ranks: dict[str, dict[str, Ranks]] = {}
        self._margins: tuple[np.ndarray, np.ndarray] | None = None

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict."""
        data = self._data
        tables, self._ranks = self.scores(params), {}
        for mode in list(tables):
            scores, valid = tables.pop(mode)  # each is large
            self._ranks[mode] = retrieval_ranks(scores, data.image_of_text, valid)
            if len(self._ranks) == 1:
                self._margins = _margins(scores, data.image_of_text)
            del scores, valid
            for metric, value in rank_metrics(self._ranks[mode]).items():
                yield Result("retrieval", data.name, metric, value, mode)
        if not self._label:
            for metric, value in retrieval_chance(len(data.images), data.image_of_text).items():
                yield Result("retrieval", data.name, metric, value, "chance")

    def scores(self, params: Any) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """The score matrix of every mode, float32 (I, N), and which pairs were scored, bool (I, N) or None for all."""
        images, texts = len(self._data.images), len(self._data.image_of_text)
        tables = {}
        for mode in self._modes:
            for name in self._names(mode):
                valid = np.zeros((images, texts), bool) if mode == "topk" else None
                tables[name] = np.full((images, texts), -np.inf, np.float32), valid
        for numbers, results in lookahead(self._batches(params)):
            for name, (blocks, columns) in results.items():
                table, valid = tables[name]
                values = np.concatenate([np.asarray(block) for block in blocks], axis=1)[: len(numbers)]
                if columns is None:
                    table[numbers] = values[:, :texts]
                else:
                    rows, columns = numbers[:, None], np.asarray(columns)[: len(numbers)]
                    table[rows, columns] = values
                    valid[rows, columns] = True
        return tables

    def figures(self, params: Any) -> Iterator[tuple[str, Image.Image]]:
        """Titles and pictures after `run`: recall against k, and the best and the worst answers of the first mode.

        Raises:
          RuntimeError: nothing was run.
        """
        from flair_jax.figures import retrieval as drawing  # matplotlib, for who wants pictures

        if self._margins is None:
            raise RuntimeError("figures show what run found: run first")
        data = self._data
        label = f"{self._label}: " if self._label else ""
        curves = {mode: {name: found.curve() for name, found in ranks.items()} for mode, ranks in self._ranks.items()}
        yield f"{label}recall", drawing.recall_curves(curves)
        mode, ranks = next(iter(self._ranks.items()))
        margin, rival = self._margins
        order = np.argsort(-margin, kind="stable")
        for kind, chosen in (("best", order), ("worst", order[::-1])):
            _, first = np.unique(data.image_of_text[chosen], return_index=True)  # each image once
            texts = chosen[np.sort(first)[:EXAMPLES]]
            rows = self._examples(params, texts, rival[texts], ranks["text_to_image"].rank[texts])
            yield f"{label}{kind} answers ({mode})", drawing.examples(rows)

    def _examples(self, params: Any, texts: np.ndarray, rivals: np.ndarray, ranks: np.ndarray) -> list[Any]:
        """Some texts with their own image and the best one of the others, with heat maps where the model has them."""
        from flair_jax import attention_maps  # it builds on this package
        from flair_jax.figures import retrieval as drawing

        data = self._data
        numbers, place = np.unique(np.stack([data.image_of_text[texts], rivals]), return_inverse=True)
        place = place.reshape(2, -1)  # of the own image and of the rival among the images
        pixels = np.stack([data.images[int(number)] for number in numbers])
        maps = None
        if self._model.has_pooling:
            tokens = data.tokens[texts if data.text_of_row is None else np.searchsorted(data.text_of_row, texts)]
            options = dict(preprocess=self._preprocess)
            maps = attention_maps.heat_maps(self._text_model, self._text_params(params), pixels, tokens, **options).maps
        rows = []
        for number, (text, rank) in enumerate(zip(texts, ranks, strict=True)):
            string = data.texts[text] if len(data.texts) else f"text {text}"
            own, rival = ((pixels[image], None if maps is None else maps[image, number]) for image in place[:, number])
            rows.append(drawing.Example(string, int(rank), own, rival))
        return rows

    def _names(self, mode: str) -> list[str]:
        """What the results of a mode are called, one for each pooling of rows."""
        poolings = ("",) if self._data.text_of_row is None else self._pooling
        return [" ".join(part for part in (mode, self._label, pooling) if part) for pooling in poolings]

    def _batches(self, params: Any) -> Iterator[tuple[np.ndarray, dict[str, tuple[list[jax.Array], Any]]]]:
        """Starts the work on each batch of images: their numbers, and by mode the score blocks with their columns."""
        texts, modes = len(self._data.tokens), self._modes
        text = self._text_encoder.texts(self._text_encoder.place(self._text_params(params)), self._data.tokens)
        params = self._encoder.place(params)
        rows = self._encoder.text_rows(texts)
        blocks = self._encoder.blocks(text)
        finish = self._pooled()
        patches = "flair" in modes or "topk" in modes
        for images, image in self._encoder.images(params, self._data.images, local=patches):
            results = {}
            if "flair" in modes:
                results |= finish("flair", [self._score(params, image, block) for block in blocks])
            if "global" in modes or "topk" in modes:
                coarse = [self._global_score(params, image, block) for block in blocks]
            if "global" in modes:
                results |= finish("global", coarse)
            if "topk" in modes:
                best, columns = self._select(coarse)
                parts = [slice(start, start + rows) for start in range(0, self._topk, rows)]
                fine = [self._rescore(params, image, text, best[:, part], columns[:, part]) for part in parts]
                results[self._names("topk")[0]] = fine, columns
            yield images, results

    def _pooled(self) -> Callable[[str, list[jax.Array]], dict[str, tuple[list[jax.Array], None]]]:
        """A mode and its score blocks of rows -> by name, those of texts."""
        owners = self._data.text_of_row
        if owners is None:
            return lambda mode, blocks: {self._names(mode)[0]: (blocks, None)}
        count = np.bincount(owners)
        first, most = np.cumsum(count) - count, int(count.max())
        pool = _jit_pool(self._encoder.whole, self._pooling)

        def finish(mode, blocks):
            pooled = pool(blocks, first, count, most)
            named = zip(self._names(mode), self._pooling, strict=True)
            return {name: ([pooled[pooling]], None) for name, pooling in named}

        return finish


def _margins(scores: np.ndarray, image_of_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much each text's own image is ahead of the best one of the others, float (N,), and which that is, (N,).

    Own scores in the table are overwritten.
    """
    texts = np.arange(len(image_of_text))
    own = scores[image_of_text, texts]
    scores[image_of_text, texts] = -np.inf
    rival = scores.argmax(0)
    best = scores[rival, texts]
    return np.where(np.isfinite(own) & np.isfinite(best), own - np.where(np.isfinite(best), best, 0), -np.inf), rival
