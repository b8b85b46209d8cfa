"""Search in a folder: times of queries, of updates, and what the index takes, with random features.

    python -m benchmarks.search                       # FLAIR B/16, 10,000 images

The features of the images are drawn, for the towers would take an hour on two cores; all else is what a user runs, on
pictures that are written for it. What a text costs, its tower too, is measured with random weights.
"""

import io
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import command, processes
from benchmarks.sides import median

TEXTS = ["a red fox in the snow", "a dog, asleep", "two people at a table", "a kitchen", "a train at night"]
SIDE = 64  # pixels of the pictures


class RandomFeatures:
    """In the place of an `Encoder`: features of the shapes that a model's towers give."""

    def __init__(self, model: Any):
        height, width = model.image_size
        self._patches = height * width // model.vision_options["patch_size"] ** 2
        self._width = model.embed_dim
        self._rng = np.random.default_rng(0)

    def images(self, params: Any, pixels: np.ndarray, *, local: bool):
        from flair_jax.models.dual_encoder import ImageFeatures

        draw = lambda *shape: self._rng.standard_normal((len(pixels), *shape, self._width), np.float32)  # noqa: E731
        yield np.arange(len(pixels)), ImageFeatures(draw(), draw(self._patches) if local else None)


def write_pictures(folder: pathlib.Path, count: int) -> None:
    """JPEG files of noise, each another one, a thousand a folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "JPEG")
        path.write_bytes(file.getvalue())


def measure(config: Mapping[str, Any], *, images: int, candidates: int, turns: int) -> dict[str, Any]:
    """Seconds by what is done; sizes in MiB."""
    began = time.perf_counter()
    import jax

    from flair_jax import pretrained, search, state
    from flair_jax.convert import flax_files

    figures = {"images": images, "candidates": candidates, "import_seconds": time.perf_counter() - began}

    def timed(name: str, run: Any) -> Any:
        began = time.perf_counter()
        result = run()
        figures[f"{name}_seconds"] = time.perf_counter() - began
        return result

    with tempfile.TemporaryDirectory(prefix="search-") as scratch:
        folder, weights = pathlib.Path(scratch) / "photos", pathlib.Path(scratch) / "weights.safetensors"
        write_pictures(folder, images)
        model = pretrained.models.create(config["model"])
        flax_files.write(weights, jax.device_get(jax.jit(lambda: state.init_params(model, 0))()), config["model"])
        loaded = timed("load", lambda: pretrained.load(weights))
        index = timed("open", lambda: search.Index.open(folder, loaded))
        index._encoder = RandomFeatures(model)
        timed("update_without_towers", index.update)
        changes = timed("update_unchanged", index.update)
        if changes.unchanged != images:
            raise RuntimeError(f"an update without changes found {changes}")
        for path in index.at.iterdir():
            figures[f"{path.name.partition('-')[0].partition('.')[0]}_mib"] = path.stat().st_size / processes.MIB
        index = timed("reopen", lambda: search.Index.open(folder, loaded))
        timed("first_query", lambda: index.query(TEXTS[:1], candidates=candidates))
        for mode in ("global", "conditioned")[: 1 + model.has_pooling]:
            for count in (1, len(TEXTS)):
                index.query(TEXTS[:count], mode=mode, candidates=candidates)  # compiles
                found = []
                for _ in range(turns):
                    began = time.perf_counter()
                    index.query(TEXTS[:count], mode=mode, candidates=candidates)
                    found.append({"seconds": time.perf_counter() - began})
                figures[f"{mode}_{count}_texts_seconds"] = median(found, "seconds")
        figures["peak_mib"] = processes.peak_mib()
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("search", __doc__.partition("\n")[0])
    parser.add_argument("--config", help="a path or the name of a shipped config; FLAIR B/16 if absent")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    sizes = dict(images=(10_000, "in the index"), candidates=(200, "of a text"), turns=(9, "of each query"))
    command.add_sizes(parser, **sizes)
    parsed = parser.parse_args(arguments)
    from flair_jax import config as configuration

    config = configuration.read(parsed.config or "base", [f"--config.{change}" for change in parsed.set])
    command.report(measure(config, **command.pick(parsed, sizes)), parsed.json)


if __name__ == "__main__":
    main()
