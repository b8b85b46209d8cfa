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
