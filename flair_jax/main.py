"""Trains or evaluates.

    python -m flair_jax.main --config scenes --workdir /path/to/run
    python -m flair_jax.main --config my_config.py --workdir gs://bucket/run --config.batch_size=512
    python -m flair_jax.main --config scenes --workdir /path/to/run --mode evaluate

`--config` takes a path or the name of a shipped config. Running the same command again goes on from the newest
checkpoint of the work directory.
"""

import shlex
import sys

from absl import app, flags, logging

from flair_jax import config as configuration
from flair_jax.data.counted import counted

# jax is imported in `main`: grain's worker processes import this file again.

_CONFIG = flags.DEFINE_string(
    "config", None, "The experiment: a path, or the name of a shipped config; --config.KEY=VALUE changes a key."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, numbers, pictures and the report.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Start jax.distributed from the environment of Slurm, a TPU pod or Open MPI, or as told."
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where no cluster tells it.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0; with --coordinator_address.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes; with --coordinator_address.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 60, "Seconds without a sign of life after which a process is dead and the others end.", 1
)
REPORT_LINES = 150

flags.mark_flags_as_required(["config", "workdir"])


def main(arguments: list[str]) -> None:
    try:
        config = configuration.read(_CONFIG.value, arguments[1:])
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    workdir = configuration.normalize(_WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # jax names every backend that is absent, orbax every file that it writes
    import jax
    from etils import epath

    from flair_jax import compilation, distributed, evaluate, train

    by_hand = _ADDRESS.value, _PROCESS.value, _PROCESSES.value
    if _DISTRIBUTED.value:
        try:
            distributed.start(_HEARTBEAT.value, *by_hand)
        except ValueError as error:
            raise app.UsageError(str(error)) from error
    elif any(value is not None for value in by_hand):
        raise app.UsageError("--coordinator_address, --process_id and --num_processes need --distributed")
    compilation.use_cache(epath.Path(workdir) / "compiled")
    if jax.process_index() == 0:
        processes = counted(jax.process_count(), "process", "processes")
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {processes}")
        if jax.process_count() > 1:
            print(f"if a process dies, the others end within {_HEARTBEAT.value} s, and the same command goes on")
        for key, value in configuration.flatten(config).items():
            print(f"config.{key} = {value!r}")
        sys.stdout.flush()
    if jax.process_index() == 0 and _MODE.value == "train":
        path = epath.Path(workdir) / "command.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(shlex.join(["python", "-m", "flair_jax.main", *sys.argv[1:]]) + "\n")
    try:
        results = (train.train if _MODE.value == "train" else evaluate.evaluate)(config, workdir)
    except distributed.Interrupted as stop:
        logging.warning("%s", stop)
        sys.exit(128 + stop.number)
    except Exception:
        if jax.process_count() == 1:
            raise
        distributed.fail()
    if jax.process_index() == 0:
        if results:
            print((epath.Path(workdir) / "report.md").read_text())
        print(f"report and pictures: {workdir}" if results else f"nothing was evaluated; checkpoints: {workdir}")
    if _MODE.value == "evaluate" and not results:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_known_flags)
