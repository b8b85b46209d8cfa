"""Data sets that have boxes become shards with regions: each published form, and what is wrong in its files."""

import csv
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import ExifTags, Image
from test_prepare import picture, prepare, read, sample, url, write_tar

from flair_jax.data.prepare import atomic, boxes, job, rows
from flair_jax.data.transforms import regions

PHOTOS = pathlib.Path(__file__).parents[2] / "shared/photos/coco_val2017_283"  # beside the checkout
GOOD = {"description": "a dog", "bbox": [96, 192, 480, 960], "score": 0.9}


def skipped(folder) -> dict[str, int]:
    return atomic.read_json(pathlib.Path(folder) / job.INFO)["captions"]["skipped"]


def found_regions(content) -> list[tuple]:
    """(description, box rounded, score) of a record."""
    return [
        (one.description, None if one.box is None else tuple(round(side, 3) for side in one.box), one.score)
        for one in regions.parse(content)
    ]


def images(folder, *names) -> pathlib.Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# GRAIN's three files


@pytest.fixture
def grain(tmp_path):
    """Three images; what the files say of a fourth, which is not there."""
    images(tmp_path / "data", "a/1.jpg", "a/2.jpg", "3.png")
    with open(tmp_path / "captions_pooled.csv", "w", newline="") as file:
        rows = [["image", "caption"], ["a/1.jpg", "a web, text", "more"], ["./a/2.jpg", "Two."], ["4.jpg", "gone"]]
        csv.writer(file).writerows([*rows, ["a/1.jpg", "second text"], ["a/2.jpg", " "], ["3.png"], [], ["x.gif", "x"]])
    (tmp_path / "mllm.json").write_text(
        json.dumps({"a/1.jpg": " An MLLM's. Long. ", "3.png": "Three", "a/2.jpg": ["x"]})
    )
    return tmp_path


def prepare_grain(capsys, folder, boxes) -> dict[str, dict]:
    text = boxes if isinstance(boxes, str) else json.dumps(boxes)
    (folder / "boxes.json").write_text(text)
    arguments = ["--images", folder / "data", "--captions", folder / "captions_pooled.csv"]
    arguments += ["--mllm-captions", folder / "mllm.json", "--boxes", folder / "boxes.json"]
    prepare(capsys, "grain", *arguments, "--output", folder / "out", "--prefix", "cc3m")
    return {content["file"]: content for content in read(folder / "out").values()}


def test_grain(grain, capsys):
    """Captions stay whole, boxes become shares of the picture, each image has what the files say of it."""
    more = {"description": "a cat ", "bbox": [0, 0, 960, 480], "score": 0.5}
    found = prepare_grain(capsys, grain, {"a/1.jpg": [GOOD, more], "3.png": [], "4.jpg": [GOOD]})
    assert found.keys() == {"a/1.jpg", "a/2.jpg", "3.png"}
    assert found["a/1.jpg"]["caption"] == "a web, text"  # of several the first one counts
    assert found["a/1.jpg"]["mllm_caption"] == "An MLLM's. Long."
    assert found_regions(found["a/1.jpg"]) == [("a dog", (0.1, 0.2, 0.5, 1), 0.9), ("a cat", (0, 0, 1, 0.5), 0.5)]
    assert found["a/2.jpg"]["caption"] == "Two." and "mllm_caption" not in found["a/2.jpg"]
    assert "regions" not in found["a/2.jpg"] and "caption" not in found["3.png"]
    assert found["3.png"]["mllm_caption"] == "Three"
    assert skipped(grain / "out") == {
        boxes.NO_IMAGE_PATH: 2,
        rows.NO_CAPTIONS: 2,
        rows.BAD_CELL: 1,
        boxes.NO_REGIONS: 1,
    }


def test_grain_s_boxes_are_not_trusted(grain, capsys):
    """What is wrong in a region takes that region alone, and each kind is counted."""
    bad = [
        3,
        {},
        {**GOOD, "description": 1},
        {**GOOD, "description": "<pad>"},
        {**GOOD, "bbox": [1, 2, 3]},
        {**GOOD, "bbox": None},
        {**GOOD, "bbox": [1, 2, "3", 4]},
        {**GOOD, "bbox": [1, 2, 1e99, 4]},
    ]
    doubtful = [{**GOOD, "score": "high"}, {**GOOD, "bbox": [96, 96, 96, 500]}, {**GOOD, "bbox": [960, 0, 990, 9]}]
    text = json.dumps(
        {"a/1.jpg": [*bad, *doubtful, {**GOOD, "score": float("nan")}], "a/2.jpg": bad[:2], "3.png": {"a": 1}}
    )
    found = prepare_grain(capsys, grain, text)
    assert [score for _, _, score in found_regions(found["a/1.jpg"])] == [None, 0.9, 0.9, None]
    assert found_regions(found["a/1.jpg"])[1] == ("a dog", (0.1, 0.1, 0.1, 0.521), 0.9)
    reasons = skipped(grain / "out")
    assert reasons[boxes.BAD_FORM] == 2 and reasons[boxes.NO_DESCRIPTION] == 4 and reasons[boxes.BAD_BOX] == 4
    assert reasons[boxes.BAD_SCORE] == 2 and reasons[boxes.EMPTY_BOX] == 2
    assert reasons[boxes.NO_REGIONS] == 1 and reasons[boxes.NOT_A_LIST] == 1
    assert atomic.read_json(grain / "out" / job.INFO)["captions"]["read"] == 8 + 3 + 3  # rows, not regions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", r"boxes\.json is no JSON object"),
        ("", r"boxes\.json is no JSON object"),
        ('{"a": [1, 2], ', r"boxes\.json is not JSON"),
        ('{"a": [1, 2]', r"boxes\.json is not JSON: expected , or }"),
        ('{"a" [1]}', r"boxes\.json is not JSON: expected NAME: VALUE"),
        ("{3: [1]}", r"boxes\.json is not JSON"),
        ('{"a": []} {"b": []}', r"boxes\.json is not JSON: .* after its end"),
        ('{"a": ' + "[" * 100_000, r"boxes\.json is not JSON"),
    ],
)
def test_a_damaged_file_of_boxes_stops_the_run(grain, capsys, text, words):
    with pytest.raises(atomic.InputError, match=words):
        prepare_grain(capsys, grain, text)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_large_object_is_read_member_by_member(tmp_path, monkeypatch, chunk, indent):
    """Wherever a block of the file ends: within a name, a number, or a character of several bytes."""
    monkeypatch.setattr(boxes, "CHUNK", chunk)
    content = {'a \\" {x}': [1, 23.5e-3, {"b": None}], "ö": "text, }", "": {}, "number": 123, "true": True, "last": []}
    path = tmp_path / "a.json"
    for one in (content, {}):
        path.write_text(json.dumps(one, indent=indent, ensure_ascii=False) + "\n")
        assert dict(boxes.members(str(path), lambda done: None, rows.Text())) == one


# ---------------------------------------------------------------------------------------------------------------------
# COCO

COCO = {
    "images": [{"id": 9, "file_name": "9.jpg", "width": 60, "height": 40}, {"id": 8, "file_name": "8.jpg"}],
    "categories": [
        {"id": 3, "name": "hot dog"},
        {"id": 7, "name": "floor-other-merged"},
        {"id": 8, "name": "wall-brick"},
    ],
}
CAPTIONS = {"images": COCO["images"], "annotations": [{"image_id": 9, "caption": "A dog. It sits"}]}


def prepare_coco(tmp_path, capsys, *contents) -> dict[str, dict]:
    images(tmp_path / "images", "9.jpg", "8.jpg")
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    for number, content in enumerate(contents):
        (tmp_path / f"regions{number}.json").write_text(json.dumps(content))
    files = [tmp_path / f"regions{number}.json" for number in range(len(contents))]
    arguments = ["--images", tmp_path / "images", "--captions", tmp_path / "captions.json", "--regions", *files]
    prepare(capsys, "coco", *arguments, "--output", tmp_path / "out")
    return {content["file"]: content for content in read(tmp_path / "out").values()}


def test_coco_instances_and_segments(tmp_path, capsys):
    """Beside the captions of the same images, the largest first; an image that has boxes alone is no sample."""
    box = dict(image_id=9, category_id=3, segmentation=[[1, 2, 3, 4]], iscrowd=0)
    instances = [
        {**box, "bbox": [6, 4, 6, 4]},
        {**box, "bbox": [0, 10, 30, 30]},
        {**box, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {**box, "bbox": [3, 3, 0, 9]},
    ]
    segments = [dict(category_id=7, bbox=[0, 20, 60, 20], iscrowd=0), dict(category_id=8, bbox=[0, 0, 60, 20])]
    panoptic = [{"image_id": 9, "file_name": "9.png", "segments_info": segments}]
    found = prepare_coco(tmp_path, capsys, {**COCO, "annotations": instances}, {**COCO, "annotations": panoptic})
    assert found.keys() == {"9.jpg"} and found["9.jpg"]["raw_caption"] == ["A dog", "It sits"]
    assert found_regions(found["9.jpg"]) == [
        ("hot dog", (0, 0.25, 0.5, 1), None),
        ("hot dog", (0.1, 0.1, 0.2, 0.2), None),
        ("hot dog", (0.05, 0.075, 0.05, 0.3), None),
        ("floor", (0, 0.5, 1, 1), None),
        ("wall brick", (0, 0, 1, 0.5), None),
    ]
    assert skipped(tmp_path / "out") == {boxes.CROWD: 1, boxes.EMPTY_BOX: 1}


@pytest.mark.parametrize(
    "change",
    [
        {"annotations": [{"image_id": 9, "category_id": 3}]},
        {"annotations": [{"image_id": 9, "category_id": 3, "bbox": 5}]},
        {"annotations": [{"image_id": 9, "category_id": 4, "bbox": [0, 0, 1, 1]}]},
        {"annotations": [{"image_id": 8, "category_id": 3, "bbox": [0, 0, 1, 1]}]},  # without a size
        {"annotations": ["a"]},
        {"categories": None, "annotations": []},
    ],
)
def test_other_files_of_boxes_are_refused(tmp_path, capsys, change):
    with pytest.raises(atomic.InputError, match=r"regions0\.json has no boxes of COCO: expected .*found: "):
        prepare_coco(tmp_path, capsys, {**COCO, **change})


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="COCO's photographs are not beside the checkout")
@pytest.mark.parametrize("file", ["annotations/instances_val2017_79img.json", "panoptic/panoptic_val2017.json"])
def test_boxes_of_coco_s_own_files(file):
    """They are where another release of the same objects, in shares of the picture, has them."""
    read = boxes.coco(str(PHOTOS / file), lambda done: None, rows.Text(), "whole")
    found = {row.key: row.captions["regions"] for row in read if isinstance(row, rows.Row)}
    names = json.loads((PHOTOS / "classes.json").read_text())["yolo"]
    compared = 0
    for path in sorted((PHOTOS / "yolo_boxes" / "val2017").glob("*.txt")):
        own = [(one["description"], one["box"]) for one in found.get(f"{path.stem}.jpg", [])]
        for line in path.read_text().splitlines() if own else ():
            number, x, y, width, height = map(float, line.split())
            expected = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            near = [np.abs(expected - box).max() for name, box in own if name == names[f"{number:.0f}"]]
            compared += bool(near) and min(near) < 0.02
    assert compared > {"annotations": 10, "panoptic": 500}[file.split("/")[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Visual Genome, Flickr30k Entities, GRIT


def test_visual_genome(tmp_path, capsys):
    """Its phrases are captions, too; images are found in both of its folders."""
    images(tmp_path / "images", "VG_100K_2/1.jpg", "VG_100K/2.jpg")
    host = "https://cs.stanford.edu/people/rak248/"
    sizes = [{"image_id": n, "url": f"{host}{name}", "width": 60, "height": 40, "coco_id": None}
             for n, name in ((1, "VG_100K_2/1.jpg"), (2, "VG_100K/2.jpg"), (3, "VG_100K/3.jpg"))]  # fmt: skip
    phrase = dict(region_id=5, image_id=1, x=6, y=4, width=12, height=8, phrase="the clock is green. ")
    found = [
        {"id": 1, "regions": [phrase, {**phrase, "phrase": "shade", "x": 0, "y": 0, "width": 60, "height": 40}]},
        {"id": 2, "regions": [{**phrase, "x": None}, {"phrase": 3}, 4]},
        {"id": 3, "regions": [phrase]},
        {"id": 4, "regions": [phrase]},
    ]
    (tmp_path / "image_data.json").write_text(json.dumps(sizes))
    (tmp_path / "region_descriptions.json").write_text(json.dumps(found))
    arguments = ["--images", tmp_path / "images", "--captions", tmp_path / "region_descriptions.json"]
    arguments += ["--image-data", tmp_path / "image_data.json", "--output", tmp_path / "out"]
    prepare(capsys, "visual_genome", *arguments)
    (content,) = read(tmp_path / "out").values()
    assert content["file"] == "VG_100K_2/1.jpg"
    assert content["raw_caption"] == ["shade", "the clock is green."]
    assert found_regions(content) == [
        ("shade", (0, 0, 1, 1), None), ("the clock is green.", (0.1, 0.1, 0.3, 0.3), None)
    ]  # fmt: skip
    assert skipped(tmp_path / "out") == {
        boxes.NO_REGIONS: 1, boxes.BAD_BOX: 1, boxes.NO_DESCRIPTION: 1, boxes.BAD_FORM: 1, boxes.NO_SIZE: 1
    }  # fmt: skip
    (tmp_path / "image_data.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(atomic.InputError, match=r"image_data\.json is no image_data\.json of Visual Genome"):
        prepare(capsys, "visual_genome", *arguments[:-1], tmp_path / "other")


XML = """<annotation><filename>1.jpg</filename><size><width>60</width><height>40</height></size>
<object><name>11</name><bndbox><xmin>6</xmin><ymin>4</ymin><xmax>12</xmax><ymax>8</ymax></bndbox></object>
<object><name>11</name><name>12</name><bndbox><xmin>30</xmin><ymin>0</ymin><xmax>60</xmax><ymax>20</ymax></bndbox></object>
<object><name>13</name><scene>1</scene></object></annotation>"""


def test_flickr30k_entities(tmp_path, capsys):
    """One region for each entity: around all of its boxes, named by its longest phrase."""
    images(tmp_path / "images", "1.jpg", "2.jpg")
    folder = tmp_path / "entities"
    for name, ending, content in (
        ("1", "xml", XML),
        (
            "1",
            "txt",
            "[/EN#11/people Two men] see [/EN#12/animals a dog] at [/EN#13/scene home]\n[/EN#11/people Both men]",
        ),
    ):
        file = folder / {"xml": "Annotations", "txt": "Sentences"}[ending] / f"{name}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    listed = [
        {"filename": f"{name}.jpg", "split": part, "sentences": [{"raw": "A caption ."}]}
        for name, part in (("1", "train"), ("2", "test"))
    ]
    (tmp_path / "flickr.json").write_text(json.dumps({"images": listed}))
    arguments = ["--images", tmp_path / "images", "--captions", tmp_path / "flickr.json", "--entities", folder]
    prepare(capsys, "flickr30k", *arguments, "--output", tmp_path / "out")
    (content,) = read(tmp_path / "out").values()
    assert content["raw_caption"] == ["A caption"]
    assert found_regions(content) == [("Both men", (0.1, 0, 1, 0.5), None), ("a dog", (0.5, 0, 1, 0.5), None)]
    (folder / "Annotations" / "1.xml").write_text("<!DOCTYPE a><annotation/>")
    with pytest.raises(atomic.InputError, match=r"--entities .*1\.xml: a document type"):
        prepare(capsys, "flickr30k", *arguments, "--output", tmp_path / "other")


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_grit(tmp_path, capsys, form):
    """Phrases are cut out of the caption; lists may be spelled as text."""
    caption = "a wire hanger with a paper cover"
    expression = [0.0, 32.0, 0.02, 0.1, 0.5, 0.9, 0.8]
    chunk = [19.0, 32.0, 0.2, 0.3, 0.4, 0.5, 0.7]
    table = [
        {"url": url(1), "caption": caption, "ref_exps": [expression], "noun_chunks": [chunk, [1, 2]]},
        {"url": url(2), "caption": caption, "ref_exps": [], "noun_chunks": None},
        {"url": url(3), "caption": " ", "ref_exps": [expression], "noun_chunks": [chunk]},
    ]
    path = tmp_path / f"grit.{form}"
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(
                [
                    list(table[0]),
                    *([json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in table),
                ]
            )
    tar = write_tar(tmp_path / "a.tar", [m for n in (1, 2, 3) for m in sample(str(n), {"url": url(n)})])
    arguments = ["--images", tar, "--captions", path]
    prepare(capsys, "grit", *arguments, "--output", tmp_path / "out")
    first, second = read(tmp_path / "out").values()
    assert first["caption"] == second["caption"] == caption and second["regions"] == []
    assert found_regions(first) == [(caption, (0.02, 0.1, 0.5, 0.9), 0.8)]
    prepare(capsys, "grit", *arguments, "--output", tmp_path / "chunks", "--phrases", "noun_chunks")
    first, second = read(tmp_path / "chunks").values()
    assert found_regions(first) == [("a paper cover", (0.2, 0.3, 0.4, 0.5), 0.7)]
    assert skipped(tmp_path / "chunks") == {rows.NO_CAPTIONS: 1, boxes.BAD_FORM: 1, boxes.NOT_A_LIST: 1}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that are turned


@pytest.mark.parametrize("upright", [True, False])
def test_boxes_turn_with_their_picture(grain, capsys, upright):
    """A picture that is stored upright has its boxes turned; one that keeps its orientation keeps them."""
    image = Image.new("RGB", (96, 48))
    image.paste((255, 255, 255), (0, 24, 24, 48))
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=tags, quality=95)
    (grain / "data" / "a" / "1.jpg").write_bytes(file.getvalue())
    (grain / "boxes.json").write_text(json.dumps({"a/1.jpg": [{**GOOD, "bbox": [0, 480, 240, 960]}]}))
    arguments = ["--images", grain / "data", "--captions", grain / "captions_pooled.csv", "--output", grain / "out"]
    prepare(capsys, "grain", *arguments, "--boxes", grain / "boxes.json", *(["--upright"] if upright else []))
    content = next(one for one in read(grain / "out").values() if one["file"] == "a/1.jpg")
    stored = np.asarray(Image.open(io.BytesIO(content["image"])))[..., 0] > 127
    ((_, box, _),) = found_regions(content)
    seen = np.argwhere(stored)
    height, width = stored.shape
    expected = [
        seen[:, 1].min() / width,
        seen[:, 0].min() / height,
        (seen[:, 1].max() + 1) / width,
        (seen[:, 0].max() + 1) / height,
    ]
    np.testing.assert_allclose(box, expected, atol=0.03)
    assert (width < height) is upright
