"""Shards as they are met: patterns, tars good and bad, and the index of offsets beside them."""

import collections
import hashlib
import io
import logging
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

from data import records


def write_tar(path, members, **options) -> str:
    """`members`: (name, bytes), or a TarInfo without content."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(*keys, extension="jpg"):
    return [
        member
        for key in keys
        for member in ((f"{key}.{extension}", b"I" + key.encode()), (f"{key}.json", b"J" + key.encode()))
    ]


def names(source) -> list[str]:
    return [source[index].key for index in range(len(source))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The default cache folder, away from the user's home."""
    monkeypatch.setattr(records, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    ],
)
def test_patterns(tree, pattern, expected):
    assert records.expand(pattern.replace("T", str(tree))) == [str(tree / name) for name in expected]


def test_lists_and_paths(tree):
    assert records.expand([tree / "b", f"{tree}/a/{{08..09}}.tar"]) == [
        str(tree / name) for name in ("b/x.tar", "b/y.tar", "a/08.tar", "a/09.tar")
    ]
    assert records.expand((str(tree / "a/08.tar"),)) == [str(tree / "a/08.tar")]


@pytest.mark.parametrize("pattern", ["T/a/{08..12}.tar", "T/none-*.tar", "T/empty", "T/a/08.tar::T/d.tar", ""])
def test_a_pattern_without_files_is_named(tree, pattern):
    pattern = pattern.replace("T", str(tree))
    with pytest.raises(FileNotFoundError) as raised:
        records.expand(pattern)
    assert repr(pattern.split("::")[-1]) in str(raised.value)


def test_missing_files_of_a_range_are_counted(tree):
    with pytest.raises(FileNotFoundError, match=r"11\.tar' and 1 more"):
        records.expand(f"{tree}/a/{{08..12}}.tar")


@pytest.mark.parametrize("shards", [None, 3, [b"x"], {"a": 1}])
def test_shards_of_a_wrong_type(shards):
    with pytest.raises(TypeError, match="shards must be"):
        records.expand(shards)


def test_no_shards():
    with pytest.raises(FileNotFoundError, match="empty"):
        records.expand([])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_samples_in_the_order_of_the_shards(tmp_path):
    write_tar(tmp_path / "0.tar", samples("000", "001"))
    write_tar(tmp_path / "1.tar", [])
    write_tar(tmp_path / "2.tar", samples("002", extension="png"))
    source = records.WebDataset(tmp_path)
    assert len(source) == 3
    assert [source[index] for index in range(3)] == [
        records.Record("000", str(tmp_path / "0.tar"), b"I000", b"J000"),
        records.Record("001", str(tmp_path / "0.tar"), b"I001", b"J001"),
        records.Record("002", str(tmp_path / "2.tar"), b"I002", b"J002"),
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
    source = records.WebDataset(write_tar(tmp_path / "0.tar", samples(*keys), format=format))
    assert names(source) == list(keys)
    assert [source[index].image for index in range(3)] == [b"I" + key.encode() for key in keys]


def test_the_key_ends_at_the_first_dot_of_the_file_name(tmp_path):
    members = [("./v1.0/a.b.jpg", b"no"), ("./v1.0/a.JPG", b"image"), ("./v1.0/a.json", b"{}"), ("v1.0/a.txt", b"text")]
    source = records.WebDataset(write_tar(tmp_path / "0.tar", members))
    assert [(record.key, record.image) for record in source] == [("v1.0/a", b"image")]
    assert not source.skipped


def test_partners_need_not_be_neighbours(tmp_path):
    members = samples("0", "1")
    source = records.WebDataset(write_tar(tmp_path / "0.tar", members[0::2] + members[1::2]))
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
        source = records.WebDataset(path)
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
        source = records.WebDataset(str(path))
        assert len(source) == min((size + 48) // (2 * member), 3), size  # the last 48 bytes of a member are padding
        assert source.skipped["shard cut short"] == (size < 6 * member + 512), size
        complete[len(source)] += 1
    assert set(complete) == {1, 2, 3}


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = pathlib.Path(write_tar(tmp_path / "shard.tar", samples("0", "1", "2")))
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 150] ^= 0xFF  # in the checksum of the third member
    path.write_bytes(content)
    source = records.WebDataset(str(path))
    assert names(source) == ["0"]
    assert source.skipped == {"damaged header, rest of the shard not read": 1}


def test_a_file_of_no_bytes_is_left_out(tmp_path):
    (tmp_path / "0.tar").touch()
    write_tar(tmp_path / "1.tar", samples("1"))
    source = records.WebDataset(tmp_path)
    assert names(source) == ["1"] and source.skipped == {"empty file": 1}


@pytest.mark.parametrize("content", [b"no tar", b"no tar " * 1000, None])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    path = tmp_path / "shard.tar"
    if content is None:
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
    else:
        path.write_bytes(content)
    with pytest.raises(records.ShardError, match=r"shard\.tar is not a tar file"):
        records.WebDataset(str(path))


def test_no_sample_at_all(tmp_path):
    with pytest.raises(records.ShardError, match=r"no sample .*'image without json': 1"):
        records.WebDataset(write_tar(tmp_path / "0.tar", [("a.jpg", b"")]))


@pytest.mark.parametrize("change", ["replaced", "appended", "touched", "removed"])
def test_a_shard_that_changes_after_its_index_was_read(tmp_path, change):
    path = pathlib.Path(write_tar(tmp_path / "0.tar", samples("0", "1")))
    source = records.WebDataset(str(path))
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
    with pytest.raises(records.ShardError, match=r"0\.tar.*(replaced or changed|cannot be read)"):
        source[0]


def test_a_source_is_small_when_sent_to_a_worker(tmp_path):
    source = records.WebDataset(write_tar(tmp_path / "0.tar", samples(*(f"{i:09d}" for i in range(2000)))))
    content = pickle.dumps(source)
    assert len(content) < 60 * len(source)
    assert [record.key for record in pickle.loads(content)] == names(source)


# ---------------------------------------------------------------------------------------------------------------------
# Index files


@pytest.fixture
def scans(monkeypatch):
    """Paths of the tars that were scanned."""
    paths, scan = [], records.scan
    monkeypatch.setattr(records, "scan", lambda path: (paths.append(pathlib.Path(path).name), scan(path))[1])
    return paths


def test_an_index_is_built_once(tmp_path, scans):
    write_tar(tmp_path / "0.tar", samples("0"))
    write_tar(tmp_path / "1.tar", samples("1"))
    first = records.WebDataset(tmp_path)
    assert sorted(scans) == ["0.tar", "1.tar"]
    second = records.WebDataset(tmp_path)
    assert len(scans) == 2
    assert list(second) == list(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.index.npz", "1.tar", "1.tar.index.npz"]


def test_an_index_follows_its_shard(tmp_path, scans):
    path = tmp_path / "0.tar"
    write_tar(path, samples("0"))
    records.WebDataset(tmp_path)
    time = path.stat().st_mtime_ns
    write_tar(path, samples("1"))  # as long as before
    os.utime(path, ns=(time, time + 1))
    assert names(records.WebDataset(tmp_path)) == ["1"]
    write_tar(path, samples(*map(str, range(30))))
    os.utime(path, ns=(time, time + 1))  # as old as before
    assert len(records.WebDataset(tmp_path)) == 30
    assert len(scans) == 3


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "empty", "pickle", "inconsistent"])
def test_a_damaged_index_is_built_again(tmp_path, scans, caplog, damage):
    path = write_tar(tmp_path / "0.tar", samples("0", "1"))
    records.WebDataset(path)
    file = tmp_path / "0.tar.index.npz"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bits":
        content[content.index(b"spans.npy") + 150] ^= 0xFF  # in the array
        file.write_bytes(content)
    elif damage == "pickle":
        np.savez(file, **{**np.load(file), "spans": np.array([[object()] * 4] * 2)})
    elif damage == "inconsistent":
        np.savez(file, **{**np.load(file), "key_lengths": np.array([1, 5])})
    else:
        file.write_bytes(b"nonsense" if damage == "text" else b"")
    assert names(records.WebDataset(path)) == ["0", "1"]
    assert "cannot be read" in caplog.text and len(scans) == 2
    records.WebDataset(path)
    assert len(scans) == 2


def test_an_index_of_another_schema_is_built_again(tmp_path, scans, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples("0"))
    records.WebDataset(path)
    monkeypatch.setattr(records, "SCHEMA", records.SCHEMA + 1)
    for _ in range(2):
        records.WebDataset(path)
    assert len(scans) == 2


def test_read_only_folders_use_the_cache(tmp_path, scans, cache, caplog):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", samples("0"))
    folder.chmod(0o555)
    try:
        for _ in range(2):
            assert names(records.WebDataset(folder)) == ["0"]
    finally:
        folder.chmod(0o755)
    assert [path.name for path in folder.iterdir()] == ["0.tar"]
    digest = hashlib.sha256(os.fsencode(folder / "0.tar")).hexdigest()
    assert [path.name for path in cache.iterdir()] == [f"0-{digest[:24]}.index.npz"]
    assert len(scans) == 1 and not caplog.records


def test_index_dir(tmp_path, scans):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", samples(folder))
    for _ in range(2):  # shards of one name in two folders
        source = records.WebDataset([tmp_path / "a", tmp_path / "b"], index_dir=tmp_path / "new" / "indexes")
        assert names(source) == ["a", "b"]
    assert len(scans) == 2
    assert len(list((tmp_path / "new" / "indexes").iterdir())) == 2
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, scans, caplog):
    (tmp_path / "file").touch()
    path = write_tar(tmp_path / "0.tar", samples("0"))
    for _ in range(2):
        assert names(records.WebDataset(path, index_dir=tmp_path / "file" / "below")) == ["0"]
    assert len(scans) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "0.tar is not kept" in caplog.text and "index_dir" in caplog.text


def test_a_full_disk_leaves_no_half_index(tmp_path, cache, caplog, monkeypatch):
    def full(target, **arrays):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    path = write_tar(tmp_path / "0.tar", samples("0"))
    assert names(records.WebDataset(path)) == ["0"]
    assert caplog.text.count("No space left") == 2  # beside the shard and in the cache
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["0.tar"]
    assert list(cache.iterdir()) == []


def test_the_checksum_knows_the_data_not_its_place(tmp_path):
    def checksum(name, members, **options):
        return records.WebDataset(write_tar(tmp_path / name, members, **options)).checksum

    first = checksum("a.tar", samples("0", "1"))
    assert checksum("b.tar", [("x.txt", b"moves the rest"), *samples("0", "1")]) == first
    assert checksum("c.tar", samples("1", "0")) != first
    assert checksum("d.tar", samples("0", "2")) != first
    assert checksum("e.tar", [*samples("0"), ("1.jpg", b"longer"), ("1.json", b"J1")]) != first
