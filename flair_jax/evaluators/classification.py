"""Zero-shot classification: prompts stand for the classes, and an image gets the class that scores best.

FLAIR's code for it was never released, nor whether it averages prompts before or after the pooling (`spec/flair.md`
3.6): both are modes. GRAIN's code compares regions of the image with descriptions of the classes, too (`spec/grain.md`
5.2). The metrics are those of CLIP's and CLIP_benchmark's tables.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from flair_jax.evaluators.features import EmptySet, Encoder, check_texts, lookahead
from flair_jax.models.layers import normalize
from flair_jax.report import Result

# And what each asks the model for.
MODES = {"flair_before": "score", "flair_after": "score", "global": "global_score", "regions": "region_score"}
AFTER_PAIRS = 2**30  # more pairs of an image and a prompt than these are pooled only when asked for
TIES = {"wrong": "the true class comes last", "first": "the class with the lower number comes first"}


@dataclasses.dataclass(frozen=True)
class ClassificationSet:
    """Images with a class or several, and the prompts that stand for the classes.

    Attributes:
      name: stands in the names of the metrics.
      classes: C names.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      labels: int (I,), the class of each image; or bool (I, C), several classes each.
      tokens: int32 (P, T), padded prompts.
      class_of_prompt: int (P,), every class at least once.
      counted: of several classes, bool (I, C), which images count for a class; None: all of them.
      descriptions: int32 (M, T), padded texts that describe a class without its name, for the regions of an image; a
        class may have none. None: no class is described.
      class_of_description: int (M,); None as `descriptions` is.

    Raises:
      ValueError: the parts do not fit together. EmptySet: no image has a class.
    """

    name: str
    classes: Sequence[str]
    images: Sequence[np.ndarray]
    labels: np.ndarray
    tokens: np.ndarray
    class_of_prompt: np.ndarray
    counted: np.ndarray | None = None
    descriptions: np.ndarray | None = None
    class_of_description: np.ndarray | None = None

    def __post_init__(self):
        images, classes, labels = len(self.images), len(self.classes), self.labels
        single = labels.shape == (images,) and np.issubdtype(labels.dtype, np.integer)
        several = labels.shape == (images, classes) and labels.dtype == bool
        if not images or not (single or several):
            raise ValueError(
                f"{self.name}: labels {labels.dtype} {labels.shape} of {images} images and {classes} classes; expected "
                f"integers ({images},) or bool ({images}, {classes}), and at least one image"
            )
        if single and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"{self.name}: labels run from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}"
            )
        counted = self.counted
        if counted is not None and not (several and counted.shape == labels.shape and counted.dtype == bool):
            raise ValueError(f"{self.name}: counted {counted.dtype} {counted.shape}; expected bool, as the labels")
        if several and not present_classes(labels, classes, counted).any():
            raise EmptySet(f"{self.name}: no image has a class")
        check_texts(self.name, self.tokens, self.class_of_prompt, classes)
        if missing := set(range(classes)) - set(self.class_of_prompt.tolist()):
            raise ValueError(f"{self.name}: no prompt for the classes {[self.classes[c] for c in sorted(missing)][:5]}")
        if self.descriptions is not None:
            check_texts(self.name, self.descriptions, self.class_of_description, classes)
            if self.descriptions.shape[1] != self.tokens.shape[1]:
                raise ValueError(f"{self.name}: descriptions {self.descriptions.shape}, prompts {self.tokens.shape}")

    @property
    def undescribed(self) -> np.ndarray:
        """The classes without a description, int, in ascending order."""
        described = [] if self.descriptions is None else self.class_of_description
        return np.setdiff1d(np.arange(len(self.classes)), described)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def ranks(scores: np.ndarray, labels: np.ndarray, ties: str = "wrong") -> np.ndarray:
    """The rank of each image's class, from 1: scores (I, C), labels int (I,) -> int (I,).

    Args:
      ties: who wins among equal scores. "wrong": the other classes. "first": the class with the lower number, as where
        an argmax is taken (CLIP_benchmark).
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ahead = (scores > own).sum(1)
    tied = scores == own
    if ties == "first":
        return 1 + ahead + (tied & (np.arange(scores.shape[1]) < labels[:, None])).sum(1)
    return ahead + tied.sum(1)


def precision_recall(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall when everything down to a score is claimed, for each different score, the best one first.

    Args:
      scores: (I,).
      positive: bool (I,), at least one.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of the images that share a score
    hits = np.cumsum(positive[order])[last]
    return hits / (np.flatnonzero(last) + 1), hits / positive.sum()


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall steps, without interpolation; equal scores count together, as in scikit-learn."""
    precision, recall = precision_recall(scores, positive)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def voc_11_point(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean of the best precision at a recall of at least 0, 0.1, …, 1 (PASCAL VOC 2007)."""
    precision, recall = precision_recall(scores, positive)
    hits = np.rint(recall * positive.sum())
    return float(np.mean([precision[10 * hits >= tenth * positive.sum()].max() for tenth in range(11)]))


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, a tie counting half; needs one of each."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, of equal scores their mean
    positives, negatives = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def present_classes(labels: np.ndarray, classes: int, counted: np.ndarray | None = None) -> np.ndarray:
    """Which classes have an image that counts, bool (C,)."""
    if labels.ndim == 2:
        return (labels if counted is None else labels & counted).any(0)
    return np.bincount(labels, minlength=classes) > 0


def classification_chance(labels: np.ndarray, classes: int, counted: np.ndarray | None = None) -> dict[str, float]:
    """What a random guess is expected to get in each metric that the labels allow, whose names these are.

    One class per image: `acc1`, `acc5` (at least 5 classes), `mean_per_class`, `roc_auc` (2 classes, each with images).
    Several: `average_precision`, and `voc_11_point_map`, for which it is the same number and a little too low.

    In a random order of N images, n of them positive, the first k hold (k - 1) (n - 1) / (N - 1) other positives if
    number k is one. So the average precision is the mean over k of (1 + (k - 1) (n - 1) / (N - 1)) / k, which is above
    n / N where images are few.
    """
    present = present_classes(labels, classes, counted)
    if labels.ndim == 2:
        counted = np.ones_like(labels) if counted is None else counted
        images, positives = counted.sum(0)[present], (labels & counted).sum(0)[present]
        harmonic = np.cumsum(1 / np.arange(1, len(labels) + 1))[images - 1] / images
        expected = harmonic + (positives - 1) / np.maximum(images - 1, 1) * (1 - harmonic)
        return dict.fromkeys(("average_precision", "voc_11_point_map"), float(expected.mean()))
    chance = {"acc1": 1 / classes}
    if classes >= 5:
        chance["acc5"] = 5 / classes
    chance["mean_per_class"] = 1 / classes
    if classes == 2 and present.all():
        chance["roc_auc"] = 0.5
    return chance


def classification_metrics(
    scores: np.ndarray, labels: np.ndarray, ties: str = "wrong", counted: np.ndarray | None = None
) -> dict[str, float]:
    """The metrics of `classification_chance`, fractions, from scores (I, C).

    acc1, acc5: images whose class is among the first k of the ranking, see `ranks`.
    mean_per_class: mean over the classes of the share of their images with rank 1.
    average_precision, voc_11_point_map: mean over the classes, of each among its `counted` images.
    roc_auc: of class 1, by the difference of the scores.
    Classes without an image are in no mean, but can be guessed.

    Raises:
      ValueError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        image = np.flatnonzero(~np.isfinite(scores).all(1))[0]
        raise ValueError(f"scores of image {image} are not finite: the weights or the image are broken")
    names = classification_chance(labels, scores.shape[1], counted).keys()
    present = np.flatnonzero(present_classes(labels, scores.shape[1], counted))
    if labels.ndim == 2:
        columns = [_column(scores, labels, counted, c) for c in present]
        return {
            "average_precision": float(np.mean([average_precision(*column) for column in columns])),
            "voc_11_point_map": float(np.mean([voc_11_point(*column) for column in columns])),
        }
    rank = ranks(scores, labels, ties)
    images = np.bincount(labels, minlength=scores.shape[1])
    hits = np.bincount(labels, weights=rank == 1, minlength=scores.shape[1])
    metrics = {"acc1": float(np.mean(rank == 1)), "acc5": float(np.mean(rank <= 5))}
    metrics["mean_per_class"] = float(np.mean(hits[present] / images[present]))
    if "roc_auc" in names:
        difference = scores[:, 1].astype(np.float64) - scores[:, 0]
        metrics["roc_auc"] = roc_auc(difference, labels == 1)
    return {name: metrics[name] for name in names}


def _column(
    scores: np.ndarray, labels: np.ndarray, counted: np.ndarray | None, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a class, and which of them are of its images, for the images that count."""
    rows = slice(None) if counted is None else counted[:, number]
    return scores[rows, number], labels[rows, number]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluator


class _TextsOfClasses(NamedTuple):
    """Several texts of each class, each different text once.

    `tokens`: (N, T), different texts. `number`: (P,), the class's texts among them, class by class. `starts`: (C,) of
    each class in `number`. `count`: (C,), at least 1.
    """

    tokens: np.ndarray
    number: np.ndarray
    starts: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, owner: np.ndarray) -> Self:
        """Texts (P, T) and the class of each, (P,); every class has one."""
        different, number = np.unique(tokens, axis=0, return_inverse=True)
        number, count = number.reshape(-1), np.bincount(owner)
        return cls(different, number[np.lexsort((number, owner))], np.cumsum(count) - count, count)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Over the texts of each class: (…, P) -> float64 (…, C)."""
        return np.add.reduceat(values, self.starts, axis=-1, dtype=np.float64) / self.count

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Over the texts of each class: (…, P) -> (…, C)."""
        return np.maximum.reduceat(values, self.starts, axis=-1)


class Classification:
    """Yields `classification/<set>/<mode>/<metric>`, the main metric first, and `classification/<set>/chance` of it.

    Where some classes have no image, as in a part of a set, also `classification/<set>/classes_without_images`.

    The score of an image and a class by mode; `model.score` and `model.global_score` are scaled cosines:
      flair_before: prompts are averaged before the pooling. The mean of the class's prompt vectors at unit length, at
        unit length again, is the query that the image is pooled for, and what it is compared with: `model.score`.
      flair_after: prompts are averaged after it. The image is pooled for each prompt and compared with it, and the
        class has the mean of its prompts' `model.score`.
      global: `model.global_score` of the vector of flair_before, as CLIP.
      regions: alpha * global + (1 - alpha) * the regions' score: for each region query of the image the best
        `model.region_score` among the class's descriptions, and of these the mean over all queries (GRAIN). A class
        without descriptions is compared by its prompts.
    Means are taken in float64, and of equal prompts one is scored: classes with the same prompts tie to the bit.

    Images are encoded once for all modes, in batches. The device holds the features of two of them, all prompts' pooled
    features, and scores of `image_batch` x `text_batch` pairs at a time; the host 4 bytes per image, class and mode.
    Pooling per prompt costs ViT-B/16 about 1 MFLOP a pair: for ImageNet's 80,000 prompts twice what the image tower
    needs, 4e9 pairs in all.

    Attributes:
      notes: texts for the report, such as the rule for ties.

    Args:
      model: a module with `encode_image`, `encode_text`, `score` and `global_score`; with `has_regions` `region_score`.
      data: what to classify.
      preprocess: the set's images (B, H, W, 3) -> the model's input; runs inside jit.
      modes: some of `MODES`. The first two need text-conditioned pooling, "regions" a query decoder and a set with
        descriptions. None: all that there are, but flair_after only up to `AFTER_PAIRS` pairs of an image and a prompt.
      alpha: of mode "regions", from 0, regions alone, to 1, global alone.
      renormalize: whether the mean of a class's prompt vectors is brought to unit length. False, as in GRAIN's code:
        scores of flair_before and global, and global's part in regions, are multiplied by the length of the mean, which
        is smaller the more the prompts of a class differ.
      metric: the main metric, one of those of `classification_chance`; None: the first of them.
      ties: see `ranks`.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown mode, metric or rule for ties, or an alpha that is no share.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClassificationSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        modes: Sequence[str] | None = None,
        alpha: float = 0.5,
        renormalize: bool = True,
        metric: str | None = None,
        ties: str = "wrong",
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        self._data, self.notes = data, []
        there = dict.fromkeys(MODES, model.has_pooling)
        there |= {"global": True, "regions": model.has_regions and data.descriptions is not None}
        available = tuple(mode for mode in MODES if there[mode])
        if modes is None:
            modes, pairs = available, len(data.images) * len(data.tokens)
            if "flair_after" in modes and pairs > AFTER_PAIRS:
                modes = tuple(mode for mode in modes if mode != "flair_after")
                self._note(
                    f"Mode flair_after is left out: it would pool {pairs:.1e} pairs of an image and a prompt. "
                    "Named in modes it runs all the same."
                )
        if not modes or set(modes) - set(available):
            needs = ""
            if "regions" in modes:
                needs = "; regions need a model with a query decoder, and descriptions of the classes"
            raise ValueError(f"classification modes are {tuple(modes)}; expected one or more of {available}{needs}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"classification/{data.name}: alpha is {alpha}; expected a share, 0 to 1")
        if ties not in TIES:
            raise ValueError(f"classification/{data.name}: ties {ties!r}; expected one of {TIES}")
        self._chance = classification_chance(data.labels, len(data.classes), data.counted)
        first = next(iter(self._chance))
        metric = first if metric is None else metric
        two = data.labels.ndim == 1 and len(data.classes) == 2
        if metric == "roc_auc" and two and metric not in self._chance:
            self._note(f"One of the two classes has no image, so that {metric} is not defined.")
            metric = first
        if metric not in self._chance:
            raise ValueError(f"classification/{data.name}: metric {metric!r}; its labels allow {tuple(self._chance)}")
        self._prompts = _TextsOfClasses.of(data.tokens, data.class_of_prompt)
        # Classes with the same prompts are scored once, so that they tie whatever the order in which devices add.
        own = np.split(self._prompts.number, self._prompts.starts[1:])
        known: dict[bytes, int] = {}
        self._number = np.array([known.setdefault(part.tobytes(), len(known)) for part in own])  # (C,)
        self._first = np.unique(self._number, return_index=True)[1]  # the classes that are scored
        if alike := [data.classes[c] for c in np.setdiff1d(np.arange(len(own)), self._first)]:
            self._note(f"Classes with the same prompts as another one, with which they tie: {', '.join(alike)}.")
        if data.labels.ndim == 1:
            self.notes.append(f"Among equal scores {TIES[ties]}.")
        self._descriptions = None
        if data.descriptions is not None:
            self._describe(modes, alpha)
        if not renormalize:
            self.notes.append("Means of a class's prompt vectors keep their length.")
        self._modes, self._metric, self._ties = tuple(modes), metric, ties
        self._alpha, self._renormalize = alpha, renormalize
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._kept: dict[str, np.ndarray] = {}

    def _note(self, text: str) -> None:
        logging.warning("classification/%s: %s", self._data.name, text)
        self.notes.append(text)

    def _describe(self, modes: Sequence[str], alpha: float) -> None:
        """Gathers what regions are compared with, and notes which classes are not described."""
        data, undescribed = self._data, self._data.undescribed
        if len(undescribed):
            names = ", ".join(data.classes[c] for c in undescribed[:5]) + (", …" if len(undescribed) > 5 else "")
            self._note(
                f"{len(undescribed)} of {len(data.classes)} classes have no description, and are compared by their "
                f"names in the templates alone: {names}."
            )
        if "regions" in modes:
            instead = np.isin(data.class_of_prompt, undescribed)
            self._descriptions = _TextsOfClasses.of(
                np.concatenate([data.descriptions, data.tokens[instead]]),
                np.concatenate([data.class_of_description, data.class_of_prompt[instead]]),
            )
            self.notes.append(f"Mode regions: {alpha:g} * global + {1 - alpha:g} * the score of the regions.")

    def scores(self, params: Any) -> dict[str, np.ndarray]:
        """The score matrix of every mode, float32 (I, C)."""
        encoder, images = self._encoder, self._data.images
        params = encoder.place(params)
        prompts = encoder.texts(params, self._prompts.tokens)
        unit = np.asarray(normalize(np.asarray(prompts.pooled)))[self._prompts.number]  # (P, D)
        means = self._prompts.means(unit.T).T  # (C, D)
        vectors = prompts.replace(pooled=jax.device_put(np.asarray(normalize(means))[self._first], encoder.whole))
        lengths = np.ones(len(means)) if self._renormalize else np.linalg.norm(means[self._first], axis=1)[self._number]
        texts = dict.fromkeys(self._modes, vectors)
        if "flair_after" in texts:
            texts["flair_after"] = prompts
        if "regions" in texts:
            texts |= {"global": vectors, "regions": encoder.texts(params, self._descriptions.tokens)}
        blocks_of = {mode: encoder.blocks(text) for mode, text in texts.items()}
        local = any(mode.startswith("flair") for mode in texts)

        def batches():
            for numbers, image in encoder.images(params, images, local=local):
                started = {
                    mode: [encoder.apply(MODES[mode], params, image, block) for block in blocks]
                    for mode, blocks in blocks_of.items()
                }
                yield numbers, started

        tables = {mode: np.empty((len(images), len(means)), np.float32) for mode in texts}
        for numbers, started in lookahead(batches()):
            for mode, blocks in started.items():
                found = np.concatenate([np.asarray(block) for block in blocks], axis=-1)[: len(numbers)]
                if found.dtype != np.float32:  # bfloat16 has about 3 digits: many of the best classes would be ties
                    raise TypeError(f"the model's {MODES[mode]} gives {found.dtype}; expected float32")
                if mode == "flair_after":
                    tables[mode][numbers] = self._prompts.means(found[:, self._prompts.number])
                elif mode == "regions":  # (n, Q, M)
                    best = self._descriptions.largest(found[..., self._descriptions.number])
                    tables[mode][numbers] = best.mean(axis=1, dtype=np.float64)
                else:
                    tables[mode][numbers] = lengths * found[:, self._number]
        if "regions" in tables:
            tables["regions"] = self._alpha * tables["global"] + (1 - self._alpha) * tables["regions"]
        return {mode: tables[mode] for mode in self._modes}

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          ValueError: a score is not finite.
        """
        data = self._data
        for mode, scores in self.scores(params).items():
            metrics = classification_metrics(scores, data.labels, self._ties, data.counted)
            for metric in sorted(metrics, key=lambda metric: metric != self._metric):
                yield Result("classification", data.name, metric, metrics[metric], mode)
            if mode == self._modes[0]:
                self._kept = _summary(scores, data.labels, data.counted)
        yield Result("classification", data.name, "chance", self._chance[self._metric])
        if missing := int((~present_classes(data.labels, len(data.classes), data.counted)).sum()):
            yield Result("classification", data.name, "classes_without_images", float(missing))

    def figures(self, params: Any) -> Iterator[tuple[str, Image.Image]]:
        """After `run`: titles and pictures of the first mode. Errors made most often, or the average precision of each
        class where images have several; and images that are right and wrong with a wide margin.
        """
        from flair_jax.figures import classification as figures  # matplotlib is slow to import, and needed only here

        del params
        data, kept, mode = self._data, self._kept, self._modes[0]
        if data.labels.ndim == 2:
            yield f"average precision by class ({mode})", figures.bars(data.classes, kept["precision"])
        else:
            yield (
                f"classes most often confused ({mode})",
                figures.confusion(data.classes, data.labels, kept["best"][:, 0]),
            )
        if np.isfinite(kept["margin"]).any():
            scored = kept["best"], kept["best_scores"], kept["margin"]
            yield (
                f"right and wrong images ({mode})",
                figures.examples(data.images, data.labels, data.classes, *scored),
            )


def _summary(scores: np.ndarray, labels: np.ndarray, counted: np.ndarray | None) -> Mapping[str, np.ndarray]:
    """What figures need of a score matrix: the three best classes of each image with their scores, (I, 3) each; by how
    much its best true class leads over all others, (I,); with several labels the average precision of each class, NaN
    where there is none, (C,).
    """
    truth = labels if labels.ndim == 2 else labels[:, None] == np.arange(scores.shape[1])
    best, others = np.empty((len(scores), min(3, scores.shape[1])), int), scores.copy()
    for column in best.T:  # of equal scores the first
        column[:] = others.argmax(1)
        others[np.arange(len(scores)), column] = -np.inf
    lead = np.where(truth, scores, -np.inf).max(1) - np.where(truth, -np.inf, scores).max(1)
    kept = {"best": best, "best_scores": np.take_along_axis(scores, best, axis=1), "margin": lead}
    if labels.ndim == 2:
        columns = [_column(scores, labels, counted, c) for c in range(scores.shape[1])]
        kept["precision"] = np.array([average_precision(s, t) if t.any() else np.nan for s, t in columns])
    return kept
