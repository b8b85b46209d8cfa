"""benchmarks/original_starts.py draws what the original's own constructors drew."""

import hashlib

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from benchmarks import original_starts  # noqa: E402
from flair_jax.configs import scenes  # noqa: E402

# SHA-256 of all tensors of the first of its files, names in alphabetic order; of the token embedding the last two rows.
ORIGINAL = "7bb609b4d9ba7cec2813a9f9a3467e65bdc1869688c39a1b77aba4429b246af4"


def test_the_first_start_is_the_originals_to_the_bit():
    weights = original_starts.draw(0, scenes.get_config().model.to_dict())
    digest = hashlib.sha256()
    for name in sorted(weights):
        rows = slice(-2, None) if name == "token_embedding.weight" else ...
        digest.update(name.encode() + weights[name][rows].numpy().tobytes())
    assert digest.hexdigest() == ORIGINAL


def test_starts_of_both_sides_are_compared(monkeypatch):
    model = scenes.get_config().model
    model.embed_dim = 32
    for tower in (model.vision, model.text):
        tower.update(width=32, depth=1, heads=2)
    model = model.to_dict()
    assert original_starts.compare(3, model)[0][0] > 1e-6
    draw = original_starts.draw

    def narrower(seed, model):
        weights = draw(seed, model)
        weights["image_post.proj"] *= 0.8
        return weights

    monkeypatch.setattr(original_starts, "draw", narrower)
    p, name, statistic = original_starts.compare(3, model)[0]
    assert (name, statistic) == ("image_post.proj", "deviation") and p < 1e-3
