"""Whatever is wrong with the files of a data set: the rest is read, each sample once, and what is lost is counted.

Every fault is put into real shards and met by the whole stream: index, workers, decoder, captions, packing.
"""

import io
import json
import logging
import os
import signal
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from processes import worker_processes
from shard_files import write_array_record, write_tar, write_tfrecord

from flair_jax.data import loader
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.tf_example import Example
from flair_jax.data.transforms import tokenizer

LENGTH = 16
SAMPLES = 12  # in two shards
VICTIM = 4  # of the fault, in the first
KEYS = [f"{number:09d}" for number in range(SAMPLES)]
WORDS = {tuple(row): number for number, row in enumerate(tokenizer.Tokenizer(LENGTH)([f"n {n}" for n in range(99)]))}


def picture(form="JPEG", mode="RGB", size=(96, 80), **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    image.save(file, form, **options)
    return file.getvalue()


def animation() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (24, 20), (shade, 0, 0)) for shade in (0, 80, 160)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000."""
    whole = picture("PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def document(**fields) -> bytes:
    return json.dumps(fields).encode()


def caption(number: int) -> bytes:
    return document(raw_caption=[f"n {number}"])


def members(numbers, **contents) -> list[tuple[str, bytes]]:
    """Of one shard; `contents` replaces the victim's `image` or `json`."""
    found = []
    for number in numbers:
        own = contents if number == VICTIM else {}
        found.append((f"{KEYS[number]}.jpg", own.get("image", picture())))
        found.append((f"{KEYS[number]}.json", own.get("json", caption(number))))
    return found


def write(folder, change=lambda found: found, **contents):
    """Both shards; `change` works on the members of the first."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / "00000.tar", change(members(range(6), **contents)))
    write_tar(folder / "00001.tar", members(range(6, SAMPLES)))
    return folder


def open_stream(folder, **options):
    defaults = dict(batch_size=3, image_size=16, context_length=LENGTH, seed=1, max_skipped=1.0)
    captions = dict(count=1, max_merged=1)
    return loader.make_stream(folder, **{**defaults, "captions": captions, **options})


def two_epochs(batches) -> list[int]:
    seen = []
    while batches.epoch < 2:
        for tokens in next(batches)["texts"]["tokens"]:
            seen.append(WORDS[tuple(tokens)])
    return seen


def cut(folder, keep) -> None:
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:keep])


def offset_of(folder, name: str) -> int:
    with tarfile.open(folder / "00000.tar") as tar:
        return tar.getmember(name).offset_data


# Name of the fault -> how the shards come to have it, the samples that are lost, and a part of the counted reason.
FAULTS = {
    "tar cut inside of a member": (
        lambda folder: cut(write(folder), offset_of(folder, f"{KEYS[4]}.jpg") + 100),
        {4, 5},
        "shard cut short",
    ),
    "tar cut inside of a header": (
        lambda folder: cut(write(folder), offset_of(folder, f"{KEYS[4]}.jpg") - 300),
        {4, 5},
        "shard cut short",
    ),
    "tar of no bytes": (lambda folder: cut(write(folder), 0), set(range(6)), "empty file"),
    "jpeg cut in half": (
        lambda folder: write(folder, image=picture()[: len(picture()) // 2]),
        {4},
        "cannot decode the image",
    ),
    "jpeg without its header": (lambda folder: write(folder, image=picture()[40:]), {4}, "not an image"),
    "image of no bytes": (lambda folder: write(folder, image=b""), {4}, "not an image"),
    "text for an image": (lambda folder: write(folder, image=b"<html>404</html>"), {4}, "not an image"),
    "decompression bomb": (lambda folder: write(folder, image=bomb()), {4}, "pixels"),
    "image of one pixel": (lambda folder: write(folder, image=picture(size=(1, 1))), set(), None),
    "CMYK": (lambda folder: write(folder, image=picture(mode="CMYK")), set(), None),
    "16 bits": (lambda folder: write(folder, image=picture("PNG", "I;16")), set(), None),
    "palette with transparency": (
        lambda folder: write(folder, image=picture("PNG", "P", transparency=b"\0")),
        set(),
        None,
    ),
    "animated": (lambda folder: write(folder, image=animation()), set(), None),
    "json that does not parse": (lambda folder: write(folder, json=b"{not json"), {4}, "json does not parse"),
    "json of no bytes": (lambda folder: write(folder, json=b""), {4}, "json does not parse"),
    "json that is no UTF-8": (lambda folder: write(folder, json=b"\xff\xfe\x00"), {4}, "json does not parse"),
    "json in latin-1": (
        lambda folder: write(folder, json='{"raw_caption": ["n 4", "Träume"]}'.encode("latin-1")),
        {4},
        "json does not parse",
    ),
    "json nested too deep": (lambda folder: write(folder, json=b"[" * 100_000), {4}, "json does not parse"),
    "json null": (lambda folder: write(folder, json=b"null"), {4}, "must be a JSON object, not NoneType"),
    "json list": (lambda folder: write(folder, json=b'["a"]'), {4}, "must be a JSON object, not list"),
    "no fields": (lambda folder: write(folder, json=b"{}"), {4}, "no captions"),
    "null fields": (lambda folder: write(folder, json=document(raw_caption=None)), {4}, "no captions"),
    "empty lists": (lambda folder: write(folder, json=document(raw_caption=[])), {4}, "no captions"),
    "blank captions": (lambda folder: write(folder, json=document(raw_caption=[" ", ""])), {4}, "no captions"),
    "nothing but stops": (lambda folder: write(folder, json=document(raw_caption=" . . ")), {4}, "no captions"),
    "number for a caption": (lambda folder: write(folder, json=document(raw_caption=5)), {4}, "must be a string or"),
    "object for a caption": (
        lambda folder: write(folder, json=document(raw_caption={"text": "n 4"})),
        {4},
        "must be a string or a list",
    ),
    "null among captions": (
        lambda folder: write(folder, json=document(raw_caption=["n 4", None])),
        {4},
        "raw_caption[#] must be a string, not NoneType",
    ),
    "some fields missing or null": (
        lambda folder: write(folder, json=document(raw_caption=None, shortSV_captions=["n 4"], longSV_captions=[])),
        set(),
        None,
    ),
    "captions that were never split": (
        lambda folder: write(folder, json=document(raw_caption="n 4. n 4.\nn 4</s>")),
        set(),
        None,
    ),
    "caption of a million characters": (
        lambda folder: write(folder, json=document(raw_caption=["n 4" + " " * 1_000_000])),
        set(),
        None,
    ),
    "lone surrogates": (
        lambda folder: write(folder, json=b'{"raw_caption": ["n 4"], "longSV_captions": [" "], "note": "\\ud83d"}'),
        set(),
        None,
    ),
    "image without json": (
        lambda folder: write(folder, lambda found: [m for m in found if m[0] != f"{KEYS[4]}.json"]),
        {4},
        "image without json",
    ),
    "json without image": (
        lambda folder: write(folder, lambda found: [m for m in found if m[0] != f"{KEYS[4]}.jpg"]),
        {4},
        "json without image",
    ),
    "key that comes twice": (
        lambda folder: write(folder, lambda found: [*found, *members([4])]),
        set(),
        "second image or json of a key",
    ),
    "name with ..": (
        lambda folder: write(folder, lambda found: [(f"../{n}" if KEYS[4] in n else n, c) for n, c in found]),
        {4},
        "unsafe name",
    ),
    "absolute name": (
        lambda folder: write(folder, lambda found: [(f"/etc/{n}" if KEYS[4] in n else n, c) for n, c in found]),
        {4},
        "unsafe name",
    ),
    "dot inside of the name": (
        lambda folder: write(folder, lambda found: [(n.replace(KEYS[4], "photo.00"), c) for n, c in found]),
        {4},
        "name with a dot inside",
    ),
    "directory": (lambda folder: write(folder, lambda found: [directory("000000004"), *found]), set(), "directory"),
}


def directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_survives(tmp_path, caplog, fault):
    make, lost, reason = FAULTS[fault]
    make(tmp_path / "shards")
    good = sorted({*range(SAMPLES)} - lost)
    for pixels in ("reference", "fast", "device"):
        caplog.clear()
        with open_stream(tmp_path / "shards", pixels=pixels, shuffle=False) as batches:
            seen, half = two_epochs(batches), len(batches.source)
            counted = batches.source.skipped + batches.skipped
        assert sorted(seen[: 2 * len(good)]) == sorted(good + good), pixels  # nothing is repeated or lost
        if reason is None:
            assert not counted
            continue
        ((found, count),) = counted.items() if fault != "name with .." else [*counted.items()][:1]
        assert reason in found and count >= 1
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any("00000.tar" in text for text in warnings)
        if half == SAMPLES and lost:  # it was indexed, and found wanting when it was read
            assert any(KEYS[4] in text and reason.split("[#]")[-1] in text for text in warnings)


@pytest.mark.parametrize("fault", ["tar cut inside of a member", "jpeg cut in half", "json that does not parse"])
def test_the_run_goes_on_behind_a_fault(tmp_path, fault):
    """The position behind any batch leads to the very next good sample, with packed captions too."""
    FAULTS[fault][0](tmp_path / "shards")
    options = dict(packing=dict(row_length=LENGTH), captions=dict(count=2, max_merged=1))
    with open_stream(tmp_path / "shards", **options) as batches:
        positions, expected = [batches.position], []
        for _ in range(9):
            expected.append(next(batches))
            positions.append(batches.position)
    for done in (1, 2, 5, 8):
        with open_stream(tmp_path / "shards", **options, position=json.loads(json.dumps(positions[done]))) as batches:
            for batch in expected[done:]:
                again = next(batches)
                assert (batch["images"] == again["images"]).all()
                for name in ("tokens", "segments", "positions", "ends"):
                    assert (batch["texts"][name] == again["texts"][name]).all()


@pytest.mark.parametrize("writer", [write_array_record, write_tfrecord])
@pytest.mark.parametrize("texts", [["Träume".encode("latin-1")], [b"n 9", "Träume".encode("latin-1")]])
def test_a_feature_in_another_encoding_is_refused_by_name(tmp_path, writer, texts):
    """In tf.train.Example the captions are bytes. Other captions of the record do not stand in for lost ones."""
    contents = []
    for captions in ([b"n 1"], texts, [b"n 2"]):
        example = Example()
        example.features.feature["image"].bytes_list.value.append(picture())
        example.features.feature["raw_caption"].bytes_list.value.extend(captions)
        example.features.feature["longSV_captions"].bytes_list.value.extend([captions[0]] if captions[1:] else [])
        contents.append(example.SerializeToString())
    name = "x.array_record" if writer is write_array_record else "x.tfrecord"
    with open_stream(writer(tmp_path / name, contents), batch_size=2) as batches:
        seen = sorted(WORDS[tuple(tokens)] for tokens in next(batches)["texts"]["tokens"])
        batches_of_an_epoch = [seen, sorted(WORDS[tuple(tokens)] for tokens in next(batches)["texts"]["tokens"])]
    assert batches_of_an_epoch == [[1, 2], [1, 2]]
    ((reason, _),) = batches.skipped.items()
    assert reason.startswith("raw_caption") and "must be a string" in reason and "dict" in reason


def test_lone_surrogates_in_a_caption(tmp_path):
    """No tokenizer knows them; the caption's other words are kept, the sample is not lost."""
    write(tmp_path / "shards", json=b'{"raw_caption": ["n \\ud83d 4"]}')
    with open_stream(tmp_path / "shards", batch_size=SAMPLES) as batches:
        tokens = next(batches)["texts"]["tokens"]
    assert not batches.skipped
    n, four = tokenizer.Tokenizer(LENGTH)(["n 4"])[0, 1:3]
    (row,) = [row for row in tokens if tuple(row) not in WORDS]
    assert row[1] == n and four in row


def test_a_shard_that_is_replaced_during_the_run(tmp_path):
    folder = write(tmp_path / "shards")
    with open_stream(folder) as batches:
        next(batches)
        write_tar(folder / "00000.tar", members(range(3)))
        with pytest.raises(ShardError, match=r"00000\.tar was replaced"):
            two_epochs(batches)
    with open_stream(folder) as batches:  # the cached index notices
        assert len(batches.source) == 9


def test_a_shard_that_vanishes_during_the_run(tmp_path):
    folder = write(tmp_path / "shards")
    with open_stream(folder) as batches:
        next(batches)
        (folder / "00001.tar").unlink()
        with pytest.raises(ShardError, match=r"00001\.tar"):
            two_epochs(batches)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_a_worker_that_is_killed(tmp_path):
    """The run ends with a reason, and goes on with the very next batch."""
    folder = write(tmp_path / "shards")
    with open_stream(folder) as batches:
        expected = [next(batches)["texts"]["tokens"] for _ in range(12)]
    with open_stream(folder, workers=1) as batches:
        done = [next(batches)["texts"]["tokens"]]
        (worker,) = worker_processes(os.getpid())
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="exit code -9") as raised:
            while True:
                done.append(next(batches)["texts"]["tokens"])
    assert any("want of memory" in note for note in raised.value.__notes__)
    with open_stream(folder, position=batches.position) as batches:
        done += [next(batches)["texts"]["tokens"] for _ in range(12 - len(done))]
    np.testing.assert_array_equal(done, expected)


@pytest.mark.parametrize("count", [5, 12])
def test_more_processes_than_shards(tmp_path, count):
    folder = write(tmp_path / "shards")
    seen = []
    for index in range(count):
        with open_stream(folder, batch_size=count, process_index=index, process_count=count) as batches:
            seen += [WORDS[tuple(next(batches)["texts"]["tokens"][0])] for _ in range(SAMPLES)]
    assert sorted(seen) == sorted([*range(SAMPLES)] * count)


def test_more_than_the_stated_share_stops_the_run_with_the_table(tmp_path):
    folder = write(tmp_path / "shards", image=b"<html>404</html>")
    write_tar(folder / "00002.tar", [("x.jpg", picture()), ("x.json", b"{}")])
    with open_stream(folder, max_skipped=0.1) as batches, pytest.raises(loader.TooManySkipped) as raised:
        two_epochs(batches)
    message = str(raised.value)
    assert "max_skipped allows 10.00% of 13" in message
    table = [line.split(maxsplit=1) for line in message.splitlines()[1:3]]
    assert {(count, reason[:11]) for count, reason in table} == {("1", "not an imag"), ("1", "no captions")}
