"""Weights by name: files on Hugging Face's hub, fetched once, converted once and kept as safetensors.

    hf://OWNER/REPO/FILE            a file, such as hf://xiaorui638/flair/flair-cc3m-recap.pt
    hf://OWNER/REPO                 config.json and the weights beside it, as `transformers` writes them
    hf://OWNER/REPO@REVISION/…      of a branch, tag or commit
    flair-cc3m-recap                one of `NAMES`

`huggingface_hub` does the fetching: its cache, HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold here too.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from flair_jax.convert import flax_files

PREFIX = "hf://"
NAMES = {
    **{
        name: f"hf://xiaorui638/flair/{name}.pt"
        for name in ("flair-cc3m-recap", "flair-cc12m-recap", "flair-yfcc15m-recap", "flair-merged30m")
    },
    "clip-vit-base-patch32": "hf://openai/clip-vit-base-patch32",
    "clip-vit-base-patch16": "hf://openai/clip-vit-base-patch16",
    "clip-vit-large-patch14": "hf://openai/clip-vit-large-patch14",
    "clip-vit-large-patch14-336": "hf://openai/clip-vit-large-patch14-336",
}
# FSC-CLIP's twelve, by the names of its training scripts; https://github.com/ytaek-oh/fsc-clip, model zoo.
_FSC_CLIP = {
    "fsc-clip-coco": "coco_fsc-clip-ViT-B-32",
    "fsc-clip-lora-coco": "coco_fsc-clip-lora-ViT-B-32",
    "fsc-clip-cc3m": "cc3m_fsc-clip-ViT-B-32",
    "fsc-clip-lora-cc3m": "cc3m_fsc-clip-lora-ViT-B-32",
    "fsc-clip-laioncoco": "laioncoco_fsc-clip-ViT-B-32",
    "fsc-clip-lora-laioncoco": "laioncoco_fsc-clip-lora-ViT-B-32",
    "fsc-clip-vitb16-laioncoco": "laioncoco_fsc-clip-ViT-B-16",
    "fsc-clip-lora-vitb16-laioncoco": "laioncoco_fsc-clip-lora-ViT-B-16",
    "fsc-clip-vitl14-laioncoco": "laioncoco_fsc-clip-ViT-L-14",
    "fsc-clip-lora-vitl14-laioncoco": "laioncoco_fsc-clip-lora-ViT-L-14",
    "fsc-clip-dcxl-laioncoco": "dcxl_fsc-clip-ViT-B-32",
    "fsc-clip-lora-dcxl-laioncoco": "dcxl_fsc-clip-lora-ViT-B-32",
}
NAMES |= {name: f"hf://ytaek-oh/fsc-clip/{file}.pt" for name, file in _FSC_CLIP.items()}
# The activation of weights whose files do not say it: OpenAI's, but for the two that began with DataComp's.
GELUS = {name: "exact" if "-dcxl-" in name else "quick" for name in _FSC_CLIP}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder, the first that is there
_URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")


class HubError(OSError):
    """Weights that could not be fetched. The message says what was asked for, and what to do."""


class Address(NamedTuple):
    """A file or, where `file` is None, the weights of a repository; `revision` None: its main branch."""

    repository: str
    revision: str | None
    file: str | None


def is_name(path: Any) -> bool:
    """Whether a text is an address on the hub or one of `NAMES`, of which no file or folder of that name exists."""
    return isinstance(path, str) and (path.startswith(PREFIX) or (path in NAMES and not os.path.exists(path)))


def parse(name: str) -> Address:
    """What a name means. Raises ValueError if it is no address."""
    match = _URL.fullmatch(NAMES.get(name, name))
    if match is None or (match[3] and ".." in match[3].split("/")):
        raise ValueError(f"{name!r} is no address on the hub; expected hf://OWNER/REPO[@REVISION][/FILE]")
    return Address(*match.groups())


def fetch(name: str) -> Path:
    """The file or folder of a name on this disk, downloaded if it is not in the cache of `huggingface_hub` yet.

    Raises:
      HubError: there is no network, repository, revision or file, or no access to it, or the download broke.
      ValueError: see `parse`.
    """
    address = parse(name)
    if address.file is not None:
        return _download(name, address, address.file)
    folder = _download(name, address, "config.json").parent
    for weights in WEIGHTS:
        with contextlib.suppress(_Missing):
            _download(name, address, weights)
            return folder
    raise HubError(f"{name}: {address.repository} has neither of {', '.join(WEIGHTS)}")


def kept(name: str, model: Mapping[str, Any] | None = None, gelu: str | None = None) -> Path:
    """The weights of a name as a .safetensors file of `flax_files`, converted when they are asked for first.

    Args:
      name: see the top of this module.
      model: the `model` section, for weights whose shapes do not tell it.
      gelu: the activation, where the file does not say it.

    Raises:
      HubError, ValueError: see `fetch`. ConversionError, WeightsFileError, ImportError: see `flax_files.load`.
    """
    source, gelu = fetch(name), gelu or GELUS.get(name)
    folder = huggingface_hub.cached_assets_path("flair_jax", namespace="weights", subfolder="flax")
    # A snapshot's folder bears the number of the commit: another version is another file.
    snapshot = source if source.is_dir() else source.parent
    parts = (parse(name).repository, *snapshot.parts[-1:], "" if source.is_dir() else source.name, gelu or "")
    target = folder / ("--".join(filter(None, parts)).replace("/", "--") + ".safetensors")
    if not target.exists():
        params, section = flax_files.load(source, model, gelu)
        flax_files.write(target, params, section)
    return target


class _Missing(HubError):
    """The repository is there and the file is not."""


def _download(name: str, address: Address, file: str) -> Path:
    with _explained(name, address, file):
        endpoint = os.environ.get("HF_ENDPOINT")  # as it is now, not as it was when huggingface_hub was imported
        found = huggingface_hub.hf_hub_download(
            address.repository, file, revision=address.revision, endpoint=endpoint, library_name="flair_jax"
        )
    return Path(found)


@contextlib.contextmanager
def _explained(name: str, address: Address, file: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into an error that says what to do."""
    from huggingface_hub import errors  # slow to import: they need the HTTP client, and few runs fetch anything

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{name}: {address.repository} asks for consent on its page; then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: no repository {address.repository}, or it is private and HF_TOKEN is not set"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name}: {address.repository} has no revision {address.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:  # before EntryNotFoundError, which it is too
        raise HubError(
            f"{name}: {file} is not in the cache, and the hub is out of reach (no network, or HF_HUB_OFFLINE is set). "
            "Fetch it where there is a network and give its path"
        ) from error
    except errors.EntryNotFoundError as error:
        raise _Missing(f"{name}: {address.repository} has no file {file}") from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise HubError(f"{name}: {file} was not fetched: {error}") from error
