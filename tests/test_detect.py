"""Regions that OWLv2 finds: their file beside a shard, the command that makes it, and the stream that reads it."""

import io
import json
import os
import pathlib

import numpy as np
import pytest
from conftest import load_golden
from parsed import parse_of
from PIL import Image
from shard_files import write_tar

from flair_jax.data import loader
from flair_jax.data.prepare import __main__ as command
from flair_jax.data.prepare import atomic, detect
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.open import expand
from flair_jax.data.transforms import images, region_files, side_files, tokenizer
from flair_jax.data.transforms.base import BOXES, BOXES_VALID
from flair_jax.data.transforms.regions import Region

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIDE = 32
TEXTS = ["- a dog runs. It is brown", "a red house", "trees, and the sky above", "", "a cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny random OWLv2, and a tokenizer that knows single letters."""
    folder = tmp_path_factory.mktemp("owlv2")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenize = transformers.CLIPTokenizerFast(*files, model_max_length=16, pad_token="!")
    processor = transformers.Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE})
    transformers.Owlv2Processor(processor, tokenize).save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=0)
    config = transformers.Owlv2Config(
        text_config=dict(**sizes, **ids, max_position_embeddings=16),
        vision_config=dict(**sizes, image_size=SIDE, patch_size=8),
        projection_dim=16,
    )
    torch.manual_seed(0)
    owl = transformers.Owlv2ForObjectDetection(config)
    with torch.no_grad():
        owl.class_head.logit_shift.weight.mul_(20)  # so that some boxes are below the threshold
    owl.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def detector(model):
    return detect.Detector(model, "cpu")


def picture(number: int) -> bytes:
    target = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(pixels).resize((60, 40)).save(target, "PNG")
    return target.getvalue()


def write_shard(path, texts=TEXTS, first=0) -> str:
    """A sample for each text; one more has no picture."""
    members = []
    for number, text in enumerate(texts, first):
        members += [(f"{number:03}.png", picture(number)), (f"{number:03}.json", json.dumps({"text": text}).encode())]
    members += [(f"x{first}.png", b"no picture"), (f"x{first}.json", b'{"text": "a dog"}')]
    return write_tar(path, members)


@pytest.fixture
def shards(tmp_path):
    return [write_shard(tmp_path / "0.tar"), write_shard(tmp_path / "1.tar", TEXTS[:2], 10)]


def run(model, shards, *more) -> None:
    options = ["--fields", "text", "--model", model, "--threshold", "0.45", "--workers", "1", "--device", "cpu"]
    command.main(["annotate", "regions", "--shards", *map(str, shards), *options, *map(str, more)])


def rows(shard, folder=None) -> dict[str, list[Region]]:
    opened = side_files.SideFile(side_files.path(str(shard), folder, region_files.KIND))
    keys = [f"{number:03}" for number in range(15)] + ["x0", "x10"]
    return {
        key: [Region(tuple(one["box"]), one["description"], one["score"]) for one in row[0]]
        for key in keys
        if (row := opened.row(key)) is not None
    }


# ---------------------------------------------------------------------------------------------------------------------
# The detector


def squashed(number: int) -> np.ndarray:
    return images.squash(Image.open(io.BytesIO(picture(number))), SIDE)


def test_each_box_has_its_best_description(detector):
    """As the scores of each description alone say; a batch of images with other numbers of them changes nothing."""
    texts = [["a dog", "a red house", "sky"], ["tree"]]
    both = detector([squashed(0), squashed(1)], texts, -1.0)
    assert [len(found) for found in both] == [16, 16]  # one for each patch
    for number, own in enumerate(texts):
        alone = detector([squashed(number)], [own], -1.0)[0]
        assert [one.description for one in alone] == [one.description for one in both[number]]
        np.testing.assert_allclose([one.box for one in alone], [one.box for one in both[number]], atol=2e-5)
        scores = [one.score for one in alone]
        assert scores == sorted(scores, reverse=True)
    single = {}
    for text in texts[0]:
        for one in detector([squashed(0)], [[text]], -1.0)[0]:
            single.setdefault(one.box, {})[text] = one.score
    assert {one.description for one in both[0]} > {"a dog"} or len({one.description for one in both[0]}) > 1
    for one in both[0]:
        scores = next(found for box, found in single.items() if np.allclose(box, one.box, atol=2e-5))
        assert one.score == pytest.approx(max(scores.values()), abs=2e-4)
        assert scores[one.description] == pytest.approx(max(scores.values()), abs=2e-4)


def test_the_threshold_and_the_length_of_queries(detector):
    every = detector([squashed(0)], [["a dog"]], -1.0)[0]
    cut = every[5].score - 1e-4
    assert detector([squashed(0)], [["a dog"]], cut)[0] == [one for one in every if one.score > cut]
    long = "abcdefghijklmnopqrstuvwxyz"
    first, second = (detector([squashed(0)], [[text]], -1.0)[0] for text in (long, long[:14] + "cut off"))
    assert [one.box for one in first] == [one.box for one in second]  # 14 letters and both ends are all that is seen


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(atomic.InputError, match=rf"--model {tmp_path}/nothing: "):
        detect.Detector(f"{tmp_path}/nothing")


def test_descriptions():
    texts = ["- a dog", " *A dog", "", "...", "a cat.", "-3 apples", "sky", "more"]
    assert detect.descriptions(texts, 4) == ["a dog", "a cat.", "3 apples", "sky"]


def test_noun_phrases_of_parsed_texts():
    class Parser:
        version = "1"

        def __call__(self, texts):
            return (parsed[text] for text in texts)

    parsed = {record["caption"]: parse_of(record) for record in load_golden("fsc_clip/hard_negatives.json")["records"]}
    captions = [caption for caption, parse in parsed.items() if len(parse.noun_chunks) > 1][:3]
    found = detect.NounPhrases(Parser())([captions[:2], [], captions[2:]])
    assert found[1] == [] and len(found) == 3
    for own, texts in zip(found, (captions[:2], [], captions[2:]), strict=True):
        assert len(own) >= len(texts) and all(any(phrase in text for text in texts) for phrase in own)
        chunks = [chunk for text in texts for chunk in parsed[text].noun_chunks]
        pronouns = [c for text in texts for c in parsed[text].noun_chunks if parsed[text].tokens[c.root].pos == "PRON"]
        assert len(own) == len(chunks) - len(pronouns)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_every_sample_has_a_row(model, detector, shards, capsys):
    """What the detector finds of the squashed picture; nothing where there is no text or no picture."""
    run(model, shards)
    told = capsys.readouterr().out
    assert "9 images of 2 shards in this run" in told and "--config.data.regions.source=beside" in told
    assert told.count("skipped: no captions") == 1 and told.count("skipped: not an image") == 1
    found = rows(shards[0])
    assert found.keys() == {"000", "001", "002", "003", "004", "x0"} and found["003"] == found["x0"] == []
    texts = {"000": ["a dog runs", "It is brown"], "001": ["a red house"], "002": ["trees, and the sky above"]}
    for key, own in texts.items():
        expected = detector([squashed(int(key))], [own], 0.45)[0]
        assert [one.description for one in found[key]] == [one.description for one in expected]
        np.testing.assert_allclose([one.box for one in found[key]], [one.box for one in expected], atol=2e-5)
    assert 0 < sum(map(len, found.values())) < 4 * 16
    assert rows(shards[1]).keys() == {"010", "011", "x10"}


def test_finished_shards_are_kept(model, shards, tmp_path):
    run(model, shards, "--output", tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["0.tar.regions", "1.tar.regions"]
    before = [file.stat().st_mtime_ns for file in files]
    run(model, shards, "--output", tmp_path / "out")
    assert [file.stat().st_mtime_ns for file in files] == before
    files[1].write_bytes(files[1].read_bytes()[:100])  # a copy that was cut
    run(model, shards, "--output", tmp_path / "out")
    after = [file.stat().st_mtime_ns for file in files]
    assert after[0] == before[0] and after[1] != before[1] and len(rows(shards[1], tmp_path / "out")) == 3
    run(model, shards, "--output", tmp_path / "out", "--count", "1")  # other descriptions
    assert all(file.stat().st_mtime_ns != stamp for file, stamp in zip(files, after, strict=True))
    assert {one.description for one in rows(shards[0], tmp_path / "out")["000"]} <= {"a dog runs"}


def test_the_files_do_not_depend_on_the_batch(model, shards, tmp_path):
    for name, batch in (("one", 1), ("five", 5)):
        run(model, shards[:1], "--output", tmp_path / name, "--batch", batch)
    first, second = (rows(shards[0], tmp_path / name) for name in ("one", "five"))
    assert first.keys() == second.keys()
    for key, found in first.items():
        assert [one.description for one in found] == [one.description for one in second[key]]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def stream(shards, **options):
    captions = dict(fields=("text",), count=1, max_merged=1)
    defaults = dict(
        batch_size=2, image_size=16, context_length=32, seed=0, max_skipped=1.0, augmentation=dict(squash=True)
    )
    return loader.make_stream(shards, captions=captions, **{**defaults, **options})


@pytest.mark.parametrize("beside", [True, False])
def test_training_reads_the_files(model, shards, tmp_path, beside):
    run(model, shards, *([] if beside else ["--output", tmp_path / "out"]))
    assert expand(str(tmp_path)) == shards  # a folder's side files are no shards
    found = {
        **rows(shards[0], None if beside else tmp_path / "out"),
        **rows(shards[1], None if beside else tmp_path / "out"),
    }
    source = "beside" if beside else str(tmp_path / "out")
    tokenize = tokenizer.Tokenizer(32)
    seen = 0
    with stream(shards, regions=dict(count=3, source=source)) as batches:
        for batch in (next(batches) for _ in range(6)):
            tokens = batch["texts"]["tokens"].reshape(2, 4, 32)
            for row in range(2):
                candidates = []
                for key, own in found.items():
                    texts = [*(one.description for one in own), "", "", ""][:3]
                    candidates += [key] * np.array_equal(tokens[row, 1:], tokenize(texts))
                assert candidates
                corners = [np.clip(one.box, 0, 1) for one in found[candidates[0]][:3]]
                seen += len(corners)
                for (x, y, w, h), there, box in zip(batch[BOXES][row], batch[BOXES_VALID][row], corners, strict=False):
                    expected = (
                        np.array([box[0] + box[2], box[1] + box[3], 2 * (box[2] - box[0]), 2 * (box[3] - box[1])]) / 2
                    )
                    assert not there or len(candidates) > 1 or np.allclose([x, y, w, h], expected, atol=1e-4)
    assert seen > 5


def test_files_that_are_missing_or_stale_stop_the_run(model, shards, tmp_path):
    with pytest.raises(ShardError, match=r"has no regions, which data\.regions\.source needs: .*annotate regions"):
        stream(shards, regions=dict(count=3, source="beside"))
    run(model, shards[:1])
    write_shard(shards[0], [*TEXTS, *["more"] * 20])
    with pytest.raises(ShardError, match=r"0\.tar\.regions is stale: its shard had"):
        stream(shards[:1], regions=dict(count=3, source="beside"))
    size = os.path.getsize(shards[0])
    region_files.write(pathlib.Path(f"{shards[0]}.regions"), [("other", [])], {"size": size})
    with pytest.raises(ShardError, match=r"has no row for the sample '0.*it is stale"):
        next(stream(shards[:1], regions=dict(count=3, source="beside")))
    pathlib.Path(f"{shards[0]}.regions").write_bytes(b"{}")
    with pytest.raises(ShardError, match=r"holds no regions"):
        stream(shards[:1], regions=dict(count=3, source="beside"))
