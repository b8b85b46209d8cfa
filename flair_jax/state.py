"""The state of a training run, and its creation with its shardings."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flair_jax import sharding
from flair_jax.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: int32 scalar, steps done.
      params: nested dict, float32.
      opt_state: of the optimizer.
      ema: average of the parameters over the steps, see `optimizer.average`; None: the run keeps none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def weights(self) -> Any:
        """The parameters to evaluate and to use: the average where there is one."""
        return self.params if self.ema is None else self.ema

    def start_from(self, params: Any) -> "TrainState":
        """The state with other parameters (a tree of arrays), where the average begins too; same shardings."""
        params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, self.params))
        # A copy: the step donates both, and a buffer that is given away twice crashes.
        return self.replace(params=params, ema=None if self.ema is None else jax.tree.map(jnp.copy, params))


def init_params(model: nn.Module, seed: int) -> Any:
    """Fresh parameters; the same on any mesh."""
    height, width = model.image_size
    images, tokens = jnp.zeros((1, height, width, 3)), jnp.zeros((1, 1), jnp.int32)
    return model.init(jax.random.key(seed), images, tokens)["params"]


def create(model: nn.Module, optimizer: Optimizer, mesh: Mesh, seed: int, *, ema: bool = False) -> TrainState:
    """A new state, with an average if `ema`, each array created on its own devices: none is ever whole on one."""

    def build():
        params = init_params(model, seed)
        average = params if ema else None
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), ema=average)

    shardings = sharding.state_sharding(mesh, jax.eval_shape(build))
    return jax.jit(build, out_shardings=shardings)()
