"""The report as tables and sentences, before it is Markdown or HTML."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flair_jax.report.base import Figure, Missing, Published, Result, SetDetails
from flair_jax.report.values import Values, at_chance, by_set, difference, text

# Metrics in the summary, those of them that a set has; where it has none of them, its first one.
MAIN = {
    "retrieval": ("text_to_image_R@1", "image_to_text_R@1"),
    "choice": ("accuracy", "text_score", "image_score", "group_score"),
}
MARK = "*"
AT_CHANCE = "at chance"
UNITS = "Numbers are percentages, except for ranks, which count from 1. A difference is measured minus published."
CHANGES = "Before is what the training started from, after is what it ended with; the difference is after minus before."
NOT_WHOLE = f"{MARK} marks numbers of a set that is not whole, for the reason under its tables. Do not compare them."
_NUMBER = re.compile(r"[-+]?[\d,.]+( to [\d,.]+)?\*?")


class Table(NamedTuple):
    """Cells as text; the first column names the rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone, and are aligned to the right."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.head)
        return [
            bool(number) and any(column) and all(_NUMBER.fullmatch(cell) for cell in column if cell)
            for number, column in enumerate(columns)
        ]


@dataclasses.dataclass(frozen=True)
class Section:
    """One set. `parts`: a table for each metric that there is of classes or of parts of the set."""

    details: SetDetails
    results: Sequence[Result]
    metrics: Table
    published: Table | None
    parts: Sequence[Table]
    at_chance: bool
    figures: Sequence[tuple[str, Figure]]  # with the names of their files

    @property
    def name(self) -> str:
        return f"{self.details.task}/{self.details.set}"

    @property
    def title(self) -> str:
        return self.details.title or self.details.set

    def facts(self) -> list[str]:
        """What was evaluated and whose it is, without the source, which may be a link."""
        counts = [f"{number:,} {name}" for name, number in self.details.counts.items()]
        licence = [f"licence: {self.details.licence}"] if self.details.licence else []
        return counts + licence

    def remarks(self) -> list[str]:
        """Sentences under the tables."""
        remarks = [f"{MARK} {text[0].upper()}{text[1:]}." for text in self.details.reservations()]
        if number := Values.of(self.results).without_images:
            remarks.append(f"{number:,} of the classes have no image and are in no mean.")
        return [*remarks, *self.details.notes]


@dataclasses.dataclass(frozen=True)
class Document:
    """The whole report. `summary`: a table for each task, with the sections that its rows stand for; `figures`: of no
    section; `before`, `changes`: values by name of the weights before a training, and the table that compares them."""

    warnings: Sequence[str]
    notes: Sequence[str]
    summary: Sequence[tuple[str, Table, Sequence[Section]]]
    sections: Sequence[Section]
    missing: Sequence[Missing]
    figures: Sequence[tuple[str, Figure]]
    before: Mapping[str, float]
    changes: Table | None


def document(
    results: Iterable[Result],
    details: Iterable[SetDetails],
    figures: Iterable[Figure],
    notes: Iterable[str],
    missing: Iterable[Missing],
    warnings: Iterable[str],
    before: Mapping[str, float],
) -> Document:
    """Lays out what `report.write` takes."""
    results, details = list(results), list(details)
    known = {(one.task, one.set): one for one in details}
    pictures = _named(figures)
    low, judged = at_chance(results, details)
    sections = []
    for key, group in by_set(results).items():
        about = known.get(key, SetDetails(*key))
        values = Values.of(group)
        own = [(name, figure) for name, figure in pictures if (figure.task, figure.set) == key]
        sections.append(
            Section(about, group, _metrics(about, values), _published(about, values), _parts(about, values),
                    "/".join(key) in low, own)
        )  # fmt: skip
    warnings = list(warnings)
    if low and low == judged:
        sets = "the set that can be judged" if len(low) == 1 else f"all {len(low)} sets that can be judged"
        warnings.append(
            f"Results are at chance level on {sets}: these weights look untrained, or are not this model's."
        )
    missing = list(missing)
    notes = [*notes, UNITS]
    if missing:
        notes.append(f"{len(sections)} sets are evaluated; {len(missing)} are not, and are listed with the reason.")
    if any(section.details.reservations() for section in sections):
        notes.append(NOT_WHOLE)
    tasks = dict.fromkeys(section.details.task for section in sections)
    summary = []
    for task in tasks:
        own = [section for section in sections if section.details.task == task]
        summary.append((task, _summary(task, own), own))
    shown = {(section.details.task, section.details.set) for section in sections}
    others = [(name, figure) for name, figure in pictures if (figure.task, figure.set) not in shown]
    changes = _changes(sections, before)
    if changes:
        notes.append(CHANGES)
    return Document(warnings, notes, summary, sections, missing, others, before, changes)


def _mark(details: SetDetails) -> str:
    return MARK if details.reservations() else ""


def _metrics(details: SetDetails, values: Values) -> Table:
    """A row for each metric, a column for each mode, chance beside."""
    modes, mark = values.modes(), _mark(details)
    kinds = list(dict.fromkeys(kind for chances in values.chance.values() for kind in chances))
    rows = [
        (
            metric,
            *(text(metric, by_mode[mode]) + mark if mode in by_mode else "" for mode in modes),
            *(
                text(metric, values.chance[metric][kind]) if kind in values.chance.get(metric, {}) else ""
                for kind in kinds
            ),
        )
        for metric, by_mode in values.measured.items()
    ]
    return Table((f"{details.task}/{details.set}", *(mode or "value" for mode in modes), *kinds), tuple(rows))


def _published(details: SetDetails, values: Values) -> Table | None:
    """A row for each published number, with the measured one and the difference."""
    rows = []
    for one, measured in compared(details, values):
        ours = "" if measured is None else text(one.metric, measured) + _mark(details)
        apart = "" if measured is None else difference(one.metric, measured, one.value) + _mark(details)
        rows.append((one.model, one.mode, one.metric, ours, text(one.metric, one.value), apart, one.source))
    head = ("published", "mode", "metric", "measured", "published value", "difference", "source")
    return Table(head, tuple(rows)) if rows else None


def compared(details: SetDetails, values: Values) -> Iterator[tuple[Published, float | None]]:
    """Each published number with the measured one of its metric and mode, if there is one; where it names no mode, with
    the one of the first mode."""
    for one in details.published:
        by_mode = values.by_mode(one.metric)
        mode = one.mode if one.mode or "" in by_mode else next(iter(by_mode), "")
        yield one, by_mode.get(mode)


def main_metrics(task: str, values: Values) -> list[str]:
    """Those metrics of a set that stand for it: the task's in `MAIN`, or the first one."""
    return [name for name in MAIN.get(task, ()) if name in values.measured] or list(values.measured)[:1]


def _changes(sections: Sequence[Section], before: Mapping[str, float]) -> Table | None:
    """A row for each main metric and mode that was measured before, too; None: there are none."""
    rows = []
    for section in sections:
        task, mark = section.details.task, _mark(section.details)
        values = Values.of(section.results)
        for metric in main_metrics(task, values):
            for mode, now in values.measured[metric].items():
                then = before.get(Result(task, section.details.set, metric, now, mode).name)
                if then is not None:
                    numbers = (text(metric, then), text(metric, now), difference(metric, now, then))
                    rows.append((f"{task}: {section.title}", mode, metric, *(number + mark for number in numbers)))
    head = ("before and after training", "mode", "metric", "before", "after", "difference")
    return Table(head, tuple(rows)) if rows else None


def _parts(details: SetDetails, values: Values) -> list[Table]:
    tables = []
    for metric, parts in values.parts.items():
        modes = list(dict.fromkeys(mode for by_mode in parts.values() for mode in by_mode))
        modes.sort(key=lambda mode: mode == "chance")
        rows = [
            (part, *(_part(details, metric, mode, by_mode[mode]) if mode in by_mode else "" for mode in modes))
            for part, by_mode in parts.items()
        ]
        tables.append(Table((f"{details.set}: {metric}", *(mode or "value" for mode in modes)), tuple(rows)))
    return tables


def _part(details: SetDetails, metric: str, mode: str, value: float) -> str:
    return text(metric, value) + ("" if mode == "chance" else _mark(details))


def _summary(task: str, sections: Sequence[Section]) -> Table:
    """A row for each set of a task: the main metrics in the set's first mode, with chance and the range of published
    values."""
    rows = []
    for section in sections:
        values = Values.of(section.results)
        first_mode = next(iter(values.modes()), "")
        row = {("set",): section.title, ("mode",): first_mode}
        for metric in main_metrics(task, values):
            by_mode = values.measured[metric]
            value = by_mode.get(first_mode, next(iter(by_mode.values())))
            chance = values.chance.get(metric, {}).get("chance")
            published = [one.value for one in section.details.published if one.metric == metric]
            ends = [text(metric, value) for value in (min(published), max(published))] if published else []
            row[metric, metric] = text(metric, value) + _mark(section.details)
            row[metric, "chance"] = "" if chance is None else text(metric, chance)
            row[metric, "published"] = " to ".join(dict.fromkeys(ends))
        rows.append((row, AT_CHANCE if section.at_chance else ""))
    columns = dict.fromkeys(column for row, _ in rows for column in row)
    columns = [column for column in columns if any(row.get(column) for row, _ in rows)]
    head, cells = [column[-1] for column in columns], [[row.get(column, "") for column in columns] for row, _ in rows]
    if any(remark for _, remark in rows):
        head, cells = [*head, "remark"], [[*row, remark] for row, (_, remark) in zip(cells, rows, strict=True)]
    return Table(tuple(head), tuple(map(tuple, cells)))


def missing_table(missing: Iterable[Missing]) -> Table:
    """A row for each set that was not evaluated."""
    rows = [(one.title or one.set, one.task, one.why(), one.source, one.licence) for one in missing]
    return Table(("not evaluated", "task", "reason", "where to get it", "licence"), tuple(rows))


def _named(figures: Iterable[Figure]) -> list[tuple[str, Figure]]:
    """Figures with file names that are different, and safe on any disk and in any URL."""
    used, named = set(), []
    for figure in figures:
        names = [name for name in (figure.task, figure.set) if name not in figure.title]
        words = re.sub(r"[^A-Za-z0-9-]+", "_", " ".join([*names, figure.title])).strip("_").lower()
        stem, number = words[:80] or "picture", 1
        while (name := stem if number == 1 else f"{stem}_{number}") in used:
            number += 1
        used.add(name)
        named.append((f"{name}.{'jpg' if figure.kind == 'jpeg' else figure.kind}", figure))
    return named
