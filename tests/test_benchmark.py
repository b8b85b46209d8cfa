"""The benchmarks at small sizes: what their command line writes."""

import json
import os
import subprocess
import sys

import pytest

from flair_jax import benchmark

SIZES = dict(images=256, captions=4, block_size=64, chunk_size=4)  # nothing is run, so this is as fast as fewer
ARGUMENTS = ["--images", "256", "--captions", "4", "--block-size", "64", "--chunk-size", "4"]


def check_loss(figures, devices):
    settings = dict(**SIZES, devices=devices)
    assert settings.items() <= figures.items()
    assert figures.keys() - settings.keys() == {"temp_bytes_dense", "temp_bytes_chunked", "ratio"}
    assert 0 < figures["temp_bytes_chunked"] < figures["temp_bytes_dense"] / 4
    assert figures["ratio"] == figures["temp_bytes_dense"] / figures["temp_bytes_chunked"]


def test_loss_in_chunks_needs_less_memory(tmp_path, capsys):
    file = tmp_path / "loss.json"
    benchmark.main(["loss", *ARGUMENTS, "--json", str(file)])
    figures = json.loads(file.read_text())
    check_loss(figures, devices=1)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["temp_bytes_dense"] == f"{figures['temp_bytes_dense']:,}"


def test_loss_on_fake_devices(tmp_path):
    """A process of its own: the number of devices is fixed once jax has started."""
    file = tmp_path / "loss.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "flair_jax.benchmark", "loss", *ARGUMENTS, "--devices", "2", "--json", str(file)]
    subprocess.run(command, env=environment, check=True)
    check_loss(json.loads(file.read_text()), devices=2)


@pytest.mark.parametrize(("devices", "message"), [(3, "do not divide"), (1024, "1024 devices are asked for")])
def test_loss_on_devices_that_do_not_fit_is_refused(devices, message, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # puts it back
    with pytest.raises(ValueError, match=message):
        benchmark.loss(**SIZES, devices=devices)


def test_tokenizer(tmp_path):
    captions, file = tmp_path / "captions.txt", tmp_path / "tokenizer.json"
    captions.write_text("a photo of a cat\ntwo dogs\nA café.\n")
    benchmark.main(["tokenizer", "--captions", str(captions), "--json", str(file)])
    figures = json.loads(file.read_text())
    assert figures["captions"] == 3
    assert figures["captions_per_second"] > 0
    with_open_clip = {"open_clip_captions_per_second", "ratio", "different_rows"}
    assert figures.keys() - {"captions", "captions_per_second"} in (set(), with_open_clip)
    assert figures.get("different_rows", 0) == 0
