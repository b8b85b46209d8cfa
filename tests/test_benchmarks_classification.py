"""Readers of classification sets on a miniature of every native layout, and the prompts that are made for classes."""

import io
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from colour_model import ColourModel
from conftest import load_golden
from PIL import Image

from flair_jax import evaluation_sets, evaluation_tasks, sharding
from flair_jax.data.benchmarks import base, classification, prompts, table
from flair_jax.data.benchmarks.base import AnnotationError, MissingError
from flair_jax.data.transforms.images import MEAN_STD, Preprocessing, squash
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.models.dual_encoder import TextFeatures


def write(root: pathlib.Path, **files: str | bytes):
    """Files by path, with `/` written as `__` and `.` as it is."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def encoded(colour, side=48) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def mat(**arrays) -> bytes:
    from scipy.io import savemat

    file = io.BytesIO()
    savemat(file, arrays)
    return file.getvalue()


def lines(*rows) -> str:
    return "".join(f"{row}\n" for row in rows)


def raw(count, side, header=()):
    """Records of random pixels: header bytes of each, channels, rows, columns."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)
    heads = np.array(header, np.uint8).reshape(count, -1)
    return pixels, np.concatenate([heads, pixels.reshape(count, -1)], axis=1).tobytes()


def folders(root, *names, images=("b.JPG", "a.png")):
    return {f"{root}/{name}/{image}": "" for name in names for image in images} | {f"{root}/{names[0]}/notes.txt": ""}


WNIDS = prompts.imagenet_folders()
CARS = np.array([(1, "00001.jpg"), (2, "00002.jpg")], dtype=[("class", object), ("fname", object)])

# Set -> its files, and what is read: the images with their labels, and some class names by number.
LAYOUTS = {
    "imagenet": (
        folders("imagenet/val", WNIDS[2], WNIDS[999]),
        {f"val/{WNIDS[2]}/a.png": 2, f"val/{WNIDS[2]}/b.JPG": 2, f"val/{WNIDS[999]}/a.png": 999, "b.JPG": 999},
        {0: "tench", 999: "toilet paper"},
    ),
    "imagenet_v2": (
        folders("imagenetv2/imagenetv2-matched-frequency-format-val", "2", "10", "999", images=("x.jpeg",)),
        {"10/x.jpeg": 10, "2/x.jpeg": 2, "999/x.jpeg": 999},
        {10: "brambling"},
    ),
    "imagenet_sketch": (
        folders("imagenet-sketch/sketch", WNIDS[1], images=("s.JPEG",)),
        {f"{WNIDS[1]}/s.JPEG": 1},
        {1: "goldfish"},
    ),
    "imagenet_a": (
        folders("imagenet-a", "n01498041", "n12267677", images=("0.jpg",)),
        {"n01498041/0.jpg": 0, "n12267677/0.jpg": 199},
        {0: "stingray", 199: "acorn"},
    ),
    "imagenet_r": (
        folders("imagenet-r", "n01443537", images=("art_0.jpg",)) | {"imagenet-r/README.txt": ""},
        {"n01443537/art_0.jpg": 0},
        {0: "goldfish"},
    ),
    "imagenet_o": (folders("imagenet-o", "n13052670", images=("o.jpg",)), {"n13052670/o.jpg": 199}, {0: "goldfish"}),
    "cifar10": (
        {
            "cifar10/cifar-10-batches-bin/test_batch.bin": raw(2, 32, [[1], [9]])[1],
            "cifar10/cifar-10-batches-bin/batches.meta.txt": lines("airplane", "automobile", *"cdefghi", "truck", ""),
        },
        [1, 9],
        {1: "automobile", 9: "truck"},
    ),
    "cifar100": (
        {
            "cifar100/cifar-100-binary/test.bin": raw(2, 32, [[7, 1], [3, 0]])[1],
            "cifar100/cifar-100-binary/fine_label_names.txt": lines("apple", "aquarium_fish"),
        },
        [1, 0],
        {1: "aquarium fish"},
    ),
    "stl10": (
        {
            "stl10/stl10_binary/test_X.bin": raw(2, 96, [[], []])[1],
            "stl10/stl10_binary/test_y.bin": bytes([2, 1]),
            "stl10/stl10_binary/class_names.txt": lines("airplane", "bird"),
        },
        [1, 0],
        {1: "bird"},
    ),
    "food101": (
        {
            "food101/food-101/meta/test.txt": lines("baby_back_ribs/2", "apple_pie/7"),
            "food101/food-101/meta/classes.txt": lines("apple_pie", "baby_back_ribs"),
        },
        {"images/baby_back_ribs/2.jpg": 1, "images/apple_pie/7.jpg": 0},
        {1: "baby back ribs"},
    ),
    "pets": (
        {"pets/annotations/test.txt": lines("Abyssinian_201 1 1 1", "saint_bernard_7 29 2 20")},
        {"pets/images/Abyssinian_201.jpg": 0, "saint_bernard_7.jpg": 28},
        {28: "Saint Bernard"},
    ),
    "dtd": (
        {"dtd/labels/test1.txt": lines("lined/lined_1.jpg", "banded/banded_2.jpg")},
        {"dtd/images/lined/lined_1.jpg": 1, "banded/banded_2.jpg": 0},
        {0: "banded"},
    ),
    "aircraft": (
        {
            "fgvc_aircraft/data/images_variant_test.txt": lines("0061581 DHC-8-100", "0062765 A300B4"),
            "fgvc_aircraft/data/variants.txt": lines("707-320", "A300B4", "DHC-8-100"),
        },
        {"data/images/0061581.jpg": 2, "0062765.jpg": 1},
        {0: "707-320"},
    ),
    "sun397": (
        {
            "sun397/Testing_01.txt": lines("/a/apse/indoor/sun_1.jpg", "/a/abbey/sun_2.jpg"),
            "sun397/ClassName.txt": lines("/a/abbey", "/a/apse/indoor"),
        },
        {"sun397/a/apse/indoor/sun_1.jpg": 1, "a/abbey/sun_2.jpg": 0},
        {0: "abbey", 1: "apse indoor"},
    ),
    "caltech101": (
        folders("caltech101/101_ObjectCategories", *(f"c{n:03d}" for n in range(102)), images=("image_0001.jpg",)),
        {f"c{n:03d}/image_0001.jpg": n for n in range(102)},
        {0: "background", 101: "yin and yang symbol"},
    ),
    "flowers102": (
        {
            "flowers102/imagelabels.mat": mat(labels=np.array([[77, 1, 102]], np.uint8)),
            "flowers102/setid.mat": mat(tstid=np.array([[3, 1]], np.uint16), trnid=np.array([[2]])),
        },
        {"jpg/image_00003.jpg": 101, "jpg/image_00001.jpg": 76},
        {0: "pink primrose", 101: "blackberry lily"},
    ),
    "cars": (
        {
            "stanford_cars/cars_test_annos_withlabels.mat": mat(annotations=CARS),
            "stanford_cars/devkit/cars_meta.mat": mat(class_names=np.array(["AM General Hummer", "Acura RL"], object)),
        },
        {"cars_test/00001.jpg": 0, "cars_test/00002.jpg": 1},
        {1: "Acura RL"},
    ),
    "cub": (
        {
            "cub/CUB_200_2011/images.txt": lines("1 001.Black/a.jpg", "2 001.Black/b.jpg", "3 002.Laysan/c.jpg"),
            "cub/CUB_200_2011/image_class_labels.txt": lines("1 1", "2 1", "3 2"),
            "cub/CUB_200_2011/train_test_split.txt": lines("1 1", "2 0", "3 0"),
            "cub/CUB_200_2011/classes.txt": lines("1 001.Black_footed_Albatross", "2 002.Laysan_Albatross"),
        },
        {"images/001.Black/b.jpg": 0, "images/002.Laysan/c.jpg": 1},
        {0: "Black footed Albatross"},
    ),
    "places365": (
        {
            "places365/places365_val.txt": lines("Places365_val_00000001.jpg 1"),
            "places365/categories_places365.txt": lines("/a/airfield 0", "/a/apartment_building/outdoor 1"),
        },
        {"places365/val_256/Places365_val_00000001.jpg": 1},
        {1: "apartment building outdoor"},
    ),
    "eurosat": (
        folders("eurosat/2750", *(f"Class{n}" for n in range(10)), images=("C_1.jpg",)),
        {f"Class{n}/C_1.jpg": n for n in range(10)},
        {0: "annual crop land", 9: "lake or sea"},
    ),
    "resisc45": (
        folders("resisc45/NWPU-RESISC45", "airport", "basketball_court", images=("a.jpg",)),
        {"airport/a.jpg": 0, "basketball_court/a.jpg": 1},
        {1: "basketball court"},
    ),
    "country211": (
        folders("country211/test", *(f"{n:03d}" for n in range(211)), images=("1.jpg",)),
        {f"{n:03d}/1.jpg": n for n in range(211)},
        {0: "Andorra"},
    ),
    "rendered_sst2": (
        folders("rendered-sst2/test", "positive", "negative", images=("1.png",)),
        {"negative/1.png": 0, "positive/1.png": 1},
        {0: "negative"},
    ),
    "hateful_memes": (
        {
            "hateful_memes/data/dev.jsonl": lines(
                '{"id":8291,"img":"img/08291.png","label":1,"text":"a text"}',
                '{"id":46971,"img":"img/46971.png","label":0,"text":"another"}',
                "",
            )
        },
        {"data/img/08291.png": 1, "data/img/46971.png": 0},
        {0: "meme", 1: "hatespeech meme"},
    ),
    "gtsrb": (
        {"gtsrb/GT-final_test.csv": lines("Filename;Width;Height;Roi.X1;ClassId", "00000.ppm;53;54;6;16")},
        {"gtsrb/Final_Test/Images/00000.ppm": 16},
        {0: "red and white circle 20 kph speed limit"},
    ),
}


def coco(**changes) -> str:
    """COCO's instances: image 7 with a cat and two dogs, image 3 with nothing."""
    content = {
        "images": [{"id": 7, "file_name": "000007.jpg"}, {"id": 3, "file_name": "000003.jpg"}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [{"image_id": 7, "category_id": category} for category in (17, 18, 18)],
    }
    return json.dumps(content | changes)


LAYOUTS["coco_objects"] = (
    {"coco/annotations/instances_val2017.json": coco()},
    {"coco/images/val2017/000003.jpg": [False] * 3, "000007.jpg": [False, True, True]},
    {0: "person", 1: "cat", 2: "dog"},
)
VOC = {  # image 3 has a difficult bird alone, image 7 a bird and a dog
    f"VOCdevkit/VOC2007/ImageSets/Main/{name}_test.txt": lines(f"000007 {seven:2d}", f"000003 {three:2d}")
    for name in classification._VOC_CLASSES
    for seven, three in [(1 if name in ("bird", "dog") else -1, 0 if name == "bird" else -1)]
}
LAYOUTS["voc2007"] = (
    VOC,
    {
        "VOCdevkit/VOC2007/JPEGImages/000003.jpg": [False] * 20,
        "000007.jpg": [name in ("bird", "dog") for name in classification._VOC_CLASSES],
    },
    {0: "aeroplane", 2: "bird", 19: "tvmonitor"},
)


def test_difficult_objects_of_voc_do_not_count(tmp_path):
    write(tmp_path, **VOC)
    data = table.select(["voc2007"])[0].read(tmp_path)
    assert data.counted.tolist() == [[name != "bird" for name in classification._VOC_CLASSES], [True] * 20]


def test_every_set_of_the_table_has_a_miniature():
    assert LAYOUTS.keys() == {entry.name for entry in classification.BENCHMARKS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_native_layout(tmp_path, name):
    files, expected, names = LAYOUTS[name]
    (entry,) = table.select([name])
    with pytest.raises(MissingError):
        entry.read(tmp_path)
    write(tmp_path, **files)
    data = entry.read(tmp_path)
    if isinstance(expected, dict):
        assert len(data.pictures) == len(expected)
        for picture, label, (path, number) in zip(data.pictures, data.labels, expected.items(), strict=True):
            assert picture.path.startswith(str(tmp_path)) and picture.path.endswith(path) and np.all(label == number)
    else:
        assert data.labels.tolist() == expected
    assert {number: data.classes[number] for number in names} == {number: (name,) for number, name in names.items()}
    assert data.templates and all("{c}" in template for template in data.templates)
    assert data.counts() == {"images": len(data.labels), "classes": len(data.classes)}
    for file in entry.files:
        if file.count is not None:
            assert file.count(base.find(tmp_path, file.path)) > 0


def test_counts_of_the_files_are_those_of_the_miniatures(tmp_path):
    expected = dict(
        imagenet=[4], cifar10=[2, 10], food101=[2, 2], flowers102=[2, 3], cars=[2, 2], gtsrb=[1], stl10=[2, 2, 2]
    )
    for name, counts in expected.items():
        write(tmp_path, **LAYOUTS[name][0])
        (entry,) = table.select([name])
        found = [file.count(base.find(tmp_path, file.path)) for file in entry.files if file.count]
        assert found == counts, name


def test_imagenet_has_the_classes_of_clip_and_kaggles_layout(tmp_path):
    (entry,) = table.select(["imagenet"])
    write(tmp_path, **folders("imagenet/val", WNIDS[2]))
    data = entry.read(tmp_path)
    assert len(data.classes) == 1000 and len(data.templates) == 80 and data.parts == ("1 of 1000 classes",)
    assert entry.options == {"ties": "first"}  # "missile" and "sunglasses" are two classes each

    with pytest.raises(MissingError, match=r"not found: imagenet/val/<class> or imagenet/LOC_val_solution\.csv"):
        entry.read(tmp_path / "nowhere")

    kaggle = tmp_path / "kaggle"
    rows = ("ImageId,PredictionString", f"ILSVRC2012_val_00000001,{WNIDS[5]} 1 2 3 4 {WNIDS[5]} 5 6 7 8 ", "")
    write(kaggle, **{"imagenet/LOC_val_solution.csv": lines(*rows)})
    data = entry.read(kaggle)  # annotations alone
    assert data.labels.tolist() == [5] and data.pictures[0].path.endswith("val/ILSVRC2012_val_00000001.JPEG")
    write(kaggle, **{"imagenet/ILSVRC2012_img_val/ILSVRC2012_val_00000001.JPEG": ""})
    assert entry.read(kaggle).pictures[0].exists()
    assert entry.files[0].count(kaggle / "imagenet/ILSVRC2012_img_val") == 1


@pytest.mark.parametrize(("name", "side", "header"), [("cifar10", 32, 1), ("cifar100", 32, 2), ("stl10", 96, 0)])
def test_pixels_without_a_header(tmp_path, name, side, header):
    write(tmp_path, **LAYOUTS[name][0])
    (entry,) = table.select([name])
    pictures = entry.read(tmp_path).pictures
    pixels, _ = raw(2, side, [[0] * header] * 2)
    for picture, planes in zip(pictures, pixels, strict=True):
        image = planes.transpose(2, 1, 0) if name == "stl10" else planes.transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(picture.decode()), image)
    assert pictures[0].key() != pictures[1].key() and pictures[0].exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("imagenet", {"imagenet/val/n00000000/a.jpg": ""}, r"val: class 'n00000000'; expected one of 1000"),
        ("cifar10", {"cifar10/cifar-10-batches-bin/test_batch.bin": "x"}, "1 bytes; expected a multiple of 3073"),
        ("cifar100", {"cifar100/cifar-100-binary/fine_label_names.txt": "apple\n"}, "class 1; expected 0 to 0"),
        ("stl10", {"stl10/stl10_binary/test_y.bin": bytes([1])}, "does not fit to the 1 labels"),
        ("stl10", {"stl10/stl10_binary/test_y.bin": bytes([0, 1])}, "does not fit to the 2 labels"),
        ("food101", {"food101/food-101/meta/test.txt": "cake/1\n"}, "class 'cake'; expected one of 2"),
        ("food101", {"food101/food-101/meta/test.txt": "apple_pie/1\napple_pie/1\n"}, "is named twice"),
        ("food101", {"food101/food-101/meta/test.txt": "apple_pie/../../x\n"}, "expected a path inside of"),
        ("food101", {"food101/food-101/meta/test.txt": "\n"}, "no image is named"),
        ("food101", {"food101/food-101/meta/test.txt": b"\xff\n"}, "not UTF-8"),
        ("food101", {"food101/food-101/meta/classes.txt": "a\na\n"}, "2 classes are named, of which 1 differ"),
        ("food101", {"food101/food-101/meta/classes.txt": ""}, "no class is named"),
        ("dtd", {"dtd/labels/test1.txt": "lined/\0.jpg\n"}, "expected a path inside of"),
        ("pets", {"pets/annotations/test.txt": "Abyssinian_1 2 1 1\n"}, "has class 2, which is American Bulldog"),
        ("pets", {"pets/annotations/test.txt": "Abyssinian_1 99 1 1\n"}, "has class 98; expected 0 to 36"),
        ("pets", {"pets/annotations/test.txt": "Abyssinian_1 one 1 1\n"}, "'one'; expected a number"),
        ("pets", {"pets/annotations/test.txt": "\nAbyssinian_1\n"}, "line 2: 'Abyssinian_1'; expected 4 fields"),
        ("flowers102", {"flowers102/setid.mat": mat(tstid=np.array([[4]]))}, "3 labels; setid.mat names image 4"),
        ("flowers102", {"flowers102/setid.mat": "no MATLAB file"}, "expected a MATLAB file with tstid"),
        ("flowers102", {"flowers102/setid.mat": mat(other=np.array([[4]]))}, "expected a MATLAB file with tstid"),
        ("flowers102", {"flowers102/setid.mat": mat(tstid=np.array([[4]]))[:128]}, "expected a MATLAB file with tstid"),
        ("cars", {"stanford_cars/cars_test_annos_withlabels.mat": mat(annotations=np.ones(3))}, "fname and class"),
        ("cub", {"cub/CUB_200_2011/train_test_split.txt": "1 0\n"}, "name others"),
        ("caltech101", {"caltech101/101_ObjectCategories/more/x.jpg": ""}, "103 folders; expected one for each of 102"),
        ("coco_objects", {"coco/annotations/instances_val2017.json": "{}"}, "expected COCO's images"),
        ("coco_objects", {"coco/annotations/instances_val2017.json": "[1"}, "no JSON"),
        ("coco_objects", {"coco/annotations/instances_val2017.json": coco(images=[])}, "image 7, which is not listed"),
        (
            "coco_objects",
            {"coco/annotations/instances_val2017.json": coco(categories=[{"id": 1, "name": "a"}] * 2)},
            "stands twice",
        ),
        (
            "voc2007",
            {"VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt": "000007 1\n"},
            "other images than aeroplane_test",
        ),
        ("voc2007", {"VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt": "000007 2\n"}, "'000007 2'; expected an image"),
        ("voc2007", {"VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt": "7 1\n7 1\n"}, "2 images, of which 1 differ"),
        ("gtsrb", {"gtsrb/GT-final_test.csv": "a;b\n1;2\n"}, "expected the columns Filename and ClassId"),
    ],
)
def test_broken_annotations_are_named(tmp_path, name, changes, message):
    write(tmp_path, **(LAYOUTS[name][0] | changes))
    (entry,) = table.select([name])
    with pytest.raises(AnnotationError, match=message) as error:
        entry.read(tmp_path)
    assert str(tmp_path) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# One's own sets


def test_own_folders(tmp_path):
    write(tmp_path, **folders("my set/pictures", "red_things", "blue"))
    entry, other = table.select(["folders:my set/pictures", f"folders:{tmp_path}/my set/pictures"])
    assert entry.name == "my set_pictures" != other.name and entry.task == "classification"
    data = entry.read(tmp_path)
    assert data.classes == [("blue",), ("red things",)] and data.labels.tolist() == [0, 0, 1, 1]
    assert [os.path.basename(picture.path) for picture in data.pictures] == ["a.png", "b.JPG"] * 2
    assert other.read(pathlib.Path("/nowhere")).pictures == data.pictures
    with pytest.raises(MissingError):
        entry.read(tmp_path / "my set")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(AnnotationError, match="no image is named"):
        classification.located("folders:empty").read(tmp_path)
    with pytest.raises(ValueError, match="expected folders:DIR or tfds:NAME"):
        classification.located("x:y")


@pytest.fixture(scope="module")
def tfds_records(tmp_path_factory):
    """Two records of an image and a label, as TensorFlow Datasets writes them, in an ArrayRecord file."""
    from array_record.python import array_record_module

    from flair_jax.data.sources.tf_example import Example

    folder = tmp_path_factory.mktemp("tfds")
    path = folder / "shapes-test.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for colour, label in (("red", 1), ("blue", 0)):
        example = Example()
        example.features.feature["image"].bytes_list.value.append(encoded(colour))
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()
    (folder / "label.labels.txt").write_text("blue_square\nred_square\n")
    return path


def test_records_of_tensorflow_datasets(tfds_records, tmp_path):
    data = classification.records(str(tfds_records))
    assert data.labels.tolist() == [1, 0] and data.classes == [("blue square",), ("red square",)]
    assert data.pictures[0].decode().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(AnnotationError, match=r"colour\.labels\.txt: not found"):
        classification.records(str(tfds_records), "colour")
    (tfds_records.parent / "none.labels.txt").write_text("a\n")
    with pytest.raises(AnnotationError, match="none is None; expected a number from 0 to 0"):
        classification.records(str(tfds_records), "none")


def test_a_name_of_tensorflow_datasets(tmp_path, monkeypatch, tfds_records):
    (entry,) = table.select(["tfds:group/shapes:1.0.0?split=test"])
    assert entry.name == "group_shapes:1.0.0"
    opened = []
    monkeypatch.setattr(
        classification, "open_source", lambda name: opened.append(name) or open_array_record(tfds_records)
    )
    assert entry.read(tmp_path).labels.tolist() == [1, 0]
    assert opened == ["tfds:group/shapes:1.0.0?split=test"]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_data_set_that_tensorflow_datasets_made(tmp_path, file_format):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `tf` is not installed")
    pixels = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    samples = [
        (str(number), {"image": np.full((4, 6, 3), pixels[colour], np.uint8), "label": f"{colour} thing"})
        for number, colour in enumerate(("red", "blue", "red"))
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="things",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["blue thing", "red thing"])}
        ),
        split_datasets={"test": samples},
        data_dir=tmp_path,
        file_format=file_format,
        disable_shuffling=True,
    )
    (entry,) = table.select([f"tfds:things?split=test&data_dir={tmp_path}"])
    data = entry.read(tmp_path)
    assert data.labels.tolist() == [1, 0, 1] and data.classes == [("blue thing",), ("red thing",)]
    assert [picture.decode().getpixel((0, 0)) for picture in data.pictures] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert len({picture.key() for picture in data.pictures}) == 3
    for wrong in ("tfds:things?split=train", "tfds:other?split=test"):
        (entry,) = table.select([f"{wrong}&data_dir={tmp_path}"])
        with pytest.raises(AnnotationError, match=wrong.partition("?")[0]):
            entry.read(tmp_path)
    (entry,) = table.select([f"tfds:things?split=test[1:]&data_dir={tmp_path}"])
    if file_format == "tfrecord":  # files are read whole
        with pytest.raises(AnnotationError, match="prepared as ArrayRecord"):
            entry.read(tmp_path)
    else:
        assert entry.read(tmp_path).labels.tolist() == [0, 1]


def open_array_record(path):
    from flair_jax.data.sources import array_record

    return array_record.open_files([str(path)])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_names_and_templates_of_clip():
    names, templates = prompts.class_names("imagenet1k"), prompts.templates("imagenet1k")
    assert len(names) == len(WNIDS) == 1000 and len(templates) == 80
    assert names[0] == ("tench",) and templates[0] == "a bad photo of a {c}." and WNIDS[0] == "n01440764"
    assert sorted(WNIDS) == WNIDS
    for subset in ("imagenet-a", "imagenet-o", "imagenet-r"):
        folders_ = prompts.imagenet_folders(subset)
        assert len(folders_) == 200 and folders_ == sorted(folders_) and set(folders_) <= set(WNIDS)
    with pytest.raises(ValueError, match="no set 'imagenet'; there are cifar10"):
        prompts.templates("imagenet")


def test_prompts_of_templates():
    classes = [("hen",), ("tusker", "{c} elephant")]
    assert prompts.from_templates(classes, ("a {c}.", "{c} {c}")) == [
        ["a hen.", "hen hen"],
        ["a tusker.", "tusker tusker", "a {c} elephant.", "{c} elephant {c} elephant"],
    ]
    for templates in ((), ("a photo",), ("{}",)):
        with pytest.raises(ValueError, match="expected one or more, each with"):
            prompts.from_templates(classes, templates)
    with pytest.raises(ValueError, match=r"classes \[0\] have no name"):
        prompts.from_templates([()], ("{c}",))


def test_relative_clauses():
    """The rule looks at the first letters alone, wrong as it may be: the published results were made with it."""
    for description, clause in {
        "two legs": "which has two legs",
        "a beak": "which is a beak",
        "apple-shaped": "which is apple-shaped",
        "used to boil water": "which is used to boil water",
        "has feathers": "which has feathers",
        "often in herds": "which often in herds",
        "typically tall": "which typically tall",
        "may be lit": "which may be lit",
        "can float": "which can float",
        "candle light": "which candle light",
        "Used": "which has Used",
    }.items():
        assert prompts.relative_clause(description) == clause


def test_prompts_of_descriptions():
    classes = [("Hen",), ("tusker", "elephant"), ("sea_slug",)]
    descriptions = {"elephant": ["a trunk"], "hen": ["two legs", "used to lay"], "sea slug": []}
    assert prompts.from_descriptions(classes, descriptions) == [
        ["Hen, which has two legs", "Hen, which is used to lay"],
        ["tusker, which is a trunk", "elephant, which is a trunk"],
        ["sea_slug"],  # never an empty mean
    ]
    assert prompts.from_descriptions(classes[:1], descriptions, ("a {c},", "one {c},")) == [
        [
            "a Hen, which has two legs",
            "one Hen, which has two legs",
            "a Hen, which is used to lay",
            "one Hen, which is used to lay",
        ]
    ]
    with pytest.raises(ValueError, match=r"1 of 2 classes are not described, among them \['cow'\]"):
        prompts.from_descriptions([("hen",), ("cow",)], descriptions)
    with pytest.raises(ValueError, match="have the same name but for case and punctuation"):
        prompts.from_descriptions([("hen",)], {"hen": [], "Hen": ["two legs"]})


def test_descriptions_are_found_by_number_where_names_show_the_order():
    """As ImageNet's: "missile" twice in CLIP's list, "eft" where CLIP says "newt"."""
    classes = [("Black_footed Albatross",), ("newt",), ("missile",), ("cowboy hat",), ("missile",)]
    texts = {"black-footed albatross": ["0"], "eft": ["1"], "missile": ["2"], "cowboy hat": ["3"], "projectile": ["4"]}
    found = prompts.from_descriptions(classes, texts, ("{c},",))
    assert [own[0].rpartition(" ")[2] for own in found] == list("01234") and found[4] == ["missile, which has 4"]
    other_order = {name: texts[name] for name in reversed(texts)}
    with pytest.raises(ValueError, match=r"1 of 5 classes are not described, among them \['newt'\]"):
        prompts.from_descriptions(classes, other_order)


@pytest.mark.golden
def test_prompts_of_descriptions_are_those_of_grain():
    """Templates times descriptions."""
    golden = load_golden("grain/text.json")
    classes = [(name,) for name in golden["classes"]]
    templates = [template.replace("{}", "{c}") for template in golden["templates"]]
    found = prompts.from_descriptions(classes, golden["classes"], templates)
    assert found == golden["prompts"]["prompts_use_desc_True"]
    assert prompts.from_templates(classes, templates) == golden["prompts"]["prompts_use_desc_False"]


def test_files_of_names_and_descriptions(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"hen": ["two legs", " "], "cow": []}))
    assert prompts.read_descriptions(path) == {"hen": ["two legs"], "cow": []}
    for content in ("[]", '{"hen": "two legs"}', '{"hen": [1]}', "{", '{"hen": [null]}'):
        path.write_text(content)
        with pytest.raises(AnnotationError, match=r"file\.json"):
            prompts.read_descriptions(path)
    path.write_text('["hen", ["tusker", "elephant"]]')
    assert prompts.read_names(path) == [("hen",), ("tusker", "elephant")]
    for content in ('{"hen": 1}', "[1]", "[[]]", "[[1]]", '"hen"', "[null]"):
        path.write_text(content)
        with pytest.raises(AnnotationError, match=r"file\.json"):
            prompts.read_names(path)


# ---------------------------------------------------------------------------------------------------------------------
# From a set to its evaluator


class NamedColours(ColourModel):
    """Understands texts whose last word is red, green or blue."""

    image_size = (16, 24)

    def encode_text(self, text, *, local=True):
        words = Tokenizer()(["red", "green", "blue"])[:, 1]
        pooled = (text.tokens.reshape(-1)[text.ends - 1, None] == words).astype("float32")
        return TextFeatures(pooled=pooled, local=None, mask=text.tokens != 0)


@pytest.fixture
def own(tmp_path):
    """A model and a set of two colours: (model, entry, data)."""
    pictures = {f"set/red/{name}.png": encoded("red") for name in "abc"} | {"set/blue/d.png": encoded("blue")}
    write(tmp_path, **pictures, **{"set/red/green.png": encoded("green")})
    (entry,) = table.select(["folders:set"])
    return NamedColours(8), entry, entry.read(tmp_path)


def tokens_of(own, **options):
    """Texts' tokens and classes of the evaluator that the options give."""
    (evaluator,) = evaluation_tasks.TASKS["classification"](*own, options)
    data = evaluator._data
    return data, [data.tokens[data.class_of_prompt == number] for number in range(len(data.classes))]


def test_prompts_follow_the_options(own, tmp_path):
    model, _, _ = own
    tokenize = Tokenizer(model.context_length)

    def expect(tokens, *texts):
        for found, own_texts in zip(tokens, texts, strict=True):
            np.testing.assert_array_equal(found, tokenize(list(own_texts)))

    data, tokens = tokens_of(own)
    expect(tokens, ["a photo of a blue."], ["a photo of a red."])
    assert data.classes == ["blue", "red"] and data.images[1].shape == (*model.image_size, 3)
    assert data.images[1][0, 0].tolist() == [255, 0, 0] and len(set(data.images.keys)) == 5
    expect(tokens_of(own, templates="the {c}")[1], ["the blue"], ["the red"])
    assert len(tokens_of(own, templates="imagenet1k")[1][0]) == 80
    data, tokens = tokens_of(own, names=(("navy", "sky"), "rose"), templates=("a {c}", "{c}"))
    expect(tokens, ["a navy", "navy", "a sky", "sky"], ["a rose", "rose"])
    assert data.classes == ["navy", "rose"]
    (tmp_path / "d.json").write_text(json.dumps({"Red": ["warm"], "blue": []}))
    data, tokens = tokens_of(own, descriptions=str(tmp_path / "d.json"))
    expect(tokens, ["blue"], ["red, which has warm"])
    np.testing.assert_array_equal(data.descriptions, tokenize(["warm"]))
    assert data.class_of_description.tolist() == [1] and data.undescribed.tolist() == [0]
    (tmp_path / "many").mkdir()
    with pytest.raises(evaluation_tasks.UnusableSet, match=r"descriptions are missing: .*many/set\.json"):
        tokens_of(own, descriptions=str(tmp_path / "many"))
    (tmp_path / "many/set.json").write_text(json.dumps({"red": ["warm"], "blue": ["cold", "far"]}))
    data, tokens = tokens_of(own, descriptions=str(tmp_path / "many"), templates=("a {c},",))
    expect(tokens, ["a blue, which has cold", "a blue, which has far"], ["a red, which has warm"])
    assert data.class_of_description.tolist() == [0, 0, 1]
    (tmp_path / "d.json").write_text(json.dumps({"red": [], "blue": [" "]}))
    with pytest.raises(ValueError, match=r"set: no class in .*d\.json has a description"):
        tokens_of(own, descriptions=str(tmp_path / "d.json"))
    (tmp_path / "n.json").write_text('["b", "r"]')
    expect(tokens_of(own, names=str(tmp_path / "n.json"), templates=("{c}",))[1], ["b"], ["r"])
    with pytest.raises(ValueError, match="set: 1 names for 2 classes"):
        tokens_of(own, names=("navy",))


def test_pictures_are_preprocessed_as_the_model_says(own):
    """Pixels, what is done to them inside jit, and the keys under which their features are kept."""
    model, entry, data = own
    other = model.clone(preprocessing=Preprocessing("squash", "imagenet"))
    ours, theirs = (evaluation_tasks.TASKS["classification"](one, entry, data, {}) for one in (model, other))
    (ours,), (theirs,) = list(ours), list(theirs)
    image = data.pictures[0].decode()
    np.testing.assert_array_equal(theirs._data.images[0], squash(image, model.image_size))
    assert not set(ours._data.images.keys) & set(theirs._data.images.keys)
    white = np.full((8, *model.image_size, 3), 255, np.uint8)
    found = [np.asarray(next(evaluator._encoder.images({}, white))[1].pooled[0]) for evaluator in (ours, theirs)]
    np.testing.assert_allclose(found[0], (1 - MEAN_STD["openai"][0]) / MEAN_STD["openai"][1], rtol=1e-5)
    np.testing.assert_allclose(found[1], (1 - MEAN_STD["imagenet"][0]) / MEAN_STD["imagenet"][1], rtol=1e-5)


def test_a_set_is_evaluated_from_its_files(tmp_path, own):
    """A missing image is left out; results have the names that reports read."""
    model, entry, _ = own
    (tmp_path / "set/red/b.png").unlink()
    options = {"templates": "{c}", "image_batch": 3, "modes": "global", "metric": "mean_per_class"}
    evaluator = evaluation_sets.SetEvaluator(model, entry, tmp_path, allow_missing=True, options=options)
    with jax.set_mesh(sharding.create_mesh()):
        results = evaluator.run({})
        assert [(result.name, result.value) for result in results] == [
            ("classification/set/global/mean_per_class", pytest.approx((2 / 3 + 1) / 2)),
            ("classification/set/global/acc1", 0.75),
            ("classification/set/global/roc_auc", 1),
            ("classification/set/chance", 0.5),
        ]
        assert len(list(evaluator.figures({}))) == 2
