"""Zero-shot segmentation: counts and figures by hand, predictions against PyTorch's interpolation."""

import jax
import numpy as np
import pytest
from colour_model import ColourModel, canvas, texts
from conftest import load_golden, nhwc
from optional import torch

from flair_jax.evaluators import Segmentation, SegmentationSet
from flair_jax.evaluators.features import patch_grid
from flair_jax.evaluators.segmentation import IGNORE, ConfusionMatrix
from flair_jax.models.text import Text
from flair_jax.report import flat

IMAGES = nhwc(load_golden("tiny_inputs.npz")["images"])
TOKENS = load_golden("tiny_inputs.npz")["tokens"]


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


def test_iou_by_hand():
    labels = np.array([[0, 0, 0, 1], [1, 1, IGNORE, IGNORE]])
    predictions = np.array([[0, 0, 1, 1], [1, 2, 0, -1]])  # what stands on ignored pixels does not count
    matrix = ConfusionMatrix(4)
    matrix.add(labels, predictions)
    assert matrix.counts.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [0] * 4, [0] * 4]
    np.testing.assert_allclose(matrix.iou(), [2 / 3, 2 / 4, np.nan, np.nan])


def test_iou_is_that_of_all_pixels_however_they_are_batched():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, (2, 7, 11, 13))
    labels = np.where(labels == 4, IGNORE, labels).astype(np.uint8)
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.add(labels, predictions)
    for image in range(7):
        parts.add(labels[image], predictions[image])
    assert (whole.counts == parts.counts).all()
    for name in range(4):
        union = (((labels == name) | (predictions == name)) & (labels != IGNORE)).sum()
        assert whole.iou()[name] == ((labels == name) & (predictions == name)).sum() / union


def test_chance_is_what_random_labels_reach():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 200_000, p=[0.5, 0.3, 0.2, 0.0])  # class 3 never occurs, and is guessed all the same
    matrix = ConfusionMatrix(4)
    matrix.add(labels, rng.integers(0, 4, labels.size))
    assert matrix.chance() == pytest.approx(np.nanmean(matrix.iou()), abs=2e-3)
    assert matrix.chance() == pytest.approx(np.mean([0.5 / 2.5, 0.3 / 1.9, 0.2 / 1.6]), abs=2e-3)


def test_impossible_labels_are_refused():
    with pytest.raises(ValueError, match="labels run from 0 to 3; expected 0 to 2"):
        ConfusionMatrix(3).add(np.array([0, 3]), np.array([0, 0]))
    with pytest.raises(ValueError, match="predictions run from -1 to 0"):
        ConfusionMatrix(3).add(np.array([0, 1]), np.array([0, -1]))
    with pytest.raises(ValueError, match=r"labels \(2,\) and predictions \(1,\)"):
        ConfusionMatrix(3).add(np.array([0, 1]), np.array([0]))


def colour_set(**changes):
    """Red, green and blue halves in images of 16 x 24 pixels; the second image's left half is labelled wrongly."""
    left, right = (0, 0, 16, 12), (0, 12, 16, 12)
    label = np.full((16, 24), IGNORE, np.uint8)
    first, second = label.copy(), label.copy()
    first[:, :12], first[:, 12:] = 0, 1
    second[:, :12], second[:, 16:] = 2, 2
    fields = dict(
        name="colours",
        classes=("red", "green", "blue"),
        images=[canvas(16, 24, red=left, green=right), canvas(16, 24, red=left, blue=right)],
        labels=[first, second],
        tokens=texts(0, 1, 2),
        class_of_prompt=np.array([0, 1, 2]),
    )
    return SegmentationSet(**{**fields, **changes})


@pytest.mark.parametrize(("image_batch", "devices"), [(1, 1), (64, 8)])
def test_miou_and_chance_by_hand(image_batch, devices):
    options = {"modes": ("projected", "value"), "image_batch": image_batch, "mesh": mesh(devices)}
    evaluator = Segmentation(ColourModel(4), colour_set(), preprocess=lambda x: x, **options)
    results = flat(evaluator.run({}))
    half, blue = 12 * 16, 8 * 16
    assert results == {
        "segmentation/colours/iou/red": pytest.approx(half / (half + half)),
        "segmentation/colours/iou/green": 1,
        "segmentation/colours/iou/blue": pytest.approx(blue / (half + blue)),
        "segmentation/colours/miou": pytest.approx((0.5 + 1 + 0.4) / 3),
        # The other mode takes red for green, green for blue and blue for red: nothing is right.
        "segmentation/colours/value/miou": 0,
        "segmentation/colours/chance": pytest.approx(
            np.mean([n / (2 * n + 3 * half + blue) for n in (half, half, half + blue)])
        ),
    }


def test_a_class_is_the_mean_of_its_prompts_and_absent_classes_do_not_count():
    """Red or green as one class "warm": a pixel of either is nearer to it than to blue."""
    labels = [np.where(x == 1, 0, x) for x in colour_set().labels]
    data = colour_set(
        labels=labels[:1],
        images=colour_set().images[:1],
        classes=("warm", "blue"),
        tokens=texts(0, 2, 1),
        class_of_prompt=np.array([0, 1, 0]),
    )
    results = flat(Segmentation(ColourModel(4), data, preprocess=lambda x: x, modes=("projected",)).run({}))
    assert results == {
        "segmentation/colours/miou": 1,
        "segmentation/colours/iou/warm": 1,
        "segmentation/colours/chance": 0.5,
    }


def test_predictions_equal_torch_interpolation(tiny_model, tiny_params):
    """Both modes on labels of another size than the images, in two batches."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (len(IMAGES), 37, 53))
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    owner = np.array([0, 0, 1, 2, 1, 2])
    data = SegmentationSet("tiny", "abc", IMAGES, labels, TOKENS[:6], owner)
    evaluator = Segmentation(tiny_model, data, preprocess=lambda x: x, image_batch=3, text_batch=4, mesh=mesh(1))
    matrices = evaluator.confusion(tiny_params)

    def apply(method, *args):
        return jax.jit(lambda params, *args: tiny_model.apply({"params": params}, *args, method=method))(
            tiny_params, *args
        )

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    image, text = apply("encode_image", IMAGES), unit(np.asarray(apply("encode_text", Text.padded(TOKENS[:6])).pooled))
    vectors = unit(np.stack([text[owner == name].mean(0) for name in range(3)]))
    for mode, local in (("value", apply("dense_features", image)), ("projected", image.local)):
        cosine = unit(np.asarray(local)) @ vectors.T  # (images, patches, 3)
        rows, columns = patch_grid(*IMAGES.shape[1:3], cosine.shape[1])
        cosine = cosine.reshape(-1, rows, columns, 3).transpose(0, 3, 1, 2)
        large = torch.nn.functional.interpolate(torch.from_numpy(cosine), (37, 53), mode="bilinear")
        expected = ConfusionMatrix(3)
        expected.add(labels, large.argmax(1).numpy())
        assert np.abs(matrices[mode].counts - expected.counts).sum() <= 4  # of 6,000 pixels, for rounding on an edge
    assert (matrices["value"].counts != matrices["projected"].counts).any()


def test_wrong_sets_and_options_are_refused():
    with pytest.raises(ValueError, match=r"no prompt for the classes \['green'\]"):
        colour_set(class_of_prompt=np.array([0, 2, 2]))
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        colour_set(labels=colour_set().labels[:1])
    with pytest.raises(ValueError, match="texts belong to numbers from 0 to 3; expected 0 to 2"):
        colour_set(class_of_prompt=np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="modes are \\('key',\\)"):
        Segmentation(ColourModel(4), colour_set(), preprocess=lambda x: x, modes=("key",))
    empty = colour_set(labels=[np.full((16, 24), IGNORE)] * 2)
    with pytest.raises(ValueError, match="segmentation/colours: no pixel has a label"):
        flat(Segmentation(ColourModel(4), empty, preprocess=lambda x: x, modes=("projected",)).run({}))
    with pytest.raises(ValueError, match="predictions run from -1"):
        flat(Segmentation(ColourModel(4), colour_set(), preprocess=lambda x: x * np.nan).run({}))
