"""Compositional benchmarks: a miniature of each release, broken files, averages of published scores, a set by name, and
real files where they are at hand.
"""

import collections
import csv
import itertools
import json
import pathlib

import numpy as np
import pytest
from colour_model import RegionModel
from conftest import load_golden
from PIL import Image
from word_model import WordModel

from flair_jax import evaluation_sets, evaluation_tasks
from flair_jax.data.benchmarks import aro, compositional, pairs, sugarcrepe, suites, table, valse, vl_checklist
from flair_jax.data.benchmarks.base import AnnotationError, Item, MissingError, Picture
from flair_jax.data.transforms.images import ImageError, Preprocessing
from flair_jax.evaluators.choice import average
from flair_jax.report import Result, SetDetails

SHARED = pathlib.Path(__file__).parents[2] / "shared"  # beside the checkout
ANNOTATIONS, PHOTOS = SHARED / "annotations", SHARED / "photos/coco_val2017_283/images/val2017"


def write(root: pathlib.Path, path: str, content) -> pathlib.Path:
    """Writes JSON, lines of JSON for `.jsonl`, rows of texts for `.csv`."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows(content)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(json.dumps(content))
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Miniatures. Each returns the items that it should be read as: paths of images, texts, and other fields of `Item`.


def sugarcrepe_files(root):
    row = {"filename": "000000000001.jpg", "caption": "a cat", "negative_caption": "a dog"}
    write(root, "sugarcrepe/add_obj.json", {"0": row, "7": {**row, "caption": "a red cat"}})  # keys have gaps
    write(root, "sugarcrepe/data/swap_att.json", {"3": {**row, "filename": "2.jpg"}})  # as in the repository
    image, other = "coco/images/val2017/000000000001.jpg", "coco/images/val2017/2.jpg"
    return [
        ([image], ["a cat", "a dog"], {"group": "add/add_obj"}),
        ([image], ["a red cat", "a dog"], {"group": "add/add_obj"}),
        ([other], ["a cat", "a dog"], {"group": "swap/swap_att"}),
    ]


def sugarcrepe_pp_files(root):
    (root / "coco/val2017").mkdir(parents=True)
    row = {"id": 0, "filename": "1.jpg", "caption": "a", "caption2": "b", "negative_caption": "c"}
    write(root, "sugarcrepe_pp/swap_obj.json", [row])
    return [(["coco/val2017/1.jpg"], ["a", "b", "c"], {"positives": 2, "group": "swap_obj"})]


def valse_files(root):
    row = {"image_file": "1.jpg", "caption": "yes", "foil": "no", "mturk": {"caption": 2, "foil": 1, "other": 0}}
    refused = {**row, "mturk": {"caption": 1, "foil": 2, "other": 0}}
    write(root, "valse/existence.json", {"a": row, "b": refused})
    write(root, "valse/data/actant-swap.json", {"a": refused, "b": row})
    return [
        (["valse/visual7w/images/1.jpg"], ["yes", "no"], {"group": "existence"}),
        (["valse/actions/images_512/1.jpg"], ["yes", "no"], {"group": "action/actant-swap"}),
    ]


def vl_checklist_files(root):
    (root / "vg/VG_100K_2").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "vg/VG_100K_2/2.jpg")
    texts = {"POS": ["metal legs", "unused"], "NEG": ["cloth legs", "unused"]}
    rows = [[f"VG_100K_2/{number}.jpg", texts] for number in range(1001)]
    write(root, "vl_checklist/Attribute/vg/material.json", rows)
    write(root, "vl_checklist/Object/Location/swig_location/swig_item/swig_item_mid.json", [["milking_22.jpg", texts]])
    write(root, "vl_checklist/data/Object/Size/hake_size/hake_obj_small.json", [])
    pair = ["metal legs", "cloth legs"]
    swig = (["vl_checklist/swig/milking_22.jpg"], pair, {"group": "Object/Location_mid/swig/item"})
    folders = ["vl_checklist/vg" if number != 2 else "vg" for number in range(1000)]
    names = [f"{folder}/VG_100K_2/{number}.jpg" for number, folder in enumerate(folders)]
    return [swig, *(([name], pair, {"group": "Attribute/material/vg"}) for name in names)]


def aro_files(root):
    row = {"image_path": "9.jpg", "bbox_x": 1, "bbox_y": 2, "bbox_w": 30, "bbox_h": 40}
    row |= {"true_caption": "right", "false_caption": "wrong"}
    relations = [{**row, "relation_name": name} for name in ("on", "attached to", "near/at")]
    write(root, "aro/visual_genome_relation.json", relations)
    pairs = [["red", "big"]] * 25 + [["old", "wet"]] * 24
    write(root, "aro/visual_genome_attribution.json", [{**row, "attributes": pair} for pair in pairs])
    order = {"image": "val2014/COCO_1.jpg", "caption_options": ["a b", "b a", "a a", "b b", "b"]}
    write(root, "aro/coco_order.json", [order])
    write(root, "aro/flickr30k_order.json", [{**order, "image": "flickr30k-images/5.jpg"}])
    box = "aro/images/9.jpg", (1, 2, 31, 42)

    def about(group):
        return [box], ["right", "wrong"], {"group": group, "place": 1}

    return [
        about("VG_Relation/on"),
        about("VG_Relation/near at"),  # a slash in a name makes no part
        *[about("VG_Attribute/red_big")] * 25,
        (["coco/images/val2014/COCO_1.jpg"], order["caption_options"], {"group": "COCO_Order"}),
        (["flickr30k/flickr30k-images/5.jpg"], order["caption_options"], {"group": "Flickr30k_Order"}),
    ]


def crepe_files(root):
    columns = ["image_id", "caption", "x", "y", "width", "height", "hard_negs"]
    rows = [columns, ["7", 'a "big" cat, lying', "1", "2", "30", "40", "['a dog', \"no cat\"]"]]
    write(root, "crepe/atom/prod_vg_hard_negs_atom_complexity_4.csv", rows)
    write(root, "crepe/data/prod_hard_negatives/swap/prod_vg_hard_negs_swap_complexity_12.csv", rows)
    image, texts = ("crepe/images/7.jpg", (1, 2, 31, 42)), ['a "big" cat, lying', "a dog", "no cat"]
    return [([image], texts, {"group": group}) for group in ("atom/complexity_4", "swap/complexity_12")]


def whatsup_files(root):
    captions = ["a mug left of a table", "a mug right of a table", "a mug on a table", "a mug under a table"]
    rows = [
        {"image_path": f"data/controlled_images/mug_{name}.jpeg", "caption_options": captions}
        for name in ("left_of_table", "on_table")
    ]
    write(root, "whatsup/controlled_images_dataset.json", rows)
    write(
        root,
        "whatsup/data/controlled_clevr_dataset.json",
        [{"image_path": "data/controlled_clevr/mug_in-front_of_cup.jpeg", "caption_options": captions[:2]}],
    )
    write(root, "whatsup/coco_qa_one_obj.json", [[42, "a cat on the left", "a cat on the right"]])
    write(root, "whatsup/vg_qa_two_obj.json", [["2317", "true", "false"]])
    left, on, front = "mug table, left or right", "mug table, on or under", "mug cup, in front or behind"
    folder = "whatsup/controlled_images"

    def joint(pair, objects):
        return {"joint": (("pair", pair), ("set", objects))}

    return [
        ([f"{folder}/mug_left_of_table.jpeg"], captions, {"group": "WhatsUp_A", **joint(left, "mug table")}),
        ([f"{folder}/mug_on_table.jpeg"], captions, {"group": "WhatsUp_A", **joint(on, "mug table")}),
        (
            ["whatsup/controlled_clevr/mug_in-front_of_cup.jpeg"],
            captions[:2],
            {"group": "WhatsUp_B", **joint(front, "mug cup")},
        ),
        (
            ["whatsup/val2017/000000000042.jpg"],
            ["a cat on the left", "a cat on the right"],
            {"group": "COCO_QA_ONE"},
        ),
        (["whatsup/vg_images/2317.jpg"], ["true", "false"], {"group": "VG_QA_TWO"}),
    ]


def imagecode_files(root):
    write(root, "imagecode/valid_data.json", {"open-images-1_a": {"2": "a deer"}, "video7": {"0": "a girl"}})
    folder = root / "imagecode/image-sets/video7"
    folder.mkdir(parents=True)
    for number in range(1, 11):  # in a real folder the names may start anywhere, and img10 is after img9
        (folder / f"img{number}.jpg").write_bytes(b"")
    static = [f"imagecode/image-sets/open-images-1_a/img{number}.jpg" for number in (2, 0, 1, *range(3, 10))]
    video = [f"imagecode/image-sets/video7/img{number}.jpg" for number in range(1, 11)]
    return [(static, ["a deer"], {"group": "static", "place": 2}), (video, ["a girl"], {"group": "videos"})]


def svo_files(root):
    columns = ["sentence", "pos_triplet", "neg_triplet", "pos_url", "neg_url", "pos_image_id", "neg_image_id"]
    columns += ["subj_neg", "verb_neg", "obj_neg"]
    row = ["A man, walking.", "man,walk,", "man,sit,", "http://a", "http://b", "12", "5", "False", "True", "False"]
    write(root, "svo_probes/svo_probes.csv", [columns, row])
    return [(["svo_probes/images/12.jpg", "svo_probes/images/5.jpg"], ["A man, walking."], {"group": "verb_neg"})]


def winoground_files(root):
    row = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a b", "caption_1": "b a"}
    write(root, "winoground/examples.jsonl", [{**row, "tag": "x", "collapsed_tag": "Object"}])
    images = [f"winoground/images/ex_0_img_{number}.png" for number in (0, 1)]
    return [(images, ["a b", "b a"], {"group": "Object"})]


def eqben_files(root):
    row = {"image0": "eqbensd/0.png", "image1": "eqbensd/1.png", "caption0": "a", "caption1": "b"}
    cooking = {"image0": "eqbenyoucook2/0.npy", "image1": "eqbenyoucook2/1.npy", "caption0": "a", "caption1": "c"}
    genome = {"image0": "eqbenag/v/0.png", "image1": "eqbenag/v/1.png", "caption0": ["d", "x"], "caption1": ["e"]}
    winoground = {"image_0": "eqbenkubric_cnt/0.png", "image_1": "eqbenkubric_cnt/1.png"}
    winoground |= {"caption_0": "one", "caption_1": "two"}
    content = {
        "sd": [row],
        "youcook2": {"video": [cooking]},
        "ag": {"video": {"man": [genome]}},
        "kubric": [winoground],
    }
    write(root, "eqben/private_info_global.json", content)

    def both(name, suffix="png"):
        return [f"eqben/images/{name}/{number}.{suffix}" for number in (0, 1)]

    return [
        (both("eqbensd"), ["a", "b"], {"group": "eqbensd"}),
        (both("eqbenyoucook2", "npy"), ["a", "c"], {"group": "eqbenyoucook2"}),
        (both("eqbenag/v"), ["d", "e"], {"group": "eqbenag"}),
        (both("eqbenkubric_cnt"), ["one", "two"], {"group": "eqbenkubric/eqbenkubric_cnt"}),
    ]


def cola_files(root):
    address = "https://cs-people.bu.edu/array/data/vg_gqa_images"
    rows = [[f"{address}/1.jpg", "red cat, blue dog", f"{address}/2.jpg", "blue cat, red dog"]]
    write(root, "cola/data/COLA_multiobjects_matching_benchmark.json", rows)
    return [(["cola/images/1.jpg", "cola/images/2.jpg"], ["red cat, blue dog", "blue cat, red dog"], {})]


def counterfactuals_files(root):
    row = {"id": "5_0", "image_0": "5_0_img_0", "image_1": "5_0_img_1", "caption_0": "a cat", "caption_1": "a dog"}
    write(root, "coco_counterfactuals/data/examples.jsonl", [row])
    images = [f"coco_counterfactuals/images/5_0_img_{number}.jpg" for number in (0, 1)]
    return [(images, ["a cat", "a dog"], {})]


def spec_files(root):
    write(root, "spec/count/image2text.json", [{"query": "img/3.jpg", "keys": ["one", "two", "three"], "label": 2}])
    keys = ["img/1.jpg", "img/2.jpg"]
    write(root, "spec/data/existence/text2image.json", [{"query": "a cat", "keys": keys, "label": 0}])
    folder = "spec/data/existence/img"
    return [
        ([f"{folder}/1.jpg", f"{folder}/2.jpg"], ["a cat"], {"group": "existence"}),
        (["spec/count/img/3.jpg"], ["three", "one", "two"], {"group": "count", "place": 2}),
    ]


def fg_ovd_files(root):
    row = {"img_path": "val2017/1.jpg", "bbox": [1, 2, 30, 40], "width": 64, "height": 48}
    row |= {"pos_expression": ["A Cat."], "neg_expression": ["A dog.", "A cow."]}
    literals = {name: str(row[name]) for name in ("bbox", "pos_expression", "neg_expression")}
    write(root, "fg_ovd/h_attributes_llava.jsonl", [row, {**row, **literals, "img_path": "train2017/2.jpg"}])
    native = {
        "images": [{"id": 5, "file_name": "val2017/1.jpg", "width": 64, "height": 48}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(("A cup", "A pan", "A pot"))],
        "annotations": [{"image_id": 5, "bbox": [1, 2, 30, 40], "category_id": 2, "neg_category_ids": [0, 1]}],
    }
    write(root, "fg_ovd/benchmarks/color.json", native)
    box = (1, 2, 31, 42)
    texts = ["a cat.", "a dog.", "a cow."]
    return [
        ([("coco/images/val2017/1.jpg", box)], texts, {"group": "hard"}),
        ([("coco/images/train2017/2.jpg", box)], texts, {"group": "hard"}),
        ([("coco/images/val2017/1.jpg", box)], ["a pot", "a cup", "a pan"], {"group": "color"}),
    ]


MINIATURES = {
    "sugarcrepe": sugarcrepe_files,
    "sugarcrepe_pp": sugarcrepe_pp_files,
    "valse": valse_files,
    "vl_checklist": vl_checklist_files,
    "aro": aro_files,
    "crepe": crepe_files,
    "whatsup": whatsup_files,
    "imagecode": imagecode_files,
    "svo_probes": svo_files,
    "winoground": winoground_files,
    "eqben": eqben_files,
    "cola": cola_files,
    "coco_counterfactuals": counterfactuals_files,
    "spec": spec_files,
    "fg_ovd": fg_ovd_files,
}
WHOLE = {"aro", "imagecode", "svo_probes", "winoground", "eqben", "cola", "coco_counterfactuals"}


def read(root, name):
    [benchmark] = table.select([name])
    return benchmark.read(root)


def test_every_set_has_a_miniature():
    assert set(MINIATURES) == {name for name, benchmark in table.ALL.items() if benchmark.task == "choice"}


@pytest.mark.parametrize("name", MINIATURES)
def test_a_set_is_read_by_name(name, tmp_path):
    expected = MINIATURES[name](tmp_path)
    data = read(tmp_path, name)
    found = []
    for item in data.items:
        pictures = [data.pictures[number] for number in item.images]
        names = [str(pathlib.Path(picture.path).relative_to(tmp_path)) for picture in pictures]
        boxes = [picture.box for picture in pictures]
        images = [name if box is None else (name, box) for name, box in zip(names, boxes, strict=True)]
        found.append((images, [data.texts[number] for number in item.texts], item))
    for (images, texts, fields), (found_images, found_texts, item) in zip(expected, found, strict=True):
        assert (found_images, found_texts) == (images, texts)
        assert item == Item(item.images, item.texts, **fields)
    assert len(set(data.pictures)) == len(data.pictures) and len(set(data.texts)) == len(data.texts)
    assert bool(data.parts) == (name not in WHOLE)
    with pytest.raises(MissingError):
        read(tmp_path / "nowhere", name)


@pytest.mark.parametrize("name", MINIATURES)
def test_files_of_the_table_are_those_that_are_read(name, tmp_path):
    """Each annotation file of a miniature is one of the table's, and is counted."""
    MINIATURES[name](tmp_path)
    counted = set()
    for file in table.ALL[name].files:
        for path in file.path.split("|"):
            if file.count is not None and (tmp_path / path).is_file():
                assert file.count(tmp_path / path) >= 0
                counted.add(tmp_path / path)
    annotations = {path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".csv")}
    assert counted == annotations or (name == "eqben" and not counted)


def test_options_are_those_of_the_evaluator():
    from flair_jax.evaluate import _keywords
    from flair_jax.evaluators import Choice

    for name in MINIATURES:
        assert set(table.ALL[name].options) <= set(_keywords(Choice)), name


@pytest.mark.parametrize(
    ("name", "path", "content", "message"),
    [
        ("sugarcrepe", "sugarcrepe/add_obj.json", [], "is '\\[\\]', list; expected an object"),
        ("sugarcrepe", "sugarcrepe/add_obj.json", {}, "add_obj.json: no items"),
        (
            "sugarcrepe",
            "sugarcrepe/add_obj.json",
            {"0": {"filename": "1.jpg", "caption": "a"}},
            "no 'negative_caption'",
        ),
        (
            "sugarcrepe",
            "sugarcrepe/add_obj.json",
            {"0": {"filename": "../1.jpg", "caption": "a", "negative_caption": "b"}},
            "expected a path inside",
        ),
        ("valse", "valse/existence.json", {"0": {"mturk": {"caption": "3"}}}, "expected an integer"),
        ("vl_checklist", "vl_checklist/Attribute/vg/size.json", [["1.jpg"]], r"expected \[image, \{POS, NEG\}\]"),
        (
            "vl_checklist",
            "vl_checklist/Attribute/vg/size.json",
            [["1.jpg", {"POS": [], "NEG": ["a"]}]],
            "list of texts",
        ),
        ("vl_checklist", "vl_checklist/Attribute/vg/size.json", [], "no items"),
        ("aro", "aro/coco_order.json", [{"image": "1.jpg", "caption_options": ["a"]}], "one caption"),
        (
            "aro",
            "aro/visual_genome_relation.json",
            [{"relation_name": "on", "image_path": "1.jpg", "bbox_x": 0, "bbox_y": 0, "bbox_w": 0, "bbox_h": 5}],
            "width, height > 0",
        ),
        ("crepe", "crepe/atom/prod_vg_hard_negs_atom_complexity_4.csv", [["image_id"]], "no columns"),
        (
            "crepe",
            "crepe/atom/prod_vg_hard_negs_atom_complexity_4.csv",
            [
                ["image_id", "caption", "x", "y", "width", "height", "hard_negs"],
                [1, "a", 0, 0, 1, 1, "__import__('os')"],
            ],
            "is no Python literal",
        ),
        ("whatsup", "whatsup/coco_qa_one_obj.json", [[1, "a"]], "expected .image, true caption"),
        ("imagecode", "imagecode/valid_data.json", {"a": {"10": "b"}}, "0 to 9"),
        ("svo_probes", "svo_probes/svo_probes.csv", [["sentence"]], "no columns"),
        ("winoground", "winoground/examples.jsonl", [{"image_0": "a"}], "record 1: no 'image_1'"),
        ("eqben", "eqben/private_info_global.json", {"a": [1]}, "expected image0, image1"),
        ("cola", "cola/data/COLA_multiobjects_matching_benchmark.json", [["a", "b"]], "has 2 entries"),
        ("spec", "spec/count/image2text.json", [{"query": "a", "keys": ["b", "c"], "label": 2}], "label 2 of 2 keys"),
        ("fg_ovd", "fg_ovd/1_attributes.json", {"images": [], "categories": []}, "no 'annotations'"),
        (
            "fg_ovd",
            "fg_ovd/1_attributes.json",
            {
                "images": [{"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}],
                "categories": [{"id": 0, "name": "a"}],
                "annotations": [{"image_id": 1, "category_id": 0, "neg_category_ids": [[]], "bbox": [0, 0, 1, 1]}],
            },
            "'neg_category_ids' is .*expected an integer",
        ),
        ("fg_ovd", "fg_ovd/h_attributes_llava.jsonl", [{"bbox": "[1, 2"}], "is no Python literal"),
    ],
)
def test_broken_files_are_named(name, path, content, message, tmp_path):
    write(tmp_path, path, content)
    with pytest.raises(AnnotationError, match=message) as error:
        read(tmp_path, name)
    assert pathlib.Path(path).name in str(error.value)


def test_the_tenth_of_eqben_that_its_release_has_beside_the_whole(tmp_path):
    names = [f"eqbensd/{number}.png" for number in (0, 1)]
    row = {"image0": names[0], "image1": names[1], "caption0": "a", "caption1": "b"}
    write(tmp_path, "eqben/eqben_subset_10percent_final.json", [row])
    (tmp_path / "eqben/image_subset/eqbensd").mkdir(parents=True)
    for name in names:
        (tmp_path / "eqben/image_subset" / name).write_bytes(b"")
    data = read(tmp_path, "eqben")
    assert [picture.path for picture in data.pictures] == [
        str(tmp_path / "eqben/image_subset" / name) for name in names
    ]
    assert data.counts()["items"] < table.ALL["eqben"].expected()["items"]  # which marks its numbers in the report
    write(tmp_path, "eqben/private_info_global.json", [{**row, "caption0": "of the whole"}])
    assert read(tmp_path, "eqben").texts == ["of the whole", "b"]


def test_items_without_all_their_images_are_left_out(tmp_path):
    MINIATURES["whatsup"](tmp_path)
    data = read(tmp_path, "whatsup")
    kept = data.keep(np.array([True, False, True, False, True]))
    assert [item.group for item in kept.items] == ["WhatsUp_A", "WhatsUp_B", "VG_QA_TWO"]
    assert [item.images for item in kept.items] == [(0,), (1,), (2,)]


def test_counterfactuals_as_retrieval(tmp_path):
    rows = [{"image_0": f"{n}_0", "image_1": f"{n}_1", "caption_0": f"a {n}", "caption_1": f"b {n}"} for n in range(10)]
    write(tmp_path, "coco_counterfactuals/examples.jsonl", rows)
    data = read(tmp_path, "coco_counterfactuals_retrieval")
    assert data.counts() == {"images": 6, "texts": 6} and data.image_of_text.tolist() == [0, 1, 2, 3, 4, 5]
    names = [pathlib.Path(picture.path).stem for picture in data.pictures]
    assert [f"{'ab'[int(name[-1])]} {name[0]}" for name in names] == data.texts
    assert data.texts == read(tmp_path, "coco_counterfactuals_retrieval").texts


def test_relations_that_do_not_count():
    assert len(aro.EXCLUDED) == 157 and {"adjusting", "attached to", "by"} <= aro.EXCLUDED


SINGLE = "cola/data/COLA_singleobjects_benchmark_{}.json"
LABELS = ["square white plate", "red cup"]


@pytest.mark.parametrize("part", ["GQA", "CLEVR", "PACO"])
def test_single_objects_of_cola(part, tmp_path):
    [benchmark] = table.select([f"cola_single_{part.lower()}"])
    with pytest.raises(MissingError):
        benchmark.read(tmp_path)
    images = {"GQA": "vg/VG_100K/1.jpg", "CLEVR": "clevr/images/val/1.jpg", "PACO": "coco/train2017/1.jpg"}
    (tmp_path / images[part]).parent.mkdir(parents=True)
    (tmp_path / images[part]).write_bytes(b"")
    objects = [] if part == "PACO" else [{"plate": ["white"]}]
    rows = [["/home/x/1.jpg", *objects, [1, 0], [1, 1]], ["2.jpg", *objects, [0, 1], [1, 0]]]
    content = {"labels": LABELS, "data": rows}
    for form in (content, list(content.values())):
        write(tmp_path, SINGLE.format(part), form)
        data = benchmark.read(tmp_path)
        assert data.pictures[0].path == str(tmp_path / images[part]) and data.pictures[1].path.endswith("/2.jpg")
        assert data.labels.tolist() == [[True, False], [False, True]]
        assert data.counted.tolist() == [[True, True], [True, False]]
        assert data.classes == [(label,) for label in LABELS] and data.templates == ("{c}",)
        assert (
            data.counts() == {"images": 2, "classes": 2}
            and benchmark.files[0].count(tmp_path / SINGLE.format(part)) == 2
        )
    kept = data.keep(np.array([False, True]))
    assert kept.labels.tolist() == [[False, True]] and kept.counted.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["1.jpg", {}, [1], [1, 0]]], r"'data'\[0\]: \[1\]; expected 0 or 1 for each of 2 classes"),
        ([["1.jpg", {}, [1, 2], [1, 0]]], r"\[1, 2\]; expected 0 or 1"),
        ([["1.jpg", [1, 0]]], "has 2 entries"),
        ([["1.jpg", [1, 0], [1, 0]], ["a/1.jpg", [1, 0], [1, 0]]], "2 images, of which 1 differ"),
        ([["..", [1, 0], [1, 0]]], "expected a path inside"),
        ([], "0 images"),
    ],
)
def test_broken_files_of_single_objects_are_named(rows, message, tmp_path):
    write(tmp_path, SINGLE.format("GQA"), {"labels": LABELS, "data": rows})
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, "cola_single_gqa")


# ---------------------------------------------------------------------------------------------------------------------
# Averages: the published scores of the parts give the published score of the whole


def parts_of(name: str, scores: dict[str, float]) -> tuple[list[float], list[str], list[int]]:
    """Scores, groups and sizes of a set's parts, for the names that the published file has them under."""
    if name == "sugarcrepe":
        rows = [(f"sugarcrepe::{part}", sugarcrepe.group(part), size) for part, size in sugarcrepe.SIZES.items()]
    elif name == "valse":
        rows = [(f"valse::{part}", row[0], row[2]) for part, row in valse.PARTS.items()]
    elif name == "vl_checklist":  # published for the second level alone
        groups = dict.fromkeys("/".join(group.split("/")[:2]) for group in vl_checklist.FILES)
        rows = [(f"vl_checklist::{group.replace('/', '_')}", group, 1) for group in groups]
    elif name == "eqben":
        rows = [(f"eqben::{part}::group", group, size) for part, (group, size) in pairs.EQBEN_PARTS.items()]
    elif name == "imagecode":
        rows = [("imagecode::videos", "videos", 1872), ("imagecode::static", "static", 430)]
    else:
        rows = [(key, key.split("::")[1], 1) for key in scores if key.startswith(f"{name}::")]
    return [scores[key] for key, _, _ in rows], [group for _, group, _ in rows], [size for _, _, size in rows]


@pytest.mark.golden
@pytest.mark.parametrize(
    "name",
    ["aro", "crepe", "sugarcrepe", "valse", "vl_checklist", "whatsup", "imagecode", "svo_probes", "eqben"],
)
def test_averages_equal_the_published_ones(name):
    for model in load_golden("fsc_clip/aggregation.json"):
        values, groups, sizes = parts_of(name, model["sub"])
        sizes = np.minimum(sizes, 2000) if name == "eqben" else sizes  # its parts are averaged whatever their sizes
        items = [np.full(size, value) for value, size in zip(values, sizes, strict=True)]
        found = average(np.concatenate(items), np.repeat(groups, sizes), table.ALL[name].options.get("levels"))
        assert found[""] == pytest.approx(model["aggregate"][name], rel=1e-7)


def test_suites_average_the_published_scores_of_their_sets():
    """Of each model whose scores of all eleven sets are published, and whose average is."""
    [suite] = suites.SUITES
    expected = {(one.model, one.source): one.value for one in suite.published if one.metric == "Comp"}
    checked = 0
    for (model, source), scores in compositional.SCORES.items():
        if None in scores or (model, source) not in expected:
            continue
        results = results_of(suite.averages["Comp"], scores)
        [(found, _)] = evaluation_sets.averages(results, [])
        assert [(one.metric, one.value) for one in found] == [
            ("Comp", pytest.approx(expected[model, source], abs=1e-4))
        ]
        checked += 1
    assert checked == 3


# FSC-CLIP's table 9: OpenAI CLIP ViT-B/32, FSC-CLIP and FSC-CLIP LoRA on LAION-COCO; with the average it gives.
ZERO_SHOT = {
    57.1: "88.3 89.8 65.1 17.2 44.4 45.5 42.3 19.7 66.7 84.0 32.6 55.9 63.3 27.4 48.3 87.1 60.6 58.6 60.0 59.7 82.6",
    55.33: "86.5 87.5 65.7 15.3 42.4 43.9 48.9 14.9 55.5 80.5 31.6 55.9 58.1 29.1 52.4 84.2 61.0 56.0 56.9 52.0 83.6",
    55.91: "85.9 88.5 66.3 15.8 39.8 52.8 48.2 14.2 57.0 81.0 27.9 56.3 57.4 33.9 54.3 82.7 59.8 57.2 58.7 52.6 83.7",
}


def results_of(members, scores, form=0):
    """Results of the given scores in percent, for the first (0) or the last (-1) form of each set."""
    ones = [suites.either(member)[form] for member in members]
    return [Result(*one, score / 100, "global") for one, score in zip(ones, scores, strict=True)]


@pytest.mark.parametrize("form", [0, -1])
@pytest.mark.parametrize("average", ZERO_SHOT)
def test_zero_shot_is_the_mean_of_the_21_sets_of_the_paper_whichever_form_of_them_is_there(average, form):
    [suite] = suites.SUITES
    assert average in [round(100 * one.value, 2) for one in suite.published if one.metric == "ZS"]
    scores = [float(score) for score in ZERO_SHOT[average].split()]
    results = results_of(suite.averages["ZS"], scores, form)
    [([found], details)] = evaluation_sets.averages(results, [])
    assert found.metric == "ZS" and found.value == pytest.approx(average / 100, abs=6e-4)
    assert "EuroSAT" in details.notes[0]
    assert not list(evaluation_sets.averages(results[1:], []))


def test_of_a_set_that_was_evaluated_twice_the_first_form_counts():
    [suite] = suites.SUITES
    first = results_of(suite.averages["ZS"], [50.0] * 21)
    others = results_of(suite.averages["ZS"], [0.0] * 21, -1)
    others = [one for one in others if one.name not in {other.name for other in first}]
    assert len(others) == 16
    [([found], _)] = evaluation_sets.averages(others + first, [])
    assert found.value == 0.5


def test_members_of_suites_are_results_of_sets():
    for suite in suites.SUITES:
        for task, name, _ in itertools.chain(*map(suites.either, itertools.chain(*suite.averages.values()))):
            assert table.ALL[name].task == task


def test_averages_stand_in_the_report():
    retrieval = [
        Result("retrieval", name, metric, value, mode)
        for value, name in zip((0.2, 0.4, 0.9), suites.RETRIEVAL, strict=True)
        for mode in ("global", "flair")
        for metric in ("text_to_image_R@1", "image_to_text_R@1")
        if (name, mode) != ("flickr30k_test", "flair")
    ]
    partly = SetDetails("retrieval", "flickr30k_test", title="Flickr30k", left_out=3)
    [(results, details)] = evaluation_sets.averages(retrieval, [partly])
    assert [(result.name, result.value) for result in results] == [
        ("average/fsc_clip/global/I2T", pytest.approx(0.5)),
        ("average/fsc_clip/global/T2I", pytest.approx(0.5)),
    ]
    assert details.left_out == 3 and details.published and details.reservations()
    assert not list(evaluation_sets.averages(retrieval[:4], []))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_a_box_is_cut_out_of_a_resized_copy(tmp_path):
    image = Image.new("RGB", (64, 32))
    image.paste((255, 0, 0), (16, 8, 32, 24))
    image.save(tmp_path / "a.png")
    box = (32, 16, 64, 48)  # in an image of twice the size
    cut = Picture(str(tmp_path / "a.png"), box=box, box_in=(128, 64)).decode()
    assert cut.size == (16, 16) and np.asarray(cut).min((0, 1)).tolist() == [255, 0, 0]
    assert Picture(str(tmp_path / "a.png"), box=(16, 8, 32, 24)).decode().size == (16, 16)
    with pytest.raises(ImageError, match="its boxes are those of an image of 64 x 128"):
        Picture(str(tmp_path / "a.png"), box=box, box_in=(64, 128)).decode()
    over = Picture(str(tmp_path / "a.png"), box=(16, 8, 32, 64)).decode()  # reaches below the image: black there
    assert over.size == (16, 56) and over.getpixel((0, 0)) == (255, 0, 0) and over.getpixel((0, 50)) == (0, 0, 0)
    for outside in ((64, 0, 80, 8), (-9, 0, 0, 8), (8, 8, 8, 9)):
        with pytest.raises(ImageError, match="is outside of its"):
            Picture(str(tmp_path / "a.png"), box=outside).decode()
    with pytest.raises(ImageError, match=r"the box .* pixels"):
        Picture(str(tmp_path / "a.png"), box=(0, 0, 1e5, 1e5)).decode()


def test_images_as_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 6, 3), [255, 128, 0], np.uint8))
    image = pairs.ArrayPicture(str(tmp_path / "a.npy")).decode()
    assert image.size == (6, 4) and image.getpixel((0, 0)) == (0, 128, 255)
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ImageError, match=r"b\.npy"):
        pairs.ArrayPicture(str(tmp_path / "b.npy")).decode()


# ---------------------------------------------------------------------------------------------------------------------
# A set by name, with images


def sugarcrepe_with_images(root):
    colours = {"1.png": (255, 0, 0), "2.png": (0, 0, 255)}
    for name, colour in colours.items():
        (root / "coco/val2017").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), colour).save(root / "coco/val2017" / name)
    rows = [("1.png", "red", "blue"), ("2.png", "blue", "green"), ("2.png", "red", "blue"), ("3.png", "red", "blue")]
    rows = [dict(filename=name, caption=caption, negative_caption=other) for name, caption, other in rows]
    write(root, "sugarcrepe/swap_obj.json", {str(number): row for number, row in enumerate(rows)})


def test_a_set_is_evaluated_by_name(tmp_path):
    sugarcrepe_with_images(tmp_path)
    options = dict(root=str(tmp_path), sets=["sugarcrepe"], choice={"modes": ["global"]})
    model = WordModel(8)
    [refused] = evaluation_sets.evaluators(model, "sets", **options)
    assert isinstance(refused, evaluation_tasks.UnusableSet) and "1 of 3 images is missing" in refused.reason
    [evaluator] = evaluation_sets.evaluators(model, "sets", allow_missing=True, **options)
    results = {result.name: result.value for result in evaluator.run({})}
    assert evaluator.left_out == {"missing": 1}
    assert results["choice/sugarcrepe/global/accuracy"] == pytest.approx(2 / 3)
    assert results["choice/sugarcrepe/chance/accuracy/swap/swap_obj"] == 0.5
    assert [title for title, _ in evaluator.figures({})] == [
        "by part",
        "most confident wrong decisions (global)",
    ]
    (tmp_path / "coco/val2017/1.png").write_bytes(b"no image")
    [evaluator] = evaluation_sets.evaluators(model, "sets", allow_missing=True, **options)
    results = {result.name: result.value for result in evaluator.run({})}
    assert results["choice/sugarcrepe/global/accuracy"] == 0.5 and evaluator.left_out == {"missing": 1, "broken": 1}


class WordRegions(RegionModel, WordModel):
    """Its regions are the patches of 8 pixels, and its texts words."""


@pytest.mark.parametrize("modes", [None, ["regions"]])
def test_boxes_are_asked_in_their_whole_images_too(tmp_path, modes):
    """FG-OVD on two pictures, of which one is a copy of half the size; the crops alone show the right colour, too."""
    red, blue = (255, 0, 0), (0, 0, 255)
    rows = []
    for number, scale in ((1, 1), (2, 2)):
        image = Image.new("RGB", (64 // scale, 32 // scale), red)
        image.paste(blue, (32 // scale, 0, 64 // scale, 16 // scale))
        (tmp_path / "coco/val2017").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / f"coco/val2017/{number}.png")
        for box, right, wrong in (([36, 0, 28, 20], "Blue", "Red"), ([2, 14, 26, 18], "red", "blue")):
            row = {"img_path": f"val2017/{number}.png", "bbox": box, "width": 64, "height": 32}
            rows.append({**row, "pos_expression": [right], "neg_expression": [wrong, "green"]})
    write(tmp_path, "fg_ovd/h_attributes_llava.jsonl", rows)
    model = WordRegions(8, preprocessing=Preprocessing("squash", "openai"))
    options = dict(root=str(tmp_path), sets=["fg_ovd"], choice={"modes": modes}, allow_missing=True)
    [evaluator] = evaluation_sets.evaluators(model, "sets", **options)
    results = {result.name: result.value for result in evaluator.run({})}
    assert results["choice/fg_ovd/regions/accuracy/hard"] == 1
    assert results.get("choice/fg_ovd/global/accuracy/hard") == (1 if modes is None else None)
    whole = evaluation_tasks.whole_images(model, evaluator.data.pictures)
    assert whole.whole_of_image.tolist() == [0, 0, 1, 1] and len(whole.images) == 2
    np.testing.assert_allclose(whole.boxes[:2] * (64, 32, 64, 32), [[36, 0, 64, 20], [2, 14, 28, 32]], atol=1e-4)
    np.testing.assert_array_equal(whole.boxes[:2], whole.boxes[2:])
    cut = evaluation_tasks.whole_images(model.clone(preprocessing=Preprocessing()), evaluator.data.pictures)
    np.testing.assert_allclose(cut.boxes[0], [20 / 32, 0, 1, 20 / 32], atol=1e-6)  # of the 32 pixels in the middle
    unboxed = [Picture(str(tmp_path / "coco/val2017/1.png")), *evaluator.data.pictures]
    assert evaluation_tasks.whole_images(model, unboxed) is None
    assert evaluation_tasks.whole_images(WordModel(8), evaluator.data.pictures) is None
    (tmp_path / "coco/val2017/1.png").write_bytes(b"no image")
    [evaluator] = evaluation_sets.evaluators(model, "sets", **options)
    evaluator.run({})
    assert evaluator.left_out == {"broken": 2} and len(evaluator.data.items) == 2
    assert all(picture.path.endswith("2.png") for picture in evaluator.data.pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Real files


def items_of(data):
    return collections.Counter(item.group for item in data.items)


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason="needs the sets' own annotation files")
def test_real_files_have_the_published_counts():
    data = read(ANNOTATIONS, "sugarcrepe")
    assert items_of(data) == {sugarcrepe.group(part): sugarcrepe.SIZES[part] for part in data.parts}
    data = read(ANNOTATIONS, "valse")  # after the vote
    assert len(data.parts) >= 8
    assert items_of(data) == {valse.PARTS[part][0]: valse.PARTS[part][2] for part in data.parts}
    assert items_of(read(ANNOTATIONS, "sugarcrepe_pp")) == {"swap_att": 666, "swap_obj": 245, "replace_att": 788}
    assert items_of(read(ANNOTATIONS, "imagecode")) == {"videos": 1872, "static": 430}
    assert items_of(read(ANNOTATIONS, "fg_ovd")) == {"hard": 3545}
    assert max(items_of(read(ANNOTATIONS, "vl_checklist")).values()) <= 4000  # of up to four files, 1,000 of each


# Items whose images are among the photographs: annotations/README.md, which counts VALSE's rows before the vote.
PHOTOGRAPHED = {
    "sugarcrepe": {"add_att": 30, "add_obj": 117, "replace_att": 43, "replace_obj": 90, "swap_att": 47},
    "sugarcrepe_pp": {"swap_att": 47, "swap_obj": 21, "replace_att": 43},
    "valse": {"plurals": 59, "relations": 33},
    "fg_ovd": {"hard": 170},
}


@pytest.mark.skipif(not (ANNOTATIONS.exists() and PHOTOS.exists()), reason="needs annotation files and photographs")
@pytest.mark.parametrize("name", PHOTOGRAPHED)
def test_real_files_are_evaluated_on_the_photographs_at_hand(name, tmp_path):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images/val2017").symlink_to(PHOTOS)
    (tmp_path / name).symlink_to(ANNOTATIONS / name)
    options = dict(allow_missing=True, options={"modes": ("global",)})
    evaluator = evaluation_sets.SetEvaluator(WordModel(8), table.ALL[name], tmp_path, **options)
    results = {result.metric: result.value for result in evaluator.run({}) if result.mode == "global"}
    found = {group.rpartition("/")[2]: count for group, count in items_of(evaluator.data).items()}
    if name == "valse":
        rows = {part: json.loads((ANNOTATIONS / f"valse/{part}.json").read_text()).values() for part in found}
        there = {part: [row for row in of if (PHOTOS / row["image_file"]).exists()] for part, of in rows.items()}
        assert {part: len(of) for part, of in there.items()} == PHOTOGRAPHED[name]
        assert {part: sum(row["mturk"]["caption"] >= 2 for row in of) for part, of in there.items()} == found
    else:
        assert found == PHOTOGRAPHED[name]
    assert evaluator.left_out["missing"] > 0 and not evaluator.left_out["broken"]
    assert results["accuracy"] < 0.5  # most captions name no colour last, and equal scores are wrong
