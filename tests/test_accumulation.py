"""Micro-batches give the loss and the gradients of the whole batch, in less memory, and no state travels for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import losses
from jax.sharding import PartitionSpec

from flair_jax import models, objectives, sharding
from flair_jax.data.transforms import packing
from flair_jax.models.accumulation import in_micro_batches
from flair_jax.models.text import Text

IMAGES, CAPTIONS, LENGTH, WIDTH = 32, 3, 24, 40  # no parameter has the shape of features
MODEL = dict(
    name="flair",
    embed_dim=16,
    vision=dict(image_size=48, patch_size=16, width=WIDTH, depth=3, heads=2),
    text=dict(context_length=LENGTH, vocab_size=64, width=WIDTH, depth=3, heads=2),
    pooling=dict(heads=2),
    init_logit_bias=-10.0,
)


def make_batch(packed: bool) -> dict:
    """Random images and captions, laid out for 8 devices."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 12, IMAGES * CAPTIONS)
    tokens = rng.integers(1, 62, (IMAGES * CAPTIONS, LENGTH), np.int32)
    tokens[np.arange(len(sizes)), sizes - 1] = 63
    tokens = np.where(np.arange(LENGTH) < sizes[:, None], tokens, 0)
    if packed:
        texts = packing.Packer(row_length=LENGTH, row_counts=(8,), devices=8)(tokens).texts
    else:
        padded = Text.padded(tokens)
        texts = {"tokens": tokens, "ends": np.asarray(padded.ends)}
    return {"images": rng.standard_normal((IMAGES, 48, 48, 3), np.float32), "texts": texts}


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(models.create(MODEL).init)(jax.random.key(0), jnp.zeros((1, 48, 48, 3)), tokens)["params"]


def run(params, batch, devices=1, **changes):
    """Loss, gradients and the compiled function, on so many devices."""
    model = models.create({**MODEL, **changes})

    def loss(params, batch):
        features = model.apply({"params": params}, batch["images"], Text(**batch["texts"]), method="features")
        return objectives.weighted_sum(losses(chunk_size=2), features, batch, jax.random.key(1))[0]

    mesh = sharding.create_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(jax.device_get(params), sharding.replicated(mesh))
        batch = sharding.global_batch(mesh, batch)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
        value, grads = compiled(params, batch)
    return jax.device_get(value), jax.device_get(grads), compiled


@pytest.fixture(scope="module")
def whole(params):
    """The same without micro-batches, on one device, by `packed`."""
    return {packed: run(params, make_batch(packed)) for packed in (False, True)}


def travelling(compiled) -> list[tuple[str, tuple[int, ...]]]:
    """Name and sizes, see `sizes`, of everything that devices exchange."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
    shapes = [(kind, re.findall(r"\w+\[([\d,]*)\]", types)) for types, kind in found]
    return [(kind, sizes(int(n) for n in shape.split(",") if n)) for kind, many in shapes for shape in many]


def sizes(shape) -> tuple[int, ...]:
    """A shape less its order and its ones, which compilers change at will."""
    return tuple(sorted(n for n in shape if n > 1))


@pytest.mark.parametrize(
    ("devices", "packed", "changes"),
    [
        (1, False, dict(micro_batches=2)),
        (1, True, dict(micro_batches=4, scan_blocks=True, remat="full")),
        (8, True, dict()),
        (8, True, dict(micro_batches=2)),
        (8, False, dict(micro_batches=4, scan_blocks=True)),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch(params, whole, devices, packed, changes):
    expected, expected_grads, compiled_whole = whole[packed]
    value, grads, compiled = run(params, make_batch(packed), devices, **changes)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-7 * largest),
        grads,
        expected_grads,
    )
    if devices == 1:
        one, many = (c.memory_analysis().temp_size_in_bytes for c in (compiled_whole, compiled))
        assert many < 1.3 * one / changes["micro_batches"]
    else:
        exchanged = travelling(compiled)
        assert {kind for kind, _ in exchanged} >= {"all-reduce", "collective-permute"}  # so that the pattern finds them
        # Gradients, which have the shapes of parameters, and the texts' features of a device; no states, no images.
        leaves = jax.tree.leaves(params)
        parameters = {sizes(leaf.shape) for leaf in leaves}
        parameters |= {
            sizes((leaf.size // leaf.shape[-1], leaf.shape[-1])) for leaf in leaves if leaf.ndim > 2
        }  # as a matrix
        features = {sizes((12, *rest)) for rest in ((16,), (2, 8))}
        assert {shape for _, shape in exchanged} <= parameters | features


def test_rows_that_do_not_divide_are_refused(params):
    with pytest.raises(ValueError, match=r"32 rows on 8 devices .* config\.model\.micro_batches 8"):
        run(params, make_batch(False), 8, micro_batches=8)


def test_gradients_are_summed_in_float32():
    """In bfloat16 the sum of ones would stop at 256."""
    encode = in_micro_batches(lambda scale, x: x * scale.astype(jnp.float32), 1024)
    gradient = jax.grad(lambda scale: encode(scale, jnp.ones((1024, 1))).sum())(jnp.ones((), jnp.bfloat16))
    assert gradient == 1024 and gradient.dtype == jnp.bfloat16


def test_each_device_finds_the_ends_of_its_own_rows_and_no_others():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 6, 4), np.float32)  # two rows per device
    ends = (np.repeat(np.arange(8), 3) * 12 + rng.integers(0, 12, 24)).astype(np.int32)
    at_ends = jax.jit(lambda x, ends: Text(tokens=None, ends=ends, segments=jnp.ones((16, 6))).at_ends(x))
    expected = x.reshape(-1, 4)[ends]
    np.testing.assert_array_equal(at_ends(x, ends), expected)
    mesh = sharding.create_mesh()
    with jax.set_mesh(mesh):
        split = sharding.batch_sharding(mesh)
        assert split.spec == PartitionSpec(("data", "fsdp"))
        np.testing.assert_array_equal(at_ends(*jax.device_put((x, ends), split)), expected)
        # The first caption of device 1 in the rows of device 0, of device 2 in those of device 3; one before all rows.
        wrong = ends.copy()
        wrong[[3, 6, 0]] = [11, 36, -1]
        found = np.asarray(at_ends(*jax.device_put((x, wrong), split)))
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [0, 3, 6]
    assert np.isnan(at_ends(x, np.full(24, -1, np.int32))).all()
