"""A local page to try a model on: a picture and texts -> scores, heat maps, segmentation, regions; search in a folder.

    python -m flair_jax.demo --checkpoint flair-cc3m-recap
    python -m flair_jax.demo --checkpoint runs/mine --index ~/photographs
    python -m flair_jax.demo                      # a small model of drawn scenes, trained here if it is not there yet

The page is at http://127.0.0.1:7860, for this machine alone unless `--host` says otherwise. It needs no network.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from flair_jax import pretrained, search
from flair_jax.checkpoint import Checkpoints
from flair_jax.data.counted import counted

DURATION = "7 to 10 minutes on two CPU cores"


def kept_scenes() -> pathlib.Path:
    """The work directory of the scenes model that is kept from start to start, below XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "flair_jax" / "scenes"


def newest(workdir: pathlib.Path) -> tuple[int, Mapping[str, Any]] | None:
    """Step and config of the newest checkpoint of a work directory; None: there is none."""
    if not (workdir / "checkpoints").is_dir():
        return None
    saved = Checkpoints(workdir, keep=None)
    step = saved.latest()
    found = None if step is None else (step, saved.config(step))
    saved.close()
    return found


def is_trained(workdir: pathlib.Path) -> bool:
    """Whether a run of `configs/scenes.py` in `workdir` has reached its last step."""
    found = newest(workdir)
    return found is not None and found[0] >= found[1]["steps"]


def knows_scenes(checkpoint: str) -> bool:
    """Whether a checkpoint is the work directory of a run that was trained on drawn scenes."""
    found = newest(pathlib.Path(checkpoint).expanduser())
    return found is not None and found[1]["data"].get("scenes") is not None


def train_scenes(workdir: pathlib.Path, agreed: bool) -> None:
    """Trains the scenes model, or goes on with its training, if the user agrees in the terminal.

    Args:
      workdir: of the run.
      agreed: whether the user has agreed already.

    Raises:
      ValueError: the user does not agree, cannot be asked, or the training failed.
    """
    command = [sys.executable, "-m", "flair_jax.main", "--config", "scenes", "--workdir", str(workdir)]
    if not agreed:
        print("There is no --checkpoint. A small model of drawn scenes can be trained on this machine instead:")
        print(f"it takes {DURATION}, lies in {workdir}, and is there at once from the next start on.")
        if not sys.stdin.isatty():
            raise ValueError("give --checkpoint, or --yes to train the scenes model")
        try:
            answer = input("Train it now? [Y/n] ")
        except EOFError:
            answer = "no"
        if answer.strip().lower() not in ("", "y", "yes"):
            raise ValueError("without a model there is no page: give --checkpoint")
    # A process of its own: the loader's workers import the main module again, and this one is the page's.
    process, status = subprocess.Popen(command), None
    while status is None:
        with contextlib.suppress(KeyboardInterrupt):  # the training gets it too, and saves where it is
            status = process.wait()
    if status:
        raise ValueError(f"the training ended with status {status}; the same command goes on where it was")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flair_jax.demo", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    pretrained.add_options(parser, absent="the scenes model")
    parser.add_argument("--index", type=pathlib.Path, metavar="DIR", help="a folder of photographs to search in")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (%(default)s); 0.0.0.0: all")
    parser.add_argument("--port", type=int, help="absent: the first free one from 7860")
    parser.add_argument("--yes", action="store_true", help="train the scenes model without asking, where it is missing")
    options = parser.parse_args(arguments)
    # Uploads lie in a folder that other users of the machine cannot read, and that goes away. gradio reads the variable
    # when it is imported.
    with tempfile.TemporaryDirectory(prefix="flair_jax_demo_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            run(options)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print()
    return 0


def run(options: argparse.Namespace) -> None:
    """Loads the model, brings the index up to date, and serves the page until SIGINT comes."""
    try:
        from flair_jax.demo import page
    except ImportError as error:
        raise ImportError(f"the page needs gradio ({error}): pip install 'flair_jax[demo]'") from error
    checkpoint = options.checkpoint
    if checkpoint is None:
        workdir = kept_scenes()
        if not is_trained(workdir):
            train_scenes(workdir, options.yes)
        checkpoint = str(workdir)
    model = pretrained.load(checkpoint, gelu=options.gelu)
    index = None
    if options.index is not None:
        index = search.Index.open(options.index, model, checkpoint=checkpoint)
        skipped = f"{counted(len(index.update().skipped), 'file')} skipped"
        if not len(index):
            raise ValueError(f"{options.index} has no picture to search for; {skipped}")
        print(f"{counted(len(index), 'picture')} in the index of {options.index}, {skipped}")
    title = pathlib.Path(checkpoint).name if options.checkpoint else "scenes"
    built = page.build(model, f"flair_jax: {title}", index=index, scenes=knows_scenes(checkpoint))
    with page.serve(built, options.host, options.port) as address:
        print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
