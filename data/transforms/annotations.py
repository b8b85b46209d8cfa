"""Annotations of captions for hard negatives, in a file beside each shard: `SHARD.annotations`.

The file is a safetensors file, of which a draw reads a few hundred bytes. A caption is found by its text, so an
annotation can never be used for another caption, whatever became of the shard. Parts of many captions share their
replacements: each list of words is stored once a shard, and each word once.
"""

import collections
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from flair_jax.data.sources import files
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import ANNOTATIONS_ENDING
from flair_jax.data.transforms.negatives import Annotation, Replaceable, Word

SCHEMA = 1
OPENED = 256  # files that a process keeps open
COMMAND = "python -m flair_jax.data.prepare annotate"


def path(shard: str, folder: str | None = None) -> str:
    """The file of a shard's annotations: beside it, or in a folder.

    Raises:
      ShardError: the shard lies in a store, and there is no folder.
    """
    if folder is not None:
        return os.path.join(os.path.expanduser(folder), os.path.basename(shard.partition("?")[0]) + ANNOTATIONS_ENDING)
    if files.is_remote(shard):
        raise ShardError(f"{shard} lies in a store: give the annotations a folder of this machine")
    return shard + ANNOTATIONS_ENDING


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
        row = [annotation.caption, tokens, annotation.swaps, parts]
        rows[annotation.caption] = json.dumps(row, separators=(",", ":")).encode()
    order = sorted(rows, key=_hash)
    numbers = [np.array([words[word] for word in found], np.uint32) for _, found, _ in lists.values()]
    cumulative = [np.asarray(weights, np.uint32) for _, _, weights in lists.values()]
    spelled = [word.encode("utf-8", "surrogatepass") for word in words]
    arrays = {
        "hashes": np.array([_hash(caption) for caption in order], np.uint64),  # (N,), sorted
        "rows": _joined([np.frombuffer(rows[caption], np.uint8) for caption in order], np.uint8),
        "row_ends": _ends(len(rows[caption]) for caption in order),  # (N + 1,)
        "lists": _joined(numbers, np.uint32),  # numbers of words
        "cumulative": _joined(cumulative, np.uint32),  # weights, within each list
        "list_ends": _ends(map(len, numbers)),  # (L + 1,)
        "words": np.frombuffer(b"".join(spelled), np.uint8),
        "word_ends": _ends(map(len, spelled)),  # (W + 1,)
    }
    metadata = {"annotations": json.dumps({"schema": SCHEMA, "captions": len(rows), **about})}
    safetensors.numpy.save_file(arrays, target, metadata)
    return len(rows)


def _hash(caption: str) -> int:
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _joined(parts: Sequence[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _ends(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_about(file: str) -> dict[str, Any]:
    """What `write` was told about a file.

    Raises:
      ShardError: it holds no annotations, or those of another version.
      OSError: it cannot be read.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {}).get("annotations", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ShardError(f"{file} holds no annotations ({error}): remove it, and annotate again: {COMMAND}") from error
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise ShardError(f"{file} holds no annotations of schema {SCHEMA}: remove it, and annotate again: {COMMAND}")
    return about


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

    def check(shard: str) -> str:
        file = path(shard, folder)
        again = f"annotate the shards first: {COMMAND}"
        try:
            state, about = files.state(file), read_about(file)
            size = files.state(shard).size
        except FileNotFoundError as error:
            raise ShardError(f"{shard} has no annotations, which negatives need: {error}; {again}") from error
        if about["size"] != size:
            raise ShardError(f"{file} is stale: its shard had {about['size']} bytes and has {size}; {again}")
        missing = sorted(set(fields) - set(about["fields"]))
        if missing or about["splitting"] != splitting:
            raise ShardError(
                f"{file} was made of captions.fields {about['fields']} with splitting {about['splitting']!r}; this "
                f"run has {list(fields)} with {splitting!r}; {again}"
            )
        return repr((file, state))

    with concurrent.futures.ThreadPoolExecutor(files.THREADS) as pool:
        states = list(pool.map(check, dict.fromkeys(shards)))
    return Annotations(folder, hashlib.sha256("".join(states).encode()).hexdigest()[:16])


@functools.lru_cache(maxsize=OPENED)
def _opened(file: str, stamp: str) -> "_File":
    return _File(file)


class _File:
    """One file. What is searched for each caption is kept in memory; of the large arrays only parts are read."""

    def __init__(self, file: str):
        self._opened = safetensors.safe_open(file, framework="numpy")
        self._hashes, *ends = map(self._opened.get_tensor, ("hashes", "row_ends", "list_ends"))
        self._ends = {"row_ends": ends[0], "list_ends": ends[1]}
        self._slices = {name: self._opened.get_slice(name) for name in ("rows", "lists", "cumulative", "words")}
        self._ends["word_ends"] = self._opened.get_slice("word_ends")

    def find(self, caption: str) -> Annotation | None:
        wanted = np.uint64(_hash(caption))
        first = int(np.searchsorted(self._hashes, wanted))
        for number in range(first, len(self._hashes)):
            if self._hashes[number] != wanted:
                break
            text, words, swaps, parts = json.loads(self._bytes("rows", "row_ends", number))
            if text == caption:
                return Annotation(
                    caption,
                    [Word(start, end, bool(mark)) for start, end, mark in words],
                    swaps,
                    [self._replaceable(*part) for part in parts],
                )
        return None

    def span(self, ends: str, number: int) -> tuple[int, int]:
        start, end = self._ends[ends][number : number + 2].tolist()
        return start, end

    def values(self, name: str, start: int, end: int) -> np.ndarray:
        return self._slices[name][start:end]

    def word(self, number: int) -> str:
        return self._bytes("words", "word_ends", number).decode("utf-8", "surrogatepass")

    def _bytes(self, name: str, ends: str, number: int) -> bytes:
        return self.values(name, *self.span(ends, number)).tobytes()

    def _replaceable(self, start: int, end: int, number: int) -> Replaceable:
        span = self.span("list_ends", number)
        return Replaceable(start, end, _Words(self, *span), _Weights(self, *span))


class _Weights(Sequence):
    """The cumulative weights of a list, read when they are first asked for: a draw needs those of one part."""

    name = "cumulative"

    def __init__(self, file: _File, start: int, end: int):
        self.file, self._span = file, (start, end)

    def __len__(self) -> int:
        return self._span[1] - self._span[0]

    @functools.cached_property
    def values(self) -> list[int]:
        return self.file.values(self.name, *self._span).tolist()

    def __getitem__(self, number: int):
        return self.values[number]


class _Words(_Weights):
    """The words of a list."""

    name = "lists"

    def __getitem__(self, number: int) -> str:
        return self.file.word(self.values[number])
