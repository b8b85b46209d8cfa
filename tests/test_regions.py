"""Boxes and descriptions of regions: read with care, and carried along with whatever is done to the picture."""

import hashlib
import io
import json

import jax
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from shard_files import write_tar

from flair_jax import config as configuration
from flair_jax.augmentation import crop_and_resize
from flair_jax.data import loader
from flair_jax.data.sources.base import Record
from flair_jax.data.transforms import images, regions
from flair_jax.data.transforms.base import BOXES, BOXES_VALID, DESCRIPTION_IDS, Sample
from flair_jax.data.transforms.captions import CaptionOptions
from flair_jax.data.transforms.images import AugmentationOptions
from flair_jax.data.transforms.regions import Region, RegionError, Regions
from flair_jax.data.transforms.samples import Captions, Crop, Flip
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.step import text_slots

SIZE = (48, 64)
TOKENIZE = Tokenizer(12)
BOX = [0.25, 0.5, 0.75, 0.75]
RED = {"box": BOX, "description": "red"}


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def sample(fields, image=None, seed=0, number=0) -> Sample:
    image = encoded(Image.new("RGB", (40, 20))) if image is None else image
    return Sample(Record("key", "shard", image, json.dumps(fields).encode()), seed, 0, number)


SQUASH = AugmentationOptions(squash=True)


def transform(count=3, options=SQUASH, pixels="reference", upright=False, **more):
    captions = Captions(CaptionOptions(fields=("caption",), count=1, max_merged=1), TOKENIZE)
    crop = Crop(SIZE, options, pixels, upright, Flip(options, captions, regions.of_record) if options.flip else None)
    return Regions(count, regions.of_record, crop.view, TOKENIZE, **more), crop


def of(found, *names):
    return [found[name] for name in names or ("texts/descriptions", "valid/descriptions", BOXES, BOXES_VALID)]


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_regions_become_rows():
    """Fewer than there are rows: the rest is empty; what has a box or a description alone has that alone."""
    found = [
        {"box": [0.1, 0.2, 0.3, 0.6], "description": " a dog "},
        {"box": [0.5, 0.5, 0.5, 0.9], "description": "no width"},
        {"box": [0.4, 0.4, 0.8, 0.8], "description": " "},
        {"description": "somewhere"},
    ]
    tokens, described, boxes, there = of(transform(5)[0](sample({"regions": found})))
    np.testing.assert_array_equal(tokens, TOKENIZE(["a dog", "no width", "", "somewhere", ""]))
    assert described.tolist() == [True, True, False, True, False] and described.dtype == bool
    assert there.tolist() == [True, False, True, False, False] and there.dtype == bool
    np.testing.assert_allclose(
        boxes, [[0.2, 0.4, 0.2, 0.4], [0] * 4, [0.6, 0.6, 0.4, 0.4], [0] * 4, [0] * 4], atol=1e-6
    )
    assert boxes.dtype == np.float32 and tokens.dtype == np.int32


def test_descriptions_of_any_characters():
    """JSON may hold half of a character; descriptions that read the same have one number."""
    record = {"regions": [{"box": BOX, "description": text} for text in ("\ud83d", "A Dog", "a dog", "äß \U0001f600")]}
    ids = transform(4)[0](sample(record))[DESCRIPTION_IDS]
    assert ids[1] == ids[2] and len(set(ids.tolist())) == 3 and ids.dtype == np.int32


@pytest.mark.parametrize("fields", [{}, {"regions": None}, {"regions": []}])
def test_images_without_regions_stay(fields):
    tokens, described, boxes, there = of(transform()[0](sample(fields)))
    assert not (described.any() or there.any() or boxes.any())
    np.testing.assert_array_equal(tokens, TOKENIZE([""] * 3))


def test_the_best_are_taken():
    scores = [0.5, None, 0.9, 0.5, 0.7, 0.5]
    found = [{"box": BOX, "description": str(n)} | ({} if s is None else {"score": s}) for n, s in enumerate(scores)]
    tokens = transform(4)[0](sample({"regions": found}))["texts/descriptions"]
    np.testing.assert_array_equal(tokens, TOKENIZE(["2", "4", "0", "3"]))
    for region in found:
        region.pop("score", None)
    tokens = transform(4)[0](sample({"regions": found}))["texts/descriptions"]
    np.testing.assert_array_equal(tokens, TOKENIZE(["0", "1", "2", "3"]))


def test_boxes_are_cut_to_the_picture_and_dropped_as_the_reference_drops_them():
    """Spec 2.2: clipped, and no target where nothing is left; the row stays with its description."""
    found = [[-0.5, 0.5, 0.5, 2], [1.0, 0, 1.5, 1], [0.7, 0.2, 0.3, 0.4], [0, 0, 0, 0], [-9, -9, 9, 9]]
    record = {"regions": [{"box": box, "description": str(n)} for n, box in enumerate(found)]}
    tokens, described, boxes, there = of(transform(5)[0](sample(record)))
    assert described.all() and there.tolist() == [True, False, False, False, True]
    np.testing.assert_allclose(boxes[there], [[0.25, 0.75, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    np.testing.assert_array_equal(tokens, TOKENIZE(list("01234")))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([], "the record must be a JSON object, not list"),
        ({"regions": {}}, "regions must be a list, not dict"),
        ({"regions": [RED, "a dog"]}, r"regions\[1\] must be an object, not str"),
        ({"regions": [{"box": [0, 0, 1], "description": "a"}]}, r"regions\[0\]\.box must be a list of four finite num"),
        ({"regions": [{"box": [0, 0, 1, "1"], "description": "a"}]}, r"regions\[0\]\.box must be a list of four"),
        ({"regions": [{"box": [0, 0, 1, True], "description": "a"}]}, r"regions\[0\]\.box must be a list of four"),
        ({"regions": [{"box": [0, 0, 1, float("nan")]}]}, r"regions\[0\]\.box must be a list of four"),
        ({"regions": [{"box": [0, 0, 1, float("inf")]}]}, r"regions\[0\]\.box must be a list of four"),
        ({"regions": [{"box": BOX, "description": 3}]}, r"regions\[0\]\.description must be a string, not int"),
        ({"regions": [{"box": BOX, "description": "a", "score": "high"}]}, r"regions\[0\]\.score must be a finite num"),
        ({"regions": [{"box": BOX, "description": "a", "score": float("nan")}]}, r"regions\[0\]\.score must be"),
    ],
)
def test_broken_regions_are_refused_by_name(fields, words):
    with pytest.raises(RegionError, match=words):
        transform()[0](sample(fields))


def test_a_region_s_fields_are_read_back():
    for region in (Region(tuple(BOX), "a dog", 0.5), Region(None, "a dog"), Region(tuple(BOX), "")):
        assert regions.parse(json.loads(json.dumps({"regions": [region.fields()]}))) == [region]


@pytest.mark.parametrize("options", [dict(count=0), dict(min_area=1.5), dict(min_area=-0.1)])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match=r"regions\.count is .*, regions\.min_area"):
        transform(**options)


# ---------------------------------------------------------------------------------------------------------------------
# The view


def white_box(size=(120, 90), box=BOX) -> tuple[Image.Image, list]:
    """A black picture with a white rectangle, and its region."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), tuple(round(side * of) for side, of in zip(box, size * 2, strict=True)))
    return image, [{"box": box, "description": "white"}]


_resize = jax.jit(crop_and_resize, static_argnames="size")


def seen_in(arrays) -> np.ndarray:
    """(x0, y0, x1, y1) in 0 to 1 of what is white in the image that the model sees."""
    pixels = arrays["images"]
    if "crop_boxes" in arrays:
        pixels = np.asarray(_resize(pixels[None], arrays["crop_boxes"][None], size=SIZE))[0]
    white = np.argwhere(pixels[..., 0] > 127)
    low, high = white.min(0)[::-1], white.max(0)[::-1] + 1
    return np.concatenate([low, high]) / (SIZE[1], SIZE[0], SIZE[1], SIZE[0])


def corners(box) -> np.ndarray:
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def close_to_the_pixels(record, make, arrays):
    """Within a pixel of the image that the model sees, at all four sides."""
    off = np.abs(corners(make(record)[BOXES][0]) - seen_in(arrays)) * (SIZE[1], SIZE[0], SIZE[1], SIZE[0])
    assert off.max() < 1.3


@pytest.mark.parametrize("pixels", ["reference", "fast", "device"])
@pytest.mark.parametrize(
    "options",
    [dict(squash=True), dict(squash=True, flip=1.0), dict(scale=(0.5, 0.9)), dict(scale=(0.5, 0.9), flip=0.5)],
    ids=str,
)
def test_boxes_lie_where_the_pixels_do(pixels, options):
    """A white rectangle is found where the box says, whatever was cropped and mirrored, by all three ways."""
    image, found = white_box()
    make, crop = transform(1, AugmentationOptions(**options), pixels, min_area=0.0)
    fields, flipped = {"caption": "a box", "regions": found}, set()
    for seed in range(6):
        record = sample(fields, encoded(image), seed)
        if make(record)[BOXES_VALID][0]:
            close_to_the_pixels(record, make, crop(record))
            flipped.add(crop.view(record).flip)
    assert flipped == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[options.get("flip", 0.0)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("squash", [True, False])
def test_boxes_turn_with_the_photograph(orientation, squash):
    """Boxes are those of the stored picture; with `upright` they are turned as the pixels are, and cropped then."""
    image, found = white_box(box=[0.1, 0.2, 0.4, 0.9])
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    data = encoded(image, "JPEG", exif=tags, quality=95)
    expected = np.argwhere(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))[..., 0] > 127)
    width, height = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    turned = regions.turn(tuple(found[0]["box"]), orientation)
    low, high = expected.min(0)[::-1], expected.max(0)[::-1] + 1
    np.testing.assert_allclose(turned, [low[0] / width, low[1] / height, high[0] / width, high[1] / height], atol=0.02)
    options = AugmentationOptions(squash=True) if squash else AugmentationOptions(scale=(0.7, 0.9))
    for pixels in ("reference", "fast"):
        for upright in (True, False):
            make, crop = transform(1, options, pixels, upright, min_area=0.0)
            record = sample({"regions": found}, data, seed=1)
            close_to_the_pixels(record, make, crop(record))


def test_a_tiff_is_turned_by_pillow_always():
    image, _ = white_box(box=[0.1, 0.2, 0.4, 0.9])
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    data = encoded(image, "TIFF", exif=tags)
    assert images.stored_size(data) == (*images.decode(data).size, 1)


def test_what_a_crop_hides_is_dropped_with_its_description():
    """By the share of its own area that is left, counted without what lay outside of the picture before."""
    view = images.View(1, (0.5, 0.0, 1.0, 1.0), False)
    cases = {(0.25, 0.0, 0.75, 1.0): 0.5, (0.4, 0.0, 0.6, 0.5): 0.5, (0.0, 0.0, 0.6, 1.0): 1 / 6, (0.6, -1, 1.9, 1): 1}
    for box, share in cases.items():
        region = Region(box, "a dog")
        assert regions.see(region, view, share + 1e-6) is None or share == 1
        assert regions.see(region, view, share - 1e-6).description == "a dog"
    assert regions.see(Region((0.25, 0.2, 0.75, 0.4), "a"), view, 0.1).box == (0.0, 0.2, 0.5, 0.4)
    assert regions.see(Region((0.0, 0.0, 0.4, 1.0), "a"), view, 0.0) is None  # nothing is left of it
    assert regions.see(Region((0.2, 0.2, 0.2, 0.4), "a"), view, 0.5).description == "a"  # nobody knows where it is
    assert regions.see(Region(None, "a"), view, 0.5) == Region(None, "a")
    make, _ = transform(2, AugmentationOptions(scale=(0.2, 0.2), ratio=(1, 1)), min_area=0.9)
    found = [{"box": [x, y, x + 0.05, y + 0.05], "description": "a"} for x in (0.1, 0.5, 0.9) for y in (0.1, 0.5, 0.9)]
    counts = [make(sample({"regions": found}, seed=seed))["valid/descriptions"].sum() for seed in range(20)]
    assert set(counts) > {0, 1}
    for seed in range(20):
        arrays = make(sample({"regions": found}, seed=seed))
        np.testing.assert_array_equal(arrays["valid/descriptions"], arrays[BOXES_VALID])


# ---------------------------------------------------------------------------------------------------------------------
# Mirrored pictures and their texts

SAID = [
    ({"caption": "a dog. A cat at the Left"}, "A cat at the Left"),
    ({"caption": "a dog", "regions": [RED, {"description": "rightmost cup"}]}, "rightmost cup"),
]


@pytest.mark.parametrize(("fields", "said"), SAID)
def test_a_text_that_says_left_or_right_forbids_a_flip(fields, said):
    """Whatever is drawn of the texts and whether this picture would be mirrored: at the first such sample."""
    for probability in (1e-9, 1.0):
        make, crop = transform(1, AugmentationOptions(squash=True, flip=probability))
        for call in (crop, make) if "regions" in fields else (crop,):
            with pytest.raises(ValueError, match=rf"{said}.*sample key.*sided='keep'.*sided='flip'") as raised:
                call(sample(fields))
            assert not isinstance(raised.value, regions.SampleError)  # the run ends, the sample is not skipped


@pytest.mark.parametrize(("fields", "said"), SAID)
def test_what_to_do_with_sided_texts(fields, said):
    for sided, expected in (("keep", False), ("flip", True)):
        _, crop = transform(1, AugmentationOptions(squash=True, flip=1.0, sided=sided))
        assert crop.view(sample(fields)).flip is expected
    _, crop = transform(1, AugmentationOptions(squash=True))
    assert crop.view(sample(fields)).flip is False  # nothing is mirrored, so nothing is asked


def test_other_words_and_other_fields_do_not_matter():
    fields = {"caption": "a bright copyright leftover", "url": "left.jpg", "regions": [RED]}
    _, crop = transform(1, AugmentationOptions(squash=True, flip=1.0))
    assert crop.view(sample(fields)).flip


@pytest.mark.parametrize("options", [dict(flip=1.5), dict(flip=-0.1), dict(sided="maybe")])
def test_unknown_augmentations_are_refused(options):
    with pytest.raises(ValueError, match=rf"augmentation\.{next(iter(options))} is"):
        AugmentationOptions(**options)


# ---------------------------------------------------------------------------------------------------------------------
# The stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve pictures with none to three regions each; the third has broken ones."""
    return write(tmp_path_factory.mktemp("regions") / "0.tar", broken=(2,))


def write(path, broken=()):
    members = []
    for number in range(12):
        image, _ = white_box((30 + number, 40))
        found = [{"box": BOX, "description": f"box {n} of {number}", "score": n / 10} for n in range(number % 4)]
        fields = {"caption": f"picture {number}", "mllm": f"a longer text. It is of {number}", "regions": found}
        if number in broken:
            fields["regions"][0]["box"] = [0, 1]
        members += [(f"{number:03}.png", encoded(image)), (f"{number:03}.json", json.dumps(fields).encode())]
    return write_tar(path, members)


OPTIONS = dict(
    batch_size=4,
    image_size=16,
    context_length=12,
    seed=3,
    max_skipped=1.0,
    captions=dict(fields=("caption",), count=1, max_merged=1, splitting="whole"),
    regions=dict(count=2),
    augmentation=dict(scale=(0.6, 1.0), flip=0.5),
)


def digest(batch) -> str:
    leaves = jax.tree.leaves_with_path(batch)
    return hashlib.sha256(
        b"".join(repr(path).encode() + np.asarray(leaf).tobytes() for path, leaf in leaves)
    ).hexdigest()


def test_a_batch(shards):
    """Slots stand in their order: captions, negatives, descriptions; boxes are those of the descriptions."""
    with loader.make_stream(shards, **OPTIONS, negatives=dict(kinds=("ngram_shuffle_1",))) as stream:
        batches = [next(stream) for _ in range(3)]
        assert stream.skipped == {"regions[#].box must be a list of four finite numbers, not [#, #]": 1}
    data = dict(captions=OPTIONS["captions"], negatives=dict(kinds=("ngram_shuffle_1",)), regions=OPTIONS["regions"])
    assert text_slots(data) == (("captions", 1), ("negatives", 1), ("descriptions", 2))
    for batch in batches:
        tokens = batch["texts"]["tokens"].reshape(4, 4, 12)
        assert batch["valid"].shape == (4, 4) and batch[BOXES].shape == (4, 2, 4) and batch[BOXES_VALID].shape == (4, 2)
        assert (batch["valid"][:, 2:] == batch[BOXES_VALID]).all()
        for number in range(12):
            (picture,) = TOKENIZE([f"picture {number}"])
            for row in np.flatnonzero((tokens[:, 0] == picture).all(-1)):
                best = [f"box {n} of {number}" for n in reversed(range(number % 4))][:2]
                np.testing.assert_array_equal(tokens[row, 2:], TOKENIZE([*best, "", ""][:2]))


def test_shards_without_regions_are_refused(tmp_path):
    """A run would not learn from regions, and not say so."""
    picture, fields = encoded(white_box()[0]), b'{"caption": "a", "regions": []}'
    members = [member for n in range(3) for member in ((f"{n}.png", picture), (f"{n}.json", fields))]
    shards = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"none of the first 2,048 samples has a region: .*source to 'beside'"):
        loader.make_stream(shards, **OPTIONS)
    loader.make_stream(shards, **{**OPTIONS, "regions": {}}).close()


def test_slots_without_negatives_or_regions():
    data = configuration.read("flair_cc3m")["data"]
    assert text_slots(data) == ()
    assert text_slots({**data, "regions": {"count": 5}}) == (("captions", 8), ("descriptions", 5))
    kinds = {**data["negatives"], "kinds": ("replace",)}
    assert text_slots({**data, "negatives": kinds}) == (("captions", 8), ("negatives", 1))


def test_workers_and_a_restart_change_nothing(shards):
    with loader.make_stream(shards, **OPTIONS) as stream:
        expected = [digest(next(stream)) for _ in range(7)]
    with loader.make_stream(shards, **OPTIONS) as stream:
        assert [digest(next(stream)) for _ in range(3)] == expected[:3]
        position = json.loads(json.dumps(stream.position))
    with loader.make_stream(shards, **OPTIONS, workers=2, position=position) as stream:
        assert [digest(next(stream)) for _ in range(4)] == expected[3:]


def test_packed_texts_are_the_padded_ones(shards):
    """Descriptions are packed beside the captions, each with its own tokens."""
    packed = loader.make_stream(shards, **OPTIONS, packing=dict(row_length=24))
    with packed, loader.make_stream(shards, **OPTIONS) as padded:
        for _ in range(3):
            ours, theirs = next(packed), next(padded)
            for name in (BOXES, BOXES_VALID, "valid", "images"):
                np.testing.assert_array_equal(ours[name], theirs[name])
            lengths = loader.packing.text_lengths(theirs["texts"])
            flat, ends = ours["texts"]["tokens"].reshape(-1), ours["texts"]["ends"]
            for text, length, end in zip(theirs["texts"]["tokens"], lengths, ends, strict=True):
                np.testing.assert_array_equal(flat[end + 1 - length : end + 1], text[:length])
            assert len(ours["texts"]["tokens"]) < len(lengths)


def test_two_processes_share_the_batch_of_one(tmp_path):
    shards = write(tmp_path / "0.tar")
    with loader.make_stream(shards, **OPTIONS) as stream:
        whole = [next(stream) for _ in range(2)]
    parts = []
    for process in range(2):
        with loader.make_stream(shards, **OPTIONS, process_index=process, process_count=2) as stream:
            parts.append([next(stream) for _ in range(2)])
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        for name in (BOXES, BOXES_VALID, "valid", "images"):
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), batch[name])
