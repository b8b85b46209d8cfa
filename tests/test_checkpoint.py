"""Saves that are killed, do not fit on the disk or are too many: a good checkpoint is always there."""

import contextlib
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from processes import alive, one_device, wait_for
from saver import assert_right, save
from tiny_run import tiny

from flair_jax import checkpoint, metrics, train

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 20


def whole_and_left_over(folder: pathlib.Path) -> tuple[list[int], list[str]]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit()), [name for name in names if not name.isdigit()]


@pytest.fixture
def saver(tmp_path):
    """Starts a process that saves into `tmp_path`, and kills it where the `with` statement ends."""
    command = [sys.executable, str(ROOT / "tests" / "saver.py"), str(tmp_path)]
    environment = one_device(PYTHONPATH=str(ROOT))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with subprocess.Popen(command, env=environment, text=True, **pipes) as forks:

        @contextlib.contextmanager
        def start():
            print(file=forks.stdin, flush=True)
            process = int(forks.stdout.readline())
            try:
                yield process
            finally:
                os.kill(process, signal.SIGKILL)
                assert int(forks.stdout.readline()) == process  # it has ended

        yield start
        forks.kill()


def test_twenty_kills_during_saves_lose_nothing(tmp_path, saver):
    folder = tmp_path / "checkpoints"
    rng = random.Random(0)
    latest, cut_short = 0, 0
    for _ in range(KILLS):
        with saver() as process:
            goal = latest + rng.randint(1, 3)
            assert wait_for(lambda goal=goal: max(whole_and_left_over(folder)[0], default=0) >= goal, 60)
            assert len(whole_and_left_over(folder)[1]) <= 1  # none of those that the kills before left
            time.sleep(rng.uniform(0, 0.1))
            assert alive(process)

        cut_short += bool(whole_and_left_over(folder)[1])
        saved = checkpoint.Checkpoints(tmp_path, keep=None)
        latest = saved.latest()
        assert latest >= goal
        assert_right(saved, latest)
        saved.close()
    assert cut_short >= KILLS // 4  # kills that came in the middle of a save


def test_old_checkpoints_go_by_rule(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=2, keep_every=3)
    for step in range(1, 9):
        save(saved, step)
    saved.close()
    again = checkpoint.Checkpoints(tmp_path, keep=1, keep_every=6)  # the rule may change later
    assert sorted(again.manager.all_steps()) == [3, 6, 7, 8]
    save(again, 9)
    again.close()
    assert whole_and_left_over(tmp_path / "checkpoints") == ([6, 9], [])


def test_readers_leave_a_save_in_progress_alone(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path)
    save(saved, 1)
    saved.close()
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    checkpoint.Checkpoints(tmp_path, keep=None).close()
    assert unfinished.exists()
    writer = checkpoint.Checkpoints(tmp_path, clean=True)
    save(writer, 2)
    writer.close()
    assert whole_and_left_over(tmp_path / "checkpoints") == ([1, 2], [])


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path):
    """A limit on the size of files, below that of the arrays and above that of logs, stands for the full disk."""
    saved = checkpoint.Checkpoints(tmp_path, keep=1, clean=True)
    save(saved, 1)
    saved.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
    try:
        with pytest.raises(checkpoint.SaveError, match=r"checkpoint 1 is whole (?s:.*)File too large"):
            save(saved, 2)
            assert wait_for(lambda: not saved.manager.is_saving_in_progress(), 30)
            saved.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saved.manager.close()

    again = checkpoint.Checkpoints(tmp_path, keep=1, clean=True)
    assert again.latest() == 1
    assert_right(again, 1)
    save(again, 2)
    again.close()
    assert whole_and_left_over(tmp_path / "checkpoints") == ([2], [])
    assert_right(checkpoint.Checkpoints(tmp_path), 2)


@pytest.mark.usefixtures("on_one_device", "shared_programs")
def test_a_run_stops_where_a_save_has_failed(tmp_path, monkeypatch):
    """In the steps behind the save, not at the end of the run."""
    save = checkpoint.Checkpoints.save

    def save_and_wait(self, state, positions, config, evaluations):
        """With a disk that is full from step 4 on."""
        if state.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
        save(self, state, positions, config, evaluations)
        assert wait_for(lambda: not self.manager.is_saving_in_progress(), 30)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_wait)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(checkpoint.SaveError, match=r"checkpoint 2 is whole (?s:.*)File too large"):
            train.train(tiny(steps=20), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert metrics.read_json_lines(tmp_path)[-1]["step"] == 4
    assert whole_and_left_over(tmp_path / "checkpoints")[0] == [2]
    monkeypatch.undo()
    train.train(tiny(steps=6), tmp_path)
    assert whole_and_left_over(tmp_path / "checkpoints") == ([4, 6], [])
