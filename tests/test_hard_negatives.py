"""Objectives with hard negatives against the numbers of FSC-CLIP's own code, on any number of devices."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from jax.sharding import NamedSharding, PartitionSpec
from test_objectives import mesh_of

from flair_jax import objectives
from flair_jax.models.dual_encoder import Features, ImageFeatures, TextFeatures
from flair_jax.models.layers import normalize
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
    count = rows.shape[1]
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


@functools.cache
def program(objective_names, weights, input_set):
    """Loss, parts and gradients of a combination of objectives, compiled once for all values of their options."""
    inputs = golden_inputs(load_golden("fsc_clip/losses.npz"), f"in/{input_set}")

    def loss(leaves, options):
        config = {name: dict(weight=1.0) | options[name] for name in objective_names}
        if "local_hard_negatives" in config:
            config["local_hard_negatives"]["weights"] = weights
        factors = {name: config[name].pop("factor") for name in objective_names}
        features, batch = features_and_batch(inputs, leaves, inputs["rows"], inputs["valid"])
        _, parts = objectives.weighted_sum(config, features, batch, jax.random.key(0))
        parts = {name: factors[name] * parts[name] for name in objective_names}
        return sum(parts.values()), parts

    return inputs, jax.jit(jax.value_and_grad(loss, has_aux=True))


def compare_gradient(name, found, expected, inputs, scale=1.0):
    """The reference's inputs have unit length and ours are normalised, which takes the radial part of the gradient."""
    if name in ("image_features", "text_features"):
        unit = np.asarray(inputs[name], np.float64)
        expected = expected - np.sum(expected * unit, axis=-1, keepdims=True) * unit
    # What float32 has left of a logit near the scale, times the largest gradient there is.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 + 1e-7 * scale * np.abs(expected).max())


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_files.parameters("fsc_clip/losses.json", lambda losses: losses["cases"]))
def test_losses_and_gradients_of_a_case(name, monkeypatch):
    monkeypatch.setattr(hard_negatives, "check_options", lambda *_: None)  # gamma and smoothing are traced
    case, arrays = load_golden("fsc_clip/losses.json")["cases"][name], load_golden("fsc_clip/losses.npz")
    config, terms = section(case)
    weights = config.get("local_hard_negatives", {}).pop("weights", None)
    inputs, run = program(tuple(config), weights, case["inputs"])
    leaves = {key: jnp.asarray(inputs[key]) for key in INPUTS[:-1]} | {"logit_scale": jnp.float32(case["logit_scale"])}
    options = {ours: {"factor" if key == "weight" else key: x for key, x in o.items()} for ours, o in config.items()}
    (value, parts), grads = run(leaves, options)
    rounding = dict(rtol=2e-6, atol=2e-7 * case["logit_scale"])  # float32, of logits near the scale
    np.testing.assert_allclose(value, case["terms"]["total"], **rounding)
    assert {*terms.values(), "total"} == case["terms"].keys()
    for ours, theirs in terms.items():
        np.testing.assert_allclose(parts[ours], case["terms"][theirs], **rounding, err_msg=ours)
    for key in INPUTS:
        compare_gradient(key, grads[key], arrays[f"grad/{name}/{key}"], inputs, case["logit_scale"])


@pytest.mark.golden
@pytest.mark.parametrize("weights", ["minmax", "minmax_sparse", "softmax"])
def test_scores_and_pooled_patches(weights):
    arrays = load_golden("fsc_clip/losses.npz")
    sets = {key.split("/")[1] for key in arrays if key.startswith("in/")}
    for name in sorted(sets):
        inputs, owner = golden_inputs(arrays, f"in/{name}"), arrays[f"in/{name}/owner"]
        kind = weights.removeprefix("minmax_")
        patches, tokens = inputs["image_tokens"][owner], inputs["text_tokens"][:, None]
        pooled = normalize(hard_negatives.pool_patches(patches, tokens, kind))[:, 0]
        expected = arrays[f"mid/{name}/{weights}/pooled_image_tokens"]
        np.testing.assert_allclose(pooled, expected, **TOLERANCE)
        usable = inputs["tokens"][:, None] > 0
        scale = load_golden("fsc_clip/losses.json")["logit_scale"]
        scores = hard_negatives.local_scores(patches, tokens, usable, scale, kind)
        np.testing.assert_allclose(scores[:, 0], arrays[f"mid/{name}/{weights}/local_scores"], **TOLERANCE)


RANKS = ("clip_pos", "negclip", "both_focal_ls")


@pytest.mark.golden
@pytest.mark.parametrize(("devices", "chunk_size"), [(1, 2), (2, 2), (4, None), (8, None)])
def test_two_processes_of_the_reference_on_any_number_of_devices(devices, chunk_size):
    """What DDP averages: a process's own gradients, of the gathered CLIP loss and of its own hard negatives."""
    golden, arrays = load_golden("fsc_clip/ddp_two_ranks.json"), load_golden("fsc_clip/ddp_two_ranks.npz")
    world, images = golden["world_size"], golden["world_size"] * golden["local_batch"]
    if images % devices or (chunk_size and (images // devices) % chunk_size):
        pytest.skip(f"{images} images on {devices} devices in chunks of {chunk_size}")
    ranks = [golden_inputs(arrays, f"in/rank{rank}") for rank in range(world)]
    # Texts image by image here, so that they can be split over devices.
    laid = [
        rank | {key: rank[key][rank["rows"].reshape(-1)] for key in ("text_features", "text_tokens", "tokens")}
        for rank in ranks
    ]
    inputs = {key: np.concatenate([rank[key] for rank in laid]) for key in laid[0]}
    count = inputs["rows"].shape[1]
    common = dict(weight=1.0, reference_world_size=world)
    chunks = dict(chunk_size=chunk_size)
    hard = dict(common, gamma=2.0, smoothing=0.02)
    configs = {
        "clip_pos": {"softmax": common | chunks},
        "negclip": {"negclip": common | chunks},
        "both_focal_ls": {
            "softmax": common | chunks,
            "global_hard_negatives": hard | {"weight": 0.5},
            "local_hard_negatives": hard | chunks | {"weight": 0.2},
        },
    }
    terms = dict(softmax="clip_loss", negclip="clip_loss", global_hard_negatives="clip_neg_loss")
    terms["local_hard_negatives"] = "local_neg_loss"
    rows = np.arange(images * count).reshape(images, count)

    def loss(leaves, given, config):
        features, batch = features_and_batch(given, leaves, rows, given["valid"])
        return objectives.weighted_sum(config, features, batch, jax.random.key(0))

    def all_cases(leaves, given):
        return {name: jax.value_and_grad(loss, has_aux=True)(leaves, given, config) for name, config in configs.items()}

    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("data"))
        leaves = jax.device_put({key: inputs[key] for key in INPUTS[:-1]}, split)
        given = jax.device_put({key: inputs[key] for key in ("tokens", "valid")}, split)
        leaves["logit_scale"] = jax.device_put(np.float32(golden["logit_scale"]), NamedSharding(mesh, PartitionSpec()))
        found = jax.device_get(jax.jit(all_cases)(leaves, given))
    for name, ((_, parts), grads) in found.items():
        case = golden["cases"][name]
        for ours, options in configs[name].items():
            expected = np.mean([case[f"rank{rank}"][terms[ours]] for rank in range(world)])
            np.testing.assert_allclose(options["weight"] * parts[ours], expected, rtol=5e-6, err_msg=f"{name} {ours}")
        per_rank = jax.tree.map(lambda x: np.split(x, world), {key: grads[key] for key in INPUTS[:-1]})
        for rank, given in enumerate(ranks):
            for key in INPUTS[:-1]:
                theirs = arrays[f"grad/{name}/rank{rank}/{key}"] / world
                ours = per_rank[key][rank]
                if key.startswith("text"):  # back to compact texts
                    total = np.zeros(theirs.shape, np.float32)
                    np.add.at(total, given["rows"].reshape(-1), ours)
                    ours = total
                compare_gradient(key, ours, theirs, given, golden["logit_scale"])
        scale = np.mean([arrays[f"grad/{name}/rank{rank}/logit_scale"] for rank in range(world)])
        np.testing.assert_allclose(grads["logit_scale"], scale, **TOLERANCE)
