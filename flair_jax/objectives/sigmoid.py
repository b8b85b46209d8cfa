"""FLAIR's two sigmoid losses over a global batch (Xiao et al., CVPR 2025, section 3.3).

The reference computes them on the machine it happens to run on: every GPU holds one block of B images, draws its own
negatives within the block, and meets the blocks of the others. Here the blocks belong to the batch, not to the
machines: N images are W = N / B blocks, and the value is the reference's for W GPUs on any number of devices.

TCS, text-conditioned: image i of block r meets, for each block s, the row of texts that s drew for its own image i:
the K captions of that image and one caption of each other image of s, J = B + K - 1 in all.

    TCS = 1 / (W J) * sum_n sum_m softplus(-y z),   z = exp(scale) cos(pool(t_m, V_n), t_m) + bias

MPS, multi-positive: every image's class token meets every caption.

    MPS = 1 / (N K) * sum_n sum_t softplus(-y z),   z = exp(scale) cos(g_n, t) + bias

y is +1 where the caption belongs to the image and -1 elsewhere. Both are sums over images divided by numbers of texts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flair_jax.objectives import ring

BATCH_AXES = ("data", "fsdp")  # mesh axes over which batches are split


def batch_axes() -> tuple[str, ...]:
    """Axes of the mesh in use (`jax.set_mesh`) over which batches are split; none without a mesh."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(axis for axis in BATCH_AXES if axis in names)


class ImageSide(NamedTuple):
    """Image features: `pooled` (N, D); `keys` and `values` (N, L + 1, H, D/H) of the pooling."""

    pooled: jax.Array
    keys: jax.Array
    values: jax.Array


class TextSide(NamedTuple):
    """Text features: `pooled` (N * K, D); `queries` (N * K, H, D/H) of the pooling."""

    pooled: jax.Array
    queries: jax.Array


def normalize(x: jax.Array) -> jax.Array:
    """Unit length along the last axis, in float32; zero stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def draw_captions(rng: jax.Array, place: jax.Array, other: jax.Array, captions: int) -> jax.Array:
    """Draws which caption of each other image an image meets.

    A draw is a function of its own two numbers, so that each device can make those that it needs, when it needs them.

    Args:
      rng: key of the training step.
      place: int (N,), place of the image within its block.
      other: int (M,), number of the other image in the batch.
      captions: K, captions an image.

    Returns:
      int32 (N, M) below K.
    """

    def draw(key, other):
        return jax.random.randint(jax.random.fold_in(key, other), (), 0, captions)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, place)
    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, other)


def draws_of_rows(rows: jax.Array, captions: int) -> jax.Array:
    """What the reference's ranks drew, in the form that `flair_loss` takes.

    Args:
      rows: int (N, B + K - 1), ascending; row i of rank s names the captions, of that rank's B * K, which every image
        at place i meets: all of the rank's own image i and one of each other image.
      captions: K.

    Returns:
      int32 (B, N), `draws` of `flair_loss`.
    """
    block_size = rows.shape[1] + 1 - captions
    place, other = jnp.arange(len(rows))[:, None] % block_size, jnp.arange(block_size)
    drawn = jnp.take_along_axis(rows, other + (other > place) * (captions - 1), axis=1) % captions  # (N, B)
    return drawn.reshape(-1, block_size, block_size).swapaxes(0, 1).reshape(block_size, -1).astype(jnp.int32)


def met_captions(
    place: jax.Array, first: jax.Array, drawn: jax.Array, block_size: int, captions: int
) -> tuple[jax.Array, jax.Array]:
    """What images meet of a shard of M images: one caption of each image and, of those at their own place, the others.

    Args:
      place: int (N,), place of each image within its block.
      first: number of the shard's first image in the batch.
      drawn: int (N, M), the caption of each image of the shard that is met, unless it is at the same place.
      block_size: images a block.
      captions: K, captions an image.

    Returns:
      Captions (N, J), as columns of the shard's M * K, and whether each counts (N, J) or is fill: a shard that cuts
      blocks does not have as many images at every place.
    """
    images = drawn.shape[1]
    same = (first + jnp.arange(images)) % block_size == place[:, None]
    one = jnp.arange(images) * captions + jnp.where(same, 0, drawn)
    twins = (place - first)[:, None] % block_size + jnp.arange(0, images, block_size)  # images at the same place
    others = twins[..., None] * captions + jnp.arange(1, captions)
    column = jnp.concatenate([one, others.reshape(len(place), -1)], axis=1)
    counts = column < images * captions
    return jnp.where(counts, column, 0), counts


def log_sigmoid_sum(logits: jax.Array, positive: jax.Array, counts: jax.Array | None = None) -> jax.Array:
    """Sum of -log sigmoid(y z) over all pairs, or those that count; y = +1 where `positive`."""
    return jnp.sum(jax.nn.softplus(jnp.where(positive, -logits, logits)), where=counts)


def flair_loss(
    image: ImageSide,
    text: TextSide,
    attend: Callable[..., jax.Array],
    params: Any,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    *,
    rng: jax.Array,
    draws: jax.Array | None = None,
    block_size: int | None = None,
    mps: bool = True,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """FLAIR's objective on a global batch, (TCS + MPS) / 2.

    Under a mesh (`jax.set_mesh`) each device works on its own images; only text features travel, from device to device
    in a ring.

    Args:
      image: features of N images.
      text: features of N * K captions, those of image n at n * K and behind.
      attend: `attend(params, queries (C, M, H, D/H), keys, values) -> (C, M, D)`, pools C images for M texts each.
      params: parameters of `attend`.
      logit_scale, logit_bias: scalars; the scale as its logarithm.
      rng: key of `draw_captions`.
      draws: int (B, N), to replace the draw: which caption of image m those at place i of their block meet, if m is not
        at place i itself.
      block_size: images a block, B; None: the batch is one block.
      mps: False leaves TCS alone.
      chunk_size: images to work on at a time on a device, for bounded memory; None: all at once.

    Returns:
      The loss, its parts, and the mean logit of TCS's positive and of its negative pairs, float32 scalars. None depends
      on the chunks or devices, up to rounding.

    Raises:
      ValueError: the batch cannot be split as asked.
    """
    images, texts = image.pooled.shape[0], text.pooled.shape[0]
    block_size = block_size or images
    if images % block_size:
        raise ValueError(f"loss.block_size {block_size} does not divide the batch of {images} images")
    if texts % images:
        raise ValueError(f"{texts} texts are no multiple of {images} images")
    per_image, blocks = texts // images, images // block_size

    def pair_sums(image, number, shared, constants, texts, shard):
        """The sums over pairs of some images, the first of which has this number, and the texts of a shard."""
        params, logit_scale, logit_bias = shared
        unit_texts, queries = texts  # (T, D), (T, H, D/H), all captions of the shard
        number, first = number + jnp.arange(len(image.pooled)), shard * shard_images  # (C,), ()
        scale = jnp.exp(logit_scale)
        place, others = number % block_size, first + jnp.arange(shard_images)
        rng, draws = constants
        drawn = draw_captions(rng, place, others, per_image) if draws is None else draws[place][:, others]
        column, counts = met_captions(place, first, drawn, block_size, per_image)  # (C, M)
        met_queries = queries.astype(jnp.float32)[column].astype(queries.dtype)  # so gradients are summed in float32
        pooled = attend(params, met_queries, image.keys, image.values)  # (C, M, D)
        cosine = jnp.einsum("cmd,cmd->cm", normalize(pooled), unit_texts[column])
        owner = first + jnp.arange(len(unit_texts)) // per_image
        logits, positive = scale * cosine + logit_bias, owner[column] == number[:, None]
        fixed = lax.stop_gradient(logits)
        sums = {
            "tcs": log_sigmoid_sum(logits, positive, counts),
            "positive": jnp.sum(fixed, where=counts & positive),
            "negative": jnp.sum(fixed, where=counts & ~positive),
        }
        if mps:
            cosine = normalize(image.pooled) @ unit_texts.T  # (C, T)
            sums["mps"] = log_sigmoid_sum(scale * cosine + logit_bias, owner == number[:, None])
        return sums

    axes = batch_axes()
    mesh = jax.sharding.get_abstract_mesh()
    shard_images = images // math.prod(mesh.shape[axis] for axis in axes)
    if chunk_size and shard_images % min(chunk_size, shard_images):
        raise ValueError(f"loss.chunk_size {chunk_size} does not divide the {shard_images} images of a device")
    sum_over_pairs = functools.partial(ring.sum_over_pairs, pair_sums, axes=axes, chunk_size=chunk_size)
    if axes:
        split, whole = PartitionSpec(axes), PartitionSpec()
        sum_over_pairs = jax.shard_map(sum_over_pairs, in_specs=(split, whole, whole, split), out_specs=whole)
    shared = params, jnp.asarray(logit_scale), jnp.asarray(logit_bias)
    constants = rng, None if draws is None else jnp.asarray(draws)
    sums = sum_over_pairs(image, shared, constants, (normalize(text.pooled), text.queries))

    met_texts = blocks * (block_size + per_image - 1)  # of an image
    tcs = sums["tcs"] / met_texts
    parts = {
        "tcs": tcs,
        "positive_logit": sums["positive"] / texts,
        "negative_logit": sums["negative"] / (images * met_texts - texts),
    }
    if not mps:
        return tcs, parts
    mps_loss = sums["mps"] / texts
    return (tcs + mps_loss) / 2, {**parts, "mps": mps_loss}
