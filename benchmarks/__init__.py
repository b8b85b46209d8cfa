"""Figures of speed and memory, each beside what it is compared with: `python -m benchmarks.train`, from the repository.

`train`, `encode`, `score`, `data` and `loss` print their figures and write them with `--json FILE`; `quality` compares
training with the reference's, and `gpu_check` measures everything that needs a GPU in nine minutes.
"""
