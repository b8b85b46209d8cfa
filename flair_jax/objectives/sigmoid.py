"""Sigmoid loss of pooled features over the global batch (SigLIP, Zhai et al., ICCV 2023, equation 1).

With K captions an image it is FLAIR's multi-positive loss, MPS (Xiao et al., CVPR 2025, section 3.3); with one it is
SigLIP's.

    L = 1 / (N K) * sum_n sum_t softplus(-y z),   z = exp(scale) cos(g_n, t) + bias

y is +1 where the caption belongs to the image and -1 elsewhere: a sum over images, divided by the number of texts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flair_jax.data.transforms.base import CAPTIONS
from flair_jax.models.dual_encoder import Features
from flair_jax.models.layers import normalize
from flair_jax.objectives import ring


def loss(
    features: Features, batch: Mapping[str, Any], rng: jax.Array, *, chunk_size: int | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of N images with K captions each; only text features travel between devices, in a ring.

    Args:
      features: of a model with a bias.
      batch, rng: not needed.
      chunk_size: images to work on at a time on a device, for bounded memory; None: all at once.

    Returns:
      float32 scalar, which does not depend on the chunks or devices, up to rounding.

    Raises:
      ValueError: the batch cannot be split as asked, or the model has no bias.
    """
    if features.logit_bias is None:
        raise ValueError("config.objectives.sigmoid needs a bias; set config.model.init_logit_bias, such as -10.0")
    features = features.of_slot(CAPTIONS)
    images, texts = features.image.pooled.shape[0], features.text.pooled.shape[0]
    captions = ring.texts_per_image(images, texts)

    def pair_sums(image, number, shared, constants, unit_texts, first):
        logit_scale, logit_bias = shared
        number = number + jnp.arange(len(image))  # (C,)
        owner = first + jnp.arange(len(unit_texts)) // captions  # (T,)
        logits = jnp.exp(logit_scale) * (image @ unit_texts.T) + logit_bias  # (C, T)
        return log_sigmoid_sum(logits, owner == number[:, None])

    total = ring.sum_over_pairs(
        pair_sums,
        normalize(features.image.pooled),
        (features.logit_scale, features.logit_bias),
        (),
        normalize(features.text.pooled),
        images=images,
        chunk_size=chunk_size,
        option="config.objectives.sigmoid.chunk_size",
    )
    return total / texts, {}


def log_sigmoid_sum(logits: jax.Array, positive: jax.Array, counts: jax.Array | None = None) -> jax.Array:
    """Sum of -log sigmoid(y z) over all pairs, or those that count; y = +1 where `positive`."""
    return jnp.sum(jax.nn.softplus(jnp.where(positive, -logits, logits)), where=counts)
