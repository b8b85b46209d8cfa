"""What only a CPU backend needs; docs/speed.md has what was tried and gained too little to stay."""

from typing import Any

import jax


def finish(x: Any) -> None:
    """Waits for the arrays of a step before the next one is started, if they are on a CPU.

    There a program takes its temporaries when it is started, though it runs after the one before: two steps would hold
    theirs at a time. On a GPU or a TPU it does nothing.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(x)


def alone() -> bool:
    """Whether programs run on a single CPU device: there small pieces of work, which stay in the caches, are faster."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1
