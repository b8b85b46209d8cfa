"""Publishes a model: the work directory of a run becomes a folder for Hugging Face's hub, and is uploaded if asked for.

    python -m flair_jax.push RUN FOLDER --license mit
    python -m flair_jax.push RUN FOLDER --license mit --repository OWNER/NAME

FOLDER then has `model.safetensors`, `config.json` (the `model` section, and the whole config of the run) and
`README.md`, the model card: how to load it, the report of RUN without its pictures, and the training command.
`flair_jax.load(FOLDER)` and, once it is uploaded, `flair_jax.load("hf://OWNER/NAME")` read it. Of a run with early
stopping it is the best checkpoint.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
from huggingface_hub import errors

from flair_jax import checkpoint, pretrained
from flair_jax.convert import flax_files
from flair_jax.convert.__main__ import describe
from flair_jax.convert.hugging_face import CONFIG
from flair_jax.train import BEST
from flair_jax.untrained import looks_untrained

CARD = "README.md"
FILES = {flax_files.FOLDER_FILE, CONFIG, CARD}
# How a model is used, by the vocabulary of the hub.
PIPELINE = "zero-shot-image-classification"


def write(run: str | os.PathLike, folder: str | os.PathLike, licence: str) -> Path:
    """Writes the folder of a work directory.

    Args:
      run: a work directory; of one with a folder `best` the weights are those.
      folder: is made; may hold what an earlier call has written.
      licence: of the weights, by the hub's identifiers, such as "mit" or "cc-by-nc-4.0".

    Returns:
      The folder.

    Raises:
      ValueError: the weights look untrained, or the folder holds something else.
      FileNotFoundError: there is no checkpoint, see `pretrained.read`.
    """
    run, folder = Path(run).expanduser(), Path(folder).expanduser()
    if folder.exists() and (others := sorted(path.name for path in folder.iterdir() if path.name not in FILES)):
        raise ValueError(f"{folder} holds {', '.join(others[:5])}, which would be uploaded too; give another folder")
    weights = run / BEST if (run / BEST / "checkpoints").is_dir() else run
    params, section = pretrained.read(weights)
    if problems := looks_untrained(params):
        raise ValueError(f"{weights} is not published: {'; '.join(problems)}")
    saved = checkpoint.Checkpoints(weights, keep=None)
    step = saved.latest()
    config = saved.config(step)
    saved.close()
    folder.mkdir(parents=True, exist_ok=True)
    flax_files.write(folder / flax_files.FOLDER_FILE, jax.device_get(params), section)
    about = {"model_type": "flair_jax", "library_name": "flair_jax", "model": section, "run": config}
    (folder / CONFIG).write_text(json.dumps(about, indent=2, default=dict) + "\n", encoding="utf-8")
    count = sum(x.size for x in jax.tree.leaves(params))
    (folder / CARD).write_text(card(run, folder.name, section, count, step, licence), encoding="utf-8")
    return folder


def card(run: Path, name: str, section: Mapping[str, Any], parameters: int, step: int, licence: str) -> str:
    """The model card, Markdown after the hub's front matter.

    Args:
      run: a work directory, whose report.md and command.txt count where they are there.
      name: of the model.
      section: its `model` section.
      parameters, step: numbers.
      licence: see `write`.
    """
    parts = [
        "---",
        f"license: {licence}",
        "library_name: flair_jax",
        f"pipeline_tag: {PIPELINE}",
        f"tags: [flair_jax, jax, {section['name']}]",
        "---",
        f"# {name}",
        "",
        f"{describe(section)}. {parameters:,} parameters, after {step:,} training steps.",
        "",
        "```python",
        "import flair_jax",
        "",
        f'model = flair_jax.load("{name}")  # this folder, or its name on the hub, "hf://OWNER/NAME"',
        "```",
        "",
    ]
    if (command := run / "command.txt").is_file():
        text = command.read_text(encoding="utf-8").strip()
        parts += ["## Training", "", "```shell", text, "```", "", f"`{CONFIG}` has the whole config.", ""]
    if (report := run / "report.md").is_file():
        lines = report.read_text(encoding="utf-8").splitlines()
        # Pictures may show images of others, and are not published; headings go one level down.
        lines = [re.sub("^#", "##", line) for line in lines if not line.startswith("![")]
        parts += ["## Evaluation", "", *lines, ""]
    return "\n".join(parts)


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads a folder of `write`; the token is HF_TOKEN or that of `hf auth login`.

    Returns:
      The page's address.

    Raises:
      OSError: the hub did not take it.
    """
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="flair_jax")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=sorted(FILES))
    except (errors.HTTPError, errors.HFValidationError) as error:
        raise OSError(f"{repository} was not uploaded; {folder} is whole. The cause: {error}") from error
    return str(address)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flair_jax.push", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="work directory of a run")
    parser.add_argument("folder", metavar="FOLDER", help="is written, for the hub and for flair_jax.load")
    parser.add_argument("--license", required=True, help="of the weights, as the hub names it, such as mit")
    parser.add_argument(
        "--repository", metavar="OWNER/NAME", help="upload there; without it nothing leaves this machine"
    )
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    options = parser.parse_args(arguments)
    try:
        folder = write(options.run, options.folder, options.license)
        print(f"{folder}: {', '.join(sorted(FILES))}; look at {folder / CARD} before you publish it")
        if options.repository:
            print(upload(folder, options.repository, options.private))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
