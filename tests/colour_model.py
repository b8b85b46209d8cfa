"""A model without weights, to be checked by hand: patches are their mean colour, texts name a channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flair_jax.data.transforms.images import Preprocessing
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures


class ColourModel(nn.Module):
    """The first token of a text is the channel it asks for: 0 red, 1 green, 2 blue."""

    patch: int
    context_length = 77
    has_pooling = has_local = True
    has_regions = False
    preprocessing: Preprocessing = Preprocessing()

    def encode_image(self, images):
        batch, height, width, channels = images.shape
        p = self.patch
        x = images.reshape(batch, height // p, p, width // p, p, channels).mean((2, 4))
        local = x.reshape(batch, -1, channels)
        return ImageFeatures(pooled=local.mean(1), local=local)

    def encode_text(self, text, *, local=True):
        pooled = jax.nn.one_hot(text.tokens.reshape(-1)[text.ends - 1], 3)
        return TextFeatures(pooled=pooled, local=pooled[:, None] if local else None, mask=text.tokens != 0)

    def score(self, image_features, text_features):
        return jnp.einsum("bld,nd->bnl", image_features.local, text_features.pooled).max(-1)

    def global_score(self, image_features, text_features):
        return image_features.pooled @ text_features.pooled.T

    def attention_maps(self, image_features, text_features):
        """Head 0 follows the channel and has a zero mass of 1/4; head 1 is even and has 3/4."""
        local = image_features.local
        asked = jnp.einsum("bld,nd->bnl", local, text_features.pooled) + 1e-6
        asked = 0.75 * asked / asked.sum(-1, keepdims=True)
        even = jnp.full_like(asked, 0.25 / local.shape[1])
        weights = jnp.stack([asked, even], axis=2)  # (B, N, 2, L)
        return weights, 1 - weights.sum(-1)

    def dense_features(self, image_features):
        """Channels in another order, so that this way and the plain one differ."""
        return jnp.roll(image_features.local, 1, axis=-1)


class RegionModel(ColourModel):
    """Its regions are the patches."""

    has_pooling, has_regions = False, True

    def encode_image(self, images):
        features = super().encode_image(images)
        rows, columns = (side // self.patch for side in images.shape[1:3])
        y, x = (
            (np.arange(rows * columns) // columns + 0.5) / rows,
            (np.arange(rows * columns) % columns + 0.5) / columns,
        )
        boxes = np.stack([x, y, np.full_like(x, 1 / columns), np.full_like(x, 1 / rows)], axis=1)
        boxes = jnp.broadcast_to(jnp.asarray(boxes, jnp.float32), (len(images), *boxes.shape))
        return features.replace(regions=features.local, boxes=boxes)

    def region_score(self, image_features, text_features):
        return image_features.regions @ text_features.pooled.T


def texts(*channels: int) -> np.ndarray:
    """Padded texts (N, 2) that ask for channels."""
    return np.array([[channel, 9] for channel in channels], np.int32)


def canvas(height: int, width: int, **squares) -> np.ndarray:
    """A black float32 image with pure rectangles: red=(row, column, height, width), green=…, blue=…"""
    image = np.zeros((height, width, 3), np.float32)
    for colour, (row, column, rows, columns) in squares.items():
        image[row : row + rows, column : column + columns, ("red", "green", "blue").index(colour)] = 1
    return image
