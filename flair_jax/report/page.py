"""The report as one HTML page: pictures inside, no script, nothing loaded from elsewhere."""

import base64
import re
from collections.abc import Iterable
from html import escape

from flair_jax.report import layout
from flair_jax.report.base import Figure

# The policy makes a browser load nothing, whatever text of a data set would slip through.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Evaluation</title>
<style>
:root { --text: #1d2129; --soft: #5b6472; --back: #fff; --panel: #f5f6f8; --line: #d9dde3; --link: #0b57d0;
  --alarm: #b3131b; --alarm-back: #fdeaea; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa4b2; --back: #14171b; --panel: #1e2228;
  --line: #363c45; --link: #8ab4f8; --alarm: #ff8a85; --alarm-back: #3a1718; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 2rem 0 0; } a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.alarm { color: var(--alarm); font-weight: 600; }
.banner { padding: .6rem 1rem; border: 2px solid var(--alarm); border-radius: .4rem; background: var(--alarm-back); }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal; }
thead th { background: var(--panel); font-weight: 600; vertical-align: bottom; } tbody th { font-weight: 400; }
tbody th, thead th:first-child { position: sticky; left: 0; }
tbody th { background: var(--back); min-width: 7rem; }
td a { display: inline-block; min-width: 10rem; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
</style>
</head>
<body>
"""


def render(document: layout.Document) -> str:
    """The text of report.html."""
    anchors = {section.name: f"set-{number}" for number, section in enumerate(document.sections, 1)}
    parts = [_HEAD, "<h1>Evaluation</h1>\n"]
    parts += [f'<p class="alarm banner">{escape(warning)}</p>\n' for warning in document.warnings]
    parts.append(_list(document.notes, "soft"))
    parts.append(_contents(document))
    parts.append('<h2 id="summary">Summary</h2>\n')
    if document.changes:
        parts.append(_table(document.changes))
    for task, table, sections in document.summary:
        parts.append(f"<h3>{escape(task.capitalize())}</h3>\n")
        parts.append(_table(table, [anchors[section.name] for section in sections]))
    for number, (task, _, sections) in enumerate(document.summary, 1):
        parts.append(f'<h2 id="task-{number}">{escape(task.capitalize())}</h2>\n')
        parts += [_section(section, anchors[section.name]) for section in sections]
    if document.figures:
        parts += ['<h2 id="pictures">Pictures</h2>\n', *(_figure(figure) for _, figure in document.figures)]
    if document.missing:
        parts.append('<h2 id="missing">Not evaluated</h2>\n')
        parts.append(_table(layout.missing_table(document.missing)))
    return "".join([*parts, "</body>\n</html>\n"])


def _contents(document: layout.Document) -> str:
    """Links to the parts of the page; the rows of the summary are links to the sets."""
    links = {"summary": "Summary"}
    links |= {f"task-{number}": task.capitalize() for number, (task, _, _) in enumerate(document.summary, 1)}
    links |= {"pictures": "Pictures"} if document.figures else {}
    links |= {"missing": "Not evaluated"} if document.missing else {}
    items = [f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in links.items()]
    return f"<nav>{' · '.join(items)}</nav>\n"


def _section(section: layout.Section, anchor: str) -> str:
    source = [f"source: {_link(section.details.source)}"] if section.details.source else []
    parts = [f'<section id="{anchor}">\n<h3>{escape(section.title)}</h3>\n']
    if facts := [*map(escape, section.facts()), *source]:
        parts.append(f'<p class="soft">{" · ".join(facts)}</p>\n')
    if section.at_chance:
        parts.append('<p class="alarm">Results are at chance level.</p>\n')
    parts += [_table(table) for table in (section.metrics, section.published) if table]
    parts.append(_list(section.remarks(), "soft"))
    for table in section.parts:
        parts.append(f"<details><summary>{escape(table.head[0])}, {len(table.rows):,} rows</summary>\n")
        parts.append(_table(table) + "</details>\n")
    parts += [_figure(figure) for _, figure in section.figures]
    return "".join([*parts, "</section>\n"])


def _table(table: layout.Table, anchors: Iterable[str] = ()) -> str:
    """A table; with `anchors` the first cell of each row is a link to one."""
    classes = [' class="number"' if number else "" for number in table.numeric()]
    anchors = list(anchors)
    head = "".join(f'<th scope="col"{c}>{_breakable(cell)}</th>' for cell, c in zip(table.head, classes, strict=True))
    rows = []
    for number, (first, *rest) in enumerate(table.rows):
        name = f'<a href="#{anchors[number]}">{_breakable(first)}</a>' if anchors else _breakable(first)
        cells = "".join(f"<td{c}>{_cell(cell)}</td>" for cell, c in zip(rest, classes[1:], strict=True))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>\n')
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>\n{body}\n</table></div>\n'


def _breakable(name: str) -> str:
    """A name that may be broken after each underscore: `text_to_image_R@1` would fill half a phone."""
    return escape(name).replace("_", "_<wbr>")


def _cell(text: str) -> str:
    return f'<span class="alarm">{text}</span>' if text == layout.AT_CHANCE else _link(text)


def _link(text: str) -> str:
    """A text with its web addresses as links: they are followed by hand, never loaded."""
    parts = re.split(r"(https?://[^\s;,]+)", text)  # texts and addresses in turn
    for number, part in enumerate(parts):
        parts[number] = f'<a href="{escape(part)}" rel="noreferrer">{escape(part)}</a>' if number % 2 else escape(part)
    return "".join(parts)


def _list(texts: Iterable[str], style: str) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="{style}">{items}</ul>\n' if items else ""


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.data).decode()
    size = f'width="{figure.width}" height="{figure.height}"'
    image = f'<img src="data:image/{figure.kind};base64,{data}" {size} loading="lazy" alt="{escape(figure.title)}">'
    return f"<figure>{image}\n<figcaption>{escape(figure.title)}</figcaption></figure>\n"
