"""Flax parameters as one .safetensors file: paths as names, the `model` section in its metadata."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from flair_jax.configs import variants
from flair_jax.convert import names, torch_files
from flair_jax.convert.tables import ConversionError, flatten, refuse, unflatten

KEY = "flair_jax"
FORMAT = 1
# Keys of a `model` section that do not change what given weights compute: starting values, what training alone does,
# and how a result is computed.
FREE = {
    "init_logit_scale", "init_logit_bias", "vision.position_std", "vision.patch_dropout",
    "dtype", "scan_blocks", "remat", "attention", "micro_batches",
}  # fmt: skip


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


def refuse_not_finite(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Raises ConversionError if any array holds NaN or infinity, naming all of them."""
    bad = {name: count for name, array in arrays.items() if (count := not_finite(array))}
    if bad:
        some = ", ".join(f"{name} ({count:,} of {arrays[name].size:,})" for name, count in list(bad.items())[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ConversionError(f"{path}: numbers are not finite in {some}{more}; the weights are broken")


def not_finite(array: np.ndarray) -> int:
    """How many numbers are infinite or NaN; arrays without numbers have none."""
    try:
        return int(array.size - np.isfinite(array).sum())
    except TypeError:
        return 0


def check_same_model(stored: Mapping[str, Any], given: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Refuses a `model` section under which stored weights would compute something else.

    Shapes do not tell everything: with another number of heads, or another activation, the same weights fit and give
    wrong features. A key that one side lacks has the default of `configs.variants`.

    Args:
      stored: the section that lies beside the weights.
      given: the section to use them with.
      path: of the weights, for the error.

    Raises:
      ConversionError: naming every key that differs, `FREE` aside, with both values.
    """
    stored, given, defaults = (_flat(section) for section in (stored, given, variants.flair().to_dict()))
    differences = [
        f"model.{key} is {given.get(key, defaults.get(key))!r}, the file says {stored.get(key, defaults.get(key))!r}"
        for key in sorted(stored.keys() | given.keys())
        if key not in FREE and given.get(key, defaults.get(key)) != stored.get(key, defaults.get(key))
    ]
    if differences:
        raise ConversionError(f"{path} holds the weights of another model: {'; '.join(differences)}")


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; one form for the size of an image, (height, width)."""
    flat = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == "image_size":
            flat[f"{prefix}{key}"] = (value, value) if isinstance(value, int) else tuple(value)
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return flat


def load(path: str | os.PathLike, model: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads weights of either side into Flax.

    Args:
      path: a file of `write`, or one with PyTorch's names (.safetensors, .pt, .pth, .bin).
      model: the `model` section; None: the one in the file, or the one that PyTorch's shapes tell (`infer_config`).

    Returns:
      The parameter tree, float32, and the `model` section.

    Raises:
      ConversionError: names, shapes or dtypes do not fit, a number is not finite, or `model` is another one than the
        file says. WeightsFileError, OSError: see `torch_files.read`.
    """
    if not is_flax(path):
        weights = names.plain(torch_files.read(path))
        refuse_not_finite(weights, path)
        model = names.infer_config(weights, names.recognize(weights)) if model is None else model
        return names.to_flax(weights, model.get("name", "flair"), model), dict(model)
    arrays, stored = read(path)
    refuse_not_finite(arrays, path)
    if model is None:
        model = stored
    else:
        check_same_model(stored, model, path)
    table = names.table(model.get("name", "flair"))
    refuse(table.find_problems(arrays, "flax", model), len(arrays), table.model)
    return unflatten({name: array.astype(np.float32, copy=False) for name, array in arrays.items()}), dict(model)
