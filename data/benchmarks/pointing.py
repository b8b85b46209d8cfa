"""Phrases and boxes for the pointing game: COCO's objects and Flickr30k Entities.

RefCOCO's expressions are released as pickles, which are programs: they are not read.
"""

import collections
import functools
import pathlib
import re
import xml.etree.ElementTree
from collections.abc import Iterable

import numpy as np

from flair_jax.data.benchmarks.base import (
    COCO_IMAGES,
    AnnotationError,
    Benchmark,
    File,
    Picture,
    Pointing,
    find,
    find_folder,
    inside,
    read_text,
)
from flair_jax.data.benchmarks.compositional import box_of
from flair_jax.data.benchmarks.json_files import field, read_json, typed

PROMPT = "a photo of a {}"

COCO = "coco/annotations/instances_val2017.json|coco/instances_val2017.json|coco/annotations/instances_val2017_*.json"
ENTITIES = ("flickr30k_entities", "flickr30k/flickr30k_entities", "flickr30k")  # folders of the release
FLICKR_IMAGES = "flickr30k/flickr30k-images|flickr30k/images|flickr30k/flickr30k_images|flickr30k-images"
PHRASE = re.compile(r"\[/EN#(\d+)(/[^ \]]+) ([^\]]+)\]")  # [/EN#283585/people A young child]
Box = tuple[float, float, float, float]


class Builder:
    """Collects phrases, each with the boxes of what it names in its image."""

    def __init__(self):
        self._pictures: dict[Picture, int] = {}
        self._sizes: list[tuple[int, int]] = []
        self._texts: list[str] = []
        self._owners: list[int] = []
        self._boxes: list[np.ndarray] = []

    def add(self, picture: Picture, size: tuple[int, int], text: str, boxes: Iterable[Box]) -> None:
        if picture not in self._pictures:
            self._pictures[picture] = len(self._sizes)
            self._sizes.append(size)
        self._texts.append(text)
        self._owners.append(self._pictures[picture])
        self._boxes.append(np.array(list(boxes), np.float64).reshape(-1, 4))

    def build(self, file: pathlib.Path) -> Pointing:
        """
        Raises:
          AnnotationError: there is no phrase.
        """
        if not self._texts:
            raise AnnotationError(f"{file}: no phrase with a box")
        owners, sizes = np.array(self._owners), np.array(self._sizes)
        return Pointing(list(self._pictures), self._texts, owners, self._boxes, sizes)


def read_coco(root: pathlib.Path) -> Pointing:
    """For each category in an image a phrase with the boxes of all its objects, regions of a crowd among them."""
    file, folder = find(root, COCO), find_folder(root, COCO_IMAGES)
    content, where = typed(read_json(file), dict, str(file)), str(file)
    names = {
        field(row, "id", int, where): field(row, "name", str, where)
        for row in field(content, "categories", list, where)
    }
    images = _by_id(field(content, "images", list, where), where)
    own: dict[int, dict[int, list[Box]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for number, row in enumerate(field(content, "annotations", list, str(file))):
        where = f"{file}: annotations[{number}]"
        image, category = field(row, "image_id", int, where), field(row, "category_id", int, where)
        if image not in images or category not in names:
            raise AnnotationError(f"{where}: there is no image {image}, or no category {category}")
        left, top, width, height = _four(row.get("bbox"), where)
        if width != 0 and height != 0:  # a few objects of COCO have no width or height: nothing to hit
            own[image][category].append(box_of(left, top, width, height, where))
    builder = Builder()
    for image, row in images.items():
        where = f"{file}: image {image}"
        size = field(row, "width", int, where), field(row, "height", int, where)
        picture = inside(folder, field(row, "file_name", str, where), file)
        for category, boxes in sorted(own[image].items()):
            builder.add(picture, size, PROMPT.format(names[category]), boxes)
    return builder.build(file)


def _by_id(rows: list, where: str) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for row in rows:
        key = field(row, "id", int, where)
        if key in found:
            raise AnnotationError(f"{where}: id {key} stands twice")
        found[key] = row
    return found


def _four(box, where: str) -> list:
    if not isinstance(box, list) or len(box) != 4:
        raise AnnotationError(f"{where}: bbox is {str(box)[:60]!r}; expected [x, y, width, height]")
    return box


# ---------------------------------------------------------------------------------------------------------------------
# Flickr30k Entities


def read_entities(root: pathlib.Path, split: str) -> Pointing:
    """For each phrase of a caption that has boxes, the phrase as it stands and all boxes of its entity.

    The release (Plummer et al., ICCV 2015) has lists of images, test.txt and others; captions with marked phrases in
    Sentences; and boxes in Annotations. Equal phrases of one entity count once.
    """
    paths = {
        name: "|".join(f"{base}/{name}" for base in ENTITIES) for name in (f"{split}.txt", "Sentences", "Annotations")
    }
    listed, sentences, annotations = (find(root, path) for path in paths.values())
    folder = find_folder(root, FLICKR_IMAGES)
    builder = Builder()
    for key in read_text(listed).split():
        picture = inside(folder, f"{key}.jpg", listed)
        boxes_file = annotations / f"{key}.xml"
        size, boxes = entity_boxes(boxes_file)
        found = {}
        for entity, _, phrase in PHRASE.findall(read_text(sentences / f"{key}.txt")):
            if entity in boxes:
                found[entity, phrase.lower()] = phrase
        for (entity, _), phrase in found.items():
            builder.add(picture, size, phrase, boxes[entity])
    return builder.build(listed)


def entity_boxes(file: pathlib.Path) -> tuple[tuple[int, int], dict[str, list[Box]]]:
    """Width and height of the image, and the boxes of each entity, right and bottom outside.

    Raises:
      AnnotationError: the file is not what the release has.
    """
    text = read_text(file)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # the release has none, and they can blow a parser up
        raise AnnotationError(f"{file}: a document type")
    try:
        content = xml.etree.ElementTree.fromstring(text)
        size = int(content.findtext("size/width", "")), int(content.findtext("size/height", ""))
        boxes: dict[str, list[Box]] = {}
        for entry in content.findall("object"):
            corner = entry.find("bndbox")
            if corner is None:
                continue
            left, top, right, bottom = (int(corner.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            if left >= right or top >= bottom:
                continue  # a few boxes of the release are empty
            for name in entry.findall("name"):
                boxes.setdefault(name.text or "", []).append((float(left), float(top), float(right), float(bottom)))
    except (xml.etree.ElementTree.ParseError, ValueError) as error:
        raise AnnotationError(f"{file}: {error}") from error
    return size, boxes


BENCHMARKS = (
    Benchmark(
        name="coco_pointing",
        task="pointing",
        title="COCO val2017, pointing game",
        files=(File(COCO, None, lambda path: len(read_json(path)["annotations"])), File(COCO_IMAGES)),
        read=read_coco,
        images=4_952,  # 48 of the 5,000 have no object
        licence="CC-BY-4.0; images: terms of Flickr",
        source="https://cocodataset.org/#download",
    ),
    *(
        Benchmark(
            name=f"flickr30k_entities_{split}",
            task="pointing",
            title=f"Flickr30k Entities, {split}",
            files=(
                File(
                    "|".join(f"{base}/{split}.txt" for base in ENTITIES),
                    1_000,
                    lambda path: len(read_text(path).split()),
                ),
                File("|".join(f"{base}/Sentences" for base in ENTITIES)),
                File("|".join(f"{base}/Annotations" for base in ENTITIES)),
                File(FLICKR_IMAGES),
            ),
            read=functools.partial(read_entities, split=split),
            images=1_000,
            licence="CC-BY-SA (annotations); images: Flickr30k terms",
            source="https://bryanplummer.com/Flickr30kEntities/",
        )
        for split in ("val", "test")
    ),
)
