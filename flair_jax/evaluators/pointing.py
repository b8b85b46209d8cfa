"""Pointing game: does the attention of a phrase peak inside the box of what it names (Zhang et al., ECCV 2016)?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from flair_jax.evaluators.features import Encoder, call, check_texts, lookahead, patch_grid
from flair_jax.models.layers import normalize
from flair_jax.report import Result

MODES = ("attention", "projected")
EXAMPLES = 8  # phrases in a picture


@dataclasses.dataclass(frozen=True)
class PointingSet:
    """Phrases, each with the boxes of what it names in its image.

    Attributes:
      name: stands in the names of the metrics.
      images: arrays (H, W, 3) of one size, by index; loaded when asked for.
      tokens: int32 (N, T), padded phrases.
      image_of_text: int (N,), the number of each phrase's image.
      boxes: N float arrays (M, 4), or (4,) for a single one: x0, y0, x1, y1 in pixels of `images`; x1 and y1 are
        outside. A hit in any of them counts.
      objects: int (N,), how many objects the phrase's image has.
      texts: N strings, for pictures; may be empty.
      left_out: how many phrases the set had beside these, whose boxes are not in sight after the evaluation's crop.

    Raises:
      ValueError: the parts do not fit together.
    """

    name: str
    images: Sequence[np.ndarray]
    tokens: np.ndarray
    image_of_text: np.ndarray
    boxes: Sequence[np.ndarray]
    objects: np.ndarray
    texts: Sequence[str] = ()
    left_out: int = 0

    def __post_init__(self):
        check_texts(self.name, self.tokens, self.image_of_text, len(self.images))
        texts = len(self.tokens)
        if len(self.boxes) != texts or self.objects.shape != (texts,) or len(self.texts) not in (0, texts):
            raise ValueError(
                f"{self.name}: boxes of {len(self.boxes)} phrases, objects {self.objects.shape}, {len(self.texts)} "
                f"texts; expected {texts}, ({texts},) and {texts} for {texts} phrases"
            )
        for number, boxes in enumerate(self.boxes):
            boxes = np.asarray(boxes)
            if boxes.shape[-1:] != (4,) or boxes.ndim > 2 or not boxes.size:
                raise ValueError(f"{self.name}: boxes {boxes.shape} of phrase {number}; expected (M, 4), M > 0")
            if not (boxes[..., :2] < boxes[..., 2:]).all():
                raise ValueError(f"{self.name}: a box of phrase {number} is empty: {boxes.tolist()}")
        if self.objects.min() < 1:
            raise ValueError(f"{self.name}: an image has no object")


def patches_in_boxes(boxes: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Which patches have their centre in each box: (N, 4) pixels, (h, w) patches, (H, W) pixels -> bool (N, h * w)."""
    rows, columns = grid
    y = (np.arange(rows) + 0.5) * size[0] / rows
    x = (np.arange(columns) + 0.5) * size[1] / columns
    x0, y0, x1, y1 = (side[:, None] for side in boxes.T)
    inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]  # (N, h, w)
    return inside.reshape(len(boxes), -1)


def texts_by_image(images: int, image_of_text: np.ndarray) -> np.ndarray:
    """The texts of each image in their order, int (I, M) with M the largest number; -1 after an image's last."""
    order = np.argsort(image_of_text, kind="stable")
    count = np.bincount(image_of_text, minlength=images)
    place = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((images, count.max()), -1)
    table[image_of_text[order], place] = order
    return table


@functools.lru_cache(maxsize=8)
def _own_maps(model: nn.Module, mode: str, whole: NamedSharding) -> Callable:
    """Each image with texts of its own, numbers (B, M) among all texts -> heat over the patches (B, M, L)."""

    def maps(params, image, text, texts):
        def one(image, texts):
            own = jax.tree.map(lambda x: x[texts], text)
            if mode == "projected":
                return normalize(own.pooled) @ normalize(image.local).T
            weights, _ = call(model, "attention_maps", params, jax.tree.map(lambda x: x[None], image), own)
            return weights[0].mean(1)  # over the heads

        return jax.vmap(one)(image, texts)

    return jax.jit(maps, out_shardings=whole)


class Pointing:
    """Yields `pointing/<set>/<mode>/accuracy`, and `…/<set>/chance` and `…/<set>/chance_object`, fractions.

    A phrase is right when the centre of the patch with the largest heat lies in one of its boxes; where several patches
    have that heat, the share of them whose centres do counts, so that equal heat everywhere is chance. A phrase without
    any patch's centre in a box cannot be hit and counts as wrong.

    Modes, where the heat comes from:
      attention: the attention over the patches averaged over the heads, as FLAIR's own pictures show it, without the
        zero key: the question is where the text looks most, not whether it looks at all.
      projected: the cosine of each projected patch token with the text.

    `chance` is a random patch: the mean share of patch centres in the phrase's boxes. `chance_object` is a random
    object of the image: the mean of boxes / objects.

    Args:
      model: a module with `encode_image`, `encode_text` and, for attention, `attention_maps`.
      data: what to point at.
      preprocess: the set's images (B, H, W, 3) -> the model's input of the same height and width; runs inside jit.
      modes: some of `MODES`, of which a model without text-conditioned pooling has "projected" alone; None: all.
      image_batch, text_batch: sizes of batches. Results depend on neither, nor on the devices.
      mesh: see `features.Encoder`.

    Raises:
      ValueError: an unknown mode, or none.
    """

    def __init__(
        self,
        model: nn.Module,
        data: PointingSet,
        *,
        preprocess: Callable[[jax.Array], jax.Array],
        modes: Sequence[str] | None = None,
        image_batch: int = 64,
        text_batch: int = 512,
        mesh: Mesh | None = None,
    ):
        available = MODES if model.has_pooling else ("projected",)
        modes = available if modes is None else modes
        if not modes or set(modes) - set(available):
            raise ValueError(f"pointing modes are {tuple(modes)}; expected one or more of {available}")
        self._data, self._modes = data, tuple(modes)
        self._encoder = Encoder(model, preprocess, image_batch=image_batch, text_batch=text_batch, mesh=mesh)
        self._maps = {mode: _own_maps(model, mode, self._encoder.whole) for mode in self._modes}
        self._found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        left_out = self._data.left_out
        return [f"{left_out:,} phrases are left out: the crop cuts their boxes away."] if left_out else []

    def heat(self, params: Any) -> dict[str, np.ndarray]:
        """Heat of each phrase over the patches of its image, float32 (N, L), by mode."""
        params = self._encoder.place(params)
        table = texts_by_image(len(self._data.images), self._data.image_of_text)
        text = self._encoder.texts(params, self._data.tokens)

        def batches():
            for images, image in self._encoder.images(params, self._data.images):
                rows = jax.tree.leaves(image)[0].shape[0]
                texts = np.zeros((rows, table.shape[1]), np.int32)  # padding: any text
                texts[: len(images)] = np.maximum(table[images], 0)
                texts = self._encoder.split(texts)
                yield images, {mode: maps(params, image, text, texts) for mode, maps in self._maps.items()}

        found: dict[str, np.ndarray] = {}
        for images, results in lookahead(batches()):
            own = table[images]
            for mode, maps in results.items():
                maps = np.asarray(maps)[: len(images)]  # (n, M, L)
                heat = found.setdefault(mode, np.empty((len(self._data.tokens), maps.shape[-1]), np.float32))
                heat[own[own >= 0]] = maps[own >= 0]
        return found

    def run(self, params: Any) -> Iterator[Result]:
        """Evaluates parameters, a nested dict.

        Raises:
          ValueError: a heat is not finite.
        """
        data = self._data
        boxes = [np.reshape(own, (-1, 4)) for own in data.boxes]
        counts = np.array([len(own) for own in boxes])
        size = image_size(data.images)
        for mode, heat in self.heat(params).items():
            if not np.isfinite(heat).all():
                raise ValueError(f"pointing/{data.name}: {mode} is not finite: the weights or an image are broken")
            inside = patches_in_boxes(np.concatenate(boxes), patch_grid(*size, heat.shape[1]), size)
            inside = np.logical_or.reduceat(inside, np.cumsum(counts) - counts)  # (N, L), in any box of the phrase
            peak = heat == heat.max(1, keepdims=True)
            right = (inside & peak).sum(1) / peak.sum(1)  # (N,)
            self._found[mode] = heat, right >= 0.5
            yield Result("pointing", data.name, "accuracy", float(right.mean()), mode)
        yield Result("pointing", data.name, "chance", float(inside.mean()))
        yield Result("pointing", data.name, "chance_object", float(np.minimum(counts / data.objects, 1).mean()))

    def figures(self, params: Any) -> Iterator[tuple[str, Image.Image]]:
        """A picture per mode of what `run` found, with its title: heat, boxes and the peak of some phrases."""
        from flair_jax.figures import heat as heats
        from flair_jax.figures import pointing as drawing  # here, since it knows the features' module

        data = self._data
        for mode, (heat, hit) in self._found.items():
            # As many hits as misses, from all over the set.
            chosen = [spread(np.flatnonzero(hit == right), EXAMPLES // 2) for right in (True, False)]
            examples = [
                drawing.Example(
                    data.images[int(data.image_of_text[text])],
                    heat[text],
                    np.reshape(data.boxes[text], (-1, 4)),
                    bool(hit[text]),
                    data.texts[text] if len(data.texts) else "",
                )
                for text in np.concatenate(chosen)
            ]
            scale_of = {"attention": heats.attention_scale, "projected": heats.cosine_scale}[mode]
            yield f"hits and misses ({mode})", drawing.sheet(examples, scale_of)


def image_size(images: Sequence[np.ndarray]) -> tuple[int, int]:
    """Height and width of images of one size; a sequence that has a shape loads none."""
    shape = images.shape[1:] if hasattr(images, "shape") else np.shape(images[0])
    return shape[0], shape[1]


def spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of some numbers, evenly spread over them."""
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)]
