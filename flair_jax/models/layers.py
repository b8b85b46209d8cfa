"""Transformer blocks that both towers share, and the initialisers of the reference."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flair_jax.models.accumulation import in_micro_batches

PRODUCT = "product"  # what `project` calls its results, for `block_class`

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)  # statistics always in float32


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(…, K) times (K, N) -> (…, N), as one product of two matrices.

    With several leading axes the gradient of the kernel would contract all of them, for which XLA transposes `x` and
    the gradient first on a CPU, and computes the sum of all residual branches anew for each: a third of a step.
    """
    result = checkpoint_name(x.reshape(-1, x.shape[-1]) @ kernel, PRODUCT)
    return result.reshape(*x.shape[:-1], kernel.shape[-1])


Dense = functools.partial(nn.Dense, dot_general=lambda x, kernel, *_, **__: project(x, kernel))


def normalize(x: jax.Array) -> jax.Array:
    """Unit length along the last axis, in float32; zero stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform on [-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_linear(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for the weight and the bias of a linear layer, bound 1/sqrt(fan_in)."""
    return uniform(1 / math.sqrt(fan_in))


class BlockInit(NamedTuple):
    """Initialisers of one block. The MLP's biases follow PyTorch's default everywhere: the references re-initialise
    its weights alone.
    """

    qkv: nn.initializers.Initializer
    out: nn.initializers.Initializer
    fc: nn.initializers.Initializer
    proj: nn.initializers.Initializer
    qkv_bias: nn.initializers.Initializer = nn.initializers.zeros
    out_bias: nn.initializers.Initializer = nn.initializers.zeros

    @classmethod
    def torch(cls, width: int) -> "BlockInit":
        """PyTorch's defaults for its attention and for linear layers."""
        xavier = uniform(math.sqrt(6 / (4 * width)))  # over the fused (W, 3W) matrix
        return cls(xavier, torch_linear(width), torch_linear(width), torch_linear(4 * width))


def _all(x: jax.Array) -> jax.Array:
    return x


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    attention: str = "xla",
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention, softmax in float32: (B, T, H, D), (B, S, H, D), (B, S, H, D) -> (B, T, H, D).

    Args:
      mask: (B, 1, T, S), True where a query may look; only for packed texts.
      attention: "xla", written out, because XLA compiles `jax.nn.dot_product_attention` to code that takes several
        times as long on a CPU; or "cudnn", NVIDIA's fused kernel, in 16 bits and without the (B, H, T, S) weights. It
        takes a mask only where T and S are even, as rows of packed texts should be.
      drop: dropout of the weights (B, H, T, S), which "cudnn" does not have.

    Raises:
      ValueError: another `attention`.
    """
    if attention == "cudnn" and drop is None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
    if attention != "xla":
        raise ValueError(f"model.attention is {attention!r}; expected 'xla' or 'cudnn'")
    if causal:
        length = query.shape[1]
        earlier = jnp.tril(jnp.ones((length, length), bool))
        mask = earlier if mask is None else mask & earlier
    logits = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)  # (B, H, T, S)
    weights = weights if drop is None else drop(weights)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


def attention_weights(query: jax.Array, key: jax.Array) -> jax.Array:
    """What `attend` weighs values by, without a mask: (B, T, H, D), (B, S, H, D) -> float32 (B, T, H, S)."""
    logits = jnp.einsum("bthd,bshd->bths", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1)


def gelu(x: jax.Array, form: str = "exact") -> jax.Array:
    """GELU: "exact"; "tanh", its usual approximation; or "quick", x sigmoid(1.702 x), of OpenAI's CLIP.

    The exact form is written with the error function, as PyTorch's is; `jax.nn.gelu` takes erfc, which costs a CPU
    several passes over `x`.

    Raises:
      ValueError: another `form`.
    """
    if form == "exact":
        return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))
    if form == "tanh":
        return jax.nn.gelu(x, approximate=True)
    if form == "quick":
        return x * jax.nn.sigmoid(1.702 * x)
    raise ValueError(f"model.gelu is {form!r}; expected 'exact', 'tanh' or 'quick'")


class ComputeOptions(NamedTuple):
    """How the towers compute; keys of the `model` section.

    Attributes:
      dtype: of the computation.
      scan_blocks: see `run_blocks`.
      remat: see `block_class`.
      attention: see `attend`.
      gelu: see `gelu`.
    """

    dtype: Any = jnp.float32
    scan_blocks: bool = False
    remat: str = "none"
    attention: str = "xla"
    gelu: str = "exact"


class InputProjection(nn.Module):
    """One (W, 3W) matrix whose thirds project to queries, keys and values, as in PyTorch's attention."""

    width: int
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer
    dtype: Any

    def setup(self):
        self.kernel = self.param("kernel", self.kernel_init, (self.width, 3 * self.width))
        self.bias = self.param("bias", self.bias_init, (3 * self.width,))

    def __call__(self, x: jax.Array, first: int, count: int = 1) -> jax.Array:
        """(…, W) -> (…, count * W): the thirds from the first one on, in one product."""
        columns = slice(first * self.width, (first + count) * self.width)
        kernel, bias = self.kernel[:, columns].astype(self.dtype), self.bias[columns].astype(self.dtype)
        return project(x.astype(self.dtype), kernel) + bias


class Attention(nn.Module):
    """Multi-head attention, for towers, pooling and decoder: fused input projection, softmax attention, output.

    Attributes:
      width, heads: W and H.
      initializers: of the projections.
      compute: how it computes.
      qk_norm: normalise each head's queries and keys over its W/H numbers (Henry et al., EMNLP Findings 2020).
      norm_eps: of that normalisation.
    """

    width: int
    heads: int
    initializers: BlockInit
    compute: ComputeOptions
    qk_norm: bool = False
    norm_eps: float = 1e-5

    def setup(self):
        init, dtype = self.initializers, self.compute.dtype
        self.qkv = InputProjection(self.width, init.qkv, init.qkv_bias, dtype)
        self.out = Dense(self.width, kernel_init=init.out, bias_init=init.out_bias, dtype=dtype)
        if self.qk_norm:
            self.q_norm = LayerNorm(epsilon=self.norm_eps, dtype=dtype)
            self.k_norm = LayerNorm(epsilon=self.norm_eps, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        causal: bool = False,
        mask: jax.Array | None = None,
        pick: Callable[[jax.Array], jax.Array] = _all,
    ) -> jax.Array:
        """Self-attention, (B, T, W) -> (B, T, W), or what `pick` takes of its tokens."""
        qkv = self.qkv(x, 0, 3).reshape(*x.shape[:-1], 3, self.heads, self.width // self.heads)  # (B, T, 3, H, W/H)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        x = attend(query, key, value, causal=causal, mask=mask, attention=self.compute.attention)
        return self.out(pick(x.reshape(*x.shape[:-2], self.width)))

    def queries(self, x: jax.Array) -> jax.Array:
        """(…, W) -> (…, H, W/H)."""
        query = self._heads(self.qkv(x, 0))
        return self.q_norm(query) if self.qk_norm else query

    def keys_values(self, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of what keys and what values are made of, (…, W) each -> (…, H, W/H) twice."""
        key, value = self._heads(self.qkv(keys, 1)), self._heads(self.qkv(values, 2))
        return self.k_norm(key) if self.qk_norm else key, value

    def key_value_projections(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Kernel (W, H, W/H) and bias (H, W/H) of the keys, and those of the values."""
        kernel, bias = (self._heads(x.reshape(*x.shape[:-1], 3, self.width)) for x in (self.qkv.kernel, self.qkv.bias))
        kernel, bias = kernel.astype(self.compute.dtype), bias.astype(self.compute.dtype)
        return kernel[:, 1], bias[1], kernel[:, 2], bias[2]

    def output(self, x: jax.Array) -> jax.Array:
        """What each head attended to, (…, H, W/H) -> (…, W)."""
        return self.out(x.reshape(*x.shape[:-2], self.width))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)


class MLP(nn.Module):
    """Two layers, four times as wide inside, with GELU between them."""

    initializers: BlockInit
    compute: ComputeOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        hidden = 4 * width
        fc = dict(kernel_init=self.initializers.fc, bias_init=torch_linear(width))
        proj = dict(kernel_init=self.initializers.proj, bias_init=torch_linear(hidden))
        x = gelu(Dense(hidden, **fc, dtype=self.compute.dtype, name="fc")(x), self.compute.gelu)
        return Dense(width, **proj, dtype=self.compute.dtype, name="proj")(x)


class Block(nn.Module):
    """Pre-normalised transformer block, (B, T, W) -> (B, T, W); or (N, W), the states of some tokens.

    Those are taken as soon as the attention has seen all tokens: what follows, most of the work, is done for them
    alone. `pick` chooses them, (B, T, W) -> (N, W).
    """

    heads: int
    causal: bool
    initializers: BlockInit
    compute: ComputeOptions
    qk_norm: bool = False
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, mask=None, pick: Callable[[jax.Array], jax.Array] = _all) -> jax.Array:
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.compute.dtype)
        qk = dict(qk_norm=self.qk_norm, norm_eps=self.norm_eps)
        attention = Attention(x.shape[-1], self.heads, self.initializers, self.compute, **qk, name="attention")
        x = pick(x) + attention(norm(name="ln_1")(x), causal=self.causal, mask=mask, pick=pick)
        return x + MLP(self.initializers, self.compute, name="mlp")(norm(name="ln_2")(x))


def block_class(remat: str, block: type[nn.Module] = Block) -> type[nn.Module]:
    """The block to build for a `model.remat` setting: what the backward pass finds, and what it computes again.

    "none" keeps all; "dots" keeps the results of dense layers, and attention and all that works on single numbers is
    computed again; "full" keeps only the blocks' inputs.
    """
    if remat == "none":
        return block
    if remat == "dots":
        return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
    if remat == "full":
        return nn.remat(block)
    raise ValueError(f"model.remat is {remat!r}; expected 'none', 'dots' or 'full'")


def run_blocks(
    blocks: Sequence[nn.Module], x: jax.Array, mask=None, *, scan: bool, micro_batches: int = 1
) -> jax.Array:
    """Applies equal blocks one after another, to all rows or to one of `micro_batches` after another.

    With `scan` one block is compiled and their parameters are stacked on the way in, so that the checkpoint is the same
    either way. Initialisation always runs unrolled, on all rows.
    """
    if not blocks or blocks[0].is_initializing() or (not scan and micro_batches == 1):
        for block in blocks:
            x = block(x, mask)
        return x
    block = blocks[0].clone(parent=None)
    params = [b.variables["params"] for b in blocks]
    if scan:
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def encode(params, x, mask):
        if scan:
            x, _ = lax.scan(lambda x, params: (block.apply({"params": params}, x, mask), None), x, params)
            return x
        for block_params in params:
            x = block.apply({"params": block_params}, x, mask)
        return x

    return (encode if micro_batches == 1 else in_micro_batches(encode, micro_batches))(params, x, mask)
