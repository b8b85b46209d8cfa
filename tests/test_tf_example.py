"""tf.train.Example records: read from files that TensorFlow, array_record and TensorFlow Datasets wrote."""

import gzip
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from shard_files import write_array_record, write_tfrecord

from flair_jax.data.sources import array_record, tf_example, tfrecord
from flair_jax.data.sources.base import Record, RecordError, ShardError
from flair_jax.data.sources.open import open_source


def example(**features) -> bytes:
    """Serialised by TensorFlow. `features`: bytes, numbers, or lists of these."""
    import tensorflow as tf

    def feature(values):
        values = values if isinstance(values, list) else [values]
        if all(isinstance(value, bytes) for value in values):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if all(isinstance(value, int) for value in values):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    named = {name: feature(values) for name, values in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


def pairs(*keys) -> list[bytes]:
    """Examples as `data.prepare` writes them."""
    return [example(image=b"I" + key.encode(), json=b"J" + key.encode(), key=key.encode()) for key in keys]


WRITERS = {"x.tfrecord": write_tfrecord, "x.array_record": write_array_record}


def keys(source) -> list[str]:
    return [source[index].key for index in range(len(source))]


# ---------------------------------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("name", ["image", "image/encoded", "jpg", "jpeg", "png", "webp"])
def test_an_example_of_our_own_and_of_others(name):
    record = tf_example.parse(example(**{name: b"\xff\xd8", "json": b"{}", "key": b"7"}), "s", "s:0")
    assert record == Record("7", "s", b"\xff\xd8", b"{}")
    record = tf_example.parse(example(**{name: b"\xff\xd8"}), "s", "s:0")
    assert record == Record("s:0", "s", b"\xff\xd8", b"{}")


def test_the_first_name_of_an_image_counts():
    assert tf_example.parse(example(png=b"2", jpg=b"1", webp=b"3"), "", "").image == b"1"


def test_features_become_a_json():
    content = example(
        jpg=b"\xff",
        png=b"\xff",
        key=b"000017",
        caption="naïve “日本”".encode(),
        captions=[b"one", b"two"],
        one=[b"one"],
        none=[],
        width=256,
        negative=[-1, 2**62],
        similarity=0.25,
        embedding=[0.5, 1.5],
        mask=b"\xff\xfe",
        latin=["Träume".encode("latin-1"), b"good"],
    )
    record = tf_example.parse(content, "s", "s:0")
    assert record.key == "000017" and record.image == b"\xff"
    assert json.loads(record.json) == {
        "caption": "naïve “日本”",
        "captions": ["one", "two"],
        "embedding": [0.5, 1.5],
        "key": "000017",
        "latin": [{"not UTF-8": 6}, "good"],
        "mask": {"not UTF-8": 2},
        "negative": [-1, 2**62],
        "none": [],
        "one": "one",
        "similarity": 0.25,
        "width": 256,
    }


def test_a_key_that_is_a_number_is_no_name():
    record = tf_example.parse(example(jpg=b"I", key=17), "s", "s:0")
    assert record.key == "s:0" and json.loads(record.json) == {"key": 17}


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda: b"no protobuf", "not a tf.train.Example"),
        (lambda: pairs("0")[0][:-3], "not a tf.train.Example"),
        (lambda: b"", r"no image \(.*\); its features: none"),
        (lambda: example(text=b"a", label=3), "no image .*its features: label, text"),
        (lambda: example(image=3), "'image' of the Example: expected one string of bytes, not 0 in int64_list"),
        (lambda: example(image=[b"a", b"b"]), "'image' .* not 2 in bytes_list"),
        (lambda: example(image=[]), "'image' .* not 0 in bytes_list"),
        (lambda: example(image=b"I", json=0.5), "'json' .* not 0 in float_list"),
        (lambda: example(image=b"I", json=b"{}", key=[b"a", b"b"]), "'key' .* not 2"),
    ],
)
def test_examples_of_others_are_refused_one_by_one(tmp_path, content, message):
    for file, write in WRITERS.items():
        source = open_source(write(tmp_path / file, [*pairs("a"), content(), *pairs("b")]))
        assert [source[index].image for index in (0, 2)] == [b"Ia", b"Ib"]
        with pytest.raises(RecordError, match=message):
            source[1]
        assert source.where(1) == (str(tmp_path / file), f"{file}:1")


def test_tensorflow_is_not_loaded(tmp_path):
    paths = [write(tmp_path / file, pairs("0")) for file, write in WRITERS.items()]
    sources = pickle.dumps([open_source(path) for path in paths])
    code = (
        "import pickle, sys; print([source[0].key for source in pickle.load(sys.stdin.buffer)]);"
        "print([name for name in ('tensorflow', 'tensorflow_datasets', 'jax', 'fsspec') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], input=sources, stdout=subprocess.PIPE, check=True).stdout
    assert output.decode().split("\n")[:2] == ["['0', '0']", "[]"]


# ---------------------------------------------------------------------------------------------------------------------
# Files of both kinds


@pytest.mark.parametrize("file", WRITERS)
def test_records_in_the_order_of_the_files(tmp_path, file):
    stem, extension = file.split(".")
    paths = [tmp_path / f"{stem}.{extension}-{number:05d}-of-00003" for number in range(3)]
    for path, names in zip(paths, (["0", "1"], [], ["2"]), strict=True):
        WRITERS[file](path, pairs(*names))
    source = open_source(tmp_path)
    for copy in (source, pickle.loads(pickle.dumps(source)), open_source(f"{tmp_path}/x.{extension}*")):
        assert [copy[index] for index in (2, 0, 1)] == [
            Record(str(number), str(path), b"I%d" % number, b"J%d" % number)
            for number, path in ((2, paths[2]), (0, paths[0]), (1, paths[0]))
        ]
    assert source.where(2) == (str(paths[2]), f"{paths[2].name}:0")
    assert source.shards == list(map(str, paths))
    assert source.skipped == ({"empty file": 1} if extension == "tfrecord" else {})  # without records it has no bytes
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.where(index)


@pytest.mark.parametrize("file", WRITERS)
def test_the_checksum_knows_the_data_not_its_place(tmp_path, file):
    def checksum(folder, *names):
        (tmp_path / folder).mkdir()
        return open_source(WRITERS[file](tmp_path / folder / file, pairs(*names))).checksum

    first = checksum("a", "0", "11")
    assert checksum("b", "0", "11") == first
    assert len({first, checksum("c", "11", "0"), checksum("d", "0"), checksum("e", "0", "111")}) == 4


@pytest.mark.parametrize("file", WRITERS)
def test_threads_read_the_same(tmp_path, file):
    names = [f"{number:03d}" for number in range(200)]
    source = open_source(WRITERS[file](tmp_path / file, pairs(*names)))
    found = {}

    def read(start):
        found[start] = [source[(start + step * 7) % 200].key for step in range(200)]

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: [names[(start + step * 7) % 200] for step in range(200)] for start in range(4)}


@pytest.mark.parametrize("change", ["replaced", "cut", "touched", "removed"])
@pytest.mark.parametrize("file", WRITERS)
def test_a_file_that_changes_after_it_was_opened(tmp_path, file, change):
    path = pathlib.Path(WRITERS[file](tmp_path / file, pairs("0", "1")))
    source = open_source(str(path))
    assert source[0].key == "0"
    if change == "replaced":
        os.replace(WRITERS[file](tmp_path / "new", pairs("2", "3")), path)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "touched":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.unlink()
    with pytest.raises(ShardError, match=rf"{file}.*(replaced or changed|No such file)"):
        source[0]


@pytest.mark.parametrize("file", WRITERS)
def test_a_file_of_no_bytes_is_left_out(tmp_path, file):
    (tmp_path / f"a{file}").touch()
    with pytest.raises(ShardError, match=r"no record in .*empty file"):
        open_source(tmp_path)
    WRITERS[file](tmp_path / file, pairs("0"))
    source = open_source(tmp_path)
    assert keys(source) == ["0"] and source.skipped == {"empty file": 1}


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("content", [b"no", b"some text " * 20000, bytes(200000), "other"])
def test_a_file_of_another_kind_is_named(tmp_path, file, content):
    path = tmp_path / file
    if content == "other":
        (other,) = WRITERS.keys() - {file}
        WRITERS[other](path, pairs("0", "1"))
    else:
        path.write_bytes(content)
    with pytest.raises(ShardError, match=rf"({file} is not a|no record in .*{file}.*cut short)"):
        open_source(str(path))


@pytest.mark.parametrize("file", WRITERS)
def test_a_file_that_does_not_exist(tmp_path, file):
    source = open_source(WRITERS[file](tmp_path / file, pairs("0")))
    os.unlink(tmp_path / file)
    with pytest.raises(FileNotFoundError):
        type(source)([str(tmp_path / file)]) if file == "x.tfrecord" else array_record.open_files(source.shards)


# ---------------------------------------------------------------------------------------------------------------------
# TFRecord


def test_a_tfrecord_file_that_was_cut_keeps_its_complete_records(tmp_path):
    contents = pairs("0", "1", "2")
    whole = pathlib.Path(write_tfrecord(tmp_path / "whole.tfrecord", contents)).read_bytes()
    record = 16 + len(contents[0])
    assert len(whole) == 3 * record
    for size in [*range(record, 3 * record, 7), 2 * record - 1, 2 * record, 2 * record + 1, 3 * record]:
        path = tmp_path / f"{size}.tfrecord"
        path.write_bytes(whole[:size])
        source = open_source(path)
        assert keys(source) == ["0", "1", "2"][: size // record], size
        assert source.skipped == ({"shard cut short": 1} if size % record else {}), size


def test_a_damaged_length_is_not_believed(tmp_path):
    contents = pairs("0", "1", "2")
    path = pathlib.Path(write_tfrecord(tmp_path / "x.tfrecord", contents))
    damaged = bytearray(path.read_bytes())
    damaged[16 + len(contents[0])] ^= 1
    path.write_bytes(damaged)
    source = open_source(path)
    assert keys(source) == ["0"]
    assert source.skipped == {"damaged length, rest of the shard not read": 1}


def test_the_index_of_a_tfrecord_file_is_built_once(tmp_path, monkeypatch):
    path = write_tfrecord(tmp_path / "x.tfrecord", pairs("0", "1"))
    assert keys(open_source(path)) == ["0", "1"]
    assert sorted(os.listdir(tmp_path)) == ["x.tfrecord", "x.tfrecord.index.npz"]
    monkeypatch.setattr(tfrecord, "scan", None)
    assert keys(open_source(path)) == ["0", "1"]


@pytest.mark.parametrize("compression, message", [("GZIP", "is gzip.*gzip -d"), ("ZLIB", "is not a TFRecord file")])
def test_compressed_files_are_refused(tmp_path, compression, message):
    path = write_tfrecord(tmp_path / "x.tfrecord", pairs("0"), compression)
    if compression == "GZIP":
        assert gzip.decompress(pathlib.Path(path).read_bytes())
    with pytest.raises(ShardError, match=message):
        open_source(path)


# ---------------------------------------------------------------------------------------------------------------------
# ArrayRecord


def test_an_array_record_file_that_was_cut_is_refused(tmp_path):
    """Its index is at the end: nothing can be found in what is left."""
    path = pathlib.Path(write_array_record(tmp_path / "x.array_record", pairs(*map(str, range(50)))))
    size = path.stat().st_size
    for end in (size - 1, size - 70000, 65536, 100):
        os.truncate(path, end)
        with pytest.raises(ShardError, match=r"x\.array_record is not a complete ArrayRecord file"):
            open_source(str(path))


def test_a_damaged_record_is_refused_alone(tmp_path):
    contents = [example(image=np.random.default_rng(number).bytes(3000), json=b"{}") for number in range(3)]
    path = pathlib.Path(write_array_record(tmp_path / "x.array_record", contents))
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(np.random.default_rng(1).bytes(3000)) + 1000] ^= 1
    path.write_bytes(damaged)
    source = open_source(str(path))
    for _ in range(2):
        assert [len(source[index].image) for index in (0, 2)] == [3000, 3000]
        with pytest.raises(RecordError, match=r"damaged: .*hash mismatch"):
            source[1]


def test_more_array_record_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(array_record, "READERS", 3)
    for number in range(8):
        write_array_record(tmp_path / f"{number}.array_record", pairs(f"{number}a", f"{number}b"))
    source = open_source(tmp_path)
    handles = len(os.listdir("/proc/self/fd"))
    for index in np.random.default_rng(0).integers(0, 16, 200).tolist():
        assert source[index].key == f"{index // 2}{'ab'[index % 2]}"
        assert len(os.listdir("/proc/self/fd")) <= handles + 3


def test_grouped_array_records_are_read_too(tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:7")
    for content in pairs(*map(str, range(20))):
        writer.write(content)
    writer.close()
    assert keys(open_source(tmp_path)) == list(map(str, range(20)))


def test_array_record_in_a_store_that_its_library_does_not_open():
    with pytest.raises(ShardError, match=r"s3://b/x\.array_record: .* gs:// only"):
        open_source("s3://b/x.array_record")


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow Datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of TensorFlow Datasets, prepared in two formats: folders with what data_dir names."""
    pytest.importorskip("tensorflow_datasets", reason="the extra `tf` is not installed")
    import tensorflow_datasets as tfds

    def samples(count, offset):
        for number in range(offset, offset + count):
            sentences = ["first", "second"][: 1 + number % 2]
            image = np.full((4, 6, 3), 10 * number, np.uint8)
            yield f"{number}", {"image": image, "short_caption": f"text {number}", "sentences": sentences, "id": number}

    folders = {}
    for file_format in ("array_record", "tfrecord"):
        folders[file_format] = tmp_path_factory.mktemp(file_format)
        tfds.dataset_builders.store_as_tfds_dataset(
            name="tiny",
            version="1.0.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "short_caption": tfds.features.Text(),
                    "sentences": tfds.features.Sequence(tfds.features.Text()),
                    "id": np.int64,
                }
            ),
            split_datasets={"train": list(samples(7, 0)), "test": list(samples(2, 7))},
            data_dir=folders[file_format],
            file_format=file_format,
            disable_shuffling=True,
        )
    return folders


def ids(source) -> list[int]:
    return [json.loads(source[index].json)["id"] for index in range(len(source))]


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train", range(7)),
        ("test", (7, 8)),
        ("train[2:5]", (2, 3, 4)),
        ("train[:50%]", range(4)),
        ("train[5:]+test[1:]", (5, 6, 8)),
    ],
)
def test_splits_of_a_prepared_data_set(prepared, split, expected):
    import tensorflow_datasets as tfds

    folder = prepared["array_record"]
    source = open_source(f"tfds:tiny?split={split}&data_dir={folder}")
    assert ids(source) == list(expected)
    decoded = tfds.data_source("tiny", split=split, data_dir=folder, download=False)
    assert [sample["id"] for sample in decoded] == list(expected)
    for name in ("tfds:tiny:1.0.0", f"tfds:{folder}/tiny/1.0.0"):
        again = open_source(f"{name}?data_dir={folder}&split={split}")
        assert again.checksum == source.checksum and ids(again) == list(expected)


def test_a_record_of_a_prepared_data_set(prepared):
    source = open_source(f"tfds:tiny?split=train[3:]&data_dir={prepared['array_record']}")
    record = pickle.loads(pickle.dumps(source))[0]
    assert json.loads(record.json) == {"short_caption": "text 3", "sentences": ["first", "second"], "id": 3}
    assert np.asarray(Image.open(io.BytesIO(record.image))).tolist() == np.full((4, 6, 3), 30).tolist()
    assert record.key == "tiny-train.array_record-00000-of-00001:3"
    assert (record.shard, record.key) == source.where(0)
    assert source.shards == [record.shard] and os.path.exists(record.shard)


def test_other_parts_of_a_file_have_another_checksum(prepared):
    name = f"tfds:tiny?data_dir={prepared['array_record']}&split="
    assert len({open_source(name + split).checksum for split in ("train", "train[:3]", "train[3:6]")}) == 3


def test_a_data_set_prepared_as_tfrecord_is_refused_with_advice(prepared):
    folder = prepared["tfrecord"]
    for name in (f"tfds:tiny?split=train&data_dir={folder}", f"tfds:{folder}/tiny/1.0.0?split=train"):
        with pytest.raises(ShardError, match=r"tfds convert_format.*FOLDER/NAME-train\.tfrecord"):
            open_source(name)
    assert ids(open_source(f"{folder}/tiny/1.0.0/tiny-train.tfrecord*")) == list(range(7))


@pytest.mark.parametrize(
    "name, message",
    [
        ("tfds:tiny?data_dir=D", "which split.*train, test"),
        ("tfds:tiny?split=validation&data_dir=D", "Unknown split 'validation'"),
        ("tfds:none?split=train&data_dir=D", "none not found"),
        ("tfds:tiny?split=train&data_dir=D/none", "tiny not found"),
        ("tfds:mnist?split=train&data_dir=D", "nothing in .*tfds build"),
        ("tfds:tiny?split=train&folder=D", "not folder"),
        ("tfds:?split=train", "no name"),
    ],
)
def test_data_sets_that_are_not_there(prepared, name, message):
    with pytest.raises(ShardError, match=f"(?s){message}"):
        open_source(name.replace("D", str(prepared["array_record"])))
