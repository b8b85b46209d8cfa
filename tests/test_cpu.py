"""What only a CPU backend needs."""

import jax
import jax.numpy as jnp

from flair_jax import cpu


def test_a_step_on_a_cpu_is_done_before_the_next_one_starts():
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: jnp.tanh(y @ y), x))
    x = jnp.eye(512)
    chain(x).block_until_ready()
    result = chain(x)
    cpu.finish({"loss": result})
    assert result.is_ready()
