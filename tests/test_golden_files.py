"""`--golden=ROOT`: where the files of another root are found, and what is missing there is skipped and counted."""

import os
import pathlib
import shutil
import subprocess
import sys

import golden_files
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root of the layout of `--golden`; the numbers of this run are read from where they were afterwards."""
    monkeypatch.setattr(golden_files, "_root", golden_files._root)
    return tmp_path


def write(root: pathlib.Path, path: str, content: str = "{}") -> pathlib.Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tiny.safetensors", "flair/tiny/model.safetensors"),
        ("tiny_inputs.npz", "flair/tiny/inputs.npz"),
        ("tiny_dist_grads_ws3_mps.safetensors", "flair/tiny_dist/grads_ws3_bidir_mps.safetensors"),
        ("tiny_dist_inputs_ws3.npz", "flair/tiny_dist/inputs_ws3.npz"),
        ("tiny_train.json", "flair/tiny_train/config.json"),
        ("fsc_clip/losses.json", "fsc_clip/losses.json"),
        ("grain/boxes.safetensors", "grain/boxes.safetensors"),
    ],
)
def test_names_of_copies_are_paths_in_a_root(root, name, path):
    file = write(root, path)
    golden_files.use(root)
    assert golden_files.path(name) == file and golden_files.exists(name)
    file.unlink()
    assert not golden_files.exists(name)
    with pytest.raises(pytest.skip.Exception, match=f"{file} is missing"):
        golden_files.path(name)
    golden_files.use(None)
    assert golden_files.path(name) == golden_files.COPIES / name


def test_a_root_without_any_of_its_folders_is_refused(root):
    with pytest.raises(pytest.UsageError, match="none of the folders flair, fsc_clip, grain"):
        golden_files.use(root)
    write(root, "grain/text.json", '{"found": 1}')
    golden_files.use(root)
    assert golden_files.load("grain/text.json") == {"found": 1}
    with pytest.raises(KeyError, match="no path in the layout"):
        golden_files.path("other.json")


def test_the_option_takes_a_folder_outside_of_the_repository(tmp_path):
    """The part that is there is compared with; what is missing is skipped and named."""
    (tmp_path / "flair" / "tokenizer").mkdir(parents=True)
    shutil.copy(golden_files.COPIES / "tokenizer.json", tmp_path / "flair" / "tokenizer" / "tokens.json")
    command = [sys.executable, "-m", "pytest", "-m", "golden", "-p", "no:cacheprovider", f"--golden={tmp_path}"]
    command += ["tests/test_tokenizer.py", "tests/test_captions.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tmp_path / 'flair' / 'caption_sampling' / 'stats.json'} is missing" in done.stdout
    assert "3 passed, 1 skipped" in done.stdout
