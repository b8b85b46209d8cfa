"""The benchmarks of the model at small sizes: what they count, and that both sides get the same work."""

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from processes import QUICK

from benchmarks import encode, inputs, processes, sides, train
from flair_jax.data import scenes
from flair_jax.data.transforms import packing, tokenizer

SMALL = """
from flair_jax.configs import scenes
def get_config():
    config = scenes.get_config()
    del config.data.scenes
    config.batch_size = 4
    config.model.update(embed_dim=32, pooling=dict(heads=2))
    config.model.vision.update(image_size=32, width=32, depth=1, heads=2)
    config.model.text.update(width=16, depth=1, heads=2)
    config.data.packing.row_length = 40
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def alone(monkeypatch):
    """The sides of a comparison start with one device each, as a user's do."""
    monkeypatch.setenv("XLA_FLAGS", QUICK)


@pytest.fixture
def quick_start(alone, monkeypatch):
    """Sides are forks of one process that has imported what they need, where most of their time would be imports."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["benchmarks.train", "benchmarks.encode", "flair_jax.train", "torch._dynamo"])
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[1]))
    monkeypatch.setattr(sides, "multiprocessing", SimpleNamespace(get_context=lambda method: forks))
    monkeypatch.setattr(processes, "default_backend", lambda: "cpu")


def figures_of(main, tmp_path, *arguments, **options):
    file = tmp_path / "figures.json"
    main([*arguments, "--json", str(file)], **options)
    return json.loads(file.read_text())


def test_training_beside_the_twin(config_file, tmp_path, alone):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    shards = tmp_path / "shards"
    scenes.write(shards, count=24, seed=0, size=48)
    arguments = ["--config", config_file, "--shards", str(shards), "--steps", "2", "--turns", "2"]
    figures = figures_of(train.main, tmp_path, *arguments, "--beside", "eager", "--trace", str(tmp_path / "trace"))
    assert figures["ratio_eager"] == pytest.approx(figures["images_per_second"] / figures["eager_images_per_second"])
    assert figures["images_per_second"] == pytest.approx(4 / figures["step_seconds"])
    assert 0 <= figures["data_wait_seconds"] + figures["logging_seconds"] <= figures["step_seconds"]
    assert 0 < figures["fill"] <= 1 and figures["memory_mb"] > 0 and figures["compile_seconds"] > 0
    assert "mfu" not in figures  # a CPU has no peak
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_encoding_and_scoring_beside_the_twin(config_file, tmp_path, quick_start):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    sizes = ["--images", "4", "--image-batch", "2", "--texts", "10", "--text-batch", "4"]
    arguments = ["--config", config_file, *sizes, "--turns", "1"]
    for name, kinds in (("encode", ("images", "texts")), ("score", ("pairs", "original"))):
        figures = figures_of(encode.main, tmp_path, *arguments, "--beside", "eager", name=name)
        for kind in kinds:
            ratio = figures[f"{kind}_per_second"] / figures[f"eager_{kind}_per_second"]
            assert figures[f"ratio_{kind}_eager"] == pytest.approx(ratio)


def test_a_sweep_is_a_table_and_finds_the_best(config_file, tmp_path, quick_start, capsys):
    vary = ["--vary", "batch_size=2,4", "model.remat=none,half"]
    figures = figures_of(train.main, tmp_path, "--config", config_file, "--steps", "1", "--turns", "1", *vary)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 6 and "batch_size" in table[0]
    assert sum("half" in row and row.rstrip(" |").endswith("half") for row in table) == 2  # failed, and left empty
    assert "none" in figures["settings_of_best_images_per_second"]


def test_settings_on_the_command_line_are_those_of_the_config(config_file):
    with pytest.raises(ValueError, match="batch_sice"):
        train.main(["--config", config_file, "--set", "batch_sice=4"])


def test_the_twin_is_no_rival_of_another_model():
    with pytest.raises(ValueError, match=r"the PyTorch twin is FLAIR, .* \['softmax'\]"):
        train.main(["--config", "clip", "--beside", "eager"])


@pytest.mark.parametrize("row_length", [None, 40])
@pytest.mark.parametrize("slots", [{"captions": 3}, {"captions": 1, "descriptions": 2}])
def test_made_up_batches_come_back_as_they_were_packed(slots, row_length):
    text = {"context_length": 28, "vocab_size": tokenizer.VOCAB_SIZE}
    batches = inputs.made_up(16, (32, 32), slots, text, row_length, parts=2, batches=2)
    plain = inputs.made_up(16, (32, 32), slots, text, None, batches=2)
    assert len({str(jax.tree.map(np.shape, batch)) for batch in batches}) == 1
    for batch, other in zip(batches, plain, strict=True):
        assert batch["images"].shape == (16, 32, 32, 3)
        assert {array.dtype for array in batch["texts"].values()} == {np.dtype("int32")}
        tokens = inputs.unpacked(batch["texts"], 28)
        np.testing.assert_array_equal(packing.text_lengths(batch["texts"]), packing.lengths(tokens))
        np.testing.assert_array_equal(tokens, other["texts"]["tokens"])
        assert ("regions/boxes" in batch) == ("descriptions" in slots) == ("valid" in batch)
    with pytest.raises(ValueError, match="batch_size 16 must be a multiple of the 3 devices"):
        inputs.made_up(16, (32, 32), slots, text, row_length, parts=3)


def test_captions_are_as_long_as_real_ones_and_end_as_clips():
    tokens = inputs.captions(np.random.default_rng(0), 20_000, 77, tokenizer.VOCAB_SIZE)
    lengths = packing.lengths(tokens)
    assert lengths.mean() == pytest.approx(inputs.MEAN_TOKENS, rel=0.02)
    assert lengths.min() >= 4 and lengths.max() <= 77
    assert (tokens[:, 0] == tokenizer.SOT).all() and (tokens.max(axis=1) == tokenizer.EOT).all()


@pytest.mark.parametrize("death, words", [("exits", "exit code 3$"), ("is killed", "exit code -9, .* memory")])
def test_a_side_that_dies_says_so(death, words, alone):
    with sides.Side(_dying, death) as side, pytest.raises(RuntimeError, match=words):
        side.turn(1)


@pytest.mark.parametrize(
    "backend, lives", [("cpu", "+a +b a a b b a a b b -b -a"), ("gpu", "+a a a a a -a +b b b b b -b")]
)
def test_an_accelerator_belongs_to_one_side_at_a_time(backend, lives, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def side(name):
        seen.append(f"+{name}")
        yield SimpleNamespace(turn=lambda count: seen.append(name) or count)
        seen.append(f"-{name}")

    monkeypatch.setattr(sides.processes, "default_backend", lambda: backend)
    results = sides.compare({name: functools.partial(side, name) for name in "ab"}, 3, 2)
    assert " ".join(seen) == lives
    assert results == {"a": [3, 3], "b": [3, 3]}


def test_where_jax_computes_is_asked_without_taking_it(alone):
    assert processes.default_backend() == "cpu"


def _dying(death):
    if death == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(3)
