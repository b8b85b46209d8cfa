"""Images as models see them: decoded by Pillow, cropped, resized with antialiased bicubic weights, normalised.

Sizes are an int for a square or a pair (height, width). Pixels are uint8 RGB (H, W, 3). The arithmetic is to the bit
that of torchvision's transforms of PIL images, which the reference uses.
"""

import dataclasses
import io
import math
import numbers
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flair_jax.data.transforms.base import SampleError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training images, RGB in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MEAN_STD = {
    "openai": (MEAN, STD),
    "imagenet": (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)),
}

# Largest picture that is decoded or made on the way to a crop: a quarter of a gibibyte as RGB, and where Pillow
# itself starts to warn of a decompression bomb.
MAX_PIXELS = 89_478_485
# What web data sets hold. Pillow knows more, among them EPS, which it hands to an external program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class View(NamedTuple):
    """What a training crop shows of a picture.

    orientation: EXIF's, 1 to 8, by which the picture was turned first; 1: not at all.
    part: (x0, y0, x1, y1), the part of the turned picture, as shares of its width and height.
    flip: whether the part was mirrored, left for right.
    """

    orientation: int
    part: tuple[float, float, float, float]
    flip: bool


SIDED = {
    "refuse": "they end the run",
    "keep": "they are never mirrored",
    "flip": "they are mirrored like the others, and their texts become wrong",
}


class ImageError(SampleError):
    """An image that cannot be used. The message says why, without naming the image."""


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """What training does to a picture at random; the defaults are FLAIR's.

    Raises:
      ValueError: a value that is none of the allowed ones.
    """

    scale: tuple[float, float] = (0.9, 1.0)  # share of the area that a crop has
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its width / height
    squash: bool = False  # no crop is drawn: the whole picture is resized, its proportions are not kept
    flip: float = 0.0  # share of the pictures that are mirrored, left for right
    sided: str = "refuse"  # pictures with a text that says left or right: a key of SIDED

    def __post_init__(self):
        for name, highest, what in (("scale", 1, "shares of the area"), ("ratio", math.inf, "width over height")):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= highest:
                raise ValueError(f"augmentation.{name} is {bounds}; expected a smallest and a largest, {what}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation.flip is {self.flip}; expected a share of the pictures, from 0 to 1")
        if self.sided not in SIDED:
            raise ValueError(f"augmentation.sided is {self.sided!r}; expected one of {', '.join(SIDED)}")

    def draw_box(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of a picture: of a random part, or of all of it."""
        return (0, 0, width, height) if self.squash else random_box(width, height, rng, self.scale, self.ratio)


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


def stored_size(data: bytes) -> tuple[int, int, int]:
    """Width, height and EXIF orientation of an image file, as it is stored, without decoding its pixels.

    TIFF files are decoded, for Pillow turns them then; their orientation is 1.

    Raises:
      ImageError: see `decode`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format != "TIFF":
                return *image.size, orientation(image)
    except Exception:  # of which the decoder says more
        pass
    return *decode(data).size, 1


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
    covering = _covering(image.width, image.height, (height, width))
    check_pixels(covering, f"the image of {image.width} x {image.height} pixels, resized for a crop,")
    image = resize(image, *covering)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return _pixels(image.crop((left, top, left + width, top + height)))


def squash(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """The whole of an image, resized to `size`, whose proportions it takes; converted to RGB last.

    Returns:
      uint8 (H, W, 3).
    """
    height, width = pair(size)
    return _pixels(resize(image, width, height))


def random_resized_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    rng: random.Random,
    options: AugmentationOptions = AugmentationOptions(),
    flip: bool = False,
) -> np.ndarray:
    """A random part of an image, resized to `size`: the training augmentation.

    Cropped first and resized then: pixels outside the part are ignored.

    Args:
      image: of any mode; it is converted to RGB last.
      size: of the result.
      rng: the source of all draws.
      options: how the part is drawn.
      flip: whether the result is mirrored, left for right.

    Returns:
      uint8 (H, W, 3).
    """
    part = squash(image.crop(options.draw_box(image.width, image.height, rng)), size)
    return np.ascontiguousarray(part[:, ::-1]) if flip else part


RESIZES: dict[str, Callable[[Image.Image, int | tuple[int, int]], np.ndarray]] = {
    "crop": evaluation_crop,
    "squash": squash,
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The way from a picture to the input of a model, wherever nothing is drawn at random: `config.model.preprocess`.

    Calling it normalises, inside jit too. The defaults are those of CLIP and FLAIR; GRAIN has "squash" and "imagenet".

    Attributes:
      resize: a key of `RESIZES`. "crop" takes the centre, "squash" the whole picture without its proportions.
      mean_std: a key of `MEAN_STD`: the mean that is subtracted, and the deviation that is divided by.

    Raises:
      ValueError: there is no such key.
    """

    resize: str = "crop"
    mean_std: str = "openai"

    def __post_init__(self):
        for name, allowed in (("resize", RESIZES), ("mean_std", MEAN_STD)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config.model.preprocess.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}"
                )

    @property
    def fit(self) -> Callable[[Image.Image, int | tuple[int, int]], np.ndarray]:
        """(image, size) -> uint8 (H, W, 3): `evaluation_crop` or `squash`."""
        return RESIZES[self.resize]

    def fit_boxes(self, boxes: np.ndarray, image_size: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Boxes where `fit` puts them: resized with the image, cut at the edges of the result.

        Args:
          boxes: float (M, 4), x0, y0, x1, y1 in pixels of the image.
          image_size: width and height of the image. size: height and width of the result.

        Returns:
          float (K, 4) in pixels of the result, without the boxes of which nothing is left: less than a thousandth of a
          pixel in one direction.
        """
        scale, offset = self._placement(image_size, size)
        moved = np.reshape(boxes, (-1, 2, 2)) * scale - offset
        moved = moved.clip(0, [size[1], size[0]]).reshape(-1, 4)
        return moved[(moved[:, 2:] - moved[:, :2] > 1e-3).all(1)]

    def unfit_boxes(self, boxes: np.ndarray, image_size: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Where boxes of the result of `fit` lie in the image, the inverse of `fit_boxes`.

        Args:
          boxes: float (M, 4), x0, y0, x1, y1 in pixels of the result.
          image_size: width and height of the image. size: height and width of the result.

        Returns:
          float (M, 4) in pixels of the image, cut at its edges.
        """
        scale, offset = self._placement(image_size, size)
        moved = (np.reshape(boxes, (-1, 2, 2)) + offset) / scale
        return moved.clip(0, np.array(image_size, float)).reshape(-1, 4)

    def seen(self, image_size: Sequence[int], size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of an image that the result of `fit` shows: x0, y0, x1, y1 in pixels of the image.

        Args:
          image_size: width and height of the image. size: height and width of the result.
        """
        return tuple(self.unfit_boxes(np.array([[0, 0, size[1], size[0]]]), image_size, size)[0].tolist())

    def _placement(self, image_size: Sequence[int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """A point (x, y) of the image is at (x, y) * scale - offset in the result of `fit`: both, float (2,)."""
        (width, height), (rows, columns) = (int(side) for side in image_size), size
        resized = (columns, rows) if self.resize == "squash" else _covering(width, height, size)
        offset = np.array([round((resized[0] - columns) / 2), round((resized[1] - rows) / 2)])
        return np.array(resized) / (width, height), offset

    def __call__(self, pixels):
        """Pixels as the vision tower takes them: in [0, 1], minus the mean, over the deviation.

        Args:
          pixels: (…, 3), a numpy or a jax array: uint8; or floats, which are taken as normalised and stay.

        Returns:
          float32 (…, 3), of the same kind of array.
        """
        if pixels.dtype != np.uint8:
            return pixels
        mean, std = MEAN_STD[self.mean_std]
        return (pixels.astype(np.float32) / 255 - mean) / std


def random_box(
    width: int, height: int, rng: random.Random, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part; if ten draws do not fit, the largest allowed in the centre.

    Args:
      width, height: of the image.
      rng: the source of all draws.
      scale: range of the part's share of the image's area.
      ratio: range of the part's width over its height, drawn uniformly in the logarithm.
    """
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


def _covering(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image of the same proportions that just covers `size`, (height, width)."""
    rows, columns = size
    if not width or not height:
        raise ImageError(f"the image has {width} x {height} pixels")
    if width * rows <= height * columns:  # the width decides the scale
        return columns, columns * height // width
    return rows * width // height, rows


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
