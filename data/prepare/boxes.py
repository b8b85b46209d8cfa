"""Regions, boxes with descriptions, out of the files that data sets publish them in; rows like those of `rows`.

A record keeps them under "regions", see `data.transforms.regions`: boxes in shares of the picture as it is stored.
"""

import collections
import json
import math
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flair_jax.data.benchmarks import pointing
from flair_jax.data.benchmarks.base import AnnotationError, MissingError, read_text
from flair_jax.data.prepare import rows
from flair_jax.data.prepare.atomic import InputError
from flair_jax.data.prepare.rows import (
    BAD_CELL,
    MAX_CELL,
    NO_CAPTIONS,
    NO_KEY,
    LeftOut,
    Progress,
    Row,
    Rows,
    Text,
    dreamlip_captions,
    lines,
    open_text,
    read_csv,
    read_json,
    read_table,
    relative,
)
from flair_jax.data.transforms.regions import FIELD, Region, RegionError, area, checked_box, clip, parse, turn

GRAIN_FRAME = 960  # side of the square that GRAIN's boxes are measured in, whatever the image's size
GRAIN_WEB, GRAIN_MLLM = "caption", "mllm_caption"  # fields of the record
PADDING = "<pad>"  # description that GRAIN's detector was given where there was none
IMAGE_PATH = re.compile(r".*\.(jpg|jpeg|png)", re.IGNORECASE)
CHUNK = 1 << 20  # characters read at a time
# What COCO's names of stuff end in, which nobody says: "wall-brick", but "floor-other-merged".
STUFF = re.compile(r"(-other|-merged|-stuff)+$")
PHRASES = ("ref_exps", "noun_chunks")  # of GRIT: noun chunks with all that tells of the object, or without it

BAD_FORM = "region of another form"
NO_DESCRIPTION = "region without a description"
BAD_BOX = "region whose box is no list of four finite numbers"
BAD_SCORE = "region whose score is no finite number; it is kept without one"
EMPTY_BOX = "region whose box is empty in the picture; its description is kept"
CROWD = "region of a crowd"
NO_REGIONS = "no usable region"
NO_SIZE = "image whose size is not known"
NO_IMAGE_PATH = "path that does not end in .jpg, .jpeg or .png, such as a header"
NOT_A_LIST = "regions that are no list"


def region(corners: Any, size: Sequence[float], description: Any, score: Any = None) -> Region | LeftOut:
    """A region out of a file, or why it cannot be used.

    Args:
      corners: x0, y0, x1, y1 in the units of `size`.
      size: width and height of the picture, positive.
      description: a text. score: a number, or None.
    """
    if not isinstance(description, str) or not description.strip() or description.strip() == PADDING:
        return LeftOut(NO_DESCRIPTION, f"{description!r:.80}", part=True)
    try:
        box = checked_box(corners, "")
    except RegionError:
        return LeftOut(BAD_BOX, f"{corners!r:.80}", part=True)
    width, height = size
    return Region((box[0] / width, box[1] / height, box[2] / width, box[3] / height), description.strip(), score)


def row(key: str, found: Iterable[Region | LeftOut], captions: Mapping[str, Any] | None = None) -> Rows:
    """The row of an image, and what of its regions is left out or doubtful."""
    found, good, doubtful = list(found), [], []
    for one in found:
        if isinstance(one, LeftOut):
            doubtful.append(one)
            continue
        if one.score is not None and not (isinstance(one.score, int | float) and math.isfinite(one.score)):
            doubtful.append(LeftOut(BAD_SCORE, f"{one.score!r:.80}", part=True))
            one = Region(one.box, one.description)
        if not area(clip(one.box)):
            doubtful.append(LeftOut(EMPTY_BOX, f"{one.box}", part=True))
        good.append(one)
    if good or captions:
        yield Row(key, {**(captions or {}), FIELD: [one.fields() for one in good]})
    else:
        yield LeftOut(NO_REGIONS, key)
    yield from doubtful


def turned(fields: dict[str, Any], orientation: int) -> dict[str, Any]:
    """The fields of a record whose picture is turned as its EXIF orientation says, and its boxes with it."""
    found = [Region(one.box and turn(one.box, orientation), one.description, one.score) for one in parse(fields)]
    return {**fields, FIELD: [one.fields() for one in found]}


def _largest_first(found: Iterable[Region | LeftOut]) -> list[Region | LeftOut]:
    """Where nobody scored them training takes the first ones: the largest."""
    return sorted(found, key=lambda one: -area(clip(one.box)) if isinstance(one, Region) else 0)


# ---------------------------------------------------------------------------------------------------------------------
# GRAIN's three files


def grain(path: str, progress: Progress, text: Text, mllm: Sequence[str], boxes: Sequence[str]) -> Rows:
    """One of GRAIN's three files (Halbe et al. 2024): captions_pooled.csv, the MLLM's captions, or the boxes.

    Args:
      path: the file.
      progress, text: as for the other readers.
      mllm, boxes: which files are those of the MLLM's captions and of the boxes; all others are CSVs.
    """
    if path in boxes:
        return _grain_boxes(path, progress, text)
    if path in mllm:
        return _grain_mllm(path, progress, text)
    return _grain_csv(path, progress, text)


def _grain_csv(path: str, progress: Progress, text: Text) -> Rows:
    """Image path and web caption, without a header; more columns are ignored."""
    for cells in read_csv(path, progress, text):
        if not cells:
            continue  # a blank line is no row
        if not IMAGE_PATH.fullmatch(cells[0].strip()):
            yield LeftOut(NO_IMAGE_PATH, cells[0][:80])
        elif len(cells) < 2 or not cells[1].strip():
            yield LeftOut(NO_CAPTIONS, cells[0][:80])
        else:
            yield Row(relative(cells[0]), {GRAIN_WEB: cells[1].strip()})


def _grain_mllm(path: str, progress: Progress, text: Text) -> Rows:
    for key, value in members(path, progress, text):
        if not isinstance(value, str):
            yield LeftOut(BAD_CELL, key[:80])
        elif not value.strip():
            yield LeftOut(NO_CAPTIONS, key[:80])
        else:
            yield Row(relative(key), {GRAIN_MLLM: value.strip()})


def _grain_boxes(path: str, progress: Progress, text: Text) -> Rows:
    for key, value in members(path, progress, text):
        if not isinstance(value, list):
            yield LeftOut(NOT_A_LIST, key[:80])
            continue
        yield from row(relative(key), map(_grain_region, value))


def _grain_region(value: Any) -> Region | LeftOut:
    if not isinstance(value, dict):
        return LeftOut(BAD_FORM, f"{value!r:.80}", part=True)
    sides = GRAIN_FRAME, GRAIN_FRAME
    return region(value.get("bbox"), sides, value.get("description"), value.get("score"))


def members(path: str, progress: Progress, text: Text) -> Iterator[tuple[str, Any]]:
    """The members of a file that is one JSON object, one after the other: it may be larger than memory.

    Raises:
      InputError: it is no such file, or damaged.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    colon, end_of_member = re.compile(r"\s*:\s*"), re.compile(r"\s*([,}])")

    def member(buffer: str, start: int) -> tuple[str, Any, str, int]:
        """Name, value, the mark after it, and where that ends. Raises ValueError where the buffer ends before."""
        name, stop = decoder.raw_decode(buffer, blank.match(buffer, start).end())
        separator = colon.match(buffer, stop)
        if separator is None or not isinstance(name, str):
            raise ValueError("expected NAME: VALUE")
        value, stop = decoder.raw_decode(buffer, separator.end())
        mark = end_of_member.match(buffer, stop)
        if mark is None:
            raise ValueError("expected , or }")
        return name, value, mark[1], mark.end()

    with open_text(path, text, lines) as file:
        buffer, at, mark = file.read(CHUNK), 0, ","
        start = re.match(r"\s*\{", buffer)
        if start is None:
            raise InputError(f"{path} is no JSON object {{image: …}}; it begins with {buffer[:40]!r}")
        at, empty = start.end(), True
        while mark != "}":
            try:
                name, value, mark, at = member(buffer, at)
            except (ValueError, RecursionError) as error:
                after = blank.match(buffer, at).end()
                if empty and buffer[after : after + 1] == "}":
                    at = after + 1
                    break
                block = file.read(CHUNK)
                if not block or len(buffer) - at > MAX_CELL:
                    raise InputError(f"{path} is not JSON: {error}, near {buffer[at : at + 80]!r}") from error
                buffer, at = buffer[at:] + block, 0
                progress(file.buffer.tell())
                continue
            empty = False
            yield name, value
        if rest := (buffer[at:] + file.read(CHUNK)).strip():
            raise InputError(f"{path} is not JSON: {rest[:80]!r} after its end")


# ---------------------------------------------------------------------------------------------------------------------
# COCO, Visual Genome, Flickr30k Entities, GRIT


def coco(path: str, progress: Progress, text: Text, splitting: str) -> Rows:
    """A file of COCO, which is read as a whole (captions_train2017: 92 MB, instances_train2017: 469 MB)."""
    content = read_json(path, text, _without_outlines)
    try:
        captions = any("caption" in item for item in content["annotations"][:1])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of COCO: expected {{images: […], annotations: […]}}") from error
    return rows.coco_captions(path, content, splitting) if captions else _coco_regions(path, content)


def _without_outlines(value: dict) -> dict:
    """Outlines of objects take ten times the memory of their boxes."""
    value.pop("segmentation", None)
    return value


def _coco_regions(path: str, content: Mapping[str, Any]) -> Rows:
    """The objects of instances_*.json or the segments of panoptic_*.json, described by the names of their categories.

    Regions of a crowd are left out.

    Raises:
      InputError: the file is neither.
    """
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        objects = collections.defaultdict(list)
        for item in content["annotations"]:
            for one in item.get("segments_info", (item,)):
                left, top, width, height = one["bbox"]
                name = STUFF.sub("", names[one["category_id"]]).replace("-", " ")
                objects[item["image_id"]].append(((left, top, left + width, top + height), name, one.get("iscrowd", 0)))
        sized = [(images[image], found) for image, found in objects.items()]
        sized = [(image["file_name"], (image["width"], image["height"]), found) for image, found in sized]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} has no boxes of COCO: expected {{images: [{{id, file_name, width, height}}], categories: [{{id, "
            f"name}}], annotations: [{{image_id, bbox, category_id}}]}} or segments_info of those; found: {error!r}"
        ) from error
    for name, size, found in sized:
        if not isinstance(name, str) or not all(isinstance(side, int | float) and side > 0 for side in size):
            yield LeftOut(NO_SIZE, f"{name!r:.80}")
            continue
        made = [LeftOut(CROWD, part=True) if crowd else region(box, size, text) for box, text, crowd in found]
        yield from row(name, _largest_first(made))


def visual_genome(path: str, progress: Progress, text: Text, image_data: str) -> Rows:
    """region_descriptions.json of Visual Genome (Krishna et al., IJCV 2017): its phrases are captions, too.

    Read as a whole (712 MB). Images are found by the last two parts of their URL: VG_100K/1.jpg, VG_100K_2/2.jpg.

    Args:
      path, progress, text: as for the other readers.
      image_data: image_data.json, which has the sizes.
    """
    images = {}
    for image in _objects(image_data, text, "image_data.json", ("image_id", "url", "width", "height")):
        parts = urllib.parse.urlsplit(str(image["url"])).path.split("/")[-2:]
        images[image["image_id"]] = "/".join(parts), (image["width"], image["height"])
    for image in _objects(path, text, "region_descriptions.json", ("id", "regions")):
        key, size = images.get(image["id"], (None, ()))
        if key is None or not all(isinstance(side, int | float) and side > 0 for side in size):
            yield LeftOut(NO_SIZE, f"image {image['id']}")
            continue
        if not isinstance(image["regions"], list):
            yield LeftOut(NOT_A_LIST, key)
            continue
        found = _largest_first([_genome_region(one, size) for one in image["regions"]])
        phrases = [one.description for one in found if isinstance(one, Region)]
        yield from row(key, found, phrases and dreamlip_captions({"raw_caption": phrases}, "whole"))


def _genome_region(value: Any, size: Sequence[float]) -> Region | LeftOut:
    if not isinstance(value, dict):
        return LeftOut(BAD_FORM, f"{value!r:.80}", part=True)
    left, top, width, height = (value.get(name) for name in ("x", "y", "width", "height"))
    try:
        corners = (left, top, left + width, top + height)
    except TypeError:
        corners = (left, top, width, height)
    return region(corners, size, value.get("phrase"))


def _objects(path: str, text: Text, kind: str, keys: Sequence[str]) -> list[dict]:
    content = read_json(path, text)
    if not isinstance(content, list) or not all(isinstance(one, dict) and set(keys) <= one.keys() for one in content):
        raise InputError(f"{path} is no {kind} of Visual Genome: expected a list of objects with {', '.join(keys)}")
    return content


def flickr30k(
    path: str,
    progress: Progress,
    text: Text,
    part: str,
    names: Sequence[str] | None,
    splitting: str,
    entities: str | None,
) -> Rows:
    """`rows.flickr30k`, and the regions of Flickr30k Entities where their folder is given."""
    seen = set()
    for one in rows.flickr30k(path, progress, text, part, names, splitting):
        if entities is None or isinstance(one, LeftOut) or one.key in seen:
            yield one
            continue
        seen.add(one.key)
        yield from row(one.key, entity_regions(entities, one.key.removesuffix(".jpg")), one.captions)


def entity_regions(folder: str, key: str) -> list[Region | LeftOut]:
    """The regions of an image in Flickr30k Entities (Plummer et al., ICCV 2015): each entity that has boxes, once.

    Its box is the smallest one around all of its boxes, its description the longest of the phrases that name it.

    Args:
      folder: with `Annotations` and `Sentences`.
      key: number of the image.

    Raises:
      InputError: the image's files are missing or damaged.
    """
    try:
        size, boxes = pointing.entity_boxes(pathlib.Path(folder, "Annotations", f"{key}.xml"))
        sentences = read_text(pathlib.Path(folder, "Sentences", f"{key}.txt"))
    except (AnnotationError, MissingError, OSError) as error:
        raise InputError(f"--entities {folder}: {error}") from error
    phrases = collections.defaultdict(list)
    for entity, _, phrase in pointing.PHRASE.findall(sentences):
        phrases[entity].append(phrase)
    found = []
    for entity, own in boxes.items():
        left, top, right, bottom = zip(*own, strict=True)
        box = min(left), min(top), max(right), max(bottom)
        if entity in phrases and min(size) > 0:  # an entity without a phrase is the scene, or of no sentence
            found.append(region(box, size, max(phrases[entity], key=len)))
    return _largest_first(found)


def grit(path: str, progress: Progress, text: Text, phrases: str) -> Rows:
    """GRIT (Peng et al. 2023, Kosmos-2): captions of web images, whose phrases have boxes in shares of the picture.

    Args:
      path, progress, text: as for the other readers; parquet as it is published, or other tables with these columns.
      phrases: one of PHRASES, a column of [first character, end, x0, y0, x1, y1, score].
    """
    for cells in read_table(path, progress, text, ("url", "caption", phrases)):
        if isinstance(cells, LeftOut):
            yield cells
            continue
        key, caption, found = cells.get("url"), cells.get("caption"), cells.get(phrases)
        if not isinstance(key, str) or not key.strip():
            yield LeftOut(NO_KEY)
        elif not isinstance(caption, str):
            yield LeftOut(BAD_CELL, key)
        elif not caption.strip():
            yield LeftOut(NO_CAPTIONS, key)
        else:
            found = _list(found)
            if found is None:
                yield LeftOut(NOT_A_LIST, key, part=True)
            regions = [_grit_region(one, caption) for one in found or ()]
            yield from row(key.strip(), regions, {"caption": caption.strip()})


def _list(value: Any) -> list | None:
    """A list, or the text of one, as CSV and img2dataset hold it; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _grit_region(value: Any, caption: str) -> Region | LeftOut:
    if not isinstance(value, list | tuple) or len(value) != 7:
        return LeftOut(BAD_FORM, f"{value!r:.80}", part=True)
    start, end, *corners, score = value
    try:
        phrase = caption[int(start) : int(end)]
    except (TypeError, ValueError, OverflowError):
        return LeftOut(NO_DESCRIPTION, f"{value!r:.80}", part=True)
    return region(corners, (1, 1), phrase, score)
