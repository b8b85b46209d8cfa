"""python -m flair_jax.convert: weights from PyTorch to Flax, back, and a look at what a file holds."""

import argparse
import collections
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flair_jax.convert import flax_files, hub, hugging_face, names, released, torch_files
from flair_jax.convert.tables import KINDS, Arrays, ConversionError, Side

PUBLISHED = {150_674_434: "ViT-B-16-FLAIR"}
# Without --model-config; see names.infer_config.
GUESSED = (
    "the file does not say its heads and image size: heads are taken from the published model of these widths, the "
    "image as square; --model-config tells others"
)
WIDTH = 14  # of the first column of `check`


def to_flax(source: Path, target: Path, model: Mapping[str, Any] | None, gelu: str | None) -> None:
    """PyTorch's names -> one .safetensors of Flax paths with the `model` section in its metadata."""
    if is_flax(source):
        raise torch_files.WeightsFileError(f"{source} holds Flax parameters already")
    weights = released.read(source)
    params, found = flax_files.from_torch(weights, source, model, gelu)
    flax_files.write(target, params, found)
    print(f"{target}: {describe(found)}")
    if model is None and weights.section is None:
        print(f"note: {GUESSED}", file=sys.stderr)


def to_torch(source: Path, target: Path, layout: str) -> None:
    """The file of `to_flax` -> PyTorch's names, .safetensors or a pickle by the suffix of the target."""
    params, model = load_flax(source, "to-torch")
    torch_files.write(target, names.to_torch(params, model["name"], layout))
    print(f"{target}: {describe(model)}")


def to_hf(source: Path, target: Path) -> None:
    """The file of `to_flax` -> a folder for `from_pretrained` of Hugging Face's transformers."""
    params, model = load_flax(source, "to-hf")
    hugging_face.write(target, params, model)
    print(f"{target}: {describe(model)}")


def load_flax(source: Path, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and `model` section of a file of `to_flax`.

    Raises:
      WeightsFileError: it is something else.
    """
    if source.is_dir():
        raise torch_files.WeightsFileError(
            f"{source} is a folder; {command} reads the .safetensors that to-flax writes"
        )
    if not flax_files.is_flax(source):
        raise torch_files.WeightsFileError(f"{source} holds no Flax parameters; {command} reads what to-flax writes")
    return flax_files.load(source)


def is_flax(source: Path) -> bool:
    return not source.is_dir() and flax_files.is_flax(source)


def check(source: Path, model: Mapping[str, Any] | None, gelu: str | None) -> bool:
    """Prints what a file holds and everything that is wrong with it; True if nothing is."""
    side: Side = "flax" if is_flax(source) else "torch"
    origin, pairs = "as given", 0
    if side == "flax":
        arrays, stored = flax_files.read(source)
        model, origin = (stored, "as the file says") if model is None else (model, "as given")
        table = names.table(model.get("name", "flair"), towers=names.section_towers(model))
    else:
        weights = released.read(source)
        arrays, gelu, pairs = weights.arrays, gelu or weights.gelu, weights.pairs
        if model is None and weights.section is not None:
            model, origin = weights.section, "as config.json says"
        table = names.recognize(arrays) if model is None else names.table_of(arrays, model.get("name", "flair"), model)
    problems = table.find_problems(arrays, side, model)
    note = "unknown: see below"
    if model is None and not problems:
        try:
            model = names.infer_config(arrays, table.model, gelu)
            origin = "from the shapes; image square, heads of the published model"
        except ConversionError as error:
            note = f"unknown: {error}"
    bad = {name: count for name, array in arrays.items() if (count := flax_files.not_finite(array))}

    row("file", source)
    kind = "Flax paths" if side == "flax" else f"PyTorch names of {table.layout}"
    row("kind", f"{kind}, {source.suffix or 'folder'}")
    row("model", note if model is None else f"{describe(model)} ({origin})")
    row("tensors", f"{len(arrays):,}")
    if pairs:
        row("LoRA", f"{pairs} pairs, added to their weights")
    row("parameters", parameters(arrays))
    row("dtypes", ", ".join(f"{count} {dtype}" for dtype, count in dtypes(arrays).items()) or "-")
    row("not finite", ", ".join(f"{name}: {count:,}" for name, count in bad.items()) or 0)
    for kind in KINDS:
        row(kind, sum(problem.kind == kind for problem in problems))
    for problem in problems:
        print(f"  {problem}")
    good = model is not None and not problems and not bad
    row("result", "good" if good else "wrong")
    return good


def check_example(source: Path, image: Path) -> bool:
    """Prints the logits of the model card's example beside the published ones; True if all agree."""
    from flair_jax import published_example  # runs the model; nothing else here needs jax

    found = published_example.compare(source, image)
    print(f"\nlogits of the model card, which are of {published_example.WEIGHTS}")
    for one in found:
        apart = f"{one.ours - one.published:+9.4f}" + ("" if one.good else "  WRONG")
        print(f"{one.method:20}{one.ours:10.4f}{one.published:10.4f}{apart}  {one.text[:40]}…")
    good = all(one.good for one in found)
    agree = "agree" if good else "do not agree"
    row("example", f"ours, published and difference {agree} within {published_example.TOLERANCE}")
    return good


def row(name: str, value: Any) -> None:
    print(f"{name:{WIDTH}}{value}")


def describe(model: Mapping[str, Any]) -> str:
    """One line with the sizes of a `model` section."""
    vision, text, pooling = model["vision"], model["text"], model.get("pooling")
    parts = [f"{model['name']}, width {model['embed_dim']}"]
    if vision is not None:
        parts.append(
            f"vision {vision['image_size']} px, patch {vision['patch_size']}, {vision['depth']} x {vision['width']}, "
            f"{vision['heads']} heads"
        )
    if text is not None:
        parts.append(
            f"text {text['context_length']} of {text['vocab_size']}, {text['depth']} x {text['width']}, "
            f"{text['heads']} heads"
        )
    parts.append("no pooling" if pooling is None else f"pooling {pooling['heads']} heads")
    return "; ".join([*parts, f"{model.get('gelu', 'exact')} GELU"])


def parameters(arrays: Arrays) -> str:
    count = sum(array.size for array in arrays.values())
    return f"{count:,}" + (f", as {PUBLISHED[count]}" if count in PUBLISHED else "")


def dtypes(arrays: Arrays) -> collections.Counter:
    return collections.Counter(str(array.dtype) for array in arrays.values())


def read_model(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
        model["name"], describe(model)
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"  # without what a UnicodeDecodeError holds, the whole file
        raise ValueError(f"{path} holds no model section (configs/variants.py has one): {found}") from error
    return model


def source_of(text: str) -> Path | str:
    """A path, or a name on the hub, which is fetched when the command runs."""
    return text if hub.is_name(text) else path_of(text)


def path_of(text: str) -> Path:
    """A path on the command line; `~` is the home folder."""
    return Path(text).expanduser()


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m flair_jax.convert", description=__doc__.partition(": ")[2])
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    torch = (
        "weights with PyTorch's names: .safetensors, .pt, .pth or .bin (a state dict, or OpenAI's archive), or Hugging "
        "Face's folder of config.json and model.safetensors; or a name on the hub, such as flair-cc3m-recap or "
        "hf://OWNER/REPO/FILE"
    )
    flax = "Flax parameters, .safetensors"

    def command(name: str, text: str, **files: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for file, help_ in files.items():
            kind = {"source": ("IN", source_of), "target": ("OUT", path_of)}[file]
            sub.add_argument(file, metavar=kind[0], type=kind[1], help=help_)
        return sub

    readers = (
        command("to-flax", "PyTorch to Flax", source=torch, target=f"{flax}, with the model section in its metadata"),
        command("check", "show kind, sizes and dtypes; exit 1 if anything is wrong", source=f"{torch}; or {flax}"),
    )
    written = f"{flax}, as to-flax writes it"
    to_torch = command(
        "to-torch", "Flax to PyTorch", source=written, target="a state dict, .safetensors, .pt, .pth or .bin"
    )
    to_torch.add_argument(
        "--layout",
        default="",
        choices=("open_clip", "custom_text"),
        help="names of a CLIP: open_clip's, which are OpenAI's too (default), or those of its CustomTextCLIP, 'text.…'",
    )
    command("to-hf", "Flax to Hugging Face's transformers", source=written, target="a folder, made if it is not there")
    readers[1].add_argument(
        "--image",
        metavar="PUPPY.jpg",
        type=path_of,
        help="assets/puppy.jpg of the reference: compares the logits of FLAIR's model card, for flair-cc3m-recap.pt",
    )
    for reader in readers:
        reader.add_argument(
            "--model-config",
            metavar="FILE",
            type=path_of,
            help="JSON with the model section, where shapes do not tell it: without one the image is square, and "
            "heads are known for the widths of the published models only",
        )
        reader.add_argument(
            "--gelu",
            choices=names.GELU,
            help="the activation, where the file does not say it: a state dict of CLIP does not; quick for OpenAI's "
            "weights and what was fine-tuned from them",
        )
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 for files that are wrong."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        try:
            return 0 if run(options) else 1
        except (ValueError, OSError, ImportError) as error:  # ConversionError and WeightsFileError are ValueErrors.
            print(f"error: {error}", file=sys.stderr)
            return 1


def run(options: argparse.Namespace) -> bool:
    if hub.is_name(options.source):
        options.gelu = getattr(options, "gelu", None) or hub.GELUS.get(options.source)
        options.source = hub.fetch(options.source)
    options.source = flax_files.file_of(options.source)
    if options.command == "check":
        good = check(options.source, read_model(options.model_config), options.gelu)
        return check_example(options.source, options.image) and good if options.image else good
    if options.target.exists() and options.target.samefile(options.source):
        raise ValueError(f"{options.target} is the file that is read; give another name to write to")
    if options.command == "to-flax":
        to_flax(options.source, options.target, read_model(options.model_config), options.gelu)
    elif options.command == "to-torch":
        to_torch(options.source, options.target, options.layout)
    else:
        to_hf(options.source, options.target)
    return True


if __name__ == "__main__":
    sys.exit(main())
