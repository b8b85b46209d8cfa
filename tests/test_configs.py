"""Every config builds; the recipes are the reference's, and their steps compile for the devices that they are for."""

import importlib
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from processes import one_device

from flair_jax import config as configuration
from flair_jax import evaluate, plan, sharding, step
from flair_jax.configs import fsc_clip_recipe, grain_recipe
from flair_jax.data.benchmarks import table
from flair_jax.data.transforms import base, captions

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = {"__init__", "variants", "flair_recipe", "fsc_clip_recipe", "grain_recipe", "eval_all", "finetune"}
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in TOOLS)
# spec/flair.md section 1: GPUs, images a GPU, K, samples, steps an epoch, decay, epsilon. The length of PixelProse is
# COSMOS's; all that is not in a script is CC12M's.
PUBLISHED = {
    "flair_cc3m": (8, 128, 8, 2_823_019, 2_784, 0.5, 1e-8),
    "flair_cc12m": (32, 192, 8, 10_010_225, 1_632, 0.5, 1e-8),
    "flair_yfcc15m": (32, 192, 10, 14_065_827, 2_304, 0.5, 1e-8),
    "flair_merged30m": (32, 128, 10, 27_000_000, 6_624, 0.2, 1e-6),
    "flair_pixelprose": (32, 192, 8, 15_037_386, 2_448, 0.5, 1e-8),
}
PARAMETERS = 150_674_434
STATE = 3 * 4 * PARAMETERS + 3 * 4  # float32 parameters and two moments; the step and two counts of the optimiser


def read(name):
    return importlib.import_module(f"flair_jax.configs.{name}")


def reference_epoch(samples, batch):
    """Steps of an epoch by the reference's loader, which rounds up to its 48 processes."""
    return math.ceil(math.ceil(samples / batch) / 48) * 48


def compiled(name, folder, *arguments):
    """Figures of `python -m flair_jax.plan` in a process of its own, since it chooses the number of devices."""
    file = folder / "plan.json"
    command = [sys.executable, "-m", "flair_jax.plan", f"--config=configs/{name}.py", f"--json={file}"]
    command += ["--config.model.scan_blocks=True", *arguments]  # a fifth of the time to compile
    done = subprocess.run(command, cwd=ROOT, env=one_device(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"{name} {' '.join(arguments)}\n{done.stdout}")
    return json.loads(file.read_text())


def test_the_recipes_are_all_there():
    assert set(PUBLISHED) == set(plan.RECIPES) == {name for name in EXPERIMENTS if name.startswith("flair_")}


@pytest.mark.parametrize(
    "name",
    [
        *EXPERIMENTS,
        *(f"fsc_clip_laioncoco:{run}" for run in ("negclip", "vit_l14_lora")),
        "grain_cc3m:clip",
    ],
)
def test_every_config_builds_and_its_step_has_a_type(name):
    """At the real sizes and, of a recipe, for the reference's number of devices; nothing is computed or compiled."""
    config = configuration.load(name).unlock()
    if not config.epochs:
        config.steps = config.steps or 10
    configuration.check(config.to_dict())
    captions.CaptionOptions(**config.data.captions)
    config.model.scan_blocks = True  # the same types in half of the time
    config.steps = config.steps or 10
    devices = PUBLISHED[name][0] if name in PUBLISHED else 8
    mesh = AbstractMesh((devices, 1), sharding.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        model, optimize, before = plan.abstract_state(config.to_dict(), mesh)
        batch = plan.abstract_batch(config.to_dict(), mesh)
        after, numbers = jax.eval_shape(step.step_of(config.to_dict(), model, optimize), before, batch)
    # Of the same types, so that the state can be replaced in place.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
    assert numbers["loss"].shape == () and numbers["loss"].dtype == np.float32
    if name in PUBLISHED:
        gpus, images, count, *_ = PUBLISHED[name]
        assert plan.parameters(config.to_dict()) == PARAMETERS
        # spec/anchors.md 2.1: 35.1 GFLOP an image, 5.96 a text of 77 tokens, 2.1 one of 27, 0.93e-3 a pair; thrice.
        pairs = gpus * (images + count - 1)
        gflop = plan.step_flops(config.to_dict()) / config.batch_size / 1e9
        assert gflop == pytest.approx(3 * (35.1 + 2.07 * count + 0.93e-3 * pairs), rel=0.03)
        # Replicated: the whole state on each device, and its share of the pixels and of the captions' rows and ends.
        assert bytes_of_a_device(before) == STATE
        assert bytes_of_a_device(batch) == batch_bytes(name)


def bytes_of_a_device(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def batch_bytes(name):
    """Of one device of as many as the reference has."""
    gpus, images, count, *_ = PUBLISHED[name]
    rows = math.ceil(gpus * images * count * 27 / 80 * 1.05 / gpus)
    return images * 224 * 224 * 3 + 4 * (3 * rows * 80 + images * count)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_reference_s(name):
    gpus, images, count, samples, epoch_steps, decay, epsilon = PUBLISHED[name]
    config = read(name).get_config()
    assert epoch_steps == reference_epoch(samples, gpus * images)
    assert (config.batch_size, config.objectives.text_conditioned.block_size) == (gpus * images, images)
    assert (config.steps, config.epochs) == (32 * epoch_steps, None)
    assert config.data.captions.count == count
    adamw = config.optimizer
    assert (adamw.learning_rate, adamw.warmup_steps, adamw.b1, adamw.b2) == (5e-4, 2000, 0.9, 0.98)
    assert (adamw.weight_decay, adamw.eps, adamw.clip_norm) == (decay, epsilon, None)
    assert config.data.packing.row_length == 80 and config.model.dtype == "bfloat16"
    fields = ("caption",) if name == "flair_pixelprose" else captions.FIELDS
    assert tuple(config.data.captions.fields) == fields
    assert (
        f"{samples:,} images, 32 epochs, {config.steps:,} steps of {config.batch_size:,} images" in read(name).__doc__
    )


def test_the_runs_of_fsc_clip_are_the_reference_s():
    """spec/fsc_clip.md 5: variant, learning rate, LoRA, batch, processes, both weights and kinds of negatives."""
    found = {}
    for data, runs in fsc_clip_recipe.RUNS.items():
        for name in runs:
            config = configuration.load(f"fsc_clip_{data}:{name}").to_dict()
            configuration.check(config)
            vision, losses, adamw = config["model"]["vision"], config["objectives"], config["optimizer"]
            weights = tuple(losses.get(f"{part}_hard_negatives", {}).get("weight") for part in ("global", "local"))
            worlds = {options.get("reference_world_size", 1) for options in losses.values()}
            assert len(worlds) == 1
            found[data, name] = (
                f"{'L' if vision['width'] == 1024 else 'B'}/{vision['patch_size']}",
                *(adamw["learning_rate"], config["lora"] and config["lora"]["rank"], config["batch_size"], *worlds),
                *(weights, len(config["data"]["negatives"]["kinds"] or ()), config["model"]["gelu"]),
            )
            assert set(losses) - {"global_hard_negatives", "local_hard_negatives"} == {
                "negclip" if name == "negclip" else "softmax"
            }
            assert (adamw["b1"], adamw["b2"], adamw["eps"], adamw["weight_decay"]) == (0.9, 0.98, 1e-6, 0.1)
            assert (adamw["warmup_steps"], config["epochs"], config["seed"]) == (50, 5.0, 0)
    full, lora = (5e-6, None), (5e-5, 4)
    for data, weights in (("coco", (0.5, 0.2)), ("cc3m", (1.0, 0.2)), ("laioncoco", (0.5, 0.2))):
        assert found.pop((data, "full")) == ("B/32", *full, 256, 1, weights, 3, "quick")
        assert found.pop((data, "lora")) == ("B/32", *lora, 256, 1, weights, 3, "quick")
        assert found.pop((data, "clip")) == ("B/32", *full, 256, 1, (None, None), 0, "quick")
    for suffix, rate in (("", full), ("_lora", lora)):
        assert found.pop(("laioncoco", f"vit_b16{suffix}")) == ("B/16", *rate, 128, 1, (0.5, 0.5), 3, "quick")
        assert found.pop(("laioncoco", f"vit_l14{suffix}")) == ("L/14", *rate, 256, 4, (0.5, 0.5), 3, "quick")
        assert found.pop(("laioncoco", f"datacomp{suffix}")) == ("B/32", *rate, 256, 1, (0.5, 0.2), 3, "exact")
    assert found == {("laioncoco", "negclip"): ("B/32", *full, 256, 1, (None, None), 1, "quick")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_flags_that_a_docstring_gives_are_keys(name):
    module = read(name)
    config = module.get_config()
    for key, value in re.findall(r"--config\.([\w.]+)=(\S+)", module.__doc__):
        assert key in {path for path, _ in _flat(config)}, key
        if value[0].isdigit():
            config.update_from_flattened_dict({key: json.loads(value)})
    configuration.check({**config.to_dict(), "steps": config.steps, "epochs": None if config.steps else 1.0})


@pytest.mark.parametrize(
    ("name", "samples", "batch"), [("flair_yfcc15m", 14_065_827, 1536), ("flair_merged30m", 27_000_000, 1024)]
)
def test_the_flags_for_the_run_as_scripted(name, samples, batch):
    steps = 32 * reference_epoch(samples, batch)
    assert f"--config.batch_size={batch} --config.steps={steps}\n" in read(name).__doc__


def test_the_flag_for_the_true_sum_of_the_merged_sets():
    samples = sum(PUBLISHED[name][3] for name in ("flair_cc3m", "flair_cc12m", "flair_yfcc15m"))
    assert f"{samples:,}" in read("flair_merged30m").__doc__
    assert f"--config.steps={32 * reference_epoch(samples, 4096)}\n" in read("flair_merged30m").__doc__


def test_the_step_of_a_recipe_compiles_and_fsdp_shrinks_parameters_and_moments(tmp_path):
    """spec: sharded over 8 devices, an eighth of the state; what is below 65,536 elements stays whole."""
    name = "flair_cc3m"
    figures = compiled(name, tmp_path, "--config.mesh.fsdp=8")
    assert (figures["parameters"], figures["devices"]) == (PARAMETERS, PUBLISHED[name][0])
    assert figures["steps"] == read(name).get_config().steps
    batch = batch_bytes(name)
    assert STATE / 8 < figures["argument_bytes"] - batch < 1.03 * STATE / 8
    assert figures["output_bytes_in_place"] == figures["argument_bytes"] - batch  # nothing is held twice


def test_the_step_of_grain_compiles_for_many_devices():
    """One layer of each tower at the real widths; descriptions in groups that lie on two devices each, and FSDP."""
    config = configuration.load("grain_cc3m").unlock()
    for part in (config.model.vision, config.model.text, config.model.decoder):
        part.depth = 1
    config.steps, config.epochs, config.mesh.fsdp, config.batch_size = 10, None, 4, 512
    config = config.to_dict()
    configuration.check(config)
    memory = plan.compile_step(config, jax.devices()).memory_analysis()
    batch = plan.abstract_batch(config, sharding.create_mesh(**config["mesh"]))
    del batch[base.DESCRIPTION_IDS]  # masking of duplicates is off
    state = memory.argument_size_in_bytes - bytes_of_a_device(batch)
    whole = 3 * 4 * plan.parameters(config)
    assert whole / 4 < state < 1.05 * whole / 4
    assert memory.alias_size_in_bytes == state  # nothing is held twice


def test_the_runs_of_grain_are_the_reference_s():
    """spec/grain.md 4.1: objectives, groups, captions, learning rates, decay; ImageNet zero-shot after each epoch."""
    for name in grain_recipe.RUNS:
        config = configuration.load(f"grain_cc3m:{name}").to_dict()
        configuration.check(config)
        grain, losses, adamw = name == "grain", config["objectives"], config["optimizer"]
        assert losses.keys() == {"softmax", *(("boxes", "region_descriptions") if grain else ())}
        regions = config["data"]["regions"]["count"]
        assert (config["batch_size"], config["epochs"], regions) == (2048, 35.0, 5 if grain else None)
        assert {losses[key]["group_size"] for key in losses.keys() - {"softmax"}} <= {128}
        assert {losses[key]["weight"] for key in losses} == {1.0}
        rates = adamw["first_learning_rate"], adamw["learning_rate"], adamw["last_learning_rate"]
        assert (rates, adamw["b1"], adamw["b2"], adamw["eps"]) == ((1e-6, 1e-3, 1e-5), 0.9, 0.98, 1e-8)
        assert (adamw["warmup_steps"], adamw["weight_decay"]) == (1401, 0.5 if name == "laclip" else 0.1)
        fields = config["data"]["captions"]["fields"]
        assert fields == (("raw_caption",) if name == "clip" else ("raw_caption", "longSV_captions"))
        listed = evaluate.sections(config)
        assert all(evaluate.is_off(*section) for section in listed.values())
        config["data_root"] = "/data"
        due = [at for at in (1, 1401, 1402, 2804) if "imagenet" in evaluate.due(config, at)]
        assert due == [1402, 2804] and "zero_shot" not in evaluate.due(config, 1402)
        sets = {
            entry.name
            for part in ("imagenet", "zero_shot")
            for entry in table.select(config["evaluators"][part]["sets"])
        }
        assert len(sets) == 12 and {"imagenet", "cub", "food101"} < sets
        assert not evaluate.is_off(*evaluate.sections(config)["imagenet"])


def test_the_files_for_zero_shot_are_flags():
    flags = [
        "--config.evaluators.zero_shot.classification.descriptions=FOLDER",
        "--config.evaluators.zero_shot.classification.templates=('a photo of a {c},', 'a sketch of a {c},')",
        "--config.evaluators.zero_shot.classification.modes=('global', 'regions')",
    ]
    options = configuration.read("grain_cc3m", flags)["evaluators"]["zero_shot"]["classification"]
    assert options == {
        "descriptions": "FOLDER",
        "templates": ("a photo of a {c},", "a sketch of a {c},"),
        "modes": ("global", "regions"),
        "renormalize": False,
    }


def _flat(config, prefix=""):
    for key in config:
        value = config.get(key)
        yield prefix + key, value
        if hasattr(value, "keys"):
            yield from _flat(value, f"{prefix}{key}.")
