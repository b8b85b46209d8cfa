"""A model with its parameters, to use from Python: score, search, classify, segment, and see where a text looks."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy.special import softmax

from flair_jax import attention_maps, boxes, models
from flair_jax.attention_maps import IMAGE_BATCH, TEXT_BATCH
from flair_jax.config import normalize
from flair_jax.convert import flax_files
from flair_jax.data.benchmarks import prompts
from flair_jax.data.counted import counted
from flair_jax.data.transforms.base import SampleError
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators import (
    Classification,
    ClassificationSet,
    Segmentation,
    SegmentationSet,
    features,
    segmentation,
)
from flair_jax.evaluators.features import Encoder
from flair_jax.models import layers
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.models.text import Text
from flair_jax.pictures import Fitted, Picture, Pictures, as_pictures, is_one
from flair_jax.progress import progress

Item = TypeVar("Item")

LARGEST_PIXEL = 10.0  # normalised; those of pictures are within 3, and floats from 0 to 255 are not normalised
FEW_BATCHES = 3  # more of them than these show their progress
# Of `score` and `search`, and what each asks the model for.
MODES = {"conditioned": "score", "global": "global_score", "regions": "region_score"}
TEMPLATES = ("a photo of a {c}.",)
SHORT_SIDE = 1.5  # of a picture to segment, in sides of the model's images; 336 pixels of 224, as FLAIR's evaluation


class Hit(NamedTuple):
    """An image that a text finds: its number, and its score, a cosine."""

    image: int
    score: float


class Regions(NamedTuple):
    """What a query decoder finds in an image.

    `boxes`: float32 (Q, 4), left, top, right, bottom in pixels of the picture itself. `cosines`: float32 (Q, N), of
    each region with each text.
    """

    boxes: np.ndarray
    cosines: np.ndarray


class EncodedPictures(Pictures):
    """Pictures with their features, which `Pretrained.encoded` gives.

    Attributes:
      encoder: what encoded them.
      batches: as `Encoder.images` yields them.
      sizes: width and height of each picture, by its number.
    """

    def __init__(
        self,
        pictures: Pictures,
        encoder: Encoder,
        batches: Sequence[tuple[np.ndarray, ImageFeatures]],
        sizes: Mapping[int, tuple[int, int]],
    ):
        super().__init__(pictures)
        self.encoder, self.batches, self.sizes = encoder, batches, sizes


class EncodedTexts(tuple):
    """Strings with their features, which `Pretrained.encoded` gives.

    Attributes:
      encoder: what encoded them.
      features: `pooled` (N, D); None of no texts.
    """

    encoder: Encoder
    features: TextFeatures | None


class Pretrained:
    """A model with its parameters. Its methods work in batches over all devices of the mesh, as the evaluators do, and
    are compiled once per shape.

    `score`, `scores`, `search`, `classify`, `segment`, `heat_maps`, `patch_similarity`, `regions` and `query_maps` take
    pictures and strings. A picture is a path, a PIL image or a uint8 array (H, W, 3), and several are a sequence of
    these, mixed. They are decoded batch by batch, so that the host's memory does not grow with their pixels, and turned
    upright by their EXIF orientation, see `pictures.Pictures`; more than a few batches show their progress on stderr.
    Pictures that cannot be used end the call with `BrokenImages`, a ValueError that knows all of them; a model without
    the part that is asked for raises ValueError. To ask several of these for the same pictures, see `encoded`.

    `preprocess`, `tokenize`, `encode_image`, `encode_text`, `get_logits`, `get_logits_as_clip` and `attention_maps`
    take and give arrays, with the numbers of the original code.

    Args:
      config: the `model` section.
      params: its parameters.

    Attributes:
      config, params: as given, the parameters on every device.
      model: the Linen module.
    """

    def __init__(self, config: Mapping[str, Any], params: Any):
        self.config = normalize(config)
        self.model = models.create(self.config)
        with _showing_progress():
            self._encoder = Encoder(self.model, self.model.preprocessing, **_BATCHES)
        self.params = self._encoder.place(params)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of `score` that this model has, first the one that it has without a mode."""
        has = {"conditioned": self.model.has_pooling, "global": True, "regions": self.model.has_regions}
        return tuple(mode for mode in MODES if has[mode])

    def score(
        self, images: Picture | Sequence[Picture], texts: str | Sequence[str], *, mode: str | None = None
    ) -> np.ndarray:
        """Cosine of every image with every text, float32 (B, N).

        Args:
          images: B pictures, see the class.
          texts: N texts; commas do not divide them.
          mode: "conditioned": the image is pooled for each text (FLAIR). "global": pooled features (CLIP). "regions":
            the region that is nearest to the text (GRAIN). None: conditioned where the model can, else global.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> scores = model.score(["fox.jpg", "dog.jpg"], ["a red fox in the snow", "a dog, asleep"])
          >>> scores.shape, scores.dtype
          ((2, 2), dtype('float32'))
        """
        (scores,) = self.scores(images, texts, [self._checked_mode(mode)]).values()
        return scores

    def scores(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        modes: str | Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """`score` by several modes, of images and texts that are encoded once: mode -> float32 (B, N).

        Args:
          images, texts: as for `score`.
          modes: one mode of `score`, or several; None: all that the model has, see `modes`.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> scores = model.scores("fox.jpg", ["a red fox in the snow", "a dog, asleep"])
          >>> {mode: cosines.shape for mode, cosines in scores.items()}
          {'conditioned': (1, 2), 'global': (1, 2)}
        """
        modes = [modes] if isinstance(modes, str) else modes
        modes = self.modes if modes is None else [self._checked_mode(mode) for mode in modes]
        pictures, texts = as_pictures(images), as_texts(texts)
        scores = {mode: np.empty((len(pictures), len(texts)), np.float32) for mode in modes}
        if not len(pictures) or not texts:
            return scores
        blocks = self._encoder.blocks(self._text(texts))
        encoded, _ = self._batches(pictures, local="conditioned" in modes)

        def started():
            for numbers, image in encoded:
                apply = self._encoder.apply
                parts = {mode: [apply(MODES[mode], self.params, image, block) for block in blocks] for mode in modes}
                yield numbers, parts

        for numbers, parts in features.lookahead(started()):
            for mode, blocks_of_mode in parts.items():
                found = np.concatenate([np.asarray(block) for block in blocks_of_mode], axis=-1)
                found = found[: len(numbers), ..., : len(texts)]
                scores[mode][numbers] = found.max(axis=1) if mode == "regions" else found
        return {mode: x / np.exp(np.float32(self.params["logit_scale"])) for mode, x in scores.items()}

    def search(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        top_k: int = 10,
        *,
        mode: str | None = None,
    ) -> list[list[Hit]]:
        """For each text the images that it finds, the best first; of equal scores the one with the lower number.

        Args:
          images, texts, mode: as for `score`.
          top_k: how many hits, at most; there are no more than images.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> (hits,) = model.search(["fox.jpg", "dog.jpg"], "a red fox in the snow", top_k=1)
          >>> [type(hits[0].image), type(hits[0].score)]
          [<class 'int'>, <class 'float'>]

        Raises:
          ValueError: top_k is not positive.
        """
        if not isinstance(top_k, Integral) or top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected a number of hits, at least 1")
        scores = self.score(images, texts, mode=mode)
        orders = np.argsort(-scores, axis=0, kind="stable")[:top_k].T  # (N, K)
        return [[Hit(int(i), float(scores[i, text])) for i in order] for text, order in enumerate(orders)]

    def classify(
        self,
        images: Picture | Sequence[Picture],
        class_names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = TEMPLATES,
        *,
        mode: str | None = None,
    ) -> np.ndarray:
        """Probability of every class for every image, float32 (B, C): the softmax of the scaled cosines.

        A class is the mean of the unit vectors of its prompts, at unit length again, as `evaluators.Classification` has
        it (there flair_before, and global).

        Args:
          images: B pictures, see the class.
          class_names: C classes, each a name or several (synonyms).
          templates: texts with `{c}` for the name; or the name of a set whose templates `data.benchmarks.prompts` has,
            such as "imagenet1k", its 80.
          mode: "conditioned": the image is pooled for each class. "global": pooled features. None: as for `score`.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> probabilities = model.classify("fox.jpg", ["fox", ["dog", "hound"], "cat"], "a blurry photo of a {c}.")
          >>> probabilities.shape, round(float(probabilities.sum()), 4)
          ((1, 3), 1.0)
        """
        mode = self._checked_mode(mode, ("conditioned", "global"))
        pictures, (classes, tokens, owner) = as_pictures(images), self._prompts(class_names, templates)
        if not len(pictures):
            return np.empty((0, len(classes)), np.float32)
        name = {"conditioned": "flair_before", "global": "global"}[mode]
        data = ClassificationSet(
            "classes", classes, self._fitted(pictures), np.zeros(len(pictures), int), tokens, owner
        )
        with _showing_progress():
            task = Classification(self.model, data, preprocess=self.model.preprocessing, modes=[name], **_BATCHES)
        return softmax(task.scores(self.params)[name], axis=1)

    def segment(
        self,
        images: Picture | Sequence[Picture],
        class_names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = TEMPLATES,
        *,
        mode: str | None = None,
        short_side: float | None = SHORT_SIDE,
        whole_image: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """The class of every pixel, int32 (H, W) at the picture's own size; -1 where several share the best score.

        Every patch is compared with every class, see `evaluators.Segmentation`.

        Args:
          images: pictures, see the class.
          class_names, templates: as for `classify`. Every pixel gets one of them: name what else is in the picture.
          mode: "projected": the projected patches, FLAIR's published way. "value": what the pooling makes of each
            patch. "attention": the weight that it gives each patch. None: projected.
          short_side: of the resized picture, in sides of the model's images; None: the picture keeps its size.
          whole_image: whether the model takes the whole picture with resized position embeddings, instead of windows.

        Returns:
          For one picture its classes; for several, be it a list of one, a list of such arrays.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> PIL.Image.open("fox.jpg").size
          (80, 60)
          >>> model.segment("fox.jpg", ["fox", "snow", "sky"]).shape
          (60, 80)
          >>> [mask.shape for mask in model.segment(["fox.jpg", "dog.jpg"], ["fox", "snow", "sky"])]
          [(60, 80), (70, 50)]
        """
        pictures, (classes, tokens, owner) = as_pictures(images), self._prompts(class_names, templates)
        self._check_local("segmentation")
        available = segmentation.MODES if self.model.has_pooling else ("projected",)
        mode = available[0] if mode is None else mode
        if mode not in available:
            raise ValueError(f"mode is {mode!r}; this model segments by {' or '.join(available)}")
        if not len(pictures):
            return []
        sizes = np.array([self._stored_size(pictures, number) for number in range(len(pictures))])
        unlabelled = [np.broadcast_to(np.uint8(segmentation.IGNORE), size) for size in sizes]
        data = SegmentationSet("pictures", classes, pictures, unlabelled, tokens, owner, sizes=sizes)
        options = dict(modes=[mode], short_side=short_side, whole_image=whole_image, **_BATCHES)
        masks = {}
        with _showing_progress():
            task = Segmentation(self.model, data, preprocess=self.model.preprocessing, **options)
            for number, found in task.masks(self.params):
                mask = found[mode].astype(np.int32)
                masks[number] = np.where(mask == segmentation.UNDECIDED, -1, mask)
        return masks[0] if is_one(images) else [masks[number] for number in range(len(pictures))]

    def heat_maps(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        *,
        heads: str | int | Sequence[int] = "mean",
    ) -> attention_maps.HeatMaps:
        """Attention of every text over the patches of every image, and what is on no patch, the zero key's mass.

        Args:
          images, texts: as for `score`.
          heads: "mean" of all heads; "each" of them; a number, from 0; or several numbers, of which the mean is taken.

        Returns:
          `maps` (B, N, h, w) and `zero_mass` (B, N), which sum to 1; with "each" (B, N, heads, h, w) and (B, N, heads).
          A map covers what the model sees of a picture, `preprocessing.seen`.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> heat = model.heat_maps("fox.jpg", ["a red fox in the snow", "the sky"], heads=0)
          >>> heat.maps.shape, heat.zero_mass.shape
          ((1, 2, 4, 4), (1, 2))
          >>> round(float(heat.maps[0, 0].sum() + heat.zero_mass[0, 0]), 4)
          1.0
        """
        self._check_pooling("heat maps")
        encoded = self._some(images, texts)
        return attention_maps.heat_maps_of_features(
            self._encoder, self.params, *encoded, size=self.model.image_size, heads=heads
        )

    def patch_similarity(
        self, images: Picture | Sequence[Picture], texts: str | Sequence[str], *, mode: str = "projected"
    ) -> np.ndarray:
        """Cosine of every patch with every text, float32 (B, N, h, w).

        Args:
          images, texts: as for `score`.
          mode: "projected": the patches as they are projected. "value": as the pooling would give them if all
            attention rested on one patch.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> model.patch_similarity("fox.jpg", "a red fox in the snow").shape
          (1, 1, 4, 4)
        """
        self._check_local("patch similarity")
        if mode not in (modes := ("projected", "value") if self.model.has_pooling else ("projected",)):
            raise ValueError(f"mode is {mode!r}; this model compares patches by {' or '.join(modes)}")
        encoded = self._some(images, texts)
        return attention_maps.patch_similarity(
            self._encoder, self.params, *encoded, size=self.model.image_size, mode=mode
        )

    def regions(self, images: Picture | Sequence[Picture], texts: str | Sequence[str] = ()) -> list[Regions]:
        """The regions that a query decoder (GRAIN) finds in each image, and how near they are to each text.

        Args:
          images, texts: as for `score`; without texts the cosines are (Q, 0).

        Returns:
          For each image its `Regions`, with boxes in pixels of the picture, upright: the model's crop is undone.

        Example:
          >>> model = flair_jax.load("grain.safetensors")
          >>> (found,) = model.regions("fox.jpg", ["a red fox in the snow"])
          >>> found.boxes.shape, found.cosines.shape
          ((3, 4), (3, 1))
        """
        self._check_decoder("regions")
        pictures, texts = as_pictures(images), as_texts(texts)
        if not len(pictures):
            return []
        unit = np.zeros((0, self.model.embed_dim), np.float32)
        if texts:
            unit = np.asarray(layers.normalize(self._text(texts).pooled), np.float32)
        height, width = self.model.image_size
        found, (encoded, sizes) = {}, self._batches(pictures, local=False)
        for numbers, image in encoded:
            cosines = np.asarray(layers.normalize(image.regions), np.float32) @ unit.T  # (B, Q, N)
            corners = np.asarray(boxes.corners(image.boxes))  # (B, Q, 4), shares
            for row, number in enumerate(numbers.tolist()):
                pixels = corners[row] * np.float32([width, height, width, height])
                own = self.model.preprocessing.unfit_boxes(pixels, sizes[number], (height, width))
                found[number] = Regions(own.astype(np.float32), cosines[row])
        return [found[number] for number in range(len(pictures))]

    def query_maps(
        self, images: Picture | Sequence[Picture], *, heads: str | int | Sequence[int] = "mean"
    ) -> attention_maps.QueryMaps:
        """Where the queries of a decoder (GRAIN) look, in its last layer.

        Args:
          images: as for `score`.
          heads: as for `heat_maps`.

        Returns:
          `maps` (B, Q + 1, h, w), the image query last, and `class_mass` (B, Q + 1), the weight of the class token;
          they sum to 1. With "each" (B, Q + 1, heads, h, w) and (B, Q + 1, heads).

        Example:
          >>> model = flair_jax.load("grain.safetensors")
          >>> found = model.query_maps("fox.jpg")
          >>> found.maps.shape, found.class_mass.shape
          ((1, 4, 4, 4), (1, 4))
        """
        self._check_decoder("attention of queries")
        if not len(pictures := as_pictures(images)):
            raise ValueError("0 images are given; expected at least one")
        batches, _ = self._batches(pictures, local=False, attention=True)
        return attention_maps.query_maps(batches, size=self.model.image_size, heads=heads)

    def encoded(
        self, images: Picture | Sequence[Picture], texts: str | Sequence[str] = ()
    ) -> tuple[EncodedPictures, EncodedTexts]:
        """Pictures and texts with their features, to ask several questions about them.

        `score`, `scores`, `search`, `heat_maps`, `patch_similarity`, `regions` and `query_maps` of this model take them
        in place of pictures and strings, and neither decode nor encode them again. (`classify` and `segment` make other
        texts and other pixels of theirs.) Features stay on the devices: for B/16 0.4 MB a picture.

        Args:
          images, texts: as for `score`.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> images, texts = model.encoded("fox.jpg", ["a red fox in the snow", "a dog, asleep"])
          >>> scores, heat = model.score(images, texts), model.heat_maps(images, texts)
          >>> bool((scores == model.score("fox.jpg", texts)).all())
          True
        """
        pictures, texts = as_pictures(images), as_texts(texts)
        if not isinstance(pictures, EncodedPictures):
            options = {"local": self.model.has_local, "attention": self.model.has_regions}
            batches, sizes = self._batches(pictures, **options) if len(pictures) else ((), {})
            pictures = EncodedPictures(pictures, self._encoder, list(batches), sizes)
        if not isinstance(texts, EncodedTexts):
            features = self._text(texts) if texts else None
            texts = EncodedTexts(texts)
            texts.encoder, texts.features = self._encoder, features
        return pictures, texts

    def preprocess(self, images: Sequence[Image.Image] | Image.Image) -> np.ndarray:
        """Images of any size and mode -> (B, H, W, 3) float32, as the reference evaluates them.

        Each is brought to the model's image size as its `config.model.preprocess` says, made RGB and normalised: with
        "crop" and "openai" it is resized to just cover that size, cropped in the centre and normalised with CLIP's mean
        and deviation. Its EXIF orientation is ignored here, as the reference ignores it (`PIL.ImageOps.exif_transpose`
        turns a photograph upright); `score` and the other methods that take pictures heed it.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> model.preprocess([PIL.Image.open("fox.jpg"), PIL.Image.open("dog.jpg")]).shape
          (2, 64, 64, 3)

        Raises:
          TypeError: something is no PIL image.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        for number, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise TypeError(f"images[{number}] is a {type(image).__name__}; expected PIL images (PIL.Image.open)")
        pixels = [self.model.preprocessing.fit(image, self.model.image_size) for image in images]
        return self.model.preprocessing(np.reshape(pixels, (-1, *self.model.image_size, 3)).astype(np.uint8))

    def tokenize(self, texts: Sequence[str] | str) -> np.ndarray:
        """Texts -> (N, T) int32; what does not fit the context is cut off.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> model.tokenize(["a red fox in the snow", "a dog, asleep"]).shape
          (2, 77)
        """
        return Tokenizer(self.model.context_length)(texts)

    def encode_image(self, images: np.ndarray) -> ImageFeatures:
        """Images -> `pooled` (B, D) and `local` (B, L, D), projected and not normalised.

        Args:
          images: (B, H, W, 3) of the model's size: uint8 pixels, which are normalised as in training, or floats, which
            are taken as normalised (`preprocess` gives them) and refused beyond 10. B may be 0.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> features = model.encode_image(model.preprocess(PIL.Image.open("fox.jpg")))
          >>> features.pooled.shape, features.local.shape
          ((1, 128), (1, 16, 128))

        Raises:
          TypeError: another dtype. ValueError: another shape, or floats that are no normalised pixels.
        """
        images = self._checked_images(images)
        if not len(images):
            return jax.tree.map(lambda x: x[:0], self.encode_image(np.zeros((1, *images.shape[1:]), images.dtype)))
        batches = list(self._encoder.images(self.params, images))
        features = jax.tree.map(lambda *x: jnp.concatenate(x), *[image for _, image in batches])
        # Batches are equally full but for the last, which alone has padding.
        return jax.tree.map(lambda x: x[: len(images)], features)

    def encode_text(self, texts: np.ndarray, *, local: bool = False, hidden_states: bool = False) -> TextFeatures:
        """Texts -> `pooled` (N, D), projected and not normalised.

        Args:
          texts: integers (N, T) with T up to the context length, from `tokenize`. N may be 0.
          local: give `local` (N, T, D) and `mask` too, the features of all tokens. Without it several short texts share
            a row of the text tower, which is faster by their number.
          hidden_states: give `local`, `mask` and `hidden` too, the states of the transformer before the projection:
            `last` (N, T, W), `second_to_last` (N, T, W), `pooled` (N, W), which diffusion models are conditioned on.
            They depend on the ids after the end of text too, see docs/using_clip.md.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> model.encode_text(model.tokenize(["a red fox in the snow", "a dog, asleep"])).pooled.shape
          (2, 128)

        Raises:
          TypeError: something else than integers. ValueError: another shape, or an id outside of the vocabulary.
        """
        texts = self._checked_texts(texts)
        if not len(texts):
            one = np.zeros((1, texts.shape[1]), np.int32)
            features = self.encode_text(one, local=local, hidden_states=hidden_states)
            return jax.tree.map(lambda x: x[:0], features)
        if hidden_states:
            return self._encoder.apply("encode_text_with_hidden", self.params, Text.padded(jnp.asarray(texts)))
        if local:
            return self._encoder.apply("encode_text", self.params, Text.padded(jnp.asarray(texts)))
        return self._encoder.texts(self.params, texts)

    def get_logits(self, images: np.ndarray, texts: np.ndarray) -> jax.Array:
        """Text-conditioned logits of every image with every text, bias included: (B, N) float32.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> images, texts = model.preprocess(PIL.Image.open("fox.jpg")), model.tokenize(["a fox", "a dog, asleep"])
          >>> model.get_logits(images, texts).shape
          (1, 2)
        """
        return self._pairs("score", images, texts) + self.params.get("logit_bias", 0.0)

    def get_logits_as_clip(self, images: np.ndarray, texts: np.ndarray) -> jax.Array:
        """Logits of the pooled features, without the bias as in the reference: (B, N) float32.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> images, texts = model.preprocess(PIL.Image.open("fox.jpg")), model.tokenize(["a fox", "a dog, asleep"])
          >>> model.get_logits_as_clip(images, texts).shape
          (1, 2)
        """
        return self._pairs("global_score", images, texts)

    def attention_maps(self, images: np.ndarray, texts: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Attention of each head over the patches (B, N, H, L), and the zero key's mass (B, N, H).

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> images, texts = model.preprocess(PIL.Image.open("fox.jpg")), model.tokenize(["a fox", "a dog, asleep"])
          >>> [x.shape for x in model.attention_maps(images, texts)]
          [(1, 2, 4, 16), (1, 2, 4)]
        """
        return self._pairs("attention_maps", images, texts)

    def save(self, path: str | os.PathLike) -> None:
        """Writes parameters and config as one .safetensors file, which `load` and `flair_jax.convert` read.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> model.save("copy.safetensors")
          >>> again = flair_jax.load("copy.safetensors")
          >>> bool((again.score("fox.jpg", "a dog") == model.score("fox.jpg", "a dog")).all())
          True
        """
        flax_files.write(os.path.expanduser(path), jax.device_get(self.params), self.config)

    def _pairs(self, method: str, images: np.ndarray, texts: np.ndarray) -> Any:
        return self._encoder.apply(method, self.params, self.encode_image(images), self.encode_text(texts))

    def _fitted(self, pictures: Pictures) -> Fitted:
        return Fitted(pictures, self.model.preprocessing.fit, self.model.image_size)

    def _stored_size(self, pictures: Pictures, number: int) -> tuple[int, int]:
        """Height and width of a picture; of one that cannot be used any: it is named when its turn comes."""
        try:
            width, height = pictures.size(number)
        except (SampleError, OSError):
            return self.model.image_size
        return height, width

    def _batches(
        self, pictures: Pictures, *, local: bool, attention: bool = False
    ) -> tuple[Iterator[tuple[np.ndarray, ImageFeatures]], Mapping[int, tuple[int, int]]]:
        """Pictures, at least one, as `Encoder.images` yields them; and the sizes of those that it yielded."""
        if isinstance(pictures, EncodedPictures):
            self._check_own(pictures, "images")
            return iter(pictures.batches), pictures.sizes
        fitted = self._fitted(pictures)
        return self._encoder.images(self.params, fitted, local=local, attention=attention), fitted.sizes

    def _text(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts, at least one: `pooled` (N, D)."""
        if isinstance(texts, EncodedTexts):
            self._check_own(texts, "texts")
            return texts.features
        return self._encoder.texts(self.params, self.tokenize(texts))

    def _some(
        self, images: Picture | Sequence[Picture], texts: str | Sequence[str]
    ) -> tuple[Iterator[tuple[np.ndarray, ImageFeatures]], TextFeatures]:
        """Features of pictures, patches too, and of texts. Raises ValueError: there are none."""
        pictures, texts = as_pictures(images), as_texts(texts)
        if not len(pictures) or not texts:
            given = f"{counted(len(pictures), 'image')} and {counted(len(texts), 'text')}"
            raise ValueError(f"{given} are given; expected at least one of each")
        batches, _ = self._batches(pictures, local=True)
        return batches, self._text(texts)

    def _check_own(self, encoded: EncodedPictures | EncodedTexts, what: str) -> None:
        if encoded.encoder is not self._encoder:
            raise ValueError(f"these {what} were encoded by another model; give them to `encoded` of this one")

    def _prompts(
        self, class_names: Sequence[str | Sequence[str]], templates: str | Sequence[str]
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Titles of the classes, their prompts' tokens, int32 (P, T), and the class of each prompt, int (P,)."""
        classes = prompts.as_classes(class_names)
        if not classes:
            raise ValueError("class_names is empty; expected one or more names")
        if isinstance(templates, str):
            templates = (templates,) if prompts.SLOT in templates else prompts.templates(templates)
        texts = prompts.from_templates(classes, templates)
        owner = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
        return [names[0] for names in classes], self.tokenize([text for own in texts for text in own]), owner

    def _checked_mode(self, mode: str | None, allowed: Sequence[str] = tuple(MODES)) -> str:
        if mode is None:
            return self.modes[0]
        if mode not in allowed:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(allowed)}")
        if mode == "conditioned":
            self._check_pooling("scores of mode conditioned")
        if mode == "regions":
            self._check_decoder("scores of mode regions")
        return mode

    def _check_pooling(self, what: str) -> None:
        if not self.model.has_pooling:
            raise ValueError(f"{what} need text-conditioned pooling, and config.model.pooling is None")

    def _check_decoder(self, what: str) -> None:
        if not self.model.has_regions:
            raise ValueError(f"{what} need a query decoder, and config.model.decoder is None")

    def _check_local(self, what: str) -> None:
        if not self.model.has_local:
            raise ValueError(f"{what} needs projected patches, and config.model.project_image is False")

    def _checked_images(self, images: Any) -> np.ndarray:
        height, width = self.model.image_size
        expected = (
            f"expected images (B, {height}, {width}, 3), uint8 pixels or normalised floats, as `preprocess` gives"
        )
        if not hasattr(images, "dtype"):
            raise TypeError(f"images are a {type(images).__name__}; {expected}")
        images = np.asarray(images)
        if images.shape[1:] != (height, width, 3):
            raise ValueError(f"images have shape {images.shape}; {expected}")
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images have dtype {images.dtype}; {expected}")
        images = images.astype(np.float32)
        if images.size and not np.abs(images).max() <= LARGEST_PIXEL:  # NaN too
            raise ValueError(f"images have floats from {images.min()} to {images.max()}; {expected}")
        return images

    def _checked_texts(self, texts: Any) -> np.ndarray:
        length, size = self.model.context_length, self.config["text"]["vocab_size"]
        expected = f"expected token ids, integers (N, T) with T up to {length}, as `tokenize` gives"
        if not hasattr(texts, "dtype"):
            raise TypeError(f"texts are a {type(texts).__name__}; {expected}")
        texts = np.asarray(texts)
        if not np.issubdtype(texts.dtype, np.integer):
            raise TypeError(f"texts have dtype {texts.dtype}; {expected}")
        if texts.ndim != 2 or not 0 < texts.shape[1] <= length:
            raise ValueError(f"texts have shape {texts.shape}; {expected}")
        if texts.size and not 0 <= texts.min() <= texts.max() < size:
            raise ValueError(f"token ids run from {texts.min()} to {texts.max()}; expected 0 to {size - 1}")
        return texts.astype(np.int32)


_BATCHES = {"image_batch": IMAGE_BATCH, "text_batch": TEXT_BATCH}


def as_texts(texts: str | Sequence[str]) -> Sequence[str]:
    """One text or several as a sequence of texts. Raises TypeError: something else."""
    if isinstance(texts, EncodedTexts):
        return texts
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts are a {type(texts).__name__}; expected a string or several")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] is a {type(text).__name__}; expected strings")
    return texts


def _showing_progress():
    """Encoders that are built in this context show how far they are, if there is more than a little to do."""
    return features.session(progress=_progress_of_long_jobs)


def _progress_of_long_jobs(batches: Iterable[Item], total: int) -> Iterable[Item]:
    return progress(batches, total, "batches of images") if total > FEW_BATCHES else batches
