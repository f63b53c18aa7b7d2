"""Reading files that somebody else writes at this moment, or has damaged."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_LOG_BYTES = 8 * 2**20
MAX_DOCUMENT_BYTES = 16 * 2**20


class LogTail:
    """The end of a log of JSON lines, and then what is added to it.

    Args:
      path: The log, which need not be there yet.
      max_bytes: The most to read at once; of a longer log the beginning is left out.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES):
        self._path, self._max_bytes = path, max_bytes
        self._identity: tuple[int, int] | None = None
        self._offset, self._inside_line = 0, False
        self.damaged = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """What is new.

        A line that is not an object with an integer ``step`` is left out, and counted
        in ``damaged``. One that is half written comes once it is complete.

        Returns:
          Whether the log is another than before, so that all lines read so far are
          void, and the new lines.

        Raises:
          ValueError: If there is something else than a file that can be read.
        """
        file = open_file(self._path)
        if file is None:
            replaced, self._identity = self._identity is not None, None
            return replaced, []
        with file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            replaced = identity != self._identity or status.st_size < self._offset
            if replaced or status.st_size - self._offset > self._max_bytes:
                self._offset = max(0, status.st_size - self._max_bytes)
                self._inside_line = self._offset > 0
            if replaced:
                self._identity, self.damaged = identity, 0
            file.seek(self._offset)
            data = file.read(self._max_bytes)
        return replaced, self._take(data)

    def _take(self, data: bytes) -> list[dict[str, Any]]:
        end = data.rfind(b"\n") + 1
        if not end and len(data) == self._max_bytes:
            # A line that is longer than whatever a run writes.
            self._offset += len(data)
            self._inside_line = True
            return []
        self._offset += end
        lines = data[:end].splitlines()
        if self._inside_line and lines:
            del lines[0]
            self._inside_line = False
        records = [_record(line) for line in lines]
        found = [record for record in records if record is not None]
        self.damaged += len(records) - len(found)
        return found


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
      ValueError: If there is something else; it names the file.
    """
    file = open_file(path)
    if file is None:
        return {}
    with file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path.name} is damaged: it is too large")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is damaged: it is not valid JSON") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path.name} is damaged: it is not a JSON object")
    return document


def open_file(path: Path) -> BinaryIO | None:
    """An ordinary file, open for reading; None where there is none.

    Raises:
      ValueError: If it is something else, such as a pipe, which would keep whoever
        reads it waiting, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name} cannot be read: it is not an ordinary file")
    return os.fdopen(descriptor, "rb")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    # In Python a boolean is an integer.
    return record if type(step) is int and step >= 0 else None
