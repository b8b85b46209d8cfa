"""FLAIR ViT-B/16 on CC3M-recap, the recipe of the paper.

    python -m flair_jax.main --config configs/flair_cc3m.py --workdir RUN \
        --config.data.shards='/data/cc3m/cc3m-train-{0000..0575}.tar'

Hardware: the reference used 8 A100-40G with 128 images each; `loss.block_size` keeps that split on any hardware.
Length: 2,823,019 images, 32 epochs, 89,088 steps of 1,024 images.
Expected of the published weights (R@1 in %): COCO text→image 37.7, image→text 51.6; Flickr30k 65.7 and 78.7;
ImageNet top-1 33.8; VOC20 mIoU 59.7. Not yet trained with this code.
Source: the reference's `train_cc3m_slurm.sh` at commit 0f9ce05 and its README.

Zero-shot retrieval during training, on shards of your own:
    --config.evaluators.val.shards=/data/val --config.eval_every=5000
"""

import ml_collections
from ml_collections import config_dict

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 1024
    config.steps = 89_088
    config.loss.block_size = 128
    config.model.dtype = "bfloat16"  # the reference: float16 with a gradient scaler
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.5
    config.data.workers = 48
    config.data.packing.row_length = 80  # the same loss with a third of the text tower's work
    config.evaluators.val = ml_collections.ConfigDict(
        dict(kind="shards", shards=config_dict.placeholder(str), modes=("flair",), topk=128)
    )
    return config
