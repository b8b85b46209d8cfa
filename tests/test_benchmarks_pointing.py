"""Phrases with boxes: miniatures of COCO and Flickr30k Entities, broken files, and a set by name with images."""

import json

import numpy as np
import pytest
from PIL import Image
from word_model import WordModel

from flair_jax import evaluation_sets, evaluation_tasks
from flair_jax.data.benchmarks import table
from flair_jax.data.benchmarks.base import AnnotationError, MissingError, Pointing

MINIATURES = ("coco_pointing", "flickr30k_entities_val", "flickr30k_entities_test")


def read(root, name) -> Pointing:
    [benchmark] = table.select([name])
    return benchmark.read(root)


def instances(**changes):
    """Image 5 has two birds and a crowd of people, image 3 a blue thing; image 4 nothing."""
    sizes = {5: (40, 30), 4: (8, 8), 3: (100, 50)}
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            for number, (width, height) in sizes.items()
        ],
        "categories": [{"id": 16, "name": "bird"}, {"id": 1, "name": "person"}, {"id": 2, "name": "blue"}],
        "annotations": [
            {"image_id": 5, "category_id": 16, "bbox": [0, 0, 10, 20], "iscrowd": 0},
            {"image_id": 3, "category_id": 2, "bbox": [50, 0, 25, 50], "iscrowd": 0},
            {"image_id": 5, "category_id": 1, "bbox": [1.5, 2, 30, 20.5], "iscrowd": 1},
            {"image_id": 5, "category_id": 16, "bbox": [20, 0, 10, 20], "iscrowd": 0},
        ],
    }
    return {**content, **changes}


def write_coco(root, content, path="coco/annotations/instances_val2017.json"):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "path",
    [
        "coco/annotations/instances_val2017.json",
        "coco/instances_val2017.json",
        "coco/annotations/instances_val2017_79img.json",
    ],
)
def test_coco(path, tmp_path):
    write_coco(tmp_path, instances(), path)
    data = read(tmp_path, "coco_pointing")
    assert [picture.path for picture in data.pictures] == [
        str(tmp_path / f"coco/images/val2017/{number}.png") for number in (5, 3)
    ]
    assert data.texts == ["a photo of a person", "a photo of a bird", "a photo of a blue"]
    assert data.image_of_text.tolist() == [0, 0, 1] and data.sizes.tolist() == [[40, 30], [100, 50]]
    assert [own.tolist() for own in data.boxes] == [
        [[1.5, 2, 31.5, 22.5]],
        [[0, 0, 10, 20], [20, 0, 30, 20]],
        [[50, 0, 75, 50]],
    ]
    kept = data.keep(np.array([False, True]))
    assert kept.texts == ["a photo of a blue"] and kept.image_of_text.tolist() == [0]
    assert kept.sizes.tolist() == [[100, 50]] and kept.counts() == {"images": 1, "texts": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "there is no image 9"),
        ({"annotations": [{"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1]}]}, "no category 9"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1]}]}, "expected .x, y, width, height"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, -1, 1]}]}, "width, height > 0"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, "1", 1]}]}, "expected four numbers"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 0, 1]}]}, "no phrase with a box"),
        ({"annotations": []}, "no phrase with a box"),
        ({"images": 2 * [{"id": 5, "file_name": "5.png", "width": 1, "height": 1}]}, "id 5 stands twice"),
        ({"images": []}, "there is no image 5"),
    ],
)
def test_broken_coco_files_are_named(changes, message, tmp_path):
    write_coco(tmp_path, instances(**changes))
    with pytest.raises(AnnotationError, match=f"instances_val2017.json.*{message}"):
        read(tmp_path, "coco_pointing")


ENTITIES = """<annotation><filename>7.jpg</filename><size><width>50</width><height>40</height><depth>3</depth></size>
<object><name>11</name><name>12</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
<object><name>11</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>9</xmax><ymax>10</ymax></bndbox></object>
<object><name>13</name><scene>1</scene><nobndbox>1</nobndbox></object>
<object><name>14</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>5</xmax><ymax>10</ymax></bndbox></object></annotation>"""
SENTENCES = """[/EN#11/people Two men] and [/EN#12/clothing/bodyparts a blue hat] in [/EN#13/scene the park] .
[/EN#11/people two men] see [/EN#0/notvisual it] near [/EN#14/other a box] and [/EN#11/people They] .
"""


def write_entities(root, split="test", annotation=ENTITIES):
    for path, text in {
        f"flickr30k_entities/{split}.txt": "7\n",
        "flickr30k_entities/Sentences/7.txt": SENTENCES,
        "flickr30k_entities/Annotations/7.xml": annotation,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize("split", ["val", "test"])
def test_flickr30k_entities(split, tmp_path):
    write_entities(tmp_path, split)
    data = read(tmp_path, f"flickr30k_entities_{split}")
    assert [picture.path for picture in data.pictures] == [str(tmp_path / "flickr30k/flickr30k-images/7.jpg")]
    assert data.texts == ["two men", "a blue hat", "They"] and data.image_of_text.tolist() == [0, 0, 0]
    both = [[1, 2, 30, 20], [5, 6, 9, 10]]
    assert [own.tolist() for own in data.boxes] == [both, both[:1], both]
    assert data.sizes.tolist() == [[50, 40]]


@pytest.mark.parametrize(
    "annotation", ["<annotation>", "<annotation/>", "<!DOCTYPE a><annotation/>", ENTITIES.replace("30", "x")]
)
def test_broken_entities_are_named(annotation, tmp_path):
    write_entities(tmp_path, annotation=annotation)
    with pytest.raises(AnnotationError, match=r"7\.xml: "):
        read(tmp_path, "flickr30k_entities_test")


def test_every_set_is_tested_and_can_be_missing(tmp_path):
    assert set(MINIATURES) == {name for name, benchmark in table.ALL.items() if benchmark.task == "pointing"}
    for name in MINIATURES:
        with pytest.raises(MissingError):
            read(tmp_path, name)


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_set_is_evaluated_by_name(scale, tmp_path):
    """A picture of 100 x 50 pixels whose middle half is seen: blue at its right end, where the box of one phrase is."""
    boxes = {"blue": [50, 0, 25, 50], "red": [25, 0, 10, 50], "green": [0, 0, 20, 50]}  # green is cut away
    content = {
        "images": [{"id": 3, "file_name": "3.png", "width": 100, "height": 50}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(boxes)],
        "annotations": [
            {"image_id": 3, "category_id": number, "bbox": box} for number, box in enumerate(boxes.values())
        ],
    }
    write_coco(tmp_path, content)
    image = Image.new("RGB", (100, 50))
    image.paste((0, 0, 255), (60, 0, 100, 50))
    image.paste((255, 0, 0), (55, 0, 60, 50))  # red is pointed at outside of its box
    file = tmp_path / "coco/images/val2017/3.png"
    file.parent.mkdir(parents=True)
    image.resize((round(100 * scale), round(50 * scale))).save(file)
    [evaluator] = evaluation_sets.evaluators(WordModel(4), "sets", root=str(tmp_path), sets=["coco_pointing"])
    results = {result.name: result.value for result in evaluator.run({})}
    assert results == {
        "pointing/coco_pointing/attention/accuracy": pytest.approx(1 / 3 / 2),  # red: three columns tie, one is right
        "pointing/coco_pointing/projected/accuracy": 0.5,
        "pointing/coco_pointing/chance": pytest.approx((8 + 4) / 2 / 16),
        "pointing/coco_pointing/chance_object": 0.5,
    }
    [inner] = evaluator._evaluators
    assert inner.notes == ["1 phrases are left out: the crop cuts their boxes away."]
    assert [title for title, _ in evaluator.figures({})] == [
        f"hits and misses ({mode})" for mode in ("attention", "projected")
    ]
    image.rotate(90, expand=True).save(file)
    [evaluator] = evaluation_sets.evaluators(
        WordModel(4), "sets", root=str(tmp_path), sets=["coco_pointing"], allow_missing=True
    )
    with pytest.raises(evaluation_tasks.UnusableSet, match="1 of 1 images is broken"):
        evaluator.run({})
