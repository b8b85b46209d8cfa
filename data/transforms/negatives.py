"""Hard-negative captions: a caption whose words are swapped, replaced or shuffled, so that it no longer fits its image.

Each kind makes at most one negative a caption, and none where it cannot alter it. A draw is a pure function of an
annotation and a `random.Random`. Swaps and replacements need a parse, which `data.prepare annotate` makes once and
keeps beside the shards; nothing here imports a parser.

Sources: FSC-CLIP (Oh et al. 2024, arXiv:2410.05210), whose kinds are NegCLIP's swaps (Yuksekgonul et al. 2023,
arXiv:2210.01936), SugarCrepe's replacements (Hsieh et al. 2023, arXiv:2306.14610) as CLoVe re-creates them (Castro et
al. 2024, arXiv:2402.15021), a shuffle of bigrams, and SVLC's substitution from word lists (Doveh et al. 2023,
arXiv:2211.11733).
"""

import bisect
import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flair_jax.data.transforms.base import NEGATIVES, TEXTS, VALID, Sample, SampleError
from flair_jax.data.transforms.samples import Captions
from flair_jax.data.transforms.word_lists import WORD_LISTS

FSC_CLIP = ("negclip", "replace", "ngram_shuffle_2")  # the three kinds of FSC-CLIP, in its order
PARSED = ("negclip", "replace")  # kinds that need annotations
SHUFFLES = tuple(f"ngram_shuffle_{size}" for size in range(1, 6))
LISTED = "csv_negclip"  # negatives that the record holds, as NegCLIP's file has them
KINDS = (*PARSED, *SHUFFLES, "svlc", LISTED)
LISTED_FIELD, LISTED_CAPTIONS = "neg_caption", "caption"  # of such a record: a list of negatives for each caption
MAX_SHUFFLES = 10  # attempts to find another order
REPLACEMENTS = 2  # words that are drawn for each replaceable part of a caption

# A word, a clitic as treebanks cut it ("n't", "'s"), or one mark.
_WORDS = re.compile(r"n['\u2019]t\b|['\u2019](?:s|m|d|re|ve|ll)\b|\w+?(?=n['\u2019]t\b)|\w+|[^\w\s]", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Word:
    """A token of a caption: characters `start` to `end`, and whether it is punctuation."""

    start: int
    end: int
    punctuation: bool


@dataclasses.dataclass(frozen=True)
class Replaceable:
    """A part of a caption that other words may replace.

    Attributes:
      start, end: its characters.
      words: W different replacements, as they are to be written.
      cumulative: (W,) int, the sum of the weights up to and including each word.
    """

    start: int
    end: int
    words: Sequence[str]
    cumulative: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What the draws need to know of a caption.

    Attributes:
      caption: the text.
      words: its tokens.
      swaps: for each kind of phrase (noun phrases, verb phrases, …) the spans (start, end) of characters that may be
        exchanged with one another; they do not overlap.
      replaceable: the parts that other words may replace; none unless the caption has enough content.
    """

    caption: str
    words: Sequence[Word]
    swaps: Sequence[Sequence[tuple[int, int]]] = ()
    replaceable: Sequence[Replaceable] = ()


def tokenize(caption: str) -> Annotation:
    """An annotation with nothing but the tokens, which need no parser: enough for shuffles and `svlc`."""
    spans = [(match.start(), match.end(), match[0]) for match in _WORDS.finditer(caption)]
    return Annotation(caption, [Word(start, end, not any(map(str.isalnum, text))) for start, end, text in spans])


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def swap(annotation: Annotation, rng: random.Random) -> str | None:
    """Two phrases of one kind exchanged: a pair from each kind, and one of the kinds whose two texts differ."""
    caption = annotation.caption
    candidates = []
    for spans in annotation.swaps:
        if len(spans) < 2:
            continue
        (start, end), (other_start, other_end) = sorted(rng.sample(spans, 2) if len(spans) > 2 else spans)
        text, other = caption[start:end], caption[other_start:other_end]
        if text != other:
            candidates.append(caption[:start] + other + caption[end:other_start] + text + caption[other_end:])
    return rng.choice(candidates) if candidates else None


def replace(annotation: Annotation, rng: random.Random) -> str | None:
    """One part replaced by another word.

    The reference draws up to two words for each part, without replacement and in proportion to their weights, and then
    one of all these. The same distribution: which of them is chosen first, and only this part is drawn for.
    """
    drawn = [(part, turn) for part in annotation.replaceable for turn in range(min(REPLACEMENTS, len(part.cumulative)))]
    if not drawn:
        return None
    part, turn = rng.choice(drawn)
    word = part.words[_weighted(part.cumulative, turn, rng)]
    return annotation.caption[: part.start] + word + annotation.caption[part.end :]


def _weighted(cumulative: Sequence[int], turn: int, rng: random.Random) -> int:
    """The index that comes at this turn (0 or 1) of a draw without replacement in proportion to the weights."""
    total = int(cumulative[-1])
    first = bisect.bisect_right(cumulative, rng.randrange(total))
    if turn == 0:
        return first
    before = int(cumulative[first - 1]) if first else 0
    weight = int(cumulative[first]) - before
    drawn = rng.randrange(total - weight)
    return bisect.bisect_right(cumulative, drawn + weight if drawn >= before else drawn)


def shuffle(annotation: Annotation, rng: random.Random, size: int = 2) -> str | None:
    """The tokens in groups of `size`, in another order.

    A mark that is alone in the last group is set aside and comes back first or after any group. Groups are joined with
    blanks, and so are the tokens of a group, except before punctuation. An order that repeats the caption, apart from
    punctuation at its ends, is drawn again.
    """
    groups = [annotation.words[first : first + size] for first in range(0, len(annotation.words), size)]
    mark = None
    if len(groups) > 1 and len(groups[-1]) == 1 and groups[-1][0].punctuation:
        if len(groups) == 2:
            return None
        mark = groups.pop()
    if len(groups) < 2:
        return None
    text = annotation.caption
    original = _content(annotation.words, text)
    for _ in range(MAX_SHUFFLES):
        order = list(groups)
        rng.shuffle(order)
        if mark:
            place = rng.randrange(len(order) + 1)
            order = [mark, *order] if place == 0 else [*order[: place - 1], [*order[place - 1], *mark], *order[place:]]
        if _content([word for group in order for word in group], text) != original:
            return " ".join(_join(group, text) for group in order)
    return None


def _content(words: Sequence[Word], caption: str) -> list[str]:
    """The texts of some tokens without the punctuation at both ends."""
    kept = [number for number, word in enumerate(words) if not word.punctuation]
    return [caption[word.start : word.end] for word in words[kept[0] : kept[-1] + 1]] if kept else []


def _join(group: Sequence[Word], caption: str) -> str:
    parts = [("" if word.punctuation else " ") + caption[word.start : word.end] for word in group]
    return "".join(parts).removeprefix(" ")


def substitute(annotation: Annotation, rng: random.Random) -> str | None:
    """All occurrences of one word of a list (colours, sizes, …) replaced by another of the list."""
    caption = annotation.caption
    texts = [caption[word.start : word.end] for word in annotation.words]
    found = [(words, present) for words in WORD_LISTS.values() if (present := sorted(set(texts) & set(words)))]
    if not found:
        return None
    words, present = rng.choice(found)
    old = rng.choice(present)
    new = rng.choice([word for word in words if word != old])
    written, end = [], 0
    for word, text in zip(annotation.words, texts, strict=True):
        written += [caption[end : word.start], new if text == old else text]
        end = word.end
    return "".join(written) + caption[end:]


def draw(kind: str, annotation: Annotation, rng: random.Random) -> str | None:
    """A negative of one of the `KINDS` but `LISTED`, or None where there is none."""
    if kind == "negclip":
        return swap(annotation, rng)
    if kind == "replace":
        return replace(annotation, rng)
    if kind == "svlc":
        return substitute(annotation, rng)
    return shuffle(annotation, rng, int(kind.rpartition("_")[2]))


# ---------------------------------------------------------------------------------------------------------------------
# The transform


class Annotations(Protocol):
    """Where the annotations of captions are found; see `transforms.annotations`."""

    def find(self, shard: str, caption: str) -> Annotation: ...


@dataclasses.dataclass(frozen=True)
class Negatives:
    """The transform that draws a negative of each kind for the first caption of an image.

    `texts/negatives`, int32 (K, T), and `valid/negatives`, bool (K,). Where a kind has none, or where its negative has
    the very tokens of the caption (the change lies after the cut, or is one of case), there is a copy of the caption,
    and it is not valid.

    Attributes:
      kinds: K of `KINDS`.
      captions: the transform that draws the captions.
      annotations: of the captions; needed by `PARSED` kinds.

    Raises:
      ValueError: an unknown kind, or captions of several sentences, which nobody has annotated.
    """

    kinds: Sequence[str]
    captions: Captions
    annotations: Annotations | None = None

    names = (f"{TEXTS}{NEGATIVES}", f"{VALID}{NEGATIVES}")

    def __post_init__(self):
        if isinstance(self.kinds, str) or not self.kinds:
            raise ValueError(f"negatives.kinds is {self.kinds!r}; expected a list of kinds, such as {FSC_CLIP}")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"negatives.kinds has {', '.join(unknown)}; choose of {', '.join(KINDS)}")
        single = [kind for kind in self.kinds if kind in (*PARSED, LISTED)]
        if single and self.captions.options.max_merged > 1:
            raise ValueError(
                f"negatives of the kinds {', '.join(single)} are made of captions as the record holds them: set "
                f"captions.max_merged to 1 (it is {self.captions.options.max_merged})"
            )

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """
        Raises:
          SampleError: see `Captions`; or the record has no list of negatives.
          ShardError: the caption has no annotation.
        """
        caption = self.captions.draw(sample)[0]
        rng = sample.rng(NEGATIVES)
        annotation = None if self.annotations is None else self.annotations.find(sample.record.shard, caption)
        if annotation is None:
            annotation = tokenize(caption)
        drawn = [
            _listed(sample, caption, rng) if kind == LISTED else draw(kind, annotation, rng) for kind in self.kinds
        ]
        tokens = self.captions.tokenize([caption, *(text or "" for text in drawn)])  # (1 + K, T)
        valid = np.array([text is not None for text in drawn]) & (tokens[1:] != tokens[0]).any(axis=1)
        return {self.names[0]: np.where(valid[:, None], tokens[1:], tokens[0]), self.names[1]: valid}


def _listed(sample: Sample, caption: str, rng: random.Random) -> str | None:
    """One of the negatives that the record lists for the caption."""
    captions, lists = (sample.fields.get(name) for name in (LISTED_CAPTIONS, LISTED_FIELD))
    if not (isinstance(captions, list) and isinstance(lists, list) and len(captions) == len(lists)):
        raise SampleError(f"no {LISTED_FIELD}, a list of negatives for each {LISTED_CAPTIONS}")
    if caption not in captions:
        raise SampleError(f"the caption is none of {LISTED_CAPTIONS}, whose negatives {LISTED_FIELD} lists")
    negatives = lists[captions.index(caption)]
    if not isinstance(negatives, list) or not all(isinstance(text, str) for text in negatives):
        raise SampleError(f"{LISTED_FIELD} must hold lists of texts")
    return rng.choice(negatives) if negatives else None
