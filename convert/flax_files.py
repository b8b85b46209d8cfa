"""Flax parameters as one .safetensors file: paths as names, the `model` section in its metadata."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flair_jax.configs import variants
from flair_jax.convert import names, released, torch_files
from flair_jax.convert.tables import ConversionError, flatten, pair, refuse, unflatten

KEY = "flair_jax"
FORMAT = 1
FOLDER_FILE = "model.safetensors"
# Keys of a `model` section that do not change what given weights compute: starting values, what training alone does,
# and how a result is computed.
FREE = {
    "init_logit_scale", "init_logit_bias", "vision.position_std", "vision.init", "vision.patch_dropout",
    "decoder.dropout",
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


def file_of(path: str | os.PathLike) -> Path:
    """The weights file of a folder of `flair_jax.push`; any other path as it is."""
    inside = Path(path, FOLDER_FILE)
    return inside if Path(path).is_dir() and inside.is_file() and is_flax(inside) else Path(path)


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
        if not isinstance(name := model.get("name", "flair"), str):
            raise TypeError(f"model.name is {name!r}")
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

    def value(section: Mapping[str, Any], key: str) -> Any:
        part = key.partition(".")[0]
        absent = part != key and part in section  # the part itself is a value: None
        return None if absent else section.get(key, defaults.get(key))

    differences = [
        f"model.{key} is {value(given, key)!r}, the file says {value(stored, key)!r}"
        for key in sorted(stored.keys() | given.keys())
        if key not in FREE and value(given, key) != value(stored, key)
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
            flat[f"{prefix}{key}"] = pair(value)
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return flat


def load(
    path: str | os.PathLike,
    model: Mapping[str, Any] | None = None,
    gelu: str | None = None,
    *,
    lora_scale: float = 1.0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads weights of either side into Flax.

    Args:
      path: a file of `write`, a folder of `flair_jax.push`, or a file or folder with PyTorch's names, see
        `released.read`.
      model: the `model` section; None: the one in the file, or the one that PyTorch's shapes tell (`infer_config`).
      gelu: the activation, for a file that does not say it, where there is no `model` to say it.
      lora_scale: of pairs of LoRA in the file, see `released.read`.

    Returns:
      The parameter tree, float32, and the `model` section.

    Raises:
      ConversionError: names, shapes or dtypes do not fit, a number is not finite, `model` or `gelu` is another one than
        the file says, or nobody says the activation. WeightsFileError, OSError: see `released.read`.
    """
    path = file_of(path)
    if path.is_dir() or not is_flax(path):
        return from_torch(released.read(path, lora_scale), path, model, gelu)
    arrays, stored = read(path)
    refuse_not_finite(arrays, path)
    check_same_gelu(stored.get("gelu", "exact"), gelu, path)
    if model is None:
        model = stored
    else:
        check_same_model(stored, model, path)
    table = names.table(model.get("name", "flair"), towers=names.section_towers(model))
    refuse(table.find_problems(arrays, "flax", model), len(arrays), table.model)
    return unflatten({name: array.astype(np.float32, copy=False) for name, array in arrays.items()}), dict(model)


def from_torch(
    weights: released.Weights,
    path: str | os.PathLike,
    model: Mapping[str, Any] | None = None,
    gelu: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turns weights with PyTorch's names into Flax; `load` for what was read from `path` already."""
    refuse_not_finite(weights.arrays, path)
    if gelu is not None and weights.gelu is not None:
        check_same_gelu(weights.gelu, gelu, path)
    gelu = gelu or weights.gelu
    if model is None:
        table = names.recognize(weights.arrays)
        model = weights.section or _inferred(weights.arrays, table.model, gelu, path)
    else:
        model = dict(model)
        if weights.section is not None:
            check_same_model(weights.section, model, path)
        several = model.get("name", "flair") in names.SEVERAL_GELUS
        if gelu is not None:
            check_same_gelu(gelu, model.setdefault("gelu", gelu), path)
        elif "gelu" not in model and several:
            raise ConversionError(f"{path}: {names.ASK_GELU}")
        elif several:
            warnings.warn(
                f"{path} does not say which GELU its model was trained with; it is taken as {model['gelu']!r}, as the "
                "model section has it (OpenAI's weights and those fine-tuned from them need 'quick')",
                stacklevel=2,
            )
    return names.to_flax(weights.arrays, model.get("name", "flair"), model), dict(model)


def _inferred(arrays: Mapping[str, np.ndarray], model: str, gelu: str | None, path: str | os.PathLike) -> dict:
    try:
        return names.infer_config(arrays, model, gelu)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}", error.problems) from error


def check_same_gelu(stored: str, given: str | None, path: str | os.PathLike) -> None:
    """Raises ConversionError if an activation is given that is not the stored one."""
    if given is not None and names.checked_gelu(given) != stored:
        raise ConversionError(f"{path} holds the weights of another model: gelu is {given!r}, the file says {stored!r}")
