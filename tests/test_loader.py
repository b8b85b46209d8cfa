"""The stream of batches: every sample once, the same whatever the workers, resumable anywhere, faults counted."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from grain.python import SharedMemoryArray
from PIL import Image
from processes import alive, wait_for, worker_processes

from flair_jax.augmentation import crop_and_resize
from flair_jax.data import iterator_state, loader
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import open_source
from flair_jax.data.transforms import packing, tokenizer
from flair_jax.data.transforms.base import SampleError
from flair_jax.data.transforms.captions import CaptionOptions
from flair_jax.data.transforms.images import AugmentationOptions
from flair_jax.data.transforms.samples import Captions, Crop, LoadTraining, Skipped

LENGTH = 16  # tokens a caption
FIELDS = ("raw_caption", "longSV_captions")


def picture(number: int) -> bytes:
    """An image of one colour, which is the sample's number: crops and resizing leave it as it is."""
    file = io.BytesIO()
    Image.new("RGB", (20, 14), (number % 256, number // 256, 99)).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> bytes:
    return json.dumps({"raw_caption": [f"picture {number}"], "longSV_captions": []}).encode()


def write_shards(folder: pathlib.Path, sizes, bad: dict[int, dict[str, bytes]] | None = None) -> pathlib.Path:
    """Shards of the given sizes; `bad` replaces the "image" or "json" of some numbers."""
    folder.mkdir(exist_ok=True)
    ends = np.cumsum(sizes)
    for shard, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(end - size, end):
                sample = {"image": picture(number), "json": caption(number), **(bad or {}).get(number, {})}
                for extension, content in (("png", sample["image"]), ("json", sample["json"])):
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def stream(shards, **options):
    captions = {"fields": FIELDS, "count": 2, **options.pop("captions", {})}
    defaults = dict(batch_size=4, image_size=8, context_length=LENGTH, seed=7, max_skipped=1.0)
    return loader.make_stream(shards, captions=captions, **{**defaults, **options})


def numbers(batch) -> list[int]:
    """The samples in a batch, told by their colours."""
    assert np.ptp(batch["images"], axis=(1, 2)).max() == 0
    red, green, blue = batch["images"][:, 0, 0].astype(int).T
    assert (blue == 99).all()
    return (red + 256 * green).tolist()


def take(batches, count) -> list[int]:
    return [number for _ in range(count) for number in numbers(next(batches))]


def digest(batch) -> str:
    arrays = (batch["images"], batch["texts"]["tokens"], batch["texts"]["ends"])
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def digests(batches, count) -> list[str]:
    return [digest(next(batches)) for _ in range(count)]


NO_CAPTION = {"json": b"{}"}
NO_PICTURE = {"image": b"no image"}
BAD = {0: NO_CAPTION, 3: NO_PICTURE, 4: NO_CAPTION, 5: NO_CAPTION, 6: NO_CAPTION, 7: NO_CAPTION, 12: NO_PICTURE}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("clean"), (7, 1, 5, 6))  # 19 samples


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("flawed"), (7, 1, 5, 6), BAD)  # 12 good ones


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_a_batch(clean):
    with stream(clean, image_size=(8, 6), captions={"count": 3}) as batches:
        batch = next(batches)
    assert batch["images"].shape == (4, 8, 6, 3) and batch["images"].dtype == np.uint8
    tokens, ends = batch["texts"]["tokens"], batch["texts"]["ends"]
    assert tokens.shape == (12, LENGTH) and tokens.dtype == np.int32
    assert ends.shape == (12,) and ends.dtype == np.int32
    assert (tokens.reshape(-1)[ends] == tokenizer.EOT).all() and (ends // LENGTH == np.arange(12)).all()
    # The only sentence may be merged with itself; the first words of each row are the sample's own.
    for row, number in enumerate(np.repeat(numbers(batch), 3)):
        alone = tokenizer.Tokenizer(LENGTH)([f"picture {number}"])[0]
        words = packing.lengths(alone[None])[0] - 1
        assert (tokens[row, :words] == alone[:words]).all()


def test_every_sample_once_an_epoch(clean):
    with stream(clean) as batches:
        assert len(batches.source) == 19
        assert batches.epoch == 0
        seen = take(batches, 19)
        assert batches.epoch == 4
    epochs = [seen[start : start + 19] for start in range(0, 76, 19)]
    for epoch in epochs:  # batches reach over their ends, and nothing is dropped
        assert sorted(epoch) == list(range(19))
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(19))}) == 5


def test_without_shuffling_the_order_is_that_of_the_shards(clean):
    with stream(clean, shuffle=False) as batches:
        assert take(batches, 7) == [number % 19 for number in range(28)]


def test_other_seeds_other_orders(clean):
    orders = {tuple(take(stream(clean, seed=seed), 19)) for seed in range(5)}
    assert len(orders) == 5
    firsts = [order[19 * epoch : 19 * (epoch + 1)] for order in orders for epoch in range(4)]
    assert len(set(firsts)) == 20  # seed 1 does not begin with the second epoch of seed 0


def test_draws_follow_from_seed_epoch_and_sample(tmp_path):
    """Neither from the place in the order, nor from what was drawn before."""
    gradient = np.arange(40 * 40 * 3, dtype=np.uint32).reshape(40, 40, 3) // 19
    file = io.BytesIO()
    Image.fromarray(gradient.astype(np.uint8)).save(file, "PNG")
    content = {f: [f"sentence {f} {i}" for i in range(9)] for f in FIELDS}
    shards = write_shards(
        tmp_path / "shards",
        (6,),
        {n: {"image": file.getvalue(), "json": json.dumps(content).encode()} for n in range(6)},
    )

    def rows(batches, count):
        rows = []
        for _ in range(count):
            batch = next(batches)
            texts = batch["texts"]["tokens"].reshape(len(batch["images"]), -1)
            rows += [(image.tobytes(), text.tobytes()) for image, text in zip(batch["images"], texts, strict=True)]
        return rows

    ordered, shuffled = rows(stream(shards, shuffle=False, batch_size=3), 4), rows(stream(shards, batch_size=2), 6)
    assert len({image for image, _ in ordered}) == 12 and len({text for _, text in ordered}) == 12
    for epoch in (slice(0, 6), slice(6, 12)):
        assert sorted(ordered[epoch]) == sorted(shuffled[epoch])
    assert not set(ordered) & set(rows(stream(shards, shuffle=False, batch_size=3, seed=8), 4))
    # A change of the crop leaves the captions as they are.
    wide = rows(stream(shards, shuffle=False, batch_size=3, augmentation={"scale": (0.1, 0.5)}), 4)
    assert [text for _, text in wide] == [text for _, text in ordered]
    assert not {image for image, _ in wide} & {image for image, _ in ordered}


# ---------------------------------------------------------------------------------------------------------------------
# Workers and processes


@pytest.fixture(scope="module")
def expected(flawed):
    """30 batches of 5, one process, no workers."""
    with stream(flawed, batch_size=5) as batches:
        return digests(batches, 30), dict(batches.skipped)


def test_workers_change_nothing(flawed, expected):
    """Workers: no process left behind once the stream is closed."""
    with stream(flawed, batch_size=5, workers=2) as batches:
        assert (digests(batches, 30), dict(batches.skipped)) == expected
        workers = worker_processes(os.getpid())
        assert len(workers) == 2
    assert not any(map(alive, workers))


def test_processes_share_each_global_batch(clean):
    with stream(clean, batch_size=12) as batches:
        whole = [next(batches) for _ in range(5)]
    for count in (2, 3, 4):
        parts = []
        for index in range(count):
            with stream(clean, batch_size=12, process_index=index, process_count=count) as batches:
                parts.append([next(batches) for _ in range(5)])
        for step, batch in enumerate(whole):
            images = np.concatenate([part[step]["images"] for part in parts])
            tokens = np.concatenate([part[step]["texts"]["tokens"] for part in parts])
            assert (images == batch["images"]).all() and (tokens == batch["texts"]["tokens"]).all()


def test_processes_never_share_a_sample(flawed):
    """Gaps are filled from each process's own rows: over two epochs of good samples, the union still has each twice."""
    seen = []
    for index in range(2):
        with stream(flawed, batch_size=2, shuffle=False, process_index=index, process_count=2) as batches:
            while batches.epoch < 2:
                seen += numbers(next(batches))
    good = set(range(19)) - BAD.keys()
    assert sorted(seen) == sorted([*good, *good])


@pytest.mark.parametrize("count, workers", [(1, 0), (2, 0), (3, 2), (4, 0)])
def test_the_union_of_all_processes_is_the_epoch(tmp_path, count, workers):
    """Seven shards of unequal size: whatever the processes and workers, every epoch holds each sample once."""
    shards = write_shards(tmp_path / "shards", (7, 1, 5, 6, 2, 3, 9))
    parts = []
    for index in range(count):
        options = dict(batch_size=2 * count, process_index=index, process_count=count, workers=workers)
        with stream(shards, **options) as batches:
            parts.append([numbers(next(batches)) for _ in range(33)])
    order = [number for step in zip(*parts, strict=True) for part in step for number in part]
    for start in range(0, len(order), 33):
        assert sorted(order[start : start + 33]) == list(range(33))


def test_the_batch_must_divide_by_the_processes(clean):
    for size, count in ((5, 2), (0, 1)):
        with pytest.raises(ValueError, match=f"batch_size {size}"):
            stream(clean, batch_size=size, process_count=count)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_a_mixture(tmp_path):
    """Weights are shares; resuming and the draws of captions are as ever."""
    first, second = write_shards(tmp_path / "first", (4,)), write_shards(tmp_path / "second", (7, 5, 8))
    options = dict(weights=(3, 1), image_size=20, augmentation=dict(scale=(0.1, 1.0)))
    with stream(f"{first}::{second}", **options) as batches:
        assert len(batches.source) == 24
        seen = take(batches, 6)
        position = batches.position
        rest = digests(batches, 5)
    # Both folders count from 0, and only the second goes on behind 3.
    assert 4 <= sum(number > 3 for number in seen) <= 6  # a quarter of 24, less those below 4
    with stream([first, second], **options, position=json.loads(json.dumps(position))) as batches:
        assert digests(batches, 5) == rest
    with pytest.raises(iterator_state.PositionError, match=r"weights was \[3, 1\], is \[1, 1\]"):
        stream([first, second], **{**options, "weights": (1, 1)}, position=position)
    with pytest.raises(ValueError, match="each of 1 sets"):
        stream(first, weights=(1, 2))


def test_a_window(clean):
    with stream(clean, shuffle_window=6) as batches:
        seen = take(batches, 19)
    for start in range(0, 76, 19):
        assert sorted(seen[start : start + 19]) == list(range(19))
    assert seen != take(stream(clean), 19)


def photograph(number: int) -> bytes:
    """A smooth JPEG, each another one."""
    y, x = np.mgrid[:90, :120]
    waves = [np.sin((x * (c + 1) + y * (3 - c)) / (17 + number % 5)) for c in range(3)]
    file = io.BytesIO()
    Image.fromarray((128 + 100 * np.stack(waves, -1)).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_three_ways_to_the_same_pixels(tmp_path):
    shards = write_shards(tmp_path / "shards", (8,), {number: {"image": photograph(number)} for number in range(8)})
    batch = {}
    for pixels in ("reference", "fast", "device"):
        with stream(shards, pixels=pixels, image_size=(48, 32), batch_size=8) as batches:
            batch[pixels] = next(batches)
    device = batch["device"]
    assert device["crop_boxes"].shape == (8, 4) and device["crop_boxes"].dtype == np.float32
    batch["device"]["images"] = crop_and_resize(device["images"], device["crop_boxes"], (48, 32))
    expected = batch["reference"]["images"].astype(int)
    assert expected.shape == (8, 48, 32, 3)
    for pixels in ("fast", "device"):
        assert (batch[pixels]["texts"]["tokens"] == batch["reference"]["texts"]["tokens"]).all()
        assert np.abs(np.asarray(batch[pixels]["images"]) - expected).max() <= 4
    assert set(batch["fast"]) == {"images", "texts"}
    with pytest.raises(ValueError, match="'quick'; expected one of reference, fast, device"):
        stream(shards, pixels="quick")


def uneven(tmp_path, samples: int = 192) -> pathlib.Path:
    """Shards of captions of very different lengths: most have 2 to 4 words, every eighth dozen fills the context."""
    rng = np.random.default_rng(0)

    def text(number):
        words = 14 if number // 12 % 8 == 7 else rng.integers(2, 5)
        return json.dumps({"raw_caption": [" ".join(rng.choice(["a", "dog", "cat", "red"], words))]}).encode()

    return write_shards(tmp_path / "uneven", (samples,), {number: {"json": text(number)} for number in range(samples)})


def unpacked(texts) -> list[list[int]]:
    """The captions of a packed or padded batch, in their order."""
    tokens, lengths = texts["tokens"].reshape(-1), packing.text_lengths(texts)
    ends = texts["ends"]
    if "segments" in texts:
        segments, positions = texts["segments"].reshape(-1), texts["positions"].reshape(-1)
        length = texts["tokens"].shape[1]
        for end, size in zip(ends, lengths, strict=True):
            place = np.arange(end - size + 1, end + 1)
            assert (segments[place] == segments[end]).all() and (positions[place] == np.arange(size)).all()
            assert place[0] // length == end // length  # in one row
        assert (segments > 0).sum() == lengths.sum()  # and nothing beside them
    return [tokens[end - size + 1 : end + 1].tolist() for end, size in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2)])
def test_packing_loses_nothing_on_any_number_of_devices(tmp_path, devices, processes):
    """With its defaults: the texts of the packed rows are those of the padded ones, in a few shapes."""
    options = dict(batch_size=32, captions={"count": 3, "max_merged": 3}, shuffle=False)
    shards = uneven(tmp_path)
    with stream(shards, **options) as batches:
        padded = [next(batches) for _ in range(12)]
    local = devices // processes
    more = dict(process_count=processes, device_count=local, packing=dict(row_length=LENGTH + 4))

    def read(index, agree):
        with stream(shards, **options, **more, process_index=index, agree=agree) as batches:
            parts = [next(batches) for _ in range(12)]
            assert batches.truncated == 0
        return parts

    def needs(index):
        """The rows that one process needs for each batch."""
        noted = []
        read(index, lambda rows: noted.append(rows) or (lambda: rows))
        return noted

    if processes == 1:
        parts = [read(0, None)]
    else:
        needed = [needs(index) for index in range(processes)]
        assert needed[0] != needed[1]  # or there would be nothing to agree on
        agreed = np.max(needed, axis=0)

        def agree():
            largest = iter(agreed)
            return lambda rows: functools.partial(int, next(largest))

        parts = [read(index, agree()) for index in range(processes)]
    shapes = set()
    for plain, *shares in zip(padded, *parts, strict=True):
        texts = {name: np.concatenate([share["texts"][name] for share in shares]) for name in shares[0]["texts"]}
        assert unpacked(texts) == unpacked(plain["texts"])
        assert (np.concatenate([share["images"] for share in shares]) == plain["images"]).all()
        rows = len(texts["tokens"]) // devices
        per_device = 96 // devices
        assert (texts["ends"] // (LENGTH + 4) // rows == np.arange(96) // per_device).all()  # of its own images
        assert {len(share["texts"]["tokens"]) for share in shares} == {rows * local}
        shapes.add(rows)
    assert 2 <= len(shapes) <= 4


def test_processes_that_pack_have_to_agree(clean):
    options = dict(process_count=2, packing=dict(row_length=LENGTH))
    with pytest.raises(ValueError, match="2 processes that pack need `agree`"):
        stream(clean, **options)
    options["packing"]["truncate"] = True
    with stream(clean, **options) as batches:
        next(batches)


def test_a_batch_drawn_ahead_of_its_turn_counts_when_it_is_given(flawed):
    """While processes agree on the next batch, the position, the epoch and the counts are those of the last one."""
    options = dict(batch_size=4, process_count=2, process_index=1, packing=dict(row_length=LENGTH))
    plain = []
    with stream(flawed, process_count=2, process_index=1) as batches:
        for _ in range(12):
            next(batches)
            plain.append((batches.position, batches.skipped, batches.epoch))
    with stream(flawed, **options, agree=lambda rows: lambda: rows) as batches:
        found = [(digest(next(batches)), batches.position, batches.skipped, batches.epoch) for _ in range(12)]
    assert [rest for _, *rest in found] == [list(one) for one in plain]
    for count in (1, 5):
        with stream(flawed, **options, agree=lambda rows: lambda: rows, position=found[count][1]) as batches:
            assert digests(batches, 11 - count) == [one for one, *_ in found[count + 1 :]]


def test_an_error_of_the_next_batch_waits_for_it(tmp_path):
    shards = write_shards(tmp_path / "shards", (12,), dict.fromkeys(range(4, 12), NO_CAPTION))
    options = dict(shuffle=False, process_count=2, packing=dict(row_length=LENGTH), max_skipped=0.5)
    with stream(shards, **options, agree=lambda rows: lambda: rows) as batches:
        assert numbers(next(batches)) == [0, 1]
        with pytest.raises(loader.TooManySkipped, match="4 of the first"):
            next(batches)


def test_rows_shorter_than_a_caption_are_refused(clean):
    with pytest.raises(
        ValueError, match=r"row_length is 15, and captions have up to 16 tokens .*packing\.truncate=True"
    ):
        stream(clean, packing=dict(row_length=15))


def test_captions_are_truncated_and_counted_where_that_is_asked_for(tmp_path):
    """Measured on the median, half of the batches are too long."""
    long = {"json": json.dumps({"raw_caption": ["one two three four five six seven eight nine"]}).encode()}
    shards = write_shards(tmp_path / "shards", (40,), dict.fromkeys(range(0, 40, 2), long))
    packed = dict(row_length=LENGTH, quantile=0.5, truncate=True)
    with stream(shards, captions={"count": 1, "max_merged": 1}, packing=packed) as batches:
        texts = [next(batches)["texts"] for _ in range(20)]
    assert 0 < batches.truncated < 40
    assert len({text["tokens"].shape for text in texts}) == 1
    for text in texts:
        assert (text["tokens"].reshape(-1)[text["ends"]] == tokenizer.EOT).all() and len(text["ends"]) == 4


@dataclasses.dataclass(frozen=True)
class Negatives:
    """Each drawn caption denied; only those of several sentences are meant."""

    captions: Captions

    names = ("texts/negatives", "valid/negatives")

    def __call__(self, sample):
        drawn = self.captions.draw(sample)
        texts = self.captions.tokenize([f"not {text}" for text in drawn])
        return {self.names[0]: texts, self.names[1]: np.array([". " in text for text in drawn])}


@dataclasses.dataclass(frozen=True)
class Regions:
    """Two boxes, of which the second one is never meant."""

    names = ("regions/boxes", "regions/valid")

    def __call__(self, sample):
        if sample.number == 13:
            raise SampleError("no regions")
        boxes = np.array([[0, 0, 1, sample.rng("regions").random()], [0, 0, 0, 0]], np.float32)
        return {self.names[0]: boxes, self.names[1]: np.array([True, False])}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("row_length", [None, 20])
def test_transforms_add_arrays_and_texts_under_their_names(clean, row_length, workers):
    options = CaptionOptions(fields=FIELDS, count=2)
    transforms = (Negatives(Captions(options, tokenizer.Tokenizer(LENGTH))), Regions())
    with stream(clean, batch_size=6, packing=dict(row_length=row_length)) as batches:
        plain = [next(batches) for _ in range(2)]
    more = dict(transforms=transforms, packing=dict(row_length=row_length), workers=workers)
    with stream(clean, batch_size=6, **more) as batches:
        batch = next(batches)
        assert 13 in numbers(plain[0])
        next(batches)
        next(batches)
        assert batches.skipped == {"no regions": 1}
    kept = [number for number in numbers(plain[0]) + numbers(plain[1]) if number != 13][:6]
    assert numbers(batch) == kept
    assert set(batch) == {"images", "texts", "valid", "regions/boxes", "regions/valid"}
    assert batch["regions/boxes"].shape == (6, 2, 4) and batch["regions/boxes"].dtype == np.float32
    assert len(np.unique(batch["regions/boxes"][:, 0, 3])) == 6
    assert batch["regions/valid"].tolist() == [[True, False]] * 6
    # Image-major: the two captions of an image, then its two negatives.
    texts = np.array(unpacked(batch["texts"]), object).reshape(6, 4)
    captions = {
        number: unpacked(one["texts"])[2 * i : 2 * i + 2] for one in plain for i, number in enumerate(numbers(one))
    }
    for number, (*drawn, first, second), valid in zip(kept, texts, batch["valid"], strict=True):
        assert drawn == captions[number]
        start, word, end = tokenizer.Tokenizer(3)("not")[0]
        denied = [[start, word, *text[1:-1]][: LENGTH - 1] for text in drawn]
        assert [first, second] == [[*text, end] for text in denied]
        assert valid.tolist() == [True, True, *[len(text) > 5 for text in drawn]]
    assert 0 < batch["valid"][:, 2:].mean() < 1


def test_arrays_have_one_maker(clean):
    own = Captions(CaptionOptions(), tokenizer.Tokenizer(LENGTH))
    with pytest.raises(ValueError, match="several transforms make arrays named texts/captions"):
        stream(clean, transforms=[own])

    class Lonely:
        names = ("valid/negatives",)

    with pytest.raises(ValueError, match="valid/negatives: there are no texts/negatives"):
        stream(clean, transforms=[Lonely()])


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("batch_size", [1, 3, 5, 30])
def test_resume_after_any_batch(flawed, batch_size):
    """Inside of groups, behind groups without a good sample, and where a batch needs several groups."""
    count = 40 // batch_size + 3
    with stream(flawed, batch_size=batch_size, shuffle=batch_size != 1) as batches:
        states = [(batches.position, dict(batches.skipped), batches.epoch)]
        expected = []
        for _ in range(count):
            expected.append(digest(next(batches)))
            states.append((batches.position, dict(batches.skipped), batches.epoch))
    for done, (position, skipped, epoch) in enumerate(states):
        position = json.loads(json.dumps(position))
        with stream(flawed, batch_size=batch_size, shuffle=batch_size != 1, position=position) as batches:
            assert batches.position == position and batches.epoch == epoch and dict(batches.skipped) == skipped
            assert digests(batches, count - done) == expected[done:]
            assert (batches.position, dict(batches.skipped), batches.epoch) == states[-1]


def test_resume_with_other_workers(flawed, expected):
    done = 0
    position = None
    for workers, count in ((0, 7), (1, 6), (0, 5)):
        with stream(flawed, batch_size=5, workers=workers, position=position) as batches:
            assert digests(batches, count) == expected[0][done : done + count]
            position = batches.position
        done += count


@pytest.mark.parametrize(
    "change, name",
    [
        ({"seed": 8}, "seed was 7, is 8"),
        ({"batch_size": 6}, "batch_size was 4, is 6"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"process_index": 1, "process_count": 2}, "process_index was 0, is 1; process_count was 1, is 2"),
    ],
)
def test_a_position_of_other_settings_is_refused(clean, change, name):
    with stream(clean) as batches:
        next(batches)
    with pytest.raises(iterator_state.PositionError, match=name):
        stream(clean, position=batches.position, **change)


def test_a_position_of_other_data_is_refused(clean, flawed, tmp_path):
    with stream(clean) as batches:
        next(batches)
    with pytest.raises(iterator_state.PositionError, match="checksum was"):
        stream(flawed, position=batches.position)
    with pytest.raises(iterator_state.PositionError, match="samples was 19, is 18"):
        stream(write_shards(tmp_path / "fewer", (18,)), position=batches.position)
    moved = write_shards(tmp_path / "same", (10, 9))  # the same samples in other files
    assert take(stream(moved, position=batches.position), 3) == take(stream(clean, position=batches.position), 3)


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_faults_that_differ_in_a_number_are_counted_together(tmp_path):
    bad = {
        1: {"json": json.dumps({"raw_caption": [None]}).encode()},
        3: {"json": json.dumps({"raw_caption": ["a cat", None]}).encode()},
    }
    with stream(write_shards(tmp_path / "shards", (6,), bad), batch_size=2, shuffle=False) as batches:
        next(batches)
        assert dict(batches.skipped) == {"raw_caption[#] must be a string, not NoneType": 2}


def test_too_many_skipped_stop_the_run(tmp_path):
    shards = write_shards(
        tmp_path / "shards", (100,), dict.fromkeys((3, 60), NO_CAPTION) | dict.fromkeys((50,), NO_PICTURE)
    )
    with stream(shards, max_skipped=0.03) as batches:
        take(batches, 60)  # 3 of 100, again and again
        assert batches.skipped.total() >= 6
    with stream(shards, max_skipped=0.02, shuffle=False) as batches:
        take(batches, 13)
        with pytest.raises(
            loader.TooManySkipped, match=r"3 of the first 61 samples of epoch 0.*2\.00% of 100"
        ) as raised:
            take(batches, 20)
    table = str(raised.value).splitlines()[1:3]
    assert table[0].split()[:3] == ["2", "no", "captions:"] and table[1].split()[0] == "1" and "image" in table[1]
    with (
        stream(shards, max_skipped=0.0, shuffle=False) as batches,
        pytest.raises(loader.TooManySkipped, match="first 4 "),
    ):
        next(batches)


def test_skips_are_counted_by_epoch_also_over_a_restart(tmp_path):
    shards = write_shards(tmp_path / "shards", (100,), dict.fromkeys((3, 50, 60), NO_CAPTION))
    with stream(shards, max_skipped=0.02, shuffle=False) as batches:
        take(batches, 13)
    with (
        stream(shards, max_skipped=0.02, shuffle=False, position=batches.position) as batches,
        pytest.raises(loader.TooManySkipped, match="3 of the first 61"),
    ):
        take(batches, 20)


def test_a_wrong_caption_field_shows_at_once(tmp_path):
    shards = write_shards(tmp_path / "shards", (1000,), dict.fromkeys(range(1000), NO_CAPTION))
    for allowed in (0.4, 0.01):
        with stream(shards, max_skipped=allowed) as batches, pytest.raises(loader.TooManySkipped) as raised:
            next(batches)
        seen = 200 if allowed == 0.4 else 11  # half of the first 200, and more than 10 of 1,000
        assert f"{seen} of the first {seen} samples" in str(raised.value)


def test_an_epoch_without_any_sample_ends_the_search(tmp_path):
    shards = write_shards(tmp_path / "shards", (6,), dict.fromkeys(range(6), NO_PICTURE))
    with stream(shards, max_skipped=1.0) as batches, pytest.raises(loader.TooManySkipped, match="6 of the first 6"):
        next(batches)


def test_warnings_do_not_flood_the_log(tmp_path, caplog):
    shards = write_shards(tmp_path / "shards", (40,), dict.fromkeys(range(0, 40, 2), NO_CAPTION))
    with stream(shards) as batches:
        take(batches, 20)
        assert batches.skipped.total() >= 60
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == loader.LOGGED_SKIPS + 1
    assert "only counted" in messages[-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_replaced_stops_the_run(tmp_path, workers):
    shards = write_shards(tmp_path / "shards", (6,))
    with stream(shards, workers=workers) as batches:
        next(batches)
        write_shards(shards, (7,))
        with pytest.raises(ShardError, match=r"00000\.tar was replaced"):
            take(batches, 20)


def test_a_closed_stream(clean):
    batches = stream(clean)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes end

SCRIPT = """
import time
from flair_jax.data import loader

if __name__ == "__main__":
    options = dict(batch_size=4, image_size=8, context_length=16, seed=0)
    batches = loader.make_stream({shards!r}, workers=2, **options)
    for _ in range(3):
        next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


def maps(pid: int) -> list[str]:
    return pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_end_when_their_parent_is_killed(clean, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(shards=str(clean)))
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout.readline() == "ready\n"
        workers = worker_processes(parent.pid)
        assert len(workers) == 2 and all(map(alive, workers))
        blocks = {line.split()[5] for pid in (parent.pid, *workers) for line in maps(pid) if "/dev/shm/psm_" in line}
        assert blocks  # batches wait in shared memory
        # A scheduler's SIGTERM to all, or Ctrl-C: the workers leave it to their parent.
        for pid in workers:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert all(map(alive, workers))
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not any(map(alive, workers)), 10)
    assert wait_for(lambda: not any(map(os.path.exists, blocks)), 10)


def test_samples_do_not_depend_on_their_neighbours(flawed):
    """A group of several runs, against every sample by itself."""
    source = open_source(flawed)
    captions = Captions(CaptionOptions(fields=FIELDS, count=2), tokenizer.Tokenizer(LENGTH))
    load = LoadTraining(source, (captions, Crop(8, AugmentationOptions(), "fast")), 7)
    group = [(place, divmod(place, len(source))) for place in range(70)]
    together, alone = load(group), [load([one])[0] for one in group]
    assert {type(sample) for sample in together} == {dict, Skipped}
    for sample, expected in zip(together, alone, strict=True):
        if isinstance(expected, Skipped):
            assert sample == expected
        else:
            assert sample.keys() == expected.keys() == {"images", "texts/captions"}
            for name in expected:
                np.testing.assert_array_equal(sample[name], expected[name])


@pytest.fixture
def blocks(monkeypatch) -> list[pathlib.Path]:
    """The blocks of shared memory that the loader makes."""
    made = []

    def make(*arguments):
        array = SharedMemoryArray(*arguments)
        made.append(pathlib.Path("/dev/shm", array.shm.name))
        return array

    monkeypatch.setattr(loader, "SharedMemoryArray", make)
    return made


needs_shared_memory = pytest.mark.skipif(not pathlib.Path("/dev/shm").is_dir(), reason="writes to /dev/shm")


@needs_shared_memory
def test_a_group_in_shared_memory_is_the_same(blocks):
    rng = np.random.default_rng(0)
    samples = [
        {"images": rng.integers(0, 256, (97, 103, 3), np.uint8), "tokens": rng.integers(0, 9, (2, 7), np.int32)}
        for _ in range(5)
    ]
    samples[2] = Skipped("a.tar", "key", "reason", 2)
    expected, shared = loader.collate(samples), loader.collate(samples, shared=True)
    assert shared.keys() == expected.keys() and shared["skipped"] == expected["skipped"]
    for name in ("images", "tokens", "offsets"):
        assert shared[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(shared[name], expected[name])
    for name in ("images", "tokens"):
        assert isinstance(shared[name], SharedMemoryArray)
        shared[name].unlink_on_del()
    del shared
    # Where grain has run before in this process, it unlinks in a thread of its own.
    assert len(blocks) == 2 and wait_for(lambda: not any(block.exists() for block in blocks), 30)


@needs_shared_memory
def test_full_shared_memory_is_an_error_and_leaves_nothing(blocks, monkeypatch):
    monkeypatch.setattr(loader.os.path, "join", lambda *_: "/dev/full")
    with pytest.raises(OSError, match="No space left"):
        loader.collate([{"images": np.zeros((64, 64, 3), np.uint8)}], shared=True)
    monkeypatch.undo()
    assert len(blocks) == 1 and wait_for(lambda: not blocks[0].exists(), 30)
