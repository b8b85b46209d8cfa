"""A task's data as evaluators of a model: pictures become pixels, texts become tokens."""

import dataclasses
import difflib
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import freeze

from flair_jax import evaluators, initialize
from flair_jax.data.benchmarks import base, prompts
from flair_jax.data.benchmarks import segmentation as segmentation_sets
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms import windows as text_windows
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
    WholeImages,
)
from flair_jax.evaluators.features import BrokenImages
from flair_jax.report import Missing


class UnusableSet(Exception):
    """A set that cannot be evaluated: files or images are missing or broken. The others can.

    Attributes:
      benchmark: its entry in the table.
      reason: what is missing or wrong.
      files: those that are not there, relative to the root.
    """

    def __init__(self, benchmark: base.Benchmark, reason: str, files: Sequence[str] = ()):
        self.benchmark, self.reason, self.files = benchmark, reason, tuple(files)
        super().__init__(f"{benchmark.name}: {reason}")

    def missing(self) -> Missing:
        """Its row in the report."""
        entry = self.benchmark
        reason = "" if self.files else self.reason
        return Missing(entry.task, entry.name, entry.title, self.files, entry.licence, entry.source, reason)


class Pixels(Sequence):
    """Pictures as uint8 pixels (H, W, 3) of one size, by index; decoded when asked for.

    Attributes:
      keys: for the feature store: a text per picture that identifies its pixels and how they were prepared.

    Args:
      pictures: of a set.
      size: height and width.
      fit: RGB image, size -> pixels, such as a model's `preprocessing.fit`.
    """

    def __init__(
        self,
        pictures: Sequence[base.Picture],
        size: tuple[int, int],
        fit: Callable[[Any, tuple[int, int]], np.ndarray],
    ):
        self._pictures, self._size, self._fit = pictures, size, fit

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self._pictures), *self._size, 3

    def __getitem__(self, index: int) -> np.ndarray:
        """
        Raises:
          ImageError: naming the file. OSError: it cannot be read.
        """
        return self._fit(image_rules.to_rgb(self._pictures[index].decode()), self._size)

    @property
    def keys(self) -> list[str]:
        return [f"{self._fit.__name__} {self._size} {picture.key()}" for picture in self._pictures]


def several(options: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Options of which some are one name or several: always several."""
    return {key: (value,) if key in keys and isinstance(value, str) else value for key, value in options.items()}


def retrieval(
    model: nn.Module, benchmark: base.Benchmark, data: base.Retrieval, options: Mapping[str, Any]
) -> Iterator[Retrieval]:
    """Retrieval with texts as the model takes them, and in other ways that options ask for, an evaluator for each.

    Options, beside those of `Retrieval`:
      windows: a way or several of `windows.WAYS`, of what is done with texts that are longer than the context.
      context_length: evaluates with a longer context, too, of stretched position embeddings; None: no.
    """
    options = several(options, "windows", "modes", "pooling")
    ways, modes = options.pop("windows", ("truncate",)), options.pop("modes", None)
    longer = options.pop("context_length", None)
    pixels = Pixels(data.pictures, model.image_size, model.preprocessing.fit)

    def evaluator(context_length, way, label, text_tower=None):
        tokens, rows = text_windows.text_rows(data.texts, context_length, way)
        rows = None if way == "truncate" else rows
        known = modes if modes is None or rows is None else [mode for mode in modes if mode != "topk"]
        texts = RetrievalSet(benchmark.name, pixels, tokens, data.image_of_text, rows, data.texts)
        return Retrieval(
            model, texts, preprocess=model.preprocessing, modes=known, label=label, text_tower=text_tower, **options
        )

    for way in ways:
        yield evaluator(model.context_length, way, "" if way == "truncate" else way)
    if longer is not None and longer > model.context_length:
        long_model = model.clone(text_options=freeze({**model.text_options, "context_length": longer}))
        stretch = functools.partial(initialize.stretch_context, length=longer)
        yield evaluator(longer, "truncate", f"{longer} tokens", (long_model, stretch))


def classification(
    model: nn.Module, benchmark: base.Benchmark, data: base.Classification, options: Mapping[str, Any]
) -> Iterator[Classification]:
    """`evaluators.Classification`, with prompts of the set's templates.

    Options besides the evaluator's own:
      templates: texts with `{c}` for the name of a class; or the name of a set whose templates `prompts` has.
      names: of each class its name or a list of names, in the order of the labels; or a JSON file with this list.
      descriptions: a JSON file {class: [description, …]}, or a folder with a file `SET.json` for each set; prompts are
        then as in `prompts.from_descriptions`, with templates that a relative clause can follow. The descriptions
        alone are what mode "regions" compares with.

    Raises:
      ValueError: names, descriptions and classes do not fit together, or a template has no `{c}`.
      UnusableSet: the folder of descriptions has no file for the set.
    """
    options = several(options, "modes")
    templates, names, descriptions = (options.pop(key, None) for key in ("templates", "names", "descriptions"))
    classes = data.classes
    if names is not None:
        classes = prompts.read_names(names) if isinstance(names, str) else prompts.as_classes(names)
    if len(classes) != len(data.classes):
        raise ValueError(f"{benchmark.name}: {len(classes)} names for {len(data.classes)} classes")
    if isinstance(templates, str):
        templates = (templates,) if prompts.SLOT in templates else prompts.templates(templates)
    described = None
    if descriptions is None:
        texts = prompts.from_templates(classes, templates or data.templates)
    else:
        known = prompts.read_descriptions(_of_set(benchmark, descriptions))
        texts = prompts.from_descriptions(classes, known, templates or prompts.DESCRIBED)
        described = prompts.descriptions_of(classes, known)
        if not any(described):
            raise ValueError(f"{benchmark.name}: no class in {descriptions} has a description")
    tokenize = Tokenizer(model.context_length)
    titles = [names[0] for names in classes]
    pixels = Pixels(data.pictures, model.image_size, model.preprocessing.fit)
    alone = (None, None) if described is None else texts_of_classes(described, tokenize)
    own = texts_of_classes(texts, tokenize)
    found = ClassificationSet(benchmark.name, titles, pixels, data.labels, *own, data.counted, *alone)
    yield Classification(model, found, preprocess=model.preprocessing, **options)


def texts_of_classes(texts: Sequence[Sequence[str]], tokenize: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Texts of each class, one after the other: their tokens, int32 (P, T), and the class of each, int (P,)."""
    owner = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    return tokenize([text for own in texts for text in own]), owner


def _of_set(benchmark: base.Benchmark, path: str) -> pathlib.Path:
    """The file itself, or the set's own in a folder. Raises UnusableSet: the folder has none."""
    file = pathlib.Path(path)
    if file.is_dir():
        file /= f"{benchmark.name}.json"
        if not file.is_file():
            raise UnusableSet(benchmark, f"its descriptions are missing: {file}")
    return file


class SizedPixels(Pixels):
    """Pixels of images that boxes were measured in; images of other proportions are refused.

    Args:
      sizes: int (I, 2), width and height of each image where its boxes were measured.
    """

    def __init__(self, pictures: Sequence[base.Picture], sizes: np.ndarray, size: tuple[int, int], fit: Callable):
        super().__init__(pictures, size, fit)
        self._sizes = sizes

    def __getitem__(self, index: int) -> np.ndarray:
        picture = self._pictures[index]
        image = picture.decode()
        base.check_proportions(picture.path, image.size, tuple(int(side) for side in self._sizes[index]))
        return self._fit(image_rules.to_rgb(image), self._size)


def choice(model: nn.Module, benchmark: base.Benchmark, data: base.Choice, options: Mapping[str, Any]) -> Iterator[Any]:
    """Which of some texts or images is right.

    Raises:
      UnusableSet: no item has all its images.
    """
    if not data.items:
        raise UnusableSet(benchmark, "no item has all its images")
    pixels = Pixels(data.pictures, model.image_size, model.preprocessing.fit)
    tokens = Tokenizer(model.context_length)(data.texts)
    yield Choice(
        model,
        ChoiceSet(benchmark.name, pixels, tokens, data.items, data.texts, whole_images(model, data.pictures)),
        preprocess=model.preprocessing,
        **several(options, "modes"),
    )


def whole_images(model: nn.Module, pictures: Sequence[base.Picture]) -> WholeImages | None:
    """The images that the pictures are boxes of, for models with regions; None unless all of them are."""
    if not model.has_regions or any(picture.box is None or picture.box_in is None for picture in pictures):
        return None
    size, number = image_rules.pair(model.image_size), {}
    owners, found = np.empty(len(pictures), int), np.zeros((len(pictures), 4), np.float32)
    for row, picture in enumerate(pictures):
        whole = dataclasses.replace(picture, box=None, box_in=None), picture.box_in
        owners[row] = number.setdefault(whole, len(number))
        for box in model.preprocessing.fit_boxes(np.array([picture.box]), picture.box_in, size):  # one, or cut away
            found[row] = box / (size[1], size[0], size[1], size[0])
    wholes, sizes = zip(*number, strict=True)
    return WholeImages(SizedPixels(wholes, np.array(sizes), size, model.preprocessing.fit), owners, found)


def pointing(
    model: nn.Module, benchmark: base.Benchmark, data: base.Pointing, options: Mapping[str, Any]
) -> Iterator[Any]:
    """Where phrases point, and with a query decoder what its regions find. Phrases of which the model's crop leaves
    nothing to hit are left out, and counted.

    Raises:
      UnusableSet: no phrase is left.
    """
    size, options = image_rules.pair(model.image_size), several(options, "modes")
    boxes = [
        model.preprocessing.fit_boxes(own, data.sizes[image], size)
        for own, image in zip(data.boxes, data.image_of_text, strict=True)
    ]
    seen = np.array([len(own) > 0 for own in boxes])
    if not seen.any():
        raise UnusableSet(benchmark, f"the crop to {size[0]} x {size[1]} pixels cuts all boxes away")
    texts = [text for text, visible in zip(data.texts, seen, strict=True) if visible]
    boxes = [own for own in boxes if len(own)]
    owners = data.image_of_text[seen]
    # The objects of an image are those that its phrases name.
    objects = np.array([len(np.unique(np.concatenate(rows), axis=0)) for rows in _grouped(boxes, owners)])
    phrases = PointingSet(
        benchmark.name,
        SizedPixels(data.pictures, data.sizes, size, model.preprocessing.fit),
        Tokenizer(model.context_length)(texts),
        owners,
        boxes,
        objects[np.unique(owners, return_inverse=True)[1]],
        texts,
        int((~seen).sum()),
    )
    if model.has_local:
        yield Pointing(model, phrases, preprocess=model.preprocessing, **options)
    if model.has_regions:
        own = {key: value for key, value in options.items() if key != "modes"}
        yield Regions(model, phrases, preprocess=model.preprocessing, **own)


def _grouped(rows: Sequence[Any], owners: np.ndarray) -> list[list[Any]]:
    """The rows of each owner, owners in ascending order."""
    found: dict[int, list[Any]] = {int(owner): [] for owner in np.unique(owners)}
    for row, owner in zip(rows, owners, strict=True):
        found[int(owner)].append(row)
    return list(found.values())


def segmentation(
    model: nn.Module, benchmark: base.Benchmark, data: base.Segmentation, options: Mapping[str, Any]
) -> Iterator[Segmentation]:
    """Zero-shot segmentation of pictures of any size, by a model that projects its patches.

    Args:
      options: of `evaluators.Segmentation`, and
        classes: lines with the name or names of a class, see `segmentation_sets.parse_classes`, or a file of such
            lines, in place of the set's own.
        templates: one or several prompts in which `{c}` is the name, or a file of such lines; None: the 80 of ImageNet.

    Raises:
      ValueError: another number of classes than the set has, or a template without `{c}`.
      UnusableSet: the model has no patches in the space of its texts.
    """
    if not model.has_local:
        raise UnusableSet(benchmark, "the model has no projected patches: config.model.project_image is False")
    options = {"short_side": 1.5, **several(options, "modes")}
    classes, templates = (_lines(options.pop(name, None)) for name in ("classes", "templates"))
    classes = data.classes if classes is None else segmentation_sets.parse_classes(classes)
    if len(classes) != len(data.classes):
        raise ValueError(f"{benchmark.name}: names of {len(classes)} classes; the set has {len(data.classes)}")
    templates = prompts.templates("imagenet1k") if templates is None else templates
    names = [(name,) for synonyms in classes for name in synonyms]
    texts = [text for own in prompts.from_templates(names, templates) for text in own]
    yield Segmentation(
        model,
        SegmentationSet(
            benchmark.name,
            ["background" if number == data.background else names[0] for number, names in enumerate(classes)],
            Pixels(data.pictures, model.image_size, _as_stored),
            data.masks,
            Tokenizer(model.context_length)(texts),
            np.repeat(np.arange(len(names)), len(templates)),
            class_of_query=np.repeat(np.arange(len(classes)), [len(synonyms) for synonyms in classes]),
            sizes=_sizes(data.pictures),
            background=data.background,
        ),
        preprocess=model.preprocessing,
        **options,
    )


def _lines(option: str | Sequence[str] | None) -> Sequence[str] | None:
    """Lines of text, a single prompt as one, or those of the file that is named."""
    if not isinstance(option, str):
        return option
    return (option,) if prompts.SLOT in option else base.read_text(pathlib.Path(option)).splitlines()


def _sizes(pictures: Sequence[base.Picture]) -> np.ndarray:
    """Height and width of each picture, int (I, 2), from their headers. Raises BrokenImages."""
    sizes, broken = np.zeros((len(pictures), 2), int), {}
    for number, picture in enumerate(pictures):
        try:
            sizes[number] = segmentation_sets.image_size(picture)
        except (image_rules.ImageError, OSError) as error:
            broken[number] = str(error)
    if broken:
        raise BrokenImages(broken)
    return sizes


def _as_stored(image: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels of the whole picture in its own size."""
    del size
    return np.asarray(image)


# Task -> (model, set, data, options) -> evaluators.
Build = Callable[[nn.Module, base.Benchmark, Any, Mapping[str, Any]], Iterator[Any]]
TASKS: dict[str, Build] = {
    "retrieval": retrieval,
    "classification": classification,
    "segmentation": segmentation,
    "choice": choice,
    "pointing": pointing,
}

INTERNAL = ("preprocess", "mesh", "label", "text_tower")  # arguments of evaluators that no config sets
RETRIEVAL_NAMES = {"modes": evaluators.retrieval.MODES, "pooling": evaluators.retrieval.POOLINGS}
# Task -> its evaluator, the options that it has here beside the evaluator's own, and for some options the values known.
OPTIONS: dict[str, tuple[type, tuple[str, ...], dict[str, Sequence[str]]]] = {
    "retrieval": (Retrieval, ("windows", "context_length"), {**RETRIEVAL_NAMES, "windows": text_windows.WAYS}),
    "classification": (
        Classification,
        ("templates", "names", "descriptions"),
        {"modes": tuple(evaluators.classification.MODES), "ties": tuple(evaluators.classification.TIES)},
    ),
    "segmentation": (Segmentation, ("classes", "templates"), {"modes": evaluators.segmentation.MODES}),
    "choice": (Choice, (), {"modes": tuple(evaluators.choice.MODES), "ties": evaluators.choice.TIES}),
    "pointing": (Pointing, (), {"modes": evaluators.pointing.MODES}),
}


# Task -> options that may name a file.
FILES = {"classification": ("names", "descriptions"), "segmentation": ("classes", "templates")}


def keywords(function: Callable) -> dict[str, bool]:
    """Keyword arguments that a config may set, and whether they have no default."""
    return {
        parameter.name: parameter.default is parameter.empty
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in INTERNAL
    }


def check_options(where: str, task: str, options: Mapping[str, Any] | None) -> None:
    """Refuses, before a set is read, options that its task's evaluator would refuse when the set's turn comes.

    Raises:
      ValueError: naming `where.option`: there is no such option, or no such mode or other value.
    """
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise ValueError(f"{where} is {options!r}; expected the options of {task} by name")
    evaluator, own, names = OPTIONS[task]
    check_names(f"options of {where}", options, (*own, *keywords(evaluator)))
    for key in names.keys() & options.keys():
        if options[key] is not None:
            check_names(f"{where}.{key}", options[key], names[key])


def check_names(where: str, found: str | Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError if one of some names is not known, with those that are similar."""
    for name in (found,) if isinstance(found, str) else found:
        if name not in known:
            close = difflib.get_close_matches(str(name), known)
            similar = f"similar are {', '.join(close)}; " if close else ""
            raise ValueError(f"{where}: there is no {name!r}; {similar}there are {', '.join(known)}")
