"""Child processes of a test, through /proc."""

import pathlib
import time


def alive(pid: int) -> bool:
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def worker_processes(pid: int) -> list[int]:
    """Children of all its threads, for grain starts its workers in one of its own; less multiprocessing's tracker."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [child for child in children if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text()]


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
