"""Pages of pictures and texts."""

import numpy as np
import pytest
from PIL import Image

from flair_jax.figures import page


def ink(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L")) < 128


@pytest.mark.parametrize("letter", "éñüßøłőţçÅ—–’“”…°½×ΩЯ")  # noqa: RUF001
def test_letters_of_captions_are_no_boxes(letter):
    """As Pillow's own font draws all that is not ASCII."""
    missing, drawn = page.text_block("\ufffe", 20), page.text_block(letter, 20)
    assert ink(drawn).any() and (ink(drawn) != ink(missing)).any()


def test_lines_fit_and_nothing_is_lost():
    text = "a sentence of several words, and " + "w" * 60
    lines = page._wrapped(text, 100)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(map(page.font().getlength, lines)) <= 100 and page._wrapped("", 100) == []
    assert page.text_block("", 100).size == (100, 0)
    assert page.text_block("one\ntwo", 100).height == 2 * page.LINE


def test_texts_that_are_too_long_are_cut_with_an_ellipsis():
    text = "several words " * 20
    whole, most = page.text_block(text, 100), page.text_block(text, 100, most=3)
    assert most.height == 3 * page.LINE < whole.height
    assert (ink(most)[: 2 * page.LINE] == ink(whole)[: 2 * page.LINE]).all() and (ink(most) != ink(whole)[:48]).any()
    assert page.cut("a dog", 100) == "a dog"
    shorter = page.cut(text, 100)
    assert shorter.endswith("…") and text.startswith(shorter[:-1]) and 80 < page.font().getlength(shorter) <= 100


def test_colours_and_backgrounds():
    words = np.asarray(page.text_block("MMM", 60, (180, 0, 0), background="lightgrey"))
    assert (words[0, 0] == 211).all() and (words == [180, 0, 0]).all(-1).any()
    line = np.asarray(page.marked("M" * 100, 60, (0, 110, 40)))
    assert line.shape == (page.LINE, 60, 3) and line[6, 6].tolist() == [0, 110, 40]


def test_parts_stand_where_they_belong():
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (30, 5), "blue")
    column, row = np.asarray(page.stacked([red, blue], 2)), np.asarray(page.beside([red, blue], 2))
    assert column.shape == (17, 30, 3) and row.shape == (10, 52, 3)
    assert (column[:10, :20] == [255, 0, 0]).all() and (column[12:] == [0, 0, 255]).all()
    assert (column[10:12] == 255).all() and (column[:10, 20:] == 255).all()
    assert (row[:, :20] == [255, 0, 0]).all() and (row[:5, 22:] == [0, 0, 255]).all() and (row[5:, 22:] == 255).all()
    assert page.in_rows([red] * 5, 2).size == (2 * 20 + page.MARGIN, 3 * 10 + 2 * page.MARGIN)
    framed = np.asarray(page.framed(red, 3))
    assert framed.shape == (16, 26, 3) and (framed[3:-3, 3:-3] == [255, 0, 0]).all() and (framed[:3] == 255).all()


def test_pictures_of_any_kind():
    pixels = np.uint8([[[0, 128, 255]]])
    for image in (
        pixels,
        pixels.astype(np.float32) / 255,
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("RGBA"),
    ):
        assert np.asarray(page.as_picture(image)).tolist() == pixels.tolist()
    assert np.asarray(page.as_picture(np.float32([[[-1, 0.5, 2]]]))).tolist() == [[[0, 127, 255]]]
    assert page.fit_tile(Image.new("RGB", (100, 50)), 40)[0].size == (40, 20)
    tall, factor = page.fit_tile(Image.new("RGB", (100, 1000)), 40)
    assert tall.size == (6, 60) and factor == 0.06
