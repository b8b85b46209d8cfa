"""Imports of a checkout that is not installed, as on a machine without network.

An installation maps the folders data/, configs/ and convert/ to flair_jax.data and so on (`package_dir` in setup.py).
In a checkout they lie beside the package, where Python finds them once the repository is a part of its path.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def use() -> None:
    """Makes `flair_jax`, its folders and `benchmarks` importable, for a script that is run by its path."""
    folder = str(ROOT / "benchmarks")  # which Python put first: its modules' names are too common for that
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != folder)]
    import flair_jax

    flair_jax.__path__.append(str(ROOT))
