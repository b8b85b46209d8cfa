"""Early stopping: whether a metric of an evaluator still improves, and at which step it was best."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flair_jax.report.values import is_rank


@dataclasses.dataclass(frozen=True)
class EarlyStoppingOptions:
    """When a run stops. The keys of a config's `early_stopping` section.

    Attributes:
      evaluator: name of an evaluator in the config, which has a cadence; the weights at the start count, too.
      metric: one of its results by its whole name in report.json, such as "retrieval/val/global/text_to_image_R@1".
        Ranks are better when they are lower, all else when it is higher.
      patience: evaluations in a row without a better value after which the run stops.
      min_delta: a value is better if it is more than this apart from the best one so far, in the units of report.json.

    Raises:
      ValueError: an option has no such value.
    """

    evaluator: str
    metric: str
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self):
        for key in ("evaluator", "metric"):
            if not (isinstance(getattr(self, key), str) and getattr(self, key)):
                raise ValueError(f"config.early_stopping.{key} is {getattr(self, key)!r}; expected a name")
        if not (isinstance(self.patience, int) and self.patience >= 1):
            raise ValueError(f"config.early_stopping.patience is {self.patience!r}; expected 1 or more evaluations")
        if not self.min_delta >= 0:
            raise ValueError(f"config.early_stopping.min_delta is {self.min_delta!r}; expected 0 or more")

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "EarlyStoppingOptions":
        """From an `early_stopping` section. Raises ValueError, naming the key that is wrong."""
        known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        if not isinstance(section, Mapping):
            raise ValueError(f"config.early_stopping is {section!r}; expected None or a section with {list(known)}")
        if unknown := sorted(set(section) - set(known)):
            raise ValueError(f"config.early_stopping has {unknown}; there are {list(known)}")
        if missing := [key for key, needed in known.items() if needed and key not in section]:
            raise ValueError(f"config.early_stopping lacks {missing}")
        return cls(**section)


class EarlyStopping:
    """The values of the metric so far, oldest first.

    Args:
      options: see `EarlyStoppingOptions`.
      evaluations: (step, value) pairs of the run so far, as `evaluations` gives them.

    Attributes:
      evaluations: (step, value) pairs, which a checkpoint keeps: all else follows from them.
    """

    def __init__(self, options: EarlyStoppingOptions, evaluations: Iterable[tuple[int, float]] = ()):
        self.options = options
        self.evaluations = [(int(step), float(value)) for step, value in evaluations]

    def value_of(self, results: Mapping[str, float]) -> float:
        """The metric among results by name.

        Raises:
          ValueError: it is not there, or no number.
        """
        name = self.options.metric
        if name not in results:
            raise ValueError(
                f"config.early_stopping.metric is {name!r}; evaluators.{self.options.evaluator} gives {sorted(results)}"
            )
        if not math.isfinite(results[name]):
            raise ValueError(f"config.early_stopping.metric {name!r} is {results[name]}, which cannot be compared")
        return float(results[name])

    def add(self, step: int, value: float) -> bool:
        """Takes the value of a step, later than all so far; True if it is the best."""
        self.evaluations.append((step, value))
        return self.best == (step, value)

    def knows(self, step: int) -> bool:
        """Whether the value of a step is there."""
        return any(known == step for known, _ in self.evaluations)

    @property
    def best(self) -> tuple[int, float]:
        """Step and value of the best evaluation, of equal ones the earliest."""
        sign = -1 if any(map(is_rank, self.options.metric.split("/"))) else 1
        best = self.evaluations[0]
        for step, value in self.evaluations[1:]:
            if sign * (value - best[1]) > self.options.min_delta:
                best = step, value
        return best

    def __str__(self) -> str:
        step, value = self.best
        name, last = self.options.metric, self.evaluations[-1][0]
        return f"of step {step}, where {name} was best: {value:.4g} (evaluated until step {last})"

    @property
    def exhausted(self) -> bool:
        """Whether so many evaluations as `patience` came after the best one."""
        return sum(step > self.best[0] for step, _ in self.evaluations) >= self.options.patience
