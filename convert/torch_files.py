"""Reading and writing PyTorch's weight files without running anything that is in them.

.safetensors and TorchScript archives need no PyTorch; other .pt, .pth and .bin are pickles and are read by PyTorch's
restricted reader only.
"""

import contextlib
import errno
import os
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from flair_jax.convert import torch_script
from flair_jax.convert.errors import UnsafeFileError, WeightsFileError
from flair_jax.convert.names import state_dict_of

PICKLES = (".pt", ".pth", ".bin")


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a file, by name, in the dtype that they have there.

    Args:
      path: .safetensors, or .pt, .pth or .bin with a state dict, a training checkpoint (`{"state_dict": …}`) or a
        TorchScript archive.

    Raises:
      UnsafeFileError: a pickle carries more than tensors and plain values.
      WeightsFileError: the suffix is unknown, the file is damaged, or a value is no dense tensor.
      ImportError: a pickle, and PyTorch is not installed.
      OSError: the file cannot be opened.
    """
    if suffix_of(path) == ".safetensors":
        with _reading(path):
            return safetensors.numpy.load_file(path)
    if torch_script.is_archive(path):
        return torch_script.read(path).tensors
    return _read_pickle(Path(path))


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """The free text that a .safetensors file carries beside its tensors.

    Raises:
      WeightsFileError: the file is damaged. OSError: it cannot be opened.
    """
    with _reading(path), safetensors.safe_open(path, "numpy") as file:
        return file.metadata() or {}


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], text: Mapping[str, str] | None = None) -> None:
    """Writes tensors by name. The file appears complete or not at all; an older one is replaced.

    Args:
      path: .safetensors, or .pt, .pth or .bin for `torch.load`.
      tensors: arrays by name.
      text: metadata, .safetensors only.

    Raises:
      WeightsFileError: the suffix is unknown.
      ImportError: a pickle, and PyTorch is not installed.
      OSError: the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; make it first")
    # safetensors writes the memory of an array as it lies there, so a transposed view would come back scrambled.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    if suffix_of(path) == ".safetensors":
        with replacing(path) as partial:
            safetensors.numpy.save_file(arrays, partial, dict(text) if text else None)
        return
    torch = _import_torch(path)
    with replacing(path) as partial:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, partial)


def suffix_of(path: str | os.PathLike) -> str:
    """The suffix that names the format.

    Raises:
      WeightsFileError: it is not one of those known.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", *PICKLES):
        known = ", ".join((".safetensors", *PICKLES))
        raise WeightsFileError(f"{path}: the suffix {suffix!r} names no format of weights; expected one of {known}")
    return suffix


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path)
    with _reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What it warns of is refused below or by itself.
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise WeightsFileError(f"{path} holds a {type(content).__name__}; expected a state dict, tensors by name")
    weights = state_dict_of(content)
    strange = [
        f"{name!r}: {type(value).__name__}"
        for name, value in weights.items()
        if not (isinstance(name, str) and torch.is_tensor(value) and _is_dense(torch, value))
    ]
    if strange:
        some = ", ".join(strange[:10]) + (" …" if len(strange) > 10 else "")
        raise WeightsFileError(
            f"{path}: {len(strange)} of {len(weights)} entries are not dense tensors ({some}); "
            'save the state dict itself, or {"state_dict": …}'
        )
    return {name: _to_numpy(torch, value) for name, value in weights.items()}


def _is_dense(torch: types.ModuleType, tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"


def _to_numpy(torch: types.ModuleType, tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own.
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _import_torch(path: Path) -> types.ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: {path.suffix} files need PyTorch: `pip install -e '.[torch]'`, or use .safetensors"
        ) from error
    return torch


@contextlib.contextmanager
def _reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the readers raise into an error that names the file and says what to do."""
    with Path(path).open("rb"):  # A missing or forbidden file fails here, in the words of the system.
        pass
    try:
        yield
    except Exception as error:  # A damaged pickle can raise anything.
        # PyTorch looks for the directory of a ZIP that is cut short at a negative position.
        if isinstance(error, MemoryError | OSError) and getattr(error, "errno", None) != errno.EINVAL:
            raise
        message = str(error)
        if type(error).__name__ == "UnpicklingError":
            # Only the name of what was found: the advice around it is to switch the protection off.
            found = re.search(r"GLOBAL [\w.]+|(?i:unsupported) (class|operand) [\w.]+", message)
            raise UnsafeFileError(
                f"{path} carries code or objects beside tensors ({found[0] if found else 'a foreign pickle'}). Nothing "
                "of it was run. Ask for a file with the state dict alone, best as .safetensors; if you trust its "
                "source, load it in PyTorch yourself and save `model.state_dict()`"
            ) from error
        if isinstance(error, AttributeError):  # safetensors looks for the type in NumPy
            raise WeightsFileError(f"{path} holds a type of numbers that NumPy does not have: {message}") from error
        raise WeightsFileError(
            f"{path} cannot be read as {Path(path).suffix}: {message or type(error).__name__}. It is cut short, "
            "damaged or of another format; fetch it again and compare its size"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(f"{path} was not written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
