"""Attention pooling of image tokens with a text as the query (FLAIR, section 3.2, equation 1)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from flair_jax.models import layers


class TextConditionedPooling(nn.Module):
    """Attention pooling of the local tokens of each image, conditioned on each text.

    The work is split by what it depends on, so that each part is done once: `queries` once a text, `keys_values` once
    an image, `attend` once a pair. After the projected keys and values comes a row of zeros: a text that finds
    nothing in the image can look there (`add_zero_attn` of the reference), and no mask is needed.
    """

    width: int
    heads: int
    compute: layers.ComputeOptions = layers.ComputeOptions()

    def setup(self):
        self.ln_q = layers.LayerNorm(dtype=self.compute.dtype)
        self.ln_k = layers.LayerNorm(dtype=self.compute.dtype)
        self.ln_v = layers.LayerNorm(dtype=self.compute.dtype)
        self.attention = layers.Attention(self.width, self.heads, layers.BlockInit.torch(self.width), self.compute)
        nn.share_scope(self, self.attention)  # its parameters are the pooling's own

    def queries(self, text: jax.Array) -> jax.Array:
        """(..., D) -> (..., H, D/H)."""
        return self.attention.queries(self.ln_q(text))

    def keys_values(self, local: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, L, D) -> keys and values (B, L + 1, H, D/H), the zero row last."""
        zero_row = ((0, 0), (0, 1), (0, 0), (0, 0))
        keys, values = self.attention.keys_values(self.ln_k(local), self.ln_v(local))
        return jnp.pad(keys, zero_row), jnp.pad(values, zero_row)

    def attend(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """(B, N, H, D/H) and the image's (B, L + 1, H, D/H) twice -> pooled (B, N, D)."""
        return self.attention.output(layers.attend(queries, keys, values, attention=self.compute.attention))

    def __call__(self, text: jax.Array, local: jax.Array) -> jax.Array:
        """Every text with every image: (N, D), (B, L, D) -> (B, N, D)."""
        queries = self.queries(text)
        queries = jnp.broadcast_to(queries, (local.shape[0], *queries.shape))  # (B, N, H, D/H)
        return self.attend(queries, *self.keys_values(local))

    def pool_few_texts(self, text: jax.Array, local: jax.Array) -> jax.Array:
        """`__call__` with its products in another order, which is less work for fewer texts than a head has numbers.

        A query times a key's projection is the tokens times (the projection times the query), and the projected values'
        mean is the projection of the mean: so no token is projected, D * D products each, but H directions a text are.
        """
        queries = self.queries(text)  # (N, H, D/H)
        key_kernel, key_bias, value_kernel, value_bias = self.attention.key_value_projections()
        logits = jnp.einsum("bld,nhd->bnhl", self.ln_k(local), jnp.einsum("nhe,dhe->nhd", queries, key_kernel))
        logits = logits + jnp.einsum("nhe,he->nh", queries, key_bias)[..., None]
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 0), (0, 1)))  # of the zero key
        weights = jax.nn.softmax(logits.astype(jnp.float32) * (self.width // self.heads) ** -0.5, axis=-1)[..., :-1]
        weights = weights.astype(local.dtype)
        attended = jnp.einsum("bnhl,bld->bnhd", weights, self.ln_v(local))
        pooled = jnp.einsum("bnhd,dhe->bnhe", attended, value_kernel) + weights.sum(-1)[..., None] * value_bias
        return self.attention.output(pooled)

    def weights(self, text: jax.Array, local: jax.Array) -> jax.Array:
        """Attention of every head, the zero key last: (N, D), (B, L, D) -> (B, N, H, L + 1) float32."""
        keys, _ = self.keys_values(local)
        logits = jnp.einsum("nhd,blhd->bnhl", self.queries(text), keys, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits / math.sqrt(self.width // self.heads), axis=-1)

    def values(self, local: jax.Array) -> jax.Array:
        """What each token alone would give when all attention rests on it: (B, L, D) -> (B, L, D)."""
        values = self.ln_v(local)
        return self.attention.output(self.attention.keys_values(values, values)[1])
