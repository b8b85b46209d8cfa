"""Regions for any shards: descriptions out of their captions, boxes by OWLv2, in a file beside each shard.

GRAIN's annotations were never released; these follow the way in which its authors made theirs (Halbe et al. 2024,
arXiv:2412.04429): at most ten descriptions of an image are queries of an open-vocabulary detector (Minderer et al.,
NeurIPS 2023), of which each box above a score has the best one. The picture is squashed to the detector's square, so
boxes are shares of its width and height. There is no suppression of boxes that overlap.

PyTorch and transformers are only imported where a detector is opened.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flair_jax.data.counted import counted
from flair_jax.data.prepare import parses, report
from flair_jax.data.prepare.atomic import InputError
from flair_jax.data.sources import files
from flair_jax.data.sources.base import Record, RecordError
from flair_jax.data.sources.open import open_source
from flair_jax.data.transforms import captions, images, region_files
from flair_jax.data.transforms.base import SampleError, parse
from flair_jax.data.transforms.regions import Region

MODEL = "google/owlv2-base-patch16-ensemble"
FIELDS = ("longSV_captions",)  # DreamLIP's longest captions: ShareGPT4V's
COUNT, THRESHOLD = 10, 0.3
SENTENCES, NOUN_PHRASES = "sentences", "noun_phrases"
EDGES = ".,!? -*"  # what descriptions do not begin with
NO_DESCRIPTIONS = "no descriptions"


@dataclasses.dataclass(frozen=True)
class Detect:
    """What to detect, and how; a job of `annotate.annotate`.

    Attributes:
      shards: paths of the shards.
      output: folder of the files; None: beside the shards.
      fields, splitting: of the texts that describe an image, as in `config.data.captions`.
      phrases: whether their SENTENCES are the descriptions, or the NOUN_PHRASES in them.
      count: descriptions of an image, the first ones.
      model: name at Hugging Face, or folder, of an OWLv2.
      threshold: smallest score of a box.
      batch: images that the detector sees at once.
      device: PyTorch's name of one; None: an accelerator where there is one.
      index_dir: see `open_source`.
    """

    shards: Sequence[str]
    output: str | None
    fields: Sequence[str] = FIELDS
    splitting: str = "sentences"
    phrases: str = SENTENCES
    count: int = COUNT
    model: str = MODEL
    threshold: float = THRESHOLD
    batch: int = 8
    device: str | None = None
    index_dir: str | None = None

    kind = region_files.KIND
    title = "regions"

    def about(self, shard: str) -> dict[str, Any]:
        """What the file of a shard depends on."""
        describe = _describer(self.phrases)
        return {
            "size": files.state(shard).size,
            "checksum": open_source([shard], self.index_dir).checksum,
            "fields": list(self.fields),
            "splitting": self.splitting,
            "phrases": self.phrases,
            "count": self.count,
            "model": self.model,
            "threshold": self.threshold,
            "versions": "; ".join(filter(None, (getattr(describe, "version", ""), _versions()))),
        }

    def write(self, target: pathlib.Path, shard: str, about: dict, tally: report.Tally, advance: Callable) -> None:
        """Writes the file of a shard, and counts."""
        region_files.write(target, self._detect(shard, tally, advance), about)

    def summary(self, tally: report.Tally) -> str:
        """The closing lines."""
        where = region_files.BESIDE if self.output is None else os.path.abspath(self.output)
        lines = [
            f"{counted(tally.read, 'image')} of {counted(len(self.shards), 'shard')} in this run",
            *report.reasons(tally),
        ]
        return "\n".join([*lines, f"\ntrain with --config.data.regions.source={where} --config.data.regions.count=5"])

    def _detect(self, shard: str, tally: report.Tally, advance: Callable) -> Iterator[tuple[str, list[Region]]]:
        """Every sample of a shard, those without a region, too."""
        describe, detector = _describer(self.phrases), _detector(self.model, self.device)
        source, done = open_source([shard], self.index_dir), 0
        numbers = iter(range(len(source)))
        while chunk := list(itertools.islice(numbers, self.batch)):
            advance(done)
            records = [_record(source, number, tally) for number in chunk]
            texts = [
                _texts(record, self, tally, source.where(number)) for record, number in zip(records, chunk, strict=True)
            ]
            described = [descriptions(own, self.count) for own in describe(texts)]
            pictures = [
                _picture(record, detector.size, tally, source.where(number)) if own else None
                for record, own, number in zip(records, described, chunk, strict=True)
            ]
            wanted = [number for number, picture in enumerate(pictures) if picture is not None]
            found: dict[int, list[Region]] = {one: [] for one in range(len(chunk))}
            if wanted:
                boxes = detector([pictures[one] for one in wanted], [described[one] for one in wanted], self.threshold)
                found |= dict(zip(wanted, boxes, strict=True))
            for one, number in enumerate(chunk):
                yield source.where(number)[1], found[one]
            done += len(chunk)


def _record(source, number: int, tally: report.Tally) -> Record | None:
    tally.read += 1
    try:
        return source[number]
    except RecordError as error:
        tally.skip(str(error), ", ".join(source.where(number)))
        return None


def _texts(record: Record | None, job: Detect, tally: report.Tally, where: tuple[str, str]) -> list[str]:
    if record is None:
        return []
    try:
        return captions.sentences(parse(record), job.fields, job.splitting)
    except SampleError as error:
        tally.skip(str(error), ", ".join(where))
        return []


def _picture(record: Record, size: tuple[int, int], tally: report.Tally, where: tuple[str, str]) -> np.ndarray | None:
    try:
        return images.squash(images.to_rgb(images.decode(record.image)), size)
    except SampleError as error:
        tally.skip(str(error), ", ".join(where))
        return None


def descriptions(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` different texts, without the marks that lists begin with."""
    found = {}
    for text in texts:
        text = text.strip().lstrip(EDGES).strip()
        if any(map(str.isalnum, text)):
            found.setdefault(text.lower(), text)
    return list(found.values())[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Tools, opened once a process


@functools.cache
def _describer(phrases: str) -> Callable[[Sequence[Sequence[str]]], list]:
    """(texts of each of some images) -> descriptions of each."""
    return NounPhrases(parses.Parser()) if phrases == NOUN_PHRASES else list


@functools.cache
def _detector(model: str, device: str | None) -> "Detector":
    return Detector(model, device)


def _versions() -> str:
    """Of the libraries. Raises InputError if one is not installed."""
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{error}: OWLv2, which finds the boxes, needs it: pip install 'flair_jax[regions]'"
        ) from error


class NounPhrases:
    """Texts to the noun phrases in them, pronouns left out.

    Attributes:
      version: of the parser.
    """

    def __init__(self, parser: Callable[[Iterable[str]], Iterator[parses.Parse]]):
        self._parser, self.version = parser, parser.version

    def __call__(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """The phrases of each image's texts, in their order."""
        parsed = self._parser(text for own in texts for text in own)
        return [[phrase for _ in own for phrase in _phrases(next(parsed))] for own in texts]


def _phrases(parse: parses.Parse) -> Iterator[str]:
    for chunk in parse.noun_chunks:
        if parse.tokens[chunk.root].pos != "PRON":
            yield parse.caption[parse.tokens[chunk.start].start : parse.tokens[chunk.end - 1].end]


class Detector:
    """An OWLv2 of transformers.

    Attributes:
      size: height and width of the pictures that it takes.

    Args:
      model: name at Hugging Face, or a folder.
      device: PyTorch's name of one; None: an accelerator where there is one.

    Raises:
      InputError: there is no such model.
    """

    def __init__(self, model: str, device: str | None = None):
        import torch
        import transformers

        self._torch = torch
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._processor = transformers.Owlv2Processor.from_pretrained(model)
            self._model = transformers.Owlv2ForObjectDetection.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(f"--model {model}: {error}") from error
        self._model.to(self._device).eval()
        side = self._model.config.vision_config.image_size
        self.size = (side, side)
        self._tokens = self._model.config.text_config.max_position_embeddings

    def __call__(
        self, pictures: Sequence[np.ndarray], texts: Sequence[Sequence[str]], threshold: float
    ) -> list[list[Region]]:
        """The regions of some pictures, the best ones first.

        Args:
          pictures: uint8 (H, W, 3) of `size`, squashed.
          texts: descriptions of each, at least one; the detector sees their first tokens alone (16 of published ones).
          threshold: smallest score of a box.
        """
        torch, most = self._torch, max(map(len, texts))
        queries = [text for own in texts for text in (*own, *[""] * (most - len(own)))]
        inputs = self._processor(
            text=queries,
            images=list(pictures),
            padding="max_length",
            truncation=True,
            max_length=self._tokens,
            return_tensors="pt",
        )
        for row, own in enumerate(texts):  # queries that begin with 0 are none, so they are no box's best one
            inputs["input_ids"][row * most + len(own) : (row + 1) * most] = 0
        with torch.inference_mode():
            outputs = self._model(**inputs.to(self._device))
        found = self._processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=[(1.0, 1.0)] * len(pictures)
        )
        return [list(_regions(one, own)) for one, own in zip(found, texts, strict=True)]


def _regions(found: Mapping[str, Any], texts: Sequence[str]) -> Iterator[Region]:
    scores, labels, boxes = (found[name].cpu().numpy() for name in ("scores", "labels", "boxes"))
    for number in np.argsort(-scores, kind="stable"):
        box = tuple(round(float(side), 5) for side in boxes[number])
        yield Region(box, texts[labels[number]], round(float(scores[number]), 4))
