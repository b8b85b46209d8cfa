"""Runs a preparation from start to end, or from where it was interrupted."""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import shlex
import shutil
import sys

from flair_jax.data.prepare import atomic, report, runner, shards, stages
from flair_jax.data.prepare.stages import Job
from flair_jax.data.sources import files

INFO = "info.json"
FORMAT = "flair_jax prepared data"
SCHEMA = 1  # of info.json and of the records
VERSIONS = ("flair_jax", "apache-beam", "numpy", "pillow")
STAGES = ("captions", "images", "shards")


def prepare(job: Job, options: runner.Options) -> dict:
    """Runs the remaining work of a job, and returns the contents of info.json.

    Raises:
      PrepareError: the output folder holds something else, the inputs are not what they were, nothing matches, or a
        file cannot be read or written.
    """
    output, work = pathlib.Path(job.output), pathlib.Path(job.work)
    description = _describe(job)
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    if (output / INFO).exists():
        info = atomic.read_json(output / INFO)
        if info.get("fingerprint") != fingerprint:
            raise atomic.PrepareError(f"{output} holds other prepared data: choose an empty folder, or remove it")
        _remove(work)  # killed while it was removed
        return info
    _open_folders(job, description)

    try:
        folder, images = _run_stages(job, description, options)
    except atomic.InputError:
        _remove(work)  # so that the corrected command may use the same folders
        raise
    info = {
        "format": FORMAT,
        "schema": SCHEMA,
        "release": job.release,
        **_counts(job, folder, images),
        "fingerprint": fingerprint,
        "provenance": {
            "command": shlex.join(["python", "-m", "flair_jax.data.prepare", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
            **description,
        },
    }
    atomic.write_json(output / INFO, info, indent=1)
    _remove(work)
    return info


def _remove(work: pathlib.Path) -> None:
    stages.open_store.cache_clear()
    shutil.rmtree(work, ignore_errors=True)


def _run_stages(job: Job, description: dict, options: runner.Options) -> tuple[dict[str, pathlib.Path], report.Tally]:
    """(folder of each stage, counts of the images)."""
    output = pathlib.Path(job.output)
    folder = {stage: job.folder(stage) for stage in STAGES}
    run = functools.partial(runner.run, options=options)
    pieces = stages.caption_pieces(description["captions"])
    run(functools.partial(stages.index_captions, job), pieces, folder["captions"], "captions", "B")
    pieces = stages.image_pieces(description["images"])
    run(functools.partial(stages.match, job), pieces, folder["images"], "images", "B")
    tasks, images = stages.plan(job)
    pieces = stages.shard_pieces(job, tasks)
    for piece in pieces:
        shard = output / stages.shard_name(job, piece.value[0][0], len(tasks))
        if not shard.exists():  # removed after it was written
            (folder["shards"] / f"{piece.name}.json").unlink(missing_ok=True)
    run(functools.partial(stages.write_shard, job), pieces, folder["shards"], "shards", " samples")
    return folder, images


def _describe(job: Job) -> dict:
    """Everything that determines the bytes of the shards, with the state of every file that is read."""
    settings = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    for name in ("output", "work", "captions", "inputs"):
        del settings[name]
    return {
        "settings": settings,
        "pillow": importlib.metadata.version("pillow"),  # which decodes and resizes
        "captions": [[*files.state(path), path] for path in job.captions],
        "images": [job.inputs.state(unit) for unit in range(len(job.inputs))],
    }


def _open_folders(job: Job, description: dict) -> None:
    """Makes the folders, or checks that they belong to an interrupted run of the same job."""
    output, work = pathlib.Path(job.output), pathlib.Path(job.work)
    started = work / "job.json"
    if started.exists():
        earlier = atomic.read_json(started)
        changed = [name for name in description if earlier.get(name) != json.loads(json.dumps(description[name]))]
        if changed:
            raise atomic.PrepareError(
                f"{work} holds the work of another run, which differs in {', '.join(changed)}. Give the same options "
                f"and files to go on with it; to start again remove {work} and the shards in {output}."
            )
        atomic.remove_partial(work)
        for path in output.glob(f".*{files.PARTIAL}"):
            path.unlink(missing_ok=True)
        return
    found = [path for path in output.glob("*") if path != work] if output.exists() else []
    if found:
        raise atomic.PrepareError(f"{output} is not empty ({found[0].name}): choose an empty folder for the shards")
    for folder in (output, *(work / stage for stage in STAGES)):
        folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(started, description)


def _counts(job: Job, folder: dict[str, pathlib.Path], images: report.Tally) -> dict:
    def reports(stage: str) -> list[dict]:
        return [atomic.read_json(path) for path in sorted(folder[stage].glob("*.json"))]

    captions, written = None, reports("shards")
    if job.captions:
        store = stages.open_store(folder["captions"])
        repeated = store.count_repeated()
        keys = len(store) - repeated
        numbered = sum(part["matched"] for part in reports("images")) - images.skipped[stages.REPEATED]
        captions = {
            **report.Tally.total(reports("captions")).to_json(),
            "repeated": repeated,
            "repeated_rule": "all captions are kept" if job.rules.merged else "the first one counts",
            "keys": keys,
            "keys_without_image": keys - numbered,
        }
    return {
        "samples": sum(part["samples"] for part in written),
        "shards": len(written),
        "shard_size": job.shard_size,
        "last_shard": written[-1]["samples"],
        "pattern": pattern(job, len(written)),
        "converted": sum(part["converted"] for part in written),
        "captions": captions,
        "images": {**images.to_json(), "matched": sum(part["matched"] for part in reports("images"))},
        "left_out": report.Tally.total(part["left_out"] for part in reports("images")).to_json(),
    }


def pattern(job: Job, count: int) -> str:
    """The names of all shards as one pattern with braces."""
    first, last = (stages.shard_name(job, number, count) for number in (0, count - 1))
    digits = slice(len(job.prefix) + 1, -len(shards.SUFFIXES[job.format]))
    return f"{job.prefix}-{{{first[digits]}..{last[digits]}}}{shards.SUFFIXES[job.format]}"
