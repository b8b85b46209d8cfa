"""A large batch through a tower in parts, with the gradient of the whole (GradCache, Gao et al., RepL4NLP 2021)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flair_jax.sharding import batch_axes


def in_micro_batches(encode: Callable[..., jax.Array], count: int) -> Callable[..., jax.Array]:
    """`encode` on one micro-batch after another, keeping only arguments and results between them.

    The loss sees all rows at once, so that negatives are those of the whole batch; the backward pass encodes each
    micro-batch again, when its turn comes. Values and gradients are those of `encode` itself, up to the order of sums;
    the memory of activations is that of one micro-batch. Gradients of the parameters are summed in float32 whatever
    the dtype of the parameters is.

    Micro-batch m takes the rows m, m + count, m + 2 * count, …: where rows are split over devices in order, each device
    has its share of every micro-batch, and none travels.

    Args:
      encode: `encode(params, x, *others) -> y`, row by row: x (R, …), any trees of arrays (R, …), y (R, …). Gradients
        reach `params` and `x`.
      count: micro-batches.

    Returns:
      The function with the arguments and the result of `encode`. It raises ValueError if the micro-batches, on each
      device, are not of one size.
    """

    @jax.custom_vjp
    def run(params, x, *others):
        return join(lax.map(lambda part: encode(params, *part), split((x, *others))))

    def forward(params, x, *others):
        return run(params, x, *others), (params, x, *others)

    def backward(arguments, gradient):
        params, x, *others = arguments

        def step(total, part):
            gradient, x, *others = part
            _, pull = jax.vjp(lambda params, x: encode(params, x, *others), params, x)
            of_params, of_x = pull(gradient)
            return jax.tree.map(jnp.add, total, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), of_params)), of_x

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        total, of_x = lax.scan(step, zeros, split((gradient, x, *others)))
        of_params = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), total, params)
        return of_params, join(of_x), *[None] * len(others)

    def split(tree: Any) -> Any:
        """(R, …) -> (M, R / M, …)."""
        return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)

    def join(x: jax.Array) -> jax.Array:
        """(M, R / M, …) -> (R, …)."""
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def checked(params, x, *others):
        mesh = jax.sharding.get_abstract_mesh()
        devices = int(np.prod([mesh.shape[axis] for axis in batch_axes()], dtype=int))
        if x.shape[0] % (count * devices):
            raise ValueError(
                f"{x.shape[0]} rows on {devices} devices are no multiple of config.model.micro_batches {count} on "
                "each: choose another number of them, or another config.batch_size"
            )
        return run(params, x, *others)

    run.defvjp(forward, backward)
    return checked
