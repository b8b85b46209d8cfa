"""Public sets in an evaluation: what is missing or broken is said, counted, and left out if that is allowed."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image
from word_model import WordModel

from flair_jax import config as configuration
from flair_jax import evaluate, evaluation_sets, evaluation_tasks
from flair_jax.configs import fsc_clip_recipe
from flair_jax.data.benchmarks import base, table
from flair_jax.data.transforms import images
from flair_jax.evaluators.features import BrokenImages
from flair_jax.report import Result

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Loads:
    """An evaluator that loads every image and reports how many; images that do not load are broken."""

    def __init__(self, model, benchmark, data, options):
        self.name, self.data = benchmark.name, data
        self.pixels = evaluation_tasks.Pixels(data.pictures, (8, 8), images.evaluation_crop)

    def run(self, params):
        broken = {}
        for number in range(len(self.pixels)):
            try:
                assert self.pixels[number].shape == (8, 8, 3)
            except evaluation_tasks.image_rules.ImageError as error:
                broken[number] = str(error)
        if broken:
            raise BrokenImages(broken)
        yield Result("retrieval", self.name, "images", float(len(self.pixels)))
        yield Result("retrieval", self.name, "texts", float(len(self.data.texts)))

    def figures(self, params):
        yield "first", Image.new("RGB", (2, 2))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three sets of three colours each, `whole`, `gaps` and `absent`, of which the last has no folder."""

    def entry(name):
        def read(root):
            folder = base.find(root, name)
            pictures = [base.inside(folder, f"{colour}.png", folder) for colour in COLOURS]
            return base.Retrieval(pictures, ["a", "b", "c", "d"], np.array([0, 1, 2, 2]))

        return base.Benchmark(name, "retrieval", name, (base.File(name),), read, "CC0", f"https://sets/{name}")

    sets = {name: entry(name) for name in ("whole", "gaps", "absent")}
    monkeypatch.setattr(table, "ALL", sets)
    monkeypatch.setitem(evaluation_tasks.TASKS, "retrieval", lambda *arguments: iter([Loads(*arguments)]))
    for name in ("whole", "gaps"):
        (tmp_path / name).mkdir()
        for colour, pixel in COLOURS.items():
            Image.new("RGB", (10, 12), pixel).save(tmp_path / name / f"{colour}.png")
    base._state.cache_clear()
    return tmp_path


def run(root, **options):
    """(results by name, reasons by set) of all sets."""
    results, reasons = {}, {}
    for evaluator in evaluation_sets.evaluators(types.SimpleNamespace(), "public", root=str(root), **options):
        if isinstance(evaluator, evaluation_tasks.UnusableSet):
            reasons[evaluator.benchmark.name] = evaluator.reason
            continue
        try:
            results |= {result.name: result.value for result in evaluator.run({})}
        except evaluation_tasks.UnusableSet as unusable:
            reasons[unusable.benchmark.name] = unusable.reason
    return results, reasons


def test_what_is_missing_is_said_at_once_and_the_rest_runs(root, caplog):
    (root / "gaps" / "green.png").unlink()
    results, reasons = run(root)
    assert results == {"retrieval/whole/images": 3, "retrieval/whole/texts": 4}
    assert reasons.keys() == {"gaps", "absent"}
    assert "1 of 3 images is missing, such as " in reasons["gaps"] and "green.png" in reasons["gaps"]
    assert "allow_missing=True" in reasons["gaps"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "2 of 3 sets cannot be evaluated" in message
    assert "https://sets/gaps" in message and "not found: absent" in message and "CC0" in message


def test_missing_and_broken_images_are_left_out_if_allowed(root):
    (root / "gaps" / "green.png").unlink()
    (root / "gaps" / "blue.png").write_bytes(b"no image")
    (evaluator,) = [
        evaluator
        for evaluator in evaluation_sets.evaluators(None, "public", root=str(root), sets=("gaps",), allow_missing=True)
    ]
    results = {result.metric: result.value for result in evaluator.run({})}
    assert results == {"images": 1, "texts": 1}
    assert evaluator.left_out == {"missing": 1, "broken": 1}
    assert [title for title, _ in evaluator.figures({})] == ["first"]


def test_broken_images_are_refused_with_their_count(root):
    for colour in ("red", "blue"):
        (root / "gaps" / f"{colour}.png").write_bytes(b"no image")
    results, reasons = run(root, sets=("gaps", "whole"))
    assert results["retrieval/whole/images"] == 3
    assert reasons["gaps"].startswith("2 of 3 images are broken, such as ") and "red.png" in reasons["gaps"]
    for colour in COLOURS:
        (root / "gaps" / f"{colour}.png").write_bytes(b"no image")
    assert run(root, sets=("gaps",), allow_missing=True)[1]["gaps"].startswith("3 of 3 images are broken")


def test_a_fault_of_a_reader_ends_no_other_set(root, monkeypatch, caplog):
    def fail(_):
        raise KeyError("x")

    monkeypatch.setitem(table.ALL, "gaps", dataclasses.replace(table.ALL["gaps"], read=fail))
    results, reasons = run(root)
    assert results["retrieval/whole/images"] == 3 and reasons["gaps"] == "KeyError: 'x'"
    assert "gaps was not read" in caplog.text


def test_a_set_of_which_nothing_can_be_measured_is_not_evaluated(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pictures = [base.Picture(str(tmp_path / "a.png"))]
    several = base.Classification(pictures, np.zeros((1, 2), bool), [("red",), ("blue",)], ["a {c}"])
    masks = base.Segmentation(pictures, [np.full((8, 8), 255, np.uint8)], [("red",), ("blue",)])
    for task, data, words in (("classification", several, "no image has a class"), ("segmentation", masks, "no pixel")):
        entry = base.Benchmark("set", task, "Set", (), lambda root, data=data: data, "none", "here")
        options = {"templates": ("a {c}",)}
        evaluator = evaluation_sets.SetEvaluator(WordModel(8), entry, tmp_path, allow_missing=True, options=options)
        with pytest.raises(evaluation_tasks.UnusableSet, match=words):
            evaluator.run({})


def test_selection(root):
    assert [benchmark.name for benchmark in table.select(("g*", "whole"))] == ["whole", "gaps"]
    with pytest.raises(ValueError, match=r"no evaluation set is called 'coko'; there are whole, gaps, absent"):
        table.select(("coko",))
    with pytest.raises(ValueError, match=r"several sets are a tuple, \('whole', 'gaps'\)"):
        table.select(("whole, gaps",))


def test_pictures(tmp_path):
    image = Image.new("RGB", (6, 4), (255, 0, 0))
    image.paste((0, 0, 255), (3, 0, 6, 4))
    image.save(tmp_path / "a.png")
    picture = base.inside(tmp_path, "a.png", tmp_path / "list.json")
    assert np.asarray(picture.decode()).shape == (4, 6, 3)
    right = base.Picture(picture.path, box=(3, 0, 6, 4)).decode()
    assert np.unique(np.asarray(right).reshape(-1, 3), axis=0).tolist() == [[0, 0, 255]]
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.tar").write_bytes(b"head" + content + b"tail")
    inside = base.Picture(str(tmp_path / "b.tar"), offset=4, size=len(content))
    assert np.array_equal(np.asarray(inside.decode()), np.asarray(picture.decode()))
    assert len({picture.key(), inside.key(), base.Picture(picture.path, box=(0, 0, 1, 1)).key()}) == 3
    for name in ("../a.png", "/a.png", "", None, 3, "b/../../a.png", "\ud800.png", "a\0.png", 256 * "a"):
        with pytest.raises(base.AnnotationError, match=r"list\.json: image name"):
            base.inside(tmp_path, name, tmp_path / "list.json")


def test_each_evaluator_has_a_cadence():
    config = configuration.read("scenes", ["--config.eval_every=4", "--config.evaluators.late.every=6"])
    config["evaluators"]["never"] = {"kind": "scenes", "every": 0}
    assert [sorted(evaluate.due(config, step)) for step in (2, 4, 6, 12)] == [
        [],
        ["scenes"],
        ["late"],
        ["late", "scenes"],
    ]


@pytest.mark.parametrize("recipe", fsc_clip_recipe.RUNS)
def test_fine_tuning_asks_sugarcrepe_after_each_epoch_once_it_knows_where_it_is(recipe, tmp_path, monkeypatch, caplog):
    """FSC-CLIP does so (spec/fsc_clip.md 5); by default the recipe needs no set, and says so."""
    name = f"fsc_clip_{recipe}"
    arguments = [f"--config.evaluators.val.shards={tmp_path}"]
    (tmp_path / "a.tar").write_bytes(b"")
    off = configuration.read(name)
    evaluate.check(off)
    assert "evaluators.sugarcrepe: not evaluated, since config.data_root is not set" in caplog.text
    assert "evaluators.val: not evaluated, since config.evaluators.val.shards is not set" in caplog.text
    assert evaluate.run(off, None, None, tmp_path) == []
    with pytest.raises(ValueError, match=r"set config\.data_root or config\.evaluators\.val\.shards"):
        evaluate.evaluate(off, tmp_path)
    on = configuration.read(name, [f"--config.data_root={tmp_path}", *arguments])
    evaluate.check(on)
    assert [step for step in range(1, 1954) if evaluate.due(on, step) == ["sugarcrepe"]] == [391, 782, 1173, 1564]
    asked = []

    def benchmarks(model, name, *, root, sets):
        asked.append((name, root, sets))
        return iter(())

    monkeypatch.setitem(evaluate.KINDS, "benchmarks", (benchmarks, None))
    assert evaluate.run(on, None, None, names=["sugarcrepe"]) == []
    assert asked == [("sugarcrepe", str(tmp_path), ("sugarcrepe",))]


def test_options_of_public_sets_are_checked():
    config = configuration.read("eval_all", ["--config.data_root=/data", "--config.evaluators.public.sets=coco_*"])
    ((kind, options),) = evaluate.sections(config).values()
    assert kind == "benchmarks" and options["sets"] == ("coco_*",) and options["root"] == "/data"
    config["evaluators"]["public"]["modus"] = "flair"
    with pytest.raises(ValueError, match=r"evaluators\.public of kind 'benchmarks' has no \['modus'\]"):
        evaluate.sections(config)
    with pytest.raises(FileNotFoundError, match=r"config\.data_root is '/no/such'"):
        evaluate.check(configuration.read("eval_all", ["--config.data_root=/no/such"]))
    with pytest.raises(ValueError, match=r"nothing to evaluate: set config\.data_root$"):
        evaluate.evaluate(configuration.read("eval_all"), "/no/such/weights")
    with pytest.raises(ValueError, match="no evaluation set is called 'coko'"):
        arguments = ["--config.data_root=/", "--config.evaluators.public.sets=coko"]
        evaluate.check(configuration.read("eval_all", arguments))


@pytest.mark.parametrize("task", ["retrieval", "classification", "choice"])
def test_results_do_not_depend_on_the_order_of_the_files(tmp_path, task):
    """Images, texts and questions in another order, with other numbers, give the same numbers."""
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(7):
        pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        pictures.append(base.Picture(str(tmp_path / f"{number}.png")))
    texts, owners, labels = ["the red", "a green", "blue"], np.array([4, 0, 6]), rng.integers(0, 3, 7)

    def results(images, strings):
        """With the images and texts in the orders that are given."""
        ordered, words = [pictures[image] for image in images], [texts[text] for text in strings]
        image_of = np.argsort(images)  # new number of each old image
        text_of = np.argsort(strings)
        if task == "retrieval":
            data = base.Retrieval(ordered, words, image_of[owners[strings]])
        elif task == "classification":
            classes = [(("red", "green", "blue")[name],) for name in strings]
            data = base.Classification(ordered, text_of[labels[images]], classes, ["a {c}"])
        else:
            questions = [(image, text, other) for image in range(7) for text in range(3) for other in range(3)]
            items = [
                base.Item((int(image_of[image]),), (int(text_of[text]), int(text_of[other])))
                for image, text, other in questions
                if text != other
            ]
            data = base.Choice(ordered, words, [items[number] for number in rng.permutation(len(items))])
        entry = base.Benchmark("set", task, "Set", (), lambda root: data, "none", "here")
        evaluator = evaluation_sets.SetEvaluator(WordModel(8), entry, tmp_path, allow_missing=False, options={})
        return {result.name: result.value for result in evaluator.run({})}

    expected = results(np.arange(7), np.arange(3))
    assert any(0 < value < 1 for value in expected.values())
    for _ in range(2):
        assert results(rng.permutation(7), rng.permutation(3)) == pytest.approx(expected, abs=1e-6)
