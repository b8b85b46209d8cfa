"""Numbers of a run on their way out: TensorBoard, JSON lines, the progress bar and the loss curve."""

import collections
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import tqdm
from clu import parameter_overview
from etils import epath

from flair_jax.atomic import write_whole
from flair_jax.figures import to_image


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Imports of this package fail meanwhile, unless it is imported already."""
    imported = sys.modules.get(name)
    sys.modules[name] = imported
    try:
        yield
    finally:
        if imported is None:
            del sys.modules[name]


# tensorboardX imports torch wherever it is installed, for the type of an argument: a third of the time to start.
with _hidden("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

JSON_LINES = "metrics.jsonl"
FLUSH_SECONDS = 60


def read_json_lines(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The scalars of a run, a dict a step; a last line that a crash cut short is left out."""
    path = epath.Path(workdir) / JSON_LINES
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class Writer:
    """Writes the scalars of a run as TensorBoard events and as lines of `metrics.jsonl`.

    An object store has no files to append to, so there both are uploaded whole, every `FLUSH_SECONDS`.

    Args:
      workdir: folder of the run, local or in a store (`gs://`, `s3://`).
      step: the run goes on from this step. What either file holds of later ones is dropped: a resumed run writes
        them again.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self.path = epath.Path(workdir) / JSON_LINES
        self.lines = [json.dumps(line) + "\n" for line in read_json_lines(workdir) if line["step"] <= step]
        write_whole(self.path, "".join(self.lines).encode())  # on a full disk the lines before stay
        self.appends = "://" not in str(workdir)
        # tensorboardX's SummaryWriter writes from a thread: after a full disk it would hang instead of raising.
        self.events = EventsWriter(str(epath.Path(workdir) / "events"), filename_suffix=f".{step}")
        self.events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends what was measured at one step.

        Args:
          step: counted from 1.
          scalars: name -> a number or an array without dimensions.

        Raises:
          OSError: a file cannot be written.
        """
        numbers = {name: float(value) for name, value in scalars.items()}
        line = json.dumps({"step": step, **numbers}) + "\n"
        if self.appends:
            with self.path.open("a") as file:
                file.write(line)
        else:
            self.lines.append(line)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self.events.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns once everything is in the files."""
        if not self.appends:
            write_whole(self.path, "".join(self.lines).encode())
        self.events.flush()
        self.flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self.events.close()


def parameter_table(params: Mapping[str, Any]) -> str:
    """Name, shape, dtype, size and sharding of every parameter, and their number, as a table to print."""
    return parameter_overview.get_parameter_overview(params, include_stats="sharding")


class Clock:
    """Seconds since it was made, and those of them that were spent on something that has a name."""

    def __init__(self):
        self.began = time.perf_counter()
        self.seconds = collections.Counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def total(self) -> float:
        return max(time.perf_counter() - self.began, 1e-9)


class Progress:
    """The progress bar, and how fast a run is: images a second, waits, work done, packing efficiency.

    Args:
      total, first: steps of the whole run, and those done before.
      batch_size: images per step, over all processes.
      peak: operations a second of all devices, for MFU; None where it is not known.
      enabled: False on all processes but one.
    """

    def __init__(self, total: int, first: int, batch_size: int, peak: float | None = None, enabled: bool = True):
        self.bar = tqdm.tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True, disable=not enabled, mininterval=1.0
        )
        self.batch_size, self.peak = batch_size, peak
        self.whole = collections.Counter()  # sums over all intervals
        self.start()

    def start(self) -> None:
        """Begins a new interval; also after a pause for evaluation."""
        self.clock, self.sums = Clock(), collections.Counter()

    def step(self, work: float, tokens: int, slots: int) -> None:
        """A step was started.

        Args:
          work: operations of it, over all devices.
          tokens, slots: its captions' tokens, and slots for tokens, padding included.
        """
        self.sums.update(steps=1, work=work, tokens=tokens, slots=slots)
        self.bar.update()

    def speed(self) -> dict[str, float]:
        """Figures of the interval. The next one begins here, so that writing them is not left out of both."""
        sums = self.sums + collections.Counter(seconds=self.clock.total(), **self.clock.seconds)
        self.whole.update(sums)
        self.start()
        return self._figures(sums)

    def _figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        seconds, steps = sums["seconds"], max(sums["steps"], 1)
        figures = {
            "images_per_second": sums["steps"] * self.batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait_share": sums["data"] / seconds,
            "saving_share": sums["saving"] / seconds,
            "packing_efficiency": sums["tokens"] / max(sums["slots"], 1),
            "tflop_per_second": sums["work"] / seconds / 1e12,
        }
        return figures if self.peak is None else {**figures, "mfu": sums["work"] / seconds / self.peak}

    def summary(self) -> dict[str, float]:
        """Figures of the whole run since it was started, evaluation left out."""
        self.speed()
        return {"steps": self.whole["steps"], "seconds": self.whole["seconds"], **self._figures(self.whole)}

    def show(self, scalars: Mapping[str, float]) -> None:
        mfu = f", MFU {scalars['mfu']:.0%}" if "mfu" in scalars else ""
        self.bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, {scalars['images_per_second']:.0f} images/s, "
            f"data wait {scalars['data_wait_share']:.0%}{mfu}"
        )

    def close(self) -> None:
        self.bar.close()


def table(title: str, figures: Mapping[str, Any]) -> str:
    """Numbers by name as lines to print."""
    lines = [f"  {name:20}{value:>14,}" for name, value in figures.items() if isinstance(value, int)]
    lines += [f"  {name:20}{value:>14,.4g}" for name, value in figures.items() if isinstance(value, float)]
    return "\n".join([f"{title}:", *lines])


def draw_loss_curve(workdir: epath.PathLike, path: epath.PathLike, parts: Iterable[str]) -> None:
    """Writes the loss and some parts of it, by their names in the log, over the steps as a PNG."""
    from matplotlib.figure import Figure  # slow to import and only needed at the end

    lines = [line for line in read_json_lines(workdir) if "loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in lines]
    for name in ("loss", *parts):
        if lines and name in lines[0]:
            axes.plot(steps, [line[name] for line in lines], label=name, linewidth=2 if name == "loss" else 1)
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    if len(lines) > 1 and np.ptp([line["loss"] for line in lines]) > 0:
        axes.set_yscale("log")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    with epath.Path(path).open("wb") as file:
        to_image(figure).save(file, format="png")
