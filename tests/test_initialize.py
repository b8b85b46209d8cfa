"""Starting from weights of another model."""

import jax
import numpy as np
import pytest
from conftest import TINY, fresh_params, load_golden
from optional import torch

from flair_jax import initialize, models
from flair_jax.models.text import Text


@pytest.mark.parametrize("new", [(24, 24), (7, 10), (14, 14), (3, 20)])
def test_image_positions_are_resized_as_pytorch_does(new):
    positions = np.random.default_rng(0).normal(size=(1 + 14 * 14, 8)).astype(np.float32)
    found = initialize.resize_image_positions(positions, (14, 14), new)
    grid = torch.from_numpy(positions[1:].reshape(14, 14, 8)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(grid, new, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(found[1:], expected.reshape(-1, 8), atol=2e-6)
    np.testing.assert_array_equal(found[0], positions[0])


@pytest.mark.parametrize(("old", "length", "kept"), [(77, 50, 50), (77, 77, 77), (77, 100, 20), (28, 40, 14)])
def test_text_positions_of_another_context(old, length, kept):
    """Against NumPy's interpolation, where that does not extrapolate."""
    positions = np.random.default_rng(0).normal(size=(old, 8)).astype(np.float32)
    found = initialize.resize_text_positions(positions, length)
    assert found.shape == (length, 8)
    np.testing.assert_array_equal(found[:kept], positions[:kept])
    where = kept + (np.arange(kept, length) - kept) * (old - kept) / (length - kept)
    inside = where <= old - 1
    for column in range(8):
        expected = np.interp(where, np.arange(old), positions[:, column])
        np.testing.assert_allclose(found[kept:, column][inside], expected[inside], atol=1e-6)


def test_a_shorter_context_keeps_the_features_of_texts_that_fit(tiny_model, tiny_params):
    section = {**TINY, "text": {**TINY["text"], "context_length": 12}}
    shorter = models.create(section)
    params, _ = initialize.combine(fresh_params(shorter), tiny_params, (4, 4), (4, 4))
    tokens = np.array([[1, 5, 9, 511, 0, 0, 0, 0, 0, 0, 0, 0]], np.int32)

    def encode(model, params):
        return model.apply({"params": params}, Text.padded(tokens), method="encode_text").pooled

    np.testing.assert_allclose(encode(shorter, params), encode(tiny_model, tiny_params), atol=1e-6)


def test_a_longer_context_is_stretched_as_long_clip_does():
    """Position 20 + 4 i + j of 248 lies j quarters of the way from position 20 + i of 77 to the next one."""
    positions = np.random.default_rng(0).normal(size=(77, 8)).astype(np.float32)
    found = np.asarray(initialize.stretch_text_positions(positions, 248))
    np.testing.assert_array_equal(found[:20], positions[:20])
    np.testing.assert_array_equal(found[20::4], positions[20:])
    for j in (1, 2, 3):
        between = positions[20:-1] * (4 - j) / 4 + positions[21:] * j / 4
        np.testing.assert_allclose(found[20 + j :: 4][:56], between, atol=1e-6)
        np.testing.assert_allclose(found[244 + j], positions[-1] + (positions[-1] - positions[-2]) * j / 4, atol=1e-6)
    with pytest.raises(ValueError, match="context of 77 tokens, 20 kept: cannot be stretched to 77"):
        initialize.stretch_text_positions(positions, 77)


def test_every_parameter_has_an_origin(tiny_params):
    """A CLIP for larger images starts from FLAIR's weights: no pooling, no bias, more patches, another text width."""
    section = {
        **TINY,
        "pooling": None,
        "init_logit_bias": None,
        "vision": {**TINY["vision"], "image_size": (64, 96)},
        "text": {**TINY["text"], "context_length": 90, "vocab_size": 600},
    }
    fresh = fresh_params(models.create(section))
    params, origins = initialize.combine(fresh, tiny_params, (4, 6), (4, 4))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    kinds = {origin.name: origin.kind for origin in origins}
    assert len(kinds) == len(origins)
    assert {name for name, kind in kinds.items() if kind == "resized"} == {
        "vision/position_embedding",
        "text/position_embedding",
    }
    assert {name for name, kind in kinds.items() if kind == "fresh"} == {"text/token_embedding"}
    left = {name for name, kind in kinds.items() if kind == "left over"}
    assert left == {"logit_bias"} | {f"pooling/{name}" for name in (
        "ln_k/bias", "ln_k/scale", "ln_q/bias", "ln_q/scale", "ln_v/bias", "ln_v/scale",
        "out/bias", "out/kernel", "qkv/bias", "qkv/kernel",
    )}  # fmt: skip
    np.testing.assert_array_equal(params["text"]["token_embedding"], fresh["text"]["token_embedding"])
    np.testing.assert_array_equal(params["image_projection"], tiny_params["image_projection"])
    lines = initialize.table(origins).splitlines()
    assert lines[0].startswith("weights: ") and "2 resized, 1 fresh, 11 left over" in lines[0]
    assert any("text/token_embedding  (600, 64), in the file (512, 64)" in line for line in lines)
    assert load_golden("tiny.safetensors")["positional_embedding"].shape == (77, 64)
