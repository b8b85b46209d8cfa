"""Ahead-of-time compilation: its account of memory, the warning of a step that cannot fit, the cache."""

import functools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from flair_jax import compilation


def step(state, batch):
    return state + batch.sum(), {"loss": jnp.sum(jnp.sin(batch @ batch.T))}


@functools.cache
def compiled():
    shapes = jax.ShapeDtypeStruct((256,), jnp.float32), jax.ShapeDtypeStruct((512, 64), jnp.float32)
    return compilation.compile_step(step, *shapes)


def test_the_account_of_memory():
    account = compilation.memory(compiled())
    assert account["arguments"] == 4 * (256 + 512 * 64)
    assert account["outputs"] < 256  # the state takes its own place, the loss is a number
    assert account["total"] == sum(size for name, size in account.items() if name != "total")
    assert "temporaries" in compilation.memory_table(compiled())


def test_the_state_is_given_away():
    state, batch = jnp.zeros(256), jnp.ones((512, 64))
    compiled()(state, batch)
    assert state.is_deleted() and not batch.is_deleted()


@pytest.mark.parametrize("limit, warned", [(100, True), (2**40, False), (None, False)])
def test_a_step_that_cannot_fit_is_said_before_it_runs(limit, warned, monkeypatch, caplog):
    monkeypatch.setattr(compilation, "memory_limit", lambda: limit)
    with caplog.at_level(logging.WARNING):
        compilation.compile_step(step, jnp.zeros(256), jnp.ones((512, 64)))
    assert ("model.micro_batches" in caplog.text) == warned


@pytest.mark.parametrize("variable", [False, True])
def test_a_program_compiled_once_is_found_again(variable, tmp_path):
    code = """
import sys, jax, jax.numpy as jnp
from flair_jax import compilation
compilation.use_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64)))
"""
    chosen = tmp_path / "chosen"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(chosen)}
    if not variable:
        del environment["JAX_COMPILATION_CACHE_DIR"]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment, check=True)
    assert any(chosen.glob("*lambda*")) == variable
    assert any((tmp_path / "run").glob("*lambda*")) != variable
