"""What the command lines of the benchmarks share: the options of a model, and the report of the figures."""

import argparse
import ast
import contextlib
import json
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from flair_jax.configs import base

BESIDE = {None: (), "torch": ("eager", "compiled"), "eager": ("eager",), "compiled": ("compiled",)}


def parser(name: str, words: str) -> argparse.ArgumentParser:
    """A command line `python -m benchmarks.NAME` with `--json`."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=words)
    made.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")
    return made


def add_sizes(parser: argparse.ArgumentParser, **sizes: tuple[int, str]) -> None:
    """Adds options that are one number each, from (default, help)."""
    for name, (default, words) in sizes.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{words} (%(default)s)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `config` and `sides.beside` take."""
    parser.add_argument("--config", type=pathlib.Path, metavar="FILE", help="a file of configs/; FLAIR B/16 if absent")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config: model.dtype=bfloat16")
    parser.add_argument("--shards", help="whose images and captions to take; made up if absent")
    parser.add_argument(
        "--beside", choices=list(BESIDE)[1:], help="run the PyTorch twin, too: eager, compiled, or both (torch)"
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each side (%(default)s)")


def config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config of a file, with what the arguments change; without a file, the recipe's model with 8 images a step."""
    if arguments.config:
        changed = runpy.run_path(str(arguments.config))["get_config"]()
    else:
        changed = base.get_config()
        changed.batch_size = 8
        changed.data.packing.row_length = 80
    for change in arguments.set:
        name, _, word = change.partition("=")
        set_key(changed, name, value(word))
    if arguments.shards:
        changed.data.shards = arguments.shards
    return changed.to_dict()


def value(word: str) -> Any:
    """A word of the command line as Python reads it, `None`, `True` and `0.5` among them; a string stays one."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(word)
    return word


def set_key(config: ConfigDict, name: str, value: Any) -> None:
    """Sets a key, dotted, that the config has; raises KeyError for another."""
    *sections, key = name.split(".")
    section = config
    for part in sections:
        section = section.get(part, {})
    if key not in section:
        raise KeyError(f"the config has no key {name}")
    section[key] = value


def report(figures: Mapping[str, Any], file: pathlib.Path | None) -> None:
    """Prints the figures by name, and writes them as JSON if there is a file."""
    for name, figure in figures.items():
        form = "" if isinstance(figure, str) else ",.3f" if isinstance(figure, float) else ","
        print(f"{name:32} {figure:{form}}")
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def pick(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Arguments by name, to hand on."""
    return {name: getattr(arguments, name) for name in names}
