"""Indexes of shards: kept in files, trusted only while they fit, merged into tables that processes share."""

import hashlib
import logging
import os
import pathlib

import numpy as np
import pytest
from shard_files import samples, write_tar

from data import index, records, webdataset


def names(source) -> list[str]:
    return [source[number].key for number in range(len(source))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The default cache folder, away from the user's home."""
    monkeypatch.setattr(index, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------------------------------------------------------------
# Of one shard


@pytest.fixture
def scans(monkeypatch):
    """Paths of the tars that were scanned."""
    paths, scan = [], webdataset.scan
    monkeypatch.setattr(webdataset, "scan", lambda path: (paths.append(pathlib.Path(path).name), scan(path))[1])
    return paths


def test_an_index_is_built_once(tmp_path, scans):
    write_tar(tmp_path / "0.tar", samples("0"))
    write_tar(tmp_path / "1.tar", samples("1"))
    first = records.open_source(tmp_path)
    assert sorted(scans) == ["0.tar", "1.tar"]
    second = records.open_source(tmp_path)
    assert len(scans) == 2
    assert list(second) == list(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.index.npz", "1.tar", "1.tar.index.npz"]


def test_an_index_follows_its_shard(tmp_path, scans):
    path = tmp_path / "0.tar"
    write_tar(path, samples("0"))
    records.open_source(tmp_path)
    time = path.stat().st_mtime_ns
    write_tar(path, samples("1"))  # as long as before
    os.utime(path, ns=(time, time + 1))
    assert names(records.open_source(tmp_path)) == ["1"]
    write_tar(path, samples(*map(str, range(30))))
    os.utime(path, ns=(time, time + 1))  # as old as before
    assert len(records.open_source(tmp_path)) == 30
    assert len(scans) == 3


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "empty", "pickle", "inconsistent"])
def test_a_damaged_index_is_built_again(tmp_path, scans, caplog, damage):
    path = write_tar(tmp_path / "0.tar", samples("0", "1"))
    records.open_source(path)
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
    assert names(records.open_source(path)) == ["0", "1"]
    assert "cannot be read" in caplog.text and len(scans) == 2
    records.open_source(path)
    assert len(scans) == 2


def test_an_index_of_another_schema_is_built_again(tmp_path, scans, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples("0"))
    records.open_source(path)
    monkeypatch.setattr(index, "SCHEMA", index.SCHEMA + 1)
    for _ in range(2):
        records.open_source(path)
    assert len(scans) == 2


def test_read_only_folders_use_the_cache(tmp_path, scans, cache, caplog):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", samples("0"))
    folder.chmod(0o555)
    try:
        for _ in range(2):
            assert names(records.open_source(folder)) == ["0"]
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
        source = records.open_source([tmp_path / "a", tmp_path / "b"], index_dir=tmp_path / "new" / "indexes")
        assert names(source) == ["a", "b"]
    assert len(scans) == 2
    assert len(list((tmp_path / "new" / "indexes").iterdir())) == 2
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, scans, caplog):
    (tmp_path / "file").touch()
    path = write_tar(tmp_path / "0.tar", samples("0"))
    for _ in range(2):
        assert names(records.open_source(path, index_dir=tmp_path / "file" / "below")) == ["0"]
    assert len(scans) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "0.tar is not kept" in caplog.text and "index_dir" in caplog.text


def test_a_full_disk_leaves_no_half_index(tmp_path, cache, caplog, monkeypatch):
    def full(target, **arrays):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    path = write_tar(tmp_path / "0.tar", samples("0"))
    assert names(records.open_source(path)) == ["0"]
    assert caplog.text.count("No space left") == 2  # beside the shard and in the cache
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["0.tar"]
    assert list(cache.iterdir()) == []
