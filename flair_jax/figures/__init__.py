"""Pictures of results, a module per task: arrays -> PIL images. Charts are matplotlib's, pages of pictures PIL's."""

from typing import Any

import numpy as np
from PIL import Image


def to_image(figure: Any, dpi: int = 110) -> Image.Image:
    """A matplotlib figure as a PIL image, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    # The pixels of `savefig` to the bit, for two thirds of its time: laid out once, without a PNG in between.
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plain(text: str) -> str:
    """A text for matplotlib that is drawn as it is: dollar signs would enclose a formula."""
    return text.replace("$", r"\$")
