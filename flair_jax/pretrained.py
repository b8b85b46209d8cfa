"""Checkpoints of every kind -> parameters, and models to use from Python."""

import argparse
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import SingleDeviceSharding

from flair_jax import checkpoint, initialize, lora, models, state
from flair_jax.config import flatten as config_flat
from flair_jax.config import normalize
from flair_jax.convert import flax_files, hub, hugging_face, lora_files, names, released
from flair_jax.convert.tables import flatten
from flair_jax.inference import Pretrained
from flair_jax.models.vision import grid


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


def initial_params(config: Mapping[str, Any], fresh: Any) -> Any:
    """The parameters of `init_from`; with `init_resized` those of the same model for other sizes of images and
    texts, with `init_partial` those of any other model too, see `initialize.combine`.

    Args:
      config: of the run.
      fresh: its model's own parameters.

    Raises:
      ValueError: the weights do not fit, by what these two allow.
    """
    if not config["init_partial"] and not config["init_resized"]:
        return read(config["init_from"], config["model"])[0]
    loaded, section = read(config["init_from"], gelu=config["model"].get("gelu", "exact"))
    if config["init_resized"]:
        flax_files.check_same_model(initialize.resized(section, config["model"]), config["model"], config["init_from"])
    towers = (model["vision"] for model in (config["model"], section))
    grids = (None if tower is None else grid(tower["image_size"], tower["patch_size"]) for tower in towers)
    params, origins = initialize.combine(fresh, loaded, *grids)
    if jax.process_index() == 0:
        print(f"{config['init_from']}: {initialize.table(origins)}", flush=True)
    return params


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
) -> Pretrained:
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


def add_options(parser: argparse.ArgumentParser, absent: str | None = None) -> None:
    """Gives a command the options `--checkpoint` and `--gelu`, of `load`.

    Args:
      parser: of the command.
      absent: what it uses without `--checkpoint`; None: the option is required.
    """
    what = "what flair_jax.load takes: a file, a workdir, a name"
    what += "" if absent is None else f"; absent: {absent}"
    parser.add_argument("--checkpoint", required=absent is None, help=what)
    parser.add_argument("--gelu", choices=names.GELU, help="where the checkpoint does not say it")
