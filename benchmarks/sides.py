"""Two or more sides of a comparison: processes of their own, in turns, of which medians count.

In processes of their own, neither side takes memory, threads or caches of another; in turns, whatever else the machine
does affects all of them.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from benchmarks import processes

IDLE_SECONDS, IDLE_SHARE = 0.3, 0.1  # a side rests when its processes use less than this share of a core for so long
Figures = Mapping[str, Any]
Turn = Callable[[int], Figures]


class Side:
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

    def __enter__(self) -> "Side":
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


def compare(
    sides: Mapping[str, Callable[[], Side]], count: int, turns: int, *, loaders: bool = False
) -> dict[str, list[Figures]]:
    """Takes turns, one side after the other.

    A turn begins with one that is not counted: it compiles, fills caches, and gets back the memory that the system took
    from a side while it waited. On an accelerator, whose memory either side takes for itself, a side has all its turns
    before the next one starts.

    Args:
      sides: what makes each side, by name.
      count: how often a side does in one turn what is measured.
      turns: of each side.
      loaders: the sides load data: they need no accelerator, are always there together, count for themselves, and work
        ahead, until they are idle, before another side has its turn.

    Returns:
      The figures of all turns, by side.
    """
    results = {name: [] for name in sides}
    together = loaders or processes.default_backend() == "cpu"
    for group in [list(sides)] if together else [[name] for name in sides]:
        with contextlib.ExitStack() as stack:
            made = {name: stack.enter_context(sides[name]()) for name in group}
            for _ in range(turns):
                for name, side in made.items():
                    if not loaders:
                        side.turn(1)
                    results[name].append(side.turn(count))
                    if loaders:
                        side.rest()
    return results


def beside_twin(
    ours: Callable, twin: Callable, arguments: Sequence[Any], beside: Sequence[str], count: int, turns: int
) -> tuple[list[Figures], dict[str, tuple[list[Figures], list[Figures]]]]:
    """Turns of ours and of sides of the PyTorch twin, from the same arguments.

    One side of the twin at a time: three processes that train at full size need more than 24 GB of memory.

    Args:
      ours, twin: see `Side`; the last argument tells the twin whether to compile.
      beside: "eager", "compiled" or both.
      count, turns: see `compare`.

    Returns:
      All turns of ours, and for each side those of ours that ran beside it, and its own.
    """
    all_ours, pairs = [], {}
    for side in beside or [None]:
        made = {"ours": functools.partial(Side, ours, *arguments)}
        if side is not None:
            # Its process has our input code, and leaves the accelerator to PyTorch.
            rival = functools.partial(Side, twin, *arguments, side == "compiled")
            made["twin"] = functools.partial(rival, environment={"JAX_PLATFORMS": "cpu"})
        results = compare(made, count, turns)
        all_ours += results["ours"]
        if side is not None:
            pairs[side] = results["ours"], results["twin"]
    return all_ours, pairs
