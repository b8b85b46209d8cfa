"""Webdataset tars as they are met: good ones, and all kinds of damage."""

import collections
import os
import pathlib
import pickle
import tarfile

import pytest
from shard_files import samples, write_tar

from flair_jax.data.sources import webdataset
from flair_jax.data.sources.base import Record, ShardError
from flair_jax.data.sources.open import open_source


def names(source) -> list[str]:
    return [source[index].key for index in range(len(source))]


def test_samples_in_the_order_of_the_shards(tmp_path):
    write_tar(tmp_path / "0.tar", samples("000", "001"))
    write_tar(tmp_path / "1.tar", [])
    write_tar(tmp_path / "2.tar", samples("002", extension="png"))
    source = open_source(tmp_path)
    assert len(source) == 3
    assert [source[index] for index in range(3)] == [
        Record("000", str(tmp_path / "0.tar"), b"I000", b"J000"),
        Record("001", str(tmp_path / "0.tar"), b"I001", b"J001"),
        Record("002", str(tmp_path / "2.tar"), b"I002", b"J002"),
    ]
    assert source.where(2) == (str(tmp_path / "2.tar"), "002")
    assert not source.skipped
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    long = "folder/" + "x" * 90 if format == tarfile.USTAR_FORMAT else "folder/" + "x" * 300
    keys = (long, "träumerei/日本", "short")
    source = open_source(write_tar(tmp_path / "0.tar", samples(*keys), format=format))
    assert names(source) == list(keys)
    assert [source[index].image for index in range(3)] == [b"I" + key.encode() for key in keys]


def test_the_key_ends_at_the_first_dot_of_the_file_name(tmp_path):
    members = [("./v1.0/a.b.jpg", b"no"), ("./v1.0/a.JPG", b"image"), ("./v1.0/a.json", b"{}"), ("v1.0/a.txt", b"text")]
    source = open_source(write_tar(tmp_path / "0.tar", members))
    assert [(record.key, record.image) for record in source] == [("v1.0/a", b"image")]
    assert not source.skipped


@pytest.mark.parametrize(
    "members, count, first",
    [
        (samples("photo.00", "photo.01"), 4, "photo.00.jpg"),  # both would be samples of the key `photo`
        (samples("0.00"), 2, "0.00.jpg"),  # also beside a complete sample `0`: these two belong together
        (samples("photo.JPG", extension="JPG"), 2, "photo.JPG.JPG"),
        ([("a.b.png", b"")], 1, "a.b.png"),
        ([("f.d/a.b.json", b"")], 1, "f.d/a.b.json"),
        ([("0.masks.png", b""), ("0.seg.json", b""), ("0.a.b.txt", b"")], 0, None),  # more parts of the sample 0
    ],
)
def test_names_with_a_dot_inside_are_counted_and_the_first_is_named(tmp_path, caplog, members, count, first):
    path = write_tar(tmp_path / "shard.tar", samples("0") + members + samples("1"))
    for _ in range(2):  # built, and read from its file
        caplog.clear()
        source = open_source(path)
        assert names(source) == ["0", "1"]
        assert source.skipped == ({webdataset.DOTTED: count} if count else {})
        assert (f"{count} x {webdataset.DOTTED} (first: {first})" in caplog.text) == bool(count)


def test_only_names_with_a_dot_inside(tmp_path):
    with pytest.raises(ShardError, match=r"no sample .*4 x name with a dot inside.*rename it.*first: photo\.00\.jpg"):
        open_source(write_tar(tmp_path / "0.tar", samples("photo.00", "photo.01")))


def test_partners_need_not_be_neighbours(tmp_path):
    members = samples("0", "1")
    source = open_source(write_tar(tmp_path / "0.tar", members[0::2] + members[1::2]))
    assert [(record.image, record.json) for record in source] == [(b"I0", b"J0"), (b"I1", b"J1")]


def tar_info(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "members, reasons",
    [
        ([("a.jpg", b"")], {"image without json": 1}),
        ([("a.json", b""), ("b.json", b"")], {"json without image": 2}),
        ([tar_info("a", tarfile.DIRTYPE)], {"directory": 1}),
        ([tar_info("a.jpg", tarfile.SYMTYPE, "b.jpg"), tar_info("a.json", tarfile.LNKTYPE, "0.json")], {"link": 2}),
        ([tar_info("a.jpg", tarfile.FIFOTYPE)], {"special file": 1}),
        (samples("../a") + samples("b/../../c") + samples("/d"), {"unsafe name": 6}),
        ([("._a.jpg", b""), ("b/.json", b"")], {"name without a key": 2}),
        ([("0.jpg", b"other"), ("0.json", b"other")], {"second image or json of a key": 2}),
        ([("0.webp", b"other")], {"second image or json of a key": 1}),
        ([("a.txt", b""), ("a.cls", b"")], {}),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, caplog, members, reasons):
    path = write_tar(tmp_path / "shard.tar", samples("0") + members + samples("1"))
    for _ in range(2):  # built, and read from its file
        caplog.clear()
        source = open_source(path)
        assert source.skipped == collections.Counter(reasons)
        assert [(record.key, record.image) for record in source] == [("0", b"I0"), ("1", b"I1")]
        assert all(reason in caplog.text and path in caplog.text for reason in reasons)


def test_a_tar_that_was_cut_keeps_its_complete_members(tmp_path):
    whole = pathlib.Path(
        write_tar(tmp_path / "whole.tar", [(f"{i}.{e}", bytes(2000)) for i in range(3) for e in ("jpg", "json")])
    )
    content = whole.read_bytes()
    member = 512 + 2048
    complete = collections.Counter()
    for size in range(2 * member + 100, 6 * member + 1024, 300):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(content[:size])
        source = open_source(str(path))
        assert len(source) == min((size + 48) // (2 * member), 3), size  # the last 48 bytes of a member are padding
        assert source.skipped["shard cut short"] == (size < 6 * member + 512), size
        complete[len(source)] += 1
    assert set(complete) == {1, 2, 3}


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = pathlib.Path(write_tar(tmp_path / "shard.tar", samples("0", "1", "2")))
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 150] ^= 0xFF  # in the checksum of the third member
    path.write_bytes(content)
    source = open_source(str(path))
    assert names(source) == ["0"]
    assert source.skipped == {"damaged header, rest of the shard not read": 1}


def test_tars_that_were_joined_by_cat_are_not_read_in_part_in_silence(tmp_path):
    paths = [pathlib.Path(write_tar(tmp_path / f"{n}.tar", samples(*names))) for n, names in enumerate(("01", "2"))]
    (tmp_path / "both.tar").write_bytes(b"".join(path.read_bytes() for path in paths))
    source = open_source(str(tmp_path / "both.tar"))
    ((reason, count),) = source.skipped.items()
    assert names(source) == ["0", "1"] and count == 1 and reason.startswith("more after the end mark of the tar")


def test_a_file_of_no_bytes_is_left_out(tmp_path):
    (tmp_path / "0.tar").touch()
    write_tar(tmp_path / "1.tar", samples("1"))
    source = open_source(tmp_path)
    assert names(source) == ["1"] and source.skipped == {"empty file": 1}


@pytest.mark.parametrize("content", [b"no tar", b"no tar " * 1000, None])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    path = tmp_path / "shard.tar"
    if content is None:
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
    else:
        path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard\.tar is not a tar file"):
        open_source(str(path))


def test_no_sample_at_all(tmp_path):
    with pytest.raises(ShardError, match=r"no sample .*left out: 1 x image without json \(first: a\.jpg\)"):
        open_source(write_tar(tmp_path / "0.tar", [("a.jpg", b"")]))


@pytest.mark.parametrize("change", ["replaced", "appended", "touched", "removed"])
def test_a_shard_that_changes_after_its_index_was_read(tmp_path, change):
    path = pathlib.Path(write_tar(tmp_path / "0.tar", samples("0", "1")))
    source = open_source(str(path))
    assert source[0].image == b"I0"
    if change == "replaced":
        os.replace(write_tar(tmp_path / "new", samples("2", "3")), path)
    elif change == "appended":
        with open(path, "ab") as file:
            file.write(bytes(512))
    elif change == "touched":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.unlink()
    with pytest.raises(ShardError, match=r"0\.tar.*(replaced or changed|cannot be read)"):
        source[0]


def test_a_source_is_small_when_sent_to_a_worker(tmp_path):
    source = open_source(write_tar(tmp_path / "0.tar", samples(*(f"{i:09d}" for i in range(2000)))))
    content = pickle.dumps(source)
    assert len(content) < 60 * len(source)
    assert [record.key for record in pickle.loads(content)] == names(source)


def test_the_checksum_knows_the_data_not_its_place(tmp_path):
    def checksum(name, members, **options):
        return open_source(write_tar(tmp_path / name, members, **options)).checksum

    first = checksum("a.tar", samples("0", "1"))
    assert checksum("b.tar", [("x.txt", b"moves the rest"), *samples("0", "1")]) == first
    assert checksum("c.tar", samples("1", "0")) != first
    assert checksum("d.tar", samples("0", "2")) != first
    assert checksum("e.tar", [*samples("0"), ("1.jpg", b"longer"), ("1.json", b"J1")]) != first
