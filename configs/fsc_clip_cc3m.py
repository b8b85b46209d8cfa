"""FSC-CLIP: CLIP fine-tuned for compositionality on 100,000 pairs of CC3M, with captions of CoCa.

    python -m flair_jax.data.prepare captioned --images cc3m --partner json --caption-key coca_captions \
        --text-folder cc3m/coca_captions --output cc3m-coca --resize 256
    python -m flair_jax.data.prepare annotate --shards cc3m-coca --fields coca_captions    # parses for the negatives
    python -m flair_jax.main --config fsc_clip_cc3m --workdir RUN \
        --config.init_from=ViT-B-32.pt --config.data.shards=cc3m-coca

After a colon another run: `fsc_clip_cc3m:lora`, and the baseline `fsc_clip_cc3m:clip`, no negatives.

Hardware: the reference used one Quadro RTX 8000 of 48 GB for an hour.
Length: 5 epochs, about 1,955 steps of 256 images.
Expected, mean of the eleven compositional benchmarks, of 21 zero-shot classifications, and R@1 of three retrieval sets
image→text and text→image, in %, as in `fsc_clip_laioncoco.py`:

    run   Comp   ZS     I2T    T2I
    full  53.15  53.27  55.63  54.85
    lora  53.77  53.58  56.32  53.99

The paper's table has 53.2, 53.5, 55.8, 54.6 and 53.9, 53.6, 56.1, 54.0 for them. Not yet trained with this code.
"""

from ml_collections import ConfigDict

from flair_jax.configs import fsc_clip_recipe


def get_config(run: str = "full") -> ConfigDict:
    """The config of a run; see `fsc_clip_recipe.RUNS`."""
    return fsc_clip_recipe.run_of("cc3m", run, fields=("coca_captions",))
