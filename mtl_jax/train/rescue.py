"""What becomes of a run whose folder can no longer be written."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import grain

from mtl_jax.sharding.distributed import check_shared, is_main
from mtl_jax.train.agreement import first_told
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.run_folder import (
    IDENTITY,
    RunFolder,
    RunFolderError,
    storage_fault,
    to_json,
)
from mtl_jax.train.state import TrainState

Made = TypeVar("Made")


class UnwritableError(RunFolderError):
    """The folder of a run cannot be written any more, as all its processes say.

    The message tells what is saved, and where.
    """


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A second place for a run.

    Attributes:
      path: The folder, which holds no run; of several processes the same.
      document: Content of the run's ``config.json``.
    """

    path: Path
    document: Mapping[str, Any]


@dataclasses.dataclass
class Unwritten:
    """What was to be written to a run's folder, and may not be there.

    Attributes:
      lines: Names of logs, and a line for each.
      documents: Names of JSON files, and their contents.
    """

    lines: list[tuple[str, Mapping[str, Any]]]
    documents: dict[str, Mapping[str, Any]]


def check_fallback(path: Path, run: Path) -> None:
    """Checks that a run can be saved in a folder if its own fails.

    All processes must call it; the first one looks.

    Args:
      path: The folder; one that is absent is made, and removed again.
      run: The run's own, which need not be there yet.

    Raises:
      RunFolderError: In all processes, if one of the two folders is in the other, the
        folder is not empty, it cannot be written, or not all processes see it.
    """
    absent = not path.exists()
    fault = None
    try:
        if is_main():
            _check_alone(path, run)
    except (OSError, ValueError) as error:
        fault = error
    told = first_told(None if fault is None else str(fault))
    if told is not None:
        raise RunFolderError(told) from fault
    try:
        check_shared(path)
    except ValueError as error:
        raise RunFolderError(
            f"--fallback-dir is {path}, which is not the same folder for all "
            "processes; choose one on storage that they share"
        ) from error
    finally:
        if absent and is_main():
            path.rmdir()


def _check_alone(path: Path, run: Path) -> None:
    """The part of `check_fallback` for one process, which leaves the folder there."""
    there, own = path.resolve(), run.resolve()
    if there == own or own in there.parents:
        raise RunFolderError(
            f"--fallback-dir is {path}, which is in the run folder {run}; choose one "
            "outside, best on another disk"
        )
    if there in own.parents:
        raise RunFolderError(
            f"--fallback-dir is {path}, which the run folder {run} is in; choose one "
            "beside it, best on another disk"
        )
    if (path / "config.json").exists():
        raise RunFolderError(
            f"--fallback-dir is {path}, which holds a run; continue that by --workdir "
            f"{path}, or choose another"
        )
    try:
        RunFolder(path)
        empty = not any(path.iterdir())
    except (OSError, RunFolderError) as error:
        cause = error.__cause__ or error
        raise RunFolderError(
            f"--fallback-dir is {path}, which cannot be written "
            f"({getattr(cause, 'strerror', cause)}); choose another"
        ) from error
    if not empty:
        raise RunFolderError(
            f"--fallback-dir is {path}, which is not empty; choose another, or empty it"
        )


def rescue(
    folder: RunFolder,
    description: Mapping[str, Any],
    fallback: Fallback | None,
    fault: str,
    unwritten: Unwritten,
    step: int,
    state: TrainState,
    data: grain.DatasetIterator,
) -> UnwritableError:
    """Saves a run elsewhere, if there is an elsewhere.

    All processes must call it, and know of the fault. None may be saving any more, but
    for saves that have failed.

    Args:
      folder: Its own.
      description: What is kept in each of its checkpoints besides the state.
      fallback: Where to save it.
      fault: Why its own folder does not do.
      unwritten: What may not be there.
      step: Number of updates done.
      state: The training state then.
      data: The iterator over training batches, which stands there.

    Returns:
      What to tell the user, in all processes the same.
    """
    failed = f"cannot write to the run folder {folder.path} any more: {fault}"
    if fallback is None:
        return UnwritableError(
            f"{failed}; stopped at step {step}: the same command continues from the "
            "last checkpoint once that is mended (with --fallback-dir DIR all would "
            "have been saved there)"
        )
    directory = fallback.path / "checkpoints"
    try:
        lost = _together(lambda: _write_logs(folder, fallback, unwritten, step))
        # All processes are in the midst of these two: one that fails cannot tell.
        checkpoints = Checkpoints(directory, description, barriers="fallback")
        checkpoints.save(step, state, data)
        _together(checkpoints.wait)
        checkpoints.close()
        # Written last: its presence says that there is a run.
        copy = RunFolder(fallback.path, writes=is_main())
        _together(lambda: copy.write_json("config.json", fallback.document))
    except _FailsTooError as error:
        return UnwritableError(
            f"{failed}; nor could it be saved in {fallback.path}: {error}; the same "
            "command continues from the last checkpoint once that is mended"
        )
    names = first_told(" and ".join(lost) or None)
    without = "" if names is None else f", but for {names}, which could not be read"
    return UnwritableError(
        f"{failed}; all is saved at step {step} in {fallback.path}{without}; to "
        f"continue, give the same command --workdir {fallback.path}, and no or another "
        "--fallback-dir"
    )


class _FailsTooError(Exception):
    """Where a run was to be saved, storage fails as well."""


def _together(part: Callable[[], Made]) -> Made:
    """Does a part of the work in all processes; fails in all, if storage does in one.

    Raises:
      _FailsTooError: Then.
    """
    made, fault = None, None
    try:
        made = part()
    except (OSError, ValueError) as error:
        cause = error.__cause__
        fault = storage_fault(cause if isinstance(cause, OSError) else error)
        if fault is None:
            raise
    told = first_told(fault)
    if told is not None:
        raise _FailsTooError(told)
    return cast(Made, made)


def _write_logs(
    folder: RunFolder, fallback: Fallback, unwritten: Unwritten, step: int
) -> list[str]:
    """Writes logs and documents; returns names of those that cannot be read."""
    if not is_main():
        return []
    copy = RunFolder(fallback.path)
    lost = _copy_logs(folder, copy, unwritten.lines, step)
    if identity := _identity(folder):
        copy.write_json(IDENTITY, identity)
    for name, document in unwritten.documents.items():
        copy.write_json(name, document)
    (fallback.path / "checkpoints").mkdir()
    return lost


def _identity(folder: RunFolder) -> Mapping[str, Any] | None:
    """What the run is called at Weights & Biases, where that can be read."""
    try:
        return folder.read_json(IDENTITY)
    except (OSError, RunFolderError):
        return None


def _copy_logs(
    folder: RunFolder,
    copy: RunFolder,
    unwritten: Sequence[tuple[str, Mapping[str, Any]]],
    step: int,
) -> list[str]:
    """Copies all logs up to a step; returns names of those that cannot be read."""
    lost = []
    try:
        names = {path.name for path in folder.path.glob("*.jsonl")}
    except OSError:
        names = set()
    for name in sorted(names | {name for name, _ in unwritten}):
        try:
            text = (folder.path / name).read_text()
        except (OSError, UnicodeError) as error:
            # It may be that nothing had to be logged so far.
            if not isinstance(error, FileNotFoundError) or not folder.path.is_dir():
                lost.append(name)
            text = ""
        # The last may be half-written.
        complete = [line for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        (copy.path / name).write_text("".join(complete))
        missing = [to_json(line) for log, line in unwritten if log == name]
        written = []
        # One that is damaged, or none of a run's, is left as it is.
        with contextlib.suppress(RunFolderError):
            written = copy.truncate(
                name, step, lambda line, known=missing: line if line in known else None
            )
        for line in missing:
            if line not in written:
                copy.append(name, line)
    return lost
