"""Numbers that the references' own code computed: where they lie, and their form for the tests.

By default they are the small files of `tests/golden`. `pytest -m golden --golden=ROOT` reads `ROOT/flair`,
`ROOT/fsc_clip` and `ROOT/grain` instead, in the layout that their README.md files describe. Tests take every size from
the files, so that other seeds, shapes, image sizes and numbers of processes work too. What is missing there skips the
tests that need it. The `=` is needed: pytest takes a folder after a space for one of tests, and looks
for its settings there.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

COPIES = pathlib.Path(__file__).parent / "golden"
# Folders of ROOT. Names of files of the last two begin with the folder, in the small copies too.
FLAIR, OTHERS = "flair", ("fsc_clip", "grain")
# Name of the small copy -> path under ROOT/flair, the first pattern that matches.
PATHS = (
    (r"tiny\.safetensors", "tiny/model.safetensors"),
    (r"tiny_(inputs|outputs)\.npz", r"tiny/\1.npz"),
    (r"tiny_dist\.safetensors", "tiny_dist/model.safetensors"),
    (r"tiny_dist_grads_(ws\d+)_(mps|nomps)\.safetensors", r"tiny_dist/grads_\1_bidir_\2.safetensors"),
    (r"tiny_(loss|train|dist)_(.*\.(npz|safetensors))", r"tiny_\1/\2"),
    (r"(tiny|tiny_loss|tiny_train|tiny_dist)\.json", r"\1/config.json"),
    (r"tokenizer\.json", "tokenizer/tokens.json"),
    (r"caption_sampling\.json", "caption_sampling/stats.json"),
    (r"full_(init|state_dict)\.json", "full/init_stats.json"),
    (r"retrieval\.json", "retrieval/metrics.json"),
    (r"retrieval\.npz", "retrieval/arrays.npz"),
    (r"preprocess\.npz", "preprocess/inputs_uint8.npz"),
)
_root: pathlib.Path | None = None


def use(root: str | None) -> None:
    """Reads from `root` from now on; None: from the small copies.

    Raises:
      pytest.UsageError: none of the folders that it should hold is there.
    """
    global _root
    _root = None if root is None else pathlib.Path(root).expanduser()
    folders = (FLAIR, *OTHERS)
    if _root is not None and not any((_root / name).is_dir() for name in folders):
        raise pytest.UsageError(f"--golden={root}: there is none of the folders {', '.join(folders)} in it")


def path(name: str) -> pathlib.Path:
    """The file for the name of a small copy; a test that needs one that is missing in `--golden` is skipped."""
    if _root is None:
        return COPIES / name
    found = _root / _path_in_root(name)
    if not found.exists():
        pytest.skip(f"{found} is missing", allow_module_level=True)
    return found


def _path_in_root(name: str) -> pathlib.Path:
    if name.split("/")[0] in OTHERS:
        return pathlib.Path(name.replace("tiny_features_", "tiny_model_"))  # the copy has outputs alone
    for pattern, replacement in PATHS:
        if re.fullmatch(pattern, name):
            return pathlib.Path(FLAIR, re.sub(pattern, replacement, name))
    raise KeyError(f"{name} has no path in the layout of --golden")


def exists(name: str) -> bool:
    try:
        return path(name).exists()
    except pytest.skip.Exception:
        return False


def parameters(name: str, of: Callable[[Any], Iterable]) -> list:
    """What a test is repeated for, as a file lists it.

    Args:
      name: of the small copy.
      of: content of the file -> values of the parameter. Where the file is missing, the test is skipped once.
    """
    if exists(name):
        return list(of(load(name)))
    return [pytest.param(None, marks=pytest.mark.skip(reason=f"{name} is missing in --golden"))]


def load(name: str) -> Any:
    """Content of a file: JSON as it is, arrays by name.

    Args:
      name: of the small copy, such as `tiny_inputs.npz` or `grain/boxes.safetensors`.
    """
    content = _read(path(name))
    if _root is None or name not in _REFORMS:
        return content
    return _REFORMS[name](content)


def sections(name: str) -> dict:
    """The reference's `model_cfg` of `tiny` or `tiny_dist`."""
    return load(f"{name}.json")["model_cfg"]


def worlds() -> list[int]:
    """Numbers of processes of the cases of `tiny_dist`."""
    return parameters(
        "tiny_dist.json", lambda dist: sorted({int(key[2:].split("_")[0]) for key in dist if re.match(r"ws\d+_", key)})
    )


def _read(file: pathlib.Path) -> Any:
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".npz":
        return dict(np.load(file, allow_pickle=False))
    return safetensors.numpy.load_file(file)


def _loss(config: dict) -> dict:
    for case in config["cases"].values():
        case["override"] = case["override"] or {}
        case["grads"] = case["grads"] and f"tiny_loss_{case['grads']}"
    return config


def _dist(config: dict) -> dict:
    cases = {
        f"ws{case['world_size']}_{'mps' if case['added_mps_loss'] else 'nomps'}": {
            "loss": case["mean_loss_fp64"],
            "grad_tolerance": case["grad_tolerance"],
        }
        for case in config["cases"].values()
        if case["bidir"]  # the ring of the reference has a fault of its own, see the README
    }
    return {
        "model_cfg": config["model_cfg"],
        "block_size": config["B_per_rank"],
        "captions": config["K"],
        **cases,
    }


def _state_dict(config: dict) -> dict:
    return {**config, "shapes": {entry["name"]: entry["shape"] for entry in config["state_dict"]}}


def _retrieval(config: dict) -> dict:
    pipe = config["tiny_pipeline"]
    modes = {
        mode: {key.removeprefix("x_"): value for key, value in metrics.items() if re.search("_(R@|mean|median)", key)}
        for mode, metrics in pipe["modes"].items()
    }
    topk = config["topk"]
    return {
        "cases": {name: case["metrics"] for name, case in config["cases"].items()},
        "topk": {**topk, "texts_outside_topk_of_own_image": topk["n_texts_outside_topk_of_own_image"]},
        "pipe": {"captions_per_image": pipe["captions_per_image"], "modes": modes},
    }


def _retrieval_arrays(arrays: dict) -> dict:
    for name, case in _read(path("retrieval.json"))["cases"].items():
        owners = case["txt2img"]
        arrays[f"{name}_image_of_text"] = np.array([owners[str(text)] for text in range(len(owners))])
    return arrays


def _preprocess(inputs: dict) -> dict:
    outputs = _read(path("preprocess.npz").with_name("eval_outputs.npz"))
    return {
        **{f"{name}_input": array for name, array in inputs.items()},
        **{f"{name}_output": array for name, array in outputs.items()},
    }


_REFORMS = {
    "tiny_loss.json": _loss,
    "tiny_dist.json": _dist,
    "full_state_dict.json": _state_dict,
    "retrieval.json": _retrieval,
    "retrieval.npz": _retrieval_arrays,
    "preprocess.npz": _preprocess,
}
