"""Pointing game: geometry and figures by hand, attention against the original's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colour_model import ColourModel, canvas, texts
from conftest import load_golden, nhwc
from PIL import Image

from flair_jax.data.transforms.images import Preprocessing
from flair_jax.evaluators import Pointing, PointingSet
from flair_jax.evaluators.features import patch_grid
from flair_jax.evaluators.pointing import patches_in_boxes, spread, texts_by_image
from flair_jax.report import flat

IMAGES = nhwc(load_golden("tiny_inputs.npz")["images"])
TOKENS = load_golden("tiny_inputs.npz")["tokens"]
OUTPUTS = load_golden("tiny_outputs.npz")
IMAGE_OF_TEXT = np.resize([2, 0, 2, 3, 0, 0, 3], len(TOKENS)) % len(IMAGES)  # image 1 has no phrase


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


def test_patches_in_boxes():
    """2 x 3 patches of 8 pixels: the centres are at 4 and 12 down, at 4, 12 and 20 across."""
    boxes = np.array([[0, 0, 24, 16], [4, 4, 12, 12], [4.1, 4, 12.1, 12], [8, 8, 24, 16], [5, 5, 11, 11]])
    inside = patches_in_boxes(boxes, (2, 3), (16, 24)).reshape(5, 2, 3)
    assert inside[0].all()
    assert inside[1].tolist() == [[True, False, False], [False] * 3]  # left and top belong to it, right and bottom not
    assert inside[2].tolist() == [[False, True, False], [False] * 3]
    assert inside[3].tolist() == [[False] * 3, [False, True, True]]
    assert not inside[4].any()


def test_texts_by_image():
    assert texts_by_image(4, np.array([2, 0, 2, 0, 0, 3])).tolist() == [[1, 3, 4], [-1] * 3, [0, 2, -1], [5, -1, -1]]


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("image_size", [(64, 64), (97, 61), (40, 130), (333, 500), (500, 333)])
def test_boxes_lie_where_the_model_s_resize_puts_them(image_size, resize):
    """A white rectangle in a black image is resized and cropped as an image and as a box."""
    preprocessing = Preprocessing(resize=resize)
    width, height = image_size
    size = 24, 32
    box = np.array([width * 0.35, height * 0.3, width * 0.7, height * 0.6]).round()
    image = Image.new("RGB", image_size)
    image.paste((255, 255, 255), tuple(int(side) for side in box))
    seen = np.argwhere(preprocessing.fit(image, size)[..., 0] > 127)
    [moved] = preprocessing.fit_boxes(box[None], image_size, size)
    expected = [*seen.min(0)[::-1], *(seen.max(0)[::-1] + 1)]
    np.testing.assert_allclose(moved, expected, atol=1)
    back = preprocessing.unfit_boxes(moved[None], image_size, size)[0]
    seen = preprocessing.seen(image_size, size)
    cut = np.clip(box.reshape(2, 2), seen[:2], seen[2:]).reshape(4)  # to what the crop shows
    np.testing.assert_allclose(back, cut, atol=1e-6)


@pytest.mark.parametrize("image_size", [(64, 64), (97, 61), (40, 130), (333, 500)])
def test_what_is_seen_is_what_changes_the_pixels(image_size):
    """Painting outside of it changes nothing, painting just inside of an edge does."""
    size, (width, height) = (24, 32), image_size
    assert Preprocessing(resize="squash").seen(image_size, size) == (0, 0, width, height)
    x0, y0, x1, y1 = Preprocessing().seen(image_size, size)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and (x0 == 0 or y0 == 0)
    plain = Preprocessing().fit(Image.new("RGB", image_size), size)
    reach = 2 * max(1, (x1 - x0) / size[1])  # of bicubic weights, in pixels of the image
    for side, painted in ((x0, (0, 0, int(x0 - reach), height)), (y0, (0, 0, width, int(y0 - reach)))):
        if side > reach:
            image = Image.new("RGB", image_size)
            image.paste((255, 255, 255), painted)
            np.testing.assert_array_equal(Preprocessing().fit(image, size), plain)
    for painted in ((x0, y0, x0 + reach, y1), (x0, y1 - reach, x1, y1)):
        image = Image.new("RGB", image_size)
        image.paste((255, 255, 255), tuple(round(side) for side in painted))
        assert (Preprocessing().fit(image, size) != plain).any()


def test_boxes_outside_of_the_crop_are_left_out():
    boxes = np.array([[0, 0, 20, 50], [10, 10, 60, 20], [180, 0, 200, 50.0]])  # the crop has columns 50 to 150
    assert Preprocessing().fit_boxes(boxes, (200, 100), (50, 50)).tolist() == [[0, 5, 5, 10]]
    squashed = Preprocessing(resize="squash").fit_boxes(boxes, (200, 100), (50, 50))
    assert squashed.tolist() == [[0, 0, 5, 25], [2.5, 5, 15, 10], [45, 0, 50, 25]]


def colour_set(**changes):
    """Two images of 16 x 24 pixels in patches of 8; of four phrases the first two and the last are right."""
    images = [
        canvas(16, 24, red=(0, 16, 8, 8), green=(8, 0, 8, 8)),  # patch (0, 2), patch (1, 0)
        canvas(16, 24, blue=(8, 8, 8, 8)),
    ]
    boxes = [[16, 0, 24, 8], [0, 0, 8, 16], [0, 0, 8, 8], [0, 8, 24, 16]]
    fields = dict(
        name="colours",
        images=images,
        tokens=texts(0, 1, 2, 2),
        image_of_text=np.array([0, 0, 1, 1]),
        boxes=np.array(boxes),
        objects=np.array([2, 2, 1, 1]),
    )
    return PointingSet(**{**fields, **changes})


@pytest.mark.parametrize(("image_batch", "devices"), [(1, 1), (64, 8)])
def test_accuracy_and_chance_by_hand(image_batch, devices):
    options = {"image_batch": image_batch, "mesh": mesh(devices)}
    results = flat(Pointing(ColourModel(8), colour_set(), preprocess=lambda x: x, **options).run({}))
    assert results == {
        "pointing/colours/attention/accuracy": 0.75,
        "pointing/colours/projected/accuracy": 0.75,
        "pointing/colours/chance": pytest.approx((1 + 2 + 1 + 3) / 6 / 4),
        "pointing/colours/chance_object": 0.75,
    }


@pytest.mark.parametrize(("image_batch", "devices"), [(1, 1), (64, 8)])
def test_a_hit_in_any_box_counts(image_batch, devices):
    boxes = [[[0, 0, 8, 8], [16, 0, 24, 8]], [[0, 0, 8, 16]], [[0, 0, 8, 8], [16, 0, 24, 8]], [[0, 8, 24, 16]]]
    data = colour_set(boxes=[np.array(own) for own in boxes], left_out=3, texts=("r", "g", "b", "b"))
    options = {"image_batch": image_batch, "mesh": mesh(devices)}
    evaluator = Pointing(ColourModel(8), data, preprocess=lambda x: x, **options)
    assert not list(evaluator.figures({}))
    assert flat(evaluator.run({})) == {
        "pointing/colours/attention/accuracy": 0.75,
        "pointing/colours/projected/accuracy": 0.75,
        "pointing/colours/chance": pytest.approx((2 + 2 + 2 + 3) / 6 / 4),
        "pointing/colours/chance_object": pytest.approx((1 + 0.5 + 1 + 1) / 4),
    }
    assert evaluator.notes == ["3 phrases are left out: the crop cuts their boxes away."]
    pictures = dict(evaluator.figures({}))
    assert list(pictures) == ["hits and misses (attention)", "hits and misses (projected)"]
    assert all(np.asarray(picture).std() > 0 for picture in pictures.values())


@pytest.mark.parametrize("first", [[0, 0, 24, 16], [0, 0, 8, 8], [16, 8, 24, 16]])
def test_equal_heat_everywhere_is_chance_wherever_the_boxes_are(first):
    boxes = [first, first, [0, 0, 8, 8], first]
    evaluator = Pointing(ColourModel(8), colour_set(boxes=np.array(boxes)), preprocess=jnp.zeros_like)
    results = flat(evaluator.run({}))
    chance = results["pointing/colours/chance"]
    assert [results[f"pointing/colours/{mode}/accuracy"] for mode in ("attention", "projected")] == [chance] * 2
    assert 0 < chance < 1


def test_of_several_patches_with_the_largest_heat_each_counts_for_its_share():
    image = canvas(16, 24, red=(0, 8, 16, 16))  # four of six patches
    data = colour_set(images=[image, image], tokens=texts(0, 0, 0, 0), boxes=np.array([[8, 0, 24, 8]] * 4))
    results = flat(Pointing(ColourModel(8), data, preprocess=lambda x: x, modes=("attention",)).run({}))
    assert results["pointing/colours/attention/accuracy"] == 0.5


def test_a_model_without_pooling_points_with_its_patch_tokens():
    class Plain(ColourModel):
        has_pooling = False

    results = flat(Pointing(Plain(8), colour_set(), preprocess=lambda x: x).run({}))
    assert results["pointing/colours/projected/accuracy"] == 0.75
    with pytest.raises(ValueError, match=r"modes are \('attention',\); expected one or more of \('projected',\)"):
        Pointing(Plain(8), colour_set(), preprocess=lambda x: x, modes=["attention"])


def test_spread():
    assert spread(np.arange(10, 20), 4).tolist() == [10, 13, 16, 19]
    assert spread(np.arange(3), 4).tolist() == [0, 1, 2]
    assert spread(np.arange(0), 4).tolist() == []


def test_broken_attention_is_an_error():
    with pytest.raises(ValueError, match="pointing/colours: attention is not finite"):
        flat(Pointing(ColourModel(8), colour_set(), preprocess=lambda x: x * np.nan).run({}))


@pytest.mark.golden
def test_attention_equals_the_reference(tiny_model, tiny_params):
    """Each phrase with its own image, in the order of the phrases."""
    height, width = IMAGES.shape[1:3]
    boxes = np.tile([0.0, 0.0, width / 2, height], (len(TOKENS), 1))
    data = PointingSet("tiny", IMAGES, TOKENS, IMAGE_OF_TEXT, boxes, np.ones(len(TOKENS), int))
    evaluator = Pointing(tiny_model, data, preprocess=lambda x: x, image_batch=3, text_batch=5, mesh=mesh(1))
    expected = OUTPUTS["pool_attn_avg"][IMAGE_OF_TEXT, np.arange(len(TOKENS)), :-1]  # the last key is the zero key
    np.testing.assert_allclose(evaluator.heat(tiny_params)["attention"], expected, atol=1e-5)
    rows, columns = patch_grid(height, width, expected.shape[1])
    left = expected.reshape(-1, rows, columns).max(1).argmax(1) + 0.5 < columns / 2
    assert flat(evaluator.run(tiny_params))["pointing/tiny/attention/accuracy"] == pytest.approx(left.mean())


def test_wrong_sets_are_refused():
    with pytest.raises(ValueError, match="colours: boxes of 3 phrases"):
        colour_set(boxes=np.ones((3, 4)))
    with pytest.raises(ValueError, match="colours: a box of phrase 0 is empty"):
        colour_set(boxes=np.tile([4, 4, 4, 8], (4, 1)))
    with pytest.raises(ValueError, match=r"colours: boxes \(0, 4\) of phrase 1"):
        colour_set(boxes=[[0, 0, 1, 1], np.ones((0, 4)), [0, 0, 1, 1], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="colours: texts belong to numbers from 0 to 2"):
        colour_set(image_of_text=np.array([0, 1, 1, 2]))
