"""A process of a run with early stopping: `python stopping.py FOLDER PORT COUNT INDEX`; see test_fine_tuning.py."""

import json
import pathlib
import sys

import jax

FOLDER, PORT, COUNT, INDEX = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.distributed.initialize(f"localhost:{PORT}", COUNT, INDEX)

import numpy as np  # noqa: E402
from tiny_run import STOPPING, tiny  # noqa: E402

from flair_jax import checkpoint, report, train  # noqa: E402

# What each process finds at a step. Alone, the first would stop after step 6, and the second not before the end.
VALUES = {0: 0.1, 2: 0.3, 4: 0.2, 6: 0.25} if INDEX == 0 else {step: step / 100 for step in range(0, 30, 2)}
judged, weights = [], []


def evaluated(config, model, params, workdir=None, **options):
    """Stands for `evaluate.run`, whose work in several processes test_evaluate_processes.py tests."""
    weights.append(jax.device_get(jax.tree.leaves(params)))
    if workdir is not None:
        return []
    judged.append(2 * len(judged))
    return [report.Result("retrieval", "scenes", "text_to_image_R@1", VALUES[judged[-1]], "global")]


train.evaluate.run = evaluated
train.evaluate.draw_attention_sheets = lambda *_: None
overrides = dict(steps=30, save_every=3, data__workers=0, evaluators__scenes__every=2)
train.train(tiny(evaluate=True, **overrides) | dict(early_stopping=STOPPING), FOLDER / "run")
saved = [checkpoint.Checkpoints(folder, keep=None) for folder in (FOLDER / "run", FOLDER / "run" / "best")]
kept = [one.latest() for one in saved]
found = {
    "judged": judged,
    "steps": kept,
    "evaluations": [one.evaluations(step) for one, step in zip(saved, kept, strict=True)],
    "sums": [float(np.abs(x).sum(dtype=np.float64)) for x in weights[-1]],  # of the weights that the report is about
}
for one in saved:
    one.close()
(FOLDER / f"{INDEX}.json").write_text(json.dumps(found))
