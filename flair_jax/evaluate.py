"""Evaluation: what a config lists, on the weights of a run or a file, as a report and pictures."""

import contextlib
import dataclasses
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath

from flair_jax import attention_maps, evaluation_sets, evaluation_tasks, models, pretrained, report, sharding
from flair_jax import config as configuration
from flair_jax.data import compositional_scenes, scenes
from flair_jax.data.benchmarks import base, prompts, table
from flair_jax.data.benchmarks import shards as shard_sets
from flair_jax.data.counted import counted
from flair_jax.data.sources.open import expand
from flair_jax.data.transforms import captions
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators import (
    Choice,
    ChoiceSet,
    Classification,
    ClassificationSet,
    Pointing,
    PointingSet,
    Regions,
    Retrieval,
    RetrievalSet,
    Segmentation,
    SegmentationSet,
    features,
)
from flair_jax.evaluators.segmentation import IGNORE
from flair_jax.evaluators.store import FeatureStore
from flair_jax.figures import heat
from flair_jax.untrained import looks_untrained

SHEET_IMAGES = 6
SHEET_TEXTS = 4  # per image

# Images, and for each its texts and their boxes or None: what a sheet of attention maps shows.
Examples = tuple[Sequence[np.ndarray], Sequence[Sequence[str]], Sequence[Sequence[Any]]]


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of evaluators


def scenes_evaluators(
    model: nn.Module, name: str, *, count: int, seed: int, size: int, classification: bool = False, **options
) -> Iterator[Any]:
    """Everything that the embedded data set can be asked: `count` unseen scenes, drawn in memory.

    With `classification` also which colours and shapes are in a scene, by descriptions such as "a large red circle".
    """
    unseen = scenes.evaluation_set(count, seed, size)
    tokenize = Tokenizer(model.context_length)

    def present(kind, masks, names, prompts):
        texts = evaluation_tasks.texts_of_classes(prompts, tokenize)
        labels = np.stack([(masks == 1 + number).any(axis=(1, 2)) for number in range(len(names))], axis=1)
        data = ClassificationSet(f"{name}_{kind}", names, unseen.images, labels, *texts, None, *texts)
        return Classification(model, data, preprocess=model.preprocessing)

    def segmentation(kind, masks, names, prompts):
        texts = evaluation_tasks.texts_of_classes(prompts, tokenize)
        labels = np.where(masks == 0, IGNORE, masks - 1).astype(np.uint8)
        data = SegmentationSet(f"{name}_{kind}", names, unseen.images, labels, *texts)
        return Segmentation(model, data, preprocess=model.preprocessing)

    whole = RetrievalSet(
        name, unseen.images, tokenize(unseen.descriptions), np.arange(count), texts=unseen.descriptions
    )
    yield Retrieval(model, whole, preprocess=model.preprocessing, **options)
    parts = RetrievalSet(f"{name}_parts", unseen.images, tokenize(unseen.parts), unseen.part_images, texts=unseen.parts)
    yield Retrieval(model, parts, preprocess=model.preprocessing, **options)
    objects = np.bincount(unseen.phrase_images, minlength=count)[unseen.phrase_images]
    phrases = PointingSet(
        *(name, unseen.images, tokenize(unseen.phrases), unseen.phrase_images, unseen.boxes, objects, unseen.phrases)
    )
    if model.has_pooling:
        yield Pointing(model, phrases, preprocess=model.preprocessing)
    if model.has_regions:
        yield Regions(model, phrases, preprocess=model.preprocessing)
    if classification:
        yield present("colour", unseen.colour_masks, unseen.colour_names, unseen.colour_prompts)
        yield present("shape", unseen.shape_masks, unseen.shape_names, unseen.shape_prompts)
    if model.has_local:
        yield segmentation("colour", unseen.colour_masks, unseen.colour_names, unseen.colour_prompts)
        yield segmentation("shape", unseen.shape_masks, unseen.shape_names, unseen.shape_prompts)


def scenes_examples(model: nn.Module, *, seed: int, size: int, **_) -> Examples:
    """A few unseen scenes, with a phrase and its box for each object."""
    few = scenes.evaluation_set(SHEET_IMAGES, seed, size)
    texts, boxes = [[] for _ in few.images], [[] for _ in few.images]
    for image, phrase, box in zip(few.phrase_images, few.phrases, few.boxes, strict=True):
        texts[image].append(phrase)
        boxes[image].append(tuple(box))
    return list(few.images), texts, boxes


def compositional_scenes_evaluators(
    model: nn.Module, name: str, *, count: int, seed: int, size: int, **options
) -> Iterator[Any]:
    """Captions of `count` unseen scenes against altered ones, and retrieval with the same captions."""
    unseen = compositional_scenes.compositional_set(count, seed, size)
    tokens = Tokenizer(model.context_length)(unseen.texts)
    questions = ChoiceSet(name, unseen.images, tokens, unseen.items, unseen.texts)
    yield Choice(model, questions, preprocess=model.preprocessing)
    captions = len(unseen.caption_images)
    pairs = RetrievalSet(name, unseen.images, tokens[:captions], unseen.caption_images, texts=unseen.texts[:captions])
    yield Retrieval(model, pairs, preprocess=model.preprocessing, **options)


def shards_evaluators(
    model: nn.Module,
    name: str,
    *,
    shards: Any,
    fields: Sequence[str] = captions.FIELDS,
    index_dir: str | None = None,
    upright: bool = False,
    **options,
) -> Iterator[Any]:
    """Retrieval among the samples of shards: every sentence of the given fields is a text of its image."""

    def read(_: pathlib.Path) -> base.Retrieval:
        data, skipped = shard_sets.read(shards, names_of(fields), index_dir=index_dir, upright=upright)
        for reason, number in skipped.most_common():
            logging.warning("%s: %s skipped: %s", name, counted(number, "sample"), reason)
        return data

    own = base.Benchmark(name, "retrieval", "", (), read, licence="", source=str(shards))
    yield evaluation_sets.SetEvaluator(model, own, pathlib.Path(), allow_missing=True, options=options)


def names_of(fields: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (fields,) if isinstance(fields, str) else tuple(fields)


def no_examples(model: nn.Module, **_) -> Examples:
    """For kinds whose evaluators draw figures of their own."""
    return [], [], []


# Kind -> its evaluators, and what its sheet of attention maps shows.
KINDS = {
    "scenes": (scenes_evaluators, scenes_examples),
    "compositional_scenes": (compositional_scenes_evaluators, no_examples),
    "shards": (shards_evaluators, no_examples),
    "benchmarks": (evaluation_sets.evaluators, no_examples),
}

# Kind -> the option that says where its data is, and its key in a config. A config may name an evaluator and leave this
# for its user to fill in: until then the evaluator is off.
SOURCES = {"shards": ("shards", "config.evaluators.{}.shards"), "benchmarks": ("root", "config.data_root")}


# ---------------------------------------------------------------------------------------------------------------------
# What a config lists


def sections(config: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The evaluators of a whole config: name -> kind and options. What reads captions follows `data`, unless told.

    Raises:
      ValueError: an unknown kind, an option that the kind does not have, or one that is missing.
    """
    found = {}
    data = config["data"]
    for name, section in config["evaluators"].items():
        if not isinstance(section, Mapping):
            raise ValueError(f"evaluators.{name} is {section!r}; expected a section with a kind and its options")
        kind = section.get("kind")
        source = SOURCES.get(kind, ("",))[0]
        # None is the default of any option, and says of the source that the evaluator is off.
        options = {key: value for key, value in section.items() if value is not None or key == source}
        options.pop("kind", None)
        options.pop("every", None)
        options = evaluation_tasks.several(options, "modes")
        if kind not in KINDS:
            raise ValueError(f"evaluators.{name}.kind is {kind!r}; expected one of {sorted(KINDS)}")
        known = _keywords(KINDS[kind][0])
        if unknown := options.keys() - known.keys():
            raise ValueError(f"evaluators.{name} of kind {kind!r} has no {sorted(unknown)}; there are {sorted(known)}")
        followed = {
            "fields": data["captions"]["fields"],
            "index_dir": data["index_dir"],
            "upright": data["upright"],
            "root": config["data_root"],
        }
        for key in followed.keys() & known.keys():
            if options.get(key) is None:
                options[key] = followed[key]
        if missing := {key for key, needed in known.items() if needed} - options.keys():
            raise ValueError(f"evaluators.{name} of kind {kind!r} lacks {sorted(missing)}")
        for key in ("modes", "pooling", "sets"):
            if key in options:
                options[key] = names_of(options[key])
        found[name] = kind, options
    return found


def is_off(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether an evaluator of `sections` has not been told where its data is, see `SOURCES`."""
    return kind in SOURCES and not options.get(SOURCES[kind][0])


def check(config: Mapping[str, Any]) -> None:
    """Refuses before a run what would be found wrong at its end, such as shards that are not there.

    Evaluators that are off are named in the log.

    Raises:
      ValueError: see `sections`; or scenes are not as large as the model's images; or no public set, mode or option of
        a task has such a name.
      FileNotFoundError: naming the evaluator.
    """
    for name, (kind, options) in sections(config).items():
        if kind in ("scenes", "compositional_scenes"):
            size = config["model"]["vision"]["image_size"]
            if size not in (options["size"], (options["size"], options["size"])):
                raise ValueError(f"evaluators.{name}.size is {options['size']}; model.vision.image_size is {size}")
        if kind == "benchmarks":
            table.select(options.get("sets", ("*",)))
            for task in evaluation_tasks.OPTIONS:
                evaluation_tasks.check_options(f"evaluators.{name}.{task}", task, options.get(task))
        for key in evaluation_tasks.RETRIEVAL_NAMES.keys() & options.keys():
            evaluation_tasks.check_names(
                f"evaluators.{name}.{key}", options[key], evaluation_tasks.RETRIEVAL_NAMES[key]
            )
        lacking = () if kind == "benchmarks" else set(options.get("modes") or ()) - {"global"}
        if lacking and config["model"]["pooling"] is None:
            raise ValueError(f"evaluators.{name}.modes has {sorted(lacking)}; a model without pooling has 'global'")
        if is_off(kind, options):
            logging.warning("evaluators.%s: not evaluated, since %s is not set", name, SOURCES[kind][1].format(name))
        elif kind == "benchmarks" and not os.path.isdir(options["root"]):
            raise FileNotFoundError(
                f"evaluators.{name}: config.data_root is {options['root']!r}; expected the folder of public sets"
            )
        elif kind == "benchmarks":
            for task, keys in evaluation_tasks.FILES.items():
                for key in keys:
                    path = (options.get(task) or {}).get(key)
                    if isinstance(path, str) and prompts.SLOT not in path and not os.path.exists(path):
                        raise FileNotFoundError(f"evaluators.{name}.{task}.{key}: {path} is not there")
        elif kind == "shards":
            try:
                expand(options["shards"])
            except FileNotFoundError as error:
                raise FileNotFoundError(f"evaluators.{name}.shards: {error}") from error


def check_early_stopping(config: Mapping[str, Any]) -> None:
    """Raises ValueError if a run would wait for an evaluator that is not there, is off or has no cadence."""
    if config["early_stopping"] is None:
        return
    name, listed = config["early_stopping"]["evaluator"], sections(config)
    problem = (
        f"there is none of that name; there are {sorted(listed)}"
        if name not in listed
        else f"it is off: set {SOURCES[listed[name][0]][1].format(name)}, or --config.early_stopping=None"
        if is_off(*listed[name])
        else f"it has no cadence: set config.evaluators.{name}.every to a number of steps"
        if not cadence(config, name)
        else None
    )
    if problem:
        raise ValueError(f"config.early_stopping.evaluator is {name!r}: {problem}")


def _keywords(function: Callable) -> dict[str, bool]:
    """See `evaluation_tasks.keywords`; `**options` are those of Retrieval."""
    rest = any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())
    return evaluation_tasks.keywords(function) | (evaluation_tasks.keywords(Retrieval) if rest else {})


def cadence(config: Mapping[str, Any], name: str) -> int:
    """Steps between evaluations by an evaluator: its own `every`, by default `eval_every`; 0: only at the end."""
    every = config["evaluators"][name].get("every")
    return config["eval_every"] if every is None else every


def due(config: Mapping[str, Any], step: int) -> list[str]:
    """The evaluators whose turn it is before a step, see `cadence`."""
    return [name for name in config["evaluators"] if (every := cadence(config, name)) and step % every == 0]


@dataclasses.dataclass
class Findings:
    """What an evaluation has found so far: the arguments of `report.write`."""

    results: list[report.Result] = dataclasses.field(default_factory=list)
    details: list[report.SetDetails] = dataclasses.field(default_factory=list)
    figures: list[report.Figure] = dataclasses.field(default_factory=list)
    missing: list[report.Missing] = dataclasses.field(default_factory=list)
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    before: Mapping[str, float] | None = None

    def write(self, workdir: epath.PathLike) -> None:
        if jax.process_index() == 0:
            report.write(workdir, **vars(self))


def run(
    config: Mapping[str, Any],
    model: nn.Module,
    params: Any,
    workdir: epath.PathLike | None = None,
    *,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    before: Mapping[str, float] | None = None,
) -> list[report.Result]:
    """All results of a config's evaluators, each built when its turn comes and dropped before the next one.

    Args:
      config: the whole config.
      model, params: what to evaluate; every process takes part.
      workdir: where to write the report after each evaluator, for nothing to be lost; None: nowhere, and no figures.
      names: of the evaluators; None: all.
      notes, warnings: texts for the top of the report.
      before: values of the weights that the run started from, see `report.write`.
    """
    found = Findings(notes=notes, warnings=warnings, before=before)
    for name, (kind, options) in sections(config).items():
        if (names is not None and name not in names) or is_off(kind, options):
            continue
        for evaluator in KINDS[kind][0](model, name, **options):
            if isinstance(evaluator, evaluation_tasks.UnusableSet):
                found.missing.append(evaluator.missing())
                continue
            try:
                new = list(evaluator.run(params))
            except evaluation_tasks.UnusableSet as unusable:
                logging.warning("not evaluated: %s", unusable)
                found.missing.append(unusable.missing())
                continue
            found.results += new
            if isinstance(evaluator, evaluation_sets.SetEvaluator):
                found.details.append(evaluator.details())
            if workdir is not None and new:
                found.write(workdir)  # before the figures, which may take a while
                found.figures += _figures(evaluator, params, new[0])
    for results, details in list(evaluation_sets.averages(found.results, found.details)):
        found.results += results
        found.details.append(details)
    if workdir is not None:
        found.write(workdir)
    everything = [result.name for result in found.results]
    if len(set(everything)) < len(everything):
        twice = sorted({name for name in everything if everything.count(name) > 1})
        logging.warning("results of the same name, of which the last one counts: rename an evaluator. %s", twice)
    return found.results


def _figures(evaluator: Any, params: Any, result: report.Result) -> list[report.Figure]:
    """What an evaluator draws of the set of a result. What cannot be drawn is reported and ends nothing."""
    drawn = []
    try:
        for title, image in evaluator.figures(params):
            drawn.append(report.Figure.of(result.task, result.set, title, image))
    except Exception:
        logging.exception("a figure was not drawn; the report is whole")
    return drawn


def evaluate(config: Mapping[str, Any], workdir: epath.PathLike) -> dict[str, float]:
    """Evaluates the newest checkpoint in `workdir`, or the weights that `init_from` names, and writes the report.

    With `config.model` None, or without a name, the model is the one that the weights say they are of.

    Returns:
      Values by name, as in report.json. Nothing is written if there is nothing to evaluate.

    Raises:
      ValueError: the config is wrong, lists no evaluator, or none that has been told where its data is.
      FileNotFoundError: there are no weights: a model with random weights is never evaluated in silence.
    """
    config = configuration.normalize(config)
    if not config["evaluators"]:
        raise ValueError("config.evaluators is empty: nothing to evaluate")
    listed = sections(config)
    if all(is_off(*section) for section in listed.values()):
        keys = sorted({SOURCES[kind][1].format(name) for name, (kind, _) in listed.items()})
        raise ValueError(f"nothing to evaluate: set {' or '.join(keys)}")
    weights = config["init_from"] or workdir
    section = config["model"]
    if section is not None and "name" not in section:
        section = pretrained.model_of(config, workdir)
    params, section = pretrained.read(weights, section)
    config = {**config, "model": section}
    configuration.check(config)
    check(config)
    model = models.create(section)
    warnings = looks_untrained(params)
    for warning in warnings:
        logging.warning("%s: %s", weights, warning)
    with jax.set_mesh(sharding.create_mesh(**config["mesh"])), _session(config, workdir):
        params = on_all_devices(params)
        results = run(config, model, params, workdir, notes=[f"weights: {weights}"], warnings=warnings)
        draw_attention_sheets(config, model, params, workdir)
    return report.flat(results)


def on_all_devices(params: Any) -> Any:
    """Parameters that each process has read, whole on every device of the mesh of `jax.set_mesh`."""
    # Over the host: an array cannot move from a device of this process to those of the others.
    return jax.device_put(jax.device_get(params), sharding.replicated(jax.sharding.get_mesh()))


def _session(config: Mapping[str, Any], workdir: epath.PathLike) -> contextlib.AbstractContextManager:
    """The feature store of an evaluation, on a file system that can append to files.

    Raises:
      ValueError: its folder cannot be made.
    """
    folder = config["feature_store"] or os.fspath(epath.Path(workdir) / "features")
    if "://" in folder:
        logging.warning("%s is in a store, which cannot keep features: --config.feature_store=FOLDER", folder)
        return contextlib.nullcontext()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"config.feature_store is {folder!r}; expected a folder for features: {error}") from error
    return features.session(store=FeatureStore(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def pictures(workdir: epath.PathLike) -> epath.Path:
    """The folder for pictures, created if need be."""
    folder = epath.Path(workdir) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def draw_attention_sheets(config: Mapping[str, Any], model: nn.Module, params: Any, workdir: epath.PathLike) -> None:
    """A sheet of attention maps for each evaluator, if the model has them; every process takes part, the first writes.

    A sheet that cannot be drawn is reported and ends nothing: the work that it illustrates is done.
    """
    if not model.has_pooling:
        return
    for name, (kind, options) in sections(config).items():
        try:
            images, texts, boxes = KINDS[kind][1](model, **options)
            if not any(map(len, texts)):
                continue
            sheet = attention_sheet(model, params, images, texts, boxes)
            if jax.process_index() == 0:
                with (pictures(workdir) / f"attention_{name}.png").open("wb") as file:
                    sheet.save(file, format="PNG")
        except Exception:
            logging.exception("the sheet of attention maps of evaluators.%s was not drawn; the report is whole", name)


def attention_sheet(model: nn.Module, params: Any, images, texts, boxes):
    """The picture of `Examples`: a row per image, with a map per text of its own, see `heat.sheet`."""
    tokens = Tokenizer(model.context_length)([text for row in texts for text in row])
    maps, zero_mass = attention_maps.heat_maps(model, params, np.stack(images), tokens, preprocess=model.preprocessing)
    ends = np.cumsum([len(row) for row in texts])
    own = [slice(end - len(row), end) for row, end in zip(texts, ends, strict=True)]
    rows = []
    for image, (pixels, row, texts_of, row_boxes) in enumerate(zip(images, texts, own, boxes, strict=True)):
        heats, masses = maps[image, texts_of], zero_mass[image, texts_of]
        captions = [f"{text}\n{heat.attention_caption(*one)}" for text, *one in zip(row, heats, masses, strict=True)]
        rows.append(heat.Row(pixels, heats, captions, boxes=row_boxes))
    return heat.sheet(rows, heat.attention_scale([row.maps for row in rows]))
