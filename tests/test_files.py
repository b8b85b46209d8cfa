"""Files in stores: over HTTP from a server of the test, and in fsspec's memory; the sources that read them."""

import contextlib
import functools
import http.server
import os
import pathlib
import pickle
import re
import stat
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest
from shard_files import samples, write_tar

from flair_jax.data.sources import files, index, webdataset
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import expand, open_source
from flair_jax.data.sources.tf_example import Example


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder with their ranges and ETags, as object stores do."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = pathlib.Path(self.translate_path(self.path))
        self.server.requests.append(self.command)
        if self.command == "GET" and self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, len(content))
        part = content[start:stop]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder, and the server under whose `url` its files lie."""
    pytest.importorskip("aiohttp", reason="fsspec needs it for https://")
    folder = tmp_path / "store"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    server.requests, server.failures, server.ranges = [], 0, True
    server.folder, server.url = folder, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(index, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "WAITS", (0, 0))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    with contextlib.suppress(FileNotFoundError):
        system.rm("/", recursive=True)


def put(system, name, path):
    system.pipe_file(name, pathlib.Path(path).read_bytes())


def records_of(source):
    return [source[number] for number in range(len(source))]


# ---------------------------------------------------------------------------------------------------------------------
# Ranges


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(300_000))
    return str(path)


@pytest.mark.parametrize(
    "spans, requests",
    [
        ([(0, 10)], 1),
        ([(0, 10), (10, 5)], 1),
        ([(100, 10), (10, 50), (3, 0)], 1),
        ([(0, 10), (10 + files.GAP, 10)], 1),
        ([(0, 10), (11 + files.GAP, 10)], 2),
        ([(290_000, 10_000), (0, 10), (5, 200_000)], 2),
        ([(7, 0)], 0),
        ([], 0),
    ],
)
def test_neighbouring_spans_are_one_access(file, memory, spans, requests, monkeypatch):
    put(memory, "/file", file)
    content = pathlib.Path(file).read_bytes()
    expected = [content[offset : offset + size] for offset, size in spans]
    assert files.read(file, spans, files.state(file)) == expected
    calls, cat_file = [], type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda *a, **k: (calls.append(1), cat_file(*a, **k))[1])
    assert files.read("memory://file", spans, files.state("memory://file")) == expected
    assert len(calls) == requests


def test_a_file_that_is_shorter_than_thought(file, memory):
    put(memory, "/file", file)
    for path in (file, "memory://file"):
        with pytest.raises(files.ChangedError, match="10 bytes at 299990 instead of 20"):
            files.read(path, [(299_990, 20)], files.state(path))


def test_a_stream_seeks_and_reads_like_a_file(store):
    content = np.random.default_rng(1).bytes(50_000)
    (store.folder / "x").write_bytes(content)
    with files.stream(f"{store.url}/x") as (file, state):
        assert state.size == 50_000
        for place, size in ((0, 100), (40_000, 20_000), (10, 10), (49_999, 5), (60_000, 5)):
            assert file.seek(place) == place
            assert file.read(size) == content[place : place + size]
            assert file.tell() == max(place, min(place + size, 50_000))
        assert file.seek(-5, 2) == 49_995 and file.read() == content[-5:]


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def test_tars_over_http(store, tmp_path):
    write_tar(store.folder / "0.tar", samples("a", "b"))
    write_tar(store.folder / "1.tar", [*samples("c"), ("d.jpg", b"")])
    source = open_source(store.url + "/{0..1}.tar")
    assert source.skipped == {"image without json": 1}
    local = open_source(store.folder)
    assert [(r.key, r.image, r.json) for r in records_of(source)] == [
        (r.key, r.image, r.json) for r in records_of(local)
    ]
    assert source.checksum == local.checksum
    assert source.where(2) == (f"{store.url}/1.tar", "c")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # there is no beside


def test_an_index_over_http_is_read_in_one_go_and_kept(store):
    write_tar(store.folder / "0.tar", samples(*(f"{number:04d}" for number in range(500))))
    for expected in (1, 0):
        store.requests.clear()
        source = open_source(f"{store.url}/0.tar")
        assert store.requests.count("GET") == expected
    store.requests.clear()
    for number in range(499, 0, -50):
        assert source[number].key == f"{number:04d}"
    assert store.requests.count("GET") == 10  # image and json at once
    assert store.requests.count("HEAD") == 1  # whether the shard has changed


def test_a_tar_of_many_blocks_is_streamed_once(store, monkeypatch):
    monkeypatch.setattr(files, "READ_AHEAD", 1 << 14)
    write_tar(store.folder / "0.tar", samples(*(f"{number:04d}" for number in range(100))))
    source = open_source(f"{store.url}/0.tar")
    assert [record.key for record in records_of(source)] == [f"{number:04d}" for number in range(100)]
    assert store.requests.count("GET") - 100 <= 15  # 210 kB


def test_a_worker_process_reads_from_a_store(store):
    write_tar(store.folder / "0.tar", samples("a", "b"))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[1].key)"
    source = pickle.dumps(open_source(f"{store.url}/0.tar"))
    assert subprocess.run([sys.executable, "-c", code], input=source, stdout=subprocess.PIPE).stdout == b"b\n"


def test_signed_urls(store):
    write_tar(store.folder / "0.tar", samples("a"))
    assert open_source(f"{store.url}/0.tar?key=1*2&x=[y]")[0].key == "a"


def test_a_shard_that_is_replaced_in_a_store(store, monkeypatch):
    write_tar(store.folder / "0.tar", samples("a"))
    source = open_source(f"{store.url}/0.tar")
    assert source[0].key == "a"
    write_tar(store.folder / "0.tar", samples("b"))  # as long as before, with another ETag
    assert open_source(f"{store.url}/0.tar")[0].key == "b"
    monkeypatch.setattr(files, "RECHECK", 0.0)
    with pytest.raises(ShardError, match=r"0\.tar was replaced or changed"):
        source[0]
    (store.folder / "0.tar").unlink()
    with pytest.raises(ShardError, match=r"0\.tar.*cannot be read"):
        source[0]


def test_a_store_that_fails_for_a_moment(store, caplog):
    write_tar(store.folder / "0.tar", samples("a"))
    store.failures = 2
    source = open_source(f"{store.url}/0.tar")
    store.failures = 2
    assert source[0].key == "a"
    assert caplog.text.count("retrying in 0 s") == 4
    store.failures = 3
    with pytest.raises(ShardError, match=r"0\.tar: sample 'a' cannot be read: .*503"):
        source[0]


def test_a_store_without_ranges_is_named(store):
    write_tar(store.folder / "0.tar", samples("a"))
    source = open_source(f"{store.url}/0.tar")
    store.ranges = False
    with pytest.raises(ShardError, match=r"0\.tar.*bytes at 512 instead of"):
        source[0]


def test_what_is_not_in_the_store(store):
    with pytest.raises(FileNotFoundError, match=r"1\.tar"):
        open_source(f"{store.url}/1.tar")
    store.shutdown()
    store.server_close()
    with pytest.raises(ShardError, match=r"2\.tar cannot be read"):
        open_source(f"{store.url}/2.tar")


def test_damaged_tars_in_a_store(store):
    whole = pathlib.Path(write_tar(store.folder / "0.tar", samples("a", "b"))).read_bytes()
    (store.folder / "1.tar").write_bytes(whole[:2600])
    (store.folder / "2.tar").touch()
    source = open_source(f"{store.url}/{{0..2}}.tar")
    assert [record.key for record in records_of(source)] == ["a", "b", "a"]
    assert source.skipped == {"shard cut short": 1, "image without json": 1, "empty file": 1}
    (store.folder / "3.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ShardError, match=r"3\.tar is not a tar file"):
        open_source(f"{store.url}/3.tar")


def test_tfrecord_over_http(store, tmp_path):
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(store.folder / "x.tfrecord")) as writer:
        for number in range(3):
            value = {"bytes_list": {"value": [b"%d" % number]}}
            writer.write(Example(features={"feature": {"image": value, "json": value}}).SerializeToString())
    source = open_source(f"{store.url}/x.tfrecord")
    assert [(record.key, record.image) for record in records_of(source)] == [
        (f"x.tfrecord:{number}", b"%d" % number) for number in range(3)
    ]
    assert source.checksum == open_source(store.folder).checksum


def test_patterns_in_a_store(memory, tmp_path):
    for name in ("a/0.tar", "a/1.tar", "a/note.txt", "b/2.tar", "c/x.tfrecord", "c/3.tar"):
        put(memory, f"/{name}", write_tar(tmp_path / "x.tar", samples(name[2])))
    assert expand("memory://a") == ["memory:///a/0.tar", "memory:///a/1.tar"]
    assert expand("memory://*/?.tar::memory://b/2.tar") == [
        *(f"memory:///{name}" for name in ("a/0.tar", "a/1.tar", "b/2.tar", "c/3.tar")),
        "memory://b/2.tar",
    ]
    assert [record.key for record in records_of(open_source("memory://{a,b}"))] == ["0", "1", "2"]
    (tmp_path / "list.txt").write_text("{0..1}.tar\nmemory://b/?.tar\n")
    put(memory, "/a/list.txt", tmp_path / "list.txt")
    listed = ["memory://a/0.tar", "memory://a/1.tar", "memory:///b/2.tar"]
    assert expand("memory://a/list.txt") == listed
    with pytest.raises(ShardError, match="several formats"):
        expand("memory://c")
    for pattern in ("memory://none", "memory://a/5*.tar", "memory://a/none.txt"):
        with pytest.raises(FileNotFoundError, match=re.escape(pattern)):
            expand(pattern)


def test_the_same_keys_in_tars_of_a_store_and_of_this_machine(memory, tmp_path):
    path = write_tar(tmp_path / "0.tar", samples("a"))
    put(memory, "/0.tar", path)
    source = open_source(f"{path}::memory://0.tar")
    assert [record.shard for record in records_of(source)] == [path, "memory://0.tar"]
    assert webdataset.scan("memory://0.tar").spans.tolist() == webdataset.scan(path).spans.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    before = os.umask(0o026)
    try:
        with files.replacing(path) as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as tempfile and safetensors make files
            temporary.write_text("new")
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
