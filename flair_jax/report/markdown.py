"""The report as Markdown, with columns aligned for the terminal too."""

import re
from collections.abc import Iterable

from flair_jax.report import layout
from flair_jax.report.base import Figure


def render(document: layout.Document) -> str:
    """The text of report.md; pictures are linked as `pictures/NAME`."""
    parts = [f"**{escape(warning)}**\n" for warning in document.warnings]
    parts += _list(document.notes)
    if document.changes:
        parts.append(table(document.changes))
    if len(document.sections) > 1:
        parts += [
            table(summary._replace(head=(f"summary: {task}", *summary.head[1:])))
            for task, summary, _ in document.summary
        ]
    for section in document.sections:
        source = [f"source: {section.details.source}"] if section.details.source else []
        facts = " · ".join([*section.facts(), *source])
        alarm = ["**Results are at chance level.**\n"] if section.at_chance else []
        parts += [
            f"## {escape(f'{section.details.task.capitalize()}: {section.title}')}\n",
            *([escape(facts) + "\n"] if facts else []),
            *alarm,
        ]
        parts += [table(each) for each in (section.metrics, section.published, *section.parts) if each]
        parts += _list(section.remarks())
        parts += _pictures(section.figures)
    parts += _pictures(document.figures)
    if document.missing:
        parts.append(table(layout.missing_table(document.missing)))
    return "\n".join(parts)


def _list(texts: Iterable[str]) -> list[str]:
    # A sign at the start, such as the mark of a set, would begin a list or a heading inside the item.
    items = [re.sub(r"^([*+#>-])", r"\\\1", escape(text)) for text in texts]
    return ["".join(f"- {item}\n" for item in items)] if items else []


def _pictures(figures: Iterable[tuple[str, Figure]]) -> list[str]:
    return [f"![{escape(figure.title)}](pictures/{name})\n" for name, figure in figures]


def table(content: layout.Table) -> str:
    """A table whose columns have one width."""
    cells = [tuple(map(escape, row)) for row in (content.head, *content.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    right = content.numeric()

    def line(row):
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |\n"

    rule = " | ".join("-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True))
    return "".join([line(cells[0]), f"| {rule} |\n", *map(line, cells[1:])])


def escape(text: str) -> str:
    """On one line, with what Markdown would take for a cell's end, HTML or a link escaped."""
    return re.sub(r"([\\|<\[`])", r"\\\1", " ".join(text.split()))
