"""What'sUp (Kamath et al., EMNLP 2023): prepositions of place, in controlled photographs, COCO and Visual Genome."""

import pathlib

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import COCO_IMAGES, AnnotationError, Benchmark, Choice, find_folder, inside
from flair_jax.data.benchmarks.compositional import Builder, texts_of
from flair_jax.data.benchmarks.json_files import field, read_json, typed

# Part -> file, items, folders of its images.
PARTS = {
    "WhatsUp_A": ("controlled_images_dataset.json", 412, "whatsup/controlled_images|whatsup/data/controlled_images"),
    "WhatsUp_B": ("controlled_clevr_dataset.json", 408, "whatsup/controlled_clevr|whatsup/data/controlled_clevr"),
    "COCO_QA_ONE": ("coco_qa_one_obj.json", 2_247, f"whatsup/val2017|whatsup/data/val2017|{COCO_IMAGES}"),
    "COCO_QA_TWO": ("coco_qa_two_obj.json", 440, f"whatsup/val2017|whatsup/data/val2017|{COCO_IMAGES}"),
    "VG_QA_ONE": ("vg_qa_one_obj.json", 1_160, "whatsup/vg_images|whatsup/data/vg_images"),
    "VG_QA_TWO": ("vg_qa_two_obj.json", 291, "whatsup/vg_images|whatsup/data/vg_images"),
}
FILES = {part: f"whatsup/{name}|whatsup/data/{name}" for part, (name, _, _) in PARTS.items()}
OPPOSITES = {
    "left": "left or right",
    "right": "left or right",
    "on": "on or under",
    "under": "on or under",
    "in-front": "in front or behind",
    "behind": "in front or behind",
}


def read(root: pathlib.Path) -> Choice:
    """The first caption is true. Of the controlled photographs pairs of opposites and sets of four are counted too."""

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        folder = find_folder(root, PARTS[part][2])
        for number, row in enumerate(typed(read_json(file), list, str(file))):
            where = f"{file}[{number}]"
            if part.startswith("WhatsUp"):
                name = field(row, "image_path", str, where).rpartition("/")[2]
                texts = texts_of(field(row, "caption_options", list, where), f"{where}: 'caption_options'")
                builder.add([inside(folder, name, file)], texts, group=part, joint=_joint(name, where))
                continue
            if not isinstance(row, list) or len(row) != 3:
                raise AnnotationError(f"{where} is {str(row)[:60]!r}; expected [image, true caption, false caption]")
            key = str(row[0])
            name = f"{key.zfill(12) if part.startswith('COCO') else key}.jpg"
            builder.add([inside(folder, name, file)], texts_of(row[1:], where), group=part)

    return compositional.read_parts(root, FILES, add)


def _joint(name: str, where: str) -> tuple[tuple[str, str], ...]:
    """Of an image such as mug_left_of_table.jpeg: the pair "mug table, left or right" and the set "mug table"."""
    words = name.rpartition(".")[0].split("_")
    if len(words) < 3 or words[1] not in OPPOSITES:
        raise AnnotationError(
            f"{where}: image {name!r}; expected object_preposition_…_object, one of {list(OPPOSITES)}"
        )
    objects = f"{words[0]} {words[-1]}"
    return ("pair", f"{objects}, {OPPOSITES[words[1]]}"), ("set", objects)


BENCHMARKS = (
    Benchmark(
        name="whatsup",
        task="choice",
        title="What'sUp",
        files=compositional.files(
            FILES,
            {part: items for part, (_, items, _) in PARTS.items()},
            *dict.fromkeys(row[2] for row in PARTS.values()),
        ),
        read=read,
        items=sum(items for _, items, _ in PARTS.values()),
        licence="MIT; images: own, COCO and Visual Genome",
        source="https://github.com/amitakamath/whatsup_vlms",
        published=compositional.published("whatsup"),
    ),
)
