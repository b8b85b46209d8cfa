"""GRAIN against the numbers of its own code: model, losses, gradients, matching, optimizer, names."""

import functools
import itertools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_golden, nhwc
from jax.sharding import NamedSharding, PartitionSpec
from test_objectives import mesh_of

from flair_jax import boxes, models, objectives, optimizer, state, step
from flair_jax.configs import grain_cc3m, grain_recipe, variants
from flair_jax.convert import flax_files, names
from flair_jax.data.transforms import base, packing, regions
from flair_jax.models.dual_encoder import Features, ImageFeatures, TextFeatures
from flair_jax.models.text import Text

pytestmark = pytest.mark.filterwarnings("ignore:left out, for GRAIN's losses")
LOSSES = ("softmax", "boxes", "region_descriptions")
GOLDEN_LOSSES = ("clip", "box", "word")
# Zero in exact arithmetic: attention does not see a shift of all keys, and the first layer has equal values.
NO_GRADIENT = ("k_norm.bias",)


def section():
    """The `model` section of the golden files' sizes."""
    sizes, model = load_golden("grain/config.json"), variants.grain().to_dict()
    model["embed_dim"] = sizes["embed"]
    model["vision"] |= dict(
        image_size=sizes["img_size"],
        patch_size=sizes["patch"],
        width=sizes["vw"],
        depth=sizes["vdepth"],
        heads=sizes["vheads"],
    )
    model["text"] |= dict(
        context_length=sizes["ctx"],
        vocab_size=sizes["vocab"],
        width=sizes["tw"],
        depth=sizes["tlayers"],
        heads=sizes["theads"],
    )
    model["decoder"] |= dict(
        width=sizes["dw"],
        depth=sizes["dlayers"],
        heads=sizes["dheads"],
        hidden=sizes["dff"],
        regions=sizes["num_queries"],
        dropout=0.0,
    )
    return model


@functools.cache
def golden_model():
    return models.create(section())


@functools.cache
def golden_params():
    return names.to_flax(load_golden("grain/params.safetensors"), "grain", section())


def batch_of(arrays, prefix="in."):
    """A batch as the loader makes it: padded texts, and the boxes in the form of `transforms.regions`."""
    frame = load_golden("grain/config.json")["box_frame"]
    given, available = arrays[f"{prefix}boxes"], arrays[f"{prefix}avail"].astype(bool)
    found = [[regions.Region(tuple(box / frame), "") for box in image] for image in given]
    centres, valid = zip(
        *(regions.arrays([seen(region) for region in image], given.shape[1]) for image in found), strict=True
    )
    tokens = np.concatenate([arrays[f"{prefix}text"][:, None], arrays[f"{prefix}desc"]], axis=1)
    text = Text.padded(jnp.asarray(tokens.reshape(-1, tokens.shape[-1]), jnp.int32))
    return {
        "images": nhwc(arrays[f"{prefix}images"]),
        "texts": {"tokens": text.tokens, "ends": text.ends},
        "valid": np.pad(available, ((0, 0), (1, 0)), constant_values=True),
        base.BOXES: np.stack(centres),
        base.BOXES_VALID: np.stack(valid),
    }


def seen(region):
    return regions.see(region, regions.View(1, regions.WHOLE, False), 0.0)


def slots_of(batch):
    return ((base.CAPTIONS, 1), (base.DESCRIPTIONS, batch[base.BOXES].shape[1]))


def losses(params, batch, group_size=None, text=None, **options):
    """The three losses, unweighted, float32 (3,)."""
    model = golden_model()
    features = model.apply(
        {"params": params}, batch["images"], text or Text(**batch["texts"]), method="features"
    ).replace(slots=slots_of(batch))
    config = {name: {"weight": 1.0} for name in LOSSES}
    for name in LOSSES[1:]:
        config[name] |= {"group_size": group_size}
    config["boxes"] |= options
    _, parts = objectives.weighted_sum(config, features, batch, jax.random.key(0))
    return jnp.stack([parts[name] for name in LOSSES])


@functools.cache
def values_and_gradients(group_size=None):
    """Of the golden batch: values (3,) and, by loss, gradients by the reference's names."""
    batch = batch_of(load_golden("grain/forward.safetensors"))

    @jax.jit
    def run(params):
        value, pull = jax.vjp(lambda params: losses(params, batch, group_size), params)
        return value, jax.vmap(lambda weights: pull(weights)[0])(jnp.eye(3))

    value, grads = run(golden_params())
    return np.asarray(value), [names.to_torch(one, "grain") for one in unstacked(grads)]


def unstacked(tree):
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    return [structure.unflatten(part) for part in zip(*leaves, strict=True)]


def assert_gradients(found, expected):
    for name, array in expected.items():
        if not name.endswith(NO_GRADIENT):
            limit = 1e-4 * max(np.abs(array).max(), 1e-7)
            np.testing.assert_allclose(found[name], array, rtol=0, atol=limit, err_msg=name)
    for name in found.keys() - expected.keys():
        assert not np.any(found[name]), f"{name} has a gradient"


@pytest.mark.golden
def test_forward():
    golden = load_golden("grain/forward.safetensors")
    batch = batch_of(golden)

    @jax.jit
    def run(params):
        apply = functools.partial(golden_model().apply, {"params": params})
        features = apply(batch["images"], Text(**batch["texts"]), method="features")
        return features, apply(batch["images"], attention=True, method="encode_image").attention

    features, attention = run(golden_params())
    text = features.text.pooled.reshape(len(batch["images"]), -1, features.text.pooled.shape[-1])
    expected = {
        "out.img_embed": features.image.pooled,
        "out.obj_embeds": features.image.regions,
        "out.pred_boxes_per_layer": features.image.layer_boxes,
        "out.pred_boxes": features.image.boxes,
        "out.text_embed": text[:, 0],
        "out.desc_embed": text[:, 1:][batch["valid"][:, 1:]],
        "out.logit_scale": jnp.exp(features.logit_scale),
    }
    for name, array in expected.items():
        np.testing.assert_allclose(array, golden[name], rtol=0, atol=2e-5, err_msg=name)
    assert features.image.local is None
    queries, tokens = golden["out.decoder_hidden"].shape[2], golden["out.vision_tokens"].shape[1]
    decoder = section()["decoder"]
    assert attention.shape == (len(text), decoder["depth"], queries, decoder["heads"], tokens)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)


@pytest.mark.golden
def test_losses():
    golden = load_golden("grain/forward.safetensors")
    value, _ = values_and_gradients()
    np.testing.assert_allclose(value, [golden[f"loss.{name}"] for name in GOLDEN_LOSSES], rtol=0, atol=1e-5)
    np.testing.assert_allclose(value.sum(), golden["loss.total"], rtol=0, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("loss", [*GOLDEN_LOSSES, "total"])
def test_gradients(loss):
    _, grads = values_and_gradients()
    found = grads[GOLDEN_LOSSES.index(loss)] if loss != "total" else {k: sum(g[k] for g in grads) for k in grads[0]}
    assert_gradients(found, load_golden(f"grain/grads_{loss}.safetensors"))


@pytest.mark.golden
def test_groups_are_the_processes_of_the_reference():
    golden = load_golden("grain/two_ranks.safetensors")
    ranks = sum(name.startswith("rank") and name.endswith(".loss_total") for name in golden)
    size = len(load_golden("grain/forward.safetensors")["in.images"]) // ranks
    value, grads = values_and_gradients(size)
    np.testing.assert_allclose(value, [golden[f"mean.loss_{name}"] for name in GOLDEN_LOSSES], rtol=0, atol=1e-5)
    expected = {name.removeprefix("grad_total."): x for name, x in golden.items() if name.startswith("grad_total.")}
    assert_gradients({k: sum(g[k] for g in grads) for k in grads[0]}, expected)


@pytest.mark.golden
def test_packed_texts_give_the_same_losses():
    batch = batch_of(load_golden("grain/forward.safetensors"))
    tokens = np.array(batch["texts"]["tokens"])
    length = tokens.shape[1]
    tokens[~batch["valid"].reshape(-1), :2] = tokens[0, 0], tokens.max()  # no text is an empty text
    packed = packing.Packer(2 * length, (len(tokens),))(tokens)
    value = jax.jit(lambda params: losses(params, batch, text=Text(**packed.texts)))(golden_params())
    np.testing.assert_allclose(value, values_and_gradients()[0], rtol=0, atol=1e-5)


@pytest.mark.golden
def test_a_box_without_area_does_not_shift_the_labels():
    """The reference counts descriptions by boxes that are left, and names the wrong one (spec/grain.md 2.6)."""
    golden = load_golden("grain/degenerate_box.safetensors")
    batch = batch_of(golden)
    assert not batch[base.BOXES_VALID][0, 1] and batch["valid"][0, 2]
    value = jax.jit(losses)(golden_params(), batch)
    np.testing.assert_allclose(value[:2], [golden["ref.loss_clip"], golden["ref.loss_box"]], rtol=0, atol=1e-5)

    features = jax.jit(functools.partial(golden_model().apply, method="features"))(
        {"params": golden_params()}, batch["images"], Text(**batch["texts"])
    )

    def cross_entropy(labels):
        unit = [
            np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
            for x in (features.image.regions, features.text.pooled)
        ]
        described = unit[1].reshape(len(batch["valid"]), -1, unit[1].shape[-1])[:, 1:][batch["valid"][:, 1:]]
        image, query = golden["ref.matched_image_query"].T
        logits = np.exp(features.logit_scale) * unit[0][image, query] @ described.T
        return np.mean(jax.nn.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels])

    np.testing.assert_allclose(cross_entropy(golden["ref.word_labels"]), golden["ref.loss_word"], rtol=1e-5)
    own = np.cumsum(np.pad(batch["valid"][:, 1:].sum(1), (1, 0)))[:-1, None] + np.arange(batch["valid"].shape[1] - 1)
    right = own[batch[base.BOXES_VALID] & batch["valid"][:, 1:]]
    # Pairs of an image stand in the reference by query; ours by box.
    order = np.lexsort((golden["ref.word_labels"], golden["ref.matched_image_query"][:, 0]))
    labels = np.empty(len(right), int)
    labels[order] = right
    np.testing.assert_allclose(value[2], cross_entropy(labels), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


@pytest.mark.golden
def test_geometry():
    golden = load_golden("grain/boxes.safetensors")
    for side in "ab":
        np.testing.assert_allclose(boxes.corners(golden[f"{side}.cxcywh"]), golden[f"{side}.xyxy"], atol=1e-6)
    np.testing.assert_allclose(boxes.centres(golden["a.xyxy"]), golden["back.cxcywh"], atol=1e-6)
    iou, giou = boxes.overlap(golden["a.xyxy"][:, None], golden["b.xyxy"])
    np.testing.assert_allclose(iou, golden["iou"], atol=1e-6)
    np.testing.assert_allclose(giou, golden["giou"], atol=1e-6)
    distance = np.abs(golden["a.cxcywh"][:, None] - golden["b.cxcywh"]).sum(-1)
    np.testing.assert_allclose(distance, golden["l1_cdist"], atol=1e-6)
    assert boxes.overlap(np.zeros(4), np.zeros(4))[1] == 0  # no box: finite


@pytest.mark.golden
def test_targets_are_clipped_and_those_without_area_are_none():
    golden = load_golden("grain/boxes.safetensors")
    for raw, targets, count in zip(
        golden["prep.raw_xyxy_224"], golden["prep.targets_cxcywh"], golden["prep.num"], strict=True
    ):
        found, valid = regions.arrays([seen(regions.Region(tuple(box / 224), "")) for box in raw], len(raw))
        np.testing.assert_allclose(found[valid], targets[:count], atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("match", [boxes.match_all_ways, boxes.match_hungarian])
def test_matching_is_exact(match):
    golden = load_golden("grain/boxes.safetensors")
    valid = np.arange(golden["assign.cost"].shape[2]) < golden["assign.num_targets"][:, None]
    query, matched = jax.jit(match)(golden["assign.cost"], valid)
    np.testing.assert_array_equal(np.where(matched, query, -1), golden["assign.query_of_target"])


@pytest.mark.parametrize(("queries", "targets"), [(3, 5), (7, 6)])
def test_matching_of_more_boxes_or_ways(queries, targets):
    """More boxes than queries: the cheapest are matched. Many ways: the Hungarian algorithm, against all of them."""
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(4, queries, targets)).astype(np.float32)
    valid = rng.random((4, targets)) < 0.7
    query, matched = map(np.asarray, jax.jit(boxes.match)(cost, valid))
    assert not (matched & ~valid).any()
    for image in range(len(cost)):
        there = np.flatnonzero(valid[image])
        pairs = min(queries, len(there))
        assert matched[image].sum() == pairs == len(set(query[image][matched[image]]))
        best = min(
            sum(cost[image, q, t] for q, t in zip(some, own, strict=True))
            for own in itertools.combinations(there, pairs)
            for some in itertools.permutations(range(queries), pairs)
        )
        found = cost[image, query[image], np.arange(targets)][matched[image]].sum()
        np.testing.assert_allclose(found, best, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives on made-up features


def made_up(images=16, queries=5, targets=4, width=12, seed=0):
    """Features and batch in which texts repeat, boxes are missing and one image in four has none."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def random_boxes(*shape):
        size = rng.uniform(0.1, 0.5, (*shape, 2))
        return np.concatenate([rng.uniform(size / 2, 1 - size / 2), size], -1).astype(np.float32)

    valid = rng.random((images, targets)) < 0.7
    valid[::4] = False
    exist = valid | (rng.random((images, targets)) < 0.2)
    batch = {
        "valid": np.pad(exist, ((0, 0), (1, 0)), constant_values=True),
        base.BOXES: random_boxes(images, targets) * valid[..., None],
        base.BOXES_VALID: valid,
        base.DESCRIPTION_IDS: rng.integers(0, 9, (images, targets)).astype(np.int32),
    }
    features = Features(
        ImageFeatures(
            normal(images, width), None, normal(images, queries, width), jnp.asarray(random_boxes(images, queries))
        ),
        TextFeatures(normal(images * (1 + targets), width), None, None),
        jnp.float32(2.0),
        slots=((base.CAPTIONS, 1), (base.DESCRIPTIONS, targets)),
    )
    return features, batch


def dense_descriptions(features, batch, group_size, mask_duplicates, both_directions):
    """The loss in a loop over groups, NumPy."""
    unit = [
        np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
        for x in (features.image.regions, features.text.pooled)
    ]
    images, targets = batch[base.BOXES_VALID].shape
    described = unit[1].reshape(images, 1 + targets, -1)[:, 1:]
    query, matched = map(
        np.asarray, boxes.match_boxes(features.image.boxes, batch[base.BOXES], batch[base.BOXES_VALID])
    )
    exist, ids, means = batch["valid"][:, 1:], batch[base.DESCRIPTION_IDS], []
    for first in range(0, images, group_size):
        own = [(i, t) for i in range(first, first + group_size) for t in range(targets)]
        texts = [(i, t) for i, t in own if exist[i, t]]
        pairs = [(i, t) for i, t in texts if matched[i, t]]
        logit = {
            (pair, text): np.exp(2.0) * unit[0][pair[0], query[pair]] @ described[text]
            for pair in pairs
            for text in texts
        }
        differ = {(a, b): a == b or not mask_duplicates or ids[a] != ids[b] for a in texts for b in texts}
        rows = []
        for pair in pairs:
            row = np.log(sum(np.exp(logit[pair, text]) for text in texts if differ[pair, text])) - logit[pair, pair]
            if both_directions:
                back = np.log(sum(np.exp(logit[other, pair]) for other in pairs if differ[other, pair]))
                row = (row + back - logit[pair, pair]) / 2
            rows.append(row)
        means.append(np.mean(rows) if rows else 0.0)
    return np.mean(means)


@pytest.mark.parametrize("mask_duplicates", [False, True])
@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize("group_size", [16, 4])
def test_description_options(group_size, mask_duplicates, both_directions):
    features, batch = made_up()
    options = dict(mask_duplicates=mask_duplicates, both_directions=both_directions)
    run = jax.jit(
        functools.partial(objectives.regions.descriptions, batch=batch, rng=None, group_size=group_size, **options)
    )
    expected = dense_descriptions(features, batch, group_size, mask_duplicates, both_directions)
    np.testing.assert_allclose(run(features)[0], expected, rtol=1e-5)


def test_losses_of_all_layers_are_their_sum():
    features, batch = made_up()
    layers = [features.image.boxes, made_up(seed=1)[0].image.boxes]
    image = features.image.replace(layer_boxes=jnp.stack(layers))
    value, _ = objectives.regions.boxes(features.replace(image=image), batch, None, every_layer=True)
    single = [
        objectives.regions.boxes(features.replace(image=image.replace(boxes=one)), batch, None)[0] for one in layers
    ]
    np.testing.assert_allclose(value, sum(single), rtol=1e-6)


def test_without_any_box_losses_and_gradients_are_zero():
    features, batch = made_up()
    batch[base.BOXES_VALID] = np.zeros_like(batch[base.BOXES_VALID])
    batch[base.BOXES] = np.zeros_like(batch[base.BOXES])

    def total(image):
        of = features.replace(image=image)
        return objectives.regions.boxes(of, batch, None)[0] + objectives.regions.descriptions(of, batch, None)[0]

    value, grads = jax.jit(jax.value_and_grad(total))(features.image)
    assert value == 0 and all(not np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 4])
def test_any_number_of_devices(devices, group_size):
    features, batch = made_up()

    def total(arrays, batch):
        image, text = arrays
        of = features.replace(image=image, text=text)
        options = dict(group_size=group_size)
        return (
            objectives.regions.boxes(of, batch, None, **options)[0]
            + objectives.regions.descriptions(of, batch, None, **options)[0]
        )

    expected = jax.jit(jax.value_and_grad(total))((features.image, features.text), batch)
    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("data"))
        found = jax.jit(jax.value_and_grad(total))(
            jax.device_put((features.image, features.text), split), jax.device_put(batch, split)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_errors_name_the_option():
    features, batch = made_up()
    with pytest.raises(ValueError, match=r"boxes.group_size 5 does not divide the batch of 16"):
        objectives.regions.boxes(features, batch, None, group_size=5)
    with pytest.raises(ValueError, match=r"set config.data.regions.count"):
        objectives.regions.boxes(features, {}, None)
    without = features.replace(image=features.image.replace(boxes=None))
    with pytest.raises(ValueError, match=r"config.model.decoder is None"):
        objectives.regions.descriptions(without, batch, None)
    with pytest.raises(ValueError, match=r"a description for each of the 4 boxes"):
        objectives.regions.descriptions(features.replace(slots=((base.CAPTIONS, 5),)), batch, None)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def grain_optimizer():
    return optimizer.create(total_steps=9, **grain_cc3m.get_config().optimizer)


@pytest.mark.golden
def test_four_steps_of_the_recipe():
    """AdamW with the recipe's rules against the reference's parameter groups."""
    golden, sizes = load_golden("grain/train_steps.safetensors"), load_golden("grain/config.json")
    rates, rules = golden["lr"], grain_optimizer().rules
    steps = len(rates)
    b1, b2 = sizes["betas"]
    tx = optax.adamw(
        lambda count: jnp.asarray(rates, jnp.float32)[count],
        *(b1, b2, sizes["eps"]),
        weight_decay=sizes["weight_decay"],
        mask=rules.decay,
    )
    made = optimizer.Optimizer(tx, rules)
    params = golden_params()
    current = state.TrainState(jnp.int32(0), params, made.init(params))
    batches = [batch_of(golden, f"step{i}.in.") for i in range(steps)]
    config = {name: {"weight": 1.0} for name in LOSSES}
    run = jax.jit(
        functools.partial(
            step.train_step, model=golden_model(), losses=config, optimizer=made, seed=0, slots=slots_of(batches[0])
        )
    )
    for number, batch in enumerate(batches):
        current, found = run(current, batch)
        for ours, theirs in zip(LOSSES, GOLDEN_LOSSES, strict=True):
            np.testing.assert_allclose(found[ours], golden[f"step{number}.loss.{theirs}"], rtol=0, atol=1e-4)
    expected = load_golden(f"grain/params_after_step{steps - 1}.safetensors")
    for name, array in names.to_torch(jax.tree.map(np.asarray, current.params), "grain").items():
        keep = comparable(name, array.shape)
        np.testing.assert_allclose(array[keep], expected[name][keep], rtol=0, atol=2e-5, err_msg=name)


def comparable(name, shape):
    """Entries whose gradient is not zero in exact arithmetic, see the README of the golden files."""
    keep = np.ones(shape, bool)
    third = shape[0] // 3 if shape else 0
    if name.endswith(("in_proj_bias", "attn.qkv.bias")):
        keep[third : 2 * third] = False
    if name.endswith("k_norm.bias"):
        keep[:] = False
    if "decoder.layers.0.self_attn.in_proj" in name:
        keep[: 2 * third] = False
    return keep


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_files.parameters("grain/schedules.safetensors", sorted))
def test_schedules(name):
    rates = load_golden("grain/schedules.safetensors")[name]
    epochs, iterations, warm = (int("".join(filter(str.isdigit, part)) or 0) for part in name.split("_"))
    peak = float(rates.max())
    last = {0.001: 1e-5}.get(peak, 0.0)
    schedule = optimizer.schedule(peak, warm * iterations, epochs * iterations, float(rates[0]), last)
    np.testing.assert_allclose(schedule(np.arange(len(rates))), rates, rtol=1e-5)


@pytest.mark.golden
def test_decay_is_the_references():
    config, made = (
        load_golden("grain/config.json"),
        optimizer.create(total_steps=9, **grain_cc3m.get_config().optimizer),
    )
    decay = made.rules.decay(golden_params())
    ones = jax.tree.map(lambda yes, x: np.full(x.shape, float(yes), np.float32), decay, golden_params())
    for name, array in names.to_torch(ones, "grain").items():
        assert bool(array.all()) == (name in config["decay"]), name
        assert bool(array.any()) == (name not in config["no_decay"]), name


def test_dropout_is_on_in_training_alone():
    options = section()
    options["decoder"]["dropout"] = 0.5
    model = models.create(options)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *model.image_size, 3)).astype(np.float32)
    tokens = Text.padded(jnp.asarray(rng.integers(1, options["text"]["vocab_size"], (2, 8)), jnp.int32))
    apply = jax.jit(
        lambda rngs: model.apply({"params": golden_params()}, image, tokens, method="features", rngs=rngs).image
    )
    plain, first, again, second = (
        apply(rngs).pooled for rngs in ({}, *({"dropout": jax.random.key(key)} for key in (0, 0, 1)))
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    encoded = model.apply({"params": golden_params()}, image, method="encode_image").pooled
    np.testing.assert_allclose(encoded, plain, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, initialisation, names


def abstract(model):
    return jax.eval_shape(lambda: state.init_params(models.create(model.to_dict()), 0))


def test_parameters_of_the_published_sizes():
    def count(params):
        return sum(x.size for x in jax.tree.leaves(params))

    params = abstract(variants.grain())
    assert count(params) == 175_904_005 and count(params["decoder"]) == 26_674_180
    assert count(abstract(variants.laclip())) == 149_623_041


def test_every_tensor_starts_as_in_the_reference():
    """Mean and deviation by the rules of spec/grain.md 1.4, at the published widths."""
    model = variants.grain()
    model.vision.depth = model.decoder.depth = 1
    model.text.update(depth=1, vocab_size=2000)
    params = state.init_params(models.create(model.to_dict()), 0)
    wide, narrow, inner, hidden = 768, 512, 512, 2048

    def linear(fan_in):
        return (1 / 3 / fan_in) ** 0.5

    def xavier(inputs, outputs):
        return (2 / (inputs + outputs)) ** 0.5

    block = {"qkv": linear(wide), "out": linear(wide), "fc": linear(wide), "proj": linear(4 * wide)}
    expected = {
        "vision/class_embedding": 1e-6,
        "vision/position_embedding": 0.02,
        "vision/patch_embedding": linear(3 * 16 * 16),
        **{f"vision/blocks_0/attention/{part}": block[part] for part in ("qkv", "out")},
        **{f"vision/blocks_0/mlp/{part}": block[part] for part in ("fc", "proj")},
        "text/token_embedding": 0.02,
        "text/position_embedding": 0.01,
        "text/blocks_0/attention/qkv/kernel": narrow**-0.5,
        "text/blocks_0/attention/out/kernel": narrow**-0.5 * 2**-0.5,
        "text/blocks_0/mlp/fc/kernel": (2 * narrow) ** -0.5,
        "text/blocks_0/mlp/fc/bias": linear(narrow),
        "text/blocks_0/mlp/proj/kernel": narrow**-0.5 * 2**-0.5,
        "text/blocks_0/mlp/proj/bias": linear(4 * narrow),
        "text_projection": narrow**-0.5,
        "decoder/queries": 1.0,
        "decoder/memory_projection": linear(wide),
        "decoder/layers_0/self_attention/qkv/kernel": xavier(inner, 3 * inner),
        "decoder/layers_0/self_attention/out/kernel": xavier(inner, inner),
        "decoder/layers_0/cross_attention/qkv/kernel": xavier(inner, 3 * inner),
        "decoder/layers_0/cross_attention/out/kernel": xavier(inner, inner),
        "decoder/layers_0/fc/kernel": xavier(inner, hidden),
        "decoder/layers_0/fc/bias": linear(inner),
        "decoder/layers_0/proj/kernel": xavier(inner, hidden),
        "decoder/layers_0/proj/bias": linear(hidden),
        "decoder/box_": linear(inner),
        "decoder/region_projection": inner**-0.5,
        "decoder/image_projection": inner**-0.5,
    }
    seen_rules = set()
    for name, array in flax_files.flatten(params).items():
        if name.endswith("scale"):
            value = 1.0 if name != "logit_scale" else np.log(1 / 0.07)
            np.testing.assert_allclose(array, value, rtol=1e-6, err_msg=name)
            continue
        rule = next((rule for rule in expected if name.startswith(rule)), None)
        deviation = 0.0 if rule is None else expected[rule]
        seen_rules.add(rule)
        if rule is None:
            assert name.endswith("bias") and not np.any(array), name
            continue
        error = deviation / array.size**0.5
        assert abs(float(array.mean())) < 5 * error, name
        assert float(array.std()) == pytest.approx(deviation, rel=5 * array.size**-0.5), name
    assert seen_rules - {None} == set(expected)


@pytest.mark.golden
def test_names_go_both_ways():
    golden, config = load_golden("grain/params.safetensors"), load_golden("grain/config.json")
    back = names.to_torch(golden_params(), "grain")
    assert golden.keys() - back.keys() == set(config["no_gradient"])
    for name, array in back.items():
        np.testing.assert_array_equal(array, golden[name])


@pytest.mark.golden
def test_a_checkpoint_of_the_reference():
    """Two state dicts, DDP's prefix on both; what is dead is said and left out, and what is foreign is refused."""
    golden = load_golden("grain/params.safetensors")

    def half(name):
        found = {key.removeprefix(f"{name}."): x for key, x in golden.items() if key.startswith(f"{name}.")}
        return {f"module.{key}": x for key, x in found.items()}

    checkpoint = {"epoch": 35, "backbone_state_dict": half("backbone"), "state_dict": half("decoder")}
    assert names.recognize(checkpoint).model == "grain"
    with pytest.warns(UserWarning, match=r"decoder\.class_embed\.weight"):
        found = names.to_flax(checkpoint, "grain", section())
    jax.tree.map(np.testing.assert_array_equal, found, golden_params())
    checkpoint["state_dict"]["module.foreign"] = np.zeros(3, np.float32)
    with pytest.raises(names.ConversionError, match=r"unknown decoder\.foreign"):
        names.to_flax(checkpoint, "grain", section())


def test_a_decoder_beside_other_heads_is_kept_in_files(tmp_path):
    """FLAIR's pooling and the query decoder on one tower: written and read as one model."""
    model = section() | dict(name="flair", pooling=dict(heads=2), project_image=True, init_logit_bias=-10.0)
    model["vision"] |= dict(pre_norm=True, patch_bias=False, qk_norm=False, init="open_clip")
    shapes = jax.eval_shape(lambda: state.init_params(models.create(model), 0))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    flax_files.write(tmp_path / "both.safetensors", params, model)
    found, stored = flax_files.load(tmp_path / "both.safetensors")
    assert stored["decoder"]["regions"] == model["decoder"]["regions"]
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_recipes():
    for name, rules in (("grain", grain_recipe.GRAIN_DECAY), ("clip", grain_recipe.CLIP_DECAY)):
        config = grain_cc3m.get_config(name)
        assert config.optimizer.rules == rules
        config.model.vision.depth = config.model.text.depth = 1
        if name == "grain":
            config.model.decoder.depth = 1
        optimizer.create(total_steps=9, **config.optimizer).rules.check(abstract(config.model))  # each pattern matches
    assert set(grain_recipe.RUNS) == {"grain", "clip", "clip_long", "laclip"}
    with pytest.raises(ValueError, match="no run 'flair'"):
        grain_cc3m.get_config("flair")
