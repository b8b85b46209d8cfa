"""Two sides of a comparison, each in a process of its own: neither takes memory, threads or caches of the other."""

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flair_jax.benchmark import processes

IDLE_SECONDS, IDLE_SHARE = 0.3, 0.1  # a side rests when its processes use less than this share of a core for so long
Figures = Mapping[str, Any]
Turn = Callable[[int], Figures]


class Contender:
    """One side, in a process that lives as long as the context.

    Args:
      make: called in that process with the arguments; a context manager that gives the function for `turn`. Defined at
        the top of a module, as the arguments pickleable.
      environment: variables of that process beside this one's.
    """

    def __init__(self, make: Callable[..., AbstractContextManager[Turn]], *arguments, environment=None):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, *arguments))
        before = dict(os.environ)
        os.environ.update({"TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})})  # its start is nothing to read
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def turn(self, count: int) -> Figures:
        """Does what is measured `count` times, and returns its figures.

        Raises:
          RuntimeError: the process ended.
        """
        try:
            self._connection.send(count)
            return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join()
            code = self._process.exitcode
            why = ", as the system kills for want of memory: fewer sides need less" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"a side's process ended with exit code {code}{why}") from error

    def rest(self) -> None:
        """Waits until its processes have done what they do ahead."""
        seconds = processes.cpu_seconds(self._process.pid)
        while True:
            time.sleep(IDLE_SECONDS)
            before, seconds = seconds, processes.cpu_seconds(self._process.pid)
            if seconds - before < IDLE_SHARE * IDLE_SECONDS:
                return

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()  # the process ends with it
        self._process.join()


def _serve(connection, make: Callable[..., AbstractContextManager[Turn]], *arguments) -> None:
    """The side's process: a turn for each number that comes, until the connection is closed."""
    with make(*arguments) as turn, contextlib.suppress(EOFError):
        while True:
            connection.send(turn(connection.recv()))


def median(turns: Sequence[Figures], name: str) -> float:
    """Of one figure over all turns."""
    return statistics.median(turn[name] for turn in turns)


def in_turns(sides: Mapping[str, Callable[[], Contender]], count: int, turns: int) -> dict[str, list[Figures]]:
    """One after the other, `turns` times, so that whatever else the machine does meets all of them.

    Each begins a turn with one that is not counted: it compiles, fills caches, and gets back the memory that the
    system took from it while it waited. On an accelerator, whose memory either side takes for itself, a side has all
    of its turns before the next one starts.
    """
    results = {name: [] for name in sides}
    together = processes.default_backend() == "cpu"
    for group in [list(sides)] if together else [[name] for name in sides]:
        with contextlib.ExitStack() as stack:
            contenders = {name: stack.enter_context(sides[name]()) for name in group}
            for _ in range(turns):
                for name, contender in contenders.items():
                    contender.turn(1)
                    results[name].append(contender.turn(count))
    return results
