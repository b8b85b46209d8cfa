"""Softmax (InfoNCE) loss of pooled features over the global batch (CLIP, Radford et al., ICML 2021, figure 3).

    L = 1/2 (1/N sum_n -log softmax_t(z_n)_n + 1/N sum_t -log softmax_n(z_t)_t),   z_nt = exp(scale) cos(g_n, t)

In words: each image is classified among all texts of the global batch and each text among all images.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flair_jax.models.dual_encoder import Features
from flair_jax.models.layers import normalize
from flair_jax.objectives import ring


def loss(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    caption: int = 0,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of N images with one caption each; features travel between devices in a ring, in bounded memory.

    No device forms the (N, N) logits: log-sum-exps are accumulated over the shards that come by, and the gradient
    follows from them, dL/dz = (p_row + p_column) / 2N - [n = t] / N, with the logits computed again.

    Args:
      features: of N images and N * K texts.
      batch, rng: not needed.
      caption: which of the K captions of an image is its text. They are drawn alike, so the first is a random one.
      chunk_size: images to work on at a time on a device; None: all at once.

    Returns:
      float32 scalar, which does not depend on the chunks or devices, up to rounding.

    Raises:
      ValueError: the batch cannot be split as asked, or there is no such caption.
    """
    images, texts = features.image.pooled.shape[0], features.text.pooled.shape[0]
    captions = ring.texts_per_image(images, texts)
    if not 0 <= caption < captions:
        raise ValueError(f"config.objectives.softmax.caption is {caption}; there are {captions} captions an image")
    image = normalize(features.image.pooled)  # (N, D)
    text = normalize(features.text.pooled.reshape(images, captions, -1)[:, caption])  # (N, D)
    options = dict(chunk_size=chunk_size, option="config.objectives.softmax.chunk_size")
    fixed_scale = jnp.exp(lax.stop_gradient(features.logit_scale))

    def logits(own, passing):
        return fixed_scale * (own @ passing.T)

    of_image = ring.logsumexp_over_pairs(logits, image, text, **options)  # (N,) over texts
    of_text = ring.logsumexp_over_pairs(logits, text, image, **options)  # (N,) over images

    def pair_sums(own, number, logit_scale, constants, passing, first):
        (image, of_image), (text, of_text) = own, passing
        z = jnp.exp(logit_scale) * (image @ text.T)  # (C, M)
        weight = (jnp.exp(z - of_image[:, None]) + jnp.exp(z - of_text)) / 2
        own_pair = number + jnp.arange(len(image))[:, None] == first + jnp.arange(len(text))
        # A sum with the gradient of the log-sum-exps, not their value.
        return {"weighted": jnp.sum(lax.stop_gradient(weight) * z), "positive": jnp.sum(z, where=own_pair)}

    sums = ring.sum_over_pairs(
        pair_sums, (image, of_image), features.logit_scale, (), (text, of_text), images=images, **options
    )
    value = (jnp.sum(of_image) + jnp.sum(of_text)) / 2
    value = sums["weighted"] + lax.stop_gradient(value - sums["weighted"])
    return (value - sums["positive"]) / images, {}
