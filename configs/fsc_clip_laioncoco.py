"""FSC-CLIP: CLIP fine-tuned for compositionality on 100,000 pairs of LAION-COCO.

    python -m flair_jax.data.prepare captioned --images laioncoco --output laion --prefix laion --resize 256
    python -m flair_jax.data.prepare annotate --shards laion      # parses for the negatives, see data/README.md
    python -m flair_jax.main --config fsc_clip_laioncoco --workdir RUN \
        --config.init_from=ViT-B-32.pt --config.data.shards=laion

After a colon another run: `fsc_clip_laioncoco:lora`, `:vit_b16`, `:vit_b16_lora`, `:vit_l14`, `:vit_l14_lora` (OpenAI's
weights); `:datacomp`, `:datacomp_lora` (open_clip's `datacomp_xl_s13b_b90k` of ViT-B/32, exact GELU); and
the baselines `:clip`, no negatives, and `:negclip`, NegCLIP's loss with its own kind of negatives.

Hardware: the reference used one Quadro RTX 8000 of 48 GB for an hour, and 4 GPUs with 64 images each for ViT-L/14,
which `reference_world_size` of the objectives reproduces on any hardware.
Length: 5 epochs, about 1,955 steps of 256 images (ViT-B/16: of 128).
Expected, mean of the eleven compositional benchmarks, of 21 zero-shot classifications, and R@1 of three retrieval sets
image→text and text→image, in % (fsc_targets.json has each benchmark, to full precision):

    run            Comp   ZS     I2T    T2I
    full           53.46  55.33  58.18  55.50
    lora           54.20  55.91  57.27  54.32
    vit_b16        54.27  57.00  60.08  59.42
    vit_b16_lora   54.61  57.22  59.88  58.71
    vit_l14        55.25  63.96  64.93  64.94
    vit_l14_lora   56.21  62.18  64.22  63.70
    datacomp       52.93  61.12  56.84  53.79
    datacomp_lora  54.01  60.69  56.83  53.07
    negclip        53.5   54.1   52.3   54.1   (the paper's)

OpenAI's ViT-B/32 before any of it: 46.1, 57.1, 60.0, 45.8. Not yet trained with this code.
"""

from ml_collections import ConfigDict

from flair_jax.configs import fsc_clip_recipe


def get_config(run: str = "full") -> ConfigDict:
    """The config of a run; see `fsc_clip_recipe.RUNS`."""
    return fsc_clip_recipe.run_of("laioncoco", run, fields=("caption",))
