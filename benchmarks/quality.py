"""Does it train as well as the original? Many short runs of `configs/scenes.py`, by three trainers, as a table.

    python -m benchmarks.quality run DIR --starts STARTS --runs own:0-11 reference:0-3x0-2 torch:0-1x0-2
    python -m benchmarks.quality table DIR/runs.jsonl

A run is SIDE:START or SIDE:STARTxSEED, a range `0-3` is inclusive, and without a seed it is that of the start. Sides:

  own        this code from its own initialisation, `init_params` with seed START
  reference  this code from `STARTS/start_NN.safetensors`, which the original's constructors drew, or
             `benchmarks.original_starts` as they do
  torch      the PyTorch twin in a plain loop from the same files, on the very batches and draws of `reference`

All sides see the same shards; SEED is that of the order, crops, captions and draws. Every run ends with the same
evaluators on four sets of unseen scenes, and with the loss on batches and draws of unseen scenes that are the same for
all runs, which has far less noise. A run has one core to itself: on one core a run is deterministic to the bit. Runs
that stand in `runs.jsonl` are not made again, so the command goes on after a break.
"""

import argparse
import functools
import itertools
import json
import math
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

SIDES = ("own", "reference", "torch")
SETS = (1, 101, 102, 103)  # seeds of the unseen sets; 1 is the config's own
LOSS_BATCHES, LOSS_SEED = 32, 99
METRICS = {  # row of the table -> name in a report, of each set
    "parts R@1": "retrieval/{}_parts/flair/text_to_image_R@1",
    "parts R@5": "retrieval/{}_parts/flair/text_to_image_R@5",
    "parts R@1, global": "retrieval/{}_parts/global/text_to_image_R@1",
    "whole R@1": "retrieval/{}/flair/text_to_image_R@1",
    "whole R@5": "retrieval/{}/flair/text_to_image_R@5",
    "whole R@1, global": "retrieval/{}/global/text_to_image_R@1",
    "pointing": "pointing/{}/attention/accuracy",
    "colour mIoU": "segmentation/{}_colour/value/miou",
    "shape mIoU": "segmentation/{}_shape/value/miou",
}
LOSSES = ("unseen loss", "unseen tcs", "unseen mps")
# What the original's own `main.py` gave at 2,000 steps on these shards, four seeds, on set 1.
ORIGINAL = {
    "parts R@1": (0.239, 0.221, 0.235, 0.227),
    "parts R@5": (0.702, 0.681, 0.703, 0.700),
    "whole R@1": (0.654, 0.629, 0.654, 0.578),
    "shape mIoU": (0.355, 0.295, 0.251, 0.409),
}


# ---------------------------------------------------------------------------------------------------------------------
# One run


def config_of(folder: pathlib.Path, seed: int, steps: int) -> dict[str, Any]:
    """`configs/scenes.py` on the shards in `folder`, without evaluators."""
    from flair_jax.configs import scenes as scenes_config

    config = scenes_config.get_config()
    config.seed, config.steps, config.save_every = seed, steps, steps
    config.data.scenes, config.data.shards = None, str(folder / "scenes")
    config.evaluators = {}
    return config.to_dict()


def draw_data(folder: pathlib.Path) -> None:
    """The training shards of the config, and those of the unseen loss."""
    from flair_jax.configs import scenes as scenes_config
    from flair_jax.data import scenes

    drawn = scenes_config.get_config().data.scenes.to_dict()
    scenes.write(folder / "scenes", **drawn)
    scenes.write(folder / "unseen", count=1024, seed=LOSS_SEED, size=drawn["size"], split="evaluation")


def train_jax(config: Mapping[str, Any], start: Any, workdir: pathlib.Path) -> Any:
    """Parameters after the training loop as `flair_jax.main` runs it, from the parameters `start`."""
    from flair_jax import pretrained, train
    from flair_jax.convert import flax_files

    flax_files.write(workdir / "start.safetensors", start, config["model"])
    train.train({**config, "init_from": str(workdir / "start.safetensors")}, workdir / "run")
    return pretrained.read(workdir / "run", config["model"])[0]


def train_torch(config: Mapping[str, Any], start: Any, workdir: pathlib.Path) -> Any:
    """Parameters after a plain PyTorch loop around the twin, on the batches and draws of `train_jax`."""
    import jax
    import torch

    from flair_jax import models, train
    from flair_jax.convert import names
    from flair_jax.convert.torch_flair import TorchFLAIR
    from flair_jax.data.transforms.images import MEAN, STD
    from flair_jax.objectives.text_conditioned import draw_captions

    settings, steps = config["optimizer"], config["steps"]
    batch_size, count = config["batch_size"], config["data"]["captions"]["count"]
    twin = TorchFLAIR(config["model"])
    weights = names.to_torch(start, "flair")
    twin.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()})
    decayed, others = [], []
    for parameter in twin.parameters():
        (decayed if parameter.ndim >= 2 else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
    )
    mean, std = (torch.from_numpy(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    numbers = np.arange(batch_size)

    @jax.jit
    def draws_of(step):  # as train_step and the model split the key of a step
        _, rng = jax.random.split(jax.random.fold_in(jax.random.key(config["seed"]), step))
        return draw_captions(rng, numbers, numbers, count)

    model = models.create(config["model"])
    with train.open_stream(config, model, workdir) as stream:
        for step in range(steps):
            warmup = settings["warmup_steps"]
            share = (step + 1) / warmup if step < warmup else cosine((step - warmup) / (steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = settings["learning_rate"] * share
            batch = next(stream)
            images = (torch.from_numpy(batch["images"]).permute(0, 3, 1, 2) / 255 - mean) / std
            tokens = torch.from_numpy(batch["texts"]["tokens"].astype(np.int64)).view(batch_size, count, -1)
            rows = torch.from_numpy(rows_of_draws(np.asarray(draws_of(step)), count))
            loss = twin.loss(images, tokens, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                twin.logit_scale.clamp_(0.0, math.log(100))
            if step % 200 == 0:
                print(f"step {step}: loss {loss.item():.6f}", flush=True)
    weights = {name: x.detach().numpy() for name, x in twin.state_dict().items()}
    return names.to_flax(weights, "flair", config["model"])


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def rows_of_draws(draws: np.ndarray, captions: int) -> np.ndarray:
    """What `draws_of_rows` undoes, for a batch of one block.

    Args:
      draws: int (B, B); row i: which caption of image m image i meets, for m != i.
      captions: K.

    Returns:
      int64 (B, K + B - 1), ascending; row i: the captions that image i meets, as numbers below B * K.
    """
    rows = []
    for image, drawn in enumerate(draws):
        met = np.arange(len(draws)) * captions + drawn
        own = image * captions + np.arange(captions)
        rows.append(np.concatenate([met[:image], own, met[image + 1 :]]))
    return np.stack(rows).astype(np.int64)


def judge(config: Mapping[str, Any], params: Any, folder: pathlib.Path) -> dict[str, Any]:
    """All figures of trained parameters: metric -> one value per set of `SETS`, loss -> value."""
    import jax

    from flair_jax import evaluate, models, objectives, train
    from flair_jax.models.text import Text
    from flair_jax.report import flat

    model = models.create(config["model"])
    size = config["model"]["vision"]["image_size"]
    sets = {f"set{seed}": dict(kind="scenes", count=512, seed=seed, size=size) for seed in SETS}
    report = flat(evaluate.run({**config, "evaluators": sets}, model, params))
    figures = {row: [report[name.format(data)] for data in sets] for row, name in METRICS.items()}

    @jax.jit
    def loss_of(params, batch, number):
        _, rng = jax.random.split(jax.random.fold_in(jax.random.key(LOSS_SEED), number))
        text = Text(**batch["texts"])
        features = model.apply({"params": params}, model.preprocessing(batch["images"]), text, method="features")
        loss, parts = objectives.weighted_sum(config["objectives"], features, batch, rng)
        return loss, parts["text_conditioned"], parts["sigmoid"]

    unseen = {**config, "seed": LOSS_SEED, "data": {**config["data"], "shards": str(folder / "unseen")}}
    with train.open_stream(unseen, model, folder) as stream:
        batches = itertools.islice(stream, LOSS_BATCHES)
        losses = [jax.device_get(loss_of(params, batch, number)) for number, batch in enumerate(batches)]
    return figures | dict(zip(LOSSES, map(float, np.mean(losses, axis=0)), strict=True))


def run(folder: pathlib.Path, side: str, start: int, seed: int, steps: int, starts: pathlib.Path | None) -> None:
    """One run; appends its figures to `runs.jsonl`."""
    from flair_jax import models, state
    from flair_jax.convert import flax_files

    config = config_of(folder, seed, steps)
    if side == "own":
        params = state.init_params(models.create(config["model"]), start)
    else:
        params, _ = flax_files.load(starts / f"start_{start:02d}.safetensors", config["model"])
    with tempfile.TemporaryDirectory() as workdir:
        params = (train_torch if side == "torch" else train_jax)(config, params, pathlib.Path(workdir))
        figures = judge(config, params, folder)
    record = {"side": side, "start": start, "seed": seed, "steps": steps, "figures": figures}
    with (folder / "runs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Many runs


def parse_runs(text: str) -> Iterator[tuple[str, int, int]]:
    """ "reference:0-3x0-2" -> (side, start, seed) of its twelve runs."""
    match = re.fullmatch(r"(\w+):(\d+)(?:-(\d+))?(?:x(\d+)(?:-(\d+))?)?", text)
    if match is None or match[1] not in SIDES:
        raise SystemExit(f"--runs {text}: expected SIDE:START or SIDE:STARTxSEED, SIDE one of {SIDES}")
    side, first, last, first_seed, last_seed = match.groups()
    for start in range(int(first), int(last or first) + 1):
        seeds = [start] if first_seed is None else range(int(first_seed), int(last_seed or first_seed) + 1)
        yield from ((side, start, seed) for seed in seeds)


def run_all(arguments: argparse.Namespace) -> None:
    """Makes the runs that are not there yet, one a core."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    draw_data(folder)
    there = {(r["side"], r["start"], r["seed"], r["steps"]) for r in read(folder / "runs.jsonl")}
    wanted = [run for text in arguments.runs for run in parse_runs(text) if (*run, arguments.steps) not in there]
    todo = queue.Queue()
    for each in dict.fromkeys(wanted):
        todo.put(each)

    def work(core: int) -> None:
        while True:
            try:
                side, start, seed = todo.get_nowait()
            except queue.Empty:
                return
            command = [sys.executable, "-m", "benchmarks.quality", "one", str(folder), side, str(start), str(seed)]
            command += ["--steps", str(arguments.steps), *(["--starts", arguments.starts] if arguments.starts else [])]
            with (folder / f"{side}_{start}_{seed}.log").open("w") as log:
                pin = functools.partial(os.sched_setaffinity, 0, {core})
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
                code = subprocess.run(command, stdout=log, stderr=log, preexec_fn=pin, env=environment).returncode
            print(
                f"{side} start {start} seed {seed}: " + ("done" if code == 0 else f"failed, see {log.name}"), flush=True
            )

    cores = sorted(os.sched_getaffinity(0))[: arguments.jobs]
    threads = [threading.Thread(target=work, args=(core,)) for core in cores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """All sides in Markdown: mean and deviation of each figure, and what differs by how much more than its error."""
    by_side = {side: {} for side in SIDES}
    for run in runs:
        by_side[run["side"]][run["start"], run["seed"]] = _scalars(run)
    present = [side for side in SIDES if len(by_side[side]) > 1]
    counts = ", ".join(f"`{side}` {len(by_side[side])} runs, {len(_starts(by_side[side]))} starts" for side in present)
    lines = [f"{counts}; mean ± standard deviation over starts.", "", row("", *present), rule(len(present))]
    names = [*METRICS, *LOSSES]
    for name in names:
        cells = [_column(by_side[side], name) for side in present]
        lines.append(row(name, *(f"{np.mean(x):.4f} ± {np.std(x, ddof=1):.4f}" for x in cells)))
    for first, second in itertools.pairwise(present):
        rows = list(_comparison(first, second, by_side, names))
        lines += ["", *rows] if rows else []
    if parts := _crossed(by_side["reference"]):
        lines += ["", *parts]
    if "reference" in present or "own" in present:
        lines += ["", *_original(by_side)]
    return "\n".join(lines)


def _scalars(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a run, those of several sets as their mean; "name, set 1" is that of the config's own set."""
    figures = run["figures"]
    first = {f"{name}, set {SETS[0]}": figures[name][0] for name in METRICS}
    return {name: float(np.mean(value)) for name, value in figures.items()} | first


def _column(runs: Mapping[tuple[Any, int], Mapping[str, float]], name: str) -> np.ndarray:
    """One value per start, the mean over its seeds: runs from one start are not independent."""
    of_starts = ([figures[name] for (start, _), figures in runs.items() if start == own] for own in _starts(runs))
    return np.array([np.mean(values) for values in of_starts])


def _starts(runs: Mapping[tuple[Any, int], Any]) -> list[Any]:
    return sorted({start for start, _ in runs})


def _comparison(first: str, second: str, by_side: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """`second` minus `first`: runs of the same start and seed as pairs where `torch` is one of them."""
    paired = second == "torch"
    common = sorted(set(by_side[first]) & set(by_side[second])) if paired else []
    if paired and len(common) < 2:
        return
    title = f"{len(common)} pairs of the same start and seed" if paired else "Welch's test"
    yield row(f"`{second}` minus `{first}` ({title})", "difference", "95 % interval", "p", "seen with 9 in 10")
    yield rule(4)
    for name in names:
        if paired:
            gaps = np.array([by_side[second][key][name] - by_side[first][key][name] for key in common])
            result = stats.ttest_1samp(gaps, 0.0)
            error = np.std(gaps, ddof=1) / math.sqrt(len(gaps))
            difference = np.mean(gaps)
        else:
            a, b = (_column(by_side[side], name) for side in (second, first))
            result = stats.ttest_ind(a, b, equal_var=False)
            error = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
            difference = np.mean(a) - np.mean(b)
        low, high = result.confidence_interval(0.95)
        seen = error * (stats.t.ppf(0.975, result.df) + stats.t.ppf(0.9, result.df))
        yield row(name, f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{result.pvalue:.2f}", f"{seen:.4f}")


def _crossed(runs: Mapping[tuple[int, int], Mapping[str, float]]) -> list[str]:
    """Where the spread comes from, if some starts were run with each of some seeds: a two-way table without repeats."""
    starts, seeds = (sorted({key[axis] for key in runs}) for axis in (0, 1))
    starts = [start for start in starts if all((start, seed) in runs for seed in seeds)]
    if len(starts) < 2 or len(seeds) < 2:
        return []
    lines = [
        row(f"standard deviation by source ({len(starts)} starts x {len(seeds)} seeds)", "start", "seed", "the rest"),
        rule(3),
    ]
    for name in [*METRICS, *LOSSES]:
        values = np.array([[runs[start, seed][name] for seed in seeds] for start in starts])  # (starts, seeds)
        rows, columns = values.mean(1), values.mean(0)
        rest = values - rows[:, None] - columns + values.mean()
        noise = (rest**2).sum() / ((len(starts) - 1) * (len(seeds) - 1))
        by_start = max(np.var(rows, ddof=1) - noise / len(seeds), 0.0)
        by_seed = max(np.var(columns, ddof=1) - noise / len(starts), 0.0)
        lines.append(row(name, *(f"{math.sqrt(x):.4f}" for x in (by_start, by_seed, noise))))
    return lines


def _original(by_side: Mapping[str, Any]) -> Iterator[str]:
    """The four runs of the original's own `main.py` beside all runs of this code, on the config's set."""
    ours = {
        (f"{side} {start}", seed): run for side in ("own", "reference") for (start, seed), run in by_side[side].items()
    }
    yield row(
        f"set {SETS[0]}: the original's `main.py`, 4 runs, beside {len(_starts(ours))} starts of ours",
        "original",
        "ours",
        "p of the means",
        "draws of 4 of ours with a mean as high",
        "with a spread as small",
    )
    yield rule(5)
    for name, theirs in ORIGINAL.items():
        found = _column(ours, f"{name}, set {SETS[0]}")
        result = stats.ttest_ind(theirs, found, equal_var=False)
        draws = np.random.default_rng(0).choice(found, (100_000, len(theirs)))
        cells = (f"{np.mean(x):.4f} ± {np.std(x, ddof=1):.4f}" for x in (theirs, found))
        as_high = np.mean(draws.mean(1) >= np.mean(theirs))
        as_close = np.mean(draws.std(1, ddof=1) <= np.std(theirs, ddof=1))
        yield row(name, *cells, f"{result.pvalue:.2f}", f"{as_high:.3f}", f"{as_close:.3f}")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of fractions in percent; of one value only itself, of none nothing."""
    if not len(values):
        return ""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rule(numbers: int) -> str:
    return "|---|" + "---:|" * numbers


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    many = commands.add_parser("run", help="make the runs that are not there yet")
    one = commands.add_parser("one", help="make one run, in this process")
    for command in (many, one):
        command.add_argument("folder", type=pathlib.Path, metavar="DIR", help="shards, logs and runs.jsonl")
        command.add_argument("--steps", type=int, default=2000, help="(%(default)s)")
    many.add_argument("--runs", nargs="+", required=True, metavar="SIDE:START[xSEED]", help="such as own:0-11")
    many.add_argument("--starts", metavar="STARTS", help="folder with start_NN.safetensors")
    many.add_argument("--jobs", type=int, default=2, help="runs at a time, one a core (%(default)s)")
    one.add_argument("side", choices=SIDES)
    one.add_argument("start", type=int)
    one.add_argument("seed", type=int)
    one.add_argument("--starts", type=pathlib.Path)
    shown = commands.add_parser("table", help="what the runs say")
    shown.add_argument("file", type=pathlib.Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        run_all(chosen)
    elif chosen.command == "one":
        run(chosen.folder, chosen.side, chosen.start, chosen.seed, chosen.steps, chosen.starts)
    else:
        print(table(read(chosen.file)))


if __name__ == "__main__":
    main()
