"""The captions of one record: gathered from its fields, split into sentences, sampled and merged as FLAIR does.

Source: FLAIR's diverse caption sampling (Xiao et al. 2024, arXiv:2412.03561) over the fields of DreamLIP
(Zheng et al. 2024, arXiv:2403.17007).
"""

import ast
import dataclasses
import io
import json
import random
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sentencex

from flair_jax.data.transforms.base import SampleError

# IB: InstructBLIP, SV: ShareGPT4V, LLA: LLaVA-1.5. The order matters: consecutive sentences may cross from one field
# into the next.
FIELDS = (
    "raw_caption",
    "shortIB_captions",
    "longIB_captions",
    "shortSV_captions",
    "longSV_captions",
    "shortLLA_captions",
    "longLLA_captions",
)

MAX_LIST = 1 << 20  # characters of a list written as text

_LINE_ENDS = re.compile(r"\n|</s>")
_SENTENCE_ENDS = re.compile(rf"{_LINE_ENDS.pattern}|\.")


class CaptionError(SampleError):
    """A record whose captions cannot be used. The message says why, without naming the record."""


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """How the captions of an image are drawn. The defaults are FLAIR's; the others are its ablations and our repairs.

    A fair coin between two whole texts, as GRAIN draws the web's caption or an MLLM's: the two `fields`, `count=1`,
    `max_merged=1`, `splitting="whole"`, and `join_fields=True` where shards hold them as lists of sentences. An image
    that lacks one of them has the other. Captions of one sentence: `max_merged=1`. A fixed number of sentences:
    `min_merged` and `max_merged` alike. One caption an image: `count=1`. Always the first sentence of the first field:
    `first=1, max_merged=1`.

    Raises:
      ValueError: a value that is none of the allowed ones.
    """

    fields: Sequence[str] = FIELDS
    splitting: str = "every_stop"  # of fields that are one string: a key of SPLITTINGS
    join_fields: bool = False  # each field is one text: its sentences are joined and drawn as one
    first: int | None = None  # only the first so many sentences are drawn from; None: all
    count: int = 8  # K, captions per image
    min_merged: int = 1  # sentences a caption, at least
    max_merged: int = 3  # at most
    merging: str = "mixed"  # sentences "consecutive" in the record, "scattered" over it, or either by a fair coin
    reference_windows: bool = True  # the last window of consecutive sentences is never drawn, as in the reference

    def __post_init__(self):
        if not self.fields:
            raise ValueError("captions.fields is empty; give the keys of the captions, such as ('caption',)")
        if isinstance(self.fields, str):
            raise ValueError(f"captions.fields is {self.fields!r}; give a list of keys, as ({self.fields!r},)")
        for name, allowed in (("splitting", SPLITTINGS), ("merging", MERGINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"captions.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.count < 1 or (self.first is not None and self.first < 1):
            raise ValueError(f"captions.count is {self.count}, captions.first {self.first}; both must be positive")
        if not 1 <= self.min_merged <= self.max_merged:
            raise ValueError(
                f"captions.min_merged is {self.min_merged}, captions.max_merged {self.max_merged}; "
                "they must be positive, and the first no larger than the second"
            )


def draw(record: Mapping, rng: random.Random, options: CaptionOptions) -> list[str]:
    """The captions of one record: `sample` of its `texts`. Raises CaptionError as they do."""
    return sample(texts(record, options), rng, options)


def texts(record: Mapping, options: CaptionOptions) -> list[str]:
    """All that captions of a record are drawn from: its sentences, or with `join_fields` each field as one text.

    Raises CaptionError as `sentences` does.
    """
    found = sentences(record, options.fields, options.splitting)
    if not options.join_fields:
        return found
    by_field = [field_sentences(record.get(field), options.splitting, field) for field in options.fields]
    return [join([*(sentence.rstrip(". ") for sentence in field[:-1]), field[-1]]) for field in by_field if field]


def split(text: str) -> list[str]:
    """The sentences of a text: cut at every newline, `</s>` and full stop, stripped, empty ones left out.

    This is the rule of DreamLIP and FLAIR. It knows no abbreviations: "3.5 m" becomes "3" and "5 m".
    """
    return [sentence for piece in _SENTENCE_ENDS.split(text) if (sentence := piece.strip())]


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, for new training: abbreviations, decimals, initials and addresses stay whole.

    Cut at every newline and `</s>` too, without the full stops at their ends, and without pieces that have no letter,
    such as the numbers of a list. Question and exclamation marks end a sentence and stay. In doubt, as after a single
    letter, two sentences stay together.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # sentencex takes no lone surrogates
    pieces = (piece for line in _LINE_ENDS.split(text) for piece in sentencex.segment("en", line))
    return [piece.strip().strip(" .") for piece in pieces if any(map(str.isalpha, piece))]


def whole(text: str) -> list[str]:
    """The text itself, stripped, unless nothing is left of it."""
    return [text.strip()] if text.strip() else []


SPLITTINGS: Mapping[str, Callable[[str], list[str]]] = {
    "every_stop": split,
    "sentences": split_sentences,
    "whole": whole,
}
MERGINGS = ("mixed", "consecutive", "scattered")


def sentences(record: Mapping, fields: Sequence[str] = FIELDS, splitting: str = "every_stop") -> list[str]:
    """All sentences of a record, in the order of the fields.

    Each field is read by `field_sentences`; one that is missing, null or empty adds nothing.

    Args:
      record: the decoded JSON of one image.
      fields: the keys to read; for PixelProse `("caption",)`.
      splitting: of strings, a key of `SPLITTINGS`.

    Returns:
      At least one sentence.

    Raises:
      CaptionError: if a field is of another type, or if no sentence is found ("no captions").
    """
    if not isinstance(record, Mapping):
        raise CaptionError(f"the record must be a JSON object, not {type(record).__name__}")
    found = [sentence for field in fields for sentence in field_sentences(record.get(field), splitting, field)]
    if not found:
        # No key of the record is in the message: reasons are counted, and records may have any.
        none = "" if any(field in record for field in fields) else f": there is none of the fields {', '.join(fields)}"
        raise CaptionError(f"no captions{none}")
    return found


def sample(
    sentences: Sequence[str],
    rng: random.Random,
    options: CaptionOptions = CaptionOptions(),
) -> list[str]:
    """Draws captions, each made of `min_merged` to `max_merged` sentences.

    For every caption independently: the number m of sentences is uniform; m = 1 takes one sentence; for more a fair
    coin decides between m consecutive sentences (all there are, in order, if there are no more than m) and m
    scattered ones in random order, without replacement where there are enough. With the default `min_merged` and
    `merging` the draws from `rng` are the reference's, call by call, so the same seed gives the same captions.

    The reference chooses among n - m windows of consecutive sentences and so never takes the last of the n - m + 1;
    without `reference_windows` the choice is among all of them.

    Args:
      sentences: the n sentences of one image.
      rng: the source of all draws.
      options: `fields` and `splitting` play no part.

    Returns:
      `count` captions; the same one may come twice.

    Raises:
      CaptionError: "no captions", if there are no sentences.
    """
    if not sentences:
        raise CaptionError("no captions")
    sentences = sentences[: options.first]
    return [_sample_one(sentences, rng, options) for _ in range(options.count)]


def join(sentences: Sequence[str]) -> str:
    """Sentences as one caption, ". " between them and no full stop at the end."""
    return ". ".join(sentences)


def field_sentences(value: Any, splitting: str = "every_stop", name: str = "a caption field") -> list[str]:
    """The sentences of one caption field, in shards read in place and in the files that `prepare` reads.

    A list of strings, or the text of one ('["a dog", "a cat"]', "['a dog', 'a cat']"), holds sentences as they stand;
    any other text is split. So a text that was never split cannot be sampled letter by letter, and brackets and quotes
    are not trained. Blank strings are left out.

    Args:
      value: the field, as JSON or a table's cell gives it; None adds nothing.
      splitting: of texts, a key of `SPLITTINGS`.
      name: of the field, for the error.

    Raises:
      CaptionError: the value is something else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        written = written_list(value)
        if written is None:
            return SPLITTINGS[splitting](value)
        value = written
    if not isinstance(value, list):
        raise CaptionError(f"{name} must be a string or a list of strings, not {type(value).__name__}")
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise CaptionError(f"{name}[{position}] must be a string, not {type(item).__name__}")
    return [item for item in value if item.strip()]


def written_list(text: str) -> list[str] | None:
    """The list of strings that a text spells in JSON, Python or NumPy; None for other text, which may begin with [.

    NumPy writes no commas, as in "['a dog' 'a cat']", which Python would take for one string.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MAX_LIST:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # MemoryError: nested too deep for the parser
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found if parse is json.loads else _string_literals(text)
    return None


def _string_literals(text: str) -> list[str]:
    """The strings of a Python expression, those without a comma between them apart."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]


def _sample_one(sentences: Sequence[str], rng: random.Random, options: CaptionOptions) -> str:
    total = len(sentences)
    merged = rng.randint(options.min_merged, options.max_merged)
    if merged == 1:
        return rng.choice(sentences)
    consecutive = rng.random() < 0.5 if options.merging == "mixed" else options.merging == "consecutive"
    if consecutive:
        if merged >= total:
            return join(sentences)
        last_start = total - merged - (1 if options.reference_windows else 0)
        start = rng.randint(0, last_start)
        return join(sentences[start : start + merged])
    if total < merged:
        return join(rng.choices(sentences, k=merged))
    return join(rng.sample(sentences, merged))
