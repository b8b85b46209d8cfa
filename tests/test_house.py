"""The house keeps its directions: who may import whom, and what `import flair_jax` loads."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Folder -> the name it is imported by.
ROOMS = {
    "configs": "flair_jax.configs",
    "data": "flair_jax.data",
    "convert": "flair_jax.convert",
    "flair_jax": "flair_jax",
}
# Modules of flair_jax that may use the rooms beside it.
DOORS = {
    *("predict", "main", "config", "step", "train", "evaluate", "evaluation_sets", "evaluation_tasks"),
    *("pretrained", "inference", "push", "search", "embed", "feature_files", "export", "demo"),
}
TRANSFORMS = "flair_jax.data.transforms"
LEARNING = {"jax", "jaxlib", "flax", "optax", "orbax"}


def imports(path: pathlib.Path, top_level_only: bool = False):
    """Modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room: str):
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, room
    return found


def roots(path, **options):
    """Packages that a file imports from, `flair_jax.data` and the like for the rooms."""
    return {room_of(name) or name.split(".")[0] for name in imports(path, **options) if name != "flair_jax"}


def room_of(name: str) -> str | None:
    if name.split(".")[0] != "flair_jax":
        return None
    return next(
        (room for room in ROOMS.values() if room != "flair_jax" and f"{name}.".startswith(f"{room}.")), "flair_jax"
    )


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_imports_tests(room):
    for path in files(room):
        assert not roots(path) & {"tests", "conftest", "pytest", "benchmarks"}, path


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_under_one_name(room):
    for path in files(room):
        assert not roots(path) & {"data", "configs", "convert"}, path


def test_configs_import_ml_collections_alone():
    for path in files("configs"):
        assert roots(path) <= {"ml_collections", "flair_jax.configs", "math"}, path


def test_data_knows_neither_jax_nor_the_model():
    for path in files("data"):
        outside = LEARNING | {"flair_jax", "flair_jax.convert", "flair_jax.configs"}
        assert not roots(path) & outside, path
        # OWLv2 is one of PyTorch's, which is loaded where it is opened.
        assert not roots(path, top_level_only=path.name == "detect.py") & {"torch", "transformers"}, path


def test_convert_does_not_know_the_data_and_loads_torch_inside_functions():
    for path in files("convert"):
        command = (
            path == ROOT / "convert" / "__main__.py"
        )  # `check --image` runs the model, and loads it for that alone
        assert not roots(path, top_level_only=command) & {"flair_jax.data", "flair_jax", *LEARNING}, path
        if command:
            inside = {name for name in imports(path) if room_of(name) in ("flair_jax", "flair_jax.data")}
            assert inside == {"flair_jax", "flair_jax.published_example"}
        if path.name != "torch_flair.py":  # a PyTorch module, which only its users import
            assert "torch" not in roots(path, top_level_only=True), path
            assert "flair_jax.convert.torch_flair" not in set(imports(path, top_level_only=True)), path


def test_only_the_doors_of_flair_jax_lead_outside():
    """Other modules know at most the pure functions of `data.transforms`, which are numpy and Pillow."""
    for path in files("flair_jax"):
        door = path.relative_to(ROOT / "flair_jax").parts[0].removesuffix(".py")
        if door not in DOORS:
            outside = {name for name in imports(path) if room_of(name) in ("flair_jax.data", "flair_jax.convert")}
            assert all(name.startswith(TRANSFORMS) for name in outside), path
        assert not roots(path) & {"torch"}, path


def test_objectives_know_no_devices_and_models_no_objectives():
    for path in files("flair_jax"):
        room = path.relative_to(ROOT / "flair_jax").parts[0]
        if room == "models":
            assert not [name for name in imports(path) if name.startswith("flair_jax.objectives")], path
        if room == "objectives" and path.name != "ring.py":
            assert not [name for name in imports(path) if name.startswith("flair_jax.sharding")], path


def test_importing_the_package_loads_neither_tensorflow_nor_torch():
    """Nor does a start of training, nor a grain worker, which imports the loader and the main module again."""
    code = """
import sys
def loaded():
    return [m for m in ("tensorflow", "torch", "jax") if m in sys.modules]
import flair_jax
print(loaded())
flair_jax.load
import flair_jax.data.loader, flair_jax.main
print(loaded())
import flair_jax.train
print(loaded())
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert printed == ["[]", "['jax']", "['jax']"]
