"""Matching of boxes and queries: all ways at once beside the Hungarian algorithm, on the device that jax finds."""

import math
import time
from collections.abc import Sequence

import numpy as np

TURNS = 20


def measure(images: int = 2048, queries: int = 5, targets: int = 5) -> dict[str, float]:
    """Milliseconds of `boxes.match` for a batch of random costs by either method, the medians of `TURNS` turns.

    Args:
      images: of the batch.
      queries, targets: of an image.

    Returns:
      The arguments, `ways`, `all_ways_ms`, `hungarian_ms` and `ratio`, Hungarian over all ways.

    Raises:
      ValueError: there are more targets than queries.
    """
    import jax

    from flair_jax import boxes

    if targets > queries:
        raise ValueError(f"{targets} targets for {queries} queries: only the Hungarian algorithm matches them")
    rng = np.random.default_rng(0)
    cost = jax.device_put(rng.normal(size=(images, queries, targets)).astype(np.float32))
    valid = jax.device_put(rng.random((images, targets)) < 0.7)
    figures = dict(images=images, queries=queries, targets=targets, ways=math.perm(queries, targets))
    programs = {"all_ways_ms": boxes.match_all_ways, "hungarian_ms": boxes.match_hungarian}
    programs = {name: jax.jit(program) for name, program in programs.items()}
    times = {name: [] for name in programs}
    for _ in range(TURNS + 1):  # the first compiles
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(cost, valid))
            times[name].append(1e3 * (time.perf_counter() - start))
    figures |= {name: float(np.median(all_of[1:])) for name, all_of in times.items()}
    return {**figures, "ratio": figures["hungarian_ms"] / figures["all_ways_ms"]}


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks import command  # here, since gpu_check measures where ml_collections is not installed

    parser = command.parser("matching", "Time of matching boxes and queries, by two exact methods.")
    sizes = dict(images=(2048, "of a batch"), queries=(5, "per image"), targets=(5, "per image"))
    command.add_sizes(parser, **sizes)
    parsed = parser.parse_args(arguments)
    command.report(measure(**command.pick(parsed, tuple(sizes))), parsed.json)


if __name__ == "__main__":
    main()
