"""Classification sets in their own releases, and one's own: a folder per class, or TensorFlow Datasets.

Class names and templates are CLIP's (see `prompts`) where it has some for a set; otherwise the names are those of the
release. Test splits are those of the releases; where there is none (Caltech-101, EuroSAT, RESISC45) the whole set.
"""

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flair_jax.data.benchmarks import prompts
from flair_jax.data.benchmarks.base import (
    COCO_IMAGES,
    AnnotationError,
    Benchmark,
    Classification,
    File,
    MissingError,
    Picture,
    Published,
    find,
    find_folder,
    inside,
    read_text,
)
from flair_jax.data.benchmarks.json_files import field, read_json_lines
from flair_jax.data.benchmarks.shards import RecordPicture
from flair_jax.data.sources import array_record
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import open_source
from flair_jax.data.transforms import images as image_rules

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
PLAIN = ("a photo of a {c}.",)
FOLDERS, TFDS = "folders:", array_record.TFDS_PREFIX

Row = tuple[str, int]  # the path of an image, and the number of its class

# Folders and files, relative to the root; `a|b`: either.
_VAL = "imagenet/val|imagenet/ILSVRC/Data/CLS-LOC/val|imagenet/ILSVRC2012_img_val"
_SOLUTION = "imagenet/LOC_val_solution.csv|imagenet/ILSVRC/LOC_val_solution.csv"
_V2 = "imagenetv2/imagenetv2-matched-frequency-format-val|imagenetv2-matched-frequency-format-val"
_SKETCH = "imagenet-sketch/sketch|imagenet_sketch/sketch|imagenet-sketch|sketch"
_CIFAR10 = "cifar10/cifar-10-batches-bin|cifar-10-batches-bin"
_CIFAR100 = "cifar100/cifar-100-binary|cifar-100-binary"
_STL10 = "stl10/stl10_binary|stl10_binary"
_FOOD = "food101/food-101|food-101|food101"
_PETS = "pets|oxford-iiit-pet|oxford_pets"
_DTD = "dtd/dtd|dtd"
_AIRCRAFT = "fgvc_aircraft/fgvc-aircraft-2013b/data|fgvc-aircraft-2013b/data|fgvc_aircraft/data"
_SUN = "sun397"
_CALTECH = "caltech101/101_ObjectCategories|101_ObjectCategories|caltech101/caltech-101/101_ObjectCategories"
_FLOWERS = "flowers102|flowers-102"
_CARS = "stanford_cars|cars"
_CUB = "cub/CUB_200_2011|CUB_200_2011"
_PLACES = "places365"
_EUROSAT = "eurosat/EuroSAT_RGB|eurosat/2750|EuroSAT_RGB|eurosat"
_RESISC = "resisc45/NWPU-RESISC45|NWPU-RESISC45|resisc45"
_COUNTRY = "country211/test|country211/country211/test"
_SST2 = "rendered-sst2/test|renderedsst2/rendered-sst2/test"
_GTSRB = "gtsrb|GTSRB"
_MEMES = "hateful_memes/data|hateful_memes"
_VOC = "VOCdevkit/VOC2007|voc/VOCdevkit/VOC2007|voc2007|VOC2007"
# In the order of CLIP's list, by the names of their files.
_VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse"),
    *("motorbike", "person", "sheep", "sofa", "diningtable", "pottedplant", "train", "tvmonitor"),
)
_COCO = "coco/annotations/instances_val2017.json|coco/instances_val2017.json"


@dataclasses.dataclass(frozen=True)
class RawPicture(Picture):
    """Bytes without a header: uint8 pixels of three channels, one plane after the other.

    Attributes:
      side: rows and columns.
      by_column: whether a plane's columns follow each other, instead of its rows.
    """

    side: int = 32
    by_column: bool = False

    def decode(self) -> Image.Image:
        content = self.read()
        if len(content) != 3 * self.side**2:
            raise image_rules.ImageError(f"{self.path}: {len(content)} bytes; expected {3 * self.side**2} per image")
        planes = np.frombuffer(content, np.uint8).reshape(3, self.side, self.side)
        return Image.fromarray(np.ascontiguousarray(planes.transpose((2, 1, 0) if self.by_column else (1, 2, 0))))


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks


def _in(folders: str, *names: str) -> str:
    """Any of the names in any of the folders."""
    return "|".join(f"{folder}/{name}" for folder in folders.split("|") for name in names)


_MEMES_ROWS = _in(_MEMES, "dev_seen.jsonl", "dev.jsonl")  # the same rows in both phases of the challenge


def _data(
    folder: pathlib.Path,
    file: pathlib.Path,
    rows: Sequence[Row],
    classes: Sequence[tuple[str, ...]],
    templates: Sequence[str],
    parts: tuple[str, ...] = (),
) -> Classification:
    """The set of the images that `file` names relative to `folder`.

    Raises:
      AnnotationError: there is none, one is named twice, or a class is out of range.
    """
    if not rows:
        raise AnnotationError(f"{file}: no image is named")
    seen = set()
    for name, label in rows:
        if not 0 <= label < len(classes):
            raise AnnotationError(f"{file}: {name} has class {label}; expected 0 to {len(classes) - 1}")
        if name in seen:
            raise AnnotationError(f"{file}: {name} is named twice")
        seen.add(name)
    pictures = [inside(folder, name, file) for name, _ in rows]
    return Classification(pictures, np.array([label for _, label in rows]), classes, templates, parts=parts)


def _lines(path: pathlib.Path, fields: int | None = None) -> list[list[str]]:
    """Lines that are not empty, split at white space into at least `fields`; None: whole, in a list each.

    Raises:
      AnnotationError: naming the line; it has fewer.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # a name may hold other signs of lines
        if line.strip():
            rows.append([line.strip()] if fields is None else line.split())
            if len(rows[-1]) < (fields or 1):
                raise AnnotationError(f"{path}, line {number}: {line[:60]!r}; expected {fields} fields")
    return rows


def _count_lines(path: pathlib.Path) -> int:
    return len(_lines(path))


def _whole(text: str, path: pathlib.Path) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise AnnotationError(f"{path}: {text[:40]!r}; expected a number")
    return int(text)


class _Numbers(dict[str, int]):
    """The number of each class by its key in the release's files, in the order of `keys`.

    Raises:
      AnnotationError: a class is named twice, or there is none.
    """

    def __init__(self, keys: Sequence[str], path: pathlib.Path):
        super().__init__((key, number) for number, key in enumerate(keys))
        self._path = path
        if not keys:
            raise AnnotationError(f"{path}: no class is named")
        if len(self) < len(keys):
            raise AnnotationError(f"{path}: {len(keys)} classes are named, of which {len(self)} differ")

    def __missing__(self, key: str) -> int:
        raise AnnotationError(f"{self._path}: class {key!r}; expected one of {len(self)}, such as {next(iter(self))!r}")


def _spaced(keys: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of classes from names of folders: "apple_pie" -> "apple pie"."""
    return [(" ".join(key.replace("_", " ").split()),) for key in keys]


def _subfolders(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        return sorted(name for name in names if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("."))


def count_images(folder: pathlib.Path) -> int:
    """Images in the folders of a folder."""
    return sum(len(_images_in(folder / name)) for name in _subfolders(folder))


def class_folders(
    folder: pathlib.Path,
    keys: Sequence[str] | None = None,
    classes: Sequence[tuple[str, ...]] | None = None,
    templates: Sequence[str] = PLAIN,
) -> Classification:
    """A set whose images lie in a folder per class: FOLDER/<class>/*.jpg.

    Args:
      folder: of the set.
      keys: names of the folders in the order of the labels; None: those that are there, sorted. If some are not there
        the set is read in part, with all classes to choose from.
      classes: their names; None: the names of the folders, with spaces for underscores.
      templates: of the prompts.

    Raises:
      MissingError: there is no such folder, or no folder in it.
      AnnotationError: one of the folders is no class, the numbers of folders and names differ, or there is no image.
    """
    there = _subfolders(folder) if folder.is_dir() else []
    if not there:
        raise MissingError([f"{folder}/<class>"])
    keys = there if keys is None else keys
    classes = _spaced(keys) if classes is None else classes
    if len(keys) != len(classes):
        raise AnnotationError(f"{folder}: {len(keys)} folders; expected one for each of {len(classes)} classes")
    numbers = _Numbers(keys, folder)
    rows = [(f"{key}/{name}", numbers[key]) for key in there for name in _images_in(folder / key)]
    parts = () if len(there) == len(keys) else (f"{len(there)} of {len(keys)} classes",)
    return _data(folder, folder, rows, classes, templates, parts)


# ---------------------------------------------------------------------------------------------------------------------
# One's own sets


def located(name: str) -> Benchmark:
    """An entry for a set that no table lists.

    Args:
      name: `folders:DIR`, a folder per class, relative to the root or absolute; or `tfds:NAME?split=test`, see
        `array_record.open_tfds`; of data sets in TensorFlow Datasets' default format whole splits.

    Raises:
      ValueError: it is neither.
    """
    if name.startswith(FOLDERS):
        where = name.removeprefix(FOLDERS)
        read = functools.partial(_read_folders, where=where)
        files = (File(where, count=count_images),)
    elif name.startswith(TFDS):
        where = name.removeprefix(TFDS).partition("?")[0]
        read, files = functools.partial(_read_tfds, name=name), ()
    else:
        raise ValueError(f"{name!r}; expected {FOLDERS}DIR or {TFDS}NAME?split=…")
    title = where.strip("/").replace("/", "_")
    return Benchmark(title, "classification", title, files, read, licence="not known", source=name)


def _read_folders(root: pathlib.Path, where: str) -> Classification:
    return class_folders(root / pathlib.Path(where).expanduser())


@functools.lru_cache(maxsize=4)  # the pass over all records is made once
def _read_tfds(root: pathlib.Path, name: str) -> Classification:
    """As ArrayRecord, or as TFRecord, the default format of TensorFlow Datasets."""
    del root
    try:
        try:
            return records(name)
        except ShardError:
            if not (files := array_record.tfrecord_files(name)):
                raise
            return records(files)
    except (ShardError, ImportError) as error:
        raise AnnotationError(str(error)) from error


def records(shards: Any, label: str = "label") -> Classification:
    """A set of TensorFlow Datasets, or other records with an image and the number of its class.

    Labels are read by a pass over all records, whose images are read again, one by one, when they are evaluated.

    Args:
      shards: see `open_source`: `tfds:NAME?split=test`, or the set's TFRecord files.
      label: the feature with the number; the names of the classes are taken from `<label>.labels.txt`, a name a line,
        which TensorFlow Datasets writes beside the shards.

    Raises:
      ShardError: see `open_source`.
      AnnotationError: a record has no such number, or there are no names.
    """
    source = open_source(shards)
    names = pathlib.Path(source.shards[0]).parent / f"{label}.labels.txt"
    if not names.exists():
        raise AnnotationError(f"{names}: not found; expected the name of a class per line. {shards} is no such set")
    classes = [line for (line,) in _lines(names)]
    labels = []
    for number in range(len(source)):
        value = json.loads(source[number].json).get(label)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(classes):
            where = ": ".join(source.where(number))
            raise AnnotationError(f"{where}: {label} is {value!r}; expected a number from 0 to {len(classes) - 1}")
        labels.append(value)
    pictures = [RecordPicture(source, number, upright=False) for number in range(len(source))]
    return Classification(pictures, np.array(labels), _spaced(classes), PLAIN)


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet and its relatives


def read_imagenet(root: pathlib.Path) -> Classification:
    """The validation set, as a folder per class, or as Kaggle has it: one folder and LOC_val_solution.csv."""
    folder = find_folder(root, _VAL)
    if folder.is_dir() and _subfolders(folder):
        return _imagenet_folders(folder, "imagenet1k")
    try:
        path = find(root, _SOLUTION)
    except MissingError as error:
        raise MissingError([f"imagenet/val/<class> or {error.files[0]}"]) from error
    numbers, rows = _Numbers(prompts.imagenet_folders(), path), []
    for row in csv.reader(io.StringIO(read_text(path))):
        if row[:1] != ["ImageId"] and row:
            image, found = row[0], row[1].split() if len(row) > 1 else []
            if not found:
                raise AnnotationError(f"{path}: {row}; expected an image and its class")
            rows.append((f"{image}.JPEG", numbers[found[0]]))
    return _data(folder, path, rows, *_imagenet_prompts())


def _count_imagenet(path: pathlib.Path) -> int:
    if path.is_dir():
        return count_images(path) if _subfolders(path) else len(_images_in(path))
    return _count_lines(path) - 1  # a line of titles


def _imagenet_prompts() -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    return prompts.class_names("imagenet1k"), prompts.templates("imagenet1k")


def _imagenet_folders(folder: pathlib.Path, name: str) -> Classification:
    """A folder per class, by its WordNet id, of ImageNet's classes or of the subset of them with this name."""
    names, templates = _imagenet_prompts()
    by_key = dict(zip(prompts.imagenet_folders(), names, strict=True))
    keys = prompts.imagenet_folders(name)
    return class_folders(folder, keys, [by_key[key] for key in keys], templates)


def _read_imagenet_like(root: pathlib.Path, folders: str, name: str) -> Classification:
    return _imagenet_folders(find(root, folders), name)


def _read_v2(root: pathlib.Path) -> Classification:
    """Folders "0" to "999" are labels: in numerical order, which is not the alphabetical one."""
    return class_folders(find(root, _V2), [str(number) for number in range(1000)], *_imagenet_prompts())


# ---------------------------------------------------------------------------------------------------------------------
# Other releases


def _read_class_folders(root: pathlib.Path, folders: str, name: str) -> Classification:
    """A folder per class, whose sorted names are the order of CLIP's class names."""
    folder, templates = find(root, folders), prompts.templates(name)
    return class_folders(folder, None, prompts.class_names(name), templates)


def _read_rendered_sst2(root: pathlib.Path) -> Classification:
    folder = find(root, _SST2)
    return class_folders(folder, ("negative", "positive"), None, prompts.templates("renderedsst2"))


def _read_resisc45(root: pathlib.Path) -> Classification:
    return class_folders(find(root, _RESISC), templates=prompts.templates("resisc45"))


def _binary(
    path: pathlib.Path, header: int, byte: int, side: int, classes: Sequence[tuple[str, ...]], templates: Sequence[str]
) -> Classification:
    """A file of records: `header` bytes, of which number `byte` is the class, and the pixels."""
    size = 3 * side**2
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % (header + size):
        raise AnnotationError(f"{path}: {content.size} bytes; expected a multiple of {header + size}")
    labels = content.reshape(-1, header + size)[:, byte].astype(int)
    if labels.max() >= len(classes):
        raise AnnotationError(f"{path}: class {labels.max()}; expected 0 to {len(classes) - 1}")
    offsets = (number * (header + size) + header for number in range(len(labels)))
    pictures = [RawPicture(str(path), offset, size, side=side) for offset in offsets]
    return Classification(pictures, labels, classes, templates)


def _read_cifar10(root: pathlib.Path) -> Classification:
    """The binary version; the Python version is pickled, and not read."""
    path = find(root, _in(_CIFAR10, "test_batch.bin"))
    names = _spaced(line for (line,) in _lines(path.parent / "batches.meta.txt"))
    return _binary(path, 1, 0, 32, names, prompts.templates("cifar10"))


def _read_cifar100(root: pathlib.Path) -> Classification:
    """As CIFAR-10: a coarse class, which does not count, the fine one, and the pixels."""
    path = find(root, _in(_CIFAR100, "test.bin"))
    names = _spaced(line for (line,) in _lines(path.parent / "fine_label_names.txt"))
    return _binary(path, 2, 1, 32, names, prompts.templates("cifar100"))


def _read_stl10(root: pathlib.Path) -> Classification:
    path = find(root, _in(_STL10, "test_X.bin"))
    side, names = 96, _spaced(line for (line,) in _lines(path.parent / "class_names.txt"))
    labels = np.fromfile(path.parent / "test_y.bin", np.uint8).astype(int) - 1
    if path.stat().st_size != len(labels) * 3 * side**2 or not 0 <= labels.min() <= labels.max() < len(names):
        raise AnnotationError(f"{path}: does not fit to the {len(labels)} labels of test_y.bin")
    size = 3 * side**2
    pictures = [RawPicture(str(path), n * size, size, side=side, by_column=True) for n in range(len(labels))]
    return Classification(pictures, labels, names, prompts.templates("stl10"))


def _read_food101(root: pathlib.Path) -> Classification:
    path = find(root, _in(_FOOD, "meta/test.txt"))
    keys = [line for (line,) in _lines(path.parent / "classes.txt")]
    numbers = _Numbers(keys, path)
    rows = [(f"{line}.jpg", numbers[line.split("/")[0]]) for (line,) in _lines(path)]
    return _data(path.parents[1] / "images", path, rows, _spaced(keys), prompts.templates("food101"))


def _read_pets(root: pathlib.Path) -> Classification:
    path = find(root, _in(_PETS, "annotations/test.txt"))
    rows = [(f"{name}.jpg", _whole(label, path) - 1) for name, label, *_ in _lines(path, 4)]
    classes = prompts.class_names("pets")
    for name, label in rows:  # the classes are numbered in the alphabetical order of their names
        breed = name.rpartition("_")[0].replace("_", " ").lower()
        if 0 <= label < len(classes) and classes[label][0].lower() != breed:
            raise AnnotationError(f"{path}: {name} has class {label + 1}, which is {classes[label][0]}")
    return _data(path.parents[1] / "images", path, rows, classes, prompts.templates("pets"))


def _read_dtd(root: pathlib.Path) -> Classification:
    path = find(root, _in(_DTD, "labels/test1.txt"))
    names = [line for (line,) in _lines(path)]
    keys = sorted({name.split("/")[0] for name in names})
    numbers = _Numbers(keys, path)
    rows = [(name, numbers[name.split("/")[0]]) for name in names]
    return _data(path.parents[1] / "images", path, rows, _spaced(keys), prompts.templates("dtd"))


def _read_aircraft(root: pathlib.Path) -> Classification:
    path = find(root, _in(_AIRCRAFT, "images_variant_test.txt"))
    keys = [line for (line,) in _lines(path.parent / "variants.txt")]
    numbers = _Numbers(keys, path)
    lines = [line.partition(" ") for (line,) in _lines(path)]
    rows = [(f"{image}.jpg", numbers[variant]) for image, _, variant in lines]
    return _data(path.parent / "images", path, rows, [(key,) for key in keys], prompts.templates("fgvc_aircraft"))


def _read_sun397(root: pathlib.Path) -> Classification:
    """The first of the ten official splits; "/a/apse/indoor" is called "apse indoor"."""
    path = find(root, _in(_SUN, "Testing_01.txt", "Partitions/Testing_01.txt"))
    keys = [line for (line,) in _lines(find(path.parent, "ClassName.txt", "../ClassName.txt"))]
    numbers = _Numbers(keys, path)
    rows = [(line.lstrip("/"), numbers[line.rpartition("/")[0]]) for (line,) in _lines(path)]
    classes = _spaced(key[3:].replace("/", " ") for key in keys)
    return _data(find_folder(root, f"{_SUN}/SUN397|{_SUN}"), path, rows, classes, prompts.templates("sun397"))


def _read_cub(root: pathlib.Path) -> Classification:
    """Images by number in four files; classes are called "001.Black_footed_Albatross"."""
    folder = find(root, _in(_CUB, "images.txt")).parent
    names, labels, training = (
        {row[0]: row[1] for row in _lines(find(folder, file), 2)}
        for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    if not names.keys() == labels.keys() == training.keys():
        raise AnnotationError(f"{folder}: images.txt, image_class_labels.txt and train_test_split.txt name others")
    path = folder / "image_class_labels.txt"
    rows = [(names[n], _whole(labels[n], path) - 1) for n in names if training[n] == "0"]
    classes = _spaced(row[1].partition(".")[2] for row in _lines(find(folder, "classes.txt"), 2))
    return _data(folder / "images", path, rows, classes, ("a photo of a {c}, a type of bird.",))


def _read_places365(root: pathlib.Path) -> Classification:
    path = find(root, f"{_PLACES}/places365_val.txt")
    keys = [row[0] for row in _lines(find(path.parent, "categories_places365.txt"), 2)]
    rows = [(name, _whole(label, path)) for name, label, *_ in _lines(path, 2)]
    classes = _spaced(key[3:].replace("/", " ") for key in keys)
    return _data(find_folder(path.parent, "val_256|val_large"), path, rows, classes, prompts.templates("sun397"))


def _read_hateful_memes(root: pathlib.Path) -> Classification:
    """The 500 memes of the challenge's development set, as ELEVATER and CLIP's paper take them; the test set had no
    labels. The text of a meme is part of its image.
    """
    path = find(root, _MEMES_ROWS)
    rows = []
    for number, row in enumerate(read_json_lines(path), 1):
        where = f"{path} record {number}"
        rows.append((field(row, "img", str, where), field(row, "label", int, where)))
    return _data(path.parent, path, rows, [("meme",), ("hatespeech meme",)], ("a {c}.",))


def _read_gtsrb(root: pathlib.Path) -> Classification:
    path = find(root, _in(_GTSRB, "GT-final_test.csv"))
    try:
        table = list(csv.DictReader(io.StringIO(read_text(path)), delimiter=";"))
        rows = [(row["Filename"], _whole(row["ClassId"], path)) for row in table]
    except (KeyError, AttributeError) as error:
        raise AnnotationError(f"{path}: expected the columns Filename and ClassId; {error!r}") from error
    folder = find_folder(path.parent, "Final_Test/Images|GTSRB/Final_Test/Images")
    return _data(folder, path, rows, prompts.class_names("gtsrb"), prompts.templates("gtsrb"))


def _voc_list(name: str) -> str:
    return _in(_VOC, f"ImageSets/Main/{name}_test.txt")


def _read_voc2007(root: pathlib.Path) -> Classification:
    """Which of 20 classes an image of the test split shows. By the rule of the challenge an image whose objects of a
    class are all difficult, 0 in its list, does not count for that class.
    """
    signs, listed = {"1": 1, "0": 0, "-1": -1}, {}
    for name in _VOC_CLASSES:
        path = find(root, _voc_list(name))
        rows = _lines(path, 2)
        if wrong := next((row for row in rows if row[1] not in signs), None):
            raise AnnotationError(f"{path}: {' '.join(wrong)[:60]!r}; expected an image and 1, 0 or -1")
        listed[path] = {image: signs[sign] for image, sign, *_ in rows}
        if len(listed[path]) < len(rows):
            raise AnnotationError(f"{path}: {len(rows)} images, of which {len(listed[path])} differ")
    first, *others = listed
    images = sorted(listed[first])
    if other := next((path for path in others if listed[path].keys() != listed[first].keys()), None):
        raise AnnotationError(f"{other}: other images than {first.name} names")
    if not images:
        raise AnnotationError(f"{first}: no image is named")
    table = np.array([[listed[path][image] for path in listed] for image in images])
    folder = find_folder(root, _in(_VOC, "JPEGImages"))
    pictures = [inside(folder, f"{image}.jpg", first) for image in images]
    templates = prompts.templates("voc2007_multilabel")
    return Classification(pictures, table > 0, [(name,) for name in _VOC_CLASSES], templates, table != 0)


def _read_coco(root: pathlib.Path) -> Classification:
    """Which of COCO's 80 categories an image has an object of, crowds included; an image may have none."""
    path = find(root, _COCO)
    try:
        content = prompts.read_json(path)
        categories = {int(row["id"]): row["name"] for row in content["categories"]}
        names = {int(row["id"]): row["file_name"] for row in content["images"]}
        objects = [(int(row["image_id"]), int(row["category_id"])) for row in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(f"{path}: expected COCO's images, annotations and categories; {error!r}") from error
    if len(names) < len(content["images"]) or len(categories) < len(content["categories"]):
        raise AnnotationError(f"{path}: an id of an image or a category stands twice")
    rows, columns = ({key: number for number, key in enumerate(sorted(ids))} for ids in (names, categories))
    labels = np.zeros((len(rows), len(columns)), bool)
    for image, category in objects:
        if image not in rows or category not in columns:
            raise AnnotationError(f"{path}: an object of category {category} in image {image}, which is not listed")
        labels[rows[image], columns[category]] = True
    folder = find_folder(root, COCO_IMAGES)
    pictures = [inside(folder, names[image], path) for image in rows]
    classes = [(categories[key],) for key in columns]
    return Classification(pictures, labels, classes, prompts.templates("voc2007_multilabel"))


def _count_coco(path: pathlib.Path) -> int:
    return len(prompts.read_json(path)["images"])


def _mat(path: pathlib.Path, *names: str) -> list[np.ndarray]:
    """Arrays of a MATLAB file by name.

    Raises:
      AnnotationError: it is none, or lacks one.
    """
    from scipy.io import loadmat  # of these sets alone

    try:
        found = loadmat(path, squeeze_me=True, struct_as_record=True, verify_compressed_data_integrity=True)
        return [np.atleast_1d(found[name]) for name in names]
    except Exception as error:  # damaged files raise a dozen types of exception
        raise AnnotationError(f"{path}: expected a MATLAB file with {', '.join(names)}: {error!r}") from error


def _read_flowers(root: pathlib.Path) -> Classification:
    path = find(root, _in(_FLOWERS, "imagelabels.mat"))
    (labels,), (test,) = _mat(path, "labels"), _mat(find(path.parent, "setid.mat"), "tstid")
    if test.min() < 1 or test.max() > len(labels):
        raise AnnotationError(f"{path}: {len(labels)} labels; setid.mat names image {test.max()}")
    rows = [(f"image_{int(number):05d}.jpg", int(labels[int(number) - 1]) - 1) for number in test]
    return _data(path.parent / "jpg", path, rows, prompts.class_names("flowers"), prompts.templates("flowers"))


def _read_cars(root: pathlib.Path) -> Classification:
    name = "cars_test_annos_withlabels.mat"
    path = find(root, _in(_CARS, name, f"devkit/{name}"))
    (names,) = _mat(find(root, _in(_CARS, "devkit/cars_meta.mat", "cars_meta.mat")), "class_names")
    (annotations,) = _mat(path, "annotations")
    try:
        rows = [(str(row["fname"]), int(row["class"]) - 1) for row in annotations]
    except (ValueError, IndexError, TypeError) as error:
        raise AnnotationError(f"{path}: expected fname and class for each image: {error}") from error
    classes = [(str(name),) for name in names]
    return _data(find_folder(root, _in(_CARS, "cars_test")), path, rows, classes, prompts.templates("cars"))


# ---------------------------------------------------------------------------------------------------------------------
# The table

_RESEARCH = "images of various owners, for research"
_NOTES = "second-hand notes on the paper, uncorroborated; which averaging of prompts it used is not known"
_COSMOS = "README of ExplainableML/cosmos"


def _mat_count(name: str) -> Callable[[pathlib.Path], int]:
    return lambda path: len(_mat(path, name)[0])


def _binary_count(size: int) -> Callable[[pathlib.Path], int]:
    return lambda path: path.stat().st_size // size


def _entry(
    name: str,
    title: str,
    read: Callable[[pathlib.Path], Classification],
    images: int,
    classes: int,
    files: tuple[File, ...],
    source: str,
    licence: str = _RESEARCH,
    *,
    published: tuple[Published, ...] = (),
    **options: Any,
) -> Benchmark:
    return Benchmark(
        *(name, "classification", title, files, read, licence, source),
        **dict(images=images, classes=classes, published=published, options=options),
    )


def _of_folders(folders: str, name: str) -> Callable[[pathlib.Path], Classification]:
    return functools.partial(_read_class_folders, folders=folders, name=name)


def _imagenet_like(name: str, title: str, folders: str, images: int, source: str, subset: str, **options) -> Benchmark:
    read = functools.partial(_read_imagenet_like, folders=folders, name=subset)
    classes = len(prompts.imagenet_folders(subset))
    return _entry(
        *(name, title, read, images, classes, (File(folders, images, count_images),), source, "MIT"), **options
    )


def _list(folders: str, name: str, items: int) -> File:
    """A text file with a line per image."""
    return File(_in(folders, name), items, _count_lines)


_IMAGENET_NUMBERS = (
    Published("FLAIR, CC3M-recap", "acc1", 0.338, _NOTES, "flair_before"),
    Published("FLAIR, Merged30M", "acc1", 0.566, _NOTES, "flair_before"),
    Published("OpenAI CLIP ViT-B/16", "acc1", 0.68352, "LAION-AI/CLIP_benchmark, benchmark/benchmark.csv", "global"),
    Published("COSMOS, CC3M-recap", "acc1", 0.371, _COSMOS),
    Published("COSMOS, CC12M-recap", "acc1", 0.514, _COSMOS),
    Published("COSMOS, YFCC15M-recap", "acc1", 0.524, _COSMOS),
    Published("COSMOS, Merged30M", "acc1", 0.576, _COSMOS),
    Published("COSMOS, PixelProse", "acc1", 0.596, _COSMOS),
)
_HENDRYCKS = "https://github.com/hendrycks"

# Two pairs of ImageNet's classes have the same name in CLIP's list ("missile", "sunglasses"): of their images none
# could be right unless the first of equal scores wins, as in the published numbers.
BENCHMARKS = (
    _entry(
        *("imagenet", "ImageNet val", read_imagenet, 50_000, 1000),
        (File(f"{_VAL}|{_SOLUTION}", 50_000, _count_imagenet),),
        *("https://image-net.org/download-images", "research use, terms of ImageNet"),
        published=_IMAGENET_NUMBERS,
        ties="first",
    ),
    _entry(
        *("imagenet_v2", "ImageNet-V2, matched frequency", _read_v2, 10_000, 1000),
        (File(_V2, 10_000, count_images),),
        *("https://huggingface.co/datasets/vaishaal/ImageNetV2", "MIT"),
        ties="first",
    ),
    _imagenet_like(
        *("imagenet_sketch", "ImageNet-Sketch", _SKETCH, 50_889),
        *("https://github.com/HaohanWang/ImageNet-Sketch", "imagenet1k"),
        ties="first",
    ),
    *(
        _imagenet_like(
            *(f"imagenet_{letter}", f"ImageNet-{letter.upper()}", f"imagenet-{letter}|imagenet_{letter}", images),
            *(f"{_HENDRYCKS}/{repository}", f"imagenet-{letter}"),
        )
        for letter, images, repository in (
            ("a", 7_500, "natural-adv-examples"),
            ("r", 30_000, "imagenet-r"),
            ("o", 2_000, "natural-adv-examples"),
        )
    ),
    _entry(
        *("cifar10", "CIFAR-10", _read_cifar10, 10_000, 10),
        (File(_in(_CIFAR10, "test_batch.bin"), 10_000, _binary_count(3073)), _list(_CIFAR10, "batches.meta.txt", 10)),
        *("https://www.cs.toronto.edu/~kriz/cifar.html (binary version)", "none stated"),
        published=(
            Published("FLAIR, Merged30M", "acc1", 0.9282, "a user's figure, 9 templates (nn_hw_FLAIR)", "flair_after"),
        ),
    ),
    _entry(
        *("cifar100", "CIFAR-100", _read_cifar100, 10_000, 100),
        (File(_in(_CIFAR100, "test.bin"), 10_000, _binary_count(3074)), _list(_CIFAR100, "fine_label_names.txt", 100)),
        *("https://www.cs.toronto.edu/~kriz/cifar.html (binary version)", "none stated"),
    ),
    _entry(
        *("stl10", "STL-10", _read_stl10, 8_000, 10),
        (
            File(_in(_STL10, "test_X.bin"), 8_000, _binary_count(3 * 96**2)),
            File(_in(_STL10, "test_y.bin"), 8_000, _binary_count(1)),
            _list(_STL10, "class_names.txt", 10),
        ),
        "https://cs.stanford.edu/~acoates/stl10",
    ),
    _entry(
        *("food101", "Food-101", _read_food101, 25_250, 101),
        (_list(_FOOD, "meta/test.txt", 25_250), _list(_FOOD, "meta/classes.txt", 101), File(_in(_FOOD, "images"))),
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    ),
    _entry(
        *("pets", "Oxford-IIIT Pets", _read_pets, 3_669, 37),
        (_list(_PETS, "annotations/test.txt", 3_669), File(_in(_PETS, "images"))),
        *("https://www.robots.ox.ac.uk/~vgg/data/pets", "CC-BY-SA-4.0"),
        metric="mean_per_class",
    ),
    _entry(
        *("dtd", "Describable Textures, split 1", _read_dtd, 1_880, 47),
        (_list(_DTD, "labels/test1.txt", 1_880), File(_in(_DTD, "images"))),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd",
    ),
    _entry(
        *("aircraft", "FGVC Aircraft, variants", _read_aircraft, 3_333, 100),
        (
            _list(_AIRCRAFT, "images_variant_test.txt", 3_333),
            _list(_AIRCRAFT, "variants.txt", 100),
            File(_in(_AIRCRAFT, "images")),
        ),
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        metric="mean_per_class",
    ),
    _entry(
        *("sun397", "SUN397, split 1", _read_sun397, 19_850, 397),
        (
            File(_in(_SUN, "Testing_01.txt", "Partitions/Testing_01.txt"), 19_850, _count_lines),
            File(_in(_SUN, "ClassName.txt", "Partitions/ClassName.txt"), 397, _count_lines),
            File(f"{_SUN}/SUN397|{_SUN}"),
        ),
        "https://vision.princeton.edu/projects/2010/SUN",
    ),
    _entry(
        *("caltech101", "Caltech-101, whole", _of_folders(_CALTECH, "caltech101"), 9_144, 102),
        (File(_CALTECH, 9_144, count_images),),
        *("https://data.caltech.edu/records/mzrjq-6wc02", "CC-BY-4.0"),
        metric="mean_per_class",
    ),
    _entry(
        *("flowers102", "Oxford Flowers-102", _read_flowers, 6_149, 102),
        (
            File(_in(_FLOWERS, "setid.mat"), 6_149, _mat_count("tstid")),
            File(_in(_FLOWERS, "imagelabels.mat"), 8_189, _mat_count("labels")),
            File(_in(_FLOWERS, "jpg")),
        ),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        metric="mean_per_class",
    ),
    _entry(
        *("cars", "Stanford Cars", _read_cars, 8_041, 196),
        (
            File(
                _in(_CARS, "cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"),
                *(8_041, _mat_count("annotations")),
            ),
            File(_in(_CARS, "devkit/cars_meta.mat", "cars_meta.mat"), 196, _mat_count("class_names")),
            File(_in(_CARS, "cars_test")),
        ),
        "https://www.kaggle.com/datasets/eduardo4jesus/stanford-cars-dataset",
    ),
    _entry(
        *("cub", "CUB-200-2011", _read_cub, 5_794, 200),
        (
            _list(_CUB, "images.txt", 11_788),
            _list(_CUB, "image_class_labels.txt", 11_788),
            _list(_CUB, "train_test_split.txt", 11_788),
            _list(_CUB, "classes.txt", 200),
            File(_in(_CUB, "images")),
        ),
        "https://data.caltech.edu/records/65de6-vp158",
    ),
    _entry(
        *("places365", "Places365 val", _read_places365, 36_500, 365),
        (
            _list(_PLACES, "places365_val.txt", 36_500),
            _list(_PLACES, "categories_places365.txt", 365),
            File(_in(_PLACES, "val_256", "val_large")),
        ),
        "http://places2.csail.mit.edu/download.html",
    ),
    _entry(
        *("eurosat", "EuroSAT, whole", _of_folders(_EUROSAT, "eurosat"), 27_000, 10),
        (File(_EUROSAT, 27_000, count_images),),
        *("https://github.com/phelber/EuroSAT", "MIT"),
    ),
    _entry(
        *("resisc45", "RESISC45, whole", _read_resisc45, 31_500, 45),
        (File(_RESISC, 31_500, count_images),),
        "https://www.tensorflow.org/datasets/catalog/resisc45",
    ),
    _entry(
        *("country211", "Country211", _of_folders(_COUNTRY, "country211"), 21_100, 211),
        (File(_COUNTRY, 21_100, count_images),),
        *("https://github.com/openai/CLIP/blob/main/data/country211.md", "CC, by image (YFCC100M)"),
    ),
    _entry(
        *("rendered_sst2", "Rendered SST2", _read_rendered_sst2, 1_821, 2),
        (File(_SST2, 1_821, count_images),),
        "https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
    ),
    _entry(
        *("gtsrb", "GTSRB", _read_gtsrb, 12_630, 43),
        (
            File(_in(_GTSRB, "GT-final_test.csv"), 12_630, lambda path: _count_lines(path) - 1),
            File(_in(_GTSRB, "Final_Test/Images", "GTSRB/Final_Test/Images")),
        ),
        *("https://benchmark.ini.rub.de/gtsrb_news.html", "CC0"),
    ),
    _entry(
        *("hateful_memes", "Hateful Memes, development set", _read_hateful_memes, 500, 2),
        (File(_MEMES_ROWS, 500, lambda path: len(read_json_lines(path))), File(_in(_MEMES, "img"))),
        *("https://hatefulmemeschallenge.com", "Hateful Memes licence of Meta, research only"),
        metric="roc_auc",
    ),
    _entry(
        *("voc2007", "Pascal VOC 2007, several classes an image", _read_voc2007, 4_952, 20),
        (
            *(File(_voc_list(name), 4_952, _count_lines) for name in _VOC_CLASSES),
            File(_in(_VOC, "JPEGImages")),
        ),
        *("http://host.robots.ox.ac.uk/pascal/VOC/voc2007", "images: Flickr terms; annotations: free for research"),
        metric="voc_11_point_map",
    ),
    _entry(
        *("coco_objects", "COCO val2017, categories of objects", _read_coco, 5_000, 80),
        (File(_COCO, 5_000, _count_coco), File(COCO_IMAGES)),
        *("https://cocodataset.org/#download", "annotations CC-BY-4.0, images: Flickr terms"),
    ),
)
