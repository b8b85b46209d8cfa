"""The matrix product of Intel's MKL as XLA calls it, in machine code that numba makes; importing this needs them both.

A product is done in pieces, each by one of the threads that XLA has for the rest of the program, and XLA goes on with
what does not wait for it. Threads of MKL's own would fight for the cores with XLA's.

`start.ctypes` is a handler of XLA's typed interface. It takes two matrices, or arrays of them, and gives the result;
its attributes `pieces` and `product` are arrays of int64, a `PIECE` for each piece and one `PRODUCT`. Of one matrix,
rows of zeros at the end of an operand are left out, as the gradients of a batch's empty rows of texts are.
"""

import ctypes
import importlib.metadata

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROW_MAJOR, AS_IS = 101, 111  # cblas.h; a transposed operand is one more
FLOAT, WORD = 4, 8  # bytes
MAGNITUDE = np.int32(0x7FFFFFFF)  # bits of a float beside its sign: without them it is a zero


def _record(names: str, **inner: np.dtype) -> np.dtype:
    """Of numbers or addresses of eight bytes, or of what `inner` says."""
    return np.dtype([(name, inner.get(name, np.int64)) for name in names.split()], align=True)


# Either operand is transposed or not (1, 0); (m, k) times (k, n); then distances in elements from one to the next.
_DISTANCES = "row_a example_a head_a row_b example_b head_b row_c example_c head_c"
PRODUCT = _record(f"left right m n k matrices heads {_DISTANCES}")
PIECE = _record("first last row rows column columns")  # matrices from the first to before the last

# Records of XLA's interface, `jax.ffi.include_dir()`/xla/ffi/api/c_api.h, as far as they are needed here.
VERSION = 0, 3  # for which they hold
_LIST = _record("size extension count types items")
_ATTRIBUTES = _record("size extension count types names items")
_FRAME = _record(
    "size extension api context stage arguments results attributes future",
    arguments=_LIST,
    results=_LIST,
    attributes=_ATTRIBUTES,
)
_EXTENSION = _record("size kind next metadata", kind=np.dtype(np.int32))
_METADATA_KIND = 1
_METADATA = _record("size version_size extension major minor", major=np.dtype(np.int32), minor=np.dtype(np.int32))
_API = _record(
    "size extension version_size version_extension version internal create_error get_message destroy_error register"
    " get_stream register_type get_context set_state get_state allocate free schedule count_threads create_future"
    " set_available"
)
_BUFFER = _record("size extension dtype data")
_ARRAY = _record("dtype count data")
_OF_FUTURE = _record("size extension future")  # what creates it takes the same as what ends it
_OF_ERROR = _record("size extension error")
_OF_TASK = _record("size extension context function data")

# What is kept of a call until its pieces are done: this, and a task for each. Rows of the result beyond `m` are zeros.
_CALL = _record("remaining set_available of_future product a b c m k", of_future=_OF_FUTURE)
_TASK = _record("call piece schedule of_error", schedule=_OF_TASK, of_error=_OF_ERROR)
# What the machine code must know as plain numbers.
_PIECE_SIZE, _CALL_SIZE, _TASK_SIZE = PIECE.itemsize, _CALL.itemsize, _TASK.itemsize
_OF_FUTURE_SIZE, _OF_ERROR_SIZE, _OF_TASK_SIZE = _OF_FUTURE.itemsize, _OF_ERROR.itemsize, _OF_TASK.itemsize
_OF_FUTURE_IN_CALL = _CALL.fields["of_future"][1]
_SCHEDULE_IN_TASK, _OF_ERROR_IN_TASK = _TASK.fields["schedule"][1], _TASK.fields["of_error"][1]


def _load() -> ctypes.CDLL:
    """MKL from where pip puts it, which is no folder that the system looks in."""
    for distribution, name in (("intel-openmp", "libiomp5.so"), ("mkl", "libmkl_rt.so")):
        files = importlib.metadata.files(distribution) or []
        found = [file.locate() for file in files if file.name.startswith(name)]
        if not found:
            raise ImportError(f"{distribution} has no {name}")
        library = ctypes.CDLL(str(found[0]))
    return library


def _function(library: ctypes.CDLL, name: str, result, *arguments):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


_int, _float, _address = ctypes.c_int, ctypes.c_float, ctypes.c_ssize_t
_mkl, _c = _load(), ctypes.CDLL(None)
_matrix = _address, _int
_sgemm = _function(_mkl, "cblas_sgemm", None, *[_int] * 6, _float, *_matrix, *_matrix, _float, *_matrix)
_use_threads = _function(_mkl, "MKL_Set_Num_Threads_Local", _int, _int)
_allocate, _free = _function(_c, "malloc", _address, _address), _function(_c, "free", None, _address)
_word = ir.IntType(8 * WORD)


@intrinsic
def _pointer(_, address):
    def build(context, builder, _, operands):
        return builder.inttoptr(*operands, context.get_value_type(types.voidptr))

    return types.voidptr(address), build


@intrinsic
def _call(_, function, argument):
    """What a function of C returns that is known only by its address."""

    def build(context, builder, _, operands):
        function = ir.FunctionType(_word, [_word]).as_pointer()
        return builder.call(builder.inttoptr(operands[0], function), [operands[1]])

    return types.int64(function, argument), build


@intrinsic
def _decrement(_, address):
    """What the number there was before, whoever else takes one from it at the same time."""

    def build(context, builder, _, operands):
        return builder.atomic_rmw("sub", builder.inttoptr(*operands, _word.as_pointer()), _word(1), "acq_rel")

    return types.int64(address), build


def _reader(record: np.dtype):
    """The function that gives the record at an address."""
    return numba.njit(lambda address: numba.carray(_pointer(address), 1, record)[0])


_product_at, _piece_at, _call_at, _task_at = map(_reader, (PRODUCT, PIECE, _CALL, _TASK))
_frame_at, _extension_at, _metadata_at, _api_at = map(_reader, (_FRAME, _EXTENSION, _METADATA, _API))
_buffer_at, _array_at = map(_reader, (_BUFFER, _ARRAY))


@numba.njit
def _item(items, index):
    return numba.carray(_pointer(items), index + 1, np.int64)[index]


@numba.njit
def _bits(address, count):
    """Of so many floats."""
    return numba.carray(_pointer(address), count, np.int32)


@numba.njit
def _without_zeros(address, rows, columns, distance):
    """How many rows there are up to the last that is not zeros."""
    while rows > 0:
        found = np.int32(0)
        for bits in _bits(address + FLOAT * (rows - 1) * distance, columns):
            found |= bits & MAGNITUDE
        if found != 0:
            break
        rows -= 1
    return rows


@numba.njit
def _leave_out_zeros(call):
    product = _product_at(call.product)
    call.m, call.k = product.m, product.k
    if product.matrices > 1:
        return
    if product.left:
        call.k = _without_zeros(call.a, call.k, product.m, product.row_a)
    else:
        call.m = _without_zeros(call.a, call.m, product.k, product.row_a)
    if not product.right:
        call.k = _without_zeros(call.b, call.k, product.n, product.row_b)
    if call.k == 0:
        call.m = 0


@numba.njit
def _multiply(task):
    """The piece that this task is, on this thread alone."""
    call, piece = _call_at(task.call), _piece_at(task.piece)
    product = _product_at(call.product)
    m = max(0, min(piece.rows, call.m - piece.row))
    a = call.a + FLOAT * piece.row * (1 if product.left else product.row_a)
    b = call.b + FLOAT * piece.column * (product.row_b if product.right else 1)
    c = call.c + FLOAT * (piece.row * product.row_c + piece.column)
    left, right, n, k = AS_IS + product.left, AS_IS + product.right, piece.columns, call.k
    threads = _use_threads(1)
    for i in range(piece.first, piece.last):
        example, head = i // product.heads, i % product.heads
        of_a = a + FLOAT * (example * product.example_a + head * product.head_a)
        of_b = b + FLOAT * (example * product.example_b + head * product.head_b)
        of_c = c + FLOAT * (example * product.example_c + head * product.head_c)
        if m > 0:
            _sgemm(ROW_MAJOR, left, right, m, n, k, 1, of_a, product.row_a, of_b, product.row_b, 0, of_c, product.row_c)
        for row in range(m, piece.rows):
            _bits(of_c + FLOAT * row * product.row_c, n)[:] = 0
    _use_threads(threads)


@numba.cfunc(types.void(types.int64))
def _run(address):
    task = _task_at(address)
    _multiply(task)
    shared = task.call
    if _decrement(shared) == 1:  # the last piece of all
        _call(_call_at(shared).set_available, shared + _OF_FUTURE_IN_CALL)
        _free(shared)


_RUN = _run.address


@numba.cfunc(types.int64(types.int64))
def start(address):
    """Begins the product that this call frame asks for; an address of XLA's error, or 0."""
    frame = _frame_at(address)
    if frame.extension and _extension_at(frame.extension).kind == _METADATA_KIND:  # when it is registered
        metadata = _metadata_at(_extension_at(frame.extension).metadata)
        metadata.major, metadata.minor = VERSION
        return 0
    api = _api_at(frame.api)
    pieces, product = _array_at(_item(frame.attributes.items, 0)), _array_at(_item(frame.attributes.items, 1))
    count = pieces.count * WORD // _PIECE_SIZE
    shared = _allocate(_CALL_SIZE + count * _TASK_SIZE)
    call = _call_at(shared)
    call.product = product.data
    call.a = _buffer_at(_item(frame.arguments.items, 0)).data
    call.b = _buffer_at(_item(frame.arguments.items, 1)).data
    call.c = _buffer_at(_item(frame.results.items, 0)).data
    _leave_out_zeros(call)
    for i in range(count):
        task = _task_at(shared + _CALL_SIZE + i * _TASK_SIZE)
        task.call, task.piece = shared, pieces.data + i * _PIECE_SIZE
    if count == 1:
        _multiply(_task_at(shared + _CALL_SIZE))
        _free(shared)
        return 0
    call.remaining, call.set_available = count, api.set_available
    call.of_future.size, call.of_future.extension = _OF_FUTURE_SIZE, 0
    error = _call(api.create_future, shared + _OF_FUTURE_IN_CALL)
    if error:
        _free(shared)
        return error
    frame.future = call.of_future.future
    for i in range(count):
        of_task = shared + _CALL_SIZE + i * _TASK_SIZE
        task = _task_at(of_task)
        task.schedule.size, task.schedule.extension, task.schedule.context = _OF_TASK_SIZE, 0, frame.context
        task.schedule.function, task.schedule.data = _RUN, of_task
        error = _call(api.schedule, of_task + _SCHEDULE_IN_TASK)
        if error:  # no threads: this one does it
            task.of_error.size, task.of_error.extension, task.of_error.error = _OF_ERROR_SIZE, 0, error
            _call(api.destroy_error, of_task + _OF_ERROR_IN_TASK)
            _call(_RUN, of_task)
    return 0
