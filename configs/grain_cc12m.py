r"""GRAIN and its baselines on CC12M.

    python -m flair_jax.data.prepare annotate regions --shards 'DATA/*.tar'
    python -m flair_jax.main --config grain_cc12m --workdir RUN \
        --config.data.shards='DATA/*.tar' --config.data.regions.source=beside

RUN after a colon, such as `grain_cc12m:clip`: a key of `grain_recipe.RUNS`. GRAIN itself needs regions: the first
command makes them of long captions; shards that have "regions" in their json go without `source`.
Hardware: 16 H100-80G in the reference.
"""

from ml_collections import ConfigDict

from flair_jax.configs import grain_recipe

SAMPLES = 11_000_000  # about what can still be downloaded


def get_config(run: str = "grain") -> ConfigDict:
    """The config of a run. Raises ValueError as `grain_recipe.run_of`."""
    return grain_recipe.run_of(run, SAMPLES)
