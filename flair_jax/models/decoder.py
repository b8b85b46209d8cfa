"""Query decoder over the tokens of an image (GRAIN, Halbe et al., WACV 2026; its form is DETR's, Carion et al. 2020).

tokens (B, S, W) -> projection, LN -> memory (B, S, D')
Q region queries and one image query -> depth x (self-attention, cross-attention to the memory, MLP) -> LN -> states
states of the regions -> features (B, Q, D) and boxes (B, Q, 4);  state of the image query -> feature (B, D)
"""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flair_jax.models import layers


@flax.struct.dataclass
class Decoded:
    """What the queries find in B images; features are projected, not normalised.

    Attributes:
      image: (B, D), of the image query.
      regions: (B, Q, D), of the region queries.
      boxes: float32 (depth, B, Q, 4), after every layer: centre x, centre y, width, height as shares of the picture.
      attention: float32 (depth, B, Q + 1, H, S), over the tokens, the image query last.
    """

    image: jax.Array
    regions: jax.Array
    boxes: jax.Array
    attention: jax.Array


def xavier(inputs: int, outputs: int) -> nn.initializers.Initializer:
    """Uniform within sqrt(6 / (inputs + outputs))."""
    return layers.uniform(math.sqrt(6 / (inputs + outputs)))


class DecoderLayer(nn.Module):
    """Pre-normalised: self-attention among the queries, cross-attention to the memory, MLP.

    Dropout is on where there is a random stream "dropout", that is in a training step.
    """

    heads: int
    hidden: int
    dropout: float
    compute: layers.ComputeOptions

    @nn.compact
    def __call__(self, x: jax.Array, queries: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States (B, Q, D') of so many queries, their vectors (Q, D') and the memory (B, S, D') -> the new states, and
        the weights of the cross-attention, float32 (B, Q, H, S).
        """
        width, dtype = x.shape[-1], self.compute.dtype
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        norm = functools.partial(layers.LayerNorm, dtype=dtype)
        init = layers.BlockInit.torch(width)._replace(out=xavier(width, width))
        attention = functools.partial(layers.Attention, width, self.heads, init, self.compute)

        y = norm(name="ln_1")(x)
        own = attention(name="self_attention")
        # Written out, not a fused kernel: there are few queries, and the weights are dropped.
        found = layers.attend(own.queries(y + queries), *own.keys_values(y + queries, y), drop=drop)
        x = x + drop(own.output(found))

        y = norm(name="ln_2")(x)
        cross = attention(name="cross_attention")
        query, (key, value) = cross.queries(y + queries), cross.keys_values(memory, memory)
        x = x + drop(cross.output(layers.attend(query, key, value, drop=drop)))

        y = norm(name="ln_3")(x)
        dense = functools.partial(layers.Dense, kernel_init=xavier(width, self.hidden), dtype=dtype)
        y = nn.relu(dense(self.hidden, bias_init=layers.torch_linear(width), name="fc")(y))
        x = x + drop(dense(width, bias_init=layers.torch_linear(self.hidden), name="proj")(drop(y)))
        return x, layers.attention_weights(query, key)


class QueryDecoder(nn.Module):
    """Learned queries that look at all tokens of an image, the class token included.

    The queries are positions, added in every layer; the states that they find start at zero. Parameters start as in the
    reference (spec/grain.md 1.4), but for the biases of the MLPs, which there are the same in all layers.

    Attributes:
      embed_dim: D, width of the features.
      width, depth, heads: D' and sizes of the layers.
      hidden: width inside of the MLPs.
      regions: Q, how many region queries there are.
      dropout: in training, of the layers.
      compute: how it computes.
    """

    embed_dim: int
    width: int = 512
    depth: int = 6
    heads: int = 8
    hidden: int = 2048
    regions: int = 5
    dropout: float = 0.1
    compute: layers.ComputeOptions = layers.ComputeOptions()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> Decoded:
        """Tokens of an image tower, (B, S, W) -> what the queries find."""
        dtype, dense = self.compute.dtype, functools.partial(layers.Dense, dtype=self.compute.dtype)
        projection = layers.torch_linear(tokens.shape[-1])
        memory = dense(self.width, use_bias=False, kernel_init=projection, name="memory_projection")(tokens)
        memory = layers.LayerNorm(dtype=dtype, name="ln_memory")(memory)
        queries = self.param("queries", nn.initializers.normal(1.0), (self.regions + 1, self.width)).astype(dtype)

        x, states, attention = jnp.zeros((tokens.shape[0], *queries.shape), dtype), [], []
        layer = layers.block_class(self.compute.remat, DecoderLayer)
        ln_final = layers.LayerNorm(dtype=dtype, name="ln_final")
        for i in range(self.depth):
            x, weights = layer(self.heads, self.hidden, self.dropout, self.compute, name=f"layers_{i}")(
                x, queries, memory
            )
            states.append(ln_final(x))
            attention.append(weights)

        def project(name, x):
            init = nn.initializers.normal(self.width**-0.5)
            return layers.project(x, self.param(name, init, (self.width, self.embed_dim)).astype(dtype))

        linear = layers.torch_linear(self.width)
        y = jnp.stack([state[:, :-1] for state in states])  # (depth, B, Q, D')
        for name, outputs in (("box_0", self.width), ("box_1", self.width), ("box_2", 4)):
            y = dense(outputs, kernel_init=linear, bias_init=linear, name=name)(y)
            y = nn.relu(y) if name != "box_2" else nn.sigmoid(y.astype(jnp.float32))
        return Decoded(
            image=project("image_projection", states[-1][:, -1]),
            regions=project("region_projection", states[-1][:, :-1]),
            boxes=y,
            attention=jnp.stack(attention),
        )
