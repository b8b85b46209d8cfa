"""Trains or evaluates.

    python -m flair_jax.main --config configs/scenes.py --workdir /path/to/run
    python -m flair_jax.main --config configs/flair_cc3m.py --workdir gs://bucket/run --config.batch_size=512
    python -m flair_jax.main --config configs/scenes.py --workdir /path/to/run --mode evaluate

Running the same command again goes on from the newest checkpoint of the work directory.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

# Heavy modules are imported in `main`: grain's worker processes import this file again.

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, numbers, pictures and the report.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Start jax.distributed from the environment of Slurm, a TPU pod or Open MPI."
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 60, "Seconds without a sign of life after which a process is dead and the others end."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    logging.set_verbosity(logging.WARNING)  # jax names every backend that is absent, orbax every file that it writes
    import jax
    from etils import epath

    from flair_jax import compilation, cpu, distributed, evaluate, train

    if _DISTRIBUTED.value:
        distributed.start(_HEARTBEAT.value)
    cpu.configure()
    compilation.use_cache(epath.Path(_WORKDIR.value) / "compiled")
    if jax.process_index() == 0:
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes")
        if jax.process_count() > 1:
            print(f"if a process dies, the others end within {_HEARTBEAT.value} s, and the same command goes on")
        print(_CONFIG.value, flush=True)
    config = _CONFIG.value.to_dict()
    try:
        (train.train if _MODE.value == "train" else evaluate.evaluate)(config, _WORKDIR.value)
    except distributed.Interrupted as stop:
        logging.warning("%s", stop)
        sys.exit(128 + stop.number)
    except Exception:
        if jax.process_count() == 1:
            raise
        distributed.fail()
    if jax.process_index() == 0:
        print((epath.Path(_WORKDIR.value) / "report.md").read_text())
        print(f"report and pictures: {_WORKDIR.value}")


if __name__ == "__main__":
    app.run(main)
