"""FLAIR in JAX: `flair_jax.load(path)` gives a model to use; `python -m flair_jax.main` trains and evaluates one."""

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name):
    if name == "load":  # On demand: the data workers import this package too and need no jax.
        from flair_jax.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
