"""The average of the parameters: its rule, its resume bit for bit, and that it is what is evaluated and loaded."""

import itertools
import shutil

import jax
import numpy as np
import pytest
from tiny_run import tiny

from flair_jax import checkpoint, evaluate, optimizer, pretrained, train

pytestmark = pytest.mark.usefixtures("shared_programs")
DECAY = 0.3  # warm-up: 0.1, 0.18, 0.25, then this


def items(workdir, step) -> dict:
    """Parameters and average of a step, as numpy."""
    saved = checkpoint.Checkpoints(workdir, keep=None)
    restore = checkpoint.ocp.args.StandardRestore()
    names = (checkpoint.PARAMS, checkpoint.EMA, checkpoint.OPTIMIZER)
    found = saved.manager.restore(step, args=checkpoint.ocp.args.Composite(**dict.fromkeys(names, restore)))
    return {name: jax.tree.map(np.asarray, found[name]) for name in names}


def test_the_rule():
    """Against the sum written out: every weight is a product of decays."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 3)).astype(np.float32)
    average = {"a": values[0]}
    step_function = jax.jit(optimizer.average, static_argnums=3)
    for step, value in enumerate(values[1:]):
        average = step_function(average, {"a": value}, np.int32(step), 0.9)
    decays = [min(0.9, (1 + t) / (10 + t)) for t in range(199)]
    weights = [np.prod(decays), *[(1 - d) * np.prod(decays[t + 1 :]) for t, d in enumerate(decays)]]
    assert sum(weights) == pytest.approx(1)
    np.testing.assert_allclose(average["a"], np.array(weights) @ values.astype(np.float64), atol=1e-6)


@pytest.mark.usefixtures("on_one_device")
def test_a_run_with_an_average(tmp_path):
    """Follows the rule step by step, goes on bit for bit, and is what the report and `load` use."""
    config = tiny(evaluate=True, ema_decay=DECAY, save_every=1)
    config["keep"] = None
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    report = train.train(config, whole)
    steps = [items(whole, step) for step in range(1, 7)]
    for step, (before, after) in enumerate(itertools.pairwise(steps), start=1):
        decay = min(DECAY, (1 + step) / (10 + step))
        jax.tree.map(
            lambda old, new, found, decay=decay: np.testing.assert_allclose(
                found, decay * old + (1 - decay) * new, atol=1e-7
            ),
            before["ema"],
            after["params"],
            after["ema"],
        )

    shutil.copytree(whole, broken)
    for step in (4, 5, 6):
        shutil.rmtree(broken / "checkpoints" / str(step))
    train.train({**config, "evaluators": {}}, broken)
    jax.tree.map(np.testing.assert_array_equal, items(broken, 6), steps[-1])

    loaded = jax.device_get(pretrained.load(whole).params)
    jax.tree.map(np.testing.assert_array_equal, loaded, steps[-1]["ema"])
    assert np.abs(loaded["text_projection"] - steps[-1]["params"]["text_projection"]).max() > 1e-5
    assert evaluate.evaluate(config, whole) == pytest.approx(report, abs=1e-6)

    # Another run starts from the average, with its own average there.
    other = tiny(init_from=str(whole), ema_decay=DECAY, steps=1, optimizer__learning_rate=0.0)
    train.train(other, tmp_path / "other")
    for name in ("params", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), items(tmp_path / "other", 1)[name], loaded
        )

    with pytest.raises(ValueError, match=r"config\.ema_decay is None, was 0\.3"):
        train.train({**config, "ema_decay": None}, whole)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_that_is_none_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=rf"config\.ema_decay is {decay}"):
        train.train(tiny(ema_decay=decay), tmp_path)
