"""Caption files as rows of (join key, captions), read as a stream.

A reader is given one file and yields a `Row`, or a text that says why a row is left out. Nothing is ever evaluated:
lists that stand in a cell as text are read as JSON or as Python literals.
"""

import collections
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flair_jax.data.prepare.atomic import PrepareError
from flair_jax.data.transforms.captions import FIELDS, CaptionError, field_sentences, split

MAX_CELL = 1 << 24  # characters; what is longer is a quotation mark that was never closed
PARQUET_ROWS = 1024  # read at a time

NO_KEY = "no join key"
NO_CAPTIONS = "no captions"
BAD_CELL = "a caption is neither text nor a list of texts"
BAD_ROW = "another number of cells than the header has"
BAD_OBJECT = "not a JSON object"
NOT_WANTED = "not in the chosen part"


class Row(NamedTuple):
    """The captions of one image, by field, and what the image is found by."""

    key: str
    captions: dict[str, list[str] | str]


Rows = Iterator[Row | str]
Progress = Callable[[int], None]  # is told how many bytes of the file have been read


def sentences(value, splitting: str = "every_stop") -> list[str]:
    """The sentences of one caption field, stripped; see `captions.field_sentences`.

    Raises:
      CaptionError: the value is neither a text nor a list of texts.
    """
    try:
        return [sentence.strip() for sentence in field_sentences(value, splitting)]
    except CaptionError as error:
        raise CaptionError(BAD_CELL) from error


# ---------------------------------------------------------------------------------------------------------------------
# What a row's captions become


def dreamlip_captions(cells: Mapping, splitting: str) -> dict[str, list[str]]:
    """The seven fields as lists of sentences; a missing one is empty. Raises CaptionError, also if all are empty."""
    captions = {field: sentences(cells.get(field), splitting) for field in FIELDS}
    if not any(captions.values()):
        raise CaptionError(NO_CAPTIONS)
    return captions


def raw_captions(texts: Iterable, splitting: str) -> dict[str, list[str]]:
    """All sentences of some captions as `raw_caption`, beside six empty fields, which the reference needs."""
    found = [sentence for text in texts for sentence in sentences(text, splitting)]
    return dreamlip_captions({"raw_caption": found}, splitting)


def pixelprose_captions(cells: Mapping, original: bool = False) -> dict[str, str]:
    """`caption` from PixelProse's `vlm_caption` (or from `caption`), and `original_caption` if wanted.

    Both stay whole: training splits them, so the rule may still be chosen then.
    """
    value = cells.get("vlm_caption", cells.get("caption"))
    if value is not None and not isinstance(value, str):
        raise CaptionError(BAD_CELL)
    if not split(value or ""):
        raise CaptionError(NO_CAPTIONS)
    captions = {"caption": value.strip()}
    if original and isinstance(cells.get("original_caption"), str) and cells["original_caption"].strip():
        captions["original_caption"] = cells["original_caption"].strip()
    return captions


def _row(key, captions_of: Callable[..., dict], *arguments) -> Row | str:
    key = str(key).strip() if isinstance(key, str | int) else ""
    if not key:
        return NO_KEY
    try:
        return Row(key, captions_of(*arguments))
    except CaptionError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def dreamlip(path: str, progress: Progress, splitting: str) -> Rows:
    """DreamLIP's CSV: the URL in "Image Path", and the seven caption columns; cells may hold newlines and lists."""
    for cells in _table(path, progress, needed=("Image Path", *FIELDS)):
        if isinstance(cells, str):
            yield cells
        else:
            yield _row(cells["Image Path"], dreamlip_captions, cells, splitting)


def pixelprose(path: str, progress: Progress, original: bool = False) -> Rows:
    """PixelProse's parquet or CSV: the URL in "url", the description in "vlm_caption"."""
    needed = ("url", "vlm_caption", *(["original_caption"] if original else []))
    for cells in _table(path, progress, needed):
        if isinstance(cells, str):
            yield cells
        else:
            yield _row(cells["url"], pixelprose_captions, cells, original)


def table(path: str, progress: Progress, image_column: str, caption_columns: Sequence[str], splitting: str) -> Rows:
    """A user's own captions: CSV, parquet, JSON lines, or JSON (a list of objects, or {image: caption or captions}).

    The file of an image may have several rows and several columns; all captions are gathered as `raw_caption`.
    """
    for cells in _table(path, progress, (image_column, *caption_columns)):
        if isinstance(cells, str):
            yield cells
        else:
            texts = _each(cells.get(column) for column in caption_columns)
            yield _row(_relative(cells.get(image_column)), raw_captions, texts, splitting)


def coco(path: str, progress: Progress, splitting: str) -> Rows:
    """COCO's captions_*.json, which is read as a whole (train2017: 92 MB)."""
    content = _json(path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(names.get(item["image_id"]), item["caption"]) for item in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise PrepareError(
            f"{path} is no caption file of COCO: expected {{images: [{{id, file_name}}], annotations: [{{image_id, "
            f"caption}}]}}, found no {error}"
        ) from error
    for name, caption in pairs:
        yield _row(name, raw_captions, [caption], splitting)


def flickr30k(path: str, progress: Progress, part: str, names: Sequence[str] | None, splitting: str) -> Rows:
    """Karpathy's dataset_flickr30k.json, or results_20130124.token, whose split a list of `names` must give.

    Args:
      path: the file.
      progress: not told: both are small.
      part: "train", "val" or "test" of the JSON, which states it for each image.
      names: the images to keep, as file names without `.jpg`; None keeps the whole part.
      splitting: of the captions.
    """
    if path.endswith(".json"):
        content = _json(path)
        try:
            items = [
                (item["filename"], item["split"], [sentence["raw"] for sentence in item["sentences"]])
                for item in content["images"]
            ]
        except (KeyError, TypeError) as error:
            raise PrepareError(
                f"{path} is not Karpathy's file: expected {{images: [{{filename, split, sentences: [{{raw}}]}}]}}, "
                f"found no {error}"
            ) from error
    else:
        if names is None:
            raise PrepareError(
                f"{path} does not say which images are for training and which for evaluation: name the training "
                "images with --images-list FILE (one a line), or use dataset_flickr30k.json"
            )
        items = _tokens(path, part)
    wanted = None if names is None else frozenset(names)
    for name, found, texts in items:
        if found != part or (wanted is not None and name.removesuffix(".jpg") not in wanted):
            yield NOT_WANTED
        else:
            yield _row(name, raw_captions, texts, splitting)


def _tokens(path: str, part: str) -> Iterator[tuple[str, str, list[str]]]:
    """Lines of `IMAGE.jpg#NUMBER<tab>caption`; the lines of one image follow each other."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            match = re.fullmatch(r"([^#\t]+)#\d+\t(.*)\n?", line)
            if match:
                yield match[1], part, [match[2]]
            elif line.strip():
                raise PrepareError(f"{path}, line {number}: expected IMAGE.jpg#NUMBER<tab>caption, found {line[:80]!r}")


READERS = {
    "dreamlip": dreamlip,
    "pixelprose": pixelprose,
    "folder": table,
    "coco": coco,
    "flickr30k": flickr30k,
}


# ---------------------------------------------------------------------------------------------------------------------
# File formats


def _table(path: str, progress: Progress, needed: Sequence[str]) -> Iterator[Mapping | str]:
    """The rows of a file by the names of their columns, or why a row is left out."""
    if path.endswith(".parquet"):
        return _parquet(path, progress, needed)
    if path.endswith(".jsonl"):
        return _json_lines(path, progress)
    if path.endswith(".json"):
        return _json_table(path, needed)
    if path.endswith(".csv"):
        return _csv(path, progress, needed)
    raise PrepareError(f"{path}: captions are read from .csv, .parquet, .jsonl and .json files")


def _csv(path: str, progress: Progress, needed: Sequence[str]) -> Iterator[Mapping | str]:
    csv.field_size_limit(MAX_CELL)
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            _check_columns(path, header, needed)
            for number, cells in enumerate(reader):
                if number % 1024 == 0:
                    progress(file.buffer.tell())
                if len(cells) == len(header):
                    yield dict(zip(header, cells, strict=True))
                elif cells:  # a blank line is no row
                    yield BAD_ROW
        except csv.Error as error:
            raise PrepareError(
                f"{path}, before line {reader.line_num}: {error}. Most likely a quotation mark is never closed: "
                "repair the file, or fetch it again if it was cut."
            ) from error


def _parquet(path: str, progress: Progress, needed: Sequence[str]) -> Iterator[Mapping | str]:
    import pyarrow.parquet  # of the extra `prepare`; only these files need it

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise PrepareError(f"{path} is no parquet file: {error}") from error
    with file:
        _check_columns(path, file.schema_arrow.names, needed)
        rows = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(needed)):
            rows += batch.num_rows
            progress(_size(path) * rows // file.metadata.num_rows)
            yield from batch.to_pylist()


def _json_lines(path: str, progress: Progress) -> Iterator[Mapping | str]:
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            progress(file.tell())
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else BAD_OBJECT


def _json_table(path: str, needed: Sequence[str]) -> Iterator[Mapping | str]:
    content = _json(path)
    if isinstance(content, dict):
        image_column, caption_column, *_ = needed
        content = [{image_column: image, caption_column: value} for image, value in content.items()]
    if not isinstance(content, list):
        raise PrepareError(f"{path}: expected a list of objects, or an object {{image: caption}}")
    for value in content:
        yield value if isinstance(value, dict) else BAD_OBJECT


def _json(path: str):
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{path} is not JSON: {error}") from error


def _size(path: str) -> int:
    with open(path, "rb") as file:
        return file.seek(0, 2)


def _check_columns(path: str, found: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        raise PrepareError(f"{path} has no column {missing}; its columns are {list(found)}")
    twice = [name for name, count in collections.Counter(found).items() if count > 1 and name in needed]
    if twice:
        raise PrepareError(f"{path} has the column {twice} twice")


def _each(values: Iterable) -> Iterator:
    """A list of captions is several captions, each of which may hold several sentences."""
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _relative(name):
    """`./a/b.jpg` is `a/b.jpg`; anything else stays, and matches nothing if it is no path inside of the folder."""
    return name.strip().removeprefix("./") if isinstance(name, str) else name
