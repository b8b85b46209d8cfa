"""Pictures of choice: accuracy by part beside chance, and wrong decisions with their scores."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from flair_jax.figures import page, plain, to_image
from flair_jax.report import Result

MAX_BARS = 40
TILE = 160  # width of an image in pixels
TEXT = 420  # width of the column of texts


@dataclasses.dataclass(frozen=True)
class Decision:
    """An item and how it was scored.

    Attributes:
      images: the item's, uint8 (H, W, 3). texts: the item's. scores: (images, texts). positives, group: the item's.
    """

    images: Sequence[np.ndarray]
    texts: Sequence[str]
    scores: np.ndarray
    positives: int
    group: str


def bars(results: Sequence[Result]) -> Image.Image:
    """Horizontal bars for every part of a set, one per mode, with a mark at chance.

    Args:
      results: of one set, as `Choice` yields them: metrics `<name>` and `<name>/<part>`, and mode "chance". Of the
        metrics that have parts the first one is drawn, or all metrics of the whole set if there are none.
    """
    values = {(result.metric, result.mode): result.value for result in results}
    modes = list(dict.fromkeys(result.mode for result in results if result.mode != "chance"))
    metrics = list(dict.fromkeys(result.metric for result in results))
    first = next((name for name in metrics if any(other.startswith(f"{name}/") for other in metrics)), None)
    chosen = metrics if first is None else [m for m in metrics if m == first or m.startswith(f"{first}/")]
    chosen = chosen[:MAX_BARS]
    figure = Figure(figsize=(7, 1.5 + 0.22 * len(chosen) * max(1, len(modes))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / max(1, len(modes))
    rows = np.arange(len(chosen))
    for number, mode in enumerate(modes):
        axes.barh(rows + number * height, [values[metric, mode] for metric in chosen], height, label=mode)
    chance = [values[metric, "chance"] for metric in chosen]
    axes.vlines(chance, rows - height / 2, rows - height / 2 + 0.8, colors="black", linestyles="dashed", label="chance")
    labels = [plain(metric.removeprefix(f"{first}/") if first else metric) for metric in chosen]
    axes.set_yticks(rows + 0.4 - height / 2, labels, fontsize=8)
    axes.set(xlim=(0, 1), xlabel=plain(first or "score"), title=plain(results[0].set))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(modes) + 1, fontsize=8)
    return to_image(figure, dpi=100)


def sheet(decisions: Sequence[Decision]) -> Image.Image:
    """One row per decision: its images, and its texts with their scores, right answers green, wrong ones red."""
    return page.framed(page.stacked([_row(decision) for decision in decisions], 2 * page.MARGIN))


def _row(decision: Decision) -> Image.Image:
    cells = []
    for number, image in enumerate(decision.images):
        picture, _ = page.fit_tile(image, TILE)
        label, colour = f"image {number}" if len(decision.images) > 1 else "", "black"
        if len(decision.images) > 1 and len(decision.texts) == 1:
            label, colour = (
                f"{decision.scores[number, 0]:.3f}",
                page.RIGHT if number < decision.positives else page.WRONG,
            )
        cells.append(page.stacked([picture, page.text_block(label, TILE, colour)]))
    blocks = [page.text_block(label, TEXT, colour) for label, colour in _labels(decision)]
    return page.beside([*cells, page.stacked(blocks)])


def _labels(decision: Decision) -> list[tuple[str, page.Colour]]:
    """What stands beside the images, with colours: the group, and each text with its scores."""
    labels = [(decision.group, "black")]
    for number, text in enumerate(decision.texts):
        if len(decision.texts) == 1:
            labels.append((text, "black"))
        elif len(decision.images) == 1:
            label = f"{decision.scores[0, number]:.3f}  {text}"
            labels.append((label, page.RIGHT if number < decision.positives else page.WRONG))
        else:
            label = f"{decision.scores[0, number]:.3f} / {decision.scores[1, number]:.3f}  text {number}: {text}"
            labels.append((label, "black"))
    return labels
