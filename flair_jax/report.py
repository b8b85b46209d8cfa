"""Results of evaluators, and their report: one flat JSON file and tables in Markdown."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Result:
    """One number of an evaluation.

    Attributes:
      task: "retrieval", "pointing", ….
      set: name of the data set.
      metric: such as "text_to_image_R@1"; "chance" and "chance_…" are what a random answer gets.
      value: a float.
      mode: how the model was used, a column of the set's table; empty where there is one way only.
    """

    task: str
    set: str
    metric: str
    value: float
    mode: str = ""

    @property
    def name(self) -> str:
        """`task/set/mode/metric`, the key in report.json."""
        return "/".join(part for part in (self.task, self.set, self.mode, self.metric) if part)


def flat(results: Iterable[Result]) -> dict[str, float]:
    """Values by name, in order."""
    return {result.name: result.value for result in results}


def write(workdir: str | os.PathLike, results: Iterable[Result]) -> str:
    """Writes `report.json`, flat, and `report.md`, `tables` of the same numbers; makes the folder, returns the tables.

    Without results nothing is written: what an earlier evaluation found stays.
    """
    from etils import epath  # evaluators import this module for `Result`, and may run where etils is not installed

    results, workdir = list(results), epath.Path(workdir)
    if not results:
        return ""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "report.json").write_text(json.dumps(flat(results), indent=2) + "\n")
    text = tables(results)
    (workdir / "report.md").write_text(text)
    return text


def tables(results: Iterable[Result]) -> str:
    """Markdown: a table for each set of a task, a row for each metric, a column for each mode, chance beside."""
    found: dict[str, dict[str, dict[str, float]]] = {}  # set -> metric -> mode -> value
    for result in results:
        rows = found.setdefault(f"{result.task}/{result.set}", {})
        metric, mode = result.metric, result.mode or "value"
        if metric.startswith("chance") and rows:  # of the first metric of the set
            metric, mode = next(iter(rows)), metric.replace("_", " ")
        elif mode == "iou":  # of a class, in a column with the mean over the classes
            metric, mode = f"iou of {metric}", "value"
        rows.setdefault(metric, {})[mode] = result.value
    return "\n".join(_table(title, rows) for title, rows in found.items())


def _table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    modes = list(dict.fromkeys(mode for row in rows.values() for mode in row))
    cells = [
        [title, *modes],
        *[[metric, *[f"{row[mode]:.3f}" if mode in row else "" for mode in modes]] for metric, row in rows.items()],
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    rule = " | ".join("-" * (width - 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
    return "".join(f"| {line} |\n" for line in [lines[0], rule, *lines[1:]])
