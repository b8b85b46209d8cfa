"""The mesh, its axes, and the shardings of states and batches."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # mesh axes over which batches are split
# Below this many elements a parameter is cheaper to copy than to gather.
MIN_SHARDED_SIZE = 2**16


def create_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices.

    Args:
      data: copies of the model; -1 takes all the devices that `fsdp` leaves.
      fsdp: devices over which the parameters and the optimiser of one copy are split.
      devices: None takes all.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    copies = len(devices) // fsdp if data == -1 and fsdp > 0 else data
    if copies < 1 or copies * fsdp != len(devices):
        raise ValueError(f"config.mesh data={data} times fsdp={fsdp} is not the number of devices, {len(devices)}")
    return jax.make_mesh((copies, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_axes() -> tuple[str, ...]:
    """Axes of the mesh in use (`jax.set_mesh`) over which batches are split; none without a mesh."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(axis for axis in BATCH_AXES if axis in names)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Sharding of every array of a state (parameters, moments, counters).

    The rule: a large array is split over `fsdp` along its longest axis that divides evenly; the others are replicated.
    """
    parts = mesh.shape["fsdp"]

    def rule(leaf):
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or math.prod(leaf.shape) < MIN_SHARDED_SIZE or not fitting:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(rule, state)


def global_batch(mesh: Mesh, batch: Any) -> Any:
    """Arrays of this process, its share of the rows, as one global array each."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
