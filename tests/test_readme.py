"""The README's commands and its Python, word for word, where they need no download; others are listed with a reason."""

import ast
import csv
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from processes import one_device

import flair_jax
from flair_jax import pretrained
from flair_jax.data import scenes

ROOT = pathlib.Path(__file__).parents[1]
NEEDS = {
    "make demo": "minutes; its command is the one that test_train.py runs with fewer steps",
    "make test": "this suite",
    "laioncoco": "a download of LAION-COCO",
    "laion": "a download of LAION-COCO",
    "ViT-B-32.pt": "OpenAI's weights",
    "runs/fsc": "the run on LAION-COCO",
    "flair-cc3m-recap": "the released weights",
    "flair-cc3m-recap.pt": "the released weights",
    "flair.safetensors": "the released weights",
    "hits.png": "an index by the released weights",
    "--config.data_root=DIR": "public evaluation sets",
}


def commands() -> list[list[str]]:
    """Words of every command in the README's indented blocks."""
    lines = re.sub(r" \\\n +", " ", (ROOT / "README.md").read_text()).splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(" {4}(python|make|pip) ", line)]
    assert len(found) > 10
    return found


def needs(words: list[str]) -> str | None:
    """Why a command cannot run here; None: it can."""
    text = " ".join(words)
    hits = [reason for what, reason in NEEDS.items() if what in words or what == text or f"init_from={what}" in text]
    return hits[0] if hits else None


def test_which_commands_run_here():
    """A new command is run by the test below, or gets a reason above."""
    assert [" ".join(words[1:4]) for words in commands() if not needs(words)] == [
        "-m flair_jax.data.prepare folder",
        "-m flair_jax.data.prepare folder",
        "-m flair_jax.main --config",
        "-m flair_jax.main --config",
        "-m flair_jax.push runs/tuned",
        "-m flair_jax.data.benchmarks",
        "-m flair_jax.data.benchmarks --root",
    ]
    used = {what for what in NEEDS for words in commands() if what in words or what in " ".join(words)}
    assert used == set(NEEDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README takes for given: a folder of pictures, captions of some and of others, and a folder of sets."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "photos").mkdir()
    (folder / "DIR").mkdir()
    unseen = scenes.evaluation_set(80, 0, 64)
    for name, numbers in (("captions.csv", range(64)), ("val.csv", range(64, 80))):
        with (folder / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "caption"])
            for number in numbers:
                Image.fromarray(unseen.images[number]).save(folder / "photos" / f"{number}.png")
                rows.writerow([f"{number}.png", unseen.descriptions[number]])
    return folder


def run(words, folder):
    """Runs a command; of a training the first steps, as a user with Ctrl-C does. Returns what it printed."""
    command = [sys.executable, *words[1:]]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=one_device(PYTHONPATH=str(ROOT)), stdout=file, stderr=subprocess.STDOUT
        )
        if "flair_jax.main" in words:
            deadline = time.time() + 240
            while process.poll() is None and "memory of a step" not in log.read_text():
                assert time.time() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        status = process.wait(timeout=240)
    expected = 128 + signal.SIGINT if "flair_jax.main" in words else 0
    assert status == expected, f"{shlex.join(words)}\n{log.read_text()[-3000:]}"
    return log.read_text()


@pytest.fixture(scope="module")
def printed(folder):
    """What the commands print, one after the other; they leave models in the folder."""
    return [run(words, folder) for words in commands() if not needs(words)]


def test_the_commands_run_word_for_word(folder, printed):
    assert "64" in printed[0] and "16" in printed[1]
    assert "SugarCrepe" in printed[-2] and len(printed[-1]) > 1000
    for name in ("runs/mine", "runs/tuned", "my-model"):
        assert pretrained.read(folder / name)[1]["name"] == "flair"
    assert "python -m flair_jax.main --config finetune:flair" in (folder / "my-model" / "README.md").read_text()


def test_the_python_block_runs_word_for_word(folder, printed, monkeypatch):
    """With the run that the commands trained in place of the released weights."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, name in enumerate(("fox.jpg", "dog.jpg")):
        Image.open(folder / "photos" / f"{number}.png").resize((80, 60)).save(pictures / name)
    monkeypatch.chdir(pictures)
    asked = []

    def load(name):
        asked.append(name)
        return pretrained.load(folder / "runs" / "mine")

    monkeypatch.setattr(flair_jax, "load", load)
    names, values = {}, {}
    for statement in ast.parse(block).body:
        code = ast.unparse(statement)
        if isinstance(statement, ast.Expr):
            values[statement.value.func.attr] = eval(code, names)
        else:
            exec(code, names)
    assert asked == ["flair-cc3m-recap"]
    assert list(values) == ["score", "search", "classify", "segment", "heat_maps"]
    assert values["score"].shape == (2, 2) and np.ptp(values["score"]) > 0
    assert [[hit.image in (0, 1) for hit in hits] for hits in values["search"]] == [[True]]
    np.testing.assert_allclose(values["classify"].sum(axis=1), [1], atol=1e-5)
    assert values["classify"].shape == (1, 2) and values["segment"].shape == (60, 80)
    heat = values["heat_maps"]
    assert heat.maps.shape[:2] == (1, 1)
    np.testing.assert_allclose(heat.maps.sum((2, 3)) + heat.zero_mass, 1, atol=1e-5)
