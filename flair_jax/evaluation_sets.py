"""Public evaluation sets as evaluators: each is read when its turn comes, and what is missing or broken is counted."""

import collections
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging

from flair_jax.data.benchmarks import base, suites, table
from flair_jax.evaluation_tasks import TASKS, UnusableSet
from flair_jax.evaluators.features import BrokenImages, EmptySet, session
from flair_jax.progress import progress
from flair_jax.report import Result, SetDetails, missing_lines


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
            absent = [number for number, picture in enumerate(self.data.pictures) if not picture.exists()]
        except base.MissingError as error:
            raise UnusableSet(self.benchmark, str(error), error.files) from error
        except (base.AnnotationError, OSError) as error:
            raise UnusableSet(self.benchmark, str(error)) from error
        except Exception as error:  # a fault of the reader must not end the evaluation of the other sets
            logging.exception("%s was not read", self.benchmark.name)
            raise UnusableSet(self.benchmark, f"{type(error).__name__}: {error}") from error
        self._leave_out(dict.fromkeys(absent, "missing"))

    def forget(self) -> None:
        """Drops what `read` opened and left out."""
        self.data = None
        self.left_out.clear()

    def run(self, params: Any) -> list[Result]:
        """Evaluates parameters, a nested dict. Images that turn out to be broken are left out, and the rest runs again.

        Raises:
          UnusableSet: see `read`; or an image is broken, and `allow_missing` is not set; or nothing can be measured.
        """
        self.forget()
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
            except EmptySet as error:
                raise UnusableSet(self.benchmark, str(error)) from error

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
        verbs = {count: "is" if count == 1 else "are" for count in counts.values()}
        what = ", ".join(f"{n} of {len(present)} images {verbs[n]} {reason}" for reason, n in counts.items())
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
) -> Iterator[SetEvaluator | UnusableSet]:
    """Those sets that cannot be evaluated, which are said at once for all together, then an evaluator for each other.

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
    usable: list[SetEvaluator] = []
    unusable: list[UnusableSet] = []
    for benchmark in table.select(sets):
        options = dict(image_batch=image_batch, text_batch=text_batch, **(tasks[benchmark.task] or {}))
        one = SetEvaluator(model, benchmark, pathlib.Path(root), allow_missing=allow_missing, options=options)
        try:
            one.read()
            usable.append(one)
        except UnusableSet as problem:
            unusable.append(problem)
        one.forget()  # read again when its turn comes: the annotations of all sets need not be held at once
    if unusable:
        lines = missing_lines([problem.missing() for problem in unusable])
        total = len(unusable) + len(usable)
        logging.warning("evaluators.%s: %d of %d sets cannot be evaluated\n%s", name, len(unusable), total, lines)
    yield from unusable
    while usable:
        yield usable.pop(0)  # what a set needs goes with it


def averages(results: Sequence[Result], details: Sequence[SetDetails]) -> Iterator[tuple[list[Result], SetDetails]]:
    """The averages of papers over sets that were all evaluated, with what the report says about them.

    Args:
      results, details: of single sets.
    """
    about = {(one.task, one.set): one for one in details}
    for suite in suites.SUITES:
        found, members = [], set()
        for mode in dict.fromkeys(result.mode for result in results):
            values = {(one.task, one.set, one.metric): one.value for one in results if one.mode == mode}
            for name, parts in suite.members(values).items():
                value = sum(values[member] for member in parts) / len(parts)
                found.append(Result("average", suite.name, name, value, mode))
                members |= {member[:2] for member in parts}
        if found:
            names = dict.fromkeys(result.metric for result in found)
            parts = [about[member] for member in sorted(members) if member in about]
            yield (
                found,
                SetDetails(
                    "average",
                    suite.name,
                    title=suite.title,
                    left_out=sum(part.left_out for part in parts),
                    parts=[part.title for part in parts] if any(part.parts for part in parts) else (),
                    source=suite.source,
                    published=suite.published,
                    notes=[suite.notes[name] for name in names if name in suite.notes],
                ),
            )
