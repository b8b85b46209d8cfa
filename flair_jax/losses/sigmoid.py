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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

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


def draw_captions(rng: jax.Array, images: int, block_size: int, captions: int) -> jax.Array:
    """Draws the row of texts of every image: all its own captions and one of each other image of its block.

    Returns:
      int32 (images, B + K - 1), indices into the B * K texts of the image's block, ascending, so that the own captions
      of the block's image i stand at columns i to i + K - 1.
    """
    place = jnp.arange(images)[:, None] % block_size  # (N, 1), i
    column = jnp.arange(block_size + captions - 1)[None]  # (1, J)
    draws = jax.random.randint(rng, (images, block_size + captions - 1), 0, captions)
    own = (column >= place) & (column < place + captions)
    other = jnp.where(column < place, column, column - captions + 1)
    return jnp.where(own, place * captions + column - place, other * captions + draws)


def log_sigmoid_sum(logits: jax.Array, positive: jax.Array) -> jax.Array:
    """Sum of -log sigmoid(y z) over all pairs, y = +1 where `positive`."""
    return jnp.sum(jax.nn.softplus(jnp.where(positive, -logits, logits)))


def flair_loss(
    image: ImageSide,
    text: TextSide,
    attend: Callable[..., jax.Array],
    params: Any,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    *,
    rng: jax.Array,
    captions: jax.Array | None = None,
    block_size: int | None = None,
    mps: bool = True,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """FLAIR's objective on a global batch, (TCS + MPS) / 2.

    Under a mesh (`jax.set_mesh`) each device works on its own images; only text features travel.

    Args:
      image: features of N images.
      text: features of N * K captions, those of image n at n * K and behind.
      attend: `attend(params, queries (C, M, H, D/H), keys, values) -> (C, M, D)`, pools C images for M texts each.
      params: parameters of `attend`.
      logit_scale, logit_bias: scalars; the scale as its logarithm.
      rng: key of `draw_captions`.
      captions: the result of `draw_captions`, to replace the draw.
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
    if captions is None:
        captions = draw_captions(rng, images, block_size, per_image)

    # Rows of global text indices by place within the block: `rows[i]` is what every image at place i meets.
    starts = jnp.arange(blocks)[:, None, None] * block_size * per_image
    rows = (captions.reshape(blocks, block_size, -1) + starts).swapaxes(0, 1).reshape(block_size, -1)  # (B, W * J)

    def local_loss(image, text, params, logit_scale, logit_bias, rows, *, axes):
        """The sums over the images of one device; `text` and `rows` are whole."""
        shard = image.pooled.shape[0]
        first = lax.axis_index(axes) * shard if axes else 0
        if axes:
            text = jax.tree.map(lambda x: lax.all_gather(x, axes, tiled=True), text)
        unit_texts = normalize(text.pooled)  # (N * K, D)
        scale = jnp.exp(logit_scale)

        def chunk_loss(image, number):  # C images and their numbers (C,) in the batch
            row = rows[number % block_size]  # (C, M)
            pooled = attend(params, text.queries[row], image.keys, image.values)  # (C, M, D)
            cosine = jnp.einsum("cmd,cmd->cm", normalize(pooled), unit_texts[row])
            logits, own = scale * cosine + logit_bias, row // per_image == number[:, None]
            sums = {"tcs": log_sigmoid_sum(logits, own)}
            fixed = lax.stop_gradient(logits)
            sums |= {"positive": jnp.sum(fixed, where=own), "negative": jnp.sum(fixed, where=~own)}
            if mps:
                cosine = normalize(image.pooled) @ unit_texts.T  # (C, N * K)
                owner = jnp.arange(texts) // per_image
                sums["mps"] = log_sigmoid_sum(scale * cosine + logit_bias, owner == number[:, None])
            return sums

        number = first + jnp.arange(shard)
        if chunk_size is None or chunk_size >= shard:
            sums = chunk_loss(image, number)
        else:
            if shard % chunk_size:
                raise ValueError(f"loss.chunk_size {chunk_size} does not divide the {shard} images of a device")
            # Only the checkpoint bounds memory: a scan alone keeps every chunk's intermediates for the backward pass.
            step = jax.checkpoint(lambda chunk: chunk_loss(*chunk))
            chunks = jax.tree.map(lambda x: x.reshape(-1, chunk_size, *x.shape[1:]), (image, number))
            _, sums = lax.scan(lambda _, chunk: (None, step(chunk)), None, chunks)
            sums = jax.tree.map(jnp.sum, sums)
        return lax.psum(sums, axes) if axes else sums

    axes = batch_axes()
    arguments = (image, text, params, logit_scale, logit_bias, rows)
    if axes:
        split, whole = PartitionSpec(axes), PartitionSpec()
        specs = (split, split, whole, whole, whole, whole)
        sharded = jax.shard_map(lambda *a: local_loss(*a, axes=axes), in_specs=specs, out_specs=whole)
        sums = sharded(*arguments)
    else:
        sums = local_loss(*arguments, axes=())

    met = blocks * (block_size + per_image - 1)  # texts of an image
    tcs = sums["tcs"] / met
    parts = {
        "tcs": tcs,
        "positive_logit": sums["positive"] / texts,
        "negative_logit": sums["negative"] / (images * met - texts),
    }
    if not mps:
        return tcs, parts
    mps_loss = sums["mps"] / texts
    return (tcs + mps_loss) / 2, {**parts, "mps": mps_loss}
