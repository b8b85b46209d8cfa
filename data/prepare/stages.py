"""The preparation in three stages: index the captions, match the images, write the shards.

Each stage is a function of a job and one piece of the work, and leaves its result in files. Between the second and
the third the matched samples are numbered through, so that every shard but the last holds the same number of samples
whoever writes it, and so that the shards' bytes depend neither on the number of workers nor on interruptions.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from flair_jax.data.counted import counted
from flair_jax.data.prepare import atomic, boxes, inputs, pictures, releases, report, rows, runner, shards
from flair_jax.data.prepare.store import Store, Writer
from flair_jax.data.sources import files
from flair_jax.data.transforms.captions import CaptionError
from flair_jax.data.transforms.images import ImageError, stored_size
from flair_jax.data.transforms.regions import FIELD as REGIONS

LOOKUP = 1024  # captions held in memory at a time
NO_CAPTION = "no captions for this image in the caption files"
NO_IMAGE = "image that training cannot use"
HUGE_IMAGE = f"image file of more than {inputs.MAX_IMAGE_BYTES:,} bytes"
REPEATED = "image whose captions went to an earlier one"
SHOWN_KEYS = 3  # of each side, where no image has captions


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that determines the output, and the folders."""

    release: str
    captions: tuple[str, ...]  # caption files; none if the tars hold the captions
    inputs: inputs.Inputs
    output: str
    work: str
    prefix: str
    format: str
    shard_size: int
    resize: int | None = None
    quality: int = 95
    upright: bool = False  # whether images are turned as their EXIF orientation says
    text: rows.Text = dataclasses.field(default_factory=rows.Text)  # how caption files are written
    reader: dict = dataclasses.field(default_factory=dict)  # the release's own options

    def folder(self, stage: str) -> pathlib.Path:
        return pathlib.Path(self.work) / stage

    @property
    def rules(self) -> releases.Release:
        return releases.RELEASES[self.release]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Captions


def caption_pieces(states: list) -> list[runner.Piece]:
    """`states`: [bytes, stamp, path] of each caption file."""
    return [runner.Piece(f"{number:05d}", state[0], (number, state)) for number, state in enumerate(states)]


def index_captions(job: Job, piece: tuple[int, list]) -> None:
    """Reads one caption file into the store."""
    number, state = piece
    folder, name, path = job.folder("captions"), f"{number:05d}", job.captions[number]
    tally = report.Tally()
    advance = functools.partial(runner.advance, folder, name)
    read = releases.READERS[job.release](path, advance, job.text, **job.reader)
    with atomic.replacing(folder / f"{name}.rows") as temporary, Writer(folder, name, temporary) as writer:
        for row in atomic.reading(path, read):
            tally.read += not (isinstance(row, rows.LeftOut) and row.part)
            if isinstance(row, rows.LeftOut):
                tally.skip(row.reason, f"{path}, row {tally.read}" + (f": {row.detail}" if row.detail else ""))
            else:
                writer.add(*row)
    try:
        files.check(path, files.State(*state[:2]))
    except OSError as error:
        raise atomic.PrepareError(f"{error}. Start again in an empty folder.") from error
    atomic.write_json(folder / f"{name}.json", {**tally.to_json(), "runs": writer.runs})


@functools.lru_cache(maxsize=1)
def open_store(folder: pathlib.Path) -> Store:
    """The store of finished captions, opened once a process."""
    reports = sorted(folder.glob("*.json"))
    return Store(folder, {path.stem: atomic.read_json(path)["runs"] for path in reports})


# ---------------------------------------------------------------------------------------------------------------------
# 2. Images


def image_pieces(states: list) -> list[runner.Piece]:
    """`states`: of each unit of the inputs."""
    return [runner.Piece(f"{unit:05d}", state[0], (unit, state)) for unit, state in enumerate(states)]


def match(job: Job, piece: tuple[int, list]) -> None:
    """Finds the images of one unit that have captions and that training can read."""
    unit, state = piece
    folder, name, source = job.folder("images"), f"{unit:05d}", job.inputs.name(unit)
    members, left_out = job.inputs.scan(unit, state)
    tally = report.Tally(read=len(members))
    matched, numbers = [], []
    for member, key, number in _with_captions(job, unit, state, members, tally):
        try:
            found = pictures.inspect(job.inputs.image(unit, state, member), job.upright)
        except ImageError as error:
            tally.skip(NO_IMAGE, f"{source} {member.name}: {error}")
            continue
        matched.append([member, key, found[1:]])
        numbers.append(number)
    atomic.write_json(folder / f"{name}.samples", matched)
    atomic.write_array(folder / f"{name}.numbers.npy", np.array(numbers, np.int64))
    counts = {**tally.to_json(), "left_out": left_out.to_json(), "matched": len(matched), "state": state}
    atomic.write_json(folder / f"{name}.json", counts)


def _with_captions(job: Job, unit: int, state: list, members: list, tally: report.Tally) -> Iterator[tuple]:
    """(member, join key, number of its captions, -1 if they are in the tar itself) of the members with captions."""
    source = job.inputs.name(unit)
    for batch in _batched(members, LOOKUP):
        keyed = []
        for member in batch:
            if member.size > inputs.MAX_IMAGE_BYTES:
                tally.skip(HUGE_IMAGE, f"{source} {member.name}")
                continue
            try:
                keyed.append((member, _key_of(job, unit, state, member)))
            except CaptionError as error:
                tally.skip(str(error), f"{source} {member.name}")
        if not job.captions:
            yield from ((member, key, -1) for member, key in keyed)
            continue
        found = open_store(job.folder("captions")).find([key for _, key in keyed])
        for (member, key), captions in zip(keyed, found, strict=True):
            if captions is None or all(row.keys() == {REGIONS} for row in captions.captions):
                tally.skip(NO_CAPTION, f"{source} {member.name}: {key}")
            else:
                yield member, key, captions.number


def _key_of(job: Job, unit: int, state: list, member: inputs.Member) -> str:
    """The join key of a member. Captions from the tar itself are only checked; without a URL the key is "".

    Raises:
      CaptionError: there is no such key, or the tar's own captions cannot be used.
    """
    if job.rules.images == "folder":
        return member.name
    text = job.inputs.text(unit, state, member)
    if job.captions:
        return releases.url_of(text)
    job.rules.own(text, **job.reader)
    try:
        return releases.url_of(text)
    except CaptionError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Between: which sample goes where


def plan(job: Job) -> tuple[list[tuple[int, list]], report.Tally]:
    """Numbers the matched samples through: the shards' contents, and the counts of all images.

    Of several images with the same captions the first one is kept.

    Raises:
      InputError: nothing matches.
    """
    folder, names = job.folder("images"), [f"{unit:05d}" for unit in range(len(job.inputs))]
    used = np.zeros(len(open_store(job.folder("captions"))) if job.captions else 0, bool)
    tasks, count = [], 0
    tally = report.Tally.total(atomic.read_json(folder / f"{name}.json") for name in names)
    for unit, name in enumerate(names):
        numbers = np.load(folder / f"{name}.numbers.npy", allow_pickle=False)  # (N,)
        kept = np.ones(len(numbers), bool)
        if job.captions:
            kept[:] = False
            kept[np.unique(numbers, return_index=True)[1]] = True
            kept &= ~used[numbers]
            used[numbers] = True
        if not kept.all():
            tally.skip(REPEATED, job.inputs.name(unit), int((~kept).sum()))
        atomic.write_array(folder / f"{name}.kept.npy", np.flatnonzero(kept))
        for start, stop, shard in _cut(count, count + int(kept.sum()), job.shard_size):
            if shard == len(tasks):
                tasks.append((shard, []))
            tasks[shard][1].append((unit, start - count, stop - count))
        count += int(kept.sum())
    if not count:
        raise atomic.InputError(_nothing_matches(job, tally))
    return tasks, tally


def _cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The range from start to stop in pieces that belong to one shard each: (start, stop, shard)."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end, start // size
        start = end


def _nothing_matches(job: Job, tally: report.Tally) -> str:
    """The message: what was skipped on both sides, and some join keys of both."""
    folder = job.folder("images")
    state = atomic.read_json(folder / f"{0:05d}.json")
    left_out = report.Tally.total(
        atomic.read_json(folder / f"{unit:05d}.json")["left_out"] for unit in range(len(job.inputs))
    )
    lines = [f"no image has captions: {counted(tally.read, 'image')} read", *report.reasons(tally)]
    if left_out.skipped:
        lines += ["tars: members that make no sample", *report.reasons(left_out)]
    if job.captions:
        reports = sorted(job.folder("captions").glob("*.json"))
        rows_read = report.Tally.total(map(atomic.read_json, reports))
        lines += [f"captions: {counted(rows_read.read, 'row')} read", *report.reasons(rows_read)]
        lines += [f"captions are for {_some(open_store(job.folder('captions')).some_keys(SHOWN_KEYS))}"]
        lines += [f"images are found by {_some(_image_keys(job, state['state']))}"]
        lines += ["Are these the captions of these images, and are the columns the right ones?"]
    return "\n".join(lines)


def _some(keys: list[str]) -> str:
    return ", ".join([*map(repr, keys), "…"]) if keys else "nothing"


def _image_keys(job: Job, state: list) -> list[str]:
    """The join keys of some images of the first unit."""
    found = []
    for member in job.inputs.scan(0, state)[0]:
        if len(found) == SHOWN_KEYS:
            break
        with contextlib.suppress(CaptionError):
            found.append(_key_of(job, 0, state, member))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 3. Shards


def shard_name(job: Job, shard: int, count: int) -> str:
    """`prefix-00012.tar`; more digits if there are so many shards, so that names sort as numbers do."""
    return f"{job.prefix}-{shard:0{max(5, len(str(count - 1)))}d}{shards.SUFFIXES[job.format]}"


def shard_pieces(job: Job, tasks: list) -> list[runner.Piece]:
    return [
        runner.Piece(f"{task[0]:05d}", sum(stop - start for _, start, stop in task[1]), (task, len(tasks)))
        for task in tasks
    ]


def write_shard(job: Job, piece: tuple) -> None:
    """Writes one shard."""
    (shard, slices), count = piece
    name = shard_name(job, shard, count)
    written = []  # of each sample, whether its image was changed
    shards.write(pathlib.Path(job.output) / name, job.format, _samples(job, shard, slices, written))
    atomic.write_json(
        job.folder("shards") / f"{shard:05d}.json",
        {"name": name, "samples": len(written), "converted": sum(written)},
    )


def _samples(job: Job, shard: int, slices: list, written: list) -> Iterator[shards.Sample]:
    digits = max(4, len(str(job.shard_size - 1)))
    for unit, start, stop in slices:
        folder, name = job.folder("images"), f"{unit:05d}"
        state = atomic.read_json(folder / f"{name}.json")["state"]
        matched = atomic.read_json(folder / f"{name}.samples")
        kept = np.load(folder / f"{name}.kept.npy", allow_pickle=False)[start:stop].tolist()
        for batch in _batched([matched[number] for number in kept], LOOKUP):
            members = [inputs.Member(*member) for member, _, _ in batch]
            captions = _captions(job, unit, state, members, [key for _, key, _ in batch])
            for member, (_, key, found), fields in zip(members, batch, captions, strict=True):
                data = job.inputs.image(unit, state, member)
                if job.upright and REGIONS in fields:
                    fields = boxes.turned(fields, stored_size(data)[2])
                picture = pictures.fit(data, pictures.Picture(b"", *found), job.resize, job.quality, job.upright)
                content = {
                    **fields,
                    **({job.rules.key_field: key} if key else {}),
                    "source": f"{job.inputs.name(unit)}/{member.name}",
                    "width": picture.width,
                    "height": picture.height,
                }
                key = f"{shard:05d}{len(written):0{digits}d}"
                yield shards.Sample(key, picture.extension, picture.data, json.dumps(content).encode())
                written.append(picture.data is not data)


def _captions(job: Job, unit: int, state: list, members: list[inputs.Member], keys: list[str]) -> Iterator[dict]:
    if job.captions:
        for found in open_store(job.folder("captions")).find(keys):
            yield releases.combined(found.captions, job.rules.merged)
    else:
        for member in members:
            yield job.rules.own(job.inputs.text(unit, state, member), **job.reader)


# ---------------------------------------------------------------------------------------------------------------------


def _batched(items: list, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
