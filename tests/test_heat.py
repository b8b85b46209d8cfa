"""Pictures of heat maps, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from flair_jax.figures import heat as drawing
from flair_jax.figures.heat import BOX, Row, Scale, attention_scale, cosine_scale, legend, overlay, sheet
from flair_jax.figures.page import LINE, MARGIN

SCALE = Scale(0.0, 1.0, 1.0, "heat")
FULL, NONE = drawing.COLOURS[-1], 0


def mixed(grey: float, share: float) -> np.ndarray:
    """The colour of a grey pixel under heat."""
    return drawing.coloured(np.full((1, 1, 3), grey, np.float32), np.full((1, 1), share))[0, 0]


def test_overlay_is_grey_without_heat_and_red_with_much():
    picture = np.full((2, 4, 3), (0, 100, 200), np.uint8)
    result = np.asarray(overlay(picture, np.array([[0, 0.5, 1, 2], [0, 0, 0, 2]]))).astype(int)
    assert result.shape == (2, 4, 3)
    grey = 0.587 * 100 + 0.114 * 200
    np.testing.assert_allclose(result[0, 0], 0.75 * grey + 0.25 * np.array([0, 100, 200]), atol=1)
    np.testing.assert_allclose(result[0, 3], 0.85 * FULL + 0.15 * result[0, 0], atol=1)
    assert (np.diff(result[0, :, 0]) > 0).all()  # the more heat, the more red
    assert (np.diff(result[0, :, 2]) < 0).all()
    flat = np.asarray(overlay(picture, np.zeros((1, 2))))
    assert (flat == result[0, 0]).all()


def test_overlay_is_linear_between_the_centres_of_patches():
    result = np.asarray(overlay(np.zeros((16, 16, 3), np.uint8), np.array([[0, 1], [0, 1]]), SCALE))
    assert (result == result[0]).all()
    share = np.clip((np.arange(16) - 3.5) / 8, 0, 1)
    np.testing.assert_allclose(result[0], [np.rint(mixed(0, x)) for x in share], atol=1)


def test_values_outside_of_the_scale_are_its_ends():
    heat = np.array([[-3.0, 0.25], [1.0, 7.0]])
    np.testing.assert_allclose(SCALE.share(heat), [[0, 0.25], [1, 1]])
    np.testing.assert_allclose(Scale(None, None, 1.0, "").share(heat), [[0, 0.325], [0.4, 1]])
    np.testing.assert_allclose(Scale(None, None, 1.0, "").share(np.ones((1, 2))), 0)
    with pytest.raises(ValueError, match="not finite"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.array([[np.nan, 1.0]]))


def test_heat_lies_on_the_part_that_the_model_sees():
    """The rest of the picture stays in sight, dark and hatched."""
    picture = np.full((20, 60, 3), 200, np.uint8)
    result = np.asarray(overlay(Image.fromarray(picture), np.ones((2, 2)), SCALE, part=(20, 0, 40, 20))).astype(int)
    assert result.shape == (20, 60, 3)
    np.testing.assert_allclose(result[:, 20:40], np.broadcast_to(mixed(200, 1), (20, 20, 3)), atol=1)
    for outside in (result[:, :20], result[:, 40:]):
        values, counts = np.unique(outside, return_counts=True)
        assert values.tolist() == [round(drawing.UNSEEN * 200), drawing.HATCHED] and counts[0] > 5 * counts[1]
    edge = np.asarray(overlay(np.zeros((4, 4, 3), np.uint8), np.ones((1, 1)), SCALE, part=(3.9, 3.9, 4, 4)))
    assert (edge[3, 3] == np.rint(mixed(0, 1))).all()  # at least a pixel


def test_a_flat_map_is_pale_and_a_scale_is_shared():
    """Of attention, the uniform weight 1/L is what the printed numbers count."""
    flat, peak = np.full((4, 4), 1 / 16), np.zeros((4, 4))
    peak[0, 0] = 0.5
    assert attention_scale([flat[None]]).share(flat).max() == pytest.approx(1 / 4)
    both = attention_scale([flat, peak])
    assert both.share(peak).max() == 1 and both.share(flat).max() == pytest.approx(1 / 8)
    assert both.printed(both.high) == "8.0" and [both.printed(mark) for mark in both.marks] == ["1.0"]
    assert "uniform weights 1/16" in both.title
    own = attention_scale([flat, peak], "own")
    assert own.share(flat).min() == 1 and own.share(peak).max() == 1 and "own maximum" in own.title
    assert attention_scale([flat], 2).share(flat).max() == pytest.approx(1 / 2)
    cosines = np.array([[-0.1, 0.0], [0.1, 0.3]])
    shared = cosine_scale([cosines, cosines / 2])
    assert (shared.low, shared.high) == (-0.1, 0.3) and shared.printed(-0.001) == "0.00"
    assert (
        cosine_scale([cosines], "own").share(cosines).min() == 0
        and cosine_scale([cosines], 0.2).share(cosines)[1, 0] == 0.5
    )
    for scale in (attention_scale, cosine_scale):
        for wrong in ("all", 0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="expected 'shared', 'own' or a number above 0"):
                scale([cosines], wrong)


def blue_picture():
    return np.full((48, 48, 3), (0, 0, 255), np.uint8)


def body(page: Image.Image, hatched: bool = False) -> np.ndarray:
    """A sheet without the scale above it."""
    head = legend(SCALE, page.width - 2 * MARGIN, hatched).height
    return np.asarray(page)[head + MARGIN :].astype(int)


def test_sheet_shows_the_scale_the_picture_its_maps_and_boxes():
    heat = np.zeros((6, 6))
    heat[0, 0] = 1
    one = sheet([Row(blue_picture(), [heat], ["a circle"])], SCALE, tile=96)
    assert one.width == 2 * (96 + MARGIN) + MARGIN
    bar = np.asarray(one)[MARGIN + 2, MARGIN:].astype(int)
    np.testing.assert_allclose(bar[0], [128] * 3, atol=1)
    assert (np.asarray(one)[: MARGIN + 20] != 255).any()
    pixels = body(one)
    assert (pixels[MARGIN : MARGIN + 96, MARGIN : MARGIN + 96] == [0, 0, 255]).all()  # the picture itself, in colour
    second = pixels[MARGIN : MARGIN + 96, 2 * MARGIN + 96 : -MARGIN]
    assert second[4, 4, 0] > 150 and second[-1, -1].tolist() == second[60, 60].tolist()
    caption = pixels[MARGIN + 96 :, 2 * MARGIN + 96 :]
    assert caption.min() < 100 and (pixels[MARGIN + 96 :, : MARGIN + 96] == 255).all()  # text under the map only

    boxed = body(sheet([Row(blue_picture(), [heat], ["a circle"], boxes=[(24, 24, 40, 40)])], SCALE, tile=96))
    framed = boxed[MARGIN : MARGIN + 96, 2 * MARGIN + 96 : -MARGIN]
    assert framed[48, 48:80].tolist() == [list(BOX)] * 32 and framed[60, 80].tolist() == list(BOX)
    assert (framed[64, 64] == second[64, 64]).all()


def test_sheet_prints_texts_as_they_are():
    def caption(text):
        return np.asarray(sheet([Row(blue_picture(), [np.ones((6, 6))], [text])], SCALE, tile=192))

    assert (caption("a circle") == caption("a circle")).all()
    assert (caption("red, blue") != caption("red blue")).any()  # a comma is a comma
    assert len(caption("many words " * 20)) > len(caption("a circle")) + 50  # long texts are wrapped
    assert len(caption("x" * 200)) > len(caption("a circle")) + 50  # and long words divided
    assert len(caption("a circle\nzero key 10%")) == len(caption("a circle")) + LINE


def test_sheet_takes_many_maps_and_pictures_of_any_shape():
    def row(count, picture=None, **options):
        return Row(blue_picture() if picture is None else picture, [np.ones((6, 6))] * count, ["a"] * count, **options)

    page = sheet([row(3), row(1), row(0)], SCALE, tile=96)
    assert page.width == 4 * (96 + MARGIN) + MARGIN
    rows = body(page)[:, MARGIN + 48]
    assert ((rows == [0, 0, 255]).all(1)).sum() == 2 * 96  # two pictures one below the other; no row without texts
    assert sheet([row(8)], SCALE, tile=96).width == 5 * (96 + MARGIN) + MARGIN  # two lines of four maps
    assert 48 < len(body(sheet([row(1, np.zeros((48, 96, 3), np.uint8))], SCALE, tile=96))) < 120
    assert len(body(sheet([row(1, np.zeros((960, 96, 3), np.uint8))], SCALE, tile=96))) < 200  # tall ones are smaller
    whole, part = (sheet([row(1, part=part)], SCALE, tile=96) for part in (None, (0, 4, 48, 44)))
    assert (np.asarray(whole)[: 2 * MARGIN + 20] != np.asarray(part)[: 2 * MARGIN + 20]).any()  # hatching is explained


def test_sheet_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="at least one text"):
        sheet([Row(blue_picture(), [], [])], SCALE)
    with pytest.raises(ValueError, match="zip"):
        sheet([Row(blue_picture(), [np.ones((6, 6))], ["a", "b"])], SCALE)


def test_numbers_of_a_scale_do_not_run_into_each_other():
    def ink(mark, columns):
        picture = np.asarray(legend(Scale(0.0, 6.1, 1.0, "", (mark,)), 320))
        return (picture[15:28, columns] < 128).any()

    assert ink(3.0, slice(68, 90)) and not ink(0.8, slice(68, 90))
    assert not ink(0.8, slice(20, 40)) and ink(0.8, slice(0, 20))
