"""Pictures of regions: true boxes, and beside them those that a model predicts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from flair_jax.figures import page

TILE = 280  # width of an image in pixels
COLUMNS = 4
# A colour for each box of an image, told apart by people who do not see colours as most do (Okabe and Ito).
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with M boxes.

    Attributes:
      image: (H, W, 3), uint8, or float in [0, 1].
      truth, found: (M, 4), left, top, right, bottom as shares of the image: what is there, and what is predicted.
        Without a truth, None, all lines are whole.
      fit: (M,), printed before the name, such as the IoU of both; NaN where nothing is predicted. None: not printed.
      names: M texts.
    """

    image: np.ndarray
    truth: np.ndarray | None
    found: np.ndarray
    fit: np.ndarray | None
    names: Sequence[str]


def sheet(examples: Sequence[Example]) -> Image.Image:
    """Examples in rows. True boxes are drawn with one line, predicted ones with a dashed line of the same colour; under
    the picture stand their names and how well they fit.
    """
    return page.in_rows([_cell(example) for example in examples], COLUMNS)


def _cell(example: Example) -> Image.Image:
    picture, _ = page.fit_tile(example.image, TILE)
    width, height = picture.size
    scale = (width - 1, height - 1, width - 1, height - 1)
    draw = ImageDraw.Draw(picture)
    whole = example.found if example.truth is None else example.truth
    fits = np.zeros(len(whole)) if example.fit is None else example.fit
    for number, (one, found, fit) in enumerate(zip(whole, example.found, fits, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        # Equal boxes lie within each other, so that each is seen.
        inset = np.array([3, 3, -3, -3]) * sum(np.array_equal(one, earlier) for earlier in whole[:number])
        left, top, right, bottom = np.clip(one, 0, 1) * scale + inset
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        if example.truth is not None and np.isfinite(fit):
            _dashed(draw, np.clip(found, 0, 1) * scale, colour)
    lines = [picture]
    for number, (name, fit) in enumerate(zip(example.names, fits, strict=True)):
        shown = "" if example.fit is None else f"{fit:.2f}  " if np.isfinite(fit) else "none  "
        lines.append(page.marked(f"{shown}{name}", TILE, COLOURS[number % len(COLOURS)]))
    return page.stacked(lines)


def _dashed(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int], dash: int = 6) -> None:
    """A rectangle of dashes."""
    left, top, right, bottom = box
    for x in np.arange(left, right, 2 * dash):
        for y in (top, bottom):
            draw.line((x, y, min(x + dash, right), y), fill=colour, width=2)
    for y in np.arange(top, bottom, 2 * dash):
        for x in (left, right):
            draw.line((x, y, x, min(y + dash, bottom)), fill=colour, width=2)
