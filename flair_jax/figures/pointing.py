"""Pictures of the pointing game: the heat over an image, the boxes to hit, and the patch that was pointed at."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from flair_jax.evaluators.features import patch_grid
from flair_jax.figures import heat as heats
from flair_jax.figures import page

TILE = 224  # width of an image in pixels
COLUMNS = 4
BOX = (0, 255, 0)
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


def sheet(examples: Sequence[Example], scale_of: Callable[[Sequence[np.ndarray]], heats.Scale]) -> Image.Image:
    """Examples in rows below their scale: boxes green, the peak a yellow circle, phrases green for hits, else red.

    Args:
      examples: phrases.
      scale_of: all maps (h, w) -> their scale, `heats.attention_scale` or `heats.cosine_scale`.
    """
    grids = [patch_grid(*example.image.shape[:2], len(example.heat)) for example in examples]
    maps = [example.heat.reshape(grid) for example, grid in zip(examples, grids, strict=True)]
    scale = scale_of(maps)
    cells = [_cell(example, heat, scale) for example, heat in zip(examples, maps, strict=True)]
    return heats.with_legend(page.in_rows(cells, COLUMNS), scale)


def _cell(example: Example, heat: np.ndarray, colours: heats.Scale) -> Image.Image:
    picture, scale = page.fit_tile(example.image, TILE)
    # In colour, of which the phrases speak: the picture itself does not stand beside it.
    picture, grid = heats.overlay(picture, heat, colours, grey=0.0), heat.shape
    draw = ImageDraw.Draw(picture)
    for box in example.boxes:
        draw.rectangle([scale * side for side in box], outline=BOX, width=2)
    row, column = np.unravel_index(heat.argmax(), grid)
    x, y = (column + 0.5) * picture.width / grid[1], (row + 0.5) * picture.height / grid[0]
    draw.ellipse([x - 5, y - 5, x + 5, y + 5], outline=PEAK, width=3)
    return page.stacked([picture, page.text_block(example.text, TILE, page.RIGHT if example.hit else page.WRONG)])
