"""Reductions over all pairs of two batches that are split over devices, while no device ever holds either one whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flair_jax import sharding


def texts_per_image(images: int, texts: int) -> int:
    """K of image-major texts.

    Raises:
      ValueError: the texts are no multiple of the images.
    """
    if texts % images:
        raise ValueError(f"{texts} texts are no multiple of {images} images")
    return texts // images


def sum_over_pairs(
    work: Callable[..., Any],
    own: Any,
    shared: Any,
    constants: Any,
    passing: Any,
    *,
    images: int,
    chunk_size: int | None,
    option: str,
) -> Any:
    """Sums of `work` over all pairs of a global batch's images and texts, on the mesh in use (`jax.set_mesh`).

    Each device works on its own images; shards of texts go from device to device. Gradients are summed in float32.

    Args:
      work: `work(chunk, number, shared, constants, shard, first)` gives a tree of sums, for a chunk of `own` whose
        first image has this number in the batch, and a shard of `passing` whose first image has the number `first`.
      own: tree of float arrays (N, …), by image.
      shared: tree of float arrays, the same for all pairs.
      constants: tree of any arrays, the same for all pairs and without a gradient.
      passing: tree of float arrays (N * K, …), by text in image-major order; each leaf has a K of its own.
      images: N.
      chunk_size: images at a time on a device; None: all at once.
      option: name of the option that `chunk_size` comes from, for the error.

    Returns:
      The sums, float32, the same on all devices. Neither they nor their gradients depend on the chunks or devices, up
      to rounding.

    Raises:
      ValueError: `chunk_size` does not divide a device's images.
    """
    axes, shard_images = _split_of(images, chunk_size, option)

    def by_number(chunk, number, shared, constants, shard, device):
        return work(chunk, number, shared, constants, shard, device * shard_images)

    def run(own, shared, constants, passing):
        return _sum_on_device(by_number, own, shared, constants, passing, axes=axes, chunk_size=chunk_size)

    shared = jax.tree.map(jnp.asarray, shared)
    constants = jax.tree.map(jnp.asarray, constants)
    if axes:
        split, whole = PartitionSpec(axes), PartitionSpec()
        run = jax.shard_map(run, in_specs=(split, whole, whole, split), out_specs=whole)
    return run(own, shared, constants, passing)


def logsumexp_over_pairs(
    logits: Callable[[jax.Array, Any], jax.Array],
    own: jax.Array,
    passing: Any,
    *,
    chunk_size: int | None,
    option: str,
) -> jax.Array:
    """log sum exp of each row's logits with all rows of another batch, on the mesh in use. It has no gradient.

    Args:
      logits: (C, D) and a shard of `passing`, M rows, -> (C, M) float32.
      own: (N, D), whose shards stay.
      passing: an array or a tree of arrays, whose shards go from device to device.
      chunk_size, option: as for `sum_over_pairs`.

    Returns:
      float32 (N,), split as `own`.
    """
    rows = own.shape[0]
    axes, shard_rows = _split_of(rows, chunk_size, option)
    chunk_size = min(chunk_size or shard_rows, shard_rows)

    def run(own, passing):
        devices = lax.axis_size(axes) if axes else 1
        chunks = own.reshape(-1, chunk_size, own.shape[-1])  # (chunks, C, D)

        def turn(state, _):
            total, shard = state
            arriving = _pass_on(shard, axes)
            part = lax.map(lambda chunk: jax.nn.logsumexp(logits(chunk, shard), axis=1), chunks)  # (chunks, C)
            return (jnp.logaddexp(total, part), arriving), None

        start = jnp.full(chunks.shape[:2], -jnp.inf, jnp.float32)
        start = lax.pcast(start, axes, to="varying") if axes else start
        (total, _), _ = lax.scan(turn, (start, passing), None, length=devices)
        return total.reshape(-1)

    if axes:
        split = PartitionSpec(axes)
        run = jax.shard_map(run, in_specs=(split, split), out_specs=split)
    return run(lax.stop_gradient(own), lax.stop_gradient(passing))


def map_images(
    work: Callable[..., Any],
    own: Any,
    shared: Any,
    rows: Any,
    *,
    images: int,
    chunk_size: int | None,
    option: str,
) -> Any:
    """`work` on each device's own images and rows, on the mesh in use; nothing travels.

    Args:
      work: `work(chunk, shared, rows, first)` gives a tree of arrays (C, …), for a chunk of `own` of C images, and the
        rows of its device, whose first one is row `first` of the batch.
      own: tree of arrays (N, …), by image.
      shared: tree of float arrays, the same for all images.
      rows: tree of arrays (R, …), split over the devices as the images are: rows of packed texts.
      images: N.
      chunk_size: images at a time on a device, of which all but the results is computed again in the backward pass;
        None: all at once, and nothing is.
      option: name of the option that `chunk_size` comes from, for the error.

    Returns:
      The tree of `work`, (N, …), split as `own`.

    Raises:
      ValueError: `chunk_size` does not divide a device's images.
    """
    axes, shard_images = _split_of(images, chunk_size, option)
    chunk_size = min(chunk_size or shard_images, shard_images)

    def run(own, shared, rows):
        first = jax.tree.leaves(rows)[0].shape[0] * (lax.axis_index(axes) if axes else 0)
        if chunk_size == shard_images:
            return work(own, shared, rows, first)
        chunks = jax.tree.map(lambda x: x.reshape(-1, chunk_size, *x.shape[1:]), own)
        again = jax.checkpoint(lambda chunk, shared, rows: work(chunk, shared, rows, first))
        found = lax.map(lambda chunk: again(chunk, shared, rows), chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    if axes:
        split, whole = PartitionSpec(axes), PartitionSpec()
        run = jax.shard_map(run, in_specs=(split, whole, split), out_specs=split)
    return run(*jax.tree.map(jnp.asarray, (own, shared, rows)))


def _split_of(rows: int, chunk_size: int | None, option: str) -> tuple[tuple[str, ...], int]:
    """Mesh axes over which rows are split, and the rows of one device."""
    axes = sharding.batch_axes()
    mesh = jax.sharding.get_abstract_mesh()
    shard = rows // math.prod(mesh.shape[axis] for axis in axes)
    if chunk_size and shard % min(chunk_size, shard):
        raise ValueError(f"{option} {chunk_size} does not divide the {shard} images of a device")
    return axes, shard


def _pass_on(tree: Any, axes: tuple[str, ...]) -> Any:
    """Each device's arrays on the next one."""
    devices = lax.axis_size(axes) if axes else 1
    if devices == 1:
        return tree
    return jax.tree.map(lambda x: lax.ppermute(x, axes, [(d, (d + 1) % devices) for d in range(devices)]), tree)


def _sum_on_device(
    work: Callable[..., Any],
    own: Any,
    shared: Any,
    constants: Any,
    passing: Any,
    *,
    axes: tuple[str, ...] = (),
    chunk_size: int | None = None,
) -> Any:
    """Sum of `work(chunk, first, shared, constants, shard, number)` over all chunks and shards of all devices.

    Called inside `jax.shard_map` over `axes`, or, without axes, on one device. The shards of one batch are passed from
    device to device: each works on the shard that it holds, one chunk of its own rows at a time, while the next shard
    arrives. The backward pass sends them round again, each followed by its gradient, and recomputes all work. The
    memory is that of one chunk's work, of two shards and of the gradients, however many devices there are. One chunk
    on one device is done only once.

    Args:
      work: gives a tree of sums for a chunk of `own`, whose first row is row `first` of the whole batch, and the shard
        of `passing` that device `number` had.
      own: tree of float arrays (S, …), this device's rows.
      shared: tree of float arrays, the same on all devices.
      constants: tree of any arrays, the same on all devices and without a gradient.
      passing: tree of float arrays, this device's shard. Gradients reach `own`, `shared` and `passing`, summed in
        float32.
      axes: mesh axes over which rows and shards are split, () for one device.
      chunk_size: rows at a time, None for all; it divides S.
    """
    devices = lax.axis_size(axes) if axes else 1
    rows = jax.tree.leaves(own)[0].shape[0]
    chunk_size = min(chunk_size or rows, rows)

    def split(x: jax.Array) -> jax.Array:
        return lax.pcast(x, axes, to="varying") if axes else x

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda x: split(jnp.zeros(x.shape, jnp.float32)), tree)

    def add(total: Any, part: Any) -> Any:
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), total, part)

    def here() -> jax.Array | int:
        return lax.axis_index(axes) if axes else 0

    def rows_at(tree: Any, first: jax.Array) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, chunk_size), tree)

    def every_pair(step: Callable[..., Any], carry: Any, passing: Any) -> Any:
        """`step(carry, first, shard, number)` for each chunk, from its row `first` here on, with each shard. The second
        part of the carry goes along with the shard.
        """

        def turn(state, turn):
            (staying, moving), shard = state
            arriving = _pass_on(shard, axes)
            carry, _ = lax.scan(
                lambda carry, first: (step(carry, first, shard, (here() - turn) % devices), None),
                (staying, moving),
                jnp.arange(0, rows, chunk_size),
            )
            return ((carry[0], _pass_on(carry[1], axes)), arriving), None

        (carry, _), _ = lax.scan(turn, (carry, passing), jnp.arange(devices))
        return carry

    @jax.custom_vjp
    def run(own, shared, constants, passing):
        def step(carry, first, shard, number):
            total, _ = carry
            part = work(rows_at(own, first), here() * rows + first, shared, constants, shard, number)
            return add(total, part), ()

        sums = jax.eval_shape(work, rows_at(own, 0), 0, shared, constants, passing, 0)
        total, _ = every_pair(step, (zeros(sums), ()), passing)
        return total

    def forward(own, shared, constants, passing):
        return run(own, shared, constants, passing), (own, shared, constants, passing)

    def backward(arguments, gradient):
        own, shared, constants, passing = arguments

        def step(carry, first, shard, number):
            (of_own, of_shared), of_shard = carry

            def sums(chunk, shared, shard):
                return work(chunk, here() * rows + first, shared, constants, shard, number)

            _, pull = jax.vjp(sums, rows_at(own, first), shared, shard)
            more_of_chunk, more_of_shared, more_of_shard = pull(gradient)
            of_chunk = add(rows_at(of_own, first), more_of_chunk)
            of_own = jax.tree.map(lambda x, part: lax.dynamic_update_slice_in_dim(x, part, first, 0), of_own, of_chunk)
            return (of_own, add(of_shared, more_of_shared)), add(of_shard, more_of_shard)

        start = (zeros(own), zeros(shared)), zeros(passing)
        (of_own, of_shared), of_passing = every_pair(step, start, passing)
        found, likes = (of_own, of_shared, of_passing), (own, shared, passing)
        of_own, of_shared, of_passing = jax.tree.map(lambda x, like: x.astype(like.dtype), found, likes)
        return of_own, of_shared, None, of_passing

    run.defvjp(forward, backward)
    shared = jax.tree.map(split, shared)  # each device has a gradient of its own; this is what sums them
    if devices == 1 and chunk_size == rows:
        total = work(own, 0, shared, constants, passing, 0)
    else:
        total = run(own, shared, constants, passing)
    return lax.psum(total, axes) if axes else total
