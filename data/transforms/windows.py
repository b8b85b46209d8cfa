"""Long texts as several rows of tokens, for a text tower whose context is short."""

from collections.abc import Sequence

import numpy as np

from flair_jax.data.transforms import captions, tokenizer

WAYS = ("truncate", "windows", "sentences")
SHORTEST_SENTENCE = 3  # characters


def sentences(text: str) -> list[str]:
    """The sentences of a text as FLAIR's fine-grained sets have them: `captions.split`, pieces of 1 or 2 characters
    left out (`spec/flair.md` 3.2).
    """
    return [sentence for sentence in captions.split(text) if len(sentence) >= SHORTEST_SENTENCE]


def text_rows(texts: Sequence[str], context_length: int, way: str = "truncate") -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens of N texts, one or several for each.

    Ways:
      truncate: one row a text, its first tokens, as the tokenizer cuts it.
      windows: all tokens, in as few windows as hold them, as equally long as can be, so that none is a stub; each
        between a start and an end of text.
      sentences: a row per sentence, cut at the context length; a text without any is a row of its own.

    Returns:
      tokens int32 (W, context_length), W >= N, and text_of_row int (W,), the text of each row, in order.

    Raises:
      ValueError: an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"windows is {way!r}; expected one of {WAYS}")
    tokenize = tokenizer.Tokenizer(context_length)
    if way == "truncate":
        return tokenize(texts), np.arange(len(texts))
    if way == "sentences":
        parts = [sentences(text) or [text] for text in texts]
        rows = tokenize([part for own in parts for part in own])
        return rows, np.repeat(np.arange(len(texts)), [len(own) for own in parts])
    rows, owners = [], []
    for number, text in enumerate(texts):
        ids = np.asarray(tokenizer.encode(text), np.int32)
        count = max(1, -(-len(ids) // (context_length - 2)))
        for window in np.array_split(ids, count):
            row = np.zeros(context_length, np.int32)
            row[: len(window) + 2] = [tokenizer.SOT, *window, tokenizer.EOT]
            rows.append(row)
            owners.append(number)
    return np.stack(rows), np.asarray(owners)
