"""What GRAIN's trainings have in common, and the table of its runs; a file for each data set says the rest.

Source: the code of GRAIN at commit c6bf85e (Halbe et al., WACV 2026; spec/grain.md 4.1): 35 epochs in batches of 2,048,
128 on a GPU; AdamW with betas 0.9 and 0.98, the learning rate from 1e-6 to 1e-3 over the first epoch, then a cosine to
1e-5; pictures squashed to a square and never cropped; as caption the web's or a long one by a fair coin. No result of
its paper could be read, so none is given as expected; LaCLIP's README has for its own ViT-B/16 with normalised queries
and keys, ImageNet zero-shot: CC3M CLIP 15.8, LaCLIP 21.5; CC12M CLIP 40.2, LaCLIP 48.4.

The reference computes in float16 with a gradient scaler, and these in bfloat16. Its captions and descriptions by a
multimodal model were never released: DreamLIP's long captions stand for the first, and `data.prepare annotate regions`
makes regions with the reference's detector.
"""

import math

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import base, variants

GPU_IMAGES = 128  # of the reference: description losses have the negatives of one GPU
WEB, LONG = "raw_caption", "longSV_captions"
# The sets that the reference averages, ImageNet beside them.
ZERO_SHOT = (
    *("cifar10", "cifar100", "sun397", "cars", "dtd", "pets"),
    *("caltech101", "flowers102", "cub", "places365", "food101"),
)
# What the reference's rule of weight decay hits beside matrices and embeddings, by the slips of its patterns.
GRAIN_DECAY = (
    ("vision/class_embedding", {"decay": True}),
    (r"decoder/(.*/)?ln_\w+/scale", {"decay": True}),
    ("decoder/.*/qkv/bias", {"decay": True}),
)
CLIP_DECAY = (
    ("vision/class_embedding", {"decay": True}),
    (r"vision/.*(ln_\w+|q_norm|k_norm)/scale", {"decay": True}),
    ("text/.*/qkv/bias", {"decay": True}),
)
# What stands after the colon of `--config grain_DATA:RUN` -> how the run differs, see `recipe`.
RUNS = {
    "grain": dict(regions=5),
    "clip": dict(fields=(WEB,)),
    "clip_long": {},  # the baseline with GRAIN's captions
    "laclip": dict(crops=True, weight_decay=0.5),  # LaCLIP's own recipe with GRAIN's captions
}


def run_of(name: str, samples: int) -> ConfigDict:
    """The config of a run in `RUNS`.

    Args:
      name: a key of `RUNS`.
      samples: of the data set, about; for the length of the warm-up.

    Raises:
      ValueError: there is no such run.
    """
    if name not in RUNS:
        raise ValueError(f"no run {name!r}; there are {sorted(RUNS)}")
    return recipe(samples, **RUNS[name])


def recipe(
    samples: int,
    regions: int = 0,
    fields: tuple[str, ...] = (WEB, LONG),
    crops: bool = False,
    weight_decay: float = 0.1,
) -> ConfigDict:
    """The config of a training.

    Args:
      samples: see `run_of`.
      regions: of an image; 0: CLIP, from the class token.
      fields: of a sample's json, each of them a caption of which one is drawn.
      crops: whether random parts of the pictures are seen, and whole ones cut to a square in evaluation.
      weight_decay: of the optimizer.
    """
    config = base.get_config()
    config.model = variants.grain("B/16") if regions else variants.laclip("B/16")
    config.model.preprocess.resize = "crop" if crops else "squash"
    config.model.dtype = "bfloat16"
    config.objectives = variants.clip_objectives()
    if regions:
        config.objectives.update(variants.region_objectives())
        config.objectives.boxes.group_size = config.objectives.region_descriptions.group_size = GPU_IMAGES
        config.data.regions.count = regions
    config.batch_size = 2048
    config.epochs = 35.0
    config.optimizer.update(
        learning_rate=1e-3,
        first_learning_rate=1e-6,
        last_learning_rate=1e-5,
        warmup_steps=samples // config.batch_size,
        weight_decay=weight_decay,
        rules=GRAIN_DECAY if regions else CLIP_DECAY,
    )
    config.data.captions.update(fields=fields, splitting="whole", join_fields=True, count=1, max_merged=1)
    if crops:
        config.data.augmentation.scale = (0.5, 1.0)
    else:
        config.data.augmentation.squash = True
    config.data.packing.row_length = 80  # descriptions are short
    config.data.workers = 8
    config.evaluators.val = ConfigDict(dict(kind="shards", shards=config_dict.placeholder(str), modes=("global",)))
    # On as soon as config.data_root is set: ImageNet after each epoch, as in the reference, and the others at the end.
    epoch = math.ceil(samples / config.batch_size)
    for name, sets, every in (("imagenet", ("imagenet",), epoch), ("zero_shot", ZERO_SHOT, 0)):
        options = dict(kind="benchmarks", sets=sets, every=every, classification=zero_shot_options())
        config.evaluators[name] = ConfigDict(options)
    return config


def zero_shot_options() -> ConfigDict:
    """Classification as in the reference; its descriptions and templates are its user's, see docs/evaluation.md.

    Without descriptions prompts are the templates alone: those of the set, unless others are given.
    """
    return ConfigDict(
        dict(
            descriptions=config_dict.placeholder(str),  # a JSON file, or a folder with SET.json for each set
            templates=config_dict.placeholder(tuple),  # such as ("a photo of a {c},",)
            modes=("global",),  # the regions are off in the reference, too
            renormalize=False,
        )
    )
