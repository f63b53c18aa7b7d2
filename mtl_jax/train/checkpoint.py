"""Checkpoints: training state and data position together, written by Orbax."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mtl_jax.sharding.distributed import is_main
from mtl_jax.train.agreement import told_by_all
from mtl_jax.train.array_sizes import array_sizes_checked
from mtl_jax.train.description import (
    MOST,
    array_differences,
    array_types,
    config_differences,
    shortened,
    task_differences,
)
from mtl_jax.train.integrity import (
    FORMAT,
    CheckedTemporaryPath,
    DamagedCheckpointError,
    check_contents,
    check_files,
)
from mtl_jax.train.run_folder import RunFolderError, refuse_links, storage_fault
from mtl_jax.train.state import TrainState

FILE_BYTES = 2**27
"""Bytes at which arrays go to a new file, so that threads can check several at once."""

UNREADABLE = (
    *(AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError),
)
"""What Orbax and its storage raise where files are not what they expect."""

POLL_SECONDS = 0.05
"""How often several processes tell each other how their saves go."""


class Checkpoints:
    """The checkpoints of one run, saved in the background.

    Each has a manifest of its files (`mtl_jax.train.integrity`), and nothing is read
    that does not agree with it.

    Args:
      directory: Folder that holds them; made if absent.
      description: Of the run that saves or restores, from
        `mtl_jax.train.description.describe`; without, checkpoints of any run are
        restored whose arrays fit.
      keep: How many of the newest to keep.
      read_only: Whether to leave the folder as it is, which another process may be
        writing; nothing is made, saved or deleted.
      barriers: What the points where several processes wait for each other are called.
        Where saves of two folders overlap, it must tell them apart.

    Raises:
      RunFolderError: If the folder or a checkpoint in it is a symbolic link.
    """

    def __init__(
        self,
        directory: Path,
        description: Mapping[str, Any] | None = None,
        *,
        keep: int = 2,
        read_only: bool = False,
        barriers: str | None = None,
    ):
        self._directory = directory
        self._description = dict(description or {})
        self._read_only = read_only
        # Below, nothing is written, but for what is made anew.
        refuse_links(directory, "*")
        self._given_up = False
        self._manager = _Manager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
                temporary_path_class=CheckedTemporaryPath,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=barriers
                ),
                # Metadata may be damaged, and are looked at once they are checked.
                lightweight_initialize=True,
            ),
            item_handlers={  # type: ignore[arg-type]
                # Trained arrays hardly compress, and it takes longer than the rest.
                "state": ocp.PyTreeCheckpointHandler(
                    use_zarr3=True, use_compression=False
                ),
                # Of all processes the same, so that any number of them can go on.
                "data": ocp.JsonCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
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

        Raises:
          RunFolderError: If Orbax writes nothing, as it does without a word where
            there is a checkpoint of that step or a later one.
        """
        saved = _as_pytree(state)
        description = {"format": FORMAT, "step": step, **self._description}
        description["arrays"] = array_types(saved)
        written = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(  # type: ignore[call-arg]
                    saved, ocdbt_target_data_file_size=FILE_BYTES
                ),
                data=ocp.args.JsonSave(data.get_state()),  # type: ignore[call-arg]
                run=ocp.args.JsonSave(description),  # type: ignore[call-arg]
            ),
        )
        if not written:
            raise RunFolderError(
                f"the checkpoint of step {step} is not written, as {self._directory} "
                f"has one of step {self.latest_step}; move that out of the folder, and "
                "the run continues from the one before"
            )

    def list_again(self) -> list[int]:
        """`steps` as they are now, where another process may save and delete."""
        self._manager.reload()
        return self.steps

    def restore_newest(
        self, like: Callable[[], TrainState]
    ) -> tuple[int, TrainState] | None:
        """The newest checkpoint that is whole.

        Newer ones that are damaged are named on stderr and, unless ``read_only``, get
        the name ``STEP.damaged``. Where another process may be training, what it has
        deleted meanwhile is no damage.

        Args:
          like: Makes what `restore_state` takes.

        Returns:
          Step and state; None if there are no checkpoints.

        Raises:
          RunFolderError: If all are damaged, or the newest that is whole is not of
            the shapes of ``like`` or is of another run. None is renamed then.
        """
        wanted: TrainState | None = None
        damaged: list[DamagedCheckpointError] = []
        listed = self.steps
        left = [*listed]
        while left:
            step = left.pop()
            wanted = wanted or like()
            try:
                state = self.restore_state(step, wanted)
            except RunFolderError as error:
                if self._read_only and (now := self.list_again())[-1:] != listed[-1:]:
                    listed, left, damaged = now, [*now], []
                    continue
                if not isinstance(error, DamagedCheckpointError):
                    raise
                damaged.append(error)
                continue
            self._pass_over(damaged, step)
            return step, state
        if not damaged:
            return None
        first, *others = damaged
        also = "".join(
            f", so is {other.folder.name} ({other.reason})" for other in others
        )
        raise RunFolderError(
            f"the checkpoint {first.folder} is damaged ({first.reason}){also}, and "
            "there is none before; restore one from a copy, or begin anew in another "
            "folder"
        )

    def restore_state(self, step: int, like: TrainState) -> TrainState:
        """The training state at ``step``.

        Args:
          step: One of `steps`.
          like: Shapes, types and shardings to restore into.

        Returns:
          The state, sharded as ``like``.

        Raises:
          DamagedCheckpointError: If it is damaged.
          RunFolderError: If it is not of the shapes of ``like``, of a run with other
            tasks, or of a later format.
        """
        folder = self._directory / str(step)
        wanted = _as_pytree(like)
        # Before anything is restored: storage that reads damage prints pages itself,
        # and what one process finds all must know before they restore together.
        with array_sizes_checked(folder):
            _check_together(folder)
        with self._explained(folder):
            self._check_fits(step, folder, wanted)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(  # type: ignore[call-arg]
                        wanted,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(
                            wanted
                        ),
                    )
                ),
            )
        return TrainState(**restored["state"])

    def restore_data(self, step: int, data: grain.DatasetIterator) -> None:
        """Moves ``data`` to where it stood at ``step``.

        Args:
          step: One of `steps`.
          data: An iterator over training batches.

        Raises:
          DamagedCheckpointError: If the checkpoint is damaged.
          RunFolderError: If it cannot be read.
        """
        folder = self._directory / str(step)
        check_files(folder)
        with self._explained(folder):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
            )
            data.set_state(restored["data"])

    @contextlib.contextmanager
    def _explained(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except RunFolderError:
            raise
        except UNREADABLE as error:
            # Orbax and its storage raise each of these, with pages of text.
            reason = str(error).partition("\n")[0][:100]
            fault = storage_fault(error)
            if fault is not None or isinstance(error, OSError):
                raise RunFolderError(
                    f"the checkpoint {folder} cannot be read: {fault or reason}; try "
                    "again, and look after the storage if it stays so"
                ) from error
            raise RunFolderError(
                f"the checkpoint {folder} cannot be restored ({reason}), though its "
                "files are as they were written; use the versions of the packages "
                f"that are named in {folder / 'run' / 'metadata'}"
            ) from error

    def _check_fits(self, step: int, folder: Path, wanted: Any) -> None:
        """Checks tasks and shapes; other differences explain, and do no harm."""
        found = self._manager.restore(
            step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
        )["run"]
        if found["step"] != step:
            raise RunFolderError(
                f"the checkpoint {folder} is that of step {found['step']}; give the "
                "folder its name again"
            )
        tasks = task_differences(found, self._description)
        shapes = array_differences(found["arrays"], array_types(wanted))
        if not tasks and not shapes:
            return
        config = config_differences(found, self._description)
        around = f" ({shortened(config, 3)})" if config else ""
        what = shortened([*tasks, *shapes], MOST - min(len(config), 3))
        raise RunFolderError(
            f"the checkpoint {folder} does not fit the config{around}: {what}; use "
            "the config that it was trained with, or start a run of its own from it by "
            "initialize"
        )

    def _pass_over(self, damaged: list[DamagedCheckpointError], used: int) -> None:
        """Names damaged checkpoints, and sets them aside."""
        for error in damaged:
            done = "passed over"
            if not self._read_only:
                aside = _free_name(error.folder)
                done = f"its new name is {aside.name}"
                if is_main():
                    os.rename(error.folder, aside)
            if is_main():
                print(
                    f"mtl-jax: warning: the checkpoint {error.folder} is damaged "
                    f"({error.reason}); {done}, and that of step {used} is used",
                    file=sys.stderr,
                )
        if damaged and not self._read_only:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()

    def wait(self) -> None:
        """Waits until pending saves are complete, or one of them has failed.

        All processes must call it. They wait for the slowest, but none for one that has
        failed: such a save is given up.

        Raises:
          Exception: What Orbax and its storage raise, in the process whose part of a
            save has failed. The others must be told.
        """
        while jax.process_count() > 1:
            failed = self._manager.failure is not None
            mine = failed, self._manager.is_saving_in_progress()
            failures, pending = multihost_utils.process_allgather(np.array(mine)).T
            self._given_up = self._given_up or bool(failures.any())
            if self._given_up or not pending.any():
                break
            time.sleep(POLL_SECONDS)
        if self._manager.failure is not None:
            raise self._manager.failure
        if not self._given_up:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves of this process, and ends what works for them."""
        # Those that are given up may wait for other processes for long.
        if not self._given_up:
            self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Tells of a save that has failed, where Orbax waits for other processes first.

    Attributes:
      failure: What its part of a save has failed with in this process.
    """

    failure: Exception | None = None

    def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
        # At the end of a save, in the background. The processes without a fault wait
        # for this one to end its part, and Orbax would have this one wait for them.
        try:
            self._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise
        super()._finalize(step, steps_to_remove)


def _check_together(folder: Path) -> None:
    """Checks a checkpoint whole, each process a part of its large files.

    Raises:
      DamagedCheckpointError: In all processes, if one finds damage.
      RunFolderError: In all processes, if one cannot read it.
    """
    damage = fault = None
    try:
        large = sorted(check_files(folder).items())
        share = large[jax.process_index() :: jax.process_count()]
        check_contents(folder, dict(share))
    except DamagedCheckpointError as error:
        damage = error.reason
    except RunFolderError as error:
        fault = str(error)
    for reason, text in zip(told_by_all(damage), told_by_all(fault), strict=True):
        if reason is not None:
            raise DamagedCheckpointError(folder, reason)
        if text is not None:
            raise RunFolderError(text)


def _free_name(folder: Path) -> Path:
    """The first name for what is set aside that is not taken."""
    name, number = folder.with_name(f"{folder.name}.damaged"), 1
    while name.exists():
        number += 1
        name = folder.with_name(f"{folder.name}.damaged.{number}")
    return name


def _as_pytree(state: TrainState) -> dict:
    """The state as the containers that Orbax names in its files."""
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }
