#!/usr/bin/env bash
# One run on A100 nodes under Slurm. From the root of the repository, in an environment with flair_jax[cuda]:
#
#   sbatch --nodes=4 scripts/slurm.sh --config configs/flair_cc3m.py --workdir /shared/run --config.data.workers=7
#
# One process a GPU, as jax expects it of Slurm: each takes the GPU of its SLURM_LOCALID out of those of the node, so the
# tasks must see them all (no --gpus-per-task, no binding), and each reads its own share of the data.
# Two minutes before the time is up Slurm sends SIGTERM: the run saves and the job queues again. After any other end
# submit the same command again; it goes on from the newest checkpoint.
#SBATCH --job-name=flair
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=a100:8
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# O1 lets communication run behind computation; .9 leaves a tenth of the memory to NCCL and cuDNN.
export JAX_OPTIMIZATION_LEVEL=O1 XLA_PYTHON_CLIENT_MEM_FRACTION=.9

status=0
srun --kill-on-bad-exit=1 python -m flair_jax.main --distributed "$@" || status=$?
case $status in
  0) ;;
  143) scontrol requeue "$SLURM_JOB_ID" ;; # SIGTERM: all is saved
  *) echo "the run ended with status $status; the same command goes on from its newest checkpoint" >&2 ;;
esac
exit "$status"
