"""Vision transformer that returns its class token and its patch tokens."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flair_jax.data.transforms.images import pair
from flair_jax.models import layers


def grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Raises:
      ValueError: patches do not divide the image.
    """
    height, width = pair(image_size)
    if height % patch_size or width % patch_size:
        raise ValueError(f"model.vision.image_size {image_size} is no multiple of patch_size {patch_size}")
    return height // patch_size, width // patch_size


def kept_patches(patches: int, dropout: float) -> int:
    """How many of an image's patches a training step sees, at least one.

    Raises:
      ValueError: no such share can be left out.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"model.vision.patch_dropout is {dropout}; expected a share of the patches, 0 <= share < 1")
    return max(1, round(patches * (1 - dropout)))


class PatchEmbedding(nn.Module):
    """Patches through one linear map, (B, H, W, 3) -> (B, H/p * W/p, width), row by row; no bias."""

    patch_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p = self.patch_size
        kernel = self.param("kernel", layers.torch_linear(p * p * channels), (p, p, channels, self.width))
        # A reshape and one matrix product: the strided convolution is the same sum and slower on a CPU.
        x = images.reshape(batch, height // p, p, width // p, p, channels).astype(self.dtype)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)  # (B, L, p * p * 3)
        return layers.project(x, kernel.astype(self.dtype).reshape(-1, self.width))


class VisionTower(nn.Module):
    """ViT with a class token and normalisation before and after the blocks.

    Attributes:
      image_size: height and width in pixels, one number for both.
      patch_size: side of a patch in pixels.
      width, depth, heads: of the transformer.
      compute: how it computes.
      position_std: deviation of the initial position embedding; None: 1 / sqrt(width), as the reference.
      patch_dropout: share of each image's patches that a training step leaves out (FLIP, Li et al., CVPR 2023).
    """

    image_size: int | tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    compute: layers.ComputeOptions = layers.ComputeOptions()
    position_std: float | None = None
    patch_dropout: float = 0.0

    def setup(self):
        # PyTorch's defaults: the reference re-initialises only the text tower (golden/flair/full/init_stats.json).
        init = layers.BlockInit(
            qkv=layers.uniform(math.sqrt(6 / (4 * self.width))),  # Xavier over the fused (3W, W) matrix
            out=layers.torch_linear(self.width),
            fc=layers.torch_linear(self.width),
            proj=layers.torch_linear(4 * self.width),
        )
        normal = nn.initializers.normal(self.width**-0.5)
        rows, columns = grid(self.image_size, self.patch_size)
        self.kept = kept_patches(rows * columns, self.patch_dropout)
        self.patch_embedding = PatchEmbedding(self.patch_size, self.width, self.compute.dtype)
        self.class_embedding = self.param("class_embedding", normal, (self.width,))
        position = normal if self.position_std is None else nn.initializers.normal(self.position_std)
        self.position_embedding = self.param("position_embedding", position, (1 + rows * columns, self.width))
        self.ln_pre = layers.LayerNorm(dtype=self.compute.dtype)
        block = layers.block_class(self.compute.remat)
        self.blocks = [block(self.heads, False, init, self.compute) for _ in range(self.depth)]
        self.ln_post = layers.LayerNorm(dtype=self.compute.dtype)

    def __call__(self, images: jax.Array, *, rng: jax.Array | None = None, micro_batches: int = 1) -> jax.Array:
        """Normalised images (B, H, W, 3) -> tokens (B, 1 + L, width), the class token first.

        Args:
          images: of the config's size.
          rng: key for the draw of the patches to keep, in training; None keeps all of them. L counts those kept.
          micro_batches: parts of the images that go through the blocks one after another.

        Raises:
          ValueError: the images do not have the size of the config.
        """
        expected = (*pair(self.image_size), 3)
        if images.shape[1:] != expected:
            raise ValueError(f"images have shape {images.shape}; expected (batch, {', '.join(map(str, expected))})")
        x = self.patch_embedding(images)  # (B, L, W)
        first = jnp.broadcast_to(self.class_embedding.astype(self.compute.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding.astype(self.compute.dtype)  # (B, 1 + L, W)
        if rng is not None and self.patch_dropout:
            x = self.drop_patches(x, rng)
        x = layers.run_blocks(self.blocks, self.ln_pre(x), scan=self.compute.scan_blocks, micro_batches=micro_batches)
        return self.ln_post(x)

    def drop_patches(self, x: jax.Array, rng: jax.Array) -> jax.Array:
        """The class token and `kept` patches of each image, drawn without replacement and left in order.

        (B, 1 + L, W) -> (B, 1 + kept, W).
        """
        order = jnp.argsort(jax.random.uniform(rng, (x.shape[0], x.shape[1] - 1)), axis=1)  # (B, L)
        patches = 1 + jnp.sort(order[:, : self.kept], axis=1)  # (B, kept) indices after the class token
        tokens = jnp.pad(patches, ((0, 0), (1, 0)))  # (B, 1 + kept)
        return jnp.take_along_axis(x, tokens[:, :, None], axis=1)
