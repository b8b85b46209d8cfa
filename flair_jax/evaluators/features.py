"""Images and texts through a model's towers, in batches of one fixed shape over all devices."""

import collections
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flair_jax import sharding
from flair_jax.data.transforms import packing
from flair_jax.data.transforms.base import SampleError
from flair_jax.evaluators.store import FeatureStore
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.models.text import Text

Item = TypeVar("Item")
ROW_TEXTS = 8  # texts that share a row, at most
THREADS = 16  # that decode images, at most


class BrokenImages(ValueError):
    """Images that cannot be read or decoded; the results of the pass that found them must not be used.

    Attributes:
      reasons: number of the image -> why.
    """

    def __init__(self, reasons: Mapping[int, str]):
        self.reasons = dict(reasons)
        first = next(iter(reasons.values()))
        super().__init__(
            f"{len(reasons)} images cannot be used, the first one: {first}"
            if len(reasons) > 1
            else f"an image cannot be used: {first}"
        )


class EmptySet(ValueError):
    """Nothing of a set can be measured, for instance because no pixel of the images at hand is labelled."""


def raise_broken(broken: Mapping[int, str], count: int, mesh: Mesh | None = None) -> None:
    """Raises BrokenImages on every process of a mesh if one of them met some of `count` images: number -> why.

    None: `evaluation_mesh()`.
    """
    found = dict(broken)
    if (evaluation_mesh() if mesh is None else mesh).is_multi_process:
        mine = np.isin(np.arange(count), list(broken))
        for number in np.flatnonzero(multihost_utils.process_allgather(mine).any(0)):
            found.setdefault(int(number), f"image {number} cannot be read by another process, see its log")
    if found:
        raise BrokenImages(dict(sorted(found.items())))


@dataclasses.dataclass(frozen=True)
class Session:
    """What the encoders of an evaluation share.

    Attributes:
      store: where features are kept; None: nowhere.
      progress: (batches, their number) -> the same batches, shown on the way.
    """

    store: FeatureStore | None = None
    progress: Callable[[Iterable[Item], int], Iterable[Item]] = lambda batches, total: batches


_session: contextvars.ContextVar[Session] = contextvars.ContextVar("session")


@contextlib.contextmanager
def session(**options: Any) -> Iterator[None]:
    """Encoders that are built in this context share these options; other options are those of the context around."""
    token = _session.set(dataclasses.replace(_session.get(Session()), **options))
    try:
        yield
    finally:
        _session.reset(token)


def evaluation_mesh() -> Mesh:
    """The mesh of `jax.set_mesh`; where none is set, all devices."""
    mesh = jax.sharding.get_mesh()
    return sharding.create_mesh() if mesh.empty else mesh


def lookahead(items: Iterable[Item]) -> Iterator[Item]:
    """Hands out each item after the next one was started: the host loads images while the devices work."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def patch_grid(height: int, width: int, patches: int) -> tuple[int, int]:
    """Rows and columns of `patches` square patches that cover an image of that many pixels.

    Raises:
      ValueError: no square patch fits.
    """
    side = math.isqrt(height * width // patches)
    if side == 0 or height % side or width % side or (height // side) * (width // side) != patches:
        raise ValueError(f"{patches} square patches cannot cover an image of {height} x {width} pixels")
    return height // side, width // side


def check_texts(name: str, tokens: np.ndarray, owner: np.ndarray, owners: int) -> None:
    """Raises ValueError unless N > 0 texts, (N, T), belong to one of `owners` images or classes each, (N,)."""
    if tokens.ndim != 2 or not len(tokens) or owner.shape != tokens.shape[:1]:
        raise ValueError(f"{name}: tokens {tokens.shape}, owners of texts {owner.shape}; expected (N, T), (N,), N > 0")
    if owner.min() < 0 or owner.max() >= owners:
        raise ValueError(
            f"{name}: texts belong to numbers from {owner.min()} to {owner.max()}; expected 0 to {owners - 1}"
        )


@contextlib.contextmanager
def _without_disk() -> Iterator[None]:
    """A disk that is full ends no evaluation: the results need no store."""
    try:
        yield
    except OSError as error:
        logging.log_first_n(logging.WARNING, "features are not kept: %s", 1, error)


@functools.lru_cache(maxsize=8)
def _towers(
    model: nn.Module, preprocess: Callable, split: NamedSharding, whole: NamedSharding
) -> tuple[Callable, Callable]:
    """The jitted towers; evaluators of one model share them, and their compilation."""

    def encode_image(params, images, local, attention):
        options = {"attention": True} if attention else {}
        features = model.apply({"params": params}, preprocess(images), method="encode_image", **options)
        return features if local else features.replace(local=None)

    def encode_text(params, text):
        # Texts are compared by their pooled features; those of all tokens would be T times as large.
        features = model.apply({"params": params}, text, local=False, method="encode_text")
        return features.replace(mask=None)

    images = jax.jit(encode_image, static_argnames=("local", "attention"), out_shardings=split)
    return images, jax.jit(encode_text, out_shardings=whole)


def call(model: nn.Module, method: str, params: Any, *args: Any) -> Any:
    """A method of the model on its parameters, a nested dict."""
    return model.apply({"params": params}, *args, method=method)


@functools.lru_cache(maxsize=32)
def _jit_method(model: nn.Module, method: str, out_shardings: NamedSharding) -> Callable:
    return jax.jit(functools.partial(call, model, method), out_shardings=out_shardings)


@functools.lru_cache(maxsize=8)
def _jit_take(out_shardings: NamedSharding) -> Callable:
    def take(blocks, index):
        return jax.tree.map(lambda *x: jnp.concatenate(x)[index], *blocks)

    return jax.jit(take, out_shardings=out_shardings)


class Encoder:
    """The towers of a model, jitted once for batches of a fixed shape.

    Batches are split over the mesh axes that training splits them over; results are whole on every device, so the same
    code runs in one process and in many.

    Attributes:
      mesh: devices to run on.
      whole: sharding of an array that every device holds as a whole.

    Args:
      model: a module with the methods `encode_image` and `encode_text` and a `context_length`.
      preprocess: images as the data set gives them (B, H, W, 3) -> the model's input, float; runs inside jit.
      image_batch, text_batch: largest batches, of images and of rows of texts; they are rounded up to a multiple of the
        devices.
      mesh: None: `evaluation_mesh()`.
      full_batches: whether all batches have the largest size, padded where need be: one program for any number of
        images and of texts.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[jax.Array], jax.Array],
        *,
        image_batch: int,
        text_batch: int,
        mesh: Mesh | None = None,
        full_batches: bool = False,
    ):
        if image_batch < 1 or text_batch < 1:
            raise ValueError(f"image_batch {image_batch} and text_batch {text_batch} must be at least 1")
        self.mesh = evaluation_mesh() if mesh is None else mesh
        self._model, self._image_batch, self._text_batch = model, image_batch, text_batch
        self._full_batches = full_batches
        axes = tuple(axis for axis in sharding.BATCH_AXES if axis in self.mesh.axis_names)
        self._split, self.whole = (NamedSharding(self.mesh, PartitionSpec(*spec)) for spec in ((axes,), ()))
        self._shards = int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=int))

        self._session = _session.get(Session())
        self._threads = concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "images")
        self._encode_image, self._encode_text = _towers(model, preprocess, self._split, self.whole)

    def apply(self, method: str, params: Any, *args: Any) -> Any:
        """A method of the model, jitted; its results are whole on every device, ready for `np.asarray`."""
        with jax.set_mesh(self.mesh):
            return _jit_method(self._model, method, self.whole)(params, *args)

    def place(self, params: Any) -> Any:
        """Parameters on the devices of the mesh; those that are there already keep their sharding."""
        devices = set(self.mesh.devices.flat)

        def put(x):
            there = isinstance(x, jax.Array) and x.sharding.device_set == devices
            return x if there else jax.device_put(x, self.whole)

        return jax.tree.map(put, params)

    def split(self, x: np.ndarray) -> jax.Array:
        """A host batch as one array over the devices; every process gives the whole batch."""
        return jax.make_array_from_callback(x.shape, self._split, lambda index: x[index])

    def _run(self, tower: Callable, params: Any, batch: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return tower(params, jax.tree.map(self.split, batch))

    def _rows(self, limit: int, total: int) -> int:
        """Rows of a batch: as few batches as the limit allows, equally full, on equally many rows per device."""
        batches = -(-total // limit)
        total = batches * limit if self._full_batches else total
        return -(-total // (batches * self._shards)) * self._shards

    def text_rows(self, total: int) -> int:
        """Rows of a text batch out of `total` texts."""
        return self._rows(self._text_batch, total)

    def images(
        self, params: Any, images: Sequence[np.ndarray], *, local: bool = True, attention: bool = False
    ) -> Iterator[tuple[np.ndarray, ImageFeatures]]:
        """Encodes images; each process loads those of its own devices alone.

        Args:
          params: from `place`.
          images: arrays (H, W, 3) of one size, by index; loaded when their turn comes, from several threads. If they
            have an attribute `keys`, a text per image that identifies its pixels, and the session has a store, then
            what is in the store is taken from there, and the rest is added to it.
          local: whether the features of patches are needed too.
          attention: whether the attention of a decoder's queries is needed too; no store has it.

        Yields:
          The numbers (n,) of a batch's images, and its ImageFeatures, split over the devices, at least n rows: those
          after the first n are padding. Without a store in order; with one, what is there comes first.

        Raises:
          BrokenImages: at the end, with all images that could not be loaded; until then they count as black.
        """
        rows = self._rows(self._image_batch, len(images))
        from_store = self._session.store is not None and not attention
        keys = getattr(images, "keys", None) if from_store else None
        kind = opened = (
            None if keys is None else self._session.store.open("images" if local else "pooled", self._model, params)
        )
        stored = np.zeros(len(images), bool) if opened is None else self._stored(opened, keys)
        batches = [
            (group[start : start + rows], known)
            for group, known in ((np.flatnonzero(stored), True), (np.flatnonzero(~stored), False))
            for start in range(0, len(group), rows)
        ]
        broken: dict[int, str] = {}

        def started():
            for numbers, known in batches:
                if known and (features := self._from_store(opened, keys, numbers, rows)) is not None:
                    yield numbers, known, features
                    continue
                pixels = self._load(images, numbers, rows, broken)
                with jax.set_mesh(self.mesh):
                    yield numbers, False, self._encode_image(params, pixels, local=local, attention=attention)

        for numbers, known, features in self._session.progress(lookahead(started()), len(batches)):
            if kind is not None and not known:
                with _without_disk():
                    self._to_store(kind, keys, numbers, features, broken)
            yield numbers, features
        raise_broken(broken, len(images), self.mesh)

    def _local_rows(self, rows: int) -> list[int]:
        """The rows of a batch that this process's devices hold."""
        spans = self._split.addressable_devices_indices_map((rows,)).values()
        return sorted({row for (span,) in spans for row in range(*span.indices(rows))})

    def _by_row(self, rows: int, row_of: Mapping[int, Any]) -> jax.Array:
        """A batch over the devices out of this process's rows."""
        shape = rows, *np.shape(next(iter(row_of.values())))
        return jax.make_array_from_callback(
            shape, self._split, lambda index: np.stack([row_of[row] for row in range(*index[0].indices(rows))])
        )

    def _load(self, images: Sequence[np.ndarray], numbers: np.ndarray, rows: int, broken: dict[int, str]) -> jax.Array:
        """Pixels of a batch of `rows` images, the last one repeated; what is broken is noted and black."""
        wanted = {row: int(numbers[min(row, len(numbers) - 1)]) for row in self._local_rows(rows)}

        def load(number):
            try:
                return np.asarray(images[number])
            except (SampleError, OSError) as error:
                broken[number] = str(error)
                return None

        loaded = dict(zip(set(wanted.values()), self._threads.map(load, set(wanted.values())), strict=True))
        sound = next((pixels for pixels in loaded.values() if pixels is not None), None)
        if sound is None:
            sound = np.zeros((*images.shape[1:],), np.uint8)
        black = np.zeros_like(sound)
        pixels = {row: black if loaded[number] is None else loaded[number] for row, number in wanted.items()}
        return self._by_row(rows, pixels)

    def _stored(self, kind: Any, keys: Sequence[str]) -> np.ndarray:
        """Which keys are in the store, bool (K,); for all processes alike, though another run may be adding some."""
        found = np.array([key in kind for key in keys], bool)
        return multihost_utils.process_allgather(found).all(0) if self.mesh.is_multi_process else found

    def _read(self, kind: Any, keys: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Rows of the store; None, for all processes alike, if one of them finds damaged ones."""
        fields = kind.read(keys)
        sound = np.array(fields is not None)
        return fields if not self.mesh.is_multi_process or multihost_utils.process_allgather(sound).all() else None

    def _from_store(self, kind: Any, keys: Sequence[str], numbers: np.ndarray, rows: int) -> ImageFeatures | None:
        """A batch of `rows` images; None if the store turns out to be damaged there."""
        mine = self._local_rows(rows)
        fields = self._read(kind, [keys[numbers[min(row, len(numbers) - 1)]] for row in mine])
        if fields is None:
            return None
        arrays = {name: self._by_row(rows, dict(zip(mine, array, strict=True))) for name, array in fields.items()}
        return ImageFeatures(**{"local": None, **arrays})

    def _to_store(
        self, kind: Any, keys: Sequence[str], numbers: np.ndarray, features: ImageFeatures, broken: Mapping[int, str]
    ) -> None:
        """Adds what this process's devices hold of a batch."""
        arrays = {name: x for name, x in vars(features).items() if x is not None}
        for shards in zip(*(x.addressable_shards for x in arrays.values()), strict=True):
            span = shards[0].index[0].indices(features.pooled.shape[0])
            sound = [row for row in range(*span) if row < len(numbers) and int(numbers[row]) not in broken]
            picked = [row - span[0] for row in sound]
            rows = {name: np.asarray(shard.data)[picked] for name, shard in zip(arrays, shards, strict=True)}
            kind.add([keys[numbers[row]] for row in sound], rows)

    def texts(self, params: Any, tokens: np.ndarray) -> Any:
        """Encodes texts, int32 (N, T), each different one once: equal texts have equal features to the bit.

        Returns:
          TextFeatures whose `pooled` is (N, D) and whose other fields are None, whole on every device.

        Raises:
          ValueError: a text is longer than the model's context.
        """
        tokens, inverse = np.unique(tokens, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        lengths = packing.lengths(tokens)
        if lengths.max() > self._model.context_length:
            raise ValueError(
                f"texts have {lengths.max()} tokens; model.text.context_length is {self._model.context_length}"
            )
        if self._session.store is None:
            blocks, number = self._encode_texts(params, tokens, lengths)
            return self.take(blocks, number[inverse])
        kind = self._session.store.open("texts", self._model, params)
        keys = [row[:length].tobytes().hex() for row, length in zip(tokens.astype(np.int32), lengths, strict=True)]
        stored, fields = self._stored(kind, keys), None
        while (
            stored.any() and (fields := self._read(kind, [keys[number] for number in np.flatnonzero(stored)])) is None
        ):
            stored = self._stored(kind, keys)
        old, new = np.flatnonzero(stored), np.flatnonzero(~stored)
        blocks, position = [], np.empty(len(keys), np.int64)  # of each text in the blocks
        if len(old):
            blocks.append(TextFeatures(jax.device_put(fields["pooled"], self.whole), local=None, mask=None))
            position[old] = np.arange(len(old))
        if len(new):
            encoded, number = self._encode_texts(params, tokens[new], lengths[new])
            position[new] = len(old) + number
            blocks += encoded
        features = self.take(blocks, position)
        if jax.process_index() == 0:
            with _without_disk():
                kind.add([keys[number] for number in new], {"pooled": np.asarray(features.pooled)[new]})
        return features if (inverse == np.arange(len(inverse))).all() else self.take([features], inverse)

    def _encode_texts(self, params: Any, tokens: np.ndarray, lengths: np.ndarray) -> tuple[list[Any], np.ndarray]:
        """Features of different texts, int32 (N, T), in blocks, and the number of each text among their rows."""
        row_length = tokens.shape[1] + tokens.shape[1] % 2  # cuDNN wants it even
        placement = packing.place(lengths, row_length, row_captions=ROW_TEXTS)
        count = self._rows(self._text_batch, placement.rows)
        rows = -(-placement.rows // count) * count
        texts = packing.lay_out(tokens, lengths, placement, row_length=row_length, rows=rows)
        # Each row has as many ends as there may be: those of its texts, and the row's first token for the others.
        number = placement.row * ROW_TEXTS + placement.segment - 1  # (N,) of each text among the ends
        ends = np.repeat(np.arange(rows, dtype=np.int32) * row_length, ROW_TEXTS)
        ends[number] = texts["ends"]
        blocks = []
        for start in range(0, rows, count):
            part = {name: texts[name][start : start + count] for name in ("tokens", "positions", "segments")}
            part["ends"] = ends[start * ROW_TEXTS : (start + count) * ROW_TEXTS] - np.int32(start * row_length)
            blocks.append(self._run(self._encode_text, params, Text(**part)))
        return blocks, number

    def blocks(self, text: Any) -> list[Any]:
        """Features of N texts in blocks of `text_rows(N)`, the last one padded with its last text; none of none."""
        count = len(text.pooled)
        rows = self.text_rows(count) if count else 1
        numbers = (np.minimum(np.arange(start, start + rows), count - 1) for start in range(0, count, rows))
        return [self.take([text], number) for number in numbers]

    def take(self, blocks: Sequence[Any], index: np.ndarray) -> Any:
        """Rows by number out of features of consecutive `blocks`, whole on every device."""
        return _jit_take(self.whole)(blocks, jax.device_put(index, self.whole))
