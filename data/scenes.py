"""The embedded data set: drawn scenes of coloured shapes whose captions, boxes and masks are true by construction.

A scene has two to four shapes of two sizes in different cells of a 3 x 3 grid, on a lightly textured background, and
8 to 12 sentences in the seven caption fields of DreamLIP. Everything follows from (seed, split, index). Which split a
scene belongs to is decided by its content (what lies where), so two splits share no scene whatever their seeds are.

    python -m flair_jax.data.scenes OUT --count 20000 --seed 0        # webdataset shards like those of CC3M-recap
"""

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import tarfile
import zlib

import numpy as np
from PIL import Image

from flair_jax.data.counted import counted
from flair_jax.data.sources import files
from flair_jax.data.transforms.captions import FIELDS
from flair_jax.data.transforms.regions import FIELD as REGIONS
from flair_jax.data.transforms.regions import Region

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (240, 60, 60),
    "orange": (250, 150, 40),
    "yellow": (250, 230, 70),
    "green": (70, 210, 90),
    "blue": (80, 140, 255),
    "purple": (200, 90, 235),
}
# Dark, so that shapes and not backgrounds make up most of what differs between pictures.
BACKGROUNDS = {"black": (14, 14, 18), "grey": (64, 64, 64), "navy": (15, 24, 75), "brown": (66, 40, 22)}
# Diameters as shares of the image's side. A large shape just fits into a cell, a small one is clearly smaller.
SIZES = {"small": (0.16, 0.2), "large": (0.29, 0.325)}
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
COUNTS = (2, 3, 4)
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = {  # where one shape lies as seen from another -> how sentences say it
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
SPLITS = ("train", "evaluation")

EVALUATION_SHARE = 8  # one scene in eight belongs to the evaluation split
MIN_SIZE = 36  # pixels; below, a small ring has no hole
NOISE = 7.0  # standard deviation of the texture, in grey levels
TINT = 8.0  # largest offset of a shape's or background's colour, in grey levels
SUBPIXELS = 8  # a pixel's coverage is the mean over 8 x 8 points
INFO = "info.json"
FORMAT = "flair_jax scenes 2"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One drawn object. `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; `place` is one of PLACES."""

    shape: str
    colour: str
    size: str
    place: str
    box: tuple[int, int, int, int]

    @property
    def phrase(self) -> str:
        """Its full name, which no other shape of the scene has: "large red circle"."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and all that is true of it.

    image: uint8 (H, W, 3) RGB. masks: uint8 (H, W) each, 0 is background: "colour" and "shape" hold 1 + the position in
    COLOURS and SHAPES, "object" holds 1 + the position in `objects`. sentences: the seven DreamLIP fields, lists of
    strings. places: for every object one sentence that says what it is and where. regions: for every object its box,
    with its phrase as the description.
    """

    image: np.ndarray
    objects: tuple[Shape, ...]
    background: str
    sentences: dict[str, list[str]]
    places: tuple[str, ...]
    masks: dict[str, np.ndarray]

    @property
    def regions(self) -> list[Region]:
        height, width = self.image.shape[:2]
        sides = width, height, width, height
        return [
            Region(tuple(at / side for at, side in zip(o.box, sides, strict=True)), _a(o.phrase)) for o in self.objects
        ]


def draw(seed: int, index: int, size: int = 64, split: str = "train") -> Scene:
    """Draws scene `index` of a split, `size` pixels a side; a pure function of its arguments.

    Raises ValueError for a size below MIN_SIZE or a split that is not in SPLITS.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size: expected at least {MIN_SIZE} pixels, found {size}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, found {split!r}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    content = _content(rng)
    while _split_of(content) != split:
        content = _content(rng)
    background = _choice(rng, tuple(BACKGROUNDS))
    objects = tuple(Shape(*words, _box(rng, words[2], words[3], size)) for words in content)
    image, masks = _paint(rng, objects, background, size)
    sentences, places = _sentences(rng, objects, background)
    return Scene(image, objects, background, sentences, places, masks)


def _choice(rng, options):
    return options[int(rng.integers(len(options)))]


def _content(rng) -> list[tuple[str, str, str, str]]:
    """(shape, colour, size, place) of each object: no two in one place, no two of the same colour and shape."""
    count = _choice(rng, COUNTS)
    kinds = rng.choice(len(COLOURS) * len(SHAPES), count, replace=False)
    cells = rng.choice(len(PLACES), count, replace=False)
    return [
        (SHAPES[kind % len(SHAPES)], tuple(COLOURS)[kind // len(SHAPES)], _choice(rng, tuple(SIZES)), PLACES[cell])
        for kind, cell in zip(kinds, cells, strict=True)
    ]


def _split_of(content) -> str:
    # crc32, not hash(): Python's hash of a string changes from process to process.
    digest = zlib.crc32(repr(sorted(content)).encode())
    return "evaluation" if digest % EVALUATION_SHARE == 0 else "train"


def _box(rng, size_word: str, place: str, size: int) -> tuple[int, int, int, int]:
    """A box anywhere inside the cell of its place: boxes of two cells never meet."""
    low, high = (int(share * size) for share in SIZES[size_word])
    narrowest = 2 * size // 3 - -(-size // 3)  # pixels of the middle cell
    diameter = int(rng.integers(low, min(high, narrowest) + 1))
    cell = PLACES.index(place)
    corner = []
    for step in (cell % 3, cell // 3):  # x, then y
        first, last = -(-step * size // 3), (step + 1) * size // 3 - diameter
        corner.append(int(rng.integers(first, last + 1)))
    x, y = corner
    return x, y, x + diameter, y + diameter


@functools.cache
def _coverage(shape: str, diameter: int) -> np.ndarray:
    """The share of every pixel of a shape's box that the shape fills, float32 (d, d)."""
    points = (np.arange(diameter * SUBPIXELS) + 0.5) / (diameter * SUBPIXELS) * 2 - 1
    x, y = points[None, :], points[:, None]
    radius = np.hypot(x, y)
    inside = {
        "circle": radius <= 1,
        "square": np.broadcast_to(True, radius.shape),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "cross": np.minimum(np.abs(x), np.abs(y)) <= 0.3,
        "ring": (radius <= 1) & (radius >= 0.55),
    }[shape]
    return inside.reshape(diameter, SUBPIXELS, diameter, SUBPIXELS).mean((1, 3), dtype=np.float32)  # (d, d)


def _paint(rng, objects, background: str, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The picture, uint8 (H, W, 3), and the three masks; a pixel belongs to a shape that fills half of it or more."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = np.float32(BACKGROUNDS[background]) + rng.uniform(-TINT, TINT)  # lighter or darker, the same hue
    masks = {name: np.zeros((size, size), np.uint8) for name in ("colour", "shape", "object")}
    for number, o in enumerate(objects, start=1):
        x0, y0, x1, y1 = o.box
        window = np.s_[y0:y1, x0:x1]
        coverage = _coverage(o.shape, x1 - x0)
        colour = np.float32(COLOURS[o.colour]) + rng.uniform(-TINT, TINT, 3)
        canvas[window] += coverage[..., None] * (colour - canvas[window])
        filled = coverage >= 0.5
        masks["colour"][window][filled] = 1 + tuple(COLOURS).index(o.colour)
        masks["shape"][window][filled] = 1 + SHAPES.index(o.shape)
        masks["object"][window][filled] = number
    canvas += NOISE * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), masks


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _at(place: str) -> str:
    return "in the centre" if place == "centre" else f"at the {place}"


def relations(a: Shape, b: Shape) -> tuple[str, ...]:
    """Which of RELATIONS hold of `a` as seen from `b`: their boxes do not even share a column (or a row) of pixels."""
    first, second = a.box, b.box
    holds = first[2] <= second[0], first[0] >= second[2], first[3] <= second[1], first[1] >= second[3]
    return tuple(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def _relation_sentence(rng, a: Shape, b: Shape) -> str:
    """Where `a` lies as seen from `b`."""
    wordings = [wording for relation in relations(a, b) for wording in RELATIONS[relation]]
    return f"the {a.phrase} is {_choice(rng, wordings)} the {b.phrase}"


def _count_sentences(rng, objects) -> list[str]:
    """How many shapes there are, and how many of one colour, one kind or one size."""
    total = NUMBERS[len(objects)]
    all_shapes = _choice(rng, (f"there are {total} shapes", f"the picture shows {total} shapes", f"{total} shapes"))
    o = _choice(rng, objects)
    key = _choice(rng, ("colour", "shape", "size"))
    value = getattr(o, key)
    count = sum(getattr(other, key) == value for other in objects)
    number = NUMBERS[count]
    verb = "is" if count == 1 else "are"
    if key == "shape":
        kind = value if count == 1 else "crosses" if value == "cross" else f"{value}s"
        some = _choice(rng, (f"there {verb} {number} {kind}", f"the picture shows {number} {kind}"))
    else:
        some = f"{number} of the shapes {verb} {value}"
    return [all_shapes, some]


def _sentences(rng, objects, background: str) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The seven fields (8 sentences for two shapes, 10 for three, 12 for four), and one place sentence an object."""
    phrases = [_a(o.phrase) for o in objects]
    places = [f"{_a(o.phrase)} {_at(o.place)}" for o in objects]
    pairs = [(a, b) for a in objects for b in objects if a is not b]
    all_shapes, some = _count_sentences(rng, objects)
    on = f"on {_a(background)} background"
    values = (
        [f"{', '.join(phrases[:-1])} and {phrases[-1]}"],
        [_choice(rng, (all_shapes, some))],
        places,
        [_relation_sentence(rng, *pairs[rng.integers(len(pairs))])],
        [f"there is {place}" for place in places],
        [_choice(rng, (f"the background is {background}", f"{_a(background)} background", f"the shapes lie {on}"))],
        [],
    )
    return dict(zip(FIELDS, values, strict=True)), tuple(places)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Unseen scenes with the truth that the evaluators need. N scenes, P parts, O objects.

    images: uint8 (N, H, W, 3). descriptions: N texts, every object with its place, then the background.
    parts: P texts, two objects with their places, true of one scene of the set only; part_images: int32 (P,), which.
    phrases: O texts such as "a large red circle", true of one object of their scene; phrase_images: int32 (O,);
    boxes: int32 (O, 4), (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
    colour_masks, shape_masks: uint8 (N, H, W), 0 is background, class c of the names below is 1 + c.
    colour_prompts, shape_prompts: one list of texts a class.
    """

    images: np.ndarray
    descriptions: list[str]
    parts: list[str]
    part_images: np.ndarray
    phrases: list[str]
    phrase_images: np.ndarray
    boxes: np.ndarray
    colour_masks: np.ndarray
    shape_masks: np.ndarray
    colour_names: tuple[str, ...]
    shape_names: tuple[str, ...]
    colour_prompts: list[list[str]]
    shape_prompts: list[list[str]]


def evaluation_set(count: int, seed: int, size: int = 64) -> EvaluationSet:
    """Draws `count` scenes of the evaluation split: none of them is among the training scenes of any seed."""
    scenes = [draw(seed, index, size, "evaluation") for index in range(count)]
    contents = [{(o.phrase, o.place) for o in scene.objects} for scene in scenes]
    parts, part_images, phrases, phrase_images, boxes = [], [], [], [], []
    for i, scene in enumerate(scenes):
        for first, second in _neighbours(len(scene.objects)):
            pair = {(o.phrase, o.place) for o in (scene.objects[first], scene.objects[second])}
            if sum(pair <= content for content in contents) == 1:
                parts.append(f"{scene.places[first]}. {scene.places[second]}")
                part_images.append(i)
        for o in scene.objects:
            phrases.append(_a(o.phrase))
            phrase_images.append(i)
            boxes.append(o.box)
    return EvaluationSet(
        images=np.stack([scene.image for scene in scenes]),
        descriptions=[". ".join([*s.places, f"the background is {s.background}"]) for s in scenes],
        parts=parts,
        part_images=np.asarray(part_images, np.int32),
        phrases=phrases,
        phrase_images=np.asarray(phrase_images, np.int32),
        boxes=np.asarray(boxes, np.int32),
        colour_masks=np.stack([scene.masks["colour"] for scene in scenes]),
        shape_masks=np.stack([scene.masks["shape"] for scene in scenes]),
        colour_names=tuple(COLOURS),
        shape_names=SHAPES,
        # Whole phrases, as in the captions: a class is all that bears its name.
        colour_prompts=[[_a(f"{size} {colour} {shape}") for size in SIZES for shape in SHAPES] for colour in COLOURS],
        shape_prompts=[[_a(f"{size} {colour} {shape}") for size in SIZES for colour in COLOURS] for shape in SHAPES],
    )


def _neighbours(count: int) -> list[tuple[int, int]]:
    """Pairs that meet every object twice, or once where there are only two: (0, 1), (1, 2), (2, 0)."""
    return [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]


def write(
    folder: str | os.PathLike, count: int, seed: int, shard_size: int = 1000, size: int = 64, split: str = "train"
) -> list[pathlib.Path]:
    """Writes scenes 0 ... count - 1 of a split as webdataset shards and returns their paths, in order.

    Every sample has KEY.jpg; KEY.json with the seven caption fields, the "regions" (see `transforms.regions`) and,
    under "scene", where it comes from and its objects; KEY.masks.png, RGB, whose channels are the masks "colour",
    "shape" and "object". The same arguments write the same bytes. A complete folder with the same arguments is left as
    it is (INFO is written last), an incomplete one is written again. Raises FileExistsError where the folder holds
    scenes of other arguments.
    """
    folder = pathlib.Path(os.path.expanduser(folder))
    info = {"format": FORMAT, "count": count, "seed": seed, "shard_size": shard_size, "size": size, "split": split}
    paths = [folder / f"{shard:05d}.tar" for shard in range(-(-count // shard_size))]
    if (folder / INFO).exists():
        found = json.loads((folder / INFO).read_text())
        if found != info:
            raise FileExistsError(f"{folder / INFO}: expected {info}, found {found}; delete the folder or name another")
        if all(path.exists() for path in paths):
            return paths
    folder.mkdir(parents=True, exist_ok=True)
    for shard, path in enumerate(paths):
        with files.replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * shard_size, min((shard + 1) * shard_size, count)):
                key = f"{shard:05d}{index - shard * shard_size:04d}"
                for name, content in _members(key, draw(seed, index, size, split), seed, index, split):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with files.replacing(folder / INFO) as partial:
        partial.write_text(json.dumps(info, indent=2) + "\n")
    return paths


def _members(key: str, scene: Scene, seed: int, index: int, split: str) -> list[tuple[str, bytes]]:
    height, width = scene.image.shape[:2]
    picture, masks = io.BytesIO(), io.BytesIO()
    # Colours at full resolution: a shape is a dozen pixels wide.
    Image.fromarray(scene.image).save(picture, "JPEG", quality=95, subsampling=0)
    Image.fromarray(np.stack([scene.masks[name] for name in ("colour", "shape", "object")], -1)).save(masks, "PNG")
    fields = {
        **scene.sentences,
        REGIONS: [region.fields() for region in scene.regions],
        "key": key,
        "url": f"scenes:{split}/{seed}/{index}",
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "sha256": hashlib.sha256(picture.getvalue()).hexdigest(),
        "scene": {
            "seed": seed,
            "index": index,
            "split": split,
            "background": scene.background,
            "objects": [vars(o) for o in scene.objects],
        },
    }
    return [
        (f"{key}.jpg", picture.getvalue()),
        (f"{key}.json", json.dumps(fields).encode()),
        (f"{key}.masks.png", masks.getvalue()),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.data.scenes", description="Draws scenes as webdataset shards."
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, required=True, help="scenes")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--shard-size", type=int, default=1000, help="scenes in a shard")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--split", choices=SPLITS, default="train")
    options = vars(parser.parse_args(arguments))
    paths = write(**options)
    print(f"{counted(options['count'], 'scene')} in {counted(len(paths), 'shard')}: {options['folder']}")


if __name__ == "__main__":
    main()
