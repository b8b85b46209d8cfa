"""Pictures of retrieval: recall against the number of answers looked at, and answers with what the model looks at."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flair_jax.figures import plain, to_image
from flair_jax.figures.heat import attention_scale, overlay, with_legend

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
WIDTH = 110  # characters of a line of text
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
    columns = sum(1 if heat is None else 2 for _, heat in (rows[0].own, rows[0].rival))
    figure = Figure(figsize=(2.6 * columns, 3.2 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        lines = textwrap.wrap(row.text, int(WIDTH * columns / 4), max_lines=LINES) or [""]
        part.suptitle(plain("\n".join(lines)), fontsize=8)
        panels = iter(part.subplots(1, columns, squeeze=False)[0])
        for title, (pixels, heat) in ((f"its image: rank {row.rank}", row.own), ("the best other one", row.rival)):
            image = Image.fromarray(_uint8(pixels))
            _show(next(panels), image, title)
            if heat is not None:
                _show(next(panels), overlay(image, heat, scale), "where the text looks")
    picture = to_image(figure)
    return with_legend(picture, scale) if maps else picture


def _show(panel, image: Image.Image, title: str) -> None:
    panel.imshow(image)
    panel.set_title(title, fontsize=8)
    panel.axis("off")


def _uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels as they are, or floats from 0 to 1, as uint8."""
    return pixels if pixels.dtype == np.uint8 else np.uint8(np.clip(255 * pixels, 0, 255))
