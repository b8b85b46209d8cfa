"""Heat maps over pictures: overlays, sheets of several of them, and the scale that their colours stand for."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from flair_jax.figures import page
from flair_jax.figures.page import LINE, MARGIN

BOX = (0, 255, 0)
LEAST_GAP = 4  # pixels between numbers of a scale; of two that are nearer the mark's is left out
COLUMNS = 6  # maps beside a picture, at most
# From the lowest value to the highest: how opaque the heat is, and its colour.
STOPS = (0.0, 0.25, 0.6, 1.0)
OPACITY = (0.0, 0.2, 0.65, 0.85)
COLOURS = np.array([(255, 235, 60), (255, 200, 0), (250, 90, 0), (190, 0, 40)], np.float32)
GREY = 0.75  # how much of a picture's colours goes under the heat: they would be taken for it
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Of what the model does not see: its brightness, pixels from line to line over it, and the grey of these lines.
UNSEEN, HATCH, HATCHED = 0.35, 9, 80
HATCHED_TITLE = "; hatched: outside of what the model sees"
LEAST_TOP = 4.0  # of a shared scale of attention, in uniform weights: a flat map stays pale


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the colours of heat maps stand for; values outside are drawn as the nearest end.

    Attributes:
      low, high: values of no heat and of full heat; None: the lowest or the highest value of each map itself.
      unit: values are printed divided by this number.
      title: what the printed numbers are.
      marks: values between the ends that are printed, too.
      digits: after the point, of printed values.
    """

    low: float | None
    high: float | None
    unit: float
    title: str
    marks: tuple[float, ...] = ()
    digits: int = 1

    def printed(self, value: float) -> str:
        """A value as it stands in the picture."""
        return f"{round(value / self.unit, self.digits) + 0.0:.{self.digits}f}"  # + 0.0: no -0.0

    def share(self, heat: np.ndarray) -> np.ndarray:
        """Values (h, w) -> float32 from 0, no heat, to 1.

        Raises:
          ValueError: a value is not finite.
        """
        if not np.isfinite(heat).all():
            raise ValueError("a heat map has values that are not finite")
        low = heat.min() if self.low is None else self.low
        high = heat.max() if self.high is None else self.high
        return np.clip((heat - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1).astype(np.float32)


def attention_scale(maps: Sequence[np.ndarray], scale: str | float = "shared") -> Scale:
    """The scale of attention weights, printed in multiples of the uniform weight 1/L.

    Args:
      maps: (…, h, w), L = h w patches; those that are drawn together.
      scale: "shared": from 0 to the largest weight of all maps, but at least `LEAST_TOP` / L, so that maps can be
        compared and a flat one is pale. "own": from 0 to each map's own largest weight. A number: from 0 to so many
        times 1/L, to compare pictures that are drawn one by one.
    """
    patches = int(np.prod(np.shape(maps[0])[-2:]))
    title = f"attention on a patch, in uniform weights 1/{patches}"
    if scale == "own":
        return Scale(0.0, None, 1 / patches, f"{title}; each map by its own maximum")
    top = max(LEAST_TOP, patches * _largest(maps)) if scale == "shared" else _number(scale)
    return Scale(0.0, top / patches, 1 / patches, title, (1 / patches,))


def cosine_scale(maps: Sequence[np.ndarray], scale: str | float = "shared") -> Scale:
    """The scale of cosines.

    Args:
      maps: (…, h, w), those that are drawn together.
      scale: "shared": from the lowest to the highest value of all maps. "own": from each map's own lowest to its own
        highest. A number: from 0 to it.
    """
    title = "cosine of a patch with the text"
    if scale == "own":
        return Scale(None, None, 1.0, f"{title}; each map from its lowest to its highest", digits=2)
    if scale != "shared":
        return Scale(0.0, _number(scale), 1.0, title, digits=2)
    low, high = -_largest([-np.asarray(heat) for heat in maps]), _largest(maps)
    return Scale(low, high, 1.0, title, ((low + high) / 2,), digits=2)


def attention_caption(heat: np.ndarray, mass: float, on: str = "zero key") -> str:
    """What is printed under a map of attention: the share `on` no patch, and the largest weight in uniform ones."""
    return f"{on} {mass:.0%}, peak {heat.size * heat.max():.1f} x uniform"


def _largest(maps: Sequence[np.ndarray]) -> float:
    return float(max(np.max(heat) for heat in maps if np.size(heat)))


def _number(scale: str | float) -> float:
    if isinstance(scale, str) or not 0 < scale < np.inf:
        raise ValueError(f"scale is {scale!r}; expected 'shared', 'own' or a number above 0")
    return float(scale)


OWN = Scale(0.0, None, 1.0, "")


def overlay(
    image: Image.Image | np.ndarray,
    heat: np.ndarray,
    scale: Scale = OWN,
    part: tuple[float, float, float, float] | None = None,
    grey: float = GREY,
) -> Image.Image:
    """Lays a heat map over a picture, which turns grey under it: from yellow for little to dark red for much.

    Between the centres of patches the map is interpolated linearly.

    Args:
      image: any picture; or (H, W, 3), uint8, or float in [0, 1].
      heat: (h, w).
      scale: of the colours; by default from 0 to the map's own largest value.
      part: x0, y0, x1, y1 in pixels, what the map covers, see `Preprocessing.seen`; the rest is dark and hatched. None:
        the whole picture.
      grey: how much of the picture's colours goes.

    Returns:
      RGB, the size of the picture.

    Raises:
      ValueError: the map has a value that is not finite.
    """
    picture = page.as_picture(image)
    pixels = np.asarray(picture, np.float32)
    pixels = grey * (pixels @ LUMA)[..., None] + (1 - grey) * pixels
    rows, columns = _part(part, pixels.shape[:2])
    share = Image.fromarray(scale.share(np.asarray(heat, np.float32)))
    size = columns.stop - columns.start, rows.stop - rows.start
    share = np.asarray(share.resize(size, Image.Resampling.BILINEAR))
    result = np.array(mark_unseen(picture, part))
    result[rows, columns] = np.rint(coloured(pixels[rows, columns], share))
    return Image.fromarray(result)


def mark_unseen(image: Image.Image, part: tuple[float, float, float, float] | None) -> Image.Image:
    """An RGB picture that is grey, dark and hatched outside of a part, x0, y0, x1, y1 in pixels; None: nowhere."""
    pixels = np.asarray(image, np.float32)
    y, x = np.indices(pixels.shape[:2])
    dark = np.where((x + y) % HATCH == 0, HATCHED, UNSEEN * (pixels @ LUMA))
    result = np.repeat(np.uint8(np.rint(dark))[..., None], 3, axis=2)
    rows, columns = _part(part, pixels.shape[:2])
    result[rows, columns] = np.asarray(image)[rows, columns]
    return Image.fromarray(result)


def coloured(pixels: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Float pixels (H, W, 3) under the heat of (H, W) values from 0 to 1."""
    alpha = np.interp(share, STOPS, OPACITY)[..., None]
    colour = np.stack([np.interp(share, STOPS, channel) for channel in COLOURS.T], axis=-1)
    return (1 - alpha) * pixels + alpha * colour


def _part(part: tuple[float, float, float, float] | None, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a part, whole pixels, at least one."""
    height, width = size
    x0, y0, x1, y1 = (0, 0, width, height) if part is None else (round(side) for side in part)
    left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return slice(top, max(top + 1, min(y1, height))), slice(left, max(left + 1, min(x1, width)))


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture and the maps over it, which stand beside it in a sheet.

    Attributes:
      image: as `overlay` takes it.
      maps: n arrays (h, w).
      captions: n strings, printed under the maps; line breaks divide lines.
      title: printed under the picture itself.
      part: what the maps cover, as for `overlay`.
      boxes: for each map (x0, y0, x1, y1) in pixels of the image, or None; drawn as a frame.
    """

    image: Image.Image | np.ndarray
    maps: Sequence[np.ndarray]
    captions: Sequence[str]
    title: str = ""
    part: tuple[float, float, float, float] | None = None
    boxes: Sequence[tuple[float, float, float, float] | None] | None = None


def sheet(rows: Sequence[Row], scale: Scale, *, tile: int = 192) -> Image.Image:
    """A page: the scale, and one row per picture, the picture first, then its maps with their captions.

    Args:
      rows: pictures with maps; those without a map are left out.
      scale: of all maps.
      tile: width of a picture in pixels.

    Raises:
      ValueError: lists of a row differ in length, or there is nothing to draw.
    """
    lines, hatched = [], False
    for row in rows:
        boxes = [None] * len(row.maps) if row.boxes is None else row.boxes
        cells = [
            _cell(row, heat, scale, caption, box, tile)
            for heat, caption, box in zip(row.maps, row.captions, boxes, strict=True)
        ]
        if not cells:
            continue
        width, height = page.as_picture(row.image).size
        hatched |= _part(row.part, (height, width)) != _part(None, (height, width))
        first = _cell(row, None, scale, row.title, None, tile)
        columns = -(-len(cells) // -(-len(cells) // COLUMNS))  # of equally full lines
        for start in range(0, len(cells), columns):
            before = first if start == 0 else Image.new("RGB", (tile, 1), "white")
            lines.append(page.beside([before, *cells[start : start + columns]]))
    if not lines:
        raise ValueError("a sheet needs at least one text")
    return with_legend(page.stacked(lines, MARGIN), scale, hatched)


def _cell(row: Row, heat: np.ndarray | None, scale: Scale, caption: str, box, tile: int) -> Image.Image:
    """An overlay scaled to the width of a tile, with a frame in it and a caption below; without a map the picture."""
    picture, factor = page.fit_tile(row.image, tile)
    if heat is not None:
        part = None if row.part is None else tuple(factor * side for side in row.part)
        picture = overlay(picture, heat, scale, part)
    if box is not None:
        ImageDraw.Draw(picture).rectangle([factor * side for side in box], outline=BOX, width=2)
    return page.stacked([picture, page.text_block(caption, tile)])


def with_title(picture: Image.Image, title: str) -> Image.Image:
    """A picture with a line or two above it."""
    return page.framed(page.stacked([page.text_block(title, picture.width), picture], MARGIN))


def with_legend(picture: Image.Image, scale: Scale, hatched: bool = False) -> Image.Image:
    """A picture with the scale of its overlays above it."""
    return page.framed(page.stacked([legend(scale, picture.width, hatched), picture], MARGIN))


def legend(scale: Scale, width: int, hatched: bool = False) -> Image.Image:
    """The colours over grey from the lowest to the highest value, with numbers below and what they are."""
    font, bar = page.font(), min(240, width // 2)
    share = np.broadcast_to(np.linspace(0, 1, bar, dtype=np.float32), (12, bar))
    colours = coloured(np.full((12, bar, 3), 128, np.float32), share)
    words = scale.title + (HATCHED_TITLE if hatched else "")
    text = page.text_block(words, max(1, width - bar - 30))
    picture = Image.new("RGB", (width, max(2 * LINE, text.height + 2)), "white")
    picture.paste(Image.fromarray(np.uint8(np.rint(colours))), (0, 0))
    picture.paste(text, (bar + 30, 0))
    draw = ImageDraw.Draw(picture)
    ends = [
        (0.0, "lowest" if scale.low is None else scale.printed(scale.low)),
        (1.0, "highest" if scale.high is None else scale.printed(scale.high)),
    ]
    between = []
    if scale.low is not None and scale.high is not None:
        between = [((mark - scale.low) / (scale.high - scale.low), scale.printed(mark)) for mark in scale.marks]
    taken = []
    for place, label in [*ends, *between]:
        x = place * (bar - 1)
        draw.line((x, 9, x, 14), fill="black")
        length = font.getlength(label)
        left = min(max(0, x - length / 2), bar + 28 - length)
        if all(left + length + LEAST_GAP < start or end + LEAST_GAP < left for start, end in taken):
            draw.text((left, 14), label, fill="black", font=font)
            taken.append((left, left + length))
    return picture
