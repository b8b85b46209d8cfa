"""Pictures of what a model sees, for notebooks and reports: a model, pictures and texts -> a PIL image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from flair_jax.figures import heat, page
from flair_jax.figures import regions as region_figures
from flair_jax.inference import Pretrained, as_texts
from flair_jax.pictures import Picture, as_pictures

VIEWS = ("attention", "patches", "values")
TILE = 224


def heat_maps(
    model: Pretrained,
    images: Picture | Sequence[Picture],
    texts: str | Sequence[str],
    *,
    view: str = "attention",
    heads: str | int | Sequence[int] = "mean",
    scale: str | float = "shared",
    tile: int = TILE,
) -> Image.Image:
    """A sheet of heat maps: a row per picture, a map per text, over the whole picture.

    What the model does not see of a picture, because it takes the centre, is dark and hatched. The scale stands above,
    and under each map how far its own values go; of attention also the share that the text gives to no patch, the zero
    key's mass.

    Args:
      model: of which the view is asked.
      images, texts: as `Pretrained.score` takes them.
      view: "attention": where text-conditioned pooling looks. "patches": the cosine of each projected patch with the
        text. "values": the cosine of what the pooling makes of each patch.
      heads: of attention, see `Pretrained.heat_maps`; with "each" there is a row per picture and text, with the maps of
        all heads.
      scale: see `figures.heat.attention_scale` and `cosine_scale`.
      tile: width of a picture in pixels.

    Example:
      >>> model = flair_jax.load("flair.safetensors")
      >>> sheet = visualize.heat_maps(model, ["fox.jpg", "dog.jpg"], ["a red fox in the snow", "a dog, asleep"])
      >>> sheet.save("sheet.png")
      >>> visualize.heat_maps(model, "fox.jpg", "a red fox in the snow", heads="each", scale=4).size > sheet.size
      True
    """
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}; expected one of {', '.join(VIEWS)}")
    if view != "attention" and heads != "mean":
        raise ValueError(f"heads is {heads!r}, but only the view 'attention' has heads; this is {view!r}")
    pictures, texts = as_pictures(images), as_texts(texts)
    if view == "attention":
        maps, mass = model.heat_maps(pictures, texts, heads=heads)
        scale = heat.attention_scale([maps], scale)
    else:
        maps = model.patch_similarity(pictures, texts, mode={"patches": "projected", "values": "value"}[view])
        mass, scale = None, heat.cosine_scale([maps], scale)
    rows = []

    def caption(*index):
        own = maps[index]
        return heat.attention_caption(own, mass[index]) if mass is not None else f"{own.min():.2f} to {own.max():.2f}"

    for number, picture in enumerate(pictures):
        part = _part(model, picture)
        if maps.ndim == 4:
            under = [f"{text}\n{caption(number, n)}" for n, text in enumerate(texts)]
            rows.append(heat.Row(picture, maps[number], under, part=part))
            continue
        for n, text in enumerate(texts):
            under = [f"head {head}\n{caption(number, n, head)}" for head in range(maps.shape[2])]
            rows.append(heat.Row(picture, maps[number, n], under, text, part))
    return heat.sheet(rows, scale, tile=tile)


def regions(model: Pretrained, images: Picture | Sequence[Picture], texts: str | Sequence[str] = ()) -> Image.Image:
    """A sheet of the regions that a query decoder (GRAIN) finds: their boxes on each picture.

    With texts, the box of the region that is nearest to each text, with the cosine of both; without, all boxes.

    Args:
      model: with a query decoder.
      images, texts: as `Pretrained.regions` takes them.

    Example:
      >>> model = flair_jax.load("grain.safetensors")
      >>> visualize.regions(model, "fox.jpg", ["a red fox in the snow", "the sky"]).save("regions.png")
    """
    pictures, texts = as_pictures(images), as_texts(texts)
    examples, hatched = [], False
    for picture, found in zip(pictures, model.regions(pictures, texts), strict=True):
        shares = found.boxes / np.tile(picture.size, 2)
        if texts:
            shares, fit, names = shares[found.cosines.argmax(axis=0)], found.cosines.max(axis=0), texts
        else:
            fit, names = None, [f"query {n}" for n in range(len(found.boxes))]
        part = _part(model, picture)
        hatched |= part != (0, 0, *picture.size)
        small, factor = page.fit_tile(picture, region_figures.TILE)
        pixels = heat.mark_unseen(small, tuple(factor * side for side in part))
        examples.append(region_figures.Example(np.asarray(pixels), None, shares, fit, names))
    sheet = region_figures.sheet(examples)
    title = "the region that is nearest to each text, and the cosine of both" if texts else "all regions"
    return heat.with_title(sheet, title + (heat.HATCHED_TITLE if hatched else ""))


def query_maps(
    model: Pretrained,
    images: Picture | Sequence[Picture],
    *,
    heads: str | int | Sequence[int] = "mean",
    scale: str | float = "shared",
    tile: int = TILE,
) -> Image.Image:
    """A sheet of where the queries of a decoder (GRAIN) look: a row per picture, a map per query with its box.

    Args:
      model: with a query decoder.
      images: as `Pretrained.query_maps` takes them.
      heads: "mean", a number, or several numbers.
      scale: see `figures.heat.attention_scale`.
      tile: width of a picture in pixels.

    Example:
      >>> model = flair_jax.load("grain.safetensors")
      >>> visualize.query_maps(model, "fox.jpg", heads=0).save("queries.png")
    """
    if isinstance(heads, str) and heads == "each":
        raise ValueError("heads is 'each'; a sheet of queries shows the mean, a head or the mean of several")
    pictures, _ = model.encoded(images)  # for both questions
    maps, class_mass = model.query_maps(pictures, heads=heads)
    rows = []
    for picture, own, mass, found in zip(pictures, maps, class_mass, model.regions(pictures), strict=True):
        names = [*(f"region query {number}" for number in range(len(own) - 1)), "image query"]
        captions = [
            f"{name}\n{heat.attention_caption(one, share, 'class token')}"
            for name, one, share in zip(names, own, mass, strict=True)
        ]
        boxes = [*map(tuple, found.boxes.tolist()), None]
        rows.append(heat.Row(picture, own, captions, part=_part(model, picture), boxes=boxes))
    return heat.sheet(rows, heat.attention_scale([maps], scale), tile=tile)


def _part(model: Pretrained, picture: Image.Image) -> tuple[float, float, float, float]:
    """What the model sees of a picture, in its pixels."""
    return model.model.preprocessing.seen(picture.size, model.model.image_size)
