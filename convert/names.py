"""The names of a model's parameters in PyTorch and in Flax, one table for each model and layout.

The tables themselves are in `rules`; this finds the one that fits a file, converts, and reads the sizes.
"""

import functools
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flair_jax.convert.rules import GRAIN_DEAD, GRAIN_DECODER_RULES, LAYOUTS, MODELS
from flair_jax.convert.tables import ConversionError, Rule, Sizes, Table, flatten, pair, refuse, unflatten

PREFIXES = ("module.", "_orig_mod.")
# Tensors of state dicts that are no weights: the causal mask, numbers from 0 to the length, and sizes that OpenAI's
# archives carry.
NO_WEIGHTS = re.compile(
    r"(.*\.)?attn_mask|(text_model|vision_model)\.embeddings\.position_ids|input_resolution|context_length|vocab_size"
)
GELU = ("exact", "quick", "tanh")
SEVERAL_GELUS = ("clip", "siglip")  # models that were trained with one or another
ASK_GELU = (
    "the file does not say which GELU its model was trained with, and with another one the same weights give other "
    "features: say gelu='quick' for OpenAI's weights, those fine-tuned from them and open_clip's 'quickgelu' models, "
    "gelu='exact' for open_clip's others (on the command line --gelu quick, --gelu exact), or give the model section"
)


class Towers(NamedTuple):
    """What a file has of a model: its towers, and whether features are projected into a shared space."""

    vision: bool = True
    text: bool = True
    projected: bool = True
    decoder: bool = False  # beside what the model itself has


def to_flax(
    state_dict: Mapping[str, Any], model: str = "flair", config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turns a PyTorch state dict into a Flax parameter tree.

    Args:
      state_dict: arrays by PyTorch name, in any of the model's layouts; a training checkpoint around them, `PREFIXES`
        of every name and `NO_WEIGHTS` are removed. Half precision is cast to float32 with a warning.
      model: a key of `MODELS`.
      config: the `model` section that the shapes must have; None takes depths and sizes as the file has them.

    Returns:
      Nested dict of float32 arrays, C-contiguous, which may share memory with the input.

    Raises:
      ConversionError: with every unknown, missing or misshapen name and every dtype that is no weight's.
    """
    arrays = plain(state_dict)
    if dead := [name for name in GRAIN_DEAD if name in _weights(state_dict)]:
        warnings.warn(f"left out, for GRAIN's losses never reach them: {', '.join(dead)}", stacklevel=2)
    return unflatten(table_of(arrays, model, config).convert(arrays, "torch", config))


def to_torch(params: Mapping[str, Any], model: str = "flair", layout: str = "") -> dict[str, np.ndarray]:
    """Turns a Flax parameter tree into a PyTorch state dict, the exact inverse of `to_flax`.

    Args:
      params: nested dict of arrays.
      model: a key of `MODELS`.
      layout: one of the model's layouts; "": its first one.

    Returns:
      float32 arrays, C-contiguous, in the order of the reference's state dict; they may share memory with the input.

    Raises:
      ConversionError: as `to_flax`, with Flax paths.
    """
    arrays = flatten(params)
    return table(model, layout, flax_towers(arrays, model)).convert(arrays, "flax", None)


def infer_config(state_dict: Mapping[str, Any], model: str = "flair", gelu: str | None = None) -> dict[str, Any]:
    """Reads the `model` section from the shapes of a PyTorch state dict.

    Shapes do not hold everything. The image is taken as square. Heads are those of the published models, for their
    widths only; a model with others needs its section written down. Starting values, dtype and switches are the
    defaults.

    Args:
      state_dict, model: as for `to_flax`.
      gelu: the activation, one of `GELU`, where the origin of the weights tells it; of `SEVERAL_GELUS` it has to.

    Returns:
      A `model` section that builds the model (`flair_jax.models.create`).

    Raises:
      ConversionError: as `to_flax`; or the image is not square, no published model has these widths, or `gelu` is
        needed.
    """
    arrays = plain(state_dict)
    found = table_of(arrays, model)
    refuse(found.find_problems(arrays, "torch", None), len(arrays), model)
    config = found.config(found.measure(arrays, "torch"))
    if gelu is None and model in SEVERAL_GELUS:
        raise ConversionError(ASK_GELU)
    return config if gelu is None else config | {"gelu": checked_gelu(gelu)}


def checked_gelu(gelu: str) -> str:
    """The name itself. Raises ConversionError unless it is one of `GELU`."""
    if gelu not in GELU:
        raise ConversionError(f"gelu is {gelu!r}; expected one of {', '.join(map(repr, GELU))}")
    return gelu


def recognize(state_dict: Mapping[str, Any]) -> Table:
    """The table with the fewest misfits for the names of a PyTorch state dict; where none fits any, FLAIR's."""
    arrays = plain(state_dict)
    fitting = [found for model in MODELS if _fits(found := table_of(arrays, model), arrays)]
    return min(fitting, key=lambda found: len(found.find_problems(arrays, "torch", None)), default=table("flair"))


def _fits(table: Table, arrays: Mapping[str, np.ndarray]) -> bool:
    patterns = [rule.pattern("torch") for rule in table.rules]
    return any(pattern.fullmatch(name) for name in arrays for pattern in patterns)


def table_of(arrays: Mapping[str, np.ndarray], model: str, config: Mapping[str, Any] | None = None) -> Table:
    """The table of a model for the layout and the towers that PyTorch names show.

    Args:
      arrays: from `plain`.
      model: a key of `MODELS`.
      config: the `model` section, which then says the towers.

    Raises:
      ConversionError: there is no such model, or its image tower is a ResNet.
    """
    if any(name.startswith("visual.layer1.") for name in arrays):
        raise ConversionError("the image tower is a ResNet (visual.layer1.…); there are vision transformers only")
    layouts = _layouts(model)
    layout = next((key for key in layouts if LAYOUTS[key] and _any_starts(arrays, LAYOUTS[key])), next(iter(layouts)))
    if config is not None:
        return table(model, layout, section_towers(config))
    parts = {_part(rule) for rule in layouts[layout] if any(map(rule.pattern("torch").fullmatch, arrays))}
    return table(model, layout, _towers(parts, model))


def flax_towers(arrays: Mapping[str, np.ndarray], model: str) -> Towers:
    """What Flax paths show of a model."""
    parts = {path.split("/")[0] for path in arrays}
    return _towers(parts, model)._replace(decoder="decoder" in parts)


def section_towers(config: Mapping[str, Any]) -> Towers:
    """What a `model` section has: `vision` or `text` may be None, and `embed_dim` where there is one tower."""
    return Towers(
        config.get("vision", "") is not None,
        config.get("text", "") is not None,
        config.get("embed_dim", "") is not None,
        config.get("decoder") is not None,
    )


def _towers(parts: set[str], model: str) -> Towers:
    """FLAIR's towers belong together; of CLIP's either may stand alone."""
    vision, text = "vision" in parts, "text" in parts
    if model == "flair" or vision == text:
        return Towers()
    return Towers(vision, text, ("image_projection" if vision else "text_projection") in parts)


def _part(rule: Rule) -> str:
    return rule.flax.split("/")[0]


def _any_starts(arrays: Mapping[str, np.ndarray], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in arrays)


def _layouts(model: str) -> Mapping[str, tuple[Rule, ...]]:
    if model not in MODELS:
        raise ConversionError(f"no table of names for the model {model!r}; there are {sorted(MODELS)}")
    return MODELS[model]


@functools.lru_cache
def table(model: str, layout: str = "", towers: Towers = Towers()) -> Table:  # noqa: B008, a constant
    """The table of a model.

    Args:
      model: a key of `MODELS`.
      layout: one of the model's layouts; "": its first one.
      towers: what it has.

    Raises:
      ConversionError: there is none.
    """
    layouts = _layouts(model)
    layout = layout or next(iter(layouts))
    if layout not in layouts:
        raise ConversionError(f"no names of {model!r} in the layout {layout!r}; there are {sorted(layouts)}")
    if not (towers.vision or towers.text):
        raise ConversionError("model.vision and model.text are both None; expected one tower at least")
    rules = layouts[layout]
    if not (towers.vision and towers.text):
        parts = {"vision", "image_projection"} if towers.vision else {"text", "text_projection"}
        parts -= set() if towers.projected else {"image_projection", "text_projection"}
        rules = tuple(rule for rule in rules if _part(rule) in parts)
    elif not towers.projected:
        raise ConversionError("model.embed_dim is None, which a model of two towers needs")
    if towers.decoder and model != "grain":  # no PyTorch code has such a model; the names are GRAIN's
        rules = (*rules, *GRAIN_DECODER_RULES)
    return Table(model, layout, rules, _sizes, functools.partial(_config, model, towers))


def state_dict_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a training checkpoint, where epoch, name and optimizer stand beside it; else what was given.

    GRAIN's has two, which become one: `backbone.NAME` and `decoder.NAME`.
    """
    inner, backbone = checkpoint.get("state_dict"), checkpoint.get("backbone_state_dict")
    if isinstance(inner, Mapping) and isinstance(backbone, Mapping):
        halves = {"backbone": without_prefixes(backbone), "decoder": without_prefixes(inner)}
        return {f"{half}.{name}": value for half, weights in halves.items() for name, value in weights.items()}
    return inner if isinstance(inner, Mapping) else checkpoint


def plain(checkpoint: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a checkpoint by the model's own names.

    Prefixes that every name has are removed: `module.` is of PyTorch's DistributedDataParallel, `_orig_mod.` of
    `torch.compile`, and both may be there in either order. So are `NO_WEIGHTS`, and `GRAIN_DEAD`.
    """
    weights = _weights(checkpoint)
    return {
        name: np.asarray(value)
        for name, value in weights.items()
        if not NO_WEIGHTS.fullmatch(name) and name not in GRAIN_DEAD
    }


def _weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return without_prefixes(state_dict_of(checkpoint))


def without_prefixes(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names that are left without the `PREFIXES` that all of them have."""
    weights = dict(weights)
    while found := [prefix for prefix in PREFIXES if weights and all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(found[0]): value for name, value in weights.items()}
    return weights


def _sizes(config: Mapping[str, Any]) -> Sizes:
    """Every size that a rule names, from the `model` section."""
    vision, text, sizes = config["vision"], config["text"], {}
    attentions = [(part, config[part]["width"], config[part]["heads"]) for part in ("vision", "text") if config[part]]
    if config.get("pooling") is not None:
        attentions.append(("pooling", config["embed_dim"], config["pooling"]["heads"]))
    if (decoder := config.get("decoder")) is not None:
        attentions.append(("decoder", decoder["width"], decoder["heads"]))
        sizes |= {f"decoder.{key}": decoder[key] for key in ("width", "depth", "hidden")}
        sizes["decoder.queries"] = decoder["regions"] + 1
    for part, width, heads in attentions:
        if not all(type(size) is int and size > 0 for size in (width, heads)):
            raise ConversionError(f"model.{part}: width {width!r} and heads {heads!r}; expected positive integers")
        if width % heads:
            raise ConversionError(f"model.{part}.heads is {heads}, which does not divide the width {width}")
    if vision is not None:
        height, width = pair(vision["image_size"])
        sizes["vision.tokens"] = 1 + (height // vision["patch_size"]) * (width // vision["patch_size"])
        sizes |= {f"vision.{key}": vision[key] for key in ("patch_size", "width", "depth")}
        sizes["vision.head_width"] = vision["width"] // vision["heads"]
    if text is not None:
        sizes |= {f"text.{key}": text[key] for key in ("context_length", "vocab_size", "width", "depth")}
    return sizes if config["embed_dim"] is None else sizes | {"embed_dim": config["embed_dim"]}


def _config(name: str, towers: Towers, sizes: Sizes) -> dict[str, Any]:
    """The `model` section of a file with these sizes, see `infer_config`; the published one has what shapes do not."""
    from flair_jax.configs import variants  # needs ml_collections, which translating names does without

    side = math.isqrt(sizes.get("vision.tokens", 1) - 1)
    if towers.vision and side**2 != sizes["vision.tokens"] - 1:
        raise ConversionError(
            f"the position embedding of the image tower has {sizes['vision.tokens']} rows, which is no square grid of "
            "patches and a class token; give the model section, with image_size as the pair (height, width)"
        )

    def widths(sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[key] for key in ("vision.width", "text.width", "embed_dim") if key in sizes)

    def widths_of(config: Mapping[str, Any]) -> tuple[int, ...]:
        parts = {key: config[key] for key, there in zip(("vision", "text"), towers, strict=False) if there}
        known = {f"{part}.width": section["width"] for part, section in parts.items()}
        return widths(known | ({"embed_dim": config["embed_dim"]} if towers.projected else {}))

    published = [getattr(variants, name)(variant).to_dict() for variant in variants.VARIANTS[name]]
    known = {widths_of(config): config for config in published}
    if widths(sizes) not in known:
        words = [word for word, there in zip(("vision", "text", "embed_dim"), towers[:3], strict=True) if there]
        raise ConversionError(
            "shapes do not tell the number of heads. They are known for the widths of the published models, "
            f"({', '.join(words)}) = {sorted(known)}; these weights have {widths(sizes)}: give the model section, with "
            "vision.heads, text.heads and pooling.heads"
        )
    config = known[widths(sizes)]
    config["embed_dim"] = sizes["embed_dim"] if towers.projected else None
    for part, there in (("vision", towers.vision), ("text", towers.text)):
        if not there:
            config[part] = None
    if towers.vision:
        config["vision"] |= {key: sizes[f"vision.{key}"] for key in ("patch_size", "width", "depth")}
        config["vision"]["image_size"] = side * sizes["vision.patch_size"]
    if towers.text:
        config["text"] |= {key: sizes[f"text.{key}"] for key in ("context_length", "vocab_size", "width", "depth")}
    if name == "grain":
        if sizes["decoder.width"] != config["decoder"]["width"]:
            raise ConversionError(
                f"the decoder is {sizes['decoder.width']} wide, for which no number of heads is published: give the "
                "model section, with decoder.heads"
            )
        config["decoder"] |= {key: sizes[f"decoder.{key}"] for key in ("depth", "hidden")}
        config["decoder"]["regions"] = sizes["decoder.queries"] - 1
    return config
