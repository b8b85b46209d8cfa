"""Evaluation: what a config lists, on the weights of a run or a file, as a report and pictures."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from flair_jax import attention_maps, models, pretrained, sharding
from flair_jax.data import loader, scenes
from flair_jax.data.transforms import captions
from flair_jax.data.transforms.images import normalize
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators import Pointing, PointingSet, Retrieval, RetrievalSet, Segmentation, SegmentationSet
from flair_jax.evaluators.segmentation import IGNORE

SHEET_IMAGES = 6


def scenes_evaluators(model: nn.Module, name: str, *, count: int, seed: int, size: int, **options) -> list:
    """Everything that the embedded data set can be asked: `count` unseen scenes, drawn in memory."""
    unseen = scenes.evaluation_set(count, seed, size)
    tokenize = Tokenizer(model.context_length)
    options["preprocess"] = normalize

    def segmentation(kind, masks, names, prompts):
        owners = np.repeat(np.arange(len(names)), [len(texts) for texts in prompts])
        tokens = tokenize([text for texts in prompts for text in texts])
        labels = np.where(masks == 0, IGNORE, masks - 1).astype(np.uint8)
        data = SegmentationSet(f"{name}_{kind}", names, unseen.images, labels, tokens, owners)
        return Segmentation(model, data, preprocess=normalize)

    whole = RetrievalSet(name, unseen.images, tokenize(unseen.descriptions), np.arange(count))
    parts = RetrievalSet(f"{name}_parts", unseen.images, tokenize(unseen.parts), unseen.part_images)
    objects = np.bincount(unseen.phrase_images, minlength=count)[unseen.phrase_images]
    phrases = PointingSet(name, unseen.images, tokenize(unseen.phrases), unseen.phrase_images, unseen.boxes, objects)
    return [
        Retrieval(model, whole, **options),
        Retrieval(model, parts, **options),
        Pointing(model, phrases, preprocess=normalize),
        segmentation("colour", unseen.colour_masks, unseen.colour_names, unseen.colour_prompts),
        segmentation("shape", unseen.shape_masks, unseen.shape_names, unseen.shape_prompts),
    ]


def shards_evaluators(
    model: nn.Module, name: str, *, shards: Any, fields: Iterable[str] = captions.FIELDS, **options
) -> list:
    """Retrieval among the samples of webdataset shards: every sentence of the given fields is a text of its image.

    A config may name the evaluator and leave `shards` empty for its user to fill in: then there is nothing to evaluate.
    """
    if not shards:
        logging.warning("evaluators.%s.shards is empty: not evaluated", name)
        return []
    samples = loader.evaluation_samples(shards, model.image_size, fields=tuple(fields))
    images, texts, owners = [], [], []
    for _, image, sentences in samples:
        owners += [len(images)] * len(sentences)
        texts += sentences
        images.append(image)
    for reason, number in samples.skipped.most_common():
        logging.warning("%s: %d samples were skipped: %s", name, number, reason)
    if not images:
        raise ValueError(f"evaluators.{name}: no usable sample in {shards}")
    data = RetrievalSet(name, images, Tokenizer(model.context_length)(texts), np.asarray(owners))
    return [Retrieval(model, data, preprocess=normalize, **options)]


KINDS = {"scenes": scenes_evaluators, "shards": shards_evaluators}


def build(config: Mapping[str, Any], model: nn.Module) -> list:
    """The evaluators of a config's `evaluators` section: name -> {"kind": one of `KINDS`, options}."""
    evaluators = []
    for name, section in config.items():
        options = dict(section)
        kind = options.pop("kind")
        if kind not in KINDS:
            raise ValueError(f"evaluators.{name}.kind is {kind!r}; expected one of {sorted(KINDS)}")
        evaluators += KINDS[kind](model, name, **options)
    return evaluators


def run(evaluators: Iterable, params: Any) -> dict[str, float]:
    """All metrics of all evaluators, by name."""
    return {name: float(value) for evaluator in evaluators for name, value in evaluator.run(params)}


def evaluate(config: Mapping[str, Any], workdir: epath.PathLike) -> dict[str, float]:
    """Evaluates the newest checkpoint in `workdir`, or the weights that `init_from` names, and writes the report.

    Raises:
      FileNotFoundError: there are no weights: a model with random weights is never evaluated in silence.
    """
    workdir = epath.Path(workdir)
    params, section = pretrained.read(config["init_from"] or workdir, config["model"])
    model = models.create(section)
    with jax.set_mesh(sharding.create_mesh(**config["mesh"])):
        params = jax.device_put(params, sharding.replicated(jax.sharding.get_mesh()))
        results = run(build(config["evaluators"], model), params)
        write(workdir, results, config["evaluators"], model, params)
    return results


def write(workdir: epath.PathLike, results: Mapping[str, float], config, model: nn.Module, params: Any) -> None:
    """Writes the report and the sheets of attention maps; every process takes part, the first one writes."""
    if jax.process_index() == 0:
        write_report(workdir, results)
    for name, sheet in attention_sheets(config, model, params):
        if jax.process_index() == 0:
            with (pictures(workdir) / f"attention_{name}.png").open("wb") as file:
                sheet.save(file, format="PNG")


def pictures(workdir: epath.PathLike) -> epath.Path:
    """The folder for pictures, created if need be."""
    folder = epath.Path(workdir) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_report(workdir: epath.PathLike, results: Mapping[str, float]) -> str:
    """Writes `report.json`, flat, and `report.md`, the same numbers in tables with chance beside; returns the tables.

    A name is `task/set/metric` or `task/set/way/metric`: a set is a table, a metric a row and a way a column.
    """
    workdir = epath.Path(workdir)
    (workdir / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    tables: dict[str, dict[str, dict[str, float]]] = {}  # set -> metric -> way -> value
    for name, value in results.items():
        task, data, *way, metric = name.split("/")
        if metric.startswith("chance"):
            # `pointing/scenes/chance` belongs to the first metric of the set.
            way, metric = [metric.replace("_", " ")], next(iter(tables[f"{task}/{data}"]))
        elif way == ["iou"]:
            way, metric = [], f"iou of {metric}"
        rows = tables.setdefault(f"{task}/{data}", {})
        rows.setdefault(metric, {})[way[0] if way else "value"] = value
    text = "\n".join(_table(title, rows) for title, rows in tables.items())
    (workdir / "report.md").write_text(text)
    return text


def _table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    ways = list(dict.fromkeys(way for row in rows.values() for way in row))
    cells = [
        [title, *ways],
        *[[name, *[f"{row[w]:.3f}" if w in row else "" for w in ways]] for name, row in rows.items()],
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    rule = " | ".join("-" * (width - 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
    return "".join(f"| {line} |\n" for line in [lines[0], rule, *lines[1:]])


def attention_sheets(config: Mapping[str, Any], model: nn.Module, params: Any) -> Iterator[tuple[str, Image.Image]]:
    """Yields a sheet of attention maps for each evaluator that has pictures to show."""
    tokenize = Tokenizer(model.context_length)
    for name, section in config.items():
        boxes = None
        if section["kind"] == "scenes":
            few = scenes.evaluation_set(SHEET_IMAGES, section["seed"], section["size"])
            images, texts, boxes = list(few.images), [[] for _ in few.images], [[] for _ in few.images]
            for image, phrase, box in zip(few.phrase_images, few.phrases, few.boxes, strict=True):
                texts[image].append(phrase)
                boxes[image].append(tuple(box))
        elif section["shards"]:
            samples = loader.evaluation_samples(section["shards"], model.image_size)
            chosen = list(itertools.islice(samples, SHEET_IMAGES))
            images, texts = [image for _, image, _ in chosen], [sentences[:4] for _, _, sentences in chosen]
        else:
            continue
        maps = [
            attention_maps.heat_maps(model, params, image[None], tokenize(row), preprocess=normalize)
            for image, row in zip(images, texts, strict=True)
        ]
        heats, zero_mass = [heat.maps[0] for heat in maps], [heat.zero_mass[0] for heat in maps]
        yield name, attention_maps.sheet(images, texts, heats, zero_mass, boxes)
