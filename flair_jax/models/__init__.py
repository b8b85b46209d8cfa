"""Models by name: one module each, with the methods `encode_image`, `encode_text`, `score` and `loss`."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flair_jax.models.flair import FLAIR

MODELS = {"flair": FLAIR}


def create(model: Mapping[str, Any], loss: Mapping[str, Any] | None = None) -> nn.Module:
    """Builds the model of a config.

    Args:
      model: the `model` section, see `configs.variants`.
      loss: the `loss` section; None for a model that is only evaluated.

    Raises:
      KeyError: the name is unknown. TypeError: a key is unknown or missing.
    """
    options = dict(model)
    name = options.pop("name")
    if name not in MODELS:
        raise KeyError(f"model.name is {name!r}; expected one of {sorted(MODELS)}")
    options["dtype"] = jnp.dtype(options.pop("dtype", "float32"))
    sections = {key: options.pop(key) for key in ("vision", "text", "pooling")} | {"loss": loss or {}}
    frozen = {f"{key}_options": FrozenDict(value) for key, value in sections.items()}  # a model can be hashed
    return MODELS[name](**options, **frozen)


def cast_matrices(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Casts the matrices that are only ever multiplied in `dtype` to it, once for all their uses in a step.

    So devices gather them in `dtype`, and no micro-batch or rematerialised block casts again; gradients pass the cast
    and arrive in float32. The rule: kernels of the towers and both projections. Embeddings, biases, normalisation and
    scalars stay, and so does the pooling, whose gradients the loss sums over chunks and devices in float32.
    """

    def cast(path, leaf):
        first, last = path[0].key, path[-1].key
        matrix = last == "kernel" or last in ("image_projection", "text_projection")
        return leaf.astype(dtype) if matrix and first != "pooling" else leaf

    return jax.tree.map_with_path(cast, params)
