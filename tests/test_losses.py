"""The losses against the original's, on one device and on many, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, load_golden, model_section, nhwc
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert import names
from flair_jax import models
from flair_jax.losses import sigmoid
from flair_jax.models.text import Text

LOSS = load_golden("tiny_loss.json")
DIST = load_golden("tiny_dist.json")


def batch_of(images, tokens, negatives):
    """Images (..., 3, H, W), tokens (..., K, T) and draws of the reference, any leading axes, as one global batch."""
    text = Text.padded(tokens.reshape(-1, tokens.shape[-1]))
    return {
        "images": nhwc(images).reshape(-1, *nhwc(images).shape[-3:]),
        "texts": {"tokens": text.tokens, "ends": text.ends},
        "negatives": negatives.reshape(-1, negatives.shape[-1]),
    }


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

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        value, grads = value_and_grad(model, params, batch)
    np.testing.assert_allclose(value, DIST[case]["loss"], rtol=2e-6)
    compare_grads(grads, load_golden(f"tiny_dist_grads_{case}.safetensors"), DIST[case]["grad_tolerance"])


def test_drawn_rows_hold_every_own_caption_and_one_of_each_other_image():
    rows = np.asarray(sigmoid.draw_captions(jax.random.key(3), images=12, block_size=4, captions=3))
    assert rows.shape == (12, 6)
    for n, row in enumerate(rows):
        place = n % 4
        assert np.all(np.diff(row) > 0)
        assert row[place : place + 3].tolist() == [3 * place, 3 * place + 1, 3 * place + 2]
        assert sorted(set(row // 3)) == [0, 1, 2, 3]
    again = sigmoid.draw_captions(jax.random.key(3), images=12, block_size=4, captions=3)
    np.testing.assert_array_equal(rows, again)
    draws = sigmoid.draw_captions(jax.random.key(4), images=4096, block_size=4, captions=3)[:, -1] % 3
    shares = np.bincount(np.asarray(draws[np.arange(4096) % 4 != 3]), minlength=3) / 3072
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)  # four standard errors


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
    chosen = sigmoid.draw_captions(jax.random.key(0), images, block, captions)
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
        for s in range(images // block):
            for index in np.asarray(chosen)[s * block + n % block]:
                t = s * block * captions + index
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


def temporary_bytes(images, captions, chunk_size, block_size=128):
    """Temporary memory of the loss and its gradient by compile-time analysis; nothing runs."""
    shapes = jax.eval_shape(lambda: random_sides(images, captions, width=64, heads=8, keys=17))

    def loss(image, text, weight):
        return sigmoid.flair_loss(
            image, text, attend, weight, 1.0, -1.0,
            rng=jax.random.key(0), block_size=block_size, chunk_size=chunk_size,
        )[0]  # fmt: skip

    arguments = (*shapes, jax.ShapeDtypeStruct((64, 64), jnp.float32))
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_chunks_bound_the_memory():
    dense, chunked = temporary_bytes(256, 4, None), temporary_bytes(256, 4, 4)
    assert chunked < dense / 8


@pytest.mark.parametrize("options", [dict(block_size=5), dict(chunk_size=3)])
def test_impossible_splits_are_refused_by_name(options):
    image, text = random_sides(4, 2)
    with pytest.raises(ValueError, match=next(iter(options))):
        sigmoid.flair_loss(image, text, attend, jnp.eye(16), 1.0, 0.0, rng=jax.random.key(0), **options)


def test_normalize_is_finite_at_zero():
    np.testing.assert_array_equal(jax.grad(lambda x: sigmoid.normalize(x).sum())(jnp.zeros(3)) < np.inf, True)
    np.testing.assert_allclose(sigmoid.normalize(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
