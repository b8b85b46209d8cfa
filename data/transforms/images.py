"""Images as FLAIR sees them: decoded by Pillow, cropped, resized with antialiased bicubic weights, normalised.

Sizes are an int for a square or a pair (height, width). Pixels are uint8 RGB (H, W, 3). The arithmetic is to the bit
that of torchvision's transforms of PIL images, which the reference uses.
"""

import dataclasses
import io
import math
import numbers
import random
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flair_jax.data.transforms.base import SampleError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training images, RGB in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# Largest picture that is decoded or made on the way to a crop: a quarter of a gibibyte as RGB, and where Pillow
# itself starts to warn of a decompression bomb.
MAX_PIXELS = 89_478_485
# What web data sets hold. Pillow knows more, among them EPS, which it hands to an external program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(SampleError):
    """An image that cannot be used. The message says why, without naming the image."""


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """Bounds of the random resized crop; the defaults are FLAIR's."""

    scale: tuple[float, float] = (0.9, 1.0)  # share of the area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height


def decode(data: bytes, upright: bool = False) -> Image.Image:
    """Decodes an image file, in the mode that it is stored in.

    Of an animation the first frame is taken.

    Args:
      data: the bytes of a file of one of `FORMATS`.
      upright: whether to turn the image as its EXIF orientation says, see `turn_upright`. The reference does not, so
        the published data sets are trained and evaluated as they are stored. (TIFF files are turned by Pillow always.)

    Returns:
      The decoded image, of any mode; `to_rgb` makes it RGB.

    Raises:
      ImageError: if the bytes are no such image, if they are damaged or cut short, or if the image has more than
        `MAX_PIXELS`.
    """
    file = io.BytesIO(data)
    # Pillow's readers meet damaged bytes with a dozen types of exception, hence the wide nets.
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:
        raise ImageError(f"cannot read the image's header: {error}") from error
    check_pixels(image.size, "the image")
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"cannot decode the image: {error}") from error
    return turn_upright(image) if upright else image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 (as it is stored) where there is none or it cannot be read.

    Reading it does not decode the image.
    """
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged tags raise a dozen types of exception, and say nothing of the pixels
        return 1
    return found if found in range(1, 9) else 1


def turn_upright(image: Image.Image) -> Image.Image:
    """An image turned and mirrored as its EXIF orientation says, so that it is seen as the camera was held.

    The result has no orientation left, so turning it again changes nothing. Images without one come back as they are.
    """
    if orientation(image) == 1:
        return image
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; transparency is dropped.

    16-bit grey keeps the upper byte of each value, as Pillow's reader does for 16-bit colour. (Pillow's own
    conversion, which the reference calls, turns everything above 255 white.) 32-bit integers are taken for 16-bit
    values, for older versions of Pillow read 16-bit files as such.

    Raises:
      ImageError: for modes without a rule: 32-bit floats, whose range no file states, and what Pillow cannot convert.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageError("32-bit float pixels cannot be converted to RGB: their range is unknown")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)  # (H, W)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without the warning that a palette's transparency gets lost
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"cannot convert mode {image.mode} to RGB: {error}") from error


def evaluation_crop(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of an image, after resizing it to just cover `size`.

    For a square that resizes the shorter side to `size`. The image is converted to RGB last, as in the reference's
    inference transform. The reference's data set loaders convert first, which differs for images with a palette or
    transparency: to do as they do, pass `to_rgb(image)`.

    Returns:
      uint8 (H, W, 3).

    Raises:
      ImageError: if the image is so long that the resized one has more than `MAX_PIXELS`.
    """
    height, width = pair(size)
    if image.width * height <= image.height * width:  # the width decides the scale
        covering = (width, width * image.height // image.width)
    else:
        covering = (height * image.width // image.height, height)
    check_pixels(covering, f"the image of {image.width} x {image.height} pixels, resized for a crop,")
    image = resize(image, *covering)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return _pixels(image.crop((left, top, left + width, top + height)))


def random_resized_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    rng: random.Random,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of an image, resized to `size`: the training augmentation.

    Cropped first and resized then: pixels outside the part are ignored.

    Args:
      image: of any mode; it is converted to RGB last.
      size: of the result.
      rng: the source of all draws.
      scale: range of the part's share of the image's area.
      ratio: range of the part's width over its height, drawn uniformly in the logarithm.

    Returns:
      uint8 (H, W, 3).
    """
    height, width = pair(size)
    part = image.crop(random_box(image.width, image.height, rng, scale, ratio))
    return _pixels(resize(part, width, height))


def normalize(pixels):
    """Pixels as the vision tower takes them: in [0, 1], minus `MEAN`, over `STD`.

    Args:
      pixels: uint8 (…, 3), a numpy or a jax array.

    Returns:
      float32 (…, 3), of the same kind of array.
    """
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


def random_box(
    width: int, height: int, rng: random.Random, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part; if ten draws do not fit, the largest allowed in the centre."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = rng.randint(0, height - part_height)
            left = rng.randint(0, width - part_width)
            return left, top, left + part_width, top + part_height
    part_width, part_height = width, height
    if width / height < ratio[0]:
        part_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        part_width = round(height * ratio[1])
    left, top = (width - part_width) // 2, (height - part_height) // 2
    return left, top, left + part_width, top + part_height


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """By Pillow's antialiased bicubic weights, along the rows first.

    The reference's Pillow knows that order alone; Pillow 13 starts with the columns where that is less work, and at
    hard edges, where the first pass is clipped to 8 bits, gives other pixels.
    """
    if image.mode in ("LA", "RGBA"):  # as Pillow does it: multiplied by alpha meanwhile, and once for both passes
        return resize(image.convert(image.mode[:-1] + "a"), width, height).convert(image.mode)
    rows = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return rows.resize((width, height), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.array(to_rgb(image))  # (H, W, 3)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width): of a square's side, or of a pair, which JSON gives back as a list.

    Raises:
      ValueError: the size is neither a positive integer nor a pair of them.
    """
    sides = (size, size) if isinstance(size, numbers.Integral) else size
    sound = isinstance(sides, Sequence) and len(sides) == 2 and not isinstance(sides, str)
    if not sound or not all(isinstance(side, numbers.Integral) and side > 0 for side in sides):
        raise ValueError(f"an image size is a positive integer or a pair (height, width) of them, not {size!r}")
    return int(sides[0]), int(sides[1])


def check_pixels(size: tuple[int, int], subject: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{subject} has {size[0]} x {size[1]} pixels; at most {MAX_PIXELS:,} are allowed")
