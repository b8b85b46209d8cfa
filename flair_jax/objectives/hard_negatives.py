"""Objectives with hard-negative captions: NegCLIP (Yuksekgonul et al., ICLR 2023) and FSC-CLIP (Oh et al., EMNLP 2024).

A batch has, beside an image's captions, a slot "negatives" of K altered copies of its first caption, of which
`batch["valid"]` says which exist; one that does not exist must be some text all the same, such as the caption itself.

FSC-CLIP is CLIP's loss plus two classifications of each image's caption against its own negatives, by global scores
and by local ones (section 3):

    global   z_i = exp(scale) [cos(g_i, t_i), cos(g_i, t_i1), …, cos(g_i, t_iK)]
    local    z_i = [score(V_i, T_i), score(V_i, T_i1), …],   see `local_scores`

with a focal, label-smoothed row loss, see `row_loss`. The paper leaves missing negatives out; its code, and so this by
default, keeps a logit of 0 for them. `mask_missing` does as the paper says.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from flair_jax.data.transforms.base import CAPTIONS, NEGATIVES
from flair_jax.models.dual_encoder import Features
from flair_jax.models.layers import normalize
from flair_jax.objectives import ring
from flair_jax.objectives.groups import check_divisor, group_means
from flair_jax.objectives.softmax import as_in_processes, contrast

Weights = Literal["minmax", "sparse", "softmax"]
EXACT = lax.Precision.HIGHEST  # by default GPUs and TPUs multiply float32 in fewer bits, and a scale of 100 shows it


def negclip(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    mask_missing: bool = False,
    reference_world_size: int = 1,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """NegCLIP's loss: each image is classified among all captions and all negatives of the global batch.

    A text is classified among the images as in CLIP's, captions alone.

    Args:
      features: of N images, their captions and K negatives each.
      batch: `valid` (N, C) of all slots; without it all negatives exist.
      rng: not needed.
      mask_missing: leave missing negatives out. By default each is a zero vector, as in the reference: it adds
        exp(0) = 1 to the denominator of every image.
      reference_world_size: see `softmax.as_in_processes`.
      chunk_size: images to work on at a time on a device; None: all at once.

    Returns:
      float32 scalar, which does not depend on the chunks or devices, up to rounding; and `missing`, see `counts`.

    Raises:
      ValueError: there are no negatives, or the batch cannot be split as asked.
    """
    valid = valid_negatives(features, batch, "negclip")
    text = unit_texts(features)  # (N, 1 + K, D)
    negatives = jnp.where(valid[..., None], text[:, 1:], 0.0).reshape(-1, text.shape[-1])  # (N * K, D)
    sides = normalize(features.image.pooled), text[:, 0], negatives
    image, text, negatives = as_in_processes(sides, reference_world_size)
    value = contrast(
        image,
        text,
        features.logit_scale,
        negatives,
        valid.reshape(-1) if mask_missing else None,
        chunk_size=chunk_size,
        option="config.objectives.negclip.chunk_size",
    )
    return value, {"missing": counts(valid)["missing"]}


def global_loss(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    gamma: float = 2.0,
    smoothing: float = 0.02,
    mask_missing: bool = False,
    reference_world_size: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classification of each image's caption against its own negatives, by cosines of the pooled features.

    Args:
      features, batch, rng: as for `negclip`.
      gamma, smoothing, mask_missing: see `row_loss`.
      reference_world_size: processes of the reference, see `mean_of_rows`.

    Returns:
      float32 scalar; and `missing` and `rows`, see `counts`.

    Raises:
      ValueError: there are no negatives, or an option has no such value.
    """
    name = "global_hard_negatives"
    check_options(name, gamma, smoothing)
    valid = valid_negatives(features, batch, name)
    cosine = jnp.einsum("nd,ncd->nc", normalize(features.image.pooled), unit_texts(features), precision=EXACT)
    losses = row_loss(jnp.exp(features.logit_scale) * cosine, valid, gamma, smoothing, mask_missing)
    return mean_of_rows(losses, valid, reference_world_size, name), counts(valid)


def local_loss(
    features: Features,
    batch: Mapping[str, Any],
    rng: jax.Array,
    *,
    weights: Weights = "minmax",
    gamma: float = 2.0,
    smoothing: float = 0.02,
    mask_missing: bool = False,
    reference_world_size: int = 1,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classification of each image's caption against its own negatives, by scores of all tokens and patches.

    Args:
      features: as for `negclip`, with local features of the texts.
      batch: as for `negclip`; and `texts`, the fields of `Text`.
      rng: not needed.
      weights: see `patch_weights`.
      gamma, smoothing, mask_missing, reference_world_size: as for `global_loss`.
      chunk_size: images to work on at a time on a device, for bounded memory; None: all at once.

    Returns, raises: as `global_loss`.
    """
    name = "local_hard_negatives"
    check_options(name, gamma, smoothing)
    if weights not in get_args(Weights):
        raise ValueError(f"config.objectives.{name}.weights is {weights!r}; expected one of {get_args(Weights)}")
    valid = valid_negatives(features, batch, name)
    if features.text.local is None:
        raise ValueError(f"config.objectives.{name} needs local features of the texts")
    images, texts = features.image.pooled.shape[0], batch["texts"]
    scored = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)  # (N, 1 + K)

    def work(own, scale, rows, first):
        patches, ends, scored = own
        tokens, usable = caption_tokens(rows, ends, first)
        # What does not exist is scored over all that stands there, so that its gradient is 0 and not 0 * inf.
        return local_scores(patches, tokens, usable | ~scored[..., None], scale, weights)

    rows = features.text.local, texts["tokens"], texts.get("positions")
    logits = ring.map_images(
        work,
        (features.image.local, own_and_negatives(features, texts["ends"]), scored),
        jnp.exp(features.logit_scale),
        rows,
        images=images,
        chunk_size=chunk_size,
        option=f"config.objectives.{name}.chunk_size",
    )
    losses = row_loss(logits, valid, gamma, smoothing, mask_missing)
    return mean_of_rows(losses, valid, reference_world_size, name), counts(valid)


# ---------------------------------------------------------------------------------------------------------------------
# Slots


def own_and_negatives(features: Features, x: jax.Array) -> jax.Array:
    """An array by text, (N * C, …), of the first caption and the negatives alone: (N, 1 + K, …)."""
    x = x.reshape(features.image.pooled.shape[0], -1, *x.shape[1:])
    return jnp.concatenate([features.in_slot(CAPTIONS, x)[:, :1], features.in_slot(NEGATIVES, x)], axis=1)


def unit_texts(features: Features) -> jax.Array:
    """Pooled features of unit length: (N, 1 + K, D), the caption first."""
    return normalize(own_and_negatives(features, features.text.pooled))


def valid_negatives(features: Features, batch: Mapping[str, Any], name: str) -> jax.Array:
    """Which negatives exist, bool (N, K). Raises ValueError if the batch has no slot for them."""
    if not (features.count(CAPTIONS) and features.count(NEGATIVES)):
        raise ValueError(
            f"config.objectives.{name} needs a caption and hard negatives of it; set config.data.negatives.kinds. The "
            f"slots of the texts are {features.slots}"
        )
    return features.exist(NEGATIVES, batch.get("valid"))


def counts(valid: jax.Array) -> dict[str, jax.Array]:
    """What there is to count, float32: `missing`, negatives that do not exist; `rows`, images that have any."""
    return {"missing": jnp.sum(~valid, dtype=jnp.float32), "rows": jnp.sum(valid.any(axis=1), dtype=jnp.float32)}


def caption_tokens(
    rows: tuple[jax.Array, jax.Array, jax.Array | None], ends: jax.Array, first: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """The tokens of each caption, out of packed or padded rows.

    Args:
      rows: of one device: features (R, T, D), token ids (R, T), and positions (R, T) or None, see `Text`.
      ends: int (C, …), flat index of the captions' end-of-text tokens in the batch.
      first: number of the device's first row in the batch.

    Returns:
      Features (C, …, T, D), 0 after the end, and which are usable: all but the start of text, and what has the id 0.
      A caption whose end is in another device's rows is NaN.
    """
    local, tokens, positions = rows
    length, width = local.shape[1:]
    ends = ends - first * length
    last = ends % length if positions is None else positions.reshape(-1).at[ends].get(mode="clip")  # its own position
    place = jnp.arange(length)
    inside = place <= last[..., None]  # (C, …, T)
    index = jnp.where(inside, (ends - last)[..., None] + place, 0)
    options = dict(mode="fill", wrap_negative_indices=False)
    found = local.reshape(-1, width).at[index].get(fill_value=jnp.nan, **options)
    usable = inside & (place > 0) & (tokens.reshape(-1).at[index].get(fill_value=1, **options) > 0)
    return jnp.where(inside[..., None], found, 0), usable


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def local_scores(
    patches: jax.Array, tokens: jax.Array, usable: jax.Array, scale: jax.Array, weights: Weights
) -> jax.Array:
    """How well each text agrees with its image, token by token (FSC-CLIP, equations 5 to 8), in float32.

        score = logsumexp over usable tokens w of  scale * cos(sum_p A_wp V_p, T_w)

    It is a sum over tokens: longer texts score higher.

    Args:
      patches: V, (N, P, D), not normalised.
      tokens: T of the texts of each image, (N, C, T, D), not normalised.
      usable: bool (N, C, T), at least one of each text.
      scale: that cosines are multiplied by.
      weights: of the patches for each token, see `patch_weights`.

    Returns:
      float32 (N, C).
    """
    cosine = jnp.sum(normalize(pool_patches(patches, tokens, weights)) * normalize(tokens), axis=-1)  # (N, C, T)
    return jax.nn.logsumexp(scale * cosine, axis=-1, where=usable)


def pool_patches(patches: jax.Array, tokens: jax.Array, weights: Weights) -> jax.Array:
    """Weighted sum of the patches for each token, with weights as constants: -> float32 (N, C, T, D)."""
    patches, tokens = patches.astype(jnp.float32), tokens.astype(jnp.float32)
    similarity = jnp.einsum("nctd,npd->nctp", *lax.stop_gradient((tokens, patches)), precision=EXACT)
    return jnp.einsum("nctp,npd->nctd", patch_weights(similarity, weights), patches, precision=EXACT)


def patch_weights(similarity: jax.Array, weights: Weights) -> jax.Array:
    """Weights of P patches from a token's similarities, which sum to 1.

    Args:
      similarity: float32 (…, P), of features that are not normalised.
      weights: "minmax", similarities scaled to [0, 1]; "sparse", of those only what is at least 1 / P; or "softmax" of
        the similarities as they are.

    Returns:
      float32 (…, P); 1 / P where all similarities are equal, for which the reference's "minmax" divides 0 by 0.
    """
    if weights == "softmax":
        return jax.nn.softmax(similarity, axis=-1)
    count = similarity.shape[-1]
    lowest, highest = similarity.min(axis=-1, keepdims=True), similarity.max(axis=-1, keepdims=True)
    equal = highest == lowest
    found = (similarity - lowest) / jnp.where(equal, 1.0, highest - lowest)
    if weights == "sparse":
        found = jnp.where(found < 1 / count, 0.0, found)
    found = jnp.where(equal, 1.0, found)
    return found / found.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def row_loss(
    logits: jax.Array, valid: jax.Array, gamma: float, smoothing: float, mask_missing: bool = False
) -> jax.Array:
    """Focal loss with label smoothing of a caption among its negatives (FSC-CLIP, equations 9 and 10).

        -sum_c y_c (1 - p_c)^gamma log p_c,   y_0 = 1 - e + e / (1 + n),   y_k = e / (1 + n) of the n that exist

    Args:
      logits: float32 (N, 1 + K), the caption first.
      valid: bool (N, K), which negatives exist.
      gamma: of the focal loss; 0: cross entropy.
      smoothing: e; 0: none.
      mask_missing: give missing negatives no probability. By default their logit is 0, as in the reference.

    Returns:
      float32 (N,); 0 where no negative exists.
    """
    any_valid = valid.any(axis=1)  # (N,)
    missing = jnp.pad(~valid, ((0, 0), (1, 0)))
    lowest = jnp.finfo(jnp.float32).min / 2 if mask_missing else 0.0
    log_p = jax.nn.log_softmax(jnp.where(missing, lowest, logits), axis=1)  # (N, 1 + K)
    share = smoothing / (1 + valid.sum(axis=1, keepdims=True))
    wanted = jnp.where(missing, 0.0, share).at[:, 0].add(1 - smoothing)
    other = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny)  # 1 - p; not 0, where a root has no gradient
    return jnp.where(any_valid, -jnp.sum(wanted * other**gamma * log_p, axis=1), 0.0)


def mean_of_rows(losses: jax.Array, valid: jax.Array, reference_world_size: int, name: str) -> jax.Array:
    """Mean over the images that have a negative; 0 where none has, for which the reference stops with NaN.

    Args:
      losses: float32 (N,), 0 where there is no negative.
      valid: bool (N, K).
      reference_world_size: W, processes of the reference. Each takes the mean over its own N / W consecutive images,
        and the mean over processes is what its parameters see.
      name: of the objective, for the error.
    """
    images = losses.shape[0]
    check_divisor(f"{name}.reference_world_size", reference_world_size, images)
    return group_means(losses, valid.any(axis=1), reference_world_size)


def check_options(name: str, gamma: float, smoothing: float) -> None:
    """Raises ValueError if an option is outside of its range, naming it."""
    if not gamma >= 0:
        raise ValueError(f"config.objectives.{name}.gamma is {gamma}; expected 0 (cross entropy) or more")
    if not 0 <= smoothing < 1:
        raise ValueError(f"config.objectives.{name}.smoothing is {smoothing}; expected 0 <= smoothing < 1")
