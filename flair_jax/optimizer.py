"""AdamW with rules by parameter name: decay, learning-rate scale, freezing, clamping; its schedule; and the average."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

RULE_KEYS = {"decay", "lr_scale", "frozen"}


def schedule(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    first_learning_rate: float | None = None,
    last_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up, then a half cosine.

    Args:
      learning_rate: the highest.
      warmup_steps, total_steps: of the run; the cosine would end one step after the last.
      first_learning_rate: of step 0; the last step of the warm-up and the one after it both have the highest, as GRAIN
        has it. None: step t has (t + 1) / warmup_steps of the highest, as OpenCLIP's `cosine_lr`.
      last_learning_rate: that the cosine ends at.
    """

    def rate(step):
        if first_learning_rate is None:
            warm = learning_rate * ((step + 1) / max(warmup_steps, 1))
        else:
            rise = (learning_rate - first_learning_rate) / max(warmup_steps - 1, 1)
            warm = first_learning_rate + rise * step
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return jnp.where(step < warmup_steps, warm, last_learning_rate + (learning_rate - last_learning_rate) * cosine)

    return rate


def path_of(keys: Sequence[Any]) -> str:
    """The name of a parameter in rules, such as "vision/blocks_0/attention/qkv/kernel"."""
    return "/".join(key.key for key in keys)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What holds for which parameters.

    Attributes:
      rules: (pattern, values) pairs. A pattern is a regular expression for the whole name of a parameter, such as
        "vision/.*"; of the rules whose pattern matches and that give a value, the first one counts. Values: `decay`,
        whether weight decay applies, by default to all parameters with two axes or more (matrices and embeddings, as
        OpenCLIP has it); `lr_scale`, a factor of the learning rate, 1 by default; `frozen`, False by default.
      clamp: (pattern, lowest, highest): the bounds of parameters after each step.
    """

    rules: Sequence[tuple[str, Mapping[str, Any]]] = ()
    clamp: Sequence[tuple[str, float, float]] = ()

    def __post_init__(self):
        for kind, length, form in (("rules", 2, "(pattern, values)"), ("clamp", 3, "(pattern, lowest, highest)")):
            for rule in getattr(self, kind):
                if not isinstance(rule, list | tuple) or len(rule) != length or not isinstance(rule[0], str):
                    raise ValueError(f"config.optimizer.{kind} has {rule!r}; expected entries {form}, a list of them")
                try:
                    re.compile(rule[0])
                except re.error as error:
                    raise ValueError(
                        f"config.optimizer.{kind}: {rule[0]!r} is no regular expression: {error}"
                    ) from error
        for pattern, lowest, highest in self.clamp:
            if not lowest <= highest:
                raise ValueError(f"config.optimizer.clamp: {pattern!r} has the bounds {lowest} and {highest}")
        for pattern, values in self.rules:
            if not isinstance(values, Mapping):
                raise ValueError(f"config.optimizer.rules: {pattern!r} has {values!r}; expected {sorted(RULE_KEYS)}")
            if unknown := set(values) - RULE_KEYS:
                raise ValueError(
                    f"config.optimizer.rules: {pattern!r} has {sorted(unknown)}; there are {sorted(RULE_KEYS)}"
                )

    def check(self, params: Any, base: Any = None) -> None:
        """Raises ValueError if a pattern matches no parameter: it is misspelled, or the model lacks the part.

        Args:
          params: what is trained.
          base: parameters that stay as they are, and so within their bounds: `clamp` may name them.
        """
        trained, fixed = ([path_of(keys) for keys, _ in jax.tree.leaves_with_path(tree)] for tree in (params, base))
        for kind, names in (("rules", trained), ("clamp", trained + fixed)):
            for pattern, *_ in getattr(self, kind):
                if not any(re.fullmatch(pattern, name) for name in names):
                    some = ", ".join(sorted({name.split("/")[0] for name in names}))
                    raise ValueError(
                        f"config.optimizer.{kind}: {pattern!r} matches no parameter; their names begin with {some}"
                    )

    def _tree(self, params: Any, key: str, default) -> Any:
        def value(keys, leaf):
            name = path_of(keys)
            matching = (values[key] for pattern, values in self.rules if key in values and re.fullmatch(pattern, name))
            return next(matching, default(leaf))

        return jax.tree_util.tree_map_with_path(value, params)

    def decay(self, params: Any) -> Any:
        """Whether weight decay applies, a tree of bool."""
        return self._tree(params, "decay", lambda leaf: leaf.ndim >= 2)

    def lr_scale(self, params: Any) -> Any:
        """Factor of the learning rate, a tree of float."""
        return self._tree(params, "lr_scale", lambda _: 1.0)

    def frozen(self, params: Any) -> Any:
        """Which parameters are not trained, a tree of bool."""
        return self._tree(params, "frozen", lambda _: False)

    def stop_frozen(self, params: Any) -> Any:
        """The parameters, those that are not trained as constants: their gradients are zero and cost nothing."""
        return jax.tree.map(lambda x, frozen: jax.lax.stop_gradient(x) if frozen else x, params, self.frozen(params))

    def clamped(self, params: Any) -> Any:
        """The parameters within their bounds."""

        def bounded(keys, leaf):
            for pattern, lowest, highest in self.clamp:
                if re.fullmatch(pattern, path_of(keys)):
                    leaf = jnp.clip(leaf, lowest, highest)
            return leaf

        return jax.tree_util.tree_map_with_path(bounded, params) if self.clamp else params


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and the rules that it was made with.

    Attributes:
      tx: gradients -> updates; it holds no state for frozen parameters.
      rules: see `Rules`.
    """

    tx: optax.GradientTransformation
    rules: Rules = Rules()

    def init(self, params: Any, base: Any = None) -> Any:
        """The optimizer's state for some parameters; `base` and raises ValueError as `Rules.check`."""
        self.rules.check(params, base)
        return self.tx.init(params)

    def update(self, params: Any, grads: Any, opt_state: Any) -> tuple[Any, Any]:
        """One step: the new parameters, within their bounds, and the new state."""
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return self.rules.clamped(optax.apply_updates(params, updates)), opt_state


def create(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    first_learning_rate: float | None = None,
    last_learning_rate: float = 0.0,
    rules: Sequence[tuple[str, Mapping[str, Any]]] = (),
    clamp: Sequence[tuple[str, float, float]] = (),
) -> Optimizer:
    """The optimizer of a config's `optimizer` section.

    Args:
      learning_rate: at the end of the warm-up.
      warmup_steps, total_steps, first_learning_rate, last_learning_rate: see `schedule`.
      weight_decay: times the learning rate, as in PyTorch's AdamW.
      b1, b2, eps: of Adam.
      clip_norm: largest global norm of the gradient; None: no clipping.
      rules, clamp: see `Rules`.
    """
    by_name = Rules(tuple(rules), tuple(clamp))
    rate = schedule(learning_rate, warmup_steps, total_steps, first_learning_rate, last_learning_rate)
    tx = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=by_name.decay)
    if any("lr_scale" in values for _, values in by_name.rules):
        tx = optax.chain(tx, _scale_by(by_name.lr_scale))
    if any("frozen" in values for _, values in by_name.rules):

        def labels(params):
            return jax.tree.map(lambda frozen: "frozen" if frozen else "trained", by_name.frozen(params))

        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    # The state has the same structure either way: clipping may be switched on when a run goes on.
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return Optimizer(optax.chain(clip, tx), by_name)


def _scale_by(scales) -> optax.GradientTransformation:
    """Multiplies each update by a factor of its own; `scales(params)` gives them."""

    def update(updates, state, params):
        return jax.tree.map(lambda update, scale: update * scale, updates, scales(params)), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average of the parameters after one more step.

    It begins at the first parameters and forgets them soon: the decay of step t, counted from 0, is
    min(decay, (1 + t) / (10 + t)), the rule of TensorFlow's `ExponentialMovingAverage(num_updates=t)`.

    Args:
      ema, params: the average so far, and the parameters after the step.
      step: int32 scalar, t.
      decay: in the long run; it averages over about 1 / (1 - decay) steps.
    """
    return optax.incremental_update(params, ema, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))
