"""The evaluators' encoder: batches of one shape, texts that share rows, and the features of each alone."""

import jax
import numpy as np
import pytest
from conftest import load_golden

from flair_jax import sharding
from flair_jax.data.transforms import packing
from flair_jax.evaluators import features
from flair_jax.models.text import Text


def mesh(devices: int):
    return sharding.create_mesh(devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def apply(tiny_model):
    """`tiny_model.apply`, compiled once for all tests."""
    return jax.jit(tiny_model.apply, static_argnames="method")


def test_texts_share_rows():
    rng = np.random.default_rng(0)
    lengths = rng.gamma(4, 27 / 4, 3000).round().clip(4, 77).astype(int)
    rows = packing.place(lengths, 78, row_captions=features.ROW_TEXTS)
    assert np.bincount(rows.row, lengths).max() <= 78 and np.bincount(rows.row).max() <= features.ROW_TEXTS
    assert lengths.sum() > 0.98 * 78 * rows.rows
    assert packing.place(np.full(17, 2), 78, row_captions=8).row.tolist() == [0] * 8 + [1] * 8 + [2]
    assert packing.place(np.full(3, 78), 78, row_captions=8).row.tolist() == [0, 1, 2]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("text_batch", [1, 3, 64])
def test_texts_that_share_rows_have_their_own_features(tiny_model, tiny_params, apply, text_batch, devices):
    rng = np.random.default_rng(0)
    tokens = np.zeros((21, 77), np.int32)
    for row, length in zip(tokens, [2, 77, 76, *rng.integers(3, 60, 18)], strict=True):
        row[:length] = [510, *rng.integers(1, 500, length - 2), 511]
    runs = features.Encoder(tiny_model, lambda x: x, image_batch=1, text_batch=text_batch, mesh=mesh(devices))
    found = runs.texts(runs.place(tiny_params), tokens)
    expected = apply({"params": tiny_params}, Text.padded(tokens), method="encode_text").pooled
    np.testing.assert_allclose(found.pooled, expected, atol=1e-5)
    assert found.local is None and found.mask is None


def test_texts_beyond_the_context_are_refused(tiny_model, tiny_params):
    runs = features.Encoder(tiny_model, lambda x: x, image_batch=1, text_batch=2, mesh=mesh(1))
    tokens = np.ones((2, 78), np.int32)
    tokens[:, 77] = 511
    with pytest.raises(ValueError, match=r"texts have 78 tokens; model\.text\.context_length is 77"):
        runs.texts(runs.place(tiny_params), tokens)


def test_batches_are_equally_full(tiny_model):
    runs = features.Encoder(tiny_model, lambda x: x, image_batch=64, text_batch=64, mesh=mesh(1))
    assert [runs.text_rows(total) for total in (1, 63, 64, 65, 128, 129, 1000)] == [1, 63, 64, 33, 64, 43, 63]


def test_equal_texts_have_equal_features_wherever_they_stand(tiny_model, tiny_params):
    """Or else ties between equal captions would be broken by round-off, which differs from batch to batch."""
    order = np.array([4, 0, 4, 7, 9, 11, 4])
    runs = features.Encoder(tiny_model, lambda x: x, image_batch=1, text_batch=2, mesh=mesh(1))
    tokens = load_golden("retrieval.npz")["pipe_tokens"][order]
    found = np.asarray(runs.texts(runs.place(tiny_params), tokens).pooled)
    assert (found[0] == found[2]).all() and (found[0] == found[6]).all()
    assert len(np.unique(found, axis=0)) == 5


def test_images_come_in_order_with_their_own_features(tiny_model, tiny_params, apply):
    images = np.random.default_rng(0).random((5, 64, 64, 3), np.float32)
    runs = features.Encoder(tiny_model, lambda x: x, image_batch=2, text_batch=1, mesh=mesh(1))
    batches = list(runs.images(runs.place(tiny_params), images))
    assert [number for numbers, _ in batches for number in numbers] == [0, 1, 2, 3, 4]
    found = jax.tree.map(lambda *x: np.concatenate(x)[:5], *[batch for _, batch in batches])  # the rest is padding
    expected = apply({"params": tiny_params}, images, method="encode_image")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
