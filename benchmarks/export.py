"""Exported programs: size on disk, time to load, and speed beside the model itself.

    python -m benchmarks.export                       # FLAIR B/16 with random weights, StableHLO and ONNX

Every side runs alone, one after the other in this process, on the same arrays; medians of turns after one that is not
counted, which compiles.
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


def speed(run: Callable[[], Any], turns: int) -> float:
    """Median seconds."""
    run()
    found = []
    for _ in range(turns):
        began = time.perf_counter()
        run()
        found.append({"seconds": time.perf_counter() - began})
    return median(found, "seconds")


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
        figures["model_image_seconds"] = speed(lambda: jax.device_get(model.encode_image(pixels)), turns)
        figures["model_text_seconds"] = speed(lambda: jax.device_get(model.encode_text(tokens)), turns)
        for kind, folder in folders.items():
            programs = timed(f"{kind}_load", functools.partial(READERS[kind], folder))
            image, text = programs["image"](pixels), programs["text"](tokens)["pooled"]
            scored = image["local" if model.model.has_pooling else "pooled"]
            figures[f"{kind}_image_seconds"] = speed(functools.partial(programs["image"], pixels), turns)
            figures[f"{kind}_text_seconds"] = speed(functools.partial(programs["text"], tokens), turns)
            figures[f"{kind}_score_seconds"] = speed(functools.partial(programs["score"], scored, text), turns)
            logits = programs["score"](scored, text)["logits"]
            figures[f"{kind}_largest_difference"] = float(np.abs(logits - model.get_logits(pixels, tokens)).max())
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
