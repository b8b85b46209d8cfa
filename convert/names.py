"""The names of a model's parameters in PyTorch and in Flax, one table a model.

A table is a list of rules, each with both names, the PyTorch shape in terms of the model's sizes, and the order of axes
that turns the PyTorch array into the Flax one. Another model is another entry of `TABLES`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flair_jax.convert.tables import (
    CONVOLUTION,
    LINEAR,
    ConversionError,
    Rule,
    Sizes,
    Table,
    flatten,
    refuse,
    unflatten,
)

PREFIXES = ("module.", "_orig_mod.")


def to_flax(
    state_dict: Mapping[str, Any], model: str = "flair", config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turns a PyTorch state dict into a Flax parameter tree.

    Args:
      state_dict: arrays by PyTorch name; a training checkpoint around them and `PREFIXES` of every name are removed.
        Half precision is cast to float32 with a warning.
      model: the table, a key of `TABLES`.
      config: the `model` section that the shapes must have; None takes depths and sizes as the file has them.

    Returns:
      Nested dict of float32 arrays, C-contiguous, which may share memory with the input.

    Raises:
      ConversionError: with every unknown, missing or misshapen name and every dtype that is no weight's.
    """
    return unflatten(table(model).convert(plain(state_dict), "torch", config))


def to_torch(params: Mapping[str, Any], model: str = "flair") -> dict[str, np.ndarray]:
    """Turns a Flax parameter tree into a PyTorch state dict, the exact inverse of `to_flax`.

    Args:
      params: nested dict of arrays.
      model: the table, a key of `TABLES`.

    Returns:
      float32 arrays, C-contiguous, in the order of the reference's state dict; they may share memory with the input.

    Raises:
      ConversionError: as `to_flax`, with Flax paths.
    """
    return table(model).convert(flatten(params), "flax", None)


def infer_config(state_dict: Mapping[str, Any], model: str = "flair") -> dict[str, Any]:
    """Reads the `model` section from the shapes of a PyTorch state dict.

    Shapes do not hold everything. The image is taken as square. Heads are those of the published models, for their
    widths only; a model with others needs its section written down. Starting values, dtype and switches are the
    defaults.

    Args:
      state_dict, model: as for `to_flax`.

    Returns:
      A `model` section that builds the model (`flair_jax.models.create`).

    Raises:
      ConversionError: as `to_flax`; or the image is not square, or no published model has these widths.
    """
    arrays = plain(state_dict)
    refuse(table(model).find_problems(arrays, "torch", None), len(arrays), model)
    return table(model).config(table(model).measure(arrays, "torch"))


def recognize(state_dict: Mapping[str, Any]) -> str:
    """The model whose names a PyTorch state dict has, a key of `TABLES`: the one with the fewest misfits.

    Where no name fits any, "flair".
    """
    arrays = plain(state_dict)
    problems = {model: table.find_problems(arrays, "torch", None) for model, table in TABLES.items()}
    unknown = {model: sum(problem.kind == "unknown" for problem in found) for model, found in problems.items()}
    fitting = [model for model in TABLES if unknown[model] < len(arrays)]
    return min(fitting, key=lambda model: len(problems[model]), default="flair")


def table(model: str) -> Table:
    """The table of a model.

    Raises:
      ConversionError: there is none.
    """
    if model not in TABLES:
        raise ConversionError(f"no table of names for the model {model!r}; there are {sorted(TABLES)}")
    return TABLES[model]


def state_dict_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a training checkpoint, where epoch, name and optimizer stand beside it; else what was given."""
    inner = checkpoint.get("state_dict")
    return inner if isinstance(inner, Mapping) else checkpoint


def plain(checkpoint: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by the model's own names.

    Prefixes that every name has are removed: `module.` is of PyTorch's DistributedDataParallel, `_orig_mod.` of
    `torch.compile`, and both may be there in either order.
    """
    weights = dict(state_dict_of(checkpoint))
    while found := [prefix for prefix in PREFIXES if weights and all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(found[0]): value for name, value in weights.items()}
    return {name: np.asarray(value) for name, value in weights.items()}


# -- Parts that models share -------------------------------------------------------------------------------------------


def _layer_norm(torch: str, flax: str, width: str, repeat: str = "") -> list[Rule]:
    return [
        Rule(f"{torch}.weight", f"{flax}/scale", width, repeat=repeat),
        Rule(f"{torch}.bias", f"{flax}/bias", width, repeat=repeat),
    ]


def _attention(torch: str, qkv: str, out: str, width: str, repeat: str = "") -> list[Rule]:
    return [
        Rule(f"{torch}.in_proj_weight", f"{qkv}/kernel", f"3*{width} {width}", LINEAR, repeat),
        Rule(f"{torch}.in_proj_bias", f"{qkv}/bias", f"3*{width}", repeat=repeat),
        Rule(f"{torch}.out_proj.weight", f"{out}/kernel", f"{width} {width}", LINEAR, repeat),
        Rule(f"{torch}.out_proj.bias", f"{out}/bias", width, repeat=repeat),
    ]


def _blocks(torch: str, tower: str) -> list[Rule]:
    torch, flax, width, depth = f"{torch}.{{i}}", f"{tower}/blocks_{{i}}", f"{tower}.width", f"{tower}.depth"
    return [
        *_layer_norm(f"{torch}.ln_1", f"{flax}/ln_1", width, depth),
        *_attention(f"{torch}.attn", f"{flax}/attention/qkv", f"{flax}/attention/out", width, depth),
        *_layer_norm(f"{torch}.ln_2", f"{flax}/ln_2", width, depth),
        Rule(f"{torch}.mlp.c_fc.weight", f"{flax}/mlp/fc/kernel", f"4*{width} {width}", LINEAR, depth),
        Rule(f"{torch}.mlp.c_fc.bias", f"{flax}/mlp/fc/bias", f"4*{width}", repeat=depth),
        Rule(f"{torch}.mlp.c_proj.weight", f"{flax}/mlp/proj/kernel", f"{width} 4*{width}", LINEAR, depth),
        Rule(f"{torch}.mlp.c_proj.bias", f"{flax}/mlp/proj/bias", width, repeat=depth),
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


CLIP_RULES = _clip_rules(_SCALE)
SIGLIP_RULES = _clip_rules(_SCALE, Rule("logit_bias", "logit_bias"))


def _sizes(config: Mapping[str, Any]) -> Sizes:
    """Every size that a rule names, from the `model` section."""
    vision, text = config["vision"], config["text"]
    attentions = [("vision", vision["width"], vision["heads"]), ("text", text["width"], text["heads"])]
    if config.get("pooling") is not None:
        attentions.append(("pooling", config["embed_dim"], config["pooling"]["heads"]))
    for part, width, heads in attentions:
        if width % heads:
            raise ConversionError(f"model.{part}.heads is {heads}, which does not divide the width {width}")
    size = vision["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "embed_dim": config["embed_dim"],
        "vision.tokens": 1 + (height // vision["patch_size"]) * (width // vision["patch_size"]),
        **{f"vision.{key}": vision[key] for key in ("patch_size", "width", "depth")},
        **{f"text.{key}": text[key] for key in ("context_length", "vocab_size", "width", "depth")},
    }


def _widths(config: Mapping[str, Any]) -> tuple[int, int, int]:
    return config["vision"]["width"], config["text"]["width"], config["embed_dim"]


def _config(name: str, sizes: Sizes) -> dict[str, Any]:
    """The `model` section of a file with these sizes, see `infer_config`; the published one has what shapes do not."""
    from flair_jax.configs import variants  # needs ml_collections, which translating names does without

    published = getattr(variants, name)
    side = math.isqrt(sizes["vision.tokens"] - 1)
    if side**2 != sizes["vision.tokens"] - 1:
        raise ConversionError(
            f"visual.positional_embedding has {sizes['vision.tokens']} rows, which is no square grid of patches and a "
            "class token; give the model section, with image_size as the pair (height, width)"
        )
    known = {_widths(config): config for config in (published(variant).to_dict() for variant in variants.TOWERS)}
    widths = sizes["vision.width"], sizes["text.width"], sizes["embed_dim"]
    if widths not in known:
        raise ConversionError(
            "shapes do not tell the number of heads. They are known for the widths of the published models, "
            f"(vision, text, embed_dim) = {sorted(known)}; these weights have {widths}: give the model section, with "
            "vision.heads, text.heads and pooling.heads"
        )
    config = known[widths]
    config["embed_dim"] = sizes["embed_dim"]
    config["vision"] |= {
        "image_size": side * sizes["vision.patch_size"],
        "patch_size": sizes["vision.patch_size"],
        "width": sizes["vision.width"],
        "depth": sizes["vision.depth"],
    }
    config["text"] |= {
        "context_length": sizes["text.context_length"],
        "vocab_size": sizes["text.vocab_size"],
        "width": sizes["text.width"],
        "depth": sizes["text.depth"],
    }
    return config


TABLES = {
    name: Table(name, rules, _sizes, functools.partial(_config, name))
    for name, rules in (("flair", FLAIR_RULES), ("clip", CLIP_RULES), ("siglip", SIGLIP_RULES))
}
