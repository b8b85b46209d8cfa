"""Causal text transformer over captions, one a row or several packed side by side."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flair_jax.models import layers
from flair_jax.sharding import batch_axes


@flax.struct.dataclass
class Text:
    """Captions in rows.

    Under a mesh (`jax.set_mesh`) rows and captions are split over the devices in order, and a packed caption stands in
    the rows of its own device, as `data.transforms.packing.Packer` lays them.

    Attributes:
      tokens: int32 (R, T).
      ends: int32 (N,), flat index `row * T + column` of each caption's end-of-text token.
      positions: int32 (R, T), index of each token within its caption; None: one caption a row.
      segments: int32 (R, T), 1, 2, … for the captions of a row and 0 for padding; None: one caption a row. The padding
        after a single caption needs no mask: attention is causal and nothing reads past the end.
    """

    tokens: jax.Array
    ends: jax.Array
    positions: jax.Array | None = None
    segments: jax.Array | None = None

    @classmethod
    def padded(cls, tokens: jax.Array) -> "Text":
        """One caption a row; it ends at the first largest id, which is end-of-text in CLIP's vocabulary."""
        rows, length = tokens.shape
        return cls(tokens, jnp.arange(rows) * length + jnp.argmax(tokens, axis=-1))

    def mask(self) -> jax.Array | None:
        """Which tokens may see which, (R, 1, T, T), beside causality; None where causality is enough."""
        if self.segments is None:
            return None
        return self.segments[:, None, :, None] == self.segments[:, None, None, :]  # (R, 1, T, T)

    def at_ends(self, x: jax.Array) -> jax.Array:
        """States of the end-of-text tokens, (R, T, W) -> (N, W); NaN where a packed caption is not on its device.

        Each device looks in its own rows alone: no state travels.
        """
        length, width = x.shape[1:]
        if self.segments is None:
            return jnp.take_along_axis(x, (self.ends % length)[:, None, None], axis=1)[:, 0]
        axes = batch_axes()

        def local(x, ends):  # of one device
            first = lax.axis_index(axes) * x.shape[0] * length if axes else 0
            states = x.reshape(-1, width).at[ends - first]
            return states.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

        if not axes:
            return local(x, self.ends)
        split = PartitionSpec(axes)
        return jax.shard_map(local, in_specs=(split, split), out_specs=split)(x, self.ends)


@flax.struct.dataclass
class HiddenStates:
    """States of the text transformer, before any projection.

    `last`: (R, T, W), after the last normalisation. `second_to_last`: (R, T, W), after all blocks but the last, not
    normalised. `pooled`: (N, W), `last` at the ends.
    """

    last: jax.Array
    second_to_last: jax.Array
    pooled: jax.Array


class TextTower(nn.Module):
    """Causal transformer with learned positions.

    Attributes:
      context_length: longest caption in tokens.
      vocab_size, width, depth, heads: sizes.
      compute: how it computes.
      gelu: of this tower; None: the model's.
    """

    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    compute: layers.ComputeOptions = layers.ComputeOptions()
    gelu: str | None = None

    def setup(self):
        # CLIP's rule (golden/flair/full/init_stats.json): residual branches shrink with the depth.
        normal = nn.initializers.normal
        residual = normal(self.width**-0.5 * (2 * self.depth) ** -0.5)
        init = layers.BlockInit(
            qkv=normal(self.width**-0.5), out=residual, fc=normal((2 * self.width) ** -0.5), proj=residual
        )
        self.token_embedding = self.param("token_embedding", normal(0.02), (self.vocab_size, self.width))
        self.position_embedding = self.param("position_embedding", normal(0.01), (self.context_length, self.width))
        compute = self.compute if self.gelu is None else self.compute._replace(gelu=self.gelu)
        block = layers.block_class(compute.remat)
        self.blocks = [block(self.heads, True, init, compute) for _ in range(self.depth)]
        self.ln_final = layers.LayerNorm(dtype=self.compute.dtype)

    def __call__(self, text: Text, *, local: bool = True, micro_batches: int = 1) -> tuple[jax.Array, jax.Array | None]:
        """Returns the captions' end states (N, W) and, if `local`, the states of all tokens (R, T, W).

        Args:
          text: captions.
          local: without it the last block works on the ends alone, a fifteenth of the whole work less.
          micro_batches: parts of the rows that go through the blocks one after another.

        Raises:
          ValueError: rows of one caption are longer than the context.
        """
        x = self.embed(text)
        mask, options = text.mask(), dict(scan=self.compute.scan_blocks, micro_batches=micro_batches)
        if local or micro_batches > 1:  # an end may stand in any of the micro-batches
            x = layers.run_blocks(self.blocks, x, mask, **options)
            return self.ln_final(text.at_ends(x)), self.ln_final(x) if local else None
        *blocks, last = self.blocks
        x = layers.run_blocks(blocks, x, mask, **options)
        return self.ln_final(last(x, mask, jax.tree_util.Partial(Text.at_ends, text))), None

    def hidden_states(self, text: Text) -> HiddenStates:
        """What diffusion models are conditioned on. Raises ValueError as `__call__`."""
        *blocks, last = self.blocks
        before = layers.run_blocks(blocks, self.embed(text), text.mask(), scan=self.compute.scan_blocks)
        x = self.ln_final(last(before, text.mask()))
        return HiddenStates(x, before, text.at_ends(x))

    def embed(self, text: Text) -> jax.Array:
        """Embeddings of tokens and positions, (R, T, W)."""
        length = text.tokens.shape[1]
        if text.positions is None and length > self.context_length:
            raise ValueError(f"texts have {length} tokens; model.text.context_length is {self.context_length}")
        # `take` answers NaN, not a neighbour, for an id outside the vocabulary or a position outside the context.
        x = jnp.take(self.token_embedding, text.tokens, axis=0)  # (R, T, W)
        if text.positions is None:
            x = x + self.position_embedding[:length]
        else:
            x = x + jnp.take(self.position_embedding, text.positions, axis=0)
        return x.astype(self.compute.dtype)
