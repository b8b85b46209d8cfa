"""Weights as their makers release them: arrays by PyTorch name, and what the file says of the model beside shapes.

A checkpoint that FSC-CLIP's code saved of a run with LoRA has all weights of the model and the pairs beside them,
`NAME.lora_A` (r, in) and `NAME.lora_B` (out, r) for `NAME.weight`, and `NAME_lora_A`, `NAME_lora_B` for `NAME`, the
fused input projection. They are added to the weights as that code adds them (`flair_jax.lora`), with its alpha of 1.
"""

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flair_jax.convert import hugging_face, names, torch_files, torch_script
from flair_jax.convert.tables import HALVES, Arrays, ConversionError

# Name of the weight without ".weight", what joins, and the side of a pair.
PAIR = re.compile(r"(.+?)(\.|_)lora_([AB])")
# The weights that FSC-CLIP's code adapts. What else is called so belongs to some other code, with other rules.
ADAPTED = re.compile(r".+\.(conv1|out_proj|c_fc|c_proj)\.weight|.+\.in_proj_weight")
OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}  # tensors that only OpenAI's archives have


class Weights(NamedTuple):
    """What was read.

    Attributes:
      arrays: by the model's own names, see `names.plain`; pairs of LoRA are added to their weights.
      gelu: the activation, where the file or its origin tells it; else None.
      section: the whole `model` section, where the file tells it; else None.
      pairs: how many pairs of LoRA the file had.
    """

    arrays: dict[str, np.ndarray]
    gelu: str | None = None
    section: dict[str, Any] | None = None
    pairs: int = 0


def read(path: str | os.PathLike, lora_scale: float = 1.0) -> Weights:
    """Reads a file or folder with PyTorch's names.

    Args:
      path: .safetensors, .pt, .pth or .bin with a state dict, a training checkpoint or an archive of OpenAI's; or a
        folder of Hugging Face's, or a file of it.
      lora_scale: both matrices of all pairs are multiplied by it, see `lora.scale`.

    Raises:
      ConversionError: a config.json describes another kind of model, or pairs of LoRA do not fit their weights.
      WeightsFileError, ImportError, OSError: see `torch_files.read` and `hugging_face.read`.
    """
    if Path(path).is_dir():
        if Path(path, "checkpoints").is_dir():
            raise torch_files.WeightsFileError(
                f"{path} is the work directory of a run: flair_jax.load({os.fspath(path)!r}).save('x.safetensors') "
                "writes a file that is read here"
            )
        if not hugging_face.is_folder(path):
            raise FileNotFoundError(f"{path} is a folder without the config.json that Hugging Face's folders have")
        arrays, section = hugging_face.read(path)
        return Weights(arrays, section["gelu"], section)
    if torch_files.suffix_of(path) in torch_files.PICKLES and torch_script.is_archive(path):
        archive = torch_script.read(path)
        return Weights(names.plain(archive.tensors), _archive_gelu(archive))
    arrays = names.plain(torch_files.read(path))
    if hugging_face.has_names(arrays):
        arrays, section = hugging_face.described(arrays, Path(path).parent)
        return Weights(arrays, section["gelu"], section)
    found = sum(map(is_pair, arrays)) // 2
    if found:
        arrays, rank = merge_pairs(arrays, path, lora_scale)
        warnings.warn(
            f"{path}: {found} pairs of LoRA of rank {rank} are added to their weights, with FSC-CLIP's alpha of 1",
            stacklevel=2,
        )
    return Weights(arrays, pairs=found)


def is_pair(name: str) -> bool:
    """Whether a name is that of one side of a pair of LoRA in a checkpoint of FSC-CLIP's."""
    return bool((match := PAIR.fullmatch(name)) and ADAPTED.fullmatch(weight_of(match)))


def weight_of(match: re.Match) -> str:
    """The name of the weight that a pair is of."""
    return match[1] + (".weight" if match[2] == "." else "")


def has_pairs(path: str | os.PathLike) -> bool:
    """Whether a file holds pairs of LoRA beside weights. Raises WeightsFileError, OSError: see `torch_files.read`."""
    return any(map(is_pair, names.plain(torch_files.read(path))))


def merge_pairs(arrays: Arrays, path: str | os.PathLike, scale: float = 1.0) -> tuple[dict[str, np.ndarray], int]:
    """The weights with their pairs of LoRA added: W + B A / r, float32.

    Args:
      arrays: weights and pairs by PyTorch name.
      path: of the file, for the error.
      scale: both matrices of a pair are multiplied by it.

    Returns:
      The weights alone, and the rank r, which is that of all pairs.

    Raises:
      ConversionError: naming every pair that lacks a side, its weight, or the dtype and shape that these have.
    """
    merged = {name: array for name, array in arrays.items() if not is_pair(name)}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in filter(is_pair, arrays):
        match = PAIR.fullmatch(name)
        pairs.setdefault(weight_of(match), {})[match[3]] = arrays[name]
    problems, ranks = [], {}
    for name, pair in pairs.items():
        weight = merged.get(name)
        parts = [*pair.values()] if weight is None else [weight, *pair.values()]
        rank, expected = _sides(weight, pair)
        if {side: array.shape for side, array in pair.items()} == expected and all(map(_is_floating, parts)):
            ranks[name] = rank
            a, b = (np.float32(scale) * pair[side].astype(np.float32) for side in "AB")
            merged[name] = weight.astype(np.float32) + (b @ a).reshape(weight.shape) / np.float32(rank)
            continue
        found = ", ".join(f"{side} {array.dtype} {array.shape}" for side, array in sorted(pair.items()))
        of = "is not in the file and" if weight is None else f"{weight.dtype} {weight.shape}"
        problems.append(f"{name} {of} has {found}" + (f"; expected {expected}" if expected else ""))
    if not problems and len(set(ranks.values())) > 1:
        problems = [f"{name} has a pair of rank {rank}; expected one rank for all" for name, rank in ranks.items()]
    if problems:
        some = "\n  ".join(problems[:10]) + (" …" if len(problems) > 10 else "")
        raise ConversionError(f"{path}: {len(problems)} pairs of LoRA do not fit, nothing was converted:\n  {some}")
    return merged, next(iter(ranks.values()))


def _sides(weight: np.ndarray | None, pair: dict[str, np.ndarray]) -> tuple[int, dict[str, tuple[int, int]]]:
    """The rank of a pair, and the shapes that its sides have for such a weight; none where there are none."""
    if weight is None or weight.ndim not in (2, 4) or pair.get("A", weight).ndim != 2:
        return 0, {}
    # Of a convolution (out, in, k, k) A is (k r, k in) and B (k out, k r): B A is laid into it row by row.
    side = weight.shape[-1] if weight.ndim == 4 else 1
    rank = max(1, len(pair["A"]) // side) if "A" in pair else 1
    return rank, {"A": (rank * side, weight.shape[1] * side), "B": (weight.shape[0] * side, rank * side)}


def _is_floating(array: np.ndarray) -> bool:
    return array.dtype == np.float32 or array.dtype in HALVES


def _archive_gelu(archive: torch_script.Archive) -> str | None:
    """By the class of the activation, where it is a module; otherwise by the marks of OpenAI's archives."""
    if "QuickGELU" in archive.classes:
        return "quick"
    if "GELU" in archive.classes:
        return None  # exact or tanh: the class has both
    return "quick" if archive.tensors.keys() >= OPENAI_SIZES else None
