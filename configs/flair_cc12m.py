"""FLAIR ViT-B/16 on CC12M-recap, the recipe of the paper.

    python -m flair_jax.main --config configs/flair_cc12m.py --workdir RUN --distributed \
        --config.data.shards='/data/cc12m/cc12m-train-{0000..2175}.tar'

Hardware: the reference used 32 A100-40G with 192 images each;
`objectives.text_conditioned.block_size` keeps that split on any hardware.
Length: 10,010,225 images, 32 epochs, 52,224 steps of 6,144 images.
Expected of the published weights (R@1 in %): COCO text→image 47.8, image→text 64.1; Flickr30k 75.4 and 90.8.
Not yet trained with this code.
Source: the reference's `train_cc12m_slurm.sh` at commit 0f9ce05 and its README, which agree.
"""

from ml_collections import ConfigDict

from flair_jax.configs import flair_recipe


def get_config() -> ConfigDict:
    return flair_recipe.recipe(gpus=32, images=192, epoch_steps=1_632)
