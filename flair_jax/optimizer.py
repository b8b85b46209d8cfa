"""AdamW as the reference runs it: warm-up and cosine, decay of matrices only, a clamped scale; and the average."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

MAX_LOGIT_SCALE = math.log(100)


def schedule(learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then a half cosine to zero; the first step already moves (OpenCLIP's `cosine_lr`)."""

    def rate(step):
        warm = (step + 1) / max(warmup_steps, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return learning_rate * jnp.where(step < warmup_steps, warm, cosine)

    return rate


def decay_mask(params: Any) -> Any:
    """True for matrices and embeddings; False for vectors and scalars: biases, normalisation, class token, scale."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def create(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optimiser of a config's `optimizer` section.

    Args:
      learning_rate: at the end of the warm-up.
      warmup_steps, total_steps: see `schedule`.
      weight_decay: of `decay_mask`, times the learning rate, as in PyTorch's AdamW.
      b1, b2, eps: of Adam.
      clip_norm: largest global norm of the gradient; None: no clipping.
    """
    adamw = optax.adamw(
        schedule(learning_rate, warmup_steps, total_steps), b1, b2, eps, weight_decay=weight_decay, mask=decay_mask
    )
    # The state has the same structure either way: clipping may be switched on when a run goes on.
    return optax.chain(optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm), adamw)


def clamp_scale(params: Any) -> Any:
    """Keeps exp(logit_scale) within 1 and 100, after each step."""
    return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average of the parameters after one more step.

    It begins at the first parameters and forgets them soon: the decay of step t, counted from 0, is
    min(decay, (1 + t) / (10 + t)), the rule of TensorFlow's `ExponentialMovingAverage(num_updates=t)`.

    Args:
      ema, params: the average so far, and the parameters after the step.
      step: int32 scalar, t.
      decay: in the long run; it averages over about 1 / (1 - decay) steps.
    """
    return optax.incremental_update(params, ema, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))
