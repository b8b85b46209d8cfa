"""The example of FLAIR's model card: one image, four texts and their logits, to prove a conversion of released weights.

Source: the card of xiaorui638/flair on Hugging Face's hub and `src/minimal_example.py` of the reference. The image is
`assets/puppy.jpg` of the reference's repository, whose licence is not stated: bring your own copy.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flair_jax import pretrained

WEIGHTS = "flair-cc3m-recap.pt"
IMAGE_BYTES = 35_797
TEXTS = (
    "In the image, a small white puppy with black ears and eyes is the main subject",  # true, as the second one
    "The white door behind the puppy is closed, and there's a window on the right side of the door",
    "A red ladybug is surrounded by green glass beads",  # false, as the last one
    "Dominating the scene is a white desk, positioned against a white brick wall",
)
# Computed by the reference in float16 (CUDA's autocast), with bias and without.
LOGITS = {
    "get_logits": (4.4062, 6.9531, -20.5000, -18.1719),
    "get_logits_as_clip": (12.4609, 15.6797, -3.8535, -0.2281),
}
# Float16 has steps of 1/64 at these values, and every layer rounds; an error of conversion is larger than 1.
TOLERANCE = 0.25


class Comparison(NamedTuple):
    """A logit: `method` of `Pretrained`, the text, ours and the published one."""

    method: str
    text: str
    ours: float
    published: float

    @property
    def good(self) -> bool:
        return abs(self.ours - self.published) <= TOLERANCE


def compare(weights: str | os.PathLike, image: str | os.PathLike) -> list[Comparison]:
    """All logits of the example with some weights, those of `WEIGHTS` if the numbers are to agree.

    Raises:
      ValueError: the image is another file than the card's. FileNotFoundError and others: see `pretrained.read`.
    """
    content = Path(image).read_bytes()
    if len(content) != IMAGE_BYTES:
        raise ValueError(f"{image} has {len(content):,} bytes; the card's image, puppy.jpg, has {IMAGE_BYTES:,}")
    return compare_image(weights, Image.open(image))


def compare_image(weights: str | os.PathLike, image: Image.Image) -> list[Comparison]:
    """As `compare`, for an image that is there."""
    model = pretrained.load(weights)
    images, tokens = model.preprocess(image), model.tokenize(TEXTS)
    found = []
    for method, published in LOGITS.items():
        ours = np.asarray(getattr(model, method)(images, tokens))[0]
        found += [Comparison(method, *row) for row in zip(TEXTS, map(float, ours), published, strict=True)]
    return found
