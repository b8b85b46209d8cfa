"""FLAIR as ONNX files, through its PyTorch twin.

The programs take and give what those of `python -m flair_jax.export` do: images as uint8 pixels (B, H, W, 3), which are
normalised inside, tokens as int32, features and logits as float32.
"""

import contextlib
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flair_jax.convert import names

NEEDS = "ONNX needs PyTorch and onnx: pip install 'flair_jax[onnx]'"
OPSET = 20
# What the twin has: keys of a `model` section -> values that it computes, the first one where the key is missing.
TWIN = {"gelu": ("exact",), "decoder": (None,)}


def check(model: Mapping[str, Any]) -> None:
    """
    Raises:
      ValueError: the model is none that the PyTorch twin computes. ImportError: a package is missing.
    """
    wrong = {key: model.get(key) for key, allowed in TWIN.items() if model.get(key, allowed[0]) not in allowed}
    if model.get("name", "flair") != "flair" or model.get("pooling") is None or wrong:
        differs = f" with {wrong}" if wrong else ""
        raise ValueError(
            f"ONNX files are made through the PyTorch twin, which is FLAIR; this model is {model.get('name')!r}"
            f"{differs}. StableHLO (without --onnx) has every model"
        )
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{NEEDS} ({error})") from error


def write(
    folder: str | os.PathLike, params: Mapping[str, Any], model: Mapping[str, Any], mean: np.ndarray, std: np.ndarray
) -> dict[str, str]:
    """Writes image.onnx, text.onnx, pool.onnx and score.onnx; see `check`.

    Args:
      folder: an existing one.
      params: parameter tree of numpy arrays.
      model: the `model` section.
      mean, std: (3,) float32, of pixels in [0, 1].

    Returns:
      Names of the files by part.
    """
    check(model)
    import torch

    from flair_jax.convert.torch_flair import TorchFLAIR, unit

    twin = TorchFLAIR(model).eval()
    twin.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in names.to_torch(params, "flair").items()})

    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.image_post = twin.visual, twin.image_post
            self.register_buffer("mean", torch.tensor(mean), persistent=False)
            self.register_buffer("std", torch.tensor(std), persistent=False)

        def forward(self, images):
            pixels = (images.float() / 255 - self.mean) / self.std  # (B, H, W, 3)
            x = self.image_post(self.visual(pixels.permute(0, 3, 1, 2)))
            return x[:, 0], x[:, 1:]

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, tokens):
            return self.twin.encode_text_pooled(tokens)

    class Pool(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual_proj = twin.visual_proj  # all that `pool` needs of the twin

        def forward(self, text, local):
            return TorchFLAIR.pool(self, text, local)

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = Pool()
            self.logit_scale, self.logit_bias = twin.logit_scale, twin.logit_bias

        def forward(self, local, text):
            cosine = (unit(self.pool(text, local)) * unit(text)).sum(-1)
            return self.logit_scale.exp() * cosine + self.logit_bias

    vision = twin.visual
    patches, dim = vision.positional_embedding.shape[0] - 1, model["embed_dim"]
    size = model["vision"]["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    tokens = torch.zeros(3, model["text"]["context_length"], dtype=torch.int32)
    local, text = torch.zeros(2, patches, dim), torch.zeros(3, dim)
    programs = {
        "image": (Image(), {"images": images}, ["pooled", "local"]),
        "text": (Text(), {"tokens": tokens}, ["pooled"]),
        "pool": (Pool(), {"text": text, "local": local}, ["pooled"]),
        "score": (Score(), {"local": local, "text": text}, ["logits"]),
    }
    dims = {name: torch.export.Dim(name) for name in ("b", "n")}
    axis = {"images": "b", "local": "b", "tokens": "n", "text": "n"}
    written = {}
    for name, (module, inputs, outputs) in programs.items():
        file = pathlib.Path(folder) / f"{name}.onnx"
        with torch.inference_mode(), _quiet():
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                file,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=tuple({0: dims[axis[key]]} for key in inputs),
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        written[name] = file.name
    return written


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own parts: packages that it does without, steps that it leaves out."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
