"""LoRA, low-rank adaptation (Hu et al., ICLR 2022): small changes of fixed weights, trained instead of them.

An adapted matrix W (in, out) has a pair a (in, r), b (r, out), and the model computes with

    W + alpha / r * a b

The pairs are a tree of their own beside the parameters, `{…: {"kernel": {"a": …, "b": …}}}`; `merge` adds them inside
the training step, so that towers, scanning, rematerialisation and conversion know nothing of them. Every map that is
adapted is linear and there is no dropout, so this is what layers with two branches compute. Gradients and the
optimizer's state exist for the pairs alone.

Shapes and initial values are those of FSC-CLIP's code (Oh et al., EMNLP 2024), which has two surprises. The pair of the
fused q, k, v projection starts with b other than zero, so that a fresh model is not quite the one that it starts from;
`zero_init` mends that. The patch convolution (p, p, 3, out) has the pair a (3 p, r p), b (r p, out p), whose product is
laid into the kernel row by row: it is no low rank where r p is 3 p or more.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flair_jax.optimizer import path_of

# Attention and MLP of the towers and of FLAIR's pooling, and the patch embedding. Projections into the shared space,
# embeddings, biases, normalisation and scalars stay as they are.
PATTERNS = (r".*/(qkv|out|fc|proj)/kernel", "vision/patch_embedding/kernel")


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """What is adapted, and how. The keys of a config's `lora` section.

    Attributes:
      rank: r.
      alpha: the changes are multiplied by alpha / rank.
      patterns: regular expressions for whole names of parameters; those that match one are adapted.
      zero_init: start every b at zero, also that of q, k and v, so that a fresh model is the one that it starts from.

    Raises:
      ValueError: an option has no such value.
    """

    rank: int = 4
    alpha: float = 1.0
    patterns: tuple[str, ...] = PATTERNS
    zero_init: bool = False

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(self.patterns))  # JSON gives back a list
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ValueError(f"config.lora.rank is {self.rank!r}; expected 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"config.lora.alpha is {self.alpha!r}; expected more than 0")

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "LoraOptions":
        """From a `lora` section, whose keys all have defaults. Raises ValueError, naming the key that is wrong."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(section, Mapping):
            raise ValueError(f"config.lora is {section!r}; expected None or a section with {known}")
        if unknown := sorted(set(section) - set(known)):
            raise ValueError(f"config.lora has {unknown}; there are {known}")
        return cls(**section)

    def adapts(self, name: str) -> bool:
        """Whether a parameter is adapted."""
        return any(re.fullmatch(pattern, name) for pattern in self.patterns)


def init(params: Any, options: LoraOptions, seed: int) -> dict[str, Any]:
    """Fresh pairs for the parameters that are adapted. A pair depends on the seed and the name, not on the others.

    Args:
      params: of the model, arrays or shapes.

    Raises:
      ValueError: a pattern matches no parameter, or one that has no two sides.
    """
    names = {path_of(keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(params)}
    for pattern in options.patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            some = ", ".join(sorted({name.split("/")[0] for name in names}))
            raise ValueError(f"config.lora.patterns: {pattern!r} matches no parameter; their names begin with {some}")
    tree: dict[str, Any] = {}
    for name, shape in names.items():
        if not options.adapts(name):
            continue
        node = tree
        for part in name.split("/"):
            node = node.setdefault(part, {})
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        node.update(_init_pair(key, name, shape, options))
    return tree


def _init_pair(key: jax.Array, name: str, shape: tuple[int, ...], options: LoraOptions) -> dict[str, jax.Array]:
    rows, columns, rank = _sides(name, shape, options.rank)
    if name.endswith("qkv/kernel"):  # Xavier's bounds
        bound_a, bound_b = math.sqrt(6 / (rank + rows)), math.sqrt(6 / (columns + rank))
    else:
        bound_a, bound_b = 1 / math.sqrt(rows), 0.0  # PyTorch's default for a linear layer
    key_a, key_b = jax.random.split(key)
    a = jax.random.uniform(key_a, (rows, rank), jnp.float32, -bound_a, bound_a)
    if options.zero_init or not bound_b:
        return {"a": a, "b": jnp.zeros((rank, columns), jnp.float32)}
    return {"a": a, "b": jax.random.uniform(key_b, (rank, columns), jnp.float32, -bound_b, bound_b)}


def _sides(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """Rows of a, columns of b, and what they share."""
    if len(shape) == 2:
        return shape[0], shape[1], rank
    if len(shape) == 4:
        height, width, inside, outside = shape
        if height == width:
            return inside * width, outside * width, rank * width
    raise ValueError(f"config.lora.patterns match {name} of shape {shape}; expected a matrix or a square convolution")


def change(pair: Mapping[str, jax.Array], shape: tuple[int, ...], options: LoraOptions) -> jax.Array:
    """The change of a weight of this shape: alpha / r * a b."""
    product = jnp.matmul(pair["a"], pair["b"], precision=lax.Precision.HIGHEST)
    if len(shape) == 4:  # as PyTorch lays out and in * width into (out, in, height, width)
        height, width, inside, outside = shape
        product = product.T.reshape(outside, inside, height, width).transpose(2, 3, 1, 0)
    return options.alpha / options.rank * product


def merge(base: Any, lora: Any, options: LoraOptions) -> Any:
    """Parameters of the model: the base, which is constant here, with the changes of all pairs.

    Args:
      base: tree of the model's parameters.
      lora: the tree of `init`.

    Raises:
      ValueError: there is a pair for something that `base` lacks, or of another size.
    """
    pairs: dict[str, dict[str, jax.Array]] = {}
    for keys, leaf in jax.tree.leaves_with_path(lora):
        pairs.setdefault(path_of(keys[:-1]), {})[keys[-1].key] = leaf

    def merged(keys, leaf):
        name = path_of(keys)
        leaf, pair = lax.stop_gradient(leaf), pairs.pop(name, None)
        if pair is None:
            return leaf
        rows, columns, rank = _sides(name, leaf.shape, options.rank)
        found = {side: jnp.shape(x) for side, x in pair.items()}
        if found != (expected := {"a": (rows, rank), "b": (rank, columns)}):
            raise ValueError(f"LoRA's pair of {name} has the shapes {found}; expected {expected}")
        return leaf + change(pair, leaf.shape, options)

    params = jax.tree.map_with_path(merged, base)
    if pairs:
        raise ValueError(f"LoRA has pairs for {', '.join(sorted(pairs))}, which the model lacks")
    return params


merge_jit = jax.jit(merge, static_argnums=2)


def interpolate(pretrained: Any, fine_tuned: Any, share: float) -> Any:
    """WiSE-FT (Wortsman et al., CVPR 2022): (1 - share) * pretrained + share * fine_tuned, for every parameter."""
    return jax.tree.map(lambda before, after: (1 - share) * before + share * after, pretrained, fine_tuned)


def scale(lora: Any, share: float) -> Any:
    """WiSE-FT as FSC-CLIP does it with LoRA: both matrices of a pair times `share`, the change times its square."""
    return jax.tree.map(lambda x: share * x, lora)
