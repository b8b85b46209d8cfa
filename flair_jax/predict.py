"""Scores of images and texts as a table, and a picture of where the texts look.

    python -m flair_jax.predict --checkpoint flair-cc3m-recap --image fox.jpg --image dog.jpg \\
        --text "a red fox in the snow" --text "a dog, asleep" --output sheet.png

A text is one text, commas and all. `--view` names what the picture shows:
    attention   where text-conditioned pooling looks, by the mean of its heads, by `--heads 3`, or by `--heads each`
    patches     the cosine of each projected patch with the text; values: of what the pooling makes of each patch
    regions     of a query decoder, the region that is nearest to each text
    queries     where each query of the decoder looks
Without it, the first of attention, regions and patches that the model has.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.special import expit, softmax

from flair_jax import pretrained, visualize
from flair_jax.inference import Pretrained
from flair_jax.pictures import Picture

VIEWS = (*visualize.VIEWS, "regions", "queries")


def table(model: Pretrained, images: Sequence[Picture], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of every image with every text, by column (B, N).

    Returns:
      For each mode of `Pretrained.score` that the model has its cosines; and `probability`, of the pair by the sigmoid
      of the model's ranking score, or without a bias of the text among these texts, by the softmax.
    """
    columns = model.scores(images, texts)
    logits = np.exp(np.float32(model.params["logit_scale"])) * columns[model.modes[0]]
    if "logit_bias" in model.params:
        probability = expit(logits + np.float32(model.params["logit_bias"]))
    else:
        probability = softmax(logits, axis=1)
    return {**columns, "probability": probability}


def draw(
    model: Pretrained,
    images: Sequence[Picture],
    texts: Sequence[str],
    view: str | None = None,
    heads: str | Sequence[int] = "mean",
    scale: str | float = "shared",
) -> Image.Image:
    """The picture of a view, one of `VIEWS`; None: the first of attention, regions and patches that the model has."""
    if view is None:
        has = model.model.has_pooling, model.model.has_regions
        view = "attention" if has[0] else "regions" if has[1] else "patches"
    if view == "regions":
        if (heads, scale) != ("mean", "shared"):
            raise ValueError("the view 'regions' shows boxes, which have neither heads nor a scale")
        return visualize.regions(model, images, texts)
    if view == "queries":
        return visualize.query_maps(model, images, heads=heads, scale=scale)
    return visualize.heat_maps(model, images, texts, view=view, heads=heads, scale=scale)


def _heads(text: str) -> str | list[int]:
    return text if text in ("mean", "each") else [int(number) for number in text.split(",")]


def _scale(text: str) -> str | float:
    return text if text in ("shared", "own") else float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.predict", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    pretrained.add_options(parser)
    parser.add_argument("--image", action="append", required=True, type=pathlib.Path, help="may come several times")
    parser.add_argument("--text", action="append", required=True, help="may come several times")
    parser.add_argument("--output", type=pathlib.Path, metavar="PNG", help="where to write the picture; absent: none")
    parser.add_argument("--view", choices=VIEWS, help="what the picture shows")
    parser.add_argument(
        "--heads", type=_heads, default="mean", help="of attention: mean, each, a number, or several as 0,3,5,7"
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        default="shared",
        help="of the colours: shared by all maps; own, each map's; or a number, what the last colour stands for: how "
        "many uniform weights of attention, or which cosine",
    )
    options = parser.parse_args(arguments)
    try:
        model = pretrained.load(options.checkpoint, gelu=options.gelu)
        images, texts = model.encoded(options.image, options.text)
        columns = table(model, images, texts)
        pairs = [(path.name, text) for path in options.image for text in options.text]
        widths = [max(len(pair[side]) for pair in [("image", "text"), *pairs]) for side in (0, 1)]
        print(f"{'image':{widths[0]}}  {'text':{widths[1]}}  " + "  ".join(f"{name:>11}" for name in columns))
        rows = zip(*(column.reshape(-1) for column in columns.values()), strict=True)
        for (image, text), row in zip(pairs, rows, strict=True):
            print(f"{image:{widths[0]}}  {text:{widths[1]}}  " + "  ".join(f"{x:11.4f}" for x in row))
        if options.output is not None:
            picture = draw(model, images, texts, options.view, options.heads, options.scale)
            picture.save(options.output.expanduser(), "PNG")
            print(f"picture: {options.output}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
