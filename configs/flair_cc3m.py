"""FLAIR ViT-B/16 on CC3M-recap, the recipe of the paper.

    python -m flair_jax.main --config configs/flair_cc3m.py --workdir RUN \
        --config.data.shards='/data/cc3m/cc3m-train-{0000..0575}.tar'

Hardware: the reference used 8 A100-40G with 128 images each;
`objectives.text_conditioned.block_size` keeps that split on any hardware.
Length: 2,823,019 images, 32 epochs, 89,088 steps of 1,024 images.
Expected of the published weights (R@1 in %): COCO text→image 37.7, image→text 51.6; Flickr30k 65.7 and 78.7;
ImageNet top-1 33.8; VOC20 mIoU 59.7. Not yet trained with this code.
Source: the reference's `train_cc3m_slurm.sh` at commit 0f9ce05 and its README, which agree.

Zero-shot retrieval during training, on shards of your own:
    --config.evaluators.val.shards=/data/val --config.eval_every=5000
"""

from ml_collections import ConfigDict

from flair_jax.configs import flair_recipe


def get_config() -> ConfigDict:
    return flair_recipe.recipe(gpus=8, images=128, epoch_steps=2_784)
