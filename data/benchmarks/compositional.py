"""What readers of compositional benchmarks share: items of pictures and texts out of several files; published scores.

Which caption fits the image, which image fits the caption? Formats, sizes and averages of the sets: `spec/fsc_clip.md`
6.1 and `spec/evaluation.md`.
"""

import ast
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flair_jax.data.benchmarks.base import (
    AnnotationError,
    Choice,
    File,
    Item,
    MissingError,
    Picture,
    Published,
    find,
    inside,
)
from flair_jax.data.benchmarks.json_files import read_json

COCO_VAL2014 = "coco/images/val2014|coco/val2014"
# The two folders of Visual Genome's images, which lie in either.
VISUAL_GENOME = ("VG_100K", "VG_100K_2")
VISUAL_GENOME_ROOTS = ("vg", "visual_genome", "visual_genome/images", "vg/images")


class Builder:
    """Collects the items of a set; equal pictures and equal texts are numbered once."""

    def __init__(self):
        self._pictures: dict[Picture, int] = {}
        self._texts: dict[str, int] = {}
        self._items: list[Item] = []

    def add(self, pictures: Sequence[Picture], texts: Sequence[str], **fields: Any) -> None:
        """An item, see `Item`: the right pictures or texts first."""
        images = tuple(self._pictures.setdefault(picture, len(self._pictures)) for picture in pictures)
        numbers = tuple(self._texts.setdefault(text, len(self._texts)) for text in texts)
        self._items.append(Item(images, numbers, **fields))

    def build(self, parts: Sequence[str] = ()) -> Choice:
        return Choice(list(self._pictures), list(self._texts), self._items, parts=tuple(parts))


def read_parts(
    root: pathlib.Path, parts: Mapping[str, str], read: Callable[[Builder, str, pathlib.Path], None]
) -> Choice:
    """A set out of those of its files that are there.

    Args:
      root: folder of all sets.
      parts: name of a part -> its file, as `find` takes it.
      read: (builder, part, file): adds the items of a file.

    Raises:
      MissingError: there is none of the files. AnnotationError: there is no item in any of them.
    """
    builder, found, missing = Builder(), {}, []
    for part, paths in parts.items():
        try:
            file = find(root, paths)
        except MissingError as error:
            missing += error.files
            continue
        read(builder, part, file)
        found[part] = file
    if not found:
        raise MissingError(missing)
    data = builder.build(tuple(found) if missing else ())
    if not data.items:
        raise AnnotationError(f"{', '.join(map(str, found.values()))}: no items")
    return data


def locate(root: pathlib.Path, folders: Sequence[str], name: str, file: pathlib.Path, **fields: Any) -> Picture:
    """The picture of a name in the first of several folders where it is; in the first one if it is in none.

    Raises:
      AnnotationError: see `inside`.
    """
    candidates = [picture_inside(root / folder, name, file, **fields) for folder in folders]
    return next((picture for picture in candidates if picture.exists()), candidates[0])


def visual_genome(root: pathlib.Path, name: str, file: pathlib.Path, *own: str, **fields: Any) -> Picture:
    """The picture of a name such as "2414605.jpg" or "VG_100K/2414605.jpg".

    Args:
      own: folders to look in first.
    """
    spread = [f"{base}/{folder}" for base in VISUAL_GENOME_ROOTS for folder in VISUAL_GENOME]
    whole = list(VISUAL_GENOME_ROOTS) if "/" in name else []
    return locate(root, [*own, *whole, *([] if whole else spread)], name, file, **fields)


def picture_inside(folder: pathlib.Path, name: Any, file: pathlib.Path, **fields: Any) -> Picture:
    """`inside`, with a box."""
    return dataclasses.replace(inside(folder, name, file), **fields)


def box_of(left: Any, top: Any, width: Any, height: Any, where: str) -> tuple[float, float, float, float]:
    """A box as left, top, right, bottom.

    Raises:
      AnnotationError: it is empty, or has sides that are no finite numbers.
    """
    sides = (left, top, width, height)
    if not all(isinstance(side, int | float) and math.isfinite(side) for side in sides):
        raise AnnotationError(f"{where}: box {sides}; expected four numbers")
    if width <= 0 or height <= 0:
        raise AnnotationError(f"{where}: box {sides}; expected width, height > 0")
    return (float(left), float(top), float(left + width), float(top + height))


def literal(value: Any, where: str) -> Any:
    """A value that may be written as a Python literal in a text, such as "['a', 'b']".

    Raises:
      AnnotationError: the text is no literal.
    """
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise AnnotationError(f"{where}: {value[:60]!r} is no Python literal") from error


def texts_of(value: Any, where: str) -> list[str]:
    """A list of at least one text.

    Raises:
      AnnotationError: it is something else.
    """
    if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
        raise AnnotationError(f"{where} is {str(value)[:60]!r}; expected a list of texts")
    return list(value)


def count(path: pathlib.Path) -> int:
    """Rows of a JSON file, a list or an object."""
    return len(read_json(path))


def files(parts: Mapping[str, str], sizes: Mapping[str, int | None], *images: str, count=count) -> tuple[File, ...]:
    """Entries of the table for the files of a set, each of which it can do without, and its folders of images."""
    annotations = (File(path, sizes.get(part), count, optional=True) for part, path in parts.items())
    return (*annotations, *(File(folder) for folder in images))


# ---------------------------------------------------------------------------------------------------------------------
# Published scores, in percent

VL_COMPO = "ytaek-oh/vl_compo, published scores"
FSC_CLIP = "FSC-CLIP, README (assets/extended_results.csv)"
READ_CLIP = "READ-CLIP, README (second-hand)"
CLIP, NEGCLIP = "OpenAI CLIP ViT-B/32", "NegCLIP ViT-B/32"
SETS = (
    *("aro", "crepe", "eqben", "imagecode", "sugarcrepe", "svo_probes", "valse", "vl_checklist", "whatsup"),
    *("winoground", "spec"),
)
SCORES: dict[tuple[str, str], tuple[float | None, ...]] = {  # (model, source) -> scores of SETS
    (CLIP, VL_COMPO): (57.55, 23.71, 26.49, 21.72, 73.03, 84.14, 67.53, 70.77, 41.46, 8.75, None),
    ("OpenAI CLIP ViT-B/16", VL_COMPO): (57.25, 22.06, 27.54, 22.02, 73.42, 85.70, 66.86, 70.76, 43.00, 7.50, None),
    (NEGCLIP, VL_COMPO): (80.88, 30.29, 30.33, 26.41, 83.69, 90.74, 73.72, 74.95, 42.89, 8.00, None),
    ("FSC-CLIP COCO ViT-B/32", FSC_CLIP): (
        *(85.08, 42.18, 29.81, 26.32, 85.12, 90.86, 75.31, 76.68, 40.63, 9.50, 34.19),
    ),
    ("FSC-CLIP LAION-COCO ViT-B/32", FSC_CLIP): (
        *(82.83, 46.81, 29.14, 24.72, 82.61, 90.07, 73.65, 75.69, 42.42, 6.75, 33.35),
    ),
    ("FSC-CLIP LoRA LAION-COCO ViT-B/32", FSC_CLIP): (
        *(85.48, 54.39, 29.07, 24.89, 80.57, 89.74, 72.59, 78.42, 42.81, 5.75, 32.48),
    ),
}


def published(name: str, metric: str = "accuracy") -> tuple[Published, ...]:
    """What papers report for one of `SETS`."""
    column = SETS.index(name)
    return tuple(
        Published(model, metric, round(scores[column] / 100, 6), source, "global")
        for (model, source), scores in SCORES.items()
        if scores[column] is not None
    )
