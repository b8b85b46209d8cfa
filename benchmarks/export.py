"""Exported programs: size on disk, time to load, and speed beside the model itself.

    python -m benchmarks.export                       # FLAIR B/16 with random weights, StableHLO and ONNX

The model, StableHLO and ONNX take turns in this process, on the same arrays; medians, without the first turn.
"""

import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command, processes
from benchmarks.encode import host_inputs
from benchmarks.sides import median


def speeds(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median seconds of each side."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in sides}
    for turn in range(1 + turns):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if turn:  # the first one compiles
                found[name].append({"seconds": time.perf_counter() - began})
    return {name: median(each, "seconds") for name, each in found.items()}


def stablehlo(folder: pathlib.Path) -> dict[str, Callable[..., Any]]:
    """The programs of a folder by name: arrays -> a dict of arrays."""
    import jax
    import safetensors.numpy

    about = json.loads((folder / "export.json").read_text())
    weights = jax.device_put(safetensors.numpy.load_file(folder / about["weights"]))

    def load(part: str) -> Callable[..., Any]:
        described = about["parts"][part]
        exported = jax.export.deserialize(bytearray((folder / described["stablehlo"]).read_bytes()))
        own, call = {name: weights[name] for name in described["weights"]}, jax.jit(exported.call)
        return lambda *arrays: jax.device_get(call(own, *arrays))

    return {part: load(part) for part in about["parts"]}


def onnx(folder: pathlib.Path) -> dict[str, Callable[..., Any]]:
    """As `stablehlo`, by onnxruntime on the CPU."""
    import onnxruntime

    about = json.loads((folder / "export.json").read_text())

    def load(part: str) -> Callable[..., Any]:
        described = about["parts"][part]
        session = onnxruntime.InferenceSession(folder / described["onnx"], providers=["CPUExecutionProvider"])
        names, outputs = list(described["inputs"]), described["outputs"]
        return lambda *arrays: dict(zip(outputs, session.run(None, dict(zip(names, arrays, strict=True))), strict=True))

    return {part: load(part) for part in about["parts"]}


READERS = {"stablehlo": stablehlo, "onnx": onnx}


def measure(config: Mapping[str, Any], *, images: int, texts: int, turns: int, with_onnx: bool) -> dict[str, Any]:
    import jax

    from flair_jax import export, inference, state
    from flair_jax.models import create

    figures: dict[str, Any] = {"images": images, "texts": texts}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = run()
        figures[f"{name}_seconds"] = time.perf_counter() - began
        return result

    params = jax.device_get(jax.jit(lambda: state.init_params(create(config["model"]), 0))())
    model = inference.Pretrained(config["model"], params)
    pixels, tokens = host_inputs(config, images, texts)
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        folders = {"stablehlo": pathlib.Path(scratch) / "stablehlo"}
        timed("export_stablehlo", lambda: export.write(model, folders["stablehlo"]))
        if with_onnx:
            folders["onnx"] = pathlib.Path(scratch) / "onnx"
            timed("export_onnx", lambda: export.write(model, folders["onnx"], onnx=True))
        for kind, folder in folders.items():
            for file in sorted(folder.glob(f"*.{kind}")):
                figures[f"{file.name}_mib"] = file.stat().st_size / processes.MIB
        figures["weights.safetensors_mib"] = (folders["stablehlo"] / export.WEIGHTS).stat().st_size / processes.MIB
        programs = {
            kind: timed(f"{kind}_load", functools.partial(READERS[kind], folder)) for kind, folder in folders.items()
        }
        logits = np.asarray(model.get_logits(pixels, tokens))
        scored = "local" if model.model.has_pooling else "pooled"
        inputs = {}
        for kind, parts in programs.items():
            inputs[kind] = parts["image"](pixels)[scored], parts["text"](tokens)["pooled"]
            difference = np.abs(parts["score"](*inputs[kind])["logits"] - logits).max()
            figures[f"{kind}_largest_difference"] = f"{difference:.1e}"
        sides = {
            "image": {"model": lambda: jax.device_get(model.encode_image(pixels))},
            "text": {"model": lambda: jax.device_get(model.encode_text(tokens))},
            "score": {},
        }
        for kind, parts in programs.items():
            sides["image"][kind] = functools.partial(parts["image"], pixels)
            sides["text"][kind] = functools.partial(parts["text"], tokens)
            sides["score"][kind] = functools.partial(parts["score"], *inputs[kind])
        for part, each in sides.items():
            for kind, seconds in speeds(each, turns).items():
                figures[f"{kind}_{part}_seconds"] = seconds
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("export", __doc__.partition("\n")[0])
    parser.add_argument("--config", help="a path or the name of a shipped config; FLAIR B/16 if absent")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--without-onnx", action="store_true", help="StableHLO alone, which every model has")
    sizes = dict(images=(8, "at a time"), texts=(32, "at a time"), turns=(5, "of each program"))
    command.add_sizes(parser, **sizes)
    parsed = parser.parse_args(arguments)
    from flair_jax import config as configuration

    config = configuration.read(parsed.config or "base", [f"--config.{change}" for change in parsed.set])
    figures = measure(config, **command.pick(parsed, sizes), with_onnx=not parsed.without_onnx)
    command.report(figures, parsed.json)


if __name__ == "__main__":
    main()
