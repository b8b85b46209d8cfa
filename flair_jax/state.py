"""The state of a training run, and its creation with its shardings."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flair_jax import lora as low_rank
from flair_jax import sharding
from flair_jax.lora import LoraOptions
from flair_jax.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: int32 scalar, steps done.
      params: what is trained, nested dict, float32: the parameters of the model, or low-rank changes of `base`.
      opt_state: of the optimizer.
      ema: average of `params` over the steps, see `optimizer.average`; None: the run keeps none.
      base: parameters of the model that are not trained, where `params` are low-rank changes of them; else None.
      lora: how these were made; None where there are none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None
    base: Any = None
    lora: LoraOptions | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def trained(self) -> Any:
        """What is trained, as it is to be used: the average where there is one."""
        return self.params if self.ema is None else self.ema

    @property
    def weights(self) -> Any:
        """The parameters of the model to evaluate and to use: the average where there is one."""
        trained = self.trained
        if self.base is None:
            return trained
        return low_rank.merge_jit(self.base, trained, self.lora)

    @property
    def model_params(self) -> Any:
        """The parameters of the model as the run was started with them, or as they are trained."""
        return self.params if self.base is None else self.base

    def merged(self, trained: Any) -> Any:
        """The parameters of the model for some values of `params`."""
        return trained if self.base is None else low_rank.merge(self.base, trained, self.lora)

    def start_from(self, params: Any) -> "TrainState":
        """The state with other parameters of the model (a tree of arrays), where the average begins too; same
        shardings. Low-rank changes stay as they are."""
        params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, self.model_params))
        if self.base is not None:
            return self.replace(base=params)
        # A copy: the step donates both, and a buffer that is given away twice crashes.
        return self.replace(params=params, ema=None if self.ema is None else jax.tree.map(jnp.copy, params))


def init_params(model: nn.Module, seed: int) -> Any:
    """Fresh parameters; the same on any mesh."""
    height, width = model.image_size
    images, tokens = jnp.zeros((1, height, width, 3)), jnp.zeros((1, 1), jnp.int32)
    return model.init(jax.random.key(seed), images, tokens)["params"]


def create(
    model: nn.Module,
    optimizer: Optimizer,
    mesh: Mesh,
    seed: int,
    *,
    ema: bool = False,
    lora: Mapping[str, Any] | None = None,
) -> TrainState:
    """A new state, each array created on its own devices: none is ever whole on one.

    Args:
      ema: keep an average.
      lora: the `lora` section of a config, options of `LoraOptions`; None: the parameters themselves are trained.

    Raises:
      ValueError: an option or a pattern of `lora` or of the optimizer does not fit.
    """
    options = None if lora is None else LoraOptions.of(lora)

    def build():
        params, base = init_params(model, seed), None
        if options is not None:
            params, base = low_rank.init(params, options, seed), params
        opt_state = optimizer.init(params, base)
        average = params if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average, base, options)

    shardings = sharding.state_sharding(mesh, jax.eval_shape(build))
    return jax.jit(build, out_shardings=shardings)()
