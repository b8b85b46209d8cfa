"""Planning a run: shapes are the real ones, bytes and hours come out right, and the page says what the code says."""

import pathlib

import jax
import numpy as np
import pytest

from flair_jax import models, plan, sharding, state, train
from flair_jax.configs import flair_cc3m
from flair_jax.configs import scenes as scenes_config

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny():
    """A run of a moment, of packed captions."""
    config = scenes_config.get_config()
    config.model.update(
        embed_dim=32,
        vision=dict(image_size=36, patch_size=18, width=32, depth=1, heads=2),
        text=dict(context_length=16, width=16, depth=1, heads=2),
        pooling=dict(heads=2),
    )
    config.data.scenes.update(count=48, size=36)
    config.data.packing.row_length = 20
    config.batch_size = 16
    return config.to_dict()


def test_the_batch_is_as_the_pipeline_makes_it(tiny, tmp_path):
    model = models.create(tiny["model"])
    with train.open_stream(tiny, model, tmp_path, None) as stream:
        real = next(stream)
    planned = plan.abstract_batch(tiny, sharding.create_mesh())

    def kind(leaf):  # the number of packed rows follows from the captions
        return leaf.shape[1:], np.dtype(leaf.dtype)

    assert jax.tree.map(kind, planned) == jax.tree.map(kind, real)
    assert planned["images"].shape == real["images"].shape
    assert planned["texts"]["ends"].shape == real["texts"]["ends"].shape
    packing, regions = ({**tiny["data"][name]} for name in ("packing", "regions"))
    tiny = {
        **tiny,
        "data": {**tiny["data"], "packing": packing | {"row_length": None}, "regions": regions | {"count": 3}},
    }
    with train.open_stream(tiny, model, tmp_path, None) as stream:
        real = next(stream)
    planned = plan.abstract_batch(tiny, sharding.create_mesh())
    assert jax.tree.map(np.shape, planned) == jax.tree.map(np.shape, real)


def test_packed_rows_follow_from_the_mean_length(tiny):
    mesh = sharding.create_mesh()
    rows = [plan.abstract_batch(tiny, mesh, mean)["texts"]["tokens"].shape[0] for mean in (5.0, 10.0)]
    assert rows == [24, 40]  # 64 captions in rows of 20, a twentieth more, whole rows on each of 8 devices


def test_the_state_is_placed_as_a_run_places_it(tiny):
    tiny = {**tiny, "mesh": {"data": 2, "fsdp": 4}}
    mesh = sharding.create_mesh(**tiny["mesh"])
    _, optimize, planned = plan.abstract_state(tiny, mesh)
    real = state.create(models.create(tiny["model"]), optimize, mesh, 0)
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_the_compiler_s_account_of_arguments_is_state_and_batch(tiny):
    figures = plan.measure(tiny, jax.devices())
    mesh = sharding.create_mesh()
    _, _, placed = plan.abstract_state(tiny, mesh)
    shards = jax.tree.leaves((placed, plan.abstract_batch(tiny, mesh)))
    assert figures["argument_bytes"] == sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize for leaf in shards
    )
    params = 4 * plan.parameters(tiny)
    assert figures["output_bytes_in_place"] == 3 * params + 3 * 4  # with moments and counters
    assert figures["images"] == 4000 * 16 and figures["eflop"] == pytest.approx(4 * figures["pflop_a_step"])


def test_hours():
    assert plan.chip_hours(312e12 * 3600, "A100", 0.5) == pytest.approx(2)
    lines = plan.estimates(989e12 * 3600 * 0.4 * 64, 32, ["NVIDIA H200"])
    assert "2.0 h =      64 chip-hours at 40%" in lines and "171 chip-hours at 15%" in lines


def test_a_chip_of_unknown_speed_is_named():
    with pytest.raises(ValueError, match="'abacus' is not known"):
        plan.chip_hours(1.0, "abacus", 0.5)


def test_devices_that_do_not_divide_the_batch_are_named():
    config = {**flair_cc3m.get_config().to_dict(), "batch_size": 100}
    with pytest.raises(ValueError, match=r"8 devices do not divide .* 100"):
        plan.abstract_batch(config, sharding.create_mesh())


def test_the_page_has_the_tables_that_the_code_makes():
    assert plan.tables() in (ROOT / "docs" / "scale.md").read_text(), "python -m flair_jax.plan --table"
