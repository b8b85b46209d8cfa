"""Images and texts through a model's towers, in batches of one fixed shape over all devices."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flair_jax import sharding
from flair_jax.data.transforms import packing
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


@functools.lru_cache(maxsize=8)
def _towers(
    model: nn.Module, preprocess: Callable, split: NamedSharding, whole: NamedSharding
) -> tuple[Callable, Callable]:
    """The jitted towers; evaluators of one model share them, and their compilation."""

    def encode_image(params, images):
        return call(model, "encode_image", params, preprocess(images))

    def encode_text(params, text):
        # Texts are compared by their pooled features; those of all tokens would be T times as large.
        features = model.apply({"params": params}, text, local=False, method="encode_text")
        return features.replace(mask=None)

    return jax.jit(encode_image, out_shardings=split), jax.jit(encode_text, out_shardings=whole)


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
        self._split, self.whole = (NamedSharding(self.mesh, PartitionSpec(*spec)) for spec in ((axes,), ()))
        self._shards = int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=int))

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
        lengths = packing.lengths(tokens)
        if lengths.max() > self._model.context_length:
            raise ValueError(
                f"texts have {lengths.max()} tokens; model.text.context_length is {self._model.context_length}"
            )
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
        return self.take(blocks, number[inverse.reshape(-1)])

    def take(self, blocks: Sequence[Any], index: np.ndarray) -> Any:
        """Rows by number out of features that stand one behind the other in `blocks`, whole on every device."""
        return _jit_take(self.whole)(blocks, jax.device_put(index, self.whole))
