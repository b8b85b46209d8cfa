"""FSC-CLIP: CLIP fine-tuned for compositionality on COCO, the pairs of NegCLIP's training file.

    python -m flair_jax.data.prepare negclip --images coco/images --captions train_neg_clip.tsv --output negclip \
        --resize 256
    python -m flair_jax.data.prepare annotate --shards negclip    # parses for the negatives, see data/README.md
    python -m flair_jax.main --config fsc_clip_coco --workdir RUN \
        --config.init_from=ViT-B-32.pt --config.data.shards=negclip

NegCLIP's file has several captions an image, which here are one sample: one of them is drawn in each epoch.

After a colon another run: `fsc_clip_coco:lora`, and the baseline `fsc_clip_coco:clip`, no negatives.

Hardware: the reference used one Quadro RTX 8000 of 48 GB for an hour.
Length: 5 epochs of steps of 256 images.
Expected, mean of the eleven compositional benchmarks, of 21 zero-shot classifications, and R@1 of three retrieval sets
image→text and text→image, in %, as in `fsc_clip_laioncoco.py`:

    run   Comp   ZS     I2T    T2I
    full  54.15  55.68  66.26  58.32
    lora  53.60  55.50  65.23  57.18

Not yet trained with this code.
"""

from ml_collections import ConfigDict

from flair_jax.configs import fsc_clip_recipe


def get_config(run: str = "full") -> ConfigDict:
    """The config of a run; see `fsc_clip_recipe.RUNS`."""
    return fsc_clip_recipe.run_of("coco", run, fields=("caption",))
