"""What a report is made of: results, what is known about their sets, sets that were not evaluated, and pictures."""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self


@dataclasses.dataclass(frozen=True)
class Result:
    """One number of an evaluation.

    Attributes:
      task: "retrieval", "pointing", ….
      set: name of the data set.
      metric: such as "text_to_image_R@1"; "chance" and "chance_…" are what a random answer gets. Of a class or another
        part of the set with its name, such as "iou/cat".
      value: a float; a fraction, unless the metric is a rank.
      mode: how the model was used, a column of the set's table; empty where there is one way only.
    """

    task: str
    set: str
    metric: str
    value: float
    mode: str = ""

    @property
    def name(self) -> str:
        """`task/set/mode/metric`, the key in report.json."""
        return "/".join(part for part in (self.task, self.set, self.mode, self.metric) if part)


class Published(Protocol):
    """A published number: `value` as a fraction; `metric` and `mode` as in `Result`; `source` names a paper or page."""

    model: str
    metric: str
    value: float
    source: str
    mode: str


@dataclasses.dataclass(frozen=True)
class SetDetails:
    """What the report says about a set beside its results.

    Attributes:
      task, set: as in `Result`.
      title: how papers call it; empty: `set`.
      counts: what was evaluated, such as {"images": 5000, "texts": 25014}.
      expected: the same of the whole release, as far as it is known. What differs is marked.
      left_out: images that were missing or broken, and left out.
      parts: of a set with several parts the ones that are there, where it is not all of them.
      licence: of the content.
      source: where the set comes from, a URL.
      published: numbers to compare with.
      notes: texts, such as the rule for ties.
    """

    task: str
    set: str
    title: str = ""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    parts: Sequence[str] = ()
    licence: str = ""
    source: str = ""
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()

    def reservations(self) -> list[str]:
        """Why the numbers are not those of the whole set; empty: they are."""
        found = []
        if self.left_out:
            images = "1 image was" if self.left_out == 1 else f"{self.left_out:,} images were"
            found.append(f"{images} missing or broken and left out")
        if self.parts:
            found.append(f"only a part of the set is there: {', '.join(self.parts)}")
        different = {
            name: (self.counts[name], number)
            for name, number in self.expected.items()
            if name in self.counts and self.counts[name] != number
        }
        if different:
            counts = ", ".join(f"{ours:,} of {theirs:,} {name}" for name, (ours, theirs) in different.items())
            found.append(f"evaluated are {counts} of the release")
        return found


@dataclasses.dataclass(frozen=True)
class Missing:
    """A set that was not evaluated.

    Attributes:
      task, set, title: as in `SetDetails`.
      files: what is not there.
      licence, source: what the set's content may be used for, and where to get it.
      reason: why it was not evaluated, where it is not that `files` are not there.
    """

    task: str
    set: str
    title: str = ""
    files: Sequence[str] = ()
    licence: str = ""
    source: str = ""
    reason: str = ""

    def why(self, most: int = 3) -> str:
        """The reason; or the files, at most so many of them. Of paths that would do, "a or b or c", the first one."""
        listed = ", ".join(map(_first_path, self.files[:most]))
        if len(self.files) > most:
            listed += f" and {len(self.files) - most:,} more"
        return ": ".join(text for text in (self.reason or "not found", listed) if text)


def _first_path(paths: str) -> str:
    first, *others = paths.split(" or ")
    return f"{first} (or {len(others)} other paths)" if len(others) > 1 else paths


def missing_lines(missing: Iterable[Missing]) -> str:
    """All sets that are not evaluated, with reason, source and licence: text to print."""
    return "".join(
        f"  {one.title or one.set} ({one.task}): {one.why()}\n      from {one.source} ({one.licence})\n"
        for one in missing
    )


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of a set, as an encoded file: hundreds of them are kept until the last report is written.

    Attributes:
      task, set: as in `Result`.
      title: its caption.
      data: the bytes of a file.
      kind: "png" or "jpeg".
      width, height: in pixels.
    """

    task: str
    set: str
    title: str
    data: bytes = dataclasses.field(repr=False)
    kind: str
    width: int
    height: int

    @classmethod
    def of(cls, task: str, set: str, title: str, image: Any) -> Self:
        """From a PIL image, on white where it is transparent: PNG or JPEG, whichever is smaller."""
        from PIL import Image

        if image.mode != "RGB":
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        encoded = {}
        for kind, options in (("png", {}), ("jpeg", dict(quality=90))):
            file = io.BytesIO()
            image.save(file, format=kind, **options)
            encoded[kind] = file.getvalue()
        kind = min(encoded, key=lambda kind: len(encoded[kind]))
        return cls(task, set, title, encoded[kind], kind, *image.size)
