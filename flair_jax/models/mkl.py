"""Lends XLA the matrix product of Intel's MKL: a function in machine code, made by numba, that calls it."""

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Sequence

import jax
import numpy as np

from flair_jax import JAXLIB_IS_KNOWN

TARGET = "flair_jax_sgemm"  # its name among XLA's custom calls
ROW_MAJOR, AS_IS, TRANSPOSED = 101, 111, 112  # cblas.h
FLOAT = 4  # bytes
DIGITS = 8  # of seven bits, of a number in `encode`


@functools.cache
def register() -> bool:
    """Makes the product known to XLA; False where MKL or numba is missing, or jax may have changed its ways.

    The custom call takes `encode` of these: left, right, m, n, k, examples, heads, and of either operand and of the
    result the distances from one row, example and head to the next.
    """
    if not JAXLIB_IS_KNOWN:
        return False
    try:
        import numba
        from numba import types

        library = _load()
    except (ImportError, OSError):
        return False
    size, number, address = ctypes.c_int, ctypes.c_float, ctypes.c_ssize_t
    one, many = library.cblas_sgemm, library.cblas_sgemm_batch
    one.argtypes = [*[size] * 6, number, *[address, size] * 2, number, address, size]
    many.argtypes = [size, *[ctypes.c_void_p] * 13, size, ctypes.c_void_p]
    one.restype = many.restype = None

    addresses, text = types.CPointer(types.intp), types.CPointer(types.uint8)

    @numba.cfunc(types.void(types.intp, addresses, text, types.intp, types.intp))
    def call(result, operands, text, length, status):
        numbers = np.zeros(length // DIGITS, np.int64)
        for i in range(length):
            numbers[i // DIGITS] |= np.int64(text[i]) << 7 * (i % DIGITS)
        left, right, m, n, k = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
        examples, heads = numbers[5], numbers[6]
        row_a, row_b, row_c = numbers[7], numbers[10], numbers[13]
        if examples * heads == 1:
            one(ROW_MAJOR, left, right, m, n, k, 1, operands[0], row_a, operands[1], row_b, 0, result, row_c)
            return
        a, b, c = np.empty((3, examples * heads), np.intp)  # where each matrix begins
        for i in range(examples * heads):
            example, head = i // heads, i % heads
            a[i] = operands[0] + FLOAT * (example * numbers[8] + head * numbers[9])
            b[i] = operands[1] + FLOAT * (example * numbers[11] + head * numbers[12])
            c[i] = result + FLOAT * (example * numbers[14] + head * numbers[15])
        ints = np.array([left, right, m, n, k, row_a, row_b, row_c, examples * heads], np.int32)
        shape = ints[0:].ctypes, ints[1:].ctypes, ints[2:].ctypes, ints[3:].ctypes, ints[4:].ctypes
        rows, alpha_beta = (ints[5:].ctypes, ints[6:].ctypes, ints[7:].ctypes), np.array([1, 0], np.float32)
        alpha, beta = alpha_beta[0:].ctypes, alpha_beta[1:].ctypes
        many(
            ROW_MAJOR, *shape, alpha, a.ctypes, rows[0], b.ctypes, rows[1], beta, c.ctypes, rows[2], 1, ints[8:].ctypes
        )

    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(call.ctypes), platform="cpu", api_version=0)
    register.call = call  # the machine code lives as long as this object
    return True


def encode(numbers: Sequence[int]) -> bytes:
    """Numbers below 2**56 as text that is ASCII, which is what XLA can keep in a file."""
    return bytes(number >> 7 * i & 127 for number in numbers for i in range(DIGITS))


def _load() -> ctypes.CDLL:
    """MKL from where pip puts it, which is no folder that the system looks in.

    Its threads wait asleep: XLA's need the cores between two products.
    """
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    for distribution, name in (("intel-openmp", "libiomp5.so"), ("mkl", "libmkl_rt.so")):
        files = importlib.metadata.files(distribution) or []
        found = [file.locate() for file in files if file.name.startswith(name)]
        if not found:
            raise ImportError(f"{distribution} has no {name}")
        library = ctypes.CDLL(str(found[0]))
    return library
