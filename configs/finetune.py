"""Fine-tuning of any model of the house on your own pairs: COCO, Flickr30k, a folder of images and captions.

    python -m flair_jax.data.prepare folder --images photos --captions captions.csv --output mine --resize 256
    python -m flair_jax.main --config finetune:clip+lora --workdir RUN --config.init_from=ViT-B-32.pt \
        --config.model.gelu=quick --config.data.shards=mine --config.evaluators.val.shards=mine_val \
        --config.data_root=DIR

The model is the one of the weights that `init_from` names: a released checkpoint, a converted one, or the workdir of a
run. What `config.model` sets here is changed, such as `--config.model.vision.image_size=336` and
`--config.model.text.context_length=248`, for which the position embeddings are resized. After the colon stand the
objectives and, after a plus sign, what is trained: "flair", "clip+lora", "clip+locked_image", see `OBJECTIVES` and
`TRAINED`.

Every epoch of about `evaluators.val.every` steps retrieval is asked on the validation set; after three evaluations
without a better R@1 the run stops, and RUN/best has the best checkpoint. The report compares it with the weights at the
start, on the validation set and, with `config.data_root`, on public sets of zero-shot classification.

Hardware: anything. Expected: docs/fine_tuning.md has a run on photographs.
"""

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import base, variants


def _grain_objectives() -> ConfigDict:
    objectives = variants.clip_objectives()
    objectives.update(variants.region_objectives())
    return objectives


# Name -> the objectives, and the mode whose R@1 stops the run.
OBJECTIVES = {
    "flair": (variants.flair_objectives, "flair"),
    "clip": (variants.clip_objectives, "global"),
    "siglip": (variants.siglip_objectives, "global"),
    "grain": (_grain_objectives, "global"),  # needs regions: config.data.regions
}
# Name -> optimizer.rules; "lora" trains low-rank changes of all matrices instead of them.
TRAINED = {
    "full": (),
    "lora": (),
    "locked_image": (("vision/.*", {"frozen": True}),),  # LiT (Zhai et al., CVPR 2022)
    "locked_text": (("text/.*", {"frozen": True}),),
    "locked_towers": (("(vision|text)/.*", {"frozen": True}),),  # projections, pooling, scale and bias alone
}


def get_config(method: str = "clip") -> ConfigDict:
    """The config of a fine-tuning, given after a colon: `--config finetune:flair+lora`.

    Args:
      method: a key of `OBJECTIVES`, alone or with a key of `TRAINED` after a plus sign; alone all weights are trained.

    Raises:
      ValueError: another one.
    """
    name, _, trained = method.partition("+")
    trained = trained or "full"
    if name not in OBJECTIVES or trained not in TRAINED:
        raise ValueError(f"no fine-tuning {method!r}; there are {sorted(OBJECTIVES)}, with +{', +'.join(TRAINED)}")
    objectives, mode = OBJECTIVES[name]
    config = base.get_config()
    # No whole model: what is not None here is changed of the model of `init_from`.
    config.model = ConfigDict(
        dict(
            vision=dict(image_size=config_dict.placeholder(object), patch_dropout=0.0),
            text=dict(context_length=config_dict.placeholder(int)),
            gelu=config_dict.placeholder(str),  # where the weights do not say it: "quick" of OpenAI's CLIPs
            dtype="float32",  # "bfloat16" on GPUs and TPUs
            remat="none",
            scan_blocks=False,
            micro_batches=1,
        )
    )
    config.init_resized = True
    config.objectives = objectives()
    config.batch_size = 128
    config.epochs = 10.0
    config.optimizer.update(learning_rate=1e-5, warmup_steps=50, weight_decay=0.1, clip_norm=1.0)
    config.optimizer.rules = TRAINED[trained]
    if trained == "lora":
        config.lora = ConfigDict(dict(rank=4, alpha=1.0, zero_init=True))
        config.optimizer.learning_rate = 1e-4
    # Whole captions, one of an image's in each step. Fields of `data.prepare`: `folder` and `coco` write raw_caption.
    config.data.captions.update(fields=("raw_caption",), splitting="whole", count=1, max_merged=1)
    config.data.packing.row_length = 80
    config.log_every = 10
    config.save_every = 200
    modes = tuple(dict.fromkeys((mode, "global")))
    val = dict(kind="shards", shards=config_dict.placeholder(str), modes=modes, every=100)
    config.evaluators.val = ConfigDict(val)
    config.evaluators.zero_shot = ConfigDict(  # on as soon as config.data_root is set; at the start and at the end
        dict(kind="benchmarks", sets=("imagenet", "cifar10", "cifar100", "food101", "pets", "dtd"), every=0)
    )
    config.evaluate_before = True
    config.early_stopping = ConfigDict(
        dict(evaluator="val", metric=f"retrieval/val/{mode}/text_to_image_R@1", patience=3, min_delta=0.0)
    )
    return config
