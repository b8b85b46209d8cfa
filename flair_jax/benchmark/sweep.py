"""`train` over several settings: the table that a default is chosen by."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from flair_jax.benchmark import train

COLUMNS = ("images_per_second", "mfu", "memory_mb", "compile_seconds")


def measure(config: Mapping[str, Any], vary: Sequence[str], **options) -> dict[str, Any]:
    """Runs `train.measure` for every combination of some settings, and prints a table of them in Markdown.

    A side that fails, for want of memory as a rule, leaves its row empty; the twin is measured once a `batch_size`.

    Args:
      config: of a run.
      vary: "key=value,value,…" each, keys of the config with dots.
      options: of `train.measure`.

    Returns:
      `best_images_per_second` and the settings that gave it, and of each side of the twin its own best, and
      `ratio_best_…`.
    """
    names = [change.partition("=")[0] for change in vary]
    choices = [[_value(word) for word in change.partition("=")[2].split(",")] for change in vary]
    beside = options.pop("beside", ())
    columns = [*COLUMNS, *(f"{side}_images_per_second" for side in beside)]
    print("| " + " | ".join([*names, *columns]) + " |")
    print("|" + " --- |" * len(names) + " ---: |" * len(columns))
    rows, measured = [], set()
    for values in itertools.product(*choices):
        changed = ConfigDict(config)
        for name, value in zip(names, values, strict=True):
            change(changed, name, value)
        sides = () if changed.batch_size in measured else beside
        measured.add(changed.batch_size)
        row = {}
        for part in (*((side,) for side in sides), ()):
            if row and not part:  # ours alone only where no side of the twin could do it
                break
            try:
                row |= train.measure(changed.to_dict(), beside=part, **options)
            except RuntimeError as error:
                print(f"<!-- {values} {part}: {error} -->")
        rows.append((values, row))
        cells = [f"{row[name]:,.3g}" if name in row else "" for name in columns]
        print("| " + " | ".join([*map(str, values), *cells]) + " |", flush=True)
    figures = {}
    for name in ("images_per_second", *(f"{side}_images_per_second" for side in beside)):
        found = [(row[name], values) for values, row in rows if name in row]
        if found:
            best, values = max(found)
            figures |= {f"best_{name}": best, f"settings_of_best_{name}": str(dict(zip(names, values, strict=True)))}
    for side in beside:
        if f"best_{side}_images_per_second" in figures and "best_images_per_second" in figures:
            figures[f"ratio_best_{side}"] = (
                figures["best_images_per_second"] / figures[f"best_{side}_images_per_second"]
            )
    return figures


def change(config: ConfigDict, name: str, value: Any) -> None:
    """Sets a key, dotted, that the config has; raises KeyError for another."""
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    if key not in config:
        raise KeyError(f"the config has no key {name}")
    config[key] = value


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"None": None, "True": True, "False": False}.get(word, word)
