"""Two runs in one work directory: the second is refused by name, unless the first is dead."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from processes import wait_for

from flair_jax import lock

HOLD = (
    "import sys, time; from flair_jax import lock; lock.WorkdirLock(sys.argv[1]).__enter__();"
    "print(1, flush=True); time.sleep(99)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        yield process
        process.kill()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "WATCH", 0.5)


def foreign(path, **changes):
    """Makes the lock one of another host."""
    found = json.loads(path.read_text()) | {"host": "elsewhere", "id": "other"} | changes
    path.write_text(json.dumps(found))
    return found


def test_a_lock_names_its_owner_and_is_released(tmp_path):
    with lock.WorkdirLock(tmp_path) as held:
        found = json.loads((tmp_path / "lock.json").read_text())
        assert (found["pid"], found["host"]) == (os.getpid(), os.uname().nodename)
        held.check()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock.WorkdirLock(tmp_path):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path, holder):
    message = rf"in use: process {holder.pid} of .* on .* trains there since"
    with pytest.raises(lock.WorkdirInUse, match=message), lock.WorkdirLock(tmp_path):
        pass
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid
    holder.kill()
    holder.wait()
    with lock.WorkdirLock(tmp_path):  # at once
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_another_process_with_the_number_of_the_dead_one_does_not_keep_the_lock(tmp_path, holder):
    path = tmp_path / "lock.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "process_start": found["process_start"] - 1}))
    with lock.WorkdirLock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_container_of_the_same_name_is_another_host(tmp_path, fast, monkeypatch):
    """Its processes cannot be looked up, so its lock is watched."""
    monkeypatch.setattr(lock, "machine", lambda: "another container")
    with lock.WorkdirLock(tmp_path):
        monkeypatch.setattr(lock, "machine", lambda: "this container")
        monkeypatch.setattr(lock, "process_start", lambda pid: None)
        with pytest.raises(lock.WorkdirInUse, match="trains there since"):
            lock.WorkdirLock(tmp_path).__enter__()


def test_a_run_on_another_host_is_alive_as_long_as_it_renews(tmp_path, fast):
    path = tmp_path / "lock.json"
    with lock.WorkdirLock(tmp_path):
        pass
    with lock.WorkdirLock(tmp_path):
        found = json.loads(path.read_text()) | {"host": "elsewhere", "id": "other"}
    path.write_text(json.dumps(found))
    stop = threading.Event()

    def renew():
        beat = 0
        while not stop.wait(0.1):
            beat += 1
            path.write_text(json.dumps({**found, "beat": beat}))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(lock.WorkdirInUse, match="on elsewhere trains there"), lock.WorkdirLock(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()
    start = time.monotonic()
    with lock.WorkdirLock(tmp_path):  # nothing renews it any longer
        assert time.monotonic() - start >= 0.5
        assert json.loads(path.read_text())["host"] == os.uname().nodename


def test_a_lock_is_renewed_and_a_run_that_lost_it_is_told(tmp_path, fast):
    path = tmp_path / "lock.json"
    with lock.WorkdirLock(tmp_path) as held:
        assert wait_for(lambda: '"beat": 2' in path.read_text(), 10)

        def lost():
            foreign(path)  # again, should a renewal have come between
            try:
                held.check()
            except lock.WorkdirInUse as error:
                return "taken over by" in str(error)

        assert wait_for(lost, 10)
    assert json.loads(path.read_text())["id"] == "other"  # the other's lock stays


def test_a_renewal_is_never_seen_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.001)
    path = tmp_path / "lock.json"
    with lock.WorkdirLock(tmp_path):
        beats = {json.loads(path.read_text())["beat"] for _ in range(3000)}
    assert len(beats) > 1 and list(tmp_path.iterdir()) == []


def test_a_damaged_lock_is_watched_and_taken(tmp_path, fast):
    (tmp_path / "lock.json").write_text("{")
    with lock.WorkdirLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_store_without_exclusive_creation(tmp_path, monkeypatch):
    """Writes, and reads again."""
    monkeypatch.setattr(lock, "is_store", lambda path: True)
    with lock.WorkdirLock(tmp_path), pytest.raises(lock.WorkdirInUse, match=f"process {os.getpid()}"):
        lock.WorkdirLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
