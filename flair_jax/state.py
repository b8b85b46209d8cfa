"""What a training step changes, and its creation on the devices where it will live."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flair_jax import sharding


@flax.struct.dataclass
class TrainState:
    """`step`: int32 scalar, steps done. `params`: nested dict, float32. `opt_state`: of the optax transformation."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_params(model: nn.Module, seed: int) -> Any:
    """Fresh parameters; the same on any mesh."""
    height, width = model.image_size
    images, tokens = jnp.zeros((1, height, width, 3)), jnp.zeros((1, 1), jnp.int32)
    return model.init(jax.random.key(seed), images, tokens)["params"]


def create(model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A new state, each array born on its own devices: nothing is ever whole on one."""

    def build():
        params = init_params(model, seed)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))

    shardings = sharding.state_sharding(mesh, jax.eval_shape(build))
    return jax.jit(build, out_shardings=shardings)()
