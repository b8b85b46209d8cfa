"""The stream of batches: every sample once, the same whatever the workers, resumable anywhere, faults counted."""

import hashlib
import io
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from data import pipeline, records, tokenizer

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
    return pipeline.make_stream(shards, captions=captions, **{**defaults, **options})


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
        words = int(tokenizer.ends(alone[None])[0])
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


def test_the_batch_must_divide_by_the_processes(clean):
    for size, count in ((5, 2), (0, 1)):
        with pytest.raises(ValueError, match=f"batch_size {size}"):
            stream(clean, batch_size=size, process_count=count)


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
    with pytest.raises(pipeline.PositionError, match=name):
        stream(clean, position=batches.position, **change)


def test_a_position_of_other_data_is_refused(clean, flawed, tmp_path):
    with stream(clean) as batches:
        next(batches)
    with pytest.raises(pipeline.PositionError, match="checksum was"):
        stream(flawed, position=batches.position)
    with pytest.raises(pipeline.PositionError, match="samples was 19, is 18"):
        stream(write_shards(tmp_path / "fewer", (18,)), position=batches.position)
    moved = write_shards(tmp_path / "same", (10, 9))  # the same samples in other files
    assert take(stream(moved, position=batches.position), 3) == take(stream(clean, position=batches.position), 3)


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def document(**fields) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"json": b"{not json"}, "the json does not parse"),
        ({"json": b""}, "the json does not parse"),
        ({"json": b"\xff\xfe\x00"}, "the json does not parse"),
        ({"json": b"[" * 100_000}, "the json does not parse"),
        ({"json": b"null"}, "must be a JSON object, not NoneType"),
        ({"json": b'["a list"]'}, "must be a JSON object, not list"),
        ({"json": b'"text"'}, "must be a JSON object, not str"),
        (document(), "no captions"),
        (document(raw_caption=None, longSV_captions=None), "no captions"),
        (document(raw_caption=[], longSV_captions=" . "), "no captions"),
        (document(raw_caption=["a cat", None]), "raw_caption[#] must be a string, not NoneType"),
        (document(raw_caption={"text": "a cat"}), "raw_caption must be a string or a list"),
        (document(raw_caption=5), "raw_caption must be a string or a list"),
        ({"image": b""}, "image"),
        ({"image": b"no image"}, "image"),
        ({"image": picture(1)[:60]}, "image"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path, caplog, content, reason):
    shards = write_shards(tmp_path / "shards", (3, 3), {4: content})
    with stream(shards, batch_size=5) as batches:
        assert sorted(take(batches, 2)) == [0, 0, 1, 1, 2, 2, 3, 3, 5, 5]
        ((counted, count),) = batches.skipped.items()
    assert reason in counted and count == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    for warning in warnings:
        assert "00001.tar" in warning and "000000004" in warning and reason.split("[#]")[-1] in warning


@pytest.mark.parametrize(
    "content",
    [
        document(raw_caption="picture 4"),
        document(raw_caption="picture 4. picture 4.\npicture 4</s>"),
        document(raw_caption=None, longSV_captions=["picture 4"]),
        document(longSV_captions="picture 4"),
        document(raw_caption=["", " ", "picture 4"], longSV_captions=[]),
    ],
)
def test_captions_in_other_forms_are_used(tmp_path, content):
    """Unsplit text, null, missing and empty fields, as long as there is a sentence; letters are never drawn."""
    shards = write_shards(tmp_path / "shards", (6,), {4: content})
    with stream(shards, batch_size=6, captions={"count": 20, "max_merged": 1}) as batches:
        batch = next(batches)
        assert not batches.skipped
    tokens = batch["texts"]["tokens"][20 * numbers(batch).index(4) :][:20]
    assert (tokens == tokenizer.Tokenizer(LENGTH)(["picture 4"])).all()


def test_faults_that_differ_in_a_number_are_counted_together(tmp_path):
    bad = {1: document(raw_caption=[None]), 3: document(raw_caption=["a cat", None])}
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
            pipeline.TooManySkipped, match=r"3 of the first 61 samples of epoch 0.*2\.00% of 100"
        ) as raised:
            take(batches, 20)
    table = str(raised.value).splitlines()[1:3]
    assert table[0].split() == ["2", "no", "captions"] and table[1].split()[0] == "1" and "image" in table[1]
    with (
        stream(shards, max_skipped=0.0, shuffle=False) as batches,
        pytest.raises(pipeline.TooManySkipped, match="first 4 "),
    ):
        next(batches)


def test_skips_are_counted_by_epoch_also_over_a_restart(tmp_path):
    shards = write_shards(tmp_path / "shards", (100,), dict.fromkeys((3, 50, 60), NO_CAPTION))
    with stream(shards, max_skipped=0.02, shuffle=False) as batches:
        take(batches, 13)
    with (
        stream(shards, max_skipped=0.02, shuffle=False, position=batches.position) as batches,
        pytest.raises(pipeline.TooManySkipped, match="3 of the first 61"),
    ):
        take(batches, 20)


def test_a_wrong_caption_field_shows_at_once(tmp_path):
    shards = write_shards(tmp_path / "shards", (1000,), dict.fromkeys(range(1000), NO_CAPTION))
    for allowed in (0.4, 0.01):
        with stream(shards, max_skipped=allowed) as batches, pytest.raises(pipeline.TooManySkipped) as raised:
            next(batches)
        seen = 200 if allowed == 0.4 else 11  # half of the first 200, and more than 10 of 1,000
        assert f"{seen} of the first {seen} samples" in str(raised.value)


def test_an_epoch_without_any_sample_ends_the_search(tmp_path):
    shards = write_shards(tmp_path / "shards", (6,), dict.fromkeys(range(6), NO_PICTURE))
    with stream(shards, max_skipped=1.0) as batches, pytest.raises(pipeline.TooManySkipped, match="6 of the first 6"):
        next(batches)


def test_warnings_do_not_flood_the_log(tmp_path, caplog):
    shards = write_shards(tmp_path / "shards", (40,), dict.fromkeys(range(0, 40, 2), NO_CAPTION))
    with stream(shards) as batches:
        take(batches, 20)
        assert batches.skipped.total() >= 60
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == pipeline.LOGGED_SKIPS + 1
    assert "only counted" in messages[-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_replaced_stops_the_run(tmp_path, workers):
    shards = write_shards(tmp_path / "shards", (6,))
    with stream(shards, workers=workers) as batches:
        next(batches)
        write_shards(shards, (7,))
        with pytest.raises(records.ShardError, match=r"00000\.tar was replaced"):
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
from data import pipeline

if __name__ == "__main__":
    options = dict(batch_size=4, image_size=8, context_length=16, seed=0)
    batches = pipeline.make_stream({shards!r}, workers=2, **options)
    for _ in range(3):
        next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def worker_processes(pid: int) -> list[int]:
    """Children of all its threads, for grain starts its workers in one of its own; less multiprocessing's tracker."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [child for child in children if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text()]


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_end_when_their_parent_is_killed(clean, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(shards=str(clean)))
    blocks = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout.readline() == "ready\n"
        workers = worker_processes(parent.pid)
        assert len(workers) == 2 and all(map(alive, workers))
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
    assert wait_for(lambda: not [name for name in set(os.listdir("/dev/shm")) - blocks if name.startswith("psm_")], 10)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_worker_that_is_killed_stops_the_run(clean):
    with stream(clean, workers=1) as batches:
        next(batches)
        (worker,) = worker_processes(os.getpid())
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="exit code -9") as raised:
            take(batches, 10)
    assert any("want of memory" in note for note in raised.value.__notes__)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_samples(flawed, caplog):
    samples = pipeline.evaluation_samples(flawed, 8, fields=FIELDS)
    good = [number for number in range(19) if number not in BAD]
    for _ in range(2):
        seen = list(samples)
        assert [key for key, _, _ in seen] == [f"{number:09d}" for number in good]
        assert numbers({"images": np.stack([image for _, image, _ in seen])}) == good
        assert [sentences for _, _, sentences in seen] == [[f"picture {number}"] for number in good]
        assert samples.skipped["no captions"] == 5 and samples.skipped.total() == 7
    assert len(samples.source) == 19
    assert "000000003" in caplog.text
