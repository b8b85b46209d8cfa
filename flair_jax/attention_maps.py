"""Heat maps: where in an image the pooling looks for a text, and which patches are similar to it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import numpy as np

from flair_jax.evaluators.features import Encoder, patch_grid
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.models.layers import normalize

IMAGE_BATCH, TEXT_BATCH = 64, 512  # images, rows of texts
Batches: TypeAlias = Iterable[tuple[np.ndarray, ImageFeatures]]  # numbers of images (n,), and features of n or more


class HeatMaps(NamedTuple):
    """`maps`: float32 (B, N, h, w), attention on each patch; `zero_mass`: float32 (B, N), attention on no patch.

    Of each head alone they are (B, N, heads, h, w) and (B, N, heads).

    A map and its zero mass sum to 1: maps are not renormalised, so that a text that finds nothing shows it.
    """

    maps: np.ndarray
    zero_mass: np.ndarray


class QueryMaps(NamedTuple):
    """`maps`: float32 (B, Q + 1, h, w), attention of a decoder's queries on each patch, the image query last;
    `class_mass`: float32 (B, Q + 1), attention on the class token.

    Of each head alone they are (B, Q + 1, heads, h, w) and (B, Q + 1, heads). A map and its class mass sum to 1.
    """

    maps: np.ndarray
    class_mass: np.ndarray


def heat_maps(
    model: nn.Module,
    params: Any,
    images: Sequence[np.ndarray],
    tokens: np.ndarray,
    *,
    preprocess: Callable[[jax.Array], jax.Array],
    heads: str | int | Sequence[int] = "mean",
) -> HeatMaps:
    """Attention of every text over the patches of every image.

    Args:
      model: a module with `encode_image`, `encode_text` and `attention_maps`.
      params: its parameters, a nested dict.
      images: (B, H, W, 3), as `preprocess` takes them; or a sequence with that shape, of which a batch is loaded at a
        time.
      tokens: int32 (N, T), padded texts.
      preprocess: images -> the model's input, of the same height and width.
      heads: see `heat_maps_of_features`.

    Raises:
      ValueError: there is no such head.
    """
    encoder = Encoder(model, preprocess, image_batch=IMAGE_BATCH, text_batch=TEXT_BATCH)
    params = encoder.place(params)
    batches, text = encoder.images(params, images), encoder.texts(params, tokens)
    return heat_maps_of_features(encoder, params, batches, text, size=images.shape[1:3], heads=heads)


def heat_maps_of_features(
    encoder: Encoder,
    params: Any,
    batches: Batches,
    text: TextFeatures,
    *,
    size: tuple[int, int],
    heads: str | int | Sequence[int] = "mean",
) -> HeatMaps:
    """`heat_maps` of images and texts that are encoded already.

    Args:
      encoder: of a model with `attention_maps`.
      params: its parameters, from `encoder.place`.
      batches: as `encoder.images` yields them, with `local`.
      text: from `encoder.texts`.
      size: height and width of the images.
      heads: "mean" of all heads, as FLAIR's own pictures show it; "each" of them; a number, from 0; or several numbers,
        of which the mean is taken.
    """

    def weights(image):
        return [_of_heads(np.asarray(x), heads) for x in encoder.apply("attention_maps", params, image, text)]

    maps, zero_mass = _in_order(batches, weights)
    return HeatMaps(_on_grid(maps, size), zero_mass)


def patch_similarity(
    encoder: Encoder,
    params: Any,
    batches: Batches,
    text: TextFeatures,
    *,
    size: tuple[int, int],
    mode: str = "projected",
) -> np.ndarray:
    """Cosine of every patch of every image with every text, float32 (B, N, h, w).

    Args:
      encoder: of a model with, for value, `dense_features`.
      params, batches, text, size: as for `heat_maps_of_features`.
      mode: "projected": the projected patches. "value": `model.dense_features`, what the pooling would give if all
        attention rested on one patch.
    """
    pooled = np.asarray(normalize(text.pooled), np.float32)

    def cosines(image):
        local = encoder.apply("dense_features", params, image) if mode == "value" else image.local
        local = np.asarray(normalize(local), np.float32)
        return (np.einsum("bld,nd->bnl", local, pooled, optimize=True),)

    (found,) = _in_order(batches, cosines)
    return _on_grid(found, size)


def query_maps(batches: Batches, *, size: tuple[int, int], heads: str | int | Sequence[int] = "mean") -> QueryMaps:
    """Attention of a decoder's queries over the tokens of every image, in the decoder's last layer.

    Args:
      batches: as `Encoder.images` yields them, with `attention`.
      size, heads: as for `heat_maps_of_features`.
    """
    (weights,) = _in_order(batches, lambda image: (_of_heads(np.asarray(image.attention[:, -1]), heads),))
    return QueryMaps(_on_grid(weights[..., 1:], size), weights[..., 0])


def _in_order(batches: Batches, maps: Callable[[ImageFeatures], Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Arrays that `maps` gives of batches of images, joined in the images' order."""
    order, parts = [], []
    for numbers, image in batches:
        order.append(numbers)
        parts.append([x[: len(numbers)] for x in maps(image)])
    order = np.argsort(np.concatenate(order))
    return [np.concatenate(part)[order] for part in zip(*parts, strict=True)]


def _on_grid(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(…, L) -> (…, h, w), as the patches lie in images of that height and width."""
    return maps.reshape(*maps.shape[:-1], *patch_grid(*size, maps.shape[-1]))


def _of_heads(weights: np.ndarray, heads: str | int | Sequence[int]) -> np.ndarray:
    """Weights of all heads, (B, N, H, …) -> the mean of some, (B, N, …); with "each" as they are."""
    if isinstance(heads, str) and heads == "each":
        return weights
    return weights[:, :, _numbers(heads, weights.shape[2])].mean(2)


def _numbers(heads: str | int | Sequence[int], count: int) -> list[int]:
    """The heads that are averaged. Raises ValueError: there is no such one."""
    if isinstance(heads, str):
        if heads != "mean":
            raise ValueError(f"heads is {heads!r}; expected 'mean', 'each', a number or several numbers")
        return list(range(count))
    chosen = list(heads) if isinstance(heads, Iterable) else [heads]
    if not chosen or not set(chosen) <= set(range(count)):
        raise ValueError(f"heads are {chosen}; the pooling has {count}, 0 to {count - 1}")
    return chosen
