"""Images and texts through a model's towers, in batches of one fixed shape over all devices."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flair_jax import sharding
from flair_jax.models.text import Text

Item = TypeVar("Item")
ROW_TEXTS = 8  # texts that share a row, at most


def evaluation_mesh() -> Mesh:
    """The mesh of `jax.set_mesh`; where none is set, all devices."""
    mesh = jax.sharding.get_mesh()
    return sharding.create_mesh() if mesh.empty else mesh


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Hands out each item after the next one was started: the host loads images while the devices work."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the last row until there are `rows`."""
    return np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])


def check_texts(name: str, tokens: np.ndarray, owner: np.ndarray, owners: int) -> None:
    """Raises ValueError unless N > 0 texts, (N, T), belong to one of `owners` images or classes each, (N,)."""
    if tokens.ndim != 2 or not len(tokens) or owner.shape != tokens.shape[:1]:
        raise ValueError(f"{name}: tokens {tokens.shape}, owners of texts {owner.shape}; expected (N, T), (N,), N > 0")
    if owner.min() < 0 or owner.max() >= owners:
        raise ValueError(
            f"{name}: texts belong to numbers from {owner.min()} to {owner.max()}; expected 0 to {owners - 1}"
        )


def share_rows(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Numbers of the texts in each row, as few rows as best-fit decreasing finds.

    The longest come first, each into the fullest row that has room for it and fewer than `ROW_TEXTS` others.
    """
    rows, by_room = [], [[] for _ in range(row_length + 1)]  # rows that take more, by the tokens that they have left
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        room = next((room for room in range(length, row_length) if by_room[room]), row_length)
        if room < row_length:
            row = by_room[room].pop()
        else:
            row = []
            rows.append(row)
        row.append(number)
        if len(row) < ROW_TEXTS:
            by_room[room - length].append(row)
    return rows


def lay(tokens: np.ndarray, lengths: np.ndarray, rows: Sequence[Sequence[int]], count: int, row_length: int) -> Text:
    """Texts (N, T) side by side in `count` rows; text s of row r ends at `ends[r * ROW_TEXTS + s]`, others anywhere."""
    laid, positions, segments = np.zeros((3, count, row_length), np.int32)
    ends = np.repeat(np.arange(count, dtype=np.int32) * row_length, ROW_TEXTS)  # a row's ends stand in that row
    for r, row in enumerate(rows):
        start = 0
        for s, number in enumerate(row):
            length = lengths[number]
            place = slice(start, start + length)
            laid[r, place], positions[r, place], segments[r, place] = tokens[number, :length], np.arange(length), s + 1
            start += length
            ends[r * ROW_TEXTS + s] += start - 1
    return Text(laid, ends, positions, segments)


@functools.lru_cache(maxsize=8)
def _towers(
    model: nn.Module, preprocess: Callable, split: NamedSharding, whole: NamedSharding
) -> tuple[Callable, Callable]:
    """The jitted towers; evaluators of one model share them, and their compilation."""

    def encode_image(params, images):
        return model.apply({"params": params}, preprocess(images), method="encode_image")

    def encode_text(params, text):
        # Texts are compared by their pooled features; those of all tokens would be T times as large.
        features = model.apply({"params": params}, text, local=False, method="encode_text")
        return features.replace(mask=None)

    return jax.jit(encode_image, out_shardings=split), jax.jit(encode_text, out_shardings=whole)


class Encoder:
    """The towers of a model, jitted once for batches of a fixed shape.

    Batches are split over the mesh axes that training splits them over; results are whole on every device, so the same
    code runs in one process and in many.

    Attributes:
      mesh: devices to run on.

    Args:
      model: a module with the methods `encode_image` and `encode_text` and a `context_length`.
      preprocess: images as the data set gives them (B, H, W, 3) -> the model's input, float; runs inside jit.
      image_batch, text_batch: largest batches, of images and of rows of texts; they are rounded up to a multiple of the
        devices.
      mesh: None: `evaluation_mesh()`.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[jax.Array], jax.Array],
        *,
        image_batch: int,
        text_batch: int,
        mesh: Mesh | None = None,
    ):
        if image_batch < 1 or text_batch < 1:
            raise ValueError(f"image_batch {image_batch} and text_batch {text_batch} must be at least 1")
        self.mesh = evaluation_mesh() if mesh is None else mesh
        self._model, self._image_batch, self._text_batch = model, image_batch, text_batch
        axes = tuple(axis for axis in sharding.BATCH_AXES if axis in self.mesh.axis_names)
        self._split, self._whole = (NamedSharding(self.mesh, PartitionSpec(*spec)) for spec in ((axes,), ()))
        self._shards = int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=int))

        self._encode_image, self._encode_text = _towers(model, preprocess, self._split, self._whole)
        self._take = self.jit(lambda blocks, index: jax.tree.map(lambda *x: jnp.concatenate(x)[index], *blocks))

    def jit(self, function: Callable) -> Callable:
        """Jits `function(params, …)`; its results are whole on every device, ready for `np.asarray`."""
        return jax.jit(function, out_shardings=self._whole)

    def method(self, name: str) -> Callable:
        """The model's method `name` as a function of the parameters and the method's arguments."""
        return lambda params, *args: self._model.apply({"params": params}, *args, method=name)

    def place(self, params: Any) -> Any:
        """Parameters on the devices of the mesh; those that are there already keep their sharding."""
        devices = set(self.mesh.devices.flat)

        def put(x):
            there = isinstance(x, jax.Array) and x.sharding.device_set == devices
            return x if there else jax.device_put(x, self._whole)

        return jax.tree.map(put, params)

    def split(self, x: np.ndarray) -> jax.Array:
        """A host batch as one array over the devices; every process gives the whole batch."""
        return jax.make_array_from_callback(x.shape, self._split, lambda index: x[index])

    def _run(self, tower: Callable, params: Any, batch: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return tower(params, jax.tree.map(self.split, batch))

    def _rows(self, limit: int, total: int) -> int:
        """Rows of a batch: as few batches as the limit allows, equally full, on equally many rows a device."""
        batches = -(-total // limit)
        return -(-total // (batches * self._shards)) * self._shards

    def text_rows(self, total: int) -> int:
        """Rows of a text batch out of `total` texts."""
        return self._rows(self._text_batch, total)

    def images(self, params: Any, images: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Any]]:
        """Encodes images in order.

        Args:
          params: from `place`.
          images: arrays (H, W, 3) of one size, by index.

        Yields:
          The numbers (n,) of a batch's images, and its ImageFeatures, at least n rows: what is behind is padding.
        """
        rows = self._rows(self._image_batch, len(images))

        def started():
            for start in range(0, len(images), rows):
                numbers = np.arange(start, min(start + rows, len(images)))
                batch = np.stack([images[int(number)] for number in numbers])  # (n, H, W, 3)
                yield numbers, self._run(self._encode_image, params, pad_rows(batch, rows))

        yield from one_behind(started())

    def texts(self, params: Any, tokens: np.ndarray) -> Any:
        """Encodes texts, int32 (N, T), each different one once: equal texts have equal features to the bit.

        Returns:
          TextFeatures whose `pooled` is (N, D) and whose other fields are None, whole on every device.

        Raises:
          ValueError: a text is longer than the model's context.
        """
        tokens, inverse = np.unique(tokens, axis=0, return_inverse=True)
        lengths = np.argmax(tokens, axis=1) + 1  # nothing is read behind the end of a text
        if lengths.max() > self._model.context_length:
            raise ValueError(
                f"texts have {lengths.max()} tokens; model.text.context_length is {self._model.context_length}"
            )
        row_length = tokens.shape[1] + tokens.shape[1] % 2  # cuDNN wants it even
        rows = share_rows(lengths, row_length)
        count = self._rows(self._text_batch, len(rows))
        blocks = []
        for start in range(0, len(rows), count):
            batch = lay(tokens, lengths, rows[start : start + count], count, row_length)
            blocks.append(self._run(self._encode_text, params, batch))
        place = np.empty(len(tokens), int)  # of each text among the blocks
        for number, row in enumerate(rows):
            place[row] = number * ROW_TEXTS + np.arange(len(row))
        return self.take(blocks, place[inverse.reshape(-1)])

    def take(self, blocks: Sequence[Any], index: np.ndarray) -> Any:
        """Rows by number out of features that stand one behind the other in `blocks`, whole on every device."""
        return self._take(blocks, jax.device_put(index, self._whole))
