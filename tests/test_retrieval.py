"""Retrieval: the metric against the original's numbers and a slow oracle, the evaluator against its scores."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colour_model import ColourModel, texts
from conftest import TINY, load_golden, nhwc
from optional import clip_benchmark_retrieval, torch, torchmetrics_retrieval
from PIL import Image

from flair_jax import evaluation_tasks, models
from flair_jax.data.benchmarks import base
from flair_jax.data.transforms import windows
from flair_jax.evaluators import Retrieval, RetrievalSet, features, retrieval
from flair_jax.evaluators.features import evaluation_mesh
from flair_jax.evaluators.retrieval import POOLINGS, pool_rows, retrieval_chance, retrieval_metrics, retrieval_ranks
from flair_jax.evaluators.store import FeatureStore
from flair_jax.report import flat

ARRAYS = load_golden("retrieval.npz")
GOLDEN = load_golden("retrieval.json")
IMAGES = nhwc(ARRAYS["pipe_images"])
TOKENS = ARRAYS["pipe_tokens"]
IMAGE_OF_TEXT = np.repeat(np.arange(len(IMAGES)), GOLDEN["pipe"]["captions_per_image"])
TOPK = ARRAYS["pipe_topk_indices"].shape[1]
TIED = next(case for case in GOLDEN["cases"] if case.startswith("quantised_ties"))
ATOL = 1e-4  # scores reach 16; the reference's own round-off is 4e-6


def pipe_set(images=IMAGES) -> RetrievalSet:
    return RetrievalSet("pipe", images, TOKENS, IMAGE_OF_TEXT)


def one_device():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def evaluator(model, data=None, **options) -> Retrieval:
    options = {"preprocess": lambda x: x, "topk": TOPK, **options}
    return Retrieval(model, pipe_set() if data is None else data, **options)


def summary(direction, ranks, found):
    """The metrics of a list of ranks, one statement each."""
    result = {
        f"{direction}_R@{k}": np.mean([f and r <= k for r, f in zip(ranks, found, strict=True)]) for k in (1, 5, 10)
    }
    result[f"{direction}_mean_rank"] = np.mean(ranks)
    ranks = sorted(ranks)
    result[f"{direction}_median_rank"] = (ranks[len(ranks) // 2] + ranks[(len(ranks) - 1) // 2]) // 2
    return result


def oracle(scores, image_of_text, valid=None):
    """The metric by sorting every row with Python's stable sort."""
    images, texts = scores.shape
    valid = np.ones_like(scores, bool) if valid is None else valid

    def ranking(values, allowed):
        return sorted(np.flatnonzero(allowed).tolist(), key=lambda i: -values[i])

    ranks, found = [], []
    for text, image in enumerate(image_of_text):
        order = ranking(scores[:, text], valid[:, text])
        found.append(image in order)
        ranks.append(order.index(image) + 1 if found[-1] else images)
    result = summary("text_to_image", ranks, found)
    ranks, found = [], []
    for image in sorted(set(image_of_text.tolist())):
        order = ranking(scores[image], valid[image])
        places = [place for place, text in enumerate(order) if image_of_text[text] == image]
        found.append(bool(places))
        ranks.append(places[0] + 1 if places else texts)
    return {**result, **summary("image_to_text", ranks, found)}


@pytest.mark.golden
@pytest.mark.parametrize("case", [case for case in GOLDEN["cases"] if case != TIED])
def test_metrics_equal_the_reference(case):
    metrics = retrieval_metrics(ARRAYS[f"{case}_sim"], ARRAYS[f"{case}_image_of_text"])
    assert metrics == pytest.approx(GOLDEN["cases"][case], abs=1e-6)
    assert list(metrics) == list(GOLDEN["cases"][case])


@pytest.mark.golden
def test_tied_scores_stay_within_what_an_order_of_ties_can_give():
    """The reference's argsort is not stable, so it and this rule may differ, but only as far as ties reach."""
    scores, owner = ARRAYS[f"{TIED}_sim"], ARRAYS[f"{TIED}_image_of_text"]
    metrics, reference = retrieval_metrics(scores, owner), GOLDEN["cases"][TIED]
    own = owner == np.arange(len(scores))[:, None]
    step = 0.5 * np.diff(np.unique(scores)).min()
    best = retrieval_metrics(scores + step * own, owner)
    worst = retrieval_metrics(scores - step * own, owner)
    assert metrics == pytest.approx(oracle(scores, owner))
    for name in reference:
        low, high = sorted((best[name], worst[name]))
        assert low <= metrics[name] <= high and low - 1e-6 <= reference[name] <= high + 1e-6
    assert best["text_to_image_R@1"] > worst["text_to_image_R@1"]  # the case does have ties that matter

    # The reference's own orders, ranked as it does, give its figures: the difference is the order alone.
    orders = ARRAYS[f"{TIED}_order_t2i"]
    ranks = (orders == owner[:, None]).argmax(1) + 1
    assert np.mean(ranks <= 5) == pytest.approx(reference["text_to_image_R@5"])
    assert ranks.mean() == pytest.approx(reference["text_to_image_mean_rank"], abs=1e-5)
    orders = owner[ARRAYS[f"{TIED}_order_i2t"]]
    ranks = (orders == np.arange(len(scores))[:, None]).argmax(1) + 1
    assert np.mean(ranks <= 10) == pytest.approx(reference["image_to_text_R@10"])


def test_metrics_by_hand():
    """Three images, the last without a text; text 2 ties with image 0 and comes second, its own image is 1."""
    scores = np.array([[3, 1, 5, 0], [2, 4, 5, 1], [9, 0, 0, 2]], np.float32)
    owner = np.array([0, 0, 1, 1])
    metrics = retrieval_metrics(scores, owner)
    # Text to image: text 0 -> 2 (behind image 2); 1 -> 2; 2 -> 2 (tie, the lower image first); 3 -> 2.
    # Image to text: 0: texts by score 2, 0 -> 2; 1: text 2 -> 1; image 2 is no query.
    assert metrics["text_to_image_R@1"] == 0 and metrics["text_to_image_R@5"] == 1
    assert metrics["text_to_image_mean_rank"] == 2 and metrics["text_to_image_median_rank"] == 2
    assert metrics["image_to_text_R@1"] == 0.5
    assert metrics["image_to_text_mean_rank"] == 1.5 and metrics["image_to_text_median_rank"] == 1


def test_a_text_that_nobody_selected_is_a_miss():
    """In the reference unselected texts tie at -1e10, and the first image wins the tie: a hit at rank 1."""
    scores = np.array([[3, 2], [1, 0]], np.float32)
    valid = np.array([[False, True], [True, False]])
    metrics = retrieval_metrics(scores, np.array([0, 1]), valid)
    for direction in ("text_to_image", "image_to_text"):
        assert all(metrics[f"{direction}_R@{k}"] == 0 for k in (1, 5, 10))  # although rank 2 of 2 is below 5
        assert metrics[f"{direction}_mean_rank"] == 2
    everything_unselected = retrieval_metrics(scores, np.array([0, 1]), np.zeros_like(valid))
    assert everything_unselected["text_to_image_R@10"] == 0 and everything_unselected["image_to_text_R@10"] == 0


@pytest.mark.golden
def test_topk_metrics_of_the_reference():
    """Recall image to text is the reference's; where it counted unselected texts as found, ours is lower."""
    owner, reference = ARRAYS["coco_like_image_of_text"], GOLDEN["topk"]["metrics"]
    scores, valid = (
        np.full(ARRAYS["coco_like_sim"].shape, -np.inf, np.float32),
        np.zeros(ARRAYS["coco_like_sim"].shape, bool),
    )
    np.put_along_axis(scores, ARRAYS["topk_indices"], ARRAYS["topk_scores"], axis=1)
    np.put_along_axis(valid, ARRAYS["topk_indices"], True, axis=1)
    metrics = retrieval_metrics(scores, owner, valid)
    assert metrics == pytest.approx(oracle(scores, owner, valid))
    own = owner, np.arange(len(owner))
    own_selected = valid[own]
    assert (~own_selected).sum() == GOLDEN["topk"]["texts_outside_topk_of_own_image"]
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(reference[f"image_to_text_R@{k}"])
        assert metrics[f"text_to_image_R@{k}"] <= own_selected.mean() + 1e-9
        assert metrics[f"text_to_image_R@{k}"] <= reference[f"text_to_image_R@{k}"] + 1e-9
    assert metrics["text_to_image_R@10"] < reference["text_to_image_R@10"]  # the reference found some by tie
    # Texts that were selected have the very ranks of the reference: with their misses moved to the end, as it does.
    filled = np.where(valid, scores, -1e10)
    ahead = (filled > filled[own]).sum(0)
    assert np.mean(own_selected & (ahead < 1)) == pytest.approx(metrics["text_to_image_R@1"])


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_the_oracle_in_chunks_of_any_size(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (9, 23)).astype(np.float32)  # many ties
    owner = rng.integers(0, 7, 23)  # images 7 and 8 have no text
    valid = rng.random((9, 23)) < 0.6
    for chunk in (1, 3 * 23, 2**22):
        monkeypatch.setattr(retrieval, "CHUNK", chunk)
        assert retrieval_metrics(scores, owner) == pytest.approx(oracle(scores, owner))
        assert retrieval_metrics(scores, owner, valid) == pytest.approx(oracle(scores, owner, valid))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_scores_are_an_error_and_not_a_rank(value):
    scores = np.zeros((3, 3), np.float32)
    scores[1, 2] = value
    with pytest.raises(ValueError, match="scores of image 1 are not finite"):
        retrieval_metrics(scores, np.arange(3))
    valid = np.ones((3, 3), bool)
    valid[1, 2] = False
    assert retrieval_metrics(scores, np.arange(3), valid)["text_to_image_mean_rank"] > 0  # never looked at


def test_chance_is_the_mean_over_all_orders():
    owner = np.array([0, 1, 1, 3, 3, 3])  # of four images; image 2 has no text
    orders = np.array(list(itertools.permutations(range(6))))
    chance = retrieval_chance(4, owner)
    for k in (1, 5, 10):
        found = [np.mean((owner[orders[:, :k]] == image).any(1)) for image in (0, 1, 3)]
        assert chance[f"image_to_text_R@{k}"] == pytest.approx(np.mean(found))
    assert chance["text_to_image_R@1"] == 0.25 and chance["text_to_image_R@5"] == 1


def test_a_model_that_scores_all_pairs_alike_is_at_chance():
    owner = np.repeat(np.arange(20), 3)
    metrics, chance = retrieval_metrics(np.zeros((20, 60), np.float32), owner), retrieval_chance(20, owner)
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(chance[f"text_to_image_R@{k}"])


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return evaluator(tiny_model)


@pytest.fixture(scope="module")
def pipe_scores(pipe, tiny_params):
    return pipe.scores(tiny_params)


@pytest.mark.golden
def test_scores_equal_the_reference_in_all_modes(pipe_scores):
    for mode in ("flair", "global"):
        scores, valid = pipe_scores[mode]
        assert valid is None and scores.dtype == np.float32
        np.testing.assert_allclose(scores, ARRAYS[f"pipe_{mode}_scores"], atol=ATOL)
    scores, valid = pipe_scores["topk"]
    indices = ARRAYS["pipe_topk_indices"]
    assert (valid.sum(1) == TOPK).all() and np.take_along_axis(valid, indices, axis=1).all()
    np.testing.assert_allclose(np.take_along_axis(scores, indices, 1), ARRAYS["pipe_topk_scores"], atol=ATOL)


@pytest.mark.golden
def test_named_metrics_equal_the_reference(pipe, tiny_params):
    results = flat(pipe.run(tiny_params))
    for mode in ("flair", "global"):
        for metric, value in GOLDEN["pipe"]["modes"][mode].items():
            assert results[f"retrieval/pipe/{mode}/{metric}"] == pytest.approx(value, abs=1e-6)
    reference = GOLDEN["pipe"]["modes"]["topk"]
    for k in (1, 5):
        assert results[f"retrieval/pipe/topk/image_to_text_R@{k}"] == pytest.approx(reference[f"image_to_text_R@{k}"])
    if len(IMAGES) <= 10:
        # Every text is among the first ten, in the reference even those that its image did not select.
        assert reference["text_to_image_R@10"] == 1 and results["retrieval/pipe/topk/text_to_image_R@10"] < 0.5
    assert results["retrieval/pipe/chance/text_to_image_R@5"] == min(5 / len(IMAGES), 1)
    assert len(results) == 3 * 10 + 6


@pytest.mark.parametrize(("image_batch", "text_batch"), [(1, 30), (3, 7)])
def test_results_depend_on_neither_batches_nor_devices(tiny_model, tiny_params, pipe_scores, image_batch, text_batch):
    """The fixture ran on eight devices in one batch, these run on one device in many."""
    assert len(jax.devices()) == 8
    other = evaluator(tiny_model, image_batch=image_batch, text_batch=text_batch, mesh=one_device())
    metrics = {mode: retrieval_metrics(scores, IMAGE_OF_TEXT, valid) for mode, (scores, valid) in pipe_scores.items()}
    for mode, (scores, valid) in other.scores(tiny_params).items():
        np.testing.assert_allclose(scores, pipe_scores[mode][0], atol=1e-5)
        assert retrieval_metrics(scores, IMAGE_OF_TEXT, valid) == metrics[mode]


@pytest.fixture(scope="module")
def colours():
    """Ten images of 8 x 12 pixels and twelve texts, for a model that is compiled in no time."""
    images = np.random.default_rng(0).random((10, 8, 12, 3), np.float32)
    return RetrievalSet("colours", images, texts(*range(3), *range(3), *range(3), *range(3)), np.arange(12) % 10)


def test_a_mesh_that_is_set_is_used(colours):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=auto, devices=jax.devices()[:4])
    expected = evaluator(ColourModel(4), colours, mesh=one_device()).scores({})
    with jax.set_mesh(mesh):
        assert evaluation_mesh() == mesh
        results = evaluator(ColourModel(4), colours, image_batch=3).scores({})
    for mode, (scores, valid) in results.items():
        np.testing.assert_allclose(scores, expected[mode][0], atol=1e-6)
        np.testing.assert_array_equal(valid, expected[mode][1])


class Counting:
    """Images by index that remember who was asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.images[index]


def test_images_are_loaded_once_a_run_and_nothing_is_compiled_twice(colours):
    images, traced = Counting(np.uint8(colours.images * 255)), []

    def preprocess(x):
        traced.append((x.shape, x.dtype))
        return x.astype(jnp.float32) / 255

    data = dataclasses.replace(colours, images=images)
    runs = evaluator(ColourModel(4), data, preprocess=preprocess, image_batch=3, text_batch=7, mesh=one_device())
    first = flat(runs.run({}))
    assert sorted(images.asked) == list(range(10))
    assert traced == [((3, 8, 12, 3), np.uint8)]  # the last batch is padded
    assert flat(runs.run({})) == first
    assert len(images.asked) == 20 and len(traced) == 1


def test_topk_of_all_texts_is_flair_and_a_larger_k_is_no_error(colours):
    results = evaluator(ColourModel(4), colours, modes=("topk", "flair"), topk=1000, text_batch=8).scores({})
    assert list(results) == ["topk", "flair"]
    scores, valid = results["topk"]
    assert valid.all() and len(np.unique(scores)) > 5
    np.testing.assert_allclose(scores, results["flair"][0], atol=1e-6)


def test_bfloat16_compute_gives_float32_scores(tiny_params, pipe_scores):
    model = evaluator(models.create({**TINY, "dtype": "bfloat16"}), modes=("flair", "global"), mesh=one_device())
    for mode, (scores, _) in model.scores(tiny_params).items():
        assert scores.dtype == np.float32
        assert np.mean(scores == np.asarray(jnp.asarray(scores, jnp.bfloat16), np.float32)) < 0.1  # not just widened
        np.testing.assert_allclose(scores, pipe_scores[mode][0], atol=0.3)


def test_half_precision_scores_are_refused(colours):
    class Half(ColourModel):
        def score(self, image_features, text_features):
            return super().score(image_features, text_features).astype(jnp.bfloat16)

    with pytest.raises(TypeError, match=r"Half\.score gives bfloat16; expected float32"):
        evaluator(Half(4), colours).scores({})


def test_broken_weights_are_an_error_in_every_mode(pipe, tiny_params):
    broken = {**tiny_params, "image_projection": np.full_like(tiny_params["image_projection"], np.nan)}
    for scores, valid in pipe.scores(broken).values():
        with pytest.raises(ValueError, match="not finite"):
            retrieval_metrics(scores, IMAGE_OF_TEXT, valid)


def test_wrong_sets_and_options_are_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match=r"x: texts belong to numbers from 0 to 10; expected 0 to 9"):
        RetrievalSet("x", IMAGES, TOKENS, IMAGE_OF_TEXT + (np.arange(30) == 29))
    with pytest.raises(ValueError, match=r"x: tokens \(30, 77\), owners of texts \(29,\)"):
        RetrievalSet("x", IMAGES, TOKENS, IMAGE_OF_TEXT[1:])
    with pytest.raises(ValueError, match="unknown retrieval modes \\['clip'\\]"):
        evaluator(tiny_model, modes=("flair", "clip"))
    with pytest.raises(ValueError, match="topk is 0"):
        evaluator(tiny_model, topk=0)
    with pytest.raises(ValueError, match="image_batch 0"):
        evaluator(tiny_model, image_batch=0)


# ---------------------------------------------------------------------------------------------------------------------
# Implementations that nobody here wrote


def without_ties():
    rng = np.random.default_rng(0)
    owner = np.concatenate([np.arange(30), rng.integers(0, 30, 61)])  # one text an image at least, some have many
    return rng.permutation(30 * 91).reshape(30, 91).astype(np.float32), owner


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_torchmetrics(k):
    scores, owner = without_ties()
    hit = torchmetrics_retrieval.retrieval_hit_rate
    right = torch.from_numpy(owner == np.arange(30)[:, None])
    metrics, table = retrieval_metrics(scores, owner), torch.from_numpy(scores)
    to_text = [hit(row, target, top_k=k) for row, target in zip(table, right, strict=True)]
    to_image = [hit(row, target, top_k=k) for row, target in zip(table.T, right.T, strict=True)]
    assert metrics[f"image_to_text_R@{k}"] == pytest.approx(float(np.mean(to_text)))
    assert metrics[f"text_to_image_R@{k}"] == pytest.approx(float(np.mean(to_image)))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_clip_benchmark(k):
    scores, owner = without_ties()
    recall = clip_benchmark_retrieval.recall_at_k
    right, table = torch.from_numpy(owner == np.arange(30)[:, None]), torch.from_numpy(scores)
    metrics = retrieval_metrics(scores, owner)
    assert metrics[f"image_to_text_R@{k}"] == pytest.approx((recall(table, right, k) > 0).float().mean().item())
    assert metrics[f"text_to_image_R@{k}"] == pytest.approx((recall(table.T, right.T, k) > 0).float().mean().item())


def test_curves_hold_the_recalls():
    scores, owner = without_ties()
    ranks, metrics = retrieval_ranks(scores, owner), retrieval_metrics(scores, owner)
    for direction, candidates in (("text_to_image", 30), ("image_to_text", 91)):
        curve = ranks[direction].curve()
        assert len(curve) == candidates and (np.diff(curve) >= 0).all() and curve[-1] == 1
        assert [curve[k - 1] for k in (1, 5, 10)] == [metrics[f"{direction}_R@{k}"] for k in (1, 5, 10)]


# ---------------------------------------------------------------------------------------------------------------------
# Texts of several rows


def test_scores_of_rows_are_pooled_to_those_of_texts():
    """Against one statement per text; the blocks are cut anywhere and hold padding at the end."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(5), [1, 4, 2, 1, 3])
    scores = rng.normal(size=(3, 11)).astype(np.float32)
    padded = np.concatenate([scores, scores[:, -1:]], axis=1)
    count = np.bincount(owners)
    pooled = pool_rows([padded[:, :7], padded[:, 7:]], np.cumsum(count) - count, count, 4, POOLINGS)
    for text in range(5):
        own = np.sort(scores[:, owners == text])[:, ::-1]
        expected = {"mean": own.mean(1), "max": own[:, 0], "top2": own[:, :2].mean(1), "top3": own[:, :3].mean(1)}
        for name, values in expected.items():
            np.testing.assert_allclose(pooled[name][:, text], values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pooling_hides_no_broken_score(value):
    scores = np.array([[1, 2, 3], [1, value, 3]], np.float32)
    for pooled in pool_rows([scores], np.array([0, 2]), np.array([2, 1]), 2, POOLINGS).values():
        np.testing.assert_array_equal(np.isfinite(pooled), [[True, True], [False, True]])


@pytest.fixture(scope="module")
def long_colours(colours):
    """Twelve texts of one to three rows, each of which asks for a channel."""
    owners = np.repeat(np.arange(12), np.arange(12) % 3 + 1)
    tokens = texts(*(np.arange(len(owners)) % 3))
    return dataclasses.replace(colours, tokens=tokens, text_of_row=owners)


def test_texts_of_several_rows_are_ranked_by_their_pooled_scores(long_colours):
    model, rows = ColourModel(4), RetrievalSet("rows", long_colours.images, long_colours.tokens, np.zeros(24, int))
    single = evaluator(model, rows, modes=("flair", "global")).scores({})
    runs = evaluator(model, long_colours, pooling=("mean", "max"), label="windows")
    found = runs.scores({})
    assert list(found) == [f"{mode} windows {pooling}" for mode in ("flair", "global") for pooling in ("mean", "max")]
    for mode in ("flair", "global"):
        for pooling, function in (("mean", np.mean), ("max", np.max)):
            scores, valid = found[f"{mode} windows {pooling}"]
            owners = long_colours.text_of_row
            expected = np.stack([function(single[mode][0][:, owners == text], 1) for text in range(12)], 1)
            assert valid is None and scores.dtype == np.float32
            np.testing.assert_allclose(scores, expected, atol=1e-6)
    names = flat(runs.run({}))
    assert "retrieval/colours/flair windows mean/text_to_image_R@1" in names
    assert not any("chance" in name for name in names)  # the evaluator of whole texts gives it


def test_pooled_scores_depend_on_neither_batches_nor_devices(long_colours):
    options = dict(pooling=POOLINGS, modes=("flair",))
    one = evaluator(ColourModel(4), long_colours, **options, image_batch=3, text_batch=5, mesh=one_device()).scores({})
    for name, (scores, _) in evaluator(ColourModel(4), long_colours, **options).scores({}).items():
        np.testing.assert_allclose(scores, one[name][0], atol=1e-6)


def test_one_row_a_text_pools_to_what_it_was(colours):
    plain = evaluator(ColourModel(4), colours, modes=("flair",)).scores({})["flair"][0]
    rows = dataclasses.replace(colours, text_of_row=np.arange(12))
    for scores, _ in evaluator(ColourModel(4), rows, modes=("flair",), pooling=POOLINGS).scores({}).values():
        np.testing.assert_array_equal(scores, plain)


def test_wrong_rows_and_poolings_are_refused(colours):
    for rows in (np.arange(12)[::-1], np.minimum(np.arange(12), 10), np.arange(12) + 1):
        with pytest.raises(ValueError, match="text_of_row must name each of 12 texts, in ascending order"):
            dataclasses.replace(colours, text_of_row=rows)
    rows = dataclasses.replace(colours, text_of_row=np.arange(12))
    with pytest.raises(ValueError, match=r"unknown retrieval modes \['topk'\]"):
        evaluator(ColourModel(4), rows, modes=("topk",))
    with pytest.raises(ValueError, match=r"unknown pooling \['median'\]"):
        evaluator(ColourModel(4), rows, pooling=("median",))
    with pytest.raises(ValueError, match="pooling needs one of"):
        evaluator(ColourModel(4), rows, pooling=())
    with pytest.raises(ValueError, match="1 strings for 12 texts"):
        dataclasses.replace(colours, texts=["a"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, and public sets


@pytest.mark.parametrize("pooling", [True, False])
def test_pictures_of_what_was_found(colours, long_colours, pooling, monkeypatch):
    monkeypatch.setattr(retrieval, "EXAMPLES", 2)

    class Plain(ColourModel):
        has_pooling = pooling

    named = dataclasses.replace(long_colours if pooling else colours, texts=["$a$ text " * 40] * 12)
    runs = evaluator(Plain(4), named)
    with pytest.raises(RuntimeError, match="run first"):
        next(runs.figures({}))
    list(runs.run({}))
    figures = dict(runs.figures({}))
    mode = "flair mean" if pooling else "global"
    titles = ["recall", f"best answers ({mode})", f"worst answers ({mode})"]
    assert list(figures) == titles
    for picture in figures.values():
        assert isinstance(picture, Image.Image) and min(picture.size) > 100
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10


def test_margins_name_the_best_of_the_other_images():
    scores = np.array([[5, 1, 2], [3, 4, 2], [4, 0, 2]], np.float32)
    margin, rival = retrieval._margins(scores, np.array([0, 2, 2]))
    assert margin.tolist() == [1, -4, 0] and rival.tolist() == [2, 1, 0]


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Three image files with a text each: none, one or several times the context long."""
    folder = tmp_path_factory.mktemp("set")
    pictures = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        pictures.append(base.Picture(str(folder / f"{number}.png")))
    strings = ["a", "a b c d e f. " * 4, "a b c d e f. " * 30]
    data = base.Retrieval(pictures, strings, np.arange(3))
    return base.Benchmark("long", "retrieval", "Long", (), lambda root: data, "none", "here"), data


def test_a_public_set_is_evaluated_in_all_ways(public, tiny_params, tmp_path):
    """With a store, as `eval_all` has it: texts of a longer context are not those of the shorter one."""
    model = models.create({**TINY, "text": {**TINY["text"], "vocab_size": 49408}})
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(49408, TINY["text"]["width"])).astype(np.float32)
    params = {**tiny_params, "text": {**tiny_params["text"], "token_embedding": embedding}}
    options = dict(windows=("truncate", "windows", "sentences"), context_length=120, pooling=("mean",), topk=2)
    benchmark, data = public

    def scores(options):
        found = {}
        for part in evaluation_tasks.TASKS["retrieval"](model, benchmark, data, options):
            found |= {name: scores for name, (scores, _) in part.scores(params).items()}
        return found

    with features.session(store=FeatureStore(tmp_path)):
        found = scores(options)
    rows = [sum(1 for _ in file.open("rb")) - 1 for file in tmp_path.glob("*/images-*.index")]
    assert rows == [3]  # images of all ways are encoded once
    names = ["flair", "topk", "global"]
    names += [f"{mode} {way} mean" for way in ("windows", "sentences") for mode in ("flair", "global")]
    assert list(found) == names + [f"{mode} 120 tokens" for mode in ("flair", "topk", "global")]
    assert list(scores(dict(windows="windows", modes="global", pooling="max"))) == ["global windows max"]
    alone = scores(dict(context_length=120, windows=(), topk=2))
    for name, values in alone.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    close = np.abs(found["flair 120 tokens"] - found["flair"]).max(0)
    assert close[0] < 1e-4 and close[1] > 1e-3  # the first positions stay where they were; those of a longer text move
    np.testing.assert_allclose(found["flair windows mean"][:, :2], found["flair"][:, :2], atol=1e-5)  # one window
    assert np.abs(found["flair windows mean"] - found["flair"])[:, 2].max() > 1e-3


def test_long_texts_as_rows_of_tokens():
    strings = ["", "one two. three 4.", "word " * 200]
    tokens, owners = windows.text_rows(strings, 77, "windows")
    assert owners.tolist() == [0, 1, 2, 2, 2] and tokens.shape == (5, 77) and tokens.dtype == np.int32
    lengths = tokens.argmax(1) + 1
    assert lengths.tolist() == [2, 7 + 2 - 1, 69, 69, 68]  # as even as can be, each with both ends
    assert (tokens[:, 0] == 49406).all() and (tokens.max(1) == 49407).all()
    whole, _ = windows.text_rows(strings[1:2], 77, "truncate")
    np.testing.assert_array_equal(tokens[1], whole[0])
    tokens, owners = windows.text_rows(strings, 10, "sentences")
    assert owners.tolist() == [0, 1, 1, 2] and (tokens.argmax(1) + 1).tolist() == [2, 4, 4, 10]
    with pytest.raises(ValueError, match="windows is 'cut'"):
        windows.text_rows(strings, 77, "cut")
