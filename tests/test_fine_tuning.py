"""Fine-tuning: early stopping and its resume, before and after, other sizes, and what is trained."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import fresh_params, take_devices
from processes import free_port, one_device
from tiny_run import METRIC, MODEL, SIZE, STOPPING, assert_same_checkpoint, checkpoint_of, tiny

from flair_jax import checkpoint, evaluate, pretrained, report, train
from flair_jax import config as configuration
from flair_jax.configs import finetune
from flair_jax.data import scenes
from flair_jax.early_stopping import EarlyStopping, EarlyStoppingOptions

pytestmark = pytest.mark.usefixtures("shared_programs", "on_one_device")


# ---------------------------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize(
    ("metric", "values", "options", "best", "exhausted"),
    [
        ("a/b/R@1", [0.1, 0.3, 0.2], {}, 1, False),
        ("a/b/R@1", [0.1, 0.3, 0.2, 0.3], {}, 1, True),
        ("a/b/R@1", [0.1, 0.3, 0.2, 0.31], {}, 3, False),
        ("a/b/R@1", [0.1, 0.3, 0.2, 0.31], dict(min_delta=0.02), 1, True),
        ("a/b/text_to_image_mean_rank", [9.0, 7.0, 8.0, 7.5], {}, 1, True),
        ("a/b/R@1", [0.5, 0.4, 0.4, 0.4], dict(patience=4), 0, False),
    ],
)
def test_the_rule(metric, values, options, best, exhausted):
    stopping = EarlyStopping(EarlyStoppingOptions.of(dict(evaluator="b", metric=metric, patience=2) | options))
    for step, value in enumerate(values):
        assert stopping.add(step, value) == (stopping.best == (step, value))
    assert (stopping.best, stopping.exhausted) == ((best, values[best]), exhausted)
    again = EarlyStopping(stopping.options, json.loads(json.dumps(stopping.evaluations)))
    assert (again.best, again.exhausted) == (stopping.best, stopping.exhausted)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(metric=METRIC), r"early_stopping lacks \['evaluator'\]"),
        (STOPPING | dict(patients=3), r"early_stopping has \['patients'\]"),
        (STOPPING | dict(patience=0), "patience is 0"),
        (STOPPING | dict(min_delta=-1.0), r"min_delta is -1\.0"),
        (STOPPING | dict(evaluator="val"), r"evaluator is 'val': there is none of that name; there are \['scenes'\]"),
        (STOPPING, r"evaluator is 'scenes': it has no cadence: set config\.evaluators\.scenes\.every"),
    ],
)
def test_what_cannot_stop_a_run_is_refused(tmp_path, section, words):
    with pytest.raises(ValueError, match=words):
        train.train(tiny(evaluate=True) | dict(early_stopping=section), tmp_path)


def test_a_metric_that_is_not_measured_is_said_at_once():
    stopping = EarlyStopping(EarlyStoppingOptions.of(STOPPING))
    with pytest.raises(ValueError, match=r"evaluators\.scenes gives \['other'\]"):
        stopping.value_of({"other": 1.0})
    with pytest.raises(ValueError, match="is nan, which cannot be compared"):
        stopping.value_of({METRIC: float("nan")})


# ---------------------------------------------------------------------------------------------------------------------
# A run that stops


def stopping_run(**overrides):
    config = tiny(evaluate=True, steps=30, save_every=3, evaluators__scenes__every=2, **overrides)
    return config | dict(early_stopping=STOPPING)


class Evaluations:
    """Stands for `evaluate.run`: a value that depends on the weights alone, and jumps up and down as they change."""

    def __init__(self, monkeypatch, fail_at=None):
        self.values, self.calls = [], []
        self.fail_at = fail_at
        monkeypatch.setattr(train.evaluate, "run", self)
        monkeypatch.setattr(train.evaluate, "draw_attention_sheets", lambda *_: None)

    def __call__(self, config, model, params, workdir=None, **options):
        if len(self.values) == self.fail_at:
            raise KeyboardInterrupt
        value = float(np.float32(1e5 * float(params["logit_bias"]) % 1))
        self.values.append(value)
        self.calls.append((workdir, options, jax.device_get(params)))
        return [report.Result("retrieval", "scenes", "text_to_image_R@1", value, "global")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_programs):
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        take_devices(patch, 1)
        evaluations = Evaluations(patch)
        train.train(stopping_run(), workdir)
    return workdir, evaluations


def known(workdir):
    """What the newest checkpoint and the best one know of evaluations, and their steps."""
    found = []
    for folder in (workdir, workdir / "best"):
        saved = checkpoint.Checkpoints(folder, keep=None)
        found.append((saved.latest(), saved.evaluations(saved.latest())))
        saved.close()
    return found


def test_a_run_stops_and_the_best_checkpoint_is_kept_and_reported(whole):
    workdir, evaluations = whole
    *judged, last = evaluations.values
    best = max(range(len(judged)), key=judged.__getitem__)
    assert best == len(judged) - 3, "two evaluations came after the best one"
    records = [max(judged[: end + 1]) for end in range(len(judged))]
    assert all(records[end] > records[end - 2] for end in range(2, len(judged) - 1)), "and it was not to stop earlier"
    (latest, at_latest), (kept, at_kept) = known(workdir)
    assert (latest, kept) == (2 * (len(judged) - 1), 2 * best) and latest < 30
    assert [value for _, value in at_latest] == judged[:-1]  # a checkpoint is saved before it is evaluated
    assert [value for _, value in at_kept] == judged[: best + 1]
    # The report is about the best weights, and they load as a work directory.
    into, options, weights = evaluations.calls[-1]
    assert last == judged[best] and into == workdir
    assert options["notes"] == [
        f"weights: best/, of step {2 * best}, where {METRIC} was best: {last:.4g} (evaluated until step {latest})"
    ]
    params, _ = pretrained.read(workdir / "best")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), weights)


@pytest.mark.parametrize("fail_at", [1, 3])
def test_a_run_killed_before_an_evaluation_stops_where_the_unbroken_one_does(whole, tmp_path, monkeypatch, fail_at):
    workdir, evaluations = whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Evaluations(patch, fail_at)
        train.train(stopping_run(), tmp_path)
    rest = Evaluations(monkeypatch)
    train.train(stopping_run(), tmp_path)
    assert known(tmp_path) == known(workdir)
    assert_same_checkpoint(tmp_path, workdir)
    assert_same_checkpoint(tmp_path / "best", workdir / "best")
    assert rest.values[-1] == evaluations.values[-1]
    # Once more: it has stopped, and only evaluates.
    train.train(stopping_run(), tmp_path)
    assert known(tmp_path) == known(workdir)


def test_a_run_from_the_start_forgets_the_best_of_another(whole, tmp_path, monkeypatch):
    """Killed at its first evaluation, and started again from other weights."""
    Evaluations(monkeypatch)
    best = checkpoint.Checkpoints(tmp_path / "best", keep=1)
    config = stopping_run(seed=1)
    current = train.state.create(
        train.models.create(config["model"]),
        train.optimizer.create(total_steps=30, **config["optimizer"]),
        train.sharding.create_mesh(),
        1,
    )
    best.save(current, [], config, [(0, 2.0)])
    best.close()
    train.train(stopping_run(), tmp_path)
    assert known(tmp_path) == known(whole[0])


def test_processes_stop_at_one_step_and_keep_one_best_checkpoint(tmp_path):
    """Though each finds another value of the metric: that of the first process counts."""
    port, script = str(free_port()), str(pathlib.Path(__file__).with_name("stopping.py"))
    children = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path), port, "2", str(index)],
            env=one_device(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [child.communicate(timeout=180)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(text[-3000:] for text in printed)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    assert first == second
    assert first["judged"] == [0, 2, 4, 6] and first["steps"] == [6, 2]
    values = [[0, 0.1], [2, 0.3], [4, 0.2]]  # a checkpoint is saved before it is evaluated
    np.testing.assert_allclose(first["evaluations"][0], values, rtol=1e-6)
    np.testing.assert_allclose(first["evaluations"][1], values[:2], rtol=1e-6)
    best, _ = pretrained.read(tmp_path / "run" / "best")
    np.testing.assert_allclose(first["sums"], [np.abs(x).sum(dtype=np.float64) for x in jax.tree.leaves(best)])
    assert all("of step 2, where" in text and "(evaluated until step 6)" in text for text in printed)


# ---------------------------------------------------------------------------------------------------------------------
# The config


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    scenes.write(folder / "train", count=48, seed=0, size=SIZE)
    scenes.write(folder / "val", count=12, seed=1, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of a small CLIP, which nothing but their file describes."""
    section = configuration.load("scenes:clip").to_dict()["model"]
    section = configuration.normalize({**section, **{k: v for k, v in MODEL.items() if k != "pooling"}})
    model = train.models.create(section)
    path = tmp_path_factory.mktemp("start") / "clip.safetensors"
    pretrained.Pretrained(section, fresh_params(model, 3)).save(path)
    return path


def tuned(method, start, shards, *arguments):
    """A run of some steps, as the command line gives it."""
    return configuration.read(
        f"finetune:{method}",
        [
            f"--config.init_from={start}",
            f"--config.data.shards={shards / 'train'}",
            f"--config.evaluators.val.shards={shards / 'val'}",
            "--config.evaluators.val.every=2",
            "--config.data.captions.fields=('shortSV_captions',)",
            "--config.batch_size=16",
            "--config.steps=4",
            "--config.epochs=None",
            "--config.optimizer.learning_rate=1e-3",
            "--config.data.packing.row_length=None",
            *arguments,
        ],
    )


def test_other_sizes_a_locked_tower_and_the_report_of_before_and_after(start, shards, tmp_path):
    sizes = "--config.model.vision.image_size=(40, 60)", "--config.model.text.context_length=24"
    all_steps = "--config.early_stopping=None", "--config.optimizer.warmup_steps=0"
    config = tuned("clip+locked_image", start, shards, *sizes, *all_steps)
    after = train.train(config, tmp_path)
    before = json.loads((tmp_path / "before" / "report.json").read_text())
    assert before.keys() == after.keys() and before != after
    details = json.loads((tmp_path / "report_details.json").read_text())
    assert details["before"] == before
    table = [line.split("|") for line in (tmp_path / "report.md").read_text().splitlines() if "retrieval: val" in line]
    assert len(table) == 2
    for _, _, mode, metric, *numbers, _ in table:
        name = f"retrieval/val/{mode.strip()}/{metric.strip()}"
        shown = [float(number) for number in numbers]
        expected = [100 * before[name], 100 * after[name], 100 * (after[name] - before[name])]
        np.testing.assert_allclose(shown, expected, atol=0.051)
    assert "before and after training" in (tmp_path / "report.html").read_text()

    # The model is the one of the weights, in other sizes; before is what its resized weights give.
    step, (params, _), _ = checkpoint_of(tmp_path)
    model = pretrained.load(tmp_path)
    assert (step, model.config["vision"]["image_size"], model.config["text"]["context_length"]) == (4, (40, 60), 24)
    given, _ = pretrained.read(start)
    assert params["vision"]["position_embedding"].shape[0] == 1 + 2 * 3
    np.testing.assert_array_equal(params["text"]["position_embedding"].shape[0], 24)
    assert np.abs(params["image_projection"] - given["image_projection"]).max() > 1e-5
    same = dict(params["vision"]), dict(jax.device_get(given["vision"]))
    for tree in same:
        tree.pop("position_embedding")
    jax.tree.map(np.testing.assert_array_equal, *same)

    # The same command goes on without the file; other sizes are another experiment.
    gone = tuned("clip+locked_image", tmp_path / "gone.safetensors", shards, *sizes, *all_steps)
    assert train.train(gone, tmp_path) == after
    with pytest.raises(ValueError, match=r"config\.model\.text\.context_length is 30, was 24"):
        longer = sizes[0], "--config.model.text.context_length=30"
        train.train(tuned("clip+locked_image", start, shards, *longer, *all_steps), tmp_path)
    assert evaluate.evaluate(gone | dict(init_from=None), tmp_path) == pytest.approx(after, abs=1e-6)


def test_lora_starts_from_the_weights_themselves_and_the_pairs_of_the_best_are_written(start, shards, tmp_path):
    config = tuned("clip+lora", start, shards, "--config.optimizer.learning_rate=0.0")
    after = train.train(config, tmp_path)
    assert after == json.loads((tmp_path / "before" / "report.json").read_text())
    best = checkpoint.Checkpoints(tmp_path / "best", keep=None)
    assert best.latest() == 0  # nothing was better than the start
    best.close()
    merged = pretrained.load(tmp_path / "lora.safetensors", pretrained=start)
    jax.tree.map(np.testing.assert_array_equal, merged.params, jax.device_get(pretrained.read(start)[0]))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("init_from=None", "has no name, and so is the model of the weights: set config.init_from"),
        ("model.gelu=quick", "gelu is 'quick', the file says 'exact'"),
        ("evaluators.val.shards=None", r"'val': it is off: set config\.evaluators\.val\.shards"),
        ("init_partial=True", "set one of config.init_partial and config.init_resized"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(start, shards, tmp_path, argument, words):
    with pytest.raises(ValueError, match=words):
        train.train(tuned("clip", start, shards, f"--config.{argument}"), tmp_path)


@pytest.mark.parametrize("objectives", finetune.OBJECTIVES)
@pytest.mark.parametrize("trained", finetune.TRAINED)
def test_every_fine_tuning_is_a_config(objectives, trained):
    config = configuration.read(f"finetune:{objectives}+{trained}", ["--config.early_stopping.patience=5"])
    assert config["early_stopping"]["patience"] == 5 and (config["lora"] is not None) == (trained == "lora")
    assert configuration.read(f"finetune:{objectives}", ["--config.early_stopping=None"])["early_stopping"] is None
    with pytest.raises(ValueError, match="has no name"):
        configuration.check(config)


def test_there_is_no_other_fine_tuning():
    with pytest.raises(ValueError, match=r"no fine-tuning 'clip\+half'"):
        finetune.get_config("clip+half")
