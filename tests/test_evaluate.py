"""What a config lists is evaluated when its turn comes, and no finished work is lost by what comes later."""

import json
import types

import numpy as np
import pytest
from shard_files import write_tar
from test_faults import document, picture

from flair_jax import config as configuration
from flair_jax import evaluate, report
from flair_jax.data import loader
from flair_jax.report import Result

RESULTS = [
    Result("retrieval", "val", "text_to_image_R@1", 0.5, "flair"),
    Result("retrieval", "val", "text_to_image_R@1", 0.25, "global"),
    Result("retrieval", "val", "text_to_image_mean_rank", 3.0, "flair"),
    Result("retrieval", "val", "text_to_image_R@1", 0.01, "chance"),
    Result("pointing", "val", "accuracy", 0.75),
    Result("pointing", "val", "chance", 0.125),
    Result("pointing", "val", "chance_object", 0.5),
    Result("segmentation", "val", "miou", 0.5),
    Result("segmentation", "val", "miou", 0.375, "projected"),
    Result("segmentation", "val", "chance", 0.0625),
    Result("segmentation", "val", "door/gate", 0.875, "iou"),
]


def config_of(name="shards", **evaluators):
    config = configuration.read(name, ["--config.steps=1", "--config.epochs=None"])
    return {**config, "evaluators": evaluators}


def test_names_and_tables(tmp_path):
    """Names are those that benchmarks read; tables have a row for each metric and chance beside."""
    text = report.write(tmp_path / "not" / "there", RESULTS)
    assert json.loads((tmp_path / "not" / "there" / "report.json").read_text()) == {
        "retrieval/val/flair/text_to_image_R@1": 0.5,
        "retrieval/val/global/text_to_image_R@1": 0.25,
        "retrieval/val/flair/text_to_image_mean_rank": 3.0,
        "retrieval/val/chance/text_to_image_R@1": 0.01,
        "pointing/val/accuracy": 0.75,
        "pointing/val/chance": 0.125,
        "pointing/val/chance_object": 0.5,
        "segmentation/val/miou": 0.5,
        "segmentation/val/projected/miou": 0.375,
        "segmentation/val/chance": 0.0625,
        "segmentation/val/iou/door/gate": 0.875,
    }
    assert (tmp_path / "not" / "there" / "report.md").read_text() == text
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line]
    assert ["retrieval/val", "flair", "global", "chance"] in cells
    assert ["text_to_image_R@1", "0.500", "0.250", "0.010"] in cells
    assert ["text_to_image_mean_rank", "3.000", "", ""] in cells
    assert ["pointing/val", "value", "chance", "chance object"] in cells
    assert ["accuracy", "0.750", "0.125", "0.500"] in cells
    assert ["miou", "0.500", "0.375", "0.062"] in cells
    assert ["iou of door/gate", "0.875", "", ""] in cells


def test_an_evaluation_of_nothing_leaves_the_report(tmp_path):
    report.write(tmp_path, RESULTS)
    before = (tmp_path / "report.json").read_text()
    assert report.write(tmp_path, []) == ""
    assert evaluate.run(config_of(val={"kind": "shards", "shards": None}), None, None, tmp_path) == []
    assert (tmp_path / "report.json").read_text() == before
    with pytest.raises(ValueError, match=r"config\.evaluators is empty"):
        evaluate.evaluate(config_of(), tmp_path)
    assert (tmp_path / "report.json").read_text() == before


class Fixed:
    """An evaluator with results of its own; notes when it is built and run."""

    def __init__(self, log, name, results):
        self.log, self.name, self.results = log, name, results
        log.append(f"build {name}")

    def run(self, params):
        self.log.append(f"run {self.name}")
        if not self.results:
            raise RuntimeError("a broken set")
        yield from self.results


@pytest.fixture
def fixed(monkeypatch):
    log = []

    def evaluators(model, name, *, results, **_):
        yield Fixed(log, f"{name} 1", results[:1])
        yield Fixed(log, f"{name} 2", results[1:])

    def examples(model, **_):
        raise RuntimeError("no picture")

    monkeypatch.setitem(evaluate.KINDS, "fixed", (evaluators, examples))
    return log


def test_evaluators_are_built_when_they_run(fixed):
    config = config_of(a={"kind": "fixed", "results": RESULTS[:2]}, b={"kind": "fixed", "results": RESULTS[4:6]})
    assert evaluate.run(config, None, None) == RESULTS[:2] + RESULTS[4:6]
    assert fixed == [f"{act} {name}" for name in ("a 1", "a 2", "b 1", "b 2") for act in ("build", "run")]


def test_what_was_evaluated_before_a_failure_is_in_the_report(fixed, tmp_path):
    config = config_of(a={"kind": "fixed", "results": RESULTS[:2]}, b={"kind": "fixed", "results": RESULTS[4:5]})
    with pytest.raises(RuntimeError, match="a broken set"):
        evaluate.run(config, None, None, tmp_path / "new")
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert found == report.flat(RESULTS[:2] + RESULTS[4:5])


def test_a_picture_that_fails_is_reported_and_ends_nothing(fixed, tmp_path, caplog):
    config = config_of(a={"kind": "fixed", "results": RESULTS[:2]})
    evaluate.draw_attention_sheets(config, types.SimpleNamespace(has_pooling=True), None, tmp_path)
    assert "evaluators.a was not drawn; the report is whole" in caplog.text and "no picture" in caplog.text


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        (
            {"kind": "squares"},
            ValueError,
            r"evaluators\.val\.kind is 'squares'; expected one of \['benchmarks', 'scenes'",
        ),
        ({}, ValueError, r"evaluators\.val\.kind is None"),
        ({"kind": "shards", "shards": "a", "feilds": "b"}, ValueError, r"has no \['feilds'\]; there are \['fields'"),
        ({"kind": "shards"}, ValueError, r"lacks \['shards'\]"),
        ({"kind": "scenes", "count": 8, "seed": 1, "size": 48}, ValueError, "size is 48; .*image_size is 112"),
        ({"kind": "shards", "shards": "/no/such.tar"}, FileNotFoundError, r"evaluators\.val\.shards: .*such\.tar"),
    ],
)
def test_what_is_wrong_is_said_before_a_run(section, error, words):
    with pytest.raises(error, match=words):
        evaluate.check(config_of(val=section))


def test_captions_are_where_the_training_data_has_them():
    """PixelProse has one field, `caption`; an evaluator of its own may name others."""
    config = configuration.read("flair_pixelprose", ["--config.data.index_dir=/index"])
    assert evaluate.sections(config)["val"][1]["fields"] == ("caption",)
    assert evaluate.sections(config)["val"][1]["index_dir"] == "/index"
    config = configuration.read("flair_pixelprose", ["--config.evaluators.val.fields=text"])
    assert evaluate.sections(config)["val"][1]["fields"] == "text"
    assert "fields" not in evaluate.sections(configuration.read("scenes"))["scenes"][1]


class Sizes:
    image_size, context_length = (32, 48), 16


@pytest.fixture
def pixelprose(tmp_path):
    """A shard with captions under `caption` alone."""
    members = [(f"{n}.{end}", content) for n in range(3) for end, content in
               (("jpg", picture()), ("json", document(caption=f"n {n}. Another.")))]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    return str(tmp_path / "0.tar")


def test_shards_with_captions_under_another_key(pixelprose, monkeypatch):
    """The evaluator and the sheet read the same fields."""
    sets = []
    monkeypatch.setattr(evaluate, "Retrieval", lambda model, data, **options: sets.append(data))
    options = dict(shards=pixelprose, fields=("caption",))
    list(evaluate.shards_evaluators(Sizes, "val", **options))
    (data,) = sets
    assert len(data.images) == 3 and data.image_of_text.tolist() == [0, 0, 1, 1, 2, 2]
    images, texts, boxes = evaluate.shards_examples(Sizes, **options)
    assert [np.shape(image) for image in images] == [(32, 48, 3)] * 3
    assert texts == [
        sentences for _, _, sentences in loader.evaluation_samples(pixelprose, (32, 48), fields=["caption"])
    ]
    assert boxes == [[None, None]] * 3
    with pytest.raises(
        ValueError, match=r"evaluators\.val: no usable sample .*raw_caption.* Set evaluators\.val\.fields"
    ):
        list(evaluate.shards_evaluators(Sizes, "val", shards=pixelprose))
    assert evaluate.shards_examples(Sizes, shards=pixelprose) == ([], [], [])
