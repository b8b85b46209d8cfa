"""The object that users load: the numbers of the original, from every kind of file."""

import numpy as np
import pytest
from conftest import GOLDEN, TINY, load_golden, nhwc
from PIL import Image

import flair_jax
from flair_jax.convert import torch_files

INPUTS, OUTPUTS = load_golden("tiny_inputs.npz"), load_golden("tiny_outputs.npz")
IMAGES, TOKENS = nhwc(INPUTS["images"]), INPUTS["tokens"]


@pytest.fixture(scope="module")
def model():
    return flair_jax.load(GOLDEN / "tiny.safetensors", config=TINY)


def test_methods_give_the_original_s_numbers(model):
    np.testing.assert_allclose(model.get_logits(IMAGES, TOKENS), OUTPUTS["logits_flair"], atol=1e-4)
    np.testing.assert_allclose(model.get_logits_as_clip(IMAGES, TOKENS), OUTPUTS["logits_clip"], atol=1e-4)
    np.testing.assert_allclose(model.encode_image(IMAGES).local, OUTPUTS["image_local"], atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TOKENS).pooled, OUTPUTS["text_global"], atol=1e-5)
    weights, zero_mass = model.attention_maps(IMAGES, TOKENS)
    assert weights.shape == (4, 12, 8, 16) and zero_mass.shape == (4, 12, 8)
    np.testing.assert_allclose(weights.sum(-1) + zero_mass, 1, atol=1e-5)


def test_preprocess_and_tokenize(model):
    images = model.preprocess([Image.new("RGB", (100, 80), "red"), Image.new("L", (64, 200))])
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.float32
    assert model.preprocess(Image.new("RGB", (9, 9))).shape == (1, 64, 64, 3)
    tokens = model.tokenize(["a dog", "two, cats"])
    assert tokens.shape == (2, 77) and tokens.dtype == np.int32


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_every_kind_of_file_holds_the_same_model(model, tmp_path, name):
    torch_files.write(tmp_path / name, load_golden("tiny.safetensors"))
    again = flair_jax.load(tmp_path / name, config=TINY)
    np.testing.assert_array_equal(again.get_logits(IMAGES, TOKENS), model.get_logits(IMAGES, TOKENS))


def test_what_is_saved_brings_its_own_config(model, tmp_path):
    model.save(tmp_path / "flax.safetensors")
    again = flair_jax.load(tmp_path / "flax.safetensors")
    np.testing.assert_array_equal(again.get_logits(IMAGES, TOKENS), model.get_logits(IMAGES, TOKENS))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        flair_jax.load(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="checkpoints"):
        flair_jax.load(tmp_path)
