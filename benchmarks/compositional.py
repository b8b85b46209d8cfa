"""Does FSC-CLIP keep its promise? CLIP from scratch on scenes, and its fine-tunings, for several seeds, as a table.

    pip install -e '.[prepare,negatives]'      # with a model of spaCy and WordNet, see data/README.md
    JAX_PLATFORMS=cpu python -m benchmarks.compositional run DIR --seeds 0 1 2
    python -m benchmarks.compositional table DIR/runs.jsonl

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
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        run_all(chosen.folder, chosen.seeds, chosen.methods)
    else:
        print(table(quality.read(chosen.file)))


if __name__ == "__main__":
    main()
