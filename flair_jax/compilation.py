"""Ahead-of-time compilation of the step, its memory, and the cache of compiled programs."""

import os
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

GIB = 2**30


def use_cache(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, for the next start; the one of JAX_COMPILATION_CACHE_DIR if that is set."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def jit_step(step: Callable, state: Any) -> Callable:
    """Jits a training step with donated state and unchanged shardings."""
    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def compile_step(step: Callable, state: Any, batch: Any) -> jax.stages.Compiled:
    """A training step with donated state, compiled for these arrays or shapes. Warns if it cannot fit into memory."""
    compiled = jit_step(step, state).lower(state, batch).compile()
    needed, limit = memory(compiled)["total"], memory_limit()
    if limit is not None and needed > limit:
        logging.warning(
            "the step needs %.1f GiB a device and there are %.1f: make batch_size smaller, or set model.micro_batches, "
            "model.remat, chunk_size of the objectives or mesh.fsdp",
            needed / GIB,
            limit / GIB,
        )
    return compiled


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a compiled program on one device: arguments, outputs less donated arguments, temporaries, code."""
    account = compiled.memory_analysis()
    parts = {
        "arguments": account.argument_size_in_bytes,
        "outputs": account.output_size_in_bytes - account.alias_size_in_bytes,
        "temporaries": account.temp_size_in_bytes,
        "code": account.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def memory_table(compiled: jax.stages.Compiled) -> str:
    """`memory` as lines to print, with the device's limit where it is known."""
    limit = memory_limit()
    lines = [f"  {name:12}{size / GIB:9.2f} GiB" for name, size in memory(compiled).items()]
    there = "" if limit is None else f" of {limit / GIB:.1f} GiB"
    return "memory of a step, one device:\n" + "\n".join(lines) + there


def memory_limit() -> int | None:
    """Bytes that jax may use on a device; None where the device does not say, as a CPU."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit")
