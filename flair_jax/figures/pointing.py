"""Pictures of the pointing game: the heat over an image, the boxes to hit, and the patch that was pointed at."""

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flair_jax.evaluators.features import patch_grid
from flair_jax.figures import as_pixels, in_rows
from flair_jax.figures.heat import overlay

TILE = 224  # width of an image in pixels
LINE, FONT_SIZE = 16, 12
COLUMNS = 4
HIT, MISS, BOX = (0, 110, 40), (180, 0, 0), (0, 255, 0)
PEAK = (255, 255, 0)


@dataclasses.dataclass(frozen=True)
class Example:
    """A phrase and where it points.

    Attributes:
      image: (H, W, 3), uint8, or float in [0, 1]. heat: (L,) over its patches. boxes: (M, 4), pixels of the image.
      hit: whether the peak is in a box. text: the phrase.
    """

    image: np.ndarray
    heat: np.ndarray
    boxes: np.ndarray
    hit: bool
    text: str


def sheet(examples: Sequence[Example]) -> Image.Image:
    """Examples in rows: boxes green, the peak a yellow circle, the phrase green for a hit and red for a miss."""
    return in_rows([_cell(example) for example in examples], COLUMNS)


def _cell(example: Example) -> Image.Image:
    image = as_pixels(example.image)
    height, width = image.shape[:2]
    grid = patch_grid(height, width, len(example.heat))
    heat = (example.heat - min(0, example.heat.min())).reshape(grid)  # cosines may be negative
    scale = TILE / width
    picture = overlay(Image.fromarray(image).resize((TILE, round(scale * height))), heat)
    draw = ImageDraw.Draw(picture)
    for box in example.boxes:
        draw.rectangle([scale * side for side in box], outline=BOX, width=2)
    row, column = np.unravel_index(example.heat.argmax(), grid)
    x, y = (column + 0.5) * TILE / grid[1], (row + 0.5) * scale * height / grid[0]
    draw.ellipse([x - 5, y - 5, x + 5, y + 5], outline=PEAK, width=3)
    font = ImageFont.load_default(FONT_SIZE)
    lines = textwrap.wrap(example.text, int(TILE / font.getlength("n"))) or [""]
    cell = Image.new("RGB", (TILE, picture.height + LINE * len(lines)), "white")
    cell.paste(picture)
    for number, line in enumerate(lines):
        position = 0, picture.height + LINE * number
        ImageDraw.Draw(cell).text(position, line, fill=HIT if example.hit else MISS, font=font)
    return cell
