"""Training crops at several times the speed of `images.random_resized_crop`, from the same draws and so the same boxes.

JPEG is decoded by simplejpeg, large ones at a half, a quarter or an eighth of their size, and resized by SIMD code with
Pillow's filter; or the decoded part goes to the accelerator, which resizes it (`flair_jax/augmentation.py`). What is no
plain JPEG is decoded by Pillow, under the same limits and with the same errors. Pixels differ a little from the
reference's: the README's data chapter says by how much.
"""

import io
import math
import random
import threading
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from flair_jax.data.transforms import images
from flair_jax.data.transforms.images import AugmentationOptions

try:
    import cykooz_resizer
except ImportError:  # there is no wheel for Linux on ARM, where Pillow does its work: the same filter, but slower
    cykooz_resizer = None

# A picture is decoded smaller as long as its box keeps this many pixels for each one of the result. Below it the
# coarser picture begins to show: at 1.0 it is 8 dB further from the reference's pixels.
MIN_DENSITY = 1.25
# Sides of a canvas over the longer side of the crop. Pictures with a shorter side of 256 pixels and their boxes of at
# most 4:3 fit in a canvas for crops of 224.
CANVAS_SHARE, CANVAS_MULTIPLE = 1.5, 32


_own = threading.local()


class Part(NamedTuple):
    """A box with fractional borders, and the whole pixels that it touches."""

    pixels: np.ndarray  # uint8 (h, w, 3)
    top: float  # of the box in these pixels, in [0, 1)
    left: float
    height: float
    width: float


def random_resized_crop(
    data: bytes,
    size: int | tuple[int, int],
    rng: random.Random,
    options: AugmentationOptions,
    upright: bool = False,
    flip: bool = False,
) -> np.ndarray:
    """As `images.random_resized_crop`, from the file.

    Args:
      data: the bytes of a file of one of `images.FORMATS`.
      size, rng, options, flip: see there.
      upright: see `images.decode`; photographs that have to be turned are decoded by Pillow.

    Returns:
      uint8 (H, W, 3), not writable.

    Raises:
      images.ImageError: see `images.decode` and `images.to_rgb`.
    """
    size = images.pair(size)
    return _resize(_random_part(data, size, rng, options, upright, flip), size)


def canvas_side(size: int | tuple[int, int]) -> int:
    """Side of the canvas for crops of `size`: 352 pixels for 224, 512 for 336."""
    return math.ceil(CANVAS_SHARE * max(images.pair(size)) / CANVAS_MULTIPLE) * CANVAS_MULTIPLE


def canvas(
    data: bytes,
    size: int | tuple[int, int],
    rng: random.Random,
    options: AugmentationOptions,
    upright: bool = False,
    flip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The random part of an image before its resize, in the upper left corner of a canvas of one size for all images.

    A part that does not fit is resized to `size` here: the accelerator's resize then changes nothing.

    Args: as `random_resized_crop`.

    Returns:
      uint8 (C, C, 3) with C = `canvas_side(size)`, and the box in it: float32 (4,), top, left, height and width in
      pixels.

    Raises: as `random_resized_crop`.
    """
    size = images.pair(size)
    side = canvas_side(size)
    part = _random_part(data, size, rng, options, upright, flip)
    if max(part.pixels.shape) > side:
        part = Part(_resize(part, size), 0, 0, *size)
    pixels = np.zeros((side, side, 3), np.uint8)  # (C, C, 3)
    height, width, _ = part.pixels.shape
    pixels[:height, :width] = part.pixels
    return pixels, np.array(part[1:], np.float32)


def _random_part(
    data: bytes,
    size: tuple[int, int],
    rng: random.Random,
    options: AugmentationOptions,
    upright: bool,
    flip: bool,
) -> Part:
    """A random box of an image, of its full or, where `size` does not need that, of a fraction of its resolution."""
    jpeg_size = None if upright and _is_turned(data) else _jpeg_size(data)
    pixels = _decode(data, upright) if jpeg_size is None else None
    height, width = jpeg_size or pixels.shape[:2]
    left, top, right, bottom = options.draw_box(width, height, rng)
    shrink = 1
    if jpeg_size is not None:
        density = min((bottom - top) / size[0], (right - left) / size[1])
        # libjpeg-turbo has SIMD code for these fractions alone; three quarters take longer than the whole.
        shrink = max(factor for factor in (1, 2, 4, 8) if factor == 1 or density / factor >= MIN_DENSITY)
        try:
            pixels = _decode_jpeg(data, height, width, shrink)
        except ValueError:
            pixels, shrink = _decode(data), 1  # Pillow says what is wrong, or takes what is only slightly damaged
    left, top, right, bottom = left / shrink, top / shrink, right / shrink, bottom / shrink
    first_row, first_column = math.floor(top), math.floor(left)
    pixels = pixels[first_row : math.ceil(bottom), first_column : math.ceil(right)]
    part = Part(pixels, top - first_row, left - first_column, bottom - top, right - left)
    if not flip:
        return part
    mirrored = np.ascontiguousarray(pixels[:, ::-1])
    return part._replace(pixels=mirrored, left=mirrored.shape[1] - part.left - part.width)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that simplejpeg turns into RGB, None for anything else."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    images.check_pixels((width, height), "the image")
    return height, width


def _decode_jpeg(data: bytes, height: int, width: int, shrink: int) -> np.ndarray:
    """uint8 (⌈height / shrink⌉, ⌈width / shrink⌉, 3). ValueError for all that libjpeg warns of, as of a missing end."""
    if shrink == 1:
        return simplejpeg.decode_jpeg(data)
    return simplejpeg.decode_jpeg(data, min_height=math.ceil(height / shrink), min_width=math.ceil(width / shrink))


def _is_turned(data: bytes) -> bool:
    """Whether a file has an EXIF orientation by which it has to be turned; the pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            return images.orientation(image) != 1
    except Exception:  # of which the decoder says more
        return False


def _decode(data: bytes, upright: bool = False) -> np.ndarray:
    return np.asarray(images.to_rgb(images.decode(data, upright)))  # (H, W, 3)


def _resizer() -> "cykooz_resizer.Resizer":
    """One for each thread: it keeps its scratch memory."""
    if not hasattr(_own, "resizer"):
        _own.resizer = cykooz_resizer.Resizer()
    return _own.resizer


def _resize(part: Part, size: tuple[int, int]) -> np.ndarray:
    """The part's box by antialiased bicubic weights (a = -1/2), uint8 (H, W, 3)."""
    (pixels, top, left, height, width), (out_height, out_width) = part, size
    if cykooz_resizer is None:
        box = (left, top, left + width, top + height)
        return np.asarray(Image.fromarray(pixels).resize((out_width, out_height), Image.Resampling.BICUBIC, box))
    stored_height, stored_width, _ = pixels.shape
    kind = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(stored_width, stored_height, kind, pixels.tobytes())
    resized = cykooz_resizer.ImageData(out_width, out_height, kind)
    options = cykooz_resizer.ResizeOptions(
        cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom),
        crop_box=cykooz_resizer.CropBox(left, top, width, height),
    )
    _resizer().resize(source, resized, options)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(out_height, out_width, 3)  # (H, W, 3)
