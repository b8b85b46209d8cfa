"""CLIP from scratch on shards: ViT-B/16 and the softmax loss over the global batch (Radford et al., ICML 2021).

    python -m flair_jax.main --config configs/clip.py --workdir RUN --config.data.shards='/data/{00000..00575}.tar'

Hardware: anything; `objectives.softmax.chunk_size` bounds the memory of the loss, which no device forms whole.
The optimizer is that of FLAIR's recipes, for comparisons on equal terms. One caption an image, of one to three
sentences. Expected: not yet trained with this code.
"""

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import base, variants


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model = variants.clip("B/16")
    config.objectives = variants.clip_objectives()
    config.batch_size = 1024
    config.epochs = 32.0
    config.model.dtype = "bfloat16"
    config.data.captions.count = 1
    config.data.packing.row_length = 80
    config.data.workers = 48
    config.evaluators.val = ConfigDict(dict(kind="shards", shards=config_dict.placeholder(str), modes=("global",)))
    return config
