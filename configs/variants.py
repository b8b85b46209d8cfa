"""Sizes of the published models, one entry a model. Every config starts from this table and overrides what differs."""

import math

from ml_collections import ConfigDict


def flair(variant: str = "B/16") -> ConfigDict:
    """Returns the `model` section of a FLAIR variant.

    Args:
      variant: "B/16" is ViT-B-16-FLAIR, 150,674,434 parameters (FLAIR, CVPR 2025, section 4.1).

    Raises:
      KeyError: the variant is not in the table.
    """
    sizes = {
        "B/16": dict(
            embed_dim=512,
            vision=dict(
                image_size=224,
                patch_size=16,
                width=768,
                depth=12,
                heads=12,
                patch_dropout=0.0,  # share of each image's patches that a training step leaves out, such as 0.5
            ),
            text=dict(context_length=77, vocab_size=49408, width=512, depth=12, heads=8),
            pooling=dict(heads=8),
        ),
    }
    if variant not in sizes:
        raise KeyError(f"no FLAIR variant {variant!r}; there are {sorted(sizes)}")
    return ConfigDict(
        dict(
            name="flair",
            **sizes[variant],
            init_logit_scale=math.log(1 / 0.07),
            init_logit_bias=-10.0,
            dtype="float32",  # of the computation; parameters, normalisation, softmax and losses stay float32
            scan_blocks=False,  # True: one compiled block, for pods and deep models; same checkpoint
            remat="none",  # what the backward pass computes again: "dots" all but dense layers, "full" whole blocks
            attention="xla",  # "cudnn": NVIDIA's fused kernel, for 16 bits
            gelu="exact",  # "tanh": the usual approximation, another model
            micro_batches=1,  # parts of a batch that the towers encode in turn: less memory, the same loss and gradient
        )
    )
