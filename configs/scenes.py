"""The embedded default: a small FLAIR on drawn scenes."""

import ml_collections

from configs import base

SIZE = 48


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 64
    config.steps = 450
    config.model.update(
        embed_dim=128,
        vision=dict(image_size=SIZE, patch_size=8, width=128, depth=3, heads=4),
        text=dict(context_length=32, vocab_size=49408, width=64, depth=2, heads=2),
        pooling=dict(heads=4),
        init_logit_bias=-3.0,
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.save_every = 150
    config.data.scenes = ml_collections.ConfigDict(dict(count=8000, seed=0, size=SIZE))
    config.data.captions.count = 4
    config.evaluators.scenes = ml_collections.ConfigDict(dict(kind="scenes", count=512, seed=1, size=SIZE))
    return config
