"""The training loop around `step.train_step`, top to bottom in one fixed order."""

import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from flair_jax import (
    checkpoint,
    compilation,
    cpu,
    distributed,
    evaluate,
    flops,
    metrics,
    models,
    optimizer,
    pretrained,
    sharding,
    state,
)
from flair_jax.data import iterator_state, loader, scenes
from flair_jax.data.transforms import packing
from flair_jax.data.transforms.tokenizer import VOCAB_SIZE
from flair_jax.step import step_of

SECTIONS = {
    "seed", "batch_size", "steps", "epochs", "init_from", "log_every", "save_every", "keep", "keep_every", "eval_every",
    "profile_steps", "model", "objectives", "optimizer", "ema_decay", "data", "evaluators", "mesh",
}  # fmt: skip
# Keys that say how a step is computed, not what: a run may go on with others, as it may on other hardware.
HOW = {"model": ("scan_blocks", "remat", "attention", "micro_batches"), "loss": ("chunk_size",)}


def train(config: Mapping[str, Any], workdir: epath.PathLike) -> dict[str, float]:
    """Trains as the config says, from the newest checkpoint in `workdir` if there is one, and evaluates at the end.

    Args:
      config: see `configs/`.
      workdir: receives checkpoints, numbers, pictures and the report.

    Returns:
      The report, name -> value.

    Raises:
      ValueError, TypeError: the config has a wrong key or value, or is not the one the checkpoint was trained with.
      FloatingPointError: a loss is not finite; the last checkpoint is from before.
      checkpoint.SaveError: a checkpoint could not be written; those before it are whole.
      distributed.Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    check(config)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.create_mesh(**config["mesh"])
    with jax.set_mesh(mesh), distributed.Signals() as signals:
        return _train(config, workdir, mesh, signals)


def _train(config, workdir, mesh, signals):
    main_process = jax.process_index() == 0

    # 1. What is trained.
    model = models.create(config["model"])
    saved = checkpoint.Checkpoints(workdir, config["keep"], config["keep_every"], clean=True)
    latest = saved.latest()
    position = None
    if latest is not None:
        check_same_run(saved.config(latest), config)
        position = iterator_state.redistribute(saved.positions(latest), jax.process_count())[jax.process_index()]

    # 2. Data: a position of its own for every process.
    stream = open_stream(config, model, workdir, position)

    # 3. State: born on its devices, then restored, or started from other weights.
    batches = len(stream.source) / config["batch_size"]
    steps = config["steps"] or math.ceil(config["epochs"] * batches)
    optimize = optimizer.create(total_steps=steps, **config["optimizer"])
    current = state.create(model, optimize, mesh, config["seed"], ema=config["ema_decay"] is not None)
    if latest is not None:
        current = saved.restore(latest, current)
        logging.warning("going on from step %d in %s", latest, saved.folder)
    elif config["init_from"]:
        params, _ = pretrained.read(config["init_from"], config["model"])
        current = current.start_from(params)
    first = int(current.step)

    rate = optimizer.schedule(config["optimizer"]["learning_rate"], config["optimizer"]["warmup_steps"], steps)
    evaluators = evaluate.build(config["evaluators"], model)
    writer = metrics.create_writer(workdir, first) if main_process else None
    progress = metrics.Progress(steps, first, config["batch_size"], peak_flops(config), enabled=main_process)
    profile_first, profile_last = config["profile_steps"] or (-1, -1)
    step_function = None  # compiled for the first batch

    def report(step, numbers):
        """Looks at the numbers of a step that the device has finished by now, or is about to, and logs them."""
        numbers = {name: float(value) for name, value in jax.device_get(numbers).items()}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"step {step}: {', '.join(bad)} not finite; the run stops. Checkpoint {saved.latest()} in "
                f"{saved.folder} is from before: lower optimizer.learning_rate or set optimizer.clip_norm to go on"
            )
        if step % config["log_every"] == 0 and writer is not None:
            numbers |= progress.speed() | {"learning_rate": float(rate(step - 1)), "epoch": stream.epoch}
            numbers |= {"skipped": stream.skipped.total(), "shortened": stream.shortened}
            with progress.clock.measure("logging"):
                writer.write_scalars(step, numbers)
            progress.show(numbers)
        return numbers

    # The order is fixed: save and evaluate the state as it is, draw the batch, step, report the step before. So a
    # checkpoint holds the position of the very batch that comes next, and an accelerator never waits for the host.
    pending, tracing = None, False
    try:
        for step in range(first, steps):
            stop = signals.stop(step)
            saved.check()
            save = step > first and step % config["save_every"] == 0
            if (save or stop) and pending:
                report(*pending)  # a state is only saved once the step that made it is known to be sound
                pending = None
            if save or stop:
                with progress.clock.measure("saving"):
                    saved.save(current, gather_positions(stream.position), config)
            if stop:
                raise distributed.Interrupted(stop, step)
            if config["eval_every"] and step % config["eval_every"] == 0 and step > first:
                results = evaluate.run(evaluators, current.weights)
                if writer is not None:
                    writer.write_scalars(step, results)
                progress.start()
            with progress.clock.measure("data"):
                batch = next(stream)
            placed = sharding.global_batch(mesh, batch)
            if step_function is None:
                step_function = compilation.compile_step(step_of(config, model, optimize), current, placed)
                if main_process:
                    print(compilation.memory_table(step_function), flush=True)
                progress.start()
            if step == profile_first:
                jax.profiler.start_trace(str(workdir / "profile"))
                tracing = True
            cpu.finish(pending)
            current, numbers = step_function(current, placed)
            if pending:
                report(*pending)
            pending = step + 1, numbers
            progress.step(*_work(config, batch["texts"]))
            if step == profile_last and tracing:
                jax.block_until_ready(current)
                jax.profiler.stop_trace()
                tracing = False
        final = report(*pending) if pending else {}
        saved.save(current, gather_positions(stream.position), config)
    finally:
        if tracing:
            jax.profiler.stop_trace()
        summary = progress.summary()
        progress.close()
        stream.close()
        saved.close()
        if writer is not None:
            writer.flush()

    # 4. What came of it.
    results = evaluate.run(evaluators, current.weights)
    evaluate.write(workdir, results, config["evaluators"], model, current.weights)
    if main_process:
        counts = {"skipped": stream.skipped.total(), "shortened": stream.shortened}
        print(metrics.table("this run", {**final, **summary, **counts}))
        for reason, count in stream.skipped.most_common():
            logging.warning("%d samples were skipped: %s", count, reason)
        metrics.draw_loss_curve(workdir, evaluate.pictures(workdir) / "loss.png", config["objectives"])
    return results


def peak_flops(config: Mapping[str, Any]) -> float | None:
    """Operations a second of all devices, where the model computes in bfloat16 and the chip's peak is known."""
    one = flops.peak(jax.devices()[0].device_kind)
    return None if one is None or config["model"]["dtype"] != "bfloat16" else one * jax.device_count()


def _work(config: Mapping[str, Any], texts: Mapping[str, np.ndarray]) -> tuple[float, int, int]:
    """Operations of a step on all devices, taking the other processes' captions to be as long as this one's; tokens and
    places of this process's captions."""
    lengths = packing.text_lengths(texts)
    everywhere = np.tile(lengths, jax.process_count())
    work = flops.train_step(config["model"], config["objectives"], config["batch_size"], everywhere)
    return work, int(lengths.sum()), texts["tokens"].size


def open_stream(config: Mapping[str, Any], model: nn.Module, workdir: epath.Path, position=None) -> loader.Stream:
    """The training batches of a config's `data` section.

    With `data.scenes` the embedded data set is drawn into `WORKDIR/scenes` first and read from there like any other.
    """
    options = dict(config["data"])
    if drawn := options.pop("scenes", None):
        folder = workdir / "scenes"
        if jax.process_index() == 0:
            scenes.write(folder, **drawn)
        multihost_utils.sync_global_devices("scenes are drawn")
        options["shards"] = str(folder)
    if not options["shards"]:
        raise ValueError("config.data.shards is empty; expected shards, such as '/data/{00000..00575}.tar'")
    return loader.make_stream(
        batch_size=config["batch_size"],
        image_size=model.image_size,
        context_length=model.context_length,
        seed=config["seed"],
        position=position,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        device_count=jax.local_device_count(),
        rows_multiple_of=model.micro_batches,
        **options,
    )


def check(config: Mapping[str, Any]) -> None:
    """Refuses a config with an unknown, missing or contradicting key before anything is done."""
    if unknown := set(config) - SECTIONS:
        raise ValueError(f"unknown config keys {sorted(unknown)}; there are {sorted(SECTIONS)}")
    if missing := SECTIONS - set(config):
        raise ValueError(f"the config lacks {sorted(missing)}")
    if bool(config["steps"]) == bool(config["epochs"]):
        raise ValueError(f"set one of config.steps and config.epochs, not {config['steps']} and {config['epochs']}")
    if config["ema_decay"] is not None and not 0 < config["ema_decay"] < 1:
        raise ValueError(f"config.ema_decay is {config['ema_decay']}; expected a share between 0 and 1, such as 0.9999")
    if (profile := config["profile_steps"]) and (len(profile) != 2 or not 0 <= profile[0] <= profile[1]):
        raise ValueError(f"config.profile_steps is {profile}; expected the first and the last, such as (10, 12)")
    if config["model"].get("micro_batches", 1) < 1:
        raise ValueError(f"config.model.micro_batches is {config['model']['micro_batches']}; expected 1 or more")
    if config["model"]["text"]["vocab_size"] < VOCAB_SIZE:
        size = config["model"]["text"]["vocab_size"]
        raise ValueError(f"model.text.vocab_size is {size}; the tokenizer has {VOCAB_SIZE} ids")


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to continue a checkpoint with a config that would make the rest of the run another experiment."""
    now = json.loads(json.dumps(now))

    def what(config, section):
        value = config.get(section)
        return value if section not in HOW else {key: value[key] for key in value if key not in HOW[section]}

    for section in ("seed", "batch_size", "model", "objectives", "optimizer", "ema_decay"):
        if what(before, section) != what(now, section):
            raise ValueError(
                f"config.{section} is {now[section]}, the checkpoint in the workdir was trained with "
                f"{before.get(section)}; use another --workdir, or start from its weights with --config.init_from"
            )


def gather_positions(position: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The data positions of all processes, in their order, on every process."""
    if jax.process_count() == 1:
        return [position]
    text = json.dumps(position).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
