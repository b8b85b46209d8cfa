"""The fast crops: the reference's boxes, pixels close to its own, and every file judged as the reference judges it."""

import functools
import io
import math
import random
import struct
import zlib

import jax
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from flair_jax.augmentation import crop_and_resize
from flair_jax.data.transforms import fast_images, images
from flair_jax.data.transforms.images import ImageError

SIZE = 64


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with hard-edged squares of many sizes, so that a shift by half a pixel shows."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + seed), np.cos(y / 13), np.sin((x + y) / 23)]
    pixels = 127.5 + 60 * np.stack(waves, -1)  # (H, W, 3)
    rng = np.random.default_rng(seed)
    for _ in range(40):
        top, left, side = rng.integers(height), rng.integers(width), rng.integers(4, max(5, min(width, height) // 4))
        pixels[top : top + side, left : left + side] = rng.integers(20, 235, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((found.astype(float) - expected) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-3))


# The three ways from a file to training pixels


def reference(data: bytes, rng: random.Random, size=SIZE, upright=False, flip=False, **options) -> np.ndarray:
    image = images.to_rgb(images.decode(data, upright))
    return images.random_resized_crop(image, size, rng, images.AugmentationOptions(**options), flip)


def fast(data: bytes, rng: random.Random, size=SIZE, upright=False, flip=False, **options) -> np.ndarray:
    return fast_images.random_resized_crop(data, size, rng, images.AugmentationOptions(**options), upright, flip)


_jitted_resize = jax.jit(crop_and_resize, static_argnames="size")


def device(data: bytes, rng: random.Random, size=SIZE, upright=False, flip=False, **options) -> np.ndarray:
    canvas, box = fast_images.canvas(data, size, rng, images.AugmentationOptions(**options), upright, flip)
    return np.asarray(_jitted_resize(canvas[None], box[None], size=size))[0]


PATHS = pytest.mark.parametrize("path", [reference, fast, device], ids=lambda path: path.__name__)
FAST_PATHS = pytest.mark.parametrize("path", [fast, device], ids=lambda path: path.__name__)


# Pixels

# Source size, and how close the pixels must come. Decoded smaller, a picture differs by the two ways of shrinking.
SOURCES = {(70, 66): 45, (40, 50): 45, (90, 120): 45, (150, 140): 45, (330, 250): 38, (900, 700): 36, (1300, 1200): 36}


@FAST_PATHS
@pytest.mark.parametrize("source", SOURCES)
def test_pixels_are_close_to_the_reference(path, source):
    data = encoded(picture(*source), quality=92)
    for seed in range(5):
        expected = reference(data, random.Random(seed))
        found = path(data, random.Random(seed))
        assert found.shape == (SIZE, SIZE, 3) and found.dtype == np.uint8
        assert psnr(found, expected) > SOURCES[source]
    assert psnr(path(data, random.Random(5)), expected) < 30  # another box


@FAST_PATHS
def test_height_and_width(path):
    data = encoded(picture(150, 90))
    found = path(data, random.Random(1), size=(48, 64))
    assert found.shape == (48, 64, 3) and psnr(found, reference(data, random.Random(1), size=(48, 64))) > 45


@PATHS
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_squashed_and_mirrored(path, form):
    """No crop is drawn, and the mirrored picture is the picture mirrored."""
    image = picture(150, 90)
    data = encoded(image, form)
    found = path(data, random.Random(1), size=(48, 64), squash=True)
    decoded = images.to_rgb(images.decode(data))
    assert psnr(found, np.asarray(images.resize(decoded, 64, 48))) > 45
    if path is reference:
        np.testing.assert_array_equal(found, images.squash(decoded, (48, 64)))
    np.testing.assert_array_equal(found, path(data, random.Random(2), size=(48, 64), squash=True))
    mirrored = path(data, random.Random(1), size=(48, 64), squash=True, flip=True)
    assert psnr(mirrored[:, ::-1], found) > 45
    part = path(data, random.Random(3), scale=(0.3, 0.5), flip=True)
    assert psnr(part[:, ::-1], path(data, random.Random(3), scale=(0.3, 0.5))) > 45


@FAST_PATHS
def test_small_boxes_of_large_pictures(path):
    """The resolution follows the box: a tenth of the picture is decoded whole."""
    data = encoded(picture(400, 300), quality=95)
    options = dict(scale=(0.05, 0.1), ratio=(0.5, 2.0))
    for seed in range(5):
        assert psnr(path(data, random.Random(seed), **options), reference(data, random.Random(seed), **options)) > 40


@FAST_PATHS
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_draws_are_the_references(path, form):
    data = encoded(picture(90, 70), form)
    generators = random.Random(7), random.Random(7)
    reference(data, generators[0])
    path(data, generators[1])
    assert generators[0].getstate() == generators[1].getstate()


@pytest.mark.parametrize(
    ("source", "decoded"),
    [((150, 150), (150, 150)), ((180, 170), (90, 85)), ((333, 401), (84, 101)), ((1200, 700), (150, 88))],
)
def test_jpegs_are_decoded_no_larger_than_needed(monkeypatch, source, decoded):
    shapes = []

    def decode(*args, **options):
        pixels = simplejpeg_decode(*args, **options)
        shapes.append(pixels.shape)
        return pixels

    simplejpeg_decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    fast(encoded(picture(*source)), random.Random(0), scale=(1, 1))
    assert shapes == [(*reversed(decoded), 3)]


def test_without_the_fast_resampler(monkeypatch):
    """There is no wheel of it for every machine."""
    data = encoded(picture(900, 700), quality=92)
    expected = fast(data, random.Random(0))
    monkeypatch.setattr(fast_images, "cykooz_resizer", None)
    found = fast(data, random.Random(0))
    assert found.shape == (SIZE, SIZE, 3) and psnr(found, expected) > 45


@FAST_PATHS
def test_exif_orientation_is_not_applied(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encoded(picture(80, 80), exif=exif, quality=95)
    assert psnr(path(data, random.Random(0)), reference(encoded(picture(80, 80), quality=95), random.Random(0))) > 45


@PATHS
@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_upright_photographs(path, orientation):
    """The same crop as of the photograph that was stored upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(150, 80)
    upright = images.turn_upright(images.decode(encoded(stored, "PNG", exif=exif)))
    expected = reference(encoded(upright, "PNG"), random.Random(0))
    data = encoded(stored, exif=exif, quality=98, subsampling=0)
    assert psnr(path(data, random.Random(0), upright=True), expected) > 35
    assert psnr(path(data, random.Random(0)), expected) < 30


@FAST_PATHS
def test_damaged_files_are_refused_upright_too(path):
    with pytest.raises(ImageError, match="not an image in one of the formats"):
        path(b"no image", random.Random(0), upright=True)


# The canvas


@pytest.mark.parametrize(("size", "side"), [(224, 352), (336, 512), (64, 96), (112, 192), ((64, 224), 352), (1, 32)])
def test_side_of_the_canvas(size, side):
    assert fast_images.canvas_side(size) == side


def test_canvas_holds_the_part():
    image = picture(90, 70)
    for seed in range(5):
        canvas, box = fast_images.canvas(encoded(image, "PNG"), SIZE, random.Random(seed), images.AugmentationOptions())
        assert canvas.shape == (96, 96, 3) and canvas.dtype == np.uint8 and box.dtype == np.float32
        left, top, right, bottom = images.random_box(90, 70, random.Random(seed), (0.9, 1.0), (3 / 4, 4 / 3))
        assert box.tolist() == [0, 0, bottom - top, right - left]
        np.testing.assert_array_equal(canvas[: bottom - top, : right - left], image.crop((left, top, right, bottom)))
        assert not canvas[bottom - top :].any() and not canvas[:, right - left :].any()


def test_box_of_a_picture_that_was_decoded_smaller():
    data = encoded(picture(180, 170))
    _, box = fast_images.canvas(data, SIZE, random.Random(0), images.AugmentationOptions())
    left, top, right, bottom = images.random_box(180, 170, random.Random(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box.tolist() == [top / 2 % 1, left / 2 % 1, (bottom - top) / 2, (right - left) / 2]


def test_part_larger_than_the_canvas_is_resized_before():
    data = encoded(picture(150, 100))
    canvas, box = fast_images.canvas(data, SIZE, random.Random(0), images.AugmentationOptions())
    assert box.tolist() == [0, 0, SIZE, SIZE]
    np.testing.assert_array_equal(canvas[:SIZE, :SIZE], fast(data, random.Random(0)))
    np.testing.assert_array_equal(device(data, random.Random(0)), fast(data, random.Random(0)))


# Files of all kinds


def _bomb(form: str) -> bytes:
    """An image whose header says 20,000 x 20,000."""
    data = bytearray(encoded(Image.new("L", (8, 8)), form))
    if form == "PNG":
        data[16:24] = struct.pack(">II", 20_000, 20_000)  # behind signature, length and name
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def _frames(form: str, **options) -> bytes:
    first, *others = [picture(90, 70, seed) for seed in range(3)]
    return encoded(first, form, save_all=True, append_images=others, **options)


GOOD = {
    "grey JPEG": lambda: encoded(picture(90, 70).convert("L")),
    "CMYK": lambda: encoded(picture(90, 70).convert("CMYK")),
    "progressive": lambda: encoded(picture(90, 70), progressive=True),
    "4:4:4": lambda: encoded(picture(90, 70), subsampling=0),
    "16-bit grey PNG": lambda: encoded(Image.fromarray(np.asarray(picture(90, 70))[..., 0] * np.uint16(257)), "PNG"),
    "16-bit grey TIFF": lambda: encoded(Image.fromarray(np.asarray(picture(90, 70))[..., 0] * np.uint16(257)), "TIFF"),
    "palette": lambda: encoded(picture(90, 70).quantize(64), "PNG"),
    "transparent": lambda: encoded(picture(90, 70).convert("RGBA"), "WEBP", lossless=True),
    "animated GIF": lambda: _frames("GIF"),
    "animated WEBP": lambda: _frames("WEBP", lossless=True),
    "animated PNG": lambda: _frames("PNG"),
    "multi-picture JPEG": lambda: _frames("MPO"),
}
BAD = {
    "JPEG cut in half": (lambda: _half(encoded(picture(90, 70))), "cannot decode the image: .*truncated"),
    "JPEG without its end": (lambda: encoded(picture(90, 70))[:-40], "cannot decode the image: .*truncated"),
    "large JPEG cut in half": (lambda: _half(encoded(picture(900, 700))), "cannot decode the image: .*truncated"),
    "progressive cut in half": (lambda: _half(encoded(picture(90, 70), progressive=True)), "cannot decode the image"),
    "PNG cut in half": (lambda: _half(encoded(picture(90, 70), "PNG")), "cannot decode the image"),
    "bomb as JPEG": (lambda: _bomb("JPEG"), r"20000 x 20000 pixels; at most 89,478,485|exceeds limit"),
    "bomb as PNG": (lambda: _bomb("PNG"), r"20000 x 20000 pixels; at most 89,478,485|exceeds limit"),
    "nothing": (lambda: b"", "not an image in one of the formats JPEG"),
    "a page": (lambda: b"<html>404</html>", "not an image in one of the formats JPEG"),
    "start of a JPEG": (lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF", "image"),
    "EPS": (lambda: encoded(picture(9, 9), "EPS"), "not an image in one of the formats JPEG"),
    "32-bit floats": (lambda: encoded(Image.new("F", (9, 9)), "TIFF"), "32-bit float pixels"),
}


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@PATHS
@pytest.mark.parametrize("name", GOOD)
def test_good_files(path, name):
    """The first frame, in the colours that Pillow gives it; 16 bits by their upper byte."""
    pixels = path(GOOD[name](), random.Random(3))
    image = picture(90, 70)
    image = image.getchannel("R").convert("RGB") if "16-bit" in name else image
    image = image.convert("L").convert("RGB") if "grey JPEG" in name else image
    expected = images.random_resized_crop(image, SIZE, random.Random(3))
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8 and psnr(pixels, expected) > 24


@PATHS
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_files(path, name):
    make, message = BAD[name]
    with pytest.raises(ImageError, match=message):
        path(make(), random.Random(0))


@PATHS
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("source", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_tiny_images(path, form, source):
    pixels = path(encoded(Image.new("RGB", source, (200, 100, 50)), form), random.Random(0))
    assert np.abs(pixels.astype(int) - [200, 100, 50]).max() <= 3


@PATHS
def test_long_images(path):
    pixels = path(encoded(Image.new("RGB", (60_000, 20), (200, 100, 50))), random.Random(0))
    assert np.abs(pixels.astype(int) - [200, 100, 50]).max() <= 3


@FAST_PATHS
def test_bomb_is_refused_before_it_is_decoded(path, monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="at most 89,478,485"):
        path(_bomb("JPEG"), random.Random(0))


@PATHS
def test_data_of_a_wrong_type_is_no_skip(path):
    with pytest.raises(TypeError):
        path("a path.jpg", random.Random(0))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much of what it then reads or refuses
def test_damaged_files_are_judged_as_the_reference_judges_them():
    rng = random.Random(0)
    whole = [encoded(picture(90, 70), progressive=progressive) for progressive in (False, True)]
    verdicts = [0, 0]
    for number in range(400):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.choice((None, rng.randrange(len(data)), None))])
        found = [_verdict(functools.partial(path, data, random.Random(number))) for path in (reference, fast)]
        assert found[0] == found[1], number
        verdicts[found[0] is None] += 1
    assert min(verdicts) > 50


def _verdict(load) -> str | None:
    try:
        load()
    except ImageError as error:
        return str(error)
    return None
