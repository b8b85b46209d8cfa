"""A small FLAIR on shards of your own, to see that data and training fit together.

    python -m flair_jax.main --config configs/shards.py --workdir RUN \
        --config.data.shards='/data/mine/{00000..00099}.tar' --config.evaluators.val.shards=/data/mine_val

Hardware: anything. 2 CPU cores take 0.7 s a step at 64 pixels and 2 captions per image, about 2 s as written.
Expected: on 2,000 photographs of Flickr8k, 10 epochs at 64 pixels and 2 captions per image, the loss falls from 8 to
4.5 and an unseen picture among 242 is found at two to three times chance (text→image R@5 0.060, chance 0.021): a check
that data and training fit together. Real quality needs real data, see flair_cc3m.py.
"""

import ml_collections
from ml_collections import config_dict

from flair_jax.configs import base


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
