"""Features of shards, at scale: a file per chunk of a shard, from as many processes as there are machines.

    python -m flair_jax.embed --checkpoint flair-cc3m-recap --shards '/data/cc3m/{0000..0575}.tar' --output DIR
    python -m flair_jax.embed … --process_id 3 --num_processes 16     # the share of one process of 16

Each process takes every NUM-th shard, uses all devices that it sees, and knows nothing of the others: one that dies
ends no other. The same command goes on where it was killed, with any number of processes, and leaves the same files:

    DIR/embed.json                               what all files have in common: weights, shards, options
    DIR/00012-cc3m-0012.tar-00000.safetensors    shard 12, its records 0 to 4,095; or .parquet

Where the processes have to start as one run of jax, as on the hosts of a TPU pod, or a cluster is to tell each which it
is, `--distributed` starts them so; each still encodes its own shards on its own devices.

A file holds `image/pooled` (n, D) of its n records that could be used, projected and not normalised; with `local`,
`image/local` (n, L, D) and what else the model has of an image; with `texts`, `text/pooled` (m, D) of all their
sentences, and `text/image` int32 (m,), the row of the image of each. Its metadata `about` is JSON: `keys`, of the n
records; `texts`, the m sentences; `skipped`, [key, reason] of each record that could not be used. `--format parquet`
makes a row per record of the same, see feature_files.py; docs/serving.md shows how to read both.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from flair_jax import distributed, feature_files, inference, pretrained, sharding
from flair_jax.atomic import write_whole
from flair_jax.data.counted import counted
from flair_jax.data.sources.base import RecordError, ShardError, Source
from flair_jax.data.sources.open import Shards, expand, open_source
from flair_jax.data.transforms import captions
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms.base import SampleError, parse
from flair_jax.evaluators.features import BrokenImages, Encoder
from flair_jax.evaluators.store import fingerprint
from flair_jax.progress import progress

SETTINGS = "embed.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CHUNK = 4096  # records of a file
NAMED = 10  # records without features that the command names
HEARTBEAT = 60  # seconds without a sign of life after which a process of several counts as dead
WAIT = 30 * 24 * 3600  # seconds that a process of several waits at its end for those that have more to do


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written.

    Attributes:
      local: features of patches too, and of regions with their boxes where the model has them.
      texts: features of the records' sentences too.
      fields: keys of the captions, see `captions.sentences`.
      dtype: of all features, a key of `DTYPES`.
      upright: whether photographs are turned as their EXIF orientation says. Training does not unless told so.
      chunk: records of a file; what a killed process does again, at most.
      format: of the files, one of `feature_files.FORMATS`.

    Raises:
      ValueError: there is no such dtype or format, the format lacks the dtype, or the chunk is not positive.
      ImportError: the format's library is not installed.
    """

    local: bool = False
    texts: bool = False
    fields: Sequence[str] = captions.FIELDS
    dtype: str = "float32"
    upright: bool = False
    chunk: int = CHUNK
    format: str = "safetensors"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; expected a positive number of records")
        feature_files.check(self.format)
        if (self.format, self.dtype) == ("parquet", "bfloat16"):
            raise ValueError("dtype is bfloat16, which parquet does not have; give float16 or float32")


@dataclasses.dataclass
class Counts:
    """What one process did.

    `written`, `kept`: files, and those that were there. `images`, `texts`: with features, in both. `skipped`: (shard,
    key, reason) of each record without. `without_texts`: images that have no sentence. `left_out`: what of the shards
    is no record, by reason. `failed`: shards that cannot be opened, with the reason.
    """

    written: int = 0
    kept: int = 0
    images: int = 0
    texts: int = 0
    skipped: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    without_texts: int = 0
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


class _Records(Sequence):
    """The pictures of records `start` to `stop`, decoded when their turn comes; keys and sentences are noted then."""

    def __init__(self, source: Source, start: int, stop: int, model: Any, options: Options):
        self._source, self._start, self._count = source, start, stop - start
        self._model, self._options = model, options
        self.shape = (self._count, *model.image_size, 3)
        self.keys: dict[int, str] = {}
        self.sentences: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> np.ndarray:
        try:
            record = self._source[self._start + number]
        except RecordError as error:
            raise SampleError(str(error)) from error
        self.keys[number] = record.key
        if self._options.texts:
            try:
                self.sentences[number] = captions.sentences(parse(record), self._options.fields)
            except captions.CaptionError:
                self.sentences[number] = []
        picture = image_rules.to_rgb(image_rules.decode(record.image, self._options.upright))
        return self._model.preprocessing.fit(picture, self._model.image_size)


def embed(
    model: inference.Pretrained,
    shards: Shards,
    output: str | os.PathLike,
    options: Options = Options(),
    *,
    process_id: int = 0,
    num_processes: int = 1,
    index_dir: str | os.PathLike | None = None,
    image_batch: int = inference.IMAGE_BATCH,
    text_batch: int = inference.TEXT_BATCH,
) -> Counts:
    """Writes the features of this process's share of the shards; files that are there already stay as they are.

    Args:
      model: what encodes.
      shards, index_dir: as training reads them, see `open_source`.
      output: folder of a local or shared file system; made if need be.
      options: what is written.
      process_id, num_processes: shards number `process_id`, `process_id + num_processes`, … are encoded. No two
        processes at a time may have the same number.
      image_batch, text_batch: images and rows of texts that are encoded together.

    Raises:
      ValueError: there is no such process, the model lacks a tower, a feature does not fit into the dtype, or the
        folder holds features of other weights, shards or options.
      FileNotFoundError: see `sources.open.expand`.
      ShardError: a shard changed since a file was made of it, or while it is read.
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id is {process_id} of {num_processes} processes; expected 0 to {num_processes - 1}")
    model.model.image_size  # noqa: B018 raises without an image tower
    if options.texts:
        model.model.context_length  # noqa: B018 and this without a text tower
    output = pathlib.Path(output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    paths = expand(shards)
    _settle(output / SETTINGS, _settings(model, paths, options))
    encoder = Encoder(
        model.model,
        model.model.preprocessing,
        image_batch=image_batch,
        text_batch=text_batch,
        full_batches=True,
    )
    counts = Counts()
    own = list(range(process_id, len(paths), num_processes))
    for number in progress(own, len(own), "shards"):
        prefix = f"{number:05d}-{_stem(paths[number])}"
        for partial in output.glob(f".{number:05d}-*.partial"):
            partial.unlink()  # of a process that was killed as it wrote
        try:
            source = open_source([paths[number]], index_dir)
        except (ShardError, OSError) as error:  # the others are no worse for it
            counts.failed[paths[number]] = str(error)
            continue
        counts.left_out += source.skipped
        for chunk, start in enumerate(range(0, len(source), options.chunk)):
            file = output / f"{prefix}-{chunk:05d}.{options.format}"
            stop = min(start + options.chunk, len(source))
            if file.exists():
                about, (images, texts) = _about(file, source, start, stop)
                counts.kept += 1
            else:
                tensors, about = _chunk(encoder, model, source, start, stop, options)
                feature_files.write(file, tensors, about)
                images, texts = len(about["keys"]), len(about["texts"])
                counts.written += 1
            counts.images += images
            counts.texts += texts
            counts.without_texts += about["without_texts"]
            counts.skipped += [(paths[number], key, reason) for key, reason in about["skipped"]]
    return counts


def _chunk(
    encoder: Encoder, model: inference.Pretrained, source: Source, start: int, stop: int, options: Options
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of one file."""
    records = _Records(source, start, stop, model.model, options)
    parts, broken = [], {}
    try:
        for numbers, features in encoder.images(model.params, records, local=options.local):
            fields = {name: x for name, x in vars(features).items() if x is not None}
            kept = fields if options.local else {"pooled": fields["pooled"]}
            parts.append({name: np.asarray(x)[: len(numbers)] for name, x in kept.items()})
    except BrokenImages as error:  # at the end, when all others are encoded
        broken = error.reasons
    rows = [number for number in range(stop - start) if number not in broken]
    tensors = {f"image/{name}": np.concatenate([part[name] for part in parts])[rows] for name in parts[0]}
    keys = [records.keys.get(number) or source.where(start + number)[1] for number in range(stop - start)]
    sentences = [records.sentences.get(number, []) for number in rows]
    texts = [sentence for each in sentences for sentence in each]
    if options.texts:
        pooled = np.zeros((0, tensors["image/pooled"].shape[1]), np.float32)
        if texts:
            pooled = np.asarray(encoder.texts(model.params, model.tokenize(texts)).pooled)
        owners = np.repeat(np.arange(len(rows), dtype=np.int32), [len(each) for each in sentences])
        tensors |= {"text/pooled": pooled, "text/image": owners}
    for name, x in tensors.items():
        if x.dtype != np.int32:
            with np.errstate(over="ignore"):  # named in the next line
                tensors[name] = x.astype(DTYPES[options.dtype])
            if not np.isfinite(tensors[name].astype(np.float32)).all():
                raise ValueError(f"{name}: a number does not fit into {options.dtype}: give another dtype")
    about = {
        "keys": [keys[number] for number in rows],
        "texts": texts,
        "skipped": [[keys[number], reason] for number, reason in sorted(broken.items())],
        "without_texts": sum(not each for each in sentences) if options.texts else 0,
        "records": [start, stop],
        "checksum": source.checksum,
    }
    return tensors, about


def _about(file: pathlib.Path, source: Source, start: int, stop: int) -> tuple[dict[str, Any], tuple[int, int]]:
    """What a file that an earlier process wrote says of itself, and how many images and texts it has.

    Raises:
      ShardError: it was made of other records: the shard changed since.
    """
    try:
        about, counts = feature_files.read_about(file)
        made_of = about["records"], about["checksum"]
        about = {name: about[name] for name in ("skipped", "without_texts")}
    except (feature_files.DamagedFile, KeyError) as error:
        raise ValueError(f"{file} is damaged, or none of this command's files: {error}. Remove it") from error
    if made_of != ([start, stop], source.checksum):
        raise ShardError(
            f"{file} has records {made_of[0]} of a shard with the checksum {made_of[1]}; {source.shards} has "
            f"{source.checksum} now. Remove the files of this shard to encode it again"
        )
    return about, counts


def _stem(path: str) -> str:
    """The last part of a shard's name as a part of a file's name."""
    name = path.partition("?")[0].rstrip("/").rpartition("/")[2]
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[:100]


def _settings(model: inference.Pretrained, paths: Sequence[str], options: Options) -> dict[str, Any]:
    section = {**dataclasses.asdict(options), "fields": list(options.fields) if options.texts else []}
    return {
        "weights": fingerprint(model.model, jax.device_get(model.params)),
        "preprocess": dataclasses.asdict(model.model.preprocessing),
        "shards": list(paths),
        **section,
    }


def _settle(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings, or compares them with those that are there.

    Raises:
      ValueError: they differ.
    """
    if not path.exists():
        write_whole(path, (json.dumps(settings, indent=1) + "\n").encode())
    try:
        stored = {"format": "safetensors", **json.loads(path.read_text())}  # of before there was another one
        differs = [name for name in settings if stored.get(name) != settings[name]]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Give another folder") from error
    if differs:
        name = differs[0]
        raise ValueError(
            f"{path}: {name} was {_short(stored.get(name))} where the features in this folder were made, and is "
            f"{_short(settings[name])} now. Give the same, or another folder"
        )


def _short(value: Any) -> str:
    text = f"{len(value)} of them, {value}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _join(given: argparse.Namespace) -> tuple[int, int]:
    """The number of this process, and how many there are; with `--distributed` jax starts them and tells."""
    if not given.distributed:
        if given.coordinator_address is not None:
            raise ValueError("--coordinator_address needs --distributed")
        return given.process_id or 0, 1 if given.num_processes is None else given.num_processes
    by_hand = given.coordinator_address, given.process_id, given.num_processes
    distributed.start(HEARTBEAT, *by_hand, shutdown_timeout=WAIT)
    return jax.process_index(), jax.process_count()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.embed", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    pretrained.add_options(parser)
    parser.add_argument("--shards", required=True, help="as config.data.shards: a folder, a pattern, several with ::")
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR", help="the same command goes on")
    parser.add_argument("--local", action="store_true", help="features of patches too, and of regions with their boxes")
    parser.add_argument("--texts", action="store_true", help="features of all sentences of the records too")
    parser.add_argument("--fields", nargs="+", default=captions.FIELDS, metavar="KEY", help="that hold captions")
    parser.add_argument("--dtype", choices=DTYPES, default=Options.dtype, help="of the features (%(default)s)")
    parser.add_argument("--upright", action="store_true", help="turn photographs by their EXIF orientation")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help="records of a file (%(default)s)")
    parser.add_argument("--image_batch", type=int, default=inference.IMAGE_BATCH, metavar="N", help="(%(default)s)")
    parser.add_argument("--text_batch", type=int, default=inference.TEXT_BATCH, metavar="N", help="rows (%(default)s)")
    parser.add_argument("--format", choices=feature_files.FORMATS, default=Options.format, help="(%(default)s)")
    parser.add_argument("--process_id", type=int, metavar="I", help="which share of the shards, from 0")
    parser.add_argument("--num_processes", type=int, metavar="N", help="among which the shards are shared")
    parser.add_argument(
        "--distributed", action="store_true", help="start jax.distributed, from a cluster's environment or as told"
    )
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0, where no cluster tells it")
    parser.add_argument("--index_dir", metavar="DIR", help="for the index of each shard; absent: beside it")
    given = parser.parse_args(arguments)
    try:
        options = Options(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Options)})
        shared = {name: getattr(given, name) for name in ("index_dir", "image_batch", "text_batch")}
        process_id, num_processes = _join(given)
        with jax.set_mesh(sharding.create_mesh(devices=jax.local_devices())):  # processes share no batch
            model = pretrained.load(given.checkpoint, gelu=given.gelu)
            process = dict(process_id=process_id, num_processes=num_processes)
            counts = embed(model, given.shards, given.output, options, **process, **shared)
    except (ValueError, OSError, ImportError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for shard, key, reason in counts.skipped[:NAMED]:
        print(f"skipped: {shard}: {key}: {reason}")
    reasons = collections.Counter(reason for _, _, reason in counts.skipped)
    for reason, count in (reasons + counts.left_out).most_common():
        print(f"left out: {count:,} x {reason}")
    found = [counted(counts.images, "image")]
    if given.texts:
        found += [counted(counts.texts, "text"), f"{counted(counts.without_texts, 'image')} without"]
    print(
        f"{', '.join(found)} in {counted(counts.written + counts.kept, 'file')}, {counts.kept:,} of them made before; "
        f"{counted(len(counts.skipped), 'record')} skipped"
    )
    for shard, reason in counts.failed.items():
        print(f"error: {shard} cannot be opened: {reason}", file=sys.stderr)
    if given.texts and counts.images and not counts.texts:
        print(f"note: no image has a text in the fields {', '.join(options.fields)}; see --fields", file=sys.stderr)
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
