"""Products of float32 matrices by the CPU's own library; XLA's take a third longer there (docs/speed.md)."""

import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flair_jax import JAXLIB_IS_KNOWN

TARGET = "flair_jax_sgemm"  # the product's name among XLA's custom calls
AS_IS, TRANSPOSED = 0, 1
LEAST_WORK = 2**23  # multiplications and additions in a piece, a tenth of a millisecond of one core
ALIGNED = 16  # floats in the widest register


def multiplies(*arrays: jax.Array) -> bool:
    """Whether these are for this module: float32, in a program for one CPU, with MKL and numba installed.

    XLA knows nothing of what it calls, so it could not share the work among devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    if jax.default_backend() != "cpu" or devices > 1 or mesh.manual_axes:
        return False
    return all(x.dtype == jnp.float32 and x.size for x in arrays) and register()


@functools.cache
def register() -> bool:
    """Makes the product known to XLA; False where MKL or numba is missing, or jax may have changed its ways."""
    if not JAXLIB_IS_KNOWN:
        return False
    try:
        import flair_jax.models.mkl as mkl
    except (ImportError, OSError):
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(mkl.start.ctypes), platform="cpu", api_version=1)
    return True


@jax.custom_vjp
def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(M, K) times (K, N) -> (M, N)."""
    return _multiply(x, kernel)


def _multiply(a: jax.Array, b: jax.Array, left: int = AS_IS, right: int = AS_IS) -> jax.Array:
    shape = a.shape[left == TRANSPOSED], b.shape[right == AS_IS]
    return _sgemm(a, b, shape, [_Matrices(*s, s[1]) for s in (a.shape, b.shape, shape)], left=left, right=right)


def _multiply_backward(operands, gradient):
    x, kernel = operands
    return _multiply(gradient, kernel, right=TRANSPOSED), _multiply(x, gradient, left=TRANSPOSED)


multiply.defvjp(lambda x, kernel: (_multiply(x, kernel), (x, kernel)), _multiply_backward)


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax attention: (B, T, H, D), (B, S, H, D), (B, S, H, D) -> (B, T, H, D).

    Neither way divides the (B, H, T, S) weights by their sums, or adds up what belongs to them: the results and their
    gradients are divided, and gradient times result gives the same sum (FlashAttention, arXiv:2205.14135, appendix B).

    Args:
      mask: broadcastable to (B, H, T, S), True where a query may look; None: everywhere.
    """
    return _attend(query, key, value, mask)[0]


def _attend(query, key, value, mask):
    query = query * query.shape[-1] ** -0.5
    logits = _scores(query, key)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))  # times `sums`
    sums = _other_way(jnp.sum(weights, axis=-1))
    result = _mix(weights, value) / sums
    return result, (query, key, value, mask, weights, sums, result)


def _attend_backward(saved, gradient):
    query, key, value, mask, weights, sums, result = saved
    gradient = gradient / sums
    common = _other_way(jnp.sum(gradient * result, axis=-1))
    of_logits = weights * (_scores(gradient, value) - common)
    if mask is not None:
        of_logits = jnp.where(mask, of_logits, 0)
    of_query = _mix(of_logits, key) * query.shape[-1] ** -0.5
    return of_query, _mix(of_logits, query, TRANSPOSED), _mix(weights, gradient, TRANSPOSED), None


attend.defvjp(_attend, _attend_backward)


def _other_way(x: jax.Array) -> jax.Array:
    """(B, H, T) -> (B, T, H, 1), or (B, T, H) -> (B, H, T, 1)."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Every query with every key of its head: (B, T, H, D), (B, S, H, D) -> (B, H, T, S)."""
    batch, length, heads, _ = query.shape
    shape = batch, heads, length, key.shape[1]
    matrices = [_of_heads(query.shape), _of_heads(key.shape), _of_weights(shape)]
    return _sgemm(query, key, shape, matrices, batch, heads, right=TRANSPOSED)


def _mix(weights: jax.Array, value: jax.Array, left: int = AS_IS) -> jax.Array:
    """Sums of values, weighted head by head: (B, H, T, S), (B, S, H, D) -> (B, T, H, D)."""
    batch, heads, rows, columns = weights.shape
    shape = batch, (rows if left == AS_IS else columns), heads, value.shape[-1]
    matrices = [_of_weights(weights.shape), _of_heads(value.shape), _of_heads(shape)]
    return _sgemm(weights, value, shape, matrices, batch, heads, left=left)


class _Matrices(NamedTuple):
    """The matrices in an array: their sizes, and the distance in elements from one row, example and head to the next.

    Heads are taken from where they stand, between the tokens and the channels: nothing is transposed before.
    """

    rows: int
    columns: int
    row: int
    example: int = 0
    head: int = 0


def _of_heads(shape: tuple[int, ...]) -> _Matrices:
    """(B, T, H, D): a matrix (T, D) for each example and head."""
    _, length, heads, width = shape
    return _Matrices(length, width, heads * width, length * heads * width, width)


def _of_weights(shape: tuple[int, ...]) -> _Matrices:
    """(B, H, T, S): a matrix (T, S) for each example and head."""
    _, heads, rows, columns = shape
    return _Matrices(rows, columns, columns, heads * rows * columns, rows * columns)


def _sgemm(a, b, shape, matrices, examples=1, heads=1, *, left=AS_IS, right=AS_IS) -> jax.Array:
    """One product for each example and head; `matrices` of `a`, of `b` and of the result, which has this shape."""
    of_a, _, of_result = matrices
    between = of_a.columns if left == AS_IS else of_a.rows
    rows, columns, number = of_result.rows, of_result.columns, examples * heads
    product = [left, right, rows, columns, between, number, heads]
    product += [distance for m in matrices for distance in (m.row, m.example, m.head)]
    pieces = [
        (several.start, several.stop, high.start, len(high), wide.start, len(wide))
        for several, high, wide in _cut(number, rows, columns, between)
    ]
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(a, b, pieces=np.array(pieces).ravel(), product=np.array(product))


def _cut(matrices: int, rows: int, columns: int, between: int) -> Iterator[tuple[range, range, range]]:
    """Pieces for XLA's threads, two for each so that none waits long at the end: their matrices, rows and columns."""
    wanted = max(1, min(2 * len(os.sched_getaffinity(0)), matrices * rows * columns * between // LEAST_WORK))
    several, high, wide = wanted if matrices > 1 else 1, 1, 1
    while several * high * wide < wanted:  # nearly square: each piece packs its parts of the operands anew
        if rows * wide > columns * high:
            high *= 2
        else:
            wide *= 2
    return itertools.product(_parts(matrices, several), _parts(rows, high, ALIGNED), _parts(columns, wide, ALIGNED))


def _parts(length: int, count: int, multiple: int = 1) -> list[range]:
    """At most so many parts of one length, which is a multiple of this one; the last may be shorter."""
    step = multiple * math.ceil(length / count / multiple)
    return [range(start, min(start + step, length)) for start in range(0, length, step)]
