"""Captions per second of the tokenizer, beside open_clip's Python tokenizer where open_clip is installed."""

import importlib.util
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np


def measure(captions: Sequence[str], batch_size: int = 8, repeats: int = 5) -> dict[str, float]:
    """Captions per second of `transforms.tokenizer`, and of open_clip's tokenizer where it is installed.

    Both take the same captions in batches of the same size, in turns, and the median of the turns counts. A first
    turn of each is not counted: it builds the vocabularies and fills the word caches that both have.

    Args:
      captions: the texts.
      batch_size: captions in one call; 8 are those of one image in the CC3M recipe.
      repeats: counted turns.

    Returns:
      `captions`, `captions_per_second`, and with open_clip also `open_clip_captions_per_second`, `ratio` (ours over
      theirs) and `different_rows` (captions whose ids are not the same).
    """
    from flair_jax.data.transforms.tokenizer import Tokenizer

    contenders = {"captions_per_second": Tokenizer()}
    if reference := open_clip_tokenizer():
        contenders["open_clip_captions_per_second"] = lambda texts: reference(texts).numpy()
    rows = {name: _tokenize(call, captions, batch_size) for name, call in contenders.items()}  # not counted
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            _tokenize(call, captions, batch_size)
            seconds[name].append(time.perf_counter() - start)
    figures = {"captions": len(captions)}
    figures |= {name: len(captions) / statistics.median(times) for name, times in seconds.items()}
    if reference:
        ours, theirs = rows.values()
        figures["ratio"] = figures["captions_per_second"] / figures["open_clip_captions_per_second"]
        figures["different_rows"] = int((ours != theirs).any(axis=1).sum())
    return figures


def made_up_captions(count: int, seed: int = 0) -> list[str]:
    """Captions in the style of the recipe: one to three sentences of common and of rarer, made-up words."""
    rng = random.Random(seed)
    frequent = ["a", "the", "of", "in", "and", "with", "man", "woman", "red", "white", "dog", "standing", "it's"]
    syllables = ["ba", "cor", "den", "fi", "gal", "hou", "in", "ket", "lo", "mar", "ness", "or", "pi", "ran", "tion"]
    rare = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(5000)]

    def sentence() -> str:
        words = (rng.choice(rare if rng.random() < 0.6 else frequent) for _ in range(rng.randint(7, 14)))
        return " ".join(words).capitalize()

    return [". ".join(sentence() for _ in range(rng.randint(1, 3))) for _ in range(count)]


def _tokenize(call: Callable, captions: Sequence[str], batch_size: int) -> np.ndarray:
    return np.concatenate([call(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)])


def open_clip_tokenizer() -> Callable | None:
    """open_clip's `SimpleTokenizer`, or None where open_clip is not installed.

    Its file is loaded by path: importing the package would need torchvision, which the tokenizer does not.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    path = pathlib.Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
