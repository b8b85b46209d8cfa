"""Pictures of search: what was found for each text."""

from collections.abc import Sequence

from PIL import Image

from flair_jax.figures import page

TILE = 192  # width of a picture in pixels
COLUMNS = 5

Cell = tuple[Image.Image | None, str]  # a picture, or None where it cannot be shown, and what stands below it


def hits(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A block per text: the text, and below it its pictures from left to right, `COLUMNS` in a line.

    Raises:
      ValueError: there is nothing to draw.
    """
    blocks = [_block(text, cells) for text, cells in rows if cells]
    if not blocks:
        raise ValueError("a sheet of hits needs at least one text with a hit")
    return page.framed(page.stacked(blocks, 2 * page.MARGIN))


def _block(text: str, cells: Sequence[Cell]) -> Image.Image:
    sheet = page.in_rows([_cell(*cell) for cell in cells], min(COLUMNS, len(cells)))
    return page.stacked([page.text_block(text, sheet.width), sheet], page.MARGIN // 2)


def _cell(picture: Image.Image | None, caption: str) -> Image.Image:
    if picture is None:
        picture = Image.new("RGB", (TILE, TILE // 2), "lightgrey")
        picture.paste(page.text_block("cannot be read any more", TILE - 8, background="lightgrey"), (4, 4))
    else:
        picture, _ = page.fit_tile(picture, TILE)
    return page.stacked([picture, page.text_block(caption, TILE)])
