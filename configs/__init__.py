"""Experiment configurations: plain `ml_collections` functions without logic and without jax."""
