"""The report of an evaluation: numbers as JSON, tables in Markdown, and one HTML page with tables and pictures."""

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from flair_jax.atomic import write_whole
from flair_jax.report import layout, markdown, page
from flair_jax.report.base import Figure, Missing, Result, SetDetails, missing_lines
from flair_jax.report.values import Values, at_chance

__all__ = ["Figure", "Missing", "Result", "SetDetails", "at_chance", "flat", "missing_lines", "write"]


def flat(results: Iterable[Result]) -> dict[str, float]:
    """Values by name, in order."""
    return {result.name: result.value for result in results}


def write(
    workdir: str | os.PathLike,
    results: Iterable[Result],
    details: Iterable[SetDetails] = (),
    figures: Iterable[Figure] = (),
    notes: Iterable[str] = (),
    missing: Iterable[Missing] = (),
    warnings: Iterable[str] = (),
    before: Mapping[str, float] | None = None,
) -> str:
    """Writes the report into a folder, which is made if need be:

      report.json: name -> value, see `flat`.
      report_details.json: the same numbers with all that the page says about them, by set.
      report.md: tables.
      report.html: the whole report in one file, which opens from disk.
      pictures/: the figures as files.

    Each file appears whole or not at all, so that it can be written after every evaluator; the numbers come first, for
    a disk that is nearly full. Without results nothing is written: what an earlier evaluation found stays.

    Args:
      workdir: local, or in a store (`gs://`, `s3://`).
      results: in the order of the report. Of two with the same name the last one counts.
      details: of sets among the results.
      figures: of sets among the results; others come last.
      notes: texts for the top, such as what was evaluated.
      missing: sets that were not evaluated.
      warnings: texts for the top, in red. One is added if all results are at chance, see `at_chance`.
      before: values by name, see `flat`, of the weights that a run started from: a table compares the main metrics.

    Returns:
      The text of report.md; empty without results.
    """
    from etils import epath  # evaluators import this module for `Result`, and may run where etils is not installed

    results, workdir = list({result.name: result for result in results}.values()), epath.Path(workdir)
    if not results:
        return ""
    document = layout.document(results, details, figures, notes, missing, warnings, before or {})
    text = markdown.render(document)
    pictures = [pair for section in document.sections for pair in section.figures] + list(document.figures)
    (workdir / "pictures" if pictures else workdir).mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("report.json", _json({result.name: _number(result.value) for result in results})),
        ("report_details.json", _json(_details(document))),
        ("report.md", text),
        ("report.html", page.render(document)),
    ):
        # A name may hold half of a surrogate pair, which has no bytes.
        write_whole(workdir / name, content.encode("utf-8", "backslashreplace"))
    for name, figure in pictures:
        path = workdir / "pictures" / name
        if not path.exists() or path.read_bytes() != figure.data:
            write_whole(path, figure.data)
    return text


def _json(content: Any) -> str:
    numpy_scalar = operator.methodcaller("item")
    return json.dumps(content, indent=2, allow_nan=False, default=numpy_scalar) + "\n"


def _number(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _details(document: layout.Document) -> dict[str, Any]:
    """All of a report but the bytes of its pictures."""
    sets = []
    for section in document.sections:
        details, published = section.details, []
        for one, measured in layout.compared(details, Values.of(section.results)):
            number = {key: getattr(one, key) for key in ("model", "mode", "metric", "value", "source")}
            apart = None if measured is None else measured - one.value
            published.append({**number, "measured": _number(measured), "difference": _number(apart)})
        sets.append(
            {
                **{key: getattr(details, key) for key in ("task", "set", "title", "left_out", "licence", "source")},
                **{key: dict(getattr(details, key)) for key in ("counts", "expected")},
                **{key: list(getattr(details, key)) for key in ("parts", "notes")},
                "reservations": details.reservations(),
                "at_chance": section.at_chance,
                "results": [
                    {"metric": one.metric, "mode": one.mode, "value": _number(one.value)} for one in section.results
                ],
                "published": published,
                "pictures": _pictures(section.figures),
            }
        )
    missing = [
        {key: getattr(one, key) for key in ("task", "set", "title", "reason", "licence", "source")}
        | {"files": list(one.files)}
        for one in document.missing
    ]
    return {
        "warnings": document.warnings,
        "notes": document.notes,
        "sets": sets,
        "before": {name: _number(value) for name, value in document.before.items()},
        "missing": missing,
        "pictures": _pictures(document.figures),
    }


def _pictures(figures: Iterable[tuple[str, Figure]]) -> list[dict[str, str]]:
    return [{"file": f"pictures/{name}", "title": figure.title} for name, figure in figures]
