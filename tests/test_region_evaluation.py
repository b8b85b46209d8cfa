"""The evaluation of regions, checked by hand on a model whose boxes and regions are written down."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flair_jax.data.transforms.images import Preprocessing
from flair_jax.evaluators import PointingSet, Regions
from flair_jax.evaluators.regions import rank
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.report import flat

SIDE = 16
# Of two images: the boxes of three queries (centre x, centre y, width, height), and which text each region is.
BOXES = (
    ((0.25, 0.25, 0.5, 0.5), (0.75, 0.75, 0.5, 0.5), (0.5, 0.5, 0.1, 0.1)),
    ((0.25, 0.5, 0.5, 1.0), (0.9, 0.9, 0.2, 0.2), (0.75, 0.5, 0.5, 1.0)),
)
SAYS = ((0, 1, 2), (3, 0, 2))
# Phrases: image, text, box in pixels.
PHRASES = (
    (0, 0, (0, 0, 8, 8)),  # the first query, exactly, which says so
    (0, 3, (8, 8, 16, 16)),  # the second one, exactly, which says something else
    (1, 2, (0, 0, 8, 16)),  # the first one, exactly, which says something else; the third says text 2
    (1, 3, (0, 0, 8, 16)),  # the same box has another name, which the first one says
    (1, 2, (8, 0, 16, 4)),  # a quarter of the third one's box
)


class Written(nn.Module):
    """Images say their number; texts are one-hot."""

    context_length = 77
    has_regions = True
    preprocessing: Preprocessing = Preprocessing()

    def encode_image(self, images):
        number = images[:, 0, 0, 0].astype(int)
        regions = jax.nn.one_hot(jnp.asarray(SAYS), 5)[number] + 0.01 * jax.nn.one_hot(4, 5)
        return ImageFeatures(regions[:, 0], None, regions, jnp.asarray(BOXES)[number])

    def encode_text(self, text, *, local=True):
        pooled = jax.nn.one_hot(text.tokens.reshape(-1)[text.ends - 1], 5)
        return TextFeatures(pooled, None, text.tokens != 0)


def images(count=2):
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, SIDE, SIDE, 3))


def evaluator(phrases=PHRASES, **options):
    owners, texts, boxes = zip(*phrases, strict=True)
    tokens = np.array([[text, 9] for text in texts], np.int32)
    data = PointingSet(
        "set",
        images(),
        tokens,
        np.array(owners),
        [np.array(box, float) for box in boxes],
        np.full(len(owners), 2),
        [f"text {text}" for text in texts],
    )
    return Regions(Written(), data, preprocess=lambda x: x, **options)


@pytest.mark.parametrize("image_batch", [1, 64])
def test_by_hand(image_batch):
    """Four boxes: two of an image, and two of the other, one of which has two names."""
    found = flat(evaluator(image_batch=image_batch).run({}))
    assert found == pytest.approx(
        {
            "regions/set/box_recall": 3 / 4,
            "regions/set/mean_iou": (1 + 1 + 1 + 1 / 4) / 4,
            # Right: the first, and of the second image the box with both names; that of the last one is 2, and so says
            # its region, but all that the image's texts leave to choose from are names of the box before it.
            "regions/set/description_R@1": 2 / 3,
            "regions/set/chance/description_R@1": (1 / 2 + 1 / 2 + 1 / 2) / 3,
            "regions/set/description_set_R@1": 3 / 4,
            "regions/set/description_set_R@5": 1.0,
            # The phrases' nearest regions: the first query; none, for nothing says 3 in the first image; the third,
            # whose box is another one; the first; the third, with an IoU of 1/4.
            "regions/set/grounding": 2 / 5,
            "regions/set/chance/grounding": (4 * 1 / 3 + 0) / 5,  # nothing fits the last phrase's box
        }
    )


def test_more_boxes_than_queries_are_missed():
    rows = [(0, text, (4 * text, 0, 4 * text + 4, 4)) for text in range(4)]
    found = flat(evaluator([*rows, PHRASES[2]]).run({}))
    assert found["regions/set/box_recall"] <= 4 / 5
    assert 0 <= found["regions/set/mean_iou"] < 1


def test_equal_regions_are_no_answer():
    assert rank(np.array([1.0, 1.0, 1.0]), [0]) == 2
    assert rank(np.array([1.0, 0.5, 0.2]), [0]) == 0
    assert rank(np.array([1.0, 0.5, 0.2]), [2, 1]) == 1


def test_the_picture():
    ours = evaluator()
    list(ours.run({}))
    [(title, picture)] = list(ours.figures({}))
    assert title == "predicted boxes beside true ones" and isinstance(picture, Image.Image)
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10


def test_a_model_without_a_decoder_is_refused():
    class Without(Written):
        has_regions = False

    with pytest.raises(ValueError, match=r"config.model.decoder is None"):
        Regions(Without(), evaluator()._data, preprocess=lambda x: x)
