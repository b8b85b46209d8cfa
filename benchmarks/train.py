"""Images per second of training steps, beside the PyTorch twin on the same batches, at one setting or at several."""

import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from benchmarks import command, inputs, processes, torch_twin
from benchmarks.sides import beside_twin, median
from flair_jax.data.transforms import packing

TWIN_BATCHES = 4  # different ones, which come again and again
COLUMNS = ("images_per_second", "mfu", "memory_mb", "compile_seconds")


def measure(
    config: Mapping[str, Any],
    *,
    beside: Sequence[str] = (),
    steps: int = 3,
    turns: int = 3,
    trace: str | None = None,
) -> dict[str, Any]:
    """Figures of `step.train_step` as the loop runs it.

    Args:
      config: of a run; `batch_size`, `model`, `objectives`, `optimizer`, `mesh` and `data` are looked at. Without
        `data.shards` batches are made up.
      beside: sides of the twin to run as well, "eager" and "compiled", in turns with ours.
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
    ours, pairs = beside_twin(training_ours, twin_training, [config], beside, steps, turns)

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


def vary(
    config_of: Callable[[Sequence[str]], Mapping[str, Any]],
    settings: Sequence[str],
    *,
    beside: Sequence[str] = (),
    **options,
) -> dict[str, Any]:
    """`measure` for every combination of some settings, with a table of them in Markdown on the way.

    A side that fails, for want of memory as a rule, leaves its cells empty; the twin is measured once per `batch_size`.

    Args:
      config_of: gives the config with some changes, "key=value" each.
      settings: "key=value,value,…" each, keys of the config with dots.
      beside, options: of `measure`.

    Returns:
      `best_images_per_second` and the settings that gave it, and of each side of the twin its own best, and
      `ratio_best_…`.
    """
    names = [setting.partition("=")[0] for setting in settings]
    sides = [f"{side}_images_per_second" for side in beside]
    columns = [*COLUMNS, *sides]
    print("| " + " | ".join([*names, *columns]) + " |")
    print("|" + " --- |" * len(names) + " ---: |" * len(columns))
    figures, measured = {}, set()
    for values in itertools.product(*(setting.partition("=")[2].split(",") for setting in settings)):
        config = config_of([f"{name}={value}" for name, value in zip(names, values, strict=True)])
        # Each side of the twin beside ours, and ours alone only where no side of the twin could do it.
        row, parts = {}, [] if config["batch_size"] in measured else [(side,) for side in beside]
        measured.add(config["batch_size"])
        for part in (*parts, ()):
            if row and not part:
                break
            try:
                row |= measure(config, beside=part, **options)
            except RuntimeError as error:
                print(f"<!-- {values} {part}: {error} -->")
        cells = [f"{row[name]:,.3g}" if name in row else "" for name in columns]
        print("| " + " | ".join([*values, *cells]) + " |", flush=True)
        for name in ("images_per_second", *sides):
            if row.get(name, 0) > figures.get(f"best_{name}", 0):
                of_best = str(dict(zip(names, values, strict=True)))
                figures |= {f"best_{name}": row[name], f"settings_of_best_{name}": of_best}
    for side, name in zip(beside, sides, strict=True):
        if f"best_{name}" in figures and "best_images_per_second" in figures:
            figures[f"ratio_best_{side}"] = figures["best_images_per_second"] / figures[f"best_{name}"]
    return figures


@contextlib.contextmanager
def training(config: Mapping[str, Any], trace: str | None = None) -> Iterator[Callable[[int], Mapping[str, Any]]]:
    """Turns of the training loop: draw a batch, step, report the numbers of the step before."""
    import jax

    from flair_jax import compilation, cpu, flops, metrics, models, optimizer, plan, sharding, state, step, train

    model = models.create(config["model"])
    mesh, slots = sharding.create_mesh(**config["mesh"]), plan.slots_of(config)
    optimize = optimizer.create(total_steps=100_000, **config["optimizer"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        batches = stack.enter_context(_batches(config, model))
        current = state.create(model, optimize, mesh, 0, ema=config["ema_decay"] is not None, lora=config["lora"])
        function, programs, compile_seconds = step.step_of(config, model, optimize), {}, 0.0
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        writer = metrics.Writer(epath.Path(folder), 0)
        done = 0

        def turn(count: int) -> Mapping[str, Any]:
            nonlocal current, done, compile_seconds
            clock = metrics.Clock()
            pending, work, tokens, places, uncounted = None, 0.0, 0, 0, 0.0
            for _ in range(count):
                with clock.measure("data"):
                    batch = next(batches)
                lengths = packing.text_lengths(batch["texts"])
                sections = config["model"], config["objectives"], config["batch_size"]
                work += flops.train_step(*sections, lengths, **flops.counts(slots))
                tokens, places = tokens + int(lengths.sum()), places + batch["texts"]["tokens"].size
                placed = sharding.global_batch(mesh, batch)
                shape = placed["texts"]["tokens"].shape
                if shape not in programs:  # of the first batch, and of one that needs more rows than those before it
                    began = time.perf_counter()
                    programs[shape] = compilation.compile_step(function, current, placed)
                    took = time.perf_counter() - began
                    compile_seconds, uncounted = compile_seconds + took, uncounted + took
                cpu.finish(pending)
                current, numbers = programs[shape](current, placed)
                if pending is not None:
                    values = {name: float(value) for name, value in jax.device_get(pending).items()}
                    with clock.measure("logging"):
                        writer.write_scalars(done, values)
                pending, done = numbers, done + 1
            jax.block_until_ready((current, numbers))
            seconds = clock.total() - uncounted
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

    from flair_jax import plan, train

    if config["data"]["shards"]:
        with tempfile.TemporaryDirectory() as folder, train.open_stream(config, model, epath.Path(folder)) as stream:
            yield stream
    else:
        row_length = config["data"]["packing"]["row_length"]
        sizes = model.image_size, plan.slots_of(config), config["model"]["text"], row_length
        batches = inputs.made_up(config["batch_size"], *sizes, parts=jax.local_device_count())
        yield itertools.cycle(batches)


@contextlib.contextmanager
def twin_training(config: Mapping[str, Any], compiled: bool) -> Iterator[Callable[[int], Mapping[str, Any]]]:
    """Turns of the twin on the first batches of the same stream, which lie ready: it never waits for data."""
    from flair_jax import models

    with _batches(config, models.create(config["model"])) as batches:
        held = [next(batches) for _ in range(TWIN_BATCHES)]
    with torch_twin.training(config, held, compiled) as turn:
        yield turn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("train", "Images per second of training steps.")
    command.add_model(parser)
    command.add_sizes(parser, steps=(3, "in a turn"))
    parser.add_argument("--batch-size", type=int, metavar="N", help="images; the config's if absent")
    parser.add_argument("--trace", metavar="FOLDER", help="write a profile of two more steps there, for XProf")
    parser.add_argument(
        "--vary", nargs="+", metavar="KEY=V,V", help="settings of the config to combine: batch_size=64,128; a table"
    )
    parsed = parser.parse_args(arguments)
    if parsed.batch_size:
        parsed.set = [*parsed.set, f"batch_size={parsed.batch_size}"]
    options = command.pick(parsed, ("steps", "turns", "trace")) | {"beside": command.BESIDE[parsed.beside]}
    if parsed.vary:
        figures = vary(functools.partial(command.config, parsed), parsed.vary, **options)
    else:
        figures = measure(command.config(parsed), **options)
    command.report(figures, parsed.json)


if __name__ == "__main__":
    main()
