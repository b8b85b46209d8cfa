"""Hard-negative captions: the draws against the reference's own outputs, their distribution, and the transform."""

import collections
import fractions
import functools
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from conftest import load_golden
from parsed import nothing, parse_of

from flair_jax.data.prepare import parses
from flair_jax.data.sources.base import Record
from flair_jax.data.transforms import negatives, tokenizer, word_lists
from flair_jax.data.transforms.base import Sample, SampleError
from flair_jax.data.transforms.captions import CaptionOptions
from flair_jax.data.transforms.negatives import Annotation, Negatives, Replaceable
from flair_jax.data.transforms.samples import Captions

GOLDEN = "fsc_clip/hard_negatives.json"
golden = pytest.mark.golden


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return load_golden(GOLDEN)["records"]


class Branch:
    """Stands for `random.Random` and takes one of all ways; `probability` says how likely it is."""

    def __init__(self, way: list[int]):
        self._way, self.counts, self.probability = way, [], fractions.Fraction(1)

    def randrange(self, count: int) -> int:
        self.counts.append(count)
        self.probability /= count
        return self._way[len(self.counts) - 1] if len(self.counts) <= len(self._way) else 0

    def choice(self, items):
        return items[self.randrange(len(items))]

    def sample(self, items, count: int) -> list:
        rest = list(items)
        return [rest.pop(self.randrange(len(rest))) for _ in range(count)]

    def shuffle(self, items: list) -> None:
        items[:] = self.sample(items, len(items))


def distribution(draw) -> dict:
    """The exact probability of all that `draw(rng)` may give, from the code of the draw itself."""
    found, way = collections.Counter(), []
    while True:
        branch = Branch(way)
        found[draw(branch)] += branch.probability
        way = [*way, *[0] * (len(branch.counts) - len(way))]
        while way and way[-1] + 1 == branch.counts[len(way) - 1]:
            way.pop()
        if not way:
            assert sum(found.values()) == 1
            return dict(found)
        way[-1] += 1


def check_frequencies(draw, expected: dict, count: int = 4000) -> None:
    """That draws come as often as they should, to within 5 standard deviations."""
    rng = random.Random(0)
    found = collections.Counter(draw(rng) for _ in range(count))
    assert found.keys() <= expected.keys()
    for outcome, probability in expected.items():
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(found[outcome] - count * probability) <= 5 * deviation + 1e-9, outcome


# ---------------------------------------------------------------------------------------------------------------------
# Swaps


@golden
def test_spans_to_swap_are_the_references(records):
    for record in records:
        expected = {
            kind: [(span["start"], span["end"]) for span in found["spans"]] for kind, found in record["negclip"].items()
        }
        assert parses.swaps(parse_of(record)) == expected, record["caption"]


@golden
def test_possible_swaps_are_the_references(records):
    for record in records:
        annotation = parses.annotation(parse_of(record), nothing)
        exact = distribution(lambda rng, annotation=annotation: negatives.swap(annotation, rng))
        assert exact.keys() - {None} == set(record["negclip_possible"]), record["caption"]
        drawn = {draw[0] if draw else None for draw in record["draws"]["negclip"]}
        assert drawn <= exact.keys(), record["caption"]
        # Each kind of phrase draws among its own pairs, and the kinds are equally likely where all of them have a pair.
        possible = [set(found["possible"]) for found in record["negclip"].values()]
        assert (exact.get(None) == 1) == (not any(possible))


@golden
def test_swaps_come_as_often_as_the_rules_say(records):
    record = max(records, key=lambda record: len(record["negclip_possible"]))
    annotation = parses.annotation(parse_of(record), nothing)
    exact = distribution(lambda rng: negatives.swap(annotation, rng))
    check_frequencies(lambda rng: negatives.swap(annotation, rng), exact)


def test_swap_draws_a_pair_of_each_kind_and_then_a_kind():
    caption = "a b a d e"
    first, second = [(0, 1), (2, 3), (4, 5)], [(6, 7), (8, 9)]
    annotation = Annotation(caption, [], [first, second, [(0, 1)]])
    # Of the first kind's three pairs one has equal texts: then only the second kind is left.
    third = fractions.Fraction(1, 3)
    assert distribution(lambda rng: negatives.swap(annotation, rng)) == {
        "b a a d e": third / 2,
        "a a b d e": third / 2,
        "a b a e d": third / 2 + third / 2 + third,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Replacements


@golden
def test_scene_graphs_are_the_references(records):
    for record in records:
        graph, expected = parses.scene_graph(parse_of(record)), record["replace"]
        assert [(*entity.span[:2], entity.modifiers) for entity in graph.entities] == [
            (entity["span"]["start"], entity["span"]["end"], sorted(entity["modifiers"]))
            for entity in expected["entities"]
        ], record["caption"]
        assert [(*relation.span[:2], relation.subject, relation.object) for relation in graph.relations] == [
            (relation["span"]["start"], relation["span"]["end"], relation["subject"], relation["object"])
            for relation in expected["relations"]
        ], record["caption"]
        assert graph.is_rich == expected["passes_filter"], record["caption"]


def heaviest(record: dict) -> dict[tuple, dict[str, int]]:
    """(root, first token, end of what is replaced) -> the words that the reference puts there, with their weights."""
    found, tokens, caption = {}, record["tokens"], record["caption"]
    for element in record["replace"]["elements"]:
        span, root = element["element"], element["root"]
        start, end = (span["start"], span["end"]) if element["root_pos"] == "ADP" else (root, root + 1)
        first = tokens[start]["idx"]
        rest = len(caption) - tokens[end - 1]["idx"] - len(tokens[end - 1]["text"])
        words = {top["caption"][first : len(top["caption"]) - rest]: top["weight"] for top in element["top"]}
        found[caption[first : len(caption) - rest], element["root_pos"], element["root_tag"]] = words
    return found


@golden
def test_replaced_captions_are_the_references(records):
    """With the heaviest words of each part, the ones that the file lists."""
    for record in records:
        words = heaviest(record)
        annotation = parses.annotation(
            parse_of(record), lambda *part, words=words: parses.Candidates.of(words.get(part, {}))
        )
        expected = [element for element in record["replace"]["elements"] if element["top"]]
        expected = expected if record["replace"]["passes_filter"] else []
        assert len(annotation.replaceable) == len(expected), record["caption"]
        # A part gives up to two of the drawn words, and each of them is as likely to be chosen.
        slots = sum(min(2, len(element["top"])) for element in expected)
        exact = collections.Counter() if slots else {None: 1}
        for element in expected:
            for top, share in zip(element["top"], shares([top["weight"] for top in element["top"]]), strict=True):
                exact[top["caption"]] += share / slots
        rng = random.Random(1)
        drawn = {negatives.replace(annotation, rng) for _ in range(40)}
        assert drawn <= exact.keys(), record["caption"]
    check_frequencies(lambda rng: negatives.replace(annotation, rng), exact)


def shares(weights: list[int]) -> list[float]:
    """How often each item is expected among two that are drawn without replacement."""
    total = sum(weights)
    if len(weights) == 1:
        return [1.0]
    return [
        weight / total + sum(other / total * weight / (total - other) for j, other in enumerate(weights) if j != i)
        for i, weight in enumerate(weights)
    ]


def test_second_word_is_drawn_without_the_first():
    weights = [1, 5, 2]
    part = Replaceable(2, 3, ("x", "y", "z"), list(itertools.accumulate(weights)))
    exact = distribution(lambda rng: negatives.replace(Annotation("a b", [], [], [part]), rng))
    assert {text: float(share) for text, share in exact.items()} == pytest.approx(
        {f"a {word}": share / 2 for word, share in zip("xyz", shares(weights), strict=True)}
    )


@pytest.mark.parametrize(
    ("word", "original", "expected"),
    [("parking_lot", "lawn", "parking lot"), ("young_man", "Dogs", "Young Man"), ("cat", "DOGS", "CAT")],
)
def test_replacements_are_written_as_the_original(word, original, expected):
    assert parses.written(word, original) == expected


@functools.cache
def wordnet() -> parses.WordNet:
    pytest.importorskip("nltk", reason="NLTK is not installed")
    pytest.importorskip("pyinflect", reason="pyinflect is not installed")
    try:
        return parses.WordNet()
    except parses.InputError as error:
        pytest.skip(str(error).partition(":")[0])


@golden
def test_replacements_are_the_references(records):
    """Needs WordNet. The numbers of words are equal, and so are the heaviest ones; weights the reference remembers."""
    words = wordnet()
    for record in records:
        for element in record["replace"]["elements"]:
            token = record["tokens"][element["root"]]
            if element["root_pos"] not in parses.WORDNET_POS:
                continue
            related = words.related(token["text"], parses.WORDNET_POS[element["root_pos"]])
            assert len(related) == element["n_replacements"], token
            assert {top["word"] for top in element["top"]} <= related.keys(), token
        parts = heaviest(record)
        for part, expected in parts.items():
            assert expected.keys() <= set(words.candidates(*part).words), part


@pytest.mark.parametrize(("word", "replacement", "counts"), [("dog", "cat", (18, 1, 1)), ("dog", "boy", (16, 42))])
def test_weights_are_counts_of_senses(word, replacement, counts):
    """Each occurrence counts as often as WordNet's texts have that sense, at least once."""
    assert wordnet().related(word, "n")[replacement] == sum(counts)


@golden
def test_prepositions_are_the_references(records):
    for record in records:
        for element in record["replace"]["elements"]:
            if element["root_pos"] == "ADP":
                found = parses.prepositions(element["element"]["text"])
                assert (len(found), sum(found.values())) == (element["n_replacements"], element["total_weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Shuffles and word lists


def is_arrangement(text: str, groups: list[str], mark: str | None) -> bool:
    """Whether groups and mark, each used once, make up the text: blanks between groups, the mark after one or first."""
    if not groups:
        return not text and mark is None
    for number, group in enumerate(groups):
        rest = groups[:number] + groups[number + 1 :]
        for ending, left in ((group, mark), *(((group + mark, None),) if mark else ())):
            if text == ending and not rest and left is None:
                return True
            if text.startswith(ending + " ") and is_arrangement(text[len(ending) + 1 :], rest, left):
                return True
    return bool(mark) and text.startswith(mark + " ") and is_arrangement(text[len(mark) + 1 :], groups, None)


@golden
def test_shuffles_are_arrangements_of_the_references_groups(records):
    for record in records:
        annotation = parses.annotation(parse_of(record), nothing)
        groups = [re.sub(r" (?=[^\w\s'])", "", " ".join(group)) for group in record["bigrams"]]
        mark = groups.pop() if groups and len(record["bigrams"][-1]) == 1 and annotation.words[-1].punctuation else None
        rng = random.Random(0)
        ours = [negatives.shuffle(annotation, rng) for _ in range(4)]
        theirs = [draw[0] if draw and not isinstance(draw, str) else None for draw in record["draws"]["bigram_shuffle"]]
        for text in (*ours, *theirs):
            assert text is None or is_arrangement(text, groups, mark), text
        assert set(map(bool, ours)) == set(map(bool, theirs)), record["caption"]


def test_orders_are_equally_likely():
    exact = distribution_of_shuffle("a b c d e f", orders=6)
    assert exact == {
        text: pytest.approx(1 / 5, abs=1e-6)
        for text in ("a b e f c d", "c d a b e f", "c d e f a b", "e f a b c d", "e f c d a b")
    }


def test_last_mark_goes_first_or_after_any_group():
    exact = distribution_of_shuffle("a b c d.", orders=6)
    # "a b c d." and ". a b c d" repeat the caption but for marks at its ends.
    assert exact == {text: pytest.approx(1 / 4, abs=1e-6) for text in ("a b. c d", "c d. a b", "c d a b.", ". c d a b")}


def distribution_of_shuffle(caption: str, orders: int) -> dict:
    """As `distribution`, where no more than one repetition of the caption is followed: the rest is alike."""
    annotation = negatives.tokenize(caption)
    found = distribution(lambda rng: first_attempt(annotation, rng))
    assert len(found) <= orders
    repeated = found.pop(None)
    return {text: float(share / (1 - repeated)) for text, share in found.items()}


def first_attempt(annotation, rng):
    kept = negatives.MAX_SHUFFLES
    negatives.MAX_SHUFFLES = 1
    try:
        return negatives.shuffle(annotation, rng)
    finally:
        negatives.MAX_SHUFFLES = kept


@pytest.mark.parametrize("caption", ["", "Dogs", "A dog", "A dog.", "a a a a", "!?", ". . . ."])
def test_captions_without_another_order_have_no_shuffle(caption):
    assert negatives.shuffle(negatives.tokenize(caption), random.Random(0)) is None


@pytest.mark.parametrize("kind", [kind for kind in negatives.KINDS if kind != negatives.LISTED])
def test_empty_caption_has_no_negative(kind):
    assert negatives.draw(kind, negatives.tokenize(""), random.Random(0)) is None


def test_tokens_without_a_parser():
    annotation = negatives.tokenize("She doesn't see her mother's half-eaten cake, 2019!")
    assert [annotation.caption[word.start : word.end] for word in annotation.words] == [
        *("She", "does", "n't", "see", "her", "mother", "'s", "half", "-", "eaten", "cake", ",", "2019", "!"),
    ]
    assert [word.punctuation for word in annotation.words].count(True) == 3


def test_one_word_of_a_list_is_replaced_wherever_it_stands():
    annotation = negatives.tokenize("a red car; the red bus")
    exact = distribution(lambda rng: negatives.substitute(annotation, rng))
    colours, nouns = word_lists.WORD_LISTS["colours"], word_lists.WORD_LISTS["nouns"]
    expected = collections.Counter()
    for new in set(colours) - {"red"}:
        expected[f"a {new} car; the {new} bus"] += 1 / 2 / (len(colours) - 1)
    for old, before, after in (("car", "a red ", "; the red bus"), ("bus", "a red car; the red ", "")):
        for new in set(nouns) - {old}:
            expected[before + new + after] += 1 / 4 / (len(nouns) - 1)
    assert {text: float(share) for text, share in exact.items()} == pytest.approx(dict(expected))


def test_word_lists_hold_a_word_once():
    for words in word_lists.WORD_LISTS.values():
        assert len(set(words)) == len(words) and all(words)


# ---------------------------------------------------------------------------------------------------------------------
# The transform


class Known:
    """Annotations of some captions."""

    def __init__(self, *annotations: Annotation):
        self._annotations = {annotation.caption: annotation for annotation in annotations}

    def find(self, shard: str, caption: str) -> Annotation:
        return self._annotations[caption]


def transform(kinds, annotations=None, length: int = 16, **options) -> Negatives:
    options = {"fields": ("caption",), "splitting": "whole", "count": 1, "max_merged": 1, **options}
    return Negatives(tuple(kinds), Captions(CaptionOptions(**options), tokenizer.Tokenizer(length)), annotations)


def sample(fields: dict, epoch: int = 0) -> Sample:
    return Sample(Record("key", "shard", b"", json.dumps(fields).encode()), seed=1, epoch=epoch, number=0)


def test_transform_masks_what_a_caption_lacks():
    annotation = Annotation("a dog sees a cat", negatives.tokenize("a dog sees a cat").words, [[(2, 5), (13, 16)]])
    made = transform(negatives.FSC_CLIP, Known(annotation))(sample({"caption": annotation.caption}))
    tokens, valid = made["texts/negatives"], made["valid/negatives"]
    assert tokens.shape == (3, 16) and tokens.dtype == np.int32 and valid.dtype == bool
    assert valid.tolist() == [True, False, True]
    swapped, original = tokenizer.Tokenizer(16)(["a cat sees a dog", annotation.caption])
    assert (tokens[0] == swapped).all() and (tokens[1] == original).all() and (tokens[2] != original).any()


def test_negatives_follow_from_the_sample_and_differ_between_epochs():
    draw = transform(("ngram_shuffle_2",))
    fields = {"caption": "one two three four five six seven eight nine ten"}
    first, again, later = (draw(sample(fields, epoch))["texts/negatives"] for epoch in (0, 0, 1))
    assert (first == again).all() and (first != later).any()


def test_negative_with_the_tokens_of_the_caption_is_not_valid():
    """Nouns of another case, and a swap that the cut leaves out: to the model they are the caption itself."""
    same = Annotation("A dog, a Dog", [], [[(2, 5), (9, 12)]])
    assert not transform(("negclip",), Known(same))(sample({"caption": same.caption}))["valid/negatives"].any()
    late = Annotation("one two three four five six seven eight", [], [[(28, 33), (34, 39)]])
    for length, valid in ((5, False), (16, True)):
        made = transform(("negclip",), Known(late), length)(sample({"caption": late.caption}))
        assert made["valid/negatives"].tolist() == [valid]


def test_listed_negatives_belong_to_the_drawn_caption():
    fields = {"caption": ["a cat", "a dog", "a cow"], "neg_caption": [["no cat"], ["no dog", "nor dog"], []]}
    draw = transform(("csv_negclip",))
    seen = collections.defaultdict(set)
    for epoch in range(40):
        made = draw(sample(fields, epoch))
        caption = draw.captions.draw(sample(fields, epoch))[0]
        seen[caption].add((made["texts/negatives"].tobytes(), bool(made["valid/negatives"][0])))
    tokens = {text: tokenizer.Tokenizer(16)(text).tobytes() for text in ("no cat", "no dog", "nor dog", "a cow")}
    assert seen == {
        "a cat": {(tokens["no cat"], True)},
        "a dog": {(tokens["no dog"], True), (tokens["nor dog"], True)},
        "a cow": {(tokens["a cow"], False)},
    }


@pytest.mark.parametrize(
    "fields", [{"caption": ["a"]}, {"caption": ["a"], "neg_caption": []}, {"caption": ["a"], "neg_caption": ["b"]}]
)
def test_record_without_listed_negatives_is_skipped(fields):
    with pytest.raises(SampleError, match="neg_caption"):
        transform(("csv_negclip",))(sample(fields))


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        ((), {}, "expected a list"),
        (("negclip", "shuffle"), {}, "has shuffle; choose of negclip"),
        (("negclip",), {"max_merged": 3}, "set captions.max_merged to 1"),
        (("csv_negclip",), {"max_merged": 2}, "set captions.max_merged to 1"),
    ],
)
def test_options_without_meaning_are_refused(kinds, options, message):
    with pytest.raises(ValueError, match=message):
        transform(kinds, **options)
