"""The names of a model's parameters in PyTorch and in Flax, one table for each model and layout.

A table is a list of rules, each with both names, the PyTorch shape in terms of the model's sizes, and the order of axes
that turns the PyTorch array into the Flax one. Another model is another entry of `MODELS`; another naming of the same
PyTorch weights is another entry of its layouts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flair_jax.convert.tables import (
    CONVOLUTION,
    LINEAR,
    ConversionError,
    Rule,
    Sizes,
    Table,
    flatten,
    pair,
    refuse,
    unflatten,
)

PREFIXES = ("module.", "_orig_mod.")
# Tensors of state dicts that are no weights: the causal mask, numbers from 0 to the length, and sizes that OpenAI's
# archives carry.
NO_WEIGHTS = re.compile(
    r"(.*\.)?attn_mask|(text_model|vision_model)\.embeddings\.position_ids|input_resolution|context_length|vocab_size"
)
GELU = ("exact", "quick", "tanh")
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
      gelu: the activation, one of `GELU`, where the origin of the weights tells it. FLAIR's is exact.

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
    if gelu is None and model != "flair":
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
    return _towers({path.split("/")[0] for path in arrays}, model)


def section_towers(config: Mapping[str, Any]) -> Towers:
    """What a `model` section has: `vision` or `text` may be None, and `embed_dim` where there is one tower."""
    return Towers(
        config.get("vision", "") is not None,
        config.get("text", "") is not None,
        config.get("embed_dim", "") is not None,
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
    return Table(model, layout, rules, _sizes, functools.partial(_config, model, towers))


def state_dict_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a training checkpoint, where epoch, name and optimizer stand beside it; else what was given."""
    inner = checkpoint.get("state_dict")
    return inner if isinstance(inner, Mapping) else checkpoint


def plain(checkpoint: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a checkpoint by the model's own names.

    Prefixes that every name has are removed: `module.` is of PyTorch's DistributedDataParallel, `_orig_mod.` of
    `torch.compile`, and both may be there in either order. So are `NO_WEIGHTS`.
    """
    weights = dict(state_dict_of(checkpoint))
    while found := [prefix for prefix in PREFIXES if weights and all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(found[0]): value for name, value in weights.items()}
    return {name: np.asarray(value) for name, value in weights.items() if not NO_WEIGHTS.fullmatch(name)}


# -- Parts that models share -------------------------------------------------------------------------------------------


def _layer_norm(torch: str, flax: str, width: str, repeat: str = "") -> list[Rule]:
    return [
        Rule(f"{torch}.weight", f"{flax}/scale", width, repeat=repeat),
        Rule(f"{torch}.bias", f"{flax}/bias", width, repeat=repeat),
    ]


def _linear(torch: str, flax: str, outputs: str, inputs: str, repeat: str = "") -> list[Rule]:
    return [
        Rule(f"{torch}.weight", f"{flax}/kernel", f"{outputs} {inputs}", LINEAR, repeat),
        Rule(f"{torch}.bias", f"{flax}/bias", outputs, repeat=repeat),
    ]


def _attention(torch: str, qkv: str, out: str, width: str, repeat: str = "") -> list[Rule]:
    return [
        Rule(f"{torch}.in_proj_weight", f"{qkv}/kernel", f"3*{width} {width}", LINEAR, repeat),
        Rule(f"{torch}.in_proj_bias", f"{qkv}/bias", f"3*{width}", repeat=repeat),
        *_linear(f"{torch}.out_proj", out, width, width, repeat),
    ]


def _blocks(torch: str, tower: str) -> list[Rule]:
    torch, flax, width, depth = f"{torch}.{{i}}", f"{tower}/blocks_{{i}}", f"{tower}.width", f"{tower}.depth"
    return [
        *_layer_norm(f"{torch}.ln_1", f"{flax}/ln_1", width, depth),
        *_attention(f"{torch}.attn", f"{flax}/attention/qkv", f"{flax}/attention/out", width, depth),
        *_layer_norm(f"{torch}.ln_2", f"{flax}/ln_2", width, depth),
        *_linear(f"{torch}.mlp.c_fc", f"{flax}/mlp/fc", f"4*{width}", width, depth),
        *_linear(f"{torch}.mlp.c_proj", f"{flax}/mlp/proj", width, f"4*{width}", depth),
    ]


_VISION = (
    Rule("visual.class_embedding", "vision/class_embedding", "vision.width"),
    Rule("visual.positional_embedding", "vision/position_embedding", "vision.tokens vision.width"),
)
_PATCHES = (
    Rule(
        "visual.conv1.weight",
        "vision/patch_embedding/kernel",
        "vision.width 3 vision.patch_size vision.patch_size",
        CONVOLUTION,
    ),
    *_layer_norm("visual.ln_pre", "vision/ln_pre", "vision.width"),
    *_blocks("visual.transformer.resblocks", "vision"),
    *_layer_norm("visual.ln_post", "vision/ln_post", "vision.width"),
)
_TEXT = (
    *_blocks("transformer.resblocks", "text"),
    Rule("token_embedding.weight", "text/token_embedding", "text.vocab_size text.width"),
    *_layer_norm("ln_final", "text/ln_final", "text.width"),
)
_TEXT_POSITIONS = Rule("positional_embedding", "text/position_embedding", "text.context_length text.width")
_SCALE = Rule("logit_scale", "logit_scale")

# -- Tables, each in the order of the reference's state_dict: an optimizer of PyTorch counts parameters ----------------

FLAIR_RULES = (
    _TEXT_POSITIONS,
    _SCALE,
    # The reference fills in 0 without a word (spec/flair.md M12); for weights trained with -10 that is another model.
    Rule("logit_bias", "logit_bias", hint="; a CLIP trained without one goes on with 0, which you must add yourself"),
    *_VISION,
    *_PATCHES,
    *_attention("visual_proj.attn", "pooling/qkv", "pooling/out", "embed_dim"),
    *_layer_norm("visual_proj.ln_q", "pooling/ln_q", "embed_dim"),
    *_layer_norm("visual_proj.ln_k", "pooling/ln_k", "embed_dim"),
    *_layer_norm("visual_proj.ln_v", "pooling/ln_v", "embed_dim"),
    *_TEXT,
    Rule("image_post.proj", "image_projection", "vision.width embed_dim"),
    Rule("text_post.proj", "text_projection", "text.width embed_dim"),
)


def _clip_rules(*scalars: Rule) -> tuple[Rule, ...]:
    """OpenAI's names, which open_clip has too."""
    return (
        _TEXT_POSITIONS,
        Rule("text_projection", "text_projection", "text.width embed_dim"),
        *scalars,
        *_VISION,
        Rule("visual.proj", "image_projection", "vision.width embed_dim"),
        *_PATCHES,
        *_TEXT,
    )


def _custom_text(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The names of open_clip's `CustomTextCLIP`, whose text tower is a module of its own: `text.ln_final.weight`."""
    outside = ("visual.", "logit_")
    return tuple(
        rule if rule.torch.startswith(outside) else dataclasses.replace(rule, torch=f"text.{rule.torch}")
        for rule in sorted(rules, key=lambda rule: not rule.torch.startswith(outside))
    )


def _hugging_face_blocks(torch: str, tower: str) -> list[Rule]:
    torch, flax, width, depth = (
        f"{torch}.encoder.layers.{{i}}", f"{tower}/blocks_{{i}}", f"{tower}.width", f"{tower}.depth",
    )  # fmt: skip
    qkv, parts = f"{torch}.self_attn.{{part}}_proj", dict(repeat=depth, parts=("q", "k", "v"))
    return [
        *_layer_norm(f"{torch}.layer_norm1", f"{flax}/ln_1", width, depth),
        Rule(f"{qkv}.weight", f"{flax}/attention/qkv/kernel", f"3*{width} {width}", LINEAR, **parts),
        Rule(f"{qkv}.bias", f"{flax}/attention/qkv/bias", f"3*{width}", **parts),
        *_linear(f"{torch}.self_attn.out_proj", f"{flax}/attention/out", width, width, depth),
        *_layer_norm(f"{torch}.layer_norm2", f"{flax}/ln_2", width, depth),
        *_linear(f"{torch}.mlp.fc1", f"{flax}/mlp/fc", f"4*{width}", width, depth),
        *_linear(f"{torch}.mlp.fc2", f"{flax}/mlp/proj", width, f"4*{width}", depth),
    ]


def _renamed(rule: Rule, torch: str) -> Rule:
    return dataclasses.replace(rule, torch=torch)


HUGGING_FACE_RULES = (
    _SCALE,
    _renamed(_TEXT_POSITIONS, "text_model.embeddings.position_embedding.weight"),
    Rule("text_model.embeddings.token_embedding.weight", "text/token_embedding", "text.vocab_size text.width"),
    *_hugging_face_blocks("text_model", "text"),
    *_layer_norm("text_model.final_layer_norm", "text/ln_final", "text.width"),
    _renamed(_VISION[0], "vision_model.embeddings.class_embedding"),
    _renamed(_VISION[1], "vision_model.embeddings.position_embedding.weight"),
    _renamed(_PATCHES[0], "vision_model.embeddings.patch_embedding.weight"),
    *_layer_norm("vision_model.pre_layrnorm", "vision/ln_pre", "vision.width"),
    *_hugging_face_blocks("vision_model", "vision"),
    *_layer_norm("vision_model.post_layernorm", "vision/ln_post", "vision.width"),
    Rule("visual_projection.weight", "image_projection", "embed_dim vision.width", LINEAR),
    Rule("text_projection.weight", "text_projection", "embed_dim text.width", LINEAR),
)

CLIP_RULES = _clip_rules(_SCALE)
SIGLIP_RULES = _clip_rules(_SCALE, Rule("logit_bias", "logit_bias"))

# Model -> layouts -> rules. The first layout is the one to write unless told otherwise.
MODELS = {
    "flair": {"flair": FLAIR_RULES},
    "clip": {
        "open_clip": CLIP_RULES,
        "custom_text": _custom_text(CLIP_RULES),
        "hugging_face": HUGGING_FACE_RULES,
    },
    "siglip": {"open_clip": SIGLIP_RULES, "custom_text": _custom_text(SIGLIP_RULES)},
}
# Prefixes of names that only this layout has; an empty tuple: the layout of all others.
LAYOUTS = {
    "flair": (),
    "open_clip": (),  # OpenAI's names too
    "custom_text": ("text.",),
    "hugging_face": ("text_model.", "vision_model."),
}


def _sizes(config: Mapping[str, Any]) -> Sizes:
    """Every size that a rule names, from the `model` section."""
    vision, text, sizes = config["vision"], config["text"], {}
    attentions = [(part, config[part]["width"], config[part]["heads"]) for part in ("vision", "text") if config[part]]
    if config.get("pooling") is not None:
        attentions.append(("pooling", config["embed_dim"], config["pooling"]["heads"]))
    for part, width, heads in attentions:
        if width % heads:
            raise ConversionError(f"model.{part}.heads is {heads}, which does not divide the width {width}")
    if vision is not None:
        height, width = pair(vision["image_size"])
        sizes["vision.tokens"] = 1 + (height // vision["patch_size"]) * (width // vision["patch_size"])
        sizes |= {f"vision.{key}": vision[key] for key in ("patch_size", "width", "depth")}
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

    published = [getattr(variants, name)(variant).to_dict() for variant in variants.TOWERS]
    known = {widths_of(config): config for config in published}
    if widths(sizes) not in known:
        words = [word for word, there in zip(("vision", "text", "embed_dim"), towers, strict=True) if there]
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
    return config
