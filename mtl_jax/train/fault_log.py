"""What the host makes of the faults that steps report: counts, spikes, an end."""

import dataclasses
import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtl_jax.data.batch import Batch
from mtl_jax.train.faults import FaultReport
from mtl_jax.train.run_folder import RunFolderError, refuse_links, to_json

SPIKES = "spikes.jsonl"
FAULTS = "faults"

SHOWN = 8
"""How many records of a source a message names; the reproducer names all."""


class NumericalFaultError(Exception):
    """A run stopped as its numbers are not finite.

    Attributes:
      reproducer: Folder with the batch at fault; None if there is none.
    """

    def __init__(self, message: str, reproducer: Path | None = None):
        super().__init__(message)
        self.reproducer = reproducer


@dataclasses.dataclass
class _Pending:
    """A step whose report is on its way.

    Attributes:
      step: Its number.
      report: The report, on the devices until ``fetched``.
      fetched: The same on the host.
      index: Source name -> positions of its records, on the devices.
      rows: This process' rows of the batch, dropped once its report is here, but for
        the first that ends the run.
    """

    step: int
    report: jax.Array
    index: Mapping[str, jax.Array]
    rows: Batch | None
    fetched: FaultReport | None = None


class FaultLog:
    """Follows the reports of the steps of a run, and waits for none but a line's.

    Reports are taken as they come, so that the rows of a batch are kept no longer than
    its step takes. What is done about them depends on their order alone and happens
    with the lines of metrics, in all processes alike.

    Args:
      path: The run's folder.
      task_names: Names of the tasks in order.
      labels: Source name -> tasks that it labels.
      limit: Number of faulty steps in a row that stops the run; so does a task at fault
        in as many steps in a row of those that have its labels.
      lines: Lines of metrics that earlier parts of the run left.

    Raises:
      RunFolderError: If the faults that the lines count are no numbers, or the folder
        of batches at fault is a symbolic link or holds one.
    """

    def __init__(
        self,
        path: Path,
        task_names: Sequence[str],
        labels: Mapping[str, Sequence[str]],
        limit: int,
        lines: Sequence[Mapping[str, Any]],
    ):
        refuse_links(path / FAULTS)
        self._path, self._task_names, self._labels = path, task_names, labels
        self._limit = limit
        self._pending: deque[_Pending] = deque()
        # Those of them whose reports are not here yet.
        self._awaited: deque[_Pending] = deque()
        self._first_fatal: _Pending | None = None
        # The same, once all processes have taken the step.
        self._fatal: _Pending | None = None
        names = [*(f"{task}/left_out" for task in task_names), "all/skipped_steps"]
        for line in lines:
            if not all(isinstance(line.get(name) or 0, int) for name in names):
                raise RunFolderError(
                    f"the line of step {line['step']} in metrics.jsonl is damaged; "
                    "mend or delete the file"
                )
        # Up to the last step taken, and up to the last line: a line tells of all steps
        # since the one before, whichever part of the run they were in.
        self._told = {
            name: sum(line.get(name) or 0 for line in lines) for name in names
        }
        self._counts = dict(self._told)

    def follow(self, step: int, rows: Batch, batch: Batch, report: jax.Array) -> None:
        """Begins to follow a step that the devices have begun.

        Args:
          step: Its number.
          rows: What this process put of the batch on its devices.
          batch: The batch on the devices.
          report: Its report, on the devices.
        """
        index = {source: examples.index for source, examples in batch.items()}
        pending = _Pending(step, report, index, rows)
        self._pending.append(pending)
        self._awaited.append(pending)
        while self._awaited and self._awaited[0].report.is_ready():  # type: ignore[attr-defined]
            self._fetch_next()

    def take(self, step: int) -> list[dict[str, Any]]:
        """Takes note of all steps up to one, which is done.

        Returns:
          Lines about the spikes among them, for ``spikes.jsonl``.
        """
        lines = []
        while self._pending and self._pending[0].step <= step:
            pending = self._pending.popleft()
            while pending.fetched is None:
                self._fetch_next()
            report = pending.fetched
            for k, task in enumerate(self._task_names):
                self._counts[f"{task}/left_out"] = int(report.left_out[k])
                if report.spike[k]:
                    lines.append(
                        {
                            "step": pending.step,
                            "task": task,
                            "loss": float(report.loss[k]),
                            "mean": float(report.mean[k]),
                            "limit": float(report.limit[k]),
                            "records": self._records(pending, [task]),
                        }
                    )
            self._counts["all/skipped_steps"] = int(report.skipped_steps[0])
            if pending is self._first_fatal:
                self._fatal = pending
        return lines

    def line(self) -> dict[str, int]:
        """Faults of the steps taken since the last call, by name of the metric."""
        since = {name: n - self._told[name] for name, n in self._counts.items()}
        self._told = dict(self._counts)
        return since

    def check(self) -> None:
        """Stops the run where it must not go on, and saves what shows why.

        Raises:
          NumericalFaultError: If a step taken was one faulty step in a row too many, or
            left parameters that are not finite.
        """
        if self._fatal is None:
            return
        fatal, self._fatal = self._fatal, None
        report = fatal.fetched
        assert report is not None
        blamed = report.faulty
        alone = report.finite[0] and report.in_a_row[0] < self._limit
        if alone:
            blamed = blamed * (report.task_in_a_row >= self._limit)
        tasks = [n for k, n in enumerate(self._task_names) if blamed[k]]
        records = self._records(fatal, tasks)
        named = "; ".join(f"{source}: {_some(ids)}" for source, ids in records.items())
        if report.finite[0]:
            what = "the loss or gradient of " + " and ".join(map(repr, tasks))
            if not tasks:
                what = "an auxiliary loss, or the gradient of all tasks together,"
            was = f"{what} was not finite at step {fatal.step}"
            count = int(report.in_a_row[0])
            if alone:
                was += f", as in the {self._limit} latest steps with labels of it"
            elif count > 1:
                was += f", the last of {count} faulty steps in a row"
        else:
            was = f"the update of step {fatal.step} left parameters that are not finite"
        try:
            where = self._save(fatal, report, tasks, records)
        except OSError as error:
            where, saved = None, f"its batch could not be saved: {error.strerror}"
        else:
            saved = f"its batch is in {where}"
        raise NumericalFaultError(f"{was} (records of {named}); {saved}", where)

    def _fetch_next(self) -> None:
        pending = self._awaited.popleft()
        report = pending.fetched = FaultReport(*np.asarray(pending.report))
        most = max(report.in_a_row[0], *(report.task_in_a_row * report.faulty))
        fatal = most >= self._limit or not report.finite[0]
        if fatal and self._first_fatal is None:
            self._first_fatal = pending
        else:
            pending.rows = None

    def _records(self, pending: _Pending, tasks: Sequence[str]) -> dict[str, list[int]]:
        """Positions of the batch's records, by source that labels any of the tasks."""
        return {
            source: _on_host(pending.index[source]).tolist()
            for source, labelled in self._labels.items()
            if not tasks or set(tasks) & set(labelled)
        }

    def _save(
        self,
        pending: _Pending,
        report: FaultReport,
        tasks: Sequence[str],
        records: Mapping[str, Sequence[int]],
    ) -> Path:
        """Writes the batch, every process its rows, and what was wrong with it."""
        where = self._path / FAULTS / str(pending.step)
        where.mkdir(parents=True, exist_ok=True)
        process = jax.process_index()
        assert pending.rows is not None
        arrays: Any = _arrays(pending.rows)
        np.savez(where / f"batch_{process}.npz", **arrays)
        if process == 0:
            document = {
                "step": pending.step,
                "tasks": list(tasks),
                "losses": dict(zip(self._task_names, report.loss, strict=True)),
                "records": records,
            }
            text = json.dumps(to_json(document), indent=1, allow_nan=False)
            (where / "fault.json").write_text(text + "\n")
        return where


def _on_host(index: jax.Array) -> np.ndarray:
    """A global array of the batch, from all processes: all of them must ask for it."""
    if index.is_fully_addressable:
        return np.asarray(index)
    return multihost_utils.process_allgather(index, tiled=True)


def _arrays(rows: Batch) -> dict[str, np.ndarray]:
    arrays = {}
    for source, examples in rows.items():
        arrays[f"{source}/input"] = examples.inputs
        arrays[f"{source}/index"] = examples.index
        for task, target in examples.targets.items():
            arrays[f"{source}/{task}/target"] = target
            arrays[f"{source}/{task}/mask"] = examples.mask[task]
    return arrays


def _some(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(map(str, ids[:SHOWN])) + more
