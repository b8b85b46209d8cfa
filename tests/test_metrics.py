"""The numbers of a run: how fast it is, and how they are added up."""

import time

import pytest

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
