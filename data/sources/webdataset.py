"""Webdataset tars, read in place: where each image and each json begins is indexed once, then any sample is near."""

import collections
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from flair_jax.data.sources import files, index
from flair_jax.data.sources.base import Record, ShardError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = tarfile.BLOCKSIZE


class WebDataset(index.IndexedShards):
    """All samples of some tars; see `base.Source`.

    A key is webdataset's: the path up to the first dot of the file name.
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
                f"the first is {self.shards[0]}; left out: {dict(self.skipped) or 'nothing'}"
            )

    def __getitem__(self, index: int) -> Record:
        image, json = self._parts(index)
        shard, key = self.where(index)
        return Record(key, shard, image, json)


def scan(path: str, partner: str = "json") -> index.Index:
    """Reads the headers of a tar and pairs each image with the member of its key that has the extension `partner`.

    What is no complete, plainly named sample is left out and counted: partners that are missing, second images or
    partners of a key, directories, links, names that are absolute or hold `..`. A tar that was cut keeps its complete
    members.

    Raises:
      ShardError: the file is no tar (or a compressed one, which has no offsets).
      OSError: it cannot be read.
    """
    skipped = collections.Counter()
    images, partners = {}, {}
    with files.stream(path) as (file, state):
        for member in _members(file, path, state.size, skipped):
            fault = _fault(member)
            if fault:
                skipped[fault] += 1
                continue
            key, extension = _key_and_extension(member.name)
            samples = images if extension in IMAGE_EXTENSIONS else partners if extension == partner else None
            if samples is None:
                continue  # .txt and the like are no fault
            if key in samples:
                skipped[f"second image or {partner} of a key"] += 1
            else:
                samples[key] = (member.offset_data, member.size)
    skipped[f"image without {partner}"] += len(images.keys() - partners.keys())
    skipped[f"{partner} without image"] += len(partners.keys() - images.keys())
    keys = [key for key in images if key in partners]
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return index.Index(
        state=state,
        spans=np.array([images[key] + partners[key] for key in keys], np.int64).reshape(-1, 4),  # (N, 4)
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        key_lengths=np.array([len(key) for key in encoded], np.int64),  # (N,)
        skipped=+skipped,  # without the zeros
    )


def _members(file: BinaryIO, path: str, size: int, skipped: collections.Counter) -> Iterator[tarfile.TarInfo]:
    """The members whose bytes are all there; how the tar ends is checked, because tarfile ends at damage in silence."""
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
