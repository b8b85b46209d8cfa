"""Pictures of zero-shot classification: confused classes, average precision by class, right and wrong images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flair_jax.figures import page, plain, to_image

CLASSES = 15  # of a confusion matrix, at most
BARS = 30
EXAMPLES = 5  # images that are right, and as many that are wrong
NAME = 24  # characters of a class's name in a chart
TILE = 192  # width of an image in pixels


def confusion(classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> Image.Image:
    """The classes that are most often taken for each other: true ones down, predicted ones across.

    Args:
      classes: C names.
      labels, predictions: int (I,). Numbers in the picture count images; colours are their share of the row's class.
    """
    pairs, counts = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    wrong = np.flatnonzero(pairs[0] != pairs[1])
    often = wrong[np.argsort(-counts[wrong], kind="stable")]
    chosen = list(dict.fromkeys(pairs[:, often].T.flat))[:CLASSES] or list(range(min(CLASSES, len(classes))))
    number = {label: row for row, label in enumerate(chosen)}
    matrix = np.zeros((len(chosen), len(chosen)), int)
    for (label, prediction), count in zip(pairs.T, counts, strict=True):
        if label in number and prediction in number:
            matrix[number[label], number[prediction]] = count
    total = np.maximum(np.bincount(labels, minlength=len(classes))[chosen], 1)[:, None]

    side = 3 + 0.45 * len(chosen)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(matrix / total, cmap="Blues", vmin=0, vmax=1)
    names = [_short(classes[label]) for label in chosen]
    axes.set_xticks(range(len(chosen)), names, rotation=90)
    axes.set_yticks(range(len(chosen)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, column in np.argwhere(matrix):
        colour = "white" if matrix[row, column] > 0.6 * total[row] else "black"
        axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour)
    return to_image(figure, dpi=100)


def bars(classes: Sequence[str], precision: np.ndarray) -> Image.Image:
    """Average precision of the classes, float (C,); of many the worst and the best, without those of none (NaN)."""
    order = np.argsort(precision, kind="stable")[: np.isfinite(precision).sum()]
    if len(order) > BARS:
        order = np.concatenate([order[: BARS // 2], order[-BARS // 2 :]])
    figure = Figure(figsize=(6, 1 + 0.25 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    axes.bar_label(axes.barh(range(len(order)), precision[order]), fmt="%.2f", padding=3, size=8)
    axes.set_yticks(range(len(order)), [_short(classes[c]) for c in order])
    axes.set_xlim(0, 1.1)
    axes.set_ylim(-1, len(order))
    axes.set_xlabel("average precision")
    return to_image(figure, dpi=100)


def examples(
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str],
    best: np.ndarray,
    scores: np.ndarray,
    margin: np.ndarray,
) -> Image.Image:
    """Images that are right with the widest margin in the first row, those that are most clearly wrong in the second,
    each of another class, with their three best classes; true ones in green.

    Args:
      images: (H, W, 3) by index.
      labels: int (I,), or bool (I, C).
      classes: C names.
      best, scores: (I, k), the best classes and their scores.
      margin: (I,), by how much a true class leads; not finite: the image is not shown.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not np.isfinite(margin).any():
        raise ValueError("examples need an image whose true classes lead or follow by a finite margin")
    truth = labels if labels.ndim == 2 else labels[:, None] == np.arange(len(classes))
    known = np.isfinite(margin)
    right, wrong = known & (margin > 0), known & (margin <= 0)
    rows = [_spread(np.argsort(-margin, kind="stable"), right, truth), _spread(np.argsort(margin), wrong, truth)]
    lines = []
    for chosen, title in zip(rows, ("right", "wrong"), strict=True):
        cells = []
        for image in chosen:
            true = ", ".join(classes[number] for number in np.flatnonzero(truth[image]))
            parts = [
                page.text_block(f"{title}: {true}", TILE, most=2),
                page.fit_tile(images[image], TILE)[0],
            ]
            for name, score in zip(best[image], scores[image], strict=True):
                line = page.cut(f"{score:.2f} {classes[name]}", TILE)
                parts.append(page.text_block(line, TILE, page.RIGHT if truth[image, name] else "black"))
            cells.append(page.stacked(parts))
        lines += [page.beside(cells)] if cells else []
    return page.framed(page.stacked(lines, 2 * page.MARGIN))


def _spread(order: np.ndarray, allowed: np.ndarray, truth: np.ndarray) -> list[int]:
    """The first images in order that are allowed, of different classes first."""
    order = [int(image) for image in order if allowed[image]]
    first_of_class = {int(truth[image].argmax()): image for image in reversed(order)}
    return list(dict.fromkeys([*reversed(first_of_class.values()), *order]))[:EXAMPLES]


def _short(text: str) -> str:
    """The name of a class in a chart."""
    return plain(text if len(text) <= NAME else f"{text[: NAME - 1]}…")
