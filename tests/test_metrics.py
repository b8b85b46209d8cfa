"""The numbers of a run: how fast it is, and how they are added up."""

import time
import types

import jax
import numpy as np
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import record_writer

from flair_jax import metrics


class Ticking:
    """A clock that stands still unless it is told to go on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def ticking(monkeypatch):
    return Ticking(monkeypatch)


def test_a_clock_tells_what_time_was_spent_on(ticking):
    clock = metrics.Clock()
    for seconds in (1, 2):
        with clock.measure("data"):
            ticking.now += seconds
    with pytest.raises(ValueError), clock.measure("saving"):
        ticking.now += 4
        raise ValueError
    ticking.now += 3
    assert clock.seconds == {"data": 3, "saving": 4}
    assert clock.total() == 10


def test_figures_of_an_interval_and_of_the_run(ticking):
    progress = metrics.Progress(total=4, first=0, batch_size=8, peak=50.0, enabled=False)
    for work, seconds in ((100.0, 2.0), (300.0, 6.0)):
        with progress.clock.measure("data"):
            ticking.now += seconds / 4
        ticking.now += 3 * seconds / 4
        progress.step(work, tokens=30, slots=40)
        figures = progress.speed()
        assert figures["mfu"] == pytest.approx(work / seconds / 50)
        assert figures["images_per_second"] == pytest.approx(8 / seconds)
        assert figures["data_wait_share"] == pytest.approx(0.25)
        assert figures["packing_efficiency"] == pytest.approx(0.75)
    progress.start()
    ticking.now += 50  # an evaluation
    progress.start()
    summary = progress.summary()
    assert summary["steps"] == 2 and summary["seconds"] == pytest.approx(8)
    assert summary["mfu"] == pytest.approx(400 / 8 / 50)
    progress.close()


def test_without_a_peak_there_is_no_mfu(ticking):
    progress = metrics.Progress(total=1, first=0, batch_size=8, enabled=False)
    ticking.now += 1
    progress.step(1.0, 1, 1)
    assert "mfu" not in progress.speed()
    progress.close()


def test_a_table_has_a_line_a_number():
    assert metrics.table("this run", {"steps": 1200, "loss": 0.12345}).splitlines() == [
        "this run:",
        "  steps                        1,200",
        "  loss                        0.1235",
    ]


def tensorboard_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value), as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_scalars_are_written_as_tensorboard_events_and_as_json_lines(tmp_path):
    writer = metrics.Writer(tmp_path, step=0)
    writer.write_scalars(1, {"loss": np.float32(0.5), "scenes/parts/R@1": jax.numpy.asarray(0.25)})
    writer.write_scalars(2, {"loss": 2})
    writer.close()
    assert tensorboard_scalars(tmp_path) == {"loss": [(1, 0.5), (2, 2.0)], "scenes/parts/R@1": [(1, 0.25)]}
    assert metrics.read_json_lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "scenes/parts/R@1": 0.25},
        {"step": 2, "loss": 2.0},
    ]


def test_a_resumed_run_replaces_what_was_measured_after_its_checkpoint(tmp_path):
    for first, value in ((0, 1.0), (2, 7.0)):
        writer = metrics.Writer(tmp_path, step=first)
        for step in range(first + 1, 5):
            writer.write_scalars(step, {"loss": value})
        writer.close()
    expected = [(1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0)]
    assert [(line["step"], line["loss"]) for line in metrics.read_json_lines(tmp_path)] == expected
    assert tensorboard_scalars(tmp_path) == {"loss": expected}


def test_scalars_are_on_disk_while_the_run_goes_on(tmp_path, ticking, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: ticking.now)
    writer = metrics.Writer(tmp_path, step=0)
    writer.write_scalars(1, {"loss": 1.0})
    assert [line["step"] for line in metrics.read_json_lines(tmp_path)] == [1]
    ticking.now += metrics.FLUSH_SECONDS + 1
    writer.write_scalars(2, {"loss": 2.0})
    assert tensorboard_scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}
    writer.close()


def test_a_full_disk_ends_the_run_with_an_error(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path, step=0)

    def full(event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.events, "write_event", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write_scalars(1, {"loss": 1.0})


def test_a_full_disk_at_the_start_keeps_the_lines_of_the_run_before(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path, step=0)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    path_type = type(metrics.epath.Path(tmp_path))
    write_bytes = path_type.write_bytes

    def full(self, data):
        write_bytes(self, b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(path_type, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device; .*metrics\.jsonl"):
        metrics.Writer(tmp_path, step=1)
    assert [line["step"] for line in metrics.read_json_lines(tmp_path)] == [1]


class Store(MemoryFileSystem):
    """An object store: opening a file to append replaces it, as gcsfs does with no more than a warning."""

    uploads = 0

    def _open(self, path, mode="rb", **options):
        Store.uploads += "r" not in mode
        return super()._open(path, mode.replace("a", "w"), **options)


class StoredEvents:
    """The file of TensorBoard events in a store: uploaded whole at every flush, as tensorboardX does."""

    def __init__(self, path):
        self.path, self.content = path, b""

    def write(self, content):
        self.content += content

    def flush(self):
        Store().pipe(self.path, self.content)

    close = flush


def test_a_store_without_append_keeps_every_line(tmp_path, monkeypatch, ticking):
    monkeypatch.setattr(time, "monotonic", lambda: ticking.now)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Store())
    factory = types.SimpleNamespace(open=StoredEvents)
    monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "gs", factory)

    writer = metrics.Writer("gs://bucket/run", step=0)
    uploads = Store.uploads
    for step in range(1, 11):
        writer.write_scalars(step, {"loss": step})
    assert Store.uploads == uploads, "one upload a step"
    ticking.now += metrics.FLUSH_SECONDS + 1
    writer.write_scalars(11, {"loss": 11})
    assert Store.uploads > uploads
    assert [line["loss"] for line in metrics.read_json_lines("gs://bucket/run")] == [*range(1, 12)]
    writer.write_scalars(12, {"loss": 12})
    writer.close()
    writer = metrics.Writer("gs://bucket/run", step=11)
    writer.write_scalars(12, {"loss": 0})
    writer.close()
    assert [line["loss"] for line in metrics.read_json_lines("gs://bucket/run")] == [*range(1, 12), 0]
    for path in Store().glob("gs://bucket/run/events.*"):
        (tmp_path / path.rsplit("/")[-1]).write_bytes(Store().cat(path))
    assert [value for _, value in tensorboard_scalars(tmp_path)["loss"]] == [*range(1, 12), 0]


def test_the_table_of_parameters_has_their_number_and_sharding(tiny_params):
    lines = metrics.parameter_table(tiny_params).splitlines()
    assert "Total: 626,402" in lines[-1]
    assert sum("| text/" in line for line in lines) == len(jax.tree.leaves(tiny_params["text"]))
