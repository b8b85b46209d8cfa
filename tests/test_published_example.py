"""`convert check --image`: the logits of FLAIR's model card, whose weights and image are not here: both are played."""

import json

import numpy as np
import pytest
from conftest import TINY, load_golden
from PIL import Image
from safetensors.numpy import save_file

from flair_jax import pretrained, published_example
from flair_jax.convert.__main__ import main


class Model:
    """A `Pretrained` with the published logits, one of them off by `error`."""

    def __init__(self, error):
        self.error = error

    def preprocess(self, image):
        assert image.size == (30, 20)
        return np.zeros((1, 8, 8, 3), np.float32)

    def tokenize(self, texts):
        assert len(texts) == 4 and "puppy" in texts[0]
        return np.zeros((4, 7), np.int32)

    def get_logits(self, images, tokens):
        return np.array([[4.4062, 6.9531 + self.error, -20.5, -18.1719]], np.float32)

    def get_logits_as_clip(self, images, tokens):
        return np.array([[12.4609, 15.6797, -3.8535, -0.2281]], np.float32)


@pytest.fixture
def image(tmp_path):
    """A picture of another content with as many bytes as the card's."""
    path = tmp_path / "puppy.jpg"
    Image.new("RGB", (30, 20), "white").save(path)
    path.write_bytes(path.read_bytes().ljust(published_example.IMAGE_BYTES, b"\0"))
    return path


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(load_golden("tiny.safetensors"), path)
    section = tmp_path / "section.json"
    section.write_text(json.dumps(TINY))
    return [str(path), "--model-config", str(section)]


@pytest.mark.parametrize(("error", "status"), [(0.2, 0), (-0.3, 1)])
def test_the_command(weights, image, monkeypatch, capsys, error, status):
    monkeypatch.setattr(pretrained, "load", lambda path: Model(error))
    assert main(["check", *weights, "--image", str(image)]) == status
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("get_logits")]
    assert len(lines) == 8
    assert lines[1].split()[:4] == ["get_logits", f"{6.9531 + error:.4f}", "6.9531", f"{error:+.4f}"]
    assert [line for line in lines if "WRONG" in line] == lines[1:2] * status
    assert ("do not agree" in printed) == bool(status)


def test_another_image_is_refused(weights, image, capsys):
    image.write_bytes(image.read_bytes()[:-1])
    assert main(["check", *weights, "--image", str(image)]) == 1
    assert "puppy.jpg has 35,796 bytes; the card's image, puppy.jpg, has 35,797" in capsys.readouterr().err
