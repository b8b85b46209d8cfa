"""Pictures of retrieval: recall against the number of answers looked at, and answers with what the model looks at."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flair_jax.figures import page, to_image
from flair_jax.figures.heat import Scale, attention_scale, overlay, with_legend

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
TILE = 224  # width of an image in pixels
LINES = 4  # of a text; the rest is cut off

Picture = tuple[np.ndarray, np.ndarray | None]  # pixels (H, W, 3), and a heat map (h, w) over them or None


class Example(NamedTuple):
    """A text, the rank of its own image, that image, and the best one of the others."""

    text: str
    rank: int
    own: Picture
    rival: Picture


def recall_curves(curves: Mapping[str, Mapping[str, np.ndarray]]) -> Image.Image:
    """A panel per direction, a line per mode.

    Args:
      curves: mode -> direction -> Recall@k for k = 1, 2, …, as fractions.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for panel, (direction, title) in zip(figure.subplots(1, 2), DIRECTIONS.items(), strict=True):
        for mode, by_direction in curves.items():
            recall = by_direction[direction]
            label = f"{mode}: {100 * recall[0]:.1f} %"
            panel.plot(np.arange(1, len(recall) + 1), 100 * recall, marker="." if len(recall) < 20 else "", label=label)
        panel.set(xscale="log", ylim=(0, 100), title=title, xlabel="k", ylabel="Recall@k in %")
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.grid(alpha=0.3, which="both")
        panel.legend(loc="best", title="Recall@1", fontsize=8)
    return to_image(figure)


def examples(rows: Sequence[Example]) -> Image.Image:
    """A row per text: its own image and the best one of the others, each beside its heat map where there is one, and
    above them the scale of the maps.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not rows:
        raise ValueError("examples need at least one text")
    maps = [heat for row in rows for _, heat in (row.own, row.rival) if heat is not None]
    scale = attention_scale(maps) if maps else None
    sheet = page.stacked([_block(row, scale) for row in rows], 2 * page.MARGIN)
    return with_legend(sheet, scale) if maps else sheet


def _block(row: Example, scale: Scale | None) -> Image.Image:
    cells = []
    for title, (pixels, heat) in ((f"its image: rank {row.rank}", row.own), ("the best other one", row.rival)):
        picture, _ = page.fit_tile(pixels, TILE)
        cells.append((title, picture))
        if heat is not None:
            cells.append(("where the text looks", overlay(picture, heat, scale)))
    line = page.beside([page.stacked([page.text_block(title, TILE), picture]) for title, picture in cells])
    return page.stacked([page.text_block(row.text, line.width, most=LINES), line], page.MARGIN // 2)
