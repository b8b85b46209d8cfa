"""JSON annotation files, checked: whatever is not as its release says is named by file and item."""

import json
import pathlib
from typing import Any

from flair_jax.data.benchmarks.base import AnnotationError, read_text

_NAMES = {dict: "an object", list: "a list", str: "a text", int: "an integer"}


def read_json(path: pathlib.Path) -> Any:
    """
    Raises:
      AnnotationError: the file is not JSON.
    """
    return parse(read_text(path), str(path))


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """An object a line; empty lines are left out.

    Raises:
      AnnotationError: naming the line.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [
        typed(parse(line, f"{path} line {number}"), dict, f"{path} line {number}")
        for number, line in lines
        if line.strip()
    ]


def parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise AnnotationError(f"{where}: not JSON ({error})") from error


def field(record: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key in an object, of a given type.

    Raises:
      AnnotationError: naming the place, the key, and what was found.
    """
    if key not in typed(record, dict, where):
        raise AnnotationError(f"{where}: no {key!r}; there are {sorted(record)[:10]}")
    return typed(record[key], kind, f"{where}: {key!r}")


def typed(value: Any, kind: type, where: str) -> Any:
    """Raises AnnotationError unless the value has this type; True and False are no integers."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise AnnotationError(f"{where} is {str(value)[:60]!r}, {type(value).__name__}; expected {_NAMES[kind]}")
    return value
