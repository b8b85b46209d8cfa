"""Text -> heat map -> picture: where in an image the pooling looks for a text."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flair_jax.evaluators.features import Encoder, patch_grid
from flair_jax.models.layers import normalize

RED = (255, 0, 0)
BOX = (0, 255, 0)
MARGIN = 6  # pixels between the pictures of a sheet
FONT_SIZE = 12
IMAGE_BATCH, TEXT_BATCH = 64, 512


class HeatMaps(NamedTuple):
    """`maps`: float32 (B, N, h, w), attention on each patch; `zero_mass`: float32 (B, N), attention on no patch.

    Of each head alone they are (B, N, heads, h, w) and (B, N, heads).

    A map and its zero mass sum to 1: maps are not renormalised, so that a text that finds nothing shows it.
    """

    maps: np.ndarray
    zero_mass: np.ndarray


def heat_maps(
    model: nn.Module,
    params: Any,
    images: Sequence[np.ndarray],
    tokens: np.ndarray,
    *,
    preprocess: Callable[[jax.Array], jax.Array],
    heads: str | int | Sequence[int] = "mean",
) -> HeatMaps:
    """Attention of every text over the patches of every image.

    Args:
      model: a module with `encode_image`, `encode_text` and `attention_maps`.
      params: its parameters, a nested dict.
      images: (B, H, W, 3), as `preprocess` takes them; or a sequence with that shape, of which a batch is loaded at a
        time.
      tokens: int32 (N, T), padded texts.
      preprocess: images -> the model's input, of the same height and width.
      heads: "mean" of all heads, as FLAIR's own pictures show it; "each" of them; a number, from 0; or several numbers,
        of which the mean is taken.

    Raises:
      ValueError: there is no such head.
    """

    def weights(encoder, params, image, text):
        maps, zero_mass = (np.asarray(x) for x in encoder.apply("attention_maps", params, image, text))
        if isinstance(heads, str) and heads == "each":
            return maps, zero_mass
        chosen = _numbers(heads, maps.shape[2])
        return maps[:, :, chosen].mean(2), zero_mass[:, :, chosen].mean(2)

    maps, zero_mass = _over_patches(model, params, images, tokens, preprocess, weights)
    return HeatMaps(maps.reshape(*maps.shape[:-1], *patch_grid(*images.shape[1:3], maps.shape[-1])), zero_mass)


def patch_similarity(
    model: nn.Module,
    params: Any,
    images: Sequence[np.ndarray],
    tokens: np.ndarray,
    *,
    preprocess: Callable[[jax.Array], jax.Array],
    mode: str = "projected",
) -> np.ndarray:
    """Cosine of every patch of every image with every text, float32 (B, N, h, w).

    Args:
      model: a module with `encode_image`, `encode_text` and, for value, `dense_features`.
      params, images, tokens, preprocess: as for `heat_maps`.
      mode: "projected": the projected patches. "value": `model.dense_features`, what the pooling would give if all
        attention rested on one patch.
    """

    def cosines(encoder, params, image, text):
        local = encoder.apply("dense_features", params, image) if mode == "value" else image.local
        local, pooled = (np.asarray(normalize(x), np.float32) for x in (local, text.pooled))
        return (np.einsum("bld,nd->bnl", local, pooled, optimize=True),)

    (found,) = _over_patches(model, params, images, tokens, preprocess, cosines)
    return found.reshape(*found.shape[:-1], *patch_grid(*images.shape[1:3], found.shape[-1]))


def _over_patches(model, params, images, tokens, preprocess, maps: Callable[..., tuple[np.ndarray, ...]]):
    """Arrays that `maps(encoder, params, image, text)` gives of batches of images, joined in the images' order."""
    encoder = Encoder(model, preprocess, image_batch=IMAGE_BATCH, text_batch=TEXT_BATCH)
    params = encoder.place(params)
    text = encoder.texts(params, tokens)
    order, parts = [], []
    for numbers, image in encoder.images(params, images):
        order.append(numbers)
        parts.append([x[: len(numbers)] for x in maps(encoder, params, image, text)])
    order = np.argsort(np.concatenate(order))
    return [np.concatenate(part)[order] for part in zip(*parts, strict=True)]


def _numbers(heads: str | int | Sequence[int], count: int) -> list[int]:
    """The heads that are averaged. Raises ValueError: there is no such one."""
    if isinstance(heads, str):
        if heads != "mean":
            raise ValueError(f"heads is {heads!r}; expected 'mean', 'each', a number or several numbers")
        return list(range(count))
    chosen = [int(heads)] if isinstance(heads, int | np.integer) else list(heads)
    if not chosen or not set(chosen) <= set(range(count)):
        raise ValueError(f"heads are {chosen}; the pooling has {count}, 0 to {count - 1}")
    return chosen


def overlay(image: Image.Image | np.ndarray, heat: np.ndarray) -> Image.Image:
    """Lays a heat map over a picture as red of varying opacity.

    The map is divided by its largest value, so opacities compare positions within a picture, not pictures.

    Args:
      image: any picture, or uint8 (H, W, 3). What the model's resize and centre crop take is the largest centred
        rectangle of the map's shape; the rest is cut off.
      heat: (h, w), not negative, over square patches.

    Returns:
      RGB, the size of that rectangle.

    Raises:
      ValueError: the map has a negative value or one that is not finite.
    """
    if not np.isfinite(heat).all() or heat.min() < 0:
        raise ValueError("a heat map needs finite values of at least 0")
    image = _centre_crop(_rgb(image), heat.shape)
    alpha = heat / max(heat.max(), np.finfo(np.float32).tiny)
    alpha = Image.fromarray(np.uint8(np.rint(255 * alpha))).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", image.size, RED), image, alpha)


def _rgb(image: Image.Image | np.ndarray) -> Image.Image:
    return (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")


def _centre_crop(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The largest centred rectangle with the proportions of `shape`, (height, width)."""
    rows, columns = shape
    unit = min(image.height / rows, image.width / columns)
    height, width = round(rows * unit), round(columns * unit)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def sheet(
    images: Sequence[Image.Image | np.ndarray],
    texts: Sequence[Sequence[str]],
    heats: Sequence[np.ndarray],
    zero_mass: Sequence[np.ndarray],
    boxes: Sequence[Sequence[tuple[float, float, float, float] | None]] | None = None,
    *,
    tile: int = 192,
) -> Image.Image:
    """A contact sheet: one row per image, the image first, then one overlay per text with the text below it.

    Args:
      images: B pictures, as `overlay` takes them.
      texts: B lists of strings; lists may differ in length.
      heats: for each image (n, h, w), one map per text.
      zero_mass: for each image (n,), printed under its text.
      boxes: for each image and text (x0, y0, x1, y1) in pixels of the cropped image, or None; drawn as a frame.
      tile: width of a picture in pixels.

    Raises:
      ValueError: the lists differ in length, or there is nothing to draw.
    """
    if not any(len(row) for row in texts):
        raise ValueError("a sheet needs at least one text")
    boxes = [[None] * len(row) for row in texts] if boxes is None else boxes
    rows = []
    for image, row, row_heats, row_mass, row_boxes in zip(images, texts, heats, zero_mass, boxes, strict=True):
        cells = [
            _cell(image, heat, f"{text}\n[nothing: {mass:.0%}]", box, tile)
            for text, heat, mass, box in zip(row, row_heats, row_mass, row_boxes, strict=True)
        ]
        if cells:
            rows.append([_cell(image, np.zeros_like(row_heats[0]), "", None, tile), *cells])
    return _grid(rows)


def _cell(image: Image.Image | np.ndarray, heat: np.ndarray, caption: str, box, tile: int) -> Image.Image:
    """An overlay scaled to the width of a tile, with a frame in it and a caption below."""
    picture = _centre_crop(_rgb(image), heat.shape)
    scale = tile / picture.width
    resampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC  # small pictures show their pixels
    picture = overlay(picture.resize((tile, round(picture.height * scale)), resampling), heat)
    if box is not None:
        ImageDraw.Draw(picture).rectangle([scale * side for side in box], outline=BOX, width=2)
    font = ImageFont.load_default(FONT_SIZE)
    columns = max(1, int(tile / font.getlength("n")))
    lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, columns)]
    line_height = FONT_SIZE + 3
    cell = Image.new("RGB", (tile, picture.height + line_height * len(lines)), "white")
    cell.paste(picture)
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((0, picture.height + line_height * number), line, fill="black", font=font)
    return cell


def _grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Cells in rows, each row as high as its highest cell."""
    heights = [max(cell.height for cell in row) for row in rows]
    width = max(sum(cell.width + MARGIN for cell in row) for row in rows)
    page = Image.new("RGB", (width + MARGIN, sum(heights) + MARGIN * (len(rows) + 1)), "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for cell in row:
            page.paste(cell, (left, top))
            left += cell.width + MARGIN
        top += height + MARGIN
    return page
