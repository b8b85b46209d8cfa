"""Everything in one run, at toy size: FLAIR's pooling and GRAIN's query decoder on one tower, with hard negatives.

    python -m flair_jax.main --config scenes_all --workdir RUN            # all objectives
    python -m flair_jax.main --config scenes_all:grain --workdir RUN      # one method of `METHODS`, the same towers

A packed batch holds sub-captions, hard negatives of the first of them, and descriptions of regions; the loss is the
weighted sum of text-conditioned and multi-positive sigmoid losses (FLAIR), global and local hard negatives (FSC-CLIP),
boxes and descriptions (GRAIN). Every method has the steps that spend as much computation as 800 of all of them.
docs/regions.md has the table.
"""

import ml_collections

from flair_jax.configs import scenes, variants

KINDS = ("svlc", "ngram_shuffle_2")  # of hard negatives: those that need no parses
FLAIR, NEGATIVES, REGIONS = "flair", "negatives", "regions"
# Method -> its parts, and its steps: as many as spend the computation of 800 steps of all parts (`plan.step_flops`,
# 12 tokens a text).
METHODS = {
    "all": ((FLAIR, NEGATIVES, REGIONS), 800),
    "flair": ((FLAIR,), 1353),
    "flair+negatives": ((FLAIR, NEGATIVES), 1133),
    "flair+regions": ((FLAIR, REGIONS), 907),
    "fsc_clip": ((NEGATIVES,), 1627),
    "grain": ((REGIONS,), 1193),
}


def get_config(method: str = "all") -> ml_collections.ConfigDict:
    """The config of a method. Raises ValueError if there is none of that name."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {sorted(METHODS)}")
    parts, steps = METHODS[method]
    config = scenes.get_config("flair" if FLAIR in parts else "clip")
    config.steps = steps
    config.data.packing.row_length = 56
    if FLAIR not in parts:
        config.data.captions.count = 1
    if NEGATIVES in parts:
        config.objectives.update(variants.hard_negative_objectives())
        config.data.negatives.kinds = KINDS
    if REGIONS in parts:
        config.model.decoder = variants.decoder()
        config.model.decoder.update(scenes.DECODER)
        config.objectives.update(variants.region_objectives())
        config.data.regions.count = 4
    config.data.augmentation.squash = True  # boxes go with the whole picture; all methods see the same
    config.model.preprocess.resize = "squash"
    of_scenes = config.evaluators.scenes
    config.evaluators.compositional = ml_collections.ConfigDict(
        dict(kind="compositional_scenes", count=of_scenes.count, seed=of_scenes.seed, size=of_scenes.size)
    )
    return config
