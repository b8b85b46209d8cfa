"""VALSE (Parcalabescu et al., ACL 2022): a caption against a foil, for six linguistic phenomena and FOIL it."""

import pathlib

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import COCO_IMAGES, Benchmark, Choice, find_folder, inside
from flair_jax.data.benchmarks.compositional import COCO_VAL2014, Builder
from flair_jax.data.benchmarks.json_files import field, read_json, typed

VOTES = 2  # of three annotators, for the caption

VISUAL7W = "valse/visual7w/images|valse/data/visual7w/images|visual7w/images"
SWIG = "valse/actions/images_512|valse/data/actions/images_512|swig/images_512|valse/SWiG/images_512"
COREFERENCE = "valse/coref/release_too_many_is_this_in_color/images|valse/visdial|valse/VisDial_v1.0"
COREFERENCE_HARD = "valse/coref/release_v18/test_images|valse/visdial|valse/VisDial_v1.0"
# Part -> group, rows, items after the vote, folders of its images.
PARTS = {
    "existence": ("existence", 534, 505, VISUAL7W),
    "plurals": ("plurals", 1000, 851, f"valse/plurals/test_images|{COCO_IMAGES}"),
    "counting-hard": ("counting/counting-hard", 1000, 868, VISUAL7W),
    "counting-small-quant": ("counting/counting-small-quant", 1000, 900, VISUAL7W),
    "counting-adversarial": ("counting/counting-adversarial", 756, 691, VISUAL7W),
    "relations": ("relations", 614, 535, f"valse/relations/test_images|{COCO_IMAGES}"),
    "action-replacement": ("action/action-replacement", 779, 648, SWIG),
    "actant-swap": ("action/actant-swap", 1042, 949, SWIG),
    "coreference-standard": ("coreference/coreference-standard", None, 708, COREFERENCE),
    "coreference-hard": ("coreference/coreference-hard", None, 104, COREFERENCE_HARD),
    "foil-it": ("foil-it", None, 943, f"valse/foil-it/images|{COCO_VAL2014}"),
}
FILES = {part: f"valse/{part}.json|valse/data/{part}.json" for part in PARTS}


def read(root: pathlib.Path) -> Choice:
    """Only items whose caption at least two of three annotators found right, as in the paper."""

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        group, *_, folders = PARTS[part]
        folder = find_folder(root, folders)
        for key, row in typed(read_json(file), dict, str(file)).items():
            where = f"{file}: {key!r}"
            if field(field(row, "mturk", dict, where), "caption", int, f"{where}: 'mturk'") < VOTES:
                continue
            picture = inside(folder, field(row, "image_file", str, where), file)
            builder.add([picture], [field(row, name, str, where) for name in ("caption", "foil")], group=group)

    return compositional.read_parts(root, FILES, add)


BENCHMARKS = (
    Benchmark(
        name="valse",
        task="choice",
        title="VALSE",
        files=compositional.files(
            FILES,
            {part: rows for part, (_, rows, _, _) in PARTS.items()},
            *dict.fromkeys(row[3] for row in PARTS.values()),
        ),
        read=read,
        items=sum(items for _, _, items, _ in PARTS.values()),
        licence="MIT; images: of Visual7W, SWiG, COCO and VisDial",
        source="https://github.com/Heidelberg-NLP/VALSE",
        published=compositional.published("valse"),
    ),
)
