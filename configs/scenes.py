"""The embedded default: a small FLAIR from scratch on drawn scenes.

    python -m flair_jax.main --config configs/scenes.py --workdir RUN      # or `make demo`

Hardware: 2 CPU cores, 7 to 10 minutes.
Expected on 512 unseen scenes with seed 0: parts text→image R@1 0.28 (global 0.23) and R@5 0.80,
pointing 0.86, colour mIoU 0.91, shape mIoU 0.19 (chance 0.11). Initial weights decide a good part of so short a run:
docs/quality.md has the spread over seeds.

It is the recipe of the paper at toy size. What small data want differently: a bias near the prior of a pair in a small
batch (-10 learns far more slowly), and position embeddings as strong as the pixels (with the reference's small ones the
model learns what is in a picture, but not where).
"""

import ml_collections

from flair_jax.configs import base, variants

SIZE = 48


def _flair_and_clip() -> ml_collections.ConfigDict:
    objectives = variants.flair_objectives()
    objectives.update(variants.clip_objectives())
    objectives.softmax.weight = 0.5
    return objectives


def _clip_and_regions() -> ml_collections.ConfigDict:
    objectives = variants.clip_objectives()
    objectives.update(variants.region_objectives())
    return objectives


METHODS = {
    "flair": (variants.flair, variants.flair_objectives),
    "clip": (variants.clip, variants.clip_objectives),
    "siglip": (variants.siglip, variants.siglip_objectives),
    "flair+clip": (variants.flair, _flair_and_clip),
    "laclip": (variants.laclip, variants.clip_objectives),
    "grain": (variants.grain, _clip_and_regions),
}
DECODER = dict(width=64, depth=3, heads=4, hidden=256, regions=5, dropout=0.0)


def get_config(method: str = "flair") -> ml_collections.ConfigDict:
    """The config of a method, given after a colon: `--config configs/scenes.py:clip`.

    Args:
      method: "flair"; "clip" and "siglip", the same towers with their objectives; "flair+clip", FLAIR's and CLIP's
        objectives together; or "grain" and its baseline "laclip", with one caption an image.

    Raises:
      ValueError: another method.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {sorted(METHODS)}")
    model, objectives = METHODS[method]
    config = base.get_config()
    config.model, config.objectives = model(), objectives()
    config.batch_size = 32
    config.steps = 4000
    config.log_every = 20
    config.save_every = 1000

    config.model.update(
        embed_dim=128,
        vision=dict(image_size=SIZE, patch_size=16, width=128, depth=3, heads=4, position_std=0.25),
        text=dict(context_length=28, width=64, depth=2, heads=2),
    )
    if config.model.pooling is not None:
        config.model.pooling.heads = 4
    if config.model.init_logit_bias is not None:
        config.model.init_logit_bias = -3.0
    config.data.captions.update(count=4, max_merged=2)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1

    if method in ("grain", "laclip"):
        config.model.preprocess.resize = "squash"
        config.data.augmentation.squash = True
        config.data.captions.count = 1
    if method == "grain":
        config.model.decoder.update(DECODER)
        config.data.regions.count = 4
        config.data.packing.row_length = 28
    config.data.scenes = ml_collections.ConfigDict(dict(count=8000, seed=0, size=SIZE))  # drawn into RUN/scenes
    config.evaluators.scenes = ml_collections.ConfigDict(dict(kind="scenes", count=512, seed=1, size=SIZE))
    if method in ("grain", "laclip"):
        config.evaluators.scenes.classification = True
    return config
