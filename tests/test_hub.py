"""Weights by name, from a local server that answers as the hub does."""

import http.server
import json
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, load_golden

from flair_jax import pretrained
from flair_jax.convert import flax_files, hub, names
from flair_jax.convert.__main__ import main

COMMIT = "0123456789012345678901234567890123456789"


class Hub(http.server.BaseHTTPRequestHandler):
    """Files of repositories under /OWNER/REPO/resolve/REVISION/FILE.

    `files`: contents by OWNER/REPO/FILE. `served`: paths of downloads. `truncated`: whether they break off.
    """

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        owner, repository, _, revision, *file = self.path.lstrip("/").split("/")
        content = self.files.get(f"{owner}/{repository}/{'/'.join(file)}")
        known = any(name.startswith(f"{owner}/{repository}/") for name in self.files)
        problem = (
            "RepoNotFound" if not known else "RevisionNotFound" if revision not in ("main", COMMIT) else "EntryNotFound"
        )
        if content is None or problem == "RevisionNotFound":
            self.send_response(404)
            self.send_header("X-Error-Code", problem)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.served.append(self.path)
            self.wfile.write(content[: len(content) // 2] if self.truncated else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    weights = load_golden("tiny.safetensors")
    path = tmp_path / "tiny.safetensors"
    safetensors.numpy.save_file(weights, path)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"a.b": np.zeros(3, np.float32)}, foreign)
    files = {
        "someone/flair/tiny.safetensors": path.read_bytes(),
        "someone/flair/foreign.safetensors": foreign.read_bytes(),
        "someone/empty/config.json": json.dumps({"model_type": "clip"}).encode(),
    }
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between attempts
    handler = type("Handler", (Hub,), dict(files=files, served=[], truncated=False))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://localhost:{running.server_port}")
        # Read at import, and other tests of this process are offline.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
        yield handler
        running.shutdown()


def test_from_a_name_to_weights_and_again_without_a_server(server, monkeypatch):
    name = "hf://someone/flair/tiny.safetensors"
    params, section = pretrained.read(name, TINY)
    expected = names.to_flax(load_golden("tiny.safetensors"), config=TINY)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
    assert section["vision"]["width"] == TINY["vision"]["width"] and len(server.served) == 1

    # Converted once: the second time neither the download nor the conversion is needed, nor the section.
    monkeypatch.setattr(server, "files", {})
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    target = hub.kept(name)
    assert flax_files.is_flax(target) and len(server.served) == 1
    again, _ = pretrained.read(name)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://someone/flair/missing.pt", r"someone/flair has no file missing\.pt"),
        ("hf://nobody/flair/tiny.safetensors", "no repository nobody/flair, or it is private"),
        ("hf://someone/flair@v2/tiny.safetensors", "someone/flair has no revision 'v2'"),
        ("hf://someone/empty", r"has neither of model\.safetensors, pytorch_model\.bin"),
    ],
)
def test_errors_say_what_is_missing(server, name, words):
    with pytest.raises(hub.HubError, match=words):
        pretrained.read(name, TINY)


def test_foreign_weights_are_refused_and_not_kept(server):
    with pytest.raises(ValueError, match=r"unknown a\.b|not one of the 1 names"):
        pretrained.read("hf://someone/flair/foreign.safetensors", TINY)
    with pytest.raises(ValueError, match=r"unknown a\.b|not one of the 1 names"):
        pretrained.read("hf://someone/flair/foreign.safetensors", TINY)


def test_half_of_the_way_to_weights_on_the_hub(server, tmp_path):
    before = tmp_path / "before.safetensors"
    zeros = {name: np.zeros_like(array) for name, array in load_golden("tiny.safetensors").items()}
    safetensors.numpy.save_file(zeros, before)
    name = "hf://someone/flair/tiny.safetensors"
    half, _ = pretrained.read_fine_tuned(name, before, 0.5, TINY)
    whole, _ = pretrained.read(name, TINY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2, rtol=1e-6), half, whole)


def test_the_command_takes_names(server, capsys):
    assert main(["check", "hf://someone/flair/foreign.safetensors"]) == 1
    assert "a.b" in capsys.readouterr().out
    assert main(["check", "hf://someone/flair/missing.pt"]) == 1
    assert "someone/flair has no file missing.pt" in capsys.readouterr().err


def test_without_a_network(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")  # nobody listens
    with pytest.raises(hub.HubError, match=r"not in the cache, and the hub is out of reach"):
        pretrained.read("flair-cc3m-recap")


def test_a_download_that_breaks_off_is_no_file(server, monkeypatch):
    monkeypatch.setattr(server, "truncated", True)
    with pytest.raises(hub.HubError, match=r"tiny\.safetensors was not fetched"):
        pretrained.read("hf://someone/flair/tiny.safetensors", TINY)
    monkeypatch.setattr(server, "truncated", False)
    pretrained.read("hf://someone/flair/tiny.safetensors", TINY)


@pytest.mark.parametrize("name", ["hf://flair", "hf://a/b/../../c", "hf://a b/c", "hf://"])
def test_what_is_no_address(name):
    with pytest.raises(ValueError, match="is no address on the hub"):
        hub.parse(name)


def test_addresses():
    assert hub.parse("hf://a/b/c/d.pt") == ("a/b", None, "c/d.pt")
    assert hub.parse("hf://a/b@v1") == ("a/b", "v1", None)
    assert hub.parse("flair-merged30m") == ("xiaorui638/flair", None, "flair-merged30m.pt")
    for name in hub.NAMES:
        hub.parse(name)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("flair-cc3m-recap")
    (tmp_path / "flair-cc3m-recap").mkdir()
    assert not hub.is_name("flair-cc3m-recap") and not hub.is_name(tmp_path)
