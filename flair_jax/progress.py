"""How far a long loop has come, and how long it will take: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import tqdm

Item = TypeVar("Item")

LINE_SECONDS = 30


def progress(items: Iterable[Item], total: int | None, title: str) -> Iterator[Item]:
    """Hands out `items`, and writes to stderr how many there were, of how many, and the time left.

    On a terminal that is a bar, which goes away at the end. Elsewhere it is a line every `LINE_SECONDS`, and one at the
    end if there were any: a log is not flooded by short loops. In a run of several processes the first one speaks for
    all.

    Args:
      items: what to go through.
      total: how many; None: unknown, and no time is estimated.
      title: what is done.
    """
    if jax.process_index():
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm.tqdm(items, desc=title, total=total, dynamic_ncols=True, leave=False, mininterval=0.5)
    else:
        yield from _lines(items, total, title)


def _lines(items: Iterable[Item], total: int | None, title: str) -> Iterator[Item]:
    began = said = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_SECONDS and done != total:
            left = _interval((now - began) * (total - done) / done) + " left" if total else _interval(now - began)
            _say(f"{title}: {done:,} of {total:,}, {left}" if total else f"{title}: {done:,}, {left}")
            said = now
    if said != began:
        _say(f"{title}: {done:,} done in {_interval(time.monotonic() - began)}")


def _interval(seconds: float) -> str:
    return tqdm.tqdm.format_interval(seconds)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
