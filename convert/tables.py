"""What any table of names can do: read sizes from a file, report all that does not fit, convert either way."""

import collections
import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

Side = Literal["torch", "flax"]
Arrays = Mapping[str, np.ndarray]  # by PyTorch name or by Flax path, "text/ln_final/scale"
Sizes = Mapping[str, int]

LINEAR = (1, 0)  # (out, in) -> (in, out)
CONVOLUTION = (2, 3, 1, 0)  # (out, in, height, width) -> (height, width, in, out)
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
KINDS = ("missing", "unknown", "shape", "dtype")
DEEPEST = 1000  # blocks of a tower whose names are listed, whatever the file has


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that does not fit; `kind` is one of `KINDS`."""

    kind: str
    name: str
    expected: str = ""
    found: str = ""

    def __str__(self):
        detail = ", ".join(f"{word} {value}" for word in ("expected", "found") if (value := getattr(self, word)))
        return f"{self.kind:8}{self.name}: {detail}"


class ConversionError(ValueError):
    """Weights or a model section that do not fit. `problems` holds every one that was found."""

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()):
        super().__init__(message)
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter, or one of every block.

    Attributes:
      torch, flax: both names; `{i}` is the number of the block.
      shape: PyTorch's shape, words of the form "3", "width" or "3*width" between spaces.
      axes: Flax axis a is PyTorch axis `axes[a]`; empty: the arrays are equal.
      repeat: the size that counts the blocks.
      hint: what to do when it is missing.
      parts: PyTorch has the parameter in pieces, which are stacked along its first axis; they stand for the `{part}`
        in its name, and the first word of the shape begins with their number.
      ones: so many axes of size 1 come first in PyTorch alone.
    """

    torch: str
    flax: str
    shape: str = ""
    axes: tuple[int, ...] = ()
    repeat: str = ""
    hint: str = ""
    parts: tuple[str, ...] = ()
    ones: int = 0

    def template(self, side: Side) -> str:
        return self.torch if side == "torch" else self.flax

    def names(self, side: Side, block: int) -> tuple[str, ...]:
        """One name, or one for each part."""
        name = self.template(side).replace("{i}", str(block))
        return tuple(name.replace("{part}", part) for part in self.parts) if "{part}" in name else (name,)

    def pattern(self, side: Side) -> re.Pattern:
        """Matches the names of all blocks, the number as its group."""
        pattern = "(0|[1-9][0-9]*)".join(map(re.escape, self.template(side).split("{i}")))
        return re.compile(pattern.replace(re.escape("{part}"), f"(?:{'|'.join(map(re.escape, self.parts))})"))

    def words(self, side: Side) -> list[str]:
        """The shape of an array on one side, not yet numbers."""
        words = self.shape.split()
        if side == "flax":
            return [words[axis] for axis in self.axes] if self.axes else words[self.ones :]
        return [words[0].removeprefix(f"{len(self.parts)}*"), *words[1:]] if self.parts else words

    def convert(self, arrays: Sequence[np.ndarray], to: Side) -> list[np.ndarray]:
        """The arrays as the other side has them, C-contiguous float32."""
        arrays = [array.astype(np.float32, copy=False) for array in arrays]
        if to == "flax":
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            array = array.reshape(array.shape[self.ones :])
            return [np.asarray(array.transpose(self.axes) if self.axes else array, order="C")]
        array = arrays[0].transpose(np.argsort(self.axes).tolist()) if self.axes else arrays[0]
        array = array.reshape((1,) * self.ones + array.shape)
        return [np.asarray(part, order="C") for part in (np.split(array, len(self.parts)) if self.parts else [array])]


@dataclasses.dataclass(frozen=True)
class Table:
    """All of one model in one layout: its rules, and its sizes out of a `model` section and back.

    `layout` is a key of `rules.LAYOUTS`.
    """

    model: str
    layout: str
    rules: tuple[Rule, ...]
    sizes: Callable[[Mapping[str, Any]], Sizes]
    config: Callable[[Sizes], dict[str, Any]]

    def find_problems(self, arrays: Arrays, side: Side, config: Mapping[str, Any] | None) -> tuple[Problem, ...]:
        """Compares names, shapes and dtypes: everything that does not fit, in the order of `KINDS`.

        Args:
          arrays: by the names of `side`.
          config: the `model` section that the shapes must have; None: they must agree with each other.

        Raises:
          ConversionError: the section itself does not fit the model.
        """
        sizes = self.measure(arrays, side) if config is None else self._config_sizes(config)
        for repeat in {rule.repeat for rule in self.rules if rule.repeat}:
            if sizes[repeat] > max(len(arrays), DEEPEST):  # a section is not trusted: its names would fill the memory
                raise ConversionError(f"model.{repeat} is {sizes[repeat]:,}, and the file has {len(arrays):,} tensors")
        rules = {name: rule for old, _, rule in self._names(side, sizes) for name in old}
        problems = []
        for name, rule in rules.items():
            shape = _expected_shape(rule, side, sizes)
            if name not in arrays:
                problems.append(Problem("missing", name, f"shape {shape}{rule.hint}"))
                continue
            array = arrays[name]
            if _show(array.shape) != shape:
                problems.append(Problem("shape", name, shape, _show(array.shape)))
            if array.dtype != np.float32 and array.dtype not in HALVES:
                problems.append(Problem("dtype", name, "float32, float16 or bfloat16", str(array.dtype)))
        for name, array in arrays.items():
            if name not in rules:
                problems.append(Problem("unknown", name, found=f"shape {_show(array.shape)}"))
        return tuple(sorted(problems, key=lambda problem: KINDS.index(problem.kind)))

    def convert(self, arrays: Arrays, side: Side, config: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        """Renames and transposes all arrays to the other side as float32, once all of them fit.

        Raises:
          ConversionError: with all of `find_problems`.
        """
        refuse(self.find_problems(arrays, side, config), len(arrays), self.model)
        halves = collections.Counter(str(array.dtype) for array in arrays.values() if array.dtype in HALVES)
        for dtype, count in halves.items():
            warnings.warn(f"{count} of {len(arrays)} tensors are {dtype}; cast to float32", stacklevel=3)
        other = "flax" if side == "torch" else "torch"
        converted = {}
        for old, new, rule in self._names(side, self.measure(arrays, side)):
            converted |= zip(new, rule.convert([arrays[name] for name in old], other), strict=True)
        return converted

    def measure(self, arrays: Arrays, side: Side) -> Sizes:
        """Every size that the arrays tell, each by majority, so that one wrong tensor is reported and not believed."""
        votes, blocks = collections.defaultdict(collections.Counter), collections.defaultdict(set)
        for rule in self.rules:
            words, pattern = rule.words(side), rule.pattern(side)
            for name, match in ((name, pattern.fullmatch(name)) for name in arrays):
                if match is None:
                    continue
                if rule.repeat:
                    blocks[rule.repeat].add(match[1])
                if arrays[name].ndim == len(words):
                    for word, size in zip(words, arrays[name].shape, strict=True):
                        votes[word][size] += 1
        sizes = {word: counter.most_common(1)[0][0] for word, counter in votes.items()}
        # Distinct numbers, not the largest: a gap shows as one missing and one unknown block. At least one, so that a
        # tower without any block is reported.
        return sizes | {rule.repeat: len(blocks[rule.repeat]) or 1 for rule in self.rules if rule.repeat}

    def _config_sizes(self, config: Mapping[str, Any]) -> Sizes:
        try:
            model, sizes = config["name"], self.sizes(config)
        except KeyError as error:
            raise ConversionError(f"the model section lacks {error}; configs/variants.py has a complete one") from error
        except (TypeError, ZeroDivisionError) as error:
            raise ConversionError(f"the model section does not hold sizes: {error}") from error
        if wrong := {key: size for key, size in sizes.items() if type(size) is not int or size < 1}:
            raise ConversionError(f"the model section has the sizes {wrong}; expected positive integers")
        if model != self.model:
            raise ConversionError(f"the model section is for {model!r}; expected {self.model!r}")
        return sizes

    def _names(self, side: Side, sizes: Sizes) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Rule]]:
        """The names on this side, those on the other, and the rule; all of one block before the next."""
        other = "flax" if side == "torch" else "torch"
        for repeat, group in itertools.groupby(self.rules, key=lambda rule: rule.repeat):
            rules = list(group)
            for i in range(sizes[repeat] if repeat else 1):
                yield from ((rule.names(side, i), rule.names(other, i), rule) for rule in rules)


def pair(size: Any) -> tuple[int, int]:
    """The size of an image as (height, width): of a square's side, or of a pair, which JSON gives back as a list.

    `data.transforms.images.pair` for files: weights are converted without the data's packages.

    Raises:
      ConversionError: it is neither.
    """
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int] or min(sides) < 1:
        raise ConversionError(f"model.vision.image_size is {size!r}; expected a positive integer or (height, width)")
    return sides[0], sides[1]


def refuse(problems: tuple[Problem, ...], names: int, model: str) -> None:
    """Raises a ConversionError if there are problems in a file of `names` arrays."""
    if not problems:
        return
    counts = collections.Counter(problem.kind for problem in problems)
    if counts["unknown"] == names:
        some = ", ".join(problem.name for problem in problems if problem.kind == "unknown")[:100]
        raise ConversionError(f"not one of the {names} names is a {model!r} weight: {some or 'no arrays'} …", problems)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    lines = [f"these are not the weights of such a {model!r} model, nothing was converted ({summary}):", *problems]
    raise ConversionError("\n  ".join(map(str, lines)), problems)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dict -> arrays by path."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: np.asarray(value)}
    return flat


def unflatten(flat: Arrays) -> dict[str, Any]:
    """Arrays by path -> nested dict. No path may run through another."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def _expected_shape(rule: Rule, side: Side, sizes: Sizes) -> str:
    """As text: a size that nothing in the file tells stays a word."""
    shape = []
    for word in rule.words(side):
        factor, _, name = word.rpartition("*")
        shape.append(word if name.isdigit() or name not in sizes else int(factor or 1) * sizes[name])
    return _show(shape)


def _show(shape) -> str:
    return f"({', '.join(map(str, shape))})"
