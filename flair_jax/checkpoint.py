"""Everything a run needs to go on, saved and restored together."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from flair_jax import lora
from flair_jax.config import normalize
from flair_jax.lora import LoraOptions
from flair_jax.state import TrainState

PARAMS, EMA, BASE, OPTIMIZER, POSITIONS, CONFIG = "params", "ema", "base", "optimizer", "positions", "config"
EVALUATIONS = "evaluations"


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class RestoreError(ValueError):
    """A checkpoint that cannot be read, or holds something else."""


class Checkpoints:
    """The checkpoints of a work directory, one folder per step, `WORKDIR/checkpoints/STEP`.

    A save writes to a temporary folder in the background and renames it when it is whole, so that a kill at any moment
    leaves the previous checkpoint in place. Parameters are an item of their own, and so are their average, which only
    runs with `ema_decay` have, and what low-rank changes are of, which only runs with `lora` have: using a model does
    not read its optimiser, and a run goes on without the file that it started from.

    Args:
      workdir: any path that `etils.epath` opens.
      keep: how many of the newest stay; None keeps all.
      keep_every: those of steps that are multiples of this stay for ever; None: of no step.
      clean: remove what killed saves have left over; for the run that writes here alone.
    """

    def __init__(
        self, workdir: epath.PathLike, keep: int | None = 2, keep_every: int | None = None, clean: bool = False
    ):
        self.folder = epath.Path(workdir).absolute() / "checkpoints"
        staying = [LatestN(keep)] + ([EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(staying), cleanup_tmp_directories=clean, create=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(
        self,
        state: TrainState,
        positions: list[Mapping[str, Any]],
        config: Mapping[str, Any],
        evaluations: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        """Saves the state, the data position of every process and the config; nothing if this step is saved already.

        Returns once the arrays are copied; they are written in the background.

        Args:
          evaluations: of a run with `early_stopping`, see `EarlyStopping.evaluations`.

        Raises:
          SaveError: this save or the one before could not be written.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        items = {
            PARAMS: ocp.args.StandardSave(state.params),
            OPTIMIZER: ocp.args.StandardSave(state.opt_state),
            POSITIONS: ocp.args.JsonSave(list(positions)),
            CONFIG: ocp.args.JsonSave(dict(config)),
        }
        if state.ema is not None:
            items[EMA] = ocp.args.StandardSave(state.ema)
        if state.base is not None:
            items[BASE] = ocp.args.StandardSave(state.base)
        if evaluations is not None:
            items[EVALUATIONS] = ocp.args.JsonSave([list(pair) for pair in evaluations])
        with self._explained():
            if not self.manager.save(step, args=ocp.args.Composite(**items)):
                raise OSError(f"step {step} is not saved after a checkpoint of step {self.latest()}")

    def check(self) -> None:
        """Raises SaveError if the last save has failed by now; does not wait."""
        # The manager's own `check_for_errors` stays silent: its thread that ends a save has taken the error by then.
        if not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises SaveError if it could not be written."""
        with self._explained():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            whole = max(ocp.utils.checkpoint_steps(self.folder), default=None)
            before = "no checkpoint is there yet" if whole is None else f"checkpoint {whole} is whole and stays"
            raise SaveError(
                f"a checkpoint could not be written to {self.folder}; {before}. If the disk is full, make room or "
                f"lower config.keep; the same command goes on from there. The cause: {error}"
            ) from error

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, placed as `like` is. Raises RestoreError."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {
            PARAMS: ocp.args.StandardRestore(abstract.params),
            OPTIMIZER: ocp.args.StandardRestore(abstract.opt_state),
        }
        if like.ema is not None:
            items[EMA] = ocp.args.StandardRestore(abstract.ema)
        if like.base is not None:
            items[BASE] = ocp.args.StandardRestore(abstract.base)
        saved = self._restore(step, **items)
        number = jax.device_put(np.int32(step), like.step.sharding)
        items = dict(params=saved[PARAMS], opt_state=saved[OPTIMIZER], ema=saved.get(EMA), base=saved.get(BASE))
        return like.replace(step=number, **items)

    def positions(self, step: int) -> list[dict[str, Any]]:
        """The data positions at that step, one for each process that wrote it."""
        return self._json(step, POSITIONS)

    def config(self, step: int) -> dict[str, Any]:
        """The config of the run that wrote the checkpoint, see `config.normalize`."""
        return normalize(self._json(step, CONFIG))

    def evaluations(self, step: int) -> list[tuple[int, float]]:
        """What `save` was given at that step; empty: nothing."""
        there = (self.folder / str(step) / EVALUATIONS).exists()
        return [(number, value) for number, value in self._json(step, EVALUATIONS)] if there else []

    def _json(self, step: int, item: str) -> Any:
        return self._restore(step, **{item: ocp.args.JsonRestore()})[item]

    def weights(self, step: int, like: Any, *, lora_scale: float = 1.0) -> Any:
        """`TrainState.weights` alone, placed as `like`, a tree of `jax.ShapeDtypeStruct`.

        Args:
          lora_scale: of a run with `lora`, what both matrices of all pairs are multiplied by, see `lora.scale`.
        """
        item = EMA if (self.folder / str(step) / EMA).exists() else PARAMS
        section = self.config(step).get("lora")
        if section is None:
            return self._arrays(step, item, like)
        options = LoraOptions.of(section)
        where = jax.tree.leaves(like)[0].sharding  # pairs are small: as the first one is placed, and not split
        pairs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(lambda: lora.init(like, options, 0)),
        )
        pairs = lora.scale(self._arrays(step, item, pairs), lora_scale)
        return lora.merge_jit(self._arrays(step, BASE, like), pairs, options)

    def _arrays(self, step: int, item: str, like: Any) -> Any:
        return self._restore(step, **{item: ocp.args.StandardRestore(like)})[item]

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and its stores raise a dozen types
            others = [other for other in self.manager.all_steps() if other != step]
            raise RestoreError(
                f"{', '.join(items)} of checkpoint {self.folder / str(step)} cannot be read: {error!s:.1000}. If its "
                f"files are damaged, remove that folder; the other checkpoints are {others}"
            ) from error

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads that write."""
        try:
            self.wait()
        finally:
            self.manager.close()
