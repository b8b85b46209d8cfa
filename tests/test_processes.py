"""Runs of several real processes, started as Slurm and as a TPU pod start them, equal those of one process."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import take_devices
from processes import as_slurm, free_port, one_device, wait_for
from tiny_run import ROOT, command, tiny

from flair_jax import checkpoint, distributed, metrics, train

# Half of the steps would do; so many are there that no machine is through before a signal has been seen.
OPTIONS = dict(steps=2000, save_every=4, data__packing__row_length=20, data__packing__quantile=0.01)
HEARTBEAT = 10  # seconds
SCRIPTS = ROOT / "scripts"


def as_tpu_pod(count: int, port: int) -> list[dict[str, str]]:
    """The environments of the workers of one slice under GKE. JAX_FORCE_TPU_INIT stands for the chips."""
    pod = {
        "JAX_FORCE_TPU_INIT": "1",
        "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * count),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }
    return [pod | {"TPU_WORKER_ID": str(index)} for index in range(count)]


def arguments() -> list[str]:
    overrides = {**OPTIONS, "data__workers": 0}
    return [
        "--distributed",
        f"--heartbeat_timeout={HEARTBEAT}",
        *(f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()),
    ]


class Group:
    """The processes of a run, each with a log of its own; none outlives the `with` statement."""

    def __init__(self, workdir: pathlib.Path, environments: list[dict[str, str]]):
        self.workdir = workdir
        self.logs = [workdir.with_name(f"{workdir.name}-{time.monotonic_ns()}-{n}") for n in range(len(environments))]
        self.processes = []
        for log, extra in zip(self.logs, environments, strict=True):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command(workdir, *arguments()), stdout=file, stderr=file, cwd=ROOT, env=one_device(**extra)
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, index: int) -> str:
        return self.logs[index].read_text()

    def train_until(self, step: int) -> None:
        """Waits until a step is reported."""

        def done():
            ended = [index for index, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, self.log(ended[0])[-3000:]
            return last_step(self.workdir) >= step

        assert wait_for(done, 120), self.log(0)[-3000:]

    def ends(self, index: int, seconds: float) -> int:
        """The exit status of a process that ends by itself."""
        try:
            return self.processes[index].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {index} goes on: {self.log(index)[-3000:]}") from None


def newest(workdir: pathlib.Path) -> tuple[int, int]:
    """Step of the newest checkpoint, and the number of processes that wrote it."""
    saved = checkpoint.Checkpoints(workdir, keep=None)
    step = saved.latest()
    return step, len(saved.positions(step))


def last_step(workdir: pathlib.Path) -> int:
    return max((int(line["step"]) for line in metrics.read_json_lines(workdir)), default=0)


def train_alone(workdir: pathlib.Path, until: int, monkeypatch) -> None:
    """One process, this one, with one device."""
    with monkeypatch.context() as patch:
        take_devices(patch, 1)
        patch.setattr(distributed.Signals, "stop", lambda self, step: signal.SIGTERM if step == until else 0)
        with pytest.raises(distributed.Interrupted, match=f"SIGTERM at step {until}: saved"):
            train.train(tiny(**OPTIONS), workdir)


def assert_unbroken(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """Every step is there once, with the loss of the reference."""
    lines, expected = metrics.read_json_lines(workdir), metrics.read_json_lines(reference)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in lines], [line[name] for line in expected[: len(lines)]], rtol=5e-5
        )


# ---------------------------------------------------------------------------------------------------------------------
# Scripts

FAKE = """#!/bin/bash
printf '%s\\n' "$(basename "$0") $*" >> {record}
{body}
"""
# Starts four tasks and sends one of them SIGTERM once they train: it alone hears of it, and all agree on a step.
SRUN = """
while [[ $1 == --* ]]; do shift; done
for id in 0 1 2 3; do
  SLURM_NTASKS=4 SLURM_STEP_NODELIST=localhost SLURM_PROCID=$id SLURM_LOCALID=$id "$@" > {workdir}-$id 2>&1 &
  tasks+=($!)
done
until (( $(cat {workdir}/metrics.jsonl 2>/dev/null | wc -l) >= 3 )); do
  kill -0 "${{tasks[@]}}" || break
  sleep 0.1
done
kill -TERM "${{tasks[2]}}"
for task in "${{tasks[@]}}"; do
  wait "$task"
  status=$?
  echo "$status" >> {workdir}-statuses
done
exit "$status"
"""
# A pod that is not there at first, and is taken away in its first run.
GCLOUD = """
case "$4 $*" in
  describe*) cat {folder}/state 2>/dev/null || exit 1 ;;
  create*) echo READY > {folder}/state ;;
  delete*) rm {folder}/state ;;
  scp*) tar -tzf "$5" >> {folder}/copied ;;
  ssh*flair_jax.main*)
    [[ -e {folder}/taken ]] || {{ touch {folder}/taken; echo PREEMPTED > {folder}/state; exit 255; }} ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    """Puts commands in the way of the real ones; what each was called with is in `record`."""
    record = tmp_path / "record"

    def fake(**bodies):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, body in bodies.items():
            (folder / name).write_text(FAKE.format(record=record, body=body))
            (folder / name).chmod(0o755)
        path = os.pathsep.join([str(folder), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
        return {"PATH": path}, lambda: record.read_text().splitlines()

    return fake


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.usefixtures("shared_programs")
def test_processes_may_come_go_and_die_and_change_nothing(tmp_path, fake, monkeypatch):
    """Four, one, two and again two processes train one run in turn; SIGTERM, kill -9 and a frozen machine end them.

    The first four are started by the Slurm script, which queues again when they were told to stop.
    """
    run = tmp_path / "run"
    extra, record = fake(srun=SRUN.format(workdir=run), scontrol="")
    job = str(free_port() % 2**12)
    flags = [*command(run)[3:], *arguments()[1:]]
    done = subprocess.run(
        [SCRIPTS / "slurm.sh", *flags], cwd=ROOT, env=one_device(**extra, SLURM_JOB_ID=job), timeout=180
    )
    logs = [pathlib.Path(f"{run}-{index}").read_text() for index in range(4)]
    assert done.returncode == 128 + signal.SIGTERM, logs[0][-3000:]
    assert pathlib.Path(f"{run}-statuses").read_text().split() == [str(128 + signal.SIGTERM)] * 4
    assert "4 processes" in logs[0] and all("SIGTERM at step" in log for log in logs)
    begin, requeue = record()
    assert begin.startswith("srun --kill-on-bad-exit=1 python -m flair_jax.main --distributed --config=")
    assert requeue == f"scontrol requeue {job}"
    step, writers = newest(run)
    assert step == last_step(run) and writers == 4

    train_alone(run, step + 5, monkeypatch)  # what four wrote restores in one …
    assert newest(run) == (step + 5, 1)

    with Group(run, as_tpu_pod(2, free_port())) as two:  # … and the other way round
        two.train_until(step + 11)
        two.processes[1].kill()
        assert two.ends(0, HEARTBEAT + 30) not in (0, 128 + signal.SIGTERM)
        assert "the same command goes on" in two.log(0) or "another task died" in two.log(0), two.log(0)[-3000:]
    behind, writers = newest(run)
    assert behind >= step + 6 and writers == 2

    with Group(run, as_slurm(2, free_port())) as two:
        two.train_until(last_step(run) + 3)
        two.processes[0].send_signal(signal.SIGSTOP)  # as a machine that hangs; its connections stay open
        assert two.ends(1, HEARTBEAT + 30) not in (0, 128 + signal.SIGTERM)
        assert "another task died" in two.log(1), two.log(1)[-3000:]
        assert f"going on from step {behind} " in two.log(1)

    train_alone(tmp_path / "reference", last_step(run), monkeypatch)
    assert_unbroken(run, tmp_path / "reference")


def test_slurm_script_says_how_to_go_on_after_a_crash(fake):
    extra, record = fake(srun="exit 7", scontrol="")
    done = subprocess.run(
        [SCRIPTS / "slurm.sh"], env={**os.environ, **extra, "SLURM_JOB_ID": "1"}, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 7 and "status 7; the same command goes on" in done.stderr
    assert len(record()) == 1  # a config that is wrong would fail again and again


def test_gpu_node_script_starts_one_process(fake):
    extra, record = fake(python='echo "$JAX_OPTIMIZATION_LEVEL $XLA_PYTHON_CLIENT_MEM_FRACTION"')
    done = subprocess.run(
        [SCRIPTS / "gpu_node.sh", "--config=a b"],
        env={**os.environ, **extra},
        check=True,
        capture_output=True,
        text=True,
    )
    assert record() == ["python -m flair_jax.main --config=a b"]
    assert done.stdout == "O1 .9\n"


@pytest.mark.parametrize("spot", [True, False])
def test_tpu_pod_script_makes_a_pod_and_another_when_it_is_taken_away(tmp_path, fake, spot):
    extra, record = fake(gcloud=GCLOUD.format(folder=tmp_path))
    pod = {"TPU": "flair", "ZONE": "here", "TYPE": "v5litepod-16", "VERSION": "new"} | ({} if spot else {"SPOT": ""})
    subprocess.run(
        [SCRIPTS / "tpu_pod.sh", "--config=a.py", "--config.data.shards=gs://b/{0..5}.tar"],
        cwd=ROOT,
        env={**os.environ, **extra, **pod},
        check=True,
        timeout=60,
    )
    calls = [call.removeprefix("gcloud compute tpus tpu-vm ") for call in record()]
    assert all(call.endswith("--zone here") for call in calls)
    calls = [call for call in calls if not call.startswith("describe")]
    once = ["create", "scp", "ssh", "ssh"]
    assert [call.split()[0] for call in calls] == [*once, "delete", *once]
    create = "create flair --accelerator-type v5litepod-16 --version new" + " --spot" * spot
    assert calls[0] == calls[5] == f"{create} --zone here"
    assert all("--worker=all" in call for call in calls if call.startswith(("scp", "ssh")))
    assert calls[-1].split("--command ")[1] == (
        "cd flair && .venv/bin/python -m flair_jax.main --distributed '--config=a.py' "
        "'--config.data.shards=gs://b/{0..5}.tar' --zone here"
    )
    assert "flair_jax/main.py" in (tmp_path / "copied").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Without a cluster


def test_without_a_cluster_the_variables_that_were_looked_for_are_named(monkeypatch):
    for names in distributed.CLUSTERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")  # as jax does

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="no cluster is known by the environment") as raised:
        distributed.start(HEARTBEAT)
    for words in (
        "Slurm (SLURM_JOB_ID is set, SLURM_STEP_NODELIST is not set",
        "Open MPI (OMPI_MCA_orte_hnp_uri is not set",
        "TPU_WORKER_HOSTNAMES is not set",
        "--coordinator_address=HOST:PORT --process_id=0",
    ):
        assert words in str(raised.value)


def test_an_address_by_hand_is_whole_or_refused(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    distributed.start(HEARTBEAT, "localhost:1234", 0, 2)
    timeouts = dict(heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=300)
    assert calls == [dict(coordinator_address="localhost:1234", process_id=0, num_processes=2, **timeouts)]
    with pytest.raises(ValueError, match=r"--process_id, --num_processes missing; .* are needed"):
        distributed.start(HEARTBEAT, "localhost:1234")
    with pytest.raises(ValueError, match="--coordinator_address missing"):
        distributed.start(HEARTBEAT, process_id=0, num_processes=2)
    assert len(calls) == 1


def test_processes_that_are_told_by_hand_find_one_another():
    code = (
        "import sys, jax; from flair_jax import distributed; port, me = map(int, sys.argv[1:]);"
        "distributed.start(10, f'localhost:{port}', me, 2); print(jax.process_index(), jax.process_count())"
    )
    port = str(free_port())
    processes = [
        subprocess.Popen([sys.executable, "-c", code, port, str(me)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for me in range(2)
    ]
    assert [process.communicate(timeout=300)[0] for process in processes] == ["0 2\n", "1 2\n"]
