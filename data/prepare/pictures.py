"""Images for the shards: checked to the last byte, and made smaller where they are larger than wanted."""

import io
from typing import NamedTuple

from flair_jax.data.transforms import images

# Formats that training reads as they are; the others become JPEG. MPO is a JPEG with more pictures behind it.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Picture(NamedTuple):
    """An image file and what it is; `data` is empty after a mere inspection."""

    data: bytes
    extension: str
    width: int
    height: int


def inspect(data: bytes) -> Picture:
    """What an image is, after decoding all of it. The extension is "" for a format that must be converted.

    Raises:
      data.images.ImageError: training could not use the image.
    """
    image = images.decode(data)
    images.to_rgb(image)
    return Picture(b"", KEPT.get(image.format, ""), image.width, image.height)


def fit(data: bytes, found: Picture, shorter_side: int | None, quality: int) -> Picture:
    """An image whose shorter side has at most `shorter_side` pixels.

    One that is small enough already, in a format that training reads, is passed on bit for bit. Others are resized
    with Pillow's antialiased bicubic weights and stored as JPEG. The EXIF orientation is not applied, as in training.

    Args:
      data: the image file.
      found: what `inspect` said of it.
      shorter_side: in pixels; None keeps every size.
      quality: of the JPEG, 1 to 100.
    """
    shorter = min(found.width, found.height)
    if found.extension and (shorter_side is None or shorter <= shorter_side):
        return found._replace(data=data)
    image = images.to_rgb(images.decode(data))
    if shorter_side is not None and shorter > shorter_side:
        size = tuple(max(1, round(side * shorter_side / shorter)) for side in image.size)
        image = images.resize(image, *size)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=quality)
    return Picture(target.getvalue(), "jpg", image.width, image.height)
