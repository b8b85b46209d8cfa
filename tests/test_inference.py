"""Models with pictures and texts: what the docstrings show, and that every method agrees with the arrays' methods."""

import doctest

import numpy as np
import PIL.Image
import pytest
from conftest import fresh_params

import flair_jax
from flair_jax import models
from flair_jax.config import normalize
from flair_jax.configs import scenes
from flair_jax.convert import flax_files
from flair_jax.pretrained import Pretrained

METHODS = [name for name, found in vars(Pretrained).items() if callable(found) and not name.startswith("_")]
TEXTS = ["a large red circle, at the top left", "a blue square", "a green cross"]


def section_of(kind: str, resize: str = "crop") -> dict:
    """A small model of a kind of `scenes`, for images of 64 pixels, 4 x 4 patches."""
    config = scenes.get_config(kind)
    config.model.vision.update(depth=1, image_size=64, patch_size=16)
    config.model.text.update(depth=1, context_length=77)
    config.model.preprocess.resize = resize
    if config.model.decoder is not None:
        config.model.decoder.update(depth=1, regions=3)
    return normalize(config.model.to_dict())


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the docstrings name: weights and photographs."""
    path = tmp_path_factory.mktemp("files")
    for kind in ("flair", "grain", "clip"):
        section = section_of(kind)
        flax_files.write(path / f"{kind}.safetensors", fresh_params(models.create(section)), section)
    picture(80, 60).save(path / "fox.jpg")
    picture(50, 70, seed=1).save(path / "dog.jpg")
    return path


@pytest.fixture(scope="module")
def flair(folder):
    return flair_jax.load(folder / "flair.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_examples_of_the_docstrings(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    method = getattr(Pretrained, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(
        method, name, module=False, globs={"flair_jax": flair_jax, "PIL": PIL}
    )
    assert len(example.examples) > 1
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
