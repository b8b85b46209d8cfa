"""The table of all evaluation sets, and their selection by name."""

import fnmatch
from collections.abc import Iterable

from flair_jax.data.benchmarks import segmentation
from flair_jax.data.benchmarks.base import Benchmark

FAMILIES = (segmentation,)  # modules with a tuple BENCHMARKS

ALL: dict[str, Benchmark] = {}
for family in FAMILIES:
    for benchmark in family.BENCHMARKS:
        if benchmark.name in ALL:
            raise ValueError(f"two evaluation sets are called {benchmark.name}")
        ALL[benchmark.name] = benchmark


def select(patterns: Iterable[str]) -> list[Benchmark]:
    """The sets that one of the patterns matches, in the order of the table: names, or wildcards such as "iiw_*".

    Raises:
      ValueError: a pattern matches none.
    """
    chosen = set()
    for pattern in patterns:
        names = fnmatch.filter(ALL, pattern)
        if not names:
            raise ValueError(f"no evaluation set is called {pattern!r}; there are {', '.join(ALL)}")
        chosen.update(names)
    return [benchmark for name, benchmark in ALL.items() if name in chosen]
