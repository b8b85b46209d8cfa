"""Heat maps against the original's attention, and by hand."""

import numpy as np
import pytest
from colour_model import ColourModel, canvas, texts
from conftest import load_golden, nhwc

from flair_jax import attention_maps
from flair_jax.attention_maps import heat_maps, patch_similarity
from flair_jax.evaluators.features import Encoder, patch_grid

IMAGES = nhwc(load_golden("tiny_inputs.npz")["images"])
TOKENS = load_golden("tiny_inputs.npz")["tokens"]
OUTPUTS = load_golden("tiny_outputs.npz")


@pytest.mark.golden
@pytest.mark.parametrize("heads", ["mean", 2, (0, 3, 5, 7)])
def test_heat_maps_equal_the_reference(tiny_model, tiny_params, heads):
    maps, zero_mass = heat_maps(tiny_model, tiny_params, IMAGES, TOKENS, preprocess=identity, heads=heads)
    expected = OUTPUTS["pool_attn_heads"]  # (images, heads, texts, patches + 1), the zero key last
    chosen = range(expected.shape[1]) if heads == "mean" else np.atleast_1d(heads)
    expected = expected[:, list(chosen)].mean(1)
    patches = expected.shape[-1] - 1
    assert maps.shape == (len(IMAGES), len(TOKENS), *patch_grid(*IMAGES.shape[1:3], patches))
    np.testing.assert_allclose(maps.reshape(expected[..., :-1].shape), expected[..., :-1], atol=1e-5)
    np.testing.assert_allclose(zero_mass, expected[..., -1], atol=1e-5)
    np.testing.assert_allclose(maps.sum((2, 3)) + zero_mass, 1, atol=1e-5)


def identity(x):
    return x


def test_maps_of_images_that_are_not_square():
    image = canvas(16, 24, green=(8, 16, 8, 8))
    maps, zero_mass = heat_maps(ColourModel(8), {}, image[None], texts(1, 0), preprocess=identity, heads=(0,))
    np.testing.assert_allclose(maps[0, 0], [[0, 0, 0], [0, 0, 0.75]], atol=1e-5)
    np.testing.assert_allclose(maps[0, 1], np.full((2, 3), 0.125), atol=1e-5)
    np.testing.assert_allclose(zero_mass, [[0.25, 0.25]], atol=1e-5)
    with pytest.raises(ValueError, match=r"heads are \[2\]; the pooling has 2, 0 to 1"):
        heat_maps(ColourModel(8), {}, image[None], texts(1), preprocess=identity, heads=(2,))


def test_patch_grid():
    assert patch_grid(224, 224, 196) == (14, 14)
    assert patch_grid(48, 96, 32) == (4, 8)
    assert patch_grid(96, 48, 32) == (8, 4)
    assert patch_grid(16, 16, 1) == (1, 1)
    for size in ((224, 224, 195), (48, 96, 8 * 5), (8, 8, 1000)):
        with pytest.raises(ValueError, match="square patches cannot cover"):
            patch_grid(*size)


def test_maps_of_each_head_and_of_many_batches(monkeypatch):
    """Batches are joined in the images' order, and a batch is loaded at a time."""
    monkeypatch.setattr(attention_maps, "IMAGE_BATCH", 8)
    images = np.stack([canvas(16, 16, green=(8 * (i % 2), 8 * (i // 2 % 2), 8, 8)) for i in range(20)])
    maps, zero_mass = heat_maps(ColourModel(8), {}, images, texts(1, 0), preprocess=identity, heads="each")
    assert maps.shape == (20, 2, 2, 2, 2) and zero_mass.shape == (20, 2, 2)
    for i in range(20):
        assert np.unravel_index(maps[i, 0, 0].argmax(), (2, 2)) == (i % 2, i // 2 % 2)
    np.testing.assert_allclose(maps[:, 1, 0], 0.75 / 4, atol=1e-5)  # no red anywhere
    np.testing.assert_allclose(zero_mass, np.broadcast_to([0.25, 0.75], (20, 2, 2)), atol=1e-5)
    mean = heat_maps(ColourModel(8), {}, images, texts(1, 0), preprocess=identity)
    np.testing.assert_allclose(mean.maps, maps.mean(2), atol=1e-6)
    with pytest.raises(ValueError, match="heads is 'all'; expected 'mean', 'each'"):
        heat_maps(ColourModel(8), {}, images, texts(1), preprocess=identity, heads="all")


def test_similarity_of_patches():
    image = canvas(16, 24, green=(8, 16, 8, 8), red=(0, 0, 8, 8))
    encoder = Encoder(ColourModel(8), identity, image_batch=1, text_batch=8)
    batches, text = list(encoder.images({}, image[None])), encoder.texts({}, texts(1, 0))
    found = patch_similarity(encoder, {}, batches, text, size=(16, 24))
    np.testing.assert_allclose(found[0, 0], [[0, 0, 0], [0, 0, 1]], atol=1e-5)
    np.testing.assert_allclose(found[0, 1], [[1, 0, 0], [0, 0, 0]], atol=1e-5)
    values = patch_similarity(encoder, {}, batches, text, size=(16, 24), mode="value")
    np.testing.assert_allclose(values[0, 0], found[0, 1], atol=1e-5)  # its values are the channels, moved by one
