"""Annotations of captions: their file, the command that makes it, and the training stream that reads it."""

import io
import json
import random

import numpy as np
import pytest
from conftest import load_golden
from parsed import parse_of
from PIL import Image
from shard_files import write_tar

from flair_jax.data import loader
from flair_jax.data.prepare import __main__ as command
from flair_jax.data.prepare import annotate, atomic, parses
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import expand
from flair_jax.data.transforms import annotations, negatives, side_files, tokenizer

ABOUT = {"size": 1, "checksum": 2, "fields": ["caption"], "splitting": "whole", "versions": ""}
PARSES = {record["caption"]: parse_of(record) for record in load_golden("fsc_clip/hard_negatives.json")["records"]}
CAPTIONS = [caption for caption in PARSES if caption]


class Parser:
    """Stands for spaCy; knows the captions of the golden file."""

    version = "parser 1"

    def __call__(self, captions):
        for caption in captions:
            if caption not in PARSES:
                raise ShardError(f"cannot parse {caption!r}")
            yield PARSES[caption]


class Words:
    """Stands for WordNet."""

    version = "words 1"

    def candidates(self, text, pos, tag):
        return parses.Candidates.of({f"{text}-{number}": number for number in range(1, 4)} if pos == "NOUN" else {})


@pytest.fixture
def annotators(monkeypatch):
    monkeypatch.setattr(annotate, "_annotators", lambda wordnet: (Parser(), Words()))


def picture(number: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (12, 9), (number, 0, 99)).save(target, "PNG")
    return target.getvalue()


def write_shard(path, captions, first: int = 0) -> str:
    members = [
        member
        for number, caption in enumerate(captions, first)
        for member in (
            (f"{number:05d}.png", picture(number)),
            (f"{number:05d}.json", json.dumps({"caption": caption}).encode()),
        )
    ]
    return write_tar(path, members)


def run(*arguments) -> None:
    command.main(["annotate", "--workers", "1", *map(str, arguments)])


# ---------------------------------------------------------------------------------------------------------------------
# The file


def written(folder, captions=CAPTIONS) -> tuple[annotations.Annotations, dict[str, negatives.Annotation]]:
    made = {caption: parses.annotation(PARSES[caption], Words().candidates) for caption in captions}
    shard = folder / "a.tar"
    shard.write_bytes(b"1")
    assert annotations.write(annotations.path(str(shard)), [*made.values(), *made.values()], ABOUT) == len(made)
    return annotations.open_annotations([str(shard)], None, fields=["caption"], splitting="whole"), made


def test_annotations_are_read_as_they_were_written(tmp_path):
    opened, made = written(tmp_path)
    for caption, annotation in made.items():
        found = opened.find(str(tmp_path / "a.tar"), caption)
        assert found.words == annotation.words
        assert [list(map(tuple, spans)) for spans in found.swaps] == annotation.swaps
        assert [(part.start, part.end, *part.cumulative) for part in found.replaceable] == [
            (part.start, part.end, *part.cumulative) for part in annotation.replaceable
        ]
        assert [list(part.words) for part in found.replaceable] == [list(part.words) for part in annotation.replaceable]
        for kind in negatives.FSC_CLIP:
            drawn = [negatives.draw(kind, which, random.Random(3)) for which in (found, annotation)]
            assert drawn[0] == drawn[1]


def test_equal_hashes_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(side_files, "hash_of", lambda caption: 7)
    opened, made = written(tmp_path, CAPTIONS[:3])
    for caption in made:
        assert opened.find(str(tmp_path / "a.tar"), caption).caption == caption
    with pytest.raises(ShardError, match="no annotation for 'another'"):
        opened.find(str(tmp_path / "a.tar"), "another")


def test_caption_without_annotation_stops_the_run(tmp_path):
    opened, _ = written(tmp_path)
    with pytest.raises(ShardError, match=r"a\.tar\.annotations has no annotation for 'a new text'.*annotate"):
        opened.find(str(tmp_path / "a.tar"), "a new text")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda shard, file: file.unlink(), "has no annotations.*make them first"),
        (lambda shard, file: shard.write_bytes(b"12"), "stale: its shard had 1 bytes and has 2"),
        (lambda shard, file: file.write_bytes(b"nothing"), "holds no annotations"),
        (lambda shard, file: annotations.write(file, [], {**ABOUT, "fields": ["text"]}), r"fields \['text'\]"),
        (lambda shard, file: annotations.write(file, [], {**ABOUT, "splitting": "sentences"}), "this run has"),
    ],
)
def test_annotations_of_something_else_are_refused(tmp_path, fault, message):
    written(tmp_path)
    shard = tmp_path / "a.tar"
    fault(shard, tmp_path / "a.tar.annotations")
    with pytest.raises(ShardError, match=message):
        annotations.open_annotations([str(shard)], None, fields=["caption"], splitting="whole")


def test_annotations_of_a_store_need_a_folder():
    assert annotations.path("gs://bucket/a.tar", "/data/notes") == "/data/notes/a.tar.annotations"
    with pytest.raises(ShardError, match="lies in a store"):
        annotations.path("gs://bucket/a.tar")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_annotates_beside_the_shards(tmp_path, annotators, capsys):
    write_shard(tmp_path / "a.tar", [*CAPTIONS[:3], CAPTIONS[0], ""])
    write_shard(tmp_path / "b.tar", CAPTIONS[3:])
    run("--shards", tmp_path / "*.tar")
    told = capsys.readouterr().out
    assert f"{len(CAPTIONS)} captions of 2 shards" in told and "skipped: no captions" in told
    assert "--config.data.captions.fields='(\"caption\",)'" in told
    assert sorted(path.name for path in tmp_path.iterdir() if "index" not in path.name) == [
        *("a.tar", "a.tar.annotations", "b.tar", "b.tar.annotations"),
    ]
    shards = expand(str(tmp_path / "*.tar*"))  # which names no file beside a shard
    assert len(shards) == 2
    opened = annotations.open_annotations(shards, None, fields=["caption"], splitting="whole")
    assert opened.find(shards[1], CAPTIONS[-1]).caption == CAPTIONS[-1]


def test_finished_shards_are_kept(tmp_path, annotators, monkeypatch):
    write_shard(tmp_path / "a.tar", CAPTIONS[:2])
    write_shard(tmp_path / "b.tar", ["nobody can parse this"])
    files = [tmp_path / f"{name}.tar.annotations" for name in "ab"]
    with pytest.raises(atomic.PrepareError, match="cannot parse 'nobody"):
        run("--shards", tmp_path)
    assert files[0].exists() and not files[1].exists()
    first = files[0].stat().st_mtime_ns
    write_shard(tmp_path / "b.tar", CAPTIONS[2:4])
    run("--shards", tmp_path)
    assert files[1].exists() and files[0].stat().st_mtime_ns == first
    # Another shard under the name of an old one, or another version of the parser: made again.
    second = files[1].stat().st_mtime_ns
    write_shard(tmp_path / "b.tar", CAPTIONS[4:7])
    run("--shards", tmp_path)
    assert files[1].stat().st_mtime_ns > second and files[0].stat().st_mtime_ns == first
    monkeypatch.setattr(Parser, "version", "parser 2")
    run("--shards", tmp_path)
    assert files[0].stat().st_mtime_ns > first


def test_shards_of_one_name_cannot_share_a_folder(tmp_path, annotators):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", CAPTIONS[:1])
    with pytest.raises(atomic.InputError, match="share a file"):
        run("--shards", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "notes")


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def shards(tmp_path, annotators):
    write_shard(tmp_path / "a.tar", CAPTIONS[:8])
    write_shard(tmp_path / "b.tar", CAPTIONS[8:], first=8)
    run("--shards", tmp_path)
    return tmp_path


def stream(shards, **options):
    captions = {"fields": ("caption",), "splitting": "whole", "count": 1, "max_merged": 1}
    defaults = dict(batch_size=4, image_size=8, context_length=24, seed=5, negatives={"kinds": negatives.FSC_CLIP})
    return loader.make_stream(shards, captions=captions, **{**defaults, **options})


def test_batches_hold_the_caption_and_its_negatives(shards):
    with stream(str(shards), shuffle=False) as batches:
        for start in range(0, 12, 4):
            batch = next(batches)
            tokens = batch["texts"]["tokens"].reshape(4, 4, 24)
            assert batch["valid"].shape == (4, 4) and batch["valid"][:, 0].all()
            for image, caption in enumerate(CAPTIONS[start : start + 4]):
                original = tokenizer.Tokenizer(24)(caption)[0]
                assert (tokens[image, 0] == original).all()
                same = (tokens[image] == original).all(axis=1)
                assert (same[1:] == ~batch["valid"][image, 1:]).all()
        assert batches.masked > 0  # "Dogs" has no negative of any kind


def test_negatives_do_not_depend_on_workers_or_interruptions(shards):
    with stream(str(shards)) as batches:
        whole = [next(batches) for _ in range(6)]
    with stream(str(shards)) as batches:
        for _ in range(3):
            next(batches)
        position = batches.position
    with stream(str(shards), workers=1, position=position) as batches:
        for expected in whole[3:]:
            found = next(batches)
            assert (found["valid"] == expected["valid"]).all()
            assert all(np.array_equal(found["texts"][name], expected["texts"][name]) for name in expected["texts"])


def test_kinds_without_a_parse_need_no_annotations(tmp_path):
    write_shard(tmp_path / "a.tar", CAPTIONS[:4])
    kinds = ("ngram_shuffle_2", "svlc")
    with stream(str(tmp_path), negatives={"kinds": kinds}) as batches:
        assert next(batches)["valid"].shape == (4, 3)
    with pytest.raises(ShardError, match="has no annotations"):
        stream(str(tmp_path))


def test_without_kinds_there_are_only_captions(tmp_path):
    write_shard(tmp_path / "a.tar", CAPTIONS[:4])
    with stream(str(tmp_path), negatives={"kinds": None}) as batches:
        assert "valid" not in next(batches) and batches.masked == 0
