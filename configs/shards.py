"""A small FLAIR on webdataset shards of your own, to see that data and training fit together.

    python -m flair_jax.main --config configs/shards.py --workdir RUN \
        --config.data.shards='/data/mine/{00000..00099}.tar' --config.evaluators.val.shards=/data/mine_val

Hardware: anything; 2 CPU cores take about @PHOTO_STEP@ s a step.
Expected: on 2,000 photographs of Flickr8k, @PHOTO_SCORES@.
"""

import ml_collections
from ml_collections import config_dict

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 20.0
    config.save_every = 200
    config.model.update(
        embed_dim=128,
        vision=dict(image_size=112, patch_size=16, width=128, depth=4, heads=4),
        text=dict(context_length=32, width=128, depth=2, heads=4),
        pooling=dict(heads=4),
        init_logit_bias=-4.0,  # near the prior of a pair in a batch of 64; -10 is for thousands
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.2
    config.data.captions.count = 4
    config.evaluators.val = ml_collections.ConfigDict(
        dict(kind="shards", shards=config_dict.placeholder(str), modes=("flair", "topk", "global"), topk=128)
    )
    return config
