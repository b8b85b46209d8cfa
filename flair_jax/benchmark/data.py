"""Images and captions per second of the training stream, beside the reference's kind of loader on the same shards.

Each loader lives in a process of its own with its own workers. They run in turns, so that whatever else the machine
does meets all of them, and the medians of the turns count. Between turns a loader's buffers fill and its workers
sleep; the batches of these buffers are not counted.
"""

import collections
import contextlib
import dataclasses
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flair_jax.benchmark import processes, reference_loader
from flair_jax.benchmark.contender import Contender, Turn, median
from flair_jax.benchmark.python_tokenizer import PythonTokenizer
from flair_jax.benchmark.tokenizer import open_clip_tokenizer
from flair_jax.data import loader
from flair_jax.data.sources.open import open_source
from flair_jax.data.transforms import captions, fast_images, images, packing, tokenizer

WAYS = ("reference", "fast", "device")  # to the pixels: `data.pixels` of the config
CONTEXT_LENGTH = 77
ROW_LENGTH = 80  # of packed captions
BUFFERED = 6  # batches a worker, more than any of the loaders holds back
STAGE_SAMPLES = 512  # images on which the stages are timed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all loaders of a run share."""

    shards: Sequence[str]
    workers: int
    batch_size: int = 64
    image_size: int = 224
    captions: int = 8  # K


def measure(
    settings: Settings,
    *,
    pixels: Sequence[str] = ("reference", "fast"),
    reference: bool = True,
    batches: int = 30,
    turns: int = 5,
) -> dict[str, Any]:
    """Figures of the training stream and of the reference's kind of loader, side by side.

    Args:
      settings: of all loaders.
      pixels: which of `WAYS` to measure.
      reference: whether the reference's kind of loader runs beside them.
      batches: that are counted in each turn.
      turns: of each loader.

    Returns:
      The settings, and of "reference" pixels:
        images_per_second, captions_per_second.
        cpu_ms_per_image: of all processes of the loader together.
        memory_mb: MiB of all its processes at the end of a turn, the most of all turns; shared pages count once.
        share_X: of that CPU time, the share of reading, of json and drawing captions, of decoding, resizing, tokenising
          and packing; `share_rest` is batching, the way between the processes, and the order.
      The same with `fast_` and `device_` before it, where decoding and resizing are one; with `reference_loader_` for
      the reference's kind of loader, without shares but with its `tokenizer`: "open_clip", or "python" where that is
      not installed. `ratio_reference_pixels`, `ratio_fast` and `ratio_device` are our images per second over the
      reference's, `cpu_ratio_…` its CPU time over ours.

    Raises:
      ModuleNotFoundError: see `reference_loader.require`.
    """
    if reference:
        reference_loader.require()
    with contextlib.ExitStack() as stack:
        contenders = {way: stack.enter_context(Contender(_turns, settings, _stream, way)) for way in pixels}
        if reference:
            contenders["loader"] = stack.enter_context(Contender(_turns, settings, _reference))
        results = {name: [] for name in contenders}
        for _ in range(turns):
            for name, contender in contenders.items():
                results[name].append(contender.turn(batches))
                contender.rest()
    stages = _stages(settings, pixels)
    medians = {name: {key: median(turns, key) for key in turns[0]} for name, turns in results.items()}
    prefixes = {"reference": "", "fast": "fast_", "device": "device_", "loader": "reference_loader_"}
    figures = {**dataclasses.asdict(settings), "shards": len(settings.shards), "batches": batches, "turns": turns}
    for name, speed in medians.items():
        prefix = prefixes[name]
        figures[f"{prefix}images_per_second"] = speed["images_per_second"]
        figures[f"{prefix}captions_per_second"] = speed["images_per_second"] * settings.captions
        figures[f"{prefix}cpu_ms_per_image"] = speed["cpu_ms_per_image"]
        figures[f"{prefix}memory_mb"] = max(turn["memory_mb"] for turn in results[name])
        if name != "loader":
            shares = {f"share_{stage}": ms / speed["cpu_ms_per_image"] for stage, ms in stages[name].items()}
            shares["share_rest"] = 1 - sum(shares.values())
            figures |= {prefix + stage: share for stage, share in shares.items()}
    if reference:
        figures["reference_loader_tokenizer"] = "open_clip" if open_clip_tokenizer() else "python"
        for way in pixels:
            label = "reference_pixels" if way == "reference" else way
            ours, theirs = medians[way], medians["loader"]
            figures[f"ratio_{label}"] = ours["images_per_second"] / theirs["images_per_second"]
            figures[f"cpu_ratio_{label}"] = theirs["cpu_ms_per_image"] / ours["cpu_ms_per_image"]
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The loaders, in a process of their own: batches without end


def _stream(settings: Settings, pixels: str) -> Iterator[Any]:
    stream = loader.make_stream(
        settings.shards,
        batch_size=settings.batch_size,
        image_size=settings.image_size,
        context_length=CONTEXT_LENGTH,
        seed=0,
        captions={"count": settings.captions},
        pixels=pixels,
        packing={"row_length": ROW_LENGTH},
        workers=settings.workers,
    )
    with stream:
        yield from stream


def _reference(settings: Settings) -> Iterator[Any]:
    yield from reference_loader.batches(
        settings.shards,
        batch_size=settings.batch_size,
        image_size=settings.image_size,
        captions_per_image=settings.captions,
        workers=settings.workers,
        tokenize=open_clip_tokenizer() or PythonTokenizer(CONTEXT_LENGTH),
    )


@contextlib.contextmanager
def _turns(settings: Settings, loader: Callable[..., Iterator[Any]], *arguments) -> Iterator[Turn]:
    """Turns of a loader: so many batches, behind those that it had made while it waited."""

    def turn(count: int) -> dict[str, float]:
        _skip(batches, BUFFERED * settings.workers)
        cpu, start = processes.cpu_seconds(), time.perf_counter()
        _skip(batches, count)
        seconds, cpu = time.perf_counter() - start, processes.cpu_seconds() - cpu
        cpu = max(cpu, processes.TICK)  # of a very short turn the system may not have counted any
        images = count * settings.batch_size
        return {
            "images_per_second": images / seconds,
            "cpu_ms_per_image": 1000 * cpu / images,
            "memory_mb": processes.total_mib(),
        }

    with contextlib.closing(loader(settings, *arguments)) as batches:
        yield turn


def _skip(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


# ---------------------------------------------------------------------------------------------------------------------
# The stages, one after the other on one thread


def _stages(settings: Settings, pixels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU time an image in each stage, for each way to the pixels.

    Measured in as many processes at once as the stream has workers: a core that shares its caches and its clock with
    busy neighbours takes longer for the same work.
    """
    with multiprocessing.get_context("spawn").Pool(settings.workers) as pool:
        runs = {way: pool.starmap(_stages_here, [(settings, way)] * settings.workers, chunksize=1) for way in pixels}
    return {
        way: {stage: statistics.mean(run[stage] for run in of_each) for stage in of_each[0]}
        for way, of_each in runs.items()
    }


def _stages_here(settings: Settings, pixels: str) -> dict[str, float]:
    source = open_source(settings.shards)
    numbers = random.Random(0).choices(range(len(source)), k=STAGE_SAMPLES)
    tokenize = tokenizer.Tokenizer(CONTEXT_LENGTH)
    options = captions.CaptionOptions(count=settings.captions)
    crop = dataclasses.astuple(images.AugmentationOptions())
    rng = random.Random(0)
    tokenize("the first text waits for the vocabulary")
    clock, tokens = _Clock(), []
    for number in numbers:
        with clock("read"):
            record = source[number]
        with clock("captions"):
            drawn = captions.draw(json.loads(record.json), rng, options)
        if pixels == "reference":
            with clock("decode"):
                picture = images.to_rgb(images.decode(record.image))
            with clock("resize"):
                images.random_resized_crop(picture, settings.image_size, rng, *crop)
        else:
            part = {"fast": fast_images.random_resized_crop, "device": fast_images.canvas}[pixels]
            with clock("decode_and_resize"):
                part(record.image, settings.image_size, rng, *crop)
        with clock("tokenise"):
            tokens.append(tokenize(drawn))
    rows = packing.measure_rows(tokens, batch_size=settings.batch_size, row_length=ROW_LENGTH)
    texts = settings.batch_size * settings.captions
    pack = packing.Packer(ROW_LENGTH, packing.row_counts(rows, texts, row_length=ROW_LENGTH, longest=CONTEXT_LENGTH))
    for first in range(0, len(tokens), settings.batch_size):
        batch = np.concatenate(tokens[first : first + settings.batch_size])
        with clock("pack"):
            pack(batch)
    return {stage: 1000 * seconds / len(numbers) for stage, seconds in clock.seconds.items()}


class _Clock:
    """CPU seconds of this thread, by what they were spent on."""

    def __init__(self):
        self.seconds = collections.Counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[stage] += time.thread_time() - start
