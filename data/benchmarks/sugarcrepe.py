"""SugarCrepe (Hsieh et al., NeurIPS 2023) and SugarCrepe++ (Dumpala et al., NeurIPS 2024), on COCO val2017."""

import pathlib

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import COCO_IMAGES, Benchmark, Choice, Published, find_folder, inside
from flair_jax.data.benchmarks.compositional import Builder
from flair_jax.data.benchmarks.json_files import field, read_json, typed

SIZES = {
    "add_obj": 2062,
    "add_att": 692,
    "replace_obj": 1652,
    "replace_att": 788,
    "replace_rel": 1406,
    "swap_obj": 245,
    "swap_att": 666,
}
PARTS = {part: f"sugarcrepe/{part}.json|sugarcrepe/data/{part}.json" for part in SIZES}
PLUS_SIZES = {part: size for part, size in SIZES.items() if not part.startswith("add")}
PLUS_PARTS = {part: f"sugarcrepe_pp/{part}.json|sugarcrepe_pp/data/{part}.json" for part in PLUS_SIZES}


def group(part: str) -> str:
    """Items count alike within add, replace and swap, whose means are averaged."""
    return f"{part.split('_')[0]}/{part}"


def read(root: pathlib.Path) -> Choice:
    """One image, a caption and a negative one. The keys of a file are numbers as texts, with gaps."""
    folder = find_folder(root, COCO_IMAGES)

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        for key, row in typed(read_json(file), dict, str(file)).items():
            where = f"{file}: {key!r}"
            picture = inside(folder, field(row, "filename", str, where), file)
            texts = [field(row, name, str, where) for name in ("caption", "negative_caption")]
            builder.add([picture], texts, group=group(part))

    return compositional.read_parts(root, PARTS, add)


def read_plus(root: pathlib.Path) -> Choice:
    """One image, two captions that mean the same, and a negative one close to the first."""
    folder = find_folder(root, COCO_IMAGES)

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        for number, row in enumerate(typed(read_json(file), list, str(file))):
            where = f"{file}[{number}]"
            picture = inside(folder, field(row, "filename", str, where), file)
            texts = [field(row, name, str, where) for name in ("caption", "caption2", "negative_caption")]
            builder.add([picture], texts, positives=2, group=part)

    return compositional.read_parts(root, PLUS_PARTS, add)


BENCHMARKS = (
    Benchmark(
        name="sugarcrepe",
        task="choice",
        title="SugarCrepe",
        files=compositional.files(PARTS, SIZES, COCO_IMAGES),
        read=read,
        items=sum(SIZES.values()),
        licence="MIT; images: COCO",
        source="https://github.com/RAIVNLab/sugar-crepe",
        published=compositional.published("sugarcrepe"),
        options={"levels": 1},
    ),
    Benchmark(
        name="sugarcrepe_pp",
        task="choice",
        title="SugarCrepe++",
        files=compositional.files(PLUS_PARTS, PLUS_SIZES, COCO_IMAGES),
        read=read_plus,
        items=sum(PLUS_SIZES.values()),
        licence="CC-BY-4.0; images: COCO",
        source="https://github.com/Sri-Harsha/scpp",
        published=tuple(
            Published(model, metric, value, compositional.READ_CLIP, "global")
            for model, values in {
                "FSC-CLIP COCO ViT-B/32": (0.679, 0.644),
                compositional.NEGCLIP: (0.650, 0.625),
            }.items()
            for metric, value in zip(("accuracy", "text_to_text_accuracy"), values, strict=True)
        ),
        options={"text_to_text": True},
    ),
)
