"""Objectives with hard negatives against the numbers of FSC-CLIP's own code, on any number of devices."""

import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from jax.sharding import NamedSharding, PartitionSpec
from test_objectives import attend, mesh_of, sizes_of

from flair_jax import objectives
from flair_jax.data.transforms import packing
from flair_jax.models.dual_encoder import Features, ImageFeatures, PoolingFeatures, TextFeatures
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


@functools.partial(jax.jit, static_argnums=4)
def pooled_and_scores(patches, tokens, usable, scale, weights):
    pooled = normalize(hard_negatives.pool_patches(patches, tokens, weights))
    return pooled[:, 0], hard_negatives.local_scores(patches, tokens, usable, scale, weights)[:, 0]


@pytest.mark.golden
@pytest.mark.parametrize("weights", ["minmax", "minmax_sparse", "softmax"])
def test_scores_and_pooled_patches(weights):
    arrays, scale = load_golden("fsc_clip/losses.npz"), load_golden("fsc_clip/losses.json")["logit_scale"]
    for name in sorted({key.split("/")[1] for key in arrays if key.startswith("in/")}):
        inputs, owner = golden_inputs(arrays, f"in/{name}"), arrays[f"in/{name}/owner"]
        given = inputs["image_tokens"][owner], inputs["text_tokens"][:, None], inputs["tokens"][:, None] > 0
        found = pooled_and_scores(*given, scale, weights.removeprefix("minmax_"))
        for what, array in zip(("pooled_image_tokens", "local_scores"), found, strict=True):
            np.testing.assert_allclose(array, arrays[f"mid/{name}/{weights}/{what}"], **TOLERANCE)


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


# ---------------------------------------------------------------------------------------------------------------------
# Slots, packed rows, missing negatives

IMAGES, CAPTIONS, KINDS, PATCHES, TOKENS, WIDTH = 8, 2, 3, 5, 9, 12
SLOTS = (("captions", CAPTIONS), ("negatives", KINDS))
ALL = {
    "negclip": dict(weight=1.0),
    "global_hard_negatives": dict(weight=0.5),
    "local_hard_negatives": dict(weight=0.2),
}


@pytest.fixture(scope="module")
def sides():
    """Random features by name; token ids, of which each text has some; and which texts exist. Image 2 has none."""
    rng = np.random.default_rng(0)
    texts = IMAGES * (CAPTIONS + KINDS)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    leaves = {
        "image_features": normal(IMAGES, WIDTH),
        "image_tokens": normal(IMAGES, PATCHES, WIDTH),
        "text_features": normal(texts, WIDTH),
        "text_tokens": normal(texts, TOKENS, WIDTH),
        "logit_scale": jnp.float32(1.3),
    }
    lengths = rng.integers(2, TOKENS + 1, texts)
    tokens = np.where(np.arange(TOKENS) < lengths[:, None] - 1, 7, 0)
    tokens[np.arange(texts), lengths - 1] = 9  # end of text, the largest id
    tokens[3, 1] = 0  # an id that padding has too, within a text
    valid = rng.random((IMAGES, CAPTIONS + KINDS)) < 0.6
    valid[:, :CAPTIONS], valid[2, CAPTIONS:] = True, False
    assert lengths[3] > 2 and not valid.all()
    return leaves, tokens.astype(np.int32), valid


def row_features(leaves, tokens, texts):
    """Features as the text tower gives them, by row, from those by text: packed rows hold several texts."""
    if "positions" not in texts:
        return leaves["text_tokens"]
    length = tokens.shape[1]
    ends = texts["ends"]
    first = ends - packing.lengths(tokens) + 1
    place = np.arange(length)
    inside = place < packing.lengths(tokens)[:, None]
    rows = (
        jnp.zeros((texts["tokens"].size, WIDTH)).at[(first[:, None] + place)[inside]].set(leaves["text_tokens"][inside])
    )
    return rows.reshape(*texts["tokens"].shape, WIDTH)


@pytest.mark.parametrize(("devices", "row_length", "chunk_size"), [(1, 12, 2), (4, None, None), (4, 20, 1)])
def test_packed_rows_and_devices_change_nothing(sides, devices, row_length, chunk_size):
    leaves, tokens, valid = sides
    config = {name: dict(options) for name, options in ALL.items()}
    for name in ("negclip", "local_hard_negatives"):
        config[name]["chunk_size"] = chunk_size

    def run(devices, row_length, config):
        if row_length is None:
            texts = packing.padded(tokens)
        else:
            texts = packing.Packer(row_length, range(1, 100), devices)(tokens).texts

        def loss(leaves, given):
            features = Features(
                ImageFeatures(leaves["image_features"], leaves["image_tokens"]),
                TextFeatures(leaves["text_features"], row_features(leaves, tokens, texts), None),
                leaves["logit_scale"],
                slots=SLOTS,
            )
            return objectives.weighted_sum(config, features, given, jax.random.key(0))

        mesh = mesh_of(devices)
        with jax.set_mesh(mesh):
            split = NamedSharding(mesh, PartitionSpec("data"))
            given = jax.device_put({"texts": texts, "valid": valid}, split)
            placed = {key: jax.device_put(x, split) if x.ndim else x for key, x in leaves.items()}
            return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(placed, given))

    (expected, parts), expected_grads = run(1, None, ALL)
    (value, more), grads = run(devices, row_length, config)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for name, part in parts.items():
        np.testing.assert_allclose(more[name], part, rtol=1e-5, err_msg=name)
    assert more["negclip/missing"] == (~valid).sum() and more["local_hard_negatives/rows"] == IMAGES - 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)
    # Neither padding nor the start of a text, nor what does not exist, has a part in the local scores.
    local = expected_grads["text_tokens"].reshape(IMAGES, -1, TOKENS, WIDTH)
    assert not local[:, 1:CAPTIONS].any() and not local[~valid].any() and not local[:, :, 0].any()
    assert not expected_grads["text_tokens"][tokens == 0].any() and local[:, 0].any(axis=(1, 2)).sum() == IMAGES - 1


def test_tokens_of_a_caption_on_another_device_are_nan():
    """As pooled features are, rather than those of some other text."""
    rows = jnp.ones((2, 4, 3)), jnp.ones((2, 4), jnp.int32), jnp.tile(jnp.arange(4), (2, 1))
    ends = jnp.array([11, 19])  # of rows 2 and 4; this device has rows 2 and 3
    found, usable = hard_negatives.caption_tokens(rows, ends, 2)
    np.testing.assert_array_equal(found[0], 1)
    np.testing.assert_array_equal(usable[0], [False, True, True, True])
    assert np.isnan(found[1]).any()


@pytest.mark.parametrize("mask_missing", [False, True])
def test_losses_equal_their_definition_row_by_row(sides, mask_missing):
    leaves, tokens, valid = sides
    features = Features(
        ImageFeatures(leaves["image_features"], leaves["image_tokens"]),
        TextFeatures(leaves["text_features"], leaves["text_tokens"], None),
        leaves["logit_scale"],
        slots=SLOTS,
    )
    batch = {"texts": packing.padded(tokens), "valid": jnp.asarray(valid)}
    config = {name: options | {"mask_missing": mask_missing} for name, options in ALL.items()}
    parts = jax.jit(lambda x: objectives.weighted_sum(config, x, batch, jax.random.key(0))[1])(features)

    def unit(x):
        x = np.asarray(x, np.float64)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def logsumexp(x):
        return np.log(np.sum(np.exp(x)))

    scale = np.exp(np.float64(leaves["logit_scale"]))
    image = unit(leaves["image_features"])
    text = unit(leaves["text_features"]).reshape(IMAGES, -1, WIDTH)
    exists = valid[:, CAPTIONS:]
    negatives = np.where(exists[..., None], text[:, CAPTIONS:], 0)
    columns = negatives[exists] if mask_missing else negatives.reshape(-1, WIDTH)
    pairs = scale * image @ text[:, 0].T
    rows = scale * image @ np.concatenate([text[:, 0], columns]).T
    own = np.diagonal(pairs)
    expected = (
        np.mean([logsumexp(row) for row in rows] - own) / 2 + np.mean([logsumexp(row) for row in pairs.T] - own) / 2
    )
    np.testing.assert_allclose(parts["negclip"], expected, rtol=1e-5)

    def score(n, c):
        patches = np.asarray(leaves["image_tokens"][n], np.float64)
        words = np.asarray(leaves["text_tokens"], np.float64).reshape(IMAGES, -1, TOKENS, WIDTH)[n, c]
        ids = tokens.reshape(IMAGES, -1, TOKENS)[n, c]
        found = []
        for place, word in enumerate(words):
            if place and ids[place]:
                similarity = patches @ word
                weights = (similarity - similarity.min()) / (similarity.max() - similarity.min())
                found.append(scale * unit(weights @ patches) @ unit(word))
        return logsumexp(np.array(found))

    def classification(logits, exists):
        logits = np.where(np.r_[True, exists], logits, -np.inf if mask_missing else 0.0)
        log_p = logits - logsumexp(logits)
        share = 0.02 / (1 + exists.sum())
        wanted = np.r_[1 - 0.02 + share, np.where(exists, share, 0)]
        return -sum(y * (1 - np.exp(x)) ** 2 * x for y, x in zip(wanted, log_p, strict=True) if y)

    slots = [0, *range(CAPTIONS, CAPTIONS + KINDS)]
    found = {"global_hard_negatives": [], "local_hard_negatives": []}
    for n in range(IMAGES):
        if exists[n].any():
            found["global_hard_negatives"].append(classification(scale * text[n, slots] @ image[n], exists[n]))
            found["local_hard_negatives"].append(classification(np.array([score(n, c) for c in slots]), exists[n]))
    for name, losses in found.items():
        np.testing.assert_allclose(parts[name], np.mean(losses), rtol=2e-5, err_msg=name)


def test_a_batch_without_negatives_counts_for_nothing(sides):
    """The reference divides by the number of rows, 0. Here CLIP's part of the loss goes on alone, and it is counted."""
    leaves, tokens, valid = sides
    none = jnp.asarray(valid).at[:, CAPTIONS:].set(False)
    equal = jnp.ones_like(leaves["image_tokens"])  # patches that are all alike divide 0 by 0 in the reference

    def loss(leaves, valid):
        features = Features(
            ImageFeatures(leaves["image_features"], leaves["image_tokens"]),
            TextFeatures(leaves["text_features"], leaves["text_tokens"], None),
            leaves["logit_scale"],
            slots=SLOTS,
        )
        config = {name: ALL[name] for name in ("global_hard_negatives", "local_hard_negatives")}
        batch = {"texts": packing.padded(tokens), "valid": valid}
        return objectives.weighted_sum(config, features, batch, jax.random.key(0))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, parts), grads = step(leaves, none)
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))
    for name in ("global_hard_negatives", "local_hard_negatives"):
        assert (parts[f"{name}/rows"], parts[f"{name}/missing"]) == (0, IMAGES * KINDS)
    (value, _), grads = step(leaves | {"image_tokens": equal}, jnp.asarray(valid))
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_weights_of_patches_that_are_all_alike_are_even():
    for weights in ("minmax", "sparse", "softmax"):
        found = hard_negatives.patch_weights(jnp.array([[2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 10.0]]), weights)
        np.testing.assert_allclose(found[0], 0.25)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    found = hard_negatives.patch_weights(jnp.array([0.0, 1.0, 5.0, 10.0]), "sparse")
    np.testing.assert_allclose(found, [0, 0, 1 / 3, 2 / 3], rtol=1e-6)


def test_other_objectives_see_the_captions_alone(sides):
    leaves = sides[0]
    pooled = leaves["text_features"].reshape(IMAGES, -1, WIDTH)
    image = ImageFeatures(leaves["image_features"], None)
    common = dict(logit_scale=leaves["logit_scale"], logit_bias=jnp.float32(-1.0))
    heads = (2, WIDTH // 2)
    keys = leaves["image_tokens"].reshape(IMAGES, PATCHES, *heads)

    def pooling(texts):
        return PoolingFeatures(texts.reshape(-1, *heads), keys, keys, params=jnp.eye(WIDTH), attend=attend)

    alone = pooled[:, :CAPTIONS].reshape(-1, WIDTH)
    config = {name: dict(weight=1.0) for name in ("softmax", "sigmoid", "text_conditioned")}
    run = jax.jit(lambda features: objectives.weighted_sum(config, features, {}, jax.random.key(1))[1])
    expected = run(Features(image, TextFeatures(alone, None, None), pooling=pooling(alone), **common))
    every = leaves["text_features"]
    found = run(Features(image, TextFeatures(every, None, None), pooling=pooling(every), slots=SLOTS, **common))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    wrong = Features(image, TextFeatures(every, None, None), slots=(("captions", 1), ("negatives", 3)), **common)
    with pytest.raises(ValueError, match="the batch has 5 texts an image; expected those of the slots"):
        objectives.weighted_sum({"softmax": dict(weight=1.0)}, wrong, {}, jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "options", "slots", "message"),
    [
        ("negclip", {}, (), r"objectives\.negclip needs a caption and hard negatives .*data\.negatives\.kinds"),
        ("global_hard_negatives", {"gamma": -1}, SLOTS, r"global_hard_negatives\.gamma is -1"),
        ("global_hard_negatives", {"smoothing": 1.0}, SLOTS, r"global_hard_negatives\.smoothing is 1\.0"),
        ("global_hard_negatives", {"reference_world_size": 3}, SLOTS, r"reference_world_size 3 does not divide .* 8"),
        ("local_hard_negatives", {"weights": "max"}, SLOTS, r"local_hard_negatives\.weights is 'max'; expected one of"),
        ("local_hard_negatives", {}, SLOTS, "needs local features of the texts"),
        ("negclip", {"chunk_size": 3}, SLOTS, r"negclip\.chunk_size 3 does not divide the 8 images"),
        ("softmax", {"reference_world_size": 0}, SLOTS, "reference_world_size is 0"),
    ],
)
def test_what_does_not_fit_is_named(sides, name, options, slots, message):
    leaves, tokens, valid = sides
    text = TextFeatures(leaves["text_features"], None, None)
    features = Features(ImageFeatures(leaves["image_features"], None), text, leaves["logit_scale"], slots=slots)
    with pytest.raises(ValueError, match=message):
        batch = {"valid": valid, "texts": packing.padded(tokens)}
        objectives.weighted_sum({name: dict(weight=1.0, **options)}, features, batch, jax.random.key(0))


def test_local_scores_travel_nowhere_and_chunks_bound_their_memory():
    images, length = 64, 16
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (images * 4, length)).astype(np.int32)
    texts = packing.padded(tokens)

    def compiled(devices, chunk_size):
        mesh = mesh_of(devices)
        split = NamedSharding(mesh, PartitionSpec("data"))

        def shape(*size, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(size, dtype, sharding=split)

        def loss(patches, local, texts):
            image = ImageFeatures(patches[:, 0], patches)
            text = TextFeatures(local[:, 0], local, None)
            features = Features(image, text, jnp.float32(2.0), slots=(("captions", 1), ("negatives", 3)))
            config = {"local_hard_negatives": dict(weight=1.0, chunk_size=chunk_size)}
            return objectives.weighted_sum(config, features, {"texts": texts}, jax.random.key(0))[0]

        given = {key: shape(*x.shape, dtype=x.dtype) for key, x in texts.items()}
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss, (0, 1)))
            return step.lower(shape(images, 49, 32), shape(images * 4, length, 32), given).compile()

    dense, chunked = (compiled(1, size).memory_analysis().temp_size_in_bytes for size in (None, 2))
    assert chunked < dense / 4
    program = compiled(8, 2).as_text()
    found = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program
    )
    assert {shape for shapes, kind in found for shape in sizes_of(shapes)} <= {()}  # sums of losses and of rows
