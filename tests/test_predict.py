"""The command that scores images and texts."""

import numpy as np
import pytest
from conftest import fresh_params
from PIL import Image

from flair_jax import config as configuration
from flair_jax import models, predict, pretrained
from flair_jax.configs import scenes
from flair_jax.convert import flax_files

TEXTS = ["a large red circle, at the top left", "a blue square"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (60, 90)), ("high.jpg", (70, 50))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module", params=["flair", "grain", "clip"])
def checkpoint(request, tmp_path_factory):
    config = scenes.get_config(request.param)
    config.model.vision.depth = config.model.text.depth = 1
    if config.model.decoder is not None:
        config.model.decoder.depth = 1
    section = configuration.normalize(config.model.to_dict())
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
    flax_files.write(path, fresh_params(models.create(section)), section)
    return path


def run(capsys, *arguments):
    status = predict.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def test_table_and_picture(checkpoint, photos, tmp_path, capsys):
    images = [photos / "wide.png", photos / "high.jpg"]
    sheet = tmp_path / "sheet.png"
    flags = [flag for image in images for flag in ("--image", image)]
    flags += [flag for text in TEXTS for flag in ("--text", text)]
    status, out, error = run(capsys, "--checkpoint", checkpoint, *flags, "--output", sheet)

    model = pretrained.load(checkpoint)
    pixels = model.preprocess([Image.open(image) for image in images])
    logits = np.asarray(model.get_logits(pixels, model.tokenize(TEXTS)))
    head, *rows = out.splitlines()[:5]
    assert [row.split("  ")[0].strip() for row in rows] == ["wide.png"] * 2 + ["high.jpg"] * 2
    assert all(text in row for row, text in zip(rows, 2 * TEXTS, strict=True))  # a text with a comma is one text
    titles = head.split()[2:]
    columns = dict(zip(titles, np.array([row.split()[-len(titles) :] for row in rows], float).T, strict=True))
    scale = np.exp(model.params["logit_scale"])
    as_clip = np.asarray(model.get_logits_as_clip(pixels, model.tokenize(TEXTS)))
    np.testing.assert_allclose(columns["global"], as_clip.reshape(-1) / scale, atol=1e-4)
    if checkpoint.stem == "flair":
        assert titles == ["conditioned", "global", "probability"]
        np.testing.assert_allclose(columns["probability"], 1 / (1 + np.exp(-logits.reshape(-1))), atol=1e-4)
        conditioned = (logits - model.params["logit_bias"]).reshape(-1) / scale
        np.testing.assert_allclose(columns["conditioned"], conditioned, atol=1e-4)
    else:
        assert titles == ["global", *(["regions"] if checkpoint.stem == "grain" else []), "probability"]
        np.testing.assert_allclose(columns["probability"].reshape(2, 2).sum(axis=1), 1, atol=2e-4)
    assert status == 0 and not error and len(np.unique(np.asarray(Image.open(sheet)))) > 10


@pytest.mark.parametrize(
    ("checkpoint", "view", "options", "words"),
    [
        ("flair", "attention", {"heads": 1}, None),
        ("flair", "attention", {"heads": "each", "scale": "own"}, None),
        ("flair", "attention", {"heads": "0,2", "scale": 3}, None),
        ("flair", "values", {}, None),
        ("flair", "attention", {"heads": 9}, "heads are [9]; the pooling has 4, 0 to 3"),
        ("flair", "attention", {"scale": -1}, "scale is -1.0; expected 'shared', 'own' or a number above 0"),
        ("flair", "regions", {}, "regions need a query decoder, and config.model.decoder is None"),
        ("flair", "patches", {"heads": 1}, "heads is [1], but only the view 'attention' has heads"),
        ("grain", "regions", {"scale": 3}, "boxes, which have neither heads nor a scale"),
        ("grain", "queries", {"heads": 0}, None),
        ("grain", "queries", {"heads": "each"}, "heads is 'each'"),
        ("clip", "patches", {}, None),
        ("clip", "attention", {}, "heat maps need text-conditioned pooling, and config.model.pooling is None"),
        ("clip", "values", {}, "mode is 'value'; this model compares patches by projected"),
    ],
    indirect=["checkpoint"],
)
def test_views(checkpoint, view, options, words, photos, tmp_path, capsys):
    """Each is another picture than the one without options."""
    common = ["--checkpoint", checkpoint, "--image", photos / "wide.png", *(f"--text={text}" for text in TEXTS)]
    flags = [f"--{name}={value}" for name, value in options.items()]
    status, _, error = run(capsys, *common, "--output", tmp_path / "a.png", "--view", view, *flags)
    if words is not None:
        assert status == 1 and words in error and not (tmp_path / "a.png").exists()
        return
    assert status == 0 and Image.open(tmp_path / "a.png").width > 400
    if options:
        run(capsys, *common, "--output", tmp_path / "b.png", "--view", view)
        assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("checkpoint", ["clip"], indirect=True)
@pytest.mark.parametrize(("image", "words"), [("text.png", "text.png: not an image"), ("missing.png", "No such file")])
def test_what_is_no_picture(checkpoint, photos, image, words, capsys):
    status, _, error = run(capsys, "--checkpoint", checkpoint, "--image", photos / image, "--text", "a dog")
    assert status == 1 and words in error
