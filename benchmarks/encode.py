"""Images and texts through the towers and pairs through the pooling, as evaluation does it, beside the PyTorch twin."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command, inputs, torch_twin
from benchmarks.sides import beside_twin, median


def measure(
    config: Mapping[str, Any],
    *,
    kinds: Sequence[str] = ("images", "texts"),
    beside: Sequence[str] = (),
    images: int = 64,
    texts: int = 256,
    image_batch: int = 16,
    text_batch: int = 64,
    turns: int = 5,
) -> dict[str, Any]:
    """Figures of the inference paths, from arrays on the host to features or scores on the host.

    Args:
      config: of a run; `model` is looked at. With `data.shards` texts are captions drawn from them, else made up.
      kinds: what to measure: "images" and "texts" encode, "pairs" scores every image against every text by
        text-conditioned pooling, from features that lie on the device. "original" is the same, and the twin does it as
        the original's evaluation: one image at a time, whose features, pooled for all texts, are compared on the host.
      beside: sides of the twin to run as well, "eager" and "compiled", in turns with ours. Texts are padded to the
        context there, as the original encodes them.
      images, texts: encoded, or scored against each other, in a turn.
      image_batch, text_batch: images and texts to encode at a time on either side.
      turns: of each; medians count.

    Returns:
      Of each kind `…_per_second`, and for each side of the twin `{side}_…_per_second` and `ratio_…_{side}`, its time
      over that of ours in the turns between.
    """
    sizes = dict(images=images, texts=texts, image_batch=image_batch, text_batch=text_batch)
    figures = {"dtype": config["model"]["dtype"], **sizes}
    count = {"images": images, "texts": texts, "pairs": images * texts, "original": images * texts}
    for kind in kinds:
        all_ours, pairs = beside_twin(ours, twin, (config, kind, *sizes.values()), beside, 1, turns)
        figures[f"{kind}_per_second"] = count[kind] / median(all_ours, "seconds")
        for side, (beside_it, theirs) in pairs.items():
            seconds = median(theirs, "seconds")
            figures[f"{side}_{kind}_per_second"] = count[kind] / seconds
            figures[f"ratio_{kind}_{side}"] = seconds / median(beside_it, "seconds")
    return figures


def host_inputs(config: Mapping[str, Any], images: int, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, uint8 (B, H, W, 3), and different texts, int32 (N, T), padded to the context."""
    from flair_jax.data import loader

    rng = np.random.default_rng(0)
    size, context = config["model"]["vision"]["image_size"], config["model"]["text"]["context_length"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8)
    if not config["data"]["shards"]:
        return pixels, inputs.captions(rng, texts, context, config["model"]["text"]["vocab_size"])
    count = config["data"]["captions"]["count"]
    with loader.make_stream(
        config["data"]["shards"],
        batch_size=-(-2 * texts // count),  # some captions are drawn twice
        image_size=(height, width),
        context_length=context,
        seed=0,
        captions=config["data"]["captions"],
        pixels="fast",
    ) as stream:
        tokens = next(stream)["texts"]["tokens"]
    _, first = np.unique(tokens, axis=0, return_index=True)
    if len(first) < texts:
        raise ValueError(f"{config['data']['shards']}: {len(first)} different texts where {texts} are asked for")
    return pixels, tokens[np.sort(first)[:texts]]


@contextlib.contextmanager
def ours(
    config: Mapping[str, Any], kind: str, images: int, texts: int, image_batch: int, text_batch: int
) -> Iterator[Callable]:
    """Turns of the evaluators' encoder."""
    import jax
    import jax.numpy as jnp

    from flair_jax import models, state
    from flair_jax.evaluators.features import Encoder

    model = models.create(config["model"])
    encoder = Encoder(model, model.preprocessing, image_batch=image_batch, text_batch=text_batch)
    params = encoder.place(jax.jit(lambda: state.init_params(model, 0))())
    pixels, tokens = host_inputs(config, images, texts)

    def encode_images() -> Any:
        return [features for _, features in encoder.images(params, pixels)]

    def encode_texts() -> Any:
        return encoder.texts(params, tokens)

    if kind in ("pairs", "original"):
        image_features, text_features = jax.tree.map(lambda *x: jnp.concatenate(x), *encode_images()), encode_texts()
        run = lambda: encoder.apply("score", params, image_features, text_features)  # noqa: E731
    else:
        run = {"images": encode_images, "texts": encode_texts}[kind]

    def turn(count: int) -> Mapping[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            jax.device_get(run())
        return {"seconds": (time.perf_counter() - began) / count}

    yield turn


@contextlib.contextmanager
def twin(
    config: Mapping[str, Any], kind: str, images: int, texts: int, image_batch: int, text_batch: int, compiled: bool
) -> Iterator[Callable]:
    """Turns of the twin on the same arrays."""
    arrays = host_inputs(config, images, texts)
    with torch_twin.encoding(config, kind, *arrays, image_batch, text_batch, compiled) as turn:
        yield turn


def main(arguments: Sequence[str] | None = None, name: str = "encode") -> None:
    kinds, images = (("pairs", "original"), 16) if name == "score" else (("images", "texts"), 64)
    parser = command.parser(name, "Images and texts encoded, or text-conditioned scores, per second.")
    command.add_model(parser)
    sizes = dict(
        images=(images, "in a turn"),
        texts=(256, "in a turn"),
        image_batch=(16, "encoded at a time"),
        text_batch=(64, "encoded at a time"),
    )
    command.add_sizes(parser, **sizes)
    parsed = parser.parse_args(arguments)
    options = command.pick(parsed, (*sizes, "turns"))
    beside = command.BESIDE[parsed.beside]
    command.report(measure(command.config(parsed), kinds=kinds, beside=beside, **options), parsed.json)


if __name__ == "__main__":
    main()
