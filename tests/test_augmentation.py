"""The crop and resize on the device: Pillow's pixels to within rounding, on one device and on several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flair_jax import sharding
from flair_jax.augmentation import crop_and_resize

CANVAS = 96


def canvases(count: int, seed: int = 0) -> np.ndarray:
    """Noise, on which any other filter shows."""
    return np.random.default_rng(seed).integers(0, 256, (count, CANVAS, CANVAS, 3), np.uint8)  # (B, C, C, 3)


def pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Along the rows first, which newer versions of Pillow do not always do."""
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], len(pixels)), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


BOXES = np.array(
    [[0, 0, 96, 96], [3, 5, 60, 80], [10, 0, 86, 40], [0, 20, 33, 64], [50, 60, 12, 9], [95, 95, 1, 1], [0, 7, 64, 48]],
    np.float32,
)


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (33, 50), (120, 100)])
def test_whole_boxes_are_pillows(size):
    images = canvases(len(BOXES))
    found = jax.jit(crop_and_resize, static_argnames="size")(images, BOXES, size=size)
    assert found.shape == (len(BOXES), *size, 3) and found.dtype == jnp.uint8
    for image, box, resized in zip(images, BOXES.astype(int), np.asarray(found), strict=True):
        top, left, height, width = box
        expected = pillow(image[top : top + height, left : left + width], size)
        difference = np.abs(resized.astype(int) - expected)
        assert difference.max() <= 2 and (difference > 0).mean() < 0.02, box  # ties, rounded twice


def test_borders_within_a_pixel():
    """Whole pixels that the box touches take part, by their distance from the results' centres."""
    y, x = np.mgrid[:CANVAS, :CANVAS]
    image = np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8)  # (C, C, 3)
    top, left, height, width = 0.5, 0.25, 40.25, 33.5
    found = crop_and_resize(image[None], np.array([[top, left, height, width]], np.float32), 32)[0]
    part = Image.fromarray(np.ascontiguousarray(image[:41, :34]))
    expected = part.resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_box_of_the_results_size_is_left_as_it_is():
    images = canvases(1)
    found = crop_and_resize(images, np.array([[7, 9, 48, 64]], np.float32), (48, 64))
    np.testing.assert_array_equal(found, images[:, 7:55, 9:73])


@pytest.mark.parametrize("side", [20, 80])
def test_nothing_shines_in_from_outside_the_box(side):
    images = np.full((1, CANVAS, CANVAS, 3), 255, np.uint8)
    images[:, 8 : 8 + side, 4 : 4 + side] = 0
    assert not np.asarray(crop_and_resize(images, np.array([[8, 4, side, side]], np.float32), 40)).any()


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (8, 1), (2, 4)])
def test_on_devices(data, fsdp):
    """Every device works on its own images: the result is as much split as they are, and nothing travels."""
    mesh = sharding.create_mesh(data, fsdp, jax.devices()[: data * fsdp])
    images = canvases(16)
    boxes = np.random.default_rng(0).integers(1, 48, (16, 4)).astype(np.float32)
    batch = sharding.global_batch(mesh, {"images": images, "boxes": boxes})
    with jax.set_mesh(mesh):
        compiled = jax.jit(crop_and_resize, static_argnames="size").lower(**batch, size=32).compile()
    found = compiled(**batch)
    assert found.sharding.is_equivalent_to(sharding.batch_sharding(mesh), found.ndim)
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    alone = np.asarray(crop_and_resize(images, boxes, 32)).astype(int)
    assert np.abs(np.asarray(found) - alone).max() <= 1
