"""Softmax (InfoNCE) loss of pooled features over the global batch (CLIP, Radford et al., ICML 2021, figure 3).

    L = 1/2 (1/N sum_n -log softmax_t(z_n)_n + 1/N sum_t -log softmax_n(z_t)_t),   z_nt = exp(scale) cos(g_n, t)

In words: each image is classified among all texts of the global batch and each text among all images.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flair_jax.data.transforms.base import CAPTIONS
from flair_jax.models.dual_encoder import Features
from flair_jax.models.layers import normalize
from flair_jax.objectives import ring


def loss(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    caption: int = 0,
    reference_world_size: int = 1,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of N images with one caption each; features travel between devices in a ring, in bounded memory.

    Args:
      features: of N images and N * K captions.
      batch, rng: not needed.
      caption: which of the K captions of an image is its text. They are drawn alike, so the first is a random one.
      reference_world_size: see `as_in_processes`.
      chunk_size: images to work on at a time on a device; None: all at once.

    Returns:
      float32 scalar, which does not depend on the chunks or devices, up to rounding.

    Raises:
      ValueError: the batch cannot be split as asked, or there is no such caption.
    """
    features = features.of_slot(CAPTIONS)
    images, texts = features.image.pooled.shape[0], features.text.pooled.shape[0]
    captions = ring.texts_per_image(images, texts)
    if not 0 <= caption < captions:
        raise ValueError(f"config.objectives.softmax.caption is {caption}; there are {captions} captions an image")
    image = normalize(features.image.pooled)  # (N, D)
    text = normalize(features.text.pooled.reshape(images, captions, -1)[:, caption])  # (N, D)
    image, text = as_in_processes((image, text), reference_world_size)
    option = "config.objectives.softmax.chunk_size"
    return contrast(image, text, features.logit_scale, chunk_size=chunk_size, option=option), {}


def contrast(
    image: jax.Array,
    text: jax.Array,
    logit_scale: jax.Array,
    negatives: jax.Array | None = None,
    counts: jax.Array | None = None,
    *,
    chunk_size: int | None,
    option: str,
) -> jax.Array:
    """The loss of pairs of unit features, perhaps with more texts that each image is classified among.

    No device forms the (N, N + M) logits: log-sum-exps are accumulated over the shards that come by, and the gradient
    follows from them, dL/dz = (p_row + p_column) / 2N - [n = t] / N, with the logits computed again.

    Args:
      image, text: float32 (N, D), of unit length.
      logit_scale: scalar, as its logarithm.
      negatives: float32 (M, D), M a multiple of N: columns of every image's softmax, and rows of none.
      counts: bool (M,), which of the negatives have a column; None: all.
      chunk_size, option: images at a time on a device, and the name of that option for errors.
    """
    options = dict(chunk_size=chunk_size, option=option)
    fixed_scale = jnp.exp(lax.stop_gradient(logit_scale))

    def logits(own, passing):
        return fixed_scale * (own @ passing.T)

    def only(counts, z):  # (C, M)
        return z if counts is None else jnp.where(counts > 0, z, -jnp.inf)

    of_image = ring.logsumexp_over_pairs(logits, image, text, **options)  # (N,) over texts
    of_text = ring.logsumexp_over_pairs(logits, text, image, **options)  # (N,) over images
    if negatives is not None:
        counts = None if counts is None else counts.astype(jnp.float32)
        more = ring.logsumexp_over_pairs(
            lambda own, passing: only(passing[1], logits(own, passing[0])), image, (negatives, counts), **options
        )
        of_image = jnp.logaddexp(of_image, more)

    def pair_sums(own, number, logit_scale, constants, passing, first):
        (image, of_image), (text, of_text, negatives, counts) = own, passing
        scale = jnp.exp(logit_scale)
        z = scale * (image @ text.T)  # (C, M)
        weight = (jnp.exp(z - of_image[:, None]) + jnp.exp(z - of_text)) / 2
        own_pair = number + jnp.arange(len(image))[:, None] == first + jnp.arange(len(text))
        # A sum with the gradient of the log-sum-exps, not their value.
        weighted = jnp.sum(lax.stop_gradient(weight) * z)
        if negatives is not None:
            more = scale * (image @ negatives.T)
            weight = jnp.exp(only(counts, more) - of_image[:, None]) / 2
            weighted += jnp.sum(lax.stop_gradient(weight) * more)
        return {"weighted": weighted, "positive": jnp.sum(z, where=own_pair)}

    passing = text, of_text, negatives, counts
    sums = ring.sum_over_pairs(pair_sums, (image, of_image), logit_scale, (), passing, images=image.shape[0], **options)
    value = (jnp.sum(of_image) + jnp.sum(of_text)) / 2
    value = sums["weighted"] + lax.stop_gradient(value - sums["weighted"])
    return (value - sums["positive"]) / image.shape[0]


def as_in_processes(features: Any, world_size: int) -> Any:
    """Features whose gradients are those of OpenCLIP's gathered loss in so many processes (FSC-CLIP's `ddp`).

    Each process computes the loss of the gathered batch, differentiates it for its own features alone, and the
    gradients of the parameters are averaged: the encoders receive 1 / world_size of the gradient, the scale all of it.
    It matters where another objective is a mean over each process's own images, as hard-negative losses are.
    """
    if world_size < 1:
        raise ValueError(f"reference_world_size is {world_size}; expected the number of processes, 1 or more")
    if world_size == 1:
        return features
    return jax.tree.map(lambda x: lax.stop_gradient(x) + (x - lax.stop_gradient(x)) / world_size, features)
