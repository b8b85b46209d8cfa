"""Figures of speed and memory, each beside what it is to beat and in the same run: `python -m flair_jax.benchmark X`.

One module a benchmark, whose `measure` returns the figures by name; the command line is `__main__`.
"""
