"""Pictures of results, a module per task: arrays -> PIL images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

MARGIN = 8  # pixels between cells


def to_image(figure: Any, dpi: int = 110) -> Image.Image:
    """A matplotlib figure as a PIL image, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    # The pixels of `savefig` to the bit, for two thirds of its time: laid out once, without a PNG in between.
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plain(text: str) -> str:
    """A text that matplotlib draws as it stands: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def as_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 pixels of an image, uint8 or float in [0, 1]."""
    return image if image.dtype == np.uint8 else np.uint8(np.clip(image, 0, 1) * 255)


def in_rows(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one width on a white page, row by row."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + MARGIN for row in rows]
    width = cells[0].width + MARGIN
    page = Image.new("RGB", (width * max(map(len, rows)), sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for number, cell in enumerate(row):
            page.paste(cell, (number * width, top))
        top += height
    return page
