"""Models with pictures and texts: what the docstrings show, and that every method agrees with the arrays' methods."""

import doctest
import functools
import pathlib
import weakref

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from conftest import fresh_params

import flair_jax
from flair_jax import inference, models, pictures, predict, visualize
from flair_jax.config import normalize
from flair_jax.configs import scenes
from flair_jax.convert import flax_files
from flair_jax.evaluators import features
from flair_jax.pretrained import Pretrained

METHODS = [found for name, found in vars(Pretrained).items() if callable(found) and not name.startswith("_")]
VIEWS = [visualize.heat_maps, visualize.regions, visualize.query_maps]
TEXTS = ["a large red circle, at the top left", "a blue square", "a green cross"]


def section_of(kind: str, resize: str = "crop") -> dict:
    """A small model of a kind of `scenes`, for images of 64 pixels, 4 x 4 patches."""
    config = scenes.get_config(kind)
    config.model.vision.update(depth=1, image_size=64, patch_size=16)
    config.model.text.update(depth=1, context_length=77)
    config.model.preprocess.resize = resize
    if config.model.decoder is not None:
        config.model.decoder.update(depth=1, regions=3)
    return normalize(config.model.to_dict())


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the docstrings name: weights and photographs."""
    path = tmp_path_factory.mktemp("files")
    for kind in ("flair", "grain", "clip"):
        section = section_of(kind)
        flax_files.write(path / f"{kind}.safetensors", fresh_params(models.create(section)), section)
    picture(80, 60).save(path / "fox.jpg")
    picture(50, 70, seed=1).save(path / "dog.jpg")
    picture(80, 60).save(path / "cut.png")
    (path / "cut.png").write_bytes((path / "cut.png").read_bytes()[:-300])
    (path / "text.png").write_text("no picture")
    return path


@pytest.fixture(scope="module")
def flair(folder):
    return flair_jax.load(folder / "flair.safetensors")


@pytest.fixture(scope="module")
def grain(folder):
    return flair_jax.load(folder / "grain.safetensors")


@pytest.mark.parametrize("function", [*METHODS, *VIEWS], ids=lambda function: function.__name__)
def test_examples_of_the_docstrings(folder, monkeypatch, function):
    monkeypatch.chdir(folder)
    names = {"flair_jax": flair_jax, "visualize": visualize, "PIL": PIL}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, module=False, globs=names)
    assert len(example.examples) > 1
    assert doctest.DocTestRunner().run(example).failed == 0


def test_examples_of_the_guide(folder, monkeypatch):
    """docs/using.md, with weights that know nothing."""
    monkeypatch.chdir(folder)
    guide = pathlib.Path(__file__).parents[1] / "docs" / "using.md"
    result = doctest.testfile(str(guide), module_relative=False, globs={}, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 15 and result.failed == 0


def test_pictures_in_every_form_have_the_scores_of_their_arrays(flair, grain, tmp_path):
    image = picture(80, 60)
    image.save(tmp_path / "a.png")
    image.convert("RGBA").save(tmp_path / "b.png")
    forms = [str(tmp_path / "a.png"), tmp_path / "b.png", image, np.asarray(image), PIL.Image.open(tmp_path / "b.png")]
    pixels, tokens = flair.preprocess(image), flair.tokenize(TEXTS)
    scale, bias = np.exp(flair.params["logit_scale"]), flair.params["logit_bias"]
    for mode, expected in (
        ("conditioned", (flair.get_logits(pixels, tokens) - bias) / scale),
        (None, (flair.get_logits(pixels, tokens) - bias) / scale),
        ("global", flair.get_logits_as_clip(pixels, tokens) / scale),
    ):
        found = flair.score(forms, TEXTS, mode=mode)
        assert found.shape == (5, 3) and found.dtype == np.float32
        np.testing.assert_allclose(found, np.repeat(expected, 5, axis=0), atol=1e-5)
    assert flair.score(image, "one text, with a comma").shape == (1, 1)
    assert flair.score([], TEXTS).shape == (0, 3) and flair.score(image, []).shape == (1, 0)
    (found,) = grain.regions(image, TEXTS)
    np.testing.assert_allclose(grain.score(image, TEXTS, mode="regions"), found.cosines.max(axis=0)[None], atol=1e-5)


def test_many_pictures_are_decoded_batch_by_batch(folder, monkeypatch, tmp_path):
    """Few are in memory at a time, more than a few batches show their progress, and the order stays."""
    monkeypatch.setitem(inference._BATCHES, "image_batch", 8)
    totals, alive, most = [], set(), [0]
    monkeypatch.setattr(inference, "progress", lambda items, total, title: totals.append(total) or items)
    decode = pictures.Pictures.__getitem__

    def counted(self, index):
        image = decode(self, index)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most[0] = max(most[0], len(alive))
        return image

    monkeypatch.setattr(pictures.Pictures, "__getitem__", counted)
    model = flair_jax.load(folder / "flair.safetensors")
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        picture(40, 40, seed=number).save(paths[-1])
    scores = model.score(paths, TEXTS)
    assert totals == [5] and most[0] <= 17  # threads
    np.testing.assert_allclose(scores[33:35], model.score(paths[33:35], TEXTS), atol=1e-5)
    assert totals == [5]
    model.heat_maps(paths, TEXTS)
    model.classify(paths, ["red", "blue"])
    assert totals == [5, 5, 5]


@pytest.fixture
def encodings(monkeypatch):
    """How many batches of images and of texts the towers of models that are loaded from now on encode."""
    counts, towers = {"image": 0, "text": 0}, features._towers

    def counted(tower, which):
        def run(*arguments, **options):
            counts[which] += 1
            return tower(*arguments, **options)

        return run

    def towers_counted(*arguments):
        return [counted(tower, which) for tower, which in zip(towers(*arguments), counts, strict=True)]

    monkeypatch.setattr(features, "_towers", towers_counted)
    return counts


@pytest.mark.parametrize(
    ("kind", "texts", "ask"),
    [
        ("flair", 1, lambda m, x: m.scores(x, TEXTS)),
        ("grain", 1, lambda m, x: m.scores(x, TEXTS)),
        ("flair", 1, lambda m, x: predict.table(m, x, TEXTS)),
        ("grain", 0, lambda m, x: visualize.query_maps(m, x)),
        ("flair", 1, lambda m, x: predict.main(_arguments("flair", x))),
        ("grain", 1, lambda m, x: predict.main(_arguments("grain", x))),
        ("grain", 1, lambda m, x: predict.main([*_arguments("grain", x), "--view", "queries"])),
    ],
)
def test_pictures_and_texts_are_encoded_once(folder, monkeypatch, encodings, kind, texts, ask):
    """Whatever is asked of them together."""
    monkeypatch.chdir(folder)
    assert ask(flair_jax.load(f"{kind}.safetensors"), ["fox.jpg", "dog.jpg"]) is not None
    assert encodings == {"image": 1, "text": texts}


def _arguments(kind, images):
    flags = [f"--checkpoint={kind}.safetensors", "--output=once.png", *(f"--image={image}" for image in images)]
    return [*flags, *(f"--text={text}" for text in TEXTS)]


@pytest.mark.parametrize("kind", ["flair", "grain", "clip"])
def test_encoded_pictures_and_texts_have_the_answers_of_their_own(folder, kind):
    model, forms = _loaded(folder / f"{kind}.safetensors"), [picture(64, 64), folder / "fox.jpg"]
    images, texts = model.encoded(forms, TEXTS)
    assert model.encoded(images, texts) == (images, texts) and list(texts) == TEXTS and len(images) == 2
    assert (
        model.modes == {"flair": ("conditioned", "global"), "grain": ("global", "regions"), "clip": ("global",)}[kind]
    )
    for mode, found in model.scores(images, texts).items():
        np.testing.assert_allclose(found, model.score(forms, TEXTS, mode=mode), atol=1e-6)
    questions = {
        "flair": [lambda x, y: model.heat_maps(x, y, heads="each"), lambda x, y: [model.patch_similarity(x, y)]],
        "grain": [lambda x, y: model.query_maps(x), lambda x, y: [part for one in model.regions(x, y) for part in one]],
        "clip": [lambda x, y: [model.patch_similarity(x, y)]],
    }[kind]
    for ask in questions:
        for own, plain in zip(ask(images, texts), ask(forms, TEXTS), strict=True):
            np.testing.assert_allclose(own, plain, atol=1e-5)
    assert [len(x) for x in model.encoded([])] == [0, 0]
    other = Pretrained(model.config, model.params)
    with pytest.raises(ValueError, match="these images were encoded by another model"):
        other.score(images, TEXTS)
    with pytest.raises(ValueError, match="these texts were encoded by another model"):
        other.score(forms, texts)


def test_photographs_are_seen_upright(flair, grain, tmp_path):
    upright, exif = picture(80, 60), PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    forms = [tmp_path / "turned.png", PIL.Image.open(tmp_path / "turned.png"), np.asarray(upright)]
    scores = flair.score(forms, TEXTS)
    np.testing.assert_array_equal(scores, scores[[2, 2, 2]])
    assert flair.segment(forms[0], ["red", "blue"]).shape == (60, 80)
    boxes = [found.boxes for found in grain.regions(forms)]
    np.testing.assert_array_equal(boxes[0], boxes[2])


def test_search_sorts_by_score_and_then_by_number(flair):
    images = [picture(64, 64, seed) for seed in (0, 1, 0, 2, 0)]
    scores = flair.score(images, TEXTS)
    found = flair.search(images, TEXTS, top_k=4)
    assert [len(hits) for hits in found] == [4, 4, 4] and len(flair.search(images, "a", top_k=9)[0]) == 5
    for text, hits in enumerate(found):
        assert [hit.score for hit in hits] == sorted(scores[:, text], reverse=True)[:4]
        assert all(hit.score == scores[hit.image, text] for hit in hits)
        equal = [hit.image for hit in hits if hit.image in (0, 2, 4)]
        assert equal == sorted(equal)
    assert flair.search([], TEXTS) == [[], [], []]
    with pytest.raises(ValueError, match="top_k is 0"):
        flair.search(images, TEXTS, top_k=0)


@pytest.mark.parametrize("mode", ["conditioned", "global"])
def test_classes_are_means_of_their_prompts(flair, mode):
    images = [picture(64, 64, seed) for seed in range(3)]
    templates, names = ["a {c}.", "the {c}, large"], ["circle", ("square", "box"), "ring"]
    found = flair.classify(images, names, templates, mode=mode)
    unit = []
    for own in (["circle"], ["square", "box"], ["ring"]):
        prompts = [template.replace("{c}", name) for name in own for template in templates]
        vectors = np.asarray(flair.encode_text(flair.tokenize(prompts)).pooled)
        mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
        unit.append(mean / np.linalg.norm(mean))
    text = flair.encode_text(flair.tokenize(["a"] * 3)).replace(pooled=np.stack(unit))
    image = flair.encode_image(flair.preprocess(images))
    method = {"conditioned": "score", "global": "global_score"}[mode]
    logits = np.asarray(flair.model.apply({"params": flair.params}, image, text, method=method))
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), atol=1e-4)
    assert flair.classify([], names).shape == (0, 3)
    np.testing.assert_allclose(flair.classify(images, names, "eurosat").sum(axis=1), 1, atol=1e-5)  # a set's templates


def test_segments_are_the_nearest_class_of_each_pixel(flair):
    image, names = picture(64, 64), ["circle", "square", "ring"]
    found = flair.segment(image, names, "{c}", short_side=None)
    cosines = flair.patch_similarity(image, names)[0]  # (3, 4, 4)
    large = [np.asarray(PIL.Image.fromarray(x).resize((64, 64), PIL.Image.Resampling.BILINEAR)) for x in cosines]
    assert found.dtype == np.int32 and (found == np.argmax(large, axis=0)).mean() > 0.99
    assert len(np.unique(found)) > 1
    for mode in ("value", "attention"):
        other = flair.segment(image, names, "{c}", mode=mode, short_side=1.5, whole_image=mode == "value")
        assert other.shape == (64, 64) and (other != found).any()
    assert (flair.segment(picture(50, 30), ["ring", "ring"], short_side=1.0) == -1).all()  # a tie belongs to nobody


@pytest.mark.parametrize("whole_image", [False, True])
def test_segments_of_many_pictures_are_those_of_each(flair, folder, tmp_path, whole_image):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    picture(80, 60, seed=2).save(tmp_path / "turned.jpg", exif=exif)
    many = [folder / "fox.jpg", picture(64, 64), np.asarray(picture(50, 70, seed=1)), tmp_path / "turned.jpg"]
    ask = functools.partial(flair.segment, class_names=["circle", "square"], whole_image=whole_image, short_side=1.0)
    found = ask(many)
    assert [mask.shape for mask in found] == [(60, 80), (64, 64), (70, 50), (80, 60)]
    for mask, one in zip(found, many, strict=True):
        assert mask.dtype == np.int32 and (mask == ask(one)).mean() > 0.999  # batches are of other shapes
        assert len(np.unique(mask)) > 1
    assert [mask.shape for mask in ask([picture(64, 64)])] == [(64, 64)] and ask([]) == []


def test_regions_lie_in_the_picture_s_own_pixels(folder, grain):
    """Whichever way the model's image was made of it."""
    wide = picture(200, 100)
    for resize, origin, scale in (("crop", (50, 0), (100, 100)), ("squash", (0, 0), (200, 100))):
        section = section_of("grain", resize)
        model = Pretrained(section, grain.params)
        ((boxes, cosines),) = model.regions(wide, TEXTS[:2])
        features = model.encode_image(model.preprocess(wide))
        x, y, width, height = np.asarray(features.boxes)[0].T
        corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
        expected = np.clip(corners * (scale * 2) + origin * 2, 0, (200, 100) * 2)
        np.testing.assert_allclose(boxes, expected, atol=1e-3)
        assert boxes.shape == (3, 4) and boxes.dtype == np.float32 and cosines.shape == (3, 2)
        region = np.asarray(features.regions)[0]
        text = np.asarray(model.encode_text(model.tokenize(TEXTS[:2])).pooled)
        norms = np.linalg.norm(region, axis=1)[:, None] * np.linalg.norm(text, axis=1)
        np.testing.assert_allclose(cosines, region @ text.T / norms, atol=1e-5)
    assert [found.cosines.shape for found in grain.regions([wide, wide])] == [(3, 0)] * 2 and grain.regions([]) == []


def test_heat_maps_are_the_attention_of_the_arrays(flair, grain):
    images = [picture(64, 64, seed) for seed in range(2)]
    weights, nothing = flair.attention_maps(flair.preprocess(images), flair.tokenize(TEXTS))
    heat = flair.heat_maps(images, TEXTS, heads=[0, 3])
    np.testing.assert_allclose(heat.maps.reshape(2, 3, 16), np.asarray(weights)[:, :, [0, 3]].mean(2), atol=1e-6)
    np.testing.assert_allclose(heat.zero_mass, np.asarray(nothing)[:, :, [0, 3]].mean(2), atol=1e-6)
    found = grain.query_maps(images, heads="each")
    assert found.maps.shape == (2, 4, 4, 4, 4) and found.class_mass.shape == (2, 4, 4)
    np.testing.assert_allclose(found.maps.sum((3, 4)) + found.class_mass, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        ("clip", lambda m, x: m.score(x, "a", mode="conditioned"), "mode conditioned need text-conditioned pooling"),
        ("clip", lambda m, x: m.score(x, "a", mode="regions"), "mode regions need a query decoder"),
        ("clip", lambda m, x: m.heat_maps(x, "a"), "heat maps need text-conditioned pooling"),
        ("clip", lambda m, x: m.regions(x), "regions need a query decoder, and config.model.decoder is None"),
        ("clip", lambda m, x: m.query_maps(x), "attention of queries need a query decoder"),
        ("clip", lambda m, x: m.patch_similarity(x, "a", mode="value"), "this model compares patches by projected"),
        ("clip", lambda m, x: m.segment(x, ["a"], mode="attention"), "this model segments by projected"),
        ("flair", lambda m, x: m.score(x, "a", mode="flair"), "mode is 'flair'; expected one of conditioned, global"),
        ("flair", lambda m, x: m.classify(x, ["a"], mode="regions"), "mode is 'regions'; expected one of conditioned"),
        ("flair", lambda m, x: m.classify(x, []), "class_names is empty"),
        ("flair", lambda m, x: m.classify(x, ["a"], ["a photo"]), "each with {c}"),
        ("flair", lambda m, x: m.segment("cut.png", ["a"]), "an image cannot be used: cut.png: cannot decode"),
        ("flair", lambda m, x: m.segment(["text.png", x, "cut.png"], ["a"]), r"2 images .*text.png: not an image"),
        ("flair", lambda m, x: m.heat_maps(x, []), "1 image and 0 texts are given"),
        ("flair", lambda m, x: m.patch_similarity([], "a"), "0 images and 1 text are given"),
        ("flair", lambda m, x: m.score(x, None), "texts are a NoneType; expected a string or several"),
        ("flair", lambda m, x: m.search(x, "a", 1.5), "top_k is 1.5; expected a number of hits"),
        ("flair", lambda m, x: m.scores(x, "a", "globl"), "mode is 'globl'; expected one of conditioned, global"),
        ("flair", lambda m, x: m.heat_maps(x, "a", heads=1.5), r"heads are \[1\.5\]; the pooling has"),
        ("flair", lambda m, x: m.classify(x, [1, 2]), r"the class \(1,\); expected a name or a list of names"),
        ("flair", lambda m, x: m.score(x, [3]), r"texts\[0\] is a int; expected strings"),
        ("flair", lambda m, x: m.score(3, "a"), "images are a int; expected a path, a PIL image or a uint8 array"),
        ("flair", lambda m, x: m.score([x, None], "a"), r"images\[1\] is a NoneType; expected a path"),
        ("flair", lambda m, x: m.score(np.zeros((4, 4, 3)), "a"), r"images\[0\] is an array float64 \(4, 4, 3\)"),
        ("flair", lambda m, x: m.score(np.zeros((4, 4), np.uint8), "a"), r"images\[0\] is an array uint8 \(4,\)"),
        ("flair", lambda m, x: m.score([x, "text.png", "none.png"], "a"), r"2 images .*text.png: not an image"),
        ("flair", lambda m, x: m.score("cut.png", "a"), "an image cannot be used: cut.png: cannot decode"),
        ("flair", lambda m, x: m.score(PIL.Image.open("cut.png"), "a"), r"images\[0\]: cannot decode the image"),
    ],
)
def test_what_cannot_be_is_said(folder, monkeypatch, kind, call, words):
    monkeypatch.chdir(folder)
    with pytest.raises((TypeError, ValueError), match=words):
        call(_loaded(folder / f"{kind}.safetensors"), picture(64, 64))


@functools.cache
def _loaded(path):
    return flair_jax.load(path)


def test_a_tower_alone_says_what_it_lacks(folder, flair):
    section = {**flair.config, "vision": None, "pooling": None}
    params = {name: x for name, x in flair.params.items() if name.startswith("text")}
    with pytest.raises(ValueError, match="no image tower"):
        Pretrained(section, params).score(picture(64, 64), "a")
