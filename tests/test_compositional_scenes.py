"""Captions of scenes against altered ones: what is altered is false, and a model is trained and judged with them."""

import collections
import json
import re

import numpy as np
import pytest
from test_scenes import background_word, see, true

from benchmarks import compositional
from flair_jax import config as configuration
from flair_jax import train
from flair_jax.configs import scenes_compositional
from flair_jax.data import compositional_scenes, scenes
from flair_jax.data.sources import files
from flair_jax.data.transforms import annotations, negatives

COUNT, SEED, SIZE = 60, 3, 48


@pytest.fixture(scope="module")
def unseen():
    return compositional_scenes.compositional_set(COUNT, SEED, SIZE)


def test_captions_are_true_of_one_scene_and_altered_ones_of_theirs_never(unseen):
    """By the grammar and the checker of `test_scenes`, which know nothing of how either is made."""
    drawn = [scenes.draw(SEED, index, SIZE, "evaluation") for index in range(COUNT)]
    np.testing.assert_array_equal(unseen.images, np.stack([scene.image for scene in drawn]))
    seen = [(see(scene, SIZE), background_word(scene)) for scene in drawn]

    def holds(text, image):
        try:
            return true(text, *seen[image]) == "relation"
        except (AssertionError, ValueError):  # it is false; or there is no such shape, or there are several
            return False

    captions = len(unseen.caption_images)
    assert captions > COUNT and len(set(unseen.texts)) == len(unseen.texts)
    for text, image in zip(unseen.texts, unseen.caption_images, strict=False):
        assert [other for other in range(COUNT) if holds(text, other)] == [image]
    for item in unseen.items:
        (image,), (caption, altered) = item.images, item.texts
        assert image == unseen.caption_images[caption] and item.positives == 1
        assert not holds(unseen.texts[altered], image)
        # Else it would be no question about this scene's shapes, but about language.
        assert re.fullmatch(r"the (small|large) \w+ \w+ is [a-z ]+ the (small|large) \w+ \w+", unseen.texts[altered])


WORDS = r"the (\w+) (\w+) (\w+) is (.+) the (\w+) (\w+) (\w+)"  # size, colour, shape, relation, size, colour, shape
CHANGED = {
    "swap_obj": [{0, 1, 2, 4, 5, 6}],
    "swap_att": [{0, 4}, {1, 5}],
    "replace_obj": [{2}, {6}],
    "replace_att": [{0}, {1}, {4}, {5}],
    "replace_rel": [{3}],
}


def test_each_kind_alters_what_its_name_says(unseen):
    found = collections.defaultdict(set)
    counts = collections.Counter()
    for item in unseen.items:
        caption, altered = (re.fullmatch(WORDS, unseen.texts[number]).groups() for number in item.texts)
        changed = {place for place, words in enumerate(zip(caption, altered, strict=True)) if len(set(words)) > 1}
        if item.group == "swap_obj":
            assert altered[:3] == caption[4:] and altered[4:] == caption[:3] and altered[3] == caption[3]
            changed = CHANGED["swap_obj"][0]  # of two small shapes the first word stays
        elif item.group == "swap_att":
            (first, second) = sorted(changed)
            assert (altered[first], altered[second]) == (caption[second], caption[first])
        assert changed in CHANGED[item.group]
        found[item.group].add(frozenset(changed))
        counts[item.group] += 1
    assert {kind: {frozenset(places) for places in ways} for kind, ways in CHANGED.items()} == found
    assert set(found) == set(compositional_scenes.KINDS)
    captions = len(unseen.caption_images)
    assert all(counts[kind] == captions for kind in counts if kind != "swap_att")  # two red ones of one size have none
    assert 0.5 * captions < counts["swap_att"] < captions


def test_a_set_depends_on_its_arguments_only(unseen):
    again = compositional_scenes.compositional_set(COUNT, SEED, SIZE)
    assert (again.texts, again.items) == (unseen.texts, unseen.items)
    np.testing.assert_array_equal(again.caption_images, unseen.caption_images)
    assert compositional_scenes.compositional_set(20, SEED + 1, SIZE).texts[:3] != unseen.texts[:3]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def small(name, **changes):
    config = configuration.load(name).unlock()
    config.model.update(
        embed_dim=16,
        vision=dict(image_size=36, patch_size=18, width=16, depth=1, heads=2),
        text=dict(context_length=18, width=16, depth=1, heads=2),
    )
    config.optimizer.warmup_steps = 1
    config.evaluators.unseen.update(count=8, size=36)
    config.update(batch_size=8, steps=2, log_every=1, **changes)
    return config


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Scenes with annotations as spaCy makes them, apart from replacements, which need WordNet."""
    folder = tmp_path_factory.mktemp("shards")
    (shard,) = scenes.write(folder, count=16, seed=2, size=36)
    made = []
    for index in range(16):
        (caption,) = scenes.draw(2, index, 36).sentences[scenes_compositional.FIELDS[0]]
        phrases = [match.span() for match in re.finditer(r"the \w+ \w+ \w+(?= is|$)", caption)]
        made.append(negatives.Annotation(caption, negatives.tokenize(caption).words, [phrases]))
    about = dict(size=files.state(str(shard)).size, fields=scenes_compositional.FIELDS, splitting="whole")
    annotations.write(annotations.path(str(shard)), made, about)
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, shards):
    """The work directory of a run from scratch, and its report."""
    folder = tmp_path_factory.mktemp("clip")
    config = small("scenes_compositional:clip")
    config.data.scenes, config.data.shards = None, str(shards)
    return folder, train.train(config.to_dict(), folder)


def test_the_evaluator_reports_every_kind_and_retrieval(scratch):
    _, report = scratch
    figures = compositional.figures_of(report)
    assert set(figures) == {"choice", *compositional_scenes.KINDS, "T2I R@1", "I2T R@1"}
    assert all(0 <= value <= 1 for value in figures.values())
    kinds = [figures[kind] for kind in compositional_scenes.KINDS]
    assert figures["choice"] == pytest.approx(np.mean(kinds))
    assert report["choice/unseen/chance/accuracy"] == 0.5


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("method", scenes_compositional.FINE_TUNINGS)
def test_a_fine_tuning_trains(method, scratch, shards, tmp_path):
    config = small(f"scenes_compositional:{method}", init_from=str(scratch[0]))
    config.data.shards, config.evaluators = str(shards), {}
    train.train(config.to_dict(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    assert set(config.objectives) <= set(lines[0])
    if method.startswith("fsc_clip"):
        for line in lines:  # the swap and the shuffle are there; no word has a replacement
            assert line["global_hard_negatives/missing"] == config.batch_size
    elif method == "negclip":
        assert [line["negclip/missing"] for line in lines] == [0, 0]


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no method 'flair'; there are .*'fsc_clip'"):
        scenes_compositional.get_config("flair")


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_runs_start_where_they_should(tmp_path):
    scratch, tuned = (compositional.config_of(tmp_path, method, 1) for method in ("clip", "fsc_clip"))
    assert (scratch["seed"], tuned["seed"]) == (1, 1)
    assert (scratch["init_from"], tuned["init_from"]) == (None, str(tmp_path / "clip_1"))
    assert scratch["data"]["shards"] != tuned["data"]["shards"] and scratch["data"]["scenes"] is None


def test_the_table_compares_runs_of_the_same_seed():
    def line(method, seed, value):
        return {"method": method, "seed": seed, "figures": dict.fromkeys(compositional.METRICS, value)}

    runs = [line("clip_tuned", 0, 0.5), line("clip_tuned", 1, 0.6), line("negclip", 0, 0.52), line("negclip", 1, 0.66)]
    rows = [row for row in compositional.table(runs).splitlines() if row.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells[:2]] == [["`clip_tuned`", "2", "55.0 ± 7.1"], ["`negclip`", "2", "59.0 ± 9.9"]]
    assert cells[2][:3] == ["`negclip`", "2", "+4.0 ± 25.4"]  # 2 and 6 points; Student's t is 12.7 for one degree


def test_the_probe_tells_features_that_know_sides_from_features_that_do_not():
    rng = np.random.default_rng(0)
    drawn = [scenes.draw(SEED, index, SIZE) for index in range(400)]
    truth = compositional.sides(drawn)
    assert {-1, 0, 1} == set(truth.ravel().tolist())
    # A red shape alone in its colour lies left where the word says so.
    red = list(scenes.COLOURS).index("red")
    for scene, row in zip(drawn, truth, strict=True):
        (*places,) = (shape.place for shape in scene.objects if shape.colour == "red")
        if len(places) == 1:
            assert row[red] == (1 if "left" in places[0] else -1 if "right" in places[0] else 0)
    knowing = truth @ rng.normal(size=(truth.shape[1], 20)) + 0.01 * rng.normal(size=(400, 20))
    blind = np.abs(truth) @ rng.normal(size=(truth.shape[1], 20))  # which colours are there, and nothing else
    half = slice(None, 200), slice(200, None)
    accuracy = [
        compositional.linear_accuracy(x[half[0]], truth[half[0]], x[half[1]], truth[half[1]]) for x in (knowing, blind)
    ]
    assert accuracy[0] > 0.95 and 0.35 < accuracy[1] < 0.65
