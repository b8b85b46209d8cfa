"""The object that users load: the numbers of the original, from every kind of file."""

import golden_files
import jax
import numpy as np
import pytest
from conftest import TINY, load_golden, nhwc
from PIL import Image

import flair_jax
from flair_jax import models, pretrained, state
from flair_jax.convert import flax_files, torch_files
from flair_jax.convert.tables import ConversionError
from flair_jax.data.transforms import images

INPUTS, OUTPUTS = load_golden("tiny_inputs.npz"), load_golden("tiny_outputs.npz")
IMAGES, TOKENS = nhwc(INPUTS["images"]), INPUTS["tokens"]


@pytest.fixture(scope="module")
def model():
    return flair_jax.load(golden_files.path("tiny.safetensors"), config=TINY)


@pytest.mark.golden
def test_methods_give_the_original_s_numbers(model):
    np.testing.assert_allclose(model.get_logits(IMAGES, TOKENS), OUTPUTS["logits_flair"], atol=1e-4)
    np.testing.assert_allclose(model.get_logits_as_clip(IMAGES, TOKENS), OUTPUTS["logits_clip"], atol=1e-4)
    np.testing.assert_allclose(model.encode_image(IMAGES).local, OUTPUTS["image_local"], atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TOKENS).pooled, OUTPUTS["text_global"], atol=1e-5)
    weights, zero_mass = model.attention_maps(IMAGES, TOKENS)
    expected = OUTPUTS["pool_attn_heads"].swapaxes(1, 2)  # (images, texts, heads, patches + 1), the zero key last
    np.testing.assert_allclose(weights, expected[..., :-1], atol=1e-5)
    np.testing.assert_allclose(zero_mass, expected[..., -1], atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1) + zero_mass, 1, atol=1e-5)


def test_preprocess_and_tokenize(model):
    images = model.preprocess([Image.new("RGB", (100, 80), "red"), Image.new("L", (64, 200))])
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.float32
    assert model.preprocess(Image.new("RGB", (9, 9))).shape == (1, 64, 64, 3)
    tokens = model.tokenize(["a dog", "two, cats"])
    assert tokens.shape == (2, 77) and tokens.dtype == np.int32


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_every_kind_of_file_holds_the_same_model(model, tmp_path, name):
    if name.endswith(".pt"):
        pytest.importorskip("torch", reason="PyTorch is not installed")
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


def test_pixels_are_normalised_as_in_training(model):
    """uint8 pixels and what `preprocess` makes of them give the same features."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    floats = model.preprocess([Image.fromarray(image) for image in pixels])
    np.testing.assert_allclose(model.encode_image(pixels).local, model.encode_image(floats).local, atol=1e-5)
    np.testing.assert_allclose(model.get_logits(pixels, TOKENS), model.get_logits(floats, TOKENS), atol=1e-4)


@pytest.mark.golden
def test_texts_share_rows_and_keep_their_features(model):
    """Packed as the evaluators pack them; with all tokens' features, one row for each."""
    packed, padded = model.encode_text(TOKENS), model.encode_text(TOKENS, local=True)
    np.testing.assert_allclose(packed.pooled, padded.pooled, atol=1e-5)
    assert packed.local is None and padded.local.shape == OUTPUTS["text_local"].shape
    np.testing.assert_allclose(padded.local, OUTPUTS["text_local"], atol=1e-5)


def test_nothing_gives_nothing(model):
    images, texts = model.preprocess([]), model.tokenize([])
    assert images.shape == (0, 64, 64, 3) and texts.shape == (0, 77)
    assert model.encode_image(images).pooled.shape == (0, 64)
    assert model.encode_image(images).local.shape == (0, 16, 64)
    assert model.encode_text(texts).pooled.shape == (0, 64)
    assert model.get_logits(images, TOKENS).shape == (0, 12)
    assert model.get_logits(IMAGES, texts).shape == (4, 0)
    assert model.get_logits_as_clip(images, texts).shape == (0, 0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.encode_image(np.zeros((1, 64, 64, 3), np.int64)), TypeError, "dtype int64; expected .*uint8"),
        (lambda m: m.encode_image(IMAGES[0]), ValueError, r"shape \(64, 64, 3\); expected images \(B, 64, 64, 3\)"),
        (lambda m: m.encode_image(np.zeros((1, 3, 64, 64))), ValueError, r"shape \(1, 3, 64, 64\)"),
        (lambda m: m.encode_image([Image.new("RGB", (64, 64))]), TypeError, "list; expected .* as `preprocess` gives"),
        (lambda m: m.encode_image(np.full((1, 64, 64, 3), 255.0)), ValueError, "floats from 255.0 to 255.0; expected"),
        (lambda m: m.encode_image(np.full((1, 64, 64, 3), np.nan)), ValueError, "floats from nan to nan; expected"),
        (lambda m: m.encode_text("a dog"), TypeError, "texts are a str; expected token ids"),
        (lambda m: m.encode_text(np.zeros((1, 77))), TypeError, "dtype float64; expected token ids"),
        (lambda m: m.encode_text(np.zeros((1, 78), int)), ValueError, r"shape \(1, 78\); .* T up to 77"),
        (lambda m: m.encode_text(np.full((1, 77), 512)), ValueError, "from 512 to 512; expected 0 to 511"),
        (lambda m: m.preprocess(["photo.jpg"]), TypeError, r"images\[0\] is a str; expected PIL images"),
        (lambda m: m.preprocess(Image.new("RGB", (0, 9))), ValueError, "the image has 0 x 9 pixels"),
        (lambda m: flair_jax.load(7), TypeError, "path is a int"),
        (lambda m: flair_jax.load(golden_files.path("tiny.safetensors"), config="B/16"), TypeError, "model is a str"),
    ],
)
def test_what_was_expected_is_said(model, call, error, words):
    with pytest.raises(error, match=words):
        call(model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["torch", "flax"])
def test_weights_that_are_not_finite_are_refused_by_name(model, tmp_path, side, value):
    path = tmp_path / "broken.safetensors"
    if side == "torch":
        weights = load_golden("tiny.safetensors")
        weights["ln_final.weight"][3] = value
        torch_files.write(path, weights)
        words = r"broken\.safetensors: .*ln_final\.weight \(1 of 64\)"
    else:
        params = jax.device_get(model.params)
        params["text"]["ln_final"]["scale"] = np.full(64, value, np.float32)
        flax_files.write(path, params, TINY)
        words = r"broken\.safetensors: .*text/ln_final/scale \(64 of 64\)"
    with pytest.raises(ValueError, match=words):
        flair_jax.load(path, TINY)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_parallel_modules(model, tmp_path, prefix):
    weights = {prefix + name: array for name, array in load_golden("tiny.safetensors").items()}
    torch_files.write(tmp_path / "a.safetensors", weights)
    again = flair_jax.load(tmp_path / "a.safetensors", TINY)
    np.testing.assert_array_equal(again.get_logits(IMAGES, TOKENS), model.get_logits(IMAGES, TOKENS))


def test_what_the_file_says_and_what_is_asked_for_must_agree(model, tmp_path):
    path = tmp_path / "flax.safetensors"
    model.save(path)
    flair_jax.load(path, {**TINY, "dtype": "bfloat16", "scan_blocks": True, "gelu": "exact", "init_logit_bias": 0.0})
    others = {**TINY, "gelu": "tanh", "pooling": {"heads": 4}, "vision": {**TINY["vision"], "heads": 6}}
    with pytest.raises(ValueError, match=r"flax\.safetensors holds the weights of another model") as raised:
        flair_jax.load(path, others)
    for words in (
        "model.gelu is 'tanh', the file says 'exact'",
        "model.pooling.heads is 4, the file says 8",
        "model.vision.heads is 6, the file says 3",
    ):
        assert words in str(raised.value)


def test_a_model_of_images_that_are_not_square(tmp_path):
    """Saved and loaded again: JSON has a list where the config had a tuple."""
    section = {**TINY, "vision": {**TINY["vision"], "image_size": (32, 48)}}
    shapes = jax.eval_shape(lambda: state.init_params(models.create(section), 0))
    params = jax.tree.map(lambda x: np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32), shapes)
    first = pretrained.Pretrained(section, params)
    first.save(tmp_path / "a.safetensors")
    images = first.preprocess([Image.new("RGB", (90, 70), "red"), Image.new("RGB", (20, 70), "blue")])
    assert images.shape == (2, 32, 48, 3)
    for config in (None, section, {**section, "vision": {**section["vision"], "image_size": [32, 48]}}):
        again = flair_jax.load(tmp_path / "a.safetensors", config)
        assert again.config["vision"]["image_size"] == (32, 48)
        np.testing.assert_array_equal(again.encode_image(images).local, first.encode_image(images).local)
        assert again.get_logits(images, TOKENS).shape == (2, 12)


def test_a_model_brings_its_own_preprocessing(model, tmp_path):
    """Pictures become its input in its own way, from Python and in an evaluation, and the way is saved with it."""
    section = {**TINY, "preprocess": {"resize": "squash", "mean_std": "imagenet"}}
    flax_files.write(tmp_path / "squash.safetensors", jax.device_get(model.params), section)
    squash = flair_jax.load(tmp_path / "squash.safetensors")
    picture = Image.linear_gradient("L").resize((100, 80)).convert("RGB")
    pixels = images.squash(picture, 64)
    expected = (pixels / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(squash.preprocess(picture)[0], expected, atol=1e-5)
    as_pixels, as_floats = (squash.encode_image(x) for x in (pixels[None], expected[None].astype(np.float32)))
    np.testing.assert_allclose(as_pixels.pooled, as_floats.pooled, atol=1e-4)
    crop = flair_jax.load(tmp_path / "squash.safetensors").model.clone(preprocessing=images.Preprocessing())
    assert np.abs(models.create(TINY).preprocessing(pixels) - expected).max() > 0.01  # an older section: CLIP's way
    assert crop.preprocessing == model.model.preprocessing != squash.model.preprocessing
    with pytest.raises(ConversionError, match=r"model\.preprocess\.resize is 'crop', the file says 'squash'"):
        flair_jax.load(tmp_path / "squash.safetensors", config={**section, "preprocess": {"resize": "crop"}})
