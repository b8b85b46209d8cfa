"""What the fine-tunings of FSC-CLIP have in common, and the table of its runs; a file for each data set says the rest.

Source: the reference's README at commit 604015d (Oh et al., EMNLP 2024): AdamW with betas 0.9 and 0.98 and epsilon
1e-6, 50 steps of warm-up and a cosine to 0, 5 epochs, seed 0, no clipping; crops of at least 0.9 of the image; one
whole caption an image. Three kinds of hard negatives, focal loss with gamma 2 and label smoothing 0.02. The paper gives
the weights 0.5 (global) and 0.2 (local) for all; the README's others, in the table, are those of the released weights.

The reference computes in float16 with a gradient scaler, and these in bfloat16; `--config.model.dtype=float32` is the
third way. Its negatives are drawn anew in every epoch, and so are these.
"""

from typing import NamedTuple

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import base, variants

KINDS = ("negclip", "replace", "bigram_shuffle")  # of hard negatives


class Run(NamedTuple):
    """How one run differs.

    Attributes:
      variant: of the towers.
      lora: True: rank 4, at ten times the learning rate.
      batch_size: over all of the reference's GPUs.
      gpus: of the reference, among which its means of hard negatives are split.
      global_weight, local_weight: of the hard-negative losses; 0: there is none.
      kinds: of hard negatives; the first two baselines have none or one.
      gelu: of the weights to start from: "quick" is OpenAI's.
    """

    variant: str = "B/32"
    lora: bool = False
    batch_size: int = 256
    gpus: int = 1
    global_weight: float = 0.5
    local_weight: float = 0.2
    kinds: tuple[str, ...] = KINDS
    gelu: str = "quick"


CLIP = Run(global_weight=0, local_weight=0, kinds=())
NEGCLIP = CLIP._replace(kinds=("negclip",))
_B16 = Run("B/16", batch_size=128, local_weight=0.5)
_L14 = Run("L/14", gpus=4, local_weight=0.5)
_DATACOMP = Run(gelu="exact")
# Data set -> what stands after the colon of `--config fsc_clip_DATA:RUN` -> the run.
RUNS = {
    "coco": {"full": Run(), "lora": Run(lora=True), "clip": CLIP},
    "cc3m": {"full": Run(global_weight=1.0), "lora": Run(global_weight=1.0, lora=True), "clip": CLIP},
    "laioncoco": {
        "full": Run(),
        "lora": Run(lora=True),
        "vit_b16": _B16,
        "vit_b16_lora": _B16._replace(lora=True),
        "vit_l14": _L14,
        "vit_l14_lora": _L14._replace(lora=True),
        "datacomp": _DATACOMP,
        "datacomp_lora": _DATACOMP._replace(lora=True),
        "clip": CLIP,
        "negclip": NEGCLIP,
    },
}


def recipe(data: str, name: str, fields: tuple[str, ...]) -> ConfigDict:
    """The config of a run.

    Args:
      data, name: keys of `RUNS`.
      fields: of a sample's json, where its caption stands.

    Raises:
      ValueError: there is no such run.
    """
    if name not in RUNS[data]:
        raise ValueError(f"no run {name!r}; there are {sorted(RUNS[data])}")
    run = RUNS[data][name]
    config = base.get_config()
    config.model = variants.clip(run.variant)
    config.model.gelu = run.gelu
    config.model.dtype = "bfloat16"
    config.objectives = _objectives(run)
    config.batch_size = run.batch_size
    config.epochs = 5.0
    config.optimizer.update(learning_rate=5e-6, warmup_steps=50, weight_decay=0.1, eps=1e-6)
    if run.lora:
        config.lora = ConfigDict(dict(rank=4, alpha=1.0))
        config.optimizer.learning_rate = 5e-5
    config.data.captions.update(fields=fields, splitting="whole", count=1, max_merged=1)
    if run.kinds:
        config.data.negatives.kinds = run.kinds
    config.data.packing.row_length = 80  # the same loss with a third of the text tower's work
    config.data.workers = 4
    config.evaluators.val = ConfigDict(dict(kind="shards", shards=config_dict.placeholder(str), modes=("global",)))
    return config


def _objectives(run: Run) -> ConfigDict:
    if run.kinds and not run.global_weight:
        return variants.negclip_objectives()
    objectives = variants.clip_objectives()
    if run.kinds:
        objectives.update(variants.hard_negative_objectives())
        objectives.global_hard_negatives.weight = run.global_weight
        objectives.local_hard_negatives.weight = run.local_weight
    if run.gpus > 1:
        for options in objectives.values():
            options.reference_world_size = run.gpus
    return objectives
