"""COCO and Flickr30k captions, and the sets of single sentences, DOCCI-FG and IIW-FG.

Formats, rules and counts: `spec/flair.md` 3.1 and 3.2, `spec/evaluation.md`.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from flair_jax.data.benchmarks.base import (
    COCO_IMAGES,
    AnnotationError,
    Benchmark,
    File,
    MissingError,
    Picture,
    Published,
    Retrieval,
    find,
    find_folder,
    inside,
)
from flair_jax.data.benchmarks.json_files import field, read_json, read_json_lines, typed
from flair_jax.data.transforms import captions, windows

Row = tuple[Picture, Sequence[str]]  # an image and its texts


def gather(file: pathlib.Path, rows: Iterable[Row], parts: tuple[str, ...] = ()) -> Retrieval:
    """A retrieval set out of images with their texts. A text may be empty: one of Urban-1k is.

    Raises:
      AnnotationError: an image stands twice, or has no text; or there is no image at all.
    """
    pictures, texts, owners, seen = [], [], [], set()
    for picture, own in rows:
        if picture.path in seen:
            raise AnnotationError(f"{file}: image {picture.path} is named twice")
        if not own:
            raise AnnotationError(f"{file}: image {picture.path} has no text")
        seen.add(picture.path)
        owners += [len(pictures)] * len(own)
        texts += own
        pictures.append(picture)
    if not pictures:
        raise AnnotationError(f"{file}: no image with texts")
    return Retrieval(pictures, texts, np.asarray(owners), parts=parts)


# ---------------------------------------------------------------------------------------------------------------------
# COCO and Flickr30k

COCO_VAL2017 = "coco/annotations/captions_val2017.json|coco/captions_val2017.json"
COCO_2014 = "coco/images/val2014|coco/val2014"
COCO_KARPATHY = "|".join(
    f"coco/{folder}{name}.json"
    for name in ("coco_karpathy_test", "dataset_coco")
    for folder in ("annotations/", "", "karpathy/")
)
FLICKR_NATIVE = "flickr30k/dataset_flickr30k.json|flickr30k/annotations/dataset_flickr30k.json"
FLICKR_IMAGES = "flickr30k/flickr30k-images|flickr30k/images|flickr30k/flickr30k_images|flickr30k-images"


def read_coco_val2017(root: pathlib.Path) -> Retrieval:
    """COCO's own file, in the order of its images; all captions count, 5 to 7 an image."""
    file, folder = find(root, COCO_VAL2017), find_folder(root, COCO_IMAGES)
    content = read_json(file)
    own: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    for number, image in enumerate(field(content, "images", list, str(file))):
        where = f"{file}: images[{number}]"
        key = field(image, "id", int, where)
        if key in own:
            raise AnnotationError(f"{where}: id {key} stands twice")
        own[key], names[key] = [], field(image, "file_name", str, where)
    for number, annotation in enumerate(field(content, "annotations", list, str(file))):
        where = f"{file}: annotations[{number}]"
        key = field(annotation, "image_id", int, where)
        if key not in own:
            raise AnnotationError(f"{where}: there is no image {key}")
        own[key].append(field(annotation, "caption", str, where))
    return gather(file, ((inside(folder, names[key], file), texts) for key, texts in own.items()))


def read_coco_karpathy(root: pathlib.Path) -> Retrieval:
    """Karpathy's test split of COCO 2014.

    Where the images of 2014 are not there, those of 2017 serve: the same ones, under other names in other folders.
    """
    file = find(root, COCO_KARPATHY)
    first = find_folder(root, COCO_2014)
    moved = [] if first.exists() else [root / f"coco/{folder}" for folder in ("images/val2017", "val2017")]
    moved += [] if first.exists() else [root / f"coco/{folder}" for folder in ("images/train2017", "train2017")]
    moved = [folder for folder in moved if folder.exists()]

    def locate(name: str) -> Picture:
        picture = inside(first, name.removeprefix("val2014/"), file)
        candidates = [Picture(str(folder / name.rpartition("_")[2])) for folder in moved]
        return next((candidate for candidate in candidates if candidate.exists()), picture)

    return gather(file, ((locate(name), texts) for name, texts in _karpathy(file, "test")))


def read_flickr30k(root: pathlib.Path, split: str) -> Retrieval:
    """Flickr30k, from the reference's list of one split or from Karpathy's file of all of them."""
    file, folder = find(root, _flickr_files(split)), find_folder(root, FLICKR_IMAGES)
    rows = _karpathy(file, split)
    return gather(file, ((inside(folder, name.removeprefix("flickr30k-images/"), file), texts) for name, texts in rows))


def _flickr_files(split: str) -> str:
    names = (f"flickr30k_{split}.json", f"annotations/flickr30k_{split}.json")
    own = "|".join(f"{folder}/{name}" for folder in ("flickr30k", "flickr30k-images") for name in names)
    return f"{own}|{FLICKR_NATIVE}"


def _karpathy(file: pathlib.Path, split: str) -> Iterator[tuple[str, list[str]]]:
    """Names of the images of a split and their texts, from either format.

    A list of {image, caption: […]}, as BLIP and the reference have it, is one split. An object with `images`, each with
    its split and sentences, is Karpathy's own.
    """
    content = read_json(file)
    if isinstance(content, list):
        for number, record in enumerate(content):
            where = f"{file}[{number}]"
            texts = field(record, "caption", list, where)
            yield field(record, "image", str, where), [typed(text, str, f"{where}: a caption") for text in texts]
        return
    for number, record in enumerate(field(content, "images", list, str(file))):
        where = f"{file}: images[{number}]"
        if field(record, "split", str, where) == split:
            sentences = field(record, "sentences", list, where)
            yield field(record, "filename", str, where), [field(text, "raw", str, where) for text in sentences]


def count_records(path: pathlib.Path) -> int:
    """Texts of an annotation file in one of the formats above; of Karpathy's own, of all splits."""
    content = read_json(path)
    if isinstance(content, list):
        return sum(len(record["caption"]) if isinstance(record["caption"], list) else 1 for record in content)
    if "annotations" in content:
        return len(content["annotations"])
    return sum(len(record["sentences"]) for record in content["images"])


# ---------------------------------------------------------------------------------------------------------------------
# DOCCI

DOCCI_NATIVE = "docci/docci_descriptions.jsonlines|docci/annotations/docci_descriptions.jsonlines"
DOCCI_GOAL = "docci/docci_test_goal.json"
DOCCI_SENTENCES = "docci/annotations/test_annotations.json|docci/test_annotations.json"
DOCCI_IMAGES = "docci/images|docci/test_images"


def read_docci(root: pathlib.Path) -> Retrieval:
    """The descriptions of DOCCI's test images, as they stand."""
    return _read_docci(root, lambda text: [text])


def read_docci_sentences(root: pathlib.Path) -> Retrieval:
    """DOCCI-FG: every sentence is a text. The reference's file of sentences is read where the descriptions are not."""
    try:
        return _read_docci(root, windows.sentences)
    except MissingError as missing:
        try:
            file = find(root, DOCCI_SENTENCES)
        except MissingError:
            raise missing from None
        folder = find_folder(root, DOCCI_IMAGES)
        return read_sentences(file, lambda name: inside(folder, name, file))


def _read_docci(root: pathlib.Path, texts_of: Callable[[str], list[str]]) -> Retrieval:
    """From DOCCI's own lines, or from GOAL's list of {filename, caption}; rows of other splits are left out."""
    file, folder = find(root, DOCCI_NATIVE, DOCCI_GOAL), find_folder(root, DOCCI_IMAGES)
    rows = []
    if file.suffix == ".jsonlines":
        for number, record in enumerate(read_json_lines(file), 1):
            where = f"{file}: record {number}"
            if field(record, "split", str, where) == "test":
                rows.append((field(record, "image_file", str, where), field(record, "description", str, where)))
    else:
        for number, record in enumerate(typed(read_json(file), list, str(file))):
            name = field(record, "filename", str, f"{file}[{number}]").rpartition("/")[2]
            if name.startswith("test_"):  # qual_test_… is another split
                rows.append((name, field(record, "caption", str, f"{file}[{number}]")))
    return gather(file, ((inside(folder, name, file), texts_of(text)) for name, text in rows))


# ---------------------------------------------------------------------------------------------------------------------
# ImageInWords, and the format of sentences

IIW_PARTS = {  # part -> its folder of images in the reference, and other ones
    "DOCCI_Test": ("docci", "iiw/docci|imageinwords/docci|docci/images"),
    "IIW-400": ("docci_aar", "iiw/docci_aar|imageinwords/docci_aar|docci/images_aar|docci/docci_aar"),
    "DCI_Test": ("dci", "iiw/dci|imageinwords/dci|dci/densely_captioned_images/photos|dci/photos"),
}
IIW_SENTENCES = "|".join(
    f"{folder}/{name}"
    for folder in ("iiw", "imageinwords")
    for name in ("test_annotations.json", "finegrained_test_annotations.json")
)


def iiw_file(part: str) -> str:
    folders = ("iiw", "iiw/datasets", "imageinwords", "imageinwords/datasets")
    return "|".join(f"{folder}/{part}/data.jsonl" for folder in folders)


def rejoined(text: str) -> list[str]:
    """A long text as the reference gives it to the tokenizer: its sentences joined again, as one text."""
    return [captions.join(captions.split(text))]


def read_iiw(root: pathlib.Path, texts_of: Callable[[str], list[str]] = rejoined) -> Retrieval:
    """Descriptions of ImageInWords, in the order of the reference.

    Raises:
      MissingError: none of the three parts is there. AnnotationError: one is broken.
    """
    rows, found, missing = [], [], []
    for part in IIW_PARTS:
        try:
            file = find(root, iiw_file(part))
        except MissingError as error:
            missing += error.files
            continue
        found.append(part)
        for number, record in enumerate(read_json_lines(file), 1):
            where = f"{file}: record {number}"
            name = field(record, "image" if "image" in record else "image/key", str, where)
            name = name if name.endswith(".jpg") else f"{name}.jpg"
            rows.append((_iiw_picture(root, part, name, file), texts_of(field(record, "IIW", str, where))))
    if not found:
        raise MissingError(missing)
    return gather(file, rows, tuple(found) if missing else ())


def read_iiw_sentences(root: pathlib.Path) -> Retrieval:
    """IIW-FG by the rule of spec 3.2, or from the reference's file where parts of the release are not there."""
    try:
        found, error = read_iiw(root, windows.sentences), None
        if not found.parts:
            return found
    except MissingError as missing:
        found, error = None, missing
    try:
        file = find(root, IIW_SENTENCES)
    except MissingError:
        if found is None:
            raise error from None
        return found
    part_of = {folder: part for part, (folder, _) in IIW_PARTS.items()}

    def locate(name: str) -> Picture:
        folder, _, rest = name.partition("/")
        if folder not in part_of:
            raise AnnotationError(f"{file}: image {name!r} lies in none of the folders {sorted(part_of)}")
        return _iiw_picture(root, part_of[folder], rest, file)

    return read_sentences(file, locate)


def _iiw_picture(root: pathlib.Path, part: str, name: str, file: pathlib.Path) -> Picture:
    return inside(find_folder(root, IIW_PARTS[part][1]), name, file)


def read_sentences(file: pathlib.Path, locate: Callable[[str], Picture]) -> Retrieval:
    """The reference's format: {annotations: [{image, image_id, caption}]}, the sentences of an image in succession.

    Args:
      locate: name of an image -> its picture.

    Raises:
      AnnotationError: two images have one id, or one image two ids.
    """
    own: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    for number, record in enumerate(field(read_json(file), "annotations", list, str(file))):
        where = f"{file}: annotations[{number}]"
        key, name = field(record, "image_id", int, where), field(record, "image", str, where)
        if names.setdefault(key, name) != name:
            raise AnnotationError(f"{where}: image_id {key} is that of {names[key]!r}, and here of {name!r}")
        own.setdefault(key, []).append(field(record, "caption", str, where))
    return gather(file, ((locate(names[key]), texts) for key, texts in own.items()))


# ---------------------------------------------------------------------------------------------------------------------
# The table

README = "FLAIR's README"


def recall_at_1(
    source: str, mode: str, models: Mapping[str, tuple[float | None, float | None]]
) -> tuple[Published, ...]:
    """Published numbers, in percent by model: text to image, image to text."""
    return tuple(
        Published(model, f"{direction}_R@1", round(value / 100, 6), source, mode)
        for model, values in models.items()
        for direction, value in zip(("text_to_image", "image_to_text"), values, strict=True)
        if value is not None
    )


def _flair(source: str, **models: tuple[float | None, float | None]) -> tuple[Published, ...]:
    return recall_at_1(source, "flair", {f"FLAIR {model}": values for model, values in models.items()})


IIW_FILES = tuple(
    File(iiw_file(part), count, lambda path: len(read_json_lines(path)), optional=True)
    for part, count in (("DOCCI_Test", 100), ("IIW-400", 400), ("DCI_Test", 112))
)
IIW_IMAGES = tuple(File(folders) for _, folders in IIW_PARTS.values())
FLICKR_SOURCE = "https://shannon.cs.illinois.edu/DenotationGraph/"
KARPATHY_SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
OPENAI = "OpenAI CLIP ViT-B/16"
CLIP_BENCHMARK = "LAION-AI/CLIP_benchmark, benchmark/benchmark.csv"

BENCHMARKS = (
    Benchmark(
        name="coco_val2017",
        task="retrieval",
        title="COCO",
        files=(File(COCO_VAL2017, 25_014, count_records), File(COCO_IMAGES)),
        read=read_coco_val2017,
        licence="CC-BY-4.0; images: terms of Flickr",
        source="https://cocodataset.org/#download",
        images=5_000,
        texts=25_014,
        published=_flair(
            README,
            **{
                "CC3M-recap": (37.7, 51.6),
                "CC12M-recap": (47.8, 64.1),
                "YFCC15M-recap": (51.2, 67.3),
                "Merged30M": (53.3, 68.0),
            },
        ),
    ),
    Benchmark(
        name="coco_karpathy_test",
        task="retrieval",
        title="COCO, Karpathy test",
        files=(File(COCO_KARPATHY, count=count_records), File(f"{COCO_2014}|{COCO_IMAGES}")),
        read=read_coco_karpathy,
        licence="CC-BY-4.0; images: terms of Flickr",
        source=KARPATHY_SOURCE,
        images=5_000,
        texts=25_010,
        published=(
            Published(OPENAI, "text_to_image_R@5", 0.58369, CLIP_BENCHMARK, "global"),
            Published(OPENAI, "image_to_text_R@5", 0.7682, CLIP_BENCHMARK, "global"),
        ),
    ),
    Benchmark(
        name="flickr30k_val",
        task="retrieval",
        title="Flickr30k val",
        files=(File(_flickr_files("val"), count=count_records), File(FLICKR_IMAGES)),
        read=functools.partial(read_flickr30k, split="val"),
        licence="research use, terms of Flickr30k",
        source=FLICKR_SOURCE,
        images=1_014,
        texts=5_070,
        published=_flair("second-hand: a user's run, nn_hw_FLAIR", Merged30M=(81.85, 95.17)),
    ),
    Benchmark(
        name="flickr30k_test",
        task="retrieval",
        title="Flickr30k test",
        files=(File(_flickr_files("test"), count=count_records), File(FLICKR_IMAGES)),
        read=functools.partial(read_flickr30k, split="test"),
        licence="research use, terms of Flickr30k",
        source=FLICKR_SOURCE,
        images=1_000,
        texts=5_000,
        published=(
            *_flair(
                f"{README} (its split is not named; the numbers do not fit val)",
                **{
                    "CC3M-recap": (65.7, 78.7),
                    "CC12M-recap": (75.4, 90.8),
                    "YFCC15M-recap": (79.2, 93.3),
                    "Merged30M": (81.1, 94.7),
                },
            ),
            Published(OPENAI, "text_to_image_R@5", 0.8554, CLIP_BENCHMARK, "global"),
            Published(OPENAI, "image_to_text_R@5", 0.963, CLIP_BENCHMARK, "global"),
        ),
    ),
    Benchmark(
        name="docci_fg",
        task="retrieval",
        title="DOCCI-FG",
        files=(File(f"{DOCCI_NATIVE}|{DOCCI_GOAL}|{DOCCI_SENTENCES}"), File(DOCCI_IMAGES)),
        read=read_docci_sentences,
        licence="CC-BY-4.0",
        source="https://google.github.io/docci/",
        images=5_000,
        texts=35_534,
        published=_flair(
            "second-hand, not confirmed: notes on the paper",
            **{"YFCC15M-recap": (23.0, 53.7), "Merged30M": (25.0, None)},
        ),
    ),
    Benchmark(
        name="iiw_fg",
        task="retrieval",
        title="IIW-FG",
        files=(*IIW_FILES, File(IIW_SENTENCES, 6_204, count_records, optional=True), *IIW_IMAGES),
        read=read_iiw_sentences,
        licence="CC-BY-4.0",
        source="https://github.com/google/imageinwords",
        images=612,
        texts=6_204,
    ),
)
