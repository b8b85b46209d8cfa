"""The check of a GPU, tried on the CPU at toy size without the packages that a lent machine lacks."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from processes import one_device

from benchmarks import gpu_check, gpu_parts, kernels
from flair_jax.configs import variants

ROOT = pathlib.Path(__file__).parents[1]
# Run by every Python that finds it: hides packages, and the installation of this one, so that the checkout is used.
HIDE = """
import importlib.util
import sys
missing, find_spec = {packages}, importlib.util.find_spec
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path[:] = [Missing(), *(f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", ""))]
importlib.util.find_spec = lambda name, package=None: None if name in missing else find_spec(name, package)
"""
MISSING = {
    "array_record",
    "clu",
    "cykooz",
    "etils",
    "fsspec",
    "ftfy",
    "grain",
    "matplotlib",
    "ml_collections",
    "orbax",
    "psutil",
    "sentencex",
    "simplejpeg",
    "tensorflow",
    "tqdm",
}


def test_all_parts_run_without_what_a_lent_machine_lacks(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(packages=MISSING))
    environment = one_device(PYTHONPATH=str(tmp_path), CXX=str(ROOT / "tests" / "quick_g++"))
    command = [
        sys.executable,
        "benchmarks/gpu_check.py",
        "--output",
        str(tmp_path / "out"),
        "--toy",
        "--seconds",
        "3600",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    log = (tmp_path / "out" / "log.txt").read_text()
    assert list(results) == ["toy", *gpu_check.PARTS], log
    for part in gpu_check.PARTS:
        assert "error" not in results[part], log
        assert results[part].pop("seconds") > 0

    golden = results["golden"]
    assert golden.keys() == {"forward", "loss init_mps", "loss mid_mps", "loss mid_nomps"}
    assert all(values["passed"] for values in golden.values()), golden
    assert len(results["attention"]) == 5
    for values in results["attention"].values():  # no cuDNN here
        assert 0 < values["xla_value_error"] < 0.03 and 0 < values["xla_gradient_error"] < 0.03
        assert "cudnn" in values["error"].lower() and "passed" not in values

    train = results["train"]
    assert train.pop("device")["kind"] == "cpu"
    assert train.keys() == {"4 attention=cudnn", "4 attention=xla", "8 attention=xla"}
    assert "cudnn" in train.pop("4 attention=cudnn")["error"].lower()
    for values in train.values():
        assert values["images_per_second"] == pytest.approx(values["images"] / values["step_seconds"])
        assert min(values[name] for name in ("loss", "needed_gib", "compile_seconds", "tflop_per_step")) > 0
    twin = results["twin"]
    del twin["device"]
    best = max((2, 4), key=lambda size: twin[f"{size} eager"]["images_per_second"])
    assert twin.keys() == {"2 eager", "4 eager", f"{best} compiled"}
    assert all(values["images_per_second"] > 0 for values in twin.values())
    encode = results["encode"]
    assert {case: (values["run"], values["count"]) for case, values in encode.items()} == {
        "images, attention=xla": ("second", 6),
        "texts, attention=xla": ("second", 20),
        "pairs, with encoding, attention=xla": ("second", 120),
    }
    matching = results["matching"]
    assert {case: (values["images"], values["ways"]) for case, values in matching.items()} == {
        "5 queries": (2, 120),
        "6 queries": (2, 720),
    }
    assert all(values["ratio"] == values["hungarian_ms"] / values["all_ways_ms"] > 0 for values in matching.values())
    (profile,) = results["profile"].values()
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert profile["shares"]["optimizer"] > 0 and profile["step_ms"] > 0 and len(profile["top"]) > 5

    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout
    for words in ("golden: forward | yes", "train: 8 attention=xla", f"twin: {best} compiled", "matrix products"):
        assert words in table


def test_a_part_is_stopped_in_time_and_the_rest_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PARTS", {"golden": 0, "encode": 0})
    results = gpu_check.run(tmp_path, ["golden", "encode"], True, seconds=0.5)
    assert "stopped after 0 seconds" in results["golden"]["error"]
    assert results["encode"]["error"] == "not started: no time is left"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "- golden: stopped" in gpu_check.tables(results)


def test_a_part_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PARTS", {"no such part": 0})
    results = gpu_check.run(tmp_path, ["no such part"], True, seconds=600)
    assert results["no such part"]["error"] == "its process ended with exit code 2; log.txt says why"
    assert "invalid choice: 'no such part'" in (tmp_path / "log.txt").read_text()


def test_the_parts_are_known_and_fit_into_nine_minutes():
    assert gpu_parts.PARTS.keys() == gpu_check.PARTS.keys()
    assert sum(gpu_check.PARTS.values()) <= gpu_check.SECONDS < 9 * 60


def test_the_models_are_the_published_and_the_golden_one():
    assert variants.flair("B/16").to_dict() == {**gpu_parts.FLAIR, **gpu_parts.COMPUTE, "dtype": "float32"}
    sizes = ("embed_dim", "vision", "text", "pooling")
    assert {name: gpu_parts.TINY[name] for name in sizes} == {name: TINY[name] for name in sizes}
    weights = {name: options["weight"] for name, options in gpu_parts.objectives().items()}
    assert weights == {name: options.weight for name, options in variants.flair_objectives().items()}


@pytest.mark.parametrize(
    ("kernel", "scope", "target", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "jit(step)/dot_general", "__cublas$gemm", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "", "", "matrix products"),
        ("gemm_fusion_dot_12", "jit(step)/dot_general", "", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "", "__cudnn$fmhaSoftmaxBackward", "attention"),
        ("loop_multiply_fusion_3", "jit(step)/optimizer/mul", "", "optimizer"),
        ("loop_multiply_fusion_3", "jit(step)/mul", "", "elementwise"),
        ("input_reduce_fusion_4", "", "", "reductions"),
        ("triton_softmax_2", "", "", "reductions"),
        ("loop_convert_fusion", "", "", "elementwise"),
        ("input_transpose_fusion", "", "", "copies"),
        ("MemcpyD2D", "", "", "copies"),
        ("ampere_unheard_of", "", "", "other"),
    ],
)
def test_kinds_of_kernels(kernel, scope, target, kind):
    assert kernels.kind(kernel, "", scope, target) == kind


def test_a_profile_is_summed_by_kind(tmp_path):
    def step(x, y):
        with jax.named_scope("optimizer"):
            z = jnp.sin(x) * 2
        return x @ y, z

    x = jnp.ones((400, 400))
    compiled = jax.jit(step).lower(x, x).compile()
    jax.block_until_ready(compiled(x, x))
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            jax.block_until_ready(compiled(x, x))
    found = kernels.summary(tmp_path, compiled.as_text(), steps=3)
    assert found["shares"].keys() == set(kernels.NAMES)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert "optimizer" in {kernel["kind"] for kernel in found["top"]}  # by its scope; the names are others on a CPU
    assert all(kernel["count"] >= 1 for kernel in found["top"] if kernel["kind"] == "optimizer")
    busy = sum(kernel["ms"] for kernel in found["top"])
    assert busy > 0 and found["step_ms"] > 0


def test_a_trace_without_kernels_is_refused(tmp_path):
    with jax.profiler.trace(tmp_path):
        pass
    with pytest.raises(ValueError, match="holds no kernel"):
        kernels.summary(tmp_path, "", steps=1)
