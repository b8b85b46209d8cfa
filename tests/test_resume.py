"""A stream that is killed again and again gives the very batches of one that is not, pixels and captions included."""

import hashlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from processes import alive
from shard_files import write_tar

from flair_jax.data import iterator_state, loader

BATCHES, KILLS = 200, 10
OPTIONS = dict(batch_size=6, image_size=24, context_length=20, seed=5, max_skipped=1.0, captions=dict(count=3))
OPTIONS["packing"] = dict(row_length=24)

# Keeps the digests and the position together in one file, replaced as a whole, as a checkpoint is. Each line on stdin
# starts a run, a fork of the process that has imported what it needs; its number, then its status are printed.
SCRIPT = """
import json, os, pathlib, sys
sys.path.insert(0, {tests!r})
from test_resume import BATCHES, OPTIONS, digest
from flair_jax.data import loader

def run():
    state = pathlib.Path({state!r})
    saved = json.loads(state.read_text()) if state.exists() else dict(position=None, digests=[])
    with loader.make_stream({shards!r}, workers=1, position=saved["position"], **OPTIONS) as batches:
        while len(saved["digests"]) < BATCHES:
            saved["digests"].append(digest(next(batches)))
            saved["position"] = batches.position
            new = state.with_suffix(".new")
            new.write_text(json.dumps(saved))
            os.replace(new, state)

if __name__ == "__main__":
    while sys.stdin.readline():
        child = os.fork()
        if child == 0:
            run()
            sys.exit()
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def digest(batch) -> str:
    arrays = (batch["images"], *(batch["texts"][name] for name in sorted(batch["texts"])))
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def write_shards(folder: pathlib.Path) -> str:
    """47 samples, of which 5 cannot be used, in shards of unequal size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    number = 0
    for shard, size in enumerate((13, 1, 20, 13)):
        members = []
        for _ in range(size):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(file, "JPEG")
            image = b"broken" if number % 10 == 3 else file.getvalue()
            sentences = [f"sample {number} sentence {which}" for which in range(6)]
            members += [(f"{number:05d}.jpg", image), (f"{number:05d}.json", json.dumps(dict(raw_caption=sentences)))]
            number += 1
        write_tar(folder / f"{shard:05d}.tar", [(n, c if isinstance(c, bytes) else c.encode()) for n, c in members])
    return str(folder)


def progress(state: pathlib.Path) -> int:
    return len(json.loads(state.read_text())["digests"]) if state.exists() else 0


def test_ten_kills_change_nothing(tmp_path):
    shards = write_shards(tmp_path / "shards")
    with loader.make_stream(shards, **OPTIONS) as batches:
        expected = [digest(next(batches)) for _ in range(BATCHES)]
        skipped = dict(batches.skipped)
    assert len(set(expected)) == BATCHES  # so that a repeated batch would show

    state, script = tmp_path / "state.json", tmp_path / "script.py"
    tests = pathlib.Path(__file__).parent
    script.write_text(SCRIPT.format(tests=str(tests), state=str(state), shards=shards))
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    rng = random.Random(0)
    killed = 0
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **pipes) as forks:
        while progress(state) < BATCHES:
            print(file=forks.stdin, flush=True)
            run = int(forks.stdout.readline())
            if killed < KILLS:
                goal = progress(state) + rng.randint(1, BATCHES // (KILLS + 2))
                while progress(state) < goal and alive(run):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.01))
                os.kill(run, signal.SIGKILL)
                killed += int(forks.stdout.readline()) == -signal.SIGKILL
            else:
                assert int(forks.stdout.readline()) == 0
        forks.kill()
    assert killed == KILLS
    saved = json.loads(state.read_text())
    assert saved["digests"] == expected
    assert saved["position"]["skipped"] == skipped


def test_other_numbers_of_workers_and_hosts(tmp_path):
    """Workers may change at will. Hosts may, too, by `iterator_state.redistribute`: each reads a part of its own."""
    shards = write_shards(tmp_path / "shards")
    with loader.make_stream(shards, **OPTIONS) as batches:
        expected = [digest(next(batches)) for _ in range(30)]
    position, found = None, []
    for workers in (0, 2, 1):
        with loader.make_stream(shards, **OPTIONS, workers=workers, position=position) as batches:
            found += [digest(next(batches)) for _ in range(10)]
            position = batches.position
    assert found == expected
    of_two = dict(process_index=0, process_count=2, agree=lambda value: lambda: value)
    with pytest.raises(iterator_state.PositionError, match="process_count was 1, is 2"):
        loader.make_stream(shards, **OPTIONS, **of_two, position=position)
