"""Counts of what was read, matched, written and skipped, by reason; each worker counts, the sums are printed."""

import collections
import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass
class Tally:
    """Counts of one piece of work, or of many."""

    read: int = 0
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by reason
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # the first one of each reason

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        self.skipped[reason] += count
        self.examples.setdefault(reason, example)

    def to_json(self) -> dict:
        return {"read": self.read, "skipped": dict(self.skipped), "examples": self.examples}

    @classmethod
    def total(cls, parts: Iterable[dict]) -> "Tally":
        """The sum of several `to_json`."""
        total = cls()
        for part in parts:
            total.read += part["read"]
            for reason, count in part["skipped"].items():
                total.skip(reason, part["examples"].get(reason, ""), count)
        return total


def reasons(tally: Tally) -> list[str]:
    """Lines of the table: what was skipped, most frequent reason first."""
    return [
        _line(f"  skipped: {reason}", count, tally.examples.get(reason, ""))
        for reason, count in tally.skipped.most_common()
    ]


def _line(name: str, count: int, example: str = "") -> str:
    return f"{name:<58}{count:>14,}" + (f"   e.g. {example}" if example else "")


def table(info: dict) -> str:
    """The closing table, from the contents of info.json."""
    lines = []

    def line(name: str, count: int) -> None:
        lines.append(_line(name, count))

    def skipped(counts: dict) -> None:
        lines.extend(reasons(Tally.total([counts])))

    captions, images = info["captions"], info["images"]
    if captions is not None:
        line("captions: rows read", captions["read"])
        skipped(captions)
        line(f"  rows of a key that an earlier row has ({captions['repeated_rule']})", captions["repeated"])
        line("  keys", captions["keys"])
        line("  keys without an image", captions["keys_without_image"])
    if info["left_out"]["skipped"]:
        lines.append("tars: members that make no sample")
        skipped(info["left_out"])
    line("images: read", images["read"])
    line("  matched", images["matched"])
    skipped(images)
    line("  written", info["samples"])
    line("  of these made smaller or converted", info["converted"])
    line(f"shards: of {info['shard_size']:,} samples, the last of {info['last_shard']:,}", info["shards"])
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
