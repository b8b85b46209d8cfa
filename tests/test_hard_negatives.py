"""Objectives with hard negatives against the numbers of FSC-CLIP's own code, on any number of devices."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from jax.sharding import NamedSharding, PartitionSpec
from optional import torch
from test_objectives import mesh_of, sizes_of

from flair_jax import objectives
from flair_jax.data.transforms import packing
from flair_jax.models.dual_encoder import Features, ImageFeatures, TextFeatures
from flair_jax.objectives import hard_negatives

INPUTS = ("image_features", "text_features", "image_tokens", "text_tokens", "logit_scale")
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def golden_inputs(arrays, prefix):
    """One input set of the reference: its arrays, and what we need to lay its compact texts out image by image.

    `rows` (B, 1 + K) are the compact rows of the caption and of its negatives, the caption again for one that does not
    exist; `valid` (B, 1 + K). `tokens` (N, T) stand for the attention mask: 1 where a token is usable.
    """
    found = {name: arrays[f"{prefix}/{name}"] for name in INPUTS[:-1]}
    index, masks = arrays[f"{prefix}/neg_index"], arrays[f"{prefix}/neg_text_masks"]
    own = np.arange(len(index))[:, None]
    np.testing.assert_array_equal(masks.reshape(-1, len(index)).T != 0, index >= 0)  # flat, kind-major
    found["rows"] = np.concatenate([own, np.where(index < 0, own, index)], axis=1)
    found["valid"] = np.concatenate([own >= 0, index >= 0], axis=1)
    mask = arrays[f"{prefix}/attn_mask"]
    assert not mask[:, 0].any()
    found["tokens"] = mask
    return found


def features_and_batch(inputs, leaves, rows, valid):
    """Our features and batch; `leaves` are the differentiable arrays by name, texts by compact row."""
    images, count = rows.shape
    text = leaves["text_features"][rows.reshape(-1)]
    local = leaves["text_tokens"][rows.reshape(-1)]
    tokens = jnp.asarray(inputs["tokens"])[rows.reshape(-1)].astype(jnp.int32)
    length = tokens.shape[1]
    # A row of the reference may have unusable tokens anywhere; every token up to the last place belongs to the text.
    ends = jnp.arange(len(text)) * length + length - 1
    features = Features(
        ImageFeatures(leaves["image_features"], leaves["image_tokens"]),
        TextFeatures(text, local, None),
        jnp.log(leaves["logit_scale"]),
        slots=(("captions", 1), ("negatives", count - 1)),
    )
    return features, {"valid": jnp.asarray(valid), "texts": {"tokens": tokens, "ends": ends.astype(jnp.int32)}}


def section(case):
    """Our `objectives` section for a case of the reference, and the names of the terms by ours."""
    options = case["options"]
    rows = dict(
        gamma=options.get("focal_gamma", 0.0) if options.get("neg_loss_name") == "focal_loss" else 0.0,
        smoothing=options.get("neg_label_smoothing") or 0.0,
    )
    plain = not case["uses_negatives"] or case["loss_class"] != "clip"
    found, terms = {"softmax" if plain else "negclip": dict(weight=1.0)}, {}
    terms["softmax" if plain else "negclip"] = "clip_loss"
    if options.get("apply_global_neg_loss"):
        found["global_hard_negatives"] = dict(weight=options["neg_loss_weight"], **rows)
        terms["global_hard_negatives"] = "clip_neg_loss"
    if case["loss_class"] == "local":
        weights = "sparse" if options.get("sim_sparsify") else options.get("sim_normalizer", "minmax")
        found["local_hard_negatives"] = dict(weight=options["local_neg_weight"], weights=weights, **rows)
        terms["local_hard_negatives"] = "local_neg_loss"
    return found, terms


def value_and_grads(config, inputs, leaves):
    def loss(leaves):
        features, batch = features_and_batch(inputs, leaves, inputs["rows"], inputs["valid"])
        return objectives.weighted_sum(config, features, batch, jax.random.key(0))

    return jax.value_and_grad(loss, has_aux=True)(leaves)


def compare_gradient(name, found, expected, inputs):
    """The reference's inputs have unit length and ours are normalised, which takes the radial part of the gradient."""
    if name in ("image_features", "text_features"):
        unit = np.asarray(inputs[name], np.float64)
        expected = expected - np.sum(expected * unit, axis=-1, keepdims=True) * unit
    np.testing.assert_allclose(found, expected, **TOLERANCE, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_files.parameters("fsc_clip/losses.json", lambda losses: losses["cases"]))
def test_losses_and_gradients_of_a_case(name):
    case, arrays = load_golden("fsc_clip/losses.json")["cases"][name], load_golden("fsc_clip/losses.npz")
    inputs = golden_inputs(arrays, f"in/{case['inputs']}")
    config, terms = section(case)
    leaves = {key: jnp.asarray(inputs[key]) for key in INPUTS[:-1]} | {"logit_scale": jnp.float32(case["logit_scale"])}
    (value, parts), grads = jax.jit(functools.partial(value_and_grads, config, inputs))(leaves)
    np.testing.assert_allclose(value, case["terms"]["total"], rtol=2e-5)
    assert {*terms.values(), "total"} == case["terms"].keys()
    for ours, theirs in terms.items():
        np.testing.assert_allclose(config[ours]["weight"] * parts[ours], case["terms"][theirs], rtol=2e-5, err_msg=ours)
    for key in INPUTS:
        compare_gradient(key, grads[key], arrays[f"grad/{name}/{key}"], inputs)
