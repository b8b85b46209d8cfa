"""FLAIR ViT-B/16 on PixelProse.

    python -m flair_jax.main --config configs/flair_pixelprose.py --workdir RUN --distributed \
        --config.data.shards='/data/pixelprose/{00000..01699}.tar'

Hardware: none is published; 32 GPUs with 192 images each are CC12M's.
Length: 15,037,386 images, 32 epochs, 78,336 steps of 6,144 images.
Expected: no scores are published.
Source: the reference trained on PixelProse and released neither script nor weights, only the switch `--pixelprose`:
one text an image, `caption`, split at full stops. The rest is the recipe of CC12M, our choice; shards and images are
those of COSMOS, of the same authors. `python -m flair_jax.data.prepare pixelprose` writes such shards.
Another number of images asks for other steps: --config.steps=…
"""

from ml_collections import ConfigDict

from flair_jax.configs import flair_recipe


def get_config() -> ConfigDict:
    config = flair_recipe.recipe(gpus=32, images=192, epoch_steps=2_448)
    config.data.captions.fields = ("caption",)
    return config
