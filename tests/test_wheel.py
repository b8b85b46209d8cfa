"""The built wheel, installed where nobody has the repository: it trains and converts beside a user's own modules."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN, TINY
from processes import one_device

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "flair_jax", "configs", "convert", "data")
# Names of folders in the repository, of modules that were once ours, and what a user may well have beside a run.
THEIRS = ("data/__init__.py", "data/positions.py", "data/loader.py", "configs.py", "convert/__init__.py", "models.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, since setuptools leaves folders beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*command, "--wheel-dir", "dist"], cwd=folder, check=True, capture_output=True, text=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment that holds the wheel and, for the rest, looks where the tests look."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-index"]
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, capture_output=True, text=True)
    # Plain folders: their own .pth files, the editable install of the repository among them, are not read.
    others = [path for path in sys.path if path.endswith("site-packages") and pathlib.Path(path).is_dir()]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def home(tmp_path):
    """A user's directory with modules of their own, which note when they are imported."""
    for name in THEIRS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("OWNER = 'user'\nwith open('imported.txt', 'a') as file:\n    file.write(f'{__name__} ')\n")
    return tmp_path


def run(python, home, *arguments) -> str:
    """Runs a command in a user's directory, without a way to the repository; returns what it printed."""
    environment = {name: value for name, value in one_device().items() if name != "PYTHONPATH"}
    done = subprocess.run([str(python), *arguments], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_nothing_of_the_users_was_imported(home):
    noted = home / "imported.txt"
    assert not noted.exists(), noted.read_text()


def test_the_wheel_brings_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flair_jax"}
    # Files that are not Python come along.
    vocabulary = "flair_jax/data/transforms/bpe_simple_vocab_16e6.txt.gz"
    prompts = "flair_jax/data/benchmarks/prompts/templates.json"
    assert {vocabulary, prompts, "flair_jax/convert/parity.ipynb", "flair_jax/configs/scenes.py"} <= set(names)


def test_every_source_file_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("flair_jax", "configs", "convert", "data"):
        prefix = "" if folder == "flair_jax" else "flair_jax/"
        for path in (ROOT / folder).rglob("*.py"):
            assert prefix + path.relative_to(ROOT).as_posix() in names


def test_what_is_imported_is_the_wheel(python, home):
    code = "import flair_jax.data.loader, flair_jax.configs, flair_jax.convert as c, flair_jax as f; "
    where = run(python, home, "-c", code + "print(f.__file__, f.data.__file__, f.configs.__file__, c.__file__)").split()
    assert len(where) == 4
    for path in where:
        assert pathlib.Path(path).is_relative_to(python.parents[1]), path
    assert_nothing_of_the_users_was_imported(home)


def test_a_user_imports_their_own(python, home):
    code = "import flair_jax.data.loader, flair_jax.convert, data.positions, configs, convert; print("
    assert run(python, home, "-c", code + "data.OWNER, configs.OWNER, convert.OWNER)").split() == ["user"] * 3


def test_training_starts_beside_a_users_own_modules(python, home):
    sizes = ["steps=2", "batch_size=4", "log_every=1", "data.scenes.count=16", "evaluators.scenes.count=4"]
    sizes += ["data.workers=1", "model.embed_dim=16", "model.pooling.heads=2"]
    sizes += ["model.vision.width=16", "model.vision.depth=1", "model.vision.heads=2"]
    sizes += ["model.text.width=16", "model.text.depth=1", "model.text.heads=2"]
    flags = [f"--config.{size}" for size in sizes]
    run(python, home, "-m", "flair_jax.main", "--config", "scenes", "--workdir", "run", *flags)
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (home / "run" / "report.md").exists()
    assert_nothing_of_the_users_was_imported(home)


def test_conversion_there_and_back_beside_a_users_own_modules(python, home):
    shutil.copy(GOLDEN / "tiny.safetensors", home / "torch.safetensors")
    (home / "model.json").write_text(json.dumps(TINY))
    convert = ("-m", "flair_jax.convert")
    run(python, home, *convert, "to-flax", "torch.safetensors", "flax.safetensors", "--model-config", "model.json")
    run(python, home, *convert, "to-torch", "flax.safetensors", "back.safetensors")
    before, after = (safetensors.numpy.load_file(home / f"{name}.safetensors") for name in ("torch", "back"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    assert_nothing_of_the_users_was_imported(home)
