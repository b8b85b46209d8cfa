"""A run of some seconds, for tests and the processes that they start: it imports no test."""

import pathlib
import sys

import jax
import numpy as np

from flair_jax import checkpoint
from flair_jax.configs import scenes

ROOT = pathlib.Path(__file__).parents[1]
METRIC = "retrieval/scenes/global/text_to_image_R@1"
STOPPING = dict(evaluator="scenes", metric=METRIC, patience=2)  # its `early_stopping`, where a test has one
SIZE = 40
MODEL = dict(
    embed_dim=32,
    vision=dict(image_size=SIZE, patch_size=20, width=32, depth=1, heads=2),
    text=dict(context_length=16, vocab_size=49408, width=16, depth=1, heads=2),
    pooling=dict(heads=2),
)


def tiny(evaluate=False, **overrides):
    """A run of some seconds on drawn scenes; overrides by dotted name."""
    config = scenes.get_config()
    config.model.update(MODEL)
    config.data.scenes.update(count=48, size=SIZE)
    config.evaluators.scenes.update(count=8, size=SIZE)
    if not evaluate:
        config.evaluators = {}
    config.update(batch_size=16, steps=6, save_every=2, log_every=1)
    for name, value in overrides.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config.to_dict()


def checkpoint_of(workdir, step=None):
    """Parameters, optimiser and position of a step, as numpy."""
    saved = checkpoint.Checkpoints(workdir, keep=None)
    step = saved.latest() if step is None else step
    restored = saved.manager.restore(
        step,
        args=checkpoint.ocp.args.Composite(
            params=checkpoint.ocp.args.StandardRestore(), optimizer=checkpoint.ocp.args.StandardRestore()
        ),
    )
    arrays = jax.tree.map(np.asarray, (restored["params"], restored["optimizer"]))
    return step, arrays, saved.positions(step)


def assert_same_checkpoint(one, other):
    (step, arrays, positions), (other_step, other_arrays, other_positions) = checkpoint_of(one), checkpoint_of(other)
    assert (step, positions) == (other_step, other_positions)
    jax.tree.map(np.testing.assert_array_equal, arrays, other_arrays)


def command(workdir, *arguments):
    overrides = {f"--config.{key}={value}" for key, value in {
        "batch_size": 16, "steps": 30, "save_every": 4, "log_every": 1, "data.workers": 1,
        "data.scenes.count": 48, "data.scenes.size": SIZE, "evaluators.scenes.count": 8, "evaluators.scenes.size": SIZE,
        "model.embed_dim": 32, "model.pooling.heads": 2,
        **{f"model.{tower}.{key}": value for tower in ("vision", "text") for key, value in MODEL[tower].items()},
    }.items()}  # fmt: skip
    return [
        sys.executable,
        "-m",
        "flair_jax.main",
        "--config=scenes",
        f"--workdir={workdir}",
        *overrides,
        *arguments,
    ]
