"""One stage of the work on Apache Beam: a function called once for each piece, on any runner.

Beam only hands out the pieces. A piece writes its results to files, the last of which is its report; so a piece with a
report is done, whoever did it and whenever, and the progress bar is drawn by looking which reports there are. All
workers must see the same files: one machine, or a file system that the machines share.
"""

import contextlib
import logging
import os
import pathlib
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from flair_jax.data.prepare.atomic import InputError, PrepareError

logging.disable(logging.WARNING)  # Beam warns of parts for Google's cloud that are not installed and not needed
import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402
from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # noqa: E402
from apache_beam.transforms.environments import SubprocessSDKEnvironment  # noqa: E402

logging.disable(logging.NOTSET)

LOCAL = "local"
PROGRESS = ".progress"  # ending of a file that says how much of a piece is done
FAILED = ".failed"  # ending of a file that says why a piece could not be done
WORKER = "flair_jax.data.prepare.worker"
POLL = 0.5  # seconds between checks of the reports


class Options(NamedTuple):
    """Where a stage runs."""

    runner: str = LOCAL  # or the name of one of Beam's
    workers: int = 1  # processes of the local runner
    flags: Sequence[str] = ()  # Beam's own


class Piece(NamedTuple):
    """A part of a stage's work."""

    name: str  # its report, which it writes last, is `NAME.json` in the stage's folder
    weight: int  # its share of the progress bar
    value: Any  # what the function is called with


def advance(folder: pathlib.Path, name: str, done: int) -> None:
    """Reports how much of a piece's weight is done, for the progress bar. Raises PrepareError if the disk is full."""
    path = folder / f"{name}{PROGRESS}"
    try:
        path.write_text(str(done))
    except OSError as error:
        raise PrepareError(f"{path} cannot be written: {error}") from error


def is_done(folder: pathlib.Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def run(
    function: Callable[[Any], None],
    pieces: Sequence[Piece],
    folder: pathlib.Path,
    title: str,
    unit: str,
    options: Options,
) -> None:
    """Calls `function(piece.value)` for all pieces without a report.

    Raises:
      PrepareError, InputError: the function raised it for some piece. The pieces that were finished stay so.
    """
    # A unique name per run: workers of a killed run may still be running.
    failed = f".{uuid.uuid4().hex}{FAILED}"
    pending = [piece for piece in pieces if not is_done(folder, piece.name)]
    if not pending:
        return
    options = options._replace(workers=min(options.workers, len(pending)))
    with _progress(pieces, folder, title, unit), _pipeline(options) as pipeline:
        _ = pipeline | beam.Create(pending) | beam.Reshuffle() | title >> beam.Map(_do, function, folder, failed)
    for path in sorted(folder.glob(f"*{failed}")):
        kind, _, message = path.read_text(encoding="utf-8").partition("\n")
        raise (InputError if kind == InputError.__name__ else PrepareError)(message)


def _do(piece: Piece, function: Callable[[Any], None], folder: pathlib.Path, failed: str) -> None:
    """Expected errors are passed on through a file: Beam would repeat the piece, and print pages of tracebacks."""
    if any(folder.glob(f"*{failed}")):
        return
    try:
        function(piece.value)
    except PrepareError as error:
        text = f"{type(error).__name__}\n{error}"
        (folder / f"{piece.name}{failed}").write_text(text, encoding="utf-8", errors="backslashreplace")


def _pipeline(options: Options) -> beam.Pipeline:
    if options.runner != LOCAL:
        return beam.Pipeline(options=PipelineOptions([f"--runner={options.runner}", *options.flags]))
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    environment = None  # this process
    if options.workers > 1:
        environment = SubprocessSDKEnvironment.from_command_string(
            f"{shlex.quote(sys.executable)} -m {WORKER} {os.getpid()}"
        )
    # Not Beam's "DirectRunner", which first tries to download a runner. The workers end with this process.
    return beam.Pipeline(
        runner=FnApiRunner(default_environment=environment),
        options=PipelineOptions([f"--direct_num_workers={options.workers}"]),
    )


@contextlib.contextmanager
def _progress(pieces: Sequence[Piece], folder: pathlib.Path, title: str, unit: str) -> Iterator[None]:
    stop = threading.Event()
    with tqdm(total=sum(piece.weight for piece in pieces), desc=title, unit=unit, unit_scale=True) as bar:

        def look() -> None:
            remaining, finished = list(pieces), 0
            while True:
                still, under_way = [], 0
                for piece in remaining:
                    if is_done(folder, piece.name):
                        finished += piece.weight
                    else:
                        still.append(piece)
                        under_way += _reported(folder / f"{piece.name}{PROGRESS}")
                remaining = still
                bar.update(finished + under_way - bar.n)
                if stop.wait(POLL):
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        bar.update(sum(piece.weight for piece in pieces if is_done(folder, piece.name)) - bar.n)


def _reported(path: pathlib.Path) -> int:
    try:
        return int(path.read_text() or 0)
    except FileNotFoundError:
        return 0
