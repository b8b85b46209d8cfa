"""Processes that save small checkpoints one after the other until they are killed.

python tests/saver.py WORKDIR

Each line on stdin starts one, a fork of this process, which has imported what they need and started neither jax nor a
thread. Its number is printed when it starts and again when it has ended.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from flair_jax.checkpoint import Checkpoints
from flair_jax.state import TrainState

SHAPE = (512, 512)


def state_of(step: int) -> TrainState:
    """The state that belongs to a step: numbers drawn from it, which no compression makes smaller."""
    weight, mu = jnp.asarray(np.random.default_rng(step).random((2, *SHAPE), np.float32))
    return TrainState(step=jnp.int32(step), params={"weight": weight}, opt_state={"mu": mu})


def save(saved: Checkpoints, step: int) -> None:
    saved.save(state_of(step), [{"read": step}], {"step": step})


def assert_right(saved: Checkpoints, step: int) -> None:
    restored = saved.restore(step, state_of(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(step))
    assert saved.positions(step) == [{"read": step}] and saved.config(step) == {"step": step}


def save_on_and_on() -> None:
    saved = Checkpoints(sys.argv[1], keep=2, clean=True)
    step = saved.latest() or 0
    if step:
        assert_right(saved, step)
    while True:
        step += 1
        save(saved, step)


if __name__ == "__main__":
    while sys.stdin.readline():
        child = os.fork()
        if child == 0:
            save_on_and_on()
        print(child, flush=True)
        os.waitpid(child, 0)
        print(child, flush=True)
