"""The table of all evaluation sets, and their selection by name."""

import fnmatch
from collections.abc import Iterable

from flair_jax.data.benchmarks import (
    aro,
    choose_image,
    classification,
    clip_benchmark,
    crepe,
    fg_ovd,
    long_captions,
    pairs,
    pointing,
    retrieval,
    segmentation,
    sugarcrepe,
    valse,
    vl_checklist,
    whatsup,
)
from flair_jax.data.benchmarks.base import Benchmark

CHOICE = (aro, crepe, sugarcrepe, valse, vl_checklist, whatsup, choose_image, pairs, fg_ovd)
FAMILIES = (  # modules with a tuple BENCHMARKS
    retrieval,
    long_captions,
    clip_benchmark,
    classification,
    segmentation,
    *CHOICE,
    pointing,
)

ALL: dict[str, Benchmark] = {}
for family in FAMILIES:
    for benchmark in family.BENCHMARKS:
        if benchmark.name in ALL:
            raise ValueError(f"two evaluation sets are called {benchmark.name}")
        ALL[benchmark.name] = benchmark


def select(patterns: Iterable[str]) -> list[Benchmark]:
    """The sets that one of the patterns matches, in the order of the table: names, or wildcards such as "iiw_*".

    One's own sets come last: `folders:DIR` and `tfds:NAME?split=…` (see `classification.located`),
    `wds_classification:DIR` and `wds_retrieval:DIR` (see `clip_benchmark.located`).

    Raises:
      ValueError: a pattern matches none.
    """
    chosen, own = set(), []
    for pattern in patterns:
        if pattern.startswith((classification.FOLDERS, classification.TFDS)):
            own.append(classification.located(pattern))
            continue
        if pattern.startswith(clip_benchmark.PREFIXES):
            own.append(clip_benchmark.located(pattern))
            continue
        names = fnmatch.filter(ALL, pattern)
        if not names:
            raise ValueError(f"no evaluation set is called {pattern!r}; there are {', '.join(ALL)}")
        chosen.update(names)
    return [benchmark for name, benchmark in ALL.items() if name in chosen] + own
