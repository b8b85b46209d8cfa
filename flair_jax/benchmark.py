"""Figures of speed and memory, each beside what it is to beat and in the same run: `python -m flair_jax.benchmark X`.

* `tokenizer`: captions per second, beside open_clip's Python tokenizer where open_clip is installed.
* `loss`: temporary memory of FLAIR's loss and its gradient in chunks, beside the same all at once.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np


def tokenizer(captions: Sequence[str], batch_size: int = 8, repeats: int = 5) -> dict[str, float]:
    """Captions per second of `data.tokenizer`, and of open_clip's tokenizer where it is installed.

    Both take the same captions in batches of the same size, in turns, and the median of the turns counts. A first
    turn of each is not counted: it builds the vocabularies and fills the word caches that both have.

    Args:
      captions: the texts.
      batch_size: captions in one call; 8 are those of one image in the CC3M recipe.
      repeats: counted turns.

    Returns:
      `captions`, `captions_per_second`, and with open_clip also `open_clip_captions_per_second`, `ratio` (ours over
      theirs) and `different_rows` (captions whose ids are not the same).
    """
    from data.tokenizer import Tokenizer

    contenders = {"captions_per_second": Tokenizer()}
    if reference := _open_clip_tokenizer():
        contenders["open_clip_captions_per_second"] = lambda texts: reference(texts).numpy()
    rows = {name: _tokenize(call, captions, batch_size) for name, call in contenders.items()}  # not counted
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            _tokenize(call, captions, batch_size)
            seconds[name].append(time.perf_counter() - start)
    figures = {"captions": len(captions)}
    figures |= {name: len(captions) / statistics.median(times) for name, times in seconds.items()}
    if reference:
        ours, theirs = rows.values()
        figures["ratio"] = figures["captions_per_second"] / figures["open_clip_captions_per_second"]
        figures["different_rows"] = int((ours != theirs).any(axis=1).sum())
    return figures


def made_up_captions(count: int, seed: int = 0) -> list[str]:
    """Captions in the style of the recipe: one to three sentences of common and of rarer, made-up words."""
    rng = random.Random(seed)
    frequent = ["a", "the", "of", "in", "and", "with", "man", "woman", "red", "white", "dog", "standing", "it's"]
    syllables = ["ba", "cor", "den", "fi", "gal", "hou", "in", "ket", "lo", "mar", "ness", "or", "pi", "ran", "tion"]
    rare = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(5000)]

    def sentence() -> str:
        words = (rng.choice(rare if rng.random() < 0.6 else frequent) for _ in range(rng.randint(7, 14)))
        return " ".join(words).capitalize()

    return [". ".join(sentence() for _ in range(rng.randint(1, 3))) for _ in range(count)]


def _tokenize(call: Callable, captions: Sequence[str], batch_size: int) -> np.ndarray:
    return np.concatenate([call(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)])


def _open_clip_tokenizer() -> Callable | None:
    """open_clip's `SimpleTokenizer`, or None where open_clip is not installed.

    Its file is loaded by path: importing the package would need torchvision, which the tokenizer does not.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    path = pathlib.Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def loss(
    images: int = 2048, captions: int = 8, block_size: int = 128, chunk_size: int = 8, devices: int = 1
) -> dict[str, float]:
    """Temporary memory of `sigmoid.flair_loss` and its gradient, from the features of FLAIR B/16 on, in float32.

    The compiler's own account of a program that is never run, so sizes that no device here could hold are fine. It is
    made for the CPU, over several fake devices if asked; JAX_PLATFORMS set to another platform asks that compiler.
    Neither the towers nor inputs and outputs of the loss are counted.

    Args:
      images: N, of the global batch.
      captions: K, captions an image.
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
    dense = figures["temp_bytes_dense"] = _loss_temporary_bytes(mesh, images, captions, block_size, None)
    chunked = figures["temp_bytes_chunked"] = _loss_temporary_bytes(mesh, images, captions, block_size, chunk_size)
    return {**figures, "ratio": dense / chunked}


def _loss_temporary_bytes(mesh, images: int, captions: int, block_size: int, chunk_size: int | None) -> int:
    import jax
    import jax.numpy as jnp

    from configs import variants
    from flair_jax import sharding
    from flair_jax.losses import sigmoid
    from flair_jax.models.pooling import TextConditionedPooling

    config = variants.flair("B/16")
    width, heads = config.embed_dim, config.pooling.heads
    keys = (config.vision.image_size // config.vision.patch_size) ** 2 + 1  # L + 1, with the zero row
    pooling = TextConditionedPooling(width, heads)

    def split(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(mesh))

    def whole(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    def value(image, text, params, logit_scale, logit_bias, rng):
        return sigmoid.flair_loss(
            image,
            text,
            lambda params, *args: pooling.apply({"params": params}, *args, method="attend"),
            params,
            logit_scale,
            logit_bias,
            rng=rng,
            block_size=block_size,
            chunk_size=chunk_size,
        )[0]

    cells = split(images, keys, heads, width // heads)
    image = sigmoid.ImageSide(split(images, width), cells, cells)
    text = sigmoid.TextSide(split(images * captions, width), split(images * captions, heads, width // heads))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(pooling.init, rng, jnp.zeros((1, width)), jnp.zeros((1, keys - 1, width)))["params"]
    params, scalar, rng = jax.tree.map(whole, (params, jax.ShapeDtypeStruct((), jnp.float32), rng))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(value, range(5)))
        compiled = step.lower(image, text, params, scalar, scalar, rng).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _run_tokenizer(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.captions:
        captions = arguments.captions.read_text(encoding="utf-8").splitlines()
    else:
        captions = made_up_captions(20_000)
    figures = tokenizer(captions)
    if "ratio" not in figures:
        print("open_clip is not installed, so there is nothing to compare with: pip install --no-deps open_clip_torch")
    return figures


def _run_loss(arguments: argparse.Namespace) -> dict[str, float]:
    names = ("images", "captions", "block_size", "chunk_size", "devices")
    return loss(**{name: getattr(arguments, name) for name in names})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: prints the figures of one benchmark, and writes them as flat JSON with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m flair_jax.benchmark", description="Figures of flair_jax.")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")

    command = benchmarks.add_parser("tokenizer", parents=[common], help="captions tokenised per second")
    command.add_argument("--captions", type=pathlib.Path, metavar="FILE", help="one caption a line; made up if absent")
    command.set_defaults(run=_run_tokenizer)

    command = benchmarks.add_parser("loss", parents=[common], help="temporary memory of the loss and its gradient")
    command.add_argument("--images", type=int, default=2048, metavar="N", help="global batch (%(default)s)")
    command.add_argument("--captions", type=int, default=8, metavar="K", help="captions an image (%(default)s)")
    command.add_argument("--block-size", type=int, default=128, metavar="B", help="images a block (%(default)s)")
    command.add_argument("--chunk-size", type=int, default=8, metavar="C", help="images at a time (%(default)s)")
    command.add_argument("--devices", type=int, default=1, metavar="W", help="that share the batch (%(default)s)")
    command.set_defaults(run=_run_loss)

    parsed = parser.parse_args(arguments)
    figures = parsed.run(parsed)
    for name, value in figures.items():
        print(f"{name:32} {value:,.2f}" if isinstance(value, float) else f"{name:32} {value:,}")
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
