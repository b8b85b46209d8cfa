"""A model as programs that run without this package: StableHLO for JAX and XLA, ONNX for other runtimes.

    python -m flair_jax.export --checkpoint flair-cc3m-recap --output DIR          # StableHLO
    python -m flair_jax.export --checkpoint flair-cc3m-recap --output DIR --onnx   # ONNX beside it

The programs are the parts that a service calls at different times, for any number of images (B) and texts (N):

    image   images uint8 (B, H, W, 3)                   -> pooled (B, D), and local (B, L, D) where the model has it
    text    tokens int32 (N, T)                         -> pooled (N, D)
    pool    text (N, D), local (B, L, D)                -> (B, N, D), with text-conditioned pooling alone
    score   pooled or local of images, text (N, D)      -> logits (B, N), as `Pretrained.get_logits` gives

`export.json` describes them: how a picture becomes uint8 pixels and a text becomes tokens, inputs, outputs and weights
of every program. The weights are one file, `weights.safetensors`, which `flair_jax.load` reads too. docs/serving.md
shows how to call the programs.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from flair_jax import __version__, inference, pretrained
from flair_jax.convert import flax_files, onnx_files
from flair_jax.convert.tables import flatten, unflatten
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms import tokenizer
from flair_jax.evaluators.features import call
from flair_jax.models import layers
from flair_jax.models.dual_encoder import DualEncoder, ImageFeatures, TextFeatures
from flair_jax.models.text import Text

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = 1  # of export.json
WEIGHTS = "weights.safetensors"


class Part(NamedTuple):
    """A program: a function of parameters and arrays, and what it takes.

    `inputs`: name -> dtype and shape, in which "b" and "n" stand for any number of images and texts. `uses`: names at
    the top of the parameter tree. `outputs`: what it returns, a dict by these names, or one array.
    """

    apply: Callable[..., Any]
    inputs: Mapping[str, tuple[Any, tuple[int | str, ...]]]
    uses: Sequence[str]
    outputs: Sequence[str]


def parts(model: DualEncoder, params: Mapping[str, Any]) -> dict[str, Part]:
    """The programs of a model, by name.

    Raises:
      ValueError: the model lacks a tower.
    """
    height, width = model.image_size
    length = model.context_length
    # Attention without kernels of one kind of device, and without what only training needs.
    model = model.clone(compute=model.compute._replace(attention="xla", remat="none"))
    image_shape = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
    features = jax.eval_shape(functools.partial(call, model, "encode_image"), params, image_shape)
    dim = features.pooled.shape[-1]
    fields = [name for name, x in vars(features).items() if x is not None]

    def image(params, images):
        found = call(model, "encode_image", params, model.preprocessing(images))
        return {name: getattr(found, name).astype(jnp.float32) for name in fields}

    def text(params, tokens):
        found = model.apply({"params": params}, Text.padded(tokens), local=False, method="encode_text")
        return {"pooled": found.pooled.astype(jnp.float32)}

    def pool(params, text, local):
        def pooling(module, *args):
            return module.pooling(*args)

        return {"pooled": model.apply({"params": params}, text, local, method=pooling).astype(jnp.float32)}

    def score(params, image, text):
        if model.has_pooling:
            image = pool(params, text, image)["pooled"]  # (B, N, D)
            cosine = jnp.einsum("bnd,nd->bn", layers.normalize(image), layers.normalize(text))
            logits = jnp.exp(params["logit_scale"]) * cosine
        else:
            logits = call(model, "global_score", params, ImageFeatures(image, None), TextFeatures(text, None, None))
        return {"logits": logits + params.get("logit_bias", 0.0)}

    scalars = [name for name in ("logit_scale", "logit_bias") if name in params]
    pooling = ["pooling"] if model.has_pooling else []
    text_input = (np.float32, ("n", dim))
    local_input = (np.float32, ("b", *features.local.shape[1:])) if model.has_pooling else None
    towers = {
        "image": [name for name in params if name in ("vision", "image_projection", "decoder")],
        "text": [name for name in params if name in ("text", "text_projection")],
    }
    found = {
        "image": Part(image, {"images": (np.uint8, ("b", height, width, 3))}, towers["image"], fields),
        "text": Part(text, {"tokens": (np.int32, ("n", length))}, towers["text"], ["pooled"]),
    }
    if model.has_pooling:
        found["pool"] = Part(pool, {"text": text_input, "local": local_input}, pooling, ["pooled"])
        score_input = {"local": local_input}
    else:
        score_input = {"pooled": (np.float32, ("b", dim))}
    found["score"] = Part(score, {**score_input, "text": text_input}, [*pooling, *scalars], ["logits"])
    return found


def export(part: Part, params: Mapping[str, Any]) -> jax.export.Exported:
    """A part as StableHLO for `PLATFORMS`: a function of its parameters, a flat dict, and its inputs."""
    scope = jax.export.SymbolicScope()
    dims = {name: jax.export.symbolic_shape(name, scope=scope)[0] for name in ("b", "n")}
    arguments = [
        jax.ShapeDtypeStruct(tuple(dims.get(side, side) for side in shape), dtype)
        for dtype, shape in part.inputs.values()
    ]
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in used(part, params).items()}
    # Linen asks for every array at the top, used or not; those of other parts are no inputs, and leave no trace.
    others = {name: x.shape for name, x in params.items() if name not in part.uses and not isinstance(x, Mapping)}

    def run(weights, *inputs):
        return part.apply({**unflatten(weights), **{name: jnp.zeros(x) for name, x in others.items()}}, *inputs)

    return jax.export.export(jax.jit(run), platforms=PLATFORMS)(weights, *arguments)


def used(part: Part, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a part, by their path in the file of weights."""
    return {path: x for path, x in flatten(params).items() if path.split("/")[0] in part.uses}


def description(model: inference.Pretrained, found: Mapping[str, Part]) -> dict[str, Any]:
    """What `export.json` says, see the module."""
    section, preprocessing = model.config, model.model.preprocessing
    mean, std = (x.tolist() for x in image_rules.MEAN_STD[preprocessing.mean_std])
    return {
        "format": FORMAT,
        "made_by": f"flair_jax {__version__}, jax {jax.__version__}",
        "model": section,
        "images": {
            "size": list(model.model.image_size),  # height, width
            "resize": preprocessing.resize,
            "interpolation": "bicubic, antialiased",
            "mean": mean,  # the program subtracts it from pixels / 255
            "std": std,
        },
        "texts": {
            "tokenizer": "CLIP's byte-pair encoding, bpe_simple_vocab_16e6",
            "context_length": model.model.context_length,
            "start_of_text": tokenizer.SOT,
            "end_of_text": tokenizer.EOT,
            "padding": 0,
        },
        "weights": WEIGHTS,
        "logit_scale": float(np.exp(model.params["logit_scale"])),
        "logit_bias": float(model.params.get("logit_bias", 0.0)),
        "parts": {
            name: {
                "inputs": {key: [np.dtype(dtype).name, list(shape)] for key, (dtype, shape) in part.inputs.items()},
                "outputs": list(part.outputs),
                "weights": sorted(used(part, model.params)),
            }
            for name, part in found.items()
        },
        "stablehlo": {
            "platforms": list(PLATFORMS),
            "calling_convention": jax.export.maximum_supported_calling_convention_version,
        },
    }


def write(model: inference.Pretrained, folder: str | os.PathLike, *, onnx: bool = False) -> dict[str, Any]:
    """Writes programs, weights and their description into a folder; `export.json` comes last, when all is there.

    Args:
      model: what to export.
      folder: made if need be; it must be empty.
      onnx: write ONNX files too; they hold the weights themselves.

    Returns:
      What `export.json` says.

    Raises:
      FileExistsError: the folder is not empty.
      ValueError: the model lacks a tower, or ONNX is asked for of a model that no module of PyTorch computes.
      ImportError: of ONNX: PyTorch or onnx is not installed.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give an empty folder, or remove it")
    params = jax.device_get(model.params)
    found = parts(model.model, params)
    if onnx:
        onnx_files.check(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    flax_files.write(folder / WEIGHTS, params, model.config)
    text = description(model, found)
    for name, part in found.items():
        exported = export(part, params)
        text["stablehlo"]["calling_convention"] = exported.calling_convention_version
        file = folder / f"{name}.stablehlo"
        file.write_bytes(exported.serialize())
        text["parts"][name]["stablehlo"] = file.name
    if onnx:
        mean, std = image_rules.MEAN_STD[model.model.preprocessing.mean_std]
        for name, file in onnx_files.write(folder, params, model.config, mean, std).items():
            text["parts"][name]["onnx"] = file
    (folder / "export.json").write_text(json.dumps(text, indent=1) + "\n")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.export", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    pretrained.add_options(parser)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR", help="an empty folder")
    parser.add_argument("--onnx", action="store_true", help="write ONNX files too: pip install 'flair_jax[onnx]'")
    options = parser.parse_args(arguments)
    try:
        write(pretrained.load(options.checkpoint, gelu=options.gelu), options.output, onnx=options.onnx)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for file in sorted(options.output.expanduser().iterdir()):
        print(f"{file.stat().st_size / 2**20:10.2f} MiB  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
