"""Heat maps against the original's attention; pictures pixel by pixel."""

import numpy as np
import pytest
from colour_model import ColourModel, canvas, texts
from conftest import load_golden, nhwc
from PIL import Image

from flair_jax.attention_maps import BOX, MARGIN, heat_maps, overlay, sheet
from flair_jax.evaluators.features import patch_grid

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


def test_overlay_is_red_of_the_opacity_of_the_heat():
    picture = np.full((2, 4, 3), (0, 100, 200), np.uint8)
    result = np.asarray(overlay(picture, np.array([[0, 0.5, 1, 2], [0, 0, 0, 2]])))
    assert result.shape == (2, 4, 3)
    assert result[0, 0].tolist() == [0, 100, 200] and result[0, 3].tolist() == [255, 0, 0]
    np.testing.assert_allclose(result[0, 2], [127.5, 50, 100], atol=1)
    assert (np.asarray(overlay(picture, np.zeros((1, 2)))) == picture).all()


def test_overlay_is_bilinear():
    """One patch becomes 8 pixels: halfway between the centres of two patches the heat is the mean."""
    result = np.asarray(overlay(np.zeros((16, 16, 3), np.uint8), np.array([[0, 1], [0, 1]])))[..., 0]
    assert (result[:, :4] == 0).all() and (result[:, 12:] == 255).all() and (result == result[0]).all()
    np.testing.assert_allclose(result[0, 4:12], (np.arange(8) + 0.5) / 8 * 255, atol=1)


def test_overlay_cuts_what_the_model_did_not_see():
    """Resize and centre crop keep the largest centred rectangle of the map's shape."""
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    assert (np.asarray(overlay(picture, np.zeros((7, 7)))) == np.full((10, 10, 3), 255)).all()
    assert overlay(Image.fromarray(picture), np.zeros((2, 4))).size == (20, 10)
    assert overlay(Image.fromarray(picture).rotate(90, expand=True), np.zeros((4, 2))).size == (10, 20)
    assert overlay(Image.new("RGBA", (8, 8)), np.zeros((2, 2))).mode == "RGB"


@pytest.mark.parametrize("value", [-0.1, np.nan])
def test_overlay_refuses_what_is_no_heat(value):
    with pytest.raises(ValueError, match="finite values of at least 0"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.array([[value, 1.0]]))


def blue_picture():
    return np.full((48, 48, 3), (0, 0, 255), np.uint8)


def test_sheet_shows_images_texts_and_boxes():
    heat = np.zeros((6, 6))
    heat[0, 0] = 1
    one = sheet([blue_picture()], [["a circle"]], [heat[None]], [np.array([0.25])], tile=96)
    pixels = np.asarray(one).astype(int)
    assert one.width == 2 * (96 + MARGIN) + MARGIN
    assert pixels[MARGIN + 50, MARGIN + 50].tolist() == [0, 0, 255]  # the image itself
    assert (pixels[MARGIN : MARGIN + 96, MARGIN : MARGIN + 96] == [0, 0, 255]).all()
    second = pixels[MARGIN : MARGIN + 96, 2 * MARGIN + 96 : -MARGIN]
    assert second[4, 4, 0] > 240 and second[4, 4, 2] < 20  # red where the heat is
    assert second[-1, -1].tolist() == [0, 0, 255]
    caption = pixels[MARGIN + 96 :, 2 * MARGIN + 96 :]
    assert caption.min() < 100 and (pixels[MARGIN + 96 :, : MARGIN + 96] == 255).all()  # text under the map only

    boxed = sheet([blue_picture()], [["a circle"]], [heat[None]], [np.array([0.25])], [[(24, 24, 40, 40)]], tile=96)
    framed = np.asarray(boxed).astype(int)[MARGIN : MARGIN + 96, 2 * MARGIN + 96 : -MARGIN]
    assert framed[48, 48:80].tolist() == [list(BOX)] * 32 and framed[60, 80].tolist() == list(BOX)
    assert framed[64, 64].tolist() == [0, 0, 255]


def test_sheet_prints_the_text_as_it_is_and_the_zero_mass():
    def caption(text, mass):
        page = sheet([blue_picture()], [[text]], [np.ones((1, 6, 6))], [np.array([mass])], tile=192)
        return np.asarray(page)[MARGIN + 192 :]

    assert (caption("a circle", 0.25) == caption("a circle", 0.25)).all()
    assert (caption("a circle", 0.25) != caption("a circle", 0.75)).any()
    assert (caption("red, blue", 0.25) != caption("red blue", 0.25)).any()  # a comma is a comma
    assert len(caption("many words " * 20, 0.25)) > len(caption("a circle", 0.25)) + 50  # long texts are wrapped


def test_sheet_takes_different_numbers_of_texts_and_grids_that_are_not_square():
    heats = [np.ones((3, 6, 6)), np.ones((1, 6, 6)), np.zeros((0, 6, 6))]
    page = sheet(
        [blue_picture()] * 3, [["a", "b", "c"], ["d"], []], heats, [np.zeros(3), np.zeros(1), np.zeros(0)], tile=96
    )
    assert page.width == 4 * (96 + MARGIN) + MARGIN
    rows = np.asarray(page)[:, MARGIN + 48]
    assert ((rows == [0, 0, 255]).all(1)).sum() == 2 * 96  # two pictures one below the other; no row without texts
    wide = sheet([np.zeros((48, 96, 3), np.uint8)], [["a"]], [np.ones((1, 3, 6))], [np.zeros(1)], tile=96)
    assert 48 < wide.height < 120


def test_sheet_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="at least one text"):
        sheet([blue_picture()], [[]], [np.ones((0, 6, 6))], [np.zeros(0)])
    with pytest.raises(ValueError, match="zip"):
        sheet([blue_picture()], [["a", "b"]], [np.ones((1, 6, 6))], [np.zeros(1)])
