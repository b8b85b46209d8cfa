"""Errors of files that hold weights."""


class WeightsFileError(ValueError):
    """The file does not hold tensors by name: damaged, of another format, or with other things in it."""


class UnsafeFileError(WeightsFileError):
    """The file carries code or foreign objects, or is made to exhaust memory. None of it was run."""
