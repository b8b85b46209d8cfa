"""The scenes are true: every sentence is parsed by a grammar of its own and checked against boxes, masks and pixels."""

import io
import json
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from flair_jax.data import scenes
from flair_jax.data.transforms import regions

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")
SCENES = 400


def see(scene: scenes.Scene, size: int) -> list[dict]:
    """What the boxes and masks say about each object, in words; nothing of it comes from the generator's words."""
    seen = []
    for o in scene.objects:
        x0, y0, x1, y1 = o.box
        classes = {}
        for name, words in (("colour", COLOURS), ("shape", SHAPES)):
            values = np.unique(scene.masks[name][y0:y1, x0:x1])
            (value,) = values[values > 0]  # one object in the box, of one class
            classes[name] = words[value - 1]
        column, row = COLUMNS[int(3 * (x0 + x1) / 2 / size)], ROWS[int(3 * (y0 + y1) / 2 / size)]
        place = f"{row} {column}".strip() or "centre"
        seen.append({**classes, "size": "large" if x1 - x0 > 0.25 * size else "small", "place": place, "box": o.box})
    return seen


def background_word(scene: scenes.Scene) -> str:
    red, _, blue = scene.image[scene.masks["object"] == 0].mean(0)
    if abs(red - blue) > 25:
        return "brown" if red > blue else "navy"
    return "black" if red < 40 else "grey"


def the(phrase: str, seen: list[dict]) -> dict:
    """The one object that a phrase such as "small red circle", "red shape" or "circle" fits."""
    (found,) = [o for o in seen if fits(phrase, o)]
    return found


def fits(phrase: str, o: dict) -> bool:
    return all(word in ("shape", o["colour"], o["shape"], o["size"]) for word in phrase.split())


A = r"(?:an (?=[aeiou])|a (?![aeiou]))"
PHRASE = rf"(?:(?:small|large) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|shape)"
PLACE = r"(?:in the (?P<middle>centre)|at the (?P<place>(?:top|bottom)? ?(?:left|right)?))"
GRAMMAR = {
    "place": [
        rf"(?:there is )?{A}(?P<what>{PHRASE}) {PLACE}",
    ],
    "relation": [
        rf"the (?P<a>{PHRASE}) is (?P<relation>left of|to the left of|right of|to the right of|above|below|higher than"
        rf"|lower than) the (?P<b>{PHRASE})"
    ],
    "total": [r"(?:there are |the picture shows )?(?P<number>two|three|four) shapes"],
    "some": [
        r"(?P<number>one) of the shapes is (?P<kind>\w+)",
        r"(?P<number>two|three|four) of the shapes are (?P<kind>\w+)",
        rf"(?:there is|the picture shows) (?P<number>one) (?P<kind>{'|'.join(SHAPES)})",
        rf"(?:there are|the picture shows) (?P<number>two|three|four) (?P<kind>{'|'.join(SHAPES)})e?s",
    ],
    "background": [r"the background is (?P<ground>\w+)", rf"(?:the shapes lie on )?{A}(?P<ground>\w+) background"],
    "list": [rf"(?P<list>{A}{PHRASE}(?:, {A}{PHRASE})* and {A}{PHRASE})"],
}


def true(sentence: str, seen: list[dict], ground: str) -> str:
    """Asserts that a sentence is true and returns its kind."""
    matches = [(kind, m) for kind, rules in GRAMMAR.items() for rule in rules if (m := re.fullmatch(rule, sentence))]
    assert len(matches) == 1, f"{len(matches)} readings of {sentence!r}"
    kind, match = matches[0]
    words = {name: value for name, value in match.groupdict().items() if value}
    if kind == "place":
        place = words.get("middle") or words["place"]
        assert any(fits(words["what"], o) for o in seen if o["place"] == place)
    elif kind == "relation":
        a, b = the(words["a"], seen)["box"], the(words["b"], seen)["box"]
        assert {
            "left": a[2] <= b[0],
            "right": a[0] >= b[2],
            "above": a[3] <= b[1],
            "higher": a[3] <= b[1],
            "below": a[1] >= b[3],
            "lower": a[1] >= b[3],
        }[re.search("left|right|above|higher|below|lower", words["relation"])[0]]
    elif kind == "total":
        assert NUMBERS[words["number"]] == len(seen)
    elif kind == "some":
        assert NUMBERS[words["number"]] == sum(fits(words["kind"], o) for o in seen)
    elif kind == "list":
        named = re.split(", | and ", words["list"])
        whole = [f"{o['size']} {o['colour']} {o['shape']}" for o in seen]
        assert whole == [re.sub("^an? ", "", phrase) for phrase in named]
    assert words.get("ground", ground) == ground
    return kind


@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_every_sentence_is_true(size, split):
    kinds, counts = set(), set()
    for index in range(SCENES):
        scene = scenes.draw(5, index, size, split)
        seen, ground = see(scene, size), background_word(scene)
        assert ground == scene.background
        words = [{key: o[key] for key in ("shape", "colour", "size", "place")} for o in seen]
        assert words == [{key: getattr(o, key) for key in ("shape", "colour", "size", "place")} for o in scene.objects]
        assert tuple(scene.sentences) == scenes.FIELDS
        for field, sentences in scene.sentences.items():
            assert len(sentences) == 1 or field.startswith("long")
        flat = [sentence for sentences in scene.sentences.values() for sentence in sentences]
        assert 8 <= len(flat) == len(set(flat)) <= 12
        kinds |= {true(sentence, seen, ground) for sentence in flat}
        counts.add(len(seen))
        assert len(scene.places) == len(seen)
        for o, sentence in zip(seen, scene.places, strict=True):
            assert true(sentence, seen, ground) == "place" and f"{o['size']} {o['colour']} {o['shape']}" in sentence
    assert kinds == set(GRAMMAR) and counts == {2, 3, 4}


def test_the_checker_refuses_what_is_false():
    scene = next(s for s in (scenes.draw(5, i) for i in range(100)) if scenes.PLACES[0] in [o.place for o in s.objects])
    seen, ground = see(scene, 64), background_word(scene)
    o = next(o for o in scene.objects if o.place == "top left")
    assert true(f"a {o.phrase} at the top left".replace("a o", "an o"), seen, ground) == "place"
    for lie in (f"a {o.phrase} at the bottom", f"{len(seen)} shapes", "the background is pink", f"the {o.phrase}"):
        with pytest.raises(AssertionError):
            true(lie, seen, ground)


def test_boxes_and_masks_agree_with_the_pixels():
    hues = {"red": 0, "orange": 32, "yellow": 54, "green": 135, "blue": 225, "purple": 288}  # degrees
    for index in range(SCENES):
        scene = scenes.draw(1, index, 64)
        covered = np.zeros((64, 64), int)
        for number, o in enumerate(scene.objects, start=1):
            x0, y0, x1, y1 = o.box
            covered[y0:y1, x0:x1] += 1
            mask = scene.masks["object"] == number
            rows, columns = np.nonzero(mask)
            # The apex of a triangle is thinner than a pixel; everything else reaches its box's border.
            assert (columns.min(), rows.max() + 1, columns.max() + 1) == (x0, y1, x1)
            assert y0 <= rows.min() <= y0 + (o.shape == "triangle")
            red, green, blue = scene.image[mask].mean(0) / 255
            hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
            distance = {name: abs((hue - value + 180) % 360 - 180) for name, value in hues.items()}
            assert min(distance, key=distance.get) == o.colour
            assert shape_of(mask[y0:y1, x0:x1]) == o.shape
        assert covered.max() == 1  # no box meets another
        for name in ("colour", "shape"):
            np.testing.assert_array_equal(scene.masks[name] > 0, scene.masks["object"] > 0)


def shape_of(mask: np.ndarray) -> str:
    """The shape's name from its outline alone: corners, centre, share of the box."""
    middle = len(mask) // 2
    if not mask[middle, middle]:
        return "ring"
    if mask[0, 0]:
        return "square"
    if mask[-1, 0]:
        return "triangle"
    return "circle" if mask.mean() > 0.65 else "cross"


def test_large_is_clearly_larger_than_small():
    for size in (48, 64, 96):
        widths = {"small": [], "large": []}
        for index in range(100):
            for o in scenes.draw(0, index, size).objects:
                widths[o.size].append(o.box[2] - o.box[0])
        assert max(widths["small"]) * 1.35 < min(widths["large"])


def test_drawing_depends_on_its_arguments_only():
    reference = scenes.draw(3, 7)
    scenes.draw(3, 8)
    again = scenes.draw(3, 7)
    np.testing.assert_array_equal(reference.image, again.image)
    assert reference.sentences == again.sentences and reference.objects == again.objects
    command = (
        "import hashlib; from flair_jax.data import scenes; s = scenes.draw(3, 7);"
        "print(hashlib.sha256(s.image.tobytes() + repr((s.objects, s.sentences)).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for environment in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert len(runs) == 1
    assert not np.array_equal(reference.image, scenes.draw(4, 7).image)
    assert not np.array_equal(reference.image, scenes.draw(3, 7, split="evaluation").image)


def test_splits_share_no_scene_whatever_the_seed():
    def contents(seed, split):
        drawn = (scenes.draw(seed, index, 48, split) for index in range(600))
        return {frozenset((o.phrase, o.place) for o in scene.objects) for scene in drawn}

    train = contents(0, "train") | contents(1, "train")
    evaluation = contents(0, "evaluation") | contents(2, "evaluation")
    assert len(evaluation) > 1000  # hardly a scene twice
    assert not train & evaluation


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"size: .* 36 .* 20"):
        scenes.draw(0, 0, 20)
    with pytest.raises(ValueError, match=r"split: .*'test'"):
        scenes.draw(0, 0, split="test")
    for size in range(scenes.MIN_SIZE, 130):
        for index in range(10):
            assert all(max(o.box) <= size for o in scenes.draw(0, index, size).objects)


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shards_hold_the_scenes(tmp_path):
    paths = scenes.write(tmp_path / "shards", 25, seed=9, shard_size=10, size=48)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    names = [name for path in paths for name in members(path)]
    keys = [f"{index // 10:05d}{index % 10:04d}" for index in range(25)]
    assert names == [f"{key}.{ending}" for key in keys for ending in ("jpg", "json", "masks.png")]
    content = members(paths[1])
    scene = scenes.draw(9, 13, 48)
    fields = json.loads(content["000010003.json"])
    assert {name: fields[name] for name in scenes.FIELDS} == scene.sentences
    assert fields["key"] == "000010003" and (fields["width"], fields["height"]) == (48, 48)
    assert fields["url"] == "scenes:train/9/13"
    assert [tuple(o["box"]) for o in fields["scene"]["objects"]] == [o.box for o in scene.objects]
    found = regions.parse(fields)
    assert len(found) == len(scene.objects) == len(see(scene, 48))
    for number, (region, o) in enumerate(zip(found, see(scene, 48), strict=True), start=1):
        rows, columns = np.nonzero(scene.masks["object"] == number)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(np.array(region.box) * 48, seen, atol=1)  # a thin tip fills less than half a pixel
        assert re.fullmatch(f"{A}{o['size']} {o['colour']} {o['shape']}", region.description) and region.score is None
    picture = np.asarray(Image.open(io.BytesIO(content["000010003.jpg"])))
    assert np.abs(picture.astype(float) - scene.image).mean() < 4  # JPEG, noise
    masks = np.asarray(Image.open(io.BytesIO(content["000010003.masks.png"])))
    np.testing.assert_array_equal(masks, np.stack([scene.masks[name] for name in ("colour", "shape", "object")], -1))


def test_a_complete_folder_is_reused_and_an_incomplete_one_written_again(tmp_path):
    arguments = {"count": 6, "seed": 1, "shard_size": 4, "size": 48}
    paths = scenes.write(tmp_path, **arguments)
    original = [path.read_bytes() for path in paths]
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert scenes.write(tmp_path, **arguments) == paths
    assert [path.stat().st_mtime_ns for path in paths] == stamps

    paths[1].unlink()
    scenes.write(tmp_path, **arguments)
    assert [path.read_bytes() for path in paths] == original

    (tmp_path / scenes.INFO).unlink()  # as a kill leaves it: a shard too short, no INFO
    paths[0].write_bytes(original[0][:700])
    scenes.write(tmp_path, **arguments)
    assert [path.read_bytes() for path in paths] == original
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", scenes.INFO]

    with pytest.raises(FileExistsError, match=r"info\.json.*'seed': 2.*'seed': 1.*delete"):
        scenes.write(tmp_path, **{**arguments, "seed": 2})
    assert [path.read_bytes() for path in paths] == original


def test_the_command_writes_shards(tmp_path, capsys):
    scenes.main([str(tmp_path), "--count", "3", "--seed", "4", "--size", "48", "--split", "evaluation"])
    assert "3 scenes in 1 shard" in capsys.readouterr().out
    assert json.loads(members(tmp_path / "00000.tar")["000000002.json"])["scene"]["split"] == "evaluation"


def test_evaluation_set():
    count = 60
    unseen = scenes.evaluation_set(count, seed=2, size=48)
    drawn = [scenes.draw(2, index, 48, "evaluation") for index in range(count)]
    seen = [see(scene, 48) for scene in drawn]
    grounds = [background_word(scene) for scene in drawn]
    assert unseen.images.shape == (count, 48, 48, 3) and unseen.images.dtype == np.uint8
    for i, description in enumerate(unseen.descriptions):
        *places, ground = description.split(". ")
        assert [true(sentence, seen[i], grounds[i]) for sentence in places] == ["place"] * len(seen[i])
        assert true(ground, seen[i], grounds[i]) == "background"

    def holds(part, i):
        try:
            return [true(sentence, seen[i], grounds[i]) for sentence in part.split(". ")] == ["place"] * 2
        except (AssertionError, ValueError):
            return False

    assert len(unseen.parts) == len(unseen.part_images) > 2 * count
    for part, image in zip(unseen.parts, unseen.part_images, strict=True):
        assert [i for i in range(count) if holds(part, i)] == [image]

    assert len(unseen.phrases) == len(unseen.boxes) == sum(map(len, seen))
    for phrase, image, box in zip(unseen.phrases, unseen.phrase_images, unseen.boxes, strict=True):
        assert the(re.sub("^an? ", "", phrase), seen[image])["box"] == tuple(box)
    for name, masks, names, prompts in (
        ("colour", unseen.colour_masks, unseen.colour_names, unseen.colour_prompts),
        ("shape", unseen.shape_masks, unseen.shape_names, unseen.shape_prompts),
    ):
        np.testing.assert_array_equal(masks, np.stack([scene.masks[name] for scene in drawn]))
        assert set(np.unique(masks)) == set(range(len(names) + 1))
        for word, texts in zip(names, prompts, strict=True):
            assert texts and all(word in text.split() for text in texts)


def test_parts_that_fit_two_scenes_are_left_out():
    """With so many scenes some pair of objects occurs twice; both parts must go."""
    unseen = scenes.evaluation_set(1500, seed=0, size=36)
    contents = [scenes.draw(0, i, 36, "evaluation").objects for i in range(1500)]
    pairs = sum(len(objects) if len(objects) > 2 else 1 for objects in contents)
    assert 0 < pairs - len(unseen.parts) < 0.05 * pairs
