"""All that needs a GPU, in at most nine minutes: parity, attention, speed beside PyTorch, scoring, matching, a profile.

    python benchmarks/gpu_check.py --output DIR

from the repository's root; nothing has to be installed but jax with CUDA, flax, optax, safetensors, Pillow and torch.
Batches are made up. Every part (`gpu_parts`) runs in a process of its own, so that it has the GPU's memory for itself
and a failure ends nothing else, within a limit of time. DIR/results.json holds each figure as soon as it is known,
DIR/log.txt what the parts printed, DIR/table.md the tables of docs/speed.md, which are also printed at the end.
"""

import argparse
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 9 * 60 - 20  # for all; what is left over is for the end
# In the order of running: seconds that are kept for each. One that needs more may take what nobody keeps.
PARTS = {"golden": 50, "attention": 50, "train": 170, "twin": 110, "encode": 60, "matching": 15, "profile": 50}
MARK = "RESULT "  # begins the lines of a part's output that hold figures


def run(output: pathlib.Path, parts: Sequence[str], toy: bool, seconds: float = SECONDS) -> dict[str, Any]:
    """Runs the parts one after the other.

    Args:
      output: folder for the results, made if it does not exist.
      parts: some of `PARTS`.
      toy: sizes for a try on a CPU.
      seconds: for all of them.

    Returns:
      What `results.json` holds: for each part its figures by case, `seconds`, and `error` if it failed or was stopped.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.json"
    results: dict[str, Any] = {"toy": toy}
    end = time.monotonic() + seconds

    def save() -> None:
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        unfinished.replace(file)

    with (output / "log.txt").open("w", buffering=1) as log, tempfile.TemporaryDirectory() as cache:
        for number, name in enumerate(parts):
            began = time.monotonic()
            limit = end - began - sum(PARTS[later] for later in parts[number + 1 :])
            figures = results[name] = {}
            save()
            try:
                for case, values in _part(name, toy, file, limit, cache, log):
                    figures[case] = values
                    print(f"{name} {case}: {json.dumps(values)[:500]}", flush=True)
                    save()
            except Exception as error:  # recorded; the next part runs
                figures["error"] = str(error)
                print(f"{name}: {error}", flush=True)
            figures["seconds"] = time.monotonic() - began
            save()
    return results


def _part(name: str, toy: bool, file: pathlib.Path, limit: float, cache: str, log):
    """Yields (case, figures) of a part as its process prints them.

    Raises:
      TimeoutError: it was stopped. RuntimeError: it failed.
    """
    if limit <= 0:
        raise TimeoutError("not started: no time is left")
    script = pathlib.Path(__file__).with_name("gpu_parts.py")
    command = [sys.executable, str(script), name, "--results", str(file), "--seconds", str(limit)]
    # Compiled programs are found again by the profile. JAX takes more of the memory than its usual three quarters.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_COMPILATION_CACHE_DIR": cache, **os.environ}
    if name == "twin":
        environment["JAX_PLATFORMS"] = "cpu"  # leaves the GPU to PyTorch
    end, lines = time.monotonic() + limit, queue.Queue()
    log.write(f"\n===== {name}\n")
    process = subprocess.Popen(
        command + ["--toy"] * toy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # torch.compile starts processes, which are to end with the part
    )

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            if line.startswith(MARK):
                yield tuple(json.loads(line.removeprefix(MARK)))
            else:
                log.write(line)
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        raise TimeoutError(f"stopped after {limit:.0f} seconds") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise RuntimeError(f"its process ended with exit code {code}; log.txt says why")


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown for docs/speed.md."""
    device = results.get("train", {}).get("device", {})
    lines = [f"{device.get('kind', 'unknown device')}, jax {device.get('jax', '?')}", ""]
    lines += ["| check | passed | figures |", "|---|---|---|"]
    for part in ("golden", "attention"):
        for case, values in _cases(results, part):
            figures = ", ".join(f"{name} {_number(value)}" for name, value in values.items() if name != "passed")
            lines.append(f"| {part}: {case} | {'yes' if values.get('passed') else 'NO'} | {figures} |")
    columns = ("images_per_second", "mfu", "step_seconds", "memory_gib", "needed_gib", "compile_seconds")
    lines += _table(results, ("train", "twin"), "training step", columns)
    lines += _table(results, ("encode",), "inference", ("per_second", "seconds", "memory_gib"))
    lines += _table(results, ("matching",), "matching", ("all_ways_ms", "hungarian_ms", "ratio"))
    for case, values in _cases(results, "profile"):
        if "shares" in values:
            lines += ["", f"| {case} | share of time |", "|---|---:|"]
            lines += [f"| {name} | {share:.1%} |" for name, share in values["shares"].items()]
            lines += ["", "| kernel | kind | ms per step | count |", "|---|---|---:|---:|"]
            row = "| `{kernel}` | {kind} | {ms:.2f} | {count:.0f} |"
            lines += [row.format(**kernel) for kernel in values["top"]]
    errors = [f"- {part}: {results[part]['error']}" for part in PARTS if "error" in results.get(part, {})]
    return "\n".join([*lines, "", *errors]) + "\n"


def _cases(results: Mapping[str, Any], part: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Cases of a part with their figures, the device aside."""
    found = results.get(part, {}).items()
    return [(case, values) for case, values in found if isinstance(values, dict) and case != "device"]


def _table(results: Mapping[str, Any], parts: Sequence[str], title: str, columns: Sequence[str]) -> list[str]:
    lines = ["", f"| {title} | {' | '.join(columns)} | |", "|---|" + "---:|" * len(columns) + "---|"]
    for part in parts:
        for case, values in _cases(results, part):
            cells = " | ".join(_number(values.get(name, "")) for name in columns)
            lines.append(f"| {part}: {case} | {cells} | {values.get('error', '')[:100]} |")
    return lines


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="all if absent")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help="for all parts (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="small sizes, for a try on a CPU")
    parsed = parser.parse_args(arguments)
    parts = [name for name in PARTS if name in parsed.parts]
    table = tables(run(parsed.output, parts, parsed.toy, parsed.seconds))
    (parsed.output / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
