"""The config of a run: read from the command line, checked, and compared with that of a checkpoint.

    config = read("scenes", ["--config.batch_size=64", "--config.epochs=None"])

ml_collections keeps the values and their types. What it has no flag for is done here: shipped configs by name, None,
pairs where the default is one number, and options of an evaluator or an objective that its section does not list.
"""

import ast
import importlib
import importlib.util
import json
import math
import numbers
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from flair_jax import configs
from flair_jax.configs import base
from flair_jax.convert.rules import MODELS
from flair_jax.data.transforms.tokenizer import VOCAB_SIZE
from flair_jax.early_stopping import EarlyStoppingOptions
from flair_jax.lora import LoraOptions

# Sections whose keys are not all listed in a config: options of an evaluator, of an objective.
OPEN_SECTIONS = ("evaluators", "objectives")

NONE_TOO = ("model.init_logit_bias", "keep")  # keys that have a default and may be None all the same

# Which numbers a key may have: in words, as a test, and the keys. None is checked apart.
RANGES: Sequence[tuple[str, Callable[[Any], bool], Sequence[str]]] = (
    (
        "1 or more", lambda x: x >= 1,
        (
            "steps", "batch_size", "log_every", "save_every", "keep", "keep_every", "objectives.*.chunk_size",
            "evaluators.*.topk", "evaluators.*.image_batch", "evaluators.*.text_batch",
        ),
    ),
    (
        "0 or more", lambda x: x >= 0,
        (
            "eval_every", "evaluators.*.every", "data.workers", "optimizer.learning_rate", "optimizer.warmup_steps",
            "optimizer.first_learning_rate", "optimizer.last_learning_rate", "optimizer.weight_decay", "optimizer.eps",
        ),
    ),
    ("a number above 0", lambda x: x > 0, ("epochs", "optimizer.clip_norm")),
    ("0 or more and less than 1", lambda x: 0 <= x < 1, ("optimizer.b1", "optimizer.b2")),
    ("a share from 0 to 1", lambda x: 0 <= x <= 1, ("data.max_skipped", "data.packing.quantile")),
    ("a share between 0 and 1, such as 0.9999", lambda x: 0 < x < 1, ("ema_decay",)),
    ("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32, ("seed",)),  # JAX drops all higher bits
)  # fmt: skip

# What a run may change when it goes on from a checkpoint; everything else would make the rest another experiment.
MAY_CHANGE = {
    "the length of the run": ("steps", "epochs", "early_stopping", "early_stopping.*"),
    "the step size, the usual answer to a loss that is not finite": (
        "optimizer.learning_rate",
        "optimizer.warmup_steps",
        "optimizer.clip_norm",
    ),
    "when something is logged, saved or traced": (
        "log_every", "save_every", "keep", "keep_every", "eval_every", "evaluate_before", "profile_steps",
    ),
    "what is measured, not what is trained": ("evaluators", "evaluators.*", "data_root", "feature_store"),
    "read at step 0 only": ("init_from", "init_partial", "init_resized"),
    "the hardware, and how a step is computed on it": (
        "mesh", "mesh.*", "model.scan_blocks", "model.remat", "model.attention", "model.micro_batches",
        "objectives.*.chunk_size",
    ),
    "how data is read; the loader compares the samples themselves": (
        "data.shards", "data.workers", "data.index_dir", "data.max_skipped",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def parse_known_flags(arguments: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=…)`: leaves `--config.KEY=VALUE`, which no flag defines, to `read`."""
    return flags.FLAGS(list(arguments), known_only=True)


def read(name: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The config that a command line gives.

    Args:
      name: a path to a Python file with a function `get_config`, or the name of a shipped config, such as "scenes";
        after a colon what to call the function with, as in "scenes:clip".
      arguments: `--config.KEY=VALUE` or `--config.KEY VALUE`, which change single keys.

    Returns:
      A nested dict, see `normalize`.

    Raises:
      ValueError: an argument is no such change, or its key or value is wrong.
      FileNotFoundError: there is no such config.
    """
    config = load(name)
    for key, text in _changes(arguments):
        _change(config, key, text)
    return normalize(config.to_dict())


def load(name: str) -> ConfigDict:
    """The unchanged config of a path or a shipped name, see `read`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file has no function `get_config`, or that takes no such argument.
    """
    name, colon, argument = name.partition(":")
    if name.endswith(".py") or os.sep in name:
        path = os.path.expanduser(name)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--config={name}: no such file")
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif name in (shipped := sorted(module.name for module in pkgutil.iter_modules(configs.__path__))):
        module = importlib.import_module(f"{configs.__name__}.{name}")
    else:
        raise FileNotFoundError(f"--config={name}: not the path of a .py file, nor one of the configs {shipped}")
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={name}: {module.__file__} has no function get_config()")
    try:
        return module.get_config(*([argument] if colon else [])).lock()
    except TypeError as error:
        raise ValueError(f"--config={name}:{argument}: {error}") from error


def _changes(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and texts out of `--config.KEY=VALUE` and `--config.KEY VALUE`."""
    remaining = iter(arguments)
    for argument in remaining:
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            raise ValueError(f"unexpected argument {argument!r}; expected --config.KEY=VALUE, or see --help")
        key, text = match.groups()
        text = next(remaining, None) if text is None else text
        if text is None:
            raise ValueError(f"{argument}: the value is missing; expected {argument}=VALUE")
        yield key, text


def _change(config: ConfigDict, key: str, text: str) -> None:
    """Sets one key, by its dotted name, to what a text says; its type stays, None and pairs of pixels aside."""
    *parents, last = key.split(".")
    section, is_open = config, parents[:1] and parents[0] in OPEN_SECTIONS
    for depth, parent in enumerate(parents):
        if is_open and depth and parent not in section:
            with section.unlocked():
                section[parent] = ConfigDict()
        section = section.get(parent)
        if not isinstance(section, ConfigDict):
            raise ValueError(f"--config.{key}: there is no section {'.'.join(parents[: depth + 1])!r}")
    if last not in section and not is_open:
        where = ".".join(["config", *parents])
        raise ValueError(f"--config.{key}: {where} has no key {last!r}; there are {sorted(section)}")
    kind = section.get_type(last) if last in section else object
    value = text if kind is str and text != "None" else _literal(text)
    if last == "image_size" or kind in (object, type(None)):  # one number or a pair; or a key without a type so far
        with section.unlocked(), section.ignore_type():
            section[last] = value
        return
    try:
        if isinstance(value, bool) != (kind is bool) and value is not None:  # Python counts True as 1
            raise TypeError
        section[last] = (value,) if kind is tuple and isinstance(value, str) else value
    except (TypeError, ValueError) as error:
        example = "" if section[last] is None else f", such as {section[last]!r}"
        raise ValueError(f"--config.{key}={text}: expected {kind.__name__}{example}") from error


def _literal(text: str) -> Any:
    """A Python literal; `true` and `false` too; any other text as it is."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError):
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Values


def normalize(config: Any) -> Any:
    """The same config with one form for each value: dicts, tuples for lists, `~` replaced by the home folder.

    JSON, in which configs are stored beside weights, turns tuples into lists, and a model's options must be hashable.
    `~` counts at the start of a text and after the `::` that joins several sets.
    """
    if isinstance(config, Mapping):
        return {key: normalize(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return tuple(map(normalize, config))
    if isinstance(config, str):
        return "::".join(map(os.path.expanduser, config.split("::")))
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> values by dotted key; an empty section is a value."""
    flat = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def check(config: Mapping[str, Any]) -> None:
    """Refuses a config with an unknown, missing or contradicting key before anything is done.

    Raises:
      ValueError: naming the key.
    """
    defaults = base.get_config().to_dict()
    if unknown := set(config) - set(defaults):
        raise ValueError(f"unknown config keys {sorted(unknown)}; there are {sorted(defaults)}")
    if missing := set(defaults) - set(config):
        raise ValueError(f"the config lacks {sorted(missing)}")
    if "name" not in config["model"]:
        raise ValueError("config.model has no name: it is completed by the weights of init_from when a run starts")
    _check_sections(config, defaults)
    values = flatten(config)
    for key, default in flatten(defaults).items():
        if default is not None and key not in NONE_TOO and key in values and values[key] is None:
            raise ValueError(f"config.{key} is None; expected a value such as {default!r}")
    _check_ranges(values)
    if config["model"]["name"] not in MODELS:
        raise ValueError(f"config.model.name is {config['model']['name']!r}; expected one of {sorted(MODELS)}")
    if bool(config["steps"]) == bool(config["epochs"]):
        raise ValueError(f"set one of config.steps and config.epochs, not {config['steps']} and {config['epochs']}")
    if (profile := config["profile_steps"]) and (len(profile) != 2 or not 0 <= profile[0] <= profile[1]):
        raise ValueError(f"config.profile_steps is {profile}; expected the first and the last, such as (10, 12)")
    if config["lora"] is not None:
        LoraOptions.of(config["lora"])
    if config["early_stopping"] is not None:
        EarlyStoppingOptions.of(config["early_stopping"])
    if config["init_partial"] and config["init_resized"]:
        raise ValueError("set one of config.init_partial and config.init_resized: the first one resizes, too")
    if lacking := [tower for tower in ("vision", "text") if config["model"][tower] is None]:
        raise ValueError(f"config.model.{lacking[0]} is None: a tower alone is neither trained nor evaluated")
    if config["model"].get("micro_batches", 1) < 1:
        raise ValueError(f"config.model.micro_batches is {config['model']['micro_batches']}; expected 1 or more")
    if config["model"]["text"]["vocab_size"] < VOCAB_SIZE:
        size = config["model"]["text"]["vocab_size"]
        raise ValueError(f"model.text.vocab_size is {size}; the tokenizer has {VOCAB_SIZE} ids")


def _check_sections(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "config") -> None:
    """Raises ValueError where a config has a value instead of a section; parts of a model may be None."""
    for key, value in config.items():
        default = {} if prefix.removeprefix("config.") in OPEN_SECTIONS else defaults.get(key)
        if isinstance(default, Mapping) and not (value is None and prefix == "config.model"):
            if not isinstance(value, Mapping):
                keys = f" with {sorted(default)}" if default else ""
                raise ValueError(f"{prefix}.{key} is {value!r}; expected a section{keys}")
            _check_sections(value, default, f"{prefix}.{key}")


def _check_ranges(values: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first key whose number is none of its `RANGES`."""
    for words, holds, patterns in RANGES:
        for key, value in values.items():
            if value is None or not any(fnmatchcase(key, pattern) for pattern in patterns):
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not holds(value):
                raise ValueError(f"config.{key} is {value!r}; expected {words}")


def check_resume(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses to continue a checkpoint with a config that would make the rest of the run another experiment.

    Args:
      saved: the config that the checkpoint was trained with.
      config: the config to go on with. `MAY_CHANGE` says what may differ.

    Raises:
      ValueError: naming every other key that differs, with both values.
    """
    # Through JSON, as the saved one went: other containers are no other experiment.
    before, now = (flatten(normalize(json.loads(json.dumps(x, default=dict)))) for x in (saved, config))
    for key, default in flatten(normalize(base.get_config().to_dict())).items():
        # A key that is younger than the checkpoint: its default is what was done before there was a choice.
        parents = {key[: match.start()] for match in re.finditer(r"\.", key)}
        if key in now and not parents & before.keys() and not parents & set(OPEN_SECTIONS):
            before.setdefault(key, default)
    patterns = [pattern for keys in MAY_CHANGE.values() for pattern in keys]
    differences = [
        f"config.{key} is {now.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(fnmatchcase(key, pattern) for pattern in patterns)
    ]
    if differences:
        raise ValueError(
            "the checkpoint in the workdir was trained with another config: "
            + "; ".join(differences)
            + ". Use another --workdir, or start from its weights with --config.init_from"
        )
