"""VL-CheckList (Zhao et al., EMNLP 2022): objects, attributes and relations of HAKE, SWiG, Visual Genome and VAW."""

import pathlib

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import AnnotationError, Benchmark, Choice, Picture, find_folder, inside
from flair_jax.data.benchmarks.compositional import Builder, texts_of
from flair_jax.data.benchmarks.json_files import field, read_json, typed

FIRST = 1000  # items of a file that count
HAKE = "vl_checklist/hake|hake"
SWIG = "vl_checklist/swig|vl_checklist/swig/images_512|swig/images_512|swig"


def _files() -> dict[str, str]:
    """Group of a file -> its path in the release. Means are taken at every level of the group.

    These are the 56 files that `corpus.json` of the release lists.
    """
    found = {}
    for kind, values in (("Location", ("center", "margin", "mid")), ("Size", ("large", "medium", "small"))):
        folder = f"Object/{kind}"
        for value in values:
            group = f"Object/{kind}_{value}"
            for role in ("obj", "subj"):
                found[f"{group}/vg/{role}"] = f"{folder}/vg_{kind.lower()}/vg_{role}_{value}.json"
            for role in ("agent", "destination", "item", "tool"):
                found[f"{group}/swig/{role}"] = f"{folder}/swig_{kind.lower()}/swig_{role}/swig_{role}_{value}.json"
            found[f"{group}/hake"] = f"{folder}/hake_{kind.lower()}/hake_obj_{value}.json"
    for value in ("action", "color", "material", "size", "state"):
        for source in ("vg", "vaw"):
            found[f"Attribute/{value}/{source}"] = f"Attribute/{source}/{value}.json"
    for source, path in (("vg", "vg/action"), ("swig", "swig_action"), ("hake", "hake_action")):
        found[f"Relation/action/{source}"] = f"Relation/{path}.json"
    found["Relation/spatial/vg"] = "Relation/vg/spatial.json"
    return {
        group: f"vl_checklist/{path}|vl_checklist/data/{path}|vl_checklist/{path.replace('vg/', 'vg_')}"
        if group.startswith("Relation")
        else f"vl_checklist/{path}|vl_checklist/data/{path}"
        for group, path in found.items()
    }


FILES = _files()
# Files of the release that `corpus.json` lists in none of its tasks, the last one empty: they are not scored.
UNSCORED = {
    size: "|".join(
        f"vl_checklist/{folder}Object/Size/swig_size/swig_place/swig_place_{size}.json" for folder in ("", "data/")
    )
    for size in ("large", "medium", "small")
}


def read(root: pathlib.Path) -> Choice:
    """The first positive against the first negative text of each of a file's first 1,000 rows; a file may be empty."""
    folders = {"hake": find_folder(root, HAKE), "swig": find_folder(root, SWIG)}

    def locate(source: str, name: str, file: pathlib.Path) -> Picture:
        if source in folders:
            return inside(folders[source], name, file)
        return compositional.visual_genome(root, name, file, "vl_checklist/vg")

    def add(builder: Builder, group: str, file: pathlib.Path) -> None:
        source = group.split("/")[2]
        for number, row in enumerate(typed(read_json(file), list, str(file))[:FIRST]):
            where = f"{file}[{number}]"
            if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
                raise AnnotationError(f"{where} is {str(row)[:60]!r}; expected [image, {{POS, NEG}}]")
            name, texts = row
            right, wrong = (texts_of(field(texts, key, list, where), f"{where}: {key!r}")[0] for key in ("POS", "NEG"))
            builder.add([locate(source, name, file)], [right, wrong], group=group)

    return compositional.read_parts(root, FILES, add)


BENCHMARKS = (
    Benchmark(
        name="vl_checklist",
        task="choice",
        title="VL-CheckList",
        files=(
            *compositional.files(FILES, {}, HAKE, SWIG, "vl_checklist/vg|vg|visual_genome"),
            *compositional.files(UNSCORED, {"small": 0}),
        ),
        read=read,
        licence="none stated; images: of HAKE, SWiG and Visual Genome",
        source="https://github.com/om-ai-lab/VL-CheckList",
        published=compositional.published("vl_checklist"),
    ),
)
