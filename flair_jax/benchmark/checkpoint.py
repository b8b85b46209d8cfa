"""How long training stands still for a checkpoint that is written behind the scenes, beside the whole save."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from flair_jax import models, optimizer, sharding, state
from flair_jax.checkpoint import Checkpoints


def measure(config: Mapping[str, Any], folder: epath.PathLike | None = None, turns: int = 3) -> dict[str, Any]:
    """Saves and restores the fresh state of a config; medians over the turns.

    Args:
      config: see `configs/`.
      folder: where to write and, at the end, delete: any path that `etils.epath` opens. None takes the system's folder
        for temporary files.
      turns: saves of either kind, one after the other, and restores.

    Returns:
      parameters, devices.
      megabytes: 1e6 bytes of the arrays, the optimiser's included.
      stall_seconds: until an asynchronous save lets go of the loop.
      save_seconds: until a save is whole on disk.
      restore_seconds: until a state is back on its devices.
      ratio: of save_seconds to stall_seconds.
    """
    mesh = sharding.create_mesh(**config["mesh"])
    model = models.create(config["model"], config["loss"])
    with tempfile.TemporaryDirectory() as temporary, jax.set_mesh(mesh):
        tx = optimizer.create(total_steps=config["steps"] or 1, **config["optimizer"])
        current = jax.block_until_ready(state.create(model, tx, mesh, config["seed"]))
        root = epath.Path(folder or temporary) / "benchmark_checkpoint"
        saved = Checkpoints(root, keep=1)
        stalls, saves, restores = [], [], []

        def save() -> None:
            nonlocal current
            current = current.replace(step=current.step + 1)
            saved.save(current, [{}], config)

        def whole_save() -> None:
            save()
            saved.wait()

        _seconds(whole_save)  # makes folders and threads
        for _ in range(turns):
            stalls.append(_seconds(save))
            saved.wait()
            saves.append(_seconds(whole_save))
            restores.append(_seconds(lambda: jax.block_until_ready(saved.restore(int(current.step), current))))
        saved.close()
        root.rmtree()
    stall, whole = statistics.median(stalls), statistics.median(saves)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(current.params)),
        "devices": len(mesh.devices.flat),
        "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(current)) / 1e6,
        "stall_seconds": stall,
        "save_seconds": whole,
        "restore_seconds": statistics.median(restores),
        "ratio": whole / stall,
    }


def _seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
