"""Indexes of shards: kept in files, trusted only while they fit, merged into tables that processes share."""

import hashlib
import logging
import os
import pathlib
import pickle
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest
from shard_files import samples, write_tar

from flair_jax.data.sources import files, index, webdataset
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import open_source


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
    first = open_source(tmp_path)
    assert sorted(scans) == ["0.tar", "1.tar"]
    second = open_source(tmp_path)
    assert len(scans) == 2
    assert list(second) == list(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.index.npz", "1.tar", "1.tar.index.npz"]


def test_an_index_follows_its_shard(tmp_path, scans):
    path = tmp_path / "0.tar"
    write_tar(path, samples("0"))
    open_source(tmp_path)
    time = path.stat().st_mtime_ns
    write_tar(path, samples("1"))  # as long as before
    os.utime(path, ns=(time, time + 1))
    assert names(open_source(tmp_path)) == ["1"]
    write_tar(path, samples(*map(str, range(30))))
    os.utime(path, ns=(time, time + 1))  # as old as before
    assert len(open_source(tmp_path)) == 30
    assert len(scans) == 3


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "empty", "pickle", "inconsistent", "outside", "negative"])
def test_a_damaged_index_is_built_again(tmp_path, scans, caplog, damage):
    path = write_tar(tmp_path / "0.tar", samples("0", "1"))
    open_source(path)
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
    elif damage in ("outside", "negative"):  # would be read as a part of another member, or fill the memory
        stored = dict(np.load(file))
        np.savez(file, **{**stored, "spans": stored["spans"] * (2**40 if damage == "outside" else -1)})
    else:
        file.write_bytes(b"nonsense" if damage == "text" else b"")
    assert names(open_source(path)) == ["0", "1"]
    assert "cannot be read" in caplog.text and len(scans) == 2
    open_source(path)
    assert len(scans) == 2


def test_an_index_of_another_schema_is_built_again(tmp_path, scans, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples("0"))
    open_source(path)
    monkeypatch.setattr(index, "SCHEMA", index.SCHEMA + 1)
    for _ in range(2):
        open_source(path)
    assert len(scans) == 2


def test_read_only_folders_use_the_cache(tmp_path, scans, cache, caplog):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", samples("0"))
    folder.chmod(0o555)
    try:
        for _ in range(2):
            assert names(open_source(folder)) == ["0"]
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
        source = open_source([tmp_path / "a", tmp_path / "b"], index_dir=tmp_path / "new" / "indexes")
        assert names(source) == ["a", "b"]
    assert len(scans) == 2
    assert len(list((tmp_path / "new" / "indexes").iterdir())) == 2
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, scans, caplog):
    (tmp_path / "file").touch()
    path = write_tar(tmp_path / "0.tar", samples("0"))
    for _ in range(2):
        assert names(open_source(path, index_dir=tmp_path / "file" / "below")) == ["0"]
    assert len(scans) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "0.tar is not kept" in caplog.text and "index_dir" in caplog.text


def test_a_full_disk_leaves_no_half_index(tmp_path, cache, caplog, monkeypatch):
    def full(target, **arrays):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    path = write_tar(tmp_path / "0.tar", samples("0"))
    assert names(open_source(path)) == ["0"]
    assert caplog.text.count("No space left") == 2  # beside the shard and in the cache
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["0.tar"]
    assert list(cache.iterdir()) == []


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_and_folders_follow_the_umask(tmp_path, mapped, cache, umask):
    """Other users find the indexes; how far they may read is the user's choice."""
    before = os.umask(umask)
    try:
        path = write_tar(tmp_path / "0.tar", samples("0"))
        open_source(path)
        open_source(path, index_dir=tmp_path / "indexes")
    finally:
        os.umask(before)
    (kept,) = (tmp_path / "indexes").glob("*.npz")
    (table,) = cache.glob("*.table/*")
    written = [tmp_path / "0.tar.index.npz", kept, *table.iterdir()]
    assert len(written) == 2 + len(index.ARRAYS) + 1
    assert {mode(file) for file in written} == {0o666 & ~umask}
    assert {mode(folder) for folder in (table, table.parent, cache, tmp_path / "indexes")} == {0o777 & ~umask}


# ---------------------------------------------------------------------------------------------------------------------
# Of many shards


def shards(folder, *names, size=3):
    folder.mkdir(exist_ok=True)
    return [write_tar(folder / f"{name}.tar", samples(*(f"{name}{i}" for i in range(size)))) for name in names]


def test_many_shards_are_scanned_by_processes(tmp_path, monkeypatch, cache):
    paths = shards(tmp_path / "shards", *"abcdefghij")
    alone = open_source(paths, index_dir=tmp_path / "other")
    monkeypatch.setattr(index, "PROCESS_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(webdataset, "_members", None)  # here: nothing can be scanned in this process
    together = open_source(paths)
    assert list(together) == list(alone) and together.checksum == alone.checksum
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.npz")) == [
        f"{n}.tar.index.npz" for n in "abcdefghij"
    ]


def test_a_fault_in_such_a_process_is_told(tmp_path, monkeypatch):
    paths = shards(tmp_path / "shards", *"abc")
    pathlib.Path(paths[1]).write_bytes(b"no tar" * 1000)
    monkeypatch.setattr(index, "PROCESS_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with pytest.raises(ShardError, match=r"b\.tar is not a tar file"):
        open_source(paths)


def test_what_others_have_scanned_meanwhile_is_not_scanned_again(tmp_path, scans, monkeypatch):
    paths = shards(tmp_path / "shards", *"abcdef")
    monkeypatch.setattr(files, "THREADS", 1)
    scan, busy = webdataset.scan, []

    def scan_while_another_process_does_the_rest(path):
        if not busy:
            busy.append(path)
            for other in paths:
                open_source(other)
        return scan(path)

    monkeypatch.setattr(webdataset, "scan", scan_while_another_process_does_the_rest)
    assert len(open_source(paths)) == 18
    assert sorted(scans) == sorted([*(pathlib.Path(path).name for path in paths), pathlib.Path(busy[0]).name])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.fixture
def mapped(cache, monkeypatch):
    """Tables of any size are mapped. Folders of tables in the cache."""
    monkeypatch.setattr(index, "MAPPED_BYTES", 0)
    return lambda: sorted(path.parent.name + "/" + path.name for path in cache.glob("*.table/*"))


def test_a_mapped_table_reads_the_same(tmp_path, mapped, scans):
    paths = shards(tmp_path / "shards", *"abc")
    source = open_source(paths)
    assert len(mapped()) == 1 and len(scans) == 3
    again = open_source(paths)
    assert len(mapped()) == 1 and len(scans) == 3
    for copy in (source, again, pickle.loads(pickle.dumps(source))):
        assert names(copy) == [f"{name}{i}" for name in "abc" for i in range(3)]
        assert copy.where(5) == (paths[1], "b2")
        assert copy.checksum == open_source(paths, index_dir=tmp_path / "other").checksum
        assert not copy.skipped
        assert isinstance(copy._table.spans, np.ndarray) and not copy._table.spans.flags.writeable


def test_what_was_left_out_is_kept_with_the_table(tmp_path, mapped):
    write_tar(tmp_path / "0.tar", [*samples("a"), ("b.jpg", b"")])
    for _ in range(2):
        assert open_source(tmp_path / "0.tar").skipped == {"image without json": 1}
    assert len(mapped()) == 1


def test_a_mapped_table_is_sent_by_its_name(tmp_path, mapped):
    (path,) = shards(tmp_path, "a", size=3000)
    source = open_source(path)
    assert len(pickle.dumps(source)) < 1000
    # The pages that processes map are the same ones of the same file.
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s[2999].key, open('/proc/self/maps').read())"
    output = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), stdout=subprocess.PIPE
    ).stdout.decode()
    assert output.startswith("a2999 ")
    for name in index.ARRAYS:
        assert f"{mapped()[0]}/{name}.npy" in output
        assert f"{mapped()[0]}/{name}.npy" in pathlib.Path("/proc/self/maps").read_text()


def test_the_table_follows_the_shards(tmp_path, mapped):
    paths = shards(tmp_path / "shards", *"ab")
    source = open_source(paths)
    before = mapped()
    pickled = pickle.dumps(source)
    os.utime(write_tar(paths[1], samples("c")), ns=(0, 10**18))
    assert names(open_source(paths)) == ["a0", "a1", "a2", "c"]
    assert len(mapped()) == 1 and mapped() != before  # the old table is gone
    assert source[0].key == "a0"  # but not for those who have it
    with pytest.raises(ShardError, match=r"b\.tar was replaced"):
        source[3]
    with pytest.raises(FileNotFoundError, match="the shards changed and another run has indexed them anew"):
        pickle.loads(pickled)


def test_tables_of_other_shards_stay_for_some_time(tmp_path, mapped, cache):
    paths = shards(tmp_path / "shards", *"abc")
    for path in paths[:2]:
        open_source(path)
    first, second = sorted(cache.glob("*.table"), key=lambda path: path.stat().st_mtime_ns)
    for folder in (first, second):
        os.utime(folder, (0, 0))
    open_source(paths[0])  # in use
    open_source(paths[2])
    assert len(mapped()) == 2 and first.exists() and not second.exists()


def test_remains_of_a_killed_process_are_removed(tmp_path, mapped, cache):
    (path,) = shards(tmp_path / "shards", "a")
    open_source(path)
    (home,) = cache.glob("*.table")
    for name in (".old.tmp", ".new.tmp"):
        (home / name).mkdir()
        (home / name / "spans.npy").touch()
    os.utime(home / ".old.tmp", (0, 0))
    os.utime(path, ns=(0, 10**18))
    open_source(path)
    assert {path.name for path in home.glob(".*")} == {".new.tmp"}


@pytest.mark.parametrize("damage", ["cut", "missing", "text", "inconsistent"])
def test_a_damaged_table_is_built_again(tmp_path, mapped, cache, caplog, damage):
    (path,) = shards(tmp_path / "shards", "a", size=200)
    open_source(path)
    (file,) = cache.glob("*.table/*/spans.npy")
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 8)
    elif damage == "missing":
        file.unlink()
    elif damage == "text":
        (file.parent / "table.json").write_text("{")
    else:
        np.save(file, np.load(file)[:-1])
    assert open_source(path)[199].key == "a199"
    assert "built again" in caplog.text
    caplog.clear()
    assert open_source(path)[199].key == "a199"
    assert len(mapped()) == 1 and not caplog.records


def test_a_disk_without_space_for_the_table(tmp_path, mapped, cache, caplog):
    """The system itself refuses to write more than some bytes, as it does when the disk is full."""
    (path,) = shards(tmp_path / "shards", "a", size=2000)
    open_source(path, index_dir=tmp_path / "other")
    for file in (tmp_path / "other").glob("*.npz"):
        file.rename(f"{path}.index.npz")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        source = open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the table of 2000 samples is not kept" in caplog.text and "index_dir" in caplog.text
    assert source[1999].key == "a1999" and pickle.loads(pickle.dumps(source))[7].key == "a7"
    assert mapped() == [] and not list(cache.glob("*.table/.*"))


def test_processes_that_start_together_share_one_table(tmp_path):
    paths = shards(tmp_path / "shards", *"abcd", size=50)
    code = (
        "import sys; from flair_jax.data.sources import index; from flair_jax.data.sources.open import open_source;"
        "index.MAPPED_BYTES = 0;"
        "source = open_source(sys.argv[2:], index_dir=sys.argv[1]);"
        "print(source[199].key, source._table.folder)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), *paths]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    (folder,) = (tmp_path / "cache").glob("*.table/*")
    assert outputs == {f"d49 {folder}\n".encode()}
    assert not list((tmp_path / "cache").glob("*.table/.*"))
