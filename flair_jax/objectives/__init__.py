"""Training objectives: a loss is a weighted sum of them, over the features of one global batch.

An objective is a pure function `loss(features, batch, rng, **options) -> (scalar, {name: scalar})` of the features of
the global batch (`models.dual_encoder.Features`), the batch itself, a key and its own options. It never asks on how
many devices it runs. Of an image's texts it takes the slots that it is about (`Features.of_slot`): the captions, or
hard negatives of them or descriptions of regions too.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flair_jax.models.dual_encoder import Features
from flair_jax.objectives import hard_negatives, regions, sigmoid, softmax, text_conditioned
from flair_jax.objectives.groups import check_divisor

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
OBJECTIVES: Mapping[str, Objective] = {
    "boxes": regions.boxes,
    "global_hard_negatives": hard_negatives.global_loss,
    "local_hard_negatives": hard_negatives.local_loss,
    "negclip": hard_negatives.negclip,
    "region_descriptions": regions.descriptions,
    "sigmoid": sigmoid.loss,
    "softmax": softmax.loss,
    "text_conditioned": text_conditioned.loss,
}
LOCAL_TEXT = frozenset({"local_hard_negatives"})  # those that need the features of all tokens of the texts

DIVISORS = ("block_size", "group_size", "reference_world_size")  # options that divide the batch


def check(config: Mapping[str, Mapping[str, Any]], batch_size: int) -> None:
    """Refuses a config's `objectives` section with a wrong option before data and programs are made ready.

    Raises:
      ValueError: naming the option.
    """
    for name, options in active(config).items():
        parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
        known = {"weight", *(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)}
        if unknown := set(options) - known:
            raise ValueError(
                f"unknown options {sorted(unknown)} of config.objectives.{name}; there are {sorted(known)}"
            )
        for option in DIVISORS:
            if options.get(option) is not None:
                check_divisor(f"{name}.{option}", options[option], batch_size)


def needs_local_text(config: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an objective with a weight needs `TextFeatures.local`."""
    return not LOCAL_TEXT.isdisjoint(active(config))


def active(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The objectives of a config's `objectives` section that have a weight: name -> weight and options.

    Raises:
      ValueError: an objective is unknown or its weight is negative, or none has a weight.
    """
    for name, options in config.items():
        if name not in OBJECTIVES:
            raise ValueError(f"config.objectives.{name} is unknown; there are {sorted(OBJECTIVES)}")
        if not options["weight"] >= 0:
            raise ValueError(f"config.objectives.{name}.weight is {options['weight']}; expected 0 or more")
    found = {name: options for name, options in config.items() if options["weight"]}
    if not found:
        raise ValueError(f"config.objectives gives no objective a weight above 0: {dict(config)}")
    return found


def weighted_sum(
    config: Mapping[str, Mapping[str, Any]], features: Features, batch: Mapping[str, Any], rng: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss, sum of weight times objective.

    Args:
      config: the `objectives` section: name -> {"weight": …, and the options of the objective}.
      features: of the batch.
      batch: what the loader gave, for objectives that need more than features.
      rng: key of the step's draws.

    Returns:
      float32 scalar; and by name the value of each objective, and as "objective/name" what it tells besides.
    """
    total, parts = 0.0, {}
    for name, options in active(config).items():
        options = dict(options)
        weight = options.pop("weight")
        value, more = OBJECTIVES[name](features, batch, rng, **options)
        total += weight * value
        parts |= {name: value, **{f"{name}/{key}": x for key, x in more.items()}}
    return total, parts
