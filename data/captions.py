"""The captions of one record: gathered from its fields, split into sentences, sampled and merged as FLAIR does.

Source: FLAIR's diverse caption sampling (Xiao et al. 2024, arXiv:2412.03561) over the fields of DreamLIP
(Zheng et al. 2024, arXiv:2403.17007).
"""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence

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

_SENTENCE_ENDS = re.compile(r"\n|</s>|\.")


class CaptionError(ValueError):
    """A record whose captions cannot be used. The message says why, without naming the record."""


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """How the captions of an image are drawn. The defaults are FLAIR's."""

    fields: Sequence[str] = FIELDS
    count: int = 8  # K, captions an image
    max_merged: int = 3  # sentences a caption, at most
    reference_windows: bool = True  # the last window of consecutive sentences is never drawn, as in the reference


def draw(record: Mapping, rng: random.Random, options: CaptionOptions) -> list[str]:
    """The captions of one record: `sample` of its `sentences`. Raises CaptionError as they do."""
    found = sentences(record, options.fields)
    return sample(found, rng, options.count, options.max_merged, options.reference_windows)


def split(text: str) -> list[str]:
    """The sentences of a text: cut at every newline, `</s>` and full stop, stripped, empty ones left out.

    This is the rule of DreamLIP and FLAIR. It knows no abbreviations: "3.5 m" becomes "3" and "5 m".
    """
    return [sentence for piece in _SENTENCE_ENDS.split(text) if (sentence := piece.strip())]


def sentences(record: Mapping, fields: Sequence[str] = FIELDS) -> list[str]:
    """All sentences of a record, in the order of the fields.

    A field is a list of strings, of which each is a sentence as it stands, or one string, which is split; so a text
    that was never split cannot be sampled letter by letter. A field that is missing, null or empty adds nothing, nor
    does a blank string.

    Args:
      record: the decoded JSON of one image.
      fields: the keys to read; for PixelProse `("caption",)`.

    Returns:
      At least one sentence.

    Raises:
      CaptionError: if a field is of another type, or if no sentence is found ("no captions").
    """
    if not isinstance(record, Mapping):
        raise CaptionError(f"the record must be a JSON object, not {type(record).__name__}")
    found = [sentence for field in fields for sentence in _field_sentences(field, record.get(field))]
    if not found:
        raise CaptionError("no captions")
    return found


def sample(
    sentences: Sequence[str],
    rng: random.Random,
    count: int = 8,
    max_merged: int = 3,
    reference_windows: bool = True,
) -> list[str]:
    """Draws captions, each made of 1 to `max_merged` sentences.

    For every caption independently: the number m of sentences is uniform; m = 1 takes one sentence; for more a fair
    coin decides between m consecutive sentences (all there are, in order, if there are no more than m) and m
    scattered ones in random order, without replacement where there are enough. The draws from `rng` are the
    reference's, call by call, so the same seed gives the same captions.

    Args:
      sentences: the n sentences of one image.
      rng: the source of all draws.
      count: captions to draw, K.
      max_merged: the largest number of sentences in a caption.
      reference_windows: True keeps the reference's choice among n - m windows, which never takes the last of the
        n - m + 1; False chooses among all of them.

    Returns:
      `count` captions; the same one may come twice.

    Raises:
      CaptionError: "no captions", if there are no sentences.
    """
    if not sentences:
        raise CaptionError("no captions")
    return [_sample_one(sentences, rng, max_merged, reference_windows) for _ in range(count)]


def join(sentences: Sequence[str]) -> str:
    """Sentences as one caption, ". " between them and no full stop at the end."""
    return ". ".join(sentences)


def _field_sentences(field: str, value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return split(value)
    if not isinstance(value, list):
        raise CaptionError(f"{field} must be a string or a list of strings, not {type(value).__name__}")
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise CaptionError(f"{field}[{position}] must be a string, not {type(item).__name__}")
    return [item for item in value if item.strip()]


def _sample_one(sentences: Sequence[str], rng: random.Random, max_merged: int, reference_windows: bool) -> str:
    total = len(sentences)
    merged = rng.randint(1, max_merged)
    if merged == 1:
        return rng.choice(sentences)
    if rng.random() < 0.5:
        if merged >= total:
            return join(sentences)
        last_start = total - merged - (1 if reference_windows else 0)
        start = rng.randint(0, last_start)
        return join(sentences[start : start + merged])
    if total < merged:
        return join(rng.choices(sentences, k=merged))
    return join(rng.sample(sentences, merged))
