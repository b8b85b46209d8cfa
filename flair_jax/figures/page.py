"""Pages of pictures and texts, put together from parts: every part is a PIL image, RGB."""

import bisect
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8  # pixels between parts
FONT_SIZE, LINE = 11, 16  # of texts
INDENT = 16  # of a text after a mark
TALLEST = 1.5  # height of a picture, in tiles
RIGHT, WRONG = (0, 110, 40), (180, 0, 0)  # colours of answers

Colour = str | tuple[int, int, int]


def as_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """A picture, or pixels (H, W, 3) that are uint8, or float in [0, 1], as an RGB picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return Image.fromarray(image if image.dtype == np.uint8 else np.uint8(np.clip(image, 0, 1) * 255))


def fit_tile(image: Image.Image | np.ndarray, tile: int) -> tuple[Image.Image, float]:
    """A picture scaled to the width of a tile, a tall one to less, and the factor; small pictures show their pixels."""
    picture = as_picture(image)
    factor = min(tile / picture.width, TALLEST * tile / picture.height)
    resampling = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.BICUBIC
    return picture.resize(tuple(max(1, round(factor * side)) for side in picture.size), resampling), factor


@functools.cache
def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin with all accents, Greek, Cyrillic. Pillow's own has ASCII."""
    import matplotlib  # slow to import

    return ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def text_block(
    text: str, width: int, colour: Colour = "black", most: int | None = None, background: Colour = "white"
) -> Image.Image:
    """A text, wrapped to a width in pixels; of more than `most` lines the rest is cut off. Empty texts have no
    height."""
    lines = [line for part in text.split("\n") for line in _wrapped(part, width)]
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], cut(f"{lines[most - 1]} …", width)]
    block = Image.new("RGB", (width, LINE * len(lines)), background)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, LINE * number), line, fill=colour, font=font())
    return block


def marked(text: str, width: int, colour: Colour) -> Image.Image:
    """A line of text after a square of a colour, cut off where it does not fit."""
    line = Image.new("RGB", (width, LINE), "white")
    ImageDraw.Draw(line).rectangle((2, 3, 10, 11), fill=colour, outline="black")
    line.paste(text_block(cut(text, width - INDENT), width - INDENT), (INDENT, 0))
    return line


def cut(text: str, width: int) -> str:
    """A text that is no wider than `width` pixels, with an ellipsis where it is cut off."""
    if font().getlength(text) <= width:
        return text
    text = text.rstrip(" …")
    while text and font().getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…"


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of words that are no wider than `width` pixels; a longer word is divided."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font().getlength(longer) <= width:
            line = longer
            continue
        lines += [line] if line else []
        while font().getlength(word) > width and len(word) > 1:
            ends = range(1, len(word) + 1)
            fits = max(1, bisect.bisect_right(ends, width, key=lambda end: font().getlength(word[:end])))
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def stacked(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Parts below each other on a white page, `gap` pixels apart."""
    page = Image.new(
        "RGB", (max(part.width for part in parts), sum(part.height + gap for part in parts) - gap), "white"
    )
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height + gap
    return page


def beside(parts: Sequence[Image.Image], gap: int = MARGIN) -> Image.Image:
    """Parts beside each other on a white page, `gap` pixels apart."""
    page = Image.new(
        "RGB", (sum(part.width + gap for part in parts) - gap, max(part.height for part in parts)), "white"
    )
    left = 0
    for part in parts:
        page.paste(part, (left, 0))
        left += part.width + gap
    return page


def in_rows(parts: Sequence[Image.Image], columns: int) -> Image.Image:
    """Parts of one width in rows."""
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    return stacked([beside(row) for row in rows], MARGIN)


def framed(page: Image.Image, margin: int = MARGIN) -> Image.Image:
    """A page with a white margin around it."""
    whole = Image.new("RGB", (page.width + 2 * margin, page.height + 2 * margin), "white")
    whole.paste(page, (margin, margin))
    return whole
