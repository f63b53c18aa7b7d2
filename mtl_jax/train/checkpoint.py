"""Checkpoints: training state and data position together, written by Orbax."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mtl_jax.sharding.rules import path_name
from mtl_jax.train.run_folder import RunFolderError
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
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
            ),
            item_handlers={  # type: ignore[arg-type]
                "state": ocp.StandardCheckpointHandler(),
                # Of all processes the same, so that any number of them can go on.
                "data": ocp.JsonCheckpointHandler(),
            },
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
                data=ocp.args.JsonSave(data.get_state()),  # type: ignore[call-arg]
            ),
        )

    def restore_state(self, step: int, like: TrainState) -> TrainState:
        """The training state at ``step``.

        Args:
          step: One of `steps`.
          like: Shapes, types and shardings to restore into.

        Returns:
          The state, sharded as ``like``.

        Raises:
          RunFolderError: If it is damaged, or not of the shapes of ``like``.
        """
        wanted = _as_pytree(like)
        with self._explained(step):
            self._check_files(step)
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise ValueError("its metadata are missing")
            self._check_fits(step, saved, wanted)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(wanted)  # type: ignore[call-arg]
                ),
            )
        return TrainState(**restored["state"])

    def restore_data(self, step: int, data: grain.DatasetIterator) -> None:
        """Moves ``data`` to where it stood at ``step``.

        Raises:
          RunFolderError: If the checkpoint is damaged.
        """
        with self._explained(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
            )
            data.set_state(restored["data"])

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except RunFolderError:
            raise
        except (KeyError, OSError, TypeError, ValueError) as error:
            # Orbax and its storage raise each of these, with pages of text.
            reason = str(error).partition("\n")[0][:100]
            folder = self._directory / str(step)
            raise RunFolderError(
                f"the checkpoint {folder} is damaged ({reason}); restore it from a "
                "copy, or delete it to use the one before"
            ) from error

    def _check_files(self, step: int) -> None:
        # Storage threads report missing files on stderr themselves.
        for manifest in (self._directory / str(step)).glob("state/**/manifest.ocdbt"):
            if not any((manifest.parent / "d").iterdir()):
                raise ValueError("its arrays are missing")

    def _check_fits(self, step: int, saved: Any, wanted: Any) -> None:
        there, here = _shapes(saved), _shapes(wanted)
        different = [
            path for path in {**here, **there} if here.get(path) != there.get(path)
        ]
        if different:
            # Parameters tell more than what optimizers keep for each of them.
            path = min(different, key=lambda path: not path.startswith("params/"))
            old, new = (shapes.get(path, "absent") for shapes in (there, here))
            raise RunFolderError(
                f"the checkpoint {self._directory / str(step)} does not fit the "
                f"config: {path} is {old} in the checkpoint and {new} in the config, "
                f"and {len(different) - 1} more differ; use the config that it was "
                "trained with, or start a run of its own from it by initialize"
            )

    def close(self) -> None:
        """Waits for pending saves."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_pytree(state: TrainState) -> dict:
    """The state as the containers that Orbax names in its files."""
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }


def _shapes(tree: Any) -> dict[str, str]:
    """Type and shape of every array by its path; saved keys are arrays of integers."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        shapes[path_name(path)] = f"{jnp.dtype(leaf.dtype)} {tuple(leaf.shape)}"
    return shapes
