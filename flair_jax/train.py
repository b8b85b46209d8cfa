"""The training loop around `step.train_step`, top to bottom in one fixed order."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flair_jax import (
    checkpoint,
    compilation,
    cpu,
    distributed,
    evaluate,
    flops,
    metrics,
    models,
    objectives,
    optimizer,
    pretrained,
    schedule,
    sharding,
    state,
)
from flair_jax import config as configuration
from flair_jax.convert import lora_files
from flair_jax.data import iterator_state, loader, scenes
from flair_jax.data.counted import counted
from flair_jax.data.transforms import packing
from flair_jax.early_stopping import EarlyStopping, EarlyStoppingOptions
from flair_jax.lock import WorkdirLock
from flair_jax.report import flat
from flair_jax.step import step_of, text_slots

BEFORE, BEST = "before", "best"  # folders in a work directory, see `train`
NOTE_BEFORE = "weights: those that the run starts from"


def train(config: Mapping[str, Any], workdir: epath.PathLike) -> dict[str, float]:
    """Trains as the config says, from the newest checkpoint in `workdir` if there is one, and evaluates at the end.

    Args:
      config: see `configs/`.
      workdir: receives checkpoints, numbers, pictures and the report. With `evaluate_before` its folder `before` has
        the report of the weights at the start. With `early_stopping` its folder `best` is a work directory of its own
        with the best checkpoint, and the report is about that.

    Returns:
      The report, name -> value.

    Raises:
      ValueError, TypeError: the config has a wrong key or value, or is not the one the checkpoint was trained with.
      FloatingPointError: a loss is not finite; the last checkpoint is from before.
      checkpoint.SaveError: a checkpoint could not be written; those before it are whole.
      lock.WorkdirInUse: another run trains in `workdir`.
      distributed.Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    config, workdir = configuration.normalize(config), epath.Path(workdir)
    if "name" not in config["model"]:
        config["model"] = pretrained.model_of(config, workdir)
    configuration.check(config)
    objectives.check(config["objectives"], config["batch_size"])
    evaluate.check(config)
    evaluate.check_early_stopping(config)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.create_mesh(**config["mesh"])
    # One process holds the lock for all processes of the run.
    lock = WorkdirLock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with lock, jax.set_mesh(mesh), distributed.Signals() as signals:
        multihost_utils.sync_global_devices("the work directory is locked")
        return _train(config, workdir, mesh, signals, lock)


def _train(config, workdir, mesh, signals, lock):
    main_process = jax.process_index() == 0

    # 1. What is trained.
    model = models.create(config["model"])
    saved = checkpoint.Checkpoints(workdir, config["keep"], config["keep_every"], clean=True)
    latest = saved.latest()
    position = None
    if latest is not None:
        configuration.check_resume(saved.config(latest), config)
        position = iterator_state.redistribute(saved.positions(latest), jax.process_count())[jax.process_index()]
    elif config["lora"] and not config["init_from"]:
        raise ValueError("config.lora trains changes of weights that are there: set config.init_from")

    stopping, best = None, None
    if config["early_stopping"] is not None:
        best = checkpoint.Checkpoints(workdir / BEST, keep=1, clean=True)
        stopping = early_stopping(config, saved, best)

    # 2. Data: a position of its own for every process.
    try:
        stream = open_stream(config, model, workdir, position)
    except iterator_state.PositionError as error:
        before, now = saved.config(latest)["data"]["shards"], config["data"]["shards"]
        raise ValueError(f"config.data.shards is {now!r}, was {before!r}, and holds other data: {error}") from error

    # 3. State: born on its devices, then restored, or started from other weights.
    steps = schedule.total_steps(config, len(stream.source))
    optimize = optimizer.create(total_steps=steps, **config["optimizer"])
    kept = dict(ema=config["ema_decay"] is not None, lora=config["lora"])
    current = state.create(model, optimize, mesh, config["seed"], **kept)
    if latest is not None:
        current = saved.restore(latest, current)
        logging.warning("going on from step %d in %s", latest, saved.folder)
        schedule.warn_of_change(saved.config(latest), config, len(stream.source), latest)
    elif config["init_from"]:
        current = current.start_from(pretrained.initial_params(config, current.model_params))
    first = int(current.step)

    rate = schedule.learning_rate(config, steps)
    writer = metrics.Writer(workdir, first) if main_process else None
    if main_process:
        (workdir / "parameters.txt").write_text(metrics.parameter_table(current.params))
    progress = metrics.Progress(steps, first, config["batch_size"], peak_flops(config), enabled=main_process)
    profile_first, profile_last = config["profile_steps"] or (-1, -1)
    step_functions = {}  # by the shape of the texts, of which packing has a few; see packing.Packer

    def report(step, numbers):
        """Looks at the numbers of a step that the device has finished by now, or is about to, and logs them."""
        numbers = {name: float(value) for name, value in jax.device_get(numbers).items()}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            newest = saved.latest()
            last = "no checkpoint is there yet" if newest is None else f"Checkpoint {newest} is from before"
            raise FloatingPointError(
                f"step {step}: {', '.join(bad)} not finite; the run stops. In {saved.folder} {last}: lower "
                "optimizer.learning_rate or set optimizer.clip_norm, and the same workdir goes on"
            )
        if step % config["log_every"] == 0 and writer is not None:
            numbers |= progress.speed() | {"learning_rate": float(rate(step - 1)), "epoch": stream.epoch}
            numbers |= {"skipped": stream.skipped.total(), "truncated": stream.truncated, "masked": stream.masked}
            with progress.clock.measure("logging"):
                writer.write_scalars(step, numbers)
            progress.show(numbers)
        return numbers

    def judge(step, results):
        """Takes the metric of early stopping, and keeps the checkpoint if it is the best one."""
        # The same number in all processes, for none to stop alone.
        value = float(multihost_utils.broadcast_one_to_all(np.float32(stopping.value_of(results))))
        if stopping.add(step, value):
            saved.wait()  # the best checkpoint is never newer than the one to go on from
            best.save(current, gather_positions(stream.position), config, history(stopping))

    # The order is fixed: save and evaluate the state as it is, draw the batch, step, report the step before. So a
    # checkpoint holds the position of the very batch that comes next, and an accelerator never waits for the host.
    pending, tracing = None, False
    try:
        for step in range(first, steps):
            stop = signals.stop(step)
            saved.check()
            names = evaluate.due(config, step) if step > first else []
            if stopping is not None and step == first and not stopping.knows(step):
                # The weights at the start; or a save was the last thing before a run was killed.
                names = [name for name in evaluate.due(config, step) if name == stopping.options.evaluator]
            judged = stopping is not None and stopping.options.evaluator in names
            save = step > first and (step % config["save_every"] == 0 or judged)
            if (save or stop) and pending:
                report(*pending)  # a state is only saved once the step that made it is known to be sound
                pending = None
            if save or stop:
                if main_process:
                    lock.check()
                with progress.clock.measure("saving"):
                    saved.save(current, gather_positions(stream.position), config, history(stopping))
            if stop:
                raise distributed.Interrupted(stop, step)
            before = step == 0 and config["evaluate_before"]
            if before or names:
                into = dict(workdir=workdir / BEFORE, notes=[NOTE_BEFORE]) if before else dict(names=names)
                results = flat(evaluate.run(config, model, current.weights, **into))
                if writer is not None:
                    writer.write_scalars(step, results)
                progress.start()
                if judged:
                    judge(step, results)
            if stopping is not None and stopping.evaluations and stopping.exhausted:
                print(f"step {step}: {stopping}", flush=True)
                break
            with progress.clock.measure("data"):
                batch = next(stream)
            placed = sharding.global_batch(mesh, batch)
            shape = placed["texts"]["tokens"].shape
            if shape not in step_functions:
                step_functions[shape] = compilation.compile_step(step_of(config, model, optimize), current, placed)
                if main_process:
                    if len(step_functions) > 1:
                        print(f"step {step}: compiled anew, for {shape[0]} rows of packed captions", flush=True)
                    print(compilation.memory_table(step_functions[shape]), flush=True)
                progress.start()
            if step == profile_first:
                jax.profiler.start_trace(str(workdir / "profile"))
                tracing = True
            cpu.finish(pending)
            current, numbers = step_functions[shape](current, placed)
            if pending:
                report(*pending)
            pending = step + 1, numbers
            progress.step(*_work(config, batch["texts"]))
            if step == profile_last and tracing:
                jax.block_until_ready(current)
                jax.profiler.stop_trace()
                tracing = False
        final = report(*pending) if pending else {}
        saved.save(current, gather_positions(stream.position), config, history(stopping))
        if stopping is not None:
            if not stopping.knows(last := int(current.step)):
                judge(last, flat(evaluate.run(config, model, current.weights, names=[stopping.options.evaluator])))
            best.wait()
            if stopping.best[0] != int(current.step):
                current = best.restore(stopping.best[0], current)
        if config["lora"] is not None:
            write_lora(workdir / "lora.safetensors", current, config, mesh)
    finally:
        if tracing:
            jax.profiler.stop_trace()
        summary = progress.summary()
        progress.close()
        stream.close()
        saved.close()
        if best is not None:
            best.close()
        if writer is not None:
            writer.close()

    # 4. What came of it.
    notes = [] if stopping is None else [f"weights: {BEST}/, {stopping}"]
    results = evaluate.run(config, model, current.weights, workdir, notes=notes, before=values_before(workdir))
    evaluate.draw_attention_sheets(config, model, current.weights, workdir)
    if main_process:
        counts = {"skipped": stream.skipped.total(), "truncated": stream.truncated, "masked": stream.masked}
        print(metrics.table("this run", {**final, **summary, **counts}))
        for reason, count in stream.skipped.most_common():
            logging.warning("%s skipped: %s", counted(count, "sample"), reason)
        try:
            metrics.draw_loss_curve(workdir, evaluate.pictures(workdir) / "loss.png", config["objectives"])
        except Exception:  # the run is done
            logging.exception("the loss curve was not drawn")
    return flat(results)


def early_stopping(
    config: Mapping[str, Any], saved: checkpoint.Checkpoints, best: checkpoint.Checkpoints
) -> EarlyStopping:
    """The values of the metric of early stopping up to the checkpoint that the run goes on from.

    A checkpoint is saved before its step is evaluated: what is known of that step is in the best one, if it is that.
    """
    if saved.latest() is None:  # the run starts anew, maybe from other weights
        for step in best.manager.all_steps():
            best.manager.delete(step)
    kept = [one.evaluations(one.latest()) for one in (saved, best) if one.latest() is not None]
    return EarlyStopping(EarlyStoppingOptions.of(config["early_stopping"]), max(kept, key=len, default=[]))


def history(stopping: EarlyStopping | None) -> list[tuple[int, float]] | None:
    """What a checkpoint keeps of early stopping; None: nothing."""
    return None if stopping is None else stopping.evaluations


def values_before(workdir: epath.Path) -> dict[str, float] | None:
    """Values by name of the weights at the start of a run; None: they were not evaluated."""
    path = workdir / BEFORE / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_lora(path: epath.Path, current: state.TrainState, config: Mapping[str, Any], mesh: Mesh) -> None:
    """Writes what a run with `lora` has trained as a file of its own, for `flair_jax.load(path, pretrained=…)`."""
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(current.trained)
    if jax.process_index() == 0:
        with tempfile.TemporaryDirectory() as folder:  # the work directory may be in a bucket
            local = os.path.join(folder, path.name)
            lora_files.write(local, jax.device_get(whole), config["model"], config["lora"])
            path.write_bytes(epath.Path(local).read_bytes())


def peak_flops(config: Mapping[str, Any]) -> float | None:
    """Operations a second of all devices, where the model computes in bfloat16 and the chip's peak is known."""
    one = flops.peak(jax.devices()[0].device_kind)
    return None if one is None or config["model"]["dtype"] != "bfloat16" else one * jax.device_count()


def _work(config: Mapping[str, Any], texts: Mapping[str, np.ndarray]) -> tuple[float, int, int]:
    """Operations of a step on all devices, taking the other processes' captions to be as long as this one's; tokens and
    slots of this process's captions."""
    lengths = packing.text_lengths(texts)
    everywhere = np.tile(lengths, jax.process_count())
    counts = flops.counts(dict(text_slots(config["data"])))
    work = flops.train_step(config["model"], config["objectives"], config["batch_size"], everywhere, **counts)
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
        agree=distributed.start_max,
        **options,
    )


def gather_positions(position: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The data positions of all processes, in their order, on every process."""
    if jax.process_count() == 1:
        return [position]
    text = json.dumps(position).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
