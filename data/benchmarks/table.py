"""The table of all evaluation sets, and their selection by name."""

import collections
import difflib
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
      ValueError: a pattern matches none, or two sets have the same name.
    """
    chosen, own = set(), {}
    for pattern in patterns:
        if pattern.startswith((classification.FOLDERS, classification.TFDS)):
            own[pattern] = classification.located(pattern)
            continue
        if pattern.startswith(clip_benchmark.PREFIXES):
            own[pattern] = clip_benchmark.located(pattern)
            continue
        names = fnmatch.filter(ALL, pattern)
        if not names:
            close = difflib.get_close_matches(pattern, ALL)
            similar = f"; similar names are {', '.join(close)}" if close else ""
            if "," in pattern:
                similar = f"; several sets are a tuple, {tuple(part.strip() for part in pattern.split(','))}"
            raise ValueError(f"no evaluation set is called {pattern!r}{similar}; there are {', '.join(ALL)}")
        chosen.update(names)
    found = [*(benchmark for name, benchmark in ALL.items() if name in chosen), *own.values()]
    counts = collections.Counter(benchmark.name for benchmark in found)
    if twice := [benchmark.source for benchmark in found if counts[benchmark.name] > 1]:
        raise ValueError(f"results of these sets would have the same name, evaluate them apart: {', '.join(twice)}")
    return found
