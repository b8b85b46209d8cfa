"""What a run needs before it is started: work, time and memory per device. Nothing is allocated, no data is read.

    python -m flair_jax.plan --config flair_cc12m
    python -m flair_jax.plan --config flair_cc12m --config.mesh.fsdp=8 --devices 64 --mean_tokens 40
    python -m flair_jax.plan --config flair_cc12m --topology v6e:4x8    # TPU's compiler: pip install libtpu
    python -m flair_jax.plan --table                                               # the tables of docs/scale.md

The training step is compiled for as many devices as asked, which need not exist. By default the compiler is the CPU's:
the arguments and outputs are those of any device, but it computes in float32 where the config says
bfloat16 and fuses little, so that its temporaries are several times a GPU's or TPU's, good for comparing settings only,
and `model.remat` only with `model.scan_blocks`, for it finds in unrolled blocks what would be computed twice.
With `--topology` the account is the TPU compiler's own.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from flair_jax import compilation, flops, models, objectives, optimizer, sharding, state
from flair_jax import config as configuration
from flair_jax.data.transforms.base import BOXES, BOXES_VALID, CAPTIONS, DESCRIPTION_IDS, DESCRIPTIONS
from flair_jax.data.transforms.images import pair
from flair_jax.step import step_of, text_slots

RECIPES = ("flair_cc3m", "flair_cc12m", "flair_yfcc15m", "flair_merged30m", "flair_pixelprose")
CHIPS = ("A100", "H200", "TPU v5e", "TPU v6e")  # an H100 counts as an H200

# Of the chip's dense bfloat16 peak. The first is what the best public CLIP training shows (open_clip, ViT-B/16 on
# A100-40G: 15.6 %), the second the aim of this code. Neither was measured here.
MFUS = (0.15, 0.40)
MEAN_TOKENS = 27.0  # of a caption of DreamLIP's kind, one to three sentences, with both ends
FILL = 1.05  # packed rows, over what the tokens alone would take: README, "Packed rows"


def abstract_batch(config: Mapping[str, Any], mesh: jax.sharding.Mesh, mean_tokens: float = MEAN_TOKENS) -> Any:
    """Shapes of a global batch as the pipeline makes it, split over the mesh.

    Args:
      config: the whole config.
      mesh: of the run.
      mean_tokens: of a caption, for the number of packed rows.
    """
    model, images = config["model"], config["batch_size"]
    slots = slots_of(config)
    count = sum(slots.values())  # texts an image
    split, devices = sharding.batch_sharding(mesh), mesh.size
    if images % devices:
        raise ValueError(f"{devices} devices do not divide config.batch_size {images}")

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=split)

    texts = images * count
    if row_length := config["data"]["packing"]["row_length"]:
        rows = math.ceil(texts * mean_tokens / row_length * FILL / devices) * devices
        text = {name: ints(rows, row_length) for name in ("tokens", "segments", "positions")}
    else:
        text = {"tokens": ints(texts, model["text"]["context_length"])}
    height, width = pair(model["vision"]["image_size"])
    pixels = jax.ShapeDtypeStruct((images, height, width, 3), np.uint8, sharding=split)
    batch = {"images": pixels, "texts": {**text, "ends": ints(texts)}}
    if slots.keys() != {CAPTIONS}:
        batch["valid"] = jax.ShapeDtypeStruct((images, count), np.bool_, sharding=split)
    if regions := slots.get(DESCRIPTIONS):
        batch[BOXES] = jax.ShapeDtypeStruct((images, regions, 4), np.float32, sharding=split)
        batch[BOXES_VALID] = jax.ShapeDtypeStruct((images, regions), np.bool_, sharding=split)
        batch[DESCRIPTION_IDS] = ints(images, regions)
    return batch


def slots_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Texts an image by slot."""
    return dict(text_slots(config["data"])) or {CAPTIONS: config["data"]["captions"]["count"]}


def abstract_state(config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """Model, optimiser and the shapes of their state, placed as a run would place them."""
    model = models.create(config["model"])
    optimize = optimizer.create(total_steps=config["steps"], **config["optimizer"])
    shapes = jax.eval_shape(
        lambda: state.create(
            model, optimize, mesh, config["seed"], ema=config["ema_decay"] is not None, lora=config["lora"]
        )
    )
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.state_sharding(mesh, shapes),
    )
    return model, optimize, placed


def compile_step(
    config: Mapping[str, Any], devices: Sequence[jax.Device], mean_tokens: float = MEAN_TOKENS
) -> jax.stages.Compiled:
    """The training step of a config, compiled for some devices; they may be fake or absent."""
    mesh = sharding.create_mesh(**config["mesh"], devices=devices)
    # The CPU's code is never run, and its optimisation does not change the plan of the memory.
    options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
    with jax.set_mesh(mesh):
        model, optimize, placed = abstract_state(config, mesh)
        batch = abstract_batch(config, mesh, mean_tokens)
        step = compilation.jit_step(step_of(config, model, optimize), placed)
        return step.lower(placed, batch).compile(options)


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the model of a config."""
    model = models.create(config["model"])
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: state.init_params(model, 0))))


def step_flops(config: Mapping[str, Any], mean_tokens: float = MEAN_TOKENS) -> float:
    """Operations of a step of useful work, see `flops`, where every caption has the mean length."""
    slots, images = slots_of(config), config["batch_size"]
    lengths = np.full(images * sum(slots.values()), mean_tokens)
    return flops.train_step(config["model"], config["objectives"], images, lengths, **flops.counts(slots))


def chip_hours(operations: float, chip: str, mfu: float) -> float:
    """Hours that one chip takes for so many operations.

    Args:
      operations: of useful work, see `flops`.
      chip: its kind as jax names it, or a part of that.
      mfu: share of its dense bfloat16 peak.

    Raises:
      ValueError: the chip's peak is not known.
    """
    if (peak := flops.peak(chip)) is None:
        raise ValueError(f"the speed of {chip!r} is not known; there are {sorted(flops.PEAK_BF16)}")
    return operations / (peak * mfu) / 3600


def measure(
    config: Mapping[str, Any], devices: Sequence[jax.Device], mean_tokens: float = MEAN_TOKENS
) -> dict[str, int | float | str]:
    """The figures of a run by name; all bytes are those of one device.

    Args:
      config: the whole config; `steps` must be set.
      devices: to compile for.
      mean_tokens: of a caption.
    """
    images, steps = config["batch_size"], config["steps"]
    work = step_flops(config, mean_tokens)
    compiled = compile_step(config, devices, mean_tokens)
    memory = compiled.memory_analysis()
    figures = {
        "parameters": parameters(config),
        "devices": len(devices),
        "compiler": devices[0].device_kind,
        "images_a_step": images,
        "captions_an_image": config["data"]["captions"]["count"],
        "tokens_a_caption": mean_tokens,
        "steps": steps,
        "images": steps * images,
        "gflop_an_image": work / images / 1e9,
        "pflop_a_step": work / 1e15,
        "eflop": steps * work / 1e18,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "output_bytes_in_place": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return figures


def estimates(operations: float, devices: int, chips: Sequence[str] = CHIPS) -> str:
    """How long so many operations take on so many chips, a line a kind of chip."""
    lines = []
    for chip in chips:
        hours = {mfu: chip_hours(operations, chip, mfu) for mfu in MFUS}
        cells = (f"{hour / devices:9,.1f} h = {hour:7,.0f} chip-hours at {mfu:.0%}" for mfu, hour in hours.items())
        lines.append(f"{devices} x {chip:12}" + ",".join(cells))
    return "\n".join(lines)


def recipe(name: str) -> dict[str, Any]:
    """The config of a file of `configs/`, as a plain dict."""
    return configuration.read(name)


def tables() -> str:
    """The tables of docs/scale.md that follow from formulas, in Markdown."""
    low, high = (f"{mfu:.0%}" for mfu in MFUS)
    work = ["| recipe | GPUs of the reference | images per step | K | steps | GFLOP per image | EFLOP |", _rule(6)]
    hours = ["| chip-hours at " + f"{low} / {high} | " + " | ".join(CHIPS) + " |", _rule(len(CHIPS))]
    for name in RECIPES:
        config = recipe(name)
        images, steps, operations = config["batch_size"], config["steps"], step_flops(config)
        gpus = images // config["objectives"]["text_conditioned"]["block_size"]
        work.append(
            f"| {name} | {gpus} | {images:,} | {config['data']['captions']['count']} | {steps:,} "
            f"| {operations / images / 1e9:.0f} | {steps * operations / 1e18:.0f} |"
        )
        cells = (" / ".join(f"{chip_hours(steps * operations, chip, mfu):,.0f}" for mfu in MFUS) for chip in CHIPS)
        hours.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*work, "", *hours])


def _rule(numbers: int) -> str:
    return "|---|" + "---:|" * numbers


def main(arguments: Sequence[str]) -> None:
    if _TABLE.value:
        print(tables())
        return
    if _CONFIG.value is None:
        raise app.UsageError("--config names the run to plan, such as flair_cc12m")
    try:
        config = configuration.read(_CONFIG.value, arguments[1:])
        configuration.check(config)
        objectives.check(config["objectives"], config["batch_size"])
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    if not config["steps"]:
        raise app.UsageError("the length of the run must be known without its data: set --config.steps")
    chips = (_DEVICE.value,) if _DEVICE.value else CHIPS
    jax.config.update("jax_platforms", "cpu")
    if _TOPOLOGY.value:
        devices = topologies.get_topology_desc(_TOPOLOGY.value, "tpu").devices
    else:
        blocks = config["objectives"].get("text_conditioned", {}).get("block_size")
        count = _DEVICES.value or (config["batch_size"] // blocks if blocks else 1)
        jax.config.update("jax_num_cpu_devices", count)  # only before jax starts
        devices = jax.devices()
    figures = measure(config, devices, _MEAN_TOKENS.value)
    for name, value in figures.items():
        print(f"{name:24} {value}" if isinstance(value, str) else f"{name:24} {value:,.7g}")
    print("\nEstimated, not measured, at a share of the chips' dense bfloat16 peak:")
    print(estimates(1e18 * figures["eflop"], len(devices), chips))
    if _JSON.value:
        pathlib.Path(configuration.normalize(_JSON.value)).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    _CONFIG = flags.DEFINE_string("config", None, "The experiment: a path, or the name of a shipped config.")
    _DEVICES = flags.DEFINE_integer("devices", None, "To plan for; default: as many as the reference's.")
    _DEVICE = flags.DEFINE_string("device", None, "Kind of chip as jax names it; default: several.")
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs to compile for, such as v5e:4x8, instead of --devices.")
    _MEAN_TOKENS = flags.DEFINE_float("mean_tokens", MEAN_TOKENS, "Of a caption, with both ends.")
    _JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
    _TABLE = flags.DEFINE_bool("table", False, "Print the tables of docs/scale.md.")
    app.run(main, flags_parser=configuration.parse_known_flags)
