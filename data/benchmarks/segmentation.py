"""Semantic segmentation sets, read as their releases and mmsegmentation's converters lay them out.

The classes, their names and what counts as background are those of the protocol that FLAIR's numbers were made with
(`spec/flair.md` 3.7; SCLIP, Wang et al., ECCV 2024). The names are in `prompts/segmentation_*.txt`: a class a line,
several names of it separated by commas.
"""

import functools
import importlib.resources
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flair_jax.data.benchmarks import base
from flair_jax.data.benchmarks.base import AnnotationError, Benchmark, File, Picture, Published, Segmentation, find
from flair_jax.data.benchmarks.json_files import read_json, typed
from flair_jax.data.transforms import images as image_rules

IGNORE = 255  # label of pixels that do not count
NO_LABEL = -1  # in a table of labels: the mask must not hold this value

# ---------------------------------------------------------------------------------------------------------------------
# Labels of mask values: int arrays (256,), by value

COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # ids below 183 without a category
COCO_IDS = np.setdiff1d(np.arange(1, 183), COCO_GAPS)  # (171,): 80 things up to 90, then 91 kinds of stuff
COCO_THINGS = COCO_IDS[COCO_IDS <= 90]
# Cityscapes' id of each of the 19 classes that are evaluated; all other ids, 0 to 33, do not count.
CITYSCAPES_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])


def labels_of(values: Iterable[int], first: int = 0, ignored: Iterable[int] = (IGNORE,)) -> np.ndarray:
    """The table in which the classes `first`, `first + 1`, … have the given mask values."""
    table = np.full(256, NO_LABEL)
    table[list(ignored)] = IGNORE
    values = list(values)
    table[values] = np.arange(first, first + len(values))
    return table


def reduced(classes: int) -> np.ndarray:
    """Class c is stored as c + 1; 0, the background, and 255 do not count: mmsegmentation's `reduce_zero_label`."""
    return labels_of(range(1, classes + 1), ignored=(0, IGNORE))


def objects() -> np.ndarray:
    """COCO-Stuff's pixel maps -> COCO-Object: things are 1 to 80, stuff and what is not labelled are background."""
    table = labels_of(COCO_THINGS - 1, first=1)
    table[np.append(COCO_IDS[COCO_IDS > 90] - 1, IGNORE)] = 0
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Masks


class Masks(Sequence):
    """Label maps, uint8 (h, w), by index; each is read and checked when asked for.

    Args:
      paths: I files.
      pictures: the images that they belong to, whose size they must have.
      read: path -> mask values, integers (h, w).
      table: the label of each value, int (V,); `NO_LABEL` for values that a mask must not hold.
    """

    def __init__(
        self,
        paths: Sequence[pathlib.Path],
        pictures: Sequence[Picture],
        read: Callable[[pathlib.Path], np.ndarray],
        table: np.ndarray,
    ):
        self.paths, self._pictures, self._read, self._table = paths, pictures, read, table

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """
        Raises:
          AnnotationError: naming the file: it is no mask, has another size than its image, or holds a value that stands
            for no class. OSError: it cannot be read.
        """
        path, picture = self.paths[index], self._pictures[index]
        values = self._read(path)
        size = image_size(picture)
        if values.shape != size:
            raise AnnotationError(
                f"{path}: a mask of {_by(values.shape)} pixels; its image {picture.path} has {_by(size)}"
            )
        table = self._table
        inside = (values >= 0) & (values < len(table))
        labels = table[np.where(inside, values, 0)]
        wrong = ~inside | (labels == NO_LABEL)
        if wrong.any():
            raise AnnotationError(
                f"{path}: mask values {np.unique(values[wrong])[:8].tolist()} stand for no class; "
                f"expected some of {_ranges(np.flatnonzero(table != NO_LABEL))}"
            )
        return labels.astype(np.uint8)


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _ranges(values: np.ndarray) -> str:
    """Numbers in ascending order as text: "0-19, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def image_size(picture: Picture) -> tuple[int, int]:
    """Height and width of an image, from its header; nothing is decoded.

    Raises:
      ImageError: naming the file; it has no such header. OSError: it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(picture.read()), formats=image_rules.FORMATS) as image:
            return image.height, image.width
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise image_rules.ImageError(f"{picture.path}: cannot read the image's header: {error}") from error


def read_indices(path: pathlib.Path) -> np.ndarray:
    """The pixel values of a PNG with one channel, of a palette its indices: int (h, w).

    Raises:
      AnnotationError: it is no such image.
    """
    image = _decode(path)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise AnnotationError(f"{path}: a mask of mode {image.mode}; expected one channel, or a palette")
    return np.asarray(image).astype(np.int64)


def read_matlab(path: pathlib.Path, matrix: str = "S") -> np.ndarray:
    """A matrix of a MATLAB file, int (h, w): S of a COCO-Stuff 10k annotation, LabelMap of Pascal Context.

    Raises:
      AnnotationError: it is no such file.
    """
    from scipy.io import loadmat  # slow to import, and for two sets

    try:
        values = loadmat(path, variable_names=[matrix])[matrix]
    except Exception as error:  # damaged files raise a dozen types of exception
        raise AnnotationError(f"{path}: no MATLAB file with a matrix {matrix}: {error!r}") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise AnnotationError(
            f"{path}: {matrix} has shape {values.shape} and type {values.dtype}; expected integers (h, w)"
        )
    return values.astype(np.int64)


def _decode(path: pathlib.Path) -> Image.Image:
    try:
        return image_rules.decode(path.read_bytes())
    except image_rules.ImageError as error:
        raise AnnotationError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Readers: what all of them do


def class_names(name: str) -> list[tuple[str, ...]]:
    """The classes of a list in `prompts`, each with its name or names."""
    return parse_classes(_prompts(f"segmentation_{name}.txt"))


def _prompts(name: str) -> list[str]:
    """The lines of a file in `prompts`."""
    file = importlib.resources.files("flair_jax.data.benchmarks") / "prompts" / name
    return file.read_text(encoding="utf-8").splitlines()


def parse_classes(lines: Iterable[str]) -> list[tuple[str, ...]]:
    """A class a line, several names of it separated by commas.

    Raises:
      ValueError: a class has no name.
    """
    classes = [tuple(name.strip() for name in line.split(",")) for line in lines]
    if not classes or not all(all(names) for names in classes):
        raise ValueError(f"class names {classes}; expected at least one name in each line, between commas too")
    return classes


def _listed(file: pathlib.Path) -> list[str]:
    """The first word of each line, empty lines left out; a name may stand there once."""
    names = [line.split()[0] for line in base.read_text(file).splitlines() if line.strip()]
    return _unique(names, file)


def _unique(names: list[str], file: pathlib.Path) -> list[str]:
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AnnotationError(f"{file}: {twice[:3]} stand there more than once")
    if not names:
        raise AnnotationError(f"{file}: no images there")
    return names


def _by_list(
    file: pathlib.Path, names: Sequence[str], images: pathlib.Path, masks: pathlib.Path, suffix: str
) -> tuple[list[Picture], list[pathlib.Path]]:
    """Images `NAME.jpg` and masks `NAME` + suffix of the names that a file lists."""
    pictures = [base.inside(images, f"{name}.jpg", file) for name in names]
    paths = [pathlib.Path(base.inside(masks, f"{name}{suffix}", file).path) for name in names]
    if missing := [path.name for path in paths if not path.exists()]:
        raise AnnotationError(f"{file}: {len(missing)} of {len(names)} masks are not in {masks}, such as {missing[0]}")
    return pictures, paths


def _is_mask(name: str, suffix: str) -> bool:
    """By the name of a file; an archive that was packed on a Mac brings "._1.png" beside 1.png."""
    return name.endswith(suffix) and not name.startswith(".")


def _names_in(folder: pathlib.Path, suffix: str, without: str | None = None) -> list[str]:
    """Names, without their suffix, of the files of a folder that have it, in order; files with `without` left out."""
    names = sorted(
        entry.name.removesuffix(suffix)
        for entry in os.scandir(folder)
        if _is_mask(entry.name, suffix) and (without is None or without not in entry.name)
    )
    return _unique(names, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Pascal

VOC2012 = "VOCdevkit/VOC2012|voc/VOCdevkit/VOC2012|voc2012|VOC2012"
VOC2010 = "VOCdevkit/VOC2010|voc/VOCdevkit/VOC2010|voc2010|VOC2010"


def _under(folders: str, path: str) -> str:
    """A path, or one of several, in each of the folders, to `find`."""
    return "|".join(f"{folder}/{one}" for one in path.split("|") for folder in folders.split("|"))


def read_pascal(
    root: pathlib.Path, *, folders: str, split: str, masks: str, classes: str, table: np.ndarray, background: int | None
) -> Segmentation:
    """The validation images of a VOC devkit: a list of names, JPEG images, and masks with a palette or grey."""
    file = find(root, _under(folders, split))
    names = _listed(file)
    folder = find(root, _under(folders, masks))
    images = base.find_folder(root, _under(folders, "JPEGImages"))
    pictures, paths = _by_list(file, names, images, folder, ".png")
    return Segmentation(pictures, Masks(paths, pictures, read_indices, table), class_names(classes), background)


CONTEXT = "pascal_context|context|VOCdevkit/VOC2010|voc/VOCdevkit/VOC2010|voc2010|VOC2010"
CONTEXT_MASKS = "SegmentationClassContext"
CONTEXT_SPLIT = "ImageSets/SegmentationContext/val.txt"


def read_context(root: pathlib.Path, *, classes: str, table: np.ndarray, background: int | None) -> Segmentation:
    """Pascal Context: the masks and the list of mmsegmentation's converter; where they are not there, the release.

    The release has a MATLAB file per image, `trainval/NAME.mat`, with 459 labels whose names `labels.txt` lists, as in
    "2: aeroplane"; the 59 frequent ones are found by name. Its validation images are those of VOC 2010.
    """
    rest = dict(classes=classes, table=table, background=background)
    try:
        return read_pascal(root, folders=VOC2010, split=CONTEXT_SPLIT, masks=CONTEXT_MASKS, **rest)
    except base.MissingError as converted:
        try:
            folder, names = find(root, _under(CONTEXT, "trainval")), find(root, _under(CONTEXT, "labels.txt"))
            file = find(root, _under(VOC2010, f"{CONTEXT_SPLIT}|ImageSets/Main/val.txt"))
        except base.MissingError as released:
            raise base.MissingError([*converted.files, *released.files]) from released
    values = _context_values(names)
    listed = [name for name in _listed(file) if (folder / f"{name}.mat").exists()]
    images = base.find_folder(root, _under(VOC2010, "JPEGImages"))
    pictures, paths = _by_list(file, listed, images, folder, ".mat")

    def read(path: pathlib.Path) -> np.ndarray:
        labels = read_matlab(path, "LabelMap")
        if labels.min() < 0 or labels.max() >= len(values):
            raise AnnotationError(f"{path}: labels up to {labels.max()}; {names} lists {len(values) - 1}")
        return values[labels]

    return Segmentation(pictures, Masks(paths, pictures, read, table), class_names(classes), background)


def _context_values(file: pathlib.Path) -> np.ndarray:
    """The value that mmsegmentation's converter gives each of the release's labels, 0 for those beside the 59."""
    numbers = {}
    for line in base.read_text(file).splitlines():
        number, colon, name = line.partition(":")
        if colon and number.strip().isdecimal():
            numbers[name.replace(" ", "").strip()] = int(number)
    frequent = [names[0].replace(" ", "") for names in class_names("context59")]
    if missing := [name for name in frequent if name not in numbers]:
        raise AnnotationError(f"{file}: no label {missing[:5]}; expected lines such as '2: aeroplane'")
    values = np.zeros(max(numbers.values()) + 1, int)
    values[[numbers[name] for name in frequent]] = np.arange(1, len(frequent) + 1)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# ADE20K and Cityscapes

ADE20K = "ade20k/ADEChallengeData2016|ADEChallengeData2016|ade20k|ade/ADEChallengeData2016"
CITYSCAPES = "cityscapes|Cityscapes"


def read_ade20k(root: pathlib.Path) -> Segmentation:
    """The 150 classes of the scene parsing challenge: `images` and `annotations`, each with `validation`."""
    masks = find(root, _under(ADE20K, "annotations/validation"))
    images = base.find_folder(root, _under(ADE20K, "images/validation"))
    pictures, paths = _by_list(masks, _names_in(masks, ".png"), images, masks, ".png")
    classes = class_names("ade20k")
    return Segmentation(pictures, Masks(paths, pictures, read_indices, reduced(len(classes))), classes)


def read_cityscapes(root: pathlib.Path) -> Segmentation:
    """`leftImg8bit/val` and `gtFine/val`, by city: ids as they are released, or the train ids of cityscapesScripts."""
    masks = find(root, _under(CITYSCAPES, "gtFine/val"))
    images = base.find_folder(root, _under(CITYSCAPES, "leftImg8bit/val"))
    ids = labels_of(CITYSCAPES_IDS, ignored=(*np.setdiff1d(np.arange(34), CITYSCAPES_IDS), IGNORE))
    for suffix, table in (("_gtFine_labelIds.png", ids), ("_gtFine_labelTrainIds.png", labels_of(range(19)))):
        if paths := sorted(masks.glob(f"*/[!.]*{suffix}")):
            names = [f"{path.parent.name}/{path.name.removesuffix(suffix)}_leftImg8bit.png" for path in paths]
            pictures = [base.inside(images, name, masks) for name in names]
            return Segmentation(pictures, Masks(paths, pictures, read_indices, table), class_names("cityscapes"))
    raise AnnotationError(f"{masks}: no */*_gtFine_labelIds.png and no */*_gtFine_labelTrainIds.png there")


# ---------------------------------------------------------------------------------------------------------------------
# COCO

STUFF_IMAGES = f"{base.COCO_IMAGES}|coco_stuff164k/images/val2017"
STUFF_MASKS = "coco/stuffthingmaps/val2017|coco_stuff164k/annotations/val2017|cocostuff/val2017"
# COCO-Object's converter writes a folder of its own.
OBJECT_IMAGES = f"coco_object/images/val2017|{STUFF_IMAGES}"
OBJECT_MASKS = f"coco_object/annotations/val2017|{STUFF_MASKS}"
STUFF_10K = "coco_stuff10k|cocostuff10k|cocostuff-10k-v1.1"
PANOPTIC = "coco/annotations/panoptic_val2017.json|coco/panoptic/panoptic_val2017.json"
PANOPTIC_MASKS = "coco/annotations/panoptic_val2017|coco/panoptic/panoptic_val2017"


def read_coco_pixel_maps(
    root: pathlib.Path,
    *,
    masks: str,
    images: str,
    classes: str,
    native: np.ndarray,
    suffix: str,
    converted: np.ndarray,
    background: int | None,
) -> Segmentation:
    """COCO-Stuff's pixel maps of val2017 as released, or else as a converter wrote them with a suffix.

    In the released ones a pixel has the category's id less 1, and 255 where nothing is labelled.
    """
    folder = find(root, masks)
    entries = [entry.name for entry in os.scandir(folder) if _is_mask(entry.name, ".png")]
    if any("TrainIds" not in name for name in entries):
        names, ending, table = _names_in(folder, ".png", without="TrainIds"), ".png", native
    else:
        names, ending, table = _names_in(folder, suffix), suffix, converted
    pictures, paths = _by_list(folder, names, base.find_folder(root, images), folder, ending)
    return Segmentation(pictures, Masks(paths, pictures, read_indices, table), class_names(classes), background)


def read_coco_stuff10k(root: pathlib.Path) -> Segmentation:
    """The 1,000 test images of COCO-Stuff 10k: the release's MATLAB files, or mmsegmentation's PNGs.

    A MATLAB matrix holds the category's id, a PNG 1 to 171; both 0 where nothing is labelled.
    """
    file = find(root, _under(STUFF_10K, "imageLists/test.txt"), _under(STUFF_10K, "imagesLists/test.txt"))
    names = _listed(file)
    images = base.find_folder(
        root, "|".join((_under(STUFF_10K, "images/test2014"), _under(STUFF_10K, "images"), "coco_stuff10k/images"))
    )
    classes = class_names("coco_stuff")
    try:
        folder, suffix = find(root, _under(STUFF_10K, "annotations/test2014")), "_labelTrainIds.png"
        read, table = read_indices, reduced(len(classes))
    except base.MissingError:
        folder, suffix = find(root, _under(STUFF_10K, "annotations")), ".mat"
        read, table = read_matlab, labels_of(COCO_IDS, ignored=(0,))
    pictures, paths = _by_list(file, names, images, folder, suffix)
    return Segmentation(pictures, Masks(paths, pictures, read, table), classes)


def read_panoptic(root: pathlib.Path) -> Segmentation:
    """COCO's panoptic annotations of val2017 by category: 133 things and merged kinds of stuff.

    A pixel's colour is the id of its segment, R + 256 G + 65536 B; the JSON file says which category that is.
    """
    file = find(root, PANOPTIC)
    folder, images = find(root, PANOPTIC_MASKS), base.find_folder(root, STUFF_IMAGES)
    content = typed(read_json(file), dict, str(file))
    categories = sorted(_each(content, "categories", file, id=int, name=str), key=lambda entry: entry["id"])
    ids = _unique([entry["id"] for entry in categories], file)
    if not 0 < ids[0] <= ids[-1] < IGNORE:
        raise AnnotationError(f"{file}: category ids from {ids[0]} to {ids[-1]}; expected 1 to {IGNORE - 1}")
    files = {entry["id"]: entry["file_name"] for entry in _each(content, "images", file, id=int, file_name=str)}
    pictures, paths, segments = [], [], {}
    for entry in _each(content, "annotations", file, image_id=int, file_name=str, segments_info=list):
        if entry["image_id"] not in files:
            raise AnnotationError(f"{file}: an annotation of the image {entry['image_id']}, which is not in images")
        pictures.append(base.inside(images, files[entry["image_id"]], file))
        paths.append(pathlib.Path(base.inside(folder, entry["file_name"], file).path))
        found = _each(entry, "segments_info", file, id=int, category_id=int)
        segments[paths[-1]] = {segment["id"]: segment["category_id"] for segment in found}
    _unique([picture.path for picture in pictures], file)
    if missing := [path.name for path in paths if not path.exists()]:
        raise AnnotationError(f"{file}: {len(missing)} of {len(paths)} masks are not in {folder}, such as {missing[0]}")
    masks = Masks(paths, pictures, functools.partial(_read_segments, segments), labels_of(ids, ignored=(0,)))
    return Segmentation(pictures, masks, [(_plain_name(entry["name"]),) for entry in categories])


def _read_segments(segments: Mapping[pathlib.Path, Mapping[int, int]], path: pathlib.Path) -> np.ndarray:
    """A panoptic PNG -> the category of each pixel, 0 where there is no segment."""
    image = _decode(path)
    if image.mode != "RGB":
        raise AnnotationError(f"{path}: a panoptic mask of mode {image.mode}; expected RGB, the ids of segments")
    ids, inverse = np.unique(np.asarray(image).astype(np.int64) @ (1, 256, 65536), return_inverse=True)
    known = {0: 0, **segments[path]}
    if unknown := [number for number in ids.tolist() if number not in known]:
        raise AnnotationError(f"{path}: the segments {unknown[:3]} are not listed in the annotation file")
    return np.array([known[number] for number in ids.tolist()])[inverse].reshape(image.height, image.width)


def _plain_name(name: str) -> str:
    """A category of stuff as one would say it: "wall-other-merged" -> "wall", "floor-wood" -> "floor wood"."""
    for ending in ("-merged", "-stuff", "-other"):
        name = name.removesuffix(ending)
    return name.replace("-", " ")


def _each(content: Mapping[str, Any], key: str, file: pathlib.Path, **types: type) -> list[Mapping[str, Any]]:
    """The objects of a list, with entries of the given types."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise AnnotationError(f"{file}: {key!r} is a {type(entries).__name__}; expected a list")
    for number, entry in enumerate(entries):
        for name, kind in types.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise AnnotationError(f"{file}: {key}[{number}] has no {kind.__name__} {name!r}")
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# The table

# Options of `evaluators.Segmentation`: the softmax over the queries, what is background, and the shorter side of the
# resized image, 1.5 where nothing is said, as a multiple of the model's (224 pixels in the published protocol).
VOC21 = {"temperature": 65, "threshold": 0.1, "area": 0.1}
BACKGROUND = {"temperature": 50, "threshold": 0.1}

FLAIR_30M = "a user's run, issue 18 of FLAIR's repository; the paper's 73.0 second-hand"
FLAIR_3M = "second-hand: notes on the paper, not confirmed"
# The same protocol with another model and another attention in its last layer: checks the order of magnitude.
SCLIP = "SCLIP's README: the same protocol, another model and attention"


def _sclip(value: float) -> Published:
    return Published("CLIP ViT-B/16 with SCLIP", "miou", value, SCLIP, "projected")


def _lines(file: pathlib.Path) -> int:
    return len(_listed(file))


def _masks(pattern: str) -> Callable[[pathlib.Path], int]:
    """Counts images that have a mask, one or several: 1.png, 1_labelTrainIds.png."""
    endings = re.compile(r"(_gtFine)?(_label(Train)?Ids|_instanceTrainIds)?\.png$")
    return lambda folder: len({endings.sub("", str(path)) for path in folder.glob(pattern) if path.name[0] != "."})


def _pascal(folders: str, split: str, masks: str, images: int) -> tuple[File, ...]:
    return (
        File(_under(folders, split), images, _lines),
        File(_under(folders, masks)),
        File(_under(folders, "JPEGImages"), optional=True),
    )


_VOC = _pascal(VOC2012, "ImageSets/Segmentation/val.txt", "SegmentationClass", 1449)
_CONTEXT = (
    File(_under(VOC2010, f"{CONTEXT_SPLIT}|ImageSets/Main/val.txt"), 5104, _lines),
    File(f"{_under(VOC2010, CONTEXT_MASKS)}|{_under(CONTEXT, 'trainval')}"),
    File(_under(VOC2010, "JPEGImages"), optional=True),
)
_read_voc = functools.partial(
    read_pascal, folders=VOC2012, split="ImageSets/Segmentation/val.txt", masks="SegmentationClass"
)
VOC_LICENCE = "images: Flickr terms; annotations: free for research"
COCO_LICENCE = "images: Flickr terms; annotations: CC-BY-4.0"

BENCHMARKS = (
    Benchmark(
        "voc20",
        "segmentation",
        "VOC20",
        _VOC,
        functools.partial(_read_voc, classes="voc20", table=reduced(20), background=None),
        VOC_LICENCE,
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        images=1449,
        classes=20,
        published=(
            Published("FLAIR Merged30M", "miou", 0.73, FLAIR_30M, "projected"),
            Published("FLAIR CC3M-recap", "miou", 0.597, FLAIR_3M, "projected"),
            _sclip(0.8154),
        ),
    ),
    Benchmark(
        "voc21",
        "segmentation",
        "VOC21",
        _VOC,
        functools.partial(_read_voc, classes="voc21", table=labels_of(range(21)), background=0),
        VOC_LICENCE,
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        images=1449,
        classes=21,
        published=(_sclip(0.5963),),
        options=VOC21,
    ),
    Benchmark(
        "context59",
        "segmentation",
        "Pascal Context 59",
        _CONTEXT,
        functools.partial(read_context, classes="context59", table=reduced(59), background=None),
        VOC_LICENCE,
        "https://www.cs.stanford.edu/~roozbeh/pascal-context/",
        images=5104,
        classes=59,
        published=(_sclip(0.3446),),
    ),
    Benchmark(
        "context60",
        "segmentation",
        "Pascal Context 60",
        _CONTEXT,
        functools.partial(read_context, classes="context60", table=labels_of(range(60)), background=0),
        VOC_LICENCE,
        "https://www.cs.stanford.edu/~roozbeh/pascal-context/",
        images=5104,
        classes=60,
        published=(_sclip(0.3174),),
        options=BACKGROUND,
    ),
    Benchmark(
        "ade20k",
        "segmentation",
        "ADE20K",
        (
            File(_under(ADE20K, "annotations/validation"), 2000, _masks("*.png")),
            File(_under(ADE20K, "images/validation"), optional=True),
        ),
        read_ade20k,
        "images: for research; annotations: BSD-3-Clause",
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        images=2000,
        classes=150,
        published=(_sclip(0.1645),),
    ),
    Benchmark(
        "coco_stuff10k",
        "segmentation",
        "COCO-Stuff 10k",
        (
            File(
                "|".join(_under(STUFF_10K, f"{name}/test.txt") for name in ("imageLists", "imagesLists")), 1000, _lines
            ),
            File(_under(STUFF_10K, "annotations")),
            File(_under(STUFF_10K, "images"), optional=True),
        ),
        read_coco_stuff10k,
        COCO_LICENCE,
        "https://github.com/nightrome/cocostuff10k",
        images=1000,
        classes=171,
        published=(_sclip(0.2591),),
    ),
    Benchmark(
        "coco_stuff164k",
        "segmentation",
        "COCO-Stuff 164k",
        (File(STUFF_MASKS, 5000, _masks("*.png")), File(STUFF_IMAGES, optional=True)),
        functools.partial(
            read_coco_pixel_maps,
            masks=STUFF_MASKS,
            images=STUFF_IMAGES,
            classes="coco_stuff",
            native=labels_of(COCO_IDS - 1),
            suffix="_labelTrainIds.png",
            converted=labels_of(range(171)),
            background=None,
        ),
        COCO_LICENCE,
        "https://github.com/nightrome/cocostuff (stuffthingmaps_trainval2017.zip)",
        images=5000,
        classes=171,
        published=(_sclip(0.2277),),
        options={"short_side": 2.0},
    ),
    Benchmark(
        "coco_object",
        "segmentation",
        "COCO-Object",
        (File(OBJECT_MASKS, 5000, _masks("*.png")), File(OBJECT_IMAGES, optional=True)),
        functools.partial(
            read_coco_pixel_maps,
            masks=OBJECT_MASKS,
            images=OBJECT_IMAGES,
            classes="coco_object",
            native=objects(),
            suffix="_instanceTrainIds.png",
            converted=labels_of(range(81)),
            background=0,
        ),
        COCO_LICENCE,
        "https://github.com/nightrome/cocostuff (stuffthingmaps_trainval2017.zip)",
        images=5000,
        classes=81,
        published=(_sclip(0.3352),),
        options=BACKGROUND,
    ),
    Benchmark(
        "coco_panoptic",
        "segmentation",
        "COCO panoptic, by category",
        (
            File(PANOPTIC, 5000, lambda file: len(_each(typed(read_json(file), dict, str(file)), "annotations", file))),
            File(PANOPTIC_MASKS, 5000, _masks("*.png")),
            File(STUFF_IMAGES, optional=True),
        ),
        read_panoptic,
        COCO_LICENCE,
        "https://cocodataset.org/#download (panoptic_annotations_trainval2017.zip)",
        images=5000,
        classes=133,
    ),
    Benchmark(
        "cityscapes",
        "segmentation",
        "Cityscapes",
        (
            File(_under(CITYSCAPES, "gtFine/val"), 500, _masks("*/*_gtFine_label*Ids.png")),
            File(_under(CITYSCAPES, "leftImg8bit/val"), optional=True),
        ),
        read_cityscapes,
        "Cityscapes terms, research only",
        "https://www.cityscapes-dataset.com/downloads/ (gtFine_trainvaltest.zip, leftImg8bit_trainvaltest.zip)",
        images=500,
        classes=19,
        published=(_sclip(0.3234),),
        options={"short_side": 2.5},
    ),
)
