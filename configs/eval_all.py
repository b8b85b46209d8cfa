"""Every public evaluation set that is there, on any model.

    python -m flair_jax.main --mode evaluate --config eval_all --workdir OUT \
        --config.init_from=PATH --config.data_root=DIR

PATH is a .pt or .safetensors file or the workdir of a run; the model is the one that it holds. DIR has a folder per
set: `python -m flair_jax.data.benchmarks` lists them, and with `--root DIR` what is there and what
is not. Single sets: `--config.evaluators.public.sets=coco_val2017`, or `"('coco_*', 'voc20')"`.

Hardware: anything; more devices share the work.
"""

import ml_collections

from flair_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    with config.ignore_type():
        config.model = None  # as the weights say
    config.steps = 1  # nothing is trained
    config.evaluators.public = ml_collections.ConfigDict(
        dict(kind="benchmarks", sets=("*",), allow_missing=False, image_batch=64, text_batch=512)
    )
    return config
