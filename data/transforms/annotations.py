"""Annotations of captions for hard negatives, in a file beside each shard: `SHARD.annotations`.

A side file, see `side_files`, whose texts are the captions. Parts of many captions share their replacements: each list
of words is stored once a shard, and each word once.
"""

import collections
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import ANNOTATIONS_ENDING
from flair_jax.data.transforms import side_files
from flair_jax.data.transforms.negatives import Annotation, Replaceable, Word

OPENED = 256  # files that a process keeps open
COMMAND = "python -m flair_jax.data.prepare annotate"
KIND = side_files.Kind("annotations", ANNOTATIONS_ENDING, 1, "captions", "negatives need", COMMAND)


def path(shard: str, folder: str | None = None) -> str:
    """The file of a shard's annotations, see `side_files.path`."""
    return side_files.path(shard, folder, KIND)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(target: pathlib.Path, annotations: Iterable[Annotation], about: Mapping[str, Any]) -> int:
    """Writes the annotations of a shard's captions; of equal captions the first counts.

    Args:
      target: a file that the caller gives its name when all is done.
      annotations: of the captions.
      about: what `read_about` returns, fit for JSON: the shard's state, and how the captions were read.

    Returns:
      The number of different captions.
    """
    words = collections.defaultdict(lambda: len(words))  # word -> number
    lists = {}  # id of a list of words -> (its number, the list, which so stays alive, the cumulative weights)
    rows = {}
    for annotation in annotations:
        if annotation.caption in rows:
            continue
        parts = []
        for part in annotation.replaceable:
            number, *_ = lists.setdefault(id(part.words), (len(lists), part.words, part.cumulative))
            parts.append((part.start, part.end, number))
        tokens = [(word.start, word.end, int(word.punctuation)) for word in annotation.words]
        rows[annotation.caption] = tokens, annotation.swaps, parts
    numbers = [np.array([words[word] for word in found], np.uint32) for _, found, _ in lists.values()]
    cumulative = [np.asarray(weights, np.uint32) for _, _, weights in lists.values()]
    spelled = [word.encode("utf-8", "surrogatepass") for word in words]
    arrays = {
        "lists": side_files.joined(numbers, np.uint32),  # numbers of words
        "cumulative": side_files.joined(cumulative, np.uint32),  # weights, within each list
        "list_ends": side_files.ends(map(len, numbers)),  # (L + 1,)
        "words": np.frombuffer(b"".join(spelled), np.uint8),
        "word_ends": side_files.ends(map(len, spelled)),  # (W + 1,)
    }
    side_files.write(target, rows, about, KIND, arrays)
    return len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_about(file: str) -> dict[str, Any]:
    """What `write` was told about a file, see `side_files.read_about`."""
    return side_files.read_about(file, KIND)


class Annotations(NamedTuple):
    """The annotations of some shards, opened by `open_annotations`; cheap to pickle."""

    folder: str | None
    stamp: str  # of the files as they were when they were opened

    def find(self, shard: str, caption: str) -> Annotation:
        """
        Raises:
          ShardError: the caption has no annotation.
        """
        file = path(shard, self.folder)
        found = _opened(file, self.stamp).find(caption)
        if found is None:
            raise ShardError(
                f"{file} has no annotation for {caption!r}: it is stale, or was made of other captions. Annotate again "
                f"with the fields and the splitting of config.data.captions: {COMMAND}"
            )
        return found


def open_annotations(
    shards: Sequence[str], folder: str | None, *, fields: Sequence[str], splitting: str
) -> Annotations:
    """The annotations of all shards, after a look at each file.

    Args:
      shards: all shards of a source.
      folder: of the files; None: beside the shards.
      fields, splitting: of the captions that training draws.

    Raises:
      ShardError: a file is missing, belongs to another state of its shard, or was made of other captions.
    """

    def differs(about: Mapping[str, Any]) -> str:
        if set(fields) <= set(about["fields"]) and about["splitting"] == splitting:
            return ""
        return (
            f"was made of captions.fields {about['fields']} with splitting {about['splitting']!r}; this run has "
            f"{list(fields)} with {splitting!r}"
        )

    return Annotations(folder, side_files.check(shards, folder, KIND, differs))


@functools.lru_cache(maxsize=OPENED)
def _opened(file: str, stamp: str) -> "_File":
    return _File(file)


class _File(side_files.SideFile):
    """One file, with the lists and words that its rows refer to."""

    def __init__(self, file: str):
        super().__init__(file)
        self._ends["list_ends"] = self._opened.get_tensor("list_ends")
        self._ends["word_ends"] = self._opened.get_slice("word_ends")
        self._slices |= {name: self._opened.get_slice(name) for name in ("lists", "cumulative", "words")}

    def find(self, caption: str) -> Annotation | None:
        row = self.row(caption)
        if row is None:
            return None
        words, swaps, parts = row
        return Annotation(
            caption,
            [Word(start, end, bool(mark)) for start, end, mark in words],
            swaps,
            [self._replaceable(*part) for part in parts],
        )

    def word(self, number: int) -> str:
        return self.stored("words", "word_ends", number).decode("utf-8", "surrogatepass")

    def _replaceable(self, start: int, end: int, number: int) -> Replaceable:
        span = self.span("list_ends", number)
        return Replaceable(start, end, _Words(self, *span), _Weights(self, *span))


class _Words(Sequence):
    """The words of a list, of which a draw needs one."""

    def __init__(self, file: _File, start: int, end: int):
        self._file, self._entries = file, range(start, end)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> str:
        entry = self._entries[number]
        return self._file.word(int(self._file.values("lists", entry, entry + 1)[0]))


class _Weights(Sequence):
    """The cumulative weights of a list, read when they are first asked for: a draw needs those of one part."""

    def __init__(self, file: _File, start: int, end: int):
        self._file, self._span = file, (start, end)

    def __len__(self) -> int:
        return self._span[1] - self._span[0]

    @functools.cached_property
    def _values(self) -> np.ndarray:
        return self._file.values("cumulative", *self._span)

    def __getitem__(self, number: int) -> int:
        return int(self._values[number])
