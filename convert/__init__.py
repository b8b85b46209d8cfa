"""Weights between PyTorch and Flax: `names` translates, `torch_files` and `flax_files` read and write."""
