"""Starting from weights of another model: what fits is taken, positions are resized, and a table tells all of it."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flair_jax.models.vision import grid as grid_of
from flair_jax.optimizer import path_of

VISION_POSITIONS, TEXT_POSITIONS = "vision/position_embedding", "text/position_embedding"


class Origin(NamedTuple):
    """Where a parameter came from: `kind` is "loaded", "resized", "fresh" or "left over"; `detail` says more."""

    name: str
    kind: str
    detail: str = ""


def combine(fresh: Any, loaded: Any, grid: tuple[int, int], loaded_grid: tuple[int, int]) -> tuple[Any, list[Origin]]:
    """Parameters of a model, from a file where it has them.

    Args:
      fresh: the model's own tree of parameters, freshly initialised.
      loaded: the tree of another model.
      grid, loaded_grid: rows and columns of image patches of both.

    Returns:
      A tree like `fresh`, and the origin of every parameter of either tree: "loaded" where name and shape agree,
      "resized" for position embeddings of another number, see `resize_image_positions` and `resize_text_positions`,
      "fresh" where the file has none of that name or one of another shape, "left over" for what only the file has.
    """
    there = {path_of(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(loaded)}
    origins = []

    def choose(keys, leaf):
        name = path_of(keys)
        found = there.pop(name, None)
        if found is None:
            origins.append(Origin(name, "fresh", f"{tuple(leaf.shape)}, not in the file"))
            return leaf
        change = f"{found.shape} -> {tuple(leaf.shape)}"
        if found.shape == leaf.shape:
            origins.append(Origin(name, "loaded"))
            return found
        if name == VISION_POSITIONS and found.shape[1:] == leaf.shape[1:]:
            origins.append(Origin(name, "resized", change))
            return resize_image_positions(found, loaded_grid, grid)
        if name == TEXT_POSITIONS and found.shape[1:] == leaf.shape[1:]:
            origins.append(Origin(name, "resized", change))
            return resize_text_positions(found, leaf.shape[0])
        origins.append(Origin(name, "fresh", f"{tuple(leaf.shape)}, in the file {found.shape}"))
        return leaf

    params = jax.tree_util.tree_map_with_path(choose, fresh)
    origins += [Origin(name, "left over", str(leaf.shape)) for name, leaf in there.items()]
    return params, origins


def resize_image_positions(positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings (1 + h * w, W) for another grid of patches; the class token's stays.

    Bicubic with antialias, as `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`, open_clip's rule.
    """
    first, grid = positions[:1], positions[1:].reshape(*old, -1)
    resized = jax.image.resize(jnp.asarray(grid), (*new, grid.shape[-1]), "cubic", antialias=True)
    return np.concatenate([first, np.asarray(resized).reshape(-1, grid.shape[-1])])


def with_image_size(model: nn.Module, params: Any, size: tuple[int, int]) -> tuple[nn.Module, Any]:
    """A model for images of another size, and its parameters with resized position embeddings.

    Args:
      model: a `DualEncoder`.
      params: its parameters, a nested dict.
      size: height and width, multiples of its patches.
    """
    patch = model.vision_options["patch_size"]
    resized = model.clone(vision_options=flax.core.freeze({**model.vision_options, "image_size": tuple(size)}))
    old, new = grid_of(model.image_size, patch), grid_of(size, patch)

    def resize(keys, leaf):
        return resize_image_positions(np.asarray(leaf), old, new) if path_of(keys) == VISION_POSITIONS else leaf

    return resized, jax.tree_util.tree_map_with_path(resize, params)


def resize_text_positions(positions: np.ndarray, length: int) -> np.ndarray:
    """Position embeddings (T, W) for another context length: (length, W).

    Of a shorter one the first ones: the tower is causal, so that texts that fit keep their features. Of a longer one
    see `stretch_text_positions`: the first 20 stay, or the first half where there are fewer than 40.
    """
    old = positions.shape[0]
    if length <= old:
        return np.asarray(positions[:length])
    return np.asarray(stretch_text_positions(positions, length, kept=min(20, old // 2)))


def resized(section: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section with the image size and the context length of another one."""
    section = dict(section)
    for tower, key in (("vision", "image_size"), ("text", "context_length")):
        if section[tower] is not None and like[tower] is not None:
            section[tower] = {**section[tower], key: like[tower][key]}
    return section


def stretch_text_positions(positions: jax.Array, length: int, kept: int = 20) -> jax.Array:
    """Position embeddings (T, W) for a longer context, without new training: (length, W).

    The first `kept` positions stay, which most training captions reach; the ones after them are spread over the rest of
    the longer context, with linear interpolation between them and linear extrapolation past the last one. From 77 to
    248 this is Long-CLIP's knowledge-preserved stretching (Zhang et al., ECCV 2024, arXiv:2403.15378).

    Raises:
      ValueError: the new context is not longer, or shorter than what is kept.
    """
    old = positions.shape[0]
    if length <= old or not 0 <= kept < old - 1:
        raise ValueError(f"context of {old} tokens, {kept} kept: cannot be stretched to {length}")
    place = np.arange(length, dtype=np.float64)
    place[kept:] = kept + (place[kept:] - kept) * (old - kept) / (length - kept)
    low = np.minimum(place.astype(int), old - 2)
    high_weight = (place - low).astype(np.float32)[:, None]  # above 1 past the last position
    positions = jnp.asarray(positions)
    return (1 - high_weight) * positions[low] + high_weight * positions[low + 1]


def stretch_context(params: Any, length: int) -> Any:
    """Parameters, a nested dict, for a longer `text.context_length`, see `stretch_text_positions`."""
    positions = stretch_text_positions(params["text"]["position_embedding"], length)
    return {**params, "text": {**params["text"], "position_embedding": positions}}


def table(origins: list[Origin]) -> str:
    """Counts by kind, then every parameter that was not simply loaded."""
    counts = collections.Counter(origin.kind for origin in origins)
    lines = ["weights: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("loaded", "resized", "fresh", "left over"))]
    lines += [f"  {kind:10}{name}  {detail}" for name, kind, detail in origins if kind != "loaded"]
    return "\n".join(lines)
