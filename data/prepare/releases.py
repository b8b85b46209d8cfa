"""The releases: how their captions are read, by which key images are found, and what a record holds."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping

from flair_jax.data.prepare import boxes, rows
from flair_jax.data.transforms.captions import CaptionError

URL_FIELDS = ("url", "downloadurl")  # img2dataset's and pixparse's; YFCC's

BAD_TEXT = "json that is no object"
NOT_UTF8 = "json that is not UTF-8"
NOT_IN_ENCODING = "txt that is not in the encoding (--encoding)"


@dataclasses.dataclass(frozen=True)
class Release:
    """One release.

    own: makes the captions from the text beside an image, for tars that hold them already; None if there are none.
    merged: several caption rows of one image are its several captions; else the first one is taken.
    images: "tars" or "folder".
    """

    help: str
    images: str
    merged: bool = False
    own: Callable[..., dict] | None = None

    @property
    def key_field(self) -> str:
        """Where a record keeps the join key."""
        return "file" if self.images == "folder" else "url"


def _dreamlip(text: bytes, splitting: str) -> dict:
    return rows.dreamlip_captions(_object(text), splitting)


def _pixelprose(text: bytes, original: bool) -> dict:
    return rows.pixelprose_captions(_object(text), original)


def _cc3m(text: bytes, partner: str, encoding: str, splitting: str) -> dict:
    if partner != "txt":
        return rows.raw_captions([_object(text).get("caption")], splitting)
    try:
        return rows.raw_captions([rows.decoded(text, encoding)], splitting)
    except UnicodeDecodeError as error:
        raise CaptionError(NOT_IN_ENCODING) from error


def _captioned(text: bytes, partner: str, encoding: str, caption_key: str, text_folder: str | None) -> dict:
    """One caption, whole: the txt beside the image, a key of its json, or the first line of `text_folder/KEY.txt`."""
    if partner == "txt":
        try:
            caption = rows.decoded(text, encoding)
        except UnicodeDecodeError as error:
            raise CaptionError(NOT_IN_ENCODING) from error
    else:
        content = _object(text)
        caption = content.get(caption_key)
        if caption is None and text_folder is not None:
            caption = _first_line(text_folder, content.get("key"), encoding)
    if not isinstance(caption, str | None):
        raise CaptionError(rows.BAD_CELL)
    if not (caption or "").strip():
        raise CaptionError(rows.NO_CAPTIONS)
    return {caption_key: caption.strip()}


def _first_line(folder: str, key, encoding: str) -> str:
    if not isinstance(key, str) or not re.fullmatch(r"[\w-]+", key):  # so that no path leaves the folder
        raise CaptionError("json without a plain key, which names the text file")
    try:
        with open(os.path.join(folder, f"{key}.txt"), encoding=encoding) as file:
            return file.readline().removeprefix(rows.BYTE_ORDER_MARK)
    except FileNotFoundError as error:
        raise CaptionError("no text file of this key (--text-folder)") from error
    except UnicodeDecodeError as error:
        raise CaptionError(NOT_IN_ENCODING) from error


RELEASES = {
    "dreamlip": Release("CC3M, CC12M or YFCC15M with DreamLIP's captions, joined by URL", "tars", own=_dreamlip),
    "pixelprose": Release("PixelProse's descriptions, joined by URL", "tars", own=_pixelprose),
    "cc3m": Release("Conceptual Captions with its raw captions alone, which are in the tars", "tars", own=_cc3m),
    "folder": Release("your own images in a folder, and a file of captions", "folder", merged=True),
    "coco": Release("COCO's training images and their five captions each", "folder", merged=True),
    "captioned": Release(
        "tars with one caption an image, kept whole: FSC-CLIP's LAION-COCO and CC3M, or yours", "tars", own=_captioned
    ),
    "negclip": Release("COCO's images with NegCLIP's captions and hard negatives", "folder", merged=True),
    "flickr30k": Release("Flickr30k's training images and their five captions each", "folder", merged=True),
    "grain": Release("images with GRAIN's three files: web captions, an MLLM's captions, boxes", "folder", merged=True),
    "visual_genome": Release("Visual Genome's images and their described regions", "folder"),
    "grit": Release("GRIT's web images, whose captions' phrases have boxes, joined by URL", "tars"),
}
READERS = {
    "dreamlip": rows.dreamlip,
    "pixelprose": rows.pixelprose,
    "folder": rows.table,
    "coco": boxes.coco,
    "negclip": rows.negclip,
    "flickr30k": boxes.flickr30k,
    "grain": boxes.grain,
    "visual_genome": boxes.visual_genome,
    "grit": boxes.grit,
}


def url_of(text: bytes) -> str:
    """The URL in the JSON beside an image. Raises CaptionError if there is none."""
    found = _object(text)
    for field in URL_FIELDS:
        if isinstance(found.get(field), str) and found[field].strip():
            return found[field].strip()
    raise CaptionError(f"json without {' or '.join(URL_FIELDS)}")


def combined(captions: list[dict], merged: bool) -> dict:
    """The captions and regions of an image from those of its rows."""
    if not merged or len(captions) == 1:
        return captions[0]
    found: dict = {}
    for row in captions:
        for field, value in row.items():
            if field not in found:
                found[field] = value
            elif isinstance(value, list):  # of several texts the first one counts
                found[field] = found[field] + value
    return found


def _object(text: bytes) -> Mapping:
    try:
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise CaptionError(NOT_UTF8) from error
    except (ValueError, RecursionError) as error:
        raise CaptionError(BAD_TEXT) from error
    if not isinstance(found, dict):
        raise CaptionError(BAD_TEXT)
    return found
