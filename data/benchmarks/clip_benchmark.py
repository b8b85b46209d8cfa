"""Sets in the layout of CLIP_benchmark's webdatasets: about forty sets for classification and retrieval, one reader.

Source: https://github.com/LAION-AI/CLIP_benchmark (MIT) and https://huggingface.co/clip-benchmark. A set is a folder:

    dataset_type.txt                        "retrieval", or "multilabel"; absent for other classification
    classnames.txt                          a class a line, in the order of the labels
    zeroshot_classification_templates.txt   a prompt a line, `{c}` is the class
    test/nshards.txt                        N
    test/0.tar … (N-1).tar                  KEY.{jpg,jpeg,png,webp} with KEY.cls (the number of its class),
                                            KEY.npy (0 or 1 per class, where an image has several)
                                            or KEY.txt (captions, one a line)

Counts: DataComp's tasklist.yml and the table of VTAB+ (Schuhmann et al., NeurIPS 2022). Published numbers: the suite's
own benchmark/benchmark.csv, OpenAI's ViT-B/16.
"""

import functools
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from flair_jax.data.benchmarks.base import (
    AnnotationError,
    Benchmark,
    Classification,
    File,
    MissingError,
    Picture,
    Published,
    Retrieval,
    find,
    read_text,
)
from flair_jax.data.sources import webdataset
from flair_jax.data.sources.base import ShardError

HUB = "https://huggingface.co/datasets/clip-benchmark"
SHARDS, CLASSES, TEMPLATES = "test/nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
# What packing a folder adds to a tar beside its samples: "./", and "._0.jpg" on a Mac. The suite passes over them, too.
HARMLESS = ("directory", "name without a key")
PREFIXES = ("wds_retrieval:", "wds_classification:")  # of folders of one's own
OPENAI = "OpenAI CLIP ViT-B/16"
RESULTS = "LAION-AI/CLIP_benchmark, benchmark/benchmark.csv"


def read_classification(root: pathlib.Path, folders: str) -> Classification:
    """
    Args:
      root: of all sets.
      folders: of this set, relative to the root or absolute; `a|b`: either.

    Raises:
      MissingError, AnnotationError: see `Benchmark.read`.
    """
    folder = _folder(root, folders)
    classes, templates_file = _classes(_need(root, folder / CLASSES)), _need(root, folder / TEMPLATES)
    templates = _lines(templates_file)
    for template in templates:
        if "{c}" not in template:
            raise AnnotationError(f"{templates_file}: template {template!r} has no {{c}} for the name of the class")
    tars, parts = _tars(root, folder)
    kinds = ("npy", "cls") if _type(folder) == "multilabel" else ("cls", "npy")
    partner = next((name for name in kinds if len(_scan(tars[0], name).spans)), kinds[0])
    read_label = {"cls": _label, "npy": _vector}[partner]
    pictures, labels = [], []
    for tar in tars:
        for picture, where, content in _samples(tar, partner):
            pictures.append(picture)
            labels.append(read_label(content, len(classes), where))
    if not pictures:
        raise AnnotationError(f"{folder}: no image in {len(tars)} tars")
    names = [(name,) for name in classes]
    return Classification(pictures, np.asarray(labels), names, templates, parts=parts)


def read_retrieval(root: pathlib.Path, folders: str) -> Retrieval:
    """As `read_classification`, for a set of captions."""
    folder = _folder(root, folders)
    tars, parts = _tars(root, folder)
    pictures, texts, owners = [], [], []
    for tar in tars:
        for picture, where, content in _samples(tar, "txt"):
            captions = [line.strip() for line in _decode(content, where).splitlines() if line.strip()]
            if not captions:
                raise AnnotationError(f"{where}: no caption")
            owners += [len(pictures)] * len(captions)
            texts += captions
            pictures.append(picture)
    if not pictures:
        raise AnnotationError(f"{folder}: no image in {len(tars)} tars")
    return Retrieval(pictures, texts, np.asarray(owners), parts=parts)


def unlisted(root: pathlib.Path) -> list[Benchmark]:
    """Entries for the sets in this layout that lie under the root and that the table does not name."""
    known = {folder.split("/")[0] for name in LISTED for folder in _folders(name).split("|")}
    found = []
    for shards in sorted(root.glob(f"*/{SHARDS}")):
        name = shards.parents[1].name
        if name in known:
            continue
        found.append(
            located(f"wds_{'retrieval' if _type(shards.parents[1]) == 'retrieval' else 'classification'}:{name}")
        )
    return found


def located(name: str) -> Benchmark:
    """An entry for a set in this layout that no table lists.

    Args:
      name: one of `PREFIXES` and the set's folder, relative to the root or absolute.
    """
    prefix, _, folder = name.partition(":")
    title = folder.strip("/").replace("/", "_")
    make = _retrieval_entry if f"{prefix}:" == PREFIXES[0] else _classification_entry
    return make(title, folder, title, "not known", source=name)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _folder(root: pathlib.Path, folders: str) -> pathlib.Path:
    """The folder of a set: the first one with a number of shards."""
    return find(root, *(f"{folder}/{SHARDS}" for folder in folders.split("|"))).parents[1]


def _type(folder: pathlib.Path) -> str:
    """What dataset_type.txt says, whatever that is; empty if there is none."""
    file = folder / TYPE
    return file.read_bytes().decode("utf-8", "replace").strip().lower() if file.is_file() else ""


def _need(root: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Raises MissingError, relative to the root, if there is no such file."""
    if not path.exists():
        raise MissingError([str(path.relative_to(root) if path.is_relative_to(root) else path)])
    return path


def _lines(path: pathlib.Path) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise AnnotationError(f"{path}: empty; expected a line per class or template")
    return lines


def _classes(path: pathlib.Path) -> list[str]:
    """A class per line; the number of its line is its label, so that none may be empty but at the end."""
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not all(names) or not names:
        raise AnnotationError(f"{path}: line {names.index('') + 1 if names else 1} is empty; expected a class per line")
    return names


def _tars(root: pathlib.Path, folder: pathlib.Path) -> tuple[list[pathlib.Path], tuple[str, ...]]:
    """The tars that are there, and their names if some are not."""
    text = read_text(folder / SHARDS).strip()
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
        raise AnnotationError(f"{folder / SHARDS}: {text!r}; expected the number of tars")
    tars = [folder / f"test/{number}.tar" for number in range(int(text))]
    there = [tar for tar in tars if tar.exists()]
    if not there:
        _need(root, tars[0])
    return there, () if len(there) == len(tars) else tuple(tar.name for tar in there)


def _scan(tar: pathlib.Path, partner: str) -> webdataset.index.Index:
    try:
        return webdataset.scan(str(tar), partner)
    except ShardError as error:
        raise AnnotationError(str(error)) from error


def _samples(tar: pathlib.Path, partner: str) -> Iterator[tuple[Picture, str, bytes]]:
    """The picture of each sample, the name of its label for errors, and the label's bytes; the tar is opened once.

    Raises:
      AnnotationError: a sample is incomplete, or the tar is damaged.
    """
    found = _scan(tar, partner)
    faults = ", ".join(
        f"{count} x {reason} ({found.examples.get(reason, 'no name')})"
        for reason, count in found.skipped.items()
        if reason not in HARMLESS
    )
    if faults:
        raise AnnotationError(f"{tar}: {faults}; expected an image and a .{partner} per key")
    keys, ends = found.keys.tobytes(), np.cumsum(found.key_lengths)
    with open(tar, "rb") as file:
        for (offset, size, start, length), end, width in zip(found.spans, ends, found.key_lengths, strict=True):
            key = keys[end - width : end].decode("utf-8", "replace")
            file.seek(start)
            yield Picture(str(tar), int(offset), int(size)), f"{tar}: {key}.{partner}", file.read(length)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{where}: not UTF-8 at byte {error.start}") from error


def _label(content: bytes, classes: int, where: str) -> int:
    text = _decode(content, where).strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < classes):
        raise AnnotationError(f"{where}: {text[:40]!r}; expected the number of a class, 0 to {classes - 1}")
    return int(text)


def _vector(content: bytes, classes: int, where: str) -> np.ndarray:
    try:
        vector = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise AnnotationError(f"{where}: no array ({error})") from error
    if vector.shape != (classes,) or vector.dtype.kind not in "buif" or not np.isin(vector, (0, 1)).all():
        raise AnnotationError(f"{where}: {vector.dtype} {vector.shape}; expected 0 or 1 for each of {classes} classes")
    return vector.astype(bool)


def _count(folder: pathlib.Path, partner: str) -> int:
    """Samples in the tars of a folder `test`."""
    return sum(len(_scan(tar, partner).spans) for tar in _tars(folder.parent, folder.parent)[0])


def _count_classified(folder: pathlib.Path) -> int:
    return _count(folder, "cls") or _count(folder, "npy")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _files(folders: str, *names: str) -> str:
    return "|".join(f"{folder}/{name}" for folder in folders.split("|") for name in names)


def _folders(name: str) -> str:
    """Of a set: as the hub calls it, as DataComp's download does, and without a prefix."""
    return f"wds_{name}|wds_{name}_test|{name.replace('vtab-', 'vtab/')}"


def _classification_entry(
    name: str,
    folders: str,
    title: str,
    licence: str,
    images: int | None = None,
    classes: int | None = None,
    metric: str | None = None,
    published: tuple[Published, ...] = (),
    *,
    source: str,
    **options: Any,
) -> Benchmark:
    return Benchmark(
        name=name,
        task="classification",
        title=title,
        files=(
            File(_files(folders, "test"), images, _count_classified),
            File(_files(folders, SHARDS)),
            File(_files(folders, CLASSES), classes, lambda path: len(_classes(path))),
            File(_files(folders, TEMPLATES), count=lambda path: len(_lines(path))),
        ),
        read=functools.partial(read_classification, folders=folders),
        licence=licence,
        source=source,
        images=images,
        classes=classes,
        published=published,
        options={"metric": metric, **options},  # None: what the labels allow first
    )


def _retrieval_entry(
    name: str,
    folders: str,
    title: str,
    licence: str,
    images: int | None = None,
    texts: int | None = None,
    published: tuple[Published, ...] = (),
    *,
    source: str,
) -> Benchmark:
    return Benchmark(
        name=name,
        task="retrieval",
        title=title,
        files=(
            File(_files(folders, "test"), images, lambda folder: _count(folder, "txt")),
            File(_files(folders, SHARDS)),
        ),
        read=functools.partial(read_retrieval, folders=folders),
        licence=licence,
        source=source,
        images=images,
        texts=texts,
        published=published,
    )


def _of_openai(**values: float) -> tuple[Published, ...]:
    return tuple(Published(OPENAI, metric, value, RESULTS, mode="global") for metric, value in values.items())


RESEARCH = "research use, terms of "
# Name on the hub, title, licence, images, classes, the suite's main metric, its value for OpenAI's ViT-B/16.
_CLASSIFICATION = (
    ("imagenet1k", "ImageNet", RESEARCH + "ImageNet", 50_000, 1000, "acc1", 0.68352),
    ("imagenetv2", "ImageNet-V2", "MIT", 10_000, 1000, "acc1", 0.6188),
    ("imagenet_sketch", "ImageNet-Sketch", "MIT", 50_889, 1000, "acc1", 0.48144),
    ("imagenet-a", "ImageNet-A", "MIT", 7_500, 200, "acc1", 0.50067),
    ("imagenet-r", "ImageNet-R", "MIT", 30_000, 200, "acc1", 0.77667),
    ("imagenet-o", "ImageNet-O", "MIT", 2_000, 200, "acc1", None),
    ("objectnet", "ObjectNet", "CC-BY-4.0, evaluation only", 18_574, 113, "acc1", 0.55443),
    ("fer2013", "FER2013", RESEARCH + "FER2013", 7_178, 7, "acc1", 0.45821),
    ("voc2007", "Pascal VOC 2007, objects cut out", RESEARCH + "Flickr", 14_976, 20, "acc1", 0.78439),
    ("voc2007_multilabel", "Pascal VOC 2007", RESEARCH + "Flickr", 4_952, 20, "average_precision", 0.78883),
    ("sun397", "SUN397", RESEARCH + "SUN", 108_754, 397, "acc1", 0.64349),
    ("cars", "Stanford Cars", RESEARCH + "Stanford Cars", 8_041, 196, "acc1", 0.64457),
    ("fgvc_aircraft", "FGVC Aircraft", RESEARCH + "FGVC Aircraft", 3_333, 100, "mean_per_class", 0.24055),
    ("mnist", "MNIST", "CC-BY-SA-3.0", 10_000, 10, "acc1", 0.4955),
    ("stl10", "STL-10", RESEARCH + "ImageNet", 8_000, 10, "acc1", 0.98275),
    ("gtsrb", "GTSRB", "CC0", 12_630, 43, "acc1", 0.43626),
    ("country211", "Country211", "CC, by image (YFCC100M)", 21_100, 211, "acc1", 0.22796),
    ("renderedsst2", "Rendered SST2", RESEARCH + "SST", 1_821, 2, "roc_auc", None),
    ("food101", "Food-101", RESEARCH + "Food-101", 25_250, 101, "acc1", None),
    ("vtab-caltech101", "Caltech-101", "CC-BY-4.0", 6_085, 102, "mean_per_class", 0.90888),
    ("vtab-cifar10", "CIFAR-10", "none stated", 10_000, 10, "acc1", 0.9083),
    ("vtab-cifar100", "CIFAR-100", "none stated", 10_000, 100, "acc1", 0.6691),
    ("vtab-clevr_count_all", "CLEVR count", "CC-BY-4.0", 15_000, 8, "acc1", 0.2044),
    ("vtab-clevr_closest_object_distance", "CLEVR distance", "CC-BY-4.0", 15_000, 6, "acc1", 0.15833),
    ("vtab-diabetic_retinopathy", "Diabetic Retinopathy", RESEARCH + "EyePACS", 42_670, 5, "acc1", 0.06332),
    ("vtab-dmlab", "DMLab", "Apache-2.0", 22_735, 6, "acc1", 0.15905),
    ("vtab-dsprites_label_orientation", "dSprites orientation", "Apache-2.0", 73_728, 40, "acc1", 0.01976),
    ("vtab-dsprites_label_x_position", "dSprites x position", "Apache-2.0", 73_728, 32, "acc1", 0.02954),
    ("vtab-dsprites_label_y_position", "dSprites y position", "Apache-2.0", 73_728, 32, "acc1", None),
    ("vtab-dtd", "Describable Textures", RESEARCH + "DTD", 1_880, 47, "acc1", 0.44574),
    ("vtab-eurosat", "EuroSAT", "MIT", 5_400, 10, "acc1", 0.55593),
    ("vtab-kitti_closest_vehicle_distance", "KITTI distance", "CC-BY-NC-SA-3.0", 711, 4, "acc1", 0.27004),
    ("vtab-flowers", "Oxford Flowers-102", RESEARCH + "Flowers-102", 6_149, 102, "mean_per_class", 0.69128),
    ("vtab-pets", "Oxford-IIIT Pets", "CC-BY-SA-4.0", 3_669, 37, "mean_per_class", 0.88451),
    ("vtab-pcam", "PatchCamelyon", "CC0", 32_768, 2, "roc_auc", None),
    ("vtab-resisc45", "RESISC45", RESEARCH + "RESISC45", 6_300, 45, "acc1", 0.58508),
    ("vtab-smallnorb_label_azimuth", "smallNORB azimuth", RESEARCH + "NORB", 12_150, 18, "acc1", 0.05588),
    ("vtab-smallnorb_label_elevation", "smallNORB elevation", RESEARCH + "NORB", 12_150, 9, "acc1", 0.1186),
    ("vtab-svhn", "SVHN", RESEARCH + "SVHN", 26_032, 10, "acc1", 0.30482),
)
# Sets in which two pairs of classes have the same name: see `classification.BENCHMARKS`, where they stand, too.
_SAME_NAMES = ("imagenet1k", "imagenetv2", "imagenet_sketch")
# Sets whose main metric the suite does not publish: its accuracy.
_ACCURACY = {"renderedsst2": 0.6112, "vtab-pcam": 0.50629}
# Name on the hub, title, licence, images, texts, Recall@5 text to image and image to text for OpenAI's ViT-B/16.
_RETRIEVAL = (
    ("mscoco_captions", "COCO captions, Karpathy test", "CC-BY-4.0", 5_000, 25_010, 0.58369, 0.7682),
    ("flickr8k", "Flickr8k test", RESEARCH + "Flickr8k", 1_000, 5_000, 0.56408, 0.72797),
    ("flickr30k", "Flickr30k, Karpathy test", RESEARCH + "Flickr30k", 1_000, 5_000, 0.8554, 0.963),
)


LISTED = tuple(row[0] for row in (*_RETRIEVAL, *_CLASSIFICATION))


def _entries() -> Iterator[Benchmark]:
    for name, title, licence, images, texts, to_image, to_text in _RETRIEVAL:
        published = _of_openai(**{"text_to_image_R@5": to_image, "image_to_text_R@5": to_text})
        source = f"{HUB}/wds_{name}"
        yield _retrieval_entry(f"wds_{name}", _folders(name), title, licence, images, texts, published, source=source)
    for name, title, licence, images, classes, metric, value in _CLASSIFICATION:
        values = {metric: value} if value is not None else {"acc1": _ACCURACY[name]} if name in _ACCURACY else {}
        entry = (f"wds_{name}", _folders(name), title, licence, images, classes, metric, _of_openai(**values))
        ties = {"ties": "first"} if name in _SAME_NAMES else {}
        yield _classification_entry(*entry, source=f"{HUB}/wds_{name}", **ties)


BENCHMARKS = tuple(_entries())
