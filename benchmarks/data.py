"""Images and captions per second of the training stream, beside the reference's kind of loader on the same shards, or
with hard negatives beside the same without.

Each loader has a process of its own with its own workers, see `sides`. Between turns a loader's buffers fill and its
workers sleep; the batches of these buffers are not counted.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command, processes, reference_loader
from benchmarks.sides import Side, Turn, compare, median
from flair_jax import config as configuration
from flair_jax.data import loader
from flair_jax.data.sources.open import expand, open_source
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
        growth_mb: from the end of the first turn to that of the last: with many small batches, what leaks.
        share_X: of that CPU time, the share of reading, of json and drawing captions, of decoding, resizing, tokenising
          and packing; `share_rest` is batching, the way between the processes, and the order.
      The same with `fast_` and `device_` before it, where decoding and resizing are one; with `reference_loader_` for
      the reference's kind of loader, without shares but with its `tokenizer`: "open_clip", or "flair_jax", ours, which
      is faster, where that is not installed. `ratio_reference_pixels`, `ratio_fast` and `ratio_device` are our images
      per second over the reference's, `cpu_ratio_…` its CPU time over ours.

    Raises:
      ModuleNotFoundError: see `reference_loader.require`.
    """
    if reference:
        reference_loader.require()
    sides = {way: functools.partial(Side, _turns, settings, _stream, way) for way in pixels}
    if reference:
        sides["loader"] = functools.partial(Side, _turns, settings, _reference)
    results = compare(sides, batches, turns, loaders=True)
    stages = _stages(settings, pixels)
    medians = {name: {key: median(turns, key) for key in turns[0]} for name, turns in results.items()}
    prefixes = {"reference": "", "fast": "fast_", "device": "device_", "loader": "reference_loader_"}
    figures = {**dataclasses.asdict(settings), "shards": len(settings.shards), "batches": batches, "turns": turns}
    for name, speed in medians.items():
        prefix = prefixes[name]
        figures[f"{prefix}images_per_second"] = speed["images_per_second"]
        figures[f"{prefix}captions_per_second"] = speed["images_per_second"] * settings.captions
        figures[f"{prefix}cpu_ms_per_image"] = speed["cpu_ms_per_image"]
        memory = [turn["memory_mb"] for turn in results[name]]
        figures[f"{prefix}memory_mb"], figures[f"{prefix}growth_mb"] = max(memory), memory[-1] - memory[0]
        if name != "loader":
            shares = {f"share_{stage}": ms / speed["cpu_ms_per_image"] for stage, ms in stages[name].items()}
            shares["share_rest"] = 1 - sum(shares.values())
            figures |= {prefix + stage: share for stage, share in shares.items()}
    if reference:
        figures["reference_loader_tokenizer"] = reference_loader.tokenizer()[0]
        for way in pixels:
            label = "reference_pixels" if way == "reference" else way
            ours, theirs = medians[way], medians["loader"]
            figures[f"ratio_{label}"] = ours["images_per_second"] / theirs["images_per_second"]
            figures[f"cpu_ratio_{label}"] = theirs["cpu_ms_per_image"] / ours["cpu_ms_per_image"]
    return figures


def measure_negatives(
    settings: Settings, config: str, *, pixels: Sequence[str] = ("reference", "fast"), batches: int = 30, turns: int = 5
) -> dict[str, Any]:
    """Figures of the training stream of a config with its hard negatives and without them, side by side.

    Args:
      settings: of all loaders; the captions are those of the config.
      config: a path or the name of a shipped config, of which `data.captions` and `data.negatives` count.
      pixels, batches, turns: as in `measure`.

    Returns:
      The settings, and for each way to the pixels `WAY_images_per_second` and `WAY_cpu_ms_per_image`, the same with
      `negatives_` before it, and `ratio_WAY`, images per second with negatives over those without.

    Raises:
      ValueError: the config has no negatives.
    """
    data = configuration.read(config)["data"]
    if not data["negatives"]["kinds"]:
        raise ValueError(f"--negatives: config.data.negatives.kinds of {config} is empty; try fsc_clip_laioncoco")
    settings = dataclasses.replace(settings, captions=data["captions"]["count"])
    sides = {}
    for way in pixels:
        for prefix, negatives in (("", None), ("negatives_", data["negatives"])):
            make = functools.partial(Side, _turns, settings, _stream, way, data["captions"], negatives)
            sides[f"{prefix}{way}"] = make
    results = compare(sides, batches, turns, loaders=True)
    figures = {**dataclasses.asdict(settings), "shards": len(settings.shards), "batches": batches, "turns": turns}
    figures |= {"config": config, "kinds": ", ".join(data["negatives"]["kinds"])}
    for name, speeds in results.items():
        figures |= {f"{name}_{key}": median(speeds, key) for key in ("images_per_second", "cpu_ms_per_image")}
    for way in pixels:
        with_them, without = (figures[f"{prefix}{way}_images_per_second"] for prefix in ("negatives_", ""))
        figures[f"ratio_{way}"] = with_them / without
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The loaders, in a process of their own: batches without end


def _stream(
    settings: Settings,
    pixels: str,
    captions: Mapping[str, Any] | None = None,
    negatives: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    captions = {"count": settings.captions} if captions is None else captions
    options = dataclasses.asdict(settings) | {"captions": captions, "negatives": negatives, "pixels": pixels}
    packing = {"row_length": ROW_LENGTH}
    with loader.make_stream(**options, context_length=CONTEXT_LENGTH, seed=0, packing=packing) as stream:
        yield from stream


def _reference(settings: Settings) -> Iterator[Any]:
    yield from reference_loader.batches(**dataclasses.asdict(settings), tokenize=reference_loader.tokenizer()[1])


@contextlib.contextmanager
def _turns(settings: Settings, loader: Callable[..., Iterator[Any]], *arguments) -> Iterator[Turn]:
    """Turns of a loader: so many batches, after those that it made ahead."""

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
    crop = images.AugmentationOptions()
    rng = random.Random(0)
    tokenize("the first text waits for the vocabulary")
    seconds, tokens = collections.Counter(), []  # CPU time of this thread by stage

    @contextlib.contextmanager
    def clock(stage: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        seconds[stage] += time.thread_time() - start

    for number in numbers:
        with clock("read"):
            record = source[number]
        with clock("captions"):
            drawn = captions.draw(json.loads(record.json), rng, options)
        if pixels == "reference":
            with clock("decode"):
                picture = images.to_rgb(images.decode(record.image))
            with clock("resize"):
                images.random_resized_crop(picture, settings.image_size, rng, crop)
        else:
            part = {"fast": fast_images.random_resized_crop, "device": fast_images.canvas}[pixels]
            with clock("decode_and_resize"):
                part(record.image, settings.image_size, rng, crop)
        with clock("tokenise"):
            tokens.append(tokenize(drawn))
    rows = packing.measure_rows(tokens, batch_size=settings.batch_size, row_length=ROW_LENGTH)
    texts = settings.batch_size * settings.captions
    pack = packing.Packer(ROW_LENGTH, packing.row_counts(rows, texts, row_length=ROW_LENGTH, longest=CONTEXT_LENGTH))
    for first in range(0, len(tokens), settings.batch_size):
        batch = np.concatenate(tokens[first : first + settings.batch_size])
        with clock("pack"):
            pack(batch)
    return {stage: 1000 * spent / len(numbers) for stage, spent in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("data", "Images per second of the training stream.")
    parser.add_argument("--shards", required=True, help="webdataset tars: a folder, a pattern, or several with ::")
    parser.add_argument("--workers", type=int, required=True, metavar="W", help="processes of each loader")
    sizes = dict(
        batch_size=(64, "images"),
        image_size=(224, "side in pixels"),
        captions=(8, "per image"),
        batches=(30, "counted in a turn"),
        turns=(5, "of each loader"),
    )
    command.add_sizes(parser, **sizes)
    words = "ways of data.pixels (%(default)s)"
    parser.add_argument("--pixels", nargs="+", choices=WAYS, default=["reference", "fast"], help=words)
    words = "without the reference's kind of loader"
    parser.add_argument("--no-reference", dest="reference", action="store_false", help=words)
    words = "instead: the stream of this config, such as fsc_clip_laioncoco, with its hard negatives and without them"
    parser.add_argument("--negatives", metavar="CONFIG", help=words)
    parsed = parser.parse_args(arguments)
    if parsed.workers < 1:
        raise SystemExit("--workers: at least 1; without workers the two loaders do not do the same")
    options = command.pick(parsed, ("workers", "batch_size", "image_size", "captions"))
    settings, options = Settings(shards=expand(parsed.shards), **options), ("pixels", "batches", "turns")
    if parsed.negatives:
        figures = measure_negatives(settings, parsed.negatives, **command.pick(parsed, options))
    else:
        figures = measure(settings, **command.pick(parsed, (*options, "reference")))
    command.report(figures, parsed.json)


if __name__ == "__main__":
    main()
