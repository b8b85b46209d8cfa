"""The table of all evaluation sets, and what of them lies under a folder.

python -m flair_jax.data.benchmarks                            # the table
python -m flair_jax.data.benchmarks --root DIR [--json FILE]   # per set and file: there, items counted and expected
"""

import argparse
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flair_jax.data.benchmarks import clip_benchmark, table
from flair_jax.data.benchmarks.base import AnnotationError, Benchmark, File, MissingError, find

COUNTS = ("images", "texts", "classes", "items")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def overview(benchmarks: Iterable[Benchmark]) -> str:
    """Markdown: a table per task, a row per set."""
    by_task: dict[str, list[Benchmark]] = {}
    for benchmark in benchmarks:
        by_task.setdefault(benchmark.task, []).append(benchmark)
    head = ("set", "as papers call it", *COUNTS, "licence", "where to get it", "published")
    parts = []
    for task, sets in by_task.items():
        rows = [
            (
                benchmark.name,
                benchmark.title,
                *(_number(getattr(benchmark, name)) for name in COUNTS),
                benchmark.licence,
                benchmark.source,
                _published(benchmark),
            )
            for benchmark in sets
        ]
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
        parts.append(f"## {task}, {len(sets)} sets\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _published(benchmark: Benchmark) -> str:
    """Published numbers, those of one source together."""
    by_source: dict[str, list[str]] = {}
    for entry in benchmark.published:
        value = f"{100 * entry.value:.1f}" if abs(entry.value) <= 1 else f"{entry.value:g}"
        by_source.setdefault(entry.source, []).append(f"{entry.model} {entry.metric} {value}")
    return "; ".join(f"{', '.join(values)} ({source})" for source, values in by_source.items())


# ---------------------------------------------------------------------------------------------------------------------
# What lies under a root


def inspect(benchmark: Benchmark, root: pathlib.Path) -> dict[str, Any]:
    """What of a set is under a root, as JSON has it.

    Returns:
      state: "there", "partly there" (parts of the annotations, or images, are not), "missing" or "broken".
      files: of each its path (the one found, or all that would do), there, items and expected (None: not counted, not
        published), optional, error.
      counts, expected: of `Data.counts` and the release; differs: names of counts that are not as expected.
      pictures: how many there are, and of how many, or None where no annotation can be read.
      parts, missing, error, task, title, licence, source.
    """
    files = [_inspect_file(file, root) for file in benchmark.files]
    found = {
        "task": benchmark.task,
        "title": benchmark.title,
        "state": "missing",
        "files": files,
        "counts": {},
        "expected": benchmark.expected(),
        "differs": [],
        "pictures": None,
        "parts": [],
        "missing": [],
        "error": None,
        "licence": benchmark.licence,
        "source": benchmark.source,
    }
    try:
        data = benchmark.read(root)
        there = sum(picture.exists() for picture in data.pictures)
    except MissingError as error:
        return found | {"missing": list(error.files)}
    except (AnnotationError, OSError) as error:
        return found | {"state": "broken", "error": str(error)}
    except Exception as error:  # a fault of the reader must not hide the other sets
        return found | {"state": "broken", "error": f"{type(error).__name__}: {error}"}
    counts = data.counts()
    differs = [name for name, count in found["expected"].items() if counts.get(name) != count]
    whole = there == len(data.pictures) and not data.parts and not differs
    return found | {
        "state": "there" if whole else "partly there",
        "counts": counts,
        "differs": differs,
        "pictures": {"there": there, "of": len(data.pictures)},
        "parts": list(data.parts),
    }


def _inspect_file(file: File, root: pathlib.Path) -> dict[str, Any]:
    row = {"path": file.path, "there": False, "items": None, "expected": file.items, "optional": file.optional}
    try:
        path = find(root, file.path)
    except MissingError:
        return row | {"error": None}
    row |= {"path": str(path.relative_to(root)), "there": True, "error": None}
    if file.count is not None:
        try:
            row["items"] = file.count(path)
        except Exception as error:  # whatever a broken file makes of the count
            row["error"] = f"{type(error).__name__}: {error}"
    return row


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Text: a paragraph per set of which something is there, and the names of the others.

    `!` marks counts that are not as the release has them, files that are missing, and what is broken.
    """
    lines, nothing = [], []
    for name, row in found.items():
        if row["state"] == "missing" and not any(file["there"] for file in row["files"]):
            nothing.append(name)
            continue
        lines.append(f"{name} ({row['task']}): {row['state']}")
        if row["error"]:
            lines.append(f"  ! {row['error']}")
        if row["missing"]:
            lines.append(f"  ! not found: {', '.join(row['missing'])}")
        if row["counts"]:
            counts = [_compare(what, count, row["expected"].get(what)) for what, count in row["counts"].items()]
            lines.append(f"  {', '.join(counts)}")
        if row["pictures"] and row["pictures"]["there"] < row["pictures"]["of"]:
            lines.append(f"  ! {row['pictures']['there']:,} of {row['pictures']['of']:,} image files are there")
        if row["parts"]:
            lines.append(f"  ! read in part: {', '.join(row['parts'])}")
        for file in row["files"]:
            state = "there  " if file["there"] else "missing"
            counted = "" if file["items"] is None else f"  {_compare('items', file['items'], file['expected'])}"
            error = f"  ! {file['error']}" if file["error"] else ""
            mark = "!" if not file["there"] and not file["optional"] else " "
            lines.append(f"  {mark} {state} {file['path']}{counted}{error}")
        if row["state"] != "there":
            lines.append(f"    from {row['source']} ({row['licence']})")
    if nothing:
        lines.append(f"nothing is there of {len(nothing)} sets: {', '.join(nothing)}")
    return "\n".join(lines) + "\n"


def _compare(what: str, count: int, expected: int | None) -> str:
    if expected is None:
        return f"{count:,} {what}"
    return f"{count:,} {what}" + (" as published" if count == expected else f" (! published: {expected:,})")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flair_jax.data.benchmarks", description="Evaluation sets.")
    parser.add_argument("--root", type=pathlib.Path, help="folder with a folder per set: say what of them is there")
    parser.add_argument("--json", type=pathlib.Path, help="with --root: write the same as JSON to this file")
    parsed = parser.parse_args(arguments)
    if parsed.root is None:
        if parsed.json is not None:
            parser.error("--json needs --root")
        print(overview(table.ALL.values()), end="")
        return
    if not parsed.root.is_dir():
        parser.error(f"--root {parsed.root}: no such folder")
    if parsed.json is not None and (parsed.json.is_dir() or not parsed.json.parent.is_dir()):
        parser.error(f"--json {parsed.json}: is a folder, or in a folder that is not there")
    benchmarks = dict(table.ALL)
    for entry in clip_benchmark.unlisted(parsed.root):
        # A folder may be called as a set of the table: such as "cifar10", the release's own form.
        benchmarks[entry.source if entry.name in table.ALL else entry.name] = entry
    found = {name: inspect(benchmark, parsed.root) for name, benchmark in benchmarks.items()}
    print(summary(found), end="")
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
