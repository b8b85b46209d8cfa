"""Models from the `model` section of a config: parts, and the module that holds them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flair_jax.data.transforms.images import Preprocessing, pair
from flair_jax.models.dual_encoder import DualEncoder
from flair_jax.models.layers import ComputeOptions

COMPUTE = ("scan_blocks", "remat", "attention", "gelu")  # keys of the section that are fields of ComputeOptions
PARTS = ("vision", "text", "pooling", "decoder")  # keys that are sections of their own
FLOAT32_PARTS = ("pooling",)  # whose gradients objectives sum over chunks and devices


def create(model: Mapping[str, Any]) -> DualEncoder:
    """Builds the model of a config.

    Args:
      model: the `model` section, see `configs.variants`. `name` says whose parameters it has, for conversion; what is
        built follows from the other keys alone.

    Raises:
      TypeError: a key is unknown or missing.
      ValueError: there is no such preprocessing.
    """
    options = dict(model)
    options.pop("name", None)
    dtype = jnp.dtype(options.pop("dtype", "float32"))
    compute = ComputeOptions(dtype, **{key: options.pop(key) for key in COMPUTE if key in options})
    parts = {key: dict(options.pop(key)) for key in PARTS if options.get(key) is not None}
    # A tower that is None is none; one that is missing is a mistake, which the module reports.
    absent = {f"{key}_options": None for key in PARTS if key in options}
    for key in PARTS:
        options.pop(key, None)
    if "vision" in parts:
        parts["vision"]["image_size"] = pair(parts["vision"]["image_size"])  # JSON gives back a list
    frozen = absent | {f"{key}_options": FrozenDict(value) for key, value in parts.items()}  # a model can be hashed
    preprocessing = Preprocessing(**(options.pop("preprocess", None) or {}))
    return DualEncoder(**options, **frozen, compute=compute, preprocessing=preprocessing)


def cast_matrices(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Casts the matrices that are only ever multiplied in `dtype` to it, once for all their uses in a step.

    So devices gather them in `dtype`, and no micro-batch or rematerialised block casts again; gradients pass the cast
    and arrive in float32. The rule: kernels of towers and decoder, and projections into the shared space.
    Embeddings, biases, normalisation and scalars stay, and so do `FLOAT32_PARTS`.
    """

    def cast(path, leaf):
        first, last = path[0].key, path[-1].key
        matrix = last == "kernel" or last.endswith("_projection")
        return leaf.astype(dtype) if matrix and first not in FLOAT32_PARTS else leaf

    return jax.tree.map_with_path(cast, params)
