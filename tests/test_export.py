"""Exported programs: called in a process without this package they give what the model gives, for any batch."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import TINY, fresh_params
from optional import onnx, onnxruntime, torch
from processes import one_device

from benchmarks import export as benchmark
from flair_jax import config as configuration
from flair_jax import export, models, pretrained
from flair_jax.configs import scenes
from flair_jax.convert import flax_files, onnx_files

FLAIR = {**TINY, "text": {**TINY["text"], "depth": 1}, "vision": {**TINY["vision"], "depth": 1}}
CLIP = {**FLAIR, "name": "clip", "pooling": None, "init_logit_bias": None, "gelu": "quick"}
SIGLIP = {**CLIP, "name": "siglip", "init_logit_bias": -10.0, "gelu": "exact"}
SIZES = [(3, 2), (1, 5)]  # images and texts

# What a service does that has JAX, and a file of weights and programs: no part of flair_jax.
READER = """
import json, pathlib, sys
import jax, jax.export, numpy as np, safetensors.numpy

folder, inputs, results = map(pathlib.Path, sys.argv[1:])
about = json.loads((folder / "export.json").read_text())
weights = safetensors.numpy.load_file(folder / about["weights"])

def load(part):
    exported = jax.export.deserialize(bytearray((folder / about["parts"][part]["stablehlo"]).read_bytes()))
    own = {name: weights[name] for name in about["parts"][part]["weights"]}
    return lambda *arrays: jax.jit(exported.call)(own, *arrays)

programs = {part: load(part) for part in about["parts"]}
given, found = np.load(inputs, allow_pickle=False), {}
for case in ("0", "1"):
    image, text = programs["image"](given["images" + case]), programs["text"](given["tokens" + case])["pooled"]
    scored = image[next(iter(about["parts"]["score"]["inputs"]))]
    found |= {f"image.{name}{case}": x for name, x in image.items()} | {"text" + case: text}
    found["logits" + case] = programs["score"](scored, text)["logits"]
    if "pool" in programs:
        found["pool" + case] = programs["pool"](text, image["local"])["pooled"]
np.savez(results, **found)
loaded = [name for name in sys.modules if name.split(".")[0] in ("flair_jax", "flax", "torch", "tensorflow")]
assert not loaded, loaded
"""


def grain():
    config = scenes.get_config("grain")
    config.model.vision.depth = config.model.text.depth = config.model.decoder.depth = 1
    return configuration.normalize(config.model.to_dict())


def model_of(section):
    rng = np.random.default_rng(0)  # fresh parameters have biases of 0 and scales of 1
    params = fresh_params(models.create(section))
    params = jax.tree.map(lambda x: x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32), params)
    return pretrained.Pretrained(section, params)


@pytest.fixture(scope="module", params=["flair", "clip", "grain"])
def model(request):
    return model_of({"flair": FLAIR, "clip": CLIP}.get(request.param) or grain())


@pytest.fixture(scope="module")
def flair():
    return model_of(FLAIR)


def inputs(model):
    rng = np.random.default_rng(0)
    vocabulary = model.config["text"]["vocab_size"]
    for images, texts in SIZES:
        pixels = rng.integers(0, 256, (images, *model.model.image_size, 3), dtype=np.uint8)
        tokens = rng.integers(1, vocabulary - 1, (texts, model.model.context_length), dtype=np.int32)
        for row, end in zip(tokens, rng.integers(3, tokens.shape[1], texts), strict=True):
            row[end], row[end + 1 :] = vocabulary - 1, 0
        yield pixels, tokens


def check(model, number, pixels, tokens, image, text, logits, pooled):
    """Results of programs, `image` by name, against the model."""
    expected = {name: x for name, x in vars(model.encode_image(pixels)).items() if x is not None}
    assert image.keys() == expected.keys()
    for name, x in image.items():
        np.testing.assert_allclose(x, expected[name], atol=2e-5)
    np.testing.assert_allclose(text, model.encode_text(tokens).pooled, atol=2e-5)
    scores = model.get_logits(pixels, tokens)
    assert np.ptp(scores) > 0.05
    np.testing.assert_allclose(logits, scores, atol=1e-4)
    assert (pooled is not None) == model.model.has_pooling
    if pooled is not None:
        unit = [np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (pooled, text)]
        cosines = np.einsum("bnd,nd->bn", *unit)
        scale, bias = np.exp(model.params["logit_scale"]), model.params.get("logit_bias", 0.0)
        np.testing.assert_allclose(scale * cosines + bias, scores, atol=1e-4)


def test_stablehlo_runs_without_the_package(model, tmp_path):
    about = export.write(model, tmp_path / "out")
    arrays = {}
    for number, (pixels, tokens) in enumerate(inputs(model)):
        arrays |= {f"images{number}": pixels, f"tokens{number}": tokens}
    np.savez(tmp_path / "inputs.npz", **arrays)
    files = [tmp_path / name for name in ("out", "inputs.npz", "results.npz")]
    subprocess.run([sys.executable, "-c", READER, *files], check=True, env=one_device(), cwd=tmp_path)
    found = np.load(tmp_path / "results.npz", allow_pickle=False)
    for case, (pixels, tokens) in enumerate(inputs(model)):
        image = {name[6:-1]: found[name] for name in found if name.startswith("image.") and name.endswith(str(case))}
        pooled = found.get(f"pool{case}")
        check(model, case, pixels, tokens, image, found[f"text{case}"], found[f"logits{case}"], pooled)

    assert about == json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["images"]["size"] == list(model.model.image_size)
    assert about["images"]["resize"] == model.model.preprocessing.resize
    assert about["texts"]["context_length"] == model.model.context_length
    np.testing.assert_allclose(about["logit_scale"], np.exp(model.params["logit_scale"]), rtol=1e-6)
    np.testing.assert_allclose(about["logit_bias"], model.params.get("logit_bias", 0.0))
    used = {path for part in about["parts"].values() for path in part["weights"]}
    arrays, section = flax_files.read(tmp_path / "out" / about["weights"])
    assert used == arrays.keys() and section == model.config  # all of the weights, which flair_jax.load reads too


@pytest.mark.parametrize("section", [FLAIR, CLIP, SIGLIP], ids=lambda section: section["name"])
def test_onnx_equals_the_model(section, tmp_path):
    assert onnx.__version__ and torch.__version__
    model = model_of(section)
    about = export.write(model, tmp_path / "out", onnx=True)
    sessions = {
        name: onnxruntime.InferenceSession(tmp_path / "out" / part["onnx"]) for name, part in about["parts"].items()
    }
    for name, session in sessions.items():
        described = about["parts"][name]
        assert [x.name for x in session.get_inputs()] == list(described["inputs"])
        assert [x.name for x in session.get_outputs()] == described["outputs"]
        for x in session.get_inputs():
            assert x.shape == described["inputs"][x.name][1]
    assert ("pool" in sessions) == model.model.has_pooling
    for number, (pixels, tokens) in enumerate(inputs(model)):
        image = dict(zip(("pooled", "local"), sessions["image"].run(None, {"images": pixels}), strict=True))
        (text,) = sessions["text"].run(None, {"tokens": tokens})
        pool = sessions["pool"].run(None, {"text": text, "local": image["local"]})[0] if "pool" in sessions else None
        scored = "local" if "pool" in sessions else "pooled"
        (logits,) = sessions["score"].run(None, {scored: image[scored], "text": text})
        check(model, number, pixels, tokens, image, text, logits, pool)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({**FLAIR, "gelu": "quick"}, "this model is 'flair' with gelu='quick'"),
        ({**FLAIR, "vision": {**FLAIR["vision"], "norm_eps": 1e-6}}, "gelu='exact', vision.norm_eps=1e-06. StableHLO"),
        ({**CLIP, "text": {**CLIP["text"], "gelu": "exact"}}, "text.gelu"),
        ({**CLIP, "vision": {**CLIP["vision"], "image_size": (64, 32)}}, r"image_size is \(64, 32\)"),
        ({**CLIP, "name": "grain", "decoder": {}}, "this model is 'grain' with gelu='quick', decoder={}"),
    ],
)
def test_models_that_onnx_files_are_not_made_of(section, words):
    with pytest.raises(ValueError, match=words):
        onnx_files.check(section)


def test_what_cannot_be_exported(flair, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty: give an empty folder"):
        export.write(flair, tmp_path)
    quick = pretrained.Pretrained({**FLAIR, "gelu": "quick"}, flair.params)
    with pytest.raises(ValueError, match="this model is 'flair' with gelu='quick'"):
        export.write(quick, tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()
    section = {**CLIP, "text": None}
    towers = {name: x for name, x in flair.params.items() if name in ("vision", "image_projection", "logit_scale")}
    with pytest.raises(ValueError, match="the model has no text tower"):
        export.write(pretrained.Pretrained(section, towers), tmp_path / "out")


def test_the_command(flair, tmp_path, capsys):
    flax_files.write(tmp_path / "tiny.safetensors", jax.device_get(flair.params), flair.config)
    arguments = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "--output", str(tmp_path / "out")]
    assert export.main(arguments) == 0
    printed = capsys.readouterr().out
    files = [
        "export.json",
        *(f"{part}.stablehlo" for part in ("image", "pool", "score", "text")),
        "weights.safetensors",
    ]
    assert [line.rpartition("/")[2] for line in printed.splitlines()] == files
    assert export.main(arguments) == 1 and "is not empty" in capsys.readouterr().err


def test_the_benchmark(flair):
    config = {"model": dict(flair.config), "data": {"shards": None}}
    figures = benchmark.measure(config, images=2, texts=3, turns=1, with_onnx=False)
    assert float(figures["stablehlo_largest_difference"]) < 1e-4
    assert {
        "image.stablehlo_mib",
        "score.stablehlo_mib",
        "stablehlo_image_seconds",
        "model_text_seconds",
    } <= figures.keys()
