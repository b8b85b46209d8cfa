"""Sets of long texts, one for each image: DOCCI, IIW, DCI, Urban-1k, ShareGPT4V-1k and -10k (`spec/flair.md` 3.1)."""

import functools
import json
import pathlib
import re
from collections.abc import Iterator

from flair_jax.data.benchmarks.base import (
    AnnotationError,
    Benchmark,
    File,
    MissingError,
    Picture,
    Retrieval,
    find,
    find_folder,
    inside,
    read_text,
)
from flair_jax.data.benchmarks.json_files import field, read_json, typed
from flair_jax.data.benchmarks.retrieval import (
    DOCCI_GOAL,
    DOCCI_IMAGES,
    DOCCI_NATIVE,
    IIW_FILES,
    IIW_IMAGES,
    OPENAI,
    gather,
    read_docci,
    read_iiw,
    recall_at_1,
    rejoined,
)

# ---------------------------------------------------------------------------------------------------------------------
# DCI

DCI = "dci/densely_captioned_images"
DCI_SPLITS = f"{DCI}/splits.json|dci/splits.json"
DCI_IMAGES = f"{DCI}/photos|dci/photos"


def read_dci(root: pathlib.Path, splits: tuple[str, ...] = ()) -> Retrieval:
    """Densely Captioned Images: the short caption and the extra caption of each image, joined as the reference does.

    Args:
      root: of all sets.
      splits: of splits.json; none: all of them, as the reference and LoTLIP evaluate.

    Raises:
      MissingError: annotations of single images that splits.json names are not there, too.
    """
    file = find(root, DCI_SPLITS)
    content = typed(read_json(file), dict, str(file))
    folder, photos = file.parent / "annotations", find_folder(root, DCI_IMAGES)
    names = [
        inside(folder, name if str(name).endswith(".json") else f"{name}.json", file).path
        for split in splits or content
        for name in field(content, split, list, str(file))
    ]
    if missing := [name for name in names if not pathlib.Path(name).exists()]:
        where = folder.relative_to(root)
        raise MissingError(
            [f"{len(missing):,} of {len(names):,} files of {where}, such as {pathlib.Path(missing[0]).name}"]
        )

    def rows():
        for name in names:
            record = read_json(pathlib.Path(name))
            text = f"{field(record, 'short_caption', str, name)}\n{field(record, 'extra_caption', str, name)}"
            yield inside(photos, field(record, "image", str, name), pathlib.Path(name)), rejoined(text)

    return gather(file, rows())


def _count_dci(path: pathlib.Path) -> int:
    return sum(len(names) for names in read_json(path).values())


# ---------------------------------------------------------------------------------------------------------------------
# Urban-1k

URBAN = ("urban1k", "Urban1k", "urban1k/Urban1k")
URBAN_JSON = "|".join(f"{folder}/{name}annotations.json" for folder in URBAN for name in ("annotations/", ""))
URBAN_TEXTS = "|".join(f"{folder}/caption" for folder in URBAN)
CAPTIONS = "[!.]*.txt"  # an archive that was packed on a Mac brings "._1.txt" beside 1.txt
URBAN_IMAGES = "|".join(f"{folder}/{name}" for folder in URBAN for name in ("images", "image"))


def read_urban1k(root: pathlib.Path) -> Retrieval:
    """Long-CLIP's folder of a text file an image, or the reference's JSON; texts as they stand.

    Of a text file the first line counts, as in Long-CLIP's evaluation. Images stand in the order of their names as
    texts: 1, 10, 100, ….
    """
    file, folder = find(root, URBAN_TEXTS, URBAN_JSON), find_folder(root, URBAN_IMAGES)
    if file.is_dir():
        files = sorted(file.glob(CAPTIONS), key=lambda path: path.name)
        lines = ((path, read_text(path).replace("\r", "\n").partition("\n")[0]) for path in files)
        return gather(file, ((inside(folder, f"{path.stem}.jpg", path), [text]) for path, text in lines))
    rows = []
    for number, record in enumerate(field(read_json(file), "annotations", list, str(file))):
        where = f"{file}: annotations[{number}]"
        picture = inside(folder, field(record, "image", str, where), file)
        rows.append((picture, [field(record, "caption", str, where)]))
    return gather(file, rows)


def _count_urban1k(path: pathlib.Path) -> int:
    return len(list(path.glob(CAPTIONS))) if path.is_dir() else len(read_json(path)["annotations"])


# ---------------------------------------------------------------------------------------------------------------------
# ShareGPT4V

SHARE4V_NATIVE = "share-captioner_coco_lcs_sam_1246k_1107.json"
SHARE4V = f"share4v/share4v_sam_10k.json|share4v/{SHARE4V_NATIVE}"
SHARE4V_IMAGES = "share4v/images|share4v/sam/images|share4v/sa_*"
BLOCK = 1 << 20  # characters that are read at a time
_BETWEEN = re.compile(r"[\s,\[]*")


def read_share4v(root: pathlib.Path, count: int) -> Retrieval:
    """The first `count` records of ShareGPT4V's file, or of the reference's cut of it; sentences joined again.

    Images are those of SA-1B: as the file names them (`sa_000048/images/sa_5.jpg`, `sam/images/sa_5.jpg`), without
    `images`, as the reference looks for them, or all in one folder `images`, whichever folder is there.
    """
    file = find(root, SHARE4V)
    folder = file.parent

    def rows():
        for number, record in enumerate(_first_records(file, count)):
            where = f"{file}[{number}]"
            talk = field(record, "conversations", list, where)
            if len(talk) < 2:
                raise AnnotationError(f"{where}: {len(talk)} conversations; expected a question and an answer")
            text = field(talk[1], "value", str, f"{where}: conversations[1]")
            yield _share4v_picture(folder, field(record, "image", str, where), file), rejoined(text)

    found = gather(file, rows())
    if len(found.texts) < count:
        raise AnnotationError(f"{file}: {len(found.texts)} records; expected at least {count}")
    return found


def _share4v_picture(folder: pathlib.Path, name: str, file: pathlib.Path) -> Picture:
    named = inside(folder, name, file)
    without = name.replace("/images/", "/")
    for candidate in (name, without, f"images/{name.rpartition('/')[2]}"):
        path = folder / candidate
        if path.parent != folder and _is_folder(path.parent):
            return Picture(str(path))
    return named


@functools.lru_cache(maxsize=1024)
def _is_folder(path: pathlib.Path) -> bool:
    return path.is_dir()


def _first_records(file: pathlib.Path, count: int) -> Iterator[dict]:
    """The first objects of a JSON list, of which no more is read than needed: ShareGPT4V's file has 1.5 GB.

    Raises:
      AnnotationError: it holds something else.
    """
    decoder, text, found = json.JSONDecoder(), "", 0
    with file.open(encoding="utf-8-sig") as stream:
        while found < count:
            text = text[_BETWEEN.match(text).end() :]
            if text.startswith("]"):
                return
            try:
                record, end = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                more = _read_block(stream, file)
                if not more:
                    if not text and found:  # a list that was cut after a record
                        return
                    raise AnnotationError(f"{file}: record {found} is not JSON ({error})") from error
                text += more
                continue
            found += 1
            text = text[end:]
            yield typed(record, dict, f"{file}[{found - 1}]")


def _read_block(stream, file: pathlib.Path) -> str:
    try:
        return stream.read(BLOCK)
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{file}: not UTF-8 at byte {error.start} of a block") from error


def _count_share4v(path: pathlib.Path) -> int:
    return sum(1 for _ in _first_records(path, 10_000))


# ---------------------------------------------------------------------------------------------------------------------
# The table

LOTLIP = "LoTLIP (Wu et al., NeurIPS 2024), second-hand"
# What is done with texts that do not fit into the context: cut, as the reference does, and in windows and sentences;
# and with 248 tokens of context, as Long-CLIP has.
LONG = {"windows": ("truncate", "windows", "sentences"), "context_length": 248}


def _lotlip(clip: tuple[float, float], long_clip: tuple[float, float], lotlip: tuple[float, float]):
    models = {OPENAI: clip, "Long-CLIP ViT-B/16": long_clip, "LoTLIP ViT-B/16": lotlip}
    return recall_at_1(LOTLIP, "global", models)


BENCHMARKS = (
    Benchmark(
        name="docci",
        task="retrieval",
        title="DOCCI, whole descriptions",
        files=(File(f"{DOCCI_NATIVE}|{DOCCI_GOAL}"), File(DOCCI_IMAGES)),
        read=read_docci,
        licence="CC-BY-4.0",
        source="https://google.github.io/docci/",
        images=5_000,
        texts=5_000,
        options=LONG,
    ),
    Benchmark(
        name="iiw",
        task="retrieval",
        title="ImageInWords, whole descriptions",
        files=(*IIW_FILES, *IIW_IMAGES),
        read=read_iiw,
        licence="CC-BY-4.0",
        source="https://github.com/google/imageinwords",
        images=612,
        texts=612,
        published=_lotlip((87.58, 88.24), (93.20, 89.61), (92.65, 94.28)),
        options=LONG,
    ),
    Benchmark(
        name="dci",
        task="retrieval",
        title="DCI, all splits together",
        files=(File(DCI_SPLITS, 7_805, _count_dci), File(DCI_IMAGES)),
        read=read_dci,
        licence="CC-BY-NC-4.0; images: SA-1B licence",
        source="https://github.com/facebookresearch/DCI",
        images=7_805,
        texts=7_805,
        published=_lotlip((43.01, 45.45), (57.28, 51.68), (62.63, 64.11)),
        options=LONG,
    ),
    Benchmark(
        name="dci_test",
        task="retrieval",
        title="DCI, test split",
        files=(File(DCI_SPLITS, 7_805, _count_dci), File(DCI_IMAGES)),
        read=functools.partial(read_dci, splits=("test",)),
        licence="CC-BY-NC-4.0; images: SA-1B licence",
        source="https://github.com/facebookresearch/DCI",
        images=108,
        texts=108,
        options=LONG,
    ),
    Benchmark(
        name="urban1k",
        task="retrieval",
        title="Urban-1k",
        files=(File(f"{URBAN_TEXTS}|{URBAN_JSON}", 1_000, _count_urban1k), File(URBAN_IMAGES)),
        read=read_urban1k,
        licence="CC-BY-NC-4.0",
        source="https://huggingface.co/datasets/BeichenZhang/Urban1k",
        images=1_000,
        texts=1_000,
        published=_lotlip((52.9, 67.10), (79.50, 78.90), (84.80, 88.80)),
        options=LONG,
    ),
    Benchmark(
        name="sharegpt4v_1k",
        task="retrieval",
        title="ShareGPT4V-1k",
        files=(File(SHARE4V, count=_count_share4v), File(SHARE4V_IMAGES)),
        read=functools.partial(read_share4v, count=1_000),
        licence="CC-BY-NC-4.0; images: SA-1B licence",
        source="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V; images: SA-1B, tars 000000 to 000050",
        images=1_000,
        texts=1_000,
        options=LONG,
    ),
    Benchmark(
        name="sharegpt4v_10k",
        task="retrieval",
        title="ShareGPT4V-10k",
        files=(File(SHARE4V, 10_000, _count_share4v), File(SHARE4V_IMAGES)),
        read=functools.partial(read_share4v, count=10_000),
        licence="CC-BY-NC-4.0; images: SA-1B licence",
        source="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V; images: SA-1B, tars 000000 to 000050",
        images=10_000,
        texts=10_000,
        published=_lotlip((56.16, 60.22), (77.06, 79.24), (82.72, 88.40)),
        options=LONG,
    ),
)
