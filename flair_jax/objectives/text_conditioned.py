"""Text-conditioned sigmoid loss, TCS (FLAIR, Xiao et al., CVPR 2025, section 3.3).

The reference computes it on the machine that it happens to run on: every GPU holds one block of B images, draws its own
negatives within the block, and meets the blocks of the others. Here the blocks belong to the batch, not to the
machines: N images are W = N / B blocks, and the value is the reference's for W GPUs on any number of devices.

Image i of block r is scored against, for each block s, the row of texts that s drew for its own image i: the K captions
of that image and one caption of each other image of s, J = B + K - 1 in all.

    TCS = 1 / (W J) * sum_n sum_m softplus(-y z),   z = exp(scale) cos(pool(t_m, V_n), t_m) + bias

y is +1 where the caption belongs to the image and -1 elsewhere: a sum over images, divided by the number of texts that
each image is scored against.
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
from flair_jax.objectives.groups import check_divisor
from flair_jax.objectives.sigmoid import log_sigmoid_sum


def loss(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    block_size: int | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """TCS of a global batch of N images with K captions each.

    Under a mesh (`jax.set_mesh`) each device works on its own images; only text features travel, from device to device
    in a ring.

    Args:
      features: of a model with text-conditioned pooling and a bias.
      batch: optionally `draws`, int (B, N), to replace the draw: which caption of image m those with index i in
        their block are scored against, if m does not have index i itself.
      rng: key of `draw_captions`.
      block_size: images a block, B; None: the batch is one block.
      chunk_size: images to work on at a time on a device, for bounded memory; None: all at once.

    Returns:
      The loss, and the mean logit of its positive and of its negative pairs, float32 scalars. None depends on the
      chunks or devices, up to rounding.

    Raises:
      ValueError: the batch cannot be split as asked, or the model has no text-conditioned pooling or no bias.
    """
    if features.pooling is None or features.logit_bias is None:
        raise ValueError("config.objectives.text_conditioned needs config.model.pooling and model.init_logit_bias")
    features = features.of_slot(CAPTIONS)
    pooling, attend = features.pooling, features.pooling.attend
    images, texts = features.image.pooled.shape[0], features.text.pooled.shape[0]
    block_size = images if block_size is None else block_size
    check_divisor("text_conditioned.block_size", block_size, images)
    captions, blocks = ring.texts_per_image(images, texts), images // block_size

    def pair_sums(image, number, shared, constants, texts, first):
        keys, values = image  # (C, L + 1, H, D/H)
        params, logit_scale, logit_bias = shared
        unit_texts, queries = texts  # (T, D), (T, H, D/H), all captions of the shard
        rng, draws = constants
        number = number + jnp.arange(len(keys))  # (C,)
        index, others = number % block_size, first + jnp.arange(len(unit_texts) // captions)
        drawn = draw_captions(rng, index, others, captions) if draws is None else draws[index][:, others]
        column, counts = met_captions(index, first, drawn, block_size, captions)  # (C, M)
        met_queries = queries.astype(jnp.float32)[column].astype(queries.dtype)  # so gradients are summed in float32
        pooled = attend(params, met_queries, keys, values)  # (C, M, D)
        cosine = jnp.einsum("cmd,cmd->cm", normalize(pooled), unit_texts[column])
        owner = first + jnp.arange(len(unit_texts)) // captions
        logits, positive = jnp.exp(logit_scale) * cosine + logit_bias, owner[column] == number[:, None]
        fixed = lax.stop_gradient(logits)
        return {
            "loss": log_sigmoid_sum(logits, positive, counts),
            "positive": jnp.sum(fixed, where=counts & positive),
            "negative": jnp.sum(fixed, where=counts & ~positive),
        }

    sums = ring.sum_over_pairs(
        pair_sums,
        (pooling.keys, pooling.values),
        (pooling.params, features.logit_scale, features.logit_bias),
        (rng, batch.get("draws")),
        (normalize(features.text.pooled), pooling.queries),
        images=images,
        chunk_size=chunk_size,
        option="config.objectives.text_conditioned.chunk_size",
    )
    scored = blocks * (block_size + captions - 1)  # texts that each image is scored against
    return sums["loss"] / scored, {
        "positive_logit": sums["positive"] / texts,
        "negative_logit": sums["negative"] / (images * scored - texts),
    }


def draw_captions(rng: jax.Array, index: jax.Array, other: jax.Array, captions: int) -> jax.Array:
    """Draws which caption of each other image an image is scored against.

    A draw is a function of its own two numbers, so that each device can make those that it needs, when it needs them.

    Args:
      rng: key of the training step.
      index: int (N,), index of the image within its block.
      other: int (M,), number of the other image in the batch.
      captions: K, captions an image.

    Returns:
      int32 (N, M) below K.
    """

    def draw(key, other):
        return jax.random.randint(jax.random.fold_in(key, other), (), 0, captions)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, index)
    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, other)


def draws_of_rows(rows: jax.Array, captions: int) -> jax.Array:
    """What the reference's ranks drew, in the form that `loss` takes.

    Args:
      rows: int (N, B + K - 1), ascending; row i of rank s names the captions, of that rank's B * K, which every image
        with index i meets: all of the rank's own image i and one of each other image.
      captions: K.

    Returns:
      int32 (B, N), the `draws` of a batch, see `loss`.
    """
    block_size = rows.shape[1] + 1 - captions
    index, other = jnp.arange(len(rows))[:, None] % block_size, jnp.arange(block_size)
    drawn = jnp.take_along_axis(rows, other + (other > index) * (captions - 1), axis=1) % captions  # (N, B)
    return drawn.reshape(-1, block_size, block_size).swapaxes(0, 1).reshape(block_size, -1).astype(jnp.int32)


def met_captions(
    index: jax.Array, first: jax.Array, drawn: jax.Array, block_size: int, captions: int
) -> tuple[jax.Array, jax.Array]:
    """Caption columns scored against each image, within a shard of M images: one caption of each image, and all others
    of the images with the same index in their block.

    Args:
      index: int (N,), index of each image within its block.
      first: number of the shard's first image in the batch.
      drawn: int (N, M), the caption of each image of the shard, unless it has the same index.
      block_size: images a block.
      captions: K, captions an image.

    Returns:
      Captions (N, J), as columns of the shard's M * K, and whether each counts (N, J) or is padding: a shard that
      cuts blocks does not have as many images of every index.
    """
    images = drawn.shape[1]
    same = (first + jnp.arange(images)) % block_size == index[:, None]
    one = jnp.arange(images) * captions + jnp.where(same, 0, drawn)
    twins = (index - first)[:, None] % block_size + jnp.arange(0, images, block_size)  # images of the same index
    others = twins[..., None] * captions + jnp.arange(1, captions)
    column = jnp.concatenate([one, others.reshape(len(index), -1)], axis=1)
    counts = column < images * captions
    return jnp.where(counts, column, 0), counts
