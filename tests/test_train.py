"""The loop: resume bit for bit after a real kill, signals, faults, many devices, and the commands of the README."""

import json
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import take_devices
from PIL import Image
from processes import one_device
from tiny_run import ROOT, assert_same_checkpoint, checkpoint_of, command, tiny

from flair_jax import checkpoint, evaluate, metrics, pretrained, train
from flair_jax.configs import base
from flair_jax.data import scenes
from flair_jax.lock import WorkdirInUse, WorkdirLock

pytestmark = pytest.mark.usefixtures("shared_programs")


def start(workdir, log):
    return subprocess.Popen(command(workdir), stdout=log, stderr=log, cwd=ROOT, env=one_device())


def interrupt(workdir, steps, number, log):
    """Starts the run, sends the signal once it has reported some steps of its own, and returns the exit status."""
    known = [line["step"] for line in metrics.read_json_lines(workdir)]
    behind = max(known, default=0) + steps
    process = start(workdir, log)
    deadline = time.time() + 240
    while not any(line["step"] >= behind for line in metrics.read_json_lines(workdir)):
        assert process.poll() is None and time.time() < deadline, pathlib.Path(log.name).read_text()[-3000:]
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait(timeout=120)


def test_a_run_killed_and_resumed_equals_an_unbroken_one_bit_for_bit(tmp_path):
    """2N steps = N steps, kill -9, resume, SIGTERM, resume; with data workers, through the real command."""
    with (tmp_path / "log").open("w") as log:
        assert start(tmp_path / "whole", log).wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
        broken = tmp_path / "broken"
        assert interrupt(broken, 10, signal.SIGKILL, log) == -signal.SIGKILL
        after_kill = checkpoint_of(broken)[0]
        assert 0 < after_kill < 30
        assert interrupt(broken, 3, signal.SIGTERM, log) == 128 + signal.SIGTERM
        assert after_kill < checkpoint_of(broken)[0] < 30
        assert start(broken, log).wait(timeout=300) == 0
    assert_same_checkpoint(tmp_path / "whole", broken)
    losses = {name: metrics.read_json_lines(tmp_path / name) for name in ("whole", "broken")}
    whole, resumed = ([(line["step"], line["loss"]) for line in lines] for lines in losses.values())
    assert [step for step, _ in whole] == list(range(1, 31))
    assert whole == resumed
    report = json.loads((broken / "report.json").read_text())
    assert report == json.loads((tmp_path / "whole" / "report.json").read_text())
    assert {
        "retrieval/scenes/flair/text_to_image_R@1",
        "retrieval/scenes_parts/global/text_to_image_R@1",
        "retrieval/scenes_parts/chance/text_to_image_R@1",
        "pointing/scenes/attention/accuracy",
        "pointing/scenes/chance",
        "segmentation/scenes_colour/value/miou",
        "segmentation/scenes_shape/chance",
    } <= report.keys()
    for name in ("report.md", "pictures/loss.png", "pictures/attention_scenes.png"):
        assert (broken / name).stat().st_size > 100
    assert list(broken.glob("events.out.tfevents.*"))
    assert "checkpoints/30" in str(sorted((broken / "checkpoints").iterdir()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, shared_programs):
    """The losses of a run on eight devices."""
    return losses_of(tiny(), tmp_path_factory.mktemp("plain"))


def losses_of(config, workdir):
    """The losses of a run, a step each. Nothing is saved but the end."""
    train.train({**config, "save_every": 1000}, workdir)
    losses = [line["loss"] for line in metrics.read_json_lines(workdir)]
    assert len(losses) == 6
    return losses


def test_devices_and_sharding_do_not_change_a_run(plain, tmp_path, monkeypatch):
    """One device, eight, and eight with the parameters split four ways."""
    create_mesh = train.sharding.create_mesh
    fsdp = losses_of(tiny(mesh__data=2, mesh__fsdp=4), tmp_path / "fsdp")
    monkeypatch.setattr(train.sharding, "create_mesh", lambda data, fsdp: create_mesh(1, 1, jax.devices()[:1]))
    one = losses_of(tiny(), tmp_path / "one")
    np.testing.assert_allclose(plain, one, rtol=2e-5)
    np.testing.assert_allclose(fsdp, one, rtol=2e-5)


def test_packed_captions_and_crops_on_the_device_do_not_change_a_run(plain, tmp_path):
    """Rows of several captions, of several numbers, on eight devices; pixels to within a grey level."""
    packed = losses_of(tiny(data__packing__row_length=20, data__packing__quantile=0.01), tmp_path / "packed")
    assert metrics.read_json_lines(tmp_path / "packed")[-1]["truncated"] == 0
    np.testing.assert_allclose(packed, plain, rtol=2e-5)
    np.testing.assert_allclose(losses_of(tiny(data__pixels="device"), tmp_path / "device"), plain, rtol=1e-3)


def test_micro_batches_do_not_change_a_run(plain, tmp_path):
    """On eight devices with two images each; the packed rows of a device are made even."""
    parts = losses_of(tiny(model__micro_batches=2, data__packing__row_length=20), tmp_path)
    np.testing.assert_allclose(parts, plain, rtol=2e-5)


def test_a_large_parameter_is_split_over_fsdp():
    mesh = train.sharding.create_mesh(data=2, fsdp=4)
    shardings = train.sharding.state_sharding(
        mesh,
        {"embedding": jax.ShapeDtypeStruct((4096, 64), np.float32), "bias": jax.ShapeDtypeStruct((64,), np.float32)},
    )
    assert shardings["embedding"].shard_shape((4096, 64)) == (1024, 64)
    assert shardings["bias"].shard_shape((64,)) == (64,)
    with pytest.raises(ValueError, match="fsdp=3"):
        train.sharding.create_mesh(data=2, fsdp=3)


@pytest.mark.usefixtures("on_one_device")
def test_what_a_run_tells(tmp_path, capsys):
    """Memory before the first step, all numbers in the log, a trace of the steps asked for, a summary at the end."""
    train.train(tiny(profile_steps=(2, 3), data__packing__row_length=16), tmp_path)
    printed = capsys.readouterr().out
    assert printed.index("memory of a step") < printed.index("this run:")
    told = dict(line.split() for line in printed.partition("this run:")[2].splitlines()[1:] if len(line.split()) == 2)
    assert float(told["step_seconds"]) == pytest.approx(float(told["seconds"]) / float(told["steps"]), rel=1e-2)
    lines = metrics.read_json_lines(tmp_path)
    assert lines[-1].keys() >= {
        "loss", "text_conditioned", "sigmoid", "grad_norm", "param_norm",
        "text_conditioned/positive_logit", "text_conditioned/negative_logit",
        "logit_scale", "logit_bias", "images_per_second", "step_seconds",
        "data_wait_share", "saving_share", "tflop_per_second", "packing_efficiency", "skipped",
        "truncated", "masked", "learning_rate", "epoch",
    }  # fmt: skip
    assert all(0 < line["packing_efficiency"] <= 1 and line["data_wait_share"] <= 1 for line in lines)
    # Before training both means are near the bias.
    assert lines[0]["text_conditioned/positive_logit"] == pytest.approx(
        lines[0]["text_conditioned/negative_logit"], abs=1.5
    )
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.usefixtures("on_one_device")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    train.train(tiny(steps=2), tmp_path)
    good = checkpoint_of(tmp_path)
    restore = checkpoint.Checkpoints.restore

    def restore_broken(self, step, like):  # as a fault of the machine might
        state = restore(self, step, like)
        return state.replace(params={**state.params, "logit_bias": state.params["logit_bias"] * np.nan})

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", restore_broken)
    with pytest.raises(FloatingPointError, match=r"step 3: .*loss.* not finite.*Checkpoint 2 is from before"):
        train.train(tiny(steps=6), tmp_path)
    step, arrays, _ = checkpoint_of(tmp_path)
    assert step == good[0] == 2
    jax.tree.map(np.testing.assert_array_equal, arrays, good[1])


@pytest.mark.usefixtures("on_one_device")
def test_start_from_other_weights_and_use_what_was_trained(tmp_path):
    """A run's weights start another run, load as an object, and evaluate alone, with the same numbers."""
    config = tiny(evaluate=True, steps=4)
    report = train.train(config, tmp_path / "first")
    again = evaluate.evaluate(config, tmp_path / "first")
    assert again == pytest.approx(report, abs=1e-6)
    assert evaluate.evaluate({**config, "init_from": str(tmp_path / "first")}, tmp_path / "elsewhere") == again
    assert (tmp_path / "elsewhere" / "report.md").read_text() == (tmp_path / "first" / "report.md").read_text()

    loaded = pretrained.load(tmp_path / "first")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), checkpoint_of(tmp_path / "first")[1][0])

    # With a learning rate of zero the second run keeps the first one's parameters.
    train.train(tiny(steps=1, init_from=str(tmp_path / "first"), optimizer__learning_rate=0.0), tmp_path / "second")
    first, second = (checkpoint_of(tmp_path / name)[1][0] for name in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.usefixtures("on_one_device")
def test_a_model_of_images_that_are_not_square(tmp_path):
    """Trained, continued, and loaded from its workdir, whose JSON has a list where the config had a tuple."""
    for steps in (1, 2):
        config = tiny(steps=steps)
        config["model"]["vision"]["image_size"] = (40, 60)
        train.train(config, tmp_path)
    model = pretrained.load(tmp_path)
    images = model.preprocess([Image.new("RGB", (90, 70), "red")])
    assert images.shape == (1, 40, 60, 3)
    assert model.encode_image(images).local.shape == (1, 6, 32)
    model.save(tmp_path / "a.safetensors")
    again = pretrained.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.encode_image(images).local, model.encode_image(images).local)
    texts = model.tokenize(["a red circle", "a green cross"])
    assert again.get_logits(images, texts).shape == (1, 2)


def test_evaluating_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoints"):
        evaluate.evaluate(tiny(evaluate=True), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (dict(epochs=2.0), ValueError, "one of config.steps and config.epochs"),
        (dict(model__text__vocab_size=512), ValueError, "vocab_size is 512"),
        (dict(objectives__text_conditioned__block_size=5), ValueError, "block_size 5"),
        (dict(mesh__fsdp=3), ValueError, "fsdp=3"),
        (dict(model__remat="half"), ValueError, "half"),
        (dict(profile_steps=(3, 2)), ValueError, "profile_steps"),
        (dict(model__micro_batches=0), ValueError, "micro_batches is 0"),
        (dict(model__micro_batches=3), ValueError, "16 rows on 8 devices .*micro_batches 3"),
        (dict(model__vision__patch_dropout=1.0), ValueError, "patch_dropout is 1.0"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, overrides, error, words):
    with pytest.raises(error, match=words):
        train.train(tiny(**overrides), tmp_path)


def test_unknown_keys_of_a_config_file_are_refused_by_name(tmp_path):
    config = tiny(evaluate=True)
    with pytest.raises(ValueError, match="leerning_rate"):
        train.train({**config, "leerning_rate": 1.0}, tmp_path)
    with pytest.raises(TypeError, match="leerning_rate"):
        train.train({**config, "optimizer": {**config["optimizer"], "leerning_rate": 1.0}}, tmp_path)
    with pytest.raises(TypeError, match="depht"):
        vision = {**config["model"]["vision"], "depht": 3}
        train.train({**config, "model": {**config["model"], "vision": vision}}, tmp_path)
    with pytest.raises(ValueError, match=r"evaluators\.scenes\.kind is 'squares'"):
        evaluators = {"scenes": {**config["evaluators"]["scenes"], "kind": "squares"}}
        train.train({**config, "evaluators": evaluators}, tmp_path)
    with pytest.raises(ValueError, match=r"config\.data\.shards is empty"):
        train.train({**base.get_config().to_dict(), "steps": 1}, tmp_path / "empty")


@pytest.mark.usefixtures("on_one_device")
def test_another_experiment_in_the_same_workdir_is_refused(tmp_path):
    """Every key that differs is named with both values; nothing is trained."""
    train.train(tiny(steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"config\.optimizer\.weight_decay is 0\.9, was 0\.1"):
        train.train(tiny(steps=4, optimizer__weight_decay=0.9), tmp_path)
    changes = dict(seed=3, data__captions__count=2, data__pixels="fast", data__augmentation__scale=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"trained with another config") as raised:
        train.train(tiny(steps=4, model__vision__patch_dropout=0.5, ema_decay=0.9, **changes), tmp_path)
    for words in (
        "config.seed is 3, was 0",
        "config.data.captions.count is 2, was 4",
        "config.data.pixels is 'fast', was 'reference'",
        "config.data.augmentation.scale is (0.5, 1.0), was (0.9, 1.0)",
        "config.model.vision.patch_dropout is 0.5, was 0.0",
        "config.ema_decay is 0.9, was None",
    ):
        assert words in str(raised.value)
    assert checkpoint_of(tmp_path)[0] == 2


def test_what_a_run_may_change(tmp_path, caplog, monkeypatch):
    """Length, step size, clipping, cadence and what is measured; a schedule that moves is said with both values."""
    take_devices(monkeypatch, 2)
    config = tiny(steps=2)
    train.train(config, tmp_path)
    train.train(tiny(steps=2, log_every=2), tmp_path)
    assert "learning rate" not in caplog.text
    later = dict(optimizer__clip_norm=1.0, save_every=3, keep=1, eval_every=3, data__workers=0, mesh__fsdp=2)
    train.train(tiny(evaluate=True, steps=4, optimizer__learning_rate=5e-4, **later), tmp_path)
    assert {line["step"] for line in metrics.read_json_lines(tmp_path)} == {1, 2, 3, 4}
    # Warm-up takes 50 steps: at step 2 the rate is 3 / 50 of the highest.
    assert "the learning rate at step 2 is 3e-05, was to be 6e-05 by the config of the checkpoint" in caplog.text
    assert "steps 4, were 2; optimizer.learning_rate 0.0005, was 0.001" in caplog.text


@pytest.mark.usefixtures("on_one_device")
def test_a_finished_run_that_is_made_longer_says_what_happens_to_the_rate(tmp_path, caplog):
    train.train(tiny(steps=2, optimizer__warmup_steps=0), tmp_path)
    train.train(tiny(steps=4, optimizer__warmup_steps=0), tmp_path)
    assert "the learning rate at step 2 is 0.0005, was to be 0 by" in caplog.text
    assert metrics.read_json_lines(tmp_path)[-2]["learning_rate"] == pytest.approx(5e-4)


@pytest.mark.usefixtures("on_one_device")
def test_other_data_under_another_name_is_refused_and_the_same_data_is_not(tmp_path):
    config = tiny()
    scenes.write(tmp_path / "one", **config["data"]["scenes"])
    scenes.write(tmp_path / "other", **{**config["data"]["scenes"], "seed": 5})
    shutil.copytree(tmp_path / "one", tmp_path / "moved")

    def on(folder, **changes):
        config = tiny(steps=2, **changes)
        del config["data"]["scenes"]
        config["data"]["shards"] = str(tmp_path / folder)
        return config

    train.train(on("one"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"config\.data\.shards is '.*other', was '.*one'"):
        train.train(on("other"), tmp_path / "run")
    train.train({**on("moved"), "steps": 3}, tmp_path / "run")
    assert checkpoint_of(tmp_path / "run")[0] == 3


@pytest.mark.usefixtures("on_one_device")
def test_after_a_loss_that_is_not_finite_the_advice_is_taken(tmp_path):
    """A learning rate that no run survives; the same workdir goes on with a lower one and with clipping."""
    train.train(tiny(steps=2, optimizer__warmup_steps=0), tmp_path)
    broken = tiny(steps=40, optimizer__warmup_steps=0, optimizer__learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"lower optimizer\.learning_rate or set optimizer\.clip_norm"):
        train.train(broken, tmp_path)
    step = checkpoint_of(tmp_path)[0]
    assert step < 40
    mended = tiny(steps=step + 2, optimizer__warmup_steps=0, optimizer__learning_rate=1e-4, optimizer__clip_norm=1.0)
    train.train(mended, tmp_path)
    lines = metrics.read_json_lines(tmp_path)
    assert lines[-1]["step"] == step + 2 and np.isfinite(lines[-1]["loss"])


@pytest.mark.usefixtures("on_one_device")
def test_a_second_run_in_a_workdir_is_refused(tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(WorkdirInUse, match="trains there since"):
        train.train(tiny(steps=1), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    train.train(tiny(steps=1), tmp_path)
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.usefixtures("on_one_device")
def test_a_run_goes_on_computed_otherwise(tmp_path):
    train.train(tiny(steps=2, optimizer__learning_rate=0.0), tmp_path)
    otherwise = dict(
        model__micro_batches=2, model__scan_blocks=True, model__remat="full", objectives__text_conditioned__chunk_size=1
    )
    train.train(tiny(steps=3, optimizer__learning_rate=0.0, **otherwise), tmp_path)
    assert [line["step"] for line in metrics.read_json_lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--config.modle.embed_dim=3", "modle"), ("--config.batch_size=many", "batch_size"), ("--config=no.py", "no.py")],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, argument, words):
    done = subprocess.run(command(tmp_path, argument), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert words in done.stderr
