"""What the fine-tunings of FSC-CLIP have in common, and the table of its runs; a file for each data set says the rest.

Source: the reference's README at commit 604015d (Oh et al., EMNLP 2024): AdamW with betas 0.9 and 0.98 and epsilon
1e-6, 50 steps of warm-up and a cosine to 0, 5 epochs, seed 0, no clipping; crops of at least 0.9 of the image; one
whole caption an image. Three kinds of hard negatives, focal loss with gamma 2 and label smoothing 0.02. The paper gives
the weights 0.5 (global) and 0.2 (local) for all; the README's others, in the table, are those of the released weights.

The reference computes in float16 with a gradient scaler, and these in bfloat16; `--config.model.dtype=float32` is the
third way. Its negatives are drawn anew in every epoch, and so are these.
"""

import math

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import base, variants

PAIRS = 100_000  # of an epoch: the paper's sets have about so many
KINDS = ("negclip", "replace", "ngram_shuffle_2")  # of hard negatives
CLIP = dict(kinds=(), global_weight=0.0, local_weight=0.0)
NEGCLIP = dict(kinds=("negclip",), global_weight=0.0, local_weight=0.0)
CC3M = dict(global_weight=1.0)
VIT_B16 = dict(variant="B/16", batch_size=128, local_weight=0.5)
VIT_L14 = dict(variant="L/14", gpus=4, local_weight=0.5)
DATACOMP = dict(gelu="exact")
LORA = dict(lora=True)
# Data set -> what stands after the colon of `--config fsc_clip_DATA:RUN` -> how the run differs, see `recipe`.
RUNS = {
    "coco": {"full": {}, "lora": LORA, "clip": CLIP},
    "cc3m": {"full": CC3M, "lora": CC3M | LORA, "clip": CLIP},
    "laioncoco": {
        "full": {},
        "lora": LORA,
        "vit_b16": VIT_B16,
        "vit_b16_lora": VIT_B16 | LORA,
        "vit_l14": VIT_L14,
        "vit_l14_lora": VIT_L14 | LORA,
        "datacomp": DATACOMP,
        "datacomp_lora": DATACOMP | LORA,
        "clip": CLIP,
        "negclip": NEGCLIP,
    },
}


def run_of(data: str, name: str, fields: tuple[str, ...]) -> ConfigDict:
    """The config of a run in `RUNS`.

    Args:
      data, name: keys of `RUNS`.
      fields: see `recipe`.

    Raises:
      ValueError: there is no such run.
    """
    if name not in RUNS[data]:
        raise ValueError(f"no run {name!r}; there are {sorted(RUNS[data])}")
    return recipe(fields, **RUNS[data][name])


def recipe(
    fields: tuple[str, ...],
    variant: str = "B/32",
    lora: bool = False,
    batch_size: int = 256,
    gpus: int = 1,
    global_weight: float = 0.5,
    local_weight: float = 0.2,
    kinds: tuple[str, ...] = KINDS,
    gelu: str = "quick",
) -> ConfigDict:
    """The config of a fine-tuning.

    Args:
      fields: of a sample's json, where its caption stands.
      variant: of the towers.
      lora: True: rank 4, at ten times the learning rate.
      batch_size: over all of the reference's GPUs.
      gpus: of the reference, among which its means of hard negatives are split.
      global_weight, local_weight: of the hard-negative losses; both 0: NegCLIP's loss, or without kinds CLIP's.
      kinds: of hard negatives.
      gelu: of the weights to start from: "quick" is OpenAI's.
    """
    config = base.get_config()
    config.model = variants.clip(variant)
    config.model.gelu = gelu
    config.model.dtype = "bfloat16"
    if global_weight or local_weight:
        config.objectives = variants.clip_objectives()
        config.objectives.update(variants.hard_negative_objectives())
        config.objectives.global_hard_negatives.weight = global_weight
        config.objectives.local_hard_negatives.weight = local_weight
    else:
        config.objectives = variants.negclip_objectives() if kinds else variants.clip_objectives()
    if gpus > 1:
        for options in config.objectives.values():
            options.reference_world_size = gpus
    config.batch_size = batch_size
    config.epochs = 5.0
    config.optimizer.update(learning_rate=5e-6, warmup_steps=50, weight_decay=0.1, eps=1e-6)
    if lora:
        config.lora = ConfigDict(dict(rank=4, alpha=1.0))
        config.optimizer.learning_rate = 5e-5
    config.data.captions.update(fields=fields, splitting="whole", count=1, max_merged=1)
    if kinds:
        config.data.negatives.kinds = kinds
    config.data.packing.row_length = 80  # the same loss with a third of the text tower's work
    config.data.workers = 4
    config.evaluators.val = ConfigDict(dict(kind="shards", shards=config_dict.placeholder(str), modes=("global",)))
    # After each epoch, as the reference does; on as soon as config.data_root is set.
    every = math.ceil(PAIRS / batch_size)
    config.evaluators.sugarcrepe = ConfigDict(dict(kind="benchmarks", sets=("sugarcrepe",), every=every))
    return config
