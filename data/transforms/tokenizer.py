"""CLIP's byte-pair tokenizer: the ids of open_clip's `SimpleTokenizer`, from the Rust `tokenizers` library.

The text is cleaned as CLIP cleans it (ftfy, HTML entities, white space, lower case), cut into words by CLIP's
pattern, and every word is merged into byte pairs. Source: Radford et al. 2021 (arXiv:2103.00020) and its released
vocabulary, `bpe_simple_vocab_16e6.txt.gz` (see NOTICE).

The ids are open_clip's for all code points that Unicode 14 has assigned. For later letters they may differ, as
open_clip's own do from one version of its regular-expression library to the next.
"""

import functools
import gzip
import html
import pathlib
import re
from collections.abc import Sequence

import ftfy
import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

VOCAB_SIZE = 49408
SOT = 49406  # start of text
EOT = 49407  # end of text; the largest id, hence the first argmax of a row

_MERGES_FILE = pathlib.Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
_MARKS = {"<start_of_text>": SOT, "<end_of_text>": EOT}
# CLIP's pattern ignores case. The text is lower case already, so two traces of that are left: the long s, U+017F,
# counts as an s, and U+0345, a mark whose upper case is a letter, falls between the classes and is dropped.
_WORDS = (
    r"<[s\x{17f}]tart_of_text>|<end_of_text>|'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
_ASCII_WORDS = re.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")
# Texts that neither ftfy nor html.unescape changes: printable ASCII and white space, no `&` but those before a space.
_SOUND = re.compile(r"(?:[\t\n\f\r -%'-~]++|& )*+")


class Tokenizer:
    """Texts to rows of ids, padded with 0 after the end-of-text id.

    It holds no more than the context length, so it is cheap to pickle; the vocabulary is read once a process, on
    first use. Calls from several threads are safe.

    Args:
      context_length: ids in a row, start and end of text included; at least 2.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, context_length: int = 77):
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}; start and end of text alone need 2")
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Ids of one text or of several.

        A text that is too long keeps its first ids, and its last id is the end of text. Lone surrogates, which
        have no UTF-8 form, are read as U+FFFD. A literal `<start_of_text>` or `<end_of_text>` is read as the id of
        that name, as CLIP does, where a word can begin: at the start, after a space, a letter or a digit.

        Args:
          texts: N texts, or one (then N = 1).

        Returns:
          int32 (N, context_length).

        Raises:
          TypeError: for anything that is not a text, with its position and type.
        """
        texts = _as_list(texts)
        tokens = np.zeros((len(texts), self.context_length), np.int32)  # (N, T)
        tokens[:, 0] = SOT
        for row, text in zip(tokens, texts, strict=True):
            ids = _ids(text)[: self.context_length - 2]
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = EOT
        return tokens


def encode(text: str) -> list[int]:
    """Ids of one text, of any number, without start and end of text."""
    return _ids(text).tolist()


def clean(text: str) -> str:
    """`text` as CLIP reads it: mended by ftfy, HTML entities resolved twice, white space collapsed, lower case."""
    return _even(_mended(text))


def _mended(text: str) -> str:
    return text if _SOUND.fullmatch(text) else html.unescape(html.unescape(ftfy.fix_text(text)))


def _even(text: str) -> str:
    return " ".join(text.split()).lower()


def _ids(text: str) -> np.ndarray:
    """`encode` as int32 (N,), not writable."""
    text = _mended(text)
    if text.isascii():
        ids = map(_encode_piece, text.split())
    else:
        ids = (_merge(word) for word, _ in _bpe().pre_tokenizer.pre_tokenize_str(_even(text)))
    return np.frombuffer(b"".join(ids), np.int32)


def _as_list(texts) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a str or a sequence of str, not {type(texts).__name__}")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}] must be a str, not {type(text).__name__}")
    return list(texts)


# Nearly all pieces of a caption have been seen before: looking them up is several times faster than merging them again,
# even in Rust. No word holds white space, so a text may be cut there.
@functools.lru_cache(maxsize=1 << 16)
def _encode_piece(piece: str) -> bytes:
    """Ids, as the bytes of int32, of a part of an ASCII text between white space."""
    # In ASCII a word and its bytes in the alphabet of `_bpe` are the same.
    return b"".join(map(_merge, _ASCII_WORDS.findall(piece.lower())))


@functools.lru_cache(maxsize=1 << 16)
def _merge(word: str) -> bytes:
    """Ids, as the bytes of int32, of one word of the pattern, given as bytes in the alphabet of `_bpe`."""
    # The marks are words, not tokens to be cut out of a text beforehand: `!<end_of_text>` holds none.
    ids = [_MARKS[word]] if word in _MARKS else [token.id for token in _bpe().model.tokenize(word)]
    return np.array(ids, np.int32).tobytes()


@functools.cache
def _bpe() -> RustTokenizer:
    """The Rust tokenizer, built from the merges on the first call of a process."""
    lines = gzip.decompress(_MERGES_FILE.read_bytes()).decode("utf-8").split("\n")
    # In GPT-2's alphabet every byte is a printable character; CLIP numbers them in the order of those characters.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [letter + "</w>" for letter in alphabet]
    # The first line is a title, and the file lists far more merges than CLIP has ids for.
    merges = [tuple(line.split()) for line in lines[1 : 1 + VOCAB_SIZE - len(letters) - len(_MARKS)]]
    entries = [*letters, *("".join(pair) for pair in merges), *_MARKS]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    bpe = RustTokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe
