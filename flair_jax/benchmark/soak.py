"""Memory of the training stream over many batches: what grows with every batch ends a long run."""

import io
import json
import pathlib
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from flair_jax.benchmark import processes
from flair_jax.data import loader

SAMPLES, SIDE, SENTENCES = 512, 40, 12  # of the shard: small, since it is the number of batches that counts
BATCH_SIZE, IMAGE_SIZE, CAPTIONS, CONTEXT_LENGTH = 8, 32, 2, 32
READINGS = 20


def measure(batches: int = 20_000, workers: int = 2, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Reads tiny batches and watches the memory of this process and of its workers.

    Args:
      batches: to read.
      workers: of the stream.
      report: is told each reading.

    Returns:
      batches, workers.
      main_mb_start, main_mb_end, workers_mb_start, workers_mb_end: resident MiB at a tenth of the way, when all caches
        are full, and at the end.
      growth_mb: of all processes from the first to the last of these readings, by the line that fits all between best.
    """
    readings = []
    with tempfile.TemporaryDirectory() as folder:
        _write_shard(pathlib.Path(folder) / "00000.tar")
        stream = loader.make_stream(
            folder,
            batch_size=BATCH_SIZE,
            image_size=IMAGE_SIZE,
            context_length=CONTEXT_LENGTH,
            seed=0,
            captions={"count": CAPTIONS},
            workers=workers,
        )
        with stream:
            start = time.perf_counter()
            for number in range(1, batches + 1):
                next(stream)
                if number * READINGS % batches < READINGS:
                    main, *others = processes.resident_mib()
                    readings.append((number, main, sum(others)))
                    speed = number / (time.perf_counter() - start)
                    report(
                        f"{number:>9,} batches  main {main:8.1f} MiB  workers {sum(others):8.1f} MiB  {speed:6.0f}/s"
                    )
    number, main, others = np.array(readings[READINGS // 10 - 1 :]).T
    slope = np.polyfit(number, main + others, 1)[0]
    return {
        "batches": batches,
        "workers": workers,
        "main_mb_start": main[0],
        "main_mb_end": main[-1],
        "workers_mb_start": others[0],
        "workers_mb_end": others[-1],
        "growth_mb": slope * (number[-1] - number[0]),
    }


def _write_shard(path: pathlib.Path) -> None:
    rng = random.Random(0)
    with tarfile.open(path, "w") as tar:
        for number in range(SAMPLES):
            picture = io.BytesIO()
            Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE)).save(picture, "JPEG")
            sentences = [f"sentence {rng.randrange(10**6)} of picture {number}" for _ in range(SENTENCES)]
            fields = json.dumps({"raw_caption": sentences}).encode()
            for name, content in ((f"{number:06d}.jpg", picture.getvalue()), (f"{number:06d}.json", fields)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
