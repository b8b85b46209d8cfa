"""TorchScript archives, such as OpenAI's CLIP (ViT-B-32.pt), read without PyTorch and without running their code.

An archive is a ZIP of `data.pkl`, a pickle of modules; `data/0`, `data/1`, …, the storages of their tensors; and code.
`torch.jit.load` compiles that code, and `torch.load(weights_only=True)` refuses the archive. Here the pickle is never
unpickled: its opcodes are interpreted as data, in which a module is a record of attributes and a tensor is a record of
a storage, an offset, a size and strides. No object of the file is called, no code is read, no file is extracted.

The file is not trusted. Each of these is refused: an opcode, function or class that weights do not need; records that
are compressed or overlap, so that no ZIP is larger in memory than on disk; a name that occurs twice or leads out of the
archive; a storage of another length than its tensors say; a tensor that reaches outside of its storage or repeats
numbers of it; and modules that contain each other without end.
"""

import collections
import contextlib
import dataclasses
import errno
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flair_jax.convert.errors import UnsafeFileError, WeightsFileError

STORAGES = {
    "BFloat16Storage": ml_dtypes.bfloat16, "HalfStorage": np.float16, "FloatStorage": np.float32,
    "DoubleStorage": np.float64, "ByteStorage": np.uint8, "CharStorage": np.int8, "ShortStorage": np.int16,
    "IntStorage": np.int32, "LongStorage": np.int64, "BoolStorage": np.bool_,
}  # fmt: skip
# What zipfile, pickletools and numbers out of place raise for a damaged file.
DAMAGE = (
    zipfile.BadZipFile, ArithmeticError, EOFError, LookupError, RuntimeError, TypeError, ValueError, struct.error,
)  # fmt: skip
LARGEST_PICKLE = 2**24  # bytes; that of a CLIP has less than a million
MOST_MODULES = 100_000
DEEPEST = 64  # modules within modules


class Archive(NamedTuple):
    """What an archive holds.

    Attributes:
      tensors: every tensor that is an attribute of a module, by its dotted name.
      classes: names of the modules' classes, such as "Linear".
    """

    tensors: dict[str, np.ndarray]
    classes: frozenset[str]


class _Global(NamedTuple):
    module: str
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class _Module:
    name: str
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file is a TorchScript archive: those of plain tensors have no `constants.pkl`."""
    try:
        with _open(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except DAMAGE:
        return False


def read(path: str | os.PathLike) -> Archive:
    """Reads the tensors of a TorchScript archive, in the dtype that they have there.

    Raises:
      UnsafeFileError: it holds what weights do not need, see above.
      WeightsFileError: it is damaged. OSError: it cannot be opened.
    """
    path = Path(path)
    try:
        with _open(path) as archive:
            records = _records(archive, path.stat().st_size)
            root = _interpret(_read_record(archive, records, "data.pkl"))
            if not isinstance(root, _Module):
                raise WeightsFileError("data.pkl holds no module")
            tensors, classes = _collect(root)
            storages = _read_storages(archive, records, tensors.values())
        arrays = {name: _as_array(tensor, storages) for name, tensor in tensors.items()}
        return Archive(arrays, classes)
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path}: {error}. Nothing of it was run. Ask for a file with the state dict alone, best as .safetensors"
        ) from error
    except DAMAGE as error:
        raise WeightsFileError(
            f"{path} cannot be read as a TorchScript archive: {error or type(error).__name__}. It is cut short, "
            "damaged or of another format; fetch it again and compare its size"
        ) from error


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise WeightsFileError("a record begins before the file") from error
        raise


def _records(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Members by their name below the archive's one folder; only those that are read, and none of them compressed."""
    infos = archive.infolist()
    if twice := [name for name, count in collections.Counter(i.filename for i in infos).items() if count > 1]:
        raise UnsafeFileError(f"the record {twice[0]!r} occurs twice")
    for info in infos:
        if info.filename.startswith("/") or "\\" in info.filename or ".." in info.filename.split("/"):
            raise UnsafeFileError(f"the record {info.filename!r} leads out of the archive")
    folders = {info.filename.partition("/")[0] for info in infos}
    if len(folders) != 1:
        raise WeightsFileError(f"expected one folder in the archive, found {sorted(folders)[:5]}")
    prefix = f"{folders.pop()}/"
    named = {info.filename.removeprefix(prefix): info for info in infos}
    read = {name: info for name, info in named.items() if re.fullmatch(r"data\.pkl|byteorder|data/[0-9]+", name)}
    for name, info in read.items():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise UnsafeFileError(f"the record {name!r} is compressed or encrypted, which PyTorch never does")
    # Records that are stored as they are can only be larger than the file if they overlap.
    if (total := sum(info.file_size for info in read.values())) > file_size:
        raise UnsafeFileError(f"records of {total:,} bytes in a file of {file_size:,} bytes: they overlap")
    if "byteorder" in read and archive.read(read["byteorder"]) != b"little":
        raise WeightsFileError("the numbers are not little-endian")
    return read


def _read_record(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], name: str) -> bytes:
    if name not in records:
        raise WeightsFileError(f"the record {name!r} is missing")
    if name == "data.pkl" and records[name].file_size > LARGEST_PICKLE:
        raise UnsafeFileError(f"{name} has {records[name].file_size:,} bytes; expected at most {LARGEST_PICKLE:,}")
    return archive.read(records[name])


# -- The pickle, as data -----------------------------------------------------------------------------------------------

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
}  # fmt: skip
LISTS = {f"build_{kind}list" for kind in ("int", "double", "bool", "tensor")}


def _interpret(data: bytes) -> Any:
    """The object of a pickle, in which functions and classes stay names. Only what TorchScript writes is known."""
    stack, marks, memo = [], [], {}

    def pop_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO":
                if argument != 2:
                    raise WeightsFileError(f"data.pkl has pickle protocol {argument}; expected 2")
            case "STOP":
                return stack.pop()
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in VALUES:
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Global(*argument.split(" ")))
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                items = pop_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items = pop_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(stack[-1], dict)[_expect(key, str)] = value
            case "SETITEMS":
                items = pop_mark()
                keys = [_expect(key, str) for key in items[::2]]  # a tuple's hash can take for ever
                _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(_expect(function, _Global), _expect(arguments, tuple)))
            case "NEWOBJ":
                arguments, kind = stack.pop(), _expect(stack.pop(), _Global)
                if arguments != () or kind.module.split(".")[0] != "__torch__":
                    raise UnsafeFileError(f"data.pkl makes an object of {'.'.join(kind)}")
                stack.append(_Module(kind.name))
            case "BUILD":
                state = stack.pop()
                _expect(stack[-1], _Module).attributes.update(_expect(state, dict))
            case name:
                raise UnsafeFileError(f"data.pkl has the pickle opcode {name}, which weights do not need")
    raise WeightsFileError("data.pkl has no end")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise WeightsFileError(f"data.pkl has a {type(value).__name__} where a {kind.__name__.strip('_')} belongs")
    return value


def _call(function: _Global, arguments: tuple) -> Any:
    """What one of the few functions that TorchScript writes would return."""
    if function == ("torch._utils", "_rebuild_tensor_v2"):
        return _tensor(*arguments[:4])
    if function == ("collections", "OrderedDict") and not arguments:
        return {}
    if function.module == "torch.jit._pickle" and function.name in LISTS:
        return _expect(arguments[0], list)
    if function == ("torch.jit._pickle", "restore_type_tag"):
        return arguments[0]
    raise UnsafeFileError(f"data.pkl calls {'.'.join(function)}, which weights do not need")


def _storage(identifier: Any) -> _Storage:
    """A storage by what stands for it in a pickle: ("storage", type, key, device, count)."""
    _, kind, key, _, count = _expect(identifier, tuple)
    kind = _expect(kind, _Global)
    if kind.module != "torch" or kind.name not in STORAGES:
        raise UnsafeFileError(f"data.pkl refers to {'.'.join(kind)}, which is no storage of numbers")
    if not re.fullmatch("[0-9]+", _expect(key, str)):
        raise UnsafeFileError(f"data.pkl names a storage {key[:100]!r}; expected a number")
    return _Storage(np.dtype(STORAGES[kind.name]), key, _count(count))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    """A tensor that lies within its storage and has no more numbers than it."""
    storage = _expect(storage, _Storage)
    size, stride = (tuple(map(_count, _expect(numbers, tuple))) for numbers in (size, stride))
    last = _count(offset) + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # The second condition: with a stride of 0 a tensor repeats one number as often as it likes.
    if 0 not in size and not (last < storage.count and math.prod(size) <= storage.count):
        raise UnsafeFileError(
            f"a tensor of size {size[:8]} and strides {stride[:8]} does not fit its storage of {storage.count:,}"
        )
    return _Tensor(storage, offset, size, stride)


def _count(value: Any) -> int:
    if not 0 <= _expect(value, int) < 2**48:
        raise UnsafeFileError("a size, stride or offset of a tensor is negative or too large")
    return value


def _collect(root: _Module) -> tuple[dict[str, _Tensor], frozenset[str]]:
    """Tensors by dotted name, and the classes of all modules."""
    tensors, classes, waiting = {}, set(), [("", root, 0)]
    for visited in range(MOST_MODULES + 1):
        if not waiting:
            return tensors, frozenset(classes)
        prefix, module, depth = waiting.pop()
        if depth > DEEPEST or visited == MOST_MODULES:
            raise UnsafeFileError("modules contain each other, or too many of them")
        classes.add(module.name)
        for name, value in module.attributes.items():
            if isinstance(value, _Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
    raise AssertionError("unreachable")


# -- Numbers -----------------------------------------------------------------------------------------------------------


def _read_storages(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], tensors: Iterable[_Tensor]
) -> dict[_Storage, np.ndarray]:
    """The storages of the tensors, once all of them are known to fit the archive."""
    tensors = list(tensors)
    storages, keys = {tensor.storage for tensor in tensors}, {tensor.storage.key for tensor in tensors}
    if len(keys) != len(storages):
        raise UnsafeFileError("a storage is used under two types or lengths")
    for storage in storages:
        expected, name = storage.count * storage.dtype.itemsize, f"data/{storage.key}"
        if name not in records:
            raise WeightsFileError(f"the record {name!r} is missing")
        if records[name].file_size != expected:
            raise WeightsFileError(f"{name} has {records[name].file_size:,} bytes; its tensor has {expected:,}")
    # Tensors may share a storage, as tied weights do; but a small file must not stand for many numbers.
    named, stored = sum(math.prod(t.size) for t in tensors), sum(storage.count for storage in storages)
    if named > 2 * stored:
        raise UnsafeFileError(f"tensors of {named:,} numbers share storages of {stored:,}")
    return {
        storage: np.frombuffer(_read_record(archive, records, f"data/{storage.key}"), storage.dtype)
        for storage in storages
    }


def _as_array(tensor: _Tensor, storages: dict[_Storage, np.ndarray]) -> np.ndarray:
    """A read-only view of the tensor's storage."""
    storage, offset, size, stride = tensor
    if 0 in size:
        return np.empty(size, storage.dtype)
    strides = [step * storage.dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storages[storage][offset:], size, strides, writeable=False)
