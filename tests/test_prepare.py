"""Public releases as shards, from end to end: every release, what is skipped and why, interruptions and faults."""

import csv
import io
import json
import os
import pathlib
import re
import resource
import signal
import stat
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import ExifTags, Image

from flair_jax.data.prepare import __main__ as command
from flair_jax.data.prepare import atomic, inputs, job, pictures, releases, report, rows, runner, store
from flair_jax.data.sources.open import open_source
from flair_jax.data.transforms import images as pixels
from flair_jax.data.transforms.captions import FIELDS

LONG = "A dog runs.\nIt is brown.</s>The sky, too, is blue."
LONG_SPLIT = ["A dog runs", "It is brown", "The sky, too, is blue"]


def picture(width=60, height=40, seed=0, form="JPEG") -> bytes:
    grid = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC).save(target, form)
    return target.getvalue()


def write_tar(path, members) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def sample(key, meta, image=None, text="a raw caption") -> list:
    return [
        (f"{key}.jpg", image if image is not None else picture(seed=len(key))),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", meta if isinstance(meta, bytes) else json.dumps(meta).encode()),
    ]


def write_csv(path, rows, header=("Image Path", *FIELDS)) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def url(number: int) -> str:
    return f"http://example.org/a,b/{number}.jpg?x=1"


def prepare(capsys, *arguments) -> str:
    """Runs the command in this process; what it printed."""
    command.main([*map(str, arguments), "--workers", "1"])
    return capsys.readouterr().out


def read(folder) -> dict[str, dict]:
    """{image's source: record} of all shards, through the reader that training uses."""
    info = atomic.read_json(pathlib.Path(folder) / job.INFO)
    source = open_source(str(pathlib.Path(folder) / info["pattern"]))
    assert not source.skipped and len(source) == info["samples"]
    found = {}
    for index in range(len(source)):
        record = source[index]
        content = json.loads(record.json)
        assert content["source"] not in found
        found[content["source"]] = content | {"key": record.key, "image": record.image}
    return found


@pytest.fixture
def cc3m(tmp_path):
    """Two tars in the layout of pixparse's, seven samples each, and a CSV for most of them."""
    for tar in range(2):
        members = [
            member
            for number in range(7)
            for member in sample(
                f"{tar}{number:08d}", {"url": url(10 * tar + number)}, picture(80, 60, 10 * tar + number)
            )
        ]
        write_tar(tmp_path / f"cc3m-train-{tar:04d}.tar", members)
    rows = [[url(number), "raw", *[LONG] * 6] for number in (*range(6), *range(10, 15), 99)]
    write_csv(tmp_path / "cc3m.csv", rows)
    return tmp_path


def dreamlip(folder, *more) -> list:
    """Arguments for the fixture's data."""
    return [
        "dreamlip",
        *("--captions", folder / "cc3m.csv"),
        *("--images", folder / "cc3m-train-{0000..0001}.tar"),
        *("--output", folder / "out", "--prefix", "cc3m", "--shard-size", 4),
        *more,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Releases


def test_dreamlip_joined_by_url(cc3m, capsys):
    printed = prepare(capsys, *dreamlip(cc3m))
    found = read(cc3m / "out")
    assert [content["url"] for content in found.values()] == [url(number) for number in (*range(6), *range(10, 15))]
    first = found["cc3m-train-0000.tar/000000000"]
    assert first["raw_caption"] == ["raw"] and all(first[field] == LONG_SPLIT for field in FIELDS[1:])
    assert (first["width"], first["height"], first["image"]) == (80, 60, picture(80, 60, 0))  # bit for bit
    assert [len(keys) for keys in _keys_by_shard(cc3m / "out").values()] == [4, 4, 3]
    assert "cc3m-{00000..00002}.tar" in printed

    info = atomic.read_json(cc3m / "out" / job.INFO)
    assert (info["schema"], info["samples"], info["shards"], info["last_shard"]) == (1, 11, 3, 3)
    assert info["images"]["read"] == 14 and info["images"]["matched"] == 11
    assert list(info["images"]["skipped"].values()) == [3]
    assert (info["captions"]["keys"], info["captions"]["keys_without_image"]) == (12, 1)
    assert info["provenance"]["captions"][0][0] == (cc3m / "cc3m.csv").stat().st_size
    assert not (cc3m / "out" / ".prepare").exists()


def _keys_by_shard(folder) -> dict[str, list[str]]:
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found[path.name] = [name for name in tar.getnames() if name.endswith(".json")]
    return found


def test_keys_and_bytes_do_not_depend_on_the_workers(cc3m, capsys):
    prepare(capsys, *dreamlip(cc3m))
    assert [key for keys in _keys_by_shard(cc3m / "out").values() for key in keys][3:5] == [
        "000000003.json",
        "000010000.json",
    ]
    os.rename(cc3m / "out", cc3m / "one")
    command.main([*map(str, dreamlip(cc3m)), "--workers", "2"])
    assert _contents(cc3m / "one") == _contents(cc3m / "out")


def test_any_beam_runner(cc3m, capsys):
    """Through the job service that Flink and Spark are reached by; here it is Beam's own, in this process."""
    prepare(capsys, *dreamlip(cc3m))
    os.rename(cc3m / "out", cc3m / "local")
    flags = ["--runner", "PortableRunner", "--", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    command.main([*map(str, dreamlip(cc3m)), *flags])
    assert _contents(cc3m / "local") == _contents(cc3m / "out")


def _contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name != job.INFO}


def test_dreamlip_of_yfcc_and_of_split_captions(tmp_path, capsys):
    write_tar(tmp_path / "yfcc.tar", sample("a", {"downloadurl": url(1)}) + sample("b", {"downloadurl": url(2)}))
    cells = [json.dumps(LONG_SPLIT), str(LONG_SPLIT), "[]", "", "[A dog]. Not a list.", "['it is', '  ']"]
    write_csv(tmp_path / "c.csv", [[url(1), "raw", *cells]])
    prepare(capsys, "dreamlip", "--captions", tmp_path / "c.csv", "--images", tmp_path, "--output", tmp_path / "out")
    (found,) = read(tmp_path / "out").values()
    assert [found[field] for field in FIELDS] == [
        *(["raw"], LONG_SPLIT, LONG_SPLIT, [], []),
        *(["[A dog]", "Not a list"], ["it is"]),
    ]


def test_dreamlip_of_tars_that_hold_the_captions(tmp_path, capsys):
    """img2dataset downloaded the CSV with its columns: only the splitting is left to do."""
    unsplit = {"url": url(1), **dict.fromkeys(FIELDS, LONG)}
    write_tar(tmp_path / "00000.tar", sample("a", unsplit) + sample("b", {"url": url(2)}))
    prepare(capsys, "dreamlip", "--images", tmp_path / "00000.tar", "--output", tmp_path / "out")
    (found,) = read(tmp_path / "out").values()
    assert found["url"] == url(1) and all(found[field] == LONG_SPLIT for field in FIELDS)
    assert atomic.read_json(tmp_path / "out" / job.INFO)["images"]["skipped"] == {"no captions": 1}


@pytest.mark.parametrize("original", [False, True])
def test_pixelprose(tmp_path, capsys, original):
    import pyarrow
    import pyarrow.parquet

    columns = {
        "uid": ["u1", "u2", "u3"],
        "url": [url(1), url(2), None],
        "key": ["1", "2", "3"],
        "status": ["success"] * 3,
        "original_caption": ["alt", None, "x"],
        "vlm_model": ["gemini"] * 3,
        "vlm_caption": [" " + LONG, "", "y"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    write_tar(tmp_path / "a.tar", sample("a", {"url": url(1)}) + sample("b", {"url": url(2)}))
    arguments = ["--captions", tmp_path / "p.parquet", "--images", tmp_path / "a.tar", "--output", tmp_path / "out"]
    prepare(capsys, "pixelprose", *arguments, *(["--original-caption"] if original else []))
    (found,) = read(tmp_path / "out").values()
    assert found["caption"] == LONG and found.get("original_caption") == ("alt" if original else None)
    info = atomic.read_json(tmp_path / "out" / job.INFO)
    assert info["captions"]["skipped"] == {"no captions": 1, "no join key": 1}


@pytest.mark.parametrize("partner", ["json", "txt"])
def test_cc3m_with_its_raw_captions(tmp_path, capsys, partner):
    write_tar(tmp_path / "a.tar", sample("a", {"caption": "In the json."}, text="In the txt."))
    prepare(capsys, "cc3m", "--images", tmp_path / "a.tar", "--partner", partner, "--output", tmp_path / "out")
    (found,) = read(tmp_path / "out").values()
    assert found["raw_caption"] == [f"In the {partner}"] and all(found[field] == [] for field in FIELDS[1:])


CAPTIONS = [("a.jpg", "One. Two."), ("b/c.png", "Three"), ("a.jpg", "Four"), ("gone.jpg", "Five"), ("../x.jpg", "Six")]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "mapping"])
def test_folder(tmp_path, capsys, form):
    (tmp_path / "images" / "b").mkdir(parents=True)
    (tmp_path / "images" / "a.jpg").write_bytes(picture())
    (tmp_path / "images" / "b" / "c.png").write_bytes(picture(form="PNG"))
    (tmp_path / "images" / "uncaptioned.jpg").write_bytes(picture())
    (tmp_path / "x.jpg").write_bytes(picture())  # outside of the folder
    path = tmp_path / f"captions.{'json' if form == 'mapping' else form}"
    objects = [{"image": name, "text": caption} for name, caption in CAPTIONS]
    if form == "csv":
        write_csv(path, CAPTIONS, ("image", "text"))
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, objects)) + "\n\n[1]\n{broken\n")
    elif form == "json":
        path.write_text(json.dumps(objects))
    else:
        path.write_text(json.dumps({"a.jpg": ["One. Two.", "Four"], "b/c.png": "Three"}))
    arguments = ["--captions", path, "--images", tmp_path / "images", "--output", tmp_path / "out"]
    prepare(capsys, "folder", *arguments, "--image-column", "image", "--caption-columns", "text")
    found = read(tmp_path / "out")
    assert {content["file"]: content["raw_caption"] for content in found.values()} == {
        "a.jpg": ["One", "Two", "Four"],
        "b/c.png": ["Three"],
    }
    assert found["images/b/c.png"]["image"] == picture(form="PNG")


def test_coco(tmp_path, capsys):
    (tmp_path / "train2017").mkdir()
    for name in ("000000000009.jpg", "000000000025.jpg"):
        (tmp_path / "train2017" / name).write_bytes(picture())
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 30, "file_name": "000000000030.jpg"}],
        "annotations": [
            {"image_id": 9, "caption": "A plate. "},
            {"image_id": 30, "caption": "A vase."},
            {"image_id": 9, "caption": "Food on a plate"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    arguments = ["--captions", tmp_path / "captions.json", "--images", tmp_path / "train2017"]
    prepare(capsys, "coco", *arguments, "--output", tmp_path / "out")
    assert [content["raw_caption"] for content in read(tmp_path / "out").values()] == [["A plate", "Food on a plate"]]


def test_negclip_keeps_captions_and_their_negatives(tmp_path, capsys):
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    (tmp_path / "images" / "val2014" / "1.jpg").write_bytes(picture())
    tsv = [
        ["", "title", "filepath", "neg_caption", "neg_image"],
        ["0", "A child. And a yak.", "coco/val2014/1.jpg", "['A yak .', \"A child 's yak .\"]", "[3, 1]"],
        ["1", 'A "big" dog', "coco/val2014/1.jpg", "[]", "[2]"],
        ["2", "No image", "coco/val2014/2.jpg", "['a']", "[0]"],
        ["3", "No list", "coco/val2014/1.jpg", "__import__('os')", "[0]"],
    ]
    with open(tmp_path / "train.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(tsv)
    arguments = ["--captions", tmp_path / "train.tsv", "--images", tmp_path / "images", "--output", tmp_path / "out"]
    told = prepare(capsys, "negclip", *arguments)
    (content,) = read(tmp_path / "out").values()
    assert content["file"] == "val2014/1.jpg"
    assert content["caption"] == ["A child. And a yak.", 'A "big" dog']
    assert content["neg_caption"] == [["A yak .", "A child 's yak ."], []]
    assert "a caption is neither text nor a list of texts" in told


def test_captioned_tars_keep_the_caption_whole(tmp_path, capsys):
    """From the txt, from a key of the json, and from a text file that the json's key names."""
    members = [
        *sample("1", {"key": "1", "coca_captions": "A dog. It runs."}, text=" A cat. It sits.\n"),
        *sample("2", {"key": "2"}, text="two"),
        *sample("3", {"key": "../3"}, text="  "),
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "2.txt").write_text("A cow.\nAnother line")
    (tmp_path / "3.txt").write_text("outside of the folder")
    prepare(capsys, "captioned", "--images", tar, "--output", tmp_path / "txt")
    assert [content["caption"] for content in read(tmp_path / "txt").values()] == ["A cat. It sits.", "two"]
    options = ["--partner", "json", "--caption-key", "coca_captions", "--text-folder", tmp_path / "texts"]
    told = prepare(capsys, "captioned", "--images", tar, "--output", tmp_path / "json", *options)
    assert [content["coca_captions"] for content in read(tmp_path / "json").values()] == ["A dog. It runs.", "A cow."]
    assert "json without a plain key" in told


@pytest.mark.parametrize("form", ["json", "token"])
def test_flickr30k_keeps_evaluation_images_out(tmp_path, capsys, form):
    (tmp_path / "flickr30k-images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "flickr30k-images" / name).write_bytes(picture())
    items = [("1.jpg", "train", ["A man .", "A cat ."]), ("2.jpg", "test", ["A dog ."])]
    more = []
    if form == "json":
        path = tmp_path / "dataset_flickr30k.json"
        images = [
            {"filename": name, "split": part, "sentences": [{"raw": text} for text in texts]}
            for name, part, texts in items
        ]
        path.write_text(json.dumps({"images": images}))
    else:
        path = tmp_path / "results_20130124.token"
        path.write_text("".join(f"{name}#{n}\t{text}\n" for name, _, texts in items for n, text in enumerate(texts)))
        (tmp_path / "train.txt").write_text("1\n3\n")
        more = ["--images-list", tmp_path / "train.txt"]
    arguments = [
        "flickr30k",
        "--captions",
        path,
        "--images",
        tmp_path / "flickr30k-images",
        "--output",
        tmp_path / "out",
    ]
    if form == "token":
        with pytest.raises(atomic.PrepareError, match="does not say which images are for training"):
            prepare(capsys, *arguments)
    prepare(capsys, *arguments, *more)
    assert [content["raw_caption"] for content in read(arguments[-1]).values()] == [["A man", "A cat"]]


# ---------------------------------------------------------------------------------------------------------------------
# Text files: encodings, delimiters, paths


@pytest.fixture
def photos(tmp_path):
    """A folder with two images; arguments of the release `folder` for it."""
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).write_bytes(picture())
    return ["folder", "--images", tmp_path / "photos", "--output", tmp_path / "out"]


def raw_captions(folder) -> dict[str, list[str]]:
    return {content["file"]: content["raw_caption"] for content in read(folder).values()}


TABLE = 'file_name,caption\n\na.jpg,"two\nlines"\nb.jpg,Träume im Café\n'
OBJECTS = [{"file_name": "a.jpg", "caption": "plain"}, {"file_name": "b.jpg", "caption": "Träume im Café"}]
JSON_LINES = "\n".join(json.dumps(item, ensure_ascii=False) for item in OBJECTS)


@pytest.mark.parametrize(
    "name, content, place, byte",
    [
        ("c.csv", TABLE, "row 2", TABLE.index("ä")),
        ("c.tsv", TABLE.replace(",", "\t"), "row 2", TABLE.index("ä")),
        ("c.csv", "file_name,caption,größe\na.jpg,x,1\n", "header", 20),
        ("c.csv", "file_name,caption\n" + "a.jpg,x\n" * 200_000 + "b.jpg,Träume\n", "row 200001", 18 + 1_600_000 + 8),
        ("c.jsonl", JSON_LINES, "line 2", JSON_LINES.index("ä")),
        ("c.json", f"[{JSON_LINES.replace(chr(10), ',' + chr(10))}]", "line 2", JSON_LINES.index("ä") + 2),
    ],
)
def test_text_in_another_encoding_is_refused_with_its_place(tmp_path, capsys, photos, name, content, place, byte):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert content.encode("latin-1")[byte] > 127
    message = rf"{name}, {place}, byte {byte}: b'.*' is not text in utf-8. Give the encoding .*--encoding latin-1"
    with pytest.raises(atomic.PrepareError, match=message):
        prepare(capsys, *photos, "--captions", tmp_path / name)
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name, content", [("c.csv", TABLE), ("c.jsonl", JSON_LINES), ("c.json", json.dumps(OBJECTS))])
def test_the_encoding_can_be_given(tmp_path, capsys, photos, encoding, name, content):
    (tmp_path / name).write_bytes(content.encode(encoding))
    prepare(capsys, *photos, "--captions", tmp_path / name, "--encoding", encoding)
    assert raw_captions(tmp_path / "out")["b.jpg"] == ["Träume im Café"]
    assert atomic.read_json(tmp_path / "out" / job.INFO)["provenance"]["settings"]["text"] == [encoding, None, True]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_text(tmp_path, capsys, photos, encoding):
    for name, content in (("c.csv", TABLE), ("c.jsonl", JSON_LINES), ("c.json", json.dumps(OBJECTS))):
        (tmp_path / name).write_bytes(("\ufeff" + content).encode(encoding))
        rows_read = list(
            rows.table(str(tmp_path / name), lambda _: None, rows.Text(encoding), "file_name", ["caption"], "whole")
        )
        assert ("b.jpg", ["Träume im Café"]) in [(row.key, row.captions["raw_caption"]) for row in rows_read], name
    text = "\ufeffa dog".encode(encoding)
    assert releases.RELEASES["captioned"].own(text, "txt", encoding, "caption", None) == {"caption": "a dog"}
    assert releases.RELEASES["cc3m"].own(text, "txt", encoding, "whole")["raw_caption"] == ["a dog"]
    (tmp_path / "000.txt").write_bytes(text + "\n".encode(encoding))
    found = releases.RELEASES["captioned"].own(b'{"key": "000"}', "json", encoding, "caption", str(tmp_path))
    assert found == {"caption": "a dog"}


@pytest.mark.parametrize(
    "content",
    [
        'a.jpg,one\nb.jpg,"two and\nmore',  # the file was cut
        'a.jpg,"one\nb.jpg,two\nc.jpg,three" x\n',  # would be one caption of a.jpg
        'a.jpg,"quoted dog" says hi\n',
    ],
)
def test_quotation_marks_that_do_not_fit_stop_the_run(tmp_path, capsys, photos, content):
    (tmp_path / "c.csv").write_text("file_name,caption\n" + content)
    with pytest.raises(
        atomic.PrepareError, match=r"c\.csv, before line \d: .* Most likely a quotation mark is never closed"
    ):
        prepare(capsys, *photos, "--captions", tmp_path / "c.csv")


def test_quotation_marks_may_be_a_part_of_the_text(tmp_path, capsys, photos):
    (tmp_path / "c.tsv").write_text('file_name\tcaption\na.jpg\t"Hello" says "a dog\nb.jpg\tone\n')
    prepare(capsys, *photos, "--captions", tmp_path / "c.tsv", "--no-quoting")
    assert raw_captions(tmp_path / "out") == {"a.jpg": ['"Hello" says "a dog'], "b.jpg": ["one"]}


def test_a_key_that_comes_twice_in_json_is_refused(tmp_path, capsys, photos):
    (tmp_path / "c.json").write_text('{"a.jpg": "one", "b.jpg": "two", "a.jpg": "three"}')
    with pytest.raises(atomic.PrepareError, match=r"c\.json: an object has the key 'a\.jpg' twice"):
        prepare(capsys, *photos, "--captions", tmp_path / "c.json")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--delimiter", ";;", "';;' is no delimiter; expected one character"),
        ("--shard-size", "-1", "'-1' is no whole number of 1 or more"),
        ("--resize", "1e3", "'1e3' is no whole number"),
        ("--quality", "101", "'101' is more than 100"),
        ("--prefix", "a/b", "'a/b' is no plain start of file names"),
    ],
)
def test_a_wrong_option_says_what_is_expected(capsys, photos, option, value, words):
    with pytest.raises(SystemExit):
        prepare(capsys, *photos, "--captions", "c.csv", f"{option}={value}")
    assert words in capsys.readouterr().err


def test_a_file_that_ends_inside_of_a_character(tmp_path, capsys, photos):
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbffile_name,caption\na.jpg,caf\xc3")
    with pytest.raises(atomic.PrepareError, match=r"c\.csv, row 1, byte 30: .* is not text in utf-8"):
        prepare(capsys, *photos, "--captions", tmp_path / "c.csv")


def test_what_is_no_encoding(capsys, photos):
    for name in ("latin7x", "hex"):
        with pytest.raises(SystemExit):
            prepare(capsys, *photos, "--captions", "c.csv", "--encoding", name)
        assert f"{name!r} is no encoding of text" in capsys.readouterr().err


def test_flickr30k_in_another_encoding(tmp_path, capsys, photos):
    tokens, names = tmp_path / "results.token", tmp_path / "train.txt"
    tokens.write_bytes("a.jpg#0\tone\nb.jpg#0\tCafé\r\n".encode("latin-1"))
    names.write_bytes("a\nb\nä\n".encode("latin-1"))
    arguments = ["flickr30k", *photos[1:], "--captions", tokens, "--images-list", names]
    with pytest.raises(atomic.PrepareError, match=r"train\.txt, line 3, byte 4"):
        prepare(capsys, *arguments)
    names.write_text("a\nb\n")
    with pytest.raises(atomic.PrepareError, match=r"results\.token, line 2, byte 23"):
        prepare(capsys, *arguments)
    prepare(capsys, *arguments, "--encoding", "latin-1")
    assert raw_captions(tmp_path / "out") == {"a.jpg": ["one"], "b.jpg": ["Café"]}


def test_text_of_another_encoding_in_tars_is_counted(tmp_path, capsys):
    """One record of many: it is left out, counted and named, never changed."""
    members = [
        *sample("good", {"caption": "Träume", "url": url(1)}, text="Träume"),
        ("bad.jpg", picture()),
        ("bad.txt", "Träume".encode("latin-1")),
        ("bad.json", '{"caption": "Träume"}'.encode("latin-1")),
    ]
    write_tar(tmp_path / "a.tar", members)
    for partner, reason in (("txt", releases.NOT_IN_ENCODING), ("json", releases.NOT_UTF8)):
        arguments = ["--images", tmp_path / "a.tar", "--partner", partner, "--output", tmp_path / partner]
        printed = prepare(capsys, "cc3m", *arguments)
        assert [content["raw_caption"] for content in read(tmp_path / partner).values()] == [["Träume"]]
        assert atomic.read_json(tmp_path / partner / job.INFO)["images"]["skipped"] == {reason: 1}
        assert "e.g. a.tar bad" in printed
    latin = [
        "--images",
        tmp_path / "a.tar",
        "--partner",
        "txt",
        "--encoding",
        "latin-1",
        "--output",
        tmp_path / "latin",
    ]
    prepare(capsys, "cc3m", *latin)
    assert read(tmp_path / "latin")["a.tar/bad"]["raw_caption"] == ["Träume"]
    write_csv(tmp_path / "c.csv", [[url(1), *["x"] * 7]])
    arguments = ["--captions", tmp_path / "c.csv", "--images", tmp_path / "a.tar", "--output", tmp_path / "out"]
    prepare(capsys, "dreamlip", *arguments)
    assert atomic.read_json(tmp_path / "out" / job.INFO)["images"]["skipped"] == {releases.NOT_UTF8: 1}


@pytest.mark.parametrize(
    "name, delimiter, options",
    [
        ("c.csv", ";", ["--delimiter", ";"]),
        ("c.csv", "\t", ["--delimiter", "tab"]),
        ("c.csv", "\t", ["--delimiter", r"\t"]),
        ("c.CSV", "|", ["--delimiter", "|"]),
        ("c.tsv", "\t", []),
        ("c.tsv", ";", ["--delimiter", ";"]),
    ],
)
def test_delimiters(tmp_path, capsys, photos, name, delimiter, options):
    rows_ = [("file_name", "caption"), ("a.jpg", 'one, "two"; three|\tfour\nfive')]
    with open(tmp_path / name, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows_)
    prepare(capsys, *photos, "--captions", tmp_path / name, *options)
    assert raw_captions(tmp_path / "out") == {"a.jpg": ['one, "two"; three|\tfour', "five"]}


def test_another_delimiter_is_recognised_and_refused(tmp_path, capsys, photos):
    for delimiter, option in ((";", "';'"), ("\t", "tab")):
        (tmp_path / "c.csv").write_text(f"file_name{delimiter}caption\na.jpg{delimiter}x\n")
        with pytest.raises(atomic.PrepareError, match=rf"has no column .*Give the delimiter: --delimiter {option}"):
            prepare(capsys, *photos, "--captions", tmp_path / "c.csv")
    with pytest.raises(SystemExit):
        prepare(capsys, *photos, "--captions", tmp_path / "c.csv", "--delimiter", "::")
    prepare(capsys, *photos, "--captions", tmp_path / "c.csv", "--delimiter", "tab")  # into the same folder
    assert raw_captions(tmp_path / "out") == {"a.jpg": ["x"]}


def test_the_home_folder_in_every_path(cc3m, capsys, monkeypatch, photos):
    monkeypatch.setenv("HOME", str(cc3m))
    monkeypatch.chdir(cc3m / "photos")  # where a folder called `~` would be made
    more = ["--images", "~/cc3m-train-{0000..0001}.tar", "--output", "~/out", "--work", "~/work"]
    prepare(capsys, "dreamlip", "--captions", "~/cc3m.csv", *more)
    assert len(read(cc3m / "out")) == 11
    (cc3m / "own.csv").write_text("file_name,caption\na.jpg,x\n")
    prepare(capsys, "folder", "--images", "~/photos", "--captions", "~/own.csv", "--output", "~/own")
    assert raw_captions(cc3m / "own") == {"a.jpg": ["x"]}
    (cc3m / "results.token").write_text("a.jpg#0\tx\nb.jpg#0\ty\n")
    (cc3m / "list").write_text("a.jpg\n")
    more = ["--captions", "~/results.token", "--images-list", "~/list", "--output", "~/flickr"]
    prepare(capsys, "flickr30k", "--images", "~/photos", *more)
    assert raw_captions(cc3m / "flickr") == {"a.jpg": ["x"]}
    assert sorted(path.name for path in (cc3m / "photos").iterdir()) == ["a.jpg", "b.jpg"]


def test_tars_in_a_list(cc3m, capsys):
    (cc3m / "tars.txt").write_text("cc3m-train-{0000,0001}.tar\n")
    prepare(capsys, *dreamlip(cc3m, "--images", cc3m / "tars.txt"))
    assert len(read(cc3m / "out")) == 11


def test_files_follow_the_umask(cc3m, capsys):
    before = os.umask(0o027)
    try:
        for form in ("tar", "array_record"):
            prepare(capsys, *dreamlip(cc3m, "--format", form, "--output", cc3m / form))
    finally:
        os.umask(before)
    written = [path for form in ("tar", "array_record") for path in (cc3m / form).iterdir()]
    assert len(written) == 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}
    assert stat.S_IMODE((cc3m / "tar").stat().st_mode) == 0o750


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_resize_makes_larger_images_smaller_and_leaves_the_others(tmp_path, capsys):
    small, tall = picture(200, 32), picture(90, 300, seed=2)
    members = sample("small", {"caption": "x"}, small) + sample("tall", {"caption": "x"}, tall)
    grey = io.BytesIO()
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(grey, "PNG")
    members += sample("deep", {"caption": "x"}, grey.getvalue()) + sample("gif", {"caption": "x"}, picture(form="GIF"))
    write_tar(tmp_path / "a.tar", members)
    prepare(capsys, "cc3m", "--images", tmp_path / "a.tar", "--resize", 48, "--quality", 90, "--output", tmp_path / "o")
    found = {name.removeprefix("a.tar/"): content for name, content in read(tmp_path / "o").items()}
    assert found["small"]["image"] == small
    assert (found["tall"]["width"], found["tall"]["height"]) == (48, 160)
    shrunk = Image.open(io.BytesIO(found["tall"]["image"]))
    expected = Image.open(io.BytesIO(tall)).resize((48, 160), Image.Resampling.BICUBIC)
    assert shrunk.size == (48, 160) and shrunk.format == "JPEG"
    assert np.abs(np.asarray(shrunk, float) - np.asarray(expected, float)).mean() < 4
    assert np.asarray(Image.open(io.BytesIO(found["deep"]["image"]))).mean() == pytest.approx(40_000 >> 8, abs=1)
    assert Image.open(io.BytesIO(found["gif"]["image"])).format == "JPEG"  # training reads no GIF
    assert atomic.read_json(tmp_path / "o" / job.INFO)["converted"] == 3


def turned(orientation: int | None, size=(48, 32), form="JPEG") -> tuple[bytes, np.ndarray]:
    """A photograph whose pixels are stored as a camera does that was held in another way: (file, upright pixels).

    It has a red block in the upper left corner and a green one in the upper right, as seen upright.
    """
    upright = np.zeros((size[1], size[0], 3), np.uint8)
    upright[: size[1] // 2, : size[0] // 2] = 255, 0, 0
    upright[: size[1] // 2, size[0] // 2 :] = 0, 255, 0
    # What has to be done to the stored pixels for each value of the tag (EXIF 2.32, table 6), undone here.
    stored = {
        None: upright,
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a camera"
    target = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(target, form, exif=exif, **options)
    return target.getvalue(), upright


def decoded(data: bytes) -> tuple[np.ndarray, int | None, bool]:
    """Pixels as they are stored, what EXIF says of their orientation, and whether other tags are there."""
    image = Image.open(io.BytesIO(data))
    exif = image.getexif()
    return np.asarray(image.convert("RGB")).astype(int), exif.get(ExifTags.Base.Orientation), len(exif) > 1


def folder_of(tmp_path, images: dict[str, bytes]) -> list:
    (tmp_path / "photos").mkdir()
    for name, content in images.items():
        (tmp_path / "photos" / name).write_bytes(content)
    write_csv(tmp_path / "c.csv", [(name, "x") for name in images], ("file_name", "caption"))
    return ["--images", tmp_path / "photos", "--captions", tmp_path / "c.csv", "--output", tmp_path / "out"]


@pytest.mark.parametrize("resize", [None, 16])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_own_photographs_are_turned_upright(tmp_path, capsys, form, resize):
    names = {orientation: f"{orientation}.{form.lower()}" for orientation in (None, *range(1, 9))}
    photographs = {orientation: turned(orientation, form=form) for orientation in names}
    arguments = folder_of(tmp_path, {names[key]: data for key, (data, _) in photographs.items()})
    prepare(capsys, "folder", *arguments, *(["--resize", resize] if resize else []))
    found = {content["file"]: content for content in read(tmp_path / "out").values()}
    for orientation, (data, upright) in photographs.items():
        content = found[names[orientation]]
        stored, tag, _ = decoded(content["image"])
        assert (content["width"], content["height"]) == ((24, 16) if resize else (48, 32)) == stored.shape[1::-1]
        if orientation in (None, 1) and not resize and form != "TIFF":
            assert content["image"] == data  # bit for bit, with its tags
            continue
        assert tag is None
        expected = upright[::2, ::2] if resize else upright
        assert np.abs(stored - expected).mean() < 10, orientation


@pytest.mark.parametrize("release", ["cc3m", "folder"])
def test_published_images_stay_as_their_pixels_are_stored(tmp_path, capsys, release):
    """The reference ignores EXIF. What is written anew keeps the tag: every reader sees what it saw of the original."""
    orientations = (None, *range(1, 9))
    photographs = {str(orientation): turned(orientation)[0] for orientation in orientations}
    if release == "folder":
        arguments = [*folder_of(tmp_path, {f"{key}.jpg": data for key, data in photographs.items()}), "--no-upright"]
    else:
        members = [member for key, data in photographs.items() for member in sample(key, {"caption": "x"}, data)]
        arguments = ["--images", write_tar(tmp_path / "a.tar", members), "--output", tmp_path / "out"]
    prepare(capsys, release, *arguments)
    prepare(capsys, release, *arguments, "--resize", 16, "--output", tmp_path / "small")
    for folder, step in (("out", 1), ("small", 2)):
        for source, content in read(tmp_path / folder).items():
            original = photographs[source.split("/")[1].removesuffix(".jpg")]
            stored, tag, more = decoded(content["image"])
            pixels_, orientation, _ = decoded(original)
            if step == 1:
                assert content["image"] == original
            else:
                assert (tag or 1) == (orientation or 1) and not more
                assert np.abs(stored - pixels_[::2, ::2]).mean() < 10
            assert (content["width"], content["height"]) == stored.shape[1::-1]


def test_tars_are_turned_on_request(tmp_path, capsys):
    data, upright = turned(6)
    write_tar(tmp_path / "a.tar", sample("a", {"caption": "x"}, data))
    prepare(capsys, "cc3m", "--images", tmp_path / "a.tar", "--output", tmp_path / "out", "--upright")
    (content,) = read(tmp_path / "out").values()
    assert np.abs(decoded(content["image"])[0] - upright).mean() < 4
    assert atomic.read_json(tmp_path / "out" / job.INFO)["provenance"]["settings"]["upright"] is True


def test_damaged_exif_data_does_not_cost_the_image(tmp_path, capsys):
    data, _ = turned(6)
    place = data.index(b"Exif\0\0") + 6
    for name, exif in {"a": b"nonsense", "b": data[place : place + 4] + b"\xff" * 4}.items():
        damaged = data[:place] + exif + data[place + len(exif) :]
        assert pictures.inspect(damaged, True) == pictures.inspect(damaged, False), name
    for orientation in (0, 9, 700):
        other = bytearray(data)
        tag = data.index(b"\x01\x12" if data[place : place + 2] == b"MM" else b"\x12\x01", place)
        other[tag + 8 : tag + 10] = orientation.to_bytes(2, "big" if data[place : place + 2] == b"MM" else "little")
        assert decoded(bytes(other))[1] == orientation
        assert pictures.inspect(bytes(other), True) == pictures.inspect(data, False)


def test_array_record_holds_the_same_samples(cc3m, capsys):
    prepare(capsys, *dreamlip(cc3m))
    os.rename(cc3m / "out", cc3m / "tars")
    prepare(capsys, *dreamlip(cc3m, "--format", "array_record"))
    assert sorted(_contents(cc3m / "out")) == [f"cc3m-{number:05d}.array_record" for number in range(3)]
    assert read(cc3m / "out") == read(cc3m / "tars")


def test_names_of_members_stay_names(tmp_path, capsys):
    """Keys of others never become paths: the shards have their own."""
    write_tar(tmp_path / "a.tar", sample("../../evil", {"url": url(1)}) + sample("a/b/c", {"url": url(2)}))
    write_csv(tmp_path / "c.csv", [[url(1), *["x"] * 7], [url(2), *["x"] * 7]])
    prepare(
        capsys, "dreamlip", "--captions", tmp_path / "c.csv", "--images", tmp_path / "a.tar", "--output", tmp_path / "o"
    )
    assert list(_keys_by_shard(tmp_path / "o").values()) == [["000000000.json"]]
    assert atomic.read_json(tmp_path / "o" / job.INFO)["left_out"]["skipped"] == {"unsafe name": 3}
    with pytest.raises(SystemExit):
        prepare(capsys, *dreamlip(tmp_path, "--prefix", "../x"))


# ---------------------------------------------------------------------------------------------------------------------
# What is skipped


def test_everything_skipped_is_counted(tmp_path, capsys):
    cut = picture(300, 200)[:-2000]
    members = [
        *sample("good", {"url": url(1)}),
        *sample("again", {"url": url(1)}),
        *sample("cut", {"url": url(2)}, cut),
        *sample("empty", {"url": url(2)}, b""),
        *sample("unknown", {"url": url(3)}),
        *sample("noisy", b"{"),
        *sample("list", b"[]"),
        *sample("number", {"url": 7}),
        ("alone.jpg", picture()),
        *sample("photo.00", {"url": url(6)}),
    ]
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])  # cut: its complete samples count
    (tmp_path / "c.tar").write_bytes(b"")
    rows = [
        [url(1), "first", *[""] * 6],
        [url(1), "second", *[""] * 6],
        [url(2), "x", *[""] * 6],
        [url(4), *[""] * 7],
        ["", *["x"] * 7],
        [url(5), "too few"],
        [url(6), *["x"] * 7],
    ]
    write_csv(tmp_path / "c.csv", rows)
    arguments = ["--captions", tmp_path / "c.csv", "--images", tmp_path, "--output", tmp_path / "out"]
    printed = prepare(capsys, "dreamlip", *arguments)
    found = read(tmp_path / "out")
    assert [content["raw_caption"] for content in found.values()] == [["first"]]  # of two rows the first
    assert list(found) == ["a.tar/good"]  # of several images the first
    info = atomic.read_json(tmp_path / "out" / job.INFO)
    captions, images = info["captions"], info["images"]
    assert captions["skipped"] == {
        "no captions": 1,
        "no join key": 1,
        "another number of cells than the header has": 1,
    }
    assert (captions["read"], captions["repeated"], captions["keys"]) == (7, 1, 3)
    assert captions["keys_without_image"] == 2
    assert images["read"] == info["samples"] + sum(images["skipped"].values())
    of_a = {
        "image that training cannot use": 2,
        "no captions for this image in the caption files": 1,
        "json that is no object": 2,
        "json without url or downloadurl": 1,
    }
    assert all(images["skipped"][reason] >= count for reason, count in of_a.items())
    assert images["skipped"]["image whose captions went to an earlier one"] >= 2
    assert {"shard cut short", "empty file", "image without json"} <= set(info["left_out"]["skipped"])
    for reason in (*captions["skipped"], *images["skipped"], *info["left_out"]["skipped"]):
        assert reason in printed
    assert "a.tar cut: cannot decode the image" in printed
    assert re.search(r"skipped: name with a dot inside: .* 2   e\.g\. a\.tar photo\.00\.jpg", printed)


def test_nothing_matches(cc3m, capsys):
    """The tallies of both sides and the keys found on both tell why."""
    write_csv(cc3m / "cc3m.csv", [["http://elsewhere/1", *["x"] * 7], ["http://elsewhere/2", "few"]])
    with pytest.raises(atomic.PrepareError) as raised:
        prepare(capsys, *dreamlip(cc3m))
    lines = [" ".join(line.split()) for line in str(raised.value).splitlines()]
    assert lines[0] == "no image has captions: 14 images read"
    assert lines[1].startswith("skipped: no captions for this image in the caption files 14 e.g. cc3m-train-0000.tar 0")
    assert lines[2] == "captions: 2 rows read"
    assert lines[3].startswith("skipped: another number of cells than the header has 1 e.g.")
    assert lines[3].endswith("cc3m.csv, row 2: 2 instead of 8")
    assert lines[4] == "captions are for 'http://elsewhere/1', …"
    assert lines[5] == f"images are found by {url(0)!r}, {url(1)!r}, {url(2)!r}, …"
    assert not list((cc3m / "out").glob("*.tar"))
    write_csv(cc3m / "cc3m.csv", [[url(1), *["x"] * 7]])
    prepare(capsys, *dreamlip(cc3m))  # into the same folder: nothing of the first run is of use
    assert len(read(cc3m / "out")) == 1


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_rows_of_other_keys_are_named(tmp_path, capsys, form):
    """JSON has no header that could be checked: each object is another one's affair."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture())
    objects = [{"image": "a.jpg", "text": "x"}, {"file_name": "a.jpg", "label": "y"}]
    path = tmp_path / f"c.{form}"
    path.write_text(json.dumps(objects) if form == "json" else "\n".join(map(json.dumps, objects)))
    arguments = ["--captions", path, "--images", tmp_path / "images", "--output", tmp_path / "out"]
    with pytest.raises(atomic.PrepareError) as raised:
        prepare(capsys, "folder", *arguments)
    message = " ".join(str(raised.value).split())
    assert "captions: 2 rows read" in message
    assert f"no join key 1 e.g. {path}, row 1: no file_name, caption; its keys are image, text" in message
    assert f"no captions 1 e.g. {path}, row 2: no caption; its keys are file_name, label" in message
    assert "captions are for nothing images are found by 'a.jpg', …" in message
    arguments = ["--captions", path, "--images", write_tar(tmp_path / "a.tar", sample("a", {"url": url(1)}))]
    with pytest.raises(atomic.PrepareError, match=r"no Image Path, raw_caption.*; its keys are image, text"):
        prepare(capsys, "dreamlip", *arguments, "--output", tmp_path / "out2")


def test_unusable_files_are_named(cc3m, capsys):
    write_csv(cc3m / "cc3m.csv", [["x"] * 8], ("url", *FIELDS))
    with pytest.raises(atomic.PrepareError, match=r"cc3m.csv has no column \['Image Path'\]; its columns are \['url'"):
        prepare(capsys, *dreamlip(cc3m))
    with pytest.raises(atomic.PrepareError, match="need a --runner that they are for"):
        command.main([*map(str, dreamlip(cc3m)), "--", "--project=x"])
    with pytest.raises(FileNotFoundError, match="gone"):
        prepare(capsys, "cc3m", "--images", cc3m / "gone.tar", "--output", cc3m / "out")


def test_a_quotation_mark_that_never_closes(cc3m, capsys, monkeypatch):
    monkeypatch.setattr("flair_jax.data.prepare.rows.MAX_CELL", 1000)
    with open(cc3m / "cc3m.csv", "a") as file:
        file.write('"http://x' + "\n1,2,3,4,5,6,7,8" * 200)
    with pytest.raises(atomic.PrepareError, match=r"cc3m.csv, before line .* never closed"):
        prepare(capsys, *dreamlip(cc3m))


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


def test_killed_and_gone_on(cc3m, capsys):
    """kill -9 at several moments: nothing half-written has a final name, and the end is the same."""
    prepare(capsys, *dreamlip(cc3m))
    expected = _contents(cc3m / "out")
    os.rename(cc3m / "out", cc3m / "unbroken")
    # The process stops itself for good where the n-th file is about to get its name.
    code = (
        "import os, signal, sys\n"
        "from flair_jax.data.prepare import __main__, atomic\n"
        "left, replace = int(sys.argv.pop(1)), os.replace\n"
        "def counted(source, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = counted\n"
        "__main__.main(sys.argv[1:])\n"
    )
    shards_seen = set()
    for left in (3, 5, 8, 5):  # while captions are indexed, images matched, numbered, and the second shard written
        arguments = [str(left), *map(str, dreamlip(cc3m)), "--workers", "1"]
        killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        for name, content in _contents_of_shards(cc3m / "out").items():
            assert expected[name] == content
            shards_seen.add(name)
    assert shards_seen and shards_seen < set(expected)
    reported = [atomic.read_json(path)["name"] for path in (cc3m / "out" / ".prepare" / "shards").glob("*.json")]
    assert reported
    before = {name: (cc3m / "out" / name).stat().st_mtime_ns for name in reported}
    prepare(capsys, *dreamlip(cc3m))
    assert _contents(cc3m / "out") == expected
    for name, written in before.items():
        assert (cc3m / "out" / name).stat().st_mtime_ns == written  # not done again
    unbroken, resumed = (atomic.read_json(cc3m / name / job.INFO) for name in ("unbroken", "out"))
    assert {**unbroken, "provenance": None} == {**resumed, "provenance": None}


def _contents_of_shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).glob("[!.]*.tar")}


def test_workers_end_with_a_killed_run(cc3m):
    """The processes of the local runner do not live on, and do not disturb the next run."""
    arguments = [*map(str, dreamlip(cc3m)), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "flair_jax.data.prepare", *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (workers := _workers(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60  # its own: on a busy machine the start alone may take the first one
    while (living := _workers(1) & workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living


def _workers(parent: int) -> set[int]:
    """The process ids of all descendants that are workers of the local runner."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    processes = [line.split(None, 2) for line in listed]
    family = {parent}
    for _ in processes:
        grown = family | {int(pid) for pid, above, _ in processes if int(above) in family}
        if grown == family:
            break
        family = grown
    return {int(pid) for pid, _, name in processes if int(pid) in family and runner.WORKER in name}


def test_finished_work_is_not_done_again_and_other_work_is_refused(cc3m, capsys):
    first = prepare(capsys, *dreamlip(cc3m))
    assert prepare(capsys, *dreamlip(cc3m)) == first
    with pytest.raises(atomic.PrepareError, match="holds other prepared data"):
        prepare(capsys, *dreamlip(cc3m, "--resize", 32))
    (cc3m / "full").mkdir()
    (cc3m / "full" / "photo.jpg").touch()
    with pytest.raises(atomic.PrepareError, match=r"is not empty \(photo.jpg\)"):
        prepare(capsys, *dreamlip(cc3m, "--output", cc3m / "full"))


def test_interrupted_work_with_other_options_or_inputs_is_refused(cc3m, capsys, monkeypatch):
    def stop(*arguments):
        raise atomic.PrepareError("stopped")

    monkeypatch.setattr("flair_jax.data.prepare.stages.plan", stop)
    with pytest.raises(atomic.PrepareError, match="stopped"):
        prepare(capsys, *dreamlip(cc3m))
    with pytest.raises(atomic.PrepareError, match="another run, which differs in settings"):
        prepare(capsys, *dreamlip(cc3m, "--quality", 80))
    os.utime(cc3m / "cc3m-train-0001.tar", ns=(1, 1))
    with pytest.raises(atomic.PrepareError, match="another run, which differs in images"):
        prepare(capsys, *dreamlip(cc3m))


def test_a_tar_that_is_replaced_meanwhile(cc3m, capsys, monkeypatch):
    inspect = pictures.inspect

    def meddling(*arguments):
        os.utime(cc3m / "cc3m-train-0001.tar", ns=(1, 1))
        return inspect(*arguments)

    monkeypatch.setattr(pictures, "inspect", meddling)
    with pytest.raises(atomic.PrepareError, match=r"cc3m-train-0001.tar was replaced or changed"):
        prepare(capsys, *dreamlip(cc3m))


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_full_disk(cc3m, capsys, form):
    """A limit on the size of files stands for the full disk: writing fails in the middle of a shard."""
    arguments = dreamlip(cc3m, "--format", form)
    size = len(picture(80, 60)) * 2
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Only while shards are written: the intermediate files are smaller, but not by much here.
            write = command.job.stages.shards.write

            def limited(*arguments):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
                try:
                    write(*arguments)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

            patch.setattr(command.job.stages.shards, "write", limited)
            with pytest.raises(atomic.PrepareError, match=r"cc3m-00000\S* cannot be written: .*make room"):
                prepare(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert [path.name for path in (cc3m / "out").iterdir()] == [".prepare"]  # nothing, not even half a file
    prepare(capsys, *arguments)
    assert atomic.read_json(cc3m / "out" / job.INFO)["samples"] == 11


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_store_tells_keys_of_one_hash_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "hash_of", lambda key: len(key))
    monkeypatch.setattr(store, "RUN_ROWS", 3)
    keys = ["aa", "b", "cc", "aa", "dd", "e", "aa"]
    with store.Writer(tmp_path, "x", tmp_path / "x.rows") as writer:
        for number, key in enumerate(keys):
            writer.add(key, {"n": number})
    assert writer.runs == [3, 3, 1]
    found = store.Store(tmp_path, {"x": writer.runs}).find(["dd", "aa", "zz", "b", "aaa"])
    assert [captions and [row["n"] for row in captions.captions] for captions in found] == [
        [4],
        [0, 3, 6],
        None,
        [1],
        None,
    ]
    numbers = {captions.number for captions in found if captions}
    assert len(numbers) == 3 and max(numbers) < len(keys)


@pytest.mark.parametrize("run_rows", [4, 1000])
def test_store_counts_repeated_keys(tmp_path, monkeypatch, run_rows):
    monkeypatch.setattr(store, "RUN_ROWS", run_rows)
    monkeypatch.setattr(store, "CHUNK_ROWS", 3)
    rng = np.random.default_rng(0)
    runs, keys = {}, []
    for name in ("a", "b"):
        with store.Writer(tmp_path, name, tmp_path / f"{name}.rows") as writer:
            for number in rng.integers(0, 30, 25).tolist():
                keys.append(f"k{number}")
                writer.add(keys[-1], {})
        runs[name] = writer.runs
    assert store.Store(tmp_path, runs).count_repeated() == len(keys) - len(set(keys))


def test_peak_memory_does_not_grow_with_the_captions(tmp_path):
    """The same few images, and 5,000 or 20,000 rows of 2 kB."""
    write_tar(tmp_path / "a.tar", sample("a", {"url": url(1)}))
    peaks = []
    for count in (5_000, 20_000):
        write_csv(tmp_path / "c.csv", ([url(number), *["A dog of 3 years. " * 15] * 7] for number in range(count)))
        code = (
            "import resource, sys; from flair_jax.data.prepare import __main__; __main__.main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        arguments = ["dreamlip", "--captions", "c.csv", "--images", "a.tar", "--output", str(count), "--workers", "1"]
        environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
        printed = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment)
        peaks.append(int(printed.split()[-1]) / 1024)  # MiB
    assert peaks[1] - peaks[0] < 12  # the larger file has 30 MB more


def test_folder_is_cut_into_units(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "FOLDER_UNIT", 2)
    for name in ("b.jpg", "a.jpg", "c/d.JPEG", ".hidden.jpg", ".git/x.jpg", "note.txt"):
        (tmp_path / "i" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "i" / name).write_bytes(b"x")
    folder = inputs.list_folder(str(tmp_path / "i"), tmp_path / "listing")
    members = [[member.name for member in folder.scan(unit, folder.state(unit))[0]] for unit in range(len(folder))]
    assert members == [["a.jpg", "b.jpg"], ["c/d.JPEG"]]
    with pytest.raises(atomic.PrepareError, match="hold no image"):
        inputs.list_folder(str(tmp_path / "listing"), tmp_path / "other")


def test_inspection_refuses_what_training_refuses():
    with pytest.raises(pixels.ImageError, match="float"):
        target = io.BytesIO()
        Image.fromarray(np.zeros((8, 8), np.float32)).save(target, "TIFF")
        pictures.inspect(target.getvalue(), False)


def test_totals_add_up():
    parts = [report.Tally(read=2), report.Tally(read=3)]
    parts[1].skip("x", "first")
    parts[1].skip("x", "second", 2)
    total = report.Tally.total(part.to_json() for part in parts)
    assert (total.read, total.skipped, total.examples) == (5, {"x": 3}, {"x": "first"})
