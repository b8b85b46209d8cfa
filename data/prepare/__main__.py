"""Command line: `python -m flair_jax.data.prepare RELEASE …`; data/README.md has the commands of every release.

`python -m flair_jax.data.prepare annotate …` annotates the captions of finished shards for hard negatives, and
`python -m flair_jax.data.prepare annotate regions …` finds described boxes in their pictures.
"""

import argparse
import codecs
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Callable

from flair_jax.data.prepare import annotate, atomic, boxes, detect, inputs, job, releases, report, rows, runner, shards
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import expand, open_source
from flair_jax.data.transforms.captions import SPLITTINGS

ANNOTATE, ANNOTATE_REGIONS = "annotate", "annotate regions"
PARTNERS = {"cc3m": "json", "captioned": "txt"}  # releases whose captions are in the tars, and where
# Options of a release that name more files of captions or boxes.
BOX_FILES = {"coco": ("regions",), "grain": ("mllm_captions", "boxes")}
WHOLE = ("pixelprose", "captioned", "negclip", "grain", "visual_genome", "grit")  # releases whose captions stay whole


def main(arguments: list[str]) -> None:
    own, flags = arguments, []
    if "--" in arguments:
        separator = arguments.index("--")
        own, flags = arguments[:separator], arguments[separator + 1 :]
    if own[:2] == ANNOTATE_REGIONS.split():
        own = [ANNOTATE_REGIONS, *own[2:]]
    options = _parser().parse_args(own)
    if options.runner != runner.LOCAL and options.workers is not None:
        raise atomic.PrepareError("--workers is for the local runner; configure others by Beam's own flags after `--`")
    if options.runner == runner.LOCAL and flags:
        raise atomic.PrepareError(f"flags for Beam ({' '.join(flags)}) need a --runner that they are for")
    cores = 1 if options.release == ANNOTATE_REGIONS else os.cpu_count()  # PyTorch uses all of them by itself
    workers = options.workers or cores or 1
    run = runner.Options(options.runner, workers, flags)
    if options.release in (ANNOTATE, ANNOTATE_REGIONS):
        work = _annotation(options)
        print(work.summary(annotate.annotate(work, run)))
        return
    info = job.prepare(_job(options), run)
    print(report.table(info))
    print(f"\ntrain with --config.data.shards='{os.path.join(os.path.abspath(options.output), info['pattern'])}'")


def _annotation(options: argparse.Namespace) -> annotate.Annotate | detect.Detect:
    found = open_source(expand(options.shards), options.index_dir).shards  # the files of a TFDS data set, too
    kind = annotate.Annotate if options.release == ANNOTATE else detect.Detect
    names = {field.name for field in dataclasses.fields(kind)} - {"shards"}
    return kind(tuple(dict.fromkeys(found)), **{name: getattr(options, name) for name in names})


def _job(options: argparse.Namespace) -> job.Job:
    work = options.work or os.path.join(options.output, ".prepare")
    names = ("captions", *BOX_FILES.get(options.release, ()))
    captions = tuple(file for name in names for file in _files(getattr(options, name, None)))  # PARTNERS have none
    if releases.RELEASES[options.release].images == "folder":
        images = inputs.list_folder(options.images, pathlib.Path(work) / "listing")
    else:
        images = inputs.Tars(tuple(expand(options.images)), getattr(options, "partner", "json"))
    return job.Job(
        release=options.release,
        captions=captions,
        inputs=images,
        output=options.output,
        work=work,
        prefix=options.prefix or options.release,
        format=options.format,
        shard_size=options.shard_size,
        resize=options.resize,
        quality=options.quality,
        upright=options.upright,
        text=rows.Text(
            options.encoding, getattr(options, "delimiter", None), not getattr(options, "no_quoting", False)
        ),
        reader=_reader(options),
    )


def _files(patterns: list[str] | None) -> list[str]:
    return expand(patterns) if patterns else []


def _reader(options: argparse.Namespace) -> dict:
    """Arguments of the release's reader of captions."""
    if options.release == "pixelprose":
        return {"original": options.original_caption}
    if options.release == "negclip":
        return {}
    if options.release == "grain":
        return {"mllm": _files(options.mllm_captions), "boxes": _files(options.boxes)}
    if options.release == "visual_genome":
        return {"image_data": options.image_data}
    if options.release == "grit":
        return {"phrases": options.phrases}
    if options.release == "captioned":
        names = ("partner", "encoding", "caption_key", "text_folder")
        return {name: getattr(options, name) for name in names}
    reader = {"splitting": options.splitting}
    if options.release == "cc3m":
        reader |= {"partner": options.partner, "encoding": options.encoding}
    if options.release == "folder":
        reader |= {"image_column": options.image_column, "caption_columns": options.caption_columns}
    if options.release == "flickr30k":
        names = options.images_list and rows.read_lines(options.images_list, rows.Text(options.encoding))
        reader |= {"part": options.part, "names": names and sorted(name.removesuffix(".jpg") for name in names)}
        reader |= {"entities": options.entities}
    return reader


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m flair_jax.data.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="release", required=True)
    for name, release in releases.RELEASES.items():
        command = commands.add_parser(name, help=release.help, description=release.help)
        add = command.add_argument
        if release.images == "tars":
            add(
                "--images",
                nargs="+",
                required=True,
                metavar="TARS",
                help="tars: patterns with braces or *, folders, .txt lists",
            )
        else:
            add("--images", required=True, type=path, metavar="FOLDER", help="folder of the image files")
        if name in PARTNERS:
            what = "file beside an image that holds its caption"
            add("--partner", choices=("json", "txt"), default=PARTNERS[name], help=f"{what}; default: {PARTNERS[name]}")
        else:
            own = release.own is not None
            what = "; without it the captions are taken from the tars' json" if own else ""
            add("--captions", nargs="+", required=not own, metavar="FILES", help="caption files" + what)
        add("--encoding", type=encoding, default="utf-8", help="of caption files and txt; json in tars is always UTF-8")
        if name in ("dreamlip", "pixelprose", "folder", "negclip", "grain", "grit"):
            add(
                "--delimiter",
                type=delimiter,
                metavar="CHARACTER",
                help="between the cells of .csv and .tsv, such as `;` or `tab`; default: a comma, in .tsv a tab",
            )
            add("--no-quoting", action="store_true", help="quotation marks in .csv and .tsv are a part of the text")
        if name == "captioned":
            add(
                "--caption-key",
                default="caption",
                metavar="KEY",
                help="of the json that holds the caption, and of ours",
            )
            what = "where the json lacks the key: texts named by its `key`, FOLDER/KEY.txt, whose first line counts"
            add("--text-folder", type=path, metavar="FOLDER", help=what)
        if name == "pixelprose":
            add("--original-caption", action="store_true", help="keep the original caption, too")
        if name == "folder":
            add("--image-column", default="file_name", help="holds the path of an image in the folder")
            add("--caption-columns", nargs="+", default=["caption"], help="hold a caption or a list of captions")
        if name == "flickr30k":
            add("--part", default="train", choices=("train", "val", "test"), help="of dataset_flickr30k.json")
            add(
                "--images-list",
                type=path,
                metavar="FILE",
                help="the images to keep, one a line; needed for .token files",
            )
            what = "folder of Flickr30k Entities, with Annotations and Sentences, for regions"
            add("--entities", type=path, metavar="FOLDER", help=what)
        if name == "coco":
            what = "instances_*.json or panoptic_*.json, for regions described by their category"
            add("--regions", nargs="+", default=[], metavar="FILES", help=what)
        if name == "grain":
            add("--mllm-captions", nargs="+", default=[], metavar="FILES", help="captions_cc12m_pooled.json")
            add("--boxes", nargs="+", default=[], metavar="FILES", help="bboxes_cc12m_pooled.json")
        if name == "visual_genome":
            add("--image-data", required=True, type=path, metavar="FILE", help="image_data.json, which has the sizes")
        if name == "grit":
            what = "which phrases are the descriptions; default: the longer ones"
            add("--phrases", choices=boxes.PHRASES, default=boxes.PHRASES[0], help=what)
        if name not in WHOLE:
            add("--splitting", choices=tuple(SPLITTINGS), default="every_stop", help="rule that splits captions")
        add("--output", required=True, type=path, metavar="FOLDER", help="for the shards")
        add("--prefix", type=file_name, help="of the shards' names; default: the release")
        add("--format", choices=tuple(shards.SUFFIXES), default="tar")
        add("--shard-size", type=positive_number, default=5000, metavar="SAMPLES")
        add(
            "--resize",
            type=positive_number,
            metavar="PIXELS",
            help="shorter side of larger images; default: as they are",
        )
        add("--quality", type=percentage, default=95, help="of the JPEG of images that are resized or turned")
        add(
            "--upright",
            action=argparse.BooleanOptionalAction,
            default=name == "folder",
            help="turn images as their EXIF orientation says, as viewers do; the published sets are by default stored "
            "and trained on as their pixels are, as the reference does",
        )
        add(
            "--work",
            type=path,
            metavar="FOLDER",
            help="for intermediate files, on a fast disk; default: OUTPUT/.prepare",
        )
        _add_runner(command)
    _add_annotate(commands)
    return parser


def _add_runner(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=positive_number, help="processes of the local runner; default: one a core, for regions one"
    )
    command.add_argument("--runner", default=runner.LOCAL, help="a runner of Apache Beam; its flags follow after `--`")


def _add_annotate(commands) -> None:
    what = (
        "parse the captions of shards, for hard negatives; needs spaCy and WordNet: pip install 'flair_jax[negatives]'"
    )
    add = _add_annotation(commands, ANNOTATE, what, ["caption"], "whole")
    add("--wordnet", type=path, metavar="FOLDER", help="of WordNet 3.0's files; default: where it is installed")
    what = "find boxes for descriptions in shards by OWLv2; needs PyTorch: pip install 'flair_jax[regions]'"
    add = _add_annotation(commands, ANNOTATE_REGIONS, what, list(detect.FIELDS), "sentences")
    what = "what describes a region: the texts themselves, or the noun phrases in them, for which spaCy is needed"
    add("--phrases", choices=(detect.SENTENCES, detect.NOUN_PHRASES), default=detect.SENTENCES, help=what)
    what = f"descriptions of an image, the first ones; default: {detect.COUNT}"
    add("--count", type=positive_number, default=detect.COUNT, metavar="N", help=what)
    add("--model", default=detect.MODEL, metavar="NAME", help=f"or folder of an OWLv2; default: {detect.MODEL}")
    what = f"smallest score of a box; default: {detect.THRESHOLD}"
    add("--threshold", type=float, default=detect.THRESHOLD, metavar="SCORE", help=what)
    add("--batch", type=positive_number, default=8, metavar="IMAGES", help="that the detector sees at once")
    add("--device", metavar="NAME", help="PyTorch's, such as cuda:0; default: an accelerator where there is one")


def _add_annotation(commands, name: str, what: str, fields: list[str], splitting: str) -> Callable:
    command = commands.add_parser(name, help=what, description=what)
    add = command.add_argument
    add("--shards", nargs="+", required=True, metavar="SHARDS", help="as in --config.data.shards")
    what = f"as in --config.data.captions.fields; default: {' '.join(fields)}"
    add("--fields", nargs="+", default=fields, help=what)
    what = f"as in --config.data.captions.splitting; default: {splitting}"
    add("--splitting", choices=tuple(SPLITTINGS), default=splitting, help=what)
    add("--output", type=path, metavar="FOLDER", help="for the files; default: beside the shards")
    add("--index-dir", type=path, metavar="FOLDER", help="where indexes of shards are kept; default: beside them")
    _add_runner(command)
    return add


def path(text: str) -> str:
    return os.path.expanduser(text)


def encoding(text: str) -> str:
    try:
        "".encode(codecs.lookup(text).name)  # which refuses codecs of something else than text, such as hex
    except LookupError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no encoding of text; try utf-8, latin-1, cp1252 …") from error
    return text


def delimiter(text: str) -> str:
    names = {name: character for character, name in rows.DELIMITER_NAMES.items()} | {r"\t": "\t"}
    text = names.get(text, text)
    if len(text) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no delimiter; expected one character, such as ';', or 'tab'")
    return text


def positive_number(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    number = int(text)
    return number


def percentage(text: str) -> int:
    number = positive_number(text)
    if number > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 100")
    return number


def file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain start of file names: letters, digits, _, - and .")
    return text


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (atomic.PrepareError, ShardError, OSError) as error:
        sys.exit(f"error: {error}")
