"""Two images and two texts: Winoground, EqBen, COLA and COCO-Counterfactuals; COLA's single objects; SPEC's choices in
both directions.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import (
    AnnotationError,
    Benchmark,
    Choice,
    Classification,
    File,
    Picture,
    Published,
    Retrieval,
    find,
    find_folder,
    inside,
)
from flair_jax.data.benchmarks.compositional import Builder, texts_of
from flair_jax.data.benchmarks.json_files import field, read_json, read_json_lines, typed
from flair_jax.data.benchmarks.retrieval import recall_at_1
from flair_jax.data.transforms.images import ImageError

WINOGROUND = "winoground/examples.jsonl|winoground/data/examples.jsonl"
WINOGROUND_IMAGES = "winoground/images|winoground/data/images"
COUNTERFACTUALS = "coco_counterfactuals/examples.jsonl|coco_counterfactuals/data/examples.jsonl"
COUNTERFACTUALS_IMAGES = "coco_counterfactuals/images|coco_counterfactuals/data/images"
RETRIEVAL_SHARE = 0.3


def _examples(root: pathlib.Path, paths: str, images: str, suffix: str, group: str | None) -> Choice:
    """Lines {image_0, caption_0, image_1, caption_1, …}; names of images have no suffix."""
    file, folder = find(root, paths), find_folder(root, images)
    builder = Builder()
    for number, row in enumerate(read_json_lines(file), 1):
        where = f"{file}: record {number}"
        names = [field(row, f"image_{i}", str, where) for i in (0, 1)]
        pictures = [inside(folder, name if name.endswith(suffix) else f"{name}{suffix}", file) for name in names]
        texts = [field(row, f"caption_{i}", str, where) for i in (0, 1)]
        builder.add(pictures, texts, group="" if group is None else field(row, group, str, where))
    return builder.build()


def read_winoground(root: pathlib.Path) -> Choice:
    """All examples count alike; groups are what was swapped: objects, a relation, or both."""
    return _examples(root, WINOGROUND, WINOGROUND_IMAGES, ".png", "collapsed_tag")


def read_counterfactuals(root: pathlib.Path) -> Choice:
    """Captions that differ in a noun, with generated images."""
    return _examples(root, COUNTERFACTUALS, COUNTERFACTUALS_IMAGES, ".jpg", None)


def read_counterfactuals_retrieval(root: pathlib.Path) -> Retrieval:
    """30 % of the examples, each two pairs. Which ones FSC-CLIP drew is not published: these are drawn with seed 0."""
    data = read_counterfactuals(root)
    number = round(len(data.items) * RETRIEVAL_SHARE)
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.items))[:number])
    items = [data.items[example] for example in chosen]
    pictures = [data.pictures[image] for item in items for image in item.images]
    texts = [data.texts[text] for item in items for text in item.texts]
    return Retrieval(pictures, texts, np.arange(len(texts)))


# ---------------------------------------------------------------------------------------------------------------------
# COLA

COLA = "|".join(f"cola/{folder}COLA_multiobjects_matching_benchmark.json" for folder in ("data/", ""))
COLA_IMAGES = ("cola/images", "cola/vg_gqa_images", "cola/imgs")


def read_cola(root: pathlib.Path) -> Choice:
    """Rows [address of image 1, caption 1, address of image 2, caption 2]; images are Visual Genome's.

    COLA's multi-object accuracy is the image score.
    """
    file = find(root, COLA)
    builder = Builder()
    for number, row in enumerate(typed(read_json(file), list, str(file))):
        where = f"{file}[{number}]"
        first, caption, second, other = _four(texts_of(row, where), where)
        names = [address.rpartition("/")[2] for address in (first, second)]
        pictures = [compositional.visual_genome(root, name, file, *COLA_IMAGES) for name in names]
        builder.add(pictures, [caption, other])
    return builder.build()


def _four(row: list[str], where: str) -> list[str]:
    if len(row) != 4:
        raise AnnotationError(f"{where} has {len(row)} entries; expected image, caption, image, caption")
    return row


COLA_PARTS = ("GQA", "CLEVR", "PACO")
# Where the images of the parts are beside `COLA_IMAGES`.
COLA_PART_IMAGES = {
    "GQA": (),
    "CLEVR": ("clevr/images/val", "clevr/CLEVR_v1.0/images/val", "CLEVR_v1.0/images/val"),
    "PACO": tuple(f"coco/{folder}{split}" for folder in ("images/", "") for split in ("val2017", "train2017")),
}


def _cola_single(part: str) -> str:
    return "|".join(f"cola/{folder}COLA_singleobjects_benchmark_{part}.json" for folder in ("data/", ""))


def read_cola_single(root: pathlib.Path, part: str) -> Classification:
    """COLA's single objects with attributes ("square white plate"): which of all of them are in an image?

    The names of the classes, and rows [image, its objects, 0 or 1 for each class, 0 or 1 for each class], as an object
    of `labels` and `data` or a list of both; some rows leave out the objects. The second vector says for which classes
    the image is hard, with something square, white or a plate in it: for them alone it counts, as in the paper.
    """
    file = find(root, _cola_single(part))
    content = read_json(file)
    if isinstance(content, list) and len(content) == 2:
        content = dict(zip(("labels", "data"), content, strict=True))
    names = texts_of(field(content, "labels", list, str(file)), f"{file}: 'labels'")
    pictures, vectors = [], []
    for number, row in enumerate(field(content, "data", list, str(file))):
        where = f"{file}: 'data'[{number}]"
        if len(typed(row, list, where)) not in (3, 4):
            raise AnnotationError(f"{where} has {len(row)} entries; expected image, objects, classes, hard classes")
        name = typed(row[0], str, where).rpartition("/")[2]  # the folders are those of the authors' machine
        if part == "GQA":
            pictures.append(compositional.visual_genome(root, name, file, *COLA_IMAGES))
        else:
            folders = [*COLA_PART_IMAGES[part], *COLA_IMAGES]
            pictures.append(compositional.locate(root, folders, name, file))
        vectors.append([_flags(vector, len(names), where) for vector in row[-2:]])
    if len(set(pictures)) < len(pictures) or not pictures:
        raise AnnotationError(f"{file}: {len(pictures)} images, of which {len(set(pictures))} differ")
    labels, counted = np.array(vectors).transpose(1, 0, 2)
    return Classification(pictures, labels, [(name,) for name in names], ("{c}",), counted)


def _flags(vector: Any, classes: int, where: str) -> np.ndarray:
    if not isinstance(vector, list) or len(vector) != classes or not all(flag in (0, 1) for flag in vector):
        raise AnnotationError(f"{where}: {str(vector)[:40]}; expected 0 or 1 for each of {classes} classes")
    return np.array(vector, bool)


def _cola_single_entry(part: str, licence: str, classes: int | None) -> Benchmark:
    folders = (*COLA_IMAGES, *COLA_PART_IMAGES[part])
    return Benchmark(
        name=f"cola_single_{part.lower()}",
        task="classification",
        title=f"COLA (single objects, {part})",
        files=(File(_cola_single(part), None, _count_cola_single), File("|".join(folders))),
        read=functools.partial(read_cola_single, part=part),
        classes=classes,
        licence=f"MIT; images: {licence}",
        source="https://github.com/arijitray1993/COLA",
    )


def _count_cola_single(path: pathlib.Path) -> int:
    content = read_json(path)
    return len(content["data"] if isinstance(content, dict) else content[1])


# ---------------------------------------------------------------------------------------------------------------------
# EqBen

EQBEN = "eqben/private_info_global.json|eqben/ann/private_info_global.json|eqben/annotation.json"
EQBEN += "|eqben/eqben_subset_10percent_final.json"  # a tenth of it, with images of its own
EQBEN_IMAGES = ("eqben/images", "eqben/image", "eqben/image_subset", "eqben")
# Folder of a subset's images -> group and size.
EQBEN_PARTS = {
    "eqbenyoucook2": ("eqbenyoucook2", 45_849),
    "eqbenag": ("eqbenag", 195_872),
    "eqbengebc": ("eqbengebc", 1_814),
    "eqbenkubric_loc": ("eqbenkubric/eqbenkubric_loc", 2_000),
    "eqbenkubric_cnt": ("eqbenkubric/eqbenkubric_cnt", 2_000),
    "eqbenkubric_attr": ("eqbenkubric/eqbenkubric_attr", 2_000),
    "eqbensd": ("eqbensd", 1_513),
}


@dataclasses.dataclass(frozen=True)
class ArrayPicture(Picture):
    """An image as a .npy file, uint8 (H, W, 3), blue first, as EqBen has those of YouCook2."""

    def decode(self) -> Image.Image:
        try:
            pixels = np.load(io.BytesIO(self.read()), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ImageError(f"{self.path}: {error}") from error
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ImageError(f"{self.path}: {pixels.dtype} {pixels.shape}; expected uint8 (H, W, 3)")
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))


def read_eqben(root: pathlib.Path) -> Choice:
    """Rows {image0, image1, caption0, caption1}, in one list or sorted into objects and lists by subset and video.

    The first part of an image's path names the subset. Of several captions, as Action Genome has, the first one counts.
    """
    file = find(root, EQBEN)
    builder = Builder()
    for where, row in _rows(read_json(file), str(file)):
        names = [field(row, key, str, where) for key in _either(row, "image")]
        part = names[0].split("/")[0]
        if part not in EQBEN_PARTS:
            raise AnnotationError(f"{where}: image {names[0]!r} is in none of {list(EQBEN_PARTS)}")
        pictures = [compositional.locate(root, EQBEN_IMAGES, name, file) for name in names]
        pictures = [ArrayPicture(picture.path) if picture.path.endswith(".npy") else picture for picture in pictures]
        captions = [row[key] for key in _either(row, "caption")]
        texts = [texts_of([text] if isinstance(text, str) else text, where)[0] for text in captions]
        builder.add(pictures, texts, group=EQBEN_PARTS[part][0])
    return builder.build()


def _either(row: dict[str, Any], name: str) -> tuple[str, str]:
    """The names of two fields: image0 and image1, or image_0 and image_1 as Winoground has them."""
    return (f"{name}0", f"{name}1") if f"{name}0" in row else (f"{name}_0", f"{name}_1")


def _rows(content: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects that have images and captions, wherever they are, and where that is.

    Raises:
      AnnotationError: something is neither such an object, nor an object or list of others.
    """
    if isinstance(content, dict) and all({*_either(content, name)} <= content.keys() for name in ("image", "caption")):
        yield where, content
        return
    if not isinstance(content, dict | list):
        raise AnnotationError(f"{where} is {str(content)[:60]!r}; expected image0, image1, caption0 and caption1")
    members = content.items() if isinstance(content, dict) else enumerate(content)
    for key, member in members:
        yield from _rows(member, f"{where}[{key!r}]")


# ---------------------------------------------------------------------------------------------------------------------
# SPEC

SPEC_PARTS = ("absolute_size", "relative_size", "absolute_spatial", "relative_spatial", "existence", "count")
SPEC_FILES = {
    f"{part}/{name}": f"spec/{part}/{name}.json|spec/data/{part}/{name}.json"
    for part in SPEC_PARTS
    for name in ("image2text", "text2image")
}


def read_spec(root: pathlib.Path) -> Choice:
    """Rows {query, keys, label}: an image with texts, or a text with images, whose names are relative to the part."""

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        group, direction = part.split("/")
        for number, row in enumerate(typed(read_json(file), list, str(file))):
            where = f"{file}[{number}]"
            query, label = field(row, "query", str, where), field(row, "label", int, where)
            keys = texts_of(field(row, "keys", list, where), f"{where}: 'keys'")
            if not 0 <= label < len(keys) or len(keys) < 2:
                raise AnnotationError(f"{where}: label {label} of {len(keys)} keys")
            keys = [keys[label], *keys[:label], *keys[label + 1 :]]
            images, texts = ([query], keys) if direction == "image2text" else (keys, [query])
            builder.add([inside(file.parent, name, file) for name in images], texts, group=group, place=label)

    return compositional.read_parts(root, SPEC_FILES, add)


SCORES = (  # text, image and group score
    (compositional.CLIP, "text_score", 0.3125),
    (compositional.CLIP, "image_score", 0.11),
)

BENCHMARKS = (
    Benchmark(
        name="winoground",
        task="choice",
        title="Winoground",
        files=(File(WINOGROUND, 400, lambda path: len(read_json_lines(path))), File(WINOGROUND_IMAGES)),
        read=read_winoground,
        images=800,
        items=400,
        licence="META IMAGES RESEARCH LICENSE (Getty Images)",
        source="https://huggingface.co/datasets/facebook/winoground",
        published=(
            *compositional.published("winoground", "group_score"),
            *(Published(*score, compositional.VL_COMPO, "global") for score in SCORES),
        ),
        options={"levels": 0},
    ),
    Benchmark(
        name="eqben",
        task="choice",
        title="EqBen",
        files=(File(EQBEN), File("|".join(EQBEN_IMAGES[:-1]))),
        read=read_eqben,
        items=sum(size for _, size in EQBEN_PARTS.values()),
        licence="see the source; images: of their own sources",
        source="https://github.com/Wangt-CN/EqBen",
        published=compositional.published("eqben", "group_score"),
    ),
    Benchmark(
        name="cola",
        task="choice",
        title="COLA (multi-object)",
        files=(File(COLA, 210, compositional.count), File("|".join(COLA_IMAGES))),
        read=read_cola,
        items=210,
        licence="MIT; images: Visual Genome",
        source="https://github.com/arijitray1993/COLA",
    ),
    _cola_single_entry("GQA", "Visual Genome", 320),
    _cola_single_entry("CLEVR", "CC-BY-4.0", None),
    _cola_single_entry("PACO", "COCO", None),
    Benchmark(
        name="coco_counterfactuals",
        task="choice",
        title="COCO-Counterfactuals",
        files=(
            File(COUNTERFACTUALS, 17_410, lambda path: len(read_json_lines(path))),
            File(COUNTERFACTUALS_IMAGES),
        ),
        read=read_counterfactuals,
        items=17_410,
        licence="CC-BY-4.0",
        source="https://huggingface.co/datasets/Intel/COCO-Counterfactuals",
    ),
    Benchmark(
        name="coco_counterfactuals_retrieval",
        task="retrieval",
        title="COCO-Counterfactuals, 30 % as retrieval",
        files=(File(COUNTERFACTUALS, 17_410, lambda path: len(read_json_lines(path))), File(COUNTERFACTUALS_IMAGES)),
        read=read_counterfactuals_retrieval,
        images=10_446,
        texts=10_446,
        licence="CC-BY-4.0",
        source="https://huggingface.co/datasets/Intel/COCO-Counterfactuals",
        published=recall_at_1(
            "FSC-CLIP, paper (another random 30 %)",
            "global",
            {compositional.CLIP: (48.1, 51.0), "FSC-CLIP LAION-COCO ViT-B/32": (57.9, 49.2)},
        ),
    ),
    Benchmark(
        name="spec",
        task="choice",
        title="SPEC",
        files=compositional.files(SPEC_FILES, {}),
        read=read_spec,
        licence="see the source",
        source="https://huggingface.co/datasets/wjpoom/SPEC",
        published=compositional.published("spec"),
    ),
)
