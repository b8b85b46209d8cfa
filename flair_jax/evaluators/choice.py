"""Choice among given images or texts: which caption fits the image, which image fits the caption?

The form of most benchmarks of compositional understanding: SugarCrepe, VALSE, Winoground and others. Each has its own
way to average over its parts, and some have their own rule for equal scores; `spec/fsc_clip.md` 6.1 and
`spec/evaluation.md` list them.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from flair_jax import boxes as geometry
from flair_jax.evaluators.features import BrokenImages, Encoder, call, lookahead
from flair_jax.evaluators.pointing import texts_by_image
from flair_jax.models.dual_encoder import ImageFeatures
from flair_jax.models.layers import normalize
from flair_jax.report import Result

MODES = {"flair": "score", "global": "global_score", "regions": "global_score"}  # and what each asks the model for
TIES = ("wrong", "first")
TEXTS_AT_ONCE = 32  # per image of a batch
LISTED = 60  # parts of one level that a report lists, at most; more are averaged only
LISTED_LEVELS = 2
WORST = 8  # wrong decisions in a picture


@dataclasses.dataclass(frozen=True)
class WholeImages:
    """The whole images of a set whose I images are boxes of them.

    Attributes:
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      whole_of_image: int (I,), in which of them each image of the set lies.
      boxes: float (I, 4), where: left, top, right, bottom as shares of the whole image's width and height. Without
        area: the whole image does not show it.
    """

    images: Sequence[np.ndarray]
    whole_of_image: np.ndarray
    boxes: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChoiceSet:
    """Images, texts, and questions about some of them.

    Attributes:
      name: stands in the names of the metrics.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      tokens: int32 (N, T), padded texts.
      items: the questions, each with `images`, `texts`, `positives`, `group`, `place` and `joint` as
        `data.benchmarks.base.Item` describes them.
      texts: N strings, for pictures; may be empty.
      whole: where the images are boxes of other ones, these; else None.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    images: Sequence[np.ndarray]
    tokens: np.ndarray
    items: Sequence[Any]
    texts: Sequence[str] = ()
    whole: WholeImages | None = None

    def __post_init__(self):
        if not len(self.items):
            raise ValueError(f"{self.name}: no items")
        if self.tokens.ndim != 2 or len(self.texts) not in (0, len(self.tokens)):
            raise ValueError(f"{self.name}: tokens {self.tokens.shape}, {len(self.texts)} texts; expected (N, T) and N")
        for number, item in enumerate(self.items):
            answers = max(len(item.images), len(item.texts))
            one_to_many = min(len(item.images), len(item.texts)) == 1 and 1 <= item.positives < answers
            if not one_to_many and not len(item.images) == len(item.texts) == 2:
                raise ValueError(
                    f"{self.name}: item {number} has {len(item.images)} images, {len(item.texts)} texts and "
                    f"{item.positives} right ones; expected one and several, or two and two"
                )
            if not 0 <= item.place < answers:
                raise ValueError(f"{self.name}: item {number}: place {item.place} of {answers} answers")
            for kind, numbers, count in (
                ("image", item.images, len(self.images)),
                ("text", item.texts, len(self.tokens)),
            ):
                if min(numbers) < 0 or max(numbers) >= count:
                    raise ValueError(f"{self.name}: item {number} names {kind}s {numbers}; there are {count}")
        if (whole := self.whole) is not None:
            count = len(self.images)
            if whole.whole_of_image.shape != (count,) or whole.boxes.shape != (count, 4):
                raise ValueError(
                    f"{self.name}: whole images of {whole.whole_of_image.shape} images, boxes {whole.boxes.shape}; "
                    f"expected ({count},) and ({count}, 4)"
                )
            if whole.whole_of_image.min() < 0 or whole.whole_of_image.max() >= len(whole.images):
                raise ValueError(f"{self.name}: there are {len(whole.images)} whole images; one beyond them is named")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def right_answers(scores: np.ndarray, positives: int = 1, place: Any = 0, ties: str = "wrong") -> dict[str, np.ndarray]:
    """Which items of one shape are right, by metric.

    Args:
      scores: float (Q, I, T), images by texts of each item, the right ones first.
      positives, place: as in `Item`; `place` a number or int (Q,).
      ties: "wrong": the right answer's score must be larger than all others, `>`. "first": of equal scores the one
        that the release lists first wins, as in argmax; with several right answers a tie is wrong all the same, and
        so it is between two images and two texts.

    Returns:
      bool (Q,) of "image_to_text", or of "text_to_image", or of "text_score", "image_score" and "group_score".
    """
    _, images, texts = scores.shape
    if images == texts == 2:
        text = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
        image = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
        return {"text_score": text, "image_score": image, "group_score": text & image}
    answers = scores.reshape(len(scores), -1)
    right, wrong = answers[:, :positives].min(1, keepdims=True), answers[:, positives:]
    beaten = right > wrong
    if ties == "first" and positives == 1:
        after = np.arange(wrong.shape[1]) >= np.reshape(place, (-1, 1))
        beaten |= (right == wrong) & after
    return {"image_to_text" if images == 1 else "text_to_image": beaten.all(1)}


def chances(images: int, texts: int, positives: int = 1) -> dict[str, float]:
    """How often random scores without ties are right, by metric: all p right answers come first of n in one of C(n, p)
    orders."""
    if images == texts == 2:
        return {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
    return {"image_to_text" if images == 1 else "text_to_image": 1 / math.comb(max(images, texts), positives)}


def text_answers(features: np.ndarray, positives: int) -> np.ndarray:
    """Whether right texts are closer to each other than to any wrong one (SugarCrepe++'s text-only task), bool (Q,).

    Args:
      features: unit vectors (Q, T, D) of each item's texts, the `positives` right ones first.
    """
    cosine = np.einsum("qid,qjd->qij", features[:, :positives], features)
    first, second = np.triu_indices(positives, 1)
    return cosine[:, first, second].min(1) > cosine[:, :, positives:].max((1, 2))


def text_chance(texts: int, positives: int) -> float:
    """How often random similarities are right: pairs of right texts before pairs of a right and a wrong one."""
    within, across = math.comb(positives, 2), positives * (texts - positives)
    return 1 / math.comb(within + across, within)


def average(values: np.ndarray, groups: Sequence[str], levels: int | None = None) -> dict[str, float]:
    """The mean over items for each part of a set, and for the whole, whose name is "".

    Args:
      values: (Q,) of the items.
      groups: Q paths such as "add/add_obj".
      levels: down to this level a part's value is the mean of its own parts' values, each with the same weight; below,
        all items have the same weight. None: at all levels; 0: the plain mean of all items.

    Returns:
      Values by path, the whole first, each part before its own parts.
    """
    names, inverse = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    leaves = [tuple(filter(None, name.split("/"))) for name in names]
    counts = np.bincount(inverse)
    sums = np.bincount(inverse, weights=values)
    found: dict[str, float] = {}

    def visit(path: tuple[str, ...], members: list[int]) -> float:
        name, depth = "/".join(path), len(path)
        found[name] = float(sums[members].sum() / counts[members].sum())
        parts: dict[str, list[int]] = {}
        for member in members:
            parts.setdefault("".join(leaves[member][depth : depth + 1]), []).append(member)
        if set(parts) != {""}:
            below = [visit((*path, part), own) if part else found[name] for part, own in parts.items()]
            if "" in parts:
                raise ValueError(f"items of group {name!r} beside items of its parts {sorted(set(parts) - {''})}")
            if levels is None or depth < levels:
                found[name] = float(np.mean(below))
        return found[name]

    visit((), list(range(len(leaves))))
    return found


@functools.lru_cache(maxsize=8)
def _own_scores(model: nn.Module, method: str, whole: NamedSharding) -> Callable:
    """Each image with texts of its own, numbers (B, M) among all texts -> scores (B, M)."""

    def scores(params, image, text, texts):
        def one(image, texts):
            image, own = jax.tree.map(lambda x: x[None], image), jax.tree.map(lambda x: x[texts], text)
            return call(model, method, params, image, own)[0]

        return jax.vmap(one)(image, texts)

    return jax.jit(scores, out_shardings=whole)


class Choice:
    """Yields for each mode `choice/<set>/<mode>/accuracy`, and `…/accuracy/<part>` for the parts of the set.

    Of items with two images and two texts `text_score`, `image_score` and `group_score` take the place of `accuracy`
    (Thrush et al., CVPR 2022; COLA's multi-object accuracy is the image score). If a set asks in both directions,
    `accuracy` is the mean of `image_to_text_accuracy` and `text_to_image_accuracy`, which are given too. For items that
    are counted together there is `<kind>_accuracy`. Mode "chance" is what random scores get.

    Only the pairs that items ask for are scored. Equal scores are wrong answers, unless `ties` says otherwise: a model
    that scores everything alike gets 0.

    Modes:
      flair: `model.score`, text-conditioned.
      global: `model.global_score`, as CLIP, which all published numbers of such sets are.
      regions: for sets with whole images, and models with a query decoder. The model sees the whole image, and the
        region query whose box has the largest IoU with the item's box stands for the item's image in
        `model.global_score`. If none overlaps it, all scores are 0, a tie.

    Args:
      model: a module with `encode_image`, `encode_text`, `score` and `global_score`.
      data: images, texts and items.
      preprocess: the set's images (B, H, W, 3) -> the model's input; runs inside jit.
      modes: some of `MODES`; "flair" needs text-conditioned pooling. None: all that there are.
      levels: see `average`.
      ties: see `right_answers`.
      text_to_text: whether items with several right texts are also asked without the image, `text_to_text_accuracy`:
        right texts have to be closer to each other than to any wrong one, by the cosine of pooled features.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown mode or tie rule.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ChoiceSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        modes: Sequence[str] | None = None,
        levels: int | None = None,
        ties: str = "wrong",
        text_to_text: bool = False,
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        there = {"flair": model.has_pooling, "global": True, "regions": model.has_regions and data.whole is not None}
        available = tuple(mode for mode in MODES if there[mode])
        modes = available if modes is None else modes
        if not modes or set(modes) - set(available):
            raise ValueError(f"choice modes are {tuple(modes)}; expected one or more of {available}")
        if ties not in TIES:
            raise ValueError(f"ties is {ties!r}; expected one of {TIES}")
        self._data, self._modes, self._levels, self._ties = data, tuple(modes), levels, ties
        self._text_to_text = text_to_text
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._score = {mode: _own_scores(model, MODES[mode], self._encoder.whole) for mode in self._modes}
        self._without_region = 0
        self._results: list[Result] = []
        self._scores: dict[str, np.ndarray] = {}

        # Each asked pair once, in the order of the images.
        texts = len(data.tokens)
        asked = [image * texts + text for item in data.items for image in item.images for text in item.texts]
        pairs, inverse = np.unique(np.asarray(asked, np.int64), return_inverse=True)
        self._pair_image, self._pair_text = pairs // texts, (pairs % texts).astype(np.int32)
        ends = np.cumsum([len(item.images) * len(item.texts) for item in data.items])
        self._pairs_of_item = np.split(inverse.reshape(-1), ends[:-1])

    @property
    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        notes = ["A tie is wrong." if self._ties == "wrong" else "Of equal scores the first one listed wins."]
        if self._without_region:
            notes.append(
                f"Mode regions: no region overlaps {self._without_region} of {len(self._data.images)} boxes, whose "
                "scores are a tie."
            )
        return notes

    def scores(self, params: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The score of each asked pair, float32 (P,), by mode; and the texts' unit vectors (N, D) if those are needed.

        Raises:
          ValueError: a score is not finite.
        """
        params = self._encoder.place(params)
        text = self._encoder.texts(params, self._data.tokens)
        found = {}
        if modes := [mode for mode in self._modes if mode != "regions"]:
            images = self._encoder.images(params, self._data.images, local="flair" in modes)
            found |= self._score_pairs(params, text, modes, images)
        if "regions" in self._modes:
            found |= self._score_pairs(params, text, ["regions"], self._regions(params))
        for mode, values in found.items():
            if not np.isfinite(values).all():
                bad = self._pair_image[np.flatnonzero(~np.isfinite(values))[0]]
                raise ValueError(
                    f"choice/{self._data.name}: scores of image {bad} are not finite in mode {mode!r}: the weights or "
                    "the image are broken"
                )
        vectors = np.asarray(normalize(text.pooled.astype(np.float32))) if self._text_to_text else None
        return {mode: found[mode] for mode in self._modes}, vectors

    def _score_pairs(
        self, params: Any, text: Any, modes: Sequence[str], encoded: Iterable[tuple[np.ndarray, ImageFeatures]]
    ) -> dict[str, np.ndarray]:
        """The score of each asked pair by mode, from batches of images as `Encoder.images` gives them."""
        counts = np.bincount(self._pair_image, minlength=len(self._data.images))
        starts = np.cumsum(counts) - counts
        columns = min(TEXTS_AT_ONCE, int(counts.max()))

        def batches():
            for images, image in encoded:
                rows = jax.tree.leaves(image)[0].shape[0]
                owner = np.repeat(np.arange(len(images)), counts[images])
                table = texts_by_image(len(images), owner)  # (n, M), numbers among the batch's pairs
                pairs = np.concatenate(
                    [np.arange(starts[number], starts[number] + counts[number]) for number in images]
                )
                for start in range(0, table.shape[1], columns):
                    part = table[:, start : start + columns]
                    texts = np.zeros((rows, columns), np.int32)  # padding: any text
                    texts[: len(images), : part.shape[1]] = self._pair_text[pairs[part]]
                    texts = self._encoder.split(texts)
                    results = {mode: self._score[mode](params, image, text, texts) for mode in modes}
                    yield pairs[part[part >= 0]], part >= 0, results

        found = {mode: np.empty(len(self._pair_text), np.float32) for mode in modes}
        for pairs, valid, results in lookahead(batches()):
            for mode, values in results.items():
                found[mode][pairs] = np.asarray(values)[: valid.shape[0], : valid.shape[1]][valid]
        return found

    def _regions(self, params: Any) -> Iterator[tuple[np.ndarray, ImageFeatures]]:
        """As `Encoder.images` for the set's images, with the features of the regions that stand for them.

        Raises:
          BrokenImages: whole images could not be loaded; it names the set's images in them.
        """
        encoder, whole = self._encoder, self._data.whole
        count = len(self._data.images)
        vectors, overlaps = None, np.zeros(count, np.float32)
        try:
            for numbers, features in lookahead(encoder.images(params, whole.images, local=False)):
                features = encoder.take([features], np.arange(features.pooled.shape[0]))  # whole on this host
                regions, found = np.asarray(features.regions), np.asarray(features.boxes)
                vectors = np.zeros((count, regions.shape[-1]), regions.dtype) if vectors is None else vectors
                row_of = np.full(len(whole.images), -1)
                row_of[numbers] = np.arange(len(numbers))
                mine = np.flatnonzero(row_of[whole.whole_of_image] >= 0)
                rows = row_of[whole.whole_of_image[mine]]
                corners = geometry.corners(found[rows])  # (n, Q, 4)
                iou = np.asarray(geometry.overlap(whole.boxes[mine, None], corners, epsilon=0.0)[0])
                overlaps[mine] = iou.max(axis=1)
                vectors[mine] = regions[rows, iou.argmax(axis=1)]
        except BrokenImages as broken:
            of_whole = enumerate(whole.whole_of_image.tolist())
            raise BrokenImages({i: broken.reasons[one] for i, one in of_whole if one in broken.reasons}) from broken
        vectors[overlaps == 0] = 0
        self._without_region = int((overlaps == 0).sum())
        rows = encoder.text_rows(count)
        for start in range(0, count, rows):
            numbers = np.arange(start, min(start + rows, count))
            padded = np.concatenate(
                [vectors[numbers], np.zeros((rows - len(numbers), *vectors.shape[1:]), vectors.dtype)]
            )
            yield numbers, ImageFeatures(encoder.split(padded), local=None)

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          ValueError: a score is not finite.
        """
        self._scores, vectors = self.scores(params)
        self._results = []
        for mode in (*self._modes, "chance"):
            for metric, value in self._metrics(self._answers(self._scores.get(mode), vectors)).items():
                self._results.append(Result("choice", self._data.name, metric, value, mode))
        yield from self._results

    def _answers(self, scores: np.ndarray | None, vectors: np.ndarray | None) -> dict[str, np.ndarray]:
        """For each metric float (Q,): whether items are right, 0 or 1, and NaN where the metric is not asked.

        Without scores how often random ones are right.
        """
        items = self._data.items
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for number, item in enumerate(items):
            shapes.setdefault((len(item.images), len(item.texts), item.positives), []).append(number)
        found: dict[str, np.ndarray] = {}
        for (images, texts, positives), numbers in shapes.items():
            if scores is None:
                values = chances(images, texts, positives)
            else:
                pairs = np.stack([self._pairs_of_item[number] for number in numbers])
                place = np.array([items[number].place for number in numbers])
                values = right_answers(scores[pairs].reshape(-1, images, texts), positives, place, self._ties)
            if self._text_to_text and images == 1 and positives > 1:
                own = np.array([items[number].texts for number in numbers])
                values["text_to_text"] = (
                    text_chance(texts, positives) if scores is None else text_answers(vectors[own], positives)
                )
            for metric, value in values.items():
                found.setdefault(metric, np.full(len(items), np.nan))[numbers] = value
        return found

    def _metrics(self, answers: Mapping[str, np.ndarray]) -> dict[str, float]:
        """All results of a mode by name."""
        groups = np.array([item.group for item in self._data.items], dtype=object)
        directions = [metric for metric in ("image_to_text", "text_to_image") if metric in answers]
        means = {}
        for metric, values in answers.items():
            asked = ~np.isnan(values)
            name = "accuracy" if directions == [metric] else metric if "score" in metric else f"{metric}_accuracy"
            means[name] = average(values[asked], groups[asked], self._levels)
        if len(directions) == 2:
            both = [means[f"{direction}_accuracy"] for direction in directions]
            means = {
                "accuracy": {part: (both[0][part] + both[1][part]) / 2 for part in both[0] if part in both[1]},
                **means,
            }
        means |= self._joint(answers)
        listed = {name: parts[""] for name, parts in means.items()}
        for name, parts in means.items():
            levels = collections.Counter(part.count("/") for part in parts if part)
            shown = [level for level in range(LISTED_LEVELS) if levels[level] <= LISTED]
            listed |= {f"{name}/{part}": value for part, value in parts.items() if part and part.count("/") in shown}
        return listed

    def _joint(self, answers: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Of items that are counted together: how often all of them are right, by kind."""
        together: dict[str, dict[tuple[str, str], list[int]]] = {}
        for number, item in enumerate(self._data.items):
            for kind, name in item.joint:
                together.setdefault(kind, {}).setdefault((item.group, name), []).append(number)
        found = {}
        for kind, members in together.items():
            values = np.nansum(
                [values for metric, values in answers.items() if metric in ("image_to_text", "text_to_image")], axis=0
            )
            all_right = np.array([values[numbers].prod() for numbers in members.values()])
            found[f"{kind}_accuracy"] = average(all_right, [group for group, _ in members], self._levels)
        return found

    def figures(self, params: Any) -> Iterator[tuple[str, Image.Image]]:
        """Pictures of what `run` found, with their titles: accuracy by part, and the most confident wrong decisions."""
        from flair_jax.figures import choice as drawing  # matplotlib, for who wants pictures

        if not self._results:
            return
        yield "by part", drawing.bars(self._results)
        for mode, scores in self._scores.items():
            worst = self._worst(scores)
            if worst and len(self._data.texts):
                yield f"most confident wrong decisions ({mode})", drawing.sheet(worst)

    def _worst(self, scores: np.ndarray) -> list[Any]:
        """The wrong decisions with the largest margin of a wrong answer over a right one, `figures.choice.Decision`."""
        from flair_jax.figures import choice as drawing

        data, margins = self._data, np.empty(len(self._data.items))
        for number, (item, pairs) in enumerate(zip(data.items, self._pairs_of_item, strict=True)):
            values = scores[pairs].reshape(len(item.images), len(item.texts))
            if values.shape == (2, 2):
                margins[number] = max(values[0, 1], values[1, 0]) - min(values[0, 0], values[1, 1])
            else:
                values = values.reshape(-1)
                margins[number] = values[item.positives :].max() - values[: item.positives].min()
        worst = [int(number) for number in np.argsort(-margins, kind="stable")[:WORST] if margins[number] >= 0]
        return [
            drawing.Decision(
                [data.images[image] for image in data.items[number].images],
                [data.texts[text] for text in data.items[number].texts] if len(data.texts) else [],
                scores[self._pairs_of_item[number]].reshape(len(data.items[number].images), -1),
                data.items[number].positives,
                data.items[number].group,
            )
            for number in worst
        ]
