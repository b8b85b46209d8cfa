"""Checkpoints as objects to use from Python: search, compare, and see where a text looks."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from PIL import Image

from flair_jax import checkpoint, models, state
from flair_jax.convert import flax_files
from flair_jax.data.transforms import images as image_rules
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.models.flair import ImageFeatures, TextFeatures
from flair_jax.models.text import Text


def read(path: str | os.PathLike, model: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads parameters from wherever they are.

    Args:
      path: a work directory of a run (its newest checkpoint, the average of the parameters where the run keeps one),
        a .safetensors file of either side, or a .pt file.
      model: the `model` section; None: the one stored with the weights, or told by the shapes of a PyTorch file.

    Returns:
      The parameter tree, float32, and the `model` section.

    Raises:
      FileNotFoundError: nothing is there. ValueError: it holds no FLAIR, or one of another size.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path}: no such file or work directory")
    if not folder.is_dir():
        return flax_files.load(path, model)
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{path}: a work directory holds a folder 'checkpoints', and this one does not")
    saved = checkpoint.Checkpoints(folder, keep=None)
    step = saved.latest()
    if step is None:
        raise FileNotFoundError(f"{saved.folder}: no whole checkpoint in it")
    model = saved.config(step)["model"] if model is None else model
    device = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(functools.partial(state.init_params, models.create(model), seed=0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params = saved.weights(step, like)
    saved.close()
    return params, dict(model)


def load(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> "Pretrained":
    """Loads a model.

    Args:
      path, config: `path` and `model` of `read`.
    """
    params, model = read(path, config)
    return Pretrained(model, params)


class Pretrained:
    """A model with its parameters. Methods take and give arrays and are compiled once a shape.

    Args:
      config: the `model` section.
      params: its parameters.

    Attributes:
      config, params: as given, the parameters on the default device.
      model: the Linen module.
    """

    def __init__(self, config: Mapping[str, Any], params: Any):
        self.config = config
        self.model = models.create(config)
        self.params = jax.device_put(params)
        self._tokenizer = Tokenizer(self.model.context_length)

    def preprocess(self, images: Sequence[Image.Image] | Image.Image) -> np.ndarray:
        """Images of any size and mode -> (B, H, W, 3) float32, as the reference evaluates them.

        Each is resized to just cover the model's image size, cropped in the centre, made RGB and normalised with CLIP's
        mean and deviation. Its EXIF orientation is ignored, as the reference ignores it: turn a photograph upright
        beforehand (`PIL.ImageOps.exif_transpose`) where the model was trained on upright ones (`data.upright`).
        """
        images = [images] if isinstance(images, Image.Image) else images
        pixels = [image_rules.evaluation_crop(image, self.model.image_size) for image in images]
        return image_rules.normalize(np.stack(pixels))

    def tokenize(self, texts: Sequence[str] | str) -> np.ndarray:
        """Texts -> (N, T) int32; what does not fit the context is cut off."""
        return self._tokenizer(texts)

    def encode_image(self, images: np.ndarray) -> ImageFeatures:
        """(B, H, W, 3) -> `pooled` (B, D) and `local` (B, L, D), projected and not normalised."""
        return _apply(self.model, "encode_image", self.params, images)

    def encode_text(self, texts: np.ndarray) -> TextFeatures:
        """(N, T) -> `pooled` (N, D) and `local` (N, T, D), projected and not normalised."""
        return _apply(self.model, "encode_text", self.params, Text.padded(jnp.asarray(texts)))

    def get_logits(self, images: np.ndarray, texts: np.ndarray) -> jax.Array:
        """Text-conditioned logits of every image with every text, bias included: (B, N) float32."""
        return self._pairs("score", images, texts) + self.params["logit_bias"]

    def get_logits_as_clip(self, images: np.ndarray, texts: np.ndarray) -> jax.Array:
        """Logits of the pooled features, without the bias as in the reference: (B, N) float32."""
        return self._pairs("global_score", images, texts)

    def attention_maps(self, images: np.ndarray, texts: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Attention of each head over the patches (B, N, H, L), and the zero key's mass (B, N, H)."""
        return self._pairs("attention_maps", images, texts)

    def save(self, path: str | os.PathLike) -> None:
        """Writes parameters and config as one .safetensors file, which `load` and `flair_jax.convert` read."""
        flax_files.write(path, jax.device_get(self.params), self.config)

    def _pairs(self, method, images, texts):
        return _apply(self.model, method, self.params, self.encode_image(images), self.encode_text(texts))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model, method, params, *args):
    return model.apply({"params": params}, *args, method=method)
