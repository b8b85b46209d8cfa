"""Scores of images and texts as a table, and a picture of where the texts look.

    python -m flair_jax.predict --checkpoint flair-cc3m-recap --image fox.jpg --image dog.jpg \
        --text "a red fox in the snow" --text "a dog, asleep" --output sheet.png

A text is one text, commas and all. The picture shows, for a model with text-conditioned pooling, its attention; for one
with a query decoder the region that is nearest to each text; other models have none.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flair_jax import attention_maps, boxes, pretrained
from flair_jax.convert import names
from flair_jax.data.transforms import images as image_rules
from flair_jax.figures import regions
from flair_jax.models.layers import normalize


def read_images(paths: Sequence[pathlib.Path]) -> list[Image.Image]:
    """Pictures of files, upright and RGB.

    Raises:
      ValueError: a file is no picture, naming it. OSError: it cannot be read.
    """
    found = []
    for path in paths:
        try:
            found.append(image_rules.to_rgb(image_rules.decode(path.read_bytes(), upright=True)))
        except image_rules.ImageError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


def table(model: pretrained.Pretrained, images: Sequence[Image.Image], texts: Sequence[str]) -> list[dict[str, float]]:
    """Scores of every image with every text, image by image.

    Returns:
      For each pair `cosine`, of the pooled features; with text-conditioned pooling `conditioned`, the cosine with the
      image pooled for the text; and `probability`, of the pair by the model's sigmoid, or without a bias of the text
      among these texts.
    """
    pixels, tokens = model.preprocess(images), model.tokenize(texts)
    scale = np.exp(np.float32(model.params["logit_scale"]))
    pooled = np.asarray(model.get_logits_as_clip(pixels, tokens)) / scale
    logits = np.asarray(model.get_logits(pixels, tokens))  # (B, N)
    if "logit_bias" in model.params:
        probability = 1 / (1 + np.exp(-logits))
    else:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probability = shifted / shifted.sum(axis=1, keepdims=True)
    columns = {"cosine": pooled, "probability": probability}
    if model.model.has_pooling:
        bias = np.float32(model.params.get("logit_bias", 0.0))
        columns = {"conditioned": (logits - bias) / scale, **columns}
    return [
        {name: float(column[image, text]) for name, column in columns.items()}
        for image in range(len(images))
        for text in range(len(texts))
    ]


def sheet(model: pretrained.Pretrained, images: Sequence[Image.Image], texts: Sequence[str]) -> Image.Image | None:
    """Where each text looks in each image; None where the model cannot say."""
    preprocess = model.model.preprocessing
    fitted = np.stack([preprocess.fit(image, model.model.image_size) for image in images])  # uint8 (B, H, W, 3)
    if model.model.has_pooling:
        tokens = model.tokenize(texts)
        heat = attention_maps.heat_maps(model.model, model.params, fitted, tokens, preprocess=preprocess)
        return attention_maps.sheet(fitted, [list(texts)] * len(images), heat.maps, heat.zero_mass)
    if not model.model.has_regions:
        return None
    features = model.encode_image(fitted)
    text = np.asarray(normalize(model.encode_text(model.tokenize(texts)).pooled))
    cosines = np.asarray(normalize(features.regions)) @ text.T  # (B, Q, N)
    corners = np.asarray(boxes.corners(features.boxes))  # (B, Q, 4)
    nearest = cosines.argmax(axis=1)  # (B, N)
    examples = [
        regions.Example(pixels, None, corners[image][nearest[image]], cosines[image].max(axis=0), texts)
        for image, pixels in enumerate(fitted)
    ]
    return regions.sheet(examples)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.predict", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="what flair_jax.load takes: a file, a workdir, a name")
    parser.add_argument("--image", action="append", required=True, type=pathlib.Path, help="may come several times")
    parser.add_argument("--text", action="append", required=True, help="may come several times")
    parser.add_argument("--output", type=pathlib.Path, metavar="PNG", help="where to write the picture; absent: none")
    parser.add_argument("--gelu", choices=names.GELU, help="where the checkpoint does not say it")
    options = parser.parse_args(arguments)
    try:
        images = read_images([path.expanduser() for path in options.image])
        model = pretrained.load(options.checkpoint, gelu=options.gelu)
        rows = table(model, images, options.text)
        pairs = [(path.name, text) for path in options.image for text in options.text]
        widths = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
        print(f"{'image':{widths[0]}}  {'text':{widths[1]}}  " + "  ".join(f"{name:>11}" for name in rows[0]))
        for (image, text), row in zip(pairs, rows, strict=True):
            print(f"{image:{widths[0]}}  {text:{widths[1]}}  " + "  ".join(f"{x:11.4f}" for x in row.values()))
        if options.output is not None:
            picture = sheet(model, images, options.text)
            if picture is None:
                raise ValueError(
                    "this model has neither text-conditioned pooling nor regions: there is no picture of it"
                )
            picture.save(options.output.expanduser(), "PNG")
            print(f"picture: {options.output}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
