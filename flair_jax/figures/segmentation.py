"""Pictures of segmentation: masks beside images, and the IoU of the classes."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flair_jax.figures import plain, to_image

TILE = 256  # pixels of a picture's longer side
MARGIN, LINE, FONT = 6, 18, 12
LEGEND = 8  # classes in the legend of an image
OPACITY = 0.65  # of a mask over its image
NONE = np.array([0, 0, 0], np.uint8)  # pixels without a class
BAR_ROWS = 60  # classes in the bar chart, at most


def colours(classes: int) -> np.ndarray:
    """A colour for each class, uint8 (C, 3); neighbours in the list are far apart."""
    numbers = range(classes)
    shades = [colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, (0.95, 0.65, 0.8)[number % 3]) for number in numbers]
    return np.uint8(255 * np.array(shades))


def masks(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Sequence[str],
) -> Image.Image:
    """A row per image: the image, its true mask, the predicted one, and a legend of the classes in them.

    Args:
      images: uint8, or float from 0 to 1, (H, W, 3).
      labels, predictions: int (h, w), the class of each pixel; numbers that are no class are black.
      classes: C names.
    """
    counts = [_pixels(*masks, len(classes)) for masks in zip(labels, predictions, strict=True)]
    palette = np.tile(NONE, (256, 1))
    # The most frequent classes get the colours that differ most.
    palette[np.argsort(-sum(map(sum, counts)), kind="stable")] = colours(len(classes))
    font = ImageFont.load_default(FONT)
    rows = []
    for image, label, prediction, (true, found) in zip(images, labels, predictions, counts, strict=True):
        picture = Image.fromarray(image if image.dtype == np.uint8 else np.uint8(255 * np.clip(image, 0, 1)))
        scale = TILE / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(size)
        tiles = [picture]
        for mask in (label, prediction):
            flat = Image.fromarray(palette[np.asarray(mask, np.uint8)]).resize(size, Image.Resampling.NEAREST)
            tiles.append(Image.blend(picture, flat, OPACITY))
        rows.append((tiles, _legend(true, found, classes, palette, font)))
    heights = [max(tiles[0].height, legend.height) for tiles, legend in rows]
    width = 3 * (TILE + MARGIN) + MARGIN + max(140, *(legend.width for _, legend in rows))
    page = Image.new("RGB", (width, LINE + sum(heights) + MARGIN * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(("image", "true", "predicted", "* not in the true mask")):
        draw.text((MARGIN + column * (TILE + MARGIN), 2), title, fill="black", font=font)
    top = LINE
    for (tiles, legend), height in zip(rows, heights, strict=True):
        for column, tile in enumerate([*tiles, legend]):
            page.paste(tile, (MARGIN + column * (TILE + MARGIN), top))
        top += height + MARGIN
    return page


def _pixels(label: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pixels each class has in the true mask and, where something is labelled, in the predicted one."""
    counted = prediction[label < classes]
    return tuple(np.bincount(x.reshape(-1), minlength=256)[:classes] for x in (label, counted))


def _legend(true: np.ndarray, found: np.ndarray, classes, palette, font) -> Image.Image:
    """Classes by the pixels that they have or get; a star marks those that are not in the true mask."""
    order = [int(name) for name in np.argsort(-(true + found), kind="stable") if true[name] + found[name]]
    lines = [(palette[name], f"{classes[name]}{'' if true[name] else ' *'}") for name in order[:LEGEND]]
    if len(order) > LEGEND:
        lines.append((np.array([255, 255, 255], np.uint8), f"and {len(order) - LEGEND} more"))
    width = max((int(font.getlength(text)) for _, text in lines), default=0) + LINE + MARGIN
    picture = Image.new("RGB", (width + MARGIN, LINE * max(1, len(lines))), "white")
    draw = ImageDraw.Draw(picture)
    for number, (colour, text) in enumerate(lines):
        draw.rectangle((0, number * LINE + 2, LINE - 6, (number + 1) * LINE - 4), fill=tuple(colour.tolist()))
        draw.text((LINE, number * LINE), text, fill="black", font=font)
    return picture


def bars(classes: Sequence[str], iou: Mapping[str, np.ndarray]) -> Image.Image:
    """Bar chart of the IoU of each class, the best first; of many classes the best and the worst.

    Args:
      classes: C names.
      iou: by mode, float (C,); NaN is left out. The first mode decides the order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    first = next(iter(iou.values()))
    order = np.argsort(-first, kind="stable")[: np.isfinite(first).sum()]
    title = "intersection over union"
    if len(order) > BAR_ROWS:
        order = np.concatenate([order[: BAR_ROWS // 2], order[-BAR_ROWS // 2 :]])
        title += f", the best and the worst {BAR_ROWS // 2} classes"
    figure = Figure(figsize=(7, 1.5 + 0.2 * len(order)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / len(iou)
    largest = max(np.nanmax(values) for values in iou.values())
    for number, (mode, values) in enumerate(iou.items()):
        label = f"{mode}, mean {np.nanmean(values):.3f}"
        axes.barh(np.arange(len(order)) + number * height, np.nan_to_num(values[order]), height, label=label)
    axes.set(title=title, xlim=(0, min(1, 1.1 * largest + 1e-3)), yticks=np.arange(len(order)) + 0.4 - height / 2)
    axes.set_yticklabels([plain(classes[name]) for name in order], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(iou), fontsize=8)
    return to_image(figure)
