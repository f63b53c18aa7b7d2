"""What becomes of a run whose folder can no longer be written."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax

from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.run_folder import (
    IDENTITY,
    RunFolder,
    RunFolderError,
    storage_fault,
    to_json,
)
from mtl_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A second place for a run.

    Attributes:
      path: The folder, which holds no run.
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

    Of several processes, one that cannot write must not save alone.

    Args:
      path: The folder; one that is absent is made, and removed again.
      run: The run's own, which need not be there yet.

    Raises:
      RunFolderError: If there are several processes; or one of the two is in the other,
        the folder is not empty, or it cannot be written.
    """
    if jax.process_count() > 1:
        raise RunFolderError(
            f"--fallback-dir is {path}, but there are {jax.process_count()} processes; "
            "leave it out, as only a run of a single process can be saved elsewhere"
        )
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
    absent = not path.exists()
    try:
        RunFolder(path)
        empty = not any(path.iterdir())
        if absent:
            path.rmdir()
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
) -> RunFolderError:
    """Saves a run elsewhere, if there is an elsewhere.

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
      What to tell the user.
    """
    failed = f"cannot write to the run folder {folder.path} any more: {fault}"
    if fallback is None:
        return RunFolderError(
            f"{failed}; stopped at step {step}: the same command continues from the "
            "last checkpoint once that is mended (with --fallback-dir DIR all would "
            "have been saved there)"
        )
    try:
        copy = RunFolder(fallback.path)
        lost = _copy_logs(folder, copy, unwritten.lines, step)
        if identity := _identity(folder):
            copy.write_json(IDENTITY, identity)
        for name, document in unwritten.documents.items():
            copy.write_json(name, document)
        checkpoints = Checkpoints(fallback.path / "checkpoints", description)
        checkpoints.save(step, state, data)
        checkpoints.close()
        # Written last: its presence says that there is a run.
        copy.write_json("config.json", fallback.document)
    except (OSError, ValueError) as error:
        also = storage_fault(error)
        if also is None:
            raise
        return RunFolderError(
            f"{failed}; nor could it be saved in {fallback.path}: {also}; the same "
            "command continues from the last checkpoint once that is mended"
        )
    without = f", but for {' and '.join(lost)}, which could not be read" if lost else ""
    return RunFolderError(
        f"{failed}; all is saved at step {step} in {fallback.path}{without}; to "
        f"continue, give the same command --workdir {fallback.path}, and no or another "
        "--fallback-dir"
    )


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
        except OSError as error:
            # It may be that nothing had to be logged so far.
            if not isinstance(error, FileNotFoundError) or not folder.path.is_dir():
                lost.append(name)
            text = ""
        # The last may be half-written.
        complete = [line for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        (copy.path / name).write_text("".join(complete))
        missing = [to_json(line) for log, line in unwritten if log == name]
        written = copy.truncate(
            name, step, lambda line, missing=missing: line if line in missing else None
        )
        for line in missing:
            if line not in written:
                copy.append(name, line)
    return lost
