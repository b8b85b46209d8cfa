"""Methods of one config side by side, for several seeds: `scenes` and `scenes_all` take a method after a colon.

    python -m benchmarks.methods run DIR --config scenes_all --methods all flair fsc_clip grain --seeds 0 1 2
    python -m benchmarks.methods table DIR --config scenes_all --methods all flair fsc_clip grain

Each run is `python -m flair_jax.main` in DIR/METHOD_SEED, with the flags after `--`. One that has a report is not made
again, and one that was stopped goes on. The table has the figures of the reports, mean and standard deviation over
seeds, and of each method its parameters and its work per image.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks import quality
from flair_jax import config as configuration
from flair_jax import plan

REPORT = "report.json"
TOKENS = 12.0  # of a text of scenes, with both ends, on average
METRICS = {  # row of the table -> name in a report
    "whole: text to image R@1, text-conditioned": "retrieval/scenes/flair/text_to_image_R@1",
    "whole: text to image R@1, global": "retrieval/scenes/global/text_to_image_R@1",
    "whole: image to text R@1, global": "retrieval/scenes/global/image_to_text_R@1",
    "parts: text to image R@1, text-conditioned": "retrieval/scenes_parts/flair/text_to_image_R@1",
    "parts: text to image R@1, global": "retrieval/scenes_parts/global/text_to_image_R@1",
    "parts: text to image R@5, global": "retrieval/scenes_parts/global/text_to_image_R@5",
    "choice: altered captions, global": "choice/compositional/global/accuracy",
    "which colours: mean AP by descriptions, best way": "classification/scenes_colour/{}/average_precision",
    "which shapes: mean AP by descriptions, best way": "classification/scenes_shape/{}/average_precision",
    "pointing": "pointing/scenes/attention/accuracy",
    "colour mIoU, best way": "segmentation/scenes_colour/{}/miou",
    "shape mIoU, best way": "segmentation/scenes_shape/{}/miou",
    "boxes found (IoU 0.5)": "regions/scenes/box_recall",
    "mean IoU of matched boxes": "regions/scenes/mean_iou",
    "region to description R@1, in the image": "regions/scenes/description_R@1",
    "region to description R@1, in the set": "regions/scenes/description_set_R@1",
    "phrase to box": "regions/scenes/grounding",
}
WAYS = ("projected", "value", "attention", "global", "regions")


def run(folder: pathlib.Path, config: str, methods: Sequence[str], seeds: Sequence[int], flags: Sequence[str]) -> None:
    """Makes the runs that are not there yet, one after the other, seed by seed."""
    for seed in seeds:
        for method in methods:
            workdir = folder / f"{method}_{seed}"
            if (workdir / REPORT).exists():
                continue
            command = [sys.executable, "-m", "flair_jax.main", f"--config={config}:{method}", f"--workdir={workdir}"]
            subprocess.run([*command, f"--config.seed={seed}", *flags], check=True)


def table(folder: pathlib.Path, config: str, methods: Sequence[str], flags: Sequence[str]) -> str:
    """The figures of all runs that are there, in Markdown; percent, without rows that no method has."""
    reports = {method: _reports(folder, method) for method in methods}
    counts = " ".join(f"{method}: {len(found)} runs." for method, found in reports.items())
    lines = [counts, "", quality.row("percent", *(f"`{method}`" for method in methods)), quality.rule(len(methods))]
    for title, name in METRICS.items():
        values = ([_value(report, name) for report in found] for found in reports.values())
        cells = [quality.spread([value for value in own if value is not None]) for own in values]
        if any(cells):
            lines.append(quality.row(title, *cells))
    sections = [configuration.read(f"{config}:{method}", flags) for method in methods]
    lines.append(quality.row("parameters, million", *(f"{plan.parameters(one) / 1e6:.2f}" for one in sections)))
    work = (plan.step_flops(one, TOKENS) / one["batch_size"] / 1e9 for one in sections)
    lines.append(quality.row("GFLOP per image and step", *(f"{one:.3f}" for one in work)))
    lines.append(quality.row("steps", *(f"{one['steps']:,}" for one in sections)))
    return "\n".join(lines)


def _reports(folder: pathlib.Path, method: str) -> list[Mapping[str, float]]:
    found = sorted(
        path for path in folder.glob(f"{method}_*/{REPORT}") if path.parent.name[len(method) + 1 :].isdigit()
    )
    return [json.loads(path.read_text()) for path in found]


def _value(report: Mapping[str, float], name: str) -> float | None:
    """The value of a name, or the best one of the `WAYS` that it has a place for."""
    names = [name.format(way) for way in WAYS] if "{}" in name else [name]
    return max((report[one] for one in names if one in report), default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    flags = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR", help="of the work directories")
    parser.add_argument("--config", required=True, help="a shipped config that takes methods")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    chosen = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    if chosen.command == "run":
        run(chosen.folder, chosen.config, chosen.methods, chosen.seeds, flags)
    else:
        print(table(chosen.folder, chosen.config, chosen.methods, flags))


if __name__ == "__main__":
    main()
