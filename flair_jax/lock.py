"""One run per work directory: a file that names the process which trains there."""

import getpass
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from absl import logging
from etils import epath

from flair_jax.atomic import write_whole

BEAT = 15.0  # seconds between two signs of life of the run that holds a lock
WATCH = 4 * BEAT  # seconds without one after which a run on another host counts as dead


class WorkdirInUse(RuntimeError):
    """Another run trains in this work directory, or has taken it over."""


class WorkdirLock:
    """Holds `WORKDIR/lock.json` while a run trains, and keeps a second run out; a context manager.

    A lock is stale, and taken over with a warning, if it is of this host and its process is gone (no such process, or
    one with another start time), or if it is of another host and is not renewed for `WATCH` seconds. No two clocks are
    compared, and a second run on another host waits that long before it starts or is refused. Another container, and
    this host before it was booted again, count as other hosts: their processes cannot be looked up.

    On a local or network file system the file is created exclusively. Stores such as gs:// cannot do this through
    `etils.epath`: there the file is read again after it was written, so that of two runs which start within the same
    second one may not see the other until it saves, where `check` finds the lock of the other.

    Args:
      workdir: an existing folder, any path that `etils.epath` opens.
      work, otherwise: what the run does there, and what a second one can use; of messages.
    """

    def __init__(self, workdir: epath.PathLike, *, work: str = "trains", otherwise: str = "another --workdir"):
        self.path = epath.Path(workdir) / "lock.json"
        self._work, self._otherwise = work, otherwise
        self._own = {
            "id": uuid.uuid4().hex,
            "user": getpass.getuser() if hasattr(os, "getuid") else "",
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="workdir-lock", daemon=True)
        self._lost = None

    def __enter__(self) -> "WorkdirLock":
        """
        Raises:
          WorkdirInUse: another run holds the lock and is alive.
        """
        while not self._create():
            other = self._read()
            if other is None:
                continue  # released in between
            if self._is_alive(other):
                raise WorkdirInUse(
                    f"{self.path.parent} is in use: {_owner(other)} {self._work} there since {other.get('since')}. "
                    f"Wait for that run, stop it, or use {self._otherwise}. If it is dead for certain, remove "
                    f"{self.path}"
                )
            logging.warning("%s is stale: %s is gone; this run takes over", self.path, _owner(other))
            self.path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._end.set()
        self._thread.join()
        if self._is_own(self._read()):
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises WorkdirInUse if another run has taken the lock over, as after a suspension of this process."""
        if self._lost is not None:
            raise WorkdirInUse(f"{self.path.parent} was taken over by {_owner(self._lost)}; this run ends")

    def _create(self) -> bool:
        """Writes the lock if there is none; whether it is this run's now."""
        text = json.dumps({**self._own, "beat": 0}, indent=1)
        if is_store(self.path):
            if self.path.exists():
                return False
            self.path.write_text(text)
            return self._is_own(self._read())
        try:
            with open(self.path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """What the file says now; None if there is none; nobody's if it is damaged."""
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:  # cut short: a writer died, or is at it
            return {}
        return found if isinstance(found, dict) else {}

    def _is_own(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("id") == self._own["id"]

    def _is_alive(self, other: dict[str, Any]) -> bool:
        if (other.get("host"), other.get("machine")) == (self._own["host"], self._own["machine"]):
            start = process_start(other["pid"])
            return start is not None and other["process_start"] in (None, start)
        logging.warning("%s is of %s: watching for %.0f s whether that run is alive", self.path, _owner(other), WATCH)
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(BEAT / 10)
            if self._read() != other:
                return True  # renewed or released: not stale in any case
        return False

    def _renew(self) -> None:
        beat = 0
        while not self._end.wait(BEAT):
            beat += 1
            try:
                found = self._read()
                if found and not self._is_own(found):
                    self._lost = found
                    logging.error("%s was taken over by %s", self.path, _owner(found))
                    return
                write_whole(self.path, json.dumps({**self._own, "beat": beat}, indent=1).encode())
            except OSError as error:  # a disk that is full or away for a while ends no run
                logging.warning("%s was not renewed: %s", self.path, error)


def is_store(path: epath.Path) -> bool:
    """Whether a path lies in a store such as gs://, where no file can be created exclusively."""
    return "://" in os.fspath(path)


def machine() -> str:
    """What process numbers belong to: this boot of this machine, and this container; empty where /proc is not there."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> float | None:
    """When a process of this host started, in the system's own units; None if there is no such process.

    Where the system does not tell the start (no /proc), 0.0 stands for any process that is there.
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else float(fields[19])  # a zombie is dead
    except (FileNotFoundError, ProcessLookupError):
        if pathlib.Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is there, and another user's
    return 0.0


def _owner(lock: dict[str, Any]) -> str:
    return f"process {lock.get('pid')} of {lock.get('user')} on {lock.get('host')}"
