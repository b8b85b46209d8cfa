"""Vision transformer that returns its class token and its patch tokens."""

import functools
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
    """Patches through one linear map, (B, H, W, 3) -> (B, H/p * W/p, width), row by row."""

    patch_size: int
    width: int
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p = self.patch_size
        init = layers.torch_linear(p * p * channels)
        kernel = self.param("kernel", init, (p, p, channels, self.width))
        bias = self.param("bias", init, (self.width,)) if self.use_bias else 0
        # A reshape and one matrix product: the strided convolution is the same sum and slower on a CPU.
        x = images.reshape(batch, height // p, p, width // p, p, channels).astype(self.dtype)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)  # (B, L, p * p * 3)
        x = layers.project(x, kernel.astype(self.dtype).reshape(-1, self.width))
        return x + jnp.asarray(bias, self.dtype)


class VisionTower(nn.Module):
    """ViT with a class token and normalisation before (perhaps) and after the blocks.

    Two families: OpenCLIP's, the default; and timm's as SLIP, LaCLIP and GRAIN train it, with `pre_norm=False`,
    `patch_bias=True`, `qk_norm=True`, `norm_eps=1e-6` and `init="timm"` (golden/grain, spec/grain.md 1.1 and 1.4).

    Attributes:
      image_size: height and width in pixels, one number for both.
      patch_size: side of a patch in pixels.
      width, depth, heads: of the transformer.
      compute: how it computes.
      position_std: deviation of the initial position embedding; None: 1 / sqrt(width), as the reference.
      patch_dropout: share of each image's patches that a training step leaves out (FLIP, Li et al., CVPR 2023).
      pre_norm: whether to normalise before the blocks.
      patch_bias: whether the patch embedding has a bias.
      qk_norm: whether each head's queries and keys are normalised, see `layers.Attention`.
      norm_eps: of all normalisation.
      init: of the parameters, "open_clip" or "timm".
      gelu: of this tower; None: the model's.

    Raises:
      ValueError: there is no such `init`, or patches do not divide the image.
    """

    image_size: int | tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    compute: layers.ComputeOptions = layers.ComputeOptions()
    position_std: float | None = None
    patch_dropout: float = 0.0
    pre_norm: bool = True
    patch_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    init: str = "open_clip"
    gelu: str | None = None

    def setup(self):
        normal, positions, block_init = self._initializers()
        compute = self.compute if self.gelu is None else self.compute._replace(gelu=self.gelu)
        rows, columns = grid(self.image_size, self.patch_size)
        self.kept = kept_patches(rows * columns, self.patch_dropout)
        self.patch_embedding = PatchEmbedding(self.patch_size, self.width, compute.dtype, self.patch_bias)
        self.class_embedding = self.param("class_embedding", normal, (self.width,))
        self.position_embedding = self.param("position_embedding", positions, (1 + rows * columns, self.width))
        norm = functools.partial(layers.LayerNorm, epsilon=self.norm_eps, dtype=compute.dtype)
        if self.pre_norm:
            self.ln_pre = norm()
        block = functools.partial(layers.block_class(compute.remat), qk_norm=self.qk_norm, norm_eps=self.norm_eps)
        self.blocks = [block(self.heads, False, block_init, compute) for _ in range(self.depth)]
        self.ln_post = norm()

    def _initializers(self) -> tuple[Any, Any, layers.BlockInit]:
        """Of the class token, of the positions and of a block."""
        block = layers.BlockInit.torch(self.width)
        if self.init == "open_clip":  # the reference re-initialises only the text tower (golden/flair/full)
            normal = nn.initializers.normal(self.width**-0.5)
            positions = normal if self.position_std is None else nn.initializers.normal(self.position_std)
            return normal, positions, block
        if self.init == "timm":  # the blocks are made anew after timm's own initialisation
            linear = layers.torch_linear(self.width)
            # timm cuts at 2, in units of the embedding, which is no cut at all.
            positions = nn.initializers.normal(0.02 if self.position_std is None else self.position_std)
            return nn.initializers.normal(1e-6), positions, block._replace(qkv=linear, qkv_bias=linear, out_bias=linear)
        raise ValueError(f"model.vision.init is {self.init!r}; expected 'open_clip' or 'timm'")

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
        x = self.ln_pre(x) if self.pre_norm else x
        x = layers.run_blocks(self.blocks, x, scan=self.compute.scan_blocks, micro_batches=micro_batches)
        return self.ln_post(x)

    def drop_patches(self, x: jax.Array, rng: jax.Array) -> jax.Array:
        """The class token and `kept` patches of each image, drawn without replacement and left in order.

        (B, 1 + L, W) -> (B, 1 + kept, W).
        """
        order = jnp.argsort(jax.random.uniform(rng, (x.shape[0], x.shape[1] - 1)), axis=1)  # (B, L)
        patches = 1 + jnp.sort(order[:, : self.kept], axis=1)  # (B, kept) indices after the class token
        tokens = jnp.pad(patches, ((0, 0), (1, 0)))  # (B, 1 + kept)
        return jnp.take_along_axis(x, tokens[:, :, None], axis=1)
