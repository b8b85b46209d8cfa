"""A model with its parameters, to use from Python: score, search, classify, segment, and see where a text looks."""

import os
from collections.abc import Iterable, Mapping, Sequence
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
from flair_jax.pictures import Fitted, Picture, Pictures
from flair_jax.progress import progress

Item = TypeVar("Item")

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


class Pretrained:
    """A model with its parameters. Its methods work in batches over all devices of the mesh, as the evaluators do, and
    are compiled once per shape.

    `score`, `search`, `classify`, `segment`, `heat_maps`, `patch_similarity`, `regions` and `query_maps` take pictures
    and strings. A picture is a path, a PIL image or a uint8 array (H, W, 3), and several are a sequence of these,
    mixed. They are decoded batch by batch, so that the host's memory does not grow with their pixels, and turned
    upright by their EXIF orientation, see `pictures.Pictures`; more than a few batches show their progress on stderr.
    Pictures that cannot be used end the call with `BrokenImages`, a ValueError that knows all of them; a model without
    the part that is asked for raises ValueError.

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
        mode = self._checked_mode(mode)
        pictures, texts = Pictures(images), _as_list(texts)
        scores = np.empty((len(pictures), len(texts)), np.float32)
        if not scores.size:
            return scores
        blocks = self._encoder.blocks(self._encoder.texts(self.params, self.tokenize(texts)))
        local = mode == "conditioned"

        def batches():
            for numbers, image in self._encoder.images(self.params, self._fitted(pictures), local=local):
                yield numbers, [self._encoder.apply(MODES[mode], self.params, image, block) for block in blocks]

        for numbers, parts in features.lookahead(batches()):
            found = np.concatenate([np.asarray(part) for part in parts], axis=-1)[: len(numbers), ..., : len(texts)]
            scores[numbers] = found.max(axis=1) if mode == "regions" else found
        return scores / np.exp(np.float32(self.params["logit_scale"]))

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
        if top_k < 1:
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
        pictures, (classes, tokens, owner) = Pictures(images), self._prompts(class_names, templates)
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
        image: Picture,
        class_names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = TEMPLATES,
        *,
        mode: str | None = None,
        short_side: float | None = SHORT_SIDE,
        whole_image: bool = False,
    ) -> np.ndarray:
        """The class of every pixel, int32 (H, W) at the picture's own size; -1 where several share the best score.

        Every patch is compared with every class, see `evaluators.Segmentation`.

        Args:
          image: one picture, see the class.
          class_names, templates: as for `classify`. Every pixel gets one of them: name what else is in the picture.
          mode: "projected": the projected patches, FLAIR's published way. "value": what the pooling makes of each
            patch. "attention": the weight that it gives each patch. None: projected.
          short_side: of the resized picture, in sides of the model's images; None: the picture keeps its size.
          whole_image: whether the model takes the whole picture with resized position embeddings, instead of windows.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> PIL.Image.open("fox.jpg").size
          (80, 60)
          >>> model.segment("fox.jpg", ["fox", "snow", "sky"]).shape
          (60, 80)
        """
        pictures, (classes, tokens, owner) = Pictures(image), self._prompts(class_names, templates)
        if len(pictures) != 1:
            raise ValueError(f"there are {len(pictures)} images; segment takes one at a time")
        self._check_local("segmentation")
        available = segmentation.MODES if self.model.has_pooling else ("projected",)
        mode = available[0] if mode is None else mode
        if mode not in available:
            raise ValueError(f"mode is {mode!r}; this model segments by {' or '.join(available)}")
        try:
            pixels = np.asarray(pictures[0])
        except (SampleError, OSError) as error:
            raise features.BrokenImages({0: str(error)}) from error
        unlabelled = np.broadcast_to(np.uint8(segmentation.IGNORE), pixels.shape[:2])
        data = SegmentationSet("picture", classes, [pixels], [unlabelled], tokens, owner)
        options = dict(modes=[mode], short_side=short_side, whole_image=whole_image, **_BATCHES)
        with _showing_progress():
            task = Segmentation(self.model, data, preprocess=self.model.preprocessing, **options)
            ((_, found),) = task.masks(self.params)
        mask = found[mode].astype(np.int32)
        return np.where(mask == segmentation.UNDECIDED, -1, mask)

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
        fitted, tokens = self._some(images, texts)
        with _showing_progress():
            return attention_maps.heat_maps(
                self.model, self.params, fitted, tokens, preprocess=self.model.preprocessing, heads=heads
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
        fitted, tokens = self._some(images, texts)
        with _showing_progress():
            return attention_maps.patch_similarity(
                self.model, self.params, fitted, tokens, preprocess=self.model.preprocessing, mode=mode
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
        fitted, texts = self._fitted(Pictures(images)), _as_list(texts)
        if not len(fitted):
            return []
        unit = np.zeros((0, self.model.embed_dim), np.float32)
        if texts:
            text = self._encoder.texts(self.params, self.tokenize(texts))
            unit = np.asarray(layers.normalize(text.pooled), np.float32)
        found = {}
        for numbers, image in self._encoder.images(self.params, fitted, local=False):
            cosines = np.asarray(layers.normalize(image.regions), np.float32) @ unit.T  # (B, Q, N)
            corners = np.asarray(boxes.corners(image.boxes))  # (B, Q, 4), shares
            height, width = self.model.image_size
            for row, number in enumerate(numbers.tolist()):
                pixels = corners[row] * np.float32([width, height, width, height])
                own = self.model.preprocessing.unfit_boxes(pixels, fitted.sizes[number], (height, width))
                found[number] = Regions(own.astype(np.float32), cosines[row])
        return [found[number] for number in range(len(fitted))]

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
        fitted, _ = self._some(images, "")
        return attention_maps.query_maps(
            self.model, self.params, fitted, preprocess=self.model.preprocessing, heads=heads
        )

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
            are taken as normalised (`preprocess` gives them). B may be 0.

        Example:
          >>> model = flair_jax.load("flair.safetensors")
          >>> features = model.encode_image(model.preprocess(PIL.Image.open("fox.jpg")))
          >>> features.pooled.shape, features.local.shape
          ((1, 128), (1, 16, 128))

        Raises:
          TypeError: another dtype. ValueError: another shape.
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

    def _some(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> tuple[Fitted, np.ndarray]:
        """Pictures for the model and tokens of texts. Raises ValueError: there are none."""
        fitted, texts = self._fitted(Pictures(images)), _as_list(texts)
        if not len(fitted) or not texts:
            raise ValueError(f"there are {len(fitted)} images and {len(texts)} texts; expected at least one of each")
        return fitted, self.tokenize(texts)

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
            return "conditioned" if self.model.has_pooling else "global"
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
        return images.astype(np.float32)

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


def _as_list(texts: str | Sequence[str]) -> list[str]:
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
