"""Class names and templates of public sets, and the prompts that are made of them.

The names and templates are those of CLIP's release, as CLIP_benchmark lists them under its names of sets
(https://github.com/LAION-AI/CLIP_benchmark, see NOTICE). A template holds `{c}` where the name of a class belongs.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flair_jax.data.benchmarks.base import AnnotationError, read_text

Classes = Sequence[tuple[str, ...]]  # of each class its name, or its names (synonyms)

SLOT = "{c}"
DESCRIBED = (f"{SLOT},",)  # the template of Menon and Vondrick


@functools.cache
def _file(name: str) -> dict[str, list[str]]:
    return json.loads((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8"))


def class_names(name: str) -> list[tuple[str, ...]]:
    """The classes of a set of CLIP_benchmark, in the order of its labels. Raises ValueError: it lists none."""
    return [(text,) for text in _of_set("class_names.json", name)]


def templates(name: str) -> tuple[str, ...]:
    """The templates of a set of CLIP_benchmark. Raises ValueError: it lists none."""
    return tuple(_of_set("templates.json", name))


def _of_set(file: str, name: str) -> list[str]:
    if name not in _file(file):
        raise ValueError(f"{file} has no set {name!r}; there are {', '.join(_file(file))}")
    return _file(file)[name]


def imagenet_folders(name: str = "imagenet1k") -> list[str]:
    """WordNet ids in the order of ImageNet's labels, the names of its folders; or those of a set of some of its
    classes: imagenet-a, imagenet-o, imagenet-r.
    """
    return _file("imagenet_folders.json")[name]


def from_templates(classes: Classes, templates: Sequence[str]) -> list[list[str]]:
    """Prompts of each class: every name in every template.

    Raises:
      ValueError: there is no template, or one without `{c}`; a class has no name.
    """
    if not templates or any(SLOT not in template for template in templates):
        raise ValueError(f"templates {list(templates)[:5]}; expected one or more, each with {SLOT}")
    if nameless := [number for number, names in enumerate(classes) if not names]:
        raise ValueError(f"classes {nameless[:5]} have no name")
    return [[template.replace(SLOT, name) for name in names for template in templates] for names in classes]


def from_descriptions(
    classes: Classes, descriptions: Mapping[str, Sequence[str]], templates: Sequence[str] = DESCRIBED
) -> list[list[str]]:
    """Prompts of each class with what it looks like (Menon and Vondrick, ICLR 2023): "hen, which has two legs".

    Every name in every template is followed by every description, in the order of the descriptions. A class whose list
    of descriptions is empty has the templates alone, without a comma at their end.

    Args:
      classes: with their names.
      descriptions: see `descriptions_of`.
      templates: texts that a relative clause can follow.

    Raises:
      ValueError: see `descriptions_of` and `from_templates`.
    """
    prompts = []
    described = descriptions_of(classes, descriptions)
    for own, starts in zip(described, from_templates(classes, templates), strict=True):
        clauses = [relative_clause(text) for text in own]
        sentences = [f"{start} {clause}" for clause in clauses for start in starts]
        prompts.append(sentences or [start.rstrip(", ") for start in starts])
    return prompts


def descriptions_of(classes: Classes, descriptions: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The descriptions of each class, in the order of the classes.

    Args:
      classes: with their names.
      descriptions: class -> descriptions. A class is found by any of its names; case and punctuation do not matter. Or
        by its number, where there are as many descriptions as classes and most stand at the number of their class:
        Menon and Vondrick's file for ImageNet calls a few classes by other names than CLIP.

    Raises:
      ValueError: a class is not described, or two descriptions are of the same name.
    """
    described = {_canonical(name): list(texts) for name, texts in descriptions.items()}
    if len(described) < len(descriptions):
        raise ValueError("two of the classes that are described have the same name but for case and punctuation")
    names_of = [[_canonical(name) for name in names] for names in classes]
    keys = list(described)
    ordered = len(keys) == len(classes) and 2 * sum(map(list.__contains__, names_of, keys)) > len(keys)
    found = keys if ordered else [next((name for name in names if name in described), None) for names in names_of]
    if missing := [names[0] for names, key in zip(classes, found, strict=True) if key is None]:
        raise ValueError(
            f"{len(missing)} of {len(classes)} classes are not described, among them {missing[:5]}; there are "
            f"{list(descriptions)[:5]} …. Name the classes as the descriptions do (option names)"
        )
    return [described[key] for key in found]


def relative_clause(description: str) -> str:
    """ "two legs" -> "which has two legs", by the first letters, as the published results were made.

    So "an upright mane" becomes "which is an upright mane", and "canine teeth" becomes "which canine teeth".
    """
    if description.startswith(("a", "used")):
        return f"which is {description}"
    if description.startswith(("has", "often", "typically", "may", "can")):
        return f"which {description}"
    return f"which has {description}"


def _canonical(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.lower()).strip()


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file that a user names.

    Raises:
      AnnotationError: it is no JSON. FileNotFoundError: there is none.
    """
    try:
        return json.loads(read_text(pathlib.Path(path)))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: no JSON: {error}") from error


def read_descriptions(path: str | os.PathLike) -> dict[str, list[str]]:
    """A JSON file {class: [description, …]}, the format of Menon and Vondrick's.

    Raises:
      AnnotationError: it holds something else. FileNotFoundError: there is none.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise AnnotationError(f"{path}: a JSON {type(found).__name__}; expected {{class: [description, …]}}")
    for name, texts in found.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise AnnotationError(f"{path}: class {name!r} has {repr(texts)[:80]}; expected a list of texts")
    return {name: [text for text in texts if text.strip()] for name, texts in found.items()}


def read_names(path: str | os.PathLike) -> list[tuple[str, ...]]:
    """A JSON file with the name, or a list of names, of each class in the order of the labels.

    Raises:
      AnnotationError: it holds something else. FileNotFoundError: there is none.
    """
    try:
        return as_classes(read_json(path))
    except TypeError as error:
        raise AnnotationError(f"{path}: {error}") from error


def as_classes(names: Any) -> list[tuple[str, ...]]:
    """["hen", ["tusker", "elephant"]] -> [("hen",), ("tusker", "elephant")].

    Raises:
      TypeError: it is no list of texts and lists of texts.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{repr(names)[:80]}; expected a list with the name, or a list of names, of each class")
    classes = [tuple(name) if isinstance(name, list | tuple) else (name,) for name in names]
    if wrong := [name for name in classes if not name or not all(isinstance(text, str) for text in name)]:
        raise TypeError(f"the class {repr(wrong[0])[:80]}; expected a name or a list of names")
    return classes
