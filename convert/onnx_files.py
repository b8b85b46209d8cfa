"""Models as ONNX files, through modules of PyTorch: FLAIR's twin, and for CLIP's towers Hugging Face's `CLIPModel`.

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

from flair_jax.convert import hugging_face, names
from flair_jax.convert.tables import ConversionError, pair

OPSET = 20
CLIPS = ("clip", "siglip")  # models with CLIP's towers, which are compared by their pooled features


def check(model: Mapping[str, Any]) -> None:
    """
    Raises:
      ValueError: no module of PyTorch computes the model. ImportError: a package is missing.
    """
    kind, wrong = model.get("name", "flair"), hugging_face.differing_options(model)
    if model.get("decoder") is not None:
        wrong["decoder"] = model["decoder"]
    if kind == "flair":
        fits = model.get("pooling") is not None and model.get("gelu", "exact") == "exact"
    else:
        fits = kind in CLIPS and model.get("pooling") is None
        try:
            fits = fits and bool(hugging_face.config_of(model))
        except ConversionError as error:
            raise ValueError(f"this model cannot be written as ONNX: {error}") from error
    if wrong or not fits:
        raise ValueError(
            f"ONNX files are made through PyTorch's FLAIR with exact GELU or Hugging Face's CLIPModel; this model is "
            f"{kind!r} with gelu={model.get('gelu', 'exact')!r}"
            f"{''.join(f', {key}={value!r}' for key, value in wrong.items())}. StableHLO (without --onnx) has every "
            "model"
        )
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch  # noqa: F401

        if kind in CLIPS:
            import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs more packages: pip install 'flair_jax[onnx]' ({error})") from error


def write(
    folder: str | os.PathLike, params: Mapping[str, Any], model: Mapping[str, Any], mean: np.ndarray, std: np.ndarray
) -> dict[str, str]:
    """Writes image.onnx, text.onnx, score.onnx, and of FLAIR pool.onnx; see `check`.

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

    height, width = pair(model["vision"]["image_size"])
    patches = (height // model["vision"]["patch_size"]) * (width // model["vision"]["patch_size"])
    inputs = {
        "images": torch.zeros(2, height, width, 3, dtype=torch.uint8),
        "tokens": torch.zeros(3, model["text"]["context_length"], dtype=torch.int32),
        "local": torch.zeros(2, patches, model["embed_dim"]),
        "pooled": torch.zeros(2, model["embed_dim"]),
        "text": torch.zeros(3, model["embed_dim"]),
    }
    dims = {name: torch.export.Dim(name) for name in ("b", "n")}
    axis = {"images": "b", "local": "b", "pooled": "b", "tokens": "n", "text": "n"}
    programs = (_flair if model.get("name", "flair") == "flair" else _clip)(params, model, mean, std)
    written = {}
    for name, (module, takes, gives) in programs.items():
        file = pathlib.Path(folder) / f"{name}.onnx"
        with torch.inference_mode(), _quiet():
            torch.onnx.export(
                module.eval(),
                tuple(inputs[key] for key in takes),
                file,
                input_names=takes,
                output_names=gives,
                dynamic_shapes=tuple({0: dims[axis[key]]} for key in takes),
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        written[name] = file.name
    return written


def _flair(
    params: Mapping[str, Any], model: Mapping[str, Any], mean: np.ndarray, std: np.ndarray
) -> dict[str, tuple[Any, list[str], list[str]]]:
    """Modules of PyTorch by part, with the names of what they take and give."""
    import torch

    from flair_jax.convert.torch_flair import TorchFLAIR, unit

    twin = TorchFLAIR(model).eval()
    twin.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in names.to_torch(params, "flair").items()})

    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.image_post = twin.visual, twin.image_post
            self.normalize = _normalize(mean, std)

        def forward(self, images):
            x = self.image_post(self.visual(self.normalize(images)))
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

    return {
        "image": (Image(), ["images"], ["pooled", "local"]),
        "text": (Text(), ["tokens"], ["pooled"]),
        "pool": (Pool(), ["text", "local"], ["pooled"]),
        "score": (Score(), ["local", "text"], ["logits"]),
    }


def _clip(
    params: Mapping[str, Any], model: Mapping[str, Any], mean: np.ndarray, std: np.ndarray
) -> dict[str, tuple[Any, list[str], list[str]]]:
    """As `_flair`, of CLIP's towers; a bias, which Hugging Face's module does not have, is added to its logits."""
    import torch
    import transformers

    from flair_jax.convert.torch_flair import unit

    config = transformers.CLIPConfig.from_dict(hugging_face.config_of(model))
    module = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    own = {name: x for name, x in params.items() if name != "logit_bias"}
    weights = names.to_torch(own, "clip", "hugging_face")
    module.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()})

    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.projection = module.vision_model, module.visual_projection
            self.normalize = _normalize(mean, std)

        def forward(self, images):
            x = self.vision(pixel_values=self.normalize(images)).last_hidden_state
            x = self.projection(self.vision.post_layernorm(x))  # theirs normalises the class token alone
            return x[:, 0], x[:, 1:]

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.projection = module.text_model, module.text_projection

        def forward(self, tokens):
            return self.projection(self.text(input_ids=tokens).pooler_output)

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit_scale = module.logit_scale
            self.register_buffer("logit_bias", torch.tensor(np.float32(params.get("logit_bias", 0.0))))

        def forward(self, pooled, text):
            return self.logit_scale.exp() * unit(pooled) @ unit(text).T + self.logit_bias

    return {
        "image": (Image(), ["images"], ["pooled", "local"]),
        "text": (Text(), ["tokens"], ["pooled"]),
        "score": (Score(), ["pooled", "text"], ["logits"]),
    }


def _normalize(mean: np.ndarray, std: np.ndarray) -> Any:
    """A module: uint8 pixels (B, H, W, 3) -> normalised (B, 3, H, W)."""
    import torch

    class Normalize(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor(mean), persistent=False)
            self.register_buffer("std", torch.tensor(std), persistent=False)

        def forward(self, images):
            return ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    return Normalize()


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
