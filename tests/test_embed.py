"""Features of shards as files: what they hold, and that neither processes nor a kill change them."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pyarrow.parquet
import pytest
import safetensors
from conftest import TINY, fresh_params
from PIL import Image
from processes import as_slurm, free_port, one_device, wait_for
from shard_files import write_array_record, write_tar

from flair_jax import embed, models, pretrained
from flair_jax.convert import flax_files
from flair_jax.data.sources.base import ShardError
from flair_jax.data.sources.tf_example import Example
from flair_jax.data.transforms import captions
from flair_jax.embed import Options

SECTION = {
    **TINY,
    "text": {**TINY["text"], "vocab_size": 49408, "depth": 1},
    "vision": {**TINY["vision"], "depth": 1},
}
RECORDS = [5, 3, 4]  # of the shards
ALL = Options(texts=True, local=True, chunk=4)
BATCHES = dict(image_batch=8, text_batch=8)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = fresh_params(models.create(SECTION))
    params = jax.tree.map(lambda x: x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32), params)
    return pretrained.Pretrained(SECTION, params)


def pictures():
    """Of all records: key, file, sentences."""
    rng = np.random.default_rng(0)
    for shard, count in enumerate(RECORDS):
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(file, "PNG")
            sentences = [f"a thing {number}", "seen by day"][: number % 3]
            yield f"{shard}{number}", file.getvalue(), sentences


def members(key, image, sentences):
    return [(f"{key}.png", image), (f"{key}.json", json.dumps({"raw_caption": sentences}).encode())]


@pytest.fixture(scope="module")
def records():
    found = list(pictures())
    found[2] = (found[2][0], found[2][1][:500], found[2][2])  # cut short
    found[6] = (found[6][0], b"no picture", found[6][2])
    return found


@pytest.fixture(scope="module")
def shards(records, tmp_path_factory):
    folder, rest = tmp_path_factory.mktemp("shards"), iter(records)
    for shard, count in enumerate(RECORDS):
        write_tar(folder / f"s-{shard}.tar", [member for _ in range(count) for member in members(*next(rest))])
    return folder


def run(model, shards, output, *, options=ALL, **process):
    return embed.embed(model, shards, output, options, **BATCHES, **process)


@pytest.fixture(scope="module")
def whole(model, shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("features")
    counts = run(model, shards, output)
    return output, counts


def read(file):
    with safetensors.safe_open(file, "numpy") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return arrays, json.loads(opened.metadata()["about"])


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_files_hold_what_the_model_gives(model, records, whole):
    output, counts = whole
    files = sorted(output.glob("*.safetensors"))
    names = ["00000-s-0.tar-00000", "00000-s-0.tar-00001", "00001-s-1.tar-00000", "00002-s-2.tar-00000"]
    assert [file.stem for file in files] == names
    arrays, abouts = zip(*map(read, files), strict=True)
    good = [record for number, record in enumerate(records) if number not in (2, 6)]
    assert [key for about in abouts for key in about["keys"]] == [key for key, _, _ in good]
    pixels = model.preprocess([Image.open(io.BytesIO(image)) for _, image, _ in good])
    expected = model.encode_image(pixels)
    for name in ("pooled", "local"):
        found = np.concatenate([each[f"image/{name}"] for each in arrays])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, getattr(expected, name), atol=2e-5)
    texts = [text for about in abouts for text in about["texts"]]
    assert texts == [sentence for _, _, sentences in good for sentence in sentences] and len(texts) > 4
    pooled = np.concatenate([each["text/pooled"] for each in arrays])
    np.testing.assert_allclose(pooled, model.encode_text(model.tokenize(texts)).pooled, atol=2e-5)
    for each, about in zip(arrays, abouts, strict=True):
        owners = [about["keys"][row] for row in each["text/image"]]
        assert owners == [key for key, _, sentences in good if key in about["keys"] for _ in sentences]
    assert [[key for key, _ in about["skipped"]] for about in abouts] == [["02"], [], ["11"], []]
    assert "cannot decode the image" in abouts[0]["skipped"][0][1]
    assert (counts.written, counts.kept, counts.images, counts.texts) == (4, 0, len(good), len(texts))
    assert [(shard.rpartition("/")[2], key) for shard, key, _ in counts.skipped] == [
        ("s-0.tar", "02"),
        ("s-1.tar", "11"),
    ]
    assert counts.without_texts == sum(not sentences for _, _, sentences in good) > 0


def test_processes_share_the_shards_and_write_the_same_files(model, shards, whole, tmp_path):
    counts = [run(model, shards, tmp_path, process_id=number, num_processes=2) for number in (1, 0)]
    assert [each.written for each in counts] == [1, 3]
    assert contents(tmp_path) == contents(whole[0])
    again = run(model, shards, tmp_path)  # another number of processes
    assert (again.written, again.kept) == (0, 4)
    assert (again.images, again.texts, again.skipped) == (whole[1].images, whole[1].texts, whole[1].skipped)


def test_what_a_killed_process_left_is_completed(model, shards, whole, tmp_path):
    run(model, shards, tmp_path)
    lost = tmp_path / "00001-s-1.tar-00000.safetensors"
    lost.rename(tmp_path / f".{lost.name}.0123.partial")
    os.truncate(tmp_path / f".{lost.name}.0123.partial", 100)
    counts = run(model, shards, tmp_path)
    assert (counts.written, counts.kept) == (1, 3)
    assert contents(tmp_path) == contents(whole[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_has_a_row_for_each_image(model, shards, whole, tmp_path, dtype):
    options = dataclasses.replace(ALL, format="parquet", dtype=dtype)
    counts = run(model, shards, tmp_path, options=options)
    assert dataclasses.replace(counts, written=4, kept=0) == whole[1]
    files = sorted(tmp_path.glob("*.parquet"))
    assert [file.stem for file in files] == [file.stem for file in sorted(whole[0].glob("*.safetensors"))]
    for file in files:
        arrays, about = read(whole[0] / f"{file.stem}.safetensors")
        table = pyarrow.parquet.read_table(file)
        rows = table.to_pylist()
        assert table["key"].to_pylist() == about["keys"] and table.column_names == [
            *("key", "image/pooled", "image/local", "texts", "text/pooled")
        ]
        for name in ("image/pooled", "image/local"):
            shape = arrays[name].shape
            found = table[name].combine_chunks().flatten(recursive=True).to_numpy().reshape(shape)
            assert found.dtype == dtype and table[name].type.list_size == shape[1]
            np.testing.assert_array_equal(found, arrays[name].astype(dtype))
        assert [text for row in rows for text in row["texts"]] == about["texts"]
        assert [row for row, own in enumerate(rows) for _ in own["texts"]] == arrays["text/image"].tolist()
        found = [vector for row in rows for vector in row["text/pooled"]]
        np.testing.assert_array_equal(
            np.reshape(found, arrays["text/pooled"].shape), arrays["text/pooled"].astype(dtype)
        )
        said = json.loads(table.schema.metadata[b"about"])
        assert {name: said[name] for name in ("skipped", "records", "checksum")}.items() <= about.items()
    before = contents(tmp_path)
    files[1].unlink()
    again = run(model, shards, tmp_path, options=options)
    assert (again.written, again.kept) == (1, 3) and contents(tmp_path) == before
    assert (again.images, again.texts, again.skipped) == (counts.images, counts.texts, counts.skipped)
    with pytest.raises(ValueError, match="format was 'parquet'"):
        run(model, shards, tmp_path, options=dataclasses.replace(options, format="safetensors"))
    files[1].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{files[1].name} is damaged"):
        run(model, shards, tmp_path, options=options)


def test_a_folder_of_before_there_were_formats_goes_on(model, shards, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    settings = json.loads((tmp_path / "out" / embed.SETTINGS).read_text())
    del settings["format"]
    (tmp_path / "out" / embed.SETTINGS).write_text(json.dumps(settings))
    assert run(model, shards, tmp_path / "out").kept == 4
    with pytest.raises(ValueError, match="format was 'safetensors'"):
        run(model, shards, tmp_path / "out", options=dataclasses.replace(ALL, format="parquet"))


def test_formats_and_their_dtypes():
    with pytest.raises(ValueError, match="format is 'csv'; expected one of safetensors, parquet"):
        Options(format="csv")
    with pytest.raises(ValueError, match="bfloat16, which parquet does not have"):
        Options(format="parquet", dtype="bfloat16")


def test_processes_of_jax_distributed_write_the_same_files(model, shards, whole, tmp_path):
    """One is through long before the other, waits for it, and neither needs the other's devices."""
    flax_files.write(tmp_path / "tiny.safetensors", jax.device_get(model.params), model.config)
    flags = ["--checkpoint", tmp_path / "tiny.safetensors", "--shards", shards, "--output", tmp_path / "out"]
    flags += ["--texts", "--local", "--chunk", "4", "--image_batch", "8", "--text_batch", "8", "--distributed"]
    command = [sys.executable, "-m", "flair_jax.embed", *map(str, flags)]
    port = free_port()
    both = [
        subprocess.Popen(command, env=one_device(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for extra in as_slurm(2, port)
    ]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "in 3 files, 0 of them made before" in printed[0] and "in 1 file, 0 of them made before" in printed[1]
    found = contents(tmp_path / "out")
    assert found.keys() == contents(whole[0]).keys()
    for file in sorted(whole[0].glob("*.safetensors")):
        (arrays, about), (own, own_about) = read(file), read(tmp_path / "out" / file.name)
        assert about == own_about
        for name, x in arrays.items():
            np.testing.assert_allclose(own[name], x, atol=1e-5, err_msg=name)  # of eight devices and of one


def test_killed_with_sigkill_and_completed_by_two_processes(model, shards, tmp_path):
    flax_files.write(tmp_path / "tiny.safetensors", jax.device_get(model.params), model.config)
    flags = dict(checkpoint=tmp_path / "tiny.safetensors", shards=shards, chunk=1, image_batch=1)
    output, unbroken = tmp_path / "out", tmp_path / "unbroken"

    def command(output, **process):
        given = [part for name, value in {**flags, **process}.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "flair_jax.embed", *given, "--output", str(output)]

    def files():
        return len(list(output.glob("*.safetensors")))

    with subprocess.Popen(command(output), env=one_device(), stderr=subprocess.DEVNULL) as process:
        assert wait_for(lambda: files() >= 1, 60)
        process.send_signal(signal.SIGKILL)
    done = files()
    assert 1 <= done <= sum(RECORDS)
    both = [  # at the same time, where one was before
        subprocess.Popen(command(output, process_id=number, num_processes=2), env=one_device(), stdout=subprocess.PIPE)
        for number in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "8 images in 9 files" in printed[0]
    assert "2 images in 3 files" in printed[1]  # of shard 1, with one that is damaged
    whole = subprocess.check_output(command(unbroken), env=one_device(), text=True)
    assert "10 images in 12 files, 0 of them made before; 2 records skipped" in whole
    assert contents(output) == contents(unbroken)


def test_formats_that_training_reads(model, records, tmp_path):
    def example(key, image, sentences):
        message = Example()
        fields = {"key": key.encode(), "image": image, "json": json.dumps({"raw_caption": sentences}).encode()}
        for name, value in fields.items():
            message.features.feature[name].bytes_list.value.append(value)
        return message.SerializeToString()

    examples = [example(*record) for record in records[3:5]]
    write_array_record(tmp_path / "a.array_record", examples)
    write_tar(tmp_path / "c.tar", [member for record in records[3:5] for member in members(*record)])
    names = "::".join(str(tmp_path / name) for name in ("a.array_record", "c.tar"))
    counts = run(model, names, tmp_path / "out", options=Options())
    assert counts.images == 4
    files = [read(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    for arrays, about in files:
        assert about["keys"] == [key for key, _, _ in records[3:5]]
        assert list(arrays) == ["image/pooled"] and about["texts"] == []
        np.testing.assert_array_equal(arrays["image/pooled"], files[0][0]["image/pooled"])


@pytest.mark.parametrize(("dtype", "expected"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_dtypes(model, shards, whole, tmp_path, dtype, expected):
    run(model, shards / "s-1.tar", tmp_path, options=Options(dtype=dtype))
    arrays, _ = read(tmp_path / "00000-s-1.tar-00000.safetensors")
    exact, _ = read(whole[0] / "00001-s-1.tar-00000.safetensors")
    assert arrays["image/pooled"].dtype == expected
    np.testing.assert_array_equal(arrays["image/pooled"], exact["image/pooled"].astype(expected))


def test_numbers_that_a_dtype_cannot_hold_are_refused(model, shards, tmp_path):
    params = {**jax.device_get(model.params)}
    params["image_projection"] = params["image_projection"] * np.float32(1e6)
    with pytest.raises(ValueError, match="image/pooled: a number does not fit into float16"):
        run(pretrained.Pretrained(SECTION, params), shards, tmp_path, options=Options(dtype="float16"))
    assert not list(tmp_path.glob("*.safetensors"))


def test_another_run_in_the_same_folder_is_refused(model, shards, whole):
    before = contents(whole[0])
    with pytest.raises(ValueError, match=r"embed.json: chunk was 4 .* is 3 now"):
        run(model, shards, whole[0], options=Options(texts=True, local=True, chunk=3))
    with pytest.raises(ValueError, match=r"shards was 3 of them, .* is 1 of them"):
        run(model, shards / "s-1.tar", whole[0])
    params = {**jax.device_get(model.params), "logit_scale": np.float32(3)}
    with pytest.raises(ValueError, match="weights was"):
        run(pretrained.Pretrained(SECTION, params), shards, whole[0])
    with pytest.raises(ValueError, match="process_id is 2 of 2 processes"):
        run(model, shards, whole[0], process_id=2, num_processes=2)
    assert contents(whole[0]) == before


def test_a_shard_that_changed_and_one_that_cannot_be_opened(model, records, tmp_path):
    folder, output = tmp_path / "shards", tmp_path / "out"
    folder.mkdir()
    write_tar(folder / "a.tar", members(*records[0]))
    (folder / "b.tar").write_bytes(b"no tar" * 1000)
    write_tar(folder / "c.tar", members(*records[1]))
    counts = run(model, folder, output)
    assert list(counts.failed) == [str(folder / "b.tar")] and counts.images == 2
    time.sleep(0.01)
    write_tar(folder / "c.tar", [*members(*records[1]), *members(*records[3])])
    with pytest.raises((ShardError, ValueError), match=r"00002-c.tar-00000.safetensors has records"):
        run(model, folder, output)
    (output / "00002-c.tar-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"00002-c.tar-00000.safetensors is damaged"):
        run(model, folder, output)


def test_the_command_reports(model, shards, tmp_path, capsys):
    flax_files.write(tmp_path / "tiny.safetensors", jax.device_get(model.params), model.config)
    flags = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "--shards", str(shards / "s-0.tar"), "--texts"]
    status = embed.main([*flags, "--output", str(tmp_path / "out"), "--image_batch", "8", "--text_batch", "8"])
    printed = capsys.readouterr()
    assert status == 0 and f"skipped: {shards / 's-0.tar'}: 02: cannot decode the image" in printed.out
    assert "left out: 1 x cannot decode the image" in printed.out
    assert "4 images, 2 texts, 2 images without in 1 file, 0 of them made before; 1 record skipped" in printed.out
    settings = json.loads((tmp_path / "out" / "embed.json").read_text())
    assert settings["fields"] == list(captions.FIELDS) and settings["shards"] == [str(shards / "s-0.tar")]
    status = embed.main([*flags, "--output", str(tmp_path / "out"), "--dtype", "float16"])
    assert status == 1 and "dtype was 'float32'" in capsys.readouterr().err
    status = embed.main([*flags, "--output", str(tmp_path / "out"), "--coordinator_address", "localhost:1"])
    assert status == 1 and "--coordinator_address needs --distributed" in capsys.readouterr().err
