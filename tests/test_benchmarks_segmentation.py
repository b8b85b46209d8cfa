"""Segmentation sets, each from a miniature of the layouts that its release and its converters make."""

import json
import pathlib

import numpy as np
import pytest
from colour_model import ColourModel
from PIL import Image
from scipy.io import savemat

from flair_jax import evaluation_tasks
from flair_jax.data.benchmarks import prompts, segmentation, table
from flair_jax.data.benchmarks.base import AnnotationError, MissingError
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators.features import BrokenImages
from flair_jax.report import flat

NAMES = [benchmark.name for benchmark in segmentation.BENCHMARKS]
SIZE = (6, 8)  # height and width of all images here


def save_image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "red").save(path)


def save_mask(path, values, palette=False, size=SIZE):
    """A mask that begins with the values and goes on with the last one: a palette's indices, or grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size, values[-1], np.uint8)
    pixels.reshape(-1)[: len(values)] = values
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
        assert image.mode == "P"
    image.save(path)


def lines(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def first(data, count, index=0):
    """The first labels of a mask."""
    return data.masks[index].reshape(-1)[:count].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Class lists


@pytest.mark.parametrize(
    ("name", "classes", "names"),
    [
        ("voc20", 20, 30),
        ("voc21", 21, 56),
        ("context59", 59, 59),
        ("context60", 60, 60),
        ("ade20k", 150, 150),
        ("coco_stuff", 171, 171),
        ("coco_object", 81, 113),
        ("cityscapes", 19, 19),
    ],
)
def test_class_lists(name, classes, names):
    found = segmentation.class_names(name)
    assert (len(found), sum(map(len, found))) == (classes, names)
    assert all(text == text.strip() and text for texts in found for text in texts)


def test_names_of_the_protocol():
    voc = segmentation.class_names("voc20")
    assert voc[3] == ("ship",)
    assert voc[14][0] == "person"
    assert len(voc[14]) == 7
    assert len(voc[19]) == 5
    assert segmentation.class_names("voc21")[1:] == voc
    assert len(segmentation.class_names("voc21")[0]) == len(segmentation.class_names("coco_object")[0]) == 26
    assert segmentation.class_names("context60")[0] == ("background",)
    assert segmentation.class_names("context60")[1:] == segmentation.class_names("context59")
    templates = prompts.templates("imagenet1k")
    assert len(set(templates)) == 80
    assert all(template.count("{c}") == 1 for template in templates)


def test_coco_ids_have_their_names():
    """Ids and the lists of names go together: 80 things and 91 kinds of stuff."""
    names = segmentation.class_names("coco_stuff")
    name_of = dict(zip(segmentation.COCO_IDS.tolist(), (name for (name,) in names), strict=True))
    assert len(segmentation.COCO_THINGS) == 80
    few = {1: "person", 11: "firehydrant", 13: "stopsign", 90: "toothbrush", 92: "banner", 157: "sky-other"}
    assert {number: name_of[number] for number in few} == few
    assert (name_of[182], name_of[183 - 14]) == ("wood", "tree")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def voc(root, masks="SegmentationClass", split="Segmentation", year="2012"):
    base = root / f"VOCdevkit/VOC{year}"
    lines(base / f"ImageSets/{split}/val.txt", "2007_000033", "2007_000042")
    save_mask(base / masks / "2007_000033.png", [0, 1, 20, 255], palette=True)
    save_mask(base / masks / "2007_000042.png", [0, 15])
    save_mask(base / masks / "2007_000001.png", [3])  # of another split
    save_image(base / "JPEGImages/2007_000033.jpg")


def context(root):
    voc(root, "SegmentationClassContext", "SegmentationContext", "2010")


def ade20k(root):
    for name in ("ADE_val_00000001", "ADE_val_00000002"):
        save_mask(root / f"ade20k/ADEChallengeData2016/annotations/validation/{name}.png", [0, 1, 150])
        save_image(root / f"ade20k/ADEChallengeData2016/images/validation/{name}.jpg")


def pixel_maps(root, folder="coco/stuffthingmaps/val2017"):
    for name in ("000000000139", "000000000285"):
        save_mask(root / f"{folder}/{name}.png", [0, 10, 12, 89, 91, 181, 255])
        save_image(root / f"coco/val2017/{name}.jpg")


def stuff10k(root):
    base = root / "coco_stuff10k"
    name = "COCO_train2014_000000000077"
    lines(base / "imageLists/test.txt", name)
    (base / "annotations").mkdir(parents=True)
    values = np.full(SIZE, 182, np.uint16)
    values.reshape(-1)[:4] = [0, 1, 13, 92]
    savemat(base / f"annotations/{name}.mat", {"S": values, "captions": np.array(["a", "b"], object)})
    save_image(base / f"images/{name}.jpg")


def cityscapes(root):
    for city, frame in (("lindau", "lindau_000000_000019"), ("frankfurt", "frankfurt_000000_000294")):
        save_mask(root / f"cityscapes/gtFine/val/{city}/{frame}_gtFine_labelIds.png", [0, 7, 8, 9, 33, 29, 31])
        save_image(root / f"cityscapes/leftImg8bit/val/{city}/{frame}_leftImg8bit.png")


def panoptic(root, **changes):
    colour = np.zeros((*SIZE, 3), np.uint8)
    colour[0, 0], colour[0, 1], colour[1:] = (4, 0, 0), (5, 1, 0), (6, 0, 2)
    (root / "coco/annotations/panoptic_val2017").mkdir(parents=True)
    Image.fromarray(colour).save(root / "coco/annotations/panoptic_val2017/000000000139.png")
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "categories": [
            {"id": 199, "name": "wall-other-merged"},
            {"id": 1, "name": "person"},
            {"id": 118, "name": "floor-wood"},
        ],
        "annotations": [
            {
                "image_id": 139,
                "file_name": "000000000139.png",
                "segments_info": [
                    {"id": 4, "category_id": 199},
                    {"id": 5 + 256, "category_id": 1},
                    {"id": 6 + 2 * 65536, "category_id": 118},
                ],
            }
        ],
    }
    (root / "coco/annotations/panoptic_val2017.json").write_text(json.dumps(content | changes))
    save_image(root / "coco/images/val2017/000000000139.jpg")


BUILD = {
    "voc20": voc,
    "voc21": voc,
    "context59": context,
    "context60": context,
    "ade20k": ade20k,
    "coco_stuff10k": stuff10k,
    "coco_stuff164k": pixel_maps,
    "coco_object": pixel_maps,
    "coco_panoptic": panoptic,
    "cityscapes": cityscapes,
}
# Images, classes, background, the first labels of the first mask.
EXPECTED = {
    "voc20": (2, 20, None, [255, 0, 19, 255]),
    "voc21": (2, 21, 0, [0, 1, 20, 255]),
    "context59": (2, 59, None, [255, 0, 19, 255]),
    "context60": (2, 60, 0, [0, 1, 20, 255]),
    "ade20k": (2, 150, None, [255, 0, 149]),
    "coco_stuff10k": (1, 171, None, [255, 0, 11, 80, 170]),
    "coco_stuff164k": (2, 171, None, [0, 10, 11, 79, 80, 170, 255]),
    "coco_object": (2, 81, 0, [1, 11, 12, 80, 0, 0, 0]),
    "coco_panoptic": (1, 3, None, [2, 0, 255, 255, 255, 255, 255, 255, 1]),
    "cityscapes": (2, 19, None, [255, 0, 1, 255, 18, 255, 16]),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_read_from_its_release(tmp_path, name):
    (benchmark,) = table.select([name])
    with pytest.raises(MissingError):
        benchmark.read(tmp_path)
    BUILD[name](tmp_path)
    data = benchmark.read(tmp_path)
    images, classes, background, labels = EXPECTED[name]
    assert data.counts() == {"images": images, "classes": classes}
    assert data.background == background
    assert first(data, len(labels)) == labels
    assert data.masks[0].dtype == np.uint8
    assert data.masks[0].shape == SIZE
    assert pathlib.Path(data.pictures[0].path).exists()
    if name != "coco_panoptic":
        assert benchmark.expected()["classes"] == classes
    for file in benchmark.files:
        found = segmentation.find(tmp_path, file.path)
        if file.count is not None:
            assert file.count(found) == images
    kept = data.keep(np.arange(images) == images - 1)
    assert len(kept.pictures) == len(kept.masks) == 1
    assert pathlib.Path(kept.pictures[0].path).stem[:12] in data.pictures[-1].path


def context_release(root, names=None):
    """459 labels in MATLAB files, and the names of VOC 2010's validation images."""
    folder = root / "VOCdevkit/VOC2010"
    frequent = [name for (name,) in segmentation.class_names("context59")]
    labels = names or ["accordion", *frequent[::-1], "zebra"]
    lines(root / "pascal_context/labels.txt", *[f"{number}: {name}" for number, name in enumerate(labels, 1)])
    lines(folder / "ImageSets/Main/val.txt", "2008_000002", "2008_000003", "2008_000007")  # the last has no annotation
    (root / "pascal_context/trainval").mkdir()
    for name in ("2008_000002", "2008_000003"):
        values = np.zeros(SIZE, np.uint16)
        values.flat[:5] = [1, 2, 60, 61, 0]  # accordion, the last and the first of the 59, zebra, nothing
        savemat(root / f"pascal_context/trainval/{name}.mat", {"LabelMap": values})
        save_image(folder / f"JPEGImages/{name}.jpg")


@pytest.mark.parametrize(("name", "labels"), [("context59", [255, 58, 0, 255, 255]), ("context60", [0, 59, 1, 0, 0])])
def test_pascal_context_from_its_own_release(tmp_path, name, labels):
    context_release(tmp_path)
    data = table.ALL[name].read(tmp_path)
    assert [pathlib.Path(picture.path).stem for picture in data.pictures] == ["2008_000002", "2008_000003"]
    assert data.masks[1].shape == SIZE and data.masks[1].reshape(-1)[:5].tolist() == labels
    context(tmp_path)  # the converter's masks count where they are
    assert pathlib.Path(table.ALL[name].read(tmp_path).pictures[0].path).stem == "2007_000033"


def test_pascal_context_with_other_labels_is_refused(tmp_path):
    context_release(tmp_path, names=["accordion", "bag"])
    with pytest.raises(AnnotationError, match=r"labels\.txt: no label \['aeroplane', 'bed'"):
        table.ALL["context59"].read(tmp_path)


def test_the_table_states_the_sizes_of_the_releases():
    images = {benchmark.name: benchmark.images for benchmark in segmentation.BENCHMARKS}
    assert images == {
        **dict.fromkeys(("voc20", "voc21"), 1449),
        **dict.fromkeys(("context59", "context60"), 5104),
        **dict.fromkeys(("coco_stuff164k", "coco_object", "coco_panoptic"), 5000),
        "ade20k": 2000,
        "coco_stuff10k": 1000,
        "cityscapes": 500,
    }


@pytest.mark.parametrize("name", ["ade20k", "coco_stuff164k", "cityscapes"])
def test_files_that_a_mac_adds_to_archives_are_no_masks(tmp_path, name):
    BUILD[name](tmp_path)
    for mask in [path for path in tmp_path.rglob("*.png") if "leftImg8bit" not in path.name]:
        mask.with_name(f"._{mask.name}").write_bytes(b"Mac OS X")
    data = table.ALL[name].read(tmp_path)
    assert len(data.pictures) == 2 and all(picture.exists() for picture in data.pictures)
    assert table.ALL[name].files[0].count(segmentation.find(tmp_path, table.ALL[name].files[0].path)) == 2


def test_annotations_alone_can_be_counted(tmp_path):
    pixel_maps(tmp_path)
    for path in (tmp_path / "coco/val2017").iterdir():
        path.unlink()
    data = table.ALL["coco_stuff164k"].read(tmp_path)
    assert data.counts()["images"] == 2
    assert not any(picture.exists() for picture in data.pictures)


@pytest.mark.parametrize(
    ("name", "suffix", "values", "labels"),
    [
        ("coco_stuff164k", "_labelTrainIds.png", [0, 170, 255], [0, 170, 255]),
        ("coco_object", "_instanceTrainIds.png", [0, 1, 80], [0, 1, 80]),
    ],
)
def test_pixel_maps_of_converters(tmp_path, name, suffix, values, labels):
    """Where the released maps are beside them, those are read."""
    folder = tmp_path / "coco_stuff164k/annotations/val2017"
    save_mask(folder / f"000000000139{suffix}", values)
    save_image(tmp_path / "coco_stuff164k/images/val2017/000000000139.jpg")
    data = table.ALL[name].read(tmp_path)
    assert data.counts()["images"] == 1
    assert first(data, 3) == labels
    save_mask(folder / "000000000139.png", [12])
    assert segmentation._masks("*.png")(folder) == 1
    data = table.ALL[name].read(tmp_path)
    assert data.counts()["images"] == 1
    assert first(data, 1) == [{"coco_stuff164k": 11, "coco_object": 12}[name]]


def test_objects_in_the_folder_of_their_converter(tmp_path):
    """As SCLIP and others lay them out, beside COCO-Stuff in train ids."""
    for name, suffix in (("coco_stuff164k", "_labelTrainIds.png"), ("coco_object", "_instanceTrainIds.png")):
        save_mask(tmp_path / f"{name}/annotations/val2017/000000000139{suffix}", [0, 80])
        save_image(tmp_path / f"{name}/images/val2017/000000000139.jpg")
        data = table.ALL[name].read(tmp_path)
        assert first(data, 2) == [0, 80] and f"/{name}/images/" in data.pictures[0].path


def test_cityscapes_train_ids_and_stuff10k_pngs(tmp_path):
    save_mask(tmp_path / "cityscapes/gtFine/val/lindau/lindau_0_gtFine_labelTrainIds.png", [0, 18, 255])
    save_image(tmp_path / "cityscapes/leftImg8bit/val/lindau/lindau_0_leftImg8bit.png")
    assert first(table.ALL["cityscapes"].read(tmp_path), 3) == [0, 18, 255]
    base = tmp_path / "coco_stuff10k"
    lines(base / "imagesLists/test.txt", "COCO_1")
    save_mask(base / "annotations/test2014/COCO_1_labelTrainIds.png", [0, 1, 171])
    save_image(base / "images/test2014/COCO_1.jpg")
    assert first(table.ALL["coco_stuff10k"].read(tmp_path), 3) == [255, 0, 170]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def read_voc(root):
    return table.ALL["voc20"].read(root)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    voc(tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2012/SegmentationClass"
    data = read_voc(tmp_path)
    save_mask(folder / "2007_000033.png", [0], size=(8, 6))
    with pytest.raises(AnnotationError, match=r"000033\.png: a mask of 8 x 6 pixels; its image .*033\.jpg has 6 x 8"):
        data.masks[0]
    save_mask(folder / "2007_000033.png", [0, 21, 254])
    with pytest.raises(AnnotationError, match=r"033\.png: mask values \[21, 254\] .* expected some of 0-20, 255"):
        data.masks[0]
    Image.new("RGB", SIZE[::-1]).save(folder / "2007_000033.png")
    with pytest.raises(AnnotationError, match=r"033\.png: a mask of mode RGB; expected one channel, or a palette"):
        data.masks[0]
    (folder / "2007_000033.png").write_bytes(b"no image")
    with pytest.raises(AnnotationError, match=r"033\.png: not an image"):
        data.masks[0]
    (folder / "2007_000042.png").unlink()
    with pytest.raises(AnnotationError, match=r"val\.txt: 1 of 2 masks are not in .*, such as 2007_000042\.png"):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["2007_000033", "2007_000033"], r"val\.txt: \['2007_000033'\] stand there more than once"),
        (["../secret"], r"val\.txt: image name '\.\./secret\.jpg'; expected a path inside of"),
        (["/etc/passwd"], r"val\.txt: image name '/etc/passwd\.jpg'"),
        ([], r"val\.txt: no images there"),
    ],
)
def test_lists_are_checked(tmp_path, names, message):
    voc(tmp_path)
    lines(tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", *names)
    with pytest.raises(AnnotationError, match=message):
        read_voc(tmp_path)


def test_ids_without_a_category_are_refused(tmp_path):
    """A map of train ids that has the name of a released one would be read one class off."""
    pixel_maps(tmp_path)
    save_mask(tmp_path / "coco/stuffthingmaps/val2017/000000000139.png", [11])
    for name in ("coco_stuff164k", "coco_object"):
        with pytest.raises(AnnotationError, match=r"139\.png: mask values \[11\] stand for no class"):
            table.ALL[name].read(tmp_path).masks[0]


def test_broken_matlab_files_are_refused(tmp_path):
    stuff10k(tmp_path)
    path = tmp_path / "coco_stuff10k/annotations/COCO_train2014_000000000077.mat"
    data = table.ALL["coco_stuff10k"].read(tmp_path)
    savemat(path, {"S": np.full(SIZE, 0.5)})
    with pytest.raises(AnnotationError, match=r"077\.mat: S has shape \(6, 8\) and type float64"):
        data.masks[0]
    savemat(path, {"S": np.full(SIZE, 300, np.int16)})
    with pytest.raises(AnnotationError, match=r"077\.mat: mask values \[300\] stand for no class"):
        data.masks[0]
    path.write_bytes(b"no matrix")
    with pytest.raises(AnnotationError, match=r"077\.mat: no MATLAB file with a matrix S"):
        data.masks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": 3}, "'categories' is a int; expected a list"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no str 'name'"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, r"\[1\] stand there more than once"),
        ({"categories": [{"id": 300, "name": "a"}]}, "category ids from 300 to 300; expected 1 to 254"),
        ({"images": []}, "an annotation of the image 139, which is not in images"),
        ({"images": [{"id": 139, "file_name": "../x.jpg"}]}, r"image name '\.\./x\.jpg'"),
        (
            {"annotations": [{"image_id": 139, "file_name": "x.png", "segments_info": [{}]}]},
            r"segments_info\[0\] has no",
        ),
        ({"annotations": [{"image_id": 139, "file_name": "x.png", "segments_info": []}]}, "1 of 1 masks are not in"),
    ],
)
def test_panoptic_files_are_checked(tmp_path, changes, message):
    panoptic(tmp_path, **changes)
    with pytest.raises(AnnotationError, match=r"panoptic_val2017\.json: .*" + message):
        table.ALL["coco_panoptic"].read(tmp_path)


def test_segments_that_are_not_listed_are_refused(tmp_path):
    panoptic(tmp_path)
    data = table.ALL["coco_panoptic"].read(tmp_path)
    Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(tmp_path / "coco/annotations/panoptic_val2017/000000000139.png")
    with pytest.raises(AnnotationError, match=r"139\.png: the segments \[592137\] are not listed"):
        data.masks[0]


# ---------------------------------------------------------------------------------------------------------------------
# From files to figures


class Words(ColourModel):
    """The last token of a text, counted in threes, is the channel that it asks for."""

    image_size: tuple[int, int] = (4, 4)

    def encode_text(self, text, *, local=True):
        return super().encode_text(text.replace(tokens=text.tokens % 3), local=local)


def word(channel):
    """A word that `Words` takes for a channel."""
    words = ["red", "green", "blue", "sky", "tree", "house", "road", "grass"]
    tokens = Tokenizer(77)(words)
    return next(text for text, row in zip(words, tokens, strict=True) if row[1] % 3 == channel and not row[3:].any())


def test_from_files_to_the_result(tmp_path):
    """A photograph of 6 x 8 pixels in windows of 4 x 4, whose every pixel is right if nothing is moved on the way."""
    panoptic(tmp_path)
    benchmark = table.ALL["coco_panoptic"]
    data = benchmark.read(tmp_path)
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[..., 2] = 255  # the floor
    pixels[0, 0], pixels[0, 1] = (255, 0, 0), (0, 255, 0)  # wall and person
    Image.fromarray(pixels).save(data.pictures[0].path, format="PNG")
    options = {"image_batch": 8, "templates": ["{c}"], "modes": ("projected",)}
    options["classes"] = [word(1), word(2), word(0)]
    (evaluator,) = evaluation_tasks.TASKS["segmentation"](Words(1), benchmark, data, options)
    results = flat(evaluator.run({}))
    assert results.pop("segmentation/coco_panoptic/chance") < 0.25
    assert set(results.values()) == {1.0}
    assert len(results) == 6
    assert len(list(evaluator.figures({}))) == 2
    options["classes"] = [word(2), word(1), word(0)]
    (evaluator,) = evaluation_tasks.TASKS["segmentation"](Words(1), benchmark, data, options)
    results = flat(evaluator.run({}))
    assert results["segmentation/coco_panoptic/projected/accuracy"] == pytest.approx(1 / 42)  # the wall, of 42 labelled


def test_options_reach_the_evaluator(tmp_path):
    """Names, prompts, sizes and options of the config and the table."""
    pixel_maps(tmp_path)
    benchmark = table.ALL["coco_object"]
    data = benchmark.read(tmp_path)
    options = {**benchmark.options, "image_batch": 8, "templates": "a {c}.", "modes": "projected"}
    (evaluator,) = evaluation_tasks.TASKS["segmentation"](Words(2), benchmark, data, options)
    assert evaluator._modes == ("projected",)
    assert evaluator._decision["temperature"] == 50
    assert evaluator._data.class_of_query.tolist() == [0] * 26 + [1] * 8 + list(range(2, 81))
    assert evaluator._data.sizes.tolist() == [list(SIZE)] * 2
    assert evaluator._data.classes[:3] == ["background", "person", "bicycle"]
    names = tmp_path / "names.txt"
    lines(names, *["thing, object"] * 81)
    (evaluator,) = evaluation_tasks.TASKS["segmentation"](Words(2), benchmark, data, options | {"classes": str(names)})
    assert len(evaluator._data.tokens) == 162
    with pytest.raises(ValueError, match="coco_object: names of 2 classes; the set has 81"):
        list(evaluation_tasks.TASKS["segmentation"](Words(2), benchmark, data, options | {"classes": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"expected one or more, each with \{c\}"):
        list(evaluation_tasks.TASKS["segmentation"](Words(2), benchmark, data, options | {"templates": ["a photo"]}))
    pathlib.Path(data.pictures[1].path).write_bytes(b"no image")
    with pytest.raises(BrokenImages) as broken:
        list(evaluation_tasks.TASKS["segmentation"](Words(2), benchmark, data, options))
    assert list(broken.value.reasons) == [1]
