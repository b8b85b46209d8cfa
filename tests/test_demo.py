"""The page to try a model on: what it computes, what it refuses, and the page itself in a browser."""

import contextlib
import io
import re
import shutil
import socket
import struct
import urllib.parse
import zlib

import jax
import numpy as np
import optional
import pytest
from conftest import fresh_params
from PIL import ExifTags, Image
from saver import state_of

from flair_jax import models, state
from flair_jax.checkpoint import Checkpoints
from flair_jax.config import normalize, read
from flair_jax.configs import scenes
from flair_jax.demo import __main__ as command
from flair_jax.demo import answers
from flair_jax.evaluators.features import Encoder
from flair_jax.pretrained import Pretrained
from flair_jax.search import Index

TEXTS = ["a large red circle, at the top left", "a <b>blue</b> square"]


def small(kind: str, drawn: bool = True) -> Pretrained:
    """A small model with random parameters, or, which needs no program, with zeros."""
    config = scenes.get_config(kind)
    config.model.vision.depth = config.model.text.depth = 1
    if config.model.decoder is not None:
        config.model.decoder.depth = 1
    section = normalize(config.model.to_dict())
    model = models.create(section)
    if drawn:
        return Pretrained(section, fresh_params(model))
    shapes = jax.eval_shape(lambda: state.init_params(model, 0))
    return Pretrained(section, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))


@pytest.fixture(scope="module")
def flair():
    return small("flair")


@pytest.fixture(scope="module")
def grain():
    return small("grain")


@pytest.fixture(scope="module")
def clip():
    return small("clip", drawn=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(60, 90), (70, 50), (64, 64)]):
        picture(*size, number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def index(flair, photos, tmp_path_factory):
    found = Index.open(photos, flair, at=tmp_path_factory.mktemp("index"))
    found.update()
    return found


def picture(height: int = 60, width: int = 90, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


# ---------------------------------------------------------------------------------------------------------------------
# Files and lines


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file whose header promises so many pixels; a few bytes follow."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an image"),
        (b"some text", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encoded(picture(), "PNG")[:-300], "cannot decode"),
        (encoded(picture(1, 101), "PNG"), "101 x 1 pixels"),
        (png_of_size(40_000, 40_000), "pixels"),  # 1.6 gigapixels in a hundred bytes
    ],
)
def test_files_that_are_no_usable_picture(tmp_path, content, words):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(answers.Refused, match=words):
        answers.read_picture(path)


def test_a_file_with_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    picture().save(path)
    monkeypatch.setattr(answers, "MAX_BYTES", path.stat().st_size)
    answers.read_picture(path)
    monkeypatch.setattr(answers, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(answers.Refused, match="too large"):
        answers.read_picture(path)
    with pytest.raises(answers.Refused, match="Give a picture first"):
        answers.read_picture(None)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_pictures_are_read_by_their_content_and_upright(tmp_path, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "photo.dat"
    path.write_bytes(encoded(picture(60, 90), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    found = answers.read_picture(path)
    assert found.mode == "RGB" and found.size == (60, 90)
    np.testing.assert_array_equal(found, picture(60, 90).transpose(Image.Transpose.ROTATE_270))
    assert answers.stored_format(path) == kind


def test_lines():
    assert answers.lines(" a dog, asleep \n\n\ta cat\na dog, asleep\r\n", most=2) == ["a dog, asleep", "a cat"]
    for typed, words in (("", "one a line"), (None, "at least one text"), (" \n", "at least"), ("a\nb\nc", "3 lines")):
        with pytest.raises(answers.Refused, match=words):
            answers.lines(typed, most=2)
    answers.lines("x" * answers.MAX_CHARACTERS, most=1)
    with pytest.raises(answers.Refused, match="2,001 characters"):
        answers.lines("x" * (answers.MAX_CHARACTERS + 1), most=1)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_scores_are_those_of_the_model(flair, grain):
    found = answers.scores(flair, picture(), TEXTS)
    assert list(found) == ["conditioned", "global", "probability"]
    np.testing.assert_allclose(found["conditioned"], flair.score(picture(), TEXTS)[0], atol=1e-6)
    assert list(answers.scores(grain, picture(), TEXTS)) == ["global", "regions", "probability"]


def test_heat_maps_of_every_view(flair, clip):
    assert list(answers.views(flair)) == ["mean", 0, 1, 2, 3, "patches"]
    assert "mean" not in answers.views(clip)
    sheets = {}
    for view in ("mean", 2, "patches"):
        legend, figures = answers.heat_maps(flair, picture(), TEXTS, view)
        assert [figure.title for figure in figures] == TEXTS and legend.width == answers.LEGEND_WIDTH
        assert all(figure.image.size == (448, 299) for figure in figures)
        sheets[view] = [np.asarray(figure.image) for figure in figures]
        assert not np.array_equal(*sheets[view])  # each text has its own
    assert not np.array_equal(sheets["mean"][0], sheets[2][0])
    maps, mass = flair.heat_maps(picture(), TEXTS, heads=2)
    note = answers.heat_maps(flair, picture(), TEXTS, 2)[1][1].note
    assert f"zero key {mass[0, 1]:.0%}" in note and f"{maps[0, 1].size * maps[0, 1].max():.1f}" in note
    with pytest.raises(answers.Refused, match="no heat map 4"):
        answers.heat_maps(flair, picture(), TEXTS, 4)


def test_segments_are_those_of_the_model(flair, clip):
    names = ["red", "green", "blue"]
    found = answers.segment(flair, picture(), names, "a {c} shape", "value")
    mask = flair.segment(picture(), names, "a {c} shape", mode="value")
    shares = {name: np.mean(mask == number) for number, name in enumerate(names)}
    assert {name: share for name, _, share in found.classes} == {name: x for name, x in shares.items() if x}
    assert [share for *_, share in found.classes] == sorted((x for x in shares.values() if x), reverse=True)
    large = answers.segment(flair, picture(1500, 3000), names, "a {c} shape", "projected")
    assert large.image.size == (448, 224)
    with pytest.raises(answers.Refused, match=r"needs \{c\}"):
        answers.segment(flair, picture(), names, "a shape", "value")
    assert list(answers.segmentation_modes(flair)) == ["projected", "value", "attention"]


def test_regions_with_and_without_texts(grain):
    with_texts, without = (np.asarray(answers.regions(grain, picture(), texts)) for texts in (TEXTS, []))
    assert len(np.unique(with_texts)) > 10 and with_texts.shape != without.shape


def test_search_leaves_out_what_was_removed(index, photos, tmp_path):
    ((text, figures),) = answers.search(index, [TEXTS[0]])
    (hits,) = index.query([TEXTS[0]])
    assert text == TEXTS[0]
    assert [figure.title for figure in figures] == [hit.path.name for hit in hits]
    assert [figure.note for figure in figures] == [f"cosine {hit.score:.3f}" for hit in hits]
    best = hits[0].path
    with contextlib.ExitStack() as stack:
        moved = shutil.move(best, tmp_path)
        stack.callback(shutil.move, moved, best)
        ((_, figures),) = answers.search(index, [TEXTS[0]])
    assert len(figures) == 2 and best.name not in {figure.title for figure in figures}


def test_scenes_come_with_what_is_in_them():
    image, texts, names = answers.scene(7)
    assert image.size == (448, 448) and len(texts) == len(names) - 1 >= 2
    assert all(text.startswith(name) for text, name in zip(texts, names, strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# The command


class Training:
    """A process whose `wait` meets these events, one after the other: exceptions, or its status at the end."""

    def __init__(self, *events):
        self.events = list(events)

    def wait(self):
        event = self.events.pop(0)
        if isinstance(event, BaseException):
            raise event
        return event


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flair_jax" / "scenes"


def test_without_a_checkpoint_and_a_terminal_nothing_is_trained(cache, capsys, monkeypatch):
    optional.gradio.Blocks  # noqa: B018 the command says that it is missing, first
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command.main([]) == 1
    out, error = capsys.readouterr()
    assert str(cache) in out and command.DURATION in out and "--yes" in error
    assert not cache.exists()


@pytest.mark.parametrize("answer", ["", "y", "n", None])
def test_the_user_is_asked_in_the_terminal(cache, monkeypatch, answer):
    commands = []

    def said(prompt):
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(command.subprocess, "Popen", lambda line: commands.append(line) or Training(0))
    monkeypatch.setattr("builtins.input", said)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
    if answer in ("n", None):
        with pytest.raises(ValueError, match="give --checkpoint"):
            command.train_scenes(cache, agreed=False)
        assert not commands
        return
    command.train_scenes(cache, agreed=False)
    ((_, _, module, *flags),) = commands
    assert module == "flair_jax.main" and flags == ["--config", "scenes", "--workdir", str(cache)]
    assert read(flags[1], flags[4:])["steps"] == scenes.get_config().steps


def test_a_training_is_kept_and_goes_on_until_its_last_step(cache, monkeypatch):
    assert not command.is_trained(cache) and not command.knows_scenes(str(cache))
    config = {**normalize(scenes.get_config().to_dict()), "steps": 2}
    for step in (1, 2):
        with contextlib.closing(Checkpoints(cache, keep=None)) as saved:
            saved.save(state_of(step), [], config)
        assert command.is_trained(cache) == (step == 2) and command.knows_scenes(str(cache))
    training = Training(KeyboardInterrupt(), KeyboardInterrupt(), 130)  # it is waited for until it has saved
    monkeypatch.setattr(command.subprocess, "Popen", lambda _: training)
    with pytest.raises(ValueError, match="status 130; the same command goes on"):
        command.train_scenes(cache, agreed=True)
    assert not training.events


def test_errors_of_the_command(tmp_path, capsys):
    optional.gradio.Blocks  # noqa: B018
    assert command.main(["--checkpoint", str(tmp_path / "missing")]) == 1
    assert "no such file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The page


def tabs(page) -> list[str]:
    return [part["props"]["label"] for part in page.config["components"] if part["type"] == "tabitem"]


def test_tabs_for_what_the_model_can_do(flair, grain, clip, index):
    build = optional.demo_page.build
    pages = {name: tabs(build(model, name)) for name, model in (("flair", flair), ("grain", grain), ("clip", clip))}
    assert pages["flair"] == ["Scores and heat maps", "Segmentation"]
    assert pages["grain"] == ["Scores", "Regions"]
    assert pages["clip"] == ["Scores and heat maps", "Segmentation"]
    assert tabs(build(flair, "flair", index=index)) == ["A picture", *pages["flair"], "Search"]


def test_one_click_encodes_a_picture_once(flair, grain, photos, monkeypatch):
    """For its scores and its heat maps; and a message takes the place of both."""
    build, images, calls = optional.demo_page.build, Encoder.images, []
    monkeypatch.setattr(Encoder, "images", lambda *x, **y: calls.append(1) or images(*x, **y))
    for model, view in ((flair, ("mean",)), (grain, ())):
        (compare,) = (one.fn for one in build(model, "page").fns.values() if one.name == "compare")
        found = compare(str(photos / "0.png"), "\n".join(TEXTS), *view)
        scores, *maps = found if view else [found]
        assert scores.count("<tr>") == 3 and len(maps) == len(view) and all(x.count("<figure>") == 2 for x in maps)
        assert len(calls) == 1 and calls.pop()
        found = compare(str(photos / "0.png"), "", *view)
        message, *rest = found if view else [found]
        assert 'role="alert"' in message and not any(rest) and not calls


def test_what_users_write_is_escaped():
    page, script = optional.demo_page, "<script>alert('1')</script>\" onerror=\"x"
    results = [
        page.table([script], {"global": [0.5]}),
        page.gallery([answers.Figure(picture(), script, script)]),
        page.legend([(script, (1, 2, 3), 0.5)]),
        page.refused(script),
    ]
    for result in results:
        assert "<script" not in result and '" onerror' not in result and "&lt;script&gt;" in result


@pytest.fixture(scope="module")
def addresses():
    """Hosts that this process looks up while the page is served."""
    found, look_up = set(), socket.getaddrinfo

    def noted(host, *arguments, **options):
        found.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        yield found


@pytest.fixture(scope="module")
def served(flair, index, addresses, tmp_path_factory):
    """The address of a page that takes files of up to a mebibyte."""
    page = optional.demo_page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "MAX_BYTES", 2**20)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with page.serve(page.build(flair, "a <i>model</i>", index=index, scenes=True)) as address:
            yield address


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with optional.playwright.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class User:
    """Somebody with a browser of their own on the page. `hosts`: whom the page asked for anything."""

    def __init__(self, browser, address, **options):
        self.page, self.hosts = browser.new_context(**options).new_page(), set()
        self.page.on("request", lambda request: self.hosts.add(urllib.parse.urlsplit(request.url).hostname))
        self.page.goto(address)
        self.page.get_by_role("button", name="Compare").wait_for()

    def upload(self, path):
        self.page.locator("#upload input[type=file]").set_input_files(path)

    def write(self, label, text):
        self.page.get_by_label(label).fill(text)

    def click(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def heat_maps(self, *texts):
        """Pictures of the heat maps, once they are those of these texts."""
        captions = self.page.locator("#heat-maps figcaption")
        for number, text in enumerate(texts):
            captions.nth(number).filter(has_text=text).wait_for()
        assert captions.count() == len(texts)
        return [image.get_attribute("src") for image in self.page.locator("#heat-maps figure img").all()]


@pytest.fixture
def user(chromium, served):
    found = User(chromium, served)
    yield found
    found.page.context.close()


def test_a_port_in_use_is_named(flair, served):
    page, port = optional.demo_page, urllib.parse.urlsplit(served).port
    with pytest.raises(OSError, match=f"port {port}: it is in use"), page.serve(page.build(flair, "again"), port=port):
        pass


def test_upload_type_and_see_a_heat_map_that_follows_the_head(user, photos, addresses):
    user.click("Compare")
    user.page.get_by_role("alert").filter(has_text="Write at least one text").first.wait_for()
    user.write("Texts, one a line", "\n".join(TEXTS))
    user.upload(photos / "0.png")
    user.page.locator("#upload img").wait_for()
    user.click("Compare")
    mean = user.heat_maps(*TEXTS)
    assert user.page.locator("#scores td:first-child").all_inner_texts() == TEXTS  # markup is text

    user.page.get_by_label("Heat maps", exact=True).click()
    user.page.get_by_role("option", name="Attention, head 1").click()
    user.page.wait_for_function(
        "old => document.querySelector('#heat-maps figure img').src != old", arg=mean[0], timeout=20_000
    )
    assert not set(user.heat_maps(*TEXTS)) & set(mean)
    # Neither the page nor its server asks another machine for anything.
    assert user.hosts - {None} == {"127.0.0.1"}
    assert addresses <= {"127.0.0.1", "localhost", None}


def test_bad_and_large_files(user, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    user.upload(tmp_path / "bad.png")
    message = user.page.get_by_role("alert").filter(has_text="cannot be used as a picture: not an image")
    message.wait_for()
    assert user.page.locator("#upload img").count() == 0  # the field takes another file
    (tmp_path / "large.png").write_bytes(b"x" * (2**20 + 1))
    user.upload(tmp_path / "large.png")
    user.page.get_by_text(re.compile("exceed the maximum allowed size of 1.0 ?mb", re.IGNORECASE)).first.wait_for()


def test_a_picture_that_browsers_do_not_show(user, tmp_path):
    picture().save(tmp_path / "scan.tiff")
    user.upload(tmp_path / "scan.tiff")
    user.page.wait_for_function("(document.querySelector('#upload img') || {}).naturalWidth == 90")


def test_two_users_at_once(chromium, served, flair, photos):
    first, second = User(chromium, served), User(chromium, served, viewport={"width": 390, "height": 844})
    for user, text, name in ((first, "a red ring", "0.png"), (second, "a green cross", "1.png")):
        user.upload(photos / name)
        user.page.locator("#upload img").wait_for()
        user.write("Texts, one a line", text)
    first.click("Compare")
    second.click("Compare")
    for user, text, name in ((first, "a red ring", "0.png"), (second, "a green cross", "1.png")):
        _, (own,) = answers.heat_maps(flair, answers.read_picture(photos / name), [text], "mean")
        (shown,) = user.heat_maps(text)
        assert f'src="{shown}"' in optional.demo_page.picture(own.image, text)  # of their picture and their text
    # On a phone nothing is wider than the screen.
    assert second.page.evaluate("document.documentElement.scrollWidth") == 390
    for user in (first, second):
        user.page.context.close()


def test_scenes_segments_and_search(user):
    user.click("Draw a scene")
    user.page.locator("#upload img").wait_for()
    user.page.get_by_role("tab", name="Segmentation").click()
    names = user.page.get_by_label("Classes, one a line")
    user.page.wait_for_function("field => field.value", arg=names.element_handle())
    user.click("Segment")
    user.page.locator("#segments img").wait_for()
    found = user.page.locator("#segments li").all_inner_texts()
    assert found and {line.rsplit(",", 1)[0].strip() for line in found} <= set(names.input_value().splitlines())
    user.page.get_by_role("tab", name="Search").click()
    user.page.get_by_label("Texts, one a line").locator("visible=true").fill(TEXTS[0])
    user.click("Search")
    user.page.locator("#hits figure").nth(2).wait_for()
    assert sorted(user.page.locator("#hits figcaption").all_inner_texts())[0].startswith("0.png")


def test_the_server_takes_no_paths_addresses_or_large_files(user, served, photos):
    """Requests that the page does not make: with files that nobody uploaded, addresses to fetch, or past its limit."""
    request = user.page.request

    def upload(content):
        file = {"name": "photo.png", "mimeType": "image/png", "buffer": content}
        return request.post(f"{served}gradio_api/upload", multipart={"files": file})

    def check(path):
        """What the first event of the page, the check of an uploaded file, answers."""
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        request.post(f"{served}gradio_api/queue/join", data={"data": data, "fn_index": 0, "session_hash": "someone"})
        return request.get(f"{served}gradio_api/queue/data?session_hash=someone").text()

    (own,) = upload((photos / "0.png").read_bytes()).json()
    assert '"success":true' in check(own)
    for path in (str(photos / "0.png"), "/etc/hostname", "http://127.0.0.1:9/photo.png"):
        assert '"success":false' in check(path), path
    assert "Addresses are not taken" in check("http://127.0.0.1:9/photo.png")
    assert upload(bytes(2**20 + 1)).status == 413
    assert request.get(f"{served}gradio_api/file={photos / '0.png'}").status == 403
