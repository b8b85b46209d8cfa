"""The training step: where a batch goes in, and a loss and new parameters come out."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flair_jax import models, objectives
from flair_jax.augmentation import crop_and_resize
from flair_jax.data.transforms.base import CAPTIONS, DESCRIPTIONS, NEGATIVES
from flair_jax.models.dual_encoder import DualEncoder
from flair_jax.models.text import Text
from flair_jax.optimizer import Optimizer, average
from flair_jax.state import TrainState


def train_step(
    state: TrainState,
    batch: Mapping[str, Any],
    *,
    model: DualEncoder,
    losses: Mapping[str, Mapping[str, Any]],
    optimizer: Optimizer,
    seed: int,
    ema_decay: float | None = None,
    slots: tuple[tuple[str, int], ...] = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the optimizer; a pure function.

    Args:
      state: before the step.
      batch: `images` (N, H, W, 3), uint8 pixels or normalised floats; `texts`, the fields of `Text`, text c of image i
        at i * C + c; and what the objectives ask for, such as `valid` (N, C). Where there are `crop_boxes` (N, 4),
        `images` are canvases (N, S, S, 3), see `augmentation.crop_and_resize`.
      model, optimizer: what to train and how.
      losses: the `objectives` section of a config.
      seed: with the number of the step, the only source of chance.
      ema_decay: see `optimizer.average`; None where the state has no average.
      slots: of an image's texts, see `Features`.

    Returns:
      The state after the step, and the loss, its parts and what helps to judge them, float32 scalars.
    """
    images = batch["images"]
    if "crop_boxes" in batch:
        images = crop_and_resize(images, batch["crop_boxes"], model.image_size)
    images = model.preprocessing(images)
    of_model, of_objectives = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))

    def loss_of(trained):
        params = models.cast_matrices(state.merged(optimizer.rules.stop_frozen(trained)), model.dtype)
        features = model.apply(
            {"params": params},
            images,
            Text(**batch["texts"]),
            rng=of_model,
            local_text=objectives.needs_local_text(losses),
            method="features",
            rngs={"dropout": jax.random.fold_in(of_model, 1)},
        )
        return objectives.weighted_sum(losses, features.replace(slots=slots), batch, of_objectives)

    (loss, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    params, opt_state = optimizer.update(state.params, grads, state.opt_state)
    ema = None if ema_decay is None else average(state.ema, params, state.step, ema_decay)
    scalars = state.params if state.base is None else state.base
    numbers = {
        "loss": loss,
        **parts,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(state.params),
        "logit_scale": jnp.exp(scalars["logit_scale"]),
    }
    if "logit_bias" in scalars:
        numbers["logit_bias"] = scalars["logit_bias"]
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), numbers


def step_of(config: Mapping[str, Any], model: DualEncoder, optimizer: Optimizer) -> Callable:
    """`train_step` of a config, as a function of state and batch."""
    return functools.partial(
        train_step,
        model=model,
        losses=config["objectives"],
        optimizer=optimizer,
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        slots=text_slots(config["data"]),
    )


def text_slots(data: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """(name, count) of the slots of an image's texts, in the order in which the loader joins them; () where all are
    captions.

    Args:
      data: the `data` section.
    """
    negatives, descriptions = len(data["negatives"]["kinds"] or ()), data["regions"]["count"] or 0
    slots = ((CAPTIONS, data["captions"]["count"]), (NEGATIVES, negatives), (DESCRIPTIONS, descriptions))
    return tuple((name, count) for name, count in slots if count) if negatives or descriptions else ()
