"""What a config lists is evaluated when its turn comes, and no finished work is lost by what comes later."""

import json
import types

import pytest
from PIL import ExifTags, Image
from shard_files import write_tar
from test_evaluation_sets import Loads
from test_faults import document, picture

from flair_jax import config as configuration
from flair_jax import evaluate, evaluation_tasks, report
from flair_jax.data.benchmarks import shards
from flair_jax.data.transforms.images import Preprocessing
from flair_jax.report import Result

RESULTS = [
    Result("retrieval", "val", "text_to_image_R@1", 0.5, "flair"),
    Result("retrieval", "val", "text_to_image_R@1", 0.25, "global"),
    Result("pointing", "val", "accuracy", 0.75),
    Result("pointing", "val", "chance", 0.125),
]


def config_of(name="shards", **evaluators):
    config = configuration.read(name, ["--config.steps=1", "--config.epochs=None"])
    return {**config, "evaluators": evaluators}


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

    def figures(self, params):
        self.log.append(f"draw {self.name}")
        yield "a title", Image.new("RGB", (4, 4))
        raise RuntimeError("no second picture")


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
    config = config_of(a={"kind": "fixed", "results": RESULTS[:2]}, b={"kind": "fixed", "results": RESULTS[2:4]})
    assert evaluate.run(config, None, None) == RESULTS[:2] + RESULTS[2:4]
    assert fixed == [f"{act} {name}" for name in ("a 1", "a 2", "b 1", "b 2") for act in ("build", "run")]


def test_what_was_evaluated_before_a_failure_is_in_the_report(fixed, tmp_path):
    config = config_of(a={"kind": "fixed", "results": RESULTS[:2]}, b={"kind": "fixed", "results": RESULTS[2:3]})
    with pytest.raises(RuntimeError, match="a broken set"):
        evaluate.run(config, None, None, tmp_path / "new")
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert found == report.flat(RESULTS[:2] + RESULTS[2:3])


def test_a_picture_that_fails_is_reported_and_ends_nothing(fixed, tmp_path, caplog):
    config = config_of(a={"kind": "fixed", "results": RESULTS[:2]})
    evaluate.draw_attention_sheets(config, types.SimpleNamespace(has_pooling=True), None, tmp_path)
    assert "evaluators.a was not drawn; the report is whole" in caplog.text and "no picture" in caplog.text
    assert evaluate.run(
        config | {"evaluators": {"a": {"kind": "fixed", "results": RESULTS[:1] * 2}}}, None, None, tmp_path
    )
    assert "a figure was not drawn" in caplog.text and "no second picture" in caplog.text
    assert fixed[-3:] == ["build a 2", "run a 2", "draw a 2"]
    assert "a title" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        (
            {"kind": "squares"},
            ValueError,
            r"evaluators\.val\.kind is 'squares'; expected one of \['benchmarks', 'compositional_scenes', 'scenes'",
        ),
        ({}, ValueError, r"evaluators\.val\.kind is None"),
        ({"kind": "shards", "shards": "a", "feilds": "b"}, ValueError, r"has no \['feilds'\]; there are \['fields'"),
        ({"kind": "shards"}, ValueError, r"lacks \['shards'\]"),
        ({"kind": "scenes", "count": 8, "seed": 1, "size": 48}, ValueError, "size is 48; .*image_size is 112"),
        ({"kind": "compositional_scenes", "count": 8, "seed": 1, "size": 48}, ValueError, "size is 48; .*size is 112"),
        ({"kind": "shards", "shards": "a", "modes": ("flare",)}, ValueError, r"modes: there is no 'flare'"),
        ({"kind": "shards", "shards": "/no/such.tar", "topk": None}, FileNotFoundError, r"evaluators\.val\.shards"),
        (None, ValueError, r"evaluators\.val is None; expected a section with a kind"),
        ({"kind": "shards", "shards": "/no/such.tar"}, FileNotFoundError, r"evaluators\.val\.shards: .*such\.tar"),
        (
            {"kind": "shards", "shards": "a", "modes": ("flar",)},
            ValueError,
            r"evaluators\.val\.modes: there is no 'flar'; similar are flair; there are flair, topk, global",
        ),
        (
            {"kind": "benchmarks", "sets": ("coco_val2O17",)},
            ValueError,
            "'coco_val2O17'; similar names are coco_val2017",
        ),
        (
            {"kind": "benchmarks", "retrieval": {"mode": "flair"}},
            ValueError,
            r"options of evaluators\.val\.retrieval: there is no 'mode'; similar are modes",
        ),
        (
            {"kind": "benchmarks", "retrieval": {"windows": ("truncate", "sentence")}},
            ValueError,
            r"evaluators\.val\.retrieval\.windows: there is no 'sentence'; similar are sentences",
        ),
        (
            {"kind": "benchmarks", "classification": {"modes": "regoins"}},
            ValueError,
            r"no 'regoins'; similar are regions",
        ),
        (
            {"kind": "benchmarks", "segmentation": {"modes": ("csa",)}},
            ValueError,
            r"no 'csa'; there are projected, value",
        ),
        ({"kind": "benchmarks", "choice": {"ties": "last"}}, ValueError, r"choice\.ties: there is no 'last'"),
        ({"kind": "benchmarks", "pointing": ("attention",)}, ValueError, r"expected the options of pointing by name"),
        (
            {"kind": "benchmarks", "sets": ("folders:a/b", "folders:a_b")},
            ValueError,
            r"the same name, evaluate them apart: folders:a/b, folders:a_b",
        ),
        (
            {"kind": "benchmarks", "sets": ("imagenet", "folders:imagenet")},
            ValueError,
            r"net\.org/.*, folders:imagenet",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_run(section, error, words):
    with pytest.raises(error, match=words):
        evaluate.check(config_of(val=section))


def test_options_that_are_none_have_their_default_and_one_mode_needs_no_tuple():
    section = {"kind": "shards", "shards": None, "topk": None, "modes": "flair"}
    ((_, options),) = evaluate.sections(config_of(val=section)).values()
    assert "topk" not in options and options["shards"] is None  # which is off
    assert options["modes"] == ("flair",)
    clip = configuration.read("scenes:clip")
    section = {"kind": "scenes", "count": 8, "seed": 1, "size": 48, "modes": ("flair",)}
    with pytest.raises(ValueError, match=r"modes has \['flair'\]; a model without pooling has 'global'"):
        evaluate.check({**clip, "evaluators": {"val": section}})


def test_files_for_classes_are_looked_for_before_a_run(tmp_path):
    def check(**options):
        task = "segmentation" if options.keys() & {"classes", "templates"} else "classification"
        section = {"kind": "benchmarks", "sets": ("imagenet",), task: options}
        evaluate.check({**config_of(zero_shot=section), "data_root": str(tmp_path)})

    check(descriptions=None, names=("a", "b"))
    check(descriptions=str(tmp_path))
    for key in ("descriptions", "names"):
        with pytest.raises(FileNotFoundError, match=rf"evaluators\.zero_shot\.classification\.{key}: no/such\.json"):
            check(**{key: "no/such.json"})
    check(templates="a photo of a {c}.")
    for key in ("classes", "templates"):
        with pytest.raises(FileNotFoundError, match=rf"evaluators\.zero_shot\.segmentation\.{key}: no/such\.txt"):
            check(**{key: "no/such.txt"})


def test_features_need_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"config\.feature_store is '.*file'; expected a folder"):
        evaluate._session({"feature_store": str(tmp_path / "file")}, tmp_path)
    with evaluate._session({"feature_store": None}, tmp_path / "run"):
        assert (tmp_path / "run/features").is_dir()


def test_captions_are_where_the_training_data_has_them():
    """PixelProse has one field, `caption`; an evaluator of its own may name others."""
    config = configuration.read("flair_pixelprose", ["--config.data.index_dir=/index"])
    assert evaluate.sections(config)["val"][1]["fields"] == ("caption",)
    assert evaluate.sections(config)["val"][1]["index_dir"] == "/index"
    config = configuration.read("flair_pixelprose", ["--config.evaluators.val.fields=text"])
    assert evaluate.sections(config)["val"][1]["fields"] == "text"
    assert "fields" not in evaluate.sections(configuration.read("scenes"))["scenes"][1]


class Sizes:
    image_size, context_length, preprocessing = (32, 48), 16, Preprocessing()


@pytest.fixture
def pixelprose(tmp_path):
    """A shard with captions under `caption` alone."""
    members = [(f"{n}.{end}", content) for n in range(3) for end, content in
               (("jpg", picture()), ("json", document(caption=f"n {n}. Another.")))]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    return str(tmp_path / "0.tar")


def test_shards_with_captions_under_another_key(pixelprose, monkeypatch, caplog):
    """All sentences of the fields are texts; nothing is decoded before it is encoded."""
    sets = []

    def retrieval(model, benchmark, data, options):
        sets.append((benchmark, data, options))
        return iter([Fixed([], "", RESULTS[:1])])

    monkeypatch.setitem(evaluation_tasks.TASKS, "retrieval", retrieval)
    section = {"kind": "shards", "shards": pixelprose, "fields": ("caption",), "topk": 7}
    assert evaluate.run(config_of(val=section), Sizes, None) == RESULTS[:1]
    ((benchmark, data, options),) = sets
    assert benchmark.name == "val" and options == {"topk": 7}
    assert data.image_of_text.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.texts == ["n 0", "Another", "n 1", "Another", "n 2", "Another"]
    pixels = evaluation_tasks.Pixels(data.pictures, Sizes.image_size, Sizes.preprocessing.fit)
    assert [pixels[number].shape for number in range(3)] == [(32, 48, 3)] * 3
    assert len(set(pixels.keys)) == 3
    assert evaluate.run(config_of(val={**section, "fields": ("raw_caption",)}), Sizes, None) == []
    assert "not evaluated: val: no usable record" in caplog.text and "3 x no captions" in caplog.text


def test_records_that_cannot_be_used_are_counted(tmp_path, monkeypatch, caplog):
    """Without captions they are skipped when the set is read, without an image when it is encoded."""
    good = [(f"{n}.{end}", content) for n in range(2) for end, content in
            (("jpg", picture()), ("json", document(caption=f"n {n}")))]  # fmt: skip
    bad = [
        ("5.jpg", picture()),
        ("5.json", document(other="a")),
        ("6.jpg", b"no image"),
        ("6.json", document(caption="b")),
    ]
    write_tar(tmp_path / "0.tar", good + bad)
    data, skipped = shards.read(str(tmp_path / "0.tar"), ("caption",))
    assert len(data.pictures) == 3 and dict(skipped) == {"no captions: there is none of the fields caption": 1}

    def retrieval(model, benchmark, data, options):
        return iter([Loads(model, benchmark, data, options)])

    monkeypatch.setitem(evaluation_tasks.TASKS, "retrieval", retrieval)
    section = {"kind": "shards", "shards": str(tmp_path / "0.tar"), "fields": ("caption",)}
    results = {result.metric: result.value for result in evaluate.run(config_of(val=section), Sizes, None)}
    assert results == {"images": 2, "texts": 2}
    assert "1 sample skipped: no captions" in caplog.text and "0.tar: 6: not an image" in caplog.text


@pytest.mark.parametrize("upright", [False, True])
def test_photographs_are_turned_as_in_training(tmp_path, upright):
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    write_tar(
        tmp_path / "0.tar", [("a.png", (tmp_path / "turned.png").read_bytes()), ("a.json", document(caption="a"))]
    )
    data, _ = shards.read(str(tmp_path / "0.tar"), ("caption",), upright=upright)
    assert data.pictures[0].decode().size == ((4, 8) if upright else (8, 4))
    config = config_of(val={"kind": "shards", "shards": str(tmp_path / "0.tar")})
    config["data"] = {**config["data"], "upright": upright}
    assert evaluate.sections(config)["val"][1]["upright"] is upright
