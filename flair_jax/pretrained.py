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

from flair_jax import checkpoint, lora, models, state
from flair_jax.config import flatten as config_flat
from flair_jax.config import normalize
from flair_jax.convert import flax_files, hub, hugging_face, lora_files, released
from flair_jax.convert.tables import flatten
from flair_jax.data.transforms.tokenizer import Tokenizer
from flair_jax.evaluators.features import Encoder
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.models.text import Text

IMAGE_BATCH, TEXT_BATCH = 64, 512  # images, rows of texts


def read(
    path: str | os.PathLike,
    model: Mapping[str, Any] | None = None,
    gelu: str | None = None,
    *,
    lora_scale: float = 1.0,
) -> tuple[Any, dict[str, Any]]:
    """Reads parameters from wherever they are.

    Args:
      path: a work directory of a run (its newest checkpoint, the average of the parameters where the run keeps one),
        a .safetensors file of either side, a .pt or .bin file (a state dict, or OpenAI's archive), or a folder of
        `flair_jax.push` or of Hugging Face's with config.json and model.safetensors; or a name on the hub, see
        `convert.hub`.
      model: the `model` section; None: the one stored with the weights, or that of the published model
        whose widths a PyTorch file has.
      gelu: "quick" or "exact", where neither the file nor `model` says it: state dicts of CLIP do not.
      lora_scale: of a run with `lora`, see `Checkpoints.weights`, or of a file of FSC-CLIP's, see `released.read`.

    Returns:
      The parameter tree, float32, and the `model` section.

    Raises:
      FileNotFoundError: nothing is there.
      HubError: weights on the hub could not be fetched.
      ValueError: it holds no such model, one of another size or with another `model` section, a number is not finite,
        or nobody says which GELU the model has.
      TypeError: `path` is no path or `model` no mapping.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}; expected a file or work directory, as text or path")
    if not (model is None or isinstance(model, Mapping)):
        raise TypeError(f"model is a {type(model).__name__}; expected a `model` section, a mapping, or None")
    given = None if model is None else normalize(model)
    path = hub.kept(path, given, gelu) if hub.is_name(path) else path
    folder = epath.Path(path).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"{path}: no such file or work directory")
    if not folder.is_dir() and lora_files.is_lora(folder):
        raise ValueError(
            f"{path} holds LoRA's changes alone; flair_jax.load({str(path)!r}, pretrained=PATH) adds them to the "
            "weights that they are of"
        )
    has_checkpoints = (folder / "checkpoints").is_dir()
    if not folder.is_dir() or (not has_checkpoints and hugging_face.is_folder(folder)):
        params, found = flax_files.load(folder, given, gelu, lora_scale=lora_scale)
        return params, normalize(found)
    if not has_checkpoints:
        raise FileNotFoundError(
            f"{path}: a work directory holds a folder 'checkpoints', a folder of Hugging Face's a config.json; "
            "this one has neither"
        )
    saved = checkpoint.Checkpoints(folder, keep=None)
    step = saved.latest()
    if step is None:
        raise FileNotFoundError(f"{saved.folder}: no whole checkpoint in it")
    stored = saved.config(step)["model"]
    if given is not None:
        flax_files.check_same_model(stored, given, saved.folder / str(step))
    flax_files.check_same_gelu(stored.get("gelu", "exact"), gelu, saved.folder / str(step))
    found = stored if given is None else given
    device = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(functools.partial(state.init_params, models.create(found), seed=0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params = saved.weights(step, like, lora_scale=lora_scale)
    saved.close()
    flax_files.refuse_not_finite(flatten(jax.device_get(params)), saved.folder / str(step))
    return params, found


def model_of(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """The `model` section of a config that has none of a whole model, but changes of that of its weights.

    Args:
      config: the whole config; keys of its `model` section that are None stay as the weights say.
      workdir: its newest checkpoint counts, where there is one, and then `init_from`.

    Raises:
      ValueError, FileNotFoundError: there are no weights; see `read`.
    """
    changes = {key: value for key, value in config_flat(config["model"]).items() if value is not None}
    saved = checkpoint.Checkpoints(workdir, keep=None) if (epath.Path(workdir) / "checkpoints").is_dir() else None
    latest = None if saved is None else saved.latest()
    if latest is not None:
        section = saved.config(latest)["model"]
    elif config["init_from"]:
        section = read(config["init_from"], gelu=changes.get("gelu"))[1]
    else:
        raise ValueError("config.model has no name, and so is the model of the weights: set config.init_from")
    section = dict(section)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = section
        for parent in parents:
            node[parent] = dict(node[parent] or {})
            node = node[parent]
        node[last] = value
    return section


def read_fine_tuned(
    path: str | os.PathLike,
    pretrained: str | os.PathLike | None,
    wise_ft: float = 1.0,
    model: Mapping[str, Any] | None = None,
    gelu: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Reads fine-tuned weights, or some way from the pretrained ones to them (WiSE-FT, Wortsman et al., CVPR 2022).

    Args:
      path: as for `read`, or a `lora.safetensors`, the changes of a run with `lora` alone.
      pretrained: what was fine-tuned, as for `read`; a work directory of a run with `lora` holds it itself, and so does
        a checkpoint that FSC-CLIP's code saved of such a run.
      wise_ft: 1: the fine-tuned weights; 0: the pretrained ones; between them (1 - wise_ft) * pretrained + wise_ft *
        fine-tuned. With LoRA both matrices of a pair are multiplied by it, as in FSC-CLIP's code, and so the change of
        a weight by its square.
      model, gelu: as for `read`.

    Returns:
      As `read`.

    Raises:
      ValueError: as `read`; the pretrained weights are needed, or are those of another model; or there is no such
        share.
    """
    if not 0 <= wise_ft <= 1:
        raise ValueError(f"wise_ft is {wise_ft}; expected a share of the way, 0 <= wise_ft <= 1")
    if hub.is_name(path):
        gelu, path = gelu or hub.GELUS.get(path), hub.fetch(path)
    path = epath.Path(path).expanduser()
    if _holds_pairs_and_weights(path):
        return read(path, model, gelu, lora_scale=wise_ft)
    if pretrained is None:
        raise ValueError(f"{path} needs the weights that were fine-tuned: give pretrained=PATH")
    before, found = read(pretrained, model, gelu)
    if not path.is_dir() and lora_files.is_lora(path):
        pairs, section, options = lora_files.read(path)
        flax_files.check_same_model(section, found, path)
        return lora.merge(before, lora.scale(pairs, wise_ft), lora.LoraOptions.of(options)), found
    after, _ = read(path, found)
    return lora.interpolate(before, after, wise_ft), found


def _holds_pairs_and_weights(path: epath.Path) -> bool:
    """Whether it is the work directory of a run with LoRA, or a checkpoint that FSC-CLIP's code saved of one."""
    if path.is_file():
        return not lora_files.is_lora(path) and released.has_pairs(path)
    if not (path / "checkpoints").is_dir():
        return False
    saved = checkpoint.Checkpoints(path, keep=None)
    step = saved.latest()
    found = step is not None and saved.config(step).get("lora") is not None
    saved.close()
    return found


def load(
    path: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    *,
    pretrained: str | os.PathLike | None = None,
    wise_ft: float = 1.0,
    gelu: str | None = None,
) -> "Pretrained":
    """Loads a model; from a checkpoint of one tower alone, that tower.

        flair_jax.load("RUN/lora.safetensors", pretrained="ViT-B-32.pt").save("merged.safetensors")

    Args:
      path, config, gelu: `path`, `model` and `gelu` of `read`.
      pretrained, wise_ft: of fine-tuned weights, see `read_fine_tuned`.
    """
    if pretrained is None and wise_ft == 1.0:
        params, model = read(path, config, gelu)
    else:
        params, model = read_fine_tuned(path, pretrained, wise_ft, config, gelu)
    return Pretrained(model, params)


class Pretrained:
    """A model with its parameters. Methods take and give arrays, work in batches over all devices of the mesh, as the
    evaluators do, and are compiled once per shape.

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
        self._encoder = Encoder(self.model, self.model.preprocessing, image_batch=IMAGE_BATCH, text_batch=TEXT_BATCH)
        self.params = self._encoder.place(params)

    def preprocess(self, images: Sequence[Image.Image] | Image.Image) -> np.ndarray:
        """Images of any size and mode -> (B, H, W, 3) float32, as the reference evaluates them.

        Each is brought to the model's image size as its `config.model.preprocess` says, made RGB and normalised: with
        "crop" and "openai" it is resized to just cover that size, cropped in the centre and normalised with CLIP's mean
        and deviation. Its EXIF orientation is ignored, as the reference ignores it: turn a photograph upright
        beforehand (`PIL.ImageOps.exif_transpose`) where the model was trained on upright ones (`data.upright`).

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
        """Texts -> (N, T) int32; what does not fit the context is cut off."""
        return Tokenizer(self.model.context_length)(texts)

    def encode_image(self, images: np.ndarray) -> ImageFeatures:
        """Images -> `pooled` (B, D) and `local` (B, L, D), projected and not normalised.

        Args:
          images: (B, H, W, 3) of the model's size: uint8 pixels, which are normalised as in training, or floats, which
            are taken as normalised (`preprocess` gives them). B may be 0.

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
        """Text-conditioned logits of every image with every text, bias included: (B, N) float32."""
        return self._pairs("score", images, texts) + self.params.get("logit_bias", 0.0)

    def get_logits_as_clip(self, images: np.ndarray, texts: np.ndarray) -> jax.Array:
        """Logits of the pooled features, without the bias as in the reference: (B, N) float32."""
        return self._pairs("global_score", images, texts)

    def attention_maps(self, images: np.ndarray, texts: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Attention of each head over the patches (B, N, H, L), and the zero key's mass (B, N, H)."""
        return self._pairs("attention_maps", images, texts)

    def save(self, path: str | os.PathLike) -> None:
        """Writes parameters and config as one .safetensors file, which `load` and `flair_jax.convert` read."""
        flax_files.write(os.path.expanduser(path), jax.device_get(self.params), self.config)

    def _pairs(self, method: str, images: np.ndarray, texts: np.ndarray) -> Any:
        return self._encoder.apply(method, self.params, self.encode_image(images), self.encode_text(texts))

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
