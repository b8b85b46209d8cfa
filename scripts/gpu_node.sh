#!/usr/bin/env bash
# One run on all GPUs of one machine; CUDA_VISIBLE_DEVICES chooses among them:
#
#   scripts/gpu_node.sh --config configs/flair_cc3m.py --workdir runs/cc3m --config.data.workers=32
#
# One process drives all GPUs. The program is the same as with a process a GPU, and there is no peer to find, to wait for
# or to lose. Where one process cannot feed them (`data_wait_share` in metrics.jsonl), scripts/slurm.sh on one node gives
# each GPU a reader of its own.
# Ctrl-C and SIGTERM save before the run stops; the same command goes on from the newest checkpoint.
set -euo pipefail

# O1 lets communication run behind computation; .9 leaves a tenth of the memory to NCCL and cuDNN.
export JAX_OPTIMIZATION_LEVEL=O1 XLA_PYTHON_CLIENT_MEM_FRACTION=.9
exec python -m flair_jax.main "$@"
