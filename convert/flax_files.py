"""Flax parameters as one .safetensors file: paths as names, the `model` section in its metadata."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from flair_jax.convert import names, torch_files
from flair_jax.convert.tables import flatten, refuse, unflatten

KEY = "flair_jax"
FORMAT = 1


def write(path: str | os.PathLike, params: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Writes a parameter tree and the `model` section that builds its module.

    Raises:
      WeightsFileError: the suffix is not .safetensors. OSError: the file cannot be written.
    """
    if torch_files.suffix_of(path) != ".safetensors":
        raise torch_files.WeightsFileError(f"{path}: Flax parameters are written as .safetensors")
    header = json.dumps({"format": FORMAT, "model": model}, default=dict)  # ConfigDict -> dict
    torch_files.write(path, flatten(params), {KEY: header})


def is_flax(path: str | os.PathLike) -> bool:
    """Whether `write` wrote the file."""
    return torch_files.suffix_of(path) == ".safetensors" and KEY in torch_files.metadata(path)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `write` wrote, without looking at names and shapes.

    Returns:
      Arrays by path ("text/ln_final/scale") and the `model` section.

    Raises:
      WeightsFileError: the file is damaged or `write` did not write it. OSError: it cannot be opened.
    """
    arrays = torch_files.read(path)
    if not is_flax(path):
        raise torch_files.WeightsFileError(f"{path} holds no Flax parameters: no {KEY!r} in its metadata")
    try:
        header = json.loads(torch_files.metadata(path)[KEY])
        version, model = header["format"], dict(header["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise torch_files.WeightsFileError(f"{path}: the metadata {KEY!r} is damaged: {error!r}") from error
    if version != FORMAT:
        raise torch_files.WeightsFileError(f"{path} has format {version!r}; this version reads {FORMAT}")
    return arrays, model


def load(path: str | os.PathLike, model: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads weights of either side into Flax.

    Args:
      path: a file of `write`, or one with PyTorch's names (.safetensors, .pt, .pth, .bin).
      model: the `model` section; None: the one in the file, or the one that PyTorch's shapes tell (`infer_config`).

    Returns:
      The parameter tree, float32, and the `model` section.

    Raises:
      ConversionError: names, shapes or dtypes do not fit. WeightsFileError, OSError: see `torch_files.read`.
    """
    if not is_flax(path):
        weights = torch_files.read(path)
        model = names.infer_config(weights) if model is None else model
        return names.to_flax(weights, model.get("name", "flair"), model), dict(model)
    arrays, stored = read(path)
    model = stored if model is None else model
    table = names.table(model.get("name", "flair"))
    refuse(table.find_problems(arrays, "flax", model), len(arrays), table.model)
    return unflatten({name: array.astype(np.float32, copy=False) for name, array in arrays.items()}), dict(model)
