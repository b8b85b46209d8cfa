"""The length of a run and its learning rate by step, of a config."""

import math
from collections.abc import Mapping
from typing import Any

import optax
from absl import logging

from flair_jax import optimizer


def total_steps(config: Mapping[str, Any], samples: int) -> int:
    """Steps of a run over so many samples."""
    return config["steps"] or math.ceil(config["epochs"] * samples / config["batch_size"])


def learning_rate(config: Mapping[str, Any], steps: int) -> optax.Schedule:
    """The learning rate of a run by step."""
    keys = ("learning_rate", "warmup_steps", "first_learning_rate", "last_learning_rate")
    options = {key: config["optimizer"][key] for key in keys if key in config["optimizer"]}
    return optimizer.schedule(total_steps=steps, **options)


def warn_of_change(before: Mapping[str, Any], config: Mapping[str, Any], samples: int, step: int) -> None:
    """Says what the learning rate is from `step` on, if it is not what the run was started with.

    The schedule is a function of the whole length: a run that is made longer does not go on where its rate was.
    """
    lengths = [total_steps(one, samples) for one in (before, config)]
    rates = [float(learning_rate(one, length)(step)) for one, length in zip((before, config), lengths, strict=True)]
    if rates[0] != rates[1]:
        logging.warning(
            "the learning rate at step %d is %.3g, was to be %.3g by the config of the checkpoint: steps %d, were %d; "
            "optimizer.learning_rate %g, was %g; optimizer.warmup_steps %d, were %d",
            *(step, rates[1], rates[0], lengths[1], lengths[0]),
            *(
                section[key]
                for key in ("learning_rate", "warmup_steps")
                for section in (config["optimizer"], before["optimizer"])
            ),
        )
