"""The losses against the original's, on one device and on many, and their laws."""

import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, load_golden, losses, model_section, nhwc
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optional import torch

from flair_jax import models, objectives
from flair_jax.convert import names
from flair_jax.models.dual_encoder import Features, ImageFeatures, PoolingFeatures, TextFeatures
from flair_jax.models.layers import normalize
from flair_jax.models.text import Text
from flair_jax.objectives import text_conditioned


def batch_of(images, tokens, rows):
    """Images (..., 3, H, W), tokens (..., K, T) and rows of the reference, any leading axes, as one global batch."""
    text = Text.padded(tokens.reshape(-1, tokens.shape[-1]))
    return {
        "images": nhwc(images).reshape(-1, *nhwc(images).shape[-3:]),
        "texts": {"tokens": text.tokens, "ends": text.ends},
        "draws": text_conditioned.draws_of_rows(rows.reshape(-1, rows.shape[-1]), tokens.shape[-2]),
    }


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def value_and_grad(model, config, params, batch):
    def loss(params, batch):
        features = model.apply({"params": params}, batch["images"], Text(**batch["texts"]), method="features")
        return objectives.weighted_sum(config, features, batch, jax.random.key(0))[0]

    return jax.jit(jax.value_and_grad(loss))(params, batch)


def values_and_grads(model, configs, params, batch):
    """`value_and_grad` of several objectives in one program.

    Each has a gradient of the features of its own; the way back through the towers is compiled once for all.
    """

    def losses_of(params, batch):
        def features_of(params):
            found = model.apply({"params": params}, batch["images"], Text(**batch["texts"]), method="features")
            return found.replace(text=found.text.replace(mask=None))  # bool has no gradient, and no loss reads it

        features, towers_back = jax.vjp(features_of, params)

        def loss(features, config):
            return objectives.weighted_sum(config, features, batch, jax.random.key(0))[0]

        values, grads = zip(*[jax.value_and_grad(loss)(features, config) for config in configs], strict=True)
        return values, jax.vmap(towers_back)(jax.tree.map(lambda *x: jnp.stack(x), *grads))[0]

    values, grads = jax.device_get(jax.jit(losses_of)(params, batch))
    return values, [jax.tree.map(lambda x, n=n: x[n], grads) for n in range(len(configs))]


def compare_grads(grads, expected, tolerance):
    """Every gradient, within ten times the reference's own round-off or a millionth of the largest gradient."""
    grads = names.to_torch(jax.device_get(grads))
    assert grads.keys() == expected.keys()
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for name, leaf in expected.items():
        atol = max(10 * tolerance[name]["fp32_vs_fp64_maxabs"], 5e-7 * largest, 1e-6)
        np.testing.assert_allclose(grads[name], leaf, atol=atol, rtol=0, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("case", golden_files.parameters("tiny_loss.json", lambda loss: loss["cases"]))
def test_single_process_loss_and_gradients(case, tiny_params):
    golden, inputs = load_golden("tiny_loss.json")["cases"][case], load_golden("tiny_loss_inputs.npz")
    model = models.create(TINY)
    override = {key: np.float32(value) for key, value in (golden["override"] or {}).items()}
    params = {**tiny_params, **override}
    batch = batch_of(inputs["images"], inputs["tokens"], inputs["indices"])
    value, grads = value_and_grad(model, losses(golden["added_mps_loss"]), params, batch)
    np.testing.assert_allclose(value, golden["loss_fp64"], rtol=2e-6)
    if golden["grads"] is not None:  # of every case but one the original's gradients were kept
        compare_grads(grads, load_golden(golden["grads"]), golden["grad_tolerance"])


@pytest.mark.golden
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("world", golden_files.worlds())
def test_loss_of_many_processes_on_any_number_of_devices(world, devices):
    """W processes of the original are W blocks here, on 1, 2, 4 or 8 devices, whole or in chunks."""
    golden = load_golden("tiny_dist.json")
    variants = [(True, None), (True, 1), (False, None)]  # with MPS or without, in chunks or whole
    if world * golden["block_size"] % devices:
        pytest.skip(f"{world} blocks of {golden['block_size']} images on {devices} devices")
    inputs = load_golden(f"tiny_dist_inputs_ws{world}.npz")
    indices = load_golden(f"tiny_dist_indices_ws{world}.npz")["combined_indices"]
    section = model_section(golden["model_cfg"])
    configs = [losses(mps, block_size=golden["block_size"], chunk_size=chunk_size) for mps, chunk_size in variants]
    model = models.create(section)
    params = names.to_flax(load_golden("tiny_dist.safetensors"), config=section)
    batch = batch_of(inputs["images"], inputs["tokens"], indices)

    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        draws, params = jax.device_put((batch.pop("draws"), params), NamedSharding(mesh, PartitionSpec()))
        batch = {**jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))), "draws": draws}
        values, grads = values_and_grads(model, configs, params, batch)
    for (mps, _), value, grad in zip(variants, values, grads, strict=True):
        case = f"ws{world}_{'mps' if mps else 'nomps'}"
        np.testing.assert_allclose(value, golden[case]["loss"], rtol=2e-6)
        compare_grads(grad, load_golden(f"tiny_dist_grads_{case}.safetensors"), golden[case]["grad_tolerance"])


def test_a_draw_is_even_and_depends_on_its_two_images_alone():
    rng = jax.random.key(3)
    draws = np.asarray(text_conditioned.draw_captions(rng, jnp.arange(4), jnp.arange(3000), captions=3))
    assert draws.shape == (4, 3000) and draws.min() == 0 and draws.max() == 2
    again = text_conditioned.draw_captions(rng, jnp.array([3, 1]), jnp.arange(2990, 3000), captions=3)
    np.testing.assert_array_equal(again, draws[[3, 1], 2990:])
    # Pairs of draws of two places are even too, and so are those of neighbours: four standard errors.
    pairs = np.bincount(draws[0] * 3 + draws[1], minlength=9), np.bincount(draws[0, 1:] * 3 + draws[0, :-1])
    np.testing.assert_allclose(np.divide(pairs, 3000), 1 / 9, atol=0.023)
    assert np.mean(draws != text_conditioned.draw_captions(jax.random.key(4), jnp.arange(4), jnp.arange(3000), 3)) > 0.6


@pytest.mark.golden
@pytest.mark.parametrize("world", golden_files.worlds())
def test_rows_of_the_reference_are_draws(world):
    indices = load_golden(f"tiny_dist_indices_ws{world}.npz")["combined_indices"]  # (W, B, K + B - 1)
    block, rows = indices.shape[1], indices.reshape(-1, indices.shape[-1])
    per_image = rows.shape[1] - block + 1
    draws = np.asarray(text_conditioned.draws_of_rows(rows, per_image))
    assert draws.shape == (block, len(rows))
    for n, row in enumerate(rows):
        place, rank = n % block, n // block
        own = set(range(place * per_image, (place + 1) * per_image))
        drawn = {other * per_image + draws[place, rank * block + other] for other in range(block) if other != place}
        assert own | drawn == set(row.tolist())


def random_sides(images, captions, width=16, heads=2, keys=5):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    image = (
        normal(images, width),
        normal(images, keys, heads, width // heads),
        normal(images, keys, heads, width // heads),
    )
    return image, (normal(images * captions, width), normal(images * captions, heads, width // heads))


def attend(params, queries, keys, values):
    pooled = jax.nn.dot_product_attention(queries, keys, values)
    return pooled.reshape(*pooled.shape[:2], -1) @ params


def flair_loss(image, text, weight, scale, bias, *, rng, **options):
    """FLAIR's loss of (pooled, keys, values) and (pooled, queries), pooled by `attend` with this weight."""
    pooling = PoolingFeatures(text[1], *image[1:], params=weight, attend=attend)
    features = Features(ImageFeatures(image[0], None), TextFeatures(text[0], None, None), scale, bias, pooling)
    return objectives.weighted_sum(losses(**options), features, {}, rng)


def test_loss_equals_its_definition_term_by_term():
    """The docstring's double sums, written out with loops in float64."""
    images, captions, block = 6, 2, 3
    image, text = random_sides(images, captions)
    weight = jnp.eye(16)
    chosen = np.asarray(
        text_conditioned.draw_captions(jax.random.key(0), jnp.arange(block), jnp.arange(images), captions)
    )
    scale, bias = 1.3, -0.7
    value, parts = flair_loss(image, text, weight, scale, bias, rng=jax.random.key(0), block_size=block, chunk_size=2)

    def unit(x):
        x = np.asarray(x, np.float64)
        return x / np.linalg.norm(x)

    def cost(cosine, positive):
        z = np.exp(scale) * cosine + bias
        return np.logaddexp(0, -z if positive else z)

    tcs, mps, logits = 0.0, 0.0, {True: [], False: []}
    for n in range(images):
        for m in range(images):
            same = m % block == n % block
            for caption in range(captions) if same else [chosen[n % block, m]]:
                t = m * captions + caption
                pooled = attend(weight, text[1][None, t][None], image[1][n][None], image[2][n][None])
                cosine, own = unit(pooled[0, 0]) @ unit(text[0][t]), t // captions == n
                tcs += cost(cosine, own)
                logits[own].append(np.exp(scale) * cosine + bias)
        for t in range(images * captions):
            mps += cost(unit(image[0][n]) @ unit(text[0][t]), t // captions == n)
    tcs /= (images // block) * (block + captions - 1)
    mps /= images * captions
    np.testing.assert_allclose(
        [parts["text_conditioned"], parts["sigmoid"], value], [tcs, mps, (tcs + mps) / 2], rtol=1e-5
    )
    means = np.mean(logits[True]), np.mean(logits[False])
    np.testing.assert_allclose(
        [parts[f"text_conditioned/{kind}_logit"] for kind in ("positive", "negative")], means, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("images", "block", "devices"),
    [(24, 4, 2), (24, None, 8), (24, 12, 8), (24, 6, 8), (24, 4, 4), (24, 8, 4), (24, 1, 8), (8, 8, 8)],
)
def test_blocks_and_shards_of_any_sizes(images, block, devices):
    """Shards hold whole blocks, parts of one, or the end of one and the beginning of the next."""
    image, text = random_sides(images, captions=3)

    def loss(image, text, weight, scale):
        return flair_loss(image, text, weight, scale, -0.7, rng=jax.random.key(5), block_size=block)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    weight, scale = jnp.eye(16) + 0.1, jnp.float32(1.3)
    expected = step(image, text, weight, scale)
    many = mesh_of(devices)
    with jax.set_mesh(many):
        found = step(*jax.device_put((image, text), NamedSharding(many, PartitionSpec("data"))), weight, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def compiled_loss(mesh, images, chunk_size):
    """The gradient's program, from 4 captions of 64 numbers an image."""
    shapes = jax.eval_shape(lambda: random_sides(images, 4, 64, 8, keys=17))
    split = NamedSharding(mesh, PartitionSpec("data"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes)

    def loss(image, text, weight):
        return flair_loss(image, text, weight, 1.0, -1.0, rng=jax.random.key(0), block_size=32, chunk_size=chunk_size)[
            0
        ]

    with jax.set_mesh(mesh):
        weight = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, weight).compile()


def test_chunks_bound_the_memory():
    dense, chunked = (compiled_loss(mesh_of(1), 256, chunk).memory_analysis().temp_size_in_bytes for chunk in (None, 4))
    assert chunked < dense / 8


def test_no_device_holds_the_texts_of_the_others():
    """Texts and their gradients go from device to device, sums to all, and that is all that travels."""
    program = compiled_loss(mesh_of(8), 256, 4).as_text()
    texts = 256 * 4 * 64  # numbers in a feature of all
    assert max(np.prod(size) for size in sizes_of(program)) < texts
    found = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program
    )
    permuted = {shape for shapes, kind in found if kind == "collective-permute" for shape in sizes_of(shapes)}
    assert {kind for _, kind in found} == {"collective-permute", "all-reduce"}
    assert permuted == {(128, 64), (128, 8, 8)}
    # The gradient of the weight, and scalars.
    assert {shape for shapes, kind in found if kind == "all-reduce" for shape in sizes_of(shapes)} <= {(64, 64), ()}


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_gradients_of_pairs_are_summed_in_float32(chunk_size):
    """A text has pairs with all images; summed in bfloat16 its gradient would be off by over a hundredth."""
    sides = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_sides(256, captions=2))

    def gradient(sides):
        def loss(sides):
            options = dict(rng=jax.random.key(5), block_size=32, chunk_size=chunk_size)
            return flair_loss(*sides, jnp.eye(16), 1.3, -0.7, **options)[0]

        return jax.jit(jax.grad(loss))(sides)

    exact = gradient(jax.tree.map(lambda x: x.astype(jnp.float32), sides))
    for a, b in zip(jax.tree.leaves(gradient(sides)), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.005 * jnp.linalg.norm(b)


def sizes_of(shapes):
    """The sizes in a type of a compiled program."""
    return [tuple(int(n) for n in size.split(",") if n) for size in re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", shapes)]


@pytest.mark.parametrize("options", [dict(block_size=5), dict(chunk_size=3)])
def test_impossible_splits_are_refused_by_name(options):
    image, text = random_sides(4, 2)
    with pytest.raises(ValueError, match=next(iter(options))):
        flair_loss(image, text, jnp.eye(16), 1.0, 0.0, rng=jax.random.key(0), **options)


def test_normalize_is_finite_at_zero():
    np.testing.assert_array_equal(jax.grad(lambda x: normalize(x).sum())(jnp.zeros(3)) < np.inf, True)
    np.testing.assert_allclose(normalize(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)


def dense_torch_loss(name, image, text, scale, bias):
    """Value and gradients of CLIP's or SigLIP's loss of pooled features, all pairs at once, in float64."""
    leaves = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (image, text, scale, bias)]
    image, text, scale, bias = leaves
    captions = len(text) // len(image)
    unit = torch.nn.functional.normalize
    if name == "softmax":
        logits = scale.exp() * unit(image, dim=-1) @ unit(text[::captions], dim=-1).T
        own = torch.arange(len(image))
        value = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    else:
        logits = scale.exp() * unit(image, dim=-1) @ unit(text, dim=-1).T + bias
        own = torch.arange(len(text)) // captions == torch.arange(len(image))[:, None]
        value = -torch.nn.functional.logsigmoid(torch.where(own, logits, -logits)).sum() / len(text)
    value.backward()
    return value.item(), [0.0 if x.grad is None else x.grad.numpy() for x in leaves]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("name", "captions"), [("softmax", 1), ("softmax", 3), ("sigmoid", 1), ("sigmoid", 3)])
def test_global_objectives_equal_a_dense_computation(name, captions, chunk_size, devices):
    rng = np.random.default_rng(1)
    image, text = (jnp.asarray(rng.normal(size=(16 * n, 24)), jnp.float32) for n in (1, captions))
    scale, bias = jnp.float32(2.3), jnp.float32(-1.7)
    expected, expected_grads = dense_torch_loss(name, image, text, scale, bias)

    def loss(image, text, scale, bias):
        features = Features(ImageFeatures(image, None), TextFeatures(text, None, None), scale, bias)
        config = {name: dict(weight=1.0, chunk_size=chunk_size)}
        return objectives.weighted_sum(config, features, {}, jax.random.key(0))[0]

    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        sides = jax.device_put((image, text), NamedSharding(mesh, PartitionSpec("data")))
        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*sides, scale, bias)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_no_device_holds_the_logits_of_all_pairs(name):
    shape = jax.ShapeDtypeStruct((512, 8), jnp.float32, sharding=NamedSharding(mesh_of(8), PartitionSpec("data")))

    def loss(image, text):
        features = Features(ImageFeatures(image, None), TextFeatures(text, None, None), jnp.float32(1), jnp.float32(0))
        config = {name: dict(weight=1.0, chunk_size=8)}
        return objectives.weighted_sum(config, features, {}, jax.random.key(0))[0]

    with jax.set_mesh(mesh_of(8)):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(shape, shape).compile().as_text()
    assert max(np.prod(size) for size in sizes_of(program)) <= 512 * 8  # rows of a chunk by texts of a device: 8 * 64


def test_a_weight_of_zero_leaves_an_objective_out():
    sides = random_sides(4, 2)
    both = flair_loss(*sides, jnp.eye(16), 1.3, -0.7, rng=jax.random.key(0))[1]
    value, parts = flair_loss(*sides, jnp.eye(16), 1.3, -0.7, rng=jax.random.key(0), mps=False)
    assert "sigmoid" in both and "sigmoid" not in parts
    np.testing.assert_allclose(value, both["text_conditioned"], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"contrast": {"weight": 1.0}}, r"config\.objectives\.contrast is unknown; there are .*softmax"),
        ({"softmax": {"weight": -1.0}}, r"config\.objectives\.softmax\.weight is -1\.0"),
        ({"softmax": {"weight": 0.0}}, "no objective a weight"),
        ({"softmax": {"weight": 1.0, "caption": 2}}, r"config\.objectives\.softmax\.caption is 2; there are 2"),
        ({"text_conditioned": {"weight": 1.0}}, r"text_conditioned needs config\.model\.pooling"),
        ({"sigmoid": {"weight": 1.0}}, "sigmoid needs a bias"),
    ],
)
def test_what_an_objective_needs_is_named(config, message):
    features = Features(
        ImageFeatures(jnp.ones((2, 4)), None), TextFeatures(jnp.ones((4, 4)), None, None), jnp.zeros(())
    )
    with pytest.raises(ValueError, match=message):
        objectives.weighted_sum(config, features, {}, jax.random.key(0))


@pytest.mark.parametrize("words, options", [
    ("text_conditioned.block_size 5 does not divide the batch of 16 images", dict(text_conditioned=dict(block_size=5))),
    ("boxes.group_size is 0; expected a whole number", dict(boxes=dict(group_size=0))),
    ("region_descriptions.group_size 32 does not divide", dict(region_descriptions=dict(group_size=32))),
    ("softmax.reference_world_size is 2.0; expected a whole number", dict(softmax=dict(reference_world_size=2.0))),
    (r"unknown options \['colour'\] of config.objectives.sigmoid", dict(sigmoid=dict(colour=1))),
])  # fmt: skip
def test_wrong_options_are_known_before_anything_is_made_ready(words, options):
    def section(extra):
        return {name: dict(weight=1.0, **more) for name, more in extra.items()}

    objectives.check(section(dict(boxes=dict(group_size=4), text_conditioned=dict(block_size=None))), 16)
    with pytest.raises(ValueError, match=words):
        objectives.check(section(options), 16)
    without_weight = {name: {**more, "weight": 0.0} for name, more in section(options).items()}
    objectives.check({**without_weight, "negclip": dict(weight=1.0)}, 16)
