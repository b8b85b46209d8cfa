"""Pictures of segmentation: masks beside images, and the IoU of the classes."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from flair_jax.figures import page, plain, to_image

TILE, NAMES = 256, 200  # width of a picture and of its legend in pixels
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
    palette = np.empty((len(classes), 3), np.uint8)
    # The most frequent classes get the colours that differ most.
    palette[np.argsort(-sum(map(sum, counts)), kind="stable")] = colours(len(classes))
    rows = []
    for image, label, prediction, (true, found) in zip(images, labels, predictions, counts, strict=True):
        picture, _ = page.fit_tile(image, TILE)
        tiles = [picture, *(overlay(picture, mask, palette) for mask in (label, prediction))]
        titled = zip(("image", "true", "predicted"), tiles, strict=True)
        cells = [page.stacked([page.text_block(title, TILE), tile]) for title, tile in titled]
        rows.append(page.beside([*cells, _legend(true, found, classes, palette)]))
    return page.framed(page.stacked(rows, page.MARGIN))


def overlay(picture: Image.Image, mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A picture under the colours of a mask.

    Args:
      mask: int (h, w), the class of each pixel; numbers that are no class are black.
      palette: uint8 (C, 3).
    """
    is_class = (mask >= 0) & (mask < len(palette))
    flat = Image.fromarray(np.concatenate([palette, NONE[None]])[np.where(is_class, mask, len(palette))])
    return Image.blend(picture, flat.resize(picture.size, Image.Resampling.NEAREST), OPACITY)


def _pixels(label: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pixels each class has in the true mask and in the predicted one."""
    return tuple(np.bincount(x[(x >= 0) & (x < classes)], minlength=classes) for x in (label, prediction))


def _legend(true: np.ndarray, found: np.ndarray, classes: Sequence[str], palette: np.ndarray) -> Image.Image:
    """Classes of the true mask by their pixels, then those that are only predicted, which a star marks."""
    order = [int(number) for number in np.lexsort((-found, -true)) if true[number] + found[number]]
    lines = [page.text_block("* not in the true mask", NAMES)]
    for number in order[:LEGEND]:
        name = f"{classes[number]}{'' if true[number] else ' *'}"
        lines.append(page.marked(name, NAMES, tuple(palette[number].tolist())))
    if len(order) > LEGEND:
        lines.append(page.text_block(f"and {len(order) - LEGEND} more", NAMES))
    return page.stacked(lines)


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
