"""Pictures of results, a module per task: arrays -> PIL images."""

import io
from typing import Any

from PIL import Image


def to_image(figure: Any, dpi: int = 110) -> Image.Image:
    """A matplotlib figure as a PIL image, RGB."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return Image.open(file).convert("RGB")
