"""The training input pipeline: shuffled, augmented, always full batches from shards, resumable at the very next sample.

The order and what the transforms make are pure functions of (seed, epoch, sample), so neither the number of workers nor
a restart changes them. grain does the order, the workers and the batching: a *group* is a fixed run of `batch_size`
indices of the endless order, read as a whole by one worker. `Stream` turns groups into batches: where samples cannot be
used, the batch is filled up from the next group, and the rest of that group starts the next batch: nothing is repeated
or lost. Last, the texts of a batch may be packed.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import logging
import multiprocessing
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.python import SharedMemoryArray

from flair_jax.data import iterator_state, order
from flair_jax.data.sources.base import Concatenation
from flair_jax.data.sources.open import Shards, open_source, sets
from flair_jax.data.transforms import annotations, packing, region_files, tokenizer
from flair_jax.data.transforms.base import Sample, Transform
from flair_jax.data.transforms.captions import CaptionOptions
from flair_jax.data.transforms.images import AugmentationOptions
from flair_jax.data.transforms.negatives import PARSED, Negatives
from flair_jax.data.transforms.regions import Region, Regions, of_record
from flair_jax.data.transforms.samples import (
    UNUSABLE,
    Captions,
    Crop,
    Flip,
    LoadTraining,
    Pixels,
    Skipped,
    join_texts,
)

logger = logging.getLogger(__name__)

MAX_THREADS = 8  # without workers; each holds a whole batch
WORKER_BUFFER = 2  # batches that wait in each worker
SHARED_MEMORY = "/dev/shm"  # where Linux lists it as files; elsewhere grain copies the batches into it
LOGGED_SKIPS = 20  # warnings of skipped samples; later ones are only counted
MEASURED_SAMPLES = 2048  # whose captions say how many packed rows a batch needs
# Starts to find the largest of the numbers that all processes give; the function that it returns waits for it.
Agree = Callable[[int], Callable[[], int]]
EARLY_SAMPLES, EARLY_SHARE = 200, 0.5  # where more than half of the first 200 are skipped there is no use in reading on


class TooManySkipped(RuntimeError):
    """More samples than allowed cannot be used."""


def _log_and_count(skipped: Skipped, counts: collections.Counter, logged: int) -> None:
    """Counts without the numbers in the reason, so that like faults are counted together. Warns of the first ones."""
    counts[re.sub(r"\d+", "#", skipped.reason)] += 1
    if logged < LOGGED_SKIPS:
        logger.warning("skipped: %s: sample %s: %s", skipped.shard, skipped.key, skipped.reason)
    elif logged == LOGGED_SKIPS:
        logger.warning("skipped %d samples; from here on they are only counted", LOGGED_SKIPS)


def collate(samples: Sequence[dict[str, np.ndarray] | Skipped], shared: bool = False) -> dict[str, Any]:
    """A group of samples.

    Args:
      samples: of the group, in order.
      shared: whether to lay the arrays in shared memory, for another process.

    Returns:
      The arrays of the G good ones, (G, …) each; "offsets": their indices in the group, (G,); and "skipped": (offset,
      Skipped) of the others. Without good ones there are no other arrays.
    """
    offsets = [offset for offset, sample in enumerate(samples) if not isinstance(sample, Skipped)]
    good = [samples[offset] for offset in offsets]
    stack = _stack_shared if shared else np.stack
    arrays = {name: stack([sample[name] for sample in good]) for name in (good[0] if good else ())}
    skipped = [(offset, sample) for offset, sample in enumerate(samples) if isinstance(sample, Skipped)]
    return {**arrays, "offsets": np.array(offsets, np.int64), "skipped": skipped}


def _stack_shared(arrays: Sequence[np.ndarray]) -> SharedMemoryArray:
    """As np.stack, into memory that grain hands to the parent as it is.

    It is written as a file: stored through its mapping every page of it would be a fault, which takes several times as
    long as the copy, and the end of the process where the memory is full.

    Raises:
      OSError: the shared memory is full.
    """
    stacked = SharedMemoryArray((len(arrays), *arrays[0].shape), arrays[0].dtype)
    try:
        with open(os.path.join(SHARED_MEMORY, stacked.shm.name), "r+b") as file:
            for array in arrays:
                file.write(array)
    except OSError:
        stacked.unlink_on_del()
        raise
    return stacked


# ---------------------------------------------------------------------------------------------------------------------
# The stream of batches


class Stream:
    """Endless iterator over full batches; see `make_stream`.

    A batch holds the arrays of the transforms under their names, (B, …), B being this process's share of the global
    batch: with FLAIR's transforms "images", uint8 (B, H, W, 3) RGB; with pixels "device" these are canvases and there
    are "crop_boxes", float32 (B, 4). All texts, C an image, are in one dict, `texts`: {"tokens": int32 (B * C, T),
    "ends": int32 (B * C,)}. Text c of image i is number i * C + c, and `ends` are indices of the end-of-text ids into
    the flattened tokens of all processes. With packing `texts` are as `packing.lay_out` says. Where a transform says
    which of its texts are meant there is "valid", bool (B, C).

    Close it, or use it in a `with` statement, to end its workers. They also end when this process does, however it
    dies.

    Attributes:
      source: all samples; `len(stream.source)` make an epoch.
      truncated: captions that packing cut since this stream was opened; 0 without `packing.truncate`.
      masked: texts that are not valid, such as negatives that a caption does not have, in the batches since then.
    """

    def __init__(
        self,
        load: LoadTraining,
        sample_order: grain.MapDataset,
        packer: packing.Packer | None,
        *,
        identity: Mapping[str, Any],
        workers: int,
        start: iterator_state.Position,
        max_skipped: float,
        agree: Agree | None,
    ):
        self.source = load.source
        self._packer, self._agree = packer, agree
        self._max_skipped = max_skipped
        self._batch_size = identity["batch_size"]
        self._process_index, self._process_count = identity["process_index"], identity["process_count"]
        self._rows = self._batch_size // self._process_count  # of this process's batches and groups
        _check_same_stream(start["stream"], identity)
        self._base = {name: start[name] for name in ("start", "leftover", "stream")}  # what stays of the position
        self._layout = iterator_state.Layout(start["start"], tuple(map(tuple, start["leftover"])))
        # The next batch begins at index `_offset` of group `_group`.
        self._group, self._offset = start["group"], start["offset"]
        self._held = None  # that group, once it was read
        self._skipped = collections.Counter(start["skipped"])
        self.truncated = self.masked = 0
        # The epoch of the last skipped sample, and how many of it were skipped.
        self._epoch, self._epoch_skipped = start["epoch"], start["epoch_skipped"]
        self._logged = 0
        self._position = self._snapshot()
        self._prefetched: _Drawn | Exception | None = None
        # In a list that closing empties: grain complains at exit of an iterator that is still there.
        self._groups = [self._start(sample_order, load, workers)]
        self._finalizer = weakref.finalize(self, _close, self._groups)

    def _start(self, sample_order: grain.MapDataset, load: LoadTraining, workers: int) -> grain.DatasetIterator:
        if self._layout.leftover:
            relaid = functools.partial(_relaid, sample_order, self._layout)
            sample_order = grain.MapDataset.range(1).repeat().map_with_index(relaid)
        numbered = sample_order.map_with_index(_with_index)[self._layout.start :]
        groups = numbered.batch(self._rows, drop_remainder=True, batch_fn=list)
        groups = groups[self._group * self._process_count + self._process_index :: self._process_count]
        shared = bool(workers) and os.path.isdir(SHARED_MEMORY)
        groups = groups.map(functools.partial(_load_group, load, shared))
        # Only their queues let workers read ahead: a thread would hold a group that nobody unlinks at the end.
        threads = 0 if workers else min(MAX_THREADS, os.cpu_count() or 1)
        groups = groups.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers ask absl for flags, which only `app.run` parses
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=WORKER_BUFFER)
        return iter(groups.mp_prefetch(options, worker_init_fn=_start_worker))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> dict[str, Any]:
        """
        Raises:
          TooManySkipped: more than `max_skipped` of an epoch cannot be used.
          ShardError: a shard changed during the run.
          ValueError: the stream is closed.
        """
        if not self._groups:
            raise ValueError("the stream is closed")
        drawn, self._prefetched = self._prefetched or self._draw(), None
        if isinstance(drawn, Exception):
            raise drawn
        if self._agree is not None:
            # Processes agree on a batch's rows one batch before it is needed, so that no device waits for it.
            try:
                self._prefetched = self._draw()
            except Exception as error:  # it belongs to the next batch
                self._prefetched = error
        self._position = drawn.position
        if "valid" in drawn.arrays:
            self.masked += int((~drawn.arrays["valid"]).sum())
        return {**drawn.arrays, "texts": self._texts(drawn)}

    def _draw(self) -> "_Drawn":
        """The next batch, before its texts are laid out."""
        parts, missing = [], self._rows
        while missing:
            if self._held is None:
                self._held = self._read()
            part, end = self._take(self._held, missing)
            if len(part["offsets"]):
                parts.append(part)
                missing -= len(part["offsets"])
            self._offset = end
            if end == self._rows:
                self._group, self._offset, self._held = self._group + 1, 0, None
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]
        del batch["offsets"]
        arrays, tokens, valid = join_texts(batch)
        if valid is not None:
            arrays["valid"] = valid
        texts = tokens.reshape(-1, tokens.shape[-1])  # (B * C, T)
        placed = rows = None
        if self._packer is not None:
            placed = self._packer.place(texts)
            rows = (lambda: placed.rows) if self._agree is None else self._agree(placed.rows)
        return _Drawn(arrays, texts, placed, rows, self._snapshot())

    def _texts(self, drawn: "_Drawn") -> dict[str, np.ndarray]:
        """The fields of `flair_jax.models.text.Text`."""
        if drawn.placed is None:
            texts = packing.padded(drawn.tokens)
        else:
            texts, truncated = self._packer.lay_out(drawn.placed, drawn.rows())
            self.truncated += truncated
        before = self._process_index * texts["tokens"].size  # tokens of the preceding processes
        return {**texts, "ends": texts["ends"] + np.int32(before)}

    def _read(self) -> dict[str, Any]:
        try:
            group = next(self._groups[0])
        except (RuntimeError, OSError) as error:
            full = f"{SHARED_MEMORY} is full: enlarge it (docker run --shm-size=8g)"
            if getattr(error, "errno", None) == errno.ENOSPC:
                error.add_note(f"{full}.")
            elif "Worker process was terminated" in str(error):
                error.add_note(
                    "Exit code -9 means killed, most often for want of memory: use fewer workers or a smaller batch. "
                    f"Exit code -7 means that {full}."
                )
            raise
        # Workers hand over a subclass that lives in shared memory and that cannot be pickled: plain views of it.
        return {name: value if name == "skipped" else np.asarray(value) for name, value in group.items()}

    def _take(self, group: Mapping[str, Any], count: int) -> tuple[dict[str, np.ndarray], int]:
        """At most `count` good samples of a group from the present offset on, and the offset after them.

        What is passed on the way and cannot be used is counted.
        """
        offsets = group["offsets"]  # (G,)
        first = int(np.searchsorted(offsets, self._offset))
        stop = min(first + count, len(offsets))
        end = self._rows if stop == len(offsets) else int(offsets[stop - 1]) + 1
        for offset, skipped in group["skipped"]:
            if self._offset <= offset < end:
                self._count(skipped)
        return {name: array[first:stop] for name, array in group.items() if name != "skipped"}, end

    def _count(self, skipped: Skipped) -> None:
        _log_and_count(skipped, self._skipped, self._logged)
        self._logged += 1
        epoch, offset = divmod(skipped.index, len(self.source))
        self._epoch_skipped = 1 + (self._epoch_skipped if epoch == self._epoch else 0)
        self._epoch = epoch
        whole = len(self.source) / self._process_count  # samples of an epoch that this process reads
        seen = (offset + 1) / self._process_count
        too_many = self._epoch_skipped > self._max_skipped * whole or self._epoch_skipped >= whole
        hopeless = seen >= EARLY_SAMPLES and self._epoch_skipped > max(EARLY_SHARE, self._max_skipped) * seen
        if too_many or hopeless:
            raise TooManySkipped(self._table(int(seen)))

    def _table(self, seen: int) -> str:
        table = "".join(f"\n  {count:>10,}  {reason}" for reason, count in self._skipped.most_common())
        return (
            f"{self._epoch_skipped:,} of the first {seen:,} samples of epoch {self._epoch} cannot be used; max_skipped "
            f"allows {self._max_skipped:.2%} of {len(self.source):,}. Skipped since the run began:{table}\n"
            "The warnings above name the first of them. Check the caption fields and the shards, or raise max_skipped."
        )

    @property
    def position(self) -> dict[str, Any]:
        """After the last batch that was given out, for `make_stream(position=…)`. Small, and fit for JSON.

        Every process of a run has its own and must get its own back; for another number of processes see
        `iterator_state.redistribute`. The number of workers may change, the rest of `stream` may not.
        """
        return self._position

    def _snapshot(self) -> dict[str, Any]:
        return {
            **self._base,
            "group": self._group,
            "offset": self._offset,
            "skipped": dict(self._skipped),
            "epoch": self._epoch,
            "epoch_skipped": self._epoch_skipped,
        }

    @property
    def skipped(self) -> collections.Counter:
        """Samples that could not be used, by reason, since the very first batch of the run."""
        return collections.Counter(self._position["skipped"])

    @property
    def epoch(self) -> float:
        """Epochs that were given out, to within a batch."""
        given = self._position["group"] * self._batch_size + self._position["offset"] * self._process_count
        return (self._layout.start + given) / len(self.source)

    def close(self) -> None:
        """Ends the workers, which finish the batches that they are at. Idempotent."""
        self._held = self._prefetched = None
        self._finalizer()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A batch before its texts are laid out.

    Attributes:
      arrays: by name.
      tokens: int32 (B * C, T).
      placed: where they go; None: as they are.
      rows: waits for the rows that all processes take.
      position: of the stream after this batch.
    """

    arrays: dict[str, np.ndarray]
    tokens: np.ndarray
    placed: packing.Placed | None
    rows: Callable[[], int] | None
    position: dict[str, Any]


def _check_same_stream(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = [
        f"{name} was {saved.get(name)}, is {value}" for name, value in now.items() if saved.get(name) != value
    ]
    if differences:
        raise iterator_state.PositionError(
            f"the saved position belongs to another stream ({'; '.join(differences)}): to go on from it would "
            "repeat and lose samples. Restore the same data and settings, or start without a position."
        )


def _relaid(sample_order: grain.MapDataset, layout: iterator_state.Layout, index: int, _: int) -> tuple[int, int]:
    return sample_order[layout(index)]


def _with_index(index: int, which: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return index, which


def _load_group(load: LoadTraining, shared: bool, group: list[tuple[int, tuple[int, int]]]) -> dict[str, Any]:
    return collate(load(group), shared)


def _close(groups: list[grain.DatasetIterator]) -> None:
    groups.pop().close()


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker process."""
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    # grain's workers outlive a parent that was killed. PR_SET_PDEATHSIG would not do: it watches the thread that
    # started the worker, which ends earlier.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class PackingOptions:
    """How captions share rows; see `transforms.packing`.

    The loss does not depend on these, nor on the number of devices, unless `truncate` is set.
    """

    row_length: int | None = None  # tokens, at least context_length; None: every caption has a row of its own
    # Share of batches that get the smallest number of rows, which is measured on the data. Others get more, of a few
    # numbers; the training step is compiled for each number when it first comes.
    quantile: float = 0.95
    # True: the number of rows is fixed, and where a batch does not fit its longest captions lose their last tokens: one
    # program and one need of memory, but a loss that depends on the number of devices. row_length may be any.
    truncate: bool = False


@dataclasses.dataclass(frozen=True)
class NegativeOptions:
    """Hard negatives of each image's first caption; see `transforms.negatives`."""

    kinds: Sequence[str] | None = (
        None  # such as ("negclip", "replace", "ngram_shuffle_2"), at most one of each; None: none
    )
    annotations: str | None = None  # folder of the files that `data.prepare annotate` wrote; None: beside the shards


@dataclasses.dataclass(frozen=True)
class RegionOptions:
    """Described boxes of each image; see `transforms.regions`."""

    count: int | None = None  # M, regions an image, the best by score; None: none
    source: str | None = (
        None  # None: the records; "beside": the files that `data.prepare annotate regions` wrote beside
    )
    # the shards; or the folder that it wrote them to
    min_area: float = 0.5  # share of its area that a crop must leave of a box; below it box and description are dropped


def make_stream(
    shards: Shards,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    context_length: int,
    seed: int,
    captions: Mapping[str, Any] | None = None,
    negatives: Mapping[str, Any] | None = None,
    regions: Mapping[str, Any] | None = None,
    augmentation: Mapping[str, Any] | None = None,
    pixels: Pixels = "reference",
    upright: bool = False,
    transforms: Sequence[Transform] = (),
    packing: Mapping[str, Any] | None = None,
    shuffle: bool = True,
    shuffle_window: int | None = None,
    weights: Sequence[float] | None = None,
    workers: int = 0,
    index_dir: str | os.PathLike | None = None,
    position: iterator_state.Position | None = None,
    max_skipped: float = 0.01,
    process_index: int = 0,
    process_count: int = 1,
    device_count: int = 1,
    rows_multiple_of: int = 1,
    agree: Agree | None = None,
) -> Stream:
    """The training batches of some shards, without end.

    Args:
      shards: see `expand`.
      batch_size: images in a batch over all processes. Process p gets rows p * batch_size / process_count onwards.
      image_size: side in pixels, or (height, width).
      context_length: tokens a caption.
      seed: of the order, the crops and the captions.
      captions: fields of CaptionOptions that differ from their defaults.
      negatives: fields of NegativeOptions that differ from their defaults.
      regions: fields of RegionOptions that differ from their defaults.
      augmentation: fields of AugmentationOptions that differ from their defaults.
      pixels: how images are made, see `samples.Crop`.
      upright: whether photographs are turned as their EXIF orientation says; the published data sets are trained as
        they are stored.
      transforms: others beside the captions and the crop, whose arrays join the batch; see `transforms.base`.
      packing: fields of PackingOptions that differ from their defaults.
      shuffle: over all samples, anew each epoch; otherwise in the order of the shards.
      shuffle_window: samples within which to shuffle, for stores that are slow to seek; None: the whole epoch.
      weights: how often the sets that `::` joins (or a list holds) come, relative to one another; None: every sample
        once an epoch.
      workers: processes that prepare batches; 0: threads of this process. They import the main module again, so a
        script needs its `if __name__ == "__main__":`.
      index_dir: see `open_source`.
      position: `Stream.position` of an earlier run, to go on with the very next sample.
      max_skipped: largest share of an epoch's samples that may be unusable (json that does not parse, no caption, no
        picture). Over it the run stops; sooner where more than half of the first 200 samples of an epoch are.
      process_index, process_count: which share of every batch this process reads.
      device_count: devices of this process, over which its share is split; each gets the packed rows of its own images.
      rows_multiple_of: what has to divide the packed rows of a device.
      agree: the largest of the numbers that all processes give, see `Agree`; needed by several processes that pack
        without `truncate`, for the batch has one shape on all of them. They all ask for each batch, in order.

    Raises:
      FileNotFoundError, ShardError: see `open_source`; or annotations are missing, see `annotations.open_annotations`.
      ValueError: batch_size is no multiple of the processes and their devices, packed rows are too short for a
        caption, no sample has a region where there should be some, or an option has no meaning.
      iterator_state.PositionError: `position` belongs to other data or settings.
      TypeError: an unknown option of captions, negatives, regions, augmentation or packing.
    """
    if batch_size < 1 or batch_size % (process_count * device_count):
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of {process_count * device_count}: process_count "
            f"{process_count} times device_count {device_count}"
        )
    if weights is None:
        source = open_source(shards, index_dir)
        sizes = [len(source)]
    else:
        parts = [open_source(part, index_dir) for part in sets(shards)]
        source = Concatenation(parts)
        sizes = [len(part) for part in parts]
    caption_options = CaptionOptions(**(captions or {}))
    draw_captions = Captions(caption_options, tokenizer.Tokenizer(context_length))
    augment = AugmentationOptions(**(augmentation or {}))
    found = _region_source(RegionOptions(**(regions or {})), source.shards)
    flip = Flip(augment, draw_captions, found) if augment.flip else None
    crop = Crop(image_size, augment, pixels, upright, flip)
    own = (
        draw_captions,
        *_negatives(NegativeOptions(**(negatives or {})), draw_captions, source.shards),
        *_regions(RegionOptions(**(regions or {})), found, crop, draw_captions.tokenize),
        *transforms,
        crop,  # last: it costs the most
    )
    load = LoadTraining(source, own, seed)
    identity = {
        "samples": len(source),
        "checksum": source.checksum,
        "seed": seed,
        "shuffle": shuffle,
        "shuffle_window": shuffle_window,
        "weights": None if weights is None else list(weights),
        "batch_size": batch_size,
        "process_index": process_index,
        "process_count": process_count,
    }
    sample_order = order.endless(sizes, seed, shuffle=shuffle, window=shuffle_window, weights=weights)
    if found is not None:
        _check_regions(found, load, sample_order)
    packer = _measured_packer(
        load,
        sample_order,
        images=batch_size // process_count // device_count,
        longest=context_length,
        devices=device_count,
        processes=process_count,
        multiple_of=rows_multiple_of,
        options=PackingOptions(**(packing or {})),
    )
    shapes_differ = process_count > 1 and packer is not None and not packer.truncate
    if shapes_differ and agree is None:
        raise ValueError(
            f"{process_count} processes that pack need `agree`, to give their batches one shape; or packing.truncate"
        )
    return Stream(
        load,
        sample_order,
        packer,
        identity=identity,
        workers=workers,
        start=iterator_state.first(identity) if position is None else position,
        max_skipped=max_skipped,
        agree=agree if shapes_differ else None,
    )


def _negatives(options: NegativeOptions, captions: Captions, shards: Sequence[str]) -> tuple[Transform, ...]:
    """The transform that draws negatives of the captions; none without kinds."""
    if not options.kinds:
        return ()
    found = None
    if set(options.kinds) & set(PARSED):
        found = annotations.open_annotations(
            shards, options.annotations, fields=captions.options.fields, splitting=captions.options.splitting
        )
    return (Negatives(tuple(options.kinds), captions, found),)


def _region_source(options: RegionOptions, shards: Sequence[str]) -> Callable[[Sample], list[Region]] | None:
    """Where the regions of a sample are; None without a count."""
    if options.count is None:
        return None
    if options.source is None:
        return of_record
    return region_files.open_regions(shards, None if options.source == region_files.BESIDE else options.source)


def _regions(
    options: RegionOptions,
    source: Callable[[Sample], list[Region]] | None,
    crop: Crop,
    tokenize: tokenizer.Tokenizer,
) -> tuple[Transform, ...]:
    """The transform that gives regions as the crop shows them; none without a source."""
    return () if source is None else (Regions(options.count, source, crop.view, tokenize, options.min_area),)


def _check_regions(
    found: Callable[[Sample], list[Region]], load: LoadTraining, sample_order: Sequence[tuple[int, int]]
) -> None:
    """Refuses shards without regions, on which what is trained by them would learn nothing in silence.

    Raises:
      ValueError: none of the first samples has one.
    """
    for index in range(min(MEASURED_SAMPLES, len(load.source))):
        epoch, number = sample_order[index]
        with contextlib.suppress(*UNUSABLE):
            if found(Sample(load.source[number], load.seed, epoch, number)):
                return
    raise ValueError(
        f"config.data.regions.count is set, and none of the first {MEASURED_SAMPLES:,} samples has a region: set "
        "config.data.regions.source to 'beside' or a folder if `data.prepare annotate regions` made them, or make them"
    )


def _measured_packer(
    load: LoadTraining,
    sample_order: Sequence[tuple[int, int]],
    *,
    images: int,
    longest: int,
    devices: int,
    processes: int,
    multiple_of: int,
    options: PackingOptions,
) -> packing.Packer | None:
    """A packer that fits the data: the same for every process and every restart, as its samples are.

    Args:
      load, sample_order: the training samples and their order, of which the first are measured.
      images: in a batch of one device.
      longest: tokens of a caption, at most.
      devices, processes: devices of this process, and processes.
      multiple_of: what has to divide the rows of a device.
      options: the wanted rows.

    Raises:
      TooManySkipped: no sample that is measured has captions.
      ValueError: the rows are too short for the longest caption.
    """
    if options.row_length is None:
        return None
    if options.row_length < longest and not options.truncate:
        raise ValueError(
            f"packing.row_length is {options.row_length}, and captions have up to {longest} tokens (context_length): "
            f"set row_length to {longest} or more, or packing.truncate=True, which cuts captions that do not fit"
        )
    which = [sample_order[index] for index in range(min(MEASURED_SAMPLES, len(load.source)))]
    with concurrent.futures.ThreadPoolExecutor(MAX_THREADS) as pool:  # a read from a store takes its time
        measured = [tokens for tokens in pool.map(load.texts, which) if tokens is not None]
    if not measured:
        raise TooManySkipped(f"none of the first {MEASURED_SAMPLES:,} samples has captions; check the caption fields")
    rows = packing.measure_rows(
        measured,
        batch_size=images,
        row_length=options.row_length,
        multiple_of=multiple_of,
        # The fullest device decides for all: each has to fit so much more often. What is cut is cut on each device.
        quantile=options.quantile if options.truncate else options.quantile ** (1 / (devices * processes)),
    )
    counts = (rows,)
    if not options.truncate:
        captions_count = images * len(measured[0])
        counts = packing.row_counts(
            rows, captions_count, row_length=options.row_length, longest=longest, multiple_of=multiple_of
        )
    return packing.Packer(options.row_length, counts, devices, options.truncate)
