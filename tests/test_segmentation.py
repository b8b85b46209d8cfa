"""Zero-shot segmentation: counts and figures by hand, the whole way against PyTorch's, metrics against torchmetrics."""

import functools
import types

import jax
import numpy as np
import pytest
from colour_model import ColourModel, canvas, texts
from conftest import load_golden, nhwc
from optional import torch, torchmetrics

from flair_jax import initialize
from flair_jax.evaluators import Segmentation, SegmentationSet, features, segmentation
from flair_jax.evaluators.features import BrokenImages
from flair_jax.evaluators.segmentation import IGNORE, UNDECIDED, ConfusionMatrix, Grid, Windows
from flair_jax.evaluators.store import FeatureStore
from flair_jax.figures import page
from flair_jax.figures import segmentation as figures
from flair_jax.figures.page import LINE, MARGIN
from flair_jax.models.text import Text
from flair_jax.report import flat

IMAGES = nhwc(load_golden("tiny_inputs.npz")["images"])
TOKENS = load_golden("tiny_inputs.npz")["tokens"]


class Colours(ColourModel):
    image_size: tuple[int, int] = (16, 24)


def plain(images):
    return images


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


def evaluate(data, model=None, **options):
    evaluator = Segmentation(model or Colours(4), data, preprocess=plain, **options)
    return flat(evaluator.run({}))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def random_masks(classes, seed=0):
    """Labels without the last but one class, predictions without the last, both with pixels that do not count."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes - 2), classes - 1], (7, 11, 13))
    predictions = np.where(rng.random(labels.shape) < 0.4, labels, rng.integers(0, classes - 1, labels.shape))
    return np.where(rng.random(labels.shape) < 0.2, IGNORE, labels).astype(np.uint8), predictions


def test_iou_by_hand():
    labels = np.array([[0, 0, 0, 1], [1, 1, IGNORE, IGNORE]])
    predictions = np.array([[0, 0, 1, 1], [1, 2, 0, 7]])  # what stands on ignored pixels does not count
    matrix = ConfusionMatrix(4)
    matrix.add(labels, predictions)
    assert matrix.counts.tolist() == [[2, 1, 0, 0, 0], [0, 2, 1, 0, 0], [0] * 5, [0] * 5]
    np.testing.assert_allclose(matrix.iou(), [2 / 3, 2 / 4, 0, np.nan])  # 2 is predicted, 3 never occurs
    np.testing.assert_allclose(matrix.class_accuracy(), [2 / 3, 2 / 3, np.nan, np.nan])
    assert matrix.accuracy() == pytest.approx(4 / 6)


@pytest.mark.parametrize("classes", [4, 9])
def test_metrics_are_those_of_torchmetrics(classes):
    labels, predictions = random_masks(classes)
    matrix = ConfusionMatrix(classes)
    for label, prediction in zip(labels, predictions, strict=True):
        matrix.add(label, prediction)
    options = dict(num_classes=classes, ignore_index=IGNORE)
    true, guess = torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(predictions)

    def theirs(name, **more):
        return getattr(torchmetrics.classification, name)(**options, **more)(guess, true).numpy()

    assert (matrix.counts[:, :-1] == theirs("MulticlassConfusionMatrix")).all()
    np.testing.assert_allclose(np.nanmean(matrix.iou()), theirs("MulticlassJaccardIndex", average="macro"), rtol=1e-6)
    each = theirs("MulticlassJaccardIndex", average="none")
    np.testing.assert_allclose(np.nan_to_num(matrix.iou()), each, rtol=1e-6)
    np.testing.assert_allclose(matrix.accuracy(), theirs("MulticlassAccuracy", average="micro"), rtol=1e-6)
    each = theirs("MulticlassAccuracy", average="none")
    np.testing.assert_allclose(np.nan_to_num(matrix.class_accuracy()), each, rtol=1e-6)


def test_metrics_leave_out_a_class_that_is_neither_true_nor_predicted():
    labels, predictions = random_masks(6)
    few, many = ConfusionMatrix(6), ConfusionMatrix(8)
    few.add(labels, predictions)
    many.add(labels, predictions)
    assert np.isnan(many.iou()[6:]).all()
    assert np.nanmean(many.iou()) == np.nanmean(few.iou())
    whole = torchmetrics.classification.MulticlassJaccardIndex(8, ignore_index=IGNORE)
    theirs = whole(torch.from_numpy(predictions), torch.from_numpy(labels.astype(np.int64)))
    assert np.nanmean(many.iou()) == pytest.approx(float(theirs), rel=1e-6)


def test_counts_over_processes_are_summed_whole(monkeypatch):
    """Three processes, whose sums do not fit into 32 bits."""
    matrix = ConfusionMatrix(2)
    matrix.counts[:] = [[2**31 + 5, 1, 0], [0, 2**40 + 3, 7]]
    gathered = types.SimpleNamespace(process_allgather=lambda x: np.stack([x] * 3))
    monkeypatch.setattr(segmentation, "multihost_utils", gathered)
    expected = 3 * matrix.counts
    matrix.sum_over_processes()
    assert (matrix.counts == expected).all()


def test_chance_is_what_random_predictions_reach():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 200_000, p=[0.5, 0.3, 0.2, 0.0])  # class 3 never occurs, and is guessed all the same
    matrix = ConfusionMatrix(4)
    matrix.add(labels, rng.integers(0, 4, labels.size))
    assert matrix.chance() == pytest.approx(np.nanmean(matrix.iou()), abs=2e-3)
    assert matrix.chance() == pytest.approx(np.mean([0.5 / 2.5, 0.3 / 1.9, 0.2 / 1.6, 0]), abs=2e-3)


def test_impossible_labels_are_refused():
    with pytest.raises(ValueError, match="labels run from 0 to 3; expected 0 to 2"):
        ConfusionMatrix(3).add(np.array([0, 3]), np.array([0, 0]))
    with pytest.raises(ValueError, match="predictions run from -1 to 0"):
        ConfusionMatrix(3).add(np.array([0, 1]), np.array([0, -1]))
    with pytest.raises(ValueError, match=r"labels \(2,\) and predictions \(1,\)"):
        ConfusionMatrix(3).add(np.array([0, 1]), np.array([0]))


# ---------------------------------------------------------------------------------------------------------------------
# Windows and interpolation


@pytest.mark.parametrize(("old", "new"), [((7, 5, 3), (14, 5)), ((9, 16, 3), (5, 12)), ((4, 4, 3), (13, 9))])
def test_resizing_is_pytorchs(old, new):
    image = np.random.default_rng(0).random(old).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], new, mode="bilinear")
    np.testing.assert_allclose(segmentation.resize(image, new), theirs[0].permute(1, 2, 0).numpy(), atol=1e-6)
    pixels = np.uint8(255 * image)
    whole = segmentation.resize(pixels, new)
    assert whole.dtype == np.uint8
    assert np.abs(whole - segmentation.resize(pixels.astype(np.float32), new)).max() <= 0.5


@pytest.mark.parametrize(
    ("size", "resized", "tops", "lefts"),
    [
        ((375, 500), (336, 448), (0, 112), (0, 112, 224)),
        ((500, 333), (505, 336), (0, 112, 224, 281), (0, 112)),  # the last window is pushed back inside
        ((100, 1000), (224, 2240), (0,), tuple(range(0, 2017, 112))),  # of 205 x 2048 no window could be cut
        ((224, 224), (336, 336), (0, 112), (0, 112)),
    ],
)
def test_windows_of_the_published_protocol(size, resized, tops, lefts):
    assert segmentation.sliding(size, (224, 224), 336 / 224) == Grid(resized, tops, lefts)


def test_sizes_of_other_protocols_and_models():
    assert segmentation.sliding((1024, 2048), (224, 224), 2.5).size == (560, 1120)
    assert segmentation.sliding((480, 640), (224, 224), 2.0).size == (448, 597)
    assert segmentation.sliding((64, 64), (64, 64), None) == Grid((64, 64), (0,), (0,))
    assert segmentation.sliding((30, 64), (64, 64), None).size == (64, 137)
    assert segmentation.whole((375, 500), 224, 16, 1.5) == Grid((336, 448), (0,), (0,))
    assert segmentation.whole((500, 281), 224, 16, 1.5) == Grid((576, 336), (0,), (0,))


def test_an_image_is_loaded_once_for_its_windows_and_keys_tell_windows_apart(monkeypatch):
    loaded = []

    class Images(list):
        keys = ("a", "b")

        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    images = Images([np.arange(40 * 30 * 3).reshape(40, 30, 3), np.zeros((20, 20, 3), int)])
    grids = [segmentation.sliding(image.shape[:2], (20, 20), None) for image in images]
    loaded.clear()
    windows = Windows(images, np.array([0, 1]), grids, (20, 20))
    assert windows.shape == (7, 20, 20, 3)
    assert (windows[5] == images[0][20:, 10:]).all()
    assert [windows[number].shape for number in range(7)] == [(20, 20, 3)] * 7
    assert loaded == [0, 0, 1]  # one of the two was the line above
    assert windows.image_of(np.array([0, 5, 6])).tolist() == [0, 0, 1]
    assert len(set(windows.keys)) == 7
    monkeypatch.setattr(segmentation, "KEPT_WINDOWS", 6)
    assert windows.keys is None


# ---------------------------------------------------------------------------------------------------------------------
# Known answers


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
        query_of_prompt=np.array([0, 1, 2]),
    )
    return SegmentationSet(**{**fields, **changes})


@pytest.mark.parametrize(("image_batch", "devices"), [(1, 1), (64, 8)])
def test_scores_and_chance_by_hand(image_batch, devices):
    results = evaluate(
        colour_set(), modes=("projected", "value"), image_batch=image_batch, mesh=mesh(devices), threshold=0.9
    )
    half, blue = 12 * 16, 8 * 16
    assert results == {
        "segmentation/colours/projected/iou/red": pytest.approx(half / (half + half)),
        "segmentation/colours/projected/iou/green": 1,
        "segmentation/colours/projected/iou/blue": pytest.approx(blue / (half + blue)),
        "segmentation/colours/projected/miou": pytest.approx((0.5 + 1 + 0.4) / 3),
        "segmentation/colours/projected/accuracy": pytest.approx((2 * half + blue) / (3 * half + blue)),
        "segmentation/colours/projected/mean_accuracy": pytest.approx((1 + 1 + blue / (half + blue)) / 3),
        # The other mode takes red for green, green for blue and blue for red: nothing is right.
        **{f"segmentation/colours/value/{metric}": 0 for metric in ("miou", "accuracy", "mean_accuracy")},
        **{f"segmentation/colours/value/iou/{name}": 0 for name in ("red", "green", "blue")},
        "segmentation/colours/chance": pytest.approx(
            np.mean([n / (2 * n + 3 * half + blue) for n in (half, half, half + blue)])
        ),
    }


def test_attention_maps_as_scores():
    """Each query's weights sum to one over the image: the smaller its area, the larger they are there."""
    results = evaluate(colour_set(), modes=("attention",))
    assert results["segmentation/colours/attention/iou/green"] == 1
    assert results["segmentation/colours/attention/miou"] == pytest.approx((0.5 + 1 + 0.4) / 3)


def test_a_query_is_the_mean_of_its_prompts_and_classes_may_be_absent():
    """Red or green as one class "warm": a pixel of either is nearer to it than to blue."""
    labels = [np.where(x == 1, 0, x) for x in colour_set().labels]
    data = colour_set(
        labels=labels[:1],
        images=colour_set().images[:1],
        classes=("warm", "blue"),
        tokens=texts(0, 2, 1),
        query_of_prompt=np.array([0, 1, 0]),
    )
    assert evaluate(data, modes=("projected",)) == {
        **{f"segmentation/colours/projected/{metric}": 1 for metric in ("miou", "accuracy", "mean_accuracy")},
        "segmentation/colours/projected/iou/warm": 1,
        "segmentation/colours/chance": 0.25,  # half of the pixels are taken for warm, and blue gets 0
    }


def test_a_class_has_the_best_of_its_names():
    """Blue or green as the names of one class; the mean of them would lose against what is nearly green."""
    data = colour_set(
        classes=("red", "cold"), tokens=texts(0, 1, 2), class_of_query=np.array([0, 1, 1]), labels=[
            np.repeat([[0, 1]], 16, 0).repeat(12, 1), np.repeat([[0, 1]], 16, 0).repeat(12, 1)
        ]
    )  # fmt: skip
    assert evaluate(data, modes=("projected",))["segmentation/colours/projected/miou"] == 1


class Indifferent(Colours):
    """Finds all texts equally near, everywhere."""

    def encode_text(self, text, *, local=True):
        features = super().encode_text(text, local=local)
        return features.replace(pooled=features.pooled * 0 + 1)


@pytest.mark.parametrize("labels", [np.zeros((16, 24), int), np.repeat([[0, 1, 2]], 16, 0).repeat(8, 1)])
def test_equal_scores_never_get_full_marks(labels):
    """Also where one class alone is labelled, and would be right with the first or the last of equal ones."""
    for name in range(3):
        data = colour_set(labels=[(labels + name) % 3] * 2)
        results = evaluate(data, model=Indifferent(4), modes=("projected", "value"))
        for mode in ("projected", "value"):
            assert results[f"segmentation/colours/{mode}/miou"] <= results["segmentation/colours/chance"]
            assert results[f"segmentation/colours/{mode}/accuracy"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Background


def decide(values, owner, **options):
    """The decision about pixels whose scores are given, (Q, h, w): windows and labels have one patch per pixel."""
    height, width = values.shape[1:]
    options = dict(background=None, temperature=1.0, threshold=0.1, area=None, shares=False) | options
    rows, columns = np.eye(64, height, dtype=np.float32), np.eye(128, width, dtype=np.float32)
    size = np.array([height, width], np.int32)
    classes = max(owner) + 1
    chosen = segmentation._decide(
        rows, columns, np.float32(values), None, np.array(owner), size, classes=classes, **options
    )
    return np.asarray(chosen)[:height, :width]


def test_background_is_what_no_class_is_sure_of():
    pixels = [[0.5, 0.1, 0.1, 0.3], [0.1, 0.6, 0.2, 0.1], [0.1, 0.4, 0.4, 0.1], [0.3, 0.2, 0.1, 0.4]]
    probabilities = np.array(pixels).T[:, None]  # of four queries, of which two are names of class 2
    values, owner = np.log(probabilities), [0, 1, 2, 2]
    assert decide(values, owner, background=0, threshold=0.1).tolist() == [[0, 1, UNDECIDED, 2]]
    assert decide(values, owner, background=0, threshold=0.5).tolist() == [[0, 1, 0, 0]]
    assert decide(values / 4, owner, background=0, threshold=0.5, temperature=4.0).tolist() == [[0, 1, 0, 0]]
    assert decide(values, owner, background=2, threshold=0.5).tolist() == [[0, 1, 2, 2]]
    assert decide(3 * probabilities, owner, background=0, threshold=0.45, shares=True).tolist() == [[0, 1, 0, 0]]


def test_a_tie_with_the_background_is_background_and_other_ties_are_nothing():
    values = np.zeros((3, 1, 3))
    values[:, 0, 1], values[:, 0, 2] = [1, 1, 0], [0, 1, 1]
    assert decide(values, [0, 1, 2], background=0).tolist() == [[0, 0, UNDECIDED]]
    assert decide(values, [0, 1, 2], background=1).tolist() == [[1, 1, 1]]
    assert decide(values, [0, 1, 2]).tolist() == [[UNDECIDED] * 3]
    assert decide(values, [0, 0, 1]).tolist() == [[UNDECIDED, 0, UNDECIDED]]


def sclip_classes(values, owner, threshold, area):
    """The rule as its authors state it: classes of a small area lose, then what is unsure is background."""
    probabilities = np.exp(values) / np.exp(values).sum(0)
    classes = np.stack([probabilities[owner == name].max(0) for name in range(max(owner) + 1)])
    best = classes.argmax(0)
    pixels = np.array([(best == name).sum() for name in range(1, len(classes))])
    kept = pixels > area * pixels.sum()
    classes = classes * np.r_[True, kept][:, None, None]
    return np.where(classes.max(0) < threshold, 0, classes.argmax(0))


@pytest.mark.parametrize(("threshold", "area"), [(0.1, 0.1), (0.3, 0.3)])
def test_small_areas_are_left_out(threshold, area):
    rng = np.random.default_rng(1)
    owner = np.array([0, 0, 1, 2, 2, 3, 4, 5])
    values = rng.normal(size=(8, 20, 30))
    values[6] -= 1.5  # a class that is rare
    values[:, 5:] += 3 * np.eye(8)[np.repeat([2, 3, 0], 10)].T[:, None]
    expected = sclip_classes(values, owner, threshold, area)
    assert (decide(values, owner, background=0, threshold=threshold, area=area) == expected).all()
    for changed in (sclip_classes(values, owner, threshold, 1e-9), sclip_classes(values, owner, 1e-9, area)):
        assert (expected != changed).any()


def test_names_that_two_classes_share_are_equal_to_the_bit():
    """A name of the background that is also a class, as "bed" of COCO-Object: such pixels are background."""
    data = colour_set(
        classes=("other", "green", "red"),
        tokens=texts(0, 2, 1, 0),
        query_of_prompt=np.arange(4),
        class_of_query=np.array([0, 0, 1, 2]),
        background=0,
    )
    evaluator = Segmentation(Colours(4), data, preprocess=plain, modes=("projected",))
    counts = evaluator.confusion({})["projected"].counts
    half, quarter = 12 * 16, 8 * 16
    # True by predicted: red and blue are background, and nothing is undecided.
    assert counts.tolist() == [[half, 0, 0, 0], [0, half, 0, 0], [half + quarter, 0, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# The whole way, on the tiny FLAIR, against PyTorch's interpolation and a plain loop over windows

SIZES = [(40, 50), (96, 33), (37, 37)]
OWNER, CLASS = np.array([0, 0, 1, 2, 3, 3]), np.array([0, 1, 2, 2])


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in SIZES]
    labels = [rng.integers(0, 3, (53, 41)), rng.integers(0, 3, (96, 33)), rng.integers(0, 3, (70, 70))]
    labels = [np.where(rng.random(label.shape) < 0.2, IGNORE, label) for label in labels]
    return SegmentationSet("tiny", "abc", images, labels, TOKENS[:6], OWNER, CLASS, np.array(SIZES), background=None)


@pytest.fixture(scope="module")
def apply(tiny_model, tiny_params):
    @functools.cache
    def jitted(method):
        return jax.jit(lambda params, *args: tiny_model.apply({"params": params}, *args, method=method))

    return lambda method, *args: jitted(method)(tiny_params, *args)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected_classes(apply, data, size, mode, short_side):
    """Each image's best classes, by the protocol's words."""
    text = apply("encode_text", Text.padded(TOKENS[:6]))
    pooled = np.asarray(text.pooled)
    vectors = unit(np.stack([unit(pooled)[query == OWNER].mean(0) for query in range(4)]))
    raw = text.replace(pooled=np.stack([pooled[query == OWNER].mean(0) for query in range(4)]), local=None)
    for image, label in zip(data.images, data.labels, strict=True):
        scale = short_side * size / min(image.shape[:2])
        height, width = (int(side * scale + 0.5) for side in image.shape[:2])
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear")[0].permute(1, 2, 0).numpy()
        total, count = np.zeros((4, height, width), np.float32), np.zeros((height, width), np.float32)
        for top in range(0, height - size + size // 2, size // 2):
            for left in range(0, width - size + size // 2, size // 2):
                y, x = min(top, height - size), min(left, width - size)
                features = apply("encode_image", pixels[None, y : y + size, x : x + size])
                if mode == "attention":
                    scores = np.asarray(apply("attention_maps", features, raw)[0]).mean(2)[0]
                else:
                    local = features.local if mode == "projected" else apply("dense_features", features)
                    scores = (unit(np.asarray(local[0])) @ vectors.T).T
                side = int(scores.shape[-1] ** 0.5)
                patches = torch.from_numpy(scores.reshape(1, 4, side, side).copy())
                large = torch.nn.functional.interpolate(patches, (size, size), mode="bilinear")
                total[:, y : y + size, x : x + size] += large[0].numpy()
                count[y : y + size, x : x + size] += 1
        mean = torch.from_numpy(total / count)[None]
        final = torch.nn.functional.interpolate(mean, label.shape, mode="bilinear")[0].numpy()
        yield CLASS[final.argmax(0)]


def test_predictions_are_those_of_the_protocol(tiny_model, tiny_params, apply, photos):
    """All modes, images and labels of several sizes; batches that end within an image; one device and eight."""
    size = tiny_model.image_size[0]
    expected = {mode: ConfusionMatrix(3) for mode in segmentation.MODES}
    for mode, matrix in expected.items():
        for label, prediction in zip(photos.labels, expected_classes(apply, photos, size, mode, 1.5), strict=True):
            matrix.add(label, prediction)
    found = []
    for image_batch, devices in ((64, 1), (5, 8)):
        options = dict(short_side=1.5, image_batch=image_batch, text_batch=4, mesh=mesh(devices))
        evaluator = Segmentation(tiny_model, photos, preprocess=plain, **options)
        found.append({mode: matrix.counts for mode, matrix in evaluator.confusion(tiny_params).items()})
    for mode in segmentation.MODES:
        assert np.abs(found[0][mode] - found[1][mode]).sum() <= 4  # pixels on an edge, of 8,000
        assert np.abs(found[0][mode] - expected[mode].counts).sum() <= 8
    assert (found[0]["value"] != found[0]["projected"]).any()


def test_whole_images_with_resized_positions(tiny_model, tiny_params, apply, photos):
    """Each image at once, in the size nearest to the asked one; by hand for one of them."""
    options = dict(short_side=1.25, whole_image=True, modes=("projected",))

    def confusion(numbers):
        images, labels = [photos.images[number] for number in numbers], [photos.labels[number] for number in numbers]
        data = SegmentationSet("few", "abc", images, labels, TOKENS[:6], OWNER, CLASS, photos.sizes[numbers])
        return Segmentation(tiny_model, data, preprocess=plain, **options).confusion(tiny_params)["projected"]

    assert confusion([1, 2]).counts.sum() == sum((label != IGNORE).sum() for label in photos.labels[1:])
    patch = tiny_model.vision_options["patch_size"]
    size = segmentation.whole((37, 37), tiny_model.image_size[0], patch, 1.25).size
    model, params = initialize.with_image_size(tiny_model, tiny_params, size)
    pixels = segmentation.resize(photos.images[2], size)[None]
    local = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode_image").local)(params, pixels)
    pooled = apply("encode_text", Text.padded(TOKENS[:6])).pooled
    vectors = unit(np.stack([unit(np.asarray(pooled))[query == OWNER].mean(0) for query in range(4)]))
    scores = (unit(np.asarray(local[0])) @ vectors.T).T.reshape(1, 4, size[0] // patch, size[1] // patch)
    large = torch.nn.functional.interpolate(torch.from_numpy(scores.copy()), size, mode="bilinear")
    large = torch.nn.functional.interpolate(large, (70, 70), mode="bilinear")[0].numpy()
    expected = ConfusionMatrix(3)
    expected.add(photos.labels[2], CLASS[large.argmax(0)])
    assert np.abs(confusion([2]).counts - expected.counts).sum() <= 4


def test_broken_images_are_named_by_their_number(tiny_model, tiny_params, photos):
    class Images(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("photo 1 is gone")
            return super().__getitem__(index)

    data = SegmentationSet("tiny", "abc", Images(photos.images), photos.labels, TOKENS[:6], OWNER, CLASS, photos.sizes)
    evaluator = Segmentation(tiny_model, data, preprocess=plain, short_side=1.5, modes=("projected",))
    with pytest.raises(BrokenImages) as caught:
        evaluator.confusion(tiny_params)
    assert caught.value.reasons == {1: "photo 1 is gone"}


class Keyed(list):
    """Images with keys for a store; what is loaded is noted, and one may be broken."""

    keys = tuple("abc")

    def __init__(self, images, broken=None):
        super().__init__(images)
        self.loaded, self.broken = [], broken

    def __getitem__(self, index):
        self.loaded.append(index)
        if index == self.broken:
            raise OSError("gone")
        return super().__getitem__(index)


def test_windows_that_a_store_has_already_come_first_and_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.random((*size, 3)).astype(np.float32) for size in ((16, 70), (40, 30), (20, 50))]
    labels = [rng.integers(0, 3, image.shape[:2]) for image in images]

    def confusion(images):
        data = colour_set(images=images, labels=labels, sizes=np.array([label.shape for label in labels]))
        evaluator = Segmentation(Colours(4), data, preprocess=plain, modes=("projected",), image_batch=3, mesh=mesh(1))
        return evaluator.confusion({})["projected"].counts

    expected = confusion(images)
    with features.session(store=FeatureStore(tmp_path)):
        with pytest.raises(BrokenImages):
            confusion(Keyed(images, broken=1))
        again = Keyed(images)
        assert (confusion(again) == expected).all()
        assert set(again.loaded) == {1}
        assert len(again.loaded) == 1  # for all of its windows


def test_labels_that_cannot_be_read_are_broken_images():
    class Labels(list):
        def __getitem__(self, index):
            if index == 1:
                raise ValueError("mask.png: a mask of 3 x 3 pixels")
            return super().__getitem__(index)

    data = colour_set(labels=Labels(colour_set().labels))
    with pytest.raises(BrokenImages) as caught:
        evaluate(data, modes=("projected",))
    assert caught.value.reasons == {1: "mask.png: a mask of 3 x 3 pixels"}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, and what is refused


@pytest.mark.parametrize("modes", [("projected", "value"), ("value", "projected")])
def test_figures_show_masks_of_the_best_mode_and_bars(modes):
    evaluator = Segmentation(Colours(4), colour_set(), preprocess=plain, modes=modes)
    assert list(evaluator.figures({})) == []
    list(evaluator.run({}))
    (title, masks), (_, bars) = evaluator.figures({})
    assert title == "true and predicted masks (projected)"
    assert evaluator.notes == [
        "Scores of patches come from windows of 16 x 24 pixels at a stride of half a window; "
        "the mean IoU is over classes that are true or predicted."
    ]
    assert bars.width > 400
    pixels = np.asarray(masks)
    top, left = MARGIN + LINE, MARGIN + figures.TILE + MARGIN
    true, predicted = pixels[top : top + 170, left:], pixels[top : top + 170, left + figures.TILE + MARGIN :]
    assert (true[20, 20] == predicted[20, 20]).all()  # red is right in the first image
    assert (true[20, 20] != true[20, 200]).any()


def test_the_legend_names_every_class_that_is_seen(monkeypatch):
    """Those of the true mask first; predicted ones where nothing is labelled, too."""
    named, marked = [], page.marked
    monkeypatch.setattr(page, "marked", lambda text, *rest: named.append(text) or marked(text, *rest))
    label, found = np.full((4, 4), 255), np.full((4, 4), 2)
    label[0], found[0], found[1, 0] = 1, 1, -1
    names = [f"class {number}" for number in range(5)]
    figures.masks([np.zeros((4, 4, 3), np.uint8)], [label], [found], names)
    assert named == ["class 1", "class 2 *"]


def test_wrong_sets_and_options_are_refused():
    with pytest.raises(ValueError, match=r"no prompt for the classes \['green'\]"):
        colour_set(query_of_prompt=np.array([0, 2, 2]))
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        colour_set(labels=colour_set().labels[:1])
    with pytest.raises(ValueError, match="texts belong to numbers from 0 to 3; expected 0 to 2"):
        colour_set(query_of_prompt=np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="expected every class"):
        colour_set(class_of_query=np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="background is 3 of 3 classes"):
        colour_set(background=3)
    with pytest.raises(ValueError, match="modes are \\('key',\\)"):
        evaluate(colour_set(), modes=("key",))
    with pytest.raises(ValueError, match="temperature is 0; expected a number above 0"):
        evaluate(colour_set(), temperature=0)
    with pytest.raises(ValueError, match="whole_image needs short_side"):
        evaluate(colour_set(), whole_image=True)
    empty = colour_set(labels=[np.full((16, 24), IGNORE)] * 2)
    with pytest.raises(ValueError, match="segmentation/colours: no pixel has a label"):
        evaluate(empty, modes=("projected",))
    with pytest.raises(ValueError, match="segmentation/colours: scores of image 0 are not finite"):
        flat(Segmentation(Colours(4), colour_set(), preprocess=lambda x: x * np.nan).run({}))
