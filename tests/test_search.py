"""Search in a folder of photographs: what is found, what an update notices, and what a killed process leaves."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import TINY, fresh_params
from optional import faiss
from PIL import Image
from processes import one_device, wait_for

from benchmarks import search as benchmark
from flair_jax import models, pretrained, search
from flair_jax.convert import flax_files
from flair_jax.evaluators.features import call
from flair_jax.lock import WorkdirInUse, WorkdirLock
from flair_jax.models.dual_encoder import ImageFeatures, TextFeatures
from flair_jax.search import Index

TEXTS = ["a large red circle, at the top left", "a blue square", "nothing"]
COUNT = 7
FLAIR = {**TINY, "text": {**TINY["text"], "vocab_size": 49408}}  # the tokenizer's
CLIP = {**FLAIR, "name": "clip", "pooling": None}


@pytest.fixture(scope="module", autouse=True)
def needs_faiss():
    assert faiss.IndexFlatIP


@pytest.fixture(scope="module")
def flair():
    rng = np.random.default_rng(0)  # fresh parameters have biases of 0 and scales of 1
    params = fresh_params(models.create(FLAIR))
    params = jax.tree.map(lambda x: x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32), params)
    return pretrained.Pretrained(FLAIR, params)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise of one colour each, in folders; image 6 lies on its side and says so."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(COUNT):
        colour = rng.integers(0, 200, 3)
        pixels = np.uint8(colour + rng.integers(0, 56, (50 + 10 * number, 80, 3)))
        pixels[:20] = 255 - pixels[:20]
        name = f"{'deep/er/' if number % 2 else ''}{number}.png"
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 6 else 1
        Image.fromarray(pixels).save(folder / name, exif=exif)
    return folder


@pytest.fixture
def folder(pictures, tmp_path):
    """A copy whose files are old enough for their times to tell of a change."""
    shutil.copytree(pictures, tmp_path / "photos")
    for path in (tmp_path / "photos").rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def indexed(flair, pictures, tmp_path_factory):
    index = Index.open(pictures, flair, at=tmp_path_factory.mktemp("index") / "at")
    index.update()
    return index


def upright(path):
    image = Image.open(path)
    return image.transpose(Image.Transpose.ROTATE_270) if path.name == "6.png" else image


def cosines(model, folder, mode):
    """Names and cosines (B, N) by the model itself."""
    paths = sorted(folder.rglob("*.png"))
    pixels, tokens = model.preprocess([upright(path) for path in paths]), model.tokenize(TEXTS)
    logits = model.get_logits_as_clip(pixels, tokens)
    if mode == "conditioned":
        logits = model.get_logits(pixels, tokens) - model.params["logit_bias"]
    return paths, np.asarray(logits / np.exp(model.params["logit_scale"]))


def check(index, mode, model, folder, top_k=COUNT, **options):
    paths, expected = cosines(model, folder, mode)
    found = index.query(TEXTS, top_k, mode=mode, **options)
    assert len(found) == len(TEXTS)
    for hits, column in zip(found, expected.T, strict=True):
        assert len(hits) == min(top_k, len(paths))
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(column)[::-1][: len(hits)], atol=2e-3)
        for hit in hits:
            assert abs(column[paths.index(hit.path)] - hit.score) < 2e-3


# ---------------------------------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("mode", ["conditioned", "global"])
def test_hits_are_those_of_the_model(flair, indexed, mode):
    check(indexed, mode, flair, indexed.folder)
    check(indexed, mode, flair, indexed.folder, top_k=2)


def test_one_text_the_best_mode_and_few_candidates(flair, indexed):
    assert indexed.query(TEXTS[0], 3) == indexed.query(TEXTS[:1], 3, mode="conditioned")
    assert indexed.query([]) == []
    first = {hit.path for hit in indexed.query(TEXTS[0], 2, mode="global")[0]}
    assert {hit.path for hit in indexed.query(TEXTS[0], 2, candidates=1)[0]} == first  # at least top_k candidates


def test_more_candidates_than_one_program_scores(flair, indexed, monkeypatch):
    monkeypatch.setattr(search, "RANKED", 4)
    check(indexed, "conditioned", flair, indexed.folder)


def test_scores_of_few_texts_are_those_of_many(tiny_model, tiny_params):
    rng = np.random.default_rng(0)
    local, text = rng.standard_normal((3, 16, 64), np.float32), rng.standard_normal((2, 64), np.float32)
    features = ImageFeatures(None, local), TextFeatures(text, None, None)
    found, expected = (call(tiny_model, method, tiny_params, *features) for method in ("score_few_texts", "score"))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_pooling_keeps_no_tokens(flair, folder):
    params = {name: np.asarray(x) for name, x in flair.params.items() if not isinstance(x, dict)}
    towers = {name: jax.tree.map(np.asarray, flair.params[name]) for name in ("vision", "text")}
    model = pretrained.Pretrained(CLIP, {**params, **towers})
    index = Index.open(folder, model)
    index.update()
    check(index, "global", model, folder)
    assert index.query(TEXTS, 2) == index.query(TEXTS, 2, mode="global")
    assert [path.name for path in index.at.glob("*.f16")] == ["pooled-000001.f16"]
    with pytest.raises(ValueError, match="mode is 'conditioned'; this model has 'global'"):
        index.query(TEXTS, mode="conditioned")


def test_bad_numbers_and_folders(flair, indexed, tmp_path):
    for options in ({"top_k": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            indexed.query(TEXTS, **options)
    with pytest.raises(NotADirectoryError, match="missing is no folder"):
        Index.open(tmp_path / "missing", flair)
    index = Index.open(tmp_path, flair)
    with pytest.raises(FileNotFoundError, match=r"\.flair_jax is no index of photographs"):
        index.query(TEXTS)
    assert not index.at.exists()  # opening and asking write nothing
    assert index.update() == search.Changes(0, 0, 0, 0, {})
    with pytest.raises(ValueError, match="holds no image"):
        index.query(TEXTS)


def test_features_that_float16_cannot_hold_are_refused(flair, folder):
    params = jax.tree.map(np.asarray, flair.params)
    huge = pretrained.Pretrained(FLAIR, {**params, "image_projection": params["image_projection"] * 1e6})
    with pytest.raises(ValueError, match="do not fit into float16"):
        Index.open(folder, huge).update()


# ---------------------------------------------------------------------------------------------------------------------
# What an update notices


def encoded(monkeypatch):
    """Numbers of images that are encoded, batch by batch."""
    counts = []
    decode = search.image_rules.decode
    monkeypatch.setattr(search.image_rules, "decode", lambda *x, **y: counts.append(1) or decode(*x, **y))
    return counts


def test_new_changed_moved_and_removed_files(flair, folder, monkeypatch):
    decoded = encoded(monkeypatch)
    index = Index.open(folder, flair)
    index.update()
    assert len(decoded) == COUNT == len(index)
    assert index.update() == search.Changes(0, 0, 0, COUNT, {})

    (folder / "0.png").unlink()
    (folder / "2.png").rename(folder / "moved.png")
    shutil.copy(folder / "4.png", folder / "copy.png")
    rng = np.random.default_rng(1)
    for name in ("new.png", "deep/er/1.png"):
        Image.fromarray(rng.integers(0, 256, (70, 70, 3), dtype=np.uint8)).save(folder / name)
    os.utime(folder / "deep/er/3.png")  # touched, not changed
    decoded.clear()
    reader = Index.open(folder, flair)  # open since before the update
    assert reader.query(TEXTS[0], 1)
    assert index.update() == search.Changes(added=3, changed=1, removed=2, unchanged=COUNT - 3, skipped={})
    assert len(decoded) == 2
    for each in (index, reader):
        assert len(each) == COUNT + 1
        check(each, "conditioned", flair, folder, top_k=COUNT + 1)


def test_a_change_within_the_resolution_of_the_clock_is_noticed(flair, folder):
    index = Index.open(folder, flair)
    path = folder / "0.png"
    pixels = np.asarray(Image.open(path))
    Image.fromarray(pixels).save(path, compress_level=0)
    status = path.stat()
    index.update()
    Image.fromarray(255 - pixels).save(path, compress_level=0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert index.update().changed == 1
    check(index, "conditioned", flair, folder)


def test_files_that_are_no_images_are_named(flair, folder, monkeypatch):
    (folder / "notes.txt").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "empty.jpg").touch()
    (folder / "link.png").symlink_to(folder / "missing.png")
    (folder / ".hidden.png").write_bytes((folder / "0.png").read_bytes())
    os.mkfifo(folder / "pipe.png")
    (folder / "round").symlink_to(folder)
    odd = os.fsencode(folder) + b"/na\xffme.png"
    shutil.copy(folder / "0.png", odd)
    for path in (folder / "notes.txt", folder / "cut.png", folder / "empty.jpg", odd):
        os.utime(path, (1e9, 1e9))
    index = Index.open(folder, flair)
    expected = {
        "cut.png": "cannot decode the image",
        "empty.jpg": "not an image",
        "link.png": "cannot be read: No such file",
        "notes.txt": "not an image in one of the formats JPEG",
        "pipe.png": "not a file",
    }
    first = index.update()
    decoded = encoded(monkeypatch)
    again = index.update()
    assert not decoded  # what is no image is not tried again
    assert (first.added, again.unchanged) == (COUNT + 1, COUNT + 1)
    for changes in (first, again):
        assert list(changes.skipped) == list(expected)
        assert all(words in changes.skipped[name] for name, words in expected.items())
    assert odd in {os.fsencode(hit.path) for hit in index.query(TEXTS[0], COUNT + 1)[0]}
    shutil.copy(folder / "2.png", folder / "notes.txt")  # an image by its content
    shutil.copy(folder / "notes.txt", folder / "cut.png")
    (folder / "4.png").write_text("no picture any more")
    changes = index.update()
    assert (changes.added, changes.removed, len(changes.skipped)) == (2, 1, 4)


def test_files_that_may_not_be_read(flair, folder, monkeypatch):
    index = Index.open(folder, flair)
    index.update()
    os.utime(folder / "0.png")
    (folder / "9.png").write_bytes(b"new")
    with monkeypatch.context() as patch:
        # Root, who runs tests in containers, may read everything.
        patch.setattr(
            search.photo_catalogue,
            "why_no_image",
            lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )
        changes = index.update()
    denied = "cannot be read: Permission denied"
    assert changes == search.Changes(0, 0, 1, COUNT - 1, {"0.png": denied, "9.png": denied})
    assert len(index) == COUNT - 1
    changes = index.update()
    assert changes.added == 1 and list(changes.skipped) == ["9.png"]  # both were tried again


def test_rows_of_removed_files_are_used_again_and_at_last_removed(flair, folder, monkeypatch):
    index = Index.open(folder, flair)
    index.update()
    away = folder.parent / "away"
    away.mkdir()
    for number in (0, 2, 4):
        (folder / f"{number}.png").rename(away / f"{number}.png")
    assert index.update().removed == 3
    size = (index.at / "local-000001.f16").stat().st_size
    decoded = encoded(monkeypatch)
    (away / "2.png").rename(folder / "2.png")
    assert index.update().added == 1 and not decoded
    reader = Index.open(folder, flair)
    check(reader, "conditioned", flair, folder)
    for number in (1, 3):
        (folder / f"deep/er/{number}.png").unlink()
    assert index.update().removed == 2
    assert sorted(path.name for path in index.at.glob("*.f16")) == ["local-000002.f16", "pooled-000002.f16"]
    assert (index.at / "local-000002.f16").stat().st_size == size * 3 // COUNT
    (away / "0.png").rename(folder / "0.png")
    assert index.update().added == 1 and len(decoded) == 1
    for each in (index, reader):
        check(each, "conditioned", flair, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Whose index it is, and what is wrong with it


def test_an_index_of_other_weights_is_refused(flair, indexed, tmp_path):
    params = jax.tree.map(np.asarray, flair.params)
    other = pretrained.Pretrained(FLAIR, {**params, "image_projection": params["image_projection"] * 2})
    with pytest.raises(search.OtherWeights, match="is an index of other weights: their fingerprint is"):
        Index.open(indexed.folder, other, at=indexed.at)


def damaged(index, tmp_path, damage):
    shutil.copytree(index.at, tmp_path / "at")
    damage(tmp_path / "at")
    return tmp_path / "at"


def run_sql(*statements):
    def damage(at):
        with sqlite3.connect(at / "catalogue.sqlite") as connection:
            for statement in statements:
                connection.execute(statement)

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda at: (at / "catalogue.sqlite").write_bytes(b"no catalogue" * 100), OSError, "not a database"),
        (lambda at: os.truncate(at / "local-000001.f16", 1000), ValueError, "has 1000 bytes; the catalogue says"),
        (lambda at: (at / "pooled-000001.f16").unlink(), FileNotFoundError, "pooled-000001.f16"),
        (run_sql("DELETE FROM meta WHERE key = 'width'"), OSError, "the table meta lacks width"),
        (run_sql("UPDATE meta SET value = '0' WHERE key = 'schema'"), ValueError, "has the schema '0'"),
        (run_sql("UPDATE files SET path = CAST('../out.png' AS BLOB)  WHERE row = 0"), ValueError, "outside of the"),
        (run_sql("UPDATE files SET path = CAST('/etc/passwd' AS BLOB) WHERE row = 0"), ValueError, "outside of the"),
    ],
)
def test_a_damaged_index_is_refused(flair, indexed, tmp_path, damage, error, words):
    at = damaged(indexed, tmp_path, damage)
    for act in (lambda index: index.query(TEXTS), lambda index: index.update()):
        with pytest.raises(error, match=words):
            act(Index.open(indexed.folder, flair, at=at))


def test_one_process_updates_and_others_search(flair, indexed):
    with WorkdirLock(indexed.at, work="updates the index"):
        with pytest.raises(WorkdirInUse, match=r"updates the index there since .* or use another folder for the index"):
            indexed.update()
        assert indexed.query(TEXTS[0], 1)


def test_queries_from_several_threads(flair, indexed):
    expected = indexed.query(TEXTS, 2)
    index, found = Index.open(indexed.folder, flair, at=indexed.at), []
    threads = [threading.Thread(target=lambda: found.append(index.query(TEXTS, 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_without_faiss(flair, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"search needs Faiss: pip install 'flair_jax\[search\]'"):
        Index.open(folder, flair)


def test_an_update_that_fails_in_the_middle_goes_on(flair, folder, monkeypatch):
    monkeypatch.setattr(search, "BATCH", 2)
    index = Index.open(folder, flair)

    def three(batches, total, title):
        assert total == 4
        for number, batch in enumerate(batches):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        index.update(three)
    assert len(index) == 6
    with (index.at / "local-000001.f16").open("ab") as file:
        file.write(b"half a row")  # of a process that was killed as it wrote
    decoded = encoded(monkeypatch)
    assert index.update().added == 1 and len(decoded) == 1
    check(index, "conditioned", flair, folder)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def checkpoint(flair, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    flax_files.write(path, jax.device_get(flair.params), flair.config)
    return path


def run(capsys, *arguments):
    status = search.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def test_the_command(checkpoint, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    (folder / "notes.txt").write_text("no picture")
    status, out, _ = run(capsys, "index", folder, "--checkpoint", checkpoint.name)
    assert status == 0
    assert "skipped, not an image in one of the formats" in out and "PPM: notes.txt\n" in out
    assert f"{COUNT} pictures in the index" in out and f"{COUNT} added" in out and "1 file skipped" in out
    monkeypatch.chdir(tmp_path)  # the index knows its checkpoint from everywhere
    sheet = tmp_path / "hits.png"
    status, out, _ = run(capsys, "search", folder, *TEXTS[:2], "--top-k", 3, "--output", sheet)
    lines = out.splitlines()
    assert status == 0 and [lines[0], lines[4]] == TEXTS[:2] and lines[8] == f"pictures: {sheet}"
    model = pretrained.load(checkpoint)
    expected = Index.open(folder, model).query(TEXTS[:2], 3)
    assert lines[1:4] == [f"{hit.score:8.4f}  {hit.path}" for hit in expected[0]]
    picture = np.asarray(Image.open(sheet))
    best = Image.open(expected[0][0].path).resize((1, 1))
    assert (np.abs(picture.astype(int) - best.getpixel((0, 0))).sum(-1) < 60).sum() > 1000  # it shows the best hit
    expected[0][0].path.unlink()
    assert search.sheet(TEXTS[:2], expected, folder).width > 3 * 192
    status, out, _ = run(capsys, "index", folder)
    assert status == 0 and "1 removed" in out


def test_errors_of_the_command(checkpoint, folder, indexed, capsys):
    status, _, error = run(capsys, "search", folder, "a dog")
    assert status == 1 and "is no index of photographs: python -m flair_jax.search index" in error
    status, _, error = run(capsys, "search", folder, "a dog", "--index", indexed.at)
    assert status == 1 and "does not say what it was made with: give --checkpoint" in error


def test_a_killed_process_goes_on(checkpoint, folder, flair, tmp_path):
    """Killed with SIGKILL in the middle of an update, which holds the lock; the next one takes over."""
    code = """
import sys, time
from benchmarks import search as benchmark
from flair_jax import pretrained, search
search.BATCH = 1
def slowly(batches, total, title):
    for batch in batches:
        yield batch
        time.sleep(0.5)
search.Index.open(sys.argv[1], pretrained.load(sys.argv[2])).update(slowly)
"""
    process = subprocess.Popen([sys.executable, "-c", code, folder, checkpoint], env=one_device())
    index = Index.open(folder, flair)

    def some():
        try:
            return len(index) >= 2
        except OSError:
            return False

    assert wait_for(some, 60)
    with pytest.raises(WorkdirInUse):
        index.update()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(index)
    assert 2 <= kept < COUNT
    time.sleep(0.1)
    assert index.update().added == COUNT - kept
    check(index, "conditioned", flair, folder)


def test_the_benchmark(flair):
    figures = benchmark.measure({"model": dict(flair.config)}, images=40, candidates=30, turns=1)
    assert (figures["images"], figures["candidates"]) == (40, 30)
    tokens = 4 * 4 * 64 * 2 * 40 / 2**20
    np.testing.assert_allclose(figures["local_mib"], tokens)
    assert {"global_1_texts_seconds", "conditioned_5_texts_seconds", "load_seconds"} <= figures.keys()
