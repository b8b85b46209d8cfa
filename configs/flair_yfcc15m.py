"""FLAIR ViT-B/16 on YFCC15M-recap.

    python -m flair_jax.main --config configs/flair_yfcc15m.py --workdir RUN --distributed \
        --config.data.shards='/data/yfcc15m/yfcc15m-train-{0000..3636}.tar'

Hardware: 32 A100-40G with 192 images each, by the reference's README.
Length: 14,065,827 images, 32 epochs, 73,728 steps of 6,144 images.
Expected of the published weights (R@1 in %): COCO text→image 51.2, image→text 67.3; Flickr30k 79.2 and 93.3.
Not yet trained with this code.
Source: the reference's `train_yfcc15m_slurm.sh` at commit 0f9ce05 and its README. Where they disagree this config
follows the script in how to train, and the README in how many GPUs the published weights were trained on:

* GPUs: the README says 32, the script asks for 2 nodes of 4. As scripted:
    --config.batch_size=1536 --config.steps=293376
* Captions an image: the script draws 10, the paper says 8 (by others' notes on it). As in the paper:
    --config.data.captions.count=8
"""

from ml_collections import ConfigDict

from flair_jax.configs import flair_recipe


def get_config() -> ConfigDict:
    config = flair_recipe.recipe(gpus=32, images=192, epoch_steps=2_304)
    config.data.captions.count = 10
    return config
