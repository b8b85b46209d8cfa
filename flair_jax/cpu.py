"""Everything that only a CPU backend needs; on a GPU or a TPU none of it does anything.

`configure` is called by `flair_jax.main` and `flair_jax.load`, before jax computes; importing changes nothing.
"""

import ctypes
from typing import Any

import jax
import jax.numpy as jnp


def is_default() -> bool:
    """Whether jax computes on a CPU unless told otherwise. Starts the backend."""
    return jax.default_backend() == "cpu"


def configure() -> None:
    """Prepares this process for computing on a CPU, if that is what jax computes on."""
    if is_default():
        keep_heap()


def keep_heap() -> None:
    """Makes the C library keep what a step frees for the next one.

    XLA allocates all temporaries of a step anew (3.5 GB at batch 8), and glibc would map and unmap them each time. One
    arena, because those of threads hold at most 64 MB. Does nothing where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):  # -1: never
        mallopt(parameter, value)


def finish(x: Any) -> None:
    """Waits for the arrays of a step before the next one is started, if they are on a CPU.

    A program takes its temporaries when it is started, though it runs after the one before: two steps would hold theirs
    at a time.
    """
    if is_default():
        jax.block_until_ready(x)


@jax.custom_vjp
def settle(x: jax.Array) -> jax.Array:
    """`x` itself, forward and backward; on a CPU, computed once.

    XLA's CPU compiler merges a cheap sum into each of its users. Along the residual stream every block would then add
    up the branches of all blocks before it again. A division that could change something (it does not: NaN stays NaN)
    is no cheap operation to it.
    """
    if not is_default():
        return x
    return x / jnp.where(jnp.isnan(x), x, 1)


settle.defvjp(lambda x: (settle(x), None), lambda _, gradient: (settle(gradient),))
