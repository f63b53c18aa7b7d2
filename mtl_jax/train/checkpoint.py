"""Checkpoints: training state and data position together, written by Orbax."""

from pathlib import Path

import grain
import orbax.checkpoint as ocp
from grain import checkpoint as grain_checkpoint

from mtl_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one run, saved in the background.

    Args:
      directory: Folder that holds them; made if absent.
      keep: How many of the newest to keep.
      read_only: Whether to leave the folder as it is, which another process may be
        writing; nothing is made, saved or deleted.
    """

    def __init__(self, directory: Path, keep: int = 2, *, read_only: bool = False):
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
            ),
            item_names=("state", "data"),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator) -> None:
        """Starts to save; returns when ``state`` may be overwritten.

        Args:
          step: Number of updates done.
          state: The training state.
          data: The iterator over training batches, which stands at that step.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_pytree(state)),  # type: ignore[call-arg]
                data=grain_checkpoint.CheckpointSave(data),  # type: ignore[call-arg]
            ),
        )

    def restore_state(self, step: int, like: TrainState) -> TrainState:
        """The training state at ``step``.

        Args:
          step: One of `steps`.
          like: Shapes, types and shardings to restore into.

        Returns:
          The state, sharded as ``like``.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_as_pytree(like))  # type: ignore[call-arg]
            ),
        )
        return TrainState(**restored["state"])

    def restore_data(self, step: int, data: grain.DatasetIterator) -> None:
        """Moves ``data`` to where it stood at ``step``."""
        self._manager.restore(
            step,
            args=ocp.args.Composite(
                data=grain_checkpoint.CheckpointRestore(data)  # type: ignore[call-arg]
            ),
        )

    def close(self) -> None:
        """Waits for pending saves."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_pytree(state: TrainState) -> dict:
    """The state as the containers that Orbax names in its files."""
    return {
        "step": state.step,
        "params": state.params,
        "aggregator_state": state.aggregator_state,
        "optimizer_state": state.optimizer_state,
        "key": state.key,
    }
