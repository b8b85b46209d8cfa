"""Webdataset tars, read in place: the offsets of images and jsons are indexed once, for random access."""

import collections
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import BinaryIO

import numpy as np

from flair_jax.data.sources import files, index
from flair_jax.data.sources.base import Record, ShardError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = tarfile.BLOCKSIZE
DOTTED = "name with a dot inside: a key ends at the first dot; rename it, as a.00.jpg to a_00.jpg"


class WebDataset(index.IndexedShards):
    """All samples of some tars; see `base.Source`.

    The key is defined as in webdataset: the path up to the first dot of the file name.
    """

    def __init__(self, shards: Sequence[str], index_dir: str | os.PathLike | None = None):
        """
        Raises:
          FileNotFoundError: a shard does not exist.
          ShardError: a file is no tar, or no shard holds a complete sample.
        """
        super().__init__(shards, scan, index_dir)
        if not len(self):
            raise ShardError(
                f"no sample with an image ({'|'.join(IMAGE_EXTENSIONS)}) and a json in {len(self.shards)} shard(s), "
                f"the first is {self.shards[0]}; left out: {self._left_out()}"
            )

    def __getitem__(self, index: int) -> Record:
        image, json = self._parts(index)
        shard, key = self.where(index)
        return Record(key, shard, image, json)


def scan(path: str, partner: str = "json") -> index.Index:
    """Reads the headers of a tar and pairs each image with the member of its key that has the extension `partner`.

    What is no complete, plainly named sample is left out, counted by reason, and the first one is named: partners that
    are missing, second images or partners of a key, directories, links, names that are absolute or hold `..`, and
    images and partners whose names have more dots (see `DOTTED`). A tar that was cut keeps its complete members.

    Raises:
      ShardError: the file is no tar (or a compressed one, which has no offsets).
      OSError: it cannot be read.
    """
    skipped, examples = collections.Counter(), {}

    def skip(reason: str, name: str) -> None:
        skipped[reason] += 1
        examples.setdefault(reason, name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))

    images, partners = {}, {}  # key -> (offset, size, name)
    dotted = {}  # name of an image or a partner with a longer extension, such as 00.jpg -> its key
    with files.stream(path) as (file, state):
        for member in _members(file, path, state.size, skipped):
            fault = _fault(member)
            if fault:
                skip(fault, member.name)
                continue
            key, extension = _key_and_extension(member.name)
            last = extension.rpartition(".")[2]
            samples = images if last in IMAGE_EXTENSIONS else partners if last == partner else None
            if samples is None:
                continue  # .txt and the like are no fault
            if last != extension:
                dotted[member.name] = key
            elif key in samples:
                skip(f"second image or {partner} of a key", member.name)
            else:
                samples[key] = (member.offset_data, member.size, member.name)
    keys = [key for key in images if key in partners]
    for key, (_, _, name) in images.items():
        if key not in partners:
            skip(f"image without {partner}", name)
    for key, (_, _, name) in partners.items():
        if key not in images:
            skip(f"{partner} without image", name)
    for name in _lost(dotted, set(keys), partner):
        skip(DOTTED, name)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return index.Index(
        state=state,
        spans=np.array([images[key][:2] + partners[key][:2] for key in keys], np.int64).reshape(-1, 4),  # (N, 4)
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        key_lengths=np.array([len(key) for key in encoded], np.int64),  # (N,)
        skipped=skipped,
        examples=examples,
    )


def _lost(dotted: Mapping[str, str], complete: Set[str], partner: str) -> list[str]:
    """Names with a longer extension whose writer meant samples of their own, in the order of the tar.

    `KEY.masks.png` beside the sample KEY is one more part of it, and no fault. Without such a sample, or where an image
    and a partner share the longer name (`a.00.jpg`, `a.00.json`), the dot was meant as a part of the key.
    """
    stems = {name: name.rpartition(".")[0] for name in dotted}
    with_image = {stem for name, stem in stems.items() if not name.lower().endswith(f".{partner}")}
    with_partner = {stem for name, stem in stems.items() if name.lower().endswith(f".{partner}")}
    pairs = with_image & with_partner
    return [name for name, key in dotted.items() if key not in complete or stems[name] in pairs]


def _members(file: BinaryIO, path: str, size: int, skipped: collections.Counter) -> Iterator[tarfile.TarInfo]:
    """The complete members. The end of the tar is checked, because tarfile stops at damage without an error."""
    if size == 0:
        skipped["empty file"] += 1
        return
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (closing it would not close the file)
    except tarfile.TarError as error:
        raise ShardError(
            f"{path} is not a tar file ({error}). Shards are uncompressed webdataset tars: unpack .tar.gz, "
            "and fetch or write the file again if it is damaged."
        ) from error
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:  # the file ends inside of a header or before the next one
            skipped["shard cut short"] += 1
            return
        if member is None:
            break
        if member.offset_data + member.size > size:
            skipped["shard cut short"] += 1
            return
        yield member
    file.seek(tar.offset)
    end = file.read(BLOCK)
    if len(end) < BLOCK:  # only complete members, but no end mark: more may have followed
        skipped["shard cut short"] += 1
    elif end.strip(b"\0"):
        skipped["damaged header, rest of the shard not read"] += 1
    elif any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b"")):
        skipped["more after the end mark of the tar, not read; join tars with `tar --concatenate`, not `cat`"] += 1


def _fault(member: tarfile.TarInfo) -> str | None:
    if member.isdir():
        return "directory"
    if member.issym() or member.islnk():
        return "link"
    if not member.isreg() or member.issparse():
        return "special file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe name"
    if not _key_and_extension(member.name)[0]:
        return "name without a key"
    return None


def _key_and_extension(name: str) -> tuple[str, str]:
    """webdataset's rule: split at the first dot of the file name. A file name that begins with a dot has no key."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()
