"""Which shards a pattern names, in which format, and sources that are joined."""

import itertools
import pathlib
import pickle

import pytest
from shard_files import samples, write_array_record, write_tar

from flair_jax.data.sources.base import RecordError, ShardError
from flair_jax.data.sources.open import expand, open_source
from flair_jax.data.sources.tf_example import Example

# ---------------------------------------------------------------------------------------------------------------------
# Patterns


@pytest.fixture
def tree(tmp_path):
    for name in (
        "a/08.tar",
        "a/09.tar",
        "a/10.tar",
        "b/x.tar",
        "b/y.tar",
        "b/note.txt",
        "c[1].tar",
        "d/07.tar",
        "d/17.tar",
        "e{1.tar",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("T/a/09.tar", ["a/09.tar"]),
        ("T/a/{08..10}.tar", ["a/08.tar", "a/09.tar", "a/10.tar"]),
        ("T/a/{08..09}.tar::T/b", ["a/08.tar", "a/09.tar", "b/x.tar", "b/y.tar"]),
        ("T/{d,d}/{0..1}{7..7}.tar", ["d/07.tar", "d/17.tar", "d/07.tar", "d/17.tar"]),
        ("T/[ab]/[0-9]*.tar", ["a/08.tar", "a/09.tar", "a/10.tar"]),
        ("T/a", ["a/08.tar", "a/09.tar", "a/10.tar"]),
        ("T/{a,b}", ["a/08.tar", "a/09.tar", "a/10.tar", "b/x.tar", "b/y.tar"]),
        ("T/c[1].tar", ["c[1].tar"]),
        ("T/a/09.tar::T/a/09.tar", ["a/09.tar", "a/09.tar"]),
        ("T/{a/{08..10},b/{x,y}}.tar", ["a/08.tar", "a/09.tar", "a/10.tar", "b/x.tar", "b/y.tar"]),
        ("T/{b,a}/{[xy],0?}.tar", None),  # of each name without braces there must be a file
        ("T/a/{10..8..2}.tar", None),
        ("T/a/{10..08}.tar", ["a/10.tar", "a/09.tar", "a/08.tar"]),
        ("T/a/{008..010}.tar", None),
        ("T/b/{x..y}.tar", ["b/x.tar", "b/y.tar"]),
        ("T/{b/x,a/08}.tar", ["b/x.tar", "a/08.tar"]),
        ("T/b/{x}.tar", None),  # one word in braces is no choice
        ("T/e{1.tar", ["e{1.tar"]),
    ],
)
def test_patterns(tree, pattern, expected):
    if expected is None:
        with pytest.raises(FileNotFoundError, match="no such file"):
            expand(pattern.replace("T", str(tree)))
        return
    assert expand(pattern.replace("T", str(tree))) == [str(tree / name) for name in expected]


def test_lists_and_paths(tree):
    assert expand([tree / "b", f"{tree}/a/{{08..09}}.tar"]) == [
        str(tree / name) for name in ("b/x.tar", "b/y.tar", "a/08.tar", "a/09.tar")
    ]
    assert expand((str(tree / "a/08.tar"),)) == [str(tree / "a/08.tar")]


def test_braces_that_are_not_balanced(tree):
    with pytest.raises(FileNotFoundError, match=r"/a/\{08\.\.10\.tar': no such file, and its braces are not balanced"):
        expand(f"{tree}/a/{{08..10.tar")


@pytest.mark.parametrize(
    "pattern", ["~/a/08.tar", "~/a/0[8].tar", "~/a/{08,08}.tar", "{~/a,~/a}/08.tar", "~/d::~/a/08.tar", "~/list.txt"]
)
def test_the_home_folder(tree, monkeypatch, pattern):
    monkeypatch.setenv("HOME", str(tree))
    (tree / "list.txt").write_text("~/a/08.tar\n")
    found = expand(pattern)
    assert found[-1] == str(tree / "a/08.tar") and all("~" not in path for path in found)
    assert expand([pathlib.Path(pattern)])[-1] == found[-1] or "::" in pattern


def test_indexes_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "0.tar", samples("0"))
    assert open_source("~/0.tar", index_dir="~/indexes").shards == [str(tmp_path / "0.tar")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "indexes"]
    assert len(list((tmp_path / "indexes").iterdir())) == 1


def test_a_file_that_lists_shards(tree):
    path = tree / "lists.txt"
    path.write_bytes("\ufeff# our shards\r\na/{08..09}.tar\r\n\n  b \ngs://x/{0..1}.tar\nc[1].tar\n".encode())
    expected = [str(tree / name) for name in ("a/08.tar", "a/09.tar", "b/x.tar", "b/y.tar")]
    expected += ["gs://x/0.tar", "gs://x/1.tar", str(tree / "c[1].tar")]
    assert expand(path) == expected
    assert expand(f"{tree}/lists*.txt::{tree}/a/10.tar") == [*expected, str(tree / "a/10.tar")]


@pytest.mark.parametrize(
    "content, error, message",
    [
        (b"# nothing\n", ShardError, r"lists\.txt lists no shards"),
        (b"b/note.txt\n", ShardError, r"lists\.txt lists another list, b/note\.txt"),
        ("tr\xe4ume.tar".encode("latin-1"), ShardError, r"lists\.txt: a list of shards is UTF-8 text.*position 2"),
        (b"a/08.tar\nb/z.tar\n", FileNotFoundError, r"no such file: '.*/b/z\.tar'"),
    ],
)
def test_lists_of_shards_that_cannot_be_used(tree, content, error, message):
    (tree / "lists.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        expand(tree / "lists.txt")


@pytest.mark.parametrize("pattern", ["T/a/{08..12}.tar", "T/none-*.tar", "T/empty", "T/a/08.tar::T/d.tar", ""])
def test_a_pattern_without_files_is_named(tree, pattern):
    pattern = pattern.replace("T", str(tree))
    with pytest.raises(FileNotFoundError) as raised:
        expand(pattern)
    assert repr(pattern.split("::")[-1]) in str(raised.value)


def test_missing_files_of_a_range_are_counted(tree):
    with pytest.raises(FileNotFoundError, match=r"11\.tar' and 1 more"):
        expand(f"{tree}/a/{{08..12}}.tar")


@pytest.mark.parametrize("shards", [None, 3, [b"x"], {"a": 1}])
def test_shards_of_a_wrong_type(shards):
    with pytest.raises(TypeError, match="shards must be"):
        expand(shards)


def test_no_shards():
    with pytest.raises(FileNotFoundError, match="empty"):
        expand([])


@pytest.mark.parametrize(
    "name",
    [
        *("x.array_record", "x.arrayrecord", "x-train.array_record-00003-of-00010"),
        *("x.tfrecord", "x.tfrecords", "x.tfrecord-00000-of-00010", "x.tfrecords-00000-of-00010"),
    ],
)
def test_folders_hold_shards_of_any_format(tmp_path, name):
    for file in (name, "info.json", f"{name}.index.npz", "x.tar.gz", "tfrecord"):
        (tmp_path / file).touch()
    assert expand(tmp_path) == [str(tmp_path / name)]
    assert expand(f"{tmp_path}/{name[:12]}*") == [str(tmp_path / name)]


def test_a_folder_of_several_formats_is_refused(tmp_path):
    for name in ("0.tar", "1.tar", "x.tfrecord"):
        (tmp_path / name).touch()
    with pytest.raises(ShardError, match=r"several formats \(\{'webdataset': 2, 'TFRecord': 1\}\).*\*\.tar"):
        expand(tmp_path)
    assert len(expand(f"{tmp_path}/*.tar")) == 2


def test_a_folder_with_the_splits_of_a_data_set_is_refused(tmp_path):
    for name in ("a-test.array_record-00000-of-00001", "a-train.array_record-00000-of-00001", "dataset_info.json"):
        (tmp_path / name).touch()
    with pytest.raises(ShardError, match=rf"tfds:{tmp_path}\?split=train"):
        expand(tmp_path)


def test_what_is_not_on_this_machine_is_left_to_those_who_open_it():
    assert expand("gs://b/{0..1}.tar::tfds:a/b:1.0.0?split=train[:5%]+test::https://h/x.tar?key=a*") == [
        "gs://b/0.tar",
        "gs://b/1.tar",
        "tfds:a/b:1.0.0?split=train[:5%]+test",
        "https://h/x.tar?key=a*",
    ]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tfrecord.gz", "x.zip", "x"])
def test_a_name_of_no_format(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ShardError, match=rf"{name}: the name says no format.*unpack \.gz"):
        open_source(tmp_path / name)


def test_no_such_kind_of_store():
    with pytest.raises(FileNotFoundError, match=r"nowhere://a/0\.tar.*no kind of store"):
        open_source("nowhere://a/0.tar")


# ---------------------------------------------------------------------------------------------------------------------
# Joined sources


@pytest.fixture
def joined(tmp_path):
    """Tars, ArrayRecord with one damaged record, tars again."""
    tars = [write_tar(tmp_path / f"{key}.tar", [*samples(key), (f"no{key}.jpg", b"")]) for key in "abc"]
    records_ = [
        Example(features={"feature": {name: {"bytes_list": {"value": [value]}} for name, value in fields.items()}})
        for fields in ({"image": b"I", "json": b"J", "key": b"r0"}, {"json": b"J"}, {"image": b"I", "json": b"J"})
    ]
    path = write_array_record(tmp_path / "r.array_record", [record.SerializeToString() for record in records_])
    return f"{tars[0]}::{tars[1]}::{path}::{tars[2]}", tars, path


def test_sources_of_several_formats_are_joined_in_order(joined):
    shards, tars, path = joined
    source = open_source(shards)
    assert len(source) == 6
    assert source.shards == [*tars[:2], path, tars[2]]
    assert source.skipped == {"image without json": 3}
    expected = [("a", tars[0]), ("b", tars[1]), ("r0", path), None, ("r.array_record:2", path), ("c", tars[2])]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for index, place in enumerate(expected):
            if place is None:
                with pytest.raises(RecordError, match="no image"):
                    copy[index]
            else:
                record = copy[index]
                assert (record.key, record.shard) == place and record.json[:1] == b"J"
    assert source.where(1) == (tars[1], "b") and source.where(3) == (path, "r.array_record:1")
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.where(index)


def test_the_checksum_of_joined_sources_knows_their_order(joined):
    shards, tars, path = joined
    checksums = {open_source(list(order)).checksum for order in itertools.permutations([tars[0], path])}
    checksums |= {open_source(shards).checksum, open_source(tars).checksum}
    assert len(checksums) == 4
    assert open_source(shards.split("::")).checksum == open_source(shards).checksum
