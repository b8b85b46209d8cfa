"""Lends XLA the matrix product of Intel's MKL: functions in machine code, made by numba, that call it.

A product is done in pieces, each by one of the threads that XLA has for the rest of the program, and XLA goes on with
what does not wait for it. Threads of MKL's own would fight for the cores with XLA's.
"""

import ctypes
import functools
import importlib.metadata

import jax
import numpy as np

from flair_jax import JAXLIB_IS_KNOWN

TARGET = "flair_jax_sgemm"  # its name among XLA's custom calls
ROW_MAJOR, AS_IS, TRANSPOSED = 101, 111, 112  # cblas.h
FLOAT, WORD = 4, 8  # bytes

# XLA's interface for such calls, `jax.ffi.include_dir()`/xla/ffi/api/c_api.h: places of words in its records.
VERSION = 0 | 3 << 32  # major, minor
EXTENSION, API, CONTEXT, ARGUMENTS, RESULTS, ATTRIBUTES, FUTURE = 1, 2, 3, 9, 14, 20, 21  # XLA_FFI_CallFrame
KIND, METADATA, METADATA_KIND, METADATA_VERSION = 1, 3, 1, 3  # XLA_FFI_Metadata_Extension, XLA_FFI_Metadata
DESTROY_ERROR, SCHEDULE, CREATE_FUTURE, SET_AVAILABLE = 8, 17, 19, 20  # XLA_FFI_Api
BUFFER_DATA, ARRAY_SIZE, ARRAY_DATA = 3, 1, 2  # XLA_FFI_Buffer, XLA_FFI_Array

PIECE = 6  # numbers that tell of a piece
TASK = 11  # words that are kept of each piece until all are done, and as many for all together
MAGNITUDE = np.int32(0x7FFFFFFF)  # bits of a float beside its sign: without them it is a zero


@functools.cache
def register() -> bool:
    """Makes the product known to XLA; False where MKL or numba is missing, or jax may have changed its ways.

    The custom call takes two matrices, or arrays of them, and gives the result. Its attributes are arrays of int64:
      product: left, right, m, n, k, examples times heads, heads, and of either operand and of the result the distances
        in elements from one row, example and head to the next.
      pieces: for each piece its first matrix and the one after its last, its first row and how many, and its first
        column and how many.

    Of one matrix, rows of zeros at the end of an operand are left out, as the gradients of a batch's empty rows of
    texts are.
    """
    if not JAXLIB_IS_KNOWN:
        return False
    try:
        import numba
        from llvmlite import ir
        from numba import types
        from numba.extending import intrinsic

        library = _load()
    except (ImportError, OSError):
        return False
    size, number, address = ctypes.c_int, ctypes.c_float, ctypes.c_ssize_t
    sgemm, use_threads = library.cblas_sgemm, library.MKL_Set_Num_Threads_Local
    sgemm.argtypes = [*[size] * 6, number, *[address, size] * 2, number, address, size]
    sgemm.restype = None
    use_threads.argtypes, use_threads.restype = [size], size
    allocate, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    allocate.argtypes, allocate.restype = [address], address
    free.argtypes, free.restype = [address], None
    word = ir.IntType(8 * WORD)

    @intrinsic
    def words(_, address):  # what lies there
        pointer = types.CPointer(types.int64)
        return pointer(address), lambda context, builder, _, operands: builder.inttoptr(*operands, word.as_pointer())

    @intrinsic
    def call(_, function, argument):  # a function of C that is known only by its address
        def build(context, builder, _, operands):
            function = ir.FunctionType(word, [word]).as_pointer()
            return builder.call(builder.inttoptr(operands[0], function), [operands[1]])

        return types.int64(function, argument), build

    @intrinsic
    def decrement(_, address):  # the number that lies there, whoever else does so at the same time; what it was before
        def build(context, builder, _, operands):
            return builder.atomic_rmw("sub", builder.inttoptr(*operands, word.as_pointer()), word(1), "acq_rel")

        return types.int64(address), build

    @intrinsic
    def floats(_, address):  # their bits
        pointer = types.CPointer(types.int32)
        bits = ir.IntType(8 * FLOAT).as_pointer()
        return pointer(address), lambda context, builder, _, operands: builder.inttoptr(*operands, bits)

    @numba.njit(types.int64(types.int64, types.int64, types.int64, types.int64))
    def without_zeros(address, rows, columns, distance):  # how many rows there are up to the last that is not zeros
        while rows > 0:
            row, bits = floats(address + FLOAT * (rows - 1) * distance), np.int32(0)
            for i in range(columns):
                bits |= row[i] & MAGNITUDE
            if bits != 0:
                break
            rows -= 1
        return rows

    @numba.njit
    def count_used(address, a, b):  # rows of the result that are not zeros, and how much there is to add up in them
        product = words(address)
        left, right, m, n, k = product[0], product[1], product[2], product[3], product[4]
        used_m, used_k = m, k
        if product[5] == 1:
            if left == AS_IS:
                used_m = without_zeros(a, m, k, product[7])
            else:
                used_k = without_zeros(a, k, m, product[7])
            if right == AS_IS:
                used_k = without_zeros(b, used_k, n, product[10])
        return (used_m if used_k > 0 else 0), used_k

    @numba.njit(types.void(types.int64))
    def multiply(address):
        task = words(address)
        product, piece, a, b, c, shared = words(task[0]), words(task[1]), task[2], task[3], task[4], words(task[5])
        left, right, heads = product[0], product[1], product[6]
        row_a, row_b, row_c = product[7], product[10], product[13]
        row, column, n = piece[2], piece[4], piece[5]
        m, k = max(0, min(piece[3], shared[5] - row)), shared[6]
        a += FLOAT * row * (row_a if left == AS_IS else 1)
        b += FLOAT * column * (1 if right == AS_IS else row_b)
        c += FLOAT * (row * row_c + column)
        threads = use_threads(1)
        for i in range(piece[0], piece[1]):
            example, head = i // heads, i % heads
            of_a = a + FLOAT * (example * product[8] + head * product[9])
            of_b = b + FLOAT * (example * product[11] + head * product[12])
            of_c = c + FLOAT * (example * product[14] + head * product[15])
            if m > 0:
                sgemm(ROW_MAJOR, left, right, m, n, k, 1, of_a, row_a, of_b, row_b, 0, of_c, row_c)
            for zeros in range(m, piece[3]):
                result = floats(of_c + FLOAT * zeros * row_c)
                for j in range(n):
                    result[j] = 0
        use_threads(threads)

    @numba.cfunc(types.void(types.int64))
    def run(address):
        multiply(address)
        shared = words(address)[5]
        if decrement(shared) == 1:  # the last piece of all
            call(words(shared)[1], shared + 2 * WORD)
            free(shared)

    run_address = run.address

    @numba.cfunc(types.int64(types.int64))
    def start(address):
        frame = words(address)
        if frame[EXTENSION] and words(frame[EXTENSION])[KIND] & 0xFFFFFFFF == METADATA_KIND:  # when it is registered
            words(words(frame[EXTENSION])[METADATA])[METADATA_VERSION] = VERSION
            return 0
        api, operands, results = words(frame[API]), words(frame[ARGUMENTS]), words(frame[RESULTS])
        attributes = words(frame[ATTRIBUTES])  # in the order of their names
        pieces, product = words(attributes[0]), words(attributes[1])
        count = pieces[ARRAY_SIZE] // PIECE
        a, b, c = words(operands[0])[BUFFER_DATA], words(operands[1])[BUFFER_DATA], words(results[0])[BUFFER_DATA]
        shared = allocate((count + 1) * TASK * WORD)
        head = words(shared)
        head[5], head[6] = count_used(product[ARRAY_DATA], a, b)
        for i in range(count):
            task = words(shared + (i + 1) * TASK * WORD)
            task[0], task[1] = product[ARRAY_DATA], pieces[ARRAY_DATA] + i * PIECE * WORD
            task[2], task[3], task[4], task[5] = a, b, c, shared
        if count == 1:
            multiply(shared + TASK * WORD)
            free(shared)
            return 0
        head[0], head[1] = count, api[SET_AVAILABLE]
        head[2], head[3] = 3 * WORD, 0  # what creates the future takes the same record as what ends it
        error = call(api[CREATE_FUTURE], shared + 2 * WORD)
        if error:
            free(shared)
            return error
        frame[FUTURE] = head[4]
        for i in range(count):
            address = shared + (i + 1) * TASK * WORD
            task = words(address)
            task[6], task[7], task[8], task[9], task[10] = 5 * WORD, 0, frame[CONTEXT], run_address, address
            error = call(api[SCHEDULE], address + 6 * WORD)
            if error:  # no threads: this one does it
                task[6], task[8] = 3 * WORD, error
                call(api[DESTROY_ERROR], address + 6 * WORD)
                call(run_address, address)
        return 0

    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(start.ctypes), platform="cpu", api_version=1)
    register.functions = start, run  # the machine code lives as long as these objects
    return True


def _load() -> ctypes.CDLL:
    """MKL from where pip puts it, which is no folder that the system looks in."""
    for distribution, name in (("intel-openmp", "libiomp5.so"), ("mkl", "libmkl_rt.so")):
        files = importlib.metadata.files(distribution) or []
        found = [file.locate() for file in files if file.name.startswith(name)]
        if not found:
            raise ImportError(f"{distribution} has no {name}")
        library = ctypes.CDLL(str(found[0]))
    return library
