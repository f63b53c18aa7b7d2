"""The folder of a run: its config, its metrics, its result."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class RunFolder:
    """Files of one run.

    Args:
      path: The folder; made if absent.

    Raises:
      ValueError: If the folder cannot be made or written.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write to the run folder {path}: {error.strerror}; "
                "choose another --workdir"
            ) from error

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Writes a document whole or not at all."""
        text = json.dumps(document, indent=1, allow_nan=False)
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path / name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A document of the run, None if it is not there.

        Raises:
          ValueError: If the file is not a JSON object.
        """
        try:
            document = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{self.path / name} is not valid JSON ({error}); delete the run "
                "folder or choose another"
            ) from error
        if not isinstance(document, dict):
            raise ValueError(
                f"{self.path / name} is not a JSON object; delete the run folder or "
                "choose another"
            )
        return document

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds one line of JSON to a log; numbers that are not finite become null."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(to_json(line), allow_nan=False) + "\n")

    def truncate(self, name: str, last_step: int) -> None:
        """Drops the lines of a log after ``last_step``, a half-written one included.

        Raises:
          ValueError: If a line before that is not JSON.
        """
        path = self.path / name
        if not path.exists():
            return
        kept = []
        for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is damaged; mend or delete the file"
                ) from error
            if step > last_step:
                break
            kept.append(line)
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


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
