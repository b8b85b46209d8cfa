"""Regions of an image: boxes with descriptions, carried along with the crop that training makes of the picture.

A record's JSON holds them under "regions", a list of objects:

    {"box": [x0, y0, x1, y1], "description": "a large red circle", "score": 0.93}

The box is in shares of the width and the height of the picture as it is stored, that is before its EXIF orientation
turns it; it may stick out of the picture. The score is a detector's and may be left out. So may the box or the
description (or be null): such a region trains what needs the other one alone.

Source: GRAIN's regions (Halbe et al. 2024, arXiv:2412.04429); `data.prepare` makes them of data sets and of detections.
"""

import dataclasses
import math
import numbers
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flair_jax.data.transforms.base import (
    BOXES,
    BOXES_VALID,
    DESCRIPTION_IDS,
    DESCRIPTIONS,
    TEXTS,
    VALID,
    Sample,
    SampleError,
)
from flair_jax.data.transforms.images import View
from flair_jax.data.transforms.tokenizer import Tokenizer

FIELD = "regions"
WHOLE = (0.0, 0.0, 1.0, 1.0)
Box = tuple[float, float, float, float]


class RegionError(SampleError):
    """A record whose regions cannot be used. The message says why, without naming the record."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a picture.

    Attributes:
      box: x0, y0, x1, y1 in shares of the stored picture's width and height, not clipped; None: nobody said where.
      description: its text, stripped, or "" where there is none.
      score: of the detection; None: it has none.
    """

    box: Box | None
    description: str
    score: float | None = None

    def fields(self) -> dict[str, Any]:
        """As a record's JSON holds it."""
        found = {"box": None if self.box is None else list(self.box), "description": self.description}
        return found if self.score is None else found | {"score": self.score}


def parse(fields: Any) -> list[Region]:
    """The regions of a record, in its order; none where it has no such field.

    Raises:
      RegionError: a region is no object, its box no list of four finite numbers, its description no text, or its score
        no finite number.
    """
    if not isinstance(fields, Mapping):
        raise RegionError(f"the record must be a JSON object, not {type(fields).__name__}")
    found = fields.get(FIELD)
    if found is None:
        return []
    if not isinstance(found, list):
        raise RegionError(f"{FIELD} must be a list, not {type(found).__name__}")
    return [_region(region, f"{FIELD}[{number}]") for number, region in enumerate(found)]


def of_record(sample: Sample) -> list[Region]:
    """The regions in a sample's JSON. Raises SampleError as `parse` does, and where the JSON does not parse."""
    return parse(sample.fields)


def turn(box: Box, orientation: int) -> Box:
    """A box where it lies once the picture was turned as its EXIF orientation says; see `images.turn_upright`."""
    x0, y0, x1, y1 = box
    if orientation > 4:  # rows become columns
        x0, y0, x1, y1 = y0, x0, y1, x1
    if orientation in (2, 3, 6, 7):  # mirrored, left for right
        x0, x1 = 1 - x1, 1 - x0
    if orientation in (3, 4, 7, 8):  # and top for bottom
        y0, y1 = 1 - y1, 1 - y0
    return x0, y0, x1, y1


def clip(box: Box, window: Box = WHOLE) -> Box:
    """The part of a box that lies in a window; of one outside of it, a box without area."""
    (x0, y0, x1, y1), (left, top, right, bottom) = box, window

    def within(value, low, high):
        return min(max(value, low), high)

    return within(x0, left, right), within(y0, top, bottom), within(x1, left, right), within(y1, top, bottom)


def area(box: Box) -> float:
    """Of a box, 0 where a side is not positive."""
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def see(region: Region, view: View, min_area: float) -> Region | None:
    """A region as the model sees it, its box in shares of the crop, cut to it; None where it is out of sight.

    Args:
      region: of the stored picture.
      view: of the crop.
      min_area: smallest share of its area that a box must have left; what lies outside of the picture does not count.
        A box without area stays, for nobody knows where it lies: it is not valid, but its description is.
    """
    if region.box is None:
        return region
    box = clip(turn(region.box, view.orientation))
    left, top, right, bottom = view.part
    seen = clip(box, view.part)
    if area(box) and (not area(seen) or area(seen) < min_area * area(box)):
        return None
    x0, x1 = (min(max((x - left) / (right - left), 0.0), 1.0) for x in (seen[0], seen[2]))
    y0, y1 = (min(max((y - top) / (bottom - top), 0.0), 1.0) for y in (seen[1], seen[3]))
    return dataclasses.replace(region, box=(1 - x1, y0, 1 - x0, y1) if view.flip else (x0, y0, x1, y1))


@dataclasses.dataclass(frozen=True)
class Regions:
    """The transform that gives M regions of an image, the best ones by score; those of one score in their order.

    `texts/descriptions`, int32 (M, T), and `valid/descriptions`, bool (M,): whether there is such a description.
    `regions/boxes`, float32 (M, 4), centre x, centre y, width and height in 0 to 1 of the image that the model sees,
    and `regions/valid`, bool (M,): whether there is a box with an area. `regions/description_ids`, int32 (M,): the same
    number for descriptions that read the same, in upper or lower case. Row m of all of them is one region. Where an
    image has fewer than M the rows that are left are zeros and empty texts, and not valid.

    Attributes:
      count: M.
      source: of a sample's regions, `of_record` or `region_files.RegionFiles`.
      view: of a sample's crop, `samples.Crop.view`.
      tokenize: texts to ids, of T a text.
      min_area: see `see`.

    Raises:
      ValueError: an option has no meaning.
    """

    count: int
    source: Callable[[Sample], list[Region]]
    view: Callable[[Sample], View]
    tokenize: Tokenizer
    min_area: float = 0.5

    names = (f"{TEXTS}{DESCRIPTIONS}", f"{VALID}{DESCRIPTIONS}", BOXES, BOXES_VALID, DESCRIPTION_IDS)

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.min_area <= 1:
            raise ValueError(
                f"regions.count is {self.count}, regions.min_area {self.min_area}; expected 1 or more, and a share "
                "between 0 and 1"
            )

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """
        Raises:
          SampleError: see `of_record` and `images.stored_size`.
        """
        found = self.source(sample)
        if found:
            view = self.view(sample)
            found = [seen for region in found if (seen := see(region, view, self.min_area)) is not None]
        found = best(found, self.count)
        texts = [region.description for region in found] + [""] * (self.count - len(found))
        described = np.array(list(map(bool, texts)))
        checksums = [zlib.crc32(text.lower().encode("utf-8", "surrogatepass")) for text in texts]
        ids = np.array(checksums, np.uint32).view(np.int32)
        found = self.tokenize(texts), described, *arrays(found, self.count), ids
        return dict(zip(self.names, found, strict=True))


def arrays(regions: Sequence[Region], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as models predict them, float32 (count, 4), and which of them have an area, bool (count,).

    A row is (centre x, centre y, width, height); zeros where there is no box, or none with an area.
    """
    corners = np.zeros((count, 4))
    for row, region in zip(corners, regions, strict=False):
        row[:] = (0, 0, 0, 0) if region.box is None else region.box
    low, high = corners[:, :2], corners[:, 2:]
    there = (low < high).all(axis=1)
    boxes = np.concatenate([(low + high) / 2, high - low], axis=1) * there[:, None]
    return boxes.astype(np.float32), there


def best(regions: Sequence[Region], count: int) -> list[Region]:
    """At most `count` regions, those with the highest scores first; then the ones without a score."""
    return sorted(regions, key=lambda region: math.inf if region.score is None else -region.score)[:count]


def _region(value: Any, name: str) -> Region:
    if not isinstance(value, dict):
        raise RegionError(f"{name} must be an object, not {type(value).__name__}")
    box, description, score = value.get("box"), value.get("description"), value.get("score")
    if not isinstance(description, str | None):
        raise RegionError(f"{name}.description must be a string, not {type(description).__name__}")
    if not (score is None or _is_number(score)):
        raise RegionError(f"{name}.score must be a finite number, not {score!r:.50}")
    return Region(None if box is None else checked_box(box, f"{name}.box"), (description or "").strip(), score)


def checked_box(value: Any, name: str) -> Box:
    """A box of a file, as it is. Raises RegionError unless it is a list of four finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(map(_is_number, value)):
        raise RegionError(f"{name} must be a list of four finite numbers, not {value!r:.100}")
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 1e9
