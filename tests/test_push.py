"""From a run to a folder for the hub and back, and its upload to a hub that is played."""

import json

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, load_golden
from huggingface_hub import errors

from flair_jax import checkpoint, pretrained, push, state
from flair_jax import config as configuration
from flair_jax.convert import flax_files, hub, names
from flair_jax.convert.__main__ import main as convert
from flair_jax.models import create


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory with a checkpoint, a better one in `best`, a report and a command."""
    folder = tmp_path_factory.mktemp("run")
    config = configuration.load("scenes").to_dict() | dict(model=TINY)
    params = names.to_flax(load_golden("tiny.safetensors"), config=TINY)
    for path, factor, step in ((folder, 2.0, 9), (folder / "best", 1.0, 6)):
        saved = checkpoint.Checkpoints(path)
        weights = jax.tree.map(lambda x, factor=factor: factor * x, params)
        saved.save(state.TrainState(np.int32(step), weights, {"count": np.zeros(1)}), [], config)
        saved.close()
    (folder / "report.md").write_text("# Retrieval\n\n| a | b |\n\n![a cat](pictures/cat.png)\n")
    (folder / "command.txt").write_text("python -m flair_jax.main --config finetune:flair\n")
    return folder


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "my-flair"
    assert push.main([str(run), str(out), "--license", "mit"]) == 0
    return out


def test_the_folder_loads_with_the_best_weights(folder, capsys):
    params, section = pretrained.read(folder)
    expected = names.to_flax(load_golden("tiny.safetensors"), config=TINY)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
    assert section == configuration.normalize(TINY)
    assert convert(["check", str(folder)]) == 0
    assert "good" in capsys.readouterr().out
    assert convert(["to-torch", str(folder), str(folder.parent / "back.safetensors")]) == 0
    back = safetensors.numpy.load_file(folder.parent / "back.safetensors")
    for name, array in load_golden("tiny.safetensors").items():
        np.testing.assert_array_equal(back[name], array)


def test_the_card_and_the_config(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: flair_jax\n") and "after 6 training steps" in card
    assert "python -m flair_jax.main --config finetune:flair" in card
    assert "\n## Retrieval\n\n| a | b |" in card and "cat.png" not in card
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["embed_dim"] == TINY["embed_dim"] and config["run"]["batch_size"] == 32
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_what_is_not_published(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert push.main([str(run), str(tmp_path), "--license", "mit"]) == 1
    assert "holds notes.txt, which would be uploaded too" in capsys.readouterr().err
    assert push.main([str(tmp_path), str(tmp_path / "out"), "--license", "mit"]) == 1
    assert "a work directory holds a folder 'checkpoints'" in capsys.readouterr().err


def test_untrained_weights_are_not_published(tmp_path):
    config = configuration.load("scenes").to_dict() | dict(model=TINY)
    saved = checkpoint.Checkpoints(tmp_path)
    fresh = jax.jit(lambda: state.init_params(create(TINY), 0))()
    saved.save(state.TrainState(np.int32(1), fresh, {"count": np.zeros(1)}), [], config)
    saved.close()
    with pytest.raises(ValueError, match="is not published: "):
        push.write(tmp_path, tmp_path / "out", "mit")
    assert not (tmp_path / "out").exists()


class Hub:
    """`huggingface_hub.HfApi` without a network: what was asked for is in `calls`."""

    calls, error = [], None

    def __init__(self, endpoint, library_name):
        self.calls.append(("HfApi", endpoint))

    def create_repo(self, repository, *, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create_repo", repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns):
        self.calls.append(("upload_folder", repo_id, folder_path, allow_patterns))


def test_upload(folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    assert push.upload(folder, "me/my-flair", private=True) == "https://huggingface.co/me/my-flair"
    assert Hub.calls == [
        ("HfApi", "http://localhost:9"),
        ("create_repo", "me/my-flair", True, True),
        ("upload_folder", "me/my-flair", folder, ["README.md", "config.json", "model.safetensors"]),
    ]
    monkeypatch.setattr(Hub, "error", errors.HFValidationError("a name with blanks"))
    with pytest.raises(OSError, match=r"me/my flair was not uploaded; .*my-flair is whole\. .* a name with blanks"):
        push.upload(folder, "me/my flair")


def test_the_names_of_fsc_clip():
    fsc = [name for name in hub.NAMES if name.startswith("fsc-clip")]
    assert len(fsc) == 12 == len({hub.NAMES[name] for name in fsc})
    assert {name for name in fsc if hub.GELUS[name] == "exact"} == {
        "fsc-clip-dcxl-laioncoco",
        "fsc-clip-lora-dcxl-laioncoco",
    }
    assert hub.parse("fsc-clip-lora-vitl14-laioncoco") == (
        "ytaek-oh/fsc-clip", None, "laioncoco_fsc-clip-lora-ViT-L-14.pt",
    )  # fmt: skip
    assert flax_files.file_of("nowhere").name == "nowhere"
