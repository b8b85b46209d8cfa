"""Files of features, as safetensors or parquet: arrays by name, and what is said about them.

Both hold the same arrays, of n images and m texts: `image/…` (n, …), and where there are texts `text/pooled` (m, D)
and `text/image` int32 (m,), the image of each, ascending. What is said, `about`, is a dict of JSON values with `keys`
of the n images and `texts`, the m strings.

safetensors  the arrays; the metadata `about` is JSON
parquet      a row per image with the columns `key` and `image/…`, arrays as fixed-size lists; where there are texts
             also `texts` and `text/pooled`, those of the image as a list, which says what `text/image` says. The
             schema's metadata `about` is JSON of the rest of `about`, and `counts`, [n, m].
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from flair_jax.convert import torch_files

ABOUT = "about"  # the one key of a file's metadata; several would be written in any order
FORMATS = ("safetensors", "parquet")


class DamagedFile(ValueError):
    """A file that is none of these, or damaged."""


def check(form: str) -> None:
    """
    Raises:
      ValueError: `form` is none of `FORMATS`. ImportError: its library is not installed.
    """
    if form not in FORMATS:
        raise ValueError(f"format is {form!r}; expected one of {', '.join(FORMATS)}")
    if form == "parquet":
        _pyarrow()


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a file, of the format that its suffix names; it appears whole or not at all."""
    if _is_parquet(path):
        pyarrow = _pyarrow()
        table = _table(tensors, about)
        with torch_files.replacing(path) as partial:
            pyarrow.parquet.write_table(table, partial, use_dictionary=False)
    else:
        torch_files.write(path, tensors, {ABOUT: json.dumps(about)})


def read_about(path: str | os.PathLike) -> tuple[dict[str, Any], tuple[int, int]]:
    """What is said about a file's arrays, without reading those: `about`, and the counts (n, m).

    Of parquet without `keys` and `texts`, which are columns.

    Raises:
      DamagedFile: it is no such file, or damaged. OSError: it cannot be read.
    """
    try:
        if _is_parquet(path):
            about = json.loads(_pyarrow().parquet.read_schema(path).metadata[ABOUT.encode()])
            images, texts = about.pop("counts")
            return about, (int(images), int(texts))
        with safetensors.safe_open(path, "numpy") as opened:
            about = json.loads(opened.metadata()[ABOUT])
        return about, (len(about["keys"]), len(about["texts"]))
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # Arrow's are values
        raise DamagedFile(str(error)) from error


def _table(tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Any:
    """The rows of a parquet file, a `pyarrow.Table`."""
    pyarrow = _pyarrow()
    columns = {"key": pyarrow.array(about["keys"], pyarrow.string())}
    columns |= {name: _lists(x) for name, x in tensors.items() if name.startswith("image/")}
    if "text/image" in tensors:
        starts = np.searchsorted(tensors["text/image"], np.arange(len(about["keys"]) + 1)).astype(np.int32)
        own = {"texts": pyarrow.array(about["texts"], pyarrow.string()), "text/pooled": _lists(tensors["text/pooled"])}
        columns |= {name: pyarrow.ListArray.from_arrays(starts, values) for name, values in own.items()}
    rest = {name: value for name, value in about.items() if name not in ("keys", "texts")}
    said = json.dumps({**rest, "counts": [len(about["keys"]), len(about["texts"])]})
    return pyarrow.table(columns, metadata={ABOUT: said})


def _lists(x: np.ndarray) -> Any:
    """An array (n, …) as n fixed-size lists, of lists where it has more dimensions."""
    pyarrow = _pyarrow()
    values = pyarrow.array(np.ascontiguousarray(x).reshape(-1))
    for width in reversed(x.shape[1:]):
        values = pyarrow.FixedSizeListArray.from_arrays(values, width)
    return values


def _is_parquet(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(".parquet")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'flair_jax[parquet]'") from error
    return pyarrow
