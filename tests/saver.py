"""A process that saves small checkpoints one after the other, from the moment that it is told to until it is killed.

python tests/saver.py WORKDIR
"""

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


if __name__ == "__main__":
    sys.stdin.readline()
    saved = Checkpoints(sys.argv[1], keep=2, clean=True)
    step = saved.latest() or 0
    if step:
        assert_right(saved, step)
    while True:
        step += 1
        save(saved, step)
