"""Several processes as one run: they start together, save and stop at the same step, and none outlives another."""

import functools
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What jax knows a cluster by; it asks the metadata server of a TPU pod beside that.
CLUSTERS = {
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "a TPU pod": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
}


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. `number`: of the signal."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name} at step {step}: saved; the same command goes on from there")
        self.number = number


def start(
    heartbeat_timeout: int,
    coordinator_address: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    shutdown_timeout: int = 300,
) -> None:
    """Joins the processes of a run. jax reads who is who from the environment of a cluster, or it is given by hand.

    Args:
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead. Then jax ends the others,
        which would wait for it for ever.
      coordinator_address: "host:port" of process 0, where no cluster tells it.
      process_id, num_processes: which process this is, from 0, and of how many; with `coordinator_address` alone.
      shutdown_timeout: seconds that a process waits at its end until all others end too.

    Raises:
      ValueError: only some of the three are given, or none, and no cluster is known by its environment; or what is
        given names no process or no address.
    """
    by_hand = {
        "coordinator_address": coordinator_address,
        "process_id": process_id,
        "num_processes": num_processes,
    }
    missing = [f"--{name}" for name, value in by_hand.items() if value is None]
    if 0 < len(missing) < len(by_hand):
        raise ValueError(f"{', '.join(missing)} missing; without a cluster all of --{', --'.join(by_hand)} are needed")
    if not missing:
        _check(coordinator_address, process_id, num_processes)
    try:
        timeouts = {"heartbeat_timeout_seconds": heartbeat_timeout, "shutdown_timeout_seconds": shutdown_timeout}
        jax.distributed.initialize(**by_hand, **timeouts)
    except ValueError as error:
        if not missing or "should be defined" not in str(error):
            raise
        looked = (
            f"{cluster} ({', '.join(f'{name} {_state(name)}' for name in names)})"
            for cluster, names in CLUSTERS.items()
        )
        raise ValueError(
            f"--distributed: no cluster is known by the environment of this process. Looked for {'; '.join(looked)}. "
            "Start the processes with srun, mpirun or on a TPU pod, or tell each of them "
            "--coordinator_address=HOST:PORT --process_id=0 … --num_processes=N"
        ) from error


def _check(address: str, process_id: int, num_processes: int) -> None:
    """Raises ValueError where jax would end with an error of its own or wait for minutes."""
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1} of --num_processes={num_processes}"
        )
    match = re.fullmatch(r"([^/:]+|\[[^/]+\]):(\d+)", address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ValueError(f"--coordinator_address={address}: expected HOST:PORT, such as 10.0.0.1:1234")
    try:
        socket.getaddrinfo(match[1].strip("[]"), int(match[2]))
    except OSError as error:  # a name may become known later, where machines start together
        logging.warning("--coordinator_address=%s: this host does not know the name: %s", address, error)


def _state(name: str) -> str:
    return "is set" if name in os.environ else "is not set"


def fail() -> NoReturn:
    """Ends this process of several with the traceback of the exception at hand.

    At once, for all that an orderly end would do (the rest of a save, jax's shutdown) waits for the other processes,
    and those wait for this one. They hear of it as of any death.
    """
    traceback.print_exc()
    logging.error(
        "process %d of %d ends, and so will the others; the same command goes on from the newest checkpoint",
        jax.process_index(),
        jax.process_count(),
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def start_max(value: int) -> Callable[[], int]:
    """Starts to find the largest of the values that all processes give; the function that it returns waits for it.

    It runs on the devices after the steps that were started before; all processes call it in the same order.
    """
    split, largest_of = _largest()
    values = jax.make_array_from_process_local_data(split, np.full(jax.local_device_count(), value, np.int32))
    largest = largest_of(values)
    return lambda: int(largest)


@functools.cache
def _largest() -> tuple[NamedSharding, Callable]:
    """Where one number per device is, and the jitted function that finds the largest, on all devices."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    split, whole = NamedSharding(mesh, PartitionSpec("device")), NamedSharding(mesh, PartitionSpec())
    return split, jax.jit(jnp.max, in_shardings=split, out_shardings=whole)


class Signals:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one acts as usual.

    Of several processes a signal may reach one alone, or each at another step. There jax's preemption service takes
    SIGTERM, however often it comes, tells all, and finds the step that none has reached yet; the first SIGINT is handed
    to it as a SIGTERM.
    """

    def __enter__(self):
        self.received = 0
        self.distributed = jax.distributed.is_initialized()
        numbers = (signal.SIGINT,) if self.distributed else (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number, frame):
        self.received = number
        signal.signal(number, self.previous[number])
        if self.distributed:
            signal.raise_signal(signal.SIGTERM)

    def stop(self, step: int) -> int:
        """The signal for which all processes are to stop before this step, 0 if none; all ask at every step."""
        if self.distributed:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return self.received

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
