"""Readers of retrieval sets and of CLIP_benchmark's layout: a miniature of every native layout, and what is refused."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from shard_files import write_tar

from flair_jax.data.benchmarks import base, clip_benchmark, long_captions, table

ANNOTATIONS = pathlib.Path(__file__).parents[2] / "shared/annotations"  # beside the checkout


def write(root, files):
    """Files by path: JSON by its ending, JSON lines, or text."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jsonl", ".jsonlines")):
            content = "".join(json.dumps(line) + "\n" for line in content)
        elif name.endswith(".json") and not isinstance(content, str):
            content = json.dumps(content)
        path.write_text(content, encoding="utf-8")
    return root


def read(root, name):
    (entry,) = table.select([name])
    return entry.read(root)


def shown(data, root):
    """Image, relative to the root -> its texts."""
    texts = {}
    for text, image in zip(data.texts, data.image_of_text, strict=True):
        texts.setdefault(str(pathlib.Path(data.pictures[image].path).relative_to(root)), []).append(text)
    assert len(texts) == len(data.pictures)
    return texts


COCO = {
    "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "a cat"},
        {"image_id": 7, "id": 2, "caption": "a dog "},
        {"image_id": 3, "id": 3, "caption": "one cat"},
    ],
}
NATIVE = {
    "images": [
        {
            "filename": "COCO_val2014_000000000007.jpg",
            "filepath": "val2014",
            "split": "test",
            "sentences": [{"raw": "a"}],
        },
        {
            "filename": "COCO_val2014_000000000008.jpg",
            "filepath": "val2014",
            "split": "val",
            "sentences": [{"raw": "b"}],
        },
    ]
}
DOCCI_LINES = [
    {
        "example_id": "test_00000",
        "split": "test",
        "image_file": "test_00000.jpg",
        "description": "A red cat. It is 3.5 m.",
    },
    {"example_id": "qual_test_00000", "split": "qual_test", "image_file": "qual_test_00000.jpg", "description": "No."},
    {"example_id": "train_00000", "split": "train", "image_file": "train_00000.jpg", "description": "No."},
]
IIW = {
    "iiw/DOCCI_Test/data.jsonl": [{"image": "test_00731", "IIW": "A toilet.\nIt is white. OK."}],
    "iiw/IIW-400/data.jsonl": [{"image/key": "aar_test_04600", "IIW": "A bee. A flower."}],
    "iiw/DCI_Test/data.jsonl": [{"image": "sa_1.jpg", "IIW": "A street"}],
}


@pytest.mark.parametrize("folders", [("coco/annotations", "coco/images"), ("coco", "coco")])
def test_coco_val2017_from_its_own_file(tmp_path, folders):
    annotations, images = folders
    (tmp_path / images / "val2017").mkdir(parents=True)
    write(tmp_path, {f"{annotations}/captions_val2017.json": COCO})
    data = read(tmp_path, "coco_val2017")
    assert shown(data, tmp_path) == {
        f"{images}/val2017/7.jpg": ["a dog "],
        f"{images}/val2017/3.jpg": ["a cat", "one cat"],
    }
    assert data.counts() == {"images": 2, "texts": 3} and data.parts == ()
    assert not data.pictures[0].exists()  # pictures are named, and nobody looked for them


def test_coco_karpathy_in_both_formats_and_with_the_images_of_2017(tmp_path):
    native = write(tmp_path / "native", {"coco/dataset_coco.json": NATIVE})
    name = "coco/images/val2014/COCO_val2014_000000000007.jpg"
    assert shown(read(native, "coco_karpathy_test"), native) == {name: ["a"]}
    short = [{"image": "val2014/COCO_val2014_000000000007.jpg", "caption": ["a"]}]
    listed = write(tmp_path / "list", {"coco/annotations/coco_karpathy_test.json": short})
    assert shown(read(listed, "coco_karpathy_test"), listed) == {name: ["a"]}
    write(listed, {"coco/train2017/000000000007.jpg": "pixels"})
    assert shown(read(listed, "coco_karpathy_test"), listed) == {"coco/train2017/000000000007.jpg": ["a"]}


@pytest.mark.parametrize("split", ["val", "test"])
def test_flickr30k_in_both_formats(tmp_path, split):
    entry = {"filename": "1.jpg", "split": split, "sentences": [{"raw": "a"}, {"raw": "b"}]}
    other = {"filename": "2.jpg", "split": "train", "sentences": [{"raw": "c"}]}
    native = write(tmp_path / "native", {"flickr30k/dataset_flickr30k.json": {"images": [entry, other]}})
    expected = {"flickr30k/flickr30k-images/1.jpg": ["a", "b"]}
    assert shown(read(native, f"flickr30k_{split}"), native) == expected
    own = [{"image": "flickr30k-images/1.jpg", "caption": ["a", "b"]}]
    listed = write(tmp_path / "list", {f"flickr30k/flickr30k_{split}.json": own})
    assert shown(read(listed, f"flickr30k_{split}"), listed) == expected


def test_docci_whole_and_by_sentences_from_three_formats(tmp_path):
    native = write(tmp_path / "native", {"docci/docci_descriptions.jsonlines": DOCCI_LINES})
    picture = "docci/images/test_00000.jpg"
    assert shown(read(native, "docci"), native) == {picture: ["A red cat. It is 3.5 m."]}
    sentences = {picture: ["A red cat", "It is 3", "5 m"]}  # the reference's rule knows no decimals
    assert shown(read(native, "docci_fg"), native) == sentences
    rows = [{"filename": f"path/to/{line['image_file']}", "caption": line["description"]} for line in DOCCI_LINES]
    goal = write(tmp_path / "goal", {"docci/docci_test_goal.json": rows})
    assert shown(read(goal, "docci_fg"), goal) == sentences
    annotations = [{"image_id": 0, "image": "test_00000.jpg", "caption": text} for text in sentences[picture]]
    cut = write(tmp_path / "cut", {"docci/annotations/test_annotations.json": {"annotations": annotations}})
    assert shown(read(cut, "docci_fg"), cut) == sentences
    with pytest.raises(base.MissingError, match=r"docci_descriptions\.jsonlines"):
        read(cut, "docci")


def test_iiw_whole_and_by_sentences(tmp_path):
    root = write(tmp_path, IIW)
    assert shown(read(root, "iiw"), root) == {
        "iiw/docci/test_00731.jpg": ["A toilet. It is white. OK"],  # joined again, no stop at the end
        "iiw/docci_aar/aar_test_04600.jpg": ["A bee. A flower"],
        "iiw/dci/sa_1.jpg": ["A street"],
    }
    data = read(root, "iiw_fg")
    assert list(data.texts) == ["A toilet", "It is white", "A bee", "A flower", "A street"]  # "OK" has 2 characters
    assert data.image_of_text.tolist() == [0, 0, 1, 1, 2] and data.parts == ()

    (root / "iiw/IIW-400/data.jsonl").unlink()
    for name in ("iiw", "iiw_fg"):
        part = read(root, name)
        assert part.parts == ("DOCCI_Test", "DCI_Test") and len(part.pictures) == 2
    annotations = [
        {"image_id": 0, "image": "docci/test_00731.jpg", "caption": "A toilet", "caption_id": 0},
        {"image_id": 1, "image": "docci_aar/aar_test_04600.jpg", "caption": "A bee", "caption_id": 1},
    ]
    write(root, {"iiw/test_annotations.json": {"annotations": annotations}})
    assert read(root, "iiw_fg").counts() == {"images": 2, "texts": 2} and not read(root, "iiw_fg").parts
    annotations[1]["image_id"] = 0
    write(root, {"iiw/test_annotations.json": {"annotations": annotations}})
    with pytest.raises(base.AnnotationError, match=r"annotations\[1\]: image_id 0 is that of 'docci/test_00731.jpg'"):
        read(root, "iiw_fg")


def test_images_of_docci_and_dci_serve_iiw(tmp_path):
    root = write(tmp_path, IIW)
    for folder in ("docci/images", "dci/densely_captioned_images/photos"):
        (root / folder).mkdir(parents=True)
    folders = {str(pathlib.Path(picture.path).relative_to(root).parent) for picture in read(root, "iiw").pictures}
    assert folders == {"docci/images", "iiw/docci_aar", "dci/densely_captioned_images/photos"}


def test_iiw_in_the_folder_of_the_reference_and_of_its_release(tmp_path):
    files = {path.replace("iiw/", "imageinwords/datasets/"): rows for path, rows in IIW.items()}
    root = write(tmp_path, files | {"imageinwords/docci/test_00731.jpg": ""})
    first, *_ = read(root, "iiw").pictures
    assert first.exists() and first.path.endswith("imageinwords/docci/test_00731.jpg")
    rows = [{"image_id": 0, "image": "docci/test_00731.jpg", "caption": "A toilet", "caption_id": 0}]
    other = write(tmp_path / "own", {"imageinwords/test_annotations.json": {"annotations": rows}})
    assert read(other, "iiw_fg").texts == ["A toilet"]


def test_dci_all_splits_and_its_test_split(tmp_path):
    base_folder = "dci/densely_captioned_images"
    splits = {"train": ["1.json"], "valid": [], "test": ["2.json"]}
    files = {
        f"{base_folder}/annotations/{number}.json": {
            "image": f"sa_{number}.jpg", "short_caption": f"Short {number}.", "extra_caption": "More. Yet more.",
        }
        for number in (1, 2)
    }  # fmt: skip
    root = write(tmp_path, {f"{base_folder}/splits.json": splits, **files})
    test = {f"{base_folder}/photos/sa_2.jpg": ["Short 2. More. Yet more"]}
    assert shown(read(root, "dci_test"), root) == test
    assert shown(read(root, "dci"), root) == {f"{base_folder}/photos/sa_1.jpg": ["Short 1. More. Yet more"], **test}
    (root / f"{base_folder}/annotations/1.json").unlink()
    with pytest.raises(base.MissingError, match=r"1 of 2 files of dci/.*/annotations, such as 1\.json"):
        read(root, "dci")


def test_urban1k_from_its_folders_and_from_json(tmp_path):
    names = {f"Urban1k/caption/{number}.txt": f"Text\u2028{number}.\r\n\r\n" for number in (1, 10, 2)}
    root = write(tmp_path / "native", {**names, "Urban1k/caption/3.txt": ""})
    (root / "Urban1k/image").mkdir()
    (root / "Urban1k/caption/._1.txt").write_bytes(b"\xff Mac OS X")
    texts = {f"Urban1k/image/{number}.jpg": [f"Text\u2028{number}."] for number in (1, 10, 2)}
    assert shown(read(root, "urban1k"), root) == {**texts, "Urban1k/image/3.jpg": [""]}  # one text of the set is empty
    rows = [{"image_id": 0, "image": "1.jpg", "caption": "Text 1."}]
    other = write(tmp_path / "json", {"urban1k/annotations/annotations.json": {"annotations": rows}})
    assert shown(read(other, "urban1k"), other) == {"urban1k/images/1.jpg": ["Text 1."]}


def share4v(image):
    return {"id": "1", "image": image, "conversations": [{"value": "What?"}, {"value": "A man.\nA dog."}]}


@pytest.mark.parametrize(
    ("named", "folder", "expected"),
    [
        ("sa_000048/images/sa_1.jpg", "sa_000048/images", "sa_000048/images/sa_1.jpg"),
        ("sa_000048/images/sa_1.jpg", "sa_000048", "sa_000048/sa_1.jpg"),  # as the reference looks for them
        ("sam/images/sa_1.jpg", "images", "images/sa_1.jpg"),
        ("sam/images/sa_1.jpg", "other", "sam/images/sa_1.jpg"),
    ],
)
def test_images_of_sharegpt4v_with_and_without_a_folder(tmp_path, named, folder, expected):
    root = write(tmp_path, {"share4v/share4v_sam_10k.json": [share4v(named)]})
    (root / "share4v" / folder).mkdir(parents=True)
    assert shown(long_captions.read_share4v(root, 1), root) == {f"share4v/{expected}": ["A man. A dog"]}


@pytest.mark.parametrize(("name", "count"), [("sharegpt4v_1k", 1_000), ("sharegpt4v_10k", 10_000)])
def test_sharegpt4v_is_the_head_of_a_long_file(tmp_path, monkeypatch, name, count):
    monkeypatch.setattr(long_captions, "BLOCK", 1000)  # records reach over the blocks
    records = [share4v(f"sa_000000/images/sa_{number}.jpg") for number in range(count)]
    text = json.dumps(records, indent=1)[:-1] + ", this is never read"
    root = write(tmp_path, {"share4v/share-captioner_coco_lcs_sam_1246k_1107.json": text})
    data = read(root, name)
    assert data.counts() == {"images": count, "texts": count}
    assert data.pictures[-1].path.endswith(f"sa_{count - 1}.jpg")
    short = write(tmp_path / "short", {"share4v/share4v_sam_10k.json": records[: count - 1]})
    with pytest.raises(base.AnnotationError, match=f"{count - 1} records; expected at least {count}"):
        read(short, name)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP_benchmark


def npy(vector, **options):
    file = io.BytesIO()
    np.save(file, np.asarray(vector), **options)
    return file.getvalue()


def wds(root, folder, labels, classes="cat\ndog\n", shards=1, **files):
    """A set in CLIP_benchmark's layout; `labels`: (extension, bytes) of each image, one after the other."""
    own = {"classnames.txt": classes, "zeroshot_classification_templates.txt": "a photo of a {c}.\nmy {c}.\n"}
    own |= {"test/nshards.txt": f"{shards}\n", **files}
    write(root, {f"{folder}/{name}": content for name, content in own.items()})
    for shard in range(shards):
        members = []
        for number, (extension, content) in enumerate(labels):
            members += [(f"s{number}.webp", b"I%d" % number), (f"s{number}.{extension}", content)]
        write_tar(root / folder / f"test/{shard}.tar", members)
    return root


CLASSIFICATION = [entry.name for entry in clip_benchmark.BENCHMARKS if entry.task == "classification"]
RETRIEVAL = [entry.name for entry in clip_benchmark.BENCHMARKS if entry.task == "retrieval"]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_each_classification_set_of_clip_benchmark(tmp_path, name):
    several = "multilabel" in name
    labels = [("npy", npy([0, 1])), ("npy", npy([True, True]))] if several else [("cls", b"1"), ("cls", b"0\n")]
    wds(tmp_path, name, labels, shards=2)
    data = read(tmp_path, name)
    assert data.classes == [("cat",), ("dog",)] and data.templates == ["a photo of a {c}.", "my {c}."]
    expected = [[False, True], [True, True]] * 2 if several else [1, 0] * 2
    assert data.labels.tolist() == expected and data.labels.dtype == (bool if several else np.int64)
    assert [picture.read() for picture in data.pictures] == [b"I0", b"I1"] * 2
    assert data.counts() == {"images": 4, "classes": 2} and data.parts == ()


def test_ties_are_those_of_the_same_sets_in_their_own_releases():
    """Wrong, but where two classes have one name: then of their images half could be right by no other rule."""
    first = {name for name, entry in table.ALL.items() if entry.options.get("ties") == "first"}
    assert first & set(CLASSIFICATION) == {"wds_imagenet1k", "wds_imagenetv2", "wds_imagenet_sketch"}
    assert {"imagenet", "imagenet_v2", "imagenet_sketch"} <= first


def test_a_set_that_says_so_has_several_labels_though_it_has_single_ones_too(tmp_path):
    wds(tmp_path, "wds_voc2007_multilabel", [("npy", npy([1, 1]))], **{"dataset_type.txt": "multilabel"})
    members = [("s0.webp", b"I"), ("s0.cls", b"1"), ("s0.npy", npy([1, 1]))]
    write_tar(tmp_path / "wds_voc2007_multilabel/test/0.tar", members)
    assert read(tmp_path, "wds_voc2007_multilabel").labels.tolist() == [[True, True]]


@pytest.mark.parametrize("name", RETRIEVAL)
def test_each_retrieval_set_of_clip_benchmark(tmp_path, name):
    wds(
        tmp_path,
        name,
        [("txt", b"a cat\n\none cat\n"), ("txt", "ein Hündchen".encode())],
        **{"dataset_type.txt": "retrieval"},
    )
    data = read(tmp_path, name)
    assert data.texts == ["a cat", "one cat", "ein Hündchen"] and data.image_of_text.tolist() == [0, 0, 1]
    assert [picture.read() for picture in data.pictures] == [b"I0", b"I1"]


@pytest.mark.parametrize("folder", ["wds_vtab-dtd", "wds_vtab-dtd_test", "vtab/dtd"])
def test_folders_of_the_hub_of_datacomp_and_of_the_suite(tmp_path, folder):
    wds(tmp_path, folder, [("cls", b"1")])
    assert read(tmp_path, "wds_vtab-dtd").labels.tolist() == [1]


def test_what_a_set_of_clip_benchmark_lacks_is_named_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("classnames.txt", "test/0.tar"):
        wds(tmp_path / "sets", "wds_mnist", [("cls", b"1")])
        root = pathlib.Path("sets")
        assert read(root, "wds_mnist").labels.tolist() == [1]
        (root / "wds_mnist" / name).unlink()
        with pytest.raises(base.MissingError) as error:
            read(root, "wds_mnist")
        assert error.value.files == (f"wds_mnist/{name}",)


@pytest.mark.parametrize("name", ["wds_mnist", "wds_flickr8k"])
def test_a_set_of_clip_benchmark_that_was_packed_as_a_folder(tmp_path, name):
    """By `tar -cf 0.tar .`, on a Mac."""
    partner = ("cls", b"1") if name == "wds_mnist" else ("txt", b"a")
    wds(tmp_path, name, [])
    with tarfile.open(tmp_path / name / "test/0.tar", "w") as tar:
        for member, content in (
            (".", None),
            ("./s0.jpg", b"I"),
            ("./._s0.jpg", b"?"),
            (f"./s0.{partner[0]}", partner[1]),
        ):
            info = tarfile.TarInfo(member)
            info.type, info.size = (tarfile.DIRTYPE, 0) if content is None else (tarfile.REGTYPE, len(content))
            tar.addfile(info, io.BytesIO(content or b""))
    assert [picture.read() for picture in read(tmp_path, name).pictures] == [b"I"]


@pytest.mark.parametrize("name", ["wds_mnist", "wds_flickr8k"])
def test_a_set_of_clip_benchmark_without_images_is_refused(tmp_path, name):
    wds(tmp_path, name, [])
    with pytest.raises(base.AnnotationError, match="no image in 1 tars"):
        read(tmp_path, name)


def test_a_set_of_which_a_tar_is_missing_is_read_in_part(tmp_path):
    wds(tmp_path, "wds_mnist", [("cls", b"1")], shards=3)
    (tmp_path / "wds_mnist/test/1.tar").unlink()
    data = read(tmp_path, "wds_mnist")
    assert len(data.pictures) == 2 and data.parts == ("0.tar", "2.tar")


def test_sets_in_the_layout_that_no_table_names(tmp_path):
    wds(tmp_path, "wds_mnist", [("cls", b"1")])
    wds(tmp_path, "wds_birds", [("cls", b"1")])
    wds(tmp_path, "wds_stories", [("txt", b"a")], **{"dataset_type.txt": "Retrieval\n"})
    birds, stories = clip_benchmark.unlisted(tmp_path)
    assert (birds.name, birds.task, birds.read(tmp_path).labels.tolist()) == ("wds_birds", "classification", [1])
    assert (stories.name, stories.task, stories.read(tmp_path).texts) == ("wds_stories", "retrieval", ["a"])
    assert read(tmp_path, "wds_classification:wds_birds").labels.tolist() == [1]
    own = read(tmp_path / "elsewhere", f"wds_retrieval:{tmp_path}/wds_stories")
    assert own.texts == ["a"] and own.pictures[0].read() == b"I0"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


FLICKR_VAL = "flickr30k/flickr30k_val.json"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("coco_val2017", {"coco/captions_val2017.json": "{"}, "captions_val2017.json: not JSON"),
        ("coco_val2017", {"coco/captions_val2017.json": "[]"}, "expected an object"),
        ("coco_val2017", {"coco/captions_val2017.json": {"images": []}}, "no 'annotations'"),
        ("coco_val2017", {"coco/captions_val2017.json": {"images": [], "annotations": []}}, "no image with texts"),
        (
            "coco_val2017",
            {"coco/captions_val2017.json": {**COCO, "images": COCO["images"] + COCO["images"][:1]}},
            r"images\[2\]: id 7 stands twice",
        ),
        (
            "coco_val2017",
            {"coco/captions_val2017.json": {**COCO, "images": [{"id": 7, "file_name": "3.jpg"}, COCO["images"][1]]}},
            "3.jpg is named twice",
        ),
        (
            "coco_val2017",
            {"coco/captions_val2017.json": {**COCO, "annotations": [{"image_id": 9, "caption": ""}]}},
            r"annotations\[0\]: there is no image 9",
        ),
        (
            "coco_val2017",
            {"coco/captions_val2017.json": {**COCO, "annotations": COCO["annotations"][:1]}},
            "7.jpg has no text",
        ),
        (
            "coco_val2017",
            {"coco/captions_val2017.json": {**COCO, "annotations": [{"image_id": True, "caption": "a"}]}},
            "'image_id' is 'True', bool; expected an integer",
        ),
        ("flickr30k_val", {FLICKR_VAL: [{"image": "/etc/x", "caption": ["a"]}]}, "expected a path inside"),
        ("flickr30k_val", {FLICKR_VAL: [{"image": "../x", "caption": ["a"]}]}, "expected a path inside"),
        ("flickr30k_val", {FLICKR_VAL: [{"image": "x", "caption": "a"}]}, "expected a list"),
        ("flickr30k_val", {FLICKR_VAL: [{"image": "x", "caption": [1]}]}, "expected a text"),
        ("iiw", {"iiw/DCI_Test/data.jsonl": [{"image": "x.jpg", "IIW": "a"}] * 2}, "x.jpg is named twice"),
        ("iiw", {"iiw/DCI_Test/data.jsonl": [{"IIW": "a"}]}, "record 1: no 'image/key'"),
        ("urban1k", {"urban1k/annotations.json": {"annotations": [{"image": "x"}]}}, r"annotations\[0\]: no 'caption'"),
        ("dci", {"dci/splits.json": {"test": ["../x.json"]}}, "expected a path inside"),
        ("dci_test", {"dci/splits.json": {"train": []}}, "no 'test'"),
        ("sharegpt4v_1k", {"share4v/share4v_sam_10k.json": [{"conversations": [{}]}]}, "expected a question and"),
        ("sharegpt4v_1k", {"share4v/share4v_sam_10k.json": "[{]"}, "record 0 is not JSON"),
    ],
)  # fmt: skip
def test_broken_annotations_are_named(tmp_path, name, files, message):
    write(tmp_path, files)
    with pytest.raises(base.AnnotationError, match=message):
        read(tmp_path, name)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([("cls", b"2")], {}, r"0\.tar: s0\.cls: '2'; expected the number of a class, 0 to 1"),
        ([("cls", b"-1")], {}, "expected the number of a class"),
        ([("cls", b"\xff")], {}, "not UTF-8"),
        ([("npy", npy([1, 0, 1]))], {}, r"int64 \(3,\); expected 0 or 1 for each of 2 classes"),
        ([("npy", npy([2, 0]))], {}, "expected 0 or 1"),
        ([("npy", npy([{}, {}], allow_pickle=True))], {}, "s0.npy: no array"),  # never unpickled
        ([("cls", b"1"), ("json", b"{}")], {}, "image without cls"),
        ([("cls", b"1")], {"classes": " \n"}, "classnames.txt: line 1 is empty"),
        ([("cls", b"1")], {"classes": "cat\n\ndog\n\n"}, "classnames.txt: line 2 is empty"),  # or labels would shift
        ([("cls", b"1")], {"zeroshot_classification_templates.txt": "a photo"}, "has no {c}"),
        ([("cls", b"1")], {"test/nshards.txt": "many"}, "expected the number of tars"),
    ],
)
def test_broken_sets_of_clip_benchmark_are_named(tmp_path, labels, options, message):
    wds(tmp_path, "wds_mnist", labels, **options)
    with pytest.raises(base.AnnotationError, match=message):
        read(tmp_path, "wds_mnist")


def test_a_file_that_is_no_tar_is_named(tmp_path):
    wds(tmp_path, "wds_mnist", [("cls", b"1")])
    (tmp_path / "wds_mnist/test/0.tar").write_text("<html>")
    with pytest.raises(base.AnnotationError, match=r"0\.tar"):
        read(tmp_path, "wds_mnist")


@pytest.mark.parametrize("name", [entry.name for entry in table.ALL.values() if entry.task == "retrieval"])
def test_a_set_that_is_not_there_says_what_it_looks_for(tmp_path, name):
    with pytest.raises(base.MissingError) as error:
        read(tmp_path, name)
    assert error.value.files


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason="needs the sets' own annotation files")
def test_real_files_have_the_published_counts():
    for name in (
        "coco_val2017",
        "coco_karpathy_test",
        "flickr30k_val",
        "docci_fg",
        "docci",
        "iiw_fg",
        "iiw",
        "urban1k",
    ):
        (entry,) = table.select([name])
        assert entry.read(ANNOTATIONS).counts() == entry.expected(), name
    rows = json.loads((ANNOTATIONS / "iiw/finegrained_test_annotations.json").read_text())["annotations"]
    data = read(ANNOTATIONS, "iiw_fg")
    assert [(row["image_id"], row["caption"]) for row in rows] == list(zip(data.image_of_text, data.texts, strict=True))
