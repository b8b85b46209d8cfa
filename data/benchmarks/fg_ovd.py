"""FG-OVD (Bianchi et al., CVPR 2024) as a choice: a box of COCO 2017, its description and up to ten wrong ones."""

import pathlib
from collections.abc import Iterator
from typing import Any

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import COCO_IMAGES, AnnotationError, Benchmark, Choice, Picture
from flair_jax.data.benchmarks.compositional import Builder, box_of, literal, texts_of
from flair_jax.data.benchmarks.json_files import field, read_json, read_json_lines, typed

# Part -> its file in the release, items. Difficulties first, then kinds of attributes.
PARTS = {
    "hard": ("1_attributes.json", 3_545),
    "medium": ("2_attributes.json", None),
    "easy": ("3_attributes.json", None),
    "trivial": ("shuffle_negatives.json", None),
    "color": ("color.json", None),
    "material": ("material.json", None),
    "pattern": ("pattern.json", None),
    "transparency": ("transparency.json", None),
}
FILES = {
    part: "|".join(f"fg_ovd/{folder}{name}" for folder in ("", "benchmarks/", "gt/"))
    for part, (name, _) in PARTS.items()
}
FILES["hard"] += "|fg_ovd/h_attributes_llava.jsonl"  # the same items as lines


def read(root: pathlib.Path) -> Choice:
    """Texts are lower-cased, as the benchmark does. Boxes are pixels of the image that the file gives the size of."""

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        for where, name, size, box, texts in _lines(file) if file.suffix == ".jsonl" else _coco(file):
            folder, _, rest = name.rpartition("/")
            folders = [f"coco/images/{folder}", f"coco/{folder}"] if folder else ["coco/images/val2017", "coco/val2017"]
            if ".." in folder.split("/") or folder.startswith("/"):
                raise AnnotationError(f"{where}: image {name!r}; expected a path inside of COCO's folder")
            picture: Picture = compositional.locate(root, folders, rest, file, box=box_of(*box, where), box_in=size)
            builder.add([picture], [text.lower() for text in texts], group=part)

    return compositional.read_parts(root, FILES, add)


# Where an item is, name of the image, its width and height, box as x, y, width, height, texts.
Row = tuple[str, str, tuple[int, int], list[Any], list[str]]


def _lines(file: pathlib.Path) -> Iterator[Row]:
    """Lines with everything in them; lists may be written as texts."""
    for number, row in enumerate(read_json_lines(file), 1):
        where = f"{file}: record {number}"
        box, right, wrong = (
            literal(row.get(key), f"{where}: {key!r}") for key in ("bbox", "pos_expression", "neg_expression")
        )
        size = field(row, "width", int, where), field(row, "height", int, where)
        texts = [texts_of(right, f"{where}: 'pos_expression'")[0], *texts_of(wrong, f"{where}: 'neg_expression'")]
        yield where, field(row, "img_path", str, where), size, _four(box, where), texts


def _coco(file: pathlib.Path) -> Iterator[Row]:
    """The release's own form, COCO's with the categories of wrong descriptions."""
    content = typed(read_json(file), dict, str(file))
    where = str(file)
    names = {
        field(row, "id", int, where): field(row, "name", str, where)
        for row in field(content, "categories", list, where)
    }
    images = {field(row, "id", int, where): row for row in field(content, "images", list, where)}
    for number, row in enumerate(field(content, "annotations", list, where)):
        where = f"{file}: annotations[{number}]"
        image = images.get(field(row, "image_id", int, where))
        if image is None:
            raise AnnotationError(f"{where}: there is no image {row['image_id']}")
        wrong = [typed(key, int, f"{where}: 'neg_category_ids'") for key in field(row, "neg_category_ids", list, where)]
        categories = [field(row, "category_id", int, where), *wrong]
        if missing := [category for category in categories if category not in names]:
            raise AnnotationError(f"{where}: there are no categories {missing}")
        size = field(image, "width", int, where), field(image, "height", int, where)
        name = field(image, "file_name", str, where)
        yield where, name, size, _four(row.get("bbox"), where), [names[category] for category in categories]


def _four(box: Any, where: str) -> list[Any]:
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise AnnotationError(f"{where}: bbox is {str(box)[:60]!r}; expected [x, y, width, height]")
    return list(box)


def _count(path: pathlib.Path) -> int:
    return len(read_json_lines(path)) if path.suffix == ".jsonl" else len(read_json(path)["annotations"])


BENCHMARKS = (
    Benchmark(
        name="fg_ovd",
        task="choice",
        title="FG-OVD",
        files=compositional.files(
            FILES,
            {part: items for part, (_, items) in PARTS.items()},
            *(COCO_IMAGES, "coco/images/train2017|coco/train2017"),
            count=_count,
        ),
        read=read,
        licence="Apache-2.0 (repository); images: COCO",
        source="https://github.com/lorebianchi98/FG-OVD",
    ),
)
