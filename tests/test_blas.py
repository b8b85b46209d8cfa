"""MKL's products in the place of XLA's: the same numbers and gradients, and only where they are safe."""

import ctypes
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden, nhwc

from flair_jax import sharding
from flair_jax.models import blas, layers
from flair_jax.models.text import Text

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="Intel publishes MKL for Linux on x86-64"
)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def mesh(devices: int):
    return jax.set_mesh(sharding.create_mesh(devices=jax.devices()[:devices]))


def calls(function, *operands) -> int:
    """Products of MKL's in the compiled function."""
    return jax.jit(function).lower(*operands).compile().as_text().count(f'custom_call_target="{blas.TARGET}"')


def value_and_gradients(product):
    """Of a number that depends on every element of the product, and differently."""

    def number(*operands):
        result = product(*operands)
        return jnp.sum(jnp.sin(result) * jnp.arange(result.size).reshape(result.shape))

    return jax.value_and_grad(number, argnums=(0, 1))


def attend(attention):
    """Attention of either kind as a product of two: values are made of keys; the mask leaves a query nothing to see."""

    def product(query, key):
        mask = jnp.arange(query.shape[1])[:, None] > jnp.arange(key.shape[1])
        return attention(query, key, jnp.sin(3 * key), mask)

    return product


def plain_attend(query, key, value, mask):
    """By XLA, as long as the mesh has several devices or there is none."""
    return layers.attend(query, key, value, mask=mask)


@pytest.mark.parametrize(
    "ours, plain, shapes",
    [
        (blas.multiply, jnp.matmul, [(7, 5), (5, 3)]),
        (blas.multiply, jnp.matmul, [(1, 5), (5, 1)]),
        (blas.multiply, jnp.matmul, [(130, 64), (64, 257)]),
        (attend(blas.attend), attend(plain_attend), [(3, 7, 4, 6), (3, 9, 4, 6)]),
        (attend(blas.attend), attend(plain_attend), [(1, 7, 1, 6), (1, 5, 1, 6)]),
    ],
)
def test_products_and_gradients_are_xla_s(ours, plain, shapes):
    operands = arrays(*shapes)
    with mesh(1):
        assert blas.multiplies(*operands)
        assert calls(value_and_gradients(ours), *operands) == (3 if ours is blas.multiply else 6)
        value, gradients = jax.jit(value_and_gradients(ours))(*operands)
    expected, expected_gradients = jax.jit(value_and_gradients(plain))(*operands)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-3)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "ours, plain, shapes",
    [
        (blas.multiply, jnp.matmul, [(150, 33), (33, 70)]),
        (blas.multiply, jnp.matmul, [(70, 33), (33, 150)]),
        (attend(blas.attend), attend(plain_attend), [(3, 37, 4, 6), (3, 29, 4, 6)]),
        (attend(blas.attend), attend(plain_attend), [(1, 37, 1, 36), (1, 59, 1, 36)]),
    ],
)
def test_products_in_pieces_are_the_whole_ones(ours, plain, shapes, threads, monkeypatch):
    """And so are their gradients, in a program that does one after the other and in one that may do all at once."""
    monkeypatch.setattr(blas, "LEAST_WORK", 1)
    monkeypatch.setattr(blas.os, "sched_getaffinity", lambda process: range(threads))
    many = [arrays(*shapes, seed=seed) for seed in range(20)]
    stacked = [jnp.stack(operands) for operands in zip(*many, strict=True)]

    def in_turns(product):
        return jax.lax.scan(lambda carry, operands: (carry, value_and_gradients(product)(*operands)), 0, stacked)[1]

    def at_once(product):
        results = [value_and_gradients(product)(*operands) for operands in many]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    expected = jax.tree.leaves(jax.jit(at_once, static_argnums=0)(plain))
    for program in in_turns, at_once:
        with mesh(1):
            results = jax.tree.leaves(jax.jit(program, static_argnums=0)(ours))
        for result, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("zeros", [1, 20, 150])
@pytest.mark.parametrize("least_work", [1, 2**23])
def test_rows_of_zeros_at_the_end_are_left_out(zeros, least_work, monkeypatch):
    """Also negative ones. A kernel that is not a number shows which rows were multiplied."""
    monkeypatch.setattr(blas, "LEAST_WORK", least_work)
    x, kernel, gradient = arrays((150, 33), (33, 70), (150, 70))
    zero = jnp.arange(150) >= 150 - zeros
    x, gradient = (jnp.where(zero[:, None], jnp.where(a > 0, 0.0, -0.0), a) for a in (x, gradient))
    with mesh(1):
        result, backward = jax.vjp(jax.jit(blas.multiply), x, kernel)
        of_x, of_kernel = backward(gradient)
        of_nan = jax.jit(blas.multiply)(x, jnp.full_like(kernel, jnp.nan))
        no_more = jax.vjp(jax.jit(blas.multiply), jnp.where(zero[:, None], jnp.nan, x), kernel)[1](gradient)[1]
    np.testing.assert_allclose(result, x @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_x, gradient @ kernel.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_kernel, x.T @ gradient, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.isnan(of_nan).any(axis=1), ~zero)
    np.testing.assert_allclose(no_more, of_kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1576, 3072, 768), (1, 768, 100, 1576), (96, 197, 64, 197), (1, 1, 1, 1)])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_pieces_cover_the_product_once_and_are_worth_a_thread(sizes, threads, monkeypatch):
    monkeypatch.setattr(blas.os, "sched_getaffinity", lambda process: range(threads))
    matrices, rows, columns, between = sizes
    covered = np.zeros((matrices, rows, columns), np.int8)
    pieces = list(blas._cut(*sizes))
    for several, high, wide in pieces:
        covered[several.start : several.stop, high.start : high.stop, wide.start : wide.stop] += 1
    assert (covered == 1).all()
    work = matrices * rows * columns * between
    assert len(pieces) >= min(2 * threads, work // blas.LEAST_WORK) / 2
    assert len(pieces) == 1 or work / len(pieces) > blas.LEAST_WORK / 2


def test_under_vmap_each_gets_its_product():
    x, kernel = arrays((3, 7, 5), (3, 5, 2))
    with mesh(1):
        result = jax.jit(jax.vmap(blas.multiply))(x, kernel)
    np.testing.assert_allclose(result, x @ kernel, rtol=1e-5, atol=1e-5)


def test_the_model_is_the_original_s(tiny_model, tiny_params):
    inputs, expected = load_golden("tiny_inputs.npz"), load_golden("tiny_outputs.npz")

    def encode(params, images, tokens):
        image = tiny_model.apply({"params": params}, images, method="encode_image")
        return (
            image.pooled,
            image.local,
            tiny_model.apply({"params": params}, Text.padded(tokens), method="encode_text"),
        )

    operands = tiny_params, nhwc(inputs["images"]), inputs["tokens"]
    with mesh(1):
        assert calls(encode, *operands) >= 2 * 3 * 6  # towers, blocks, four dense layers and attention's two products
        pooled, local, text = jax.jit(encode)(*operands)
    np.testing.assert_allclose(pooled, expected["image_global"], atol=1e-5)
    np.testing.assert_allclose(local, expected["image_local"], atol=1e-5)
    np.testing.assert_allclose(text.pooled, expected["text_global"], atol=1e-5)


def test_other_programs_keep_xla_s_products():
    x, kernel = arrays((8, 5), (5, 3))
    with mesh(1):
        assert calls(layers.project, x, kernel) == 1
        assert calls(layers.project, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == 0
        assert calls(layers.project, x[:0], kernel) == 0
    with mesh(2):
        assert calls(layers.project, x, kernel) == 0
    assert calls(layers.project, x, kernel) == 0  # no mesh, eight devices


@pytest.mark.parametrize("missing", ["mkl", "intel-openmp"])
def test_without_the_library_xla_multiplies(missing, monkeypatch):
    files = importlib.metadata.files
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [] if name == missing else files(name))
    monkeypatch.delitem(sys.modules, "flair_jax.models.mkl", raising=False)
    assert not blas.register.__wrapped__()


def test_without_numba_xla_multiplies(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "flair_jax.models.mkl", raising=False)
    assert not blas.register.__wrapped__()


def test_the_interface_is_the_header_s():
    """What the machine code takes from XLA's table of functions stands where this jaxlib has it."""
    mkl = importlib.import_module("flair_jax.models.mkl")
    header = (pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    assert tuple(int(re.search(rf"XLA_FFI_API_{name} (\d+)", header)[1]) for name in ("MAJOR", "MINOR")) == mkl.VERSION
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);", header)
    before = mkl._API.names.index("create_error")
    for ours, theirs in {
        "create_error": "Error_Create",
        "destroy_error": "Error_Destroy",
        "schedule": "ThreadPool_Schedule",
        "create_future": "Future_Create",
        "set_available": "Future_SetAvailable",
    }.items():
        assert mkl._API.names.index(ours) == before + functions.index(theirs)


@pytest.mark.parametrize("accepted", [0, 1, 4])
def test_pieces_that_the_pool_refuses_are_done_at_once(accepted):
    """A call as XLA makes it, whose pool of threads takes so many of the four pieces, and does them afterwards."""
    mkl = importlib.import_module("flair_jax.models.mkl")
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    taken, events, kept = [], [], []

    def at(address, record):
        return np.frombuffer((ctypes.c_char * record.itemsize).from_address(address), record)[0]

    def create_future(address):
        at(address, mkl._OF_FUTURE)["future"] = 77
        return 0

    def schedule(address):
        if len(taken) == accepted:
            return 99  # the address of an error
        task = at(address, mkl._OF_TASK)
        taken.append((int(task["function"]), int(task["data"])))
        return 0

    def destroy_error(address):
        events.append(("error", int(at(address, mkl._OF_ERROR)["error"])))
        return 0

    def set_available(address):
        events.append(("available", int(at(address, mkl._OF_FUTURE)["future"])))
        return 0

    def place(record, **fields) -> int:
        kept.append(np.zeros((), record))
        for name, value in fields.items():
            kept[-1][name] = value
        return kept[-1].ctypes.data

    def pointers(addresses) -> int:
        kept.append(np.array(addresses, np.int64))
        return kept[-1].ctypes.data

    table = {}
    for called in (create_future, schedule, destroy_error, set_available):
        kept.append(function(called))
        table[called.__name__] = ctypes.cast(kept[-1], ctypes.c_void_p).value
    rng = np.random.default_rng(0)
    a, b, c = rng.random((64, 48), np.float32), rng.random((48, 32), np.float32), np.full((64, 32), np.nan, np.float32)
    pieces = np.array([(0, 1, row, 16, 0, 32) for row in range(0, 64, 16)])
    product = np.array([blas.AS_IS, blas.AS_IS, 64, 32, 48, 1, 1, 48, 0, 0, 32, 0, 0, 32, 0, 0])
    of_a, of_b, of_c = (place(mkl._BUFFER, data=x.ctypes.data) for x in (a, b, c))
    attributes = [place(mkl._ARRAY, count=x.size, data=x.ctypes.data) for x in (pieces, product)]
    frame = np.zeros((), mkl._FRAME)
    frame["api"] = place(mkl._API, **table)
    frame["arguments"]["items"], frame["results"]["items"] = pointers([of_a, of_b]), pointers([of_c])
    frame["attributes"]["items"] = pointers(attributes)

    assert function(mkl.start.address)(frame.ctypes.data) == 0
    assert frame["future"] == 77
    for run, data in taken:
        assert ("available", 77) not in events
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(run)(data)
    assert events == [("error", 99)] * (4 - accepted) + [("available", 77)]
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)


def test_a_compiled_program_is_found_again_and_runs(tmp_path):
    code = """
import jax, jax.numpy as jnp
from flair_jax.models import layers
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.monitoring.register_event_listener(lambda name, **_: print(name) if "cache_hits" in name else None)
print(jax.jit(layers.project)(jnp.ones((300, 400)), jnp.full((400, 200), 2.0)).sum())
"""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    first, second = (subprocess.run(run, env=environment, check=True, text=True, capture_output=True) for _ in "12")
    assert "cache_hits" not in first.stdout and "cache_hits" in second.stdout
    assert float(first.stdout.split()[-1]) == float(second.stdout.split()[-1]) == 300 * 200 * 800
    assert "UTF-8" not in first.stderr  # what the call is told must be text, or it cannot be kept
