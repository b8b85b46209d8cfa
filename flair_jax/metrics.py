"""Numbers of a run on their way out: TensorBoard, JSON lines, the progress bar and the loss curve."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import tqdm
from clu import metric_writers
from etils import epath

JSON_LINES = "metrics.jsonl"


def read_json_lines(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The scalars of a run, a dict a step; a last line that a crash cut short is left out."""
    path = epath.Path(workdir) / JSON_LINES
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class JsonLinesWriter(metric_writers.MetricWriter):
    """Appends the scalars of each step as one line of `metrics.jsonl`.

    Args:
      workdir: folder of the run.
      step: steps behind this one are dropped: a resumed run writes them again.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self.path = epath.Path(workdir) / JSON_LINES
        kept = [line for line in read_json_lines(workdir) if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        line = {"step": step, **{name: float(value) for name, value in scalars.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _ignore(self, *args, **kwargs):
        """TensorBoard alone shows what is not a scalar."""

    write_summaries = write_images = write_videos = write_audios = write_texts = _ignore
    write_histograms = write_pointcloud = write_hparams = flush = close = _ignore


def create_writer(workdir: epath.PathLike, step: int) -> metric_writers.MetricWriter:
    """TensorBoard files and JSON lines in `workdir`, from `step` on."""
    writers = [metric_writers.SummaryWriter(str(workdir)), JsonLinesWriter(workdir, step)]
    return metric_writers.MultiWriter(writers)


class Progress:
    """The progress bar: loss, images a second, share of the time spent waiting for data, time left.

    Args:
      total, first: steps of the whole run, and those done before.
      batch_size: images a step, over all processes.
      enabled: False on all processes but one.
    """

    def __init__(self, total: int, first: int, batch_size: int, enabled: bool = True):
        self.bar = tqdm.tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True, disable=not enabled, mininterval=1.0
        )
        self.batch_size = batch_size
        self.start()

    def start(self) -> None:
        """Begins a new interval; also after a pause for evaluation."""
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within counts as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def step(self) -> None:
        self.steps += 1
        self.bar.update()

    def speed(self) -> dict[str, float]:
        """Figures of the interval. The next one begins here, so that writing them is not left out of both."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        figures = {
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
        }
        self.start()
        return figures

    def show(self, scalars: Mapping[str, float]) -> None:
        self.bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, {scalars['images_per_second']:.0f} images/s, "
            f"data wait {scalars['data_wait_share']:.0%}"
        )

    def close(self) -> None:
        self.bar.close()


def draw_loss_curve(workdir: epath.PathLike, path: epath.PathLike) -> None:
    """Writes the loss and its parts over the steps as a PNG."""
    from matplotlib.figure import Figure  # slow to import and only needed at the end

    lines = [line for line in read_json_lines(workdir) if "loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in lines]
    for name in ("loss", "tcs", "mps"):
        if lines and name in lines[0]:
            axes.plot(steps, [line[name] for line in lines], label=name, linewidth=2 if name == "loss" else 1)
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    if len(lines) > 1 and np.ptp([line["loss"] for line in lines]) > 0:
        axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
