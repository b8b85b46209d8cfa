"""Where the time of a program goes: shares by kind of kernel, from a trace of `jax.profiler`."""

import collections
import pathlib
import re
import warnings
from typing import Any

import jax

# The first pattern that is found decides. All look at the names of kernel and instruction and at the target of a custom
# call, "optimizer" at the scope that the instruction comes from.
KINDS = (
    ("attention", re.compile(r"fmha|flash|sdpa", re.IGNORECASE)),
    ("matrix products", re.compile(r"gemm|cublas|cutlass|nvjet|xmma|matmul|(^|[ _])dot|conv(?!ert)", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|copy|transpose|slice|scatter|gather|concatenate|pad_", re.IGNORECASE)),
    ("reductions", re.compile(r"reduce|softmax|norm", re.IGNORECASE)),
    ("elementwise", re.compile(r"fusion|wrapped|add|multiply|select|convert|exp|tanh|rng|iota", re.IGNORECASE)),
)
NAMES = ("optimizer", *(name for name, _ in KINDS), "other", "idle")
LISTED = 20  # kernels that take the most time


def instructions(hlo: str) -> dict[str, tuple[str, str]]:
    """Instructions of a compiled program's text by name: scope (`op_name`), and target if it is a custom call.

    Kernels carry the names of their instructions, with underscores in place of dots and dashes, and so do the keys.
    """
    found = {}
    for line in hlo.splitlines():
        if name := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line):
            scope, target = re.search(r'op_name="([^"]*)"', line), re.search(r'custom_call_target="([^"]*)"', line)
            found[plain(name[1])] = (scope[1] if scope else "", target[1] if target else "")
    return found


def plain(name: str) -> str:
    return re.sub(r"[.-]", "_", name)


def kind(kernel: str, instruction: str, scope: str, target: str) -> str:
    """One of `NAMES`."""
    if "/optimizer/" in f"{scope}/":
        return "optimizer"
    words = f"{kernel} {instruction} {target}"
    return next((name for name, pattern in KINDS if pattern.search(words)), "other")


def events(trace: pathlib.Path) -> list[tuple[str, str, float, float]]:
    """Kernels of the first device: name, instruction, start and duration in nanoseconds.

    On a CPU, instructions as its threads ran them.
    """
    (file,) = trace.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = sorted((plane for plane in planes if plane.name.startswith("/device:GPU")), key=lambda plane: plane.name)
    found = []
    # jaxlib 0.12 makes types without a module at the first access, and aborts where Python's warning of it is an error.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        for plane in devices[:1] or [plane for plane in planes if plane.name == "/host:CPU"]:
            for line in plane.lines:
                if devices and not line.name.startswith("Stream"):  # summaries of the streams, where there are any
                    continue
                for event in line.events:
                    instruction = dict(event.stats).get("hlo_op", "")
                    if devices or instruction:
                        found.append((event.name, str(instruction), event.start_ns, event.duration_ns))
    return found


def summary(trace: pathlib.Path, hlo: str, steps: int) -> dict[str, Any]:
    """Shares of time by kind of kernel.

    Args:
      trace: folder that `jax.profiler.trace` wrote.
      hlo: text of the compiled program that ran meanwhile.
      steps: how often it ran.

    Returns:
      `shares` by `NAMES`, which add up to 1; `step_ms`; `top`, the kernels that take the most time, with their kind,
      `ms` and `count` per step.

    Raises:
      ValueError: the trace holds no kernel.
    """
    known = instructions(hlo)
    spent, counts, intervals = collections.Counter(), collections.Counter(), []
    for kernel, instruction, start, duration in events(trace):
        scope, target = known.get(plain(instruction or kernel), ("", ""))
        key = re.sub(r"[._]\d+$", "", kernel), kind(kernel, instruction, scope, target)
        spent[key] += duration
        counts[key] += 1
        intervals.append((start, start + duration))
    if not intervals:
        raise ValueError(f"{trace} holds no kernel of the device")
    busy, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span, total = end - min(intervals)[0], sum(spent.values())
    shares = dict.fromkeys(NAMES, 0.0)
    for (_, kind_of_it), duration in spent.items():
        shares[kind_of_it] += duration / total * busy / span
    shares["idle"] = 1 - busy / span
    top = [
        {"kernel": key[0][:120], "kind": key[1], "ms": duration / 1e6 / steps, "count": counts[key] / steps}
        for key, duration in spent.most_common(LISTED)
    ]
    return {"shares": shares, "step_ms": span / 1e6 / steps, "top": top}
