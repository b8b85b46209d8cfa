"""Hugging Face's CLIP: folders with `config.json` and `model.safetensors`, to a `model` section and back.

`CLIPModel`, `CLIPTextModel`, `CLIPVisionModel` and both `…WithProjection` of `transformers`. config.json holds all that
shapes do not tell: heads, activation, image size. A model that computes something else than our towers is refused.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flair_jax.configs import variants
from flair_jax.convert import names, torch_files
from flair_jax.convert.errors import WeightsFileError
from flair_jax.convert.rules import LAYOUTS
from flair_jax.convert.tables import ConversionError, pair

CONFIG, WEIGHTS, INDEX, PICKLE = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
LARGEST_JSON = 2**24  # bytes

# Values of keys that a config.json leaves out (transformers, configuration_clip.py).
COMMON = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, num_hidden_layers=12, projection_dim=512)
DEFAULTS = {
    "text": COMMON | dict(
        vocab_size=49408, hidden_size=512, intermediate_size=2048, num_attention_heads=8, max_position_embeddings=77,
        eos_token_id=49407,
    ),
    "vision": COMMON | dict(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_channels=3, image_size=224, patch_size=32,
    ),
}  # fmt: skip
ACTIVATIONS = {
    "quick_gelu": "quick", "gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh",
}  # fmt: skip
KEYS = {  # ours -> theirs
    "text": dict(
        context_length="max_position_embeddings", vocab_size="vocab_size", width="hidden_size",
        depth="num_hidden_layers", heads="num_attention_heads",
    ),
    "vision": dict(
        image_size="image_size", patch_size="patch_size", width="hidden_size", depth="num_hidden_layers",
        heads="num_attention_heads",
    ),
}  # fmt: skip
# What towers of ours compute as OpenCLIP's and Hugging Face's do; of the text tower there is no other option.
OPENCLIP = {"text": {}, "vision": dict(pre_norm=True, patch_bias=False, qk_norm=False, norm_eps=1e-5)}
TOWERS = {"clip": ("vision", "text"), "clip_text_model": ("text",), "clip_vision_model": ("vision",)}  # by model_type
SIGLIP = (
    "a SigLIP, whose towers are not CLIP's: its image tower has no class token, no LayerNorm before the blocks and a "
    "bias on the patches, and pools by attention from a learned probe with an MLP; its text tower attends in both "
    "directions, pools the last token and projects with a bias; LayerNorm has epsilon 1e-6, texts a SentencePiece "
    "vocabulary. There is no module for it"
)


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder with a config.json, as `save_pretrained` writes it."""
    return Path(path, CONFIG).is_file()


def has_names(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors have Hugging Face's names."""
    return bool(_prefix(arrays)) or any(name.startswith(LAYOUTS["hugging_face"]) for name in arrays)


def read(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a folder of `save_pretrained`.

    Returns:
      As `described`.

    Raises:
      ConversionError: as `described`. WeightsFileError: a file is damaged, or the index names one of another folder.
      OSError: a file is missing.
    """
    read_config(folder)  # first: a model of another kind may be large
    return described(_read_tensors(Path(folder)), folder)


def described(
    tensors: Mapping[str, np.ndarray], folder: str | os.PathLike
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors with the config.json beside their file.

    Args:
      tensors: by Hugging Face's names.
      folder: where their file lies.

    Returns:
      The weights by name, those of a tower alone with the prefix that they have in the whole model, and the `model`
      section.

    Raises:
      ConversionError: the model computes something else than ours.
      WeightsFileError: config.json is damaged. OSError: it is missing.
    """
    config, path = read_config(folder), Path(folder, CONFIG)
    arrays, prefix = names.plain(tensors), _prefix(tensors)
    if prefix:
        arrays = names.plain({f"{prefix}{name}": array for name, array in arrays.items()})  # drops position_ids by name
    return arrays, section(config, arrays, path)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a CLIP or of one of its towers.

    Raises:
      ConversionError: it is one of another kind. WeightsFileError: it is damaged. OSError: it is missing.
    """
    path = Path(folder, CONFIG)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: there is no {CONFIG} beside the weights, which have Hugging Face's names; it says heads, "
            "activation and image size: put the one of their model there"
        )
    config = _read_json(path)
    kind = str(config.get("model_type"))
    if kind not in TOWERS:
        what = SIGLIP if kind.startswith("siglip") else f"a model of type {kind!r:.50}"
        raise ConversionError(f"{path} describes {what}; expected one of {', '.join(TOWERS)}")
    return config


def write(folder: str | os.PathLike, params: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Writes a folder that `from_pretrained` of `transformers` loads.

    Args:
      folder: made if it is not there.
      params: Flax parameter tree.
      model: its `model` section.

    Raises:
      ConversionError: the model is no CLIP, or its images are not square. OSError: something cannot be written.
    """
    folder = Path(folder)
    weights = names.to_torch(params, model["name"], "hugging_face")
    text = json.dumps(config_of(model), indent=2) + "\n"
    folder.mkdir(exist_ok=True)
    torch_files.write(folder / WEIGHTS, weights, {"format": "pt"})
    with torch_files.replacing(folder / CONFIG) as partial:
        partial.write_text(text, encoding="utf-8")


def section(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> dict[str, Any]:
    """The `model` section of a config.json.

    Args:
      config: its content, from `read_config`.
      arrays: the weights, which tell whether a tower alone has its projection.
      path: of the config, for errors.

    Raises:
      ConversionError: naming every key under which the model computes something else than ours.
    """
    parts = TOWERS[config["model_type"]]
    found = {part: _part(config, part, alone=len(parts) == 1) for part in parts}
    problems = [problem for part, values in found.items() for problem in _differences(part, values)]
    projections = {"text": "text_projection.weight", "vision": "visual_projection.weight"}
    if len(parts) == 2:
        width = config.get("projection_dim", 512)
        if found["text"]["hidden_act"] != found["vision"]["hidden_act"]:
            problems.append("hidden_act: the towers have different ones; expected one for both")
    else:
        width = found[parts[0]]["projection_dim"] if projections[parts[0]] in arrays else None
    if width is not None and not _is_size(width):
        problems.append(f"projection_dim is {width!r:.50}; expected a positive integer")
    if problems:
        raise ConversionError("\n  ".join([f"{path} describes a model that ours is not:", *problems]))
    model = variants.clip().to_dict()
    act = found[parts[0]]["hidden_act"]
    model |= {"vision": None, "text": None, "embed_dim": width, "gelu": ACTIVATIONS[act]}
    for part, values in found.items():
        model[part] = {ours: values[theirs] for ours, theirs in KEYS[part].items()}
    return model


def config_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a `model` section.

    Raises:
      ConversionError: images are not square, or towers compute what `transformers` has no name for.
    """
    if differing := differing_options(model):
        raise ConversionError(f"Hugging Face's CLIP computes other towers: this model has {differing}")
    act = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[model.get("gelu", "exact")]
    found = {}
    for part, keys in KEYS.items():
        if model[part] is None:
            continue
        values = {theirs: model[part][ours] for ours, theirs in keys.items()}
        values |= dict(intermediate_size=4 * values["hidden_size"], hidden_act=act, layer_norm_eps=1e-5)
        if part == "text":
            end = values["vocab_size"] - 1  # the largest id ends a text
            values |= dict(bos_token_id=end - 1, eos_token_id=end, pad_token_id=0)
        else:
            values |= dict(image_size=_side(values["image_size"]), num_channels=3)
        width = {} if model["embed_dim"] is None else {"projection_dim": model["embed_dim"]}
        found[part] = dict(model_type=f"clip_{part}_model") | values | width
    if len(found) == 1:
        ((part, values),) = found.items()
        projection = "" if model["embed_dim"] is None else "WithProjection"
        return dict(architectures=[f"CLIP{part.title()}Model{projection}"], dtype="float32") | values
    return dict(
        architectures=["CLIPModel"],
        dtype="float32",
        model_type="clip",
        projection_dim=model["embed_dim"],
        text_config=found["text"],
        vision_config=found["vision"],
    )


def differing_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `model` section by which its towers compute something else than OpenCLIP's, by dotted key."""
    found = {}
    for part, expected in OPENCLIP.items():
        tower = model.get(part) or {}
        found |= {f"{part}.{key}": tower[key] for key, value in expected.items() if tower.get(key, value) != value}
        if tower.get("gelu") not in (None, model.get("gelu", "exact")):
            found[f"{part}.gelu"] = tower["gelu"]
    return found


def _side(size: Any) -> int:
    height, width = pair(size)
    if height != width:
        raise ConversionError(f"model.vision.image_size is {size}; Hugging Face's CLIP has square images only")
    return height


def _prefix(arrays: Mapping[str, np.ndarray]) -> str:
    """What the names of a tower that was saved alone lack; "" for others."""
    if "embeddings.token_embedding.weight" in arrays:
        return "text_model."
    return "vision_model." if "embeddings.patch_embedding.weight" in arrays else ""


def _part(config: Mapping[str, Any], part: str, *, alone: bool) -> dict[str, Any]:
    """All values of a tower, those that the file leaves out too."""
    if alone:
        return DEFAULTS[part] | dict(config)
    values, older = config.get(f"{part}_config") or {}, config.get(f"{part}_config_dict")
    if not isinstance(values, dict) or not isinstance(older, dict | None):
        raise ConversionError(f"config.json: {part}_config is no object")
    # As transformers reads files that older versions of it wrote: this section wins, with its defaults.
    return DEFAULTS[part] | values | ({} if older is None else DEFAULTS[part] | older)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _differences(part: str, values: Mapping[str, Any]) -> list[str]:
    """What our tower does not do, one line each."""
    problems = [
        f"{part}: {key} is {values[key]!r:.50}; expected a positive integer"
        for key in KEYS[part].values()
        if not _is_size(values[key])
    ]
    if problems:
        return problems
    expected = {"intermediate_size": 4 * values["hidden_size"], "layer_norm_eps": 1e-5}
    if part == "vision":
        expected["num_channels"] = 3
    problems += [
        f"{part}: {key} is {values[key]!r:.50}; expected {value}"
        for key, value in expected.items()
        if values[key] != value
    ]
    if values["hidden_act"] not in list(ACTIVATIONS):  # which may be anything, a list too
        problems.append(f"{part}: hidden_act is {values['hidden_act']!r:.50}; expected one of {sorted(ACTIVATIONS)}")
    # 2 stands in files from before this key had a meaning, and means the largest id (transformers, pull request 24773).
    if part == "text" and values["eos_token_id"] not in (2, values["vocab_size"] - 1):
        problems.append(
            f"text: eos_token_id is {values['eos_token_id']!r:.50}; our tower pools at the largest id, "
            f"{values['vocab_size'] - 1}"
        )
    return problems


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, in one file or in several that an index lists."""
    for name in (WEIGHTS, PICKLE):
        if (folder / name).is_file():
            return torch_files.read(folder / name)
        if name == WEIGHTS and (folder / INDEX).is_file():
            return _read_shards(folder)
    raise FileNotFoundError(f"{folder}: expected {WEIGHTS}, {INDEX} or {PICKLE} beside {CONFIG}")


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise WeightsFileError(f"{folder / INDEX}: expected a 'weight_map' of tensors to files")
    if bad := [shard for shard in shards.values() if Path(shard).name != shard or not shard.endswith(".safetensors")]:
        raise WeightsFileError(
            f"{folder / INDEX} names {bad[0]!r:.100}; expected .safetensors files of the same folder"
        )
    arrays = {shard: torch_files.read(folder / shard) for shard in sorted(set(shards.values()))}
    if lacking := [f"{name} in {shard}" for name, shard in shards.items() if name not in arrays[shard]]:
        raise WeightsFileError(f"{folder / INDEX}: there is no {', '.join(lacking[:5])}")
    return {name: arrays[shard][name] for name, shard in shards.items()}


def _read_json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise WeightsFileError(f"{path} has {size:,} bytes; expected at most {LARGEST_JSON:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsFileError(f"{path} holds a {type(content).__name__}; expected an object")
    return content
