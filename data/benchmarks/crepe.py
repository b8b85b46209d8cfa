"""CREPE's productivity sets (Ma et al., CVPR 2023): a crop of Visual Genome, its caption and hard negatives."""

import csv
import io
import pathlib

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import AnnotationError, Benchmark, Choice, read_text
from flair_jax.data.benchmarks.compositional import Builder, box_of, literal, texts_of

SIZES = {"atom": 17_698, "swap": 7_405, "negate": 17_303}
COMPLEXITIES = range(4, 13)
COLUMNS = ("image_id", "caption", "x", "y", "width", "height", "hard_negs")


def _paths(kind: str, complexity: int) -> str:
    name = f"{kind}/prod_vg_hard_negs_{kind}_complexity_{complexity}.csv"
    return f"crepe/{name}|crepe/prod_hard_negatives/{name}|crepe/data/prod_hard_negatives/{name}"


FILES = {f"{kind}/complexity_{n}": _paths(kind, n) for kind in SIZES for n in COMPLEXITIES}


def rows_of(file: pathlib.Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a csv file.

    Raises:
      AnnotationError: a column is missing, or a row has too few.
    """
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(io.StringIO(read_text(file)))
    if missing := set(columns) - set(reader.fieldnames or ()):
        raise AnnotationError(f"{file}: no columns {sorted(missing)}; there are {reader.fieldnames}")
    try:
        rows = list(reader)
    except csv.Error as error:
        raise AnnotationError(f"{file}: line {reader.line_num}: {error}") from error
    for number, row in enumerate(rows):
        if any(row[column] is None for column in columns):
            raise AnnotationError(f"{file}: row {number} has too few columns")
    return rows


def read(root: pathlib.Path) -> Choice:
    """Items of all complexities count alike within atom, swap and negate."""

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        for number, row in enumerate(rows_of(file, COLUMNS)):
            where = f"{file}: row {number}"
            try:
                sides = [float(row[name]) for name in ("x", "y", "width", "height")]
                name = f"{int(row['image_id'])}.jpg"
            except ValueError as error:
                raise AnnotationError(f"{where}: {error}") from error
            picture = compositional.visual_genome(root, name, file, "crepe/images", box=box_of(*sides, where))
            negatives = texts_of(literal(row["hard_negs"], where), f"{where}: 'hard_negs'")
            builder.add([picture], [row["caption"], *negatives], group=part)

    return compositional.read_parts(root, FILES, add)


BENCHMARKS = (
    Benchmark(
        name="crepe",
        task="choice",
        title="CREPE (productivity)",
        files=compositional.files(FILES, {}, "vg|visual_genome", count=lambda path: len(rows_of(path, COLUMNS))),
        read=read,
        items=sum(SIZES.values()),
        licence="none stated; images: Visual Genome",
        source="https://github.com/RAIVNLab/CREPE",
        published=compositional.published("crepe"),
        options={"levels": 1},
    ),
)
