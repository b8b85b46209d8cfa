"""Pictures in the forms that people have them in: paths, PIL images, arrays; decoded one by one, when asked for."""

import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image

from flair_jax.data.transforms import images as image_rules

Picture: TypeAlias = str | os.PathLike | Image.Image | np.ndarray

EXPECTED = "expected a path, a PIL image or a uint8 array (H, W, 3)"


class Pictures(Sequence[Image.Image]):
    """Pictures by index, upright and RGB.

    A picture with an EXIF orientation, whether it comes as a file or as a PIL image, is turned and mirrored as that
    says, so that it is seen as the camera was held; sizes and coordinates are those of the turned picture. Files are
    read when their turn comes, and nothing is kept.

    Args:
      pictures: one picture or several, mixed: a path, a PIL image of any mode, or uint8 (H, W, 3); an array
        (B, H, W, 3) is B of them.

    Raises:
      TypeError, ValueError: something is no picture, see `EXPECTED`.
    """

    def __init__(self, pictures: Picture | Iterable[Picture]):
        if isinstance(pictures, Pictures):
            pictures = pictures._items
        elif is_one(pictures):
            pictures = [pictures]
        elif not isinstance(pictures, Iterable):
            raise TypeError(f"images are a {type(pictures).__name__}; {EXPECTED}, or several of them")
        self._items = list(pictures)
        for number, item in enumerate(self._items):
            if isinstance(item, np.ndarray):
                if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
                    raise ValueError(f"images[{number}] is an array {item.dtype} {item.shape}; {EXPECTED}")
            elif not isinstance(item, str | os.PathLike | Image.Image):
                raise TypeError(f"images[{number}] is a {type(item).__name__}; {EXPECTED}")
        self._lock = threading.Lock()  # a PIL image may stand in the list twice, and is decoded by one thread

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """What messages call a picture: its path, or its number."""
        item = self._items[index]
        return os.fspath(item) if isinstance(item, str | os.PathLike) else f"images[{index}]"

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of a picture, upright; most files are not decoded for it. Raises as `[index]` does."""
        item = self._items[index]
        if not isinstance(item, str | os.PathLike):
            return self[index].size
        try:
            width, height, orientation = image_rules.stored_size(pathlib.Path(item).expanduser().read_bytes())
        except image_rules.ImageError as error:
            raise image_rules.ImageError(f"{self.name(index)}: {error}") from error
        return (height, width) if orientation > 4 else (width, height)  # these swap the axes

    def __getitem__(self, index: int) -> Image.Image:
        """
        Raises:
          ImageError: it cannot be used; the message names the picture. OSError: the file cannot be read.
        """
        item = self._items[index]
        try:
            if isinstance(item, np.ndarray):
                return Image.fromarray(item)
            if isinstance(item, Image.Image):
                image_rules.check_pixels(item.size, "the image")
                with self._lock:
                    item.load()
                    return image_rules.to_rgb(image_rules.turn_upright(item))
            return image_rules.to_rgb(image_rules.decode(pathlib.Path(item).expanduser().read_bytes(), upright=True))
        except image_rules.ImageError as error:
            raise image_rules.ImageError(f"{self.name(index)}: {error}") from error
        except Exception as error:
            if isinstance(item, Image.Image):  # Pillow meets damaged bytes with a dozen types of exception
                raise image_rules.ImageError(f"{self.name(index)}: cannot decode the image: {error}") from error
            raise


def is_one(pictures: Picture | Iterable[Picture]) -> bool:
    """Whether what `Pictures` takes is one picture, not several of which there may be one."""
    if isinstance(pictures, np.ndarray):
        return pictures.ndim == 3
    return isinstance(pictures, str | os.PathLike | Image.Image)


def as_pictures(pictures: Picture | Iterable[Picture]) -> Pictures:
    """What `Pictures` takes as `Pictures`; those that are some already stay as they are."""
    return pictures if isinstance(pictures, Pictures) else Pictures(pictures)


class Fitted(Sequence[np.ndarray]):
    """Pictures as a model takes them, uint8 (H, W, 3) of one size, by index; decoded when asked for.

    Attributes:
      sizes: width and height of the pictures that were decoded, by index.

    Args:
      pictures: what to fit.
      fit: RGB image, (height, width) -> uint8 (H, W, 3), such as a model's `preprocessing.fit`.
      size: height and width.
    """

    def __init__(
        self,
        pictures: Pictures,
        fit: Callable[[Image.Image, tuple[int, int]], np.ndarray],
        size: tuple[int, int],
    ):
        self._pictures, self._fit, self._size = pictures, fit, tuple(size)
        self.sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), *self._size, 3

    def __getitem__(self, index: int) -> np.ndarray:
        """
        Raises:
          ImageError: naming the picture. OSError: the file cannot be read.
        """
        picture = self._pictures[index]
        self.sizes[int(index)] = picture.size
        try:
            return self._fit(picture, self._size)
        except image_rules.ImageError as error:
            raise image_rules.ImageError(f"{self._pictures.name(index)}: {error}") from error
