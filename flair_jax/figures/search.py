"""Pictures of search: what was found for each text."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

TILE = 192  # pixels, the longer side of a picture
COLUMNS = 5
MARGIN = 8  # pixels between cells
FONT_SIZE = 12
LINE = FONT_SIZE + 4

Cell = tuple[Image.Image | None, str]  # a picture, or None where it cannot be shown, and what stands below it


def hits(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A block per text: the text, and below it its pictures from left to right, `COLUMNS` in a line.

    Raises:
      ValueError: there is nothing to draw.
    """
    blocks = [_block(text, cells) for text, cells in rows if cells]
    if not blocks:
        raise ValueError("a sheet of hits needs at least one text with a hit")
    page = Image.new(
        "RGB", (max(block.width for block in blocks), sum(block.height for block in blocks) + MARGIN), "white"
    )
    top = MARGIN
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return page


def _block(text: str, cells: Sequence[Cell]) -> Image.Image:
    columns = min(COLUMNS, len(cells))
    width = columns * (TILE + MARGIN) + MARGIN
    title = _lines(text, width - 2 * MARGIN, FONT_SIZE + 2)
    drawn = [_cell(*cell) for cell in cells]
    lines = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(cell.height for cell in line) + MARGIN for line in lines]
    top = LINE * len(title) + MARGIN
    block = Image.new("RGB", (width, top + sum(heights) + MARGIN), "white")
    _write(block, title, MARGIN, 0, FONT_SIZE + 2)
    for line, height in zip(lines, heights, strict=True):
        for number, cell in enumerate(line):
            block.paste(cell, (MARGIN + number * (TILE + MARGIN), top))
        top += height
    return block


def _cell(picture: Image.Image | None, caption: str) -> Image.Image:
    lines = _lines(caption, TILE, FONT_SIZE)
    if picture is None:
        picture = Image.new("RGB", (TILE, TILE // 2), "lightgrey")
        _write(picture, ["cannot be read any more"], 4, 4, FONT_SIZE)
    scale = TILE / max(picture.size)
    size = [max(1, round(scale * side)) for side in picture.size]
    cell = Image.new("RGB", (TILE, size[1] + LINE * len(lines) + 2), "white")
    cell.paste(picture.resize(size, Image.Resampling.BICUBIC if scale < 2 else Image.Resampling.NEAREST))
    _write(cell, lines, 0, size[1] + 2, FONT_SIZE)
    return cell


def _lines(text: str, width: int, size: int) -> list[str]:
    columns = max(1, int(width / ImageFont.load_default(size).getlength("n")))
    return textwrap.wrap(text, columns) or [""]


def _write(picture: Image.Image, lines: Sequence[str], left: int, top: int, size: int) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for number, line in enumerate(lines):
        draw.text((left, top + LINE * number), line, fill="black", font=font)
