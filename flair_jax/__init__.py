"""FLAIR in JAX: `flair_jax.load(path)` gives a model to use; `python -m flair_jax.main` trains and evaluates one."""

import importlib.metadata
import os

__version__ = "0.1.0"
__all__ = ["__version__", "load"]
JAXLIB_IS_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")  # what is not documented may change with it


def _tune_cpu() -> None:
    """Takes XLA's older matrix products on a CPU, and its newer sums; what the user set in XLA_FLAGS stays.

    In jax 0.10 YNNPACK computes both unless told otherwise (docs/speed.md). Only where the flag is known to exist: XLA
    ends a process that has an unknown one.
    """
    flag, flags = "--xla_cpu_experimental_ynn_fusion_type", os.environ.get("XLA_FLAGS", "")
    if JAXLIB_IS_KNOWN and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=reduce".strip()


_tune_cpu()


def __getattr__(name):
    if name == "load":  # On demand: the data workers import this package too and need no jax.
        from flair_jax.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
