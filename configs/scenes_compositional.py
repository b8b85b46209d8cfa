"""FSC-CLIP at toy size: CLIP from scratch on drawn scenes, and its fine-tunings with and without hard negatives.

    python -m flair_jax.main --config scenes_compositional:clip --workdir CLIP
    python -m flair_jax.data.scenes DATA --count 8000 --seed 2 --size 48
    python -m flair_jax.data.prepare annotate --shards DATA --fields shortSV_captions
    python -m flair_jax.main --config scenes_compositional:fsc_clip --workdir FSC_CLIP \\
        --config.init_from=CLIP --config.data.shards=DATA

`python -m benchmarks.compositional` does all this for several seeds; docs/compositional.md has the figures.
"""

import ml_collections

from flair_jax.configs import fsc_clip_recipe, scenes

FIELDS = ("shortSV_captions",)  # of the fine-tunings: where one shape lies as seen from another
PLACES = ("longIB_captions", "longLLA_captions", *FIELDS)  # of the run from scratch: where a shape is, too
FINE_TUNINGS = {
    "clip_tuned": fsc_clip_recipe.CLIP,
    "negclip": fsc_clip_recipe.NEGCLIP,
    "fsc_clip": {},
    "fsc_clip_lora": fsc_clip_recipe.LORA,
}


def get_config(method: str = "clip") -> ml_collections.ConfigDict:
    """The config of a method, given after a colon: `--config scenes_compositional:fsc_clip`.

    Args:
      method: "clip", from scratch; or one of `FINE_TUNINGS` of its weights, which `init_from` names, on shards of other
        scenes, which `data.shards` names.

    Raises:
      ValueError: another method.
    """
    if method != "clip" and method not in FINE_TUNINGS:
        raise ValueError(f"no method {method!r}; there are {['clip', *FINE_TUNINGS]}")
    config = scenes.get_config("clip")
    config.batch_size = 64
    config.steps = 2000
    # Position embeddings stronger than in `scenes`, and captions of one sentence that says where something is: without
    # them CLIP learns in this time what is in a picture, and nothing about where.
    config.model.vision.update(width=96, depth=2, position_std=1.0)
    config.data.captions.update(fields=PLACES, count=1, max_merged=1)
    config.data.packing.row_length = 80
    config.data.pixels = "fast"
    if method != "clip":
        config = _fine_tuning(config, **FINE_TUNINGS[method])
    config.evaluators = ml_collections.ConfigDict(
        dict(unseen=dict(kind="compositional_scenes", count=512, seed=1, size=scenes.SIZE))
    )
    return config


def _fine_tuning(scratch: ml_collections.ConfigDict, **run) -> ml_collections.ConfigDict:
    """The recipe of FSC-CLIP for the model and the batches of the run from scratch, in its shorter time."""
    config = fsc_clip_recipe.recipe(FIELDS, **run)
    config.model, config.batch_size = scratch.model, scratch.batch_size
    config.steps, config.epochs = 300, None
    # The recipe's rates are for weights of 400 million pairs; its LoRA learns ten times as fast here, too.
    config.optimizer.learning_rate *= 200
    config.data.pixels, config.data.workers = scratch.data.pixels, 0
    return config
