"""Captions of unseen scenes against altered ones: does a model know which attribute belongs to which shape, and where?

A caption says where one shape lies as seen from another, "the large red circle is left of the small blue square". It is
true of one scene of the set only, so that the same captions serve for retrieval. Of each caption there is one altered
copy of each kind; the kinds are those of SugarCrepe (Hsieh et al., NeurIPS 2023) that fit scenes:

    swap_obj     the two shapes exchanged                "the small blue square is left of the large red circle"
    swap_att     their colours or sizes exchanged        "the large blue circle is left of the small red square"
    replace_obj  one shape replaced by another           "the large red ring is left of the small blue square"
    replace_att  one colour or size replaced by another  "the large red circle is left of the small green square"
    replace_rel  the relation replaced by its opposite   "the large red circle is right of the small blue square"

Every altered caption is false: the opposite of its relation holds, or the scene has no such shape.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from flair_jax.data import scenes
from flair_jax.data.benchmarks.base import Item

KINDS = ("swap_obj", "swap_att", "replace_obj", "replace_att", "replace_rel")
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
ATTRIBUTES = {"colour": tuple(scenes.COLOURS), "size": tuple(scenes.SIZES)}


@dataclasses.dataclass(frozen=True)
class Statement:
    """That `first` lies in a relation of `scenes.RELATIONS` to `second`; `wording` numbers the words that say it."""

    first: scenes.Shape
    relation: str
    wording: int
    second: scenes.Shape

    @property
    def text(self) -> str:
        words = scenes.RELATIONS[self.relation][self.wording]
        return f"the {self.first.phrase} is {words} the {self.second.phrase}"


@dataclasses.dataclass(frozen=True)
class CompositionalSet:
    """N unseen scenes, C captions, and one choice item for each altered caption.

    images: uint8 (N, H, W, 3). texts: the C captions, each true of one scene of the set, then the altered ones, each
    once. caption_images: int32 (C,), the scene of each caption. items: one image with its caption and an altered one;
    `group` is one of KINDS.
    """

    images: np.ndarray
    texts: list[str]
    caption_images: np.ndarray
    items: list[Item]


def compositional_set(count: int, seed: int, size: int = 64) -> CompositionalSet:
    """Draws `count` scenes of the evaluation split and their captions; a pure function of its arguments.

    There is a caption for every two shapes of a scene, unless it is true of another scene, too.
    """
    drawn = [scenes.draw(seed, index, size, "evaluation") for index in range(count)]
    holders = collections.defaultdict(dict)  # phrase -> the scenes with such a shape, and their shape
    for index, scene in enumerate(drawn):
        for shape in scene.objects:
            holders[shape.phrase][index] = shape
    captions: dict[str, int] = {}  # text -> scene
    negatives: list[tuple[str, str, str]] = []  # caption, kind, altered caption
    for index, scene in enumerate(drawn):
        rng = np.random.default_rng([seed, scenes.SPLITS.index("evaluation"), index, 1])  # the scene's own is without 1
        for pair in itertools.combinations(scene.objects, 2):
            statement = draw_statement(rng, *pair)
            altered = draw_negatives(rng, statement, scene.objects)
            first, second = holders[statement.first.phrase], holders[statement.second.phrase]
            both = first.keys() & second.keys()
            if sum(statement.relation in scenes.relations(first[each], second[each]) for each in both) == 1:
                captions[statement.text] = index
                negatives += [(statement.text, kind, text) for kind, text in altered.items()]
    numbers = {
        text: number for number, text in enumerate(dict.fromkeys([*captions, *(text for *_, text in negatives)]))
    }
    return CompositionalSet(
        images=np.stack([scene.image for scene in drawn]),
        texts=list(numbers),
        caption_images=np.fromiter(captions.values(), np.int32),
        items=[
            Item((captions[caption],), (numbers[caption], numbers[text]), group=kind)
            for caption, kind, text in negatives
        ],
    )


def draw_statement(rng: np.random.Generator, a: scenes.Shape, b: scenes.Shape) -> Statement:
    """One of the true statements about two shapes of a scene."""
    true = [
        Statement(first, relation, wording, second)
        for first, second in ((a, b), (b, a))
        for relation in scenes.relations(first, second)
        for wording in range(len(scenes.RELATIONS[relation]))
    ]
    return true[rng.integers(len(true))]


def draw_negatives(rng: np.random.Generator, true: Statement, objects: Sequence[scenes.Shape]) -> dict[str, str]:
    """An altered text of each kind of a statement that is true of a scene with these objects.

    A kind is left out where it cannot alter the statement into a false one; of several ways all are equally likely.
    """
    a, b = true.first, true.second
    candidates = {
        "swap_obj": [dataclasses.replace(true, first=b, second=a)],
        "swap_att": [
            dataclasses.replace(true, first=_with(a, name, getattr(b, name)), second=_with(b, name, getattr(a, name)))
            for name in ATTRIBUTES
        ],
        "replace_obj": _replaced(true, "shape", scenes.SHAPES),
        "replace_att": [s for name, values in ATTRIBUTES.items() for s in _replaced(true, name, values)],
        "replace_rel": [dataclasses.replace(true, relation=OPPOSITES[true.relation])],
    }
    present = {o.phrase for o in objects}
    for kind in ("swap_att", "replace_obj", "replace_att"):
        candidates[kind] = [s for s in candidates[kind] if not {s.first.phrase, s.second.phrase} <= present]
    return {kind: found[rng.integers(len(found))].text for kind, found in candidates.items() if found}


def _with(shape: scenes.Shape, name: str, value: str) -> scenes.Shape:
    return dataclasses.replace(shape, **{name: value})


def _replaced(true: Statement, name: str, values: Sequence[str]) -> list[Statement]:
    """A statement with another value of one attribute of either shape."""
    return [
        dataclasses.replace(true, **{side: _with(shape, name, value)})
        for side, shape in (("first", true.first), ("second", true.second))
        for value in values
        if value != getattr(shape, name)
    ]
