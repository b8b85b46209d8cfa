"""What the page computes: uploaded files and typed lines -> numbers and pictures, or a message for the user."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flair_jax import predict, visualize
from flair_jax.data import scenes
from flair_jax.data.benchmarks import prompts
from flair_jax.data.transforms import images as image_rules
from flair_jax.figures import heat, page, segmentation
from flair_jax.inference import Pretrained
from flair_jax.pictures import Pictures, as_pictures
from flair_jax.search import Index

MAX_BYTES = 32 * 2**20  # of a picture's file
MAX_RATIO = 100  # of a picture's sides: resized to cover a model's square, a longer one has too many pixels
MAX_TEXTS, MAX_CLASSES = 12, 30
MAX_CHARACTERS = 2000  # of a text; the model's context ends before
SIDE, LEGEND_WIDTH = 448, 320  # pixels: width of a result's picture, and of what its colours stand for
SEGMENTED_SIDE = 1024  # pixels, the longer side of a picture that is segmented: scores of all classes lie in memory
HITS = 12
MEAN, PATCHES = "mean", "patches"  # views beside the numbers of heads


class Refused(ValueError):
    """What a user gave cannot be used. The message is for the user: what is wrong, and what to do."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of a result and what is written under it: a title, and a note with numbers."""

    image: Image.Image
    title: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Segments:
    """A segmented picture: `image`, each pixel in the colour of its class; and the classes, most frequent first.

    `classes`: name, colour (red, green, blue), and share of the pixels, for each class that some pixel has.
    """

    image: Image.Image
    classes: Sequence[tuple[str, tuple[int, int, int], float]]


# ---------------------------------------------------------------------------------------------------------------------
# What users give


def read_picture(path: str | os.PathLike | None) -> Image.Image:
    """An uploaded file as a picture, upright and RGB. What it is follows from its bytes; its name is not asked.

    Raises:
      Refused: there is no file; it is no image, damaged, too narrow, or has more than `MAX_BYTES` or
        `image_rules.MAX_PIXELS`.
    """
    if path is None:
        raise Refused("Give a picture first: drop one into the field, or choose a file.")
    size = os.stat(path).st_size
    if size > MAX_BYTES:
        raise Refused(
            f"This file is too large: it has {size / 2**20:.1f} MiB, and at most {MAX_BYTES / 2**20:.0f} MiB are "
            "allowed. Give a smaller copy."
        )
    try:
        image = image_rules.to_rgb(image_rules.decode(pathlib.Path(path).read_bytes(), upright=True))
    except image_rules.ImageError as error:
        raise Refused(f"This file cannot be used as a picture: {error}.") from error
    if max(image.size) > MAX_RATIO * min(image.size):
        raise Refused(
            f"This picture has {image.width} x {image.height} pixels; at most {MAX_RATIO} times as many are allowed in "
            "one direction as in the other. Cut it."
        )
    return image


def stored_format(path: str | os.PathLike) -> str:
    """Pillow's name for the format of a file that `read_picture` has read."""
    with Image.open(path, formats=image_rules.FORMATS) as image:
        return image.format


def lines(typed: str | None, most: int, what: str = "text") -> list[str]:
    """The lines of a text field that are not empty, each once, in order.

    Raises:
      Refused: there is none, there are more than `most`, or one is longer than `MAX_CHARACTERS`.
    """
    found = list(dict.fromkeys(line.strip() for line in (typed or "").splitlines() if line.strip()))
    if not found:
        raise Refused(f"Write at least one {what}, one a line.")
    if len(found) > most:
        raise Refused(f"There are {len(found)} lines; at most {most} are allowed. Remove some.")
    if (longest := max(map(len, found))) > MAX_CHARACTERS:
        raise Refused(f"A line has {longest:,} characters; at most {MAX_CHARACTERS:,} are allowed. Make it shorter.")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What they get


def scores(model: Pretrained, picture: Image.Image | Pictures, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of a picture, alone or as one of `Pictures`, with N texts by column, float32 (N,): those of
    `predict.table`.
    """
    return {name: column[0] for name, column in predict.table(model, picture, texts).items()}


def views(model: Pretrained) -> dict[str | int, str]:
    """The heat maps that a model has: `MEAN`, the number of a head, or `PATCHES` -> how the page calls it."""
    found = {}
    if model.model.has_pooling:
        found[MEAN] = "Attention, mean of all heads"
        found.update({head: f"Attention, head {head}" for head in range(model.config["pooling"]["heads"])})
    if model.model.has_local:
        found[PATCHES] = "Similarity of patch and text"
    return found


def heat_maps(
    model: Pretrained, picture: Image.Image | Pictures, texts: Sequence[str], view: str | int
) -> tuple[Image.Image, list[Figure]]:
    """The scale of the colours, and for each text the picture under its heat map; all of them on that scale.

    Args:
      picture: alone, or as one of `Pictures`.
      view: a key of `views`.
    """
    if view not in views(model):
        raise Refused(f"This model has no heat map {view!r}. Choose another one.")
    pictures = as_pictures(picture)
    (picture,) = pictures
    shown, factor = page.fit_tile(picture, SIDE)
    seen = model.model.preprocessing.seen(picture.size, model.model.image_size)
    part = tuple(factor * side for side in seen)
    if view == PATCHES:
        (maps,) = model.patch_similarity(pictures, texts)
        scale = heat.cosine_scale([maps])
        notes = [f"cosine {one.min():.2f} to {one.max():.2f}" for one in maps]
    else:
        (maps,), (mass,) = model.heat_maps(pictures, texts, heads=view)
        scale = heat.attention_scale([maps])
        notes = [heat.attention_caption(*pair) for pair in zip(maps, mass, strict=True)]
    figures = [
        Figure(heat.overlay(shown, one, scale, part), text, note)
        for one, text, note in zip(maps, texts, notes, strict=True)
    ]
    return heat.legend(scale, LEGEND_WIDTH, hatched=seen != (0, 0, *picture.size)), figures


def segmentation_modes(model: Pretrained) -> dict[str, str]:
    """The modes of `Pretrained.segment` that a model has -> how the page calls them; the published one first."""
    if not model.model.has_local:
        return {}
    found = {"projected": "Projected patches"}
    if model.model.has_pooling:
        found |= {"value": "Values of the pooling", "attention": "Attention of the pooling"}
    return found


def segment(model: Pretrained, picture: Image.Image, names: Sequence[str], template: str, mode: str) -> Segments:
    """The class of every pixel of a picture; of a large one, of a copy with `SEGMENTED_SIDE` pixels.

    Args:
      names: of the classes, C of them.
      template: the text of a class, with `{c}` for its name.
      mode: a key of `segmentation_modes`.
    """
    if prompts.SLOT not in template:
        raise Refused(f"The text of a class needs {prompts.SLOT} where the name of the class goes.")
    picture = picture.copy()
    picture.thumbnail((SEGMENTED_SIDE, SEGMENTED_SIDE))
    mask = model.segment(picture, names, template, mode=mode)
    palette = segmentation.colours(len(names))
    counts = np.bincount(mask[mask >= 0], minlength=len(names))
    shown, _ = page.fit_tile(picture, SIDE)
    classes = [
        (names[number], tuple(palette[number].tolist()), counts[number] / mask.size)
        for number in np.argsort(-counts, kind="stable")
        if counts[number]
    ]
    return Segments(segmentation.overlay(shown, mask, palette), classes)


def regions(model: Pretrained, picture: Image.Image, texts: Sequence[str]) -> Image.Image:
    """The region that is nearest to each text; without texts all regions."""
    return visualize.regions(model, picture, texts)


def search(index: Index, texts: Sequence[str]) -> list[tuple[str, list[Figure]]]:
    """For each text the pictures of the folder that fit it best, best first.

    A file that was removed or damaged since it was indexed is left out.
    """
    results = []
    for text, hits in zip(texts, index.query(texts, top_k=HITS), strict=True):
        figures = []
        for hit in hits:
            try:
                picture = image_rules.to_rgb(image_rules.decode(hit.path.read_bytes(), upright=True))
            except (OSError, image_rules.ImageError):
                continue
            name = str(hit.path.relative_to(index.folder))
            figures.append(Figure(page.fit_tile(picture, SIDE)[0], name, f"cosine {hit.score:.3f}"))
        results.append((text, figures))
    return results


def scene(number: int) -> tuple[Image.Image, list[str], list[str]]:
    """A drawn scene that is in no training set: the picture, sentences about its objects, and names of its classes."""
    drawn = scenes.draw(seed=2, index=number, size=SIDE, split="evaluation")
    names = [*(f"a {thing.phrase}" for thing in drawn.objects), f"a {drawn.background} background"]
    return Image.fromarray(drawn.image), list(drawn.places), names
