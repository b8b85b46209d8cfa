"""Two towers, two projections and, if asked for, text-conditioned pooling or a query decoder: FLAIR, CLIP, SigLIP and
GRAIN are its configs.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flair_jax import cpu
from flair_jax.data.transforms.base import CAPTIONS
from flair_jax.data.transforms.images import Preprocessing, pair
from flair_jax.models import layers
from flair_jax.models.decoder import Decoded, QueryDecoder
from flair_jax.models.pooling import TextConditionedPooling
from flair_jax.models.text import HiddenStates, Text, TextTower
from flair_jax.models.vision import VisionTower

CACHED_TEXTS = 1024  # at most pooled at a time for an image on a CPU; all of 8,192 take a third longer


@flax.struct.dataclass
class ImageFeatures:
    """Projected, not normalised.

    `pooled`: (B, D), the class token, or the image query of a decoder. `local`: (B, L, D), the patches row by row; None
    where the model does not project them. Of a decoder, else None: `regions`, (B, Q, D); `boxes`, float32 (B, Q, 4),
    centre x, centre y, width, height as shares of the picture; in training `layer_boxes`, (depth, B, Q, 4), too; and
    where it was asked for `attention`, float32 (B, depth, Q + 1, H, 1 + L), where the queries look: by layer and head,
    the image query last, the class token first; the weights of a query sum to 1.
    """

    pooled: jax.Array
    local: jax.Array | None
    regions: jax.Array | None = None
    boxes: jax.Array | None = None
    layer_boxes: jax.Array | None = None
    attention: jax.Array | None = None


@flax.struct.dataclass
class TextFeatures:
    """Projected, not normalised. `pooled`: (N, D) at the ends. `local`: (R, T, D), or None where nobody asked for it.
    `mask`: (R, T), False on padding. `hidden`: states of the transformer, where they were asked for.
    """

    pooled: jax.Array
    local: jax.Array | None
    mask: jax.Array
    hidden: HiddenStates | None = None


@flax.struct.dataclass
class PoolingFeatures:
    """What text-conditioned pooling needs of each image and of each text, computed once.

    `queries`: (N, H, D/H). `keys`, `values`: (B, L + 1, H, D/H). `params`: of `attend`, a pure function
    `attend(params, queries (B, M, H, D/H), keys, values) -> (B, M, D)` that pools each image for M texts of its own.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    params: Any
    attend: Callable[..., jax.Array] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Features:
    """What objectives see of a batch of B images and N texts, N a multiple of B, in image-major order.

    `logit_scale`: scalar, as its logarithm. `logit_bias`: scalar, or None where the model has none. `pooling`: None
    where the model has no text-conditioned pooling. `slots`: (name, count) of the N / B texts of an image in their
    order, such as (("captions", 1), ("negatives", 3)); (): all are captions.
    """

    image: ImageFeatures
    text: TextFeatures
    logit_scale: jax.Array
    logit_bias: jax.Array | None = None
    pooling: PoolingFeatures | None = None
    slots: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False, default=())

    def count(self, slot: str) -> int:
        """Texts an image in a slot, 0 where there is no such slot."""
        texts = self.text.pooled.shape[0] // self.image.pooled.shape[0]
        return dict(self.slots or ((CAPTIONS, texts),)).get(slot, 0)

    def in_slot(self, slot: str, x: jax.Array) -> jax.Array:
        """What a slot has of an array by image and text: (B, N / B, …) -> (B, count, …).

        Raises:
          ValueError: the batch has other texts than its slots.
        """
        if self.slots and sum(count for _, count in self.slots) != x.shape[1]:
            raise ValueError(f"the batch has {x.shape[1]} texts an image; expected those of the slots {self.slots}")
        first = sum(count for _, count in itertools.takewhile(lambda entry: entry[0] != slot, self.slots))
        return x[:, first : first + self.count(slot)]

    def exist(self, slot: str, valid: jax.Array | None) -> jax.Array:
        """Which texts of a slot there are, bool (B, count), by the batch's `valid` (B, N / B); None: all of them."""
        if valid is None:
            return jnp.ones((self.image.pooled.shape[0], self.count(slot)), bool)
        return self.in_slot(slot, valid)

    def of_slot(self, slot: str) -> "Features":
        """The same features with the texts of one slot alone; without local text features, which are by row.

        Raises:
          ValueError: there are no such texts.
        """
        if not self.slots and slot == CAPTIONS:
            return self
        if not self.count(slot):
            raise ValueError(f"the batch has no texts in the slot {slot!r}; its slots are {self.slots}")

        images = self.image.pooled.shape[0]

        def take(x):
            return self.in_slot(slot, x.reshape(images, -1, *x.shape[1:])).reshape(-1, *x.shape[1:])

        text = TextFeatures(take(self.text.pooled), local=None, mask=None)
        pooling = self.pooling and self.pooling.replace(queries=take(self.pooling.queries))
        return self.replace(text=text, pooling=pooling, slots=())


class DualEncoder(nn.Module):
    """An image tower and a text tower with a shared space of D dimensions; or one of them alone, as some checkpoints
    hold it, to encode with.

    Attributes:
      embed_dim: D, width of the shared space. None, for a tower alone: features are not projected.
      vision_options, text_options: sizes, the arguments of the towers; None: there is no such tower.
      pooling_options: arguments of `TextConditionedPooling`; None: the model has none and compares pooled features.
      decoder_options: arguments of `QueryDecoder`, whose image query then gives an image's pooled features; None: the
        class token does.
      project_image: whether class token and patches have a projection. Only a decoder's model can do without, and then
        has no local features.
      init_logit_scale: starting value of the scale, as its logarithm.
      init_logit_bias: starting value of the bias; None: the model has none.
      compute: how it computes, see `layers.ComputeOptions`.
      micro_batches: parts in which a training step encodes its batch, see `accumulation.in_micro_batches`.
      preprocessing: the way from pictures to `images`, for those who call the model.
    """

    embed_dim: int | None
    vision_options: Mapping[str, Any] | None
    text_options: Mapping[str, Any] | None
    pooling_options: Mapping[str, Any] | None = None
    decoder_options: Mapping[str, Any] | None = None
    project_image: bool = True
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    compute: layers.ComputeOptions = layers.ComputeOptions()
    micro_batches: int = 1
    preprocessing: Preprocessing = Preprocessing()

    def setup(self):
        if self.vision_options is not None:
            self.vision = VisionTower(**self.vision_options, compute=self.compute)
        if self.text_options is not None:
            self.text = TextTower(**self.text_options, compute=self.compute)
        if self.pooling_options is not None:
            self.pooling = TextConditionedPooling(self.embed_dim, **self.pooling_options, compute=self.compute)
        if self.decoder_options is not None:
            self.decoder = QueryDecoder(self.embed_dim, **self.decoder_options, compute=self.compute)
        if not self.project_image and (self.decoder_options is None or self.pooling_options is not None):
            raise ValueError("model.project_image may be False only with model.decoder, and without model.pooling")

        def projection(name, width):
            return self.param(name, nn.initializers.normal(width**-0.5), (width, self.embed_dim))

        if self._projects_image:
            self.image_projection = projection("image_projection", self.vision_options["width"])
        if self.embed_dim is not None and self.text_options is not None:
            self.text_projection = projection("text_projection", self.text_options["width"])
        if self.vision_options is None or self.text_options is None:
            return
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.init_logit_scale), ())
        if self.init_logit_bias is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.init_logit_bias), ())

    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """Touches every parameter, for initialisation: scores of padded tokens (N, T)."""
        return self.score(self.encode_image(images), self.encode_text(Text.padded(tokens)))

    def encode_image(
        self, images: jax.Array, *, rng: jax.Array | None = None, micro_batches: int = 1, attention: bool = False
    ) -> ImageFeatures:
        """Normalised images (B, H, W, 3) -> features.

        Args:
          images: to encode.
          rng, micro_batches: of training, see `VisionTower`.
          attention: whether the attention of a decoder's queries is asked for too.

        Raises:
          ValueError: attention of queries is asked for, and the model has no decoder.
        """
        image, decoded = self._image_features(images, rng, micro_batches)
        if not attention:
            return image
        if decoded is None:
            raise ValueError("attention of queries needs a query decoder, and config.model.decoder is None")
        return image.replace(attention=jnp.moveaxis(decoded.attention, 0, 1))

    def _image_features(
        self, images: jax.Array, rng: jax.Array | None = None, micro_batches: int = 1
    ) -> tuple[ImageFeatures, Decoded | None]:
        self._needs("vision")
        x = self.vision(images, rng=rng, micro_batches=micro_batches)
        projected = layers.project(x, self.image_projection.astype(self.dtype)) if self._projects_image else x
        local = projected[:, 1:] if self.project_image else None  # (B, L, D)
        if self.decoder_options is None:
            return ImageFeatures(projected[:, 0], local), None
        decoded = self.decoder(x)
        return ImageFeatures(decoded.image, local, decoded.regions, decoded.boxes[-1]), decoded

    def encode_text(self, text: Text, *, local: bool = True, micro_batches: int = 1) -> TextFeatures:
        """Captions, packed or padded -> features in the order of `text.ends`; without `local` in less time."""
        self._needs("text")
        pooled, tokens = self.text(text, local=local, micro_batches=micro_batches)
        return self._text_features(text, pooled, tokens)

    def encode_text_with_hidden(self, text: Text) -> TextFeatures:
        """`encode_text` with `local` and `hidden`."""
        self._needs("text")
        hidden = self.text.hidden_states(text)
        return self._text_features(text, hidden.pooled, hidden.last).replace(hidden=hidden)

    def _text_features(self, text: Text, pooled: jax.Array, tokens: jax.Array | None) -> TextFeatures:
        mask = text.tokens != 0 if text.segments is None else text.segments != 0
        if self.embed_dim is None:
            return TextFeatures(pooled, tokens, mask)
        projection = self.text_projection.astype(self.dtype)
        return TextFeatures(pooled @ projection, None if tokens is None else layers.project(tokens, projection), mask)

    def features(
        self, images: jax.Array, text: Text, *, rng: jax.Array | None = None, local_text: bool = False
    ) -> Features:
        """What the objectives of a training step see, see `Features`.

        Args:
          images: normalised (B, H, W, 3).
          text: N texts; those of image b are b * N / B and the ones after it.
          rng: key of the patches to keep; None keeps all.
          local_text: whether an objective needs `text.local`.
        """
        image, decoded = self._image_features(images, rng, self.micro_batches)
        image = image if decoded is None else image.replace(layer_boxes=decoded.boxes)
        text = self.encode_text(text, local=local_text, micro_batches=self.micro_batches)
        bias = None if self.init_logit_bias is None else self.logit_bias
        pooling = None if self.pooling_options is None else self._pooling_features(image, text)
        return Features(image, text, self.logit_scale, bias, pooling)

    def _pooling_features(self, image: ImageFeatures, text: TextFeatures) -> PoolingFeatures:
        unbound = self.pooling.clone(parent=None)
        return PoolingFeatures(
            self.pooling.queries(text.pooled),
            *self.pooling.keys_values(image.local),
            params=self.pooling.variables["params"],
            attend=lambda params, *args: unbound.apply({"params": params}, *args, method="attend"),
        )

    def score(self, image_features: ImageFeatures, text_features: TextFeatures) -> jax.Array:
        """What images and texts are ranked by, without the bias: (B, N) float32.

        With text-conditioned pooling the scaled cosine of each text with the image pooled for it, otherwise
        `global_score`.
        """
        if self.pooling_options is None:
            return self.global_score(image_features, text_features)
        text = layers.normalize(text_features.pooled)
        if cpu.alone() and not self.is_initializing():
            cosine = self._cosine_by_image(image_features, text_features, text)
        else:
            pooled = self.pooling(text_features.pooled, image_features.local)  # (B, N, D)
            cosine = jnp.einsum("bnd,nd->bn", layers.normalize(pooled), text)
        return jnp.exp(self.logit_scale) * cosine

    def score_few_texts(self, image_features: ImageFeatures, text_features: TextFeatures) -> jax.Array:
        """`score` with less work for few texts and many images, see `TextConditionedPooling.pool_few_texts`.

        Raises:
          ValueError: the model has no text-conditioned pooling.
        """
        self._needs_pooling("text-conditioned scores")
        pooled = self.pooling.pool_few_texts(text_features.pooled, image_features.local)  # (B, N, D)
        text = layers.normalize(text_features.pooled)
        return jnp.exp(self.logit_scale) * jnp.einsum("bnd,nd->bn", layers.normalize(pooled), text)

    def _cosine_by_image(self, image: ImageFeatures, text: TextFeatures, normalized: jax.Array) -> jax.Array:
        """The cosines of `score`, one image after the other and some of its texts at a time, for a CPU's caches."""
        parts, count = self._pooling_features(image, text), len(normalized)
        blocks = max(1, math.ceil(count / CACHED_TEXTS))
        missing = -count % blocks

        def blocked(x):
            padded = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
            return padded.reshape(blocks, -1, *x.shape[1:])

        def one_image(keys_values):
            keys, values = (x[None] for x in keys_values)

            def some_texts(queries_texts):
                queries, texts = queries_texts
                pooled = parts.attend(parts.params, queries[None], keys, values)[0]  # (N, D)
                return jnp.einsum("nd,nd->n", layers.normalize(pooled), texts)

            return jax.lax.map(some_texts, (blocked(parts.queries), blocked(normalized))).reshape(-1)[:count]

        return jax.lax.map(one_image, (parts.keys, parts.values))

    def global_score(self, image_features: ImageFeatures, text_features: TextFeatures) -> jax.Array:
        """Scaled cosine of the pooled features, as CLIP ranks: (B, N) float32."""
        self._needs("vision")
        self._needs("text")
        cosine = layers.normalize(image_features.pooled) @ layers.normalize(text_features.pooled).T
        return jnp.exp(self.logit_scale) * cosine

    def region_score(self, image_features: ImageFeatures, text_features: TextFeatures) -> jax.Array:
        """Scaled cosine of each region of an image with each text: (B, Q, N) float32.

        Raises:
          ValueError: the model has no decoder.
        """
        if self.decoder_options is None:
            raise ValueError("scores of regions need a query decoder, and config.model.decoder is None")
        regions, texts = (layers.normalize(x) for x in (image_features.regions, text_features.pooled))
        return jnp.exp(self.logit_scale) * jnp.einsum("bqd,nd->bqn", regions, texts)

    def attention_maps(self, image_features: ImageFeatures, text_features: TextFeatures) -> tuple[jax.Array, jax.Array]:
        """Where each text looks: weights (B, N, H, L) and the zero key's mass (B, N, H); together they sum to 1.

        Raises:
          ValueError: the model has no text-conditioned pooling.
        """
        self._needs_pooling("attention maps")
        weights = self.pooling.weights(text_features.pooled, image_features.local)
        return weights[..., :-1], weights[..., -1]

    def dense_features(self, image_features: ImageFeatures) -> jax.Array:
        """Patch tokens in the space that texts are compared in: (B, L, D) -> (B, L, D).

        Raises:
          ValueError: the model has no text-conditioned pooling, and `image_features.local` are these tokens.
        """
        self._needs_pooling("patch tokens through the pooling's value path")
        return self.pooling.values(image_features.local)

    def _needs(self, tower: str) -> None:
        if (self.vision_options if tower == "vision" else self.text_options) is None:
            name = {"vision": "image", "text": "text"}[tower]
            raise ValueError(f"the model has no {name} tower: config.model.{tower} is None, as in its checkpoint")

    def _needs_pooling(self, what: str) -> None:
        if self.pooling_options is None:
            raise ValueError(f"{what} need text-conditioned pooling, and config.model.pooling is None")

    @property
    def has_pooling(self) -> bool:
        """Whether `score` is text-conditioned, and there are attention maps."""
        return self.pooling_options is not None

    @property
    def has_local(self) -> bool:
        """Whether image features have projected patches."""
        return self.project_image

    @property
    def has_regions(self) -> bool:
        """Whether image features have regions and boxes."""
        return self.decoder_options is not None

    @property
    def _projects_image(self) -> bool:
        return self.embed_dim is not None and self.vision_options is not None and self.project_image

    @property
    def dtype(self) -> Any:
        """Of the computation; parameters, normalisation, softmax, scores and losses are float32."""
        return self.compute.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes, in pixels. Raises ValueError if it takes none."""
        self._needs("vision")
        return pair(self.vision_options["image_size"])

    @property
    def context_length(self) -> int:
        """Longest caption in tokens. Raises ValueError if there is no text tower."""
        self._needs("text")
        return self.text_options["context_length"]
