"""Reading a run's folder: what the trainer wrote, checked, and nothing else.

A finished run's folder holds ``config.json``, ``metrics.jsonl`` and ``result.json``;
``timings.jsonl`` and ``samples.npz`` are optional. JSON numbers that are ``null`` are
read as absent.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mtl_jax.archives import read_npz
from mtl_jax.report.checks import check_result, check_timing

MAX_DOCUMENT_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of one finished run's folder.

    Attributes:
      path: The folder.
      config_fields: Every configuration field by its dotted path.
      result: The final metrics, sources, cost and versions.
      records: One mapping of flat names to values a logged step, in order.
      timings: One mapping a timed step; empty if none were kept.
      samples: Test examples with targets and predictions by flat name; may be empty.
    """

    path: Path
    config_fields: Mapping[str, Any]
    result: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    timings: tuple[Mapping[str, Any], ...]
    samples: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of every task-by-task matrix."""
        return tuple(self.result["tasks"])

    def names(self, prefix: str) -> tuple[str, ...]:
        """The logged names that begin with ``prefix``, in order of first appearance."""
        found = {
            name: None
            for record in self.records
            for name in record
            if name.startswith(prefix)
        }
        return tuple(found)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The logged values of one name.

        Args:
          name: Flat name, such as ``"surface/loss"`` or ``"all/cosine"``.

        Returns:
          The steps ``[logged]`` (int64) and the values ``[logged, ...]`` (float64, NaN
          for ``null``); steps without this name are left out.

        Raises:
          ValueError: If the values are not numbers or change shape.
        """
        logged = [
            (record["step"], record[name])
            for record in self.records
            if record.get(name) is not None
        ]
        steps = np.array([step for step, _ in logged], np.int64)
        try:
            values = np.array([value for _, value in logged], np.float64)
        except (OverflowError, TypeError, ValueError):
            raise ValueError(
                f"{self.path / 'metrics.jsonl'}: {name!r} is not a number or an array "
                "of one shape at every step: the file is damaged, run again."
            ) from None
        return steps, values


def read_run(path: Path) -> Run:
    """Reads and checks the folder of a finished run.

    Args:
      path: The run's folder.

    Returns:
      Its contents.

    Raises:
      ValueError: If the folder or a required file is missing, empty or damaged; names
        the file and, where there is one, the line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give the folder of a finished run.")
    if not (path / "result.json").is_file():
        raise ValueError(
            f"{path} holds no result.json: the run has not finished, so train it to "
            "its end first."
        )
    result = _read_object(path / "result.json")
    check_result(path / "result.json", result)
    records = tuple(_read_lines(path / "metrics.jsonl"))
    if not records:
        raise ValueError(f"{path / 'metrics.jsonl'} is empty: train the run again.")
    timings = path / "timings.jsonl"
    fields = _read_object(path / "config.json").get("fields") or {}
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"{path / 'config.json'} has fields that are no object: restore it."
        )
    return Run(
        path=path,
        config_fields=fields,
        result=result,
        records=records,
        timings=tuple(_read_timings(timings)) if timings.is_file() else (),
        samples=_read_samples(path / "samples.npz"),
    )


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    """A file, open to be read."""
    if not file.is_file():
        # Reading something else, such as a pipe, might never end.
        raise ValueError(
            f"{file.parent} holds no {file.name}: give the folder of a finished run."
        )
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise ValueError(f"{file} can't be read ({error}): restore it.") from None


def _split(file: Path) -> Iterator[bytes]:
    """The lines of a file, of which a stranger's may be of any length."""
    with _reading(file) as opened:
        yield from iter(lambda: opened.readline(MAX_DOCUMENT_BYTES), b"")


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    if file.is_file() and file.stat().st_size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{file} has {file.stat().st_size:,} bytes, more than any run writes: "
            "restore it."
        )
    with _reading(file) as opened:
        text = opened.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        reason = getattr(error, "msg", None) or str(error)
        raise ValueError(
            f"{file}, line {line}: not valid JSON ({reason}): the file is truncated or "
            "damaged, run again."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{file} holds a {type(value).__name__}: it must be an object."
        )
    return value


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, each with an integer ``step``."""
    for number, line in enumerate(_split(file), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise ValueError(
                f"{file}, line {number}: not valid JSON ({reason}): the line is "
                "truncated or damaged, so remove it or continue the run."
            ) from None
        step = value.get("step") if isinstance(value, dict) else None
        if type(step) is not int or not 0 <= step < 2**63:
            raise ValueError(
                f"{file}, line {number}: not an object with an integer 'step': remove "
                "the line or continue the run."
            )
        yield value


def _read_timings(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_lines(file), start=1):
        check_timing(file, number, line)
        yield line


def _read_samples(file: Path) -> dict[str, np.ndarray]:
    """The arrays of ``samples.npz``, or none where there is no such file."""
    if not file.is_file():
        return {}
    try:
        return read_npz(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} can't be read ({error}): delete it to report without samples."
        ) from None
