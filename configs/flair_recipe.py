"""What the trainings of FLAIR have in common; each run's file says what differs.

Source: the reference's scripts `train_*_slurm.sh` at commit 0f9ce05: AdamW at 5e-4 with 2,000 steps of warm-up, betas
0.9 and 0.98, 32 epochs, up to three sentences a caption, seed 0, no clipping; all of that stands in `base.py`.

The length of a run follows the reference's loader: its epoch is ceil(samples / batch) steps, rounded up to a multiple
of its 48 loader processes, which repeat a few samples for that. Here 32 such epochs are a little more than 32 passes.
"""

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import base


def recipe(gpus: int, images: int, epoch_steps: int) -> ConfigDict:
    """The config of a run of 32 epochs.

    Args:
      gpus: of the reference. Each draws its negatives among its own images: they are the loss's blocks.
      images: a GPU.
      epoch_steps: see above.
    """
    config = base.get_config()
    config.batch_size = gpus * images
    config.objectives.text_conditioned.block_size = images
    config.steps = 32 * epoch_steps
    config.model.dtype = "bfloat16"  # the reference: float16 with a gradient scaler
    config.data.workers = 48  # a process, as in the reference
    config.data.packing.row_length = 80  # the same loss with a third of the text tower's work
    config.evaluators.val = ConfigDict(
        dict(kind="shards", shards=config_dict.placeholder(str), modes=("flair",), topk=128)
    )
    return config
