"""Images per second of a training step, beside the PyTorch twin on the same batches."""

import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from flair_jax.benchmark import inputs, processes, torch_twin
from flair_jax.benchmark.contender import median
from flair_jax.data.transforms import packing

TWIN_BATCHES = 4  # different ones, which come again and again


def measure(
    config: Mapping[str, Any],
    *,
    beside: Sequence[str] = (),
    steps: int = 3,
    turns: int = 3,
    trace: str | None = None,
) -> dict[str, Any]:
    """Figures of `train.train_step` as the loop runs it.

    Args:
      config: of a run; `batch_size`, `model`, `loss`, `optimizer`, `mesh` and `data` are looked at. Without
        `data.shards` batches are made up.
      beside: sides of the twin to run as well, of `torch_twin.SIDES`, in turns with ours.
      steps: in a turn.
      turns: of each side; medians count.
      trace: folder for a profile of one more turn of ours.

    Returns:
      images_per_second, step_seconds, data_wait_seconds and logging_seconds within it; tflop_per_step, useful work as
      `flops.train_step` counts it; tflop_per_second, and `mfu` where the chip's peak is known; memory_mb, the peak
      (of the device, or of the process on a CPU), compile_seconds, fill (share of token places with a token). Of each
      side of the twin `eager_…` or `compiled_` images_per_second, memory_mb, and `ratio_…`, its time over that of ours
      in the turns between.
    """
    training_ours = functools.partial(training, trace=trace)
    ours, pairs = torch_twin.in_turns(training_ours, twin_training, [config], beside, steps, turns)

    figures = {name: ours[-1][name] for name in ("device", "devices", "compile_seconds", "fill")}
    figures |= {"batch_size": config["batch_size"], "dtype": config["model"]["dtype"]}
    figures["step_seconds"] = median(ours, "seconds")
    figures |= {name: median(ours, name) for name in ("data_wait_seconds", "logging_seconds")}
    figures["images_per_second"] = config["batch_size"] / figures["step_seconds"]
    figures["tflop_per_step"] = median(ours, "flop") / 1e12
    figures["tflop_per_second"] = median([{"x": turn["flop"] / turn["seconds"] / 1e12} for turn in ours], "x")
    if ours[-1]["peak"] is not None:
        figures["mfu"] = 1e12 * figures["tflop_per_second"] / ours[-1]["peak"]
    figures["memory_mb"] = max(turn["memory_mb"] for turn in ours)
    for side, (beside_it, twin) in pairs.items():
        seconds = median(twin, "seconds")
        figures[f"{side}_images_per_second"] = config["batch_size"] / seconds
        figures[f"{side}_memory_mb"] = max(turn["memory_mb"] for turn in twin)
        figures[f"ratio_{side}"] = seconds / median(beside_it, "seconds")
    return figures


@contextlib.contextmanager
def training(config: Mapping[str, Any], trace: str | None = None) -> Iterator[Callable[[int], Mapping[str, Any]]]:
    """Turns of the training loop: draw a batch, step, report the numbers of the step before."""
    import jax

    from flair_jax import compilation, cpu, flops, metrics, models, optimizer, sharding, state, train

    cpu.keep_heap()
    model = models.create(config["model"], config["loss"])
    mesh = sharding.create_mesh(**config["mesh"])
    tx = optimizer.create(total_steps=100_000, **config["optimizer"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        batches = stack.enter_context(_batches(config, model))
        current = state.create(model, tx, mesh, 0, ema=config["ema_decay"] is not None)
        first = next(batches)
        began = time.perf_counter()
        step = compilation.compile_step(train.step_of(config, model, tx), current, sharding.global_batch(mesh, first))
        compile_seconds = time.perf_counter() - began
        batches = itertools.chain([first], batches)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        writer = metrics.create_writer(epath.Path(folder), 0)
        done = 0

        def turn(count: int) -> Mapping[str, Any]:
            nonlocal current, done
            clock = metrics.Clock()
            pending, work, tokens, places = None, 0.0, 0, 0
            for _ in range(count):
                with clock.measure("data"):
                    batch = next(batches)
                lengths = packing.text_lengths(batch["texts"])
                work += flops.train_step(config["model"], config["loss"], config["batch_size"], lengths)
                tokens, places = tokens + int(lengths.sum()), places + batch["texts"]["tokens"].size
                placed = sharding.global_batch(mesh, batch)
                cpu.finish(pending)
                current, numbers = step(current, placed)
                if pending is not None:
                    values = {name: float(value) for name, value in jax.device_get(pending).items()}
                    with clock.measure("logging"):
                        writer.write_scalars(done, values)
                pending, done = numbers, done + 1
            jax.block_until_ready((current, numbers))
            seconds = clock.total()
            return {
                "seconds": seconds / count,
                "data_wait_seconds": clock.seconds["data"] / count,
                "logging_seconds": clock.seconds["logging"] / count,
                "flop": work / count,
                "fill": tokens / places,
                "peak": train.peak_flops(config),
                "memory_mb": _memory_mb(),
                "compile_seconds": compile_seconds,
                "device": jax.devices()[0].device_kind,
                "devices": jax.device_count(),
            }

        yield turn
        if trace is not None:
            with jax.profiler.trace(trace):
                turn(2)


def _memory_mb() -> float:
    import jax

    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "peak_bytes_in_use" in statistics_of_device:
        return statistics_of_device["peak_bytes_in_use"] / 2**20
    return processes.peak_mib()


@contextlib.contextmanager
def _batches(config: Mapping[str, Any], model) -> Iterator[Iterator[Mapping[str, Any]]]:
    """The host batches of a run."""
    import jax

    from flair_jax import train

    if config["data"]["shards"]:
        with tempfile.TemporaryDirectory() as folder, train.open_stream(config, model, epath.Path(folder)) as stream:
            yield stream
    else:
        yield inputs.made_up(
            config["data"], config["batch_size"], jax.local_device_count(), model.image_size, model.context_length
        )


@contextlib.contextmanager
def twin_training(config: Mapping[str, Any], compiled: bool) -> Iterator[Callable[[int], Mapping[str, Any]]]:
    """Turns of the twin on the first batches of the same stream, which lie ready: it never waits for data."""
    from flair_jax import models

    with _batches(config, models.create(config["model"], config["loss"])) as batches:
        held = [next(batches) for _ in range(TWIN_BATCHES)]
    with torch_twin.training(config, held, compiled) as turn:
        yield turn
