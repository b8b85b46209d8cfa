"""Objectives of regions: boxes, and the descriptions that belong to them (GRAIN, Halbe et al., WACV 2026).

A batch has M targets an image: `regions/boxes` (N, M, 4), `regions/valid` (N, M), which of them there are, and in the
slot "descriptions" the text of each. A model with a query decoder predicts Q boxes and features an image. The targets
are given queries by their boxes, one to one, see `boxes.match_boxes`.

With groups of consecutive images, as the reference has them on its GPUs, both losses are means over groups of the means
over a group's targets, and the negatives of a description are those of its group.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flair_jax import boxes as geometry
from flair_jax.data.transforms.base import BOXES, BOXES_VALID, DESCRIPTION_IDS, DESCRIPTIONS
from flair_jax.models.dual_encoder import Features
from flair_jax.models.layers import normalize
from flair_jax.objectives.groups import check_divisor, group_means

EXACT = lax.Precision.HIGHEST


def boxes(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    l1: float = 1.0,
    giou: float = 1.0,
    factor: float = 1.5,
    group_size: int | None = None,
    every_layer: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """How far the boxes of matched queries are from the targets: factor (l1 |b - b'|_1 + giou (1 - GIoU)).

    Args:
      features: of N images, with boxes.
      batch: with targets.
      rng: not needed.
      l1, giou: weights of the parts.
      factor: the reference's, which its paper does not mention.
      group_size: images in a group; None: the whole batch is one.
      every_layer: the sum over all layers of the decoder, each matched anew, as in DETR; the reference takes the last.

    Returns:
      float32 scalar, 0 where there is no box; and of the last layer `l1` and `giou`, the unweighted parts, `iou`, the
      mean IoU of matched boxes, and `targets`, how many there are.

    Raises:
      ValueError: the model has no decoder, the batch no targets, or `group_size` does not divide it.
    """
    name = "boxes"
    wanted, valid = targets(features, batch, name)
    groups = groups_of(features, group_size, name)
    if every_layer and features.image.layer_boxes is None:
        raise ValueError(f"config.objectives.{name}.every_layer needs the boxes of all layers, as training has them")
    layers = features.image.layer_boxes if every_layer else features.image.boxes[None]
    value = 0.0
    for found in layers:
        query, matched = geometry.match_boxes(found, wanted, valid)
        own = of_queries(found, query)  # (N, M, 4)
        distance = jnp.abs(own - wanted).sum(axis=-1)
        iou, generalised = geometry.overlap(geometry.corners(own), geometry.corners(wanted))
        values = {"l1": distance, "giou": 1 - generalised, "iou": iou}
        parts = {key: group_means(x, matched, groups) for key, x in values.items()}
        value += factor * (l1 * parts["l1"] + giou * parts["giou"])
    return value, lax.stop_gradient({**parts, "targets": jnp.sum(valid, dtype=jnp.float32)})


def descriptions(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    group_size: int | None = None,
    mask_duplicates: bool = False,
    both_directions: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Each matched region is classified among the descriptions of its group.

        -log softmax_d(exp(scale) cos(r_q, d))  of the description of the box that the region is matched with

    Args:
      features: of N images, with regions and boxes, and M descriptions each.
      batch: with targets, and `valid` (N, C), which texts there are.
      rng: not needed.
      group_size: images in a group; None: all descriptions of the batch are negatives.
      mask_duplicates: leave out descriptions that read the same as the right one; by default, as in the reference, they
        are negatives. Needs `regions/description_ids` (N, M).
      both_directions: the mean of this and of the classification of each description among the matched regions of its
        group; the reference has only the first.

    Returns:
      float32 scalar, 0 where nothing is matched; and `accuracy`, and `pairs`, how many regions are matched.

    Raises:
      ValueError: as `boxes`, or there are no descriptions.
    """
    name = "region_descriptions"
    wanted, valid = targets(features, batch, name)
    groups = groups_of(features, group_size, name)
    if features.count(DESCRIPTIONS) != valid.shape[1]:
        raise ValueError(
            f"config.objectives.{name} needs a description for each of the {valid.shape[1]} boxes of an image; the "
            f"slots of the texts are {features.slots}"
        )
    query, matched = geometry.match_boxes(features.image.boxes, wanted, valid)
    exist = features.exist(DESCRIPTIONS, batch.get("valid"))
    matched &= exist

    def by_group(x):
        return x.reshape(groups, -1, *x.shape[2:])

    # Row n of a group is the region of target n, column n its description: the right ones are on the diagonal.
    regions = by_group(normalize(of_queries(features.image.regions, query)))  # (G, R, D)
    texts = features.of_slot(DESCRIPTIONS).text.pooled.reshape(*valid.shape, -1)
    logits = jnp.einsum("grd,gcd->grc", regions, by_group(normalize(texts)), precision=EXACT)
    logits *= jnp.exp(features.logit_scale)  # (G, R, R)
    counts = by_group(exist)[:, None, :]
    if mask_duplicates:
        if DESCRIPTION_IDS not in batch:
            raise ValueError(f"config.objectives.{name}.mask_duplicates needs {DESCRIPTION_IDS!r} in the batch")
        ids = by_group(batch[DESCRIPTION_IDS])
        same = (ids[:, :, None] == ids[:, None, :]) & ~jnp.eye(ids.shape[1], dtype=bool)
        counts = counts & ~same
    right = jnp.diagonal(logits, axis1=1, axis2=2)  # (G, R)
    pairs = by_group(matched)
    losses = cross_entropy(logits, right, counts | jnp.eye(right.shape[1], dtype=bool), axis=2)
    if both_directions:
        rows = jnp.broadcast_to(pairs[:, :, None], logits.shape)
        rows = rows & counts if mask_duplicates else rows
        back = cross_entropy(logits, right, rows | jnp.eye(right.shape[1], dtype=bool), axis=1)
        losses = (losses + back) / 2
    best = jnp.max(jnp.where(counts, logits, -jnp.inf), axis=2)
    hits = group_means((right >= best).astype(jnp.float32), pairs, groups)
    told = {"accuracy": hits, "pairs": jnp.sum(matched, dtype=jnp.float32)}
    return group_means(losses, pairs, groups), lax.stop_gradient(told)


def targets(features: Features, batch: Mapping[str, Any], name: str) -> tuple[jax.Array, jax.Array]:
    """The boxes (N, M, 4) of a batch and which there are (N, M). Raises ValueError if batch or model lack them."""
    if features.image.boxes is None:
        raise ValueError(f"config.objectives.{name} needs a query decoder, and config.model.decoder is None")
    if BOXES not in batch:
        raise ValueError(f"config.objectives.{name} needs boxes in the batch; set config.data.regions.count")
    return batch[BOXES].astype(jnp.float32), batch[BOXES_VALID]


def of_queries(x: jax.Array, query: jax.Array) -> jax.Array:
    """What the queries of targets have: (N, Q, …) at int32 (N, M) -> (N, M, …)."""
    return jnp.take_along_axis(x, query[..., None], axis=1)


def groups_of(features: Features, group_size: int | None, name: str) -> int:
    """How many groups of consecutive images there are. Raises ValueError if they are not of one size."""
    images = features.image.pooled.shape[0]
    size = images if group_size is None else group_size
    check_divisor(f"{name}.group_size", size, images)
    return images // size


def cross_entropy(logits: jax.Array, right: jax.Array, counts: jax.Array, axis: int) -> jax.Array:
    """-log softmax along an axis, over what counts, at the logits (G, R) of the right ones: (G, R, C) -> (G, R)."""
    return jax.nn.logsumexp(logits, axis=axis, where=counts) - right
