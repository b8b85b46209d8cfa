"""Weights that were never trained: what tells them apart is what every initialisation sets exactly."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def looks_untrained(params: Mapping[str, Any]) -> list[str]:
    """Parts of a model whose normalisation still has its initial values.

    A LayerNorm starts with a scale of exactly 1 and a bias of exactly 0, in every entry, and the first step of training
    moves both. So a part is named if one of its LayerNorms was never trained: a tower that no file had the weights of,
    blocks that were added to one, or a pooling that no objective used. Starting values of scale and bias of the logits
    are no sign, and what has no LayerNorm (projections) is judged by the results, see `report.at_chance`.

    Args:
      params: nested dict, with parts such as "vision", "text" and "pooling" at the top; blocks one by one or stacked.
        They may be spread over processes, all of which have to take part then.

    Returns:
      A sentence for each such part; none: all was trained.
    """
    norms = {part: found for part, tree in params.items() if (found := list(_norms(tree)))}
    initial = jax.device_get(jax.jit(lambda norms: jax.tree.map(_initial, norms, is_leaf=_is_norm))(norms))
    sentences = []
    for part, counts in initial.items():
        if count := sum(map(int, counts)):
            number = sum(norm["scale"].size // norm["scale"].shape[-1] for norm in norms[part])
            which = f"all {number}" if count == number else f"{count} of {number}"
            sentences.append(f"{part}: weights look untrained: {which} LayerNorms have their initial values, 1 and 0.")
    return sentences


def _is_norm(tree: Any) -> bool:
    return isinstance(tree, Mapping) and tree.keys() == {"scale", "bias"}


def _norms(tree: Any):
    if _is_norm(tree):
        yield dict(tree)
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from _norms(branch)


def _initial(norm: Mapping[str, jax.Array]) -> jax.Array:
    """How many LayerNorms have their initial values, of one (W,) or of several that are stacked (N, W)."""
    return jnp.sum(jnp.all((norm["scale"] == 1) & (norm["bias"] == 0), axis=-1))
