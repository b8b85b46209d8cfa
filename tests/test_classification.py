"""Zero-shot classification: metrics against scikit-learn, torchmetrics and CLIP_benchmark, scores against the model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colour_model import ColourModel, RegionModel, canvas, texts
from conftest import load_golden, nhwc
from optional import Optional, torch, torchmetrics
from test_grain import golden_model, golden_params

from flair_jax.evaluators import Classification, ClassificationSet, classification
from flair_jax.evaluators.classification import (
    average_precision,
    classification_chance,
    classification_metrics,
    ranks,
    roc_auc,
    voc_11_point,
)
from flair_jax.figures import classification as figures
from flair_jax.figures.page import MARGIN
from flair_jax.models.dual_encoder import TextFeatures
from flair_jax.models.layers import normalize
from flair_jax.models.text import Text
from flair_jax.report import flat

# Each test compares with scikit-learn first: what needs PyTorch may be missing, and skips the rest.
sklearn = Optional("sklearn.metrics", "scikit-learn")
clip_benchmark = Optional("clip_benchmark.metrics.zeroshot_classification", "clip-benchmark")


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_ranks_by_hand():
    scores = np.array([[3, 3, 1], [3, 3, 1], [0, 2, 5], [1, 1, 1]], np.float32)
    labels = np.array([0, 1, 1, 1])
    assert ranks(scores, labels).tolist() == [2, 2, 2, 3]
    assert ranks(scores, labels, "first").tolist() == [1, 2, 2, 2]


@pytest.fixture(scope="module")
def random_case():
    """300 images, 12 classes of which number 7 has no image, scores without ties."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 300)
    labels[labels == 7] = 3
    scores = rng.normal(size=(300, 12)).astype(np.float32)
    scores[np.arange(300), labels] += 1
    return scores, labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracy_is_that_of_torchmetrics_and_scikit_learn(random_case):
    scores, labels = random_case
    metrics = classification_metrics(scores, labels)
    assert list(metrics) == ["acc1", "acc5", "mean_per_class"] and 0.2 < metrics["acc1"] < metrics["acc5"] < 1
    assert metrics["mean_per_class"] == pytest.approx(sklearn.balanced_accuracy_score(labels, scores.argmax(1)))
    assert metrics["acc5"] == pytest.approx(sklearn.top_k_accuracy_score(labels, scores, k=5, labels=range(12)))
    assert classification_metrics(scores, labels, "first") == metrics
    for k in (1, 5):
        theirs = torchmetrics.functional.classification.multiclass_accuracy(
            torch.from_numpy(scores), torch.from_numpy(labels), 12, average="micro", top_k=k
        )
        assert metrics[f"acc{k}"] == pytest.approx(theirs.item())


def test_rule_first_is_argmax():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 4, (200, 6)).astype(np.float32), rng.integers(0, 6, 200)
    metrics = classification_metrics(scores, labels, "first")
    assert metrics["acc1"] == np.mean(scores.argmax(1) == labels)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert metrics["acc5"] == np.mean((order == labels[:, None]).any(1))
    assert metrics["mean_per_class"] == pytest.approx(sklearn.balanced_accuracy_score(labels, scores.argmax(1)))
    assert classification_metrics(scores, labels)["acc1"] < metrics["acc1"]


@pytest.mark.parametrize("levels", [None, 5])
def test_precision_is_that_of_the_libraries(levels):
    """With many ties and without; the last class has no image, and stays out of the mean."""
    rng = np.random.default_rng(2)
    labels = rng.random((120, 6)) < [0.5, 0.1, 0.3, 0.02, 0.9, 0]
    labels[0, 3] = True
    scores = labels + rng.normal(size=labels.shape)
    scores = (scores if levels is None else np.round(levels * scores / 3)).astype(np.float32)
    each = [average_precision(scores[:, c], labels[:, c]) for c in range(5)]
    assert each == pytest.approx([sklearn.average_precision_score(labels[:, c], scores[:, c]) for c in range(5)])
    metrics = classification_metrics(scores, labels)
    assert metrics["average_precision"] == pytest.approx(np.mean(each))
    for c in range(5):
        precision, recall, _ = sklearn.precision_recall_curve(labels[:, c], scores[:, c])
        precision, recall = precision[:-1], recall[:-1]  # without the point (1, 0) that it adds
        eleven = [precision[recall >= tenth / 10 - 1e-9].max() for tenth in range(11)]
        assert voc_11_point(scores[:, c], labels[:, c]) == pytest.approx(np.mean(eleven))
    theirs = torchmetrics.functional.classification.multilabel_average_precision(
        torch.from_numpy(scores[:, :5] / 10), torch.from_numpy(labels[:, :5].astype(int)), 5
    )
    assert metrics["average_precision"] == pytest.approx(theirs.item(), abs=1e-6)
    if levels is None:  # it has no rule for ties
        theirs = clip_benchmark.average_precision_per_class(torch.from_numpy(scores), torch.from_numpy(labels))
        np.testing.assert_allclose(each, theirs[:5].numpy(), atol=1e-6)


@pytest.mark.parametrize("levels", [None, 4])
def test_roc_auc_is_that_of_scikit_learn(levels):
    rng = np.random.default_rng(3)
    labels = (rng.random(150) < 0.3).astype(int)
    scores = rng.normal(size=(150, 2)).astype(np.float32)
    scores[:, 1] += labels
    scores = scores if levels is None else np.round(levels * scores) / levels
    metrics = classification_metrics(scores, labels)
    assert list(metrics) == ["acc1", "mean_per_class", "roc_auc"]  # two classes have no top-5
    assert metrics["roc_auc"] == pytest.approx(sklearn.roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    difference = torch.from_numpy(scores[:, 1] - scores[:, 0])
    theirs = torchmetrics.functional.classification.binary_auroc(difference, torch.from_numpy(labels))
    assert metrics["roc_auc"] == pytest.approx(theirs.item(), abs=1e-6)


def test_voc_map_by_hand():
    """Right, wrong, right: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. Recalls 0 to 0.5 get 1, others 2/3."""
    scores, positive = np.array([3.0, 2, 1]), np.array([True, False, True])
    assert voc_11_point(scores, positive) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert average_precision(scores, positive) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert roc_auc(scores, positive) == 0.5
    # Ten positives: a recall of exactly 3/10 counts at 0.3, whatever 0.3 is in binary.
    positive = np.array([True] * 3 + [False] * 7 + [True] * 7)
    assert voc_11_point(-np.arange(17.0), positive) == pytest.approx((4 * 1 + 7 * 10 / 17) / 11)


def test_equal_scores_get_chance_or_nothing():
    labels = np.repeat(np.arange(6), 5)
    assert classification_metrics(np.ones((30, 6), np.float32), labels) == {"acc1": 0, "acc5": 0, "mean_per_class": 0}
    first = classification_metrics(np.ones((30, 6), np.float32), labels, "first")
    assert first == pytest.approx(classification_chance(labels, 6))
    two = classification_metrics(np.ones((30, 2), np.float32), labels % 2)
    assert two == {"acc1": 0, "mean_per_class": 0, "roc_auc": 0.5}
    several = np.random.default_rng(0).random((40, 3)) < 0.3
    equal = classification_metrics(np.ones((40, 3), np.float32), several)
    assert equal == pytest.approx(dict.fromkeys(equal, several.mean()))
    assert equal["average_precision"] < classification_chance(several, 3)["average_precision"]


def test_a_guess_is_at_chance():
    rng = np.random.default_rng(4)
    labels, several = rng.integers(0, 8, 20_000), rng.random((20_000, 4)) < [0.1, 0.2, 0.5, 0]
    guess = classification_metrics(rng.random((20_000, 8), np.float32), labels)
    assert guess == pytest.approx(classification_chance(labels, 8), abs=0.01)
    guess = classification_metrics(rng.random((20_000, 4), np.float32), several)
    chance = classification_chance(several, 4)
    assert guess["average_precision"] == pytest.approx(chance["average_precision"], abs=0.01)
    assert chance["average_precision"] == pytest.approx(0.8 / 3, abs=0.01)


def test_chance_of_average_precision_is_the_mean_over_all_orders():
    positive = np.array([True, False, True, False, False, False])
    orders = [average_precision(np.array(order), positive) for order in itertools.permutations(range(6))]
    labels = np.stack([positive, np.zeros(6, bool)], axis=1)
    assert classification_chance(labels, 2)["average_precision"] == pytest.approx(np.mean(orders))
    assert classification_chance(np.ones((1, 1), bool), 1)["average_precision"] == 1


def test_images_that_do_not_count_for_a_class_change_nothing():
    """COLA's rule: each class has the average precision of its hard images, and those without one are left out."""
    rng = np.random.default_rng(5)
    scores, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.random((60, 5)) < 0.3
    counted = rng.random((60, 5)) < 0.5
    counted[:, 3], labels[:, 4] = False, False  # no hard image; no image
    metrics = classification_metrics(scores, labels, counted=counted)
    columns = [(labels[counted[:, c], c], scores[counted[:, c], c]) for c in range(3)]
    expected = np.mean([sklearn.average_precision_score(*column) for column in columns])
    assert metrics["average_precision"] == pytest.approx(expected)
    theirs = [
        torchmetrics.functional.classification.binary_average_precision(
            torch.from_numpy(s), torch.from_numpy(t.astype(int))
        )
        for t, s in columns
    ]
    assert metrics["average_precision"] == pytest.approx(np.mean([one.item() for one in theirs]), abs=1e-6)
    assert metrics["average_precision"] != pytest.approx(classification_metrics(scores, labels)["average_precision"])
    other = classification_metrics(
        np.where(counted, scores, 9 * rng.normal(size=scores.shape)), labels, counted=counted
    )
    assert other == metrics
    chance = classification_chance(labels, 5, counted)
    each = [classification_chance(t[:, None], 1) for t, _ in columns]
    assert chance["average_precision"] == pytest.approx(np.mean([one["average_precision"] for one in each]))
    everything = np.ones_like(counted)
    assert classification_metrics(scores, labels, counted=everything) == classification_metrics(scores, labels)
    assert classification_chance(labels, 5, everything) == pytest.approx(classification_chance(labels, 5))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_scores_are_an_error_and_not_a_rank(value):
    scores = np.zeros((4, 3), np.float32)
    scores[2, 1] = value
    with pytest.raises(ValueError, match="scores of image 2 are not finite"):
        classification_metrics(scores, np.zeros(4, int))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluator


def colour_set(**changes) -> ClassificationSet:
    """Four images of two rectangles; the class "warm" has two prompts, and its prompts do not stand together."""
    left, right = (0, 0, 8, 8), (0, 8, 8, 4)
    images = [
        canvas(8, 12, red=left, green=right),
        canvas(8, 12, red=left, blue=right),
        canvas(8, 12, blue=left, green=right),
        canvas(8, 12, blue=left),
    ]
    fields = dict(
        name="colours",
        classes=("blue", "warm"),
        images=images,
        labels=np.array([1, 1, 1, 0]),
        tokens=texts(0, 2, 1),
        class_of_prompt=np.array([1, 0, 1]),
    )
    return ClassificationSet(**{**fields, **changes})


def evaluator(data=None, model=None, **options) -> Classification:
    data, model = data or colour_set(), model or ColourModel(4)
    return Classification(model, data, preprocess=lambda x: x, **options)


@pytest.mark.parametrize(("batches", "devices"), [((1, 1), 1), ((64, 512), 8)])
def test_scores_by_hand(batches, devices):
    """ColourModel's score is the best patch's colour times the vector; global, the mean patch's."""
    options = dict(zip(("image_batch", "text_batch"), batches, strict=True))
    run = evaluator(mesh=mesh(devices), **options)
    scores = run.scores({})
    half = 0.5**0.5  # the unit mean of red and green
    expected = {
        "flair_before": [[0, half], [1, half], [1, half], [1, 0]],
        "flair_after": [[0, 1], [1, 0.5], [1, 0.5], [1, 0]],
        "global": [[0, half], [1 / 3, 2 / 3 * half], [2 / 3, 1 / 3 * half], [2 / 3, 0]],
    }
    assert scores.keys() == expected.keys()
    for mode, values in expected.items():
        assert scores[mode].dtype == np.float32
        np.testing.assert_allclose(scores[mode], values, atol=1e-6)
    assert flat(run.run({})) == {
        "classification/colours/flair_before/acc1": 0.5,
        "classification/colours/flair_before/mean_per_class": pytest.approx((1 / 3 + 1) / 2),
        "classification/colours/flair_before/roc_auc": 1,
        "classification/colours/flair_after/acc1": 0.5,
        "classification/colours/flair_after/mean_per_class": pytest.approx((1 / 3 + 1) / 2),
        "classification/colours/flair_after/roc_auc": 1,
        "classification/colours/global/acc1": 0.75,
        "classification/colours/global/mean_per_class": pytest.approx((2 / 3 + 1) / 2),
        "classification/colours/global/roc_auc": 1,
        "classification/colours/chance": 0.5,
    }


def test_scores_of_a_model_are_what_the_modes_say(tiny_model, tiny_params):
    """FLAIR itself, prompts of unequal number per class in any order, in many small blocks, beside its own methods."""
    inputs = load_golden("tiny_inputs.npz")
    images, tokens = nhwc(inputs["images"]), inputs["tokens"].reshape(-1, inputs["tokens"].shape[-1])
    tokens = np.unique(tokens, axis=0)[:7]
    owner = np.array([2, 0, 1, 2, 2, 0, 2])[: len(tokens)]
    twin = np.flatnonzero(owner == 2)[::-1]  # class 3 has the prompts of class 2
    tokens, owner = np.concatenate([tokens, tokens[twin]]), np.concatenate([owner, np.full(len(twin), 3)])
    data = ClassificationSet("tiny", tuple("abcd"), images, np.arange(len(images)) % 3, tokens, owner)
    scores = evaluator(data, tiny_model, image_batch=2, text_batch=3, mesh=mesh(1)).scores(tiny_params)

    @functools.partial(jax.jit, static_argnums=0)
    def call(method, *args):
        return tiny_model.apply({"params": tiny_params}, *args, method=method)

    image, text = call("encode_image", images), call("encode_text", Text.padded(tokens))
    unit = np.asarray(normalize(text.pooled))
    vectors = np.asarray(normalize(np.stack([unit[owner == c].mean(0) for c in range(4)])))
    vectors = text.replace(pooled=vectors)
    each = np.asarray(call("score", image, text))
    after = np.stack([each[:, owner == c].mean(1) for c in range(4)], axis=1)
    np.testing.assert_allclose(scores["flair_after"], after, atol=1e-4)
    np.testing.assert_allclose(scores["flair_before"], call("score", image, vectors), atol=1e-4)
    np.testing.assert_allclose(scores["global"], call("global_score", image, vectors), atol=1e-4)
    assert np.abs(scores["flair_after"] - scores["flair_before"]).max() > 0.01
    assert all((table[:, 2] == table[:, 3]).all() for table in scores.values())


def test_class_vectors_and_accuracy_are_those_of_clip_benchmark():
    """Its classifier and its loop over images on the same features, of random prompts and images."""
    rng = np.random.default_rng(5)
    words, images = rng.normal(size=(40, 3)).astype(np.float32), rng.random((60, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 8, 60)

    class Words(ColourModel):
        def encode_text(self, text, *, local=True):
            pooled = jnp.asarray(words)[text.tokens.reshape(-1)[text.ends - 1]]
            return TextFeatures(pooled=pooled, local=None, mask=text.tokens != 0)

    class Theirs:
        encode_text = staticmethod(lambda tokens: torch.from_numpy(words)[tokens])
        encode_image = staticmethod(lambda images: images.mean((1, 2)))

    prompts = {str(name): [f"{5 * name + number}" for number in range(5)] for name in range(8)}
    arguments = (lambda texts: torch.tensor([int(text) for text in texts]), list(prompts), prompts, "cpu")
    classifier = clip_benchmark.zero_shot_classifier(Theirs, *arguments, amp=False)
    batches = [(torch.from_numpy(images), torch.from_numpy(labels))]
    logits, _ = clip_benchmark.run_classification(Theirs, classifier, batches, "cpu", amp=False)

    tokens = np.stack([np.arange(40), np.full(40, 50)], axis=1).astype(np.int32)  # a word and the end
    data = ClassificationSet("words", list(prompts), images, labels, tokens, np.repeat(np.arange(8), 5))
    run = evaluator(data, Words(4), modes=("global",), image_batch=7, mesh=mesh(1))
    length = np.linalg.norm(images.mean((1, 2)), axis=1, keepdims=True)  # which ColourModel's scores keep
    np.testing.assert_allclose(100 * run.scores({})["global"] / length, logits.numpy(), rtol=1e-4, atol=1e-3)
    metrics = flat(run.run({}))
    assert metrics["classification/words/global/acc1"] == np.mean(logits.numpy().argmax(1) == labels)


def test_classes_with_the_same_prompts_tie_to_the_bit():
    """In whatever order and block they stand; nobody is right then."""
    channels, owner = np.array([0, 1, 2, 2, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    data = colour_set(tokens=texts(*channels), class_of_prompt=owner)
    run = evaluator(data, text_batch=2, mesh=mesh(1))
    for scores in run.scores({}).values():
        assert (scores[:, 0] == scores[:, 1]).all()
    assert {name: value for name, value in flat(run.run({})).items() if "acc1" in name} == {
        f"classification/colours/{mode}/acc1": 0 for mode in ("flair_before", "flair_after", "global")
    }
    first = evaluator(data, ties="first")
    assert flat(first.run({}))["classification/colours/global/acc1"] == 0.25
    same = "Classes with the same prompts as another one, with which they tie: warm."
    assert run.notes == [same, "Among equal scores the true class comes last."]
    assert first.notes == [same, "Among equal scores the class with the lower number comes first."]
    assert evaluator().notes == run.notes[1:]


def test_several_labels_and_the_main_metric():
    harmonic = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    expected = {n: harmonic + (n - 1) / 3 * (1 - harmonic) for n in (2, 3)}  # of 4 images
    labels = np.array([[0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], bool)
    data = colour_set(
        classes=("blue", "red", "pink"), labels=labels, tokens=texts(2, 0, 0), class_of_prompt=np.arange(3)
    )
    run = evaluator(data, modes=("flair_after",), metric="voc_11_point_map")
    results = list(run.run({}))
    assert [(result.metric, result.mode) for result in results] == [
        ("voc_11_point_map", "flair_after"),
        ("average_precision", "flair_after"),
        ("chance", ""),
        ("classes_without_images", ""),
    ]
    assert [result.value for result in results] == [1, 1, pytest.approx((expected[3] + expected[2]) / 2), 1]
    (title, bars), (_, examples) = run.figures({})
    assert title == "average precision by class (flair_after)"
    assert bars.mode == examples.mode == "RGB" and examples.width == 2 * (figures.TILE + MARGIN) + MARGIN
    # Blue counts for three images, two of them blue, and red for one, which is red: one order of three has 7/12.
    counted = np.array([[1, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1]], bool)
    run = evaluator(dataclasses.replace(data, counted=counted), modes=("flair_after",))
    assert [result.value for result in run.run({})] == [1, 1, pytest.approx(((1 + 5 / 6 + 7 / 12) / 3 + 1) / 2), 1]
    assert len(list(run.figures({}))) == 2


def test_a_model_without_pooling_has_one_mode():
    class Plain(ColourModel):
        has_pooling = False

    results = flat(evaluator(model=Plain(4)).run({}))
    assert results["classification/colours/global/acc1"] == 0.75 and len(results) == 4
    with pytest.raises(ValueError, match=r"\('flair_after',\); expected one or more of \('global',\)"):
        evaluator(model=Plain(4), modes=("flair_after",))


@pytest.mark.parametrize("devices", [1, 8])
def test_regions_are_compared_with_the_descriptions(devices):
    """Six patches an image. Class "warm" is described as red or green; "blue" is not, and compared by its prompts."""
    described = colour_set(descriptions=texts(1, 0), class_of_description=np.array([1, 1]))
    options = dict(model=RegionModel(4), image_batch=3, text_batch=1, mesh=mesh(devices))
    run = evaluator(described, alpha=0.0, **options)
    scores = run.scores({})
    assert list(scores) == ["global", "regions"]
    np.testing.assert_allclose(scores["regions"], np.array([[0, 6], [2, 4], [4, 2], [4, 0]]) / 6, atol=1e-6)
    mixed = evaluator(described, modes=("regions",), alpha=0.25, **options).scores({})
    assert list(mixed) == ["regions"]
    np.testing.assert_allclose(mixed["regions"], 0.25 * scores["global"] + 0.75 * scores["regions"], atol=1e-6)
    assert run.notes == [
        "Among equal scores the true class comes last.",
        "1 of 2 classes have no description, and are compared by their names in the templates alone: blue.",
        "Mode regions: 0 * global + 1 * the score of the regions.",
    ]
    assert flat(run.run({}))["classification/colours/regions/acc1"] == 0.75

    with pytest.raises(ValueError, match=r"of \('global',\); regions need a model with a query decoder, and descr"):
        evaluator(modes=("regions",), model=RegionModel(4))
    with pytest.raises(ValueError, match=r"alpha is 1\.5; expected a share"):
        evaluator(described, model=RegionModel(4), alpha=1.5)
    assert list(evaluator(described).scores({})) == ["flair_before", "flair_after", "global"]


def test_a_model_without_decoder_has_no_scores_of_regions(tiny_model, tiny_params):
    with pytest.raises(ValueError, match=r"need a query decoder, and config\.model\.decoder is None"):
        tiny_model.apply({"params": tiny_params}, None, None, method="region_score")


def test_means_of_prompts_may_keep_their_length():
    """The prompts red and green at right angles have a mean of length 0.5^0.5, those of blue one of length 1."""
    plain, kept = (evaluator(renormalize=renormalize, mesh=mesh(1)) for renormalize in (True, False))
    length, scores = np.array([1, 0.5**0.5]), plain.scores({})
    for mode, table in kept.scores({}).items():
        expected = scores[mode] if mode == "flair_after" else length * scores[mode]
        np.testing.assert_allclose(table, expected, atol=1e-6)
    assert kept.notes == [*plain.notes, "Means of a class's prompt vectors keep their length."]


def rows_of(tokens, counts):
    """Padded (C, M, T) of which each class has so many -> (P, T) and their classes."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.concatenate([own[:count] for own, count in zip(tokens, counts, strict=True)]), owner


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:left out, for GRAIN's losses")
@pytest.mark.parametrize("described", [True, False])
def test_zero_shot_scores_and_accuracies_are_those_of_grain(described):
    """`evaluate.py`, and `our_eval.py` with its alphas; its logits have no scale."""
    golden, case = load_golden("grain/zeroshot.safetensors"), f"use_desc_{described}"
    prompts = rows_of(golden[f"in.prompt_tokens.{case}"], golden[f"in.prompt_count.{case}"])
    descriptions = rows_of(golden["in.desc_tokens"], golden["in.desc_count"])
    images, labels = nhwc(golden["in.images"]), golden["in.targets"]
    names = [str(number) for number in range(len(golden["in.desc_count"]))]
    data = ClassificationSet("toys", names, images, labels, *prompts, None, *descriptions)
    scale = np.exp(golden_params()["logit_scale"])
    prefix = f"our_eval.logits.{case}.alpha_"
    cases = {float(name.removeprefix(prefix)): array for name, array in golden.items() if name.startswith(prefix)}
    assert {0.0, 1.0} < cases.keys()
    for alpha, expected in cases.items():
        run = evaluator(data, golden_model(), alpha=alpha, renormalize=False, mesh=mesh(1))
        scores = run.scores(golden_params())
        np.testing.assert_allclose(scores["regions"] / scale, expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(scores["global"] / scale, golden[f"evaluate.logits.{case}"], rtol=0, atol=2e-5)
        metrics = {mode: classification_metrics(table, labels) for mode, table in scores.items()}
        assert 100 * metrics["regions"]["acc1"] == pytest.approx(golden[f"our_eval.acc1.{case}.alpha_{alpha}"])
        for name in ("acc1", "acc5"):
            assert 100 * metrics["global"][name] == pytest.approx(golden[f"evaluate.{name}.{case}"])


def test_pooling_for_too_many_pairs_is_left_out_unless_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(classification, "AFTER_PAIRS", 11)  # 4 images, 3 prompts
    assert list(evaluator().scores({})) == ["flair_before", "global"]
    assert "flair_after is left out: it would pool 1.2e+01 pairs" in caplog.text
    assert list(evaluator(modes=("flair_after",)).scores({})) == ["flair_after"]


def test_broken_weights_and_half_precision_scores_are_refused():
    with pytest.raises(ValueError, match="scores of image 1 are not finite"):
        images = [np.array(image) for image in colour_set().images]
        images[1][0, 0] = np.nan
        list(evaluator(colour_set(images=images), mesh=mesh(1)).run({}))

    class Half(ColourModel):
        def score(self, image_features, text_features):
            return super().score(image_features, text_features).astype("bfloat16")

    with pytest.raises(TypeError, match="score gives bfloat16"):
        list(evaluator(model=Half(4), mesh=mesh(1)).run({}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1, 2, 0])}, "labels run from 0 to 2; expected 0 to 1"),
        ({"labels": np.array([0, 1, 0])}, r"labels int64 \(3,\) of 4 images and 2 classes"),
        ({"labels": np.zeros((4, 2))}, r"labels float64 \(4, 2\)"),
        ({"class_of_prompt": np.array([0, 0, 0])}, r"no prompt for the classes \['warm'\]"),
        ({"class_of_prompt": np.array([0, 1, 2])}, "texts belong to numbers from 0 to 2"),
        ({"labels": np.zeros((4, 2), bool)}, "no image has a class"),
        ({"images": [], "labels": np.zeros(0, int)}, "at least one image"),
        ({"descriptions": texts(0), "class_of_description": np.array([2])}, "texts belong to numbers from 2 to 2"),
        ({"descriptions": texts(0)[:, :1], "class_of_description": np.array([0])}, r"descriptions \(1, 1\), prompts"),
        ({"counted": np.ones((4, 2), bool)}, r"counted bool \(4, 2\); expected bool, as the labels"),
        ({"labels": np.eye(4, 2) > 0, "counted": np.eye(4, 2, 1) > 0}, "no image has a class"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        colour_set(**changes)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="metric 'acc5'; its labels allow"):
        evaluator(metric="acc5")  # two classes
    with pytest.raises(ValueError, match="ties 'last'"):
        evaluator(ties="last")
    several = np.ones((4, 2), bool)
    with pytest.raises(ValueError, match="metric 'roc_auc'; its labels allow"):
        evaluator(colour_set(labels=several), metric="roc_auc")


def test_a_part_of_a_set_without_images_of_one_class_has_no_auc():
    run = evaluator(colour_set(labels=np.zeros(4, int)), metric="roc_auc", modes=("global",), mesh=mesh(1))
    assert [result.metric for result in run.run({})] == ["acc1", "mean_per_class", "chance", "classes_without_images"]
    assert run.notes[0] == "One of the two classes has no image, so that roc_auc is not defined."


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_drawn_after_a_run():
    run = evaluator()
    list(run.run({}))
    pictures = dict(run.figures({}))
    assert list(pictures) == ["classes most often confused (flair_before)", "right and wrong images (flair_before)"]
    for picture in pictures.values():
        assert picture.mode == "RGB" and np.asarray(picture).std() > 5


def test_the_most_confused_classes_are_shown(monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "to_image", lambda figure, dpi: shown.update(axes=figure.axes))
    names = [f"class {number}" for number in range(40)]
    labels, predictions = np.repeat([3, 3, 8, 20], [5, 2, 4, 9]), np.repeat([7, 3, 3, 20], [5, 2, 4, 9])
    figures.confusion(names, labels, predictions)
    (axes,) = shown["axes"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["class 3", "class 7", "class 8"]
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {(1, 0, "5"), (0, 0, "2"), (0, 2, "4")}


def test_bars_show_the_worst_and_the_best_classes(monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "to_image", lambda figure, dpi: shown.update(axes=figure.axes))
    monkeypatch.setattr(figures, "BARS", 4)
    figures.bars([f"class {number}" for number in range(7)], np.array([0.5, np.nan, 0.1, 0.9, 0.6, 0.2, 0.8]))
    (axes,) = shown["axes"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["class 2", "class 5", "class 6", "class 3"]
    assert [bar.get_width() for bar in axes.patches] == [0.1, 0.2, 0.8, 0.9]


def test_examples_are_of_different_classes_first():
    truth = np.eye(3, dtype=bool)[[0, 0, 0, 1, 2, 2]]
    assert figures._spread([2, 1, 0, 5, 3, 4], np.array([1, 1, 1, 1, 0, 1], bool), truth) == [2, 5, 3, 1, 0]


def test_dollar_signs_begin_no_formula():
    """Names of classes and of parts of sets are drawn as they stand, in the pictures of every task."""
    from flair_jax.figures import choice, segmentation
    from flair_jax.report import Result

    names = [r"$\frac{$", "$x$ y", "x y"]
    scores = np.array([0.1, 0.2, 0.3])
    pictures = [
        *(figures.bars([name], scores[:1]) for name in names),
        *(segmentation.bars([name], {"mode": scores[:1]}) for name in names),
        *(
            choice.bars([Result("choice", name, "accuracy", 0.5, mode) for mode in ("global", "chance")])
            for name in names
        ),
        *(figures.confusion([name, "b"], np.array([0, 1]), np.array([1, 0])) for name in names),
    ]
    for _, formula, plain in zip(*[iter(pictures)] * 3, strict=True):
        assert formula.size != plain.size or (np.asarray(formula) != np.asarray(plain)).any()
