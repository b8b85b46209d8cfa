"""A process of an evaluation: `python evaluating.py FOLDER PORT COUNT INDEX`; see test_evaluate_processes.py."""

import json
import pathlib
import sys

import jax
import numpy as np

FOLDER, PORT, COUNT, INDEX = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if COUNT > 1:
    jax.distributed.initialize(f"localhost:{PORT}", COUNT, INDEX)

from colour_model import ColourModel  # noqa: E402

from flair_jax import evaluate, sharding  # noqa: E402
from flair_jax.data.transforms.images import ImageError  # noqa: E402
from flair_jax.evaluators import Retrieval, RetrievalSet, features  # noqa: E402
from flair_jax.evaluators.store import FeatureStore  # noqa: E402


class Images:
    """Noise by index, with keys; loads of this process are noted."""

    def __init__(self, broken=None):
        self.pixels = np.random.default_rng(0).random((9, 16, 16, 3), np.float32)
        self.keys = [f"image {number}" for number in range(9)]
        self.shape, self.loaded, self.broken = self.pixels.shape, [], broken

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, number):
        self.loaded.append(number)
        if number == self.broken:
            raise ImageError("image 1 is cut short")
        return self.pixels[number]


def run(images, store):
    tokens = np.array([[channel % 3, 9 + channel] for channel in range(9)], np.int32)
    data = RetrievalSet("set", images, tokens, np.arange(9))
    with features.session(store=FeatureStore(FOLDER / store)):
        evaluator = Retrieval(
            ColourModel(patch=8), data, preprocess=lambda x: x, image_batch=4, modes=("flair", "global")
        )
        return {result.name: result.value for result in evaluator.run({})}


with jax.set_mesh(sharding.create_mesh()):
    images = Images()
    found = {"results": run(images, "w"), "loaded": sorted(set(images.loaded))}
    images = Images()
    found |= {"again": run(images, "w"), "loaded again": images.loaded}
    if INDEX == 0:  # of a file that one process alone reads
        (rows,) = FOLDER.glob("w/*/images-*-00000.rows")
        rows.write_bytes(b"\x7f" + rows.read_bytes()[1:])
    images = Images()
    found |= {"repaired": run(images, "w"), "loaded to repair": sorted(set(images.loaded))}
    placed = evaluate.on_all_devices({"w": jax.device_put(np.arange(3), jax.local_devices()[0])})["w"]
    found |= {"placed": [np.asarray(placed).tolist(), placed.is_fully_replicated]}
    try:
        run(Images(broken=1), "other weights")
    except features.BrokenImages as error:
        found |= {"broken": list(error.reasons), "why": str(error)}
(FOLDER / f"{COUNT}-{INDEX}.json").write_text(json.dumps(found))
