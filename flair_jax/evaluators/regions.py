"""Regions: are the boxes of a query decoder where things are, and do its regions say what they are?"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from flair_jax import boxes as geometry
from flair_jax.evaluators.features import Encoder
from flair_jax.evaluators.pointing import PointingSet, image_size, spread
from flair_jax.models.layers import normalize
from flair_jax.report import Result

TASK = "regions"
HIT = 0.5  # smallest IoU of a box that is found
RANKS = (1, 5)
EXAMPLES = 8  # images in a picture


@dataclasses.dataclass(frozen=True)
class Targets:
    """The different boxes of each image, and which texts name them.

    Attributes:
      corners: float32 (I, M, 4), left, top, right, bottom as shares of the image, M the most of an image.
      valid: bool (I, M).
      texts: for each image, for each of its boxes, the numbers of its texts among the different texts.
      of_image: for each image the numbers of its different texts.
      of_phrase: for each phrase which of its image's boxes are its own.
    """

    corners: np.ndarray
    valid: np.ndarray
    texts: list[list[list[int]]]
    of_image: list[list[int]]
    of_phrase: list[list[int]]

    @classmethod
    def of(cls, data: PointingSet, text: np.ndarray) -> "Targets":
        """Boxes that two phrases share are one target; `text` (N,) is the number of each phrase's text."""
        height, width = image_size(data.images)
        found: list[dict[tuple, list[int]]] = [{} for _ in range(len(data.images))]
        of_phrase = []
        for number, image, own in zip(text, data.image_of_text, data.boxes, strict=True):
            boxes = [tuple(np.float32(b).tolist()) for b in np.reshape(own, (-1, 4)) / (width, height, width, height)]
            for box in boxes:
                found[image].setdefault(box, []).append(int(number))
            of_phrase.append([list(found[image]).index(box) for box in boxes])
        most = max(map(len, found))
        corners, valid = np.zeros((len(found), most, 4), np.float32), np.zeros((len(found), most), bool)
        for image, own in enumerate(found):
            corners[image, : len(own)] = np.reshape(list(own), (-1, 4))
            valid[image, : len(own)] = True
        texts = [[sorted(set(numbers)) for numbers in own.values()] for own in found]
        of_image = [sorted({n for numbers in own for n in numbers}) for own in texts]
        return cls(corners, valid, texts, of_image, of_phrase)


@jax.jit
def _matched(found: jax.Array, corners: jax.Array, valid: jax.Array) -> tuple[jax.Array, ...]:
    """Query of each target and whether it has one, both (B, M), and the IoU of all queries and targets, (B, Q, M)."""
    query, matched = geometry.match_boxes(found, geometry.centres(corners), valid)
    iou, _ = geometry.overlap(geometry.corners(found)[:, :, None], corners[:, None], epsilon=1e-12)
    return query, matched, iou


class Regions:
    """Yields `regions/<set>/…` of a model whose image features have regions and boxes, fractions.

    Each box of an image is given a query of its own, as in training (`boxes.match_boxes`); where there are more boxes
    than queries, some are left over.

      box_recall: boxes whose query has a box with an IoU of at least 0.5; those that are left over are missed.
      mean_iou: of matched boxes.
      description_R@1: matched regions whose nearest of their image's texts, by cosine, names their box; where the image
        has one text only there is nothing to choose, and the region does not count. Chance is beside it.
      description_set_R@1, …R@5: the same among all different texts of the set.
      grounding: phrases whose nearest region has a box with an IoU of at least 0.5 with one of theirs; the true boxes
        only judge here. Chance, a random region, is beside it.

    Of equal cosines the wrong one counts as first.

    Args:
      model: a module with `encode_image` and `encode_text`, whose images have regions.
      data: phrases and boxes.
      preprocess: the set's images (B, H, W, 3) -> the model's input; runs inside jit.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: the model has no regions.
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
        if not model.has_regions:
            raise ValueError("an evaluation of regions needs a query decoder, and config.model.decoder is None")
        self._data = data
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._tokens, self._text = np.unique(data.tokens, axis=0, return_inverse=True)
        self._text = self._text.reshape(-1)
        self._targets = Targets.of(data, self._text)
        self._found: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # image -> boxes of its targets' queries, their IoU

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          ValueError: a box or a feature is not finite.
        """
        data, targets = self._data, self._targets
        params = self._encoder.place(params)
        text = np.asarray(normalize(self._encoder.texts(params, self._tokens).pooled))  # (U, D)
        phrases = [np.flatnonzero(data.image_of_text == image) for image in range(len(data.images))]
        hits, ious, within, ranks, grounded, chances = [], [], [], [], [], []
        for images, image in self._encoder.images(params, data.images, local=False):
            count = len(images)
            image = self._encoder.take([image], np.arange(image.pooled.shape[0]))  # whole on every process
            regions, boxes = np.asarray(normalize(image.regions))[:count], np.asarray(image.boxes)[:count]
            if not (np.isfinite(regions).all() and np.isfinite(boxes).all()):
                raise ValueError(f"regions/{data.name}: features are not finite: the weights or an image are broken")
            query, matched, iou = map(np.asarray, _matched(boxes, targets.corners[images], targets.valid[images]))
            for row, number in enumerate(images):
                own = np.flatnonzero(targets.valid[number])
                fits = iou[row, query[row], np.arange(iou.shape[2])]  # (M,) of each target with its query
                hits += (matched[row, own] & (fits[own] >= HIT)).tolist()
                ious += fits[own[matched[row, own]]].tolist()
                self._found[int(number)] = boxes[row, query[row, own]], np.where(matched[row, own], fits[own], np.nan)
                cosines = regions[row] @ text.T  # (Q, U)
                for target in own[matched[row, own]]:
                    right = targets.texts[number][target]
                    ranks.append(rank(cosines[query[row, target]], right))
                    if len(targets.of_image[number]) > len(right):
                        some = targets.of_image[number]
                        best = rank(cosines[query[row, target], some], [some.index(n) for n in right])
                        within.append((best == 0, len(right) / len(some)))
                for phrase in phrases[number]:
                    fit = iou[row][:, targets.of_phrase[phrase]].max(axis=1) >= HIT  # (Q,)
                    similarity = cosines[:, self._text[phrase]]
                    grounded.append(fit[similarity == similarity.max()].all())
                    chances.append(fit.mean())

        def result(metric, values, mode=""):
            return Result(TASK, data.name, metric, float(np.mean(values)) if len(values) else 0.0, mode)

        yield result("box_recall", hits)
        yield result("mean_iou", ious)
        if within:
            yield result("description_R@1", [hit for hit, _ in within])
            yield result("description_R@1", [chance for _, chance in within], "chance")
        for k in RANKS:
            yield result(f"description_set_R@{k}", np.array(ranks) < k)
        yield result("grounding", grounded)
        yield result("grounding", chances, "chance")

    def figures(self, params: Any) -> Iterator[tuple[str, Image.Image]]:
        """A picture of what `run` found, with its title: predicted boxes beside true ones."""
        from flair_jax.figures import regions as drawing  # here, since it knows attention maps, which know evaluators

        data, targets = self._data, self._targets
        named = {int(number): text for number, text in zip(self._text, data.texts, strict=False)}
        examples = []
        for number in spread(np.array(sorted(self._found)), EXAMPLES):
            boxes, iou = self._found[int(number)]
            names = [named.get(own[0], "") for own in targets.texts[number]]
            truth = targets.corners[number][targets.valid[number]]
            examples.append(
                drawing.Example(data.images[int(number)], truth, np.asarray(geometry.corners(boxes)), iou, names)
            )
        yield "predicted boxes beside true ones", drawing.sheet(examples)


def rank(similarity: np.ndarray, right: list[int]) -> int:
    """How many others are at least as similar as the best of the right ones."""
    best = similarity[right].max()
    others = np.delete(similarity, right)
    return int((others >= best).sum())
