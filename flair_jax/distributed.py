"""Several processes as one run: they start together, save and stop at the same step, and none outlives another."""

import functools
import os
import signal
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


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. `number`: of the signal."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name} at step {step}: saved; the same command goes on from there")
        self.number = number


def start(heartbeat_timeout: int) -> None:
    """Joins the processes that Slurm, a TPU pod or Open MPI started; jax reads from the environment who is who.

    Args:
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead. Then jax ends the others,
        which would wait for it for ever.
    """
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout)


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
