"""Public evaluation sets as evaluators: pictures become pixels, texts become tokens, what is missing is counted."""

import collections
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging

from flair_jax.data.benchmarks import base, table
from flair_jax.data.benchmarks import segmentation as segmentation_sets
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators import Segmentation, SegmentationSet
from flair_jax.evaluators.features import BrokenImages
from flair_jax.report import Result


class Pixels(Sequence):
    """Pictures as uint8 pixels (H, W, 3) of one size, by index; decoded when asked for.

    Attributes:
      keys: for the feature store: a text per picture that identifies its pixels and how they were prepared.

    Args:
      pictures: of a set.
      size: height and width.
      crop: RGB image, size -> pixels; by default the reference's, `images.evaluation_crop`.
    """

    def __init__(
        self,
        pictures: Sequence[base.Picture],
        size: tuple[int, int],
        crop: Callable[[Any, tuple[int, int]], np.ndarray] = image_rules.evaluation_crop,
    ):
        self._pictures, self._size, self._crop = pictures, size, crop

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
        return self._crop(image_rules.to_rgb(self._pictures[index].decode()), self._size)

    @property
    def keys(self) -> list[str]:
        return [f"{self._crop.__name__} {self._size} {picture.key()}" for picture in self._pictures]


def segmentation(
    model: nn.Module, benchmark: base.Benchmark, data: base.Segmentation, options: Mapping[str, Any]
) -> Iterator[Segmentation]:
    """Zero-shot segmentation of pictures of any size.

    Args:
      options: of `evaluators.Segmentation`, and
        classes: lines with the name or names of a class, see `segmentation_sets.parse_classes`, or a file of such
            lines, in place of the set's own.
        templates: prompts in which `{c}` is the name, or a file of such lines; None: the 80 of ImageNet.

    Raises:
      ValueError: another number of classes than the set has, or a template without `{c}`.
    """
    options = {"short_side": 1.5, **options}
    classes, templates = (_lines(options.pop(name, None)) for name in ("classes", "templates"))
    classes = data.classes if classes is None else segmentation_sets.parse_classes(classes)
    if len(classes) != len(data.classes):
        raise ValueError(f"{benchmark.name}: names of {len(classes)} classes; the set has {len(data.classes)}")
    templates = segmentation_sets.templates() if templates is None else templates
    if wrong := [template for template in templates if "{c}" not in template]:
        raise ValueError(f"{benchmark.name}: the templates {wrong} have no {{c}} for the name of a class")
    names = [name for synonyms in classes for name in synonyms]
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    yield Segmentation(
        model,
        SegmentationSet(
            benchmark.name,
            ["background" if number == data.background else names[0] for number, names in enumerate(classes)],
            Pixels(data.pictures, model.image_size, _as_stored),
            data.masks,
            Tokenizer(model.context_length)(prompts),
            np.repeat(np.arange(len(names)), len(templates)),
            class_of_query=np.repeat(np.arange(len(classes)), [len(synonyms) for synonyms in classes]),
            sizes=_sizes(data.pictures),
            background=data.background,
        ),
        preprocess=image_rules.normalize,
        **options,
    )


def _lines(option: str | Sequence[str] | None) -> Sequence[str] | None:
    """Lines of text, or those of the file that is named."""
    return base.read_text(pathlib.Path(option)).splitlines() if isinstance(option, str) else option


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
    "segmentation": segmentation,
}


class UnusableSet(Exception):
    """A set that cannot be evaluated: files or images are missing or broken. The others can.

    Attributes:
      benchmark: its entry in the table.
      reason: what is missing or wrong.
    """

    def __init__(self, benchmark: base.Benchmark, reason: str):
        self.benchmark, self.reason = benchmark, reason
        super().__init__(f"{benchmark.name}: {reason}")


class SetEvaluator:
    """A public set, evaluated as its task is; see `evaluators`.

    Attributes:
      benchmark: its entry in the table.
      data: what was read, without the images that are left out; None before.
      left_out: why images are left out -> how many.

    Args:
      model: what to evaluate.
      benchmark: the set.
      root: folder of all sets.
      allow_missing: whether images that are missing or broken are left out; otherwise the set cannot be evaluated.
      options: of the task's evaluator; those of the set's entry count where these are silent.
    """

    def __init__(
        self,
        model: nn.Module,
        benchmark: base.Benchmark,
        root: pathlib.Path,
        *,
        allow_missing: bool,
        options: Mapping[str, Any],
    ):
        self.benchmark, self.left_out = benchmark, collections.Counter()
        self.data: base.Data | None = None
        self._model, self._root, self._allow_missing = model, root, allow_missing
        self._options = {**benchmark.options, **options}
        self._evaluators: list[Any] = []

    def read(self) -> None:
        """Opens the annotation files and looks whether the images are there.

        Raises:
          UnusableSet: not all is there.
        """
        try:
            self.data = self.benchmark.read(self._root)
        except (base.MissingError, base.AnnotationError, OSError) as error:
            raise UnusableSet(self.benchmark, str(error)) from error
        absent = [number for number, picture in enumerate(self.data.pictures) if not picture.exists()]
        self._leave_out(dict.fromkeys(absent, "missing"))

    def run(self, params: Any) -> list[Result]:
        """Evaluates parameters, a nested dict. Images that turn out to be broken are left out, and the rest runs again.

        Raises:
          UnusableSet: see `read`; or an image is broken, and `allow_missing` is not set.
        """
        self.left_out.clear()
        self.read()
        while True:
            self._evaluators, results = [], []
            try:
                for evaluator in TASKS[self.benchmark.task](self._model, self.benchmark, self.data, self._options):
                    self._evaluators.append(evaluator)
                    results += evaluator.run(params)
                return results
            except BrokenImages as broken:
                for reason in broken.reasons.values():
                    logging.warning("%s: %s", self.benchmark.name, reason)
                self._leave_out(dict.fromkeys(broken.reasons, "broken"))

    def figures(self, params: Any) -> Iterator[tuple[str, Any]]:
        """(title, PIL image) of what `run` found."""
        for evaluator in self._evaluators:
            yield from evaluator.figures(params)

    def _leave_out(self, reasons: Mapping[int, str]) -> None:
        if not reasons:
            return
        present = np.ones(len(self.data.pictures), bool)
        present[list(reasons)] = False
        counts = collections.Counter(reasons.values())
        what = ", ".join(f"{count} of {len(present)} images are {reason}" for reason, count in counts.items())
        what += f", such as {self.data.pictures[min(reasons)].path}"
        if not present.any():
            raise UnusableSet(self.benchmark, what)
        if not self._allow_missing:
            raise UnusableSet(self.benchmark, f"{what}; allow_missing=True leaves them out")
        self.left_out += counts
        self.data = self.data.keep(present)


def evaluators(
    model: nn.Module,
    name: str,
    *,
    root: str | None,
    sets: Sequence[str] = ("*",),
    allow_missing: bool = False,
    image_batch: int = 64,
    text_batch: int = 512,
    retrieval: Mapping[str, Any] | None = None,
    classification: Mapping[str, Any] | None = None,
    segmentation: Mapping[str, Any] | None = None,
    choice: Mapping[str, Any] | None = None,
    pointing: Mapping[str, Any] | None = None,
) -> Iterator[SetEvaluator]:
    """The public sets that are there, one after the other; what is not there is said first, for all of them together.

    Args:
      model: what to evaluate.
      name: of the evaluator in the config.
      root: `config.data_root`.
      sets: names, or wildcards, see `table.select`.
      allow_missing: see `SetEvaluator`.
      image_batch, text_batch: of all tasks.
      retrieval, classification, segmentation, choice, pointing: options of a task's evaluators.
    """
    tasks = dict(
        retrieval=retrieval, classification=classification, segmentation=segmentation, choice=choice, pointing=pointing
    )
    chosen = []
    for benchmark in table.select(sets):
        options = dict(image_batch=image_batch, text_batch=text_batch, **(tasks[benchmark.task] or {}))
        chosen.append(SetEvaluator(model, benchmark, pathlib.Path(root), allow_missing=allow_missing, options=options))
    unusable = list(filter(None, map(_problem, chosen)))
    if unusable:
        lines = [
            f"  {set_.benchmark.name}: {set_.reason}. From {set_.benchmark.source} ({set_.benchmark.licence})"
            for set_ in unusable
        ]
        logging.warning(
            "evaluators.%s: %d of %d sets cannot be evaluated:\n%s",
            *(name, len(unusable), len(chosen), "\n".join(lines)),
        )
    yield from chosen


def _problem(evaluator: SetEvaluator) -> UnusableSet | None:
    """Why a set cannot be evaluated; None: it can."""
    try:
        evaluator.read()
    except UnusableSet as unusable:
        return unusable
    finally:
        evaluator.data = None  # read again when its turn comes: the annotations of all sets need not be held at once
        evaluator.left_out.clear()
    return None
