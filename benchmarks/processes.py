"""Memory and CPU time of a process and its workers."""

import os
import resource
import subprocess
import sys

MIB = 2**20
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; CPU time is counted in these


def tree(pid: int | None = None) -> list:
    """A process (`psutil.Process`), by default this one, followed by all that it started."""
    import psutil  # an extra, which those who do not ask for this do without

    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def peak_mib() -> float:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 / MIB


def total_mib(pid: int | None = None) -> float:
    """Resident memory of `tree` together; what processes share, those outside too, is divided among them."""
    return sum(process.memory_full_info().pss for process in tree(pid)) / MIB


def cpu_seconds(pid: int | None = None) -> float:
    """CPU time that the processes of `tree` have used so far, together."""
    times = [process.cpu_times() for process in tree(pid)]
    return sum(time.user + time.system for time in times)


def default_backend() -> str:
    """Where jax would compute; asked in a process of its own, since asking takes an accelerator's memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
