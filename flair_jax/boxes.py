"""Boxes in a picture: their two forms, how much they overlap, and which of two sets belong together.

A box is float (…, 4), either (centre x, centre y, width, height), as models predict it, or its corners (left, top,
right, bottom); both as shares of the picture's width and height.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

EPSILON = 1e-4  # added to unions; in shares of a picture, so that a perfect match of small boxes has an IoU below 1
L1_COST, GIOU_COST = 5.0, 2.0  # of GRAIN's and DETR's matching
# Up to so many ways to give each box a query of its own are tried all at once, which needs no loop on the device.
MAX_WAYS = 1000


def corners(boxes: jax.Array) -> jax.Array:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def centres(boxes: jax.Array) -> jax.Array:
    """(left, top, right, bottom) -> (centre x, centre y, width, height)."""
    first, last = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(first + last) / 2, last - first], axis=-1)


def area(boxes: jax.Array) -> jax.Array:
    """Of boxes by their corners, (…, 4) -> (…)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlap(a: jax.Array, b: jax.Array, epsilon: float = EPSILON) -> tuple[jax.Array, jax.Array]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of boxes by their corners, which are broadcast.

        IoU = I / (U + epsilon),   GIoU = IoU - (C - U) / C

    Args:
      a, b: (…, 4).
      epsilon: as GRAIN's code has it; 0 where every union has an area.

    Returns:
      Both, (…).
    """
    first, last = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = jnp.prod(jnp.maximum(last - first, 0), axis=-1)
    union = area(a) + area(b) - intersection
    around = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    hull = area(around)
    iou = intersection / (union + epsilon)
    return iou, iou - (hull - union) / jnp.where(hull > 0, hull, 1)


def match_boxes(found: jax.Array, wanted: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`match` of predicted boxes and targets by 5 |b - b'|_1 - 2 GIoU(b, b'), without a gradient.

    Args:
      found, wanted: (centre x, centre y, width, height), (B, Q, 4) and (B, M, 4).
      valid: bool (B, M), which targets there are.
    """
    found, wanted = lax.stop_gradient(found)[:, :, None], wanted[:, None]
    distance = jnp.abs(found - wanted).sum(axis=-1)  # (B, Q, M)
    _, generalised = overlap(corners(found), corners(wanted))
    return match(L1_COST * distance - GIOU_COST * generalised, valid)


def match(cost: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives each target a query of its own, so that the sum of the costs is the smallest; exact, and on the device.

    Args:
      cost: float32 (B, Q, M), of M targets.
      valid: bool (B, M), which targets there are.

    Returns:
      int32 (B, M), the query of each target; and bool (B, M), which targets have one: all valid ones unless they are
      more than Q.
    """
    queries, targets = cost.shape[1:]
    few = targets <= queries and math.perm(queries, targets) <= MAX_WAYS
    return (match_all_ways if few else match_hungarian)(cost, valid)


def match_all_ways(cost: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`match` by trying every way, Q! / (Q - M)! of them; for M up to Q."""
    queries, targets = cost.shape[1:]
    ways = np.array(list(itertools.permutations(range(queries), targets)), np.int32)  # (P, M)
    costs = jnp.where(valid[:, None], cost[:, ways, np.arange(targets)], 0)  # (B, P, M)
    return jnp.asarray(ways)[jnp.argmin(costs.sum(axis=-1), axis=1)], valid


def match_hungarian(cost: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`match` by the Hungarian algorithm, image by image."""
    targets = cost.shape[2]

    def one(cost):
        query, target = optax.assignment.hungarian_algorithm(cost)
        return jnp.full(targets, -1, jnp.int32).at[target].set(query.astype(jnp.int32))

    # What is not there costs so much that it is left over first.
    found = jax.vmap(one)(jnp.where(valid[:, None], cost, 1e4))
    return jnp.maximum(found, 0), valid & (found >= 0)
