"""Images for the shards: decoded as a check, turned upright if wanted, and made smaller where they are too large."""

import io
from typing import NamedTuple

from PIL import ExifTags, Image

from flair_jax.data.transforms import images

# Formats that training reads as they are; the others become JPEG. MPO is a JPEG followed by more pictures.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Picture(NamedTuple):
    """An image file and what it is; `data` is empty after a mere inspection."""

    data: bytes
    extension: str
    width: int
    height: int


def inspect(data: bytes, upright: bool) -> Picture:
    """What an image is, after decoding all of it. The extension is "" for a file that cannot be stored as it is.

    Args:
      data: the image file.
      upright: whether `fit` is to turn it as its EXIF orientation says.

    Raises:
      images.ImageError: training could not use the image.
    """
    image = images.decode(data)
    images.to_rgb(image)
    if upright and images.orientation(image) != 1:
        return Picture(b"", "", *images.turn_upright(image).size)
    return Picture(b"", KEPT.get(image.format, ""), image.width, image.height)


def fit(data: bytes, found: Picture, shorter_side: int | None, quality: int, upright: bool) -> Picture:
    """An image whose shorter side has at most `shorter_side` pixels.

    One that is small enough already, in a format that training reads, is passed on bit for bit. Others are resized
    with Pillow's antialiased bicubic weights and stored as JPEG.

    The EXIF orientation says how a viewer has to turn the stored pixels; the reference does not. With
    `upright` the pixels are turned and the tag is dropped, so that all readers see the same image. Without, the pixels
    stay as they are stored and the tag is kept, so that each reader sees what it would see of the original file. All
    other EXIF data is dropped from files that are written anew.

    Args:
      data: the image file.
      found: the result of `inspect` with the same `upright`.
      shorter_side: in pixels; None keeps every size.
      quality: of the JPEG, 1 to 100.
      upright: whether to turn the pixels as the EXIF orientation says.
    """
    shorter = min(found.width, found.height)
    if found.extension and (shorter_side is None or shorter <= shorter_side):
        return found._replace(data=data)
    image = images.decode(data, upright)
    orientation = images.orientation(image)  # 1 after `upright` has turned it
    image = images.to_rgb(image)
    if shorter_side is not None and shorter > shorter_side:
        size = tuple(max(1, round(side * shorter_side / shorter)) for side in image.size)
        image = images.resize(image, *size)
    options = {"quality": quality}
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    target = io.BytesIO()
    image.save(target, "JPEG", **options)
    return Picture(target.getvalue(), "jpg", image.width, image.height)
