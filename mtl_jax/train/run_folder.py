"""The folder of a run: its config, its metrics, its result."""

import errno
import itertools
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

IDENTITY = "wandb.json"
"""Name of the file that says what the run is called at Weights & Biases."""

MOST_BYTES = 2**26
"""Length of a document or of a line of a log, beyond any that a run writes."""

Kept = TypeVar("Kept")


class RunFolderError(ValueError):
    """A run's folder cannot be used: files that are damaged, absent or of another run.

    The message is for whoever owns the folder: it says which file, and what to do.
    """


class RunFolder:
    """Files of one run.

    Args:
      path: The folder; made if absent and ``writes``.
      writes: Whether this process writes: not where the run is only read, and of
        several processes that train it together one does. What the others would write
        is dropped.

    Raises:
      RunFolderError: If the folder cannot be made or written.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self.path = path
        self._writes = writes
        if not writes:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise RunFolderError(
                f"cannot write to the run folder {path}: {error.strerror}; "
                "choose another --workdir"
            ) from error

    def write_json(
        self, name: str, document: Mapping[str, Any], *, durable: bool = True
    ) -> None:
        """Writes a document whole or not at all.

        Args:
          name: Of the file.
          document: Its content.
          durable: Whether it is on the disk before it takes the place of the one
            before, so that a power cut leaves one of them.
        """
        text = json.dumps(document, indent=1, allow_nan=False)
        if not self._writes:
            return
        temporary = self.path / f".{name}.tmp"
        # What a killed process left, or a stranger's link.
        temporary.unlink(missing_ok=True)
        with open_without_links(temporary, "x") as file:
            file.write(text + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, self.path / name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A document of the run, None if it is not there.

        Raises:
          RunFolderError: If the file is not a JSON object.
        """
        try:
            document = json.loads(read_document(self.path / name))
            if not isinstance(document, dict):
                raise ValueError("it is no object")
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{self.path / name} is not valid JSON ({error}); mend this file or "
                "delete it alone: the command that trains the run then goes on from "
                "its checkpoints"
            ) from error
        return document

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds one line of JSON to a log; numbers that are not finite become null.

        Raises:
          RunFolderError: If there is a link in the place of the log.
        """
        text = json.dumps(to_json(line), allow_nan=False)
        if self._writes:
            with open_without_links(self.path / name, "a") as file:
                file.write(text + "\n")

    def truncate(
        self, name: str, last_step: int, keep: Callable[[dict[str, Any]], Kept | None]
    ) -> list[Kept]:
        """Drops the lines of a log after ``last_step``, a half-written one included.

        Args:
          name: Of the log.
          last_step: Step of the last line to keep.
          keep: What to return of a line that is kept; a log may be long.

        Returns:
          What ``keep`` makes of the lines that are left, without None.

        Raises:
          RunFolderError: If a line before that is not one of a run, or there is a link
            or a pipe in the place of the log.
        """
        path = self.path / name
        kept, end = [], 0
        try:
            file = open_without_links(path, "r+b" if self._writes else "rb")
        except FileNotFoundError:
            return []
        with file:
            lines = iter(lambda: file.readline(MOST_BYTES), b"")
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and len(line) < MOST_BYTES:
                    break
                try:
                    record = json.loads(line)
                    late = record["step"] > last_step
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise RunFolderError(
                        f"line {number} of {path} is damaged; mend or delete the file"
                    ) from error
                if late:
                    break
                end += len(line)
                if (what := keep(record)) is not None:
                    kept.append(what)
            if self._writes:
                # A kill leaves the file as it was or cut, and it is cut again then.
                file.truncate(end)
        return kept


def read_document(path: Path) -> bytes:
    """Content of a file that is read whole.

    Raises:
      OSError: If it cannot be read, as FileNotFoundError where it is not there.
      ValueError: If it is no file, or longer than any that a run writes.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        # A pipe would be waited for, and a device never ends.
        raise ValueError("it is no ordinary file")
    if facts.st_size > MOST_BYTES:
        raise ValueError(f"it has {facts.st_size:,} bytes, more than any run writes")
    return path.read_bytes()


def open_without_links(path: Path, mode: str) -> IO[Any]:
    """Opens a file to write it, and not what a link in its place points to.

    A stranger's run folder may hold any links, and what is written to a run must stay
    in its folder.

    Args:
      path: The file.
      mode: As of `open`.

    Raises:
      RunFolderError: If it is a link or a pipe.
    """
    try:
        return open(path, mode, opener=_opener)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RunFolderError(
            f"{path} is a symbolic link, through which nothing is written; put the "
            "file itself there, or delete the link"
        ) from error


def refuse_links(folder: Path, inside: str = "**/*") -> None:
    """Refuses a folder of a run into which links could lead what is written to it.

    Args:
      folder: What is in a run's folder, and written by names of others' choice; it may
        be absent.
      inside: Pattern of what in it must not be a link either; all by default.

    Raises:
      RunFolderError: If it is a symbolic link, or holds one of that pattern.
    """
    # What a link leads to may be large, and is not looked through.
    found = () if folder.is_symlink() else folder.glob(inside)
    for path in itertools.chain([folder], found):
        if path.is_symlink():
            raise RunFolderError(
                f"{path} is a symbolic link, through which nothing is written; put the "
                "folder or file itself there, or delete the link"
            )


def _opener(path: str, flags: int) -> int:
    # Not on all systems. A pipe would be waited for.
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | more, 0o666)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunFolderError(f"{path} is a pipe; delete it")
    return descriptor


def storage_fault(error: Exception) -> str | None:
    """What the operating system says of storage that failed; None of other faults.

    Args:
      error: From files, also by Orbax, whose storage library has its own exceptions.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = re.search(r"\[os_error_code='(\d+)'", str(error))
        number = int(found[1]) if found else None
    return None if number is None else os.strerror(number)


def to_json(value: Any) -> Any:
    """Arrays and NumPy numbers as JSON values, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
