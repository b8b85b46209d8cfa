"""One text and several images: ImageCoDe (Krojer et al., ACL 2022) and SVO-Probes (Hendricks and Nematzadeh, 2021)."""

import pathlib
import re

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import (
    AnnotationError,
    Benchmark,
    Choice,
    File,
    Picture,
    find,
    find_folder,
    inside,
)
from flair_jax.data.benchmarks.compositional import Builder
from flair_jax.data.benchmarks.crepe import rows_of
from flair_jax.data.benchmarks.json_files import read_json, typed

IMAGECODE = "imagecode/valid_data.json|imagecode/data/valid_data.json"
IMAGECODE_IMAGES = "imagecode/image-sets|imagecode/images|imagecode/data/image-sets"
IMAGES = 10  # of an ImageCoDe set

SVO = "svo_probes/svo_probes.csv"
SVO_IMAGES = "svo_probes/images"
SVO_COLUMNS = ("sentence", "pos_image_id", "neg_image_id", "subj_neg", "verb_neg", "obj_neg")


def read_imagecode(root: pathlib.Path) -> Choice:
    """The validation set: which of ten frames of a video, or of ten photographs, does a description fit?"""
    file, folder = find(root, IMAGECODE), find_folder(root, IMAGECODE_IMAGES)
    builder = Builder()
    for name, captions in typed(read_json(file), dict, str(file)).items():
        pictures = _image_set(folder, name, file)
        group = "static" if "open-images" in name else "videos"
        for key, caption in typed(captions, dict, f"{file}: {name!r}").items():
            where = f"{file}: {name!r}: {key!r}"
            if not key.isdecimal() or int(key) >= IMAGES:
                raise AnnotationError(f"{where}: expected the number of an image, 0 to {IMAGES - 1}")
            place = int(key)
            ordered = [pictures[place], *pictures[:place], *pictures[place + 1 :]]
            builder.add(ordered, [typed(caption, str, where)], group=group, place=place)
    return builder.build()


def _image_set(folder: pathlib.Path, name: str, file: pathlib.Path) -> list[Picture]:
    """The ten images of a set by the number in their names; img0.jpg to img9.jpg where the folder is not there."""
    own = pathlib.Path(inside(folder, name, file).path)
    names = [f"img{number}.jpg" for number in range(IMAGES)]
    if own.is_dir():
        found = sorted((path.name for path in own.glob("[!.]*.jpg")), key=_number)
        names = found if len(found) == IMAGES else names  # where some are missing, they are called by these names
    return [Picture(str(own / name)) for name in names]


def _number(name: str) -> int:
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else -1


def read_svo(root: pathlib.Path) -> Choice:
    """A sentence, an image of it, and one in which the subject, the verb or the object differs.

    Images are called by their number, such as 12.jpg: the release has their addresses, many of which are dead by now.
    """
    file, folder = find(root, SVO), find_folder(root, SVO_IMAGES)
    builder = Builder()
    for number, row in enumerate(rows_of(file, SVO_COLUMNS)):
        where = f"{file}: row {number}"
        groups = [kind for kind in ("subj_neg", "verb_neg", "obj_neg") if row[kind].strip().lower() == "true"]
        if len(groups) != 1:
            raise AnnotationError(
                f"{where}: {groups or 'none'} of subj_neg, verb_neg and obj_neg is True; expected one"
            )
        pictures = [inside(folder, f"{row[key].strip()}.jpg", file) for key in ("pos_image_id", "neg_image_id")]
        builder.add(pictures, [row["sentence"]], group=groups[0])
    return builder.build()


BENCHMARKS = (
    Benchmark(
        name="imagecode",
        task="choice",
        title="ImageCoDe",
        files=(
            File(IMAGECODE, 2_302, lambda path: sum(map(len, read_json(path).values()))),
            File(IMAGECODE_IMAGES),
        ),
        read=read_imagecode,
        items=2_302,
        licence="see the source; images: MSR-VTT, Video Storytelling, YouCook, Open Images",
        source="https://github.com/McGill-NLP/imagecode",
        published=compositional.published("imagecode"),
        options={"levels": 0},
    ),
    Benchmark(
        name="svo_probes",
        task="choice",
        title="SVO-Probes",
        files=(File(SVO, None, lambda path: len(rows_of(path, SVO_COLUMNS))), File(SVO_IMAGES)),
        read=read_svo,
        licence="CC-BY-4.0; images: of the web",
        source="https://github.com/google-deepmind/svo_probes",
        published=compositional.published("svo_probes"),
    ),
)
