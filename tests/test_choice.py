"""Choice: rules for right answers, ties, chance and averages by hand and against published numbers; the evaluator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colour_model import ColourModel, RegionModel, canvas, texts
from conftest import load_golden, nhwc

from flair_jax.data.benchmarks.base import Item
from flair_jax.evaluators import Choice, ChoiceSet, WholeImages
from flair_jax.evaluators.choice import average, chances, right_answers, text_answers, text_chance
from flair_jax.evaluators.features import BrokenImages
from flair_jax.report import flat


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def one_image(*rows, **options):
    return right_answers(np.array(rows, np.float32)[:, None, :], **options)["image_to_text"].tolist()


def test_the_right_text_has_to_beat_all_others():
    rows = [2, 1, 0], [1, 2, 0], [1, 1, 0], [1, 0, 1]
    assert one_image(*rows) == [True, False, False, False]
    assert one_image(*rows, positives=2) == [True, True, True, False]
    columns = np.array(rows, np.float32)[:, :, None]
    assert right_answers(columns)["text_to_image"].tolist() == [True, False, False, False]


def test_of_equal_scores_the_first_in_the_release_wins():
    """As argmax over the answers in the release's order, where the right one stands at `place`."""
    rows = np.array(list(itertools.product([0, 1], repeat=3)), np.float32)  # the right answer first
    for place in range(3):
        released = np.insert(rows[:, 1:], place, rows[:, 0], axis=1)
        expected = released.argmax(1) == place
        assert one_image(*rows, ties="first", place=np.full(len(rows), place)) == expected.tolist()


@pytest.mark.golden
def test_pairs_equal_the_published_scorer():
    golden = load_golden("fsc_clip/metrics.npz")
    scores = golden["pair_scores_n_caption_image"].transpose(0, 2, 1)  # (Q, image, text)
    right = right_answers(scores)
    values = [right[name].mean() for name in ("text_score", "image_score", "group_score")]
    np.testing.assert_allclose(values, golden["winoground"], rtol=1e-6)


def test_only_right_texts_close_to_each_other():
    """Two right texts and a wrong one at angles on a circle."""
    angles = np.array([[0, 10, 30], [0, 30, 40], [0, 0, 0], [0, 20, -30]]) * np.pi / 180
    vectors = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    assert text_answers(vectors, 2).tolist() == [True, False, False, True]


@pytest.mark.parametrize(("images", "texts", "positives"), [(1, 2, 1), (1, 5, 1), (10, 1, 1), (1, 3, 2), (2, 2, 1)])
def test_chance_is_what_random_scores_get(images, texts, positives):
    random = np.random.default_rng(0).random((200_000, images, texts))
    right = right_answers(random, positives)
    assert {name: pytest.approx(value, abs=0.005) for name, value in chances(images, texts, positives).items()} == {
        name: value.mean() for name, value in right.items()
    }


def test_chance_of_texts():
    assert text_chance(3, 2) == pytest.approx(1 / 3)
    vectors = np.random.default_rng(0).normal(size=(50_000, 4, 64))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    assert text_answers(vectors, 2).mean() == pytest.approx(text_chance(4, 2), abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Averages


def test_average_by_level():
    values = np.array([1, 0, 0, 0, 1.0, 1])
    groups = ["a/x", "a/y", "a/y", "a/y", "b", "b"]
    parts = {"a/x": 1, "a/y": 0, "b": 1}
    assert average(values, groups) == {"": 0.75, "a": 0.5, **parts}
    assert average(values, groups, levels=1) == {"": 0.625, "a": 0.25, **parts}
    assert average(values, groups, levels=0) == {"": 0.5, "a": 0.25, **parts}
    assert average(values, [""] * 6) == {"": 0.5}
    with pytest.raises(ValueError, match="items of group 'a' beside items of its parts"):
        average(values[:2], ["a", "a/x"])


# ---------------------------------------------------------------------------------------------------------------------
# The evaluator

ITEMS = (
    Item((0,), (0, 1), group="a/x"),  # red and green are in image 0, more red: right
    Item((0,), (1, 0), group="a/y"),  # wrong
    Item((1,), (2, 0), group="b"),  # right
    Item((1,), (2, 1), group="b"),  # right
)


def colours(items=ITEMS, **changes):
    """Image 0 has two red patches and a green one, image 1 is blue, image 2 is black."""
    images = [
        canvas(16, 24, red=(0, 8, 8, 16), green=(8, 0, 8, 6)),
        canvas(16, 24, blue=(8, 8, 8, 8)),
        canvas(16, 24),
    ]
    words = ("red", "green", "blue")
    return ChoiceSet(
        **{**dict(name="colours", images=images, tokens=texts(0, 1, 2), items=items, texts=words), **changes}
    )


def evaluate(data, **options):
    return flat(Choice(ColourModel(8), data, preprocess=lambda x: x, **options).run({}))


@pytest.mark.parametrize(("image_batch", "devices"), [(1, 1), (2, 1), (64, 8)])
def test_accuracy_by_hand(image_batch, devices):
    results = evaluate(colours(), image_batch=image_batch, mesh=mesh(devices))
    for mode in ("flair", "global"):
        found = {name.removeprefix(f"choice/colours/{mode}/"): value for name, value in results.items() if mode in name}
        assert found == {
            "accuracy": 0.75,
            "accuracy/a": 0.5,
            "accuracy/b": 1.0,
            "accuracy/a/x": 1.0,
            "accuracy/a/y": 0.0,
        }
    assert {value for name, value in results.items() if "/chance/" in name} == {0.5}


def test_pairs_of_images_and_texts():
    items = [Item((0, 1), (0, 2)), Item((0, 1), (1, 0)), Item((1, 2), (2, 0))]
    # Item 1: image 0 has more red than green, and image 1 has none of both. Item 2: nothing is red in either image.
    assert evaluate(colours(items), modes=["global"]) == {
        "choice/colours/global/text_score": pytest.approx(1 / 3),
        "choice/colours/global/image_score": pytest.approx(1 / 3),
        "choice/colours/global/group_score": pytest.approx(1 / 3),
        "choice/colours/chance/text_score": 0.25,
        "choice/colours/chance/image_score": 0.25,
        "choice/colours/chance/group_score": pytest.approx(1 / 6),
    }


def test_both_directions_are_averaged_apart():
    items = [
        Item((0,), (0, 1), group="p"),
        Item((0, 1), (2,), group="p"),  # wrong
        Item((1, 0), (2,), group="q"),
        Item((1,), (2, 0), group="q"),
    ]
    results = evaluate(colours(items), modes=["global"])
    found = {name.split("global/")[1]: value for name, value in results.items() if "global" in name}
    assert found["accuracy"] == 0.75 and found["accuracy/p"] == 0.5 and found["accuracy/q"] == 1
    assert found["image_to_text_accuracy"] == 1 and found["text_to_image_accuracy"] == 0.5
    assert found["text_to_image_accuracy/p"] == 0


def test_right_together():
    joint = [("pair", "up"), ("set", "all")], [("pair", "up"), ("set", "all")], [("pair", "down")], [("pair", "down")]
    items = [Item(item.images, item.texts, joint=tuple(names)) for item, names in zip(ITEMS, joint, strict=True)]
    results = evaluate(colours(items), modes=["global"])
    assert results["choice/colours/global/pair_accuracy"] == 0.5
    assert results["choice/colours/global/set_accuracy"] == 0
    assert results["choice/colours/chance/pair_accuracy"] == 0.25


def test_texts_alone():
    """Text vectors of colours are equal or at right angles: the first item's two right texts are the same colour."""
    items = [Item((0,), (0, 3, 1), positives=2), Item((1,), (2, 1, 0), positives=2)]
    results = evaluate(colours(items, tokens=texts(0, 1, 2, 0), texts=()), modes=["global"], text_to_text=True)
    assert results["choice/colours/global/text_to_text_accuracy"] == 0.5
    assert results["choice/colours/chance/text_to_text_accuracy"] == pytest.approx(1 / 3)
    assert results["choice/colours/global/accuracy"] == 0.5


@pytest.mark.parametrize("mode", ["flair", "global"])
def test_equal_scores_are_never_right(mode):
    """A model that finds nothing anywhere, on items of every kind."""
    items = [*ITEMS, Item((0, 1, 2), (0,), group="c"), Item((0, 1), (0, 1), group="d"), Item((2,), (0, 1, 2), 2, "e")]
    evaluator = Choice(ColourModel(8), colours(items), preprocess=jnp.zeros_like, text_to_text=True, modes=[mode])
    results = flat(evaluator.run({}))
    assert {value for name, value in results.items() if f"/{mode}/" in name} == {0.0}
    assert evaluator.notes == ["A tie is wrong."]
    flattering = Choice(ColourModel(8), colours(), preprocess=jnp.zeros_like, ties="first")
    assert flattering.notes == ["Of equal scores the first one listed wins."]
    assert flat(flattering.run({}))["choice/colours/global/accuracy"] == 1


@pytest.mark.golden
def test_only_asked_pairs_are_scored_and_equal_the_reference(tiny_model, tiny_params):
    """Many texts of one image, few of another, none of a third; also in the order that the items name them."""
    images, tokens = nhwc(load_golden("tiny_inputs.npz")["images"]), load_golden("tiny_inputs.npz")["tokens"]
    items = [Item((3,), tuple(range(len(tokens)))), Item((0,), (5, 2)), Item((0, 3), (7,)), Item((3, 1), (0, 4))]
    data = ChoiceSet("tiny", images, tokens, items)
    evaluators = [
        Choice(tiny_model, data, preprocess=lambda x: x, image_batch=batch, mesh=mesh(devices))
        for batch, devices in ((3, 1), (64, 8))
    ]
    text = evaluators[0]._encoder.texts(tiny_params, tokens)
    image = tiny_model.apply({"params": tiny_params}, images, method="encode_image")
    asked = {(image, text) for item in items for image in item.images for text in item.texts}
    for evaluator in evaluators:
        scores, _ = evaluator.scores(tiny_params)
        for mode, method in (("flair", "score"), ("global", "global_score")):
            assert scores[mode].shape == (len(asked),)
            whole = np.asarray(tiny_model.apply({"params": tiny_params}, image, text, method=method))
            expected = [whole[pair] for pair in sorted(asked)]
            np.testing.assert_allclose(scores[mode], expected, rtol=1e-4, atol=1e-5)


def test_broken_scores_are_an_error():
    with pytest.raises(ValueError, match="choice/colours: scores of image 0 are not finite in mode 'flair'"):
        list(Choice(ColourModel(8), colours(), preprocess=lambda x: x * np.nan).run({}))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item((0,), (1,)), "item 0 has 1 images, 1 texts"),
        (Item((0,), (0, 1), positives=2), "2 right ones; expected one and several"),
        (Item((0, 1, 2), (0, 1, 2)), "item 0 has 3 images, 3 texts"),
        (Item((3,), (0, 1)), r"item 0 names images \(3,\); there are 3"),
        (Item((0,), (0, -1)), r"item 0 names texts \(0, -1\)"),
        (Item((0,), (0, 1), place=2), "place 2 of 2 answers"),
    ],
)
def test_wrong_items_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        colours([item])


def test_a_model_without_pooling_has_one_mode():
    class Plain(ColourModel):
        has_pooling = False

    results = flat(Choice(Plain(8), colours(), preprocess=lambda x: x).run({}))
    assert {name.split("/")[2] for name in results} == {"global", "chance"}
    assert results["choice/colours/global/accuracy"] == 0.75
    with pytest.raises(ValueError, match="expected one or more of"):
        Choice(Plain(8), colours(), preprocess=lambda x: x, modes=["flair"])


class Broken(list):
    """Images of which the one that is None cannot be read."""

    shape = 2, 16, 24, 3

    def __getitem__(self, index):
        if (image := super().__getitem__(index)) is None:
            raise OSError("no such image")
        return image


def boxed(wholes, owners=(0, 0, 1, 1)):
    """Four black images, boxes of two whole ones."""
    boxes = np.array([[0, 0, 1 / 3, 0.5], [0.2, 0.45, 1, 1], [0.7, 0.1, 0.9, 0.4], [0, 0, 0, 0]], np.float32)
    items = [Item((0,), (0, 2)), Item((1,), (2, 0)), Item((2,), (1, 0)), Item((3,), (1, 0))]
    whole = WholeImages(wholes, np.array(owners), boxes)
    return colours(items, images=[canvas(16, 24)] * 4, whole=whole)


@pytest.mark.parametrize(("image_batch", "text_batch", "devices"), [(1, 3, 1), (64, 512, 8)])
def test_the_region_that_fits_a_box_answers_for_it(image_batch, text_batch, devices):
    """Patches of 8 pixels are the regions. The last box has no area: its scores are a tie."""
    wholes = [canvas(16, 24, red=(0, 0, 8, 8), blue=(8, 8, 8, 8)), canvas(16, 24, green=(0, 16, 8, 8))]
    options = dict(image_batch=image_batch, text_batch=text_batch, mesh=mesh(devices), preprocess=lambda x: x)
    run = Choice(RegionModel(8), boxed(wholes), **options)
    scores, _ = run.scores({})
    assert list(scores) == ["global", "regions"] and not scores["global"].any()
    np.testing.assert_array_equal(scores["regions"], [1, 0, 0, 1, 0, 1, 0, 0])  # pairs by image, then by text
    assert flat(run.run({})) == {
        "choice/colours/global/accuracy": 0,
        "choice/colours/regions/accuracy": 0.75,
        "choice/colours/chance/accuracy": 0.5,
    }
    assert run.notes == [
        "A tie is wrong.",
        "Mode regions: no region overlaps 1 of 4 boxes, whose scores are a tie.",
    ]
    # Of a whole image that cannot be read, its boxes are named.
    run = Choice(RegionModel(8), boxed(Broken([wholes[0], None]), (1, 0, 1, 0)), modes=["regions"], **options)
    with pytest.raises(BrokenImages) as error:
        run.scores({})
    assert error.value.reasons == {0: "no such image", 2: "no such image"}


def test_modes_of_regions_need_regions_and_whole_images():
    wholes = [canvas(16, 24)] * 2
    for model, data in ((RegionModel(8), colours()), (ColourModel(8), boxed(wholes))):
        assert "regions" not in Choice(model, data, preprocess=lambda x: x)._modes
        with pytest.raises(ValueError, match="expected one or more of"):
            Choice(model, data, preprocess=lambda x: x, modes=["regions"])
    with pytest.raises(ValueError, match="there are 2 whole images; one beyond them is named"):
        boxed(wholes, (0, 1, 2, 0))
    with pytest.raises(ValueError, match=r"whole images of \(3,\) images, boxes \(4, 4\); expected \(4,\)"):
        boxed(wholes, (0, 1, 1))


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="expected one or more of"):
        Choice(ColourModel(8), colours(), preprocess=lambda x: x, modes=["topk"])
    with pytest.raises(ValueError, match="ties is 'last'"):
        Choice(ColourModel(8), colours(), preprocess=lambda x: x, ties="last")


def test_pictures():
    evaluator = Choice(ColourModel(8), colours([*ITEMS, Item((0, 1), (2,), group="c")]), preprocess=lambda x: x)
    assert not list(evaluator.figures({}))
    list(evaluator.run({}))
    found = dict(evaluator.figures({}))
    assert list(found) == [
        "by part",
        "most confident wrong decisions (flair)",
        "most confident wrong decisions (global)",
    ]
    assert all(np.asarray(picture).std() > 0 for picture in found.values())
