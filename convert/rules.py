"""The tables of names: for every parameter of a model its names in PyTorch and in Flax.

A table is a list of rules, each with both names, the PyTorch shape in terms of the model's sizes, and the order of axes
that turns the PyTorch array into the Flax one. Another model is another entry of `MODELS`; another naming of the same
PyTorch weights is another entry of its layouts.
"""

import dataclasses

from flair_jax.convert.tables import CONVOLUTION, LINEAR, Rule

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


# -- GRAIN, and LaCLIP, which it begins with: timm's vision transformer with normalised queries and keys ---------------


def _timm_blocks(torch: str, flax: str, width: str, depth: str) -> list[Rule]:
    torch, flax = f"{torch}.{{i}}", f"{flax}/blocks_{{i}}"
    return [
        *_layer_norm(f"{torch}.norm1", f"{flax}/ln_1", width, depth),
        *_layer_norm(f"{torch}.attn.q_norm", f"{flax}/attention/q_norm", "vision.head_width", depth),
        *_layer_norm(f"{torch}.attn.k_norm", f"{flax}/attention/k_norm", "vision.head_width", depth),
        *_linear(f"{torch}.attn.qkv", f"{flax}/attention/qkv", f"3*{width}", width, depth),
        *_linear(f"{torch}.attn.proj", f"{flax}/attention/out", width, width, depth),
        *_layer_norm(f"{torch}.norm2", f"{flax}/ln_2", width, depth),
        *_linear(f"{torch}.mlp.fc1", f"{flax}/mlp/fc", f"4*{width}", width, depth),
        *_linear(f"{torch}.mlp.fc2", f"{flax}/mlp/proj", width, f"4*{width}", depth),
    ]


def _decoder_layers(torch: str, flax: str, width: str, depth: str) -> list[Rule]:
    torch, flax, hidden = f"{torch}.{{i}}", f"{flax}/layers_{{i}}", "decoder.hidden"
    cross, own = f"{flax}/cross_attention", f"{flax}/self_attention"
    return [
        *_attention(f"{torch}.multihead_attn", f"{cross}/qkv", f"{cross}/out", width, depth),
        *_attention(f"{torch}.self_attn", f"{own}/qkv", f"{own}/out", width, depth),
        *_linear(f"{torch}.linear1", f"{flax}/fc", hidden, width, depth),
        *_linear(f"{torch}.linear2", f"{flax}/proj", width, hidden, depth),
        *_layer_norm(f"{torch}.norm1", f"{flax}/ln_1", width, depth),
        *_layer_norm(f"{torch}.norm2", f"{flax}/ln_2", width, depth),
        *_layer_norm(f"{torch}.norm3", f"{flax}/ln_3", width, depth),
    ]


_IMAGE_PROJECTION = Rule("image_projection", "image_projection", "vision.width embed_dim")
LACLIP_RULES = (
    _TEXT_POSITIONS,
    _IMAGE_PROJECTION,
    Rule("text_projection", "text_projection", "text.width embed_dim"),
    _SCALE,
    Rule("visual.cls_token", "vision/class_embedding", "1 1 vision.width", ones=2),
    Rule("visual.pos_embed", "vision/position_embedding", "1 vision.tokens vision.width", ones=1),
    _renamed(_PATCHES[0], "visual.patch_embed.proj.weight"),
    Rule("visual.patch_embed.proj.bias", "vision/patch_embedding/bias", "vision.width"),
    *_timm_blocks("visual.blocks", "vision", "vision.width", "vision.depth"),
    *_layer_norm("visual.norm", "vision/ln_post", "vision.width"),
    *_TEXT,
)
DECODER_RULES = (
    Rule("obj_proj", "decoder/region_projection", "decoder.width embed_dim"),
    Rule("img_proj", "decoder/image_projection", "decoder.width embed_dim"),
    *_layer_norm("transformer.pre_norm", "decoder/ln_memory", "decoder.width"),
    *_decoder_layers("transformer.decoder.layers", "decoder", "decoder.width", "decoder.depth"),
    *_layer_norm("transformer.decoder.norm", "decoder/ln_final", "decoder.width"),
    *_linear("bbox_embed.layers.0", "decoder/box_0", "decoder.width", "decoder.width"),
    *_linear("bbox_embed.layers.1", "decoder/box_1", "decoder.width", "decoder.width"),
    *_linear("bbox_embed.layers.2", "decoder/box_2", "4", "decoder.width"),
    Rule("query_embed.weight", "decoder/queries", "decoder.queries decoder.width"),
    Rule("proj.weight", "decoder/memory_projection/kernel", "decoder.width vision.width", LINEAR),
)


def _below(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(_renamed(rule, f"{prefix}.{rule.torch}") for rule in rules)


# Of its two state dicts, "backbone_state_dict" and "state_dict", see `names.state_dict_of`.
GRAIN_DECODER_RULES = _below("decoder", DECODER_RULES)
GRAIN_RULES = (
    *_below("backbone", tuple(rule for rule in LACLIP_RULES if rule is not _IMAGE_PROJECTION)),
    *GRAIN_DECODER_RULES,
)
# Of GRAIN's checkpoints: what its losses never reach (spec/grain.md 1.3).
GRAIN_DEAD = (
    "backbone.image_projection",
    "decoder.pos_embed",
    "decoder.temporal_embed",
    "decoder.class_embed.weight",
    "decoder.class_embed.bias",
)

# Model -> layouts -> rules. The first layout is the one to write unless told otherwise.
MODELS = {
    "flair": {"flair": FLAIR_RULES},
    "clip": {
        "open_clip": CLIP_RULES,
        "custom_text": _custom_text(CLIP_RULES),
        "hugging_face": HUGGING_FACE_RULES,
    },
    "siglip": {"open_clip": SIGLIP_RULES, "custom_text": _custom_text(SIGLIP_RULES)},
    "laclip": {"laclip": LACLIP_RULES},
    "grain": {"grain": GRAIN_RULES},
}
# Prefixes of names that only this layout has; an empty tuple: the layout of all others.
LAYOUTS = {
    "flair": (),
    "laclip": (),
    "grain": (),
    "open_clip": (),  # OpenAI's names too
    "custom_text": ("text.",),
    "hugging_face": ("text_model.", "vision_model."),
}
