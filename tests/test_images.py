"""Images: evaluation crops equal to the reference's to the bit, training crops by its law, all modes, damaged files."""

import io
import random
import struct
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from PIL import Image

from flair_jax.data.transforms import images
from flair_jax.data.transforms.images import ImageError

GOLDEN = load_golden("preprocess.npz")
NAMES = sorted(name.removesuffix("_input") for name in GOLDEN if name.endswith("_input"))


def picture(width: int = 120, height: int = 80, seed: int = 0) -> Image.Image:
    """A smooth colour picture, so that JPEG and 8 colours of a palette do it little harm."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(6 * x + seed), np.cos(5 * y), np.sin(4 * (x + y))]
    return Image.fromarray(np.stack([127.5 + 100 * wave for wave in waves], -1).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def by_rows_first(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


# Evaluation


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    size = GOLDEN[f"{name}_output"].shape[-1]
    pixels = images.evaluation_crop(Image.fromarray(GOLDEN[f"{name}_input"]), size)
    assert pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)
    normalised = images.Preprocessing()(pixels)
    assert normalised.dtype == np.float32
    np.testing.assert_array_equal(np.moveaxis(normalised, -1, 0), GOLDEN[f"{name}_output"])


@pytest.mark.golden
def test_golden_holds_an_image_with_transparency():
    """For which conversion before and after the resize differ; the golden one is converted after it."""
    name = next(name for name in NAMES if "rgba" in name)
    image, expected = Image.fromarray(GOLDEN[f"{name}_input"]), GOLDEN[f"{name}_output"]
    assert image.mode == "RGBA"
    converted_first = images.Preprocessing()(images.evaluation_crop(images.to_rgb(image), expected.shape[-1]))
    assert np.abs(np.moveaxis(converted_first, -1, 0) - expected).max() > 0.1


def test_crop_is_centred_with_ties_to_even():
    """torchvision rounds the offset (n - size) / 2 half to even."""
    row = np.repeat(np.arange(11, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)  # (8, 11, 3)
    assert images.evaluation_crop(Image.fromarray(row), 8)[0, :, 0].tolist() == list(range(2, 10))
    row = row[:, :9]
    assert images.evaluation_crop(Image.fromarray(row), 8)[0, :, 0].tolist() == list(range(0, 8))


@pytest.mark.parametrize(
    ("source", "size", "covering"),
    [
        ((100, 100), (32, 64), (64, 64)),
        ((100, 100), (64, 32), (64, 64)),
        ((200, 50), (32, 64), (128, 32)),
        ((50, 200), (32, 64), (64, 256)),
        ((100, 50), (32, 64), (64, 32)),
        ((33, 77), (40, 30), (30, 70)),
        ((77, 33), (40, 30), (93, 40)),
    ],
)
def test_pair_of_sizes(source, size, covering):
    """The image just covers (height, width), and its centre is cut out."""
    image = picture(*source)
    resized = np.asarray(by_rows_first(image, *covering))
    top, left = round((covering[1] - size[0]) / 2), round((covering[0] - size[1]) / 2)
    expected = resized[top : top + size[0], left : left + size[1]]
    np.testing.assert_array_equal(images.evaluation_crop(image, size), expected)


@pytest.mark.parametrize("source", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_tiny_images(source):
    assert images.evaluation_crop(picture(*source), 24).shape == (24, 24, 3)
    assert images.random_resized_crop(picture(*source), 24, random.Random(0)).shape == (24, 24, 3)


def test_too_long_to_resize():
    with pytest.raises(ImageError, match=r"224 x 2240000 pixels; at most 89,478,485"):
        images.evaluation_crop(picture(1, 10_000), 224)


# Training


def test_random_crop_is_cropped_first_and_resized_then():
    image = picture(90, 70)
    for seed in range(20):
        box = images.random_box(90, 70, random.Random(seed), (0.9, 1.0), (3 / 4, 4 / 3))
        expected = np.asarray(by_rows_first(image.crop(box), 48, 32))
        np.testing.assert_array_equal(images.random_resized_crop(image, (32, 48), random.Random(seed)), expected)


def test_pixels_outside_the_crop_are_ignored():
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (0, 0, 20, 40))
    options = images.AugmentationOptions(scale=(0.1, 0.2), ratio=(1, 1))
    boxes = {seed: options.draw_box(40, 40, random.Random(seed)) for seed in range(1000)}
    at_the_edge = [seed for seed, (left, *_) in boxes.items() if left == 20]
    assert at_the_edge
    for seed in at_the_edge:
        assert images.random_resized_crop(image, 16, random.Random(seed), options).max() == 0


# Mean and standard deviation of left, top, width, height over 200,000 draws of RandomResizedCrop.get_params,
# torchvision 0.28.0.
TORCHVISION_BOXES = [
    ((340, 256), (0.9, 1.0), [5.496, 1.411, 328.977, 253.172], [6.677, 2.213, 9.901, 3.372]),
    ((256, 256), (0.9, 1.0), [3.771, 3.770, 248.470, 248.469], [4.506, 4.491, 6.533, 6.523]),
    ((500, 375), (0.08, 1.0), [109.145, 52.266, 281.684, 270.090], [80.361, 50.586, 86.042, 70.113]),
]


@pytest.mark.parametrize(("source", "scale", "means", "deviations"), TORCHVISION_BOXES)
def test_distribution_of_the_boxes(source, scale, means, deviations):
    rng = random.Random(0)
    draws = 40_000
    boxes = np.array([images.random_box(*source, rng, scale, (3 / 4, 4 / 3)) for _ in range(draws)])
    assert boxes.min() >= 0 and (boxes[:, 2:] <= source).all()
    boxes[:, 2:] -= boxes[:, :2]
    standard_error = np.array(deviations) * np.sqrt(1 / draws + 1 / 200_000)
    assert (np.abs(boxes.mean(0) - means) < 5 * standard_error).all()
    np.testing.assert_allclose(boxes.std(0), deviations, rtol=0.03)


@pytest.mark.parametrize(
    ("source", "box"), [((400, 60), (160, 0, 240, 60)), ((60, 400), (0, 160, 60, 240)), ((61, 61), None)]
)
def test_fallback_is_the_centre(source, box):
    """An image longer than 4:3 holds no part of 90 % of its area."""
    found = images.random_box(*source, random.Random(3), (0.9, 1.0), (3 / 4, 4 / 3))
    assert found == box if box else found[2] - found[0] >= 50


def test_fallback_keeps_the_whole_image_within_the_ratio():
    assert images.random_box(40, 40, random.Random(0), (2.0, 3.0), (3 / 4, 4 / 3)) == (0, 0, 40, 40)


def test_same_seed_same_crop():
    image = picture(90, 70)
    seeds = [*range(10), *range(10)]
    crops = [images.random_resized_crop(image, 32, random.Random(seed)).tobytes() for seed in seeds]
    assert crops[:10] == crops[10:] and len(set(crops)) > 5


@pytest.mark.parametrize(
    ("mode", "checksum"), [("RGB", 375815952), ("RGBA", 2141170685), ("L", 2038047139), ("LA", 2440654841)]
)
def test_pixels_do_not_depend_on_the_version_of_pillow(mode, checksum):
    """Of a tall picture with hard edges, by Pillow 11.3 and 12.3; Pillow 13 resizes it along the columns first."""
    values = (np.random.default_rng(0).random((300, 200, 4)) > 0.5).astype(np.uint8) * 255
    image = Image.fromarray(np.ascontiguousarray(values[..., : {"LA": 2, "RGBA": 4}.get(mode, 3)]))
    resized = images.resize(image.convert(mode) if mode == "L" else image, 224, 224)
    assert resized.mode == mode and zlib.crc32(resized.tobytes()) == checksum


# Normalisation


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("openai", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_normalize_numpy_and_jax(name, mean, std):
    normalize = images.Preprocessing(mean_std=name)
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    assert normalize(pixels).dtype == np.float32
    np.testing.assert_allclose(normalize(pixels), expected, atol=1e-6)
    on_device = jax.jit(normalize)(jnp.asarray(pixels))
    assert isinstance(on_device, jnp.ndarray) and on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, expected, atol=1e-6)
    np.testing.assert_array_equal(normalize(expected.astype(np.float32)), expected.astype(np.float32))  # done already


@pytest.mark.parametrize("source", [(90, 70), (70, 90), (24, 36)])
def test_squash_is_torchvision_s_resize_to_both_sides(source):
    """Which hands both sides to Pillow; the proportions are the model's and nothing is cut off."""
    image = picture(*source)
    found = images.Preprocessing(resize="squash").fit(image, (24, 36))
    np.testing.assert_array_equal(found, np.asarray(images.resize(image, 36, 24)))
    np.testing.assert_allclose(
        found.astype(int), np.asarray(image.resize((36, 24), Image.Resampling.BICUBIC)).astype(int), atol=1
    )
    halves = Image.new("RGB", source, "red")
    halves.paste((0, 0, 255), (source[0] // 2, 0, *source))
    columns = images.squash(halves, 24)[:, :, 0]
    assert (columns[:, :10] > 200).all() and (columns[:, 14:] < 55).all()


@pytest.mark.parametrize("option", ["resize", "mean_std"])
def test_an_unknown_preprocessing_is_refused_by_name(option):
    with pytest.raises(ValueError, match=rf"config\.model\.preprocess\.{option} is 'other'; expected one of"):
        images.Preprocessing(**{option: "other"})


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (1.0, 0.9), (-1.0, 1.0), (0.5,)])
@pytest.mark.parametrize("option", ["scale", "ratio"])
def test_bounds_that_no_crop_can_have_are_refused_by_name(option, bounds):
    with pytest.raises(ValueError, match=rf"augmentation\.{option} is \({bounds[0]}.*; expected a smallest"):
        images.AugmentationOptions(**{option: bounds})


# Modes

MODES = {
    "L": dict(tolerance=0, form="PNG"),
    "1": dict(tolerance=0, form="PNG"),
    "LA": dict(tolerance=0, form="PNG"),
    "RGBA": dict(tolerance=0, form="PNG"),
    "P": dict(tolerance=0, form="PNG"),
    "CMYK": dict(tolerance=12, form="JPEG"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    """A file of every mode becomes the colours that Pillow gives it, of the right shape from both crops."""
    stored = picture().convert(mode)
    if mode in ("LA", "RGBA"):
        stored.putalpha(Image.linear_gradient("L").resize(stored.size))
    image = images.decode(encoded(stored, MODES[mode]["form"]))
    assert image.mode == mode
    rgb = images.to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (120, 80)
    difference = np.asarray(rgb).astype(int) - np.asarray(stored.convert("RGB"))
    assert np.abs(difference).max() <= MODES[mode]["tolerance"]
    assert np.asarray(rgb).std() > 20
    for pixels in (images.evaluation_crop(image, 32), images.random_resized_crop(image, 32, random.Random(0))):
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and pixels.std() > 20


def test_transparency_is_dropped_not_blended():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert np.asarray(images.to_rgb(image)).reshape(-1, 3).tolist() == [[200, 100, 50]] * 16


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 80, 10))])
def test_palette_with_transparency_without_a_warning(transparency):
    data = encoded(picture().quantize(8), "PNG", transparency=transparency)
    image = images.decode(data)
    assert image.mode == "P" and image.info["transparency"] == transparency
    opaque = image.copy()
    del opaque.info["transparency"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = images.to_rgb(image)
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(opaque.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_byte(form):
    values = np.array([[0, 255, 256, 511], [32768, 40000, 65279, 65535]], np.uint16)
    image = images.decode(encoded(Image.fromarray(values), form))
    expected = np.array([[0, 0, 1, 1], [128, 156, 254, 255]])[..., None].repeat(3, -1)
    np.testing.assert_array_equal(np.asarray(images.to_rgb(image)), expected)
    crop = images.evaluation_crop(images.decode(encoded(Image.fromarray(values), form)), 8)
    assert crop.shape == (8, 8, 3) and crop[0].max() < 10 and crop[-1, -1].min() > 250


def test_32_bit_integers_are_read_as_16_bit_values():
    values = np.array([[-5, 256, 65535, 10**6]], np.int32)
    assert np.asarray(images.to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize("mode", ["F", "La"])
def test_modes_without_a_rule_are_refused(mode):
    with pytest.raises(ImageError, match="RGB"):
        images.to_rgb(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_upright_photographs(format, orientation):
    """What the camera saw, however it was held; Pillow's writers store the tag and leave the pixels as they are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture()  # 120 x 80
    data = encoded(stored, format, exif=exif, **({} if format in ("PNG", "TIFF") else {"quality": 95}))
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}  # quarters, against the clock
    seen = np.rot90(np.asarray(stored), turns[orientation])
    if orientation in (2, 4, 5, 7):
        seen = seen[:, ::-1]
    image = images.decode(data, upright=True)
    assert images.orientation(image) == 1
    assert image.size == ((120, 80) if orientation < 5 else (80, 120))
    assert np.abs(np.asarray(images.to_rgb(image)).astype(int) - seen).max() < 25
    assert images.turn_upright(image) is image
    if format != "TIFF":  # which Pillow turns in any case
        assert images.decode(data).size == (120, 80)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\xff", b"rubbish" * 20])
def test_damaged_exif_turns_nothing(exif):
    image = images.decode(encoded(picture(), "JPEG", exif=exif), upright=True)
    assert image.size == (120, 80)


def test_an_unknown_orientation_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert images.decode(encoded(picture(), "JPEG", exif=exif), upright=True).size == (120, 80)


def test_a_size_is_a_side_or_a_pair():
    assert images.pair(224) == (224, 224) and images.pair((224, 336)) == (224, 336)
    assert images.pair([64, 96]) == (64, 96)  # as JSON gives it back
    assert images.pair(np.int64(7)) == (7, 7)
    for size in (0, -1, 2.0, "22", (1, 2, 3), (1,), None, (4, 0), (4, 2.5)):
        with pytest.raises(ValueError, match="an image size is a positive integer or a pair"):
            images.pair(size)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = images.decode(encoded(picture(), "JPEG", exif=exif, quality=95))
    assert image.size == (120, 80) and image.getexif()[0x0112] == 6
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).max() < 12


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (np.asarray(images.to_rgb(images.decode(data))) == [255, 0, 0]).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM"])
def test_formats(form):
    image = images.to_rgb(images.decode(encoded(picture(), form)))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).mean() < 3


# Damage


@pytest.mark.parametrize("data", [b"", b"no image at all", b"<html>404</html>", b"\xff\xd8\xff"])
def test_no_image(data):
    with pytest.raises(ImageError, match=r"not an image in one of the formats JPEG, PNG"):
        images.decode(data)


def test_format_that_runs_another_program_is_refused():
    with pytest.raises(ImageError, match="not an image in one of"):
        images.decode(encoded(picture(), "EPS"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_cut_short(form, share):
    data = encoded(picture(300, 200), form)
    with pytest.raises(ImageError, match="image"):
        images.decode(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much of what it then reads or refuses
def test_random_damage_is_always_an_image_error():
    rng = random.Random(0)
    refused = 0
    for form in images.FORMATS:
        data = encoded(picture(), form)
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
            try:
                images.decode(bytes(damaged))
            except ImageError:
                refused += 1
    assert refused > 100


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("source", [(9460, 9460), (20_000, 20_000)])
def test_decompression_bomb(source):
    data = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", *source)  # in the header, behind signature, length and name
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageError, match=r"at most 89,478,485|exceeds limit"):
        images.decode(bytes(data))


def test_data_of_a_wrong_type_is_no_skip():
    with pytest.raises(TypeError):
        images.decode("a path.jpg")
