"""Public evaluation sets: what their readers give, and how a set is listed in the table.

A reader opens the annotation files of a release and gives names: where each image lies, the texts, which belongs to
which. It decodes no image and knows no model, tokenizer or image size.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from flair_jax.data.transforms import images as image_rules

TASKS = ("retrieval", "classification", "segmentation", "choice", "pointing")


class AnnotationError(ValueError):
    """An annotation file that does not hold what its release says. The message names the file and the item."""


class MissingError(FileNotFoundError):
    """Files of a set that are not under the root; none of its parts can be read without one of them.

    Attributes:
      files: paths relative to the root.
    """

    def __init__(self, files: Iterable[str]):
        self.files = tuple(files)
        super().__init__(f"not found: {', '.join(self.files)}")


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclasses.dataclass(frozen=True)
class Picture:
    """Where the bytes of an image lie: in a file of its own or inside a tar.

    Attributes:
      path: the file.
      offset, size: of the bytes in the file; size None: to the end.
      box: left, top, right, bottom in pixels; what the image is cropped to after decoding, black where the box leaves
        the image, as Pillow does and so the suites that crop. None: all of it.
      box_in: width and height of the image that the box is measured in, of which this one may be a resized copy. None:
        of this one.
    """

    path: str
    offset: int = 0
    size: int | None = None
    box: tuple[float, float, float, float] | None = None
    box_in: tuple[int, int] | None = None

    def exists(self) -> bool:
        return _state(self.path) is not None

    def key(self) -> str:
        """Identifies the pixels: a changed file has another key.

        Raises:
          FileNotFoundError: there is no such file.
        """
        state = _state(self.path)
        if state is None:
            raise FileNotFoundError(f"{self.path}: no such image")
        return repr((os.path.abspath(self.path), state, self.offset, self.size, self.box, self.box_in))

    def read(self) -> bytes:
        """
        Raises:
          OSError: the file cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)

    def decode(self) -> Any:
        """The image, PIL, in the mode that it is stored in.

        Raises:
          ImageError: naming the file; its bytes are no image, or are damaged. OSError: they cannot be read.
        """
        try:
            image = image_rules.decode(self.read())
        except image_rules.ImageError as error:
            raise image_rules.ImageError(f"{self.path}: {error}") from error
        if self.box is None:
            return image
        scale = 1.0, 1.0
        if self.box_in is not None:
            check_proportions(self.path, image.size, self.box_in)
            scale = image.width / self.box_in[0], image.height / self.box_in[1]
        left, top, right, bottom = (round(side * scale[i % 2]) for i, side in enumerate(self.box))
        if right <= max(left, 0) or bottom <= max(top, 0) or left >= image.width or top >= image.height:
            raise image_rules.ImageError(f"{self.path}: box {self.box} is outside of its {image.size} pixels, or empty")
        image_rules.check_pixels((right - left, bottom - top), f"the box {self.box} of {self.path}")
        return image.crop((left, top, right, bottom))


def check_proportions(path: str, found: tuple[int, int], measured: tuple[int, int]) -> None:
    """Refuses an image that is no resized copy of the one that its boxes were measured in.

    Args:
      found, measured: width and height. A copy has rounded sides: one pixel is allowed.

    Raises:
      ImageError: naming the file.
    """
    if abs(found[0] * measured[1] - found[1] * measured[0]) > max(*found, *measured):
        raise image_rules.ImageError(
            f"{path}: {found[0]} x {found[1]} pixels; its boxes are those of an image of {measured[0]} x {measured[1]}"
        )


@functools.lru_cache(maxsize=1 << 17)
def _state(path: str) -> tuple[int, int] | None:
    """Size and time of the last change; None: no such file. Remembered, since a tar holds thousands of pictures."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, found.st_mtime_ns


# ---------------------------------------------------------------------------------------------------------------------
# What a reader gives, by task


@dataclasses.dataclass(frozen=True)
class Data:
    """What all tasks have.

    Attributes:
      pictures: I images; the same picture may stand in several sets, not twice in one.
      parts: which parts of the set were found and read, where it has several; empty: it has one.
    """

    pictures: Sequence[Picture]
    parts: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def keep(self, present: np.ndarray) -> Self:
        """The set without the images whose entry in `present`, bool (I,), is False, and without what needs them."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """Numbers to compare with those that the release publishes: images, texts, classes, items."""
        return {"images": len(self.pictures)}

    def _renumbered(self, present: np.ndarray) -> tuple[list[Picture], np.ndarray]:
        """The pictures that stay, and the new number of each old one."""
        kept = [picture for picture, there in zip(self.pictures, present, strict=True) if there]
        return kept, np.cumsum(present) - 1


@dataclasses.dataclass(frozen=True)
class Retrieval(Data):
    """Attributes: texts: N texts, as the release has them; image_of_text: int (N,)."""

    texts: Sequence[str]
    image_of_text: np.ndarray

    def keep(self, present: np.ndarray) -> Self:
        pictures, number = self._renumbered(present)
        stay = present[self.image_of_text]
        texts = [text for text, there in zip(self.texts, stay, strict=True) if there]
        owners = number[self.image_of_text[stay]]
        return dataclasses.replace(self, pictures=pictures, texts=texts, image_of_text=owners)

    def counts(self) -> dict[str, int]:
        return super().counts() | {"texts": len(self.texts)}


@dataclasses.dataclass(frozen=True)
class Classification(Data):
    """A class of each image, or several.

    Attributes:
      labels: int (I,), the class of each image; or bool (I, C), several classes each.
      classes: C classes, each with its name or names (synonyms); the first one stands in reports.
      templates: prompts in which `{c}` stands for the name of a class.
      counted: of several classes, bool (I, C), which images count for a class; None: all of them.
    """

    labels: np.ndarray
    classes: Sequence[tuple[str, ...]]
    templates: Sequence[str]
    counted: np.ndarray | None = None

    def keep(self, present: np.ndarray) -> Self:
        counted = None if self.counted is None else self.counted[present]
        pictures = self._renumbered(present)[0]
        return dataclasses.replace(self, pictures=pictures, labels=self.labels[present], counted=counted)

    def counts(self) -> dict[str, int]:
        return super().counts() | {"classes": len(self.classes)}


@dataclasses.dataclass(frozen=True)
class Segmentation(Data):
    """A class of each pixel.

    Attributes:
      masks: label maps by index, integers (h, w) of the image's own size, 0 to C - 1 or 255 for pixels that do not
        count; read when asked for.
      classes: C classes, each with its name or names; the largest score of its names is a class's.
      background: the class, if any, that a pixel gets whose best probability is below the threshold.
    """

    masks: Sequence[np.ndarray]
    classes: Sequence[tuple[str, ...]]
    background: int | None = None

    def keep(self, present: np.ndarray) -> Self:
        numbers = np.flatnonzero(present)
        return dataclasses.replace(self, pictures=self._renumbered(present)[0], masks=Subsequence(self.masks, numbers))

    def counts(self) -> dict[str, int]:
        return super().counts() | {"classes": len(self.classes)}


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a choice set, as numbers of images and texts.

    One image and several texts: which texts are right? The first `positives` ones, and each has to beat all others.
    One text and several images: the same the other way round.
    Two images and two texts: image i belongs to text i (Winoground's text, image and group score).

    Attributes:
      group: the part that it counts for, a path such as "add/add_obj": tables list its parts, and macro averages are
        taken over them.
      place: of the right answer among the answers in the release's order; it decides ties where the first one wins.
      joint: names of items that are also counted together, right if all of them are: (kind, name), such as
        ("pair", "mug on or under a table").
    """

    images: tuple[int, ...]
    texts: tuple[int, ...]
    positives: int = 1
    group: str = ""
    place: int = 0
    joint: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice(Data):
    """Attributes: texts: N different texts; items: the questions."""

    texts: Sequence[str]
    items: Sequence[Item]

    def keep(self, present: np.ndarray) -> Self:
        pictures, number = self._renumbered(present)
        items = [
            dataclasses.replace(item, images=tuple(int(number[image]) for image in item.images))
            for item in self.items
            if all(present[image] for image in item.images)
        ]
        return dataclasses.replace(self, pictures=pictures, items=items)

    def counts(self) -> dict[str, int]:
        return super().counts() | {"items": len(self.items)}


@dataclasses.dataclass(frozen=True)
class Pointing(Data):
    """Phrases and the boxes of what they name.

    Attributes:
      texts, image_of_text: as in `Retrieval`.
      boxes: N float arrays (M, 4), left, top, right, bottom in pixels: a hit in any counts.
      sizes: int (I, 2), width and height of the image that the boxes are measured in. The image at hand may be a
        resized copy of it.
    """

    texts: Sequence[str]
    image_of_text: np.ndarray
    boxes: Sequence[np.ndarray]
    sizes: np.ndarray

    def keep(self, present: np.ndarray) -> Self:
        pictures, number = self._renumbered(present)
        stay = np.flatnonzero(present[self.image_of_text])
        return dataclasses.replace(
            self,
            pictures=pictures,
            texts=[self.texts[text] for text in stay],
            image_of_text=number[self.image_of_text[stay]],
            boxes=[self.boxes[text] for text in stay],
            sizes=self.sizes[present],
        )

    def counts(self) -> dict[str, int]:
        return super().counts() | {"texts": len(self.texts)}


class Subsequence(Sequence):
    """Items of another sequence, by number; read when asked for."""

    def __init__(self, items: Sequence, numbers: np.ndarray):
        self._items, self._numbers = items, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int):
        return self._items[int(self._numbers[index])]


# ---------------------------------------------------------------------------------------------------------------------
# Entries of the table


@dataclasses.dataclass(frozen=True)
class File:
    """A file or folder of a set.

    Attributes:
      path: relative to the root; `a|b`: either of them, the first one that is there. May hold wildcards.
      items: how many items the release has there; None: not published.
      count: gives the items of the file that is there; None: nothing to count (a folder of images).
      optional: whether the set can be read, in part, without it.
    """

    path: str
    items: int | None = None
    count: Callable[[pathlib.Path], int] | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
    """A published number: `value` as a fraction; `metric` and `mode` as in `report.Result`."""

    model: str
    metric: str
    value: float
    source: str
    mode: str = ""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set in the table.

    Attributes:
      name: to select it by, such as "coco_val2017".
      task: one of `TASKS`; `read` gives the data of this task.
      title: how papers call it.
      files: what it is read from, annotations first.
      read: root -> data. Raises `MissingError` if nothing of the set can be read, `AnnotationError` if a file is
        broken.
      images, texts, classes, items: what the release counts; None: it has none, or does not say.
      licence: of the content.
      source: where to get it, a URL.
      published: numbers to compare with.
      options: of the set's evaluator, where the protocol asks for other ones than the defaults.
    """

    name: str
    task: str
    title: str
    files: tuple[File, ...]
    read: Callable[[pathlib.Path], Data]
    licence: str
    source: str
    images: int | None = None
    texts: int | None = None
    classes: int | None = None
    items: int | None = None
    published: tuple[Published, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"{self.name}: task {self.task!r}; expected one of {TASKS}")

    def expected(self) -> dict[str, int]:
        """What `Data.counts` should give, as far as it is published."""
        counts = {"images": self.images, "texts": self.texts, "classes": self.classes, "items": self.items}
        return {name: count for name, count in counts.items() if count is not None}


# ---------------------------------------------------------------------------------------------------------------------
# For readers

COCO_IMAGES = "coco/images/val2017|coco/val2017"  # the folder of val2017, which many sets use


def find(root: pathlib.Path, *paths: str) -> pathlib.Path:
    """The file or folder of the first path under `root` that is there; `a|b` stands for two paths, wildcards match.

    Raises:
      MissingError: none is there.
    """
    for path in "|".join(paths).split("|"):
        if (root / path).exists():
            return root / path
        if any(sign in path for sign in "*?[") and (found := sorted(root.glob(path))):
            return found[0]
    raise MissingError([" or ".join(paths).replace("|", " or ")])


def find_folder(root: pathlib.Path, paths: str) -> pathlib.Path:
    """As `find`, for a folder of images; where none is there the first alternative, so that images count as missing."""
    try:
        return find(root, paths)
    except MissingError:
        return root / paths.split("|")[0]


def inside(folder: pathlib.Path, name: Any, file: pathlib.Path) -> Picture:
    """The picture that an annotation file names, relative to a folder.

    Raises:
      AnnotationError: the name is no text, no name that a file can have, or leads out of the folder.
    """
    if not isinstance(name, str) or not _can_name_a_file(name) or name[0] == "/" or ".." in name.split("/"):
        raise AnnotationError(f"{file}: image name {name!r}; expected a path inside of {folder}")
    return Picture(str(folder / name))


def _can_name_a_file(name: str) -> bool:
    try:
        return 0 not in os.fsencode(name) and 0 < max(map(len, os.fsencode(name).split(b"/"))) < 256
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold
        return False


def read_text(path: pathlib.Path) -> str:
    """A text file, UTF-8 with or without a byte order mark.

    Raises:
      AnnotationError: it has another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: not UTF-8 at byte {error.start}") from error
