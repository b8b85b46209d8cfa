"""The random resized crop on the accelerator, for images that come as canvases with boxes."""

import jax
import jax.numpy as jnp

from flair_jax.data.transforms.images import pair


def crop_and_resize(images: jax.Array, boxes: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Crops a box from each image and resizes it, as Pillow crops and then resizes by antialiased bicubic weights.

    Two matrix products per image, so it belongs inside the jitted step; images may be split over devices. Equal to
    Pillow's result to within rounding, for boxes of whole pixels; the borders of others may lie within a pixel.

    Args:
      images: uint8 (B, C, C, 3).
      boxes: float32 (B, 4): top, left, height and width in pixels, within the image. Pixels outside are ignored.
      size: side of the results in pixels, or (height, width); static under jit.

    Returns:
      uint8 (B, H, W, 3).
    """
    height, width = pair(size)
    top, left, box_height, box_width = boxes.T  # (B,) each
    rows = _weights(top, box_height, images.shape[1], height)  # (B, H, C)
    columns = _weights(left, box_width, images.shape[2], width)  # (B, W, C)
    # Along the rows, rounded, then along the columns: Pillow's order. The weights need all bits of float32, of which
    # TPUs would drop most.
    wide = jnp.einsum("bwx,byxc->bywc", columns, images.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    wide = _round(wide)  # (B, C, W, 3)
    return _round(jnp.einsum("bhy,bywc->bhwc", rows, wide, precision=jax.lax.Precision.HIGHEST)).astype(jnp.uint8)


def _weights(start: jax.Array, length: jax.Array, stored: int, resized: int) -> jax.Array:
    """What each stored pixel along one axis gives to each pixel of the result.

    Args:
      start, length: of the boxes, (B,).
      stored, resized: pixels of the canvas and of the result.

    Returns:
      float32 (B, resized, stored), every row with sum 1.
    """
    start, length = start[:, None, None], length[:, None, None]  # (B, 1, 1)
    pixels = jnp.arange(stored, dtype=jnp.float32)  # (C,)
    step = length / resized
    centres = start + (jnp.arange(resized, dtype=jnp.float32)[:, None] + 0.5) * step  # (B, R, 1)
    # When shrinking, the filter grows with the step, so that it covers all pixels.
    weights = _cubic((pixels + 0.5 - centres) / jnp.maximum(step, 1))  # (B, R, C)
    inside = (pixels >= jnp.floor(start)) & (pixels < jnp.ceil(start + length))  # (B, 1, C)
    weights = jnp.where(inside, weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def _cubic(x: jax.Array) -> jax.Array:
    """Keys' cubic kernel with a = -1/2, which is Pillow's and Catmull and Rom's; zero from 2 onwards."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _round(pixels: jax.Array) -> jax.Array:
    """To whole grey levels of 8 bits, halves upwards; the cubic overshoots at edges."""
    return jnp.clip(jnp.floor(pixels + 0.5), 0, 255)
