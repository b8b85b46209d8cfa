"""Child processes of tests: their environment, and what /proc tells of them."""

import os
import pathlib
import random
import socket
import sys
import time

# XLA_FLAGS of all tests. Most of their time is compilation, which takes half as long without LLVM's optimisations, and
# half of that with XLA's older emitters, which jaxlib 0.10 still has, the last one for Python 3.11; later ones refuse
# the flag.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if sys.version_info < (3, 12):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def one_device(**variables: str) -> dict[str, str]:
    """Environment of a child process that starts jax with one device."""
    return {**os.environ, "XLA_FLAGS": QUICK, **variables}


def free_port() -> int:
    """Among those that jax chooses from by the number of a Slurm job; the system gives them to nobody else."""
    while True:
        port = random.SystemRandom().randint(65535 - 2**12 + 1, 65535)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port


def as_slurm(count: int, port: int) -> list[dict[str, str]]:
    """The environments of the tasks of a job step."""
    job = {"SLURM_JOB_ID": str(port % 2**12), "SLURM_NTASKS": str(count), "SLURM_STEP_NODELIST": "localhost"}
    return [job | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} for index in range(count)]


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
