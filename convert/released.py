"""Weights as their makers release them: arrays by PyTorch name, and what the file says of the model beside shapes."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flair_jax.convert import hugging_face, names, torch_files, torch_script

OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}  # tensors that only OpenAI's archives have


class Weights(NamedTuple):
    """What was read.

    Attributes:
      arrays: by the model's own names, see `names.plain`.
      gelu: the activation, where the file or its origin tells it; else None.
      section: the whole `model` section, where the file tells it; else None.
    """

    arrays: dict[str, np.ndarray]
    gelu: str | None = None
    section: dict[str, Any] | None = None


def read(path: str | os.PathLike) -> Weights:
    """Reads a file or folder with PyTorch's names.

    Args:
      path: .safetensors, .pt, .pth or .bin with a state dict, a training checkpoint or an archive of OpenAI's; or a
        folder of Hugging Face's, or a file of it.

    Raises:
      ConversionError: a config.json describes another kind of model.
      WeightsFileError, ImportError, OSError: see `torch_files.read` and `hugging_face.read`.
    """
    if Path(path).is_dir():
        arrays, section = hugging_face.read(path)
        return Weights(arrays, section["gelu"], section)
    if torch_files.suffix_of(path) in torch_files.PICKLES and torch_script.is_archive(path):
        archive = torch_script.read(path)
        return Weights(names.plain(archive.tensors), _archive_gelu(archive))
    arrays = names.plain(torch_files.read(path))
    if hugging_face.has_names(arrays):
        arrays, section = hugging_face.described(arrays, Path(path).parent)
        return Weights(arrays, section["gelu"], section)
    return Weights(arrays)


def _archive_gelu(archive: torch_script.Archive) -> str | None:
    """By the class of the activation, where it is a module; otherwise by the marks of OpenAI's archives."""
    if "QuickGELU" in archive.classes:
        return "quick"
    if "GELU" in archive.classes:
        return None  # exact or tanh: the class has both
    return "quick" if archive.tensors.keys() >= OPENAI_SIZES else None
