"""FLAIR: image tokens pooled under the eye of each caption (Xiao et al., CVPR 2025)."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flair_jax.models import layers
from flair_jax.models.pooling import TextConditionedPooling
from flair_jax.models.text import Text, TextTower
from flair_jax.models.vision import VisionTower, pair
from flair_jax.objectives import sigmoid


@flax.struct.dataclass
class ImageFeatures:
    """Projected, not normalised. `pooled`: (B, D), the class token. `local`: (B, L, D), the patches row by row."""

    pooled: jax.Array
    local: jax.Array


@flax.struct.dataclass
class TextFeatures:
    """Projected, not normalised. `pooled`: (N, D) at the ends. `local`: (R, T, D), or None where nobody asked for it.
    `mask`: (R, T), False on padding.
    """

    pooled: jax.Array
    local: jax.Array | None
    mask: jax.Array


class FLAIR(nn.Module):
    """Two towers, two projections and the text-conditioned pooling.

    Attributes:
      embed_dim: D, width of the shared space.
      vision_options, text_options, pooling_options: sizes, the arguments of the towers and of the pooling.
      loss_options: `block_size`, `mps`, `chunk_size` of `sigmoid.flair_loss`.
      init_logit_scale, init_logit_bias: starting values; the scale is stored as its logarithm.
      dtype: of the computation; parameters, normalisation, softmax, scores and losses are float32.
      scan_blocks, remat, attention, gelu: see `layers.How`.
      micro_batches: parts in which a training step encodes its batch, see `accumulation.in_micro_batches`.
    """

    embed_dim: int
    vision_options: Mapping[str, Any]
    text_options: Mapping[str, Any]
    pooling_options: Mapping[str, Any]
    loss_options: Mapping[str, Any]
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float = -10.0
    dtype: Any = jnp.float32
    scan_blocks: bool = False
    remat: str = "none"
    attention: str = "xla"
    gelu: str = "exact"
    micro_batches: int = 1

    def setup(self):
        how = layers.How(self.dtype, self.scan_blocks, self.remat, self.attention, self.gelu)
        self.vision = VisionTower(**self.vision_options, how=how)
        self.text = TextTower(**self.text_options, how=how)
        self.pooling = TextConditionedPooling(self.embed_dim, **self.pooling_options, how=how)

        def projection(name, width):
            return self.param(name, nn.initializers.normal(width**-0.5), (width, self.embed_dim))

        self.image_projection = projection("image_projection", self.vision_options["width"])
        self.text_projection = projection("text_projection", self.text_options["width"])
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.init_logit_scale), ())
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.init_logit_bias), ())

    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """Touches every parameter, for initialisation: scores of padded tokens (N, T)."""
        return self.score(self.encode_image(images), self.encode_text(Text.padded(tokens)))

    def encode_image(self, images: jax.Array, *, rng: jax.Array | None = None, micro_batches: int = 1) -> ImageFeatures:
        """Normalised images (B, H, W, 3) -> features; `rng` and `micro_batches` are training's, see `VisionTower`."""
        x = self.vision(images, rng=rng, micro_batches=micro_batches)
        x = layers.project(x, self.image_projection.astype(self.dtype))  # (B, 1 + L, D)
        return ImageFeatures(pooled=x[:, 0], local=x[:, 1:])

    def encode_text(self, text: Text, *, local: bool = True, micro_batches: int = 1) -> TextFeatures:
        """Captions, packed or padded -> features in the order of `text.ends`; without `local` in less time."""
        pooled, tokens = self.text(text, local=local, micro_batches=micro_batches)
        projection = self.text_projection.astype(self.dtype)
        mask = text.tokens != 0 if text.segments is None else text.segments != 0
        return TextFeatures(pooled @ projection, layers.project(tokens, projection) if local else None, mask)

    def score(self, image_features: ImageFeatures, text_features: TextFeatures) -> jax.Array:
        """Scaled cosine of each text with the image pooled for it, without the bias: (B, N) float32."""
        pooled = self.pooling(text_features.pooled, image_features.local)  # (B, N, D)
        cosine = jnp.einsum("bnd,nd->bn", sigmoid.normalize(pooled), sigmoid.normalize(text_features.pooled))
        return jnp.exp(self.logit_scale) * cosine

    def global_score(self, image_features: ImageFeatures, text_features: TextFeatures) -> jax.Array:
        """Scaled cosine of the pooled features, as CLIP ranks: (B, N) float32."""
        cosine = sigmoid.normalize(image_features.pooled) @ sigmoid.normalize(text_features.pooled).T
        return jnp.exp(self.logit_scale) * cosine

    def attention_maps(self, image_features: ImageFeatures, text_features: TextFeatures) -> tuple[jax.Array, jax.Array]:
        """Where each text looks: weights (B, N, H, L) and the zero key's mass (B, N, H); together they sum to 1."""
        weights = self.pooling.weights(text_features.pooled, image_features.local)
        return weights[..., :-1], weights[..., -1]

    def dense_features(self, image_features: ImageFeatures) -> jax.Array:
        """Patch tokens in the space that texts are compared in: (B, L, D) -> (B, L, D)."""
        return self.pooling.values(image_features.local)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes, in pixels."""
        return pair(self.vision_options["image_size"])

    @property
    def context_length(self) -> int:
        """Longest caption in tokens."""
        return self.text_options["context_length"]

    def loss(self, batch: Mapping[str, Any], rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training objective on a global batch of N images and N * K captions.

        Args:
          batch: `images` (N, H, W, 3) normalised; `texts`, the fields of `Text`, caption c of image i at i * K + c;
            optionally `draws` (B, N) to use instead of own ones, see `sigmoid.flair_loss`.
          rng: key for the draws of the negative captions and of the patches to keep.

        Returns:
          The loss and its parts, float32 scalars.
        """
        of_patches, of_captions = jax.random.split(rng)
        parts = self.micro_batches
        image = self.encode_image(batch["images"], rng=of_patches, micro_batches=parts)
        text = self.encode_text(Text(**batch["texts"]), local=False, micro_batches=parts)
        pool = self.pooling.clone(parent=None)
        return sigmoid.flair_loss(
            sigmoid.ImageSide(image.pooled, *self.pooling.keys_values(image.local)),
            sigmoid.TextSide(text.pooled, self.pooling.queries(text.pooled)),
            lambda params, *args: pool.apply({"params": params}, *args, method="attend"),
            self.pooling.variables["params"],
            self.logit_scale,
            self.logit_bias,
            rng=of_captions,
            draws=batch.get("draws"),
            **self.loss_options,
        )
