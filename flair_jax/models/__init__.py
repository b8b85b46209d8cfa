"""Models from the `model` section of a config: parts, and the module that holds them."""

import dataclasses
import numbers
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
# Sizes of the parts; their other keys are options.
SIZES = ("patch_size", "width", "depth", "heads", "context_length", "vocab_size", "hidden", "regions")
FLOAT32_PARTS = ("pooling",)  # whose gradients objectives sum over chunks and devices


def create(model: Mapping[str, Any]) -> DualEncoder:
    """Builds the model of a config.

    Args:
      model: the `model` section, see `configs.variants`. `name` says whose parameters it has, for conversion; what is
        built follows from the other keys alone.

    Raises:
      TypeError: a key is unknown or missing.
      ValueError: there is no such preprocessing or dtype, a size is no positive integer, or heads do not divide their
        width.
    """
    options = dict(model)
    options.pop("name", None)
    dtype = _float_type(options.pop("dtype", "float32"))
    compute = ComputeOptions(dtype, **{key: options.pop(key) for key in COMPUTE if key in options})
    parts = {key: dict(options.pop(key)) for key in PARTS if options.get(key) is not None}
    if options.get("embed_dim") is not None:
        _check_size("embed_dim", options["embed_dim"])
    for name, part in parts.items():
        _check_part(name, {"width": options.get("embed_dim"), **part} if name == "pooling" else part)
    # A tower that is None is none; one that is missing is a mistake, which the module reports.
    absent = {f"{key}_options": None for key in PARTS if key in options}
    for key in PARTS:
        options.pop(key, None)
    if "vision" in parts:
        parts["vision"]["image_size"] = pair(parts["vision"]["image_size"])  # JSON gives back a list
    frozen = absent | {f"{key}_options": FrozenDict(value) for key, value in parts.items()}  # a model can be hashed
    if unknown := options.keys() - {field.name for field in dataclasses.fields(DualEncoder)} - {"preprocess"}:
        raise TypeError(f"the model section has the unknown keys {sorted(unknown)}")
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


def _float_type(name: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"model.dtype is {name!r}; expected a type of floats, such as 'float32' or 'bfloat16'")
    return dtype


def _check_part(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError naming a size of a part that makes no model."""
    for key in SIZES:
        if key in options:
            _check_size(f"{name}.{key}", options[key])
    if {"width", "heads"} <= options.keys() and options["width"] % options["heads"]:
        of = "model.embed_dim" if name == "pooling" else f"model.{name}.width"
        raise ValueError(f"model.{name}.heads is {options['heads']}, which does not divide {of}, {options['width']}")


def _check_size(key: str, size: Any) -> None:
    if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
        raise ValueError(f"model.{key} is {size!r}; expected a positive integer")
