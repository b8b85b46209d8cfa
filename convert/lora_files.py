"""LoRA's pairs as a file of their own, and under the names of FSC-CLIP's code, either way.

Theirs are described in `released`. Ours are `PATH/a` and `PATH/b` for `PATH`, transposed; see `flair_jax.lora`.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from flair_jax.convert import names, released, torch_files
from flair_jax.convert.flax_files import refuse_not_finite
from flair_jax.convert.tables import Arrays, ConversionError, Side, flatten, unflatten

KEY = "flair_jax_lora"
FORMAT = 1
SIDES = {"A": "a", "B": "b"}


def write(
    path: str | os.PathLike, lora: Mapping[str, Any], model: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Writes a tree of pairs as .safetensors, with the `model` and the `lora` section in its metadata.

    Raises:
      WeightsFileError: the suffix is not .safetensors. OSError: the file cannot be written.
    """
    if torch_files.suffix_of(path) != ".safetensors":
        raise torch_files.WeightsFileError(f"{path}: pairs of LoRA are written as .safetensors")
    header = json.dumps({"format": FORMAT, "model": model, "lora": options}, default=dict)
    torch_files.write(path, flatten(lora), {KEY: header})


def is_lora(path: str | os.PathLike) -> bool:
    """Whether `write` wrote the file."""
    return torch_files.suffix_of(path) == ".safetensors" and KEY in torch_files.metadata(path)


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What `write` wrote: the tree of pairs, and the `model` and the `lora` section.

    Raises:
      WeightsFileError: the file is damaged or `write` did not write it. ConversionError: a number is not finite.
      OSError: it cannot be opened.
    """
    arrays = torch_files.read(path)
    if not is_lora(path):
        raise torch_files.WeightsFileError(f"{path} holds no pairs of LoRA: no {KEY!r} in its metadata")
    try:
        header = json.loads(torch_files.metadata(path)[KEY])
        version, model, options = header["format"], dict(header["model"]), dict(header["lora"])
    except (ValueError, KeyError, TypeError) as error:
        raise torch_files.WeightsFileError(f"{path}: the metadata {KEY!r} is damaged: {error!r}") from error
    if version != FORMAT:
        raise torch_files.WeightsFileError(f"{path} has format {version!r}; this version reads {FORMAT}")
    refuse_not_finite(arrays, path)
    return unflatten(arrays), model, options


def to_flax(weights: Arrays, model: str = "clip") -> dict[str, Any]:
    """FSC-CLIP's names -> the tree of pairs, float32.

    Raises:
      ConversionError: a name is none of LoRA's for such a model.
    """
    flat = {}
    for name, array in weights.items():
        match = released.PAIR.fullmatch(name)
        found = match and _translate(released.weight_of(match), "torch", model)
        if not found:
            raise ConversionError(f"{name} is no pair of LoRA for a {model!r} model")
        flat[f"{found}/{SIDES[match[3]]}"] = np.asarray(array.T, np.float32, order="C")
    return unflatten(flat)


def to_torch(lora: Mapping[str, Any], model: str = "clip") -> dict[str, np.ndarray]:
    """The reverse of `to_flax`; for "flair", which FSC-CLIP does not know, in the same manner."""
    found = {}
    for path, array in flatten(lora).items():
        path, _, side = path.rpartition("/")
        name = _translate(path, "flax", model)
        if not name or side not in SIDES.values():
            raise ConversionError(f"{path}/{side} is no pair of LoRA for a {model!r} model")
        stem, joint = (name.removesuffix(".weight"), ".") if name.endswith(".weight") else (name, "_")
        found[f"{stem}{joint}lora_{side.upper()}"] = np.asarray(array.T, order="C")
    return found


def _translate(name: str, side: Side, model: str) -> str | None:
    """The name of a parameter on the other side; None where the model has none of this name."""
    other = "flax" if side == "torch" else "torch"
    for rule in names.table(model).rules:
        if match := rule.pattern(side).fullmatch(name):
            return rule.template(other).replace("{i}", match[1] if match.lastindex else "")
    return None
