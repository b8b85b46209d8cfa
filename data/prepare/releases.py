"""The releases: how their captions are read, by which key images are found, and what a record holds."""

import dataclasses
import json
from collections.abc import Callable, Mapping

from flair_jax.data.prepare import rows
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
        return rows.raw_captions([text.decode(encoding)], splitting)
    except UnicodeDecodeError as error:
        raise CaptionError(NOT_IN_ENCODING) from error


RELEASES = {
    "dreamlip": Release("CC3M, CC12M or YFCC15M with DreamLIP's captions, joined by URL", "tars", own=_dreamlip),
    "pixelprose": Release("PixelProse's descriptions, joined by URL", "tars", own=_pixelprose),
    "cc3m": Release("Conceptual Captions with its raw captions alone, which are in the tars", "tars", own=_cc3m),
    "folder": Release("your own images in a folder, and a file of captions", "folder", merged=True),
    "coco": Release("COCO's training images and their five captions each", "folder", merged=True),
    "flickr30k": Release("Flickr30k's training images and their five captions each", "folder", merged=True),
}


def url_of(text: bytes) -> str:
    """The URL in the JSON beside an image. Raises CaptionError if there is none."""
    found = _object(text)
    for field in URL_FIELDS:
        if isinstance(found.get(field), str) and found[field].strip():
            return found[field].strip()
    raise CaptionError(f"json without {' or '.join(URL_FIELDS)}")


def combined(captions: list[dict], merged: bool) -> dict:
    """The captions of an image from those of its rows."""
    if not merged or len(captions) == 1:
        return captions[0]
    return {field: [sentence for row in captions for sentence in row[field]] for field in captions[0]}


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
