"""SigLIP's objective with CLIP's towers, from scratch on shards (Zhai et al., ICCV 2023).

    python -m flair_jax.main --config configs/siglip.py --workdir RUN --config.data.shards='/data/{00000..00575}.tar'

Hardware: anything; the loss is a sum over pairs, on any number of devices.
As `clip.py`, but for the objective, the starting scale (10) and the bias (-10).
Expected: not yet trained with this code.
"""

from ml_collections import ConfigDict

from flair_jax.configs import clip, variants


def get_config() -> ConfigDict:
    config = clip.get_config()
    model, config.model = config.model, variants.siglip("B/16")
    config.model.dtype = model.dtype
    config.objectives = variants.siglip_objectives()
    return config
