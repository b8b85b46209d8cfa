"""Results of one set by what they are: measured, chance, or of a part; and how they are written and judged."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from flair_jax.report.base import Result, SetDetails

WITHOUT_IMAGES = "classes_without_images"  # a number of classes, and no measure of the model
CERTAINTY = 1e-3  # a random answer is better than chance by this much less often than this


@dataclasses.dataclass(frozen=True)
class Values:
    """Results of one set.

    Attributes:
      measured: metric -> mode -> value.
      chance: metric -> kind of chance, "chance" or for instance "chance object" -> value.
      parts: metric -> class or part of the set -> mode -> value; of the mode "chance" too.
      without_images: classes without an image, which are in no mean.
    """

    measured: Mapping[str, Mapping[str, float]]
    chance: Mapping[str, Mapping[str, float]]
    parts: Mapping[str, Mapping[str, Mapping[str, float]]]
    without_images: int = 0

    @classmethod
    def of(cls, results: Iterable[Result]) -> "Values":
        """Sorts results by their names.

        A metric with a slash is that of a part, such as "iou/cat". Chance of a metric is a result of that metric and
        the mode "chance"; a result whose metric is "chance" or "chance_…" belongs to the first metric of the set.
        """
        measured, chance, parts, of_first, without_images = {}, {}, {}, {}, 0
        for result in results:
            metric, _, part = result.metric.partition("/")
            if part:
                parts.setdefault(metric, {}).setdefault(part, {})[result.mode] = result.value
            elif metric == WITHOUT_IMAGES:
                without_images = round(result.value)
            elif result.mode == "chance":
                chance.setdefault(metric, {})["chance"] = result.value
            elif metric == "chance" or metric.startswith("chance_"):
                of_first[metric.replace("_", " ")] = result.value
            else:
                measured.setdefault(metric, {})[result.mode] = result.value
        if of_first and measured:
            first = next(iter(measured))
            chance[first] = {**chance.get(first, {}), **of_first}
        return cls(measured, chance, parts, without_images)

    def by_mode(self, metric: str) -> Mapping[str, float]:
        """Mode -> value of a metric of the whole set, or of a part such as "iou/cat"; empty: not measured."""
        name, _, part = metric.partition("/")
        return self.parts.get(name, {}).get(part, {}) if part else self.measured.get(name, {})

    def modes(self) -> list[str]:
        """In the order of the results."""
        return list(dict.fromkeys(mode for values in self.measured.values() for mode in values))


def by_set(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """(task, set) -> its results, in order."""
    found = {}
    for result in results:
        found.setdefault((result.task, result.set), []).append(result)
    return found


def is_rank(metric: str) -> bool:
    """Whether values of a metric, or of a part of it, count from 1; all others are fractions."""
    return metric.partition("/")[0].endswith("_rank")


def text(metric: str, value: float) -> str:
    """A value as the report shows it: in percent, unless it is a rank; of small ones two digits."""
    number = value if is_rank(metric) else 100 * value
    return f"{number:.2g}" if 0 < number < 1 else f"{number:.1f}"


def difference(metric: str, measured: float, published: float) -> str:
    """With its sign, in percentage points, unless it is of ranks."""
    number = round((measured - published) * (1 if is_rank(metric) else 100), 1)
    return f"{number:+.1f}" if number else "0.0"


# ---------------------------------------------------------------------------------------------------------------------
# Chance


def at_chance(results: Iterable[Result], details: Iterable[SetDetails] = ()) -> tuple[list[str], list[str]]:
    """Sets whose results a random answer would reach too, and all sets that can be judged, as "task/set".

    Judged are what a model without knowledge cannot get, whatever its preferences:
      retrieval: Recall@k of both directions in all modes. n is the number of images, which is 1 / chance: the texts of
        an image are no independent queries.
      classification: mean recall per class, which an answer that is always the same leaves at chance, 1 / classes; n
        images. Both numbers are of `SetDetails.counts`.
    A preference for short texts, for the middle of the image or for the sky is far from chance in choice, pointing and
    segmentation: these are not judged.

    A value v is better than chance c if a random answer gets it with a probability below `CERTAINTY`. By Chernoff's
    bound that is exp(-n KL(v, c)) at most, with KL the divergence of two coins. A set is at chance if no judged value
    is better.

    Returns:
      Two lists, in the order of the results.
    """
    counts = {(one.task, one.set): one.counts for one in details}
    low, judged = [], []
    for key, group in by_set(results).items():
        values = Values.of(group)
        better = []
        for metric, modes in values.measured.items():
            if key[0] == "retrieval" and "_R@" in metric:
                image_chance = values.chance.get("text_to_image_R@1", {}).get("chance")
                chance = values.chance.get(metric, {}).get("chance")
                number = round(1 / image_chance) if image_chance else None
            elif key[0] == "classification" and metric == "mean_per_class":
                classes = counts.get(key, {}).get("classes", 0) - values.without_images
                chance, number = 1 / max(classes, 1), counts.get(key, {}).get("images")
            else:
                continue
            if chance and number and chance < 1:
                better += [_is_better(value, chance, number) for value in modes.values()]
        if better:
            judged.append("/".join(key))
            if not any(better):
                low.append("/".join(key))
    return low, judged


def _is_better(value: float, chance: float, number: int) -> bool:
    """Whether a share `value` of `number` answers is too many for a random answer."""
    if not value > chance:
        return False
    divergence = value * math.log(value / chance)
    if value < 1:
        divergence += (1 - value) * math.log((1 - value) / (1 - chance))
    return math.exp(-number * divergence) < CERTAINTY
