"""Public evaluation sets as evaluators: pictures become pixels, texts become tokens, what is missing is counted."""

import collections
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging

from flair_jax import initialize
from flair_jax.data.benchmarks import base, table
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms import windows as text_windows
from flair_jax.evaluators import Retrieval, RetrievalSet
from flair_jax.evaluators.features import BrokenImages, session
from flair_jax.progress import progress
from flair_jax.report import Missing, Result, SetDetails, missing_lines


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


def retrieval(
    model: nn.Module, benchmark: base.Benchmark, data: base.Retrieval, options: Mapping[str, Any]
) -> Iterator[Retrieval]:
    """Retrieval with texts as the model takes them, and in other ways that options ask for, an evaluator for each.

    Options, beside those of `Retrieval`:
      windows: a way or several of `windows.WAYS`, of what is done with texts that are longer than the context.
      context_length: evaluates with a longer context, too, of stretched position embeddings; None: no.
    """
    options = dict(options)
    ways = options.pop("windows", "truncate")
    longer = options.pop("context_length", None)
    modes = options.pop("modes", None)
    pixels = Pixels(data.pictures, model.image_size)

    def evaluator(model, way, label, **more):
        tokens, rows = text_windows.text_rows(data.texts, model.context_length, way)
        rows = None if way == "truncate" else rows
        known = modes if modes is None or rows is None else [mode for mode in modes if mode != "topk"]
        texts = RetrievalSet(benchmark.name, pixels, tokens, data.image_of_text, rows, data.texts)
        return Retrieval(model, texts, preprocess=image_rules.normalize, modes=known, label=label, **more, **options)

    for way in (ways,) if isinstance(ways, str) else ways:
        yield evaluator(model, way, "" if way == "truncate" else way)
    if longer is not None and longer > model.context_length:
        long_model = model.clone(text_options={**model.text_options, "context_length": longer})
        stretch = functools.partial(initialize.stretch_context, length=longer)
        yield evaluator(long_model, "truncate", f"{longer} tokens", prepare=stretch)


# Task -> (model, set, data, options) -> evaluators.
Build = Callable[[nn.Module, base.Benchmark, Any, Mapping[str, Any]], Iterator[Any]]
TASKS: dict[str, Build] = {"retrieval": retrieval}


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
        except base.MissingError as error:
            raise UnusableSet(self.benchmark, str(error), error.files) from error
        except (base.AnnotationError, OSError) as error:
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
                with session(progress=functools.partial(progress, title=self.benchmark.name)):
                    for evaluator in TASKS[self.benchmark.task](self._model, self.benchmark, self.data, self._options):
                        self._evaluators.append(evaluator)
                        results += evaluator.run(params)
                return results
            except BrokenImages as broken:
                for reason in broken.reasons.values():
                    logging.warning("%s: %s", self.benchmark.name, reason)
                self._leave_out(dict.fromkeys(broken.reasons, "broken"))

    def details(self) -> SetDetails:
        """What the report says about the set, after `run`."""
        benchmark = self.benchmark
        return SetDetails(
            benchmark.task,
            benchmark.name,
            title=benchmark.title,
            counts=self.data.counts(),
            expected=benchmark.expected(),
            left_out=self.left_out.total(),
            parts=self.data.parts,
            licence=benchmark.licence,
            source=benchmark.source,
            published=benchmark.published,
            notes=[note for evaluator in self._evaluators for note in getattr(evaluator, "notes", ())],
        )

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
        lines = missing_lines([problem.missing() for problem in unusable])
        logging.warning("evaluators.%s: %d of %d sets cannot be evaluated\n%s", name, len(unusable), len(chosen), lines)
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
