"""The command line: prints the figures of one benchmark, and writes them as flat JSON with `--json`."""

import argparse
import ast
import contextlib
import json
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from flair_jax.benchmark import checkpoint, data, encode, loss, soak, sweep, tokenizer, torch_twin, train
from flair_jax.configs import base
from flair_jax.data.sources.open import expand

WITHOUT_OPEN_CLIP = "open_clip is not installed, so {}: pip install --no-deps open_clip_torch"


def _tokenizer(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.captions:
        captions = arguments.captions.read_text(encoding="utf-8").splitlines()
    else:
        captions = tokenizer.made_up_captions(20_000)
    figures = tokenizer.measure(captions)
    if "ratio" not in figures:
        print(WITHOUT_OPEN_CLIP.format("there is nothing to compare with"))
    return figures


def _loss(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("images", "captions", "block_size", "chunk_size", "devices")
    return loss.measure(**{name: getattr(arguments, name) for name in names})


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("workers", "batch_size", "image_size", "captions")
    if arguments.workers < 1:
        raise SystemExit("--workers: at least 1; without workers the two loaders do not do the same")
    settings = data.Settings(shards=expand(arguments.shards), **{name: getattr(arguments, name) for name in names})
    names = ("pixels", "reference", "batches", "turns")
    figures = data.measure(settings, **{name: getattr(arguments, name) for name in names})
    if figures.get("reference_loader_tokenizer") == "python":
        print(WITHOUT_OPEN_CLIP.format("the reference's loader has another Python tokenizer, a bit faster"))
    return figures


def _read(file: pathlib.Path) -> ConfigDict:
    return runpy.run_path(str(file))["get_config"]()


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config of a file, with what the arguments change, as the benchmarks of the model take it."""
    config = _read(arguments.config) if arguments.config else base.get_config()
    if not arguments.config:  # the recipe's model on whatever the machine has
        config.batch_size = 8
        config.data.packing.row_length = 80
    for change in arguments.set:
        name, _, value = change.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # a string stays one
            value = ast.literal_eval(value)
        sweep.change(config, name, value)
    if arguments.shards:
        config.data.shards = arguments.shards
    if getattr(arguments, "batch_size", None):
        config.batch_size = arguments.batch_size
    return config.to_dict()


def _sides(arguments: argparse.Namespace) -> Sequence[str]:
    return {None: (), "torch": torch_twin.SIDES, "eager": ("eager",), "compiled": ("compiled",)}[arguments.beside]


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    options = dict(beside=_sides(arguments), steps=arguments.steps, turns=arguments.turns, trace=arguments.trace)
    return train.measure(_config(arguments), **options)


def _encode(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("images", "texts", "image_batch", "text_batch", "turns")
    options = {name: getattr(arguments, name) for name in names}
    return encode.measure(_config(arguments), kinds=arguments.kinds, beside=_sides(arguments), **options)


def _sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    options = dict(beside=_sides(arguments), steps=arguments.steps, turns=arguments.turns)
    return sweep.measure(_config(arguments), arguments.vary, **options)


def _soak(arguments: argparse.Namespace) -> dict[str, Any]:
    return soak.measure(arguments.batches, arguments.workers)


def _checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    return checkpoint.measure(_read(arguments.config).to_dict(), arguments.folder, arguments.turns)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flair_jax.benchmark", description="Figures of flair_jax.")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")

    command = benchmarks.add_parser("tokenizer", parents=[common], help="captions tokenised per second")
    command.add_argument("--captions", type=pathlib.Path, metavar="FILE", help="one caption a line; made up if absent")
    command.set_defaults(run=_tokenizer)

    command = benchmarks.add_parser("loss", parents=[common], help="temporary memory of the loss and its gradient")
    command.add_argument("--images", type=int, default=2048, metavar="N", help="global batch (%(default)s)")
    command.add_argument("--captions", type=int, default=8, metavar="K", help="captions an image (%(default)s)")
    command.add_argument("--block-size", type=int, default=128, metavar="B", help="images a block (%(default)s)")
    command.add_argument("--chunk-size", type=int, default=8, metavar="C", help="images at a time (%(default)s)")
    command.add_argument("--devices", type=int, default=1, metavar="W", help="that share the batch (%(default)s)")
    command.set_defaults(run=_loss)

    command = benchmarks.add_parser("data", parents=[common], help="images per second of the training stream")
    command.add_argument("--shards", required=True, help="webdataset tars: a folder, a pattern, or several with ::")
    command.add_argument("--workers", type=int, required=True, metavar="W", help="processes of each loader")
    command.add_argument("--batch-size", type=int, default=64, metavar="B", help="images (%(default)s)")
    command.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="side (%(default)s)")
    command.add_argument("--captions", type=int, default=8, metavar="K", help="captions an image (%(default)s)")
    command.add_argument("--batches", type=int, default=30, metavar="N", help="counted in a turn (%(default)s)")
    command.add_argument("--turns", type=int, default=5, metavar="N", help="of each loader (%(default)s)")
    command.add_argument(
        "--pixels",
        nargs="+",
        choices=data.WAYS,
        default=["reference", "fast"],
        help="ways of data.pixels (%(default)s)",
    )
    command.add_argument(
        "--no-reference", dest="reference", action="store_false", help="without the reference's kind of loader"
    )
    command.set_defaults(run=_data)

    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument("--config", type=pathlib.Path, metavar="FILE", help="a file of configs/; FLAIR B/16 if absent")
    model.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config: model.dtype=bfloat16")
    model.add_argument("--shards", help="whose images and captions to take; made up if absent")
    model.add_argument(
        "--beside",
        choices=["torch", *torch_twin.SIDES],
        help="run the PyTorch twin, too: eager, compiled, or both (torch)",
    )
    model.add_argument("--turns", type=int, default=3, metavar="N", help="of each side (%(default)s)")
    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument("--steps", type=int, default=3, metavar="N", help="in a turn (%(default)s)")

    command = benchmarks.add_parser("train", parents=[model, steps], help="images per second of training steps")
    command.add_argument("--batch-size", type=int, metavar="B", help="images; the config's if absent")
    command.add_argument("--trace", metavar="FOLDER", help="write a profile of two more steps there, for XProf")
    command.set_defaults(run=_train)

    command = benchmarks.add_parser("sweep", parents=[model, steps], help="`train` over several settings, as a table")
    command.add_argument(
        "--vary",
        nargs="+",
        required=True,
        metavar="KEY=V,V",
        help="settings of the config: batch_size=64,128",
    )
    command.set_defaults(run=_sweep)

    for name, kinds, images, words in (
        ("encode", ("images", "texts"), 64, "images and texts encoded per second"),
        ("score", ("pairs",), 16, "text-conditioned scores per second"),
    ):
        command = benchmarks.add_parser(name, parents=[model], help=words)
        command.add_argument("--images", type=int, default=images, metavar="N", help="in a turn (%(default)s)")
        command.add_argument("--texts", type=int, default=256, metavar="N", help="in a turn (%(default)s)")
        command.add_argument("--image-batch", type=int, default=16, metavar="N", help="encoded at a time (%(default)s)")
        command.add_argument("--text-batch", type=int, default=64, metavar="N", help="encoded at a time (%(default)s)")
        command.set_defaults(run=_encode, kinds=kinds)

    command = benchmarks.add_parser("soak", parents=[common], help="memory of the training stream over many batches")
    command.add_argument("--batches", type=int, default=20_000, metavar="N", help="tiny ones (%(default)s)")
    command.add_argument("--workers", type=int, default=2, metavar="W", help="processes (%(default)s)")
    command.set_defaults(run=_soak)

    command = benchmarks.add_parser(
        "checkpoint", parents=[common], help="stall of the loop by a save, and the whole save"
    )
    default = pathlib.Path(base.__file__)
    command.add_argument("--config", type=pathlib.Path, default=default, metavar="FILE", help="of configs/ (base.py)")
    command.add_argument(
        "--folder", metavar="PATH", help="where to write, such as gs://…; a temporary folder if absent"
    )
    command.add_argument("--turns", type=int, default=3, metavar="N", help="of each kind (%(default)s)")
    command.set_defaults(run=_checkpoint)

    parsed = parser.parse_args(arguments)
    figures = parsed.run(parsed)
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:32} {value:,.3f}" if abs(value) < 10 else f"{name:32} {value:,.1f}")
        else:
            print(f"{name:32} {value:,}" if isinstance(value, int) else f"{name:32} {value}")
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
