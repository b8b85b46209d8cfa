"""CLIP's tokenizer in plain Python, the reference's kind: for comparisons where open_clip is not installed.

It goes about it as CLIP's own: of the words that were seen only the merges are kept. It is faster than open_clip's.
"""

import gzip
import html
import itertools
import pathlib
from collections.abc import Sequence

from flair_jax.data.transforms import tokenizer
from flair_jax.data.transforms.tokenizer import EOT, SOT, VOCAB_SIZE

MERGES = pathlib.Path(tokenizer.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
WORDS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class PythonTokenizer:
    """Texts to int64 tensors (N, context_length): words by a regular expression, merged pair by pair."""

    def __init__(self, context_length: int = 77):
        import regex

        self._context_length = context_length
        self._words = regex.compile(WORDS, regex.IGNORECASE)
        # Each byte is a printable character: its own, or for the others one of those behind U+00FF.
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        self._letters = {byte: chr(byte) for byte in printable}
        self._letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
        letters = list(self._letters.values())
        entries = letters + [letter + "</w>" for letter in letters]
        lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 1 + VOCAB_SIZE - len(entries) - 2]]
        entries += ["".join(pair) for pair in merges]
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._ids = {entry: index for index, entry in enumerate(entries)}
        self._ids |= {"<start_of_text>": SOT, "<end_of_text>": EOT}
        self._merged = {mark: [mark] for mark in ("<start_of_text>", "<end_of_text>")}

    def __call__(self, texts: Sequence[str]):
        import torch

        rows = torch.zeros(len(texts), self._context_length, dtype=torch.long)  # (N, T)
        for row, text in zip(rows, texts, strict=True):
            ids = [SOT, *self._encode(text)[: self._context_length - 2], EOT]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _encode(self, text: str) -> list[int]:
        import ftfy

        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        ids = []
        for word in self._words.findall(text):
            letters = "".join(self._letters[byte] for byte in word.encode("utf-8"))
            if letters not in self._merged:
                self._merged[letters] = self._merge(letters)
            ids.extend(self._ids[part] for part in self._merged[letters])
        return ids

    def _merge(self, letters: str) -> list[str]:
        """Joins the pair that was learned first until none is left."""
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, VOCAB_SIZE))
            if best not in self._ranks:
                break
            joined, place = [], 0
            while place < len(parts):
                size = 2 if tuple(parts[place : place + 2]) == best else 1
                joined.append("".join(parts[place : place + size]))
                place += size
            parts = joined
        return parts
