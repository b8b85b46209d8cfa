"""Temporary memory of FLAIR's loss and its gradient in chunks, beside the same all at once."""

import functools
import os
from collections.abc import Sequence

from benchmarks import command


def measure(
    images: int = 2048, captions: int = 8, block_size: int = 128, chunk_size: int = 8, devices: int = 1
) -> dict[str, float]:
    """Temporary memory of FLAIR's objectives and their gradient, from the features of FLAIR B/16 on, in float32.

    The compiler's own account of a program that is never run, so sizes that no device here could hold are fine. It is
    made for the CPU, over several fake devices if asked; JAX_PLATFORMS set to another platform asks that compiler.
    Neither the towers nor inputs and outputs of the loss are counted.

    Args:
      images: N, of the global batch.
      captions: K, captions per image.
      block_size: B, images within which negatives are drawn.
      chunk_size: images that the chunked loss works on at a time on a device.
      devices: over which the batch is split.

    Returns:
      The arguments, `temp_bytes_dense` and `temp_bytes_chunked`, both of one device, and `ratio` (dense over chunked).

    Raises:
      ValueError: the batch cannot be split as asked, or jax has fewer devices (only before it starts is their number
        free to choose).
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if devices > 1:
        fake = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake}"
    import jax

    from flair_jax import sharding

    if len(jax.devices()) < devices:
        raise ValueError(f"{devices} devices are asked for and jax has {len(jax.devices())}: run this on its own")
    if images % devices:
        raise ValueError(f"{devices} devices do not divide the batch of {images} images")
    figures = dict(images=images, captions=captions, block_size=block_size, chunk_size=chunk_size, devices=devices)
    mesh = sharding.create_mesh(devices=jax.devices()[:devices])
    dense = figures["temp_bytes_dense"] = _temporary_bytes(mesh, images, captions, block_size, None)
    chunked = figures["temp_bytes_chunked"] = _temporary_bytes(mesh, images, captions, block_size, chunk_size)
    return {**figures, "ratio": dense / chunked}


def _temporary_bytes(mesh, images: int, captions: int, block_size: int, chunk_size: int | None) -> int:
    import jax
    import jax.numpy as jnp

    from flair_jax import models, objectives, sharding
    from flair_jax.configs import variants
    from flair_jax.models.text import Text

    model = models.create(variants.flair("B/16").to_dict())
    losses = variants.flair_objectives().to_dict()
    losses["text_conditioned"] |= {"block_size": block_size, "chunk_size": chunk_size}
    losses["sigmoid"]["chunk_size"] = chunk_size

    def features(rng, pixels, tokens):
        variables = model.init(rng, pixels[:1], tokens[:1])
        found = model.apply(variables, pixels, Text.padded(tokens), method="features")
        # What the loss does not read is none of its arguments.
        return found.replace(image=found.image.replace(local=None), text=found.text.replace(mask=None))

    def placed(place, tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    split = functools.partial(placed, sharding.batch_sharding(mesh))  # what each image or text has
    whole = functools.partial(placed, sharding.replicated(mesh))

    def value(given, rng):
        return objectives.weighted_sum(losses, given, {}, rng)[0]

    rng = jax.eval_shape(lambda: jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((images, *model.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((images * captions, model.context_length), jnp.int32)
    given = jax.eval_shape(features, rng, pixels, tokens)
    pooling = split(given.pooling).replace(params=whole(given.pooling.params))
    given = whole(given).replace(image=split(given.image), text=split(given.text), pooling=pooling)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(value)).lower(given, whole(rng)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("loss", "Temporary memory of the loss and its gradient, all at once and in chunks.")
    sizes = dict(
        images=(2048, "of the global batch"),
        captions=(8, "per image"),
        block_size=(128, "images per block"),
        chunk_size=(8, "images at a time"),
        devices=(1, "that share the batch"),
    )
    command.add_sizes(parser, **sizes)
    parsed = parser.parse_args(arguments)
    command.report(measure(**command.pick(parsed, tuple(sizes))), parsed.json)


if __name__ == "__main__":
    main()
