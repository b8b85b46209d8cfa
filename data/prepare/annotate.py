"""Annotates shards once, in a file beside each: captions for hard negatives, `SHARD.annotations`; regions in `detect`.

Each shard is one piece of work on Apache Beam. A file that is there, for the same shard and made in the same way, is
kept; so an interrupted run goes on where it was, and of a growing set only the new shards are read.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from flair_jax.data.counted import counted
from flair_jax.data.prepare import atomic, parses, report, runner
from flair_jax.data.prepare.atomic import InputError, PrepareError
from flair_jax.data.sources import files
from flair_jax.data.sources.base import RecordError, ShardError
from flair_jax.data.sources.open import open_source
from flair_jax.data.transforms import annotations, captions, side_files
from flair_jax.data.transforms.base import SampleError, parse
from flair_jax.data.transforms.negatives import Annotation

PROGRESS_EVERY = 64  # captions


class Job(Protocol):
    """What `annotate` does to each of some shards.

    Attributes:
      shards: paths of the shards.
      output: folder of the side files; None: beside the shards.
      index_dir: see `open_source`.
      kind: of the side files.
      title: of the progress bar.
    """

    shards: Sequence[str]
    output: str | None
    index_dir: str | None
    kind: side_files.Kind
    title: str

    def about(self, shard: str) -> dict[str, Any]:
        """What the side file of a shard depends on; one that says the same is kept."""

    def write(self, target: pathlib.Path, shard: str, about: dict, tally: report.Tally, advance: Callable) -> None:
        """Writes the side file of a shard, counts, and calls `advance` with the samples that are done."""


@dataclasses.dataclass(frozen=True)
class Annotate:
    """The captions to annotate for hard negatives, and how; a `Job`.

    Attributes:
      shards: paths of the shards.
      output: folder of the files; None: beside the shards.
      fields, splitting: of the captions, as in `config.data.captions`: each text that training may draw alone.
      wordnet: folder of WordNet's files; None: where it is installed.
      index_dir: see `open_source`.
    """

    shards: Sequence[str]
    output: str | None
    fields: Sequence[str]
    splitting: str
    wordnet: str | None = None
    index_dir: str | None = None

    kind = annotations.KIND
    title = "annotations"

    def about(self, shard: str) -> dict[str, Any]:
        source = open_source([shard], self.index_dir)
        parser, words = _annotators(self.wordnet)
        return {
            "size": files.state(shard).size,
            "checksum": source.checksum,
            "fields": list(self.fields),
            "splitting": self.splitting,
            "versions": f"{parser.version}; {words.version}",
        }

    def write(self, target: pathlib.Path, shard: str, about: dict, tally: report.Tally, advance: Callable) -> None:
        annotations.write(target, _annotations(self, shard, tally, advance), about)

    def summary(self, tally: report.Tally) -> str:
        """The closing lines."""
        lines = [
            f"{counted(tally.read, 'caption')} of {counted(len(self.shards), 'shard')} annotated in this run",
            *report.reasons(tally),
        ]
        fields = "".join(f"{json.dumps(field)}, " for field in self.fields).strip()
        lines.append(
            f"\ntrain with --config.data.captions.fields='({fields})' --config.data.captions.splitting={self.splitting}"
        )
        if self.output is not None:
            lines.append(f"  --config.data.negatives.annotations={os.path.abspath(self.output)}")
        return "\n".join(lines)


@functools.cache
def _annotators(wordnet: str | None) -> tuple[parses.Parser, parses.WordNet]:
    """Opened once a process: both take seconds."""
    return parses.Parser(), parses.WordNet(wordnet)


def annotate(job: Job, options: runner.Options) -> report.Tally:
    """Does what remains to be done, and returns the counts of this run.

    Raises:
      PrepareError: what the job needs is not installed, or a file cannot be read or written.
    """
    targets = {shard: side_files.path(shard, job.output, job.kind) for shard in job.shards}
    if len(set(targets.values())) < len(targets):
        raise InputError(f"several shards of one name would share a file in {job.output}: annotate each set on its own")
    for target in map(pathlib.Path, targets.values()):
        target.parent.mkdir(parents=True, exist_ok=True)
        for partial in target.parent.glob(f".{glob.escape(target.name)}.*{files.PARTIAL}"):  # of a killed run
            partial.unlink(missing_ok=True)
    pending = {shard: about for shard in targets if (about := job.about(shard)) != _done(targets[shard], job.kind)}
    if not pending:
        return report.Tally()
    work = pathlib.Path(os.path.dirname(next(iter(targets.values()))), f".annotate-{_digest(job)}")
    shutil.rmtree(work, ignore_errors=True)  # reports of a killed run: its finished files are kept
    work.mkdir()
    try:
        pieces = [
            runner.Piece(f"{number:05d}", len(open_source([shard], job.index_dir)), (number, shard, about))
            for number, (shard, about) in enumerate(pending.items())
        ]
        run = functools.partial(_annotate_shard, job, work)
        runner.run(run, pieces, work, job.title, " samples", options)
        return report.Tally.total(atomic.read_json(path) for path in sorted(work.glob("*.json")))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _digest(job: Job) -> str:
    return hashlib.sha256(repr((job.title, list(job.shards), job.output)).encode()).hexdigest()[:8]


def _done(target: str, kind: side_files.Kind) -> dict | None:
    """What a finished file says of itself."""
    try:
        about = side_files.read_about(target, kind)
    except (OSError, ShardError):  # missing or damaged: it is made again
        return None
    return {name: value for name, value in about.items() if name not in ("schema", kind.counted)}


def _annotate_shard(job: Job, work: pathlib.Path, piece: tuple) -> None:
    number, shard, about = piece
    name, target = f"{number:05d}", pathlib.Path(side_files.path(shard, job.output, job.kind))
    tally = report.Tally()
    try:
        with atomic.replacing(target) as temporary:
            job.write(temporary, shard, about, tally, functools.partial(runner.advance, work, name))
    except ShardError as error:
        raise PrepareError(str(error)) from error
    atomic.write_json(work / f"{name}.json", tally.to_json())


def _annotations(job: Annotate, shard: str, tally: report.Tally, advance) -> Iterator[Annotation]:
    parser, words = _annotators(job.wordnet)
    for parsed in parser(_captions(job, shard, tally, advance)):
        yield parses.annotation(parsed, words.candidates)


def _captions(job: Annotate, shard: str, tally: report.Tally, advance) -> Iterator[str]:
    """The different captions of a shard; those of no use are counted as training counts them."""
    source, seen = open_source([shard], job.index_dir), set()
    for number in range(len(source)):
        if number % PROGRESS_EVERY == 0:
            advance(number)
        try:
            record = source[number]
            found = captions.sentences(parse(record), job.fields, job.splitting)
        except (RecordError, SampleError) as error:
            tally.skip(str(error), ", ".join(source.where(number)))
            continue
        for caption in found:
            if caption not in seen:
                seen.add(caption)
                tally.read += 1
                yield caption
