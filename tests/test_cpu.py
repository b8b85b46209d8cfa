"""What only a CPU backend needs."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from flair_jax import cpu
from flair_jax.models import vision


def test_a_kept_heap_takes_no_more_pages(tmp_path):
    """What one step gave back serves the next: the system hands out no new memory."""
    code = """
import resource, sys
import numpy as np
from flair_jax import cpu
if sys.argv[1] == "kept":
    cpu.keep_heap()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24, np.float32)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""

    def run(how):
        return int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True).stdout)

    assert run("kept") < 100 < run("given back")


def test_a_step_on_a_cpu_is_done_before_the_next_one_starts():
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: jnp.tanh(y @ y), x))
    x = jnp.eye(512)
    chain(x).block_until_ready()
    result = chain(x)
    cpu.finish({"loss": result})
    assert result.is_ready()


def test_the_residual_stream_is_added_up_once():
    """On a CPU: no kernel of the gradient reads the branches of all blocks; see `cpu.settle`."""

    def most_operands(depth):
        tower = vision.VisionTower(image_size=32, patch_size=16, width=64, depth=depth, heads=2)
        images = jnp.ones((2, 32, 32, 3))
        params = tower.init(jax.random.key(0), images)
        gradient = jax.jit(jax.grad(lambda params: jnp.square(tower.apply(params, images)).mean()))
        options = {"xla_backend_optimization_level": 3}  # the tests' own is 0
        program = gradient.lower(params).compile(compiler_options=options).as_text()
        kernels = re.findall(r"fusion\((.*?)\), kind=", program)
        assert kernels
        return max(operands.count("%") for operands in kernels)

    assert most_operands(depth=5) <= most_operands(depth=3)


def test_settled_is_equal():
    x = jnp.array([1.5, jnp.nan, jnp.inf, -0.0])
    np.testing.assert_array_equal(cpu.settle(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (cpu.settle(x) * jnp.arange(3)).sum())(jnp.ones(3)), range(3))
