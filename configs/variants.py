"""Sizes of the published models, and their objectives. Every config starts from here and overrides what differs."""

import math

from ml_collections import ConfigDict, config_dict

# Sizes of OpenAI's CLIP (Radford et al., ICML 2021, table 19), which FLAIR and SigLIP's comparisons share.
TOWERS = {
    "B/32": dict(patch_size=32, width=768, depth=12, heads=12, embed_dim=512, text_width=512, text_heads=8),
    "B/16": dict(patch_size=16, width=768, depth=12, heads=12, embed_dim=512, text_width=512, text_heads=8),
    "L/14": dict(patch_size=14, width=1024, depth=24, heads=16, embed_dim=768, text_width=768, text_heads=12),
}
# Image towers of SLIP and LaCLIP (Fan et al., NeurIPS 2023), which GRAIN begins with; one text tower for all.
_SMALL_TEXT = dict(embed_dim=512, text_width=512, text_heads=8)
LACLIP_TOWERS = {
    "S/16": dict(patch_size=16, width=384, depth=12, heads=12, **_SMALL_TEXT),
    "B/16": dict(patch_size=16, width=768, depth=12, heads=12, **_SMALL_TEXT),
    "L/14": dict(patch_size=14, width=1024, depth=24, heads=16, **_SMALL_TEXT),
}
VARIANTS = {"flair": TOWERS, "clip": TOWERS, "siglip": TOWERS, "laclip": LACLIP_TOWERS, "grain": LACLIP_TOWERS}


def _dual_encoder(name: str, variant: str, **options) -> ConfigDict:
    if variant not in VARIANTS[name]:
        raise KeyError(f"no {name} variant {variant!r}; there are {sorted(VARIANTS[name])}")
    sizes = VARIANTS[name][variant]
    return ConfigDict(
        dict(
            name=name,  # whose parameter names it has, for conversion
            embed_dim=sizes["embed_dim"],
            vision=dict(
                image_size=224,
                patch_size=sizes["patch_size"],
                width=sizes["width"],
                depth=sizes["depth"],
                heads=sizes["heads"],
                patch_dropout=0.0,  # share of each image's patches that a training step leaves out, such as 0.5
            ),
            text=dict(
                context_length=77, vocab_size=49408, width=sizes["text_width"], depth=12, heads=sizes["text_heads"]
            ),
            pooling=None,
            decoder=None,
            init_logit_scale=math.log(1 / 0.07),
            init_logit_bias=None,
            # From a picture to the model's input: "crop" or "squash", mean and deviation of "openai" or "imagenet"; see
            # Preprocessing in data/transforms/images.py.
            preprocess=dict(resize="crop", mean_std="openai"),
            dtype="float32",  # of the computation; parameters, normalisation, softmax and losses stay float32
            scan_blocks=False,  # True: one compiled block, for pods and deep models; same checkpoint
            remat="none",  # what the backward pass computes again: "dots" all but dense layers, "full" whole blocks
            attention="xla",  # "cudnn": NVIDIA's fused kernel, for 16 bits
            gelu="exact",  # "quick": x sigmoid(1.702 x), OpenAI's own weights; "tanh": the usual approximation
            micro_batches=1,  # parts of a batch that the towers encode in turn: less memory, same loss and gradient
        )
        | options
    )


def flair(variant: str = "B/16") -> ConfigDict:
    """The `model` section of a FLAIR model; "B/16" is ViT-B-16-FLAIR, 150,674,434 parameters (FLAIR, section 4.1).

    Raises:
      KeyError: the variant is not in the table.
    """
    heads = TOWERS[variant]["text_heads"] if variant in TOWERS else 8
    return _dual_encoder("flair", variant, pooling=dict(heads=heads), init_logit_bias=-10.0)


def clip(variant: str = "B/16") -> ConfigDict:
    """The `model` section of a CLIP model; "B/16" has 149,620,737 parameters.

    OpenAI's own weights need `gelu="quick"`. Raises KeyError as `flair`.
    """
    return _dual_encoder("clip", variant)


def siglip(variant: str = "B/16") -> ConfigDict:
    """The `model` section of CLIP's towers with the scale and bias of SigLIP (Zhai et al., ICCV 2023, section 3.2).

    Raises KeyError as `flair`.
    """
    return _dual_encoder("siglip", variant, init_logit_scale=math.log(10), init_logit_bias=-10.0)


def laclip(variant: str = "B/16") -> ConfigDict:
    """The `model` section of LaCLIP's CLIP, GRAIN's baseline; "B/16" has 149,623,041 parameters (spec/grain.md 1).

    Raises KeyError as `flair`.
    """
    config = _dual_encoder("laclip", variant)
    config.preprocess.mean_std = "imagenet"
    config.vision.update(pre_norm=False, patch_bias=True, qk_norm=True, norm_eps=1e-6, init="timm")
    config.text.gelu = "quick"
    return config


def grain(variant: str = "B/16") -> ConfigDict:
    """The `model` section of GRAIN (Halbe et al., WACV 2026); "B/16" has 175,904,005 parameters.

    Raises KeyError as `flair`.
    """
    config = laclip(variant)
    config.name = "grain"
    config.preprocess.resize = "squash"
    config.decoder = decoder()
    config.project_image = False  # the image query gives the image's features
    return config


def decoder() -> ConfigDict:
    """The `model.decoder` section of GRAIN's query decoder, which any model may have."""
    return ConfigDict(dict(width=512, depth=6, heads=8, hidden=2048, regions=5, dropout=0.1))


def flair_objectives() -> ConfigDict:
    """FLAIR's loss, (TCS + MPS) / 2; without MPS the weights are 1 and 0."""
    return ConfigDict(
        dict(
            text_conditioned=dict(
                weight=0.5,
                block_size=config_dict.placeholder(int),  # images that the recipe has on a GPU; None: the whole batch
                chunk_size=config_dict.placeholder(int),  # images at a time on a device, for memory; None: all
            ),
            sigmoid=dict(weight=0.5, chunk_size=config_dict.placeholder(int)),
        )
    )


def clip_objectives() -> ConfigDict:
    """CLIP's softmax loss over the global batch."""
    return ConfigDict(dict(softmax=dict(weight=1.0, caption=0, chunk_size=config_dict.placeholder(int))))


def negclip_objectives() -> ConfigDict:
    """NegCLIP's loss (Yuksekgonul et al., ICLR 2023), with negatives of `data.negatives`."""
    options = dict(mask_missing=False, reference_world_size=1, chunk_size=config_dict.placeholder(int))
    return ConfigDict(dict(negclip=dict(weight=1.0, **options)))


def hard_negative_objectives() -> ConfigDict:
    """What FSC-CLIP adds to CLIP's loss (Oh et al., EMNLP 2024, section 3), with negatives of `data.negatives`."""
    common = dict(gamma=2.0, smoothing=0.02, mask_missing=False, reference_world_size=1)
    local = dict(weights="minmax", chunk_size=config_dict.placeholder(int))
    return ConfigDict(
        dict(global_hard_negatives=dict(weight=0.5, **common), local_hard_negatives=dict(weight=0.2, **common, **local))
    )


def region_objectives() -> ConfigDict:
    """What GRAIN adds to CLIP's loss, with regions of `data.regions` (Halbe et al., WACV 2026; spec/grain.md 2)."""
    group = config_dict.placeholder(int)  # images that the recipe has on a GPU; None: the whole batch
    return ConfigDict(
        dict(
            boxes=dict(weight=1.0, l1=1.0, giou=1.0, factor=1.5, group_size=group, every_layer=False),
            region_descriptions=dict(weight=1.0, group_size=group, mask_duplicates=False, both_directions=False),
        )
    )


def siglip_objectives() -> ConfigDict:
    """SigLIP's sigmoid loss over the global batch."""
    return ConfigDict(dict(sigmoid=dict(weight=1.0, chunk_size=config_dict.placeholder(int))))
