"""Images for the shards: checked to the last byte, and made smaller where they are larger than wanted."""

import io
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps

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
    if upright and _orientation(image):
        return Picture(b"", "", *ImageOps.exif_transpose(image).size)
    return Picture(b"", KEPT.get(image.format, ""), image.width, image.height)


def fit(data: bytes, found: Picture, shorter_side: int | None, quality: int, upright: bool) -> Picture:
    """An image whose shorter side has at most `shorter_side` pixels.

    One that is small enough already, in a format that training reads, is passed on bit for bit. Others are resized
    with Pillow's antialiased bicubic weights and stored as JPEG.

    The EXIF orientation says how a viewer has to turn the stored pixels; training and the reference do not. With
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
    image = images.decode(data)
    orientation = _orientation(image)
    image = images.to_rgb(ImageOps.exif_transpose(image) if upright and orientation else image)
    if shorter_side is not None and shorter > shorter_side:
        size = tuple(max(1, round(side * shorter_side / shorter)) for side in image.size)
        image = images.resize(image, *size)
    options = {"quality": quality}
    if orientation and not upright:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    target = io.BytesIO()
    image.save(target, "JPEG", **options)
    return Picture(target.getvalue(), "jpg", image.width, image.height)


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation of a decoded image, 2 to 8; None if the pixels are stored upright or nothing says so.

    Pillow turns TIFF files itself when it decodes them.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data makes Pillow raise errors of many types; the pixels are good all the same
        return None
    return orientation if orientation in range(2, 9) else None
