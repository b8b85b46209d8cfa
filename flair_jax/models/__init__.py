"""Models by name. A model is one module with `encode_image`, `encode_text`, `score` and `loss`; nobody asks for more."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

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
    sections = {f"{key}_options": dict(options.pop(key)) for key in ("vision", "text", "pooling")}
    return MODELS[name](**options, **sections, loss_options=dict(loss or {}))
