"""How much work a step is, and how much a chip can do: the two halves of model FLOPs utilisation (MFU).

Only useful work counts: real tokens, no padding, nothing that rematerialisation computes again. A multiply and an add
are two operations; causal attention counts in full, as PyTorch's profilers and open_clip's `model_profile.csv` count
it; softmax, normalisation and activations, about a hundredth, do not count. The backward pass is twice the forward.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flair_jax.data.transforms.base import DESCRIPTIONS, NEGATIVES
from flair_jax.models.vision import grid, kept_patches

# Dense bfloat16 operations a second, of the makers' data sheets; the key is part of `jax.Device.device_kind`.
PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU7x": 2307e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a chip, by `jax.Device.device_kind`; None where it is not known."""
    return next((value for name, value in PEAK_BF16.items() if name in device_kind), None)


def transformer(tokens: Any, width: int, depth: int) -> Any:
    """Forward operations of one sequence of so many tokens, a number or an array, through all blocks."""
    return tokens * depth * (24 * width**2 + 4 * tokens * width)


def patches(vision: Mapping[str, Any]) -> int:
    """Patches of an image, L."""
    return math.prod(grid(vision["image_size"], vision["patch_size"]))


def encode_image(model: Mapping[str, Any], local: int | None = None) -> int:
    """Forward operations of one image through tower, projection and query decoder, as far as the model has them.

    Args:
      model: the `model` section of a config.
      local: patches of the image; None: all.
    """
    vision = model["vision"]
    local, width = patches(vision) if local is None else local, vision["width"]
    embedding = local * 2 * 3 * vision["patch_size"] ** 2 * width
    forward = embedding + transformer(local + 1, width, vision["depth"])
    if model.get("project_image", True):
        forward += (local + 1) * 2 * width * model["embed_dim"]
    if model.get("decoder") is not None:
        forward += decode(model["decoder"], local + 1, width, model["embed_dim"])
    return forward


def decode(decoder: Mapping[str, Any], tokens: int, width: int, embed_dim: int) -> int:
    """Forward operations of the query decoder for one image.

    Args:
      decoder: its section of a config.
      tokens, width: of the image tower.
      embed_dim: of the features.
    """
    inner, queries = decoder["width"], decoder["regions"] + 1
    of_queries = 8 * inner**2 + 4 * queries * inner  # self-attention
    of_queries += 4 * inner**2 + 4 * tokens * inner  # cross-attention
    of_queries += 4 * inner * decoder["hidden"]
    layer = queries * of_queries + tokens * 4 * inner**2  # keys and values of the memory
    heads = queries * 2 * inner * embed_dim + (queries - 1) * (4 * inner**2 + 8 * inner)
    return tokens * 2 * width * inner + decoder["depth"] * layer + heads


def encode_text(model: Mapping[str, Any], tokens: Any) -> Any:
    """Forward operations of one text of so many tokens, a number or an array, through tower and projection.

    All blocks count for all tokens, as the published figures have it; the last one works on the end alone where nothing
    else is asked for, a fifteenth less.
    """
    text = model["text"]
    return transformer(tokens, text["width"], text["depth"]) + 2 * text["width"] * model["embed_dim"]


def pool(model: Mapping[str, Any], images: int, texts: int, pairs: int, local: int | None = None) -> int:
    """Forward operations of text-conditioned pooling: keys and values an image, queries a text, attention a pair."""
    width, local = model["embed_dim"], patches(model["vision"]) if local is None else local
    return (
        images * local * 2 * 2 * width**2
        + texts * 2 * width**2
        + pairs * (4 * (local + 1) * width + 2 * width**2 + 2 * width)
    )


class Batch(NamedTuple):
    """What the work of an objective depends on.

    `images`, `captions`, `negatives`, `descriptions`: how many, of the global batch. `tokens`: of all texts together.
    `local`: patches of an image.
    """

    images: int
    captions: int
    negatives: int
    descriptions: int
    tokens: float
    local: int


def text_conditioned(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """Forward operations of the objective of that name: pooling, for all texts that each image is scored against."""
    images, texts = batch.images, batch.captions
    block = options.get("block_size") or images
    scored = (images // block) * (block + texts // images - 1)
    return pool(model, images, texts, images * scored, batch.local)


def all_pairs(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """Forward operations of the objective "sigmoid": one product of all pooled features."""
    return batch.images * batch.captions * 2 * model["embed_dim"]


def one_caption_pairs(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """Forward operations of the objective "softmax": one product of images and one caption each."""
    return batch.images * batch.images * 2 * model["embed_dim"]


def negclip(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """Forward operations of the objective of that name: one product of images, one caption each and all negatives."""
    return batch.images * (batch.images + batch.negatives) * 2 * model["embed_dim"]


def global_hard_negatives(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """Forward operations of the objective of that name: one cosine for a caption and each of its negatives."""
    return (batch.images + batch.negatives) * 2 * model["embed_dim"]


def local_hard_negatives(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> float:
    """Forward operations of the objective of that name: similarities of all tokens and patches, and weighted sums."""
    texts = batch.captions + batch.negatives + batch.descriptions
    scored = batch.tokens * (batch.images + batch.negatives) / texts
    return scored * (4 * batch.local + 2) * model["embed_dim"]


def boxes(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """The objective of that name: no products of matrices."""
    return 0


def region_descriptions(options: Mapping[str, Any], model: Mapping[str, Any], batch: Batch) -> int:
    """Forward operations of the objective of that name: regions and descriptions of a group, all with all."""
    group = options.get("group_size") or batch.images
    return batch.descriptions * (batch.descriptions * group // batch.images) * 2 * model["embed_dim"]


OBJECTIVES = {
    "boxes": boxes,
    "global_hard_negatives": global_hard_negatives,
    "local_hard_negatives": local_hard_negatives,
    "negclip": negclip,
    "region_descriptions": region_descriptions,
    "sigmoid": all_pairs,
    "softmax": one_caption_pairs,
    "text_conditioned": text_conditioned,
}


def counts(slots: Mapping[str, int]) -> dict[str, int]:
    """What `train_step` asks of the slots of an image's texts, name -> number."""
    return {name: slots.get(name, 0) for name in (NEGATIVES, DESCRIPTIONS)}


def train_step(
    model: Mapping[str, Any],
    objectives: Mapping[str, Mapping[str, Any]],
    images: int,
    lengths: np.ndarray,
    *,
    negatives: int = 0,
    descriptions: int = 0,
) -> float:
    """Operations of a training step, forward and backward; patches that are left out do not count.

    Args:
      model, objectives: sections of a config.
      images: of the global batch.
      lengths: (N * C,) tokens of each of its texts, with both ends.
      negatives, descriptions: how many of an image's C texts are hard negatives, and descriptions of regions.
    """
    local = kept_patches(patches(model["vision"]), model["vision"].get("patch_dropout", 0.0))
    forward = images * encode_image(model, local) + float(np.sum(encode_text(model, np.asarray(lengths, np.float64))))
    captions = len(lengths) - images * (negatives + descriptions)
    batch = Batch(images, captions, images * negatives, images * descriptions, float(np.sum(lengths)), local)
    for name, options in objectives.items():
        if options["weight"]:
            forward += OBJECTIVES[name](options, model, batch)
    return 3 * forward
