"""Means as the references take them: over the processes of means over what each process has."""

import jax
import jax.numpy as jnp


def check_divisor(option: str, value: int, images: int) -> None:
    """Refuses an option that has to divide the batch and does not.

    Args:
      option: the end of its name in the config, such as "boxes.group_size".

    Raises:
      ValueError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.objectives.{option} is {value!r}; expected a whole number, 1 or more")
    if images % value:
        raise ValueError(f"config.objectives.{option} {value} does not divide the batch of {images} images")


def group_means(x: jax.Array, counts: jax.Array, groups: int) -> jax.Array:
    """Mean over groups of consecutive images of the mean of what counts in each, 0 where nothing does.

    Args:
      x: float32 (N, …). counts: bool, of the same shape.
      groups: how many, a divisor of N.
    """
    counts = counts.reshape(groups, -1)
    sums = jnp.sum(x.reshape(groups, -1), axis=1, where=counts)
    return jnp.mean(sums / jnp.maximum(counts.sum(axis=1), 1))
