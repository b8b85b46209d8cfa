"""The losses against the original's, on one device and on many, and their laws."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, load_golden, model_section, nhwc
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flair_jax import models
from flair_jax.convert import names
from flair_jax.models.text import Text
from flair_jax.objectives import sigmoid

LOSS = load_golden("tiny_loss.json")
DIST = load_golden("tiny_dist.json")


def batch_of(images, tokens, rows):
    """Images (..., 3, H, W), tokens (..., K, T) and rows of the reference, any leading axes, as one global batch."""
    text = Text.padded(tokens.reshape(-1, tokens.shape[-1]))
    return {
        "images": nhwc(images).reshape(-1, *nhwc(images).shape[-3:]),
        "texts": {"tokens": text.tokens, "ends": text.ends},
        "draws": sigmoid.draws_of_rows(rows.reshape(-1, rows.shape[-1]), tokens.shape[-2]),
    }


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def value_and_grad(model, params, batch):
    def loss(params, batch):
        return model.apply({"params": params}, batch, jax.random.key(0), method="loss")[0]

    return jax.jit(jax.value_and_grad(loss))(params, batch)


def compare_grads(grads, expected, tolerance):
    """Every gradient, within ten times the reference's own round-off or a millionth of the largest gradient."""
    grads = names.to_torch(jax.device_get(grads))
    assert grads.keys() == expected.keys()
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for name, leaf in expected.items():
        atol = max(10 * tolerance[name]["fp32_vs_fp64_maxabs"], 5e-7 * largest, 1e-6)
        np.testing.assert_allclose(grads[name], leaf, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", ["init_mps", "init_nomps", "mid_mps", "mid_nomps"])
def test_single_process_loss_and_gradients(case, tiny_params):
    golden, inputs = LOSS["cases"][case], load_golden("tiny_loss_inputs.npz")
    model = models.create(TINY, dict(mps=golden["added_mps_loss"]))
    override = {key: np.float32(value) for key, value in (golden["override"] or {}).items()}
    params = {**tiny_params, **override}
    batch = batch_of(inputs["images"], inputs["tokens"], inputs["indices"])
    value, grads = value_and_grad(model, params, batch)
    np.testing.assert_allclose(value, golden["loss_fp64"], rtol=2e-6)
    if case != "init_nomps":  # the original's gradients of this case were not kept
        expected = load_golden(f"tiny_loss_grads_{case}.safetensors")
        compare_grads(grads, expected, golden["grad_tolerance"])


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("mps", "chunk_size"), [(True, None), (True, 1), (False, None)])
def test_loss_of_many_processes_on_any_number_of_devices(world, mps, devices, chunk_size):
    """W processes of the original are W blocks here, on 1, 2, 4 or 8 devices, whole or in chunks."""
    case = f"ws{world}_{'mps' if mps else 'nomps'}"
    inputs = load_golden(f"tiny_dist_inputs_ws{world}.npz")
    indices = load_golden(f"tiny_dist_indices_ws{world}.npz")["combined_indices"]
    section = model_section(DIST["model_cfg"])
    options = dict(block_size=DIST["block_size"], mps=mps, chunk_size=chunk_size)
    model = models.create(section, options)
    params = names.to_flax(load_golden("tiny_dist.safetensors"), config=section)
    batch = batch_of(inputs["images"], inputs["tokens"], indices)

    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        draws, params = jax.device_put((batch.pop("draws"), params), NamedSharding(mesh, PartitionSpec()))
        batch = {**jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))), "draws": draws}
        value, grads = value_and_grad(model, params, batch)
    np.testing.assert_allclose(value, DIST[case]["loss"], rtol=2e-6)
    compare_grads(grads, load_golden(f"tiny_dist_grads_{case}.safetensors"), DIST[case]["grad_tolerance"])


def test_a_draw_is_even_and_depends_on_its_two_images_alone():
    rng = jax.random.key(3)
    draws = np.asarray(sigmoid.draw_captions(rng, jnp.arange(4), jnp.arange(3000), captions=3))
    assert draws.shape == (4, 3000) and draws.min() == 0 and draws.max() == 2
    again = sigmoid.draw_captions(rng, jnp.array([3, 1]), jnp.arange(2990, 3000), captions=3)
    np.testing.assert_array_equal(again, draws[[3, 1], 2990:])
    # Pairs of draws of two places are even too, and so are those of neighbours: four standard errors.
    pairs = np.bincount(draws[0] * 3 + draws[1], minlength=9), np.bincount(draws[0, 1:] * 3 + draws[0, :-1])
    np.testing.assert_allclose(np.divide(pairs, 3000), 1 / 9, atol=0.023)
    assert np.mean(draws != sigmoid.draw_captions(jax.random.key(4), jnp.arange(4), jnp.arange(3000), 3)) > 0.6


def test_rows_of_the_reference_are_draws():
    rows = load_golden("tiny_dist_indices_ws2.npz")["combined_indices"].reshape(8, -1)
    block, per_image = 4, rows.shape[1] - 3
    draws = np.asarray(sigmoid.draws_of_rows(rows, per_image))
    assert draws.shape == (block, 8)
    for n, row in enumerate(rows):
        place, rank = n % block, n // block
        own = set(range(place * per_image, (place + 1) * per_image))
        drawn = {other * per_image + draws[place, rank * block + other] for other in range(block) if other != place}
        assert own | drawn == set(row.tolist())


def random_sides(images, captions, width=16, heads=2, keys=5):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    image = sigmoid.ImageSide(
        normal(images, width), normal(images, keys, heads, width // heads), normal(images, keys, heads, width // heads)
    )
    return image, sigmoid.TextSide(normal(images * captions, width), normal(images * captions, heads, width // heads))


def attend(params, queries, keys, values):
    pooled = jax.nn.dot_product_attention(queries, keys, values)
    return pooled.reshape(*pooled.shape[:2], -1) @ params


def test_loss_equals_its_definition_term_by_term():
    """The docstring's double sums, written out with loops in float64."""
    images, captions, block = 6, 2, 3
    image, text = random_sides(images, captions)
    weight = jnp.eye(16)
    chosen = np.asarray(sigmoid.draw_captions(jax.random.key(0), jnp.arange(block), jnp.arange(images), captions))
    scale, bias = 1.3, -0.7
    value, parts = sigmoid.flair_loss(
        image, text, attend, weight, scale, bias, rng=jax.random.key(0), block_size=block, chunk_size=2
    )

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
                pooled = attend(weight, text.queries[None, t][None], image.keys[n][None], image.values[n][None])
                cosine, own = unit(pooled[0, 0]) @ unit(text.pooled[t]), t // captions == n
                tcs += cost(cosine, own)
                logits[own].append(np.exp(scale) * cosine + bias)
        for t in range(images * captions):
            mps += cost(unit(image.pooled[n]) @ unit(text.pooled[t]), t // captions == n)
    tcs /= (images // block) * (block + captions - 1)
    mps /= images * captions
    np.testing.assert_allclose([parts["tcs"], parts["mps"], value], [tcs, mps, (tcs + mps) / 2], rtol=1e-5)
    means = np.mean(logits[True]), np.mean(logits[False])
    np.testing.assert_allclose([parts["positive_logit"], parts["negative_logit"]], means, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "block", "devices"),
    [(24, 4, 2), (24, None, 8), (24, 12, 8), (24, 6, 8), (24, 4, 4), (24, 8, 4), (24, 1, 8), (8, 8, 8)],
)
def test_blocks_and_shards_of_any_sizes(images, block, devices):
    """Shards hold whole blocks, parts of one, or the end of one and the beginning of the next."""
    image, text = random_sides(images, captions=3)

    def loss(image, text, weight, scale):
        return sigmoid.flair_loss(image, text, attend, weight, scale, -0.7, rng=jax.random.key(5), block_size=block)

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
        return sigmoid.flair_loss(
            image, text, attend, weight, 1.0, -1.0, rng=jax.random.key(0), block_size=32, chunk_size=chunk_size
        )[0]

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
            return sigmoid.flair_loss(*sides, attend, jnp.eye(16), 1.3, -0.7, **options)[0]

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
        sigmoid.flair_loss(image, text, attend, jnp.eye(16), 1.0, 0.0, rng=jax.random.key(0), **options)


def test_normalize_is_finite_at_zero():
    np.testing.assert_array_equal(jax.grad(lambda x: sigmoid.normalize(x).sum())(jnp.zeros(3)) < np.inf, True)
    np.testing.assert_allclose(sigmoid.normalize(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
