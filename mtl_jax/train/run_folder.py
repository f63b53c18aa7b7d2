"""The folder of a run: its config, its metrics, its result."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class RunFolderError(ValueError):
    """A run's folder cannot be used: files that are damaged, absent or of another run.

    The message is for whoever owns the folder: it says which file, and what to do.
    """


class RunFolder:
    """Files of one run.

    Args:
      path: The folder; made if absent.
      writes: Whether this process writes; of several that run together, one does, and
        what the others would write is dropped.

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
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"cannot write to the run folder {path}: {error.strerror}; "
                "choose another --workdir"
            ) from error

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Writes a document whole or not at all."""
        text = json.dumps(document, indent=1, allow_nan=False)
        if not self._writes:
            return
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path / name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A document of the run, None if it is not there.

        Raises:
          RunFolderError: If the file is not a JSON object.
        """
        try:
            document = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{self.path / name} is not valid JSON ({error}); delete the run "
                "folder or choose another"
            ) from error
        if not isinstance(document, dict):
            raise RunFolderError(
                f"{self.path / name} is not a JSON object; delete the run folder or "
                "choose another"
            )
        return document

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds one line of JSON to a log; numbers that are not finite become null."""
        text = json.dumps(to_json(line), allow_nan=False)
        if self._writes:
            with (self.path / name).open("a") as file:
                file.write(text + "\n")

    def truncate(self, name: str, last_step: int) -> list[dict[str, Any]]:
        """Drops the lines of a log after ``last_step``, a half-written one included.

        Returns:
          The lines that are left.

        Raises:
          RunFolderError: If a line before that is not one of a run.
        """
        path = self.path / name
        if not path.exists():
            return []
        text, kept = b"", []
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
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
            text += line
            kept.append(record)
        if self._writes:
            temporary = path.with_name(f".{name}.tmp")
            temporary.write_bytes(text)
            os.replace(temporary, path)
        return kept


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
