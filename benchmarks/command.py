"""What the command lines of the benchmarks share: the options of a model, and the report of the figures."""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flair_jax import config as configuration

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
    """Adds the options that `config` takes, and the sides to run beside ours."""
    parser.add_argument("--config", help="a path or the name of a shipped config; FLAIR B/16 if absent")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config: model.dtype=bfloat16")
    parser.add_argument("--shards", help="whose images and captions to take; made up if absent")
    parser.add_argument(
        "--beside", choices=list(BESIDE)[1:], help="run the PyTorch twin, too: eager, compiled, or both (torch)"
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of each side (%(default)s)")


def config(arguments: argparse.Namespace, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The config that the arguments give; without one, the recipe's model with 8 images per step.

    Args:
      arguments: with the options of `add_model`.
      changes: "key=value", beside those of `--set`.

    Raises:
      ValueError, FileNotFoundError: see `flair_jax.config.read`; or the PyTorch twin is to run beside another model.
    """
    default = () if arguments.config else ("batch_size=8", "data.packing.row_length=80")
    shards = [f"data.shards={arguments.shards}"] if arguments.shards else []
    changed = [f"--config.{change}" for change in (*default, *arguments.set, *shards, *changes)]
    found = configuration.read(arguments.config or "base", changed)
    objectives = {name for name, options in found["objectives"].items() if options["weight"]}
    if arguments.beside and not {"text_conditioned"} <= objectives <= {"text_conditioned", "sigmoid"}:
        raise ValueError(f"--beside: the PyTorch twin is FLAIR, and config.objectives are {sorted(objectives)}")
    return found


def report(figures: Mapping[str, Any], file: pathlib.Path | None) -> None:
    """Prints the figures by name, and writes them as JSON if there is a file."""
    for name, figure in figures.items():
        form = ",.3f" if isinstance(figure, float) else "," if isinstance(figure, int) else ""
        print(f"{name:32} {format(figure, form)}" if form else f"{name:32} {figure}")
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def pick(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Arguments by name, to hand on."""
    return {name: getattr(arguments, name) for name in names}
