"""Caption files as rows of (join key, captions), read as a stream.

A reader is given one file and yields a `Row`, or `LeftOut` with the reason. Nothing is ever evaluated: lists that are
written in a cell as text are read as JSON or as Python literals.
"""

import codecs
import collections
import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from flair_jax.data.prepare.atomic import InputError
from flair_jax.data.transforms.captions import FIELDS, CaptionError, field_sentences, split, written_list
from flair_jax.data.transforms.negatives import LISTED_CAPTIONS, LISTED_FIELD

BYTE_ORDER_MARK = "\ufeff"  # that some programs write at the start of a text
MAX_CELL = 1 << 24  # characters; what is longer is a quotation mark that was never closed
PARQUET_ROWS = 1024  # read at a time
DELIMITERS = {"csv": ",", "tsv": "\t"}  # by the ending of the file
DELIMITER_NAMES = {"\t": "tab"}  # for the command line

_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no text, as surrogateescape decodes them

NO_KEY = "no join key"
NO_CAPTIONS = "no captions"
BAD_CELL = "a caption is neither text nor a list of texts"
BAD_ROW = "another number of cells than the header has"
BAD_OBJECT = "not a JSON object"
NOT_WANTED = "not in the chosen part"


class Row(NamedTuple):
    """The captions and regions of one image, by field, and what the image is found by."""

    key: str
    captions: dict[str, list | str]


class LeftOut(NamedTuple):
    """A row that cannot be used."""

    reason: str  # which is counted
    detail: str = ""  # of this row, for an example
    part: bool = False  # whether it is a part of a row, the rest of which is used


class Text(NamedTuple):
    """How caption files are written."""

    encoding: str = "utf-8"
    delimiter: str | None = None  # between the cells of .csv and .tsv; None: a comma, or a tab in .tsv
    quoted: bool = True  # whether a cell may stand in quotation marks, as in most files


Rows = Iterator[Row | LeftOut]
Progress = Callable[[int], None]  # called with the number of bytes of the file that have been read


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


def negclip_captions(cells: Mapping) -> dict[str, list]:
    """One caption and its list of negatives, which a cell may hold as a Python literal."""
    title, negatives = cells.get("title"), cells.get("neg_caption")
    if isinstance(negatives, str):
        negatives = written_list(negatives)
    if not isinstance(title, str) or not isinstance(negatives, list):
        raise CaptionError(BAD_CELL)
    if not title.strip():
        raise CaptionError(NO_CAPTIONS)
    return {LISTED_CAPTIONS: [title.strip()], LISTED_FIELD: [[text.strip() for text in negatives if text.strip()]]}


def _row(key, captions_of: Callable[..., dict], *arguments, detail: str = "") -> Row | LeftOut:
    key = str(key).strip() if isinstance(key, str | int) else ""
    if not key:
        return LeftOut(NO_KEY, detail)
    try:
        return Row(key, captions_of(*arguments))
    except CaptionError as error:
        return LeftOut(str(error), detail)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def dreamlip(path: str, progress: Progress, text: Text, splitting: str) -> Rows:
    """DreamLIP's CSV: the URL in "Image Path", and the seven caption columns; cells may hold newlines and lists."""
    needed = ("Image Path", *FIELDS)
    for cells in read_table(path, progress, text, needed):
        if isinstance(cells, LeftOut):
            yield cells
        else:
            yield _row(
                cells.get("Image Path"), dreamlip_captions, cells, splitting, detail=_missing_keys(cells, needed)
            )


def pixelprose(path: str, progress: Progress, text: Text, original: bool = False) -> Rows:
    """PixelProse's parquet or CSV: the URL in "url", the description in "vlm_caption"."""
    needed = ("url", "vlm_caption", *(["original_caption"] if original else []))
    for cells in read_table(path, progress, text, needed):
        if isinstance(cells, LeftOut):
            yield cells
        else:
            yield _row(cells.get("url"), pixelprose_captions, cells, original, detail=_missing_keys(cells, needed))


def table(
    path: str, progress: Progress, text: Text, image_column: str, caption_columns: Sequence[str], splitting: str
) -> Rows:
    """A user's own captions: CSV, TSV, parquet, JSON lines, or JSON (a list of objects, or {image: caption(s)}).

    The file of an image may have several rows and several columns; all captions are gathered as `raw_caption`.
    """
    needed = (image_column, *caption_columns)
    for cells in read_table(path, progress, text, needed):
        if isinstance(cells, LeftOut):
            yield cells
        else:
            captions = _each(cells.get(column) for column in caption_columns)
            key = relative(cells.get(image_column))
            yield _row(key, raw_captions, captions, splitting, detail=_missing_keys(cells, needed))


def coco_captions(path: str, content: Mapping, splitting: str) -> Rows:
    """The content of COCO's captions_*.json."""
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(names.get(item["image_id"]), item["caption"]) for item in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no caption file of COCO: expected {{images: [{{id, file_name}}], annotations: [{{image_id, "
            f"caption}}]}}, found no {error}"
        ) from error
    for name, caption in pairs:
        yield _row(name, raw_captions, [caption], splitting)


def negclip(path: str, progress: Progress, text: Text) -> Rows:
    """NegCLIP's train_neg_clip.tsv: captions of COCO images, and for each a list of hard negatives.

    Both stay whole: `caption`, a list of the image's captions, and `neg_caption`, a list of negatives for each. The
    column `neg_image`, the rows of similar images, is not read.
    """
    needed = ("filepath", "title", "neg_caption")
    for cells in read_table(path, progress, text, needed):
        if isinstance(cells, LeftOut):
            yield cells
        else:
            key = relative(cells.get("filepath"))
            key = key.removeprefix("coco/") if isinstance(key, str) else key
            yield _row(key, negclip_captions, cells, detail=_missing_keys(cells, needed))


def flickr30k(
    path: str, progress: Progress, text: Text, part: str, names: Sequence[str] | None, splitting: str
) -> Rows:
    """Karpathy's dataset_flickr30k.json, or results_20130124.token, whose split a list of `names` must give.

    Args:
      path: the file.
      progress: not used: both are small.
      text: how the file is written.
      part: "train", "val" or "test" of the JSON, which states it for each image.
      names: the images to keep, as file names without `.jpg`; None keeps the whole part.
      splitting: of the captions.
    """
    if path.endswith(".json"):
        content = read_json(path, text)
        try:
            items = [
                (item["filename"], item["split"], [sentence["raw"] for sentence in item["sentences"]])
                for item in content["images"]
            ]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not Karpathy's file: expected {{images: [{{filename, split, sentences: [{{raw}}]}}]}}, "
                f"found no {error}"
            ) from error
    else:
        if names is None:
            raise InputError(
                f"{path} does not say which images are for training and which for evaluation: name the training "
                "images with --images-list FILE (one a line), or use dataset_flickr30k.json"
            )
        items = _tokens(path, text, part)
    wanted = None if names is None else frozenset(names)
    for name, found, captions in items:
        if found != part or (wanted is not None and name.removesuffix(".jpg") not in wanted):
            yield LeftOut(NOT_WANTED)
        else:
            yield _row(name, raw_captions, captions, splitting)


def _tokens(path: str, text: Text, part: str) -> Iterator[tuple[str, str, list[str]]]:
    """Lines of `IMAGE.jpg#NUMBER<tab>caption`; the lines of one image follow each other."""
    with open_text(path, text, lines) as file:
        for number, line in enumerate(file, 1):
            match = re.fullmatch(r"([^#\t]+)#\d+\t(.*?)[\r\n]*", line)
            if match:
                yield match[1], part, [match[2]]
            elif line.strip():
                raise InputError(f"{path}, line {number}: expected IMAGE.jpg#NUMBER<tab>caption, found {line[:80]!r}")


def read_lines(path: str, text: Text) -> list[str]:
    """The lines of a text file without empty ones. Raises InputError, and OSError if it cannot be read."""
    with open_text(path, text, lines) as file:
        return [stripped for line in file if (stripped := line.strip())]


# ---------------------------------------------------------------------------------------------------------------------
# File formats


def read_table(path: str, progress: Progress, text: Text, needed: Sequence[str]) -> Iterator[Mapping | LeftOut]:
    """The rows of a file by the names of their columns, or why a row is left out."""
    ending = path.lower().rpartition(".")[2]
    if ending == "parquet":
        return _parquet(path, progress, needed)
    if ending == "jsonl":
        return _json_lines(path, progress, text)
    if ending == "json":
        return _json_table(path, text, needed)
    if ending in ("csv", "tsv"):
        return _csv(path, progress, text._replace(delimiter=text.delimiter or DELIMITERS[ending]), needed)
    raise InputError(f"{path}: captions are read from .csv, .tsv, .parquet, .jsonl and .json files")


def _csv(path: str, progress: Progress, text: Text, needed: Sequence[str]) -> Iterator[Mapping | LeftOut]:
    cells_of_rows = read_csv(path, progress, text)
    header = next(cells_of_rows, [])
    _check_columns(path, header, needed)
    for cells in cells_of_rows:
        if len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        elif cells:  # a blank line is no row
            yield LeftOut(BAD_ROW, f"{len(cells)} instead of {len(header)}")


def read_csv(path: str, progress: Progress, text: Text) -> Iterator[list[str]]:
    """The cells of each row, of the header too.

    Raises:
      InputError: it is not in the encoding, or quotation marks do not fit.
    """
    csv.field_size_limit(MAX_CELL)
    with open_text(path, text, csv_rows) as file:
        # Strict: else a quotation mark that is never closed takes the following rows into its cell in silence.
        reader = csv.reader(file, **_csv_form(text), strict=True)
        try:
            for number, cells in enumerate(reader):
                if number % 1024 == 0:
                    progress(file.buffer.tell())
                yield cells
        except csv.Error as error:
            raise InputError(
                f"{path}, before line {reader.line_num}: {error}. Most likely a quotation mark is never closed, or one "
                "inside of a cell in quotation marks is not doubled: repair the file, or fetch it again if it was cut. "
                "Of a file whose cells never stand in quotation marks: --no-quoting"
            ) from error


def _csv_form(text: Text) -> dict[str, Any]:
    return {"delimiter": text.delimiter or ",", "quoting": csv.QUOTE_MINIMAL if text.quoted else csv.QUOTE_NONE}


def _parquet(path: str, progress: Progress, needed: Sequence[str]) -> Iterator[Mapping | str]:
    import pyarrow.parquet  # of the extra `prepare`; only these files need it

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is no parquet file: {error}") from error
    with file:
        _check_columns(path, file.schema_arrow.names, needed)
        rows = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(needed)):
            rows += batch.num_rows
            progress(_size(path) * rows // file.metadata.num_rows)
            yield from batch.to_pylist()


def _json_lines(path: str, progress: Progress, text: Text) -> Iterator[Mapping | LeftOut]:
    with open_text(path, text, lines) as file:
        for number, line in enumerate(file):
            if number % 1024 == 0:
                progress(file.buffer.tell())
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else LeftOut(BAD_OBJECT)


def _json_table(path: str, text: Text, needed: Sequence[str]) -> Iterator[Mapping | LeftOut]:
    content = read_json(path, text)
    if isinstance(content, dict):
        image_column, caption_column, *_ = needed
        content = [{image_column: image, caption_column: value} for image, value in content.items()]
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of objects, or an object {{image: caption}}")
    for value in content:
        yield value if isinstance(value, dict) else LeftOut(BAD_OBJECT)


def read_json(path: str, text: Text, hook: Callable[[dict], Any] | None = None) -> Any:
    """A file as a whole; `hook` may make every object smaller.

    Raises:
      InputError: the file is no JSON, or an object has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
            raise InputError(f"{path}: an object has the key {twice!r} twice, of which JSON keeps the last one alone")
        return found if hook is None else hook(found)

    with open_text(path, text, lines) as file:
        try:
            return json.load(file, object_pairs_hook=unique)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from error


@contextlib.contextmanager
def open_text(path: str, text: Text, rows_of: Callable[[TextIO, Text], Iterator[tuple[str, str]]]) -> Iterator[TextIO]:
    """A text file. `rows_of` names the parts of the file, for the message about a byte that is no text.

    Raises:
      InputError: a part of the file is not in the encoding. Nothing is replaced: captions would change in silence.
    """
    encoding = text.encoding
    try:
        with open(path, newline="", encoding=encoding) as file:
            if file.read(1) != BYTE_ORDER_MARK:  # it would be a part of the first column's name
                file.seek(0)
            yield file
    except UnicodeDecodeError as error:
        offset, found = _undecodable(path, encoding)
        where = None
        # UTF-16 has no surrogateescape for some faults, and a table may be damaged too: then only the byte is named.
        with (
            contextlib.suppress(UnicodeDecodeError, csv.Error),
            open(path, newline="", encoding=encoding, errors="surrogateescape") as file,
        ):
            where = next((name for name, content in rows_of(file, text) if _ESCAPED.search(content)), None)
        raise InputError(
            f"{path}, {f'{where}, ' if where else ''}byte {offset}: {found!r} is not text in {text.encoding}. Give the "
            "encoding of the file (--encoding latin-1, cp1252, utf-16, …), or convert the file to UTF-8."
        ) from error


def decoded(content: bytes, encoding: str) -> str:
    """A text without a byte order mark. Raises UnicodeDecodeError."""
    return content.decode(encoding).removeprefix(BYTE_ORDER_MARK)


def _undecodable(path: str, encoding: str) -> tuple[int, bytes]:
    """Where the first bytes of a file are that are no text: (offset, the bytes around it)."""
    decoder = codecs.getincrementaldecoder(encoding)()
    stop = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 20)
            stop += len(block)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                content = error.object  # this block, after the last bytes of the one before if they were incomplete
                return stop - len(content) + error.start, content[max(0, error.start - 10) : error.end + 10]
            if not block:  # the file was replaced by a good one since it failed
                return stop, b""


def lines(file: TextIO, text: Text) -> Iterator[tuple[str, str]]:
    return ((f"line {number}", line) for number, line in enumerate(file, 1))


def csv_rows(file: TextIO, text: Text) -> Iterator[tuple[str, str]]:
    """Rows are counted as in the table of reasons: without the header."""
    rows = enumerate(filter(None, csv.reader(file, **_csv_form(text))))
    return ((f"row {number}" if number else "header", "\n".join(cells)) for number, cells in rows)


def _size(path: str) -> int:
    with open(path, "rb") as file:
        return file.seek(0, 2)


def _check_columns(path: str, found: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        other = next((delimiter for delimiter in ";\t|," if len(found) == 1 and delimiter in found[0]), None)
        advice = f". Give the delimiter: --delimiter {DELIMITER_NAMES.get(other, repr(other))}" if other else ""
        raise InputError(f"{path} has no column {missing}; its columns are {list(found)}{advice}")
    twice = [name for name, count in collections.Counter(found).items() if count > 1 and name in needed]
    if twice:
        raise InputError(f"{path} has the column {twice} twice")


def _missing_keys(cells: Mapping, needed: Sequence[str]) -> str:
    """What a JSON object lacks; tables have all columns."""
    missing = [name for name in needed if name not in cells]
    return f"no {', '.join(missing)}; its keys are {', '.join(map(str, list(cells)[:10])) or 'none'}" if missing else ""


def _each(values: Iterable) -> Iterator:
    """A list of captions is several captions, each of which may hold several sentences."""
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def relative(name):
    """`./a/b.jpg` is `a/b.jpg`; anything else stays, and matches nothing if it is no path inside of the folder."""
    return name.strip().removeprefix("./") if isinstance(name, str) else name
