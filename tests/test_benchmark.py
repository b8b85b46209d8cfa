"""The benchmarks at small sizes: what they find, and what their command line writes."""

import importlib.util
import io
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from optional import torch
from PIL import Image
from processes import one_device

from benchmarks import data, loss, reference_loader
from flair_jax.data import scenes
from flair_jax.data.transforms import images, tokenizer
from flair_jax.data.transforms.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]
SIZES = dict(images=256, captions=4, block_size=64, chunk_size=4)  # nothing is run, so this is as fast as fewer
ARGUMENTS = ["--images", "256", "--captions", "4", "--block-size", "64", "--chunk-size", "4"]


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def check_loss(figures, devices):
    settings = dict(**SIZES, devices=devices)
    assert settings.items() <= figures.items()
    assert figures.keys() - settings.keys() == {"temp_bytes_dense", "temp_bytes_chunked", "ratio"}
    assert 0 < figures["temp_bytes_chunked"] < figures["temp_bytes_dense"] / 4
    assert figures["ratio"] == figures["temp_bytes_dense"] / figures["temp_bytes_chunked"]


def test_loss_in_chunks_needs_less_memory(tmp_path, capsys):
    file = tmp_path / "loss.json"
    loss.main([*ARGUMENTS, "--json", str(file)])
    figures = json.loads(file.read_text())
    check_loss(figures, devices=1)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["temp_bytes_dense"] == f"{figures['temp_bytes_dense']:,}"


def test_loss_on_fake_devices(tmp_path):
    """A process of its own: the number of devices is fixed once jax has started."""
    file = tmp_path / "loss.json"
    command = [sys.executable, "-m", "benchmarks.loss", *ARGUMENTS, "--devices", "2", "--json", str(file)]
    subprocess.run(command, env=one_device(), cwd=ROOT, check=True)
    check_loss(json.loads(file.read_text()), devices=2)


@pytest.mark.parametrize(("devices", "message"), [(3, "do not divide"), (1024, "1024 devices are asked for")])
def test_loss_on_devices_that_do_not_fit_is_refused(devices, message, monkeypatch):
    jax.devices()  # their number is fixed from here on; otherwise jax would start with what `measure` asks for
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # puts it back
    with pytest.raises(ValueError, match=message):
        loss.measure(**SIZES, devices=devices)


@pytest.fixture
def hide(monkeypatch):
    """A function that makes packages look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find_spec(name))

    return hide


# ---------------------------------------------------------------------------------------------------------------------
# The reference's tokenizer

STAND_IN = """
class SimpleTokenizer:
    def __call__(self, texts):
        return [len(text) for text in texts]
"""


def test_open_clips_tokenizer_is_taken_where_it_is_installed(tmp_path, monkeypatch, hide):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package itself must not be imported')")
    (package / "tokenizer.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    name, tokenize = reference_loader.tokenizer()
    assert name == "open_clip" and tokenize(["a", "cat"]) == [1, 3]
    hide("open_clip")
    assert reference_loader.tokenizer()[0] == "flair_jax"


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return scenes.write(tmp_path_factory.mktemp("scenes"), count=24, seed=0, shard_size=12)


def test_data(shards, tmp_path, hide):
    hide("open_clip")
    file = tmp_path / "figures.json"
    sizes = ["--batch-size", "4", "--image-size", "48", "--captions", "3", "--batches", "20", "--turns", "1"]
    command = ["--shards", str(shards[0].parent), "--workers", "1", *sizes, "--json", str(file)]
    data.main(command)
    figures = json.loads(file.read_text())
    assert all(isinstance(value, int | float | str) for value in figures.values())  # flat
    assert figures["shards"] == 2 and figures["captions"] == 3 and figures["workers"] == 1
    assert figures["reference_loader_tokenizer"] == "flair_jax"
    stages = {"": ("decode", "resize"), "fast_": ("decode_and_resize",)}
    for prefix, names in stages.items():
        label = "fast" if prefix else "reference_pixels"
        speed, theirs = figures[f"{prefix}images_per_second"], figures["reference_loader_images_per_second"]
        assert speed > 0 and figures[f"{prefix}captions_per_second"] == 3 * speed
        assert figures[f"ratio_{label}"] == speed / theirs
        assert figures[f"{prefix}memory_mb"] > 50 and figures[f"{prefix}growth_mb"] == 0  # of one turn
        shares = {name: value for name, value in figures.items() if name.startswith(f"{prefix}share_")}
        assert shares.keys() == {
            f"{prefix}share_{name}" for name in ("read", "captions", *names, "tokenise", "pack", "rest")
        }
        assert sum(shares.values()) == pytest.approx(1)
        assert min(value for name, value in shares.items() if name != f"{prefix}share_rest") > 0


def test_data_with_negatives_beside_the_same_without(shards, tmp_path):
    """The kinds of the config, here one that needs no annotations."""
    text = (ROOT / "configs/fsc_clip_laioncoco.py").read_text()
    change = """
    config = fsc_clip_recipe.run_of("laioncoco", run, fields=("raw_caption",))
    config.data.negatives.kinds = ("ngram_shuffle_2",)
    return config
"""
    config = tmp_path / "shuffled.py"
    config.write_text(text.partition("    return fsc_clip_recipe")[0] + change)
    sizes = ["--batch-size", "4", "--image-size", "48", "--batches", "4", "--turns", "1", "--pixels", "fast"]
    file = tmp_path / "figures.json"
    command = ["--shards", str(shards[0].parent), "--workers", "1", *sizes, "--json", str(file)]
    data.main([*command, "--negatives", str(config)])
    figures = json.loads(file.read_text())
    assert figures["kinds"] == "ngram_shuffle_2" and figures["captions"] == 1
    with_them, without = figures["negatives_fast_images_per_second"], figures["fast_images_per_second"]
    assert figures["ratio_fast"] == with_them / without > 0 and figures["negatives_fast_cpu_ms_per_image"] > 0
    with pytest.raises(ValueError, match=r"kinds of flair_cc3m is empty"):
        data.main([*command, "--negatives", "flair_cc3m"])


def test_a_loader_that_ends_is_no_figure(shards):
    settings = data.Settings([*shards, "/nowhere.tar"], workers=1, batch_size=4)
    with pytest.raises(RuntimeError, match="a side's process ended with exit code 1"):
        data.measure(settings, pixels=["reference"], reference=False)


def test_the_reference_loader(shards):
    """What the DataLoader gives: all samples before any comes twice, normalised pixels and whole captions."""
    options = dict(batch_size=8, image_size=48, captions=3, workers=0, tokenize=Tokenizer())
    batches = reference_loader.batches([str(path) for path in shards], **options)
    pixels, tokens = next(batches)
    assert pixels.shape == (8, 3, 48, 48) and pixels.dtype == torch.float32
    assert tokens.shape == (8, 3, 77) and (tokens == tokenizer.EOT).sum() == 24
    assert -2 < pixels.mean() < 2 and pixels.std() > 0.1
    ids = {tuple(row) for _ in range(20) for row in next(batches)[1][:, 0].tolist()}
    assert len(ids) > 24  # captions are drawn anew


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_the_reference_loader_has_the_pixels_of_ours(mode, monkeypatch):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    file = io.BytesIO()
    small.resize((97, 61)).convert(mode).save(file, "PNG")
    image = Image.open(file).convert("RGB")  # as webdataset hands it over
    left, top, right, bottom = images.random_box(*image.size, random.Random(5), (0.2, 0.6), (3 / 4, 4 / 3))
    box = (left, top, right - left, bottom - top)
    monkeypatch.setattr(reference_loader, "_random_box", lambda width, height: box)
    ours = images.random_resized_crop(image, 48, random.Random(5), images.AugmentationOptions((0.2, 0.6)))
    theirs = reference_loader.transform(48)(image).permute(1, 2, 0)
    np.testing.assert_array_equal(theirs, images.Preprocessing()(ours))


def test_the_reference_loaders_boxes_are_in_the_picture_and_of_the_right_size():
    torch.manual_seed(0)
    for width, height in ((256, 256), (300, 256), (256, 300)):
        boxes = np.array([reference_loader._random_box(width, height) for _ in range(300)])
        left, top, part_width, part_height = boxes.T
        assert min(left.min(), top.min()) == 0
        assert (left + part_width <= width).all() and (top + part_height <= height).all()
        area = part_width * part_height / (width * height)
        assert 0.89 < area.min() < 0.91 and area.max() > 0.97
    assert reference_loader._random_box(1000, 10) == (493, 0, 13, 10)  # no draw fits: the widest allowed, in the centre
    assert reference_loader._random_box(10, 1000) == (0, 493, 10, 13)


def test_the_reference_loader_says_what_it_needs(hide):
    hide("webdataset")
    settings = data.Settings(["/nowhere.tar"], workers=1)
    with pytest.raises(ModuleNotFoundError, match=r"webdataset: pip install 'flair_jax\[bench\]'.*--no-reference"):
        data.measure(settings)


def test_data_needs_workers():
    with pytest.raises(SystemExit, match="at least 1"):
        data.main(["--shards", "x", "--workers", "0"])
