"""Does FSC-CLIP keep its promise? CLIP from scratch on scenes, and its fine-tunings, for several seeds, as a table.

    pip install -e '.[prepare,negatives]'      # with a model of spaCy and WordNet, see data/README.md
    JAX_PLATFORMS=cpu python -m benchmarks.compositional run DIR --seeds 0 1 2
    python -m benchmarks.compositional table DIR/runs.jsonl
    python -m benchmarks.compositional probe DIR/clip_0 DIR/fsc_clip_0      # does a tower know left from right?

Runs are those of `configs/scenes_compositional.py`: of each seed first CLIP from scratch, then the fine-tunings of its
weights, in one process on one core. Every run ends with the config's own evaluators, whose figures are appended to
`DIR/runs.jsonl`. Runs that stand there are not made again, and one that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import quality
from flair_jax.configs import scenes_compositional
from flair_jax.data import compositional_scenes, scenes

SCRATCH, PLAIN = "clip", "clip_tuned"  # what is fine-tuned, and what the other fine-tunings are compared with
METHODS = (SCRATCH, *scenes_compositional.FINE_TUNINGS)
SET = "unseen"  # the config's evaluator
METRICS = {  # column of the table -> name in a report
    "choice": f"choice/{SET}/global/accuracy",
    **{kind: f"choice/{SET}/global/accuracy/{kind}" for kind in compositional_scenes.KINDS},
    "T2I R@1": f"retrieval/{SET}/global/text_to_image_R@1",
    "I2T R@1": f"retrieval/{SET}/global/image_to_text_R@1",
}
PROBED, RIDGE = 3000, 30.0  # scenes that a probe is fitted to, and its penalty
TUNING_SEED = 2  # of the scenes that weights are fine-tuned on; those from scratch are the config's own


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def draw_data(folder: pathlib.Path) -> None:
    """The scenes of both stages as shards, those of the fine-tunings with the annotations of their captions."""
    drawn = scenes_compositional.get_config(SCRATCH).data.scenes.to_dict()
    scenes.write(folder / "scratch", **drawn)
    scenes.write(folder / "tuning", **{**drawn, "seed": TUNING_SEED})
    command = [sys.executable, "-m", "flair_jax.data.prepare", "annotate", "--shards", folder / "tuning"]
    subprocess.run([*command, "--fields", *scenes_compositional.FIELDS], check=True)


def config_of(folder: pathlib.Path, method: str, seed: int) -> dict[str, Any]:
    """The config of a run on the shards in a folder, a fine-tuning from the weights of its seed."""
    config = scenes_compositional.get_config(method)
    config.seed = seed
    if method == SCRATCH:
        config.data.scenes, config.data.shards = None, str(folder / "scratch")
    else:
        config.data.shards, config.init_from = str(folder / "tuning"), str(folder / f"{SCRATCH}_{seed}")
    return config.to_dict()


def run(config: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, float]:
    """Trains, and returns the figures of the weights."""
    from flair_jax import evaluate, models, pretrained, train
    from flair_jax.report import flat

    train.train({**config, "evaluators": {}}, workdir)  # evaluated without a report and pictures, which take as long
    params, _ = pretrained.read(workdir, config["model"])
    return figures_of(flat(evaluate.run(config, models.create(config["model"]), params)))


def run_all(folder: pathlib.Path, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Makes the runs that are not there yet, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.jsonl"
    there = {(line["method"], line["seed"]) for line in quality.read(file)}
    missing = [(method, seed) for seed in seeds for method in METHODS if method in methods]
    missing = [each for each in missing if each not in there]
    if missing:
        draw_data(folder)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX starts: one core gives the same bits again
    for method, seed in missing:
        figures = run(config_of(folder, method, seed), folder / f"{method}_{seed}")
        with file.open("a") as lines:
            lines.write(json.dumps({"method": method, "seed": seed, "figures": figures}) + "\n")
        print(method, seed, *(f"{column} {100 * value:.1f}" for column, value in figures.items()), flush=True)


def figures_of(report: Mapping[str, float]) -> dict[str, float]:
    """What the table shows of a report, by column."""
    return {column: report[name] for column, name in METRICS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A linear probe: where an image's features lose what lies where


def sides(drawn: Sequence[scenes.Scene]) -> np.ndarray:
    """Where the only shape of each colour lies: 1 left, -1 right, 0 neither or not one shape; float32 (N, colours)."""
    sides = np.zeros((len(drawn), len(scenes.COLOURS)), np.float32)
    for row, scene in zip(sides, drawn, strict=True):
        for column, colour in enumerate(scenes.COLOURS):
            places = [shape.place for shape in scene.objects if shape.colour == colour]
            if len(places) == 1:
                row[column] = ("left" in places[0]) - float("right" in places[0])
    return sides


def linear_accuracy(train: np.ndarray, truth: np.ndarray, test: np.ndarray, expected: np.ndarray) -> float:
    """Share of the nonzero `expected` whose sign ridge regression tells.

    Args:
      train, test: features (N, F) and (M, F). truth, expected: (N, C) and (M, C), see `sides`.
    """
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, test = ((x - mean) / deviation for x in (train, test))
    penalty = RIDGE * np.eye(train.shape[1])
    weights = np.linalg.solve(train.T @ train + penalty, train.T @ (truth - truth.mean(axis=0)))
    predicted = test @ weights + truth.mean(axis=0)
    return float((np.sign(predicted) == expected)[expected != 0].mean())


def probe(weights: str, count: int = PROBED, unseen: int = 512) -> dict[str, float]:
    """By kind of image features, the share of shapes whose side a linear map of them tells; 0.5 is chance.

    Args:
      weights: what `flair_jax.load` takes.
      count, unseen: scenes that the map is fitted to, and scenes that it is asked about.
    """
    import flair_jax

    model = flair_jax.load(weights)
    size = scenes_compositional.get_config(SCRATCH).model.vision.image_size
    of_each = {}
    for split, number, seed in (("train", count, 5), ("evaluation", unseen, 1)):
        drawn = [scenes.draw(seed, index, size, split) for index in range(number)]
        image = model.encode_image(np.stack([scene.image for scene in drawn]))
        features = {"pooled": np.asarray(image.pooled), "local": np.asarray(image.local).reshape(number, -1)}
        of_each[split] = features, sides(drawn)
    (fitted, truth), (asked, expected) = of_each["train"], of_each["evaluation"]
    return {kind: linear_accuracy(fitted[kind], truth, asked[kind], expected) for kind in fitted}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Percentages of all methods in Markdown, and differences to plain fine-tuning between runs of the same seed."""
    found = {method: {run["seed"]: run["figures"] for run in runs if run["method"] == method} for method in METHODS}
    lines = [quality.row("percent", "runs", *METRICS), quality.rule(1 + len(METRICS))]
    for method in filter(found.get, METHODS):
        cells = (quality.spread([figures[column] for figures in found[method].values()]) for column in METRICS)
        lines.append(quality.row(f"`{method}`", str(len(found[method])), *cells))
    lines += ["", quality.row(f"points, minus `{PLAIN}`", "pairs", *METRICS), quality.rule(1 + len(METRICS))]
    for method in METHODS:
        seeds = sorted(found[method].keys() & found[PLAIN].keys())
        if method == PLAIN or not seeds:
            continue
        gaps = ([found[method][seed][column] - found[PLAIN][seed][column] for seed in seeds] for column in METRICS)
        lines.append(quality.row(f"`{method}`", str(len(seeds)), *(_interval(values) for values in gaps)))
    return "\n".join(lines)


def _interval(gaps: Sequence[float]) -> str:
    """Mean difference and half of its 95 % interval by Student's t, which is wide for three pairs."""
    if len(gaps) == 1:
        return f"{100 * gaps[0]:+.1f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    return f"{100 * np.mean(gaps):+.1f} ± {100 * half:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compositional", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    made = commands.add_parser("run", help="make the runs that are not there yet")
    made.add_argument("folder", type=pathlib.Path, metavar="DIR", help="shards, work directories, logs and runs.jsonl")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(all)")
    shown = commands.add_parser("table", help="what the runs say")
    shown.add_argument("file", type=pathlib.Path, metavar="FILE")
    probed = commands.add_parser("probe", help="whether image features say what is left and what is right")
    probed.add_argument("weights", nargs="+", metavar="WEIGHTS", help="work directories of runs")
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        run_all(chosen.folder, chosen.seeds, chosen.methods)
    elif chosen.command == "probe":
        for weights in chosen.weights:
            print(weights, *(f"{kind} {100 * share:.1f}" for kind, share in probe(weights).items()), flush=True)
    else:
        print(table(quality.read(chosen.file)))


if __name__ == "__main__":
    main()
